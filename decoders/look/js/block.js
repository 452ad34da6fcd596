// ---- The block ----

function blockView(run, pane) {
  const kinds = el("p", {}),
    drawing = el("div", { class: "scroll" }),
    code = el("div", { class: "code", tabindex: 0, "aria-label": "the lines of the model file" }),
    panel = el("div", { "aria-live": "polite" });
  pane.append(kinds, el("div", { class: "two halves" }, drawing, el("div", {}, panel, code)));
  let shown = null;
  const open = n => {
    const info = run.diagrams[n],
      parsed = new DOMParser().parseFromString(info.svg, "image/svg+xml").documentElement;
    drawing.replaceChildren(document.importNode(parsed, true));
    for (const box of drawing.querySelectorAll("[data-box]")) {
      const pick = () =>
        choose({
          box: box.dataset.box,
          layer: run.windows[chosen.layer] === info.window ? chosen.layer : info.layer,
        });
      box.addEventListener("click", pick);
      box.addEventListener("keydown", event => {
        if (["Enter", " "].includes(event.key)) {
          event.preventDefault();
          pick();
        }
      });
    }
    code.replaceChildren(
      ...info.lines.map(([n, line], i) =>
        el(
          "div",
          { "data-line": n, style: i && info.lines[i - 1][0] !== n - 1 ? "margin-top: 10px" : "" },
          el("b", {}, String(n).padStart(4) + "  "),
          line,
        ),
      ),
    );
    shown = n;
  };
  if (run.diagrams.length > 1)
    kinds.append(
      ...run.diagrams.map((info, n) =>
        el(
          "button",
          { type: "button", onclick: () => choose({ layer: info.layer, box: chosen.box }) },
          info.window ? `layers that see ${info.window} tokens` : "layers that see all tokens",
        ),
      ),
    );
  follow(() => {
    const layer = Math.min(chosen.layer, run.layers - 1),
      n = run.diagrams.findIndex(info => info.window === run.windows[layer]),
      info = run.diagrams[n];
    if (n !== shown) open(n);
    [...kinds.children].forEach((button, i) => button.setAttribute("aria-pressed", i === n));
    const key = chosen.box in info.boxes ? chosen.box : Object.keys(info.boxes)[0];
    for (const box of drawing.querySelectorAll("[data-box]"))
      box.classList.toggle("on", box.dataset.box === key);
    let first = null;
    for (const line of code.children) {
      const on = info.boxes[key].some(([a, b]) => a <= line.dataset.line && line.dataset.line <= b);
      line.classList.toggle("on", on);
      first ??= on ? line : null;
    }
    if (first) code.scrollTop = first.offsetTop - code.offsetTop - 60;
    drawValues(run, panel, info, key, layer);
  });
}

function drawValues(run, box, info, key, layer) {
  const [stage, label] = info.stages[key],
    query = at(run),
    [shape, formula] = run.stages[stage],
    value = run.values[stage];
  const parts = [
    el("h3", {}, `${label}: `, el("code", {}, `layers.${layer}.${stage}`)),
    el("p", { class: "soft" }, `${shape}: ${formula}. Lines of ${info.file} below.`),
  ];
  if (value && query >= value.first) {
    const i = query - value.first;
    parts.push(
      el(
        "p",
        {},
        "At ",
        written(token(run, query)),
        `: ${value.width.toLocaleString("en")} numbers, root mean square ${number(value.rms[layer][i])}, largest ${number(value.largest[layer][i])} in dimension ${value.where[layer][i]}. The largest of each of ${Math.min(32, value.width)} equal parts:`,
      ),
      strip(value, layer, i),
    );
  } else if (value)
    parts.push(
      el("p", {}, `Of so many layers values are kept for the last ${run.ids.length - value.first} tokens.`),
    );
  else parts.push(el("p", {}, "Its values are the attention maps above, of the same layer."));
  if (key.endsWith("_rotary")) parts.push(rotation(run));
  box.replaceChildren(...parts);
}

function rotation(run) {
  // the pairs of dimensions that are turned, the fastest and the slowest
  const n = run.rotary.length,
    shown = run.rotary.map((_, i) => i).filter(i => n <= 12 || i < 6 || i >= n - 6),
    stretched = run.rotary.some(row => row.factor !== 1);
  return el(
    "div",
    { class: "scroll" },
    el(
      "table",
      {},
      el(
        "caption",
        {},
        `each pair of dimensions turns by its own angle from token to token` +
          (n > 12 ? "; the fastest and the slowest" : ""),
      ),
      el(
        "tr",
        {},
        ["dimensions", "angle", "round after"]
          .concat(stretched ? ["factor"] : [])
          .map(text => el("th", { scope: "col", class: "soft" }, text)),
      ),
      shown
        .map(i => run.rotary[i])
        .map(row =>
          el(
            "tr",
            {},
            el("td", {}, `${row.first} and ${row.second}`),
            el("td", { class: "number" }, number(row.angle)),
            el("td", { class: "number" }, `${number(row.period)} tokens`),
            stretched ? el("td", { class: "number" }, number(row.factor)) : null,
          ),
        ),
    ),
  );
}

function strip(value, layer, i) {
  const every = new Int8Array(bytes(value.strips[layer]).buffer),
    n = Math.min(32, value.width),
    canvas = el("canvas", {
      class: "strip",
      width: n,
      height: 1,
      role: "img",
      "aria-label": "blue above zero, orange below",
    });
  const draw = canvas.getContext("2d"),
    image = draw.createImageData(n, 1),
    [page, plus, minus] = [rgb("--page"), rgb("--hot"), rgb("--warm")];
  for (let d = 0; d < n; d++) {
    const share = every[i * n + d] / 127,
      to = share < 0 ? minus : plus;
    for (let c = 0; c < 3; c++) image.data[4 * d + c] = page[c] + Math.abs(share) * (to[c] - page[c]);
    image.data[4 * d + 3] = 255;
  }
  draw.putImageData(image, 0, 0);
  return canvas;
}
