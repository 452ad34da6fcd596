"""Training made visible: a page of one prompt every so many steps, and an index that steps through them.

    python -m examples.train_tiny --family gpt_neo --out /tmp/quick --steps 300 --look /tmp/diary

`/tmp/diary/index.html` can be opened while the training runs: with every page it is written anew, as a whole.
"""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch

from decoders import look


def check_free(folder: Path) -> None:
    """ValueError for a folder that another diary is in."""
    if any(folder.glob("step-*.html")):
        raise ValueError(f"{folder} holds a diary already: name another folder")


class Diary:
    """`write(step, losses)` adds a page of the model as it is then; `every` says after how many steps."""

    def __init__(
        self, folder: str | Path, model: torch.nn.Module, tokenizer: Any, prompt: str, every: int, name: str
    ):
        self.folder, self.model, self.tokenizer = Path(folder), model, tokenizer
        self.every, self.name, self.prompt, self.ids = every, name, prompt, tokenizer.encode(prompt)
        check_free(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.pages: list[tuple[int, str]] = []

    def is_due(self, step: int, last: int) -> bool:
        return step % self.every == 0 or step == last

    def write(self, step: int, losses: Sequence[float]) -> None:
        """The loss of every step so far is drawn above the pages."""
        training = self.model.training
        self.model.eval()
        title = f"{self.prompt} (step {step})"
        run = look.Run(self.model, self.ids, self.tokenizer, name=self.name, title=title)
        file = f"step-{step:06}.html"
        look.write(self.folder / file, look.page([run], f"{self.name} after {step} steps"))
        self.model.train(training)
        self.pages.append((step, file))
        look.write(self.folder / "index.html", index(self.name, self.pages, losses))


def index(name: str, pages: Sequence[tuple[int, str]], losses: Sequence[float]) -> str:
    """HTML: a slider over the pages, the loss with a mark where the page is from. What is chosen in one page
    (token, head, view) stays chosen in the next."""
    shown = list(losses[:: max(1, len(losses) // 600)]) or [1.0]
    low, high = min(shown), max(shown)
    across, down = 600 / max(1, len(shown) - 1), 84 / max(high - low, 1e-9)
    points = " ".join(f"{i * across:.1f},{8 + (high - loss) * down:.1f}" for i, loss in enumerate(shown))
    output = json.dumps({"pages": pages, "losses": [round(x, 4) for x in losses]}).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(name)} learns</title><style>
:root {{ color-scheme: light dark; }}
body {{ margin: 0; font: 15px/1.5 system-ui, sans-serif; display: grid; grid-template-rows: auto 1fr; height: 100vh; }}
header {{ padding: 8px 16px; display: flex; flex-wrap: wrap; gap: 4px 18px; align-items: center; }}
h1 {{ font-size: 1.1rem; margin: 0; }} input {{ width: min(420px, 60vw); }} iframe {{ border: 0; width: 100%; height: 100%; }}
svg {{ width: 320px; height: 56px; }} polyline {{ fill: none; stroke: #0072b2; stroke-width: 2; }} line {{ stroke: #d55e00; stroke-width: 3; }}
</style></head><body><header><h1>{escape(name)} learns</h1>
<label>step <input id="step" type="range" min="0" max="{len(pages) - 1}" value="{len(pages) - 1}"></label>
<button id="play" type="button">play</button><output id="told"></output>
<svg viewBox="0 0 600 100" preserveAspectRatio="none" role="img" aria-label="the loss, from {high:.2f} to {low:.2f} nats">
<polyline points="{points}"/><line id="mark" y1="0" y2="100"/></svg></header>
<iframe id="page" title="the page of this step"></iframe>
<script type="application/json" id="data">{output}</script><script>
"use strict";
const {{ pages, losses }} = JSON.parse(document.getElementById("data").textContent);
const [slider, told, page, mark, play] = ["step", "told", "page", "mark", "play"].map(id => document.getElementById(id));
let chosen = "", timer = null;
function show() {{
  const [step, file] = pages[slider.value];
  page.src = file + "#" + chosen;
  const last = Math.max(1, losses.length);
  told.textContent = `${{step}} of ${{last}}` + (step ? `, loss ${{losses[step - 1].toFixed(3)}} nats a token` : ", nothing learnt yet");
  mark.setAttribute("x1", 600 * step / last);
  mark.setAttribute("x2", 600 * step / last);
}}
addEventListener("message", event => {{ if (typeof event.data?.look === "string") chosen = event.data.look; }});
slider.addEventListener("input", show);
play.addEventListener("click", () => {{
  if (timer) {{ clearInterval(timer); timer = null; play.textContent = "play"; return; }}
  if (Number(slider.value) === pages.length - 1) slider.value = 0;
  play.textContent = "stop";
  show();
  timer = setInterval(() => {{ slider.value = Number(slider.value) + 1; show(); if (Number(slider.value) === pages.length - 1) play.click(); }}, 1200);
}});
show();
</script></body></html>
"""  # noqa: E501
