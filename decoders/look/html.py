"""The file of a page: its data, its style and its script in one, and a frame for it in a notebook."""

import json
from html import escape
from pathlib import Path

from .drawing import STYLE

MOST = 512  # tokens that a page shows
# In this order one script: each uses what stands in front of it.
SCRIPTS = (
    "parts",
    "text",
    "attention",
    "lens",
    "attribution",
    "magnitudes",
    "picture",
    "block",
    "two",
    "start",
)


def filled(title: str, content: dict) -> str:
    """The file: text of others stays text, in JSON without `<`, which no HTML parser can take for a tag."""
    here = Path(__file__).parent
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char, written in (("<", "\\u003c"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029")):
        text = text.replace(char, written)
    style = (here / "look.css").read_text(encoding="utf-8") + STYLE
    script = "\n".join((here / "js" / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline';
 script-src 'unsafe-inline'; img-src data:">
<title>{escape(title)}</title><style>{style}</style></head>
<body><noscript>This page draws itself: it needs JavaScript, but no network.</noscript>
<script type="application/json" id="data">{text}</script>
<script>{script}</script></body></html>
"""


def in_frame(page: str, height: int = 760) -> str:
    """A page inside another one, as a notebook shows it: its style and its script stay its own."""
    style = f"width: 100%; height: {height}px; border: 1px solid #8884; border-radius: 4px"
    return f'<iframe sandbox="allow-scripts" style="{style}" srcdoc="{escape(page)}"></iframe>'
