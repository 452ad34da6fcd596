// ---- Attention ----

const maps = new WeakMap(); // run -> what `weights` has unpacked

function weights(run, layer, head) {
  // Float32Array (T, T)
  const T = run.ids.length,
    info = run.attention;
  let made = maps.get(run);
  if (!made)
    maps.set(
      run,
      (made = {
        bytes: bytes(info.bytes),
        keys: info.keys ? new Uint16Array(bytes(info.keys).buffer) : null,
        matrices: new Map(),
      }),
    );
  const index = layer * run.heads + head;
  if (!made.matrices.has(index)) {
    const weights = new Float32Array(T * T);
    if (info.kind === "whole")
      for (let i = 0; i < T * T; i++) weights[i] = (made.bytes[index * T * T + i] / 255) ** 2;
    else
      for (let q = 0; q < T; q++)
        for (let n = 0; n < info.kept; n++) {
          const i = (index * T + q) * info.kept + n,
            key = made.keys[i];
          if (key <= q) weights[q * T + key] = (made.bytes[i] / 255) ** 2;
        }
    if (made.matrices.size > 300) made.matrices.clear();
    made.matrices.set(index, weights);
  }
  return made.matrices.get(index);
}

function hides(run, layer, query, key) {
  const window = run.windows[layer];
  return (
    key > query ||
    (window !== null && key <= query - window && key !== query) ||
    Boolean(run.padding?.[key] && key !== query)
  );
}

// One pixel a token, or with more than `most` the strongest of several.
function paint(canvas, run, layer, head, most = Infinity) {
  const T = run.ids.length,
    found = weights(run, layer, head),
    draw = canvas.getContext("2d"),
    step = Math.ceil(T / most) || 1,
    n = Math.ceil(T / step);
  const [from, to, none] = [rgb("--page"), rgb("--hot"), rgb("--none")],
    strongest = new Float32Array(n * n);
  for (let q = 0; q < T; q++)
    for (let k = 0; k <= q; k++) {
      const i = Math.floor(q / step) * n + Math.floor(k / step);
      if (found[q * T + k] > strongest[i]) strongest[i] = found[q * T + k];
    }
  canvas.width = canvas.height = n;
  const image = draw.createImageData(n, n);
  for (let i = 0; i < n * n; i++) {
    const share = Math.sqrt(strongest[i]),
      hidden = share === 0 && hides(run, layer, Math.floor(i / n) * step, (i % n) * step);
    for (let c = 0; c < 3; c++)
      image.data[4 * i + c] = hidden ? none[c] : from[c] + share * (to[c] - from[c]);
    image.data[4 * i + 3] = 255;
  }
  draw.putImageData(image, 0, 0);
}

const MEASURES = {
  previous: "reads the token before",
  induction: "reads what followed the same token earlier",
  first: "reads the first token",
  itself: "reads itself",
  entropy: "reads widely (bits)",
  distance: "reads far back (tokens)",
};

function attentionView(run, pane) {
  const grid = el("div", {
    class: "maps",
    role: "group",
    "aria-label": "attention maps, a row for each layer",
    style: `grid-template-columns: auto repeat(${run.heads}, minmax(${run.heads > 12 ? 16 : 30}px, 76px))`,
  });
  const buttons = [],
    canvases = [];
  for (let layer = 0; layer < run.layers; layer++) {
    grid.append(
      el(
        "span",
        { class: "label" },
        `layer ${layer}` + (run.windows[layer] ? ` (${run.windows[layer]})` : ""),
      ),
    );
    for (let head = 0; head < run.heads; head++) {
      const canvas = el("canvas");
      const info = `layer ${layer} head ${head}: entropy ${number(run.head_numbers.entropy[layer][head])} bits`;
      const button = el(
        "button",
        {
          type: "button",
          "data-item": "",
          "aria-label": info,
          title: info,
          onclick: () => choose({ layer, head, mean: false }),
        },
        canvas,
      );
      canvases.push([canvas, layer, head]);
      buttons.push(button);
      grid.append(button);
    }
  }
  const small = each => {
    paint(each[0], run, each[1], each[2], 128);
    each[3] = true;
  };
  const seen = new IntersectionObserver(found => {
    for (const one of found)
      if (one.isIntersecting) {
        seen.unobserve(one.target);
        small(canvases[one.target.dataset.place]);
      }
  });
  canvases.forEach((each, i) => {
    each[0].dataset.place = i;
    if (canvases.length <= 144) small(each);
    else seen.observe(each[0]);
  });
  const repaint = () => canvases.filter(each => each[3]).forEach(small);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    repaint();
    choose({});
  });
  const big = el("div"),
    arcs = el("div", { class: "scroll" }),
    info = el("div");
  const left =
    run.attention.kind === "largest"
      ? el(
          "p",
          { class: "soft" },
          `Of each query the ${run.attention.kept} largest weights are kept; on average ${percent(run.attention.lost)} is left out.`,
        )
      : null;
  const key = el(
    "p",
    {},
    el(
      "span",
      { class: "key" },
      "0",
      el("i", { style: "background: linear-gradient(90deg, var(--page), rgb(var(--hot)))" }),
      "1 (root scale)",
    ),
    el(
      "span",
      { class: "key" },
      el("i", { style: "background: var(--none)" }),
      "hidden: later tokens" +
        (run.windows.some(Boolean) ? ", and behind the window" : "") +
        (run.padding ? ", padding" : ""),
    ),
  );
  const lists = Object.entries(MEASURES).map(([name, about]) => headList(run, name, about));
  const few = el(
    "div",
    {},
    el("div", { class: "scroll" }, grid),
    key,
    left,
    el("details", {}, el("summary", {}, "which head does what"), lists),
    info,
  );
  put(pane, el("div", { class: run.heads > 8 || RUNS.length > 1 ? "" : "two halves" }, few, big), arcs);
  roving(
    grid,
    buttons,
    () => run.heads,
    () => 0,
  );
  follow(() => {
    const layer = Math.min(chosen.layer, run.layers - 1),
      head = Math.min(chosen.head, run.heads - 1),
      place = layer * run.heads + head;
    buttons.forEach((button, i) => {
      button.setAttribute("aria-pressed", i === place);
      button.tabIndex = i === place ? 0 : -1;
    });
    drawBig(run, big, layer, head);
    drawArcs(run, arcs, layer, head);
    drawReads(run, info, layer, head);
  });
}

function headList(run, name, about) {
  const every = run.head_numbers[name].flatMap((row, layer) =>
    row.map((value, head) => ({ layer, head, value })),
  );
  const best = every
    .filter(one => one.value !== null)
    .sort((a, b) => b.value - a.value)
    .slice(0, 4);
  if (!best.length) return null;
  const show = value => (["entropy", "distance"].includes(name) ? number(value) : percent(value));
  return el(
    "p",
    {},
    about + ": ",
    best
      .map(one => [
        el(
          "button",
          { type: "button", onclick: () => choose({ layer: one.layer, head: one.head, mean: false }) },
          `layer ${one.layer} head ${one.head}`,
        ),
        ` ${show(one.value)}  `,
      ])
      .flat(),
  );
}

function drawBig(run, box, layer, head) {
  const T = run.ids.length,
    cell = chosen.large ? 24 : Math.max(2, Math.min(15, Math.floor(680 / T))),
    every = Math.ceil(15 / cell), // a label of 14 px and air
    query = at(run);
  const canvas = el("canvas", {
    role: "img",
    "aria-label": `attention of layer ${layer} head ${head}: queries downwards, keys to the right`,
    style: `width: ${cell * T}px; height: ${cell * T}px`,
  });
  paint(canvas, run, layer, head);
  const label = i =>
    el(
      "span",
      { class: i === query ? "on" : "" },
      i % every === 0 || i === query ? visible(token(run, i)) : "",
    );
  const labels = run.ids.map((_, i) => i),
    readout = el("p", { class: "soft" }, "Point at a cell to read it; click to choose its query.");
  const found = weights(run, layer, head);
  const cellAt = event => {
    const frame = canvas.getBoundingClientRect();
    return [event.clientY - frame.top, event.clientX - frame.left].map(x =>
      Math.max(0, Math.min(T - 1, Math.floor((x / frame.width) * T))),
    );
  };
  canvas.addEventListener("mousemove", event => {
    const [q, k] = cellAt(event);
    readout.replaceChildren(
      written(token(run, q)),
      hides(run, layer, q, k) ? " cannot see " : " reads ",
      written(token(run, k)),
      hides(run, layer, q, k) ? "" : `: ${percent(found[q * T + k])}`,
    );
  });
  canvas.addEventListener("click", event => choose({ run: RUNS.indexOf(run), token: cellAt(event)[0] }));
  box.replaceChildren(
    el(
      "div",
      { class: "titled" },
      el("h3", {}, `layer ${layer}, head ${head}: who reads whom`),
      el(
        "button",
        {
          type: "button",
          class: "large",
          "aria-pressed": chosen.large,
          onclick: () => choose({ large: !chosen.large }),
        },
        chosen.large ? "smaller" : "larger",
      ),
    ),
    el(
      "div",
      { class: "scroll" },
      el(
        "div",
        { class: "big" },
        el("span"),
        el(
          "div",
          { class: "top", style: `grid-template-columns: repeat(${T}, ${cell}px)` },
          labels.map(label),
        ),
        el("div", { class: "side", style: `grid-template-rows: repeat(${T}, ${cell}px)` }, labels.map(label)),
        canvas,
      ),
    ),
    readout,
  );
}

function drawArcs(run, box, layer, head) {
  const query = at(run),
    found = weights(run, layer, head),
    T = run.ids.length,
    from = Math.max(0, query - 120);
  const spots = [];
  let x = 8;
  for (let i = from; i <= Math.min(T - 1, query + 3); i++) {
    const text = visible(token(run, i)),
      width = 8.5 * [...text].length + 7;
    spots[i] = { x: x + width / 2, left: x, text };
    x += width;
  }
  const top = 104,
    picture = el("svg", {
      class: "arcs",
      width: x + 8,
      height: top + 22,
      role: "img",
      "aria-label": `what ${visible(token(run, query))} reads in layer ${layer} head ${head}, as arcs`,
    });
  for (let key = from; key <= query; key++) {
    const share = found[query * T + key],
      a = spots[key].x,
      b = spots[query].x;
    if (share < 0.01) continue;
    const rise = Math.min(96, 12 + (b - a) / 5);
    picture.append(
      el("path", {
        d:
          a === b
            ? `M${a - 5} ${top}C${a - 14} ${top - 26} ${a + 14} ${top - 26} ${a + 5} ${top}`
            : `M${b} ${top}C${b} ${top - 1.3 * rise} ${a} ${top - 1.3 * rise} ${a} ${top}`,
        "stroke-width": (0.6 + 7 * share).toFixed(1),
        "stroke-opacity": (0.3 + 0.7 * share).toFixed(2),
      }),
    );
  }
  spots.forEach((spot, i) =>
    picture.append(
      el(
        "text",
        {
          x: spot.left,
          y: top + 15,
          class: i === query ? "on" : "",
          onclick: () => choose({ run: RUNS.indexOf(run), token: i }),
        },
        spot.text,
      ),
    ),
  );
  box.replaceChildren(picture);
  box.scrollLeft = x;
}

function drawReads(run, box, layer, head) {
  const query = at(run),
    T = run.ids.length,
    found = weights(run, layer, head);
  const rows = run.ids
    .map((_, key) => [key, found[query * T + key]])
    .filter(row => row[1] >= 0.005 && row[0] <= query)
    .sort((a, b) => b[1] - a[1])
    .slice(0, 8);
  const before = run.attention.earlier
    ? (bytes(run.attention.earlier)[(layer * run.heads + head) * T + query] / 255) ** 2
    : 0;
  box.replaceChildren(
    el(
      "p",
      {},
      written(token(run, query)),
      ` (token ${query + run.start}) reads` +
        (before >= 0.005 ? `, besides ${percent(before)} in the text before what is shown:` : ":"),
    ),
    bars(
      rows.map(([key, share]) => [
        token(run, key),
        share,
        percent(share),
        key === query ? "itself" : `${query - key} before`,
      ]),
    ),
  );
}
