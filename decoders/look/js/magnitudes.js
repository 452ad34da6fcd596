// ---- Magnitudes ----

function magnitudesView(run, pane) {
  const kinds = {
    out: "residual stream",
    attn_out: "attention",
    mlp_act: "inside the MLP",
    mlp_out: "MLP",
    products: "q kᵀ, unscaled",
    scores: "scores",
  };
  const found = Object.fromEntries(Object.keys(kinds).map(kind => [kind, []]));
  for (const [stage, largest] of run.magnitudes) {
    const [, layer, kind] = stage.match(/^layers\.(\d+)\.(.+)$/) ?? [];
    if (kind in found) found[kind][Number(layer)] = largest;
  }
  if (found.products.length) delete found.scores;
  const width = 720,
    height = 300,
    left = 56,
    right = 150,
    bottom = 30,
    limit = 65504;
  const every = Object.values(found)
    .flat()
    .filter(x => x > 0);
  const low = Math.floor(Math.log10(Math.min(...every, 1))),
    high = Math.log10(Math.max(...every, limit)) + 0.3;
  const x = layer => left + (run.layers === 1 ? 0.5 : layer / (run.layers - 1)) * (width - left - right);
  const y = value =>
    10 + ((high - Math.log10(Math.max(value, 10 ** low))) / (high - low)) * (height - bottom - 10);
  const picture = el("svg", {
    class: "chart",
    viewBox: `0 0 ${width} ${height}`,
    role: "img",
    "aria-label": "largest number of each layer: " + run.safe,
  });
  for (let power = low; power <= high; power++)
    picture.append(
      el("line", { class: "grid", x1: left, x2: width - right, y1: y(10 ** power), y2: y(10 ** power) }),
      el(
        "text",
        { class: "soft", x: left - 6, y: y(10 ** power) + 4, "text-anchor": "end", "font-size": 11 },
        power < 5 && power > -4 ? String(10 ** power) : `1e${power}`,
      ),
    );
  for (let layer = 0; layer < run.layers; layer += Math.ceil(run.layers / 16))
    picture.append(
      el(
        "text",
        { class: "soft", x: x(layer), y: height - 10, "text-anchor": "middle", "font-size": 11 },
        layer === 0 ? "layer 0" : String(layer),
      ),
    );
  picture.append(
    el("path", { class: "limit", d: `M${left} ${y(limit)}H${width - right}` }),
    el("text", { x: width - right + 6, y: y(limit) + 4, "font-size": 12 }, "float16 ends: 65,504"),
  );
  const dashes = ["", "7 3", "2 3", "9 3 2 3", "4 2"],
    labels = [];
  Object.entries(found).forEach(([kind, values], n) => {
    const points = values
      .map((value, layer) => (value === null ? null : `${x(layer).toFixed(1)} ${y(value).toFixed(1)}`))
      .filter(Boolean);
    if (!points.length) return;
    picture.append(
      el("path", {
        d: "M" + points.join("L"),
        fill: "none",
        stroke: n % 2 ? "rgb(var(--warm))" : "rgb(var(--hot))",
        "stroke-width": kind === "out" ? 3 : 1.7,
        "stroke-dasharray": dashes[n % 5],
      }),
    );
    labels.push([kinds[kind], y(values.findLast(value => value !== null)), n]);
  });
  labels
    .sort((a, b) => a[1] - b[1])
    .forEach((label, i) => {
      if (i && label[1] < labels[i - 1][1] + 14) label[1] = labels[i - 1][1] + 14;
    });
  for (const [text, where, n] of labels)
    picture.append(
      el("path", {
        d: `M${width - right + 4} ${where}h22`,
        stroke: n % 2 ? "rgb(var(--warm))" : "rgb(var(--hot))",
        "stroke-width": n ? 1.7 : 3,
        "stroke-dasharray": dashes[n % 5],
      }),
      el("text", { x: width - right + 31, y: where + 4, "font-size": 12 }, text),
    );
  const rows = [...run.magnitudes].sort((a, b) => (b[1] ?? Infinity) - (a[1] ?? Infinity)).slice(0, 6);
  pane.append(
    el("p", {}, run.safe + "."),
    el(
      "div",
      { class: "two" },
      el("div", { class: "scroll" }, picture),
      el(
        "table",
        {},
        el("caption", {}, "the largest numbers"),
        rows.map(([stage, largest, position]) =>
          el(
            "tr",
            {},
            el("td", {}, stage),
            el("td", { class: "number" }, number(largest)),
            el("td", {}, "at ", written(token(run, position))),
          ),
        ),
      ),
    ),
  );
}
