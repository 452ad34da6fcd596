"""Sphinx's settings for `make docs`: the pages of docs/ as they are, and a reference from docstrings."""

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
about = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

project, release = "decoders", about["version"]
author = about["authors"][0]["name"]
copyright = f"{author}, {about['license']}"
extensions = ["myst_parser", "sphinx.ext.autodoc", "manuscript"]

# Markdown as GitHub shows it
myst_heading_anchors = 4
myst_enable_extensions = ["html_image"]
myst_url_schemes = {"http": None, "https": None, "source": None}

# Code without a language is what a command prints: it has no colours
highlight_language = "none"

# The reference
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
autoclass_content = "both"
maximum_signature_line_length = 88
add_module_names = False
python_use_unqualified_type_names = True

# Pages that need no network
html_theme = "furo"
html_title = project
html_copy_source = False
html_show_sourcelink = False
html_show_search_summary = False  # it is fetched, which a browser refuses in a folder
html_static_path = ["site.css"]
html_css_files = ["site.css"]
pygments_style = "friendly"
pygments_dark_style = "monokai"
