// Draws the page of `look.py`: the data is in the element #data, one run or two. Text of models and people is
// only ever set as textContent. One token is chosen at a time (arrow keys, click), in both runs; what stands
// below follows it.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const SVG = "http://www.w3.org/2000/svg";
const followers = []; // called when another token, layer, head or box is chosen
const chosen = {
  run: 0,
  token: Math.max(0, RUNS[0].prompt - 1),
  layer: 0,
  head: 0,
  box: null,
  mean: true,
};

// ---- Small parts ----

function el(tag, given = {}, ...children) {
  const svg = ["svg", "path", "rect", "text", "g", "line", "circle", "title"].includes(tag);
  const node = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") node.style.cssText = value;
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  return put(node, ...children);
}

function put(node, ...children) {
  for (const child of children.flat()) if (child !== null && child !== undefined) node.append(child);
  return node;
}

function percent(p) {
  if (p === null) return "NaN";
  if (p >= 0.9995) return "100 %";
  return p < 0.001 ? "< 0.1 %" : (100 * p).toFixed(p < 0.1 ? 1 : 0) + " %";
}

function number(x) {
  if (x === null) return "NaN";
  const odd = Math.abs(x) >= 1e5 || (x !== 0 && Math.abs(x) < 1e-3);
  return odd ? x.toExponential(1) : Number(x.toPrecision(3)).toString();
}

const visible = text => text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/ /g, "␣") || "␀"; // in lists and labels
const word = (run, id) => run.words[id] ?? `[${id}]`;
const token = (run, i) => (isPatch(run, i) ? patchName(run, i) : word(run, run.ids[i]));
const isPatch = (run, i) => run.picture !== null && run.picture.tokens.includes(i);
const written = text => el("span", { class: "word" }, visible(text));

function patchName(run, i) {
  const n = run.picture.tokens.indexOf(i),
    columns = run.picture.columns;
  return `▦${Math.floor(n / columns)},${n % columns}`;
}

function bytes(text) {
  return Uint8Array.from(atob(text), char => char.charCodeAt(0));
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function rgb(name) {
  // of a CSS colour "#rrggbb" or "r, g, b"
  const value = colour(name);
  return value.startsWith("#")
    ? [1, 3, 5].map(i => parseInt(value.slice(i, i + 2), 16))
    : value.split(",").map(Number);
}

// The token that is chosen, as the run has it: the other run's partner stands where both texts agree.
function at(run) {
  const r = RUNS.indexOf(run);
  if (r === chosen.run || RUNS.length === 1) return Math.min(chosen.token, run.ids.length - 1);
  const pair = DATA.compared.pairs.find(pair => pair[chosen.run] === chosen.token);
  return pair ? pair[r] : Math.min(chosen.token, run.ids.length - 1);
}

function choose(change) {
  Object.assign(chosen, change);
  for (const follow of followers) follow();
  if (parent !== window) parent.postMessage({ look: chosenAsText() }, "*"); // to an index of several pages
}

// What is chosen as the end of an address, so that a link opens the page at it: #lens;token=3;layer=1
function chosenAsText() {
  const view = [...document.querySelectorAll("section")].findLast(
    box => box.getBoundingClientRect().top < innerHeight / 2,
  );
  return [
    view?.id ?? "",
    ...["token", "layer", "head", "box"]
      .filter(name => chosen[name] !== null)
      .map(name => `${name}=${chosen[name]}`),
  ].join(";");
}

function readAddress() {
  const [view, ...rest] = location.hash.slice(1).split(";");
  for (const [name, value] of rest.map(part => part.split("="))) {
    if (["token", "layer", "head"].includes(name) && /^\d+$/.test(value)) chosen[name] = Number(value);
    if (name === "box" && value) chosen.box = value;
  }
  chosen.mean = !rest.some(part => part.startsWith("head="));
  return view;
}

function follow(draw) {
  followers.push(draw);
  draw();
}

// Arrow keys move between the items of a box; only one of them is reached by Tab.
function roving(box, items, columns, current) {
  items.forEach((item, i) => {
    item.tabIndex = i === current() ? 0 : -1;
  });
  if (box.dataset.roving) return;
  box.dataset.roving = "yes";
  box.addEventListener("keydown", event => {
    const every = [...box.querySelectorAll("[data-item]")],
      i = every.indexOf(event.target.closest("[data-item]"));
    const step = {
      ArrowRight: 1,
      ArrowLeft: -1,
      ArrowDown: columns(),
      ArrowUp: -columns(),
      Home: -i,
      End: every.length - 1 - i,
    }[event.key];
    if (step === undefined || i < 0) return;
    event.preventDefault();
    const next = Math.max(0, Math.min(every.length - 1, i + step));
    every[next].focus();
    every[next].click();
  });
}

function bars(rows, show = written) {
  // of [text, share, how it is told, remark]
  const most = Math.max(...rows.map(row => Math.abs(row[1])), 1e-9);
  return el(
    "table",
    {},
    rows.map(([text, share, told, remark]) =>
      el(
        "tr",
        {},
        el("td", {}, show(text)),
        el(
          "td",
          {},
          el("span", {
            class: share < 0 ? "bar minus" : "bar",
            style: `width: ${(90 * Math.abs(share)) / most}px`,
          }),
        ),
        el("td", { class: "number" }, told),
        el("td", { class: "soft" }, remark ?? ""),
      ),
    ),
  );
}

function section(id, title, about, draw) {
  const panes = RUNS.map(run =>
    el("div", {}, RUNS.length > 1 ? el("h3", {}, run.name + ": " + run.title) : null),
  );
  document.body.append(
    el(
      "section",
      { id, "aria-labelledby": id + "-title" },
      el("h2", { id: id + "-title" }, title),
      about ? el("p", { class: "soft" }, about) : null,
      el("div", { class: "panes", style: `--runs: ${RUNS.length}` }, panes),
    ),
  );
  RUNS.forEach((run, r) => draw(run, panes[r]));
}

// ---- Text ----

function surprise(bits) {
  return bits === null
    ? ""
    : `background: rgba(var(--warm), calc(var(--deepest) * ${Math.min(1, bits / 12).toFixed(3)}))`;
}

function textView(run, pane) {
  const text = el("div", { class: "text", role: "listbox", "aria-label": "the text as tokens" });
  const panel = el("div", { "aria-live": "polite" });
  const items = run.ids.map((id, i) => {
    const bits = run.given.bits[i],
      patch = isPatch(run, i);
    const kind = [i >= run.prompt ? "new" : "", patch ? "patch" : "", run.padding?.[i] ? "padding" : ""].join(
      " ",
    );
    const shown = patch ? token(run, i) + " " : token(run, i).replace(/\n/g, "↵\n");
    return el(
      "span",
      {
        class: "token " + kind,
        role: "option",
        "data-item": i,
        style: patch ? "" : surprise(bits),
        "aria-label": `${visible(token(run, i))}${i >= run.prompt ? ", generated" : ""}`,
        onclick: () => choose({ run: RUNS.indexOf(run), token: i }),
        onmouseenter: () => tell(i),
      },
      shown,
    );
  });
  text.append(...items);
  text.addEventListener("mouseleave", () => tell(at(run)));
  const tell = i =>
    panel.replaceChildren(
      el("h3", {}, `token ${i + run.start}: `, written(token(run, i)), el("small", {}, `  id ${run.ids[i]}`)),
      el(
        "p",
        {},
        run.given.rank[i] === null
          ? "It is the first: nothing says how likely it was."
          : `It had ${percent(run.given.p[i])}, ${run.given.rank[i] === 1 ? "the likeliest" : "place " + run.given.rank[i]}: a surprise of ${number(run.given.bits[i])} bits.`,
      ),
      el("p", { class: "soft" }, `After it, with an entropy of ${number(run.next.entropy[i])} bits:`),
      bars(
        run.next.ids[i].map((id, n) => [
          word(run, id),
          run.next.p[i][n],
          percent(run.next.p[i][n]),
          id === run.ids[i + 1] ? "came" : "",
        ]),
      ),
    );
  const scale = el(
    "p",
    {},
    el(
      "span",
      { class: "key" },
      "expected",
      el("i", {
        style: "background: linear-gradient(90deg, transparent, rgba(var(--warm), var(--deepest)))",
      }),
      "a surprise of 12 bits",
    ),
    run.prompt < run.ids.length
      ? el("span", { class: "key" }, el("span", { class: "token new" }, " generated "))
      : null,
  );
  pane.append(el("div", { class: "two" }, el("div", {}, text, scale), panel));
  roving(
    text,
    items,
    () => 8,
    () => at(run),
  );
  follow(() => {
    const i = at(run);
    items.forEach((item, n) => {
      item.classList.toggle("chosen", n === i);
      item.setAttribute("aria-selected", n === i);
      item.tabIndex = n === i ? 0 : -1;
    });
    tell(i);
  });
}

// ---- Attention ----

const maps = new WeakMap(); // run -> what `weights` has unpacked

function weights(run, layer, head) {
  // Float32Array (T, T)
  const T = run.ids.length,
    told = run.attention;
  let made = maps.get(run);
  if (!made)
    maps.set(
      run,
      (made = {
        bytes: bytes(told.bytes),
        keys: told.keys ? new Uint16Array(bytes(told.keys).buffer) : null,
        whole: new Map(),
      }),
    );
  const place = layer * run.heads + head;
  if (!made.whole.has(place)) {
    const found = new Float32Array(T * T);
    if (told.kind === "whole")
      for (let i = 0; i < T * T; i++) found[i] = (made.bytes[place * T * T + i] / 255) ** 2;
    else
      for (let q = 0; q < T; q++)
        for (let n = 0; n < told.kept; n++) {
          const i = (place * T + q) * told.kept + n,
            key = made.keys[i];
          if (key <= q) found[q * T + key] = (made.bytes[i] / 255) ** 2;
        }
    if (made.whole.size > 300) made.whole.clear();
    made.whole.set(place, found);
  }
  return made.whole.get(place);
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
      const told = `layer ${layer} head ${head}: entropy ${number(run.head_numbers.entropy[layer][head])} bits`;
      const button = el(
        "button",
        {
          type: "button",
          "data-item": "",
          "aria-label": told,
          title: told,
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
    told = el("div");
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
    told,
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
    drawReads(run, told, layer, head);
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
    cell = Math.max(2, Math.min(15, Math.floor(680 / T))),
    every = Math.ceil(10 / cell),
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
    el("h3", {}, `layer ${layer}, head ${head}: who reads whom`),
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
      width = 7.3 * [...text].length + 7;
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

// ---- Logit lens ----

function lensView(run, pane) {
  const box = el("div", { class: "scroll" }),
    panel = el("div", { "aria-live": "polite" }),
    T = run.ids.length,
    MOST = 64;
  let layer = run.layers;
  pane.append(el("div", { class: "two wide" }, box, panel));
  const show = (i, at) => {
    layer = i;
    choose({ run: RUNS.indexOf(run), token: at });
  };
  const rows = [...Array(run.layers + 1).keys()].reverse();
  follow(() => {
    const query = at(run),
      from = T <= MOST ? 0 : Math.max(0, Math.min(T - MOST, query - MOST / 2)),
      to = Math.min(T, from + MOST),
      scroll = box.scrollLeft,
      had = box.contains(document.activeElement);
    const places = [...Array(to - from).keys()].map(i => from + i);
    const cell = (i, at) => {
      const id = run.lens[i].ids[at][0],
        p = run.lens[i].p[at][0] ?? 0,
        text = visible(word(run, id));
      const button = el(
        "button",
        {
          type: "button",
          "data-item": "",
          class: (p > 0.895 ? "deep " : p > 0.65 ? "mid " : "") + (at === query && i === layer ? "on" : ""),
          style: `background: rgba(var(--hot), ${Math.min(1, p * 1.05).toFixed(2)})`,
          title: `after ${i} layers, behind ${visible(token(run, at))}: ${text} ${percent(p)}`,
          onclick: () => show(i, at),
        },
        text,
      );
      button.tabIndex = at === query && i === layer ? 0 : -1;
      return el("td", {}, button);
    };
    box.replaceChildren(
      el(
        "table",
        { class: "lens" },
        el(
          "caption",
          {},
          T > MOST
            ? `tokens ${from + run.start} to ${to - 1 + run.start}, around the chosen one`
            : "downwards: fewer layers; to the right: the text",
        ),
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            el("th", {}, ""),
            places.map(at => el("th", { scope: "col" }, visible(token(run, at)))),
          ),
        ),
        el(
          "tbody",
          {},
          rows.map(i =>
            el(
              "tr",
              {},
              el(
                "th",
                { scope: "row" },
                i === 0 ? "embeddings" : i === run.layers ? `layer ${i - 1} = the model` : `layer ${i - 1}`,
              ),
              places.map(at => cell(i, at)),
            ),
          ),
        ),
      ),
    );
    box.scrollLeft = scroll;
    const on = box.querySelector(".on"),
      frame = box.getBoundingClientRect(),
      from_left = on ? on.getBoundingClientRect().left - frame.left : 0;
    if (on && had) on.focus(); // the one that was focussed is gone
    if (on && (from_left < 150 || from_left > frame.width - 80))
      box.scrollLeft += from_left - frame.width / 2;
    roving(
      box,
      [...box.querySelectorAll("[data-item]")],
      () => places.length,
      () => rows.indexOf(layer) * places.length + query - from,
    );
    const row = run.lens[layer];
    panel.replaceChildren(
      el(
        "h3",
        {},
        layer === 0 ? "from the embedding of " : `after layer ${layer - 1}, behind `,
        written(token(run, query)),
      ),
      bars(
        row.ids[query].map((id, n) => [
          word(run, id),
          row.p[query][n],
          percent(row.p[query][n]),
          id === run.ids[query + 1] ? "came" : "",
        ]),
      ),
    );
  });
}

// ---- Who wrote this token ----

function writersView(run, pane) {
  const box = el("div");
  pane.append(box);
  follow(() => {
    const query = at(run),
      told = run.writers,
      share = Object.fromEntries(told.names.map((name, n) => [name, told.values[n][query] ?? 0]));
    const rows = [
      ["embeddings", ["embeddings"]],
      ...[...Array(run.layers).keys()].map(i => [
        `layer ${i}`,
        told.names.filter(name => name.startsWith(`layers.${i}.`)),
      ]),
      ["biases", ["biases"]],
    ];
    const reach = sign =>
      Math.max(
        ...rows.map(([, names]) => names.reduce((sum, name) => sum + Math.max(0, sign * share[name]), 0)),
        1e-6,
      );
    const width = 620,
      height = 22,
      left = 92,
      scale = (width - left - 70) / (reach(1) + reach(-1)),
      zero = left + reach(-1) * scale;
    const picture = el("svg", {
      class: "chart",
      viewBox: `0 0 ${width} ${rows.length * height + 8}`,
      role: "img",
      "aria-label": "what each layer added to the logit",
    });
    rows.forEach(([label, names], n) => {
      const y = n * height + 4,
        ends = { 1: zero, [-1]: zero };
      let sum = 0;
      picture.append(el("text", { x: left - 8, y: y + 14, "text-anchor": "end", "font-size": 12 }, label));
      for (const name of names) {
        const value = share[name],
          sign = value < 0 ? -1 : 1,
          w = Math.abs(value) * scale;
        sum += value;
        picture.append(
          el(
            "rect",
            {
              class: (sign > 0 ? "plus" : "minus") + (name.endsWith("mlp_out") ? " mlp" : ""),
              x: sign > 0 ? ends[1] : ends[-1] - w,
              y,
              width: Math.max(0, w - 0.6),
              height: height - 6,
            },
            el("title", {}, `${partName(name)}: ${number(value)}`),
          ),
        );
        ends[sign] += sign * w;
      }
      picture.append(
        el(
          "text",
          { class: "soft", x: width - 4, y: y + 14, "text-anchor": "end", "font-size": 12 },
          (sum > 0 ? "+" : "") + number(sum),
        ),
      );
    });
    picture.append(el("line", { class: "grid", x1: zero, x2: zero, y1: 0, y2: rows.length * height + 4 }));
    const best = told.names
      .map(name => [name, share[name]])
      .filter(row => row[0] !== "rounding")
      .sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]))
      .slice(0, 10);
    const last = query === run.ids.length - 1;
    box.replaceChildren(
      el(
        "p",
        {},
        "Behind ",
        written(token(run, query)),
        last ? " the likeliest is " : " came ",
        written(word(run, told.targets[query])),
        ` with a logit of ${number(told.logits[query])}, the sum of:`,
      ),
      el(
        "div",
        { class: "two" },
        el(
          "div",
          {},
          el("div", { class: "scroll" }, picture),
          el(
            "p",
            {},
            el("span", { class: "key" }, el("i", { style: "background: rgb(var(--hot))" }), "heads, for it"),
            el(
              "span",
              { class: "key" },
              el("i", { style: "background: rgba(var(--hot), .55)" }),
              "MLP, for it",
            ),
            el("span", { class: "key" }, el("i", { style: "background: rgb(var(--warm))" }), "against it"),
          ),
          told.by_head
            ? null
            : el(
                "p",
                { class: "soft" },
                "The heads of a layer are summed up here: there are too many for one page.",
              ),
        ),
        bars(
          best.map(([name, value]) => [partName(name), value, (value > 0 ? "+" : "") + number(value)]),
          text => text,
        ),
      ),
    );
  });
}

const partName = name =>
  name
    .replace(/^layers\.(\d+)\./, "layer $1 ")
    .replace("mlp_out", "MLP")
    .replace("heads", "all heads");

// ---- Magnitudes ----

function magnitudesView(run, pane) {
  const kinds = {
    out: "sum",
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

// ---- Picture ----

function pictureView(run, pane) {
  if (!run.picture) {
    pane.append(el("p", { class: "soft" }, "no picture here"));
    return;
  }
  const { width, height, patch, columns, tokens, places } = run.picture,
    zoom = Math.max(1, Math.min(4, Math.floor(600 / width)));
  const canvas = el("canvas", { width: width * zoom, height: height * zoom, role: "img" }),
    image = new Image(),
    draw = canvas.getContext("2d");
  const mean = el("button", { type: "button", onclick: () => choose({ mean: !chosen.mean }) }),
    told = el("p");
  pane.append(el("div", { class: "picture" }, canvas), told, el("p", {}, mean));
  const show = () => {
    const query = at(run),
      T = run.ids.length,
      share = new Float32Array(tokens.length);
    const heads = chosen.mean
      ? [...Array(run.layers * run.heads).keys()]
      : [Math.min(chosen.layer, run.layers - 1) * run.heads + Math.min(chosen.head, run.heads - 1)];
    for (const one of heads) {
      const found = weights(run, Math.floor(one / run.heads), one % run.heads);
      tokens.forEach((key, n) => {
        share[n] += found[query * T + key] / heads.length;
      });
    }
    const most = Math.max(...share, 1e-9);
    draw.setTransform(zoom, 0, 0, zoom, 0, 0);
    draw.imageSmoothingEnabled = false;
    draw.drawImage(image, 0, 0);
    tokens.forEach((_, n) => {
      const left = (n % columns) * patch,
        top = Math.floor(n / columns) * patch;
      draw.fillStyle = `rgba(255, 255, 255, ${0.7 * (1 - share[n] / most)})`;
      draw.fillRect(left, top, patch, patch);
      draw.lineWidth = 0.4 + (1.6 * share[n]) / most;
      draw.strokeStyle = `rgba(20, 20, 20, ${0.2 + (0.8 * share[n]) / most})`;
      draw.strokeRect(left + 1, top + 1, patch - 2, patch - 2);
    });
    draw.lineWidth = 2;
    draw.strokeStyle = "#d00000";
    for (const place of places) {
      if (place.length === 4) {
        const [top, left, bottom, right] = place;
        draw.strokeRect(left, top, right - left, bottom - top);
      } else {
        draw.beginPath();
        draw.arc(place[0], place[1], 5, 0, 7);
        draw.stroke();
      }
    }
    const sum = share.reduce((a, b) => a + b, 0);
    told.replaceChildren(
      written(token(run, query)),
      ` reads the picture with ${percent(sum)} of its attention (${chosen.mean ? "mean of all heads" : `layer ${chosen.layer} head ${chosen.head}`}); clear patches most` +
        (places.length ? "; red: the places of the answer." : "."),
    );
    canvas.setAttribute("aria-label", `the picture in ${tokens.length} patches`);
    mean.textContent = chosen.mean
      ? `show layer ${chosen.layer} head ${chosen.head} alone`
      : "show the mean of all heads";
  };
  image.onload = () => follow(show);
  image.src = run.picture.source;
}

// ---- The block ----

function blockView(run, pane) {
  const kinds = el("p", {}),
    drawing = el("div", { class: "scroll" }),
    code = el("div", { class: "code", tabindex: 0, "aria-label": "the lines of the model file" }),
    panel = el("div", { "aria-live": "polite" });
  pane.append(kinds, el("div", { class: "two halves" }, drawing, el("div", {}, panel, code)));
  let shown = null;
  const open = n => {
    const told = run.diagrams[n],
      parsed = new DOMParser().parseFromString(told.svg, "image/svg+xml").documentElement;
    drawing.replaceChildren(document.importNode(parsed, true));
    for (const box of drawing.querySelectorAll("[data-box]")) {
      const pick = () =>
        choose({
          box: box.dataset.box,
          layer: run.windows[chosen.layer] === told.window ? chosen.layer : told.layer,
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
      ...told.lines.map(([n, line], i) =>
        el(
          "div",
          { "data-line": n, style: i && told.lines[i - 1][0] !== n - 1 ? "margin-top: 10px" : "" },
          el("b", {}, String(n).padStart(4) + "  "),
          line,
        ),
      ),
    );
    shown = n;
  };
  if (run.diagrams.length > 1)
    kinds.append(
      ...run.diagrams.map((told, n) =>
        el(
          "button",
          { type: "button", onclick: () => choose({ layer: told.layer, box: chosen.box }) },
          told.window ? `layers that see ${told.window} tokens` : "layers that see all tokens",
        ),
      ),
    );
  follow(() => {
    const layer = Math.min(chosen.layer, run.layers - 1),
      n = run.diagrams.findIndex(told => told.window === run.windows[layer]),
      told = run.diagrams[n];
    if (n !== shown) open(n);
    [...kinds.children].forEach((button, i) => button.setAttribute("aria-pressed", i === n));
    const key = chosen.box in told.boxes ? chosen.box : Object.keys(told.boxes)[0];
    for (const box of drawing.querySelectorAll("[data-box]"))
      box.classList.toggle("on", box.dataset.box === key);
    let first = null;
    for (const line of code.children) {
      const on = told.boxes[key].some(([a, b]) => a <= line.dataset.line && line.dataset.line <= b);
      line.classList.toggle("on", on);
      first ??= on ? line : null;
    }
    if (first) code.scrollTop = first.offsetTop - code.offsetTop - 60;
    drawValues(run, panel, told, key, layer);
  });
}

function drawValues(run, box, told, key, layer) {
  const [stage, label] = told.stages[key],
    query = at(run),
    [shape, formula] = run.stages[stage],
    value = run.values[stage];
  const parts = [
    el("h3", {}, `${label}: `, el("code", {}, `layers.${layer}.${stage}`)),
    el("p", { class: "soft" }, `${shape}: ${formula}. Lines of ${told.file} below.`),
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
  if (key.endsWith("_turn")) parts.push(rotation(run));
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

// ---- Two runs ----

function comparedView() {
  const told = DATA.compared,
    [a, b] = RUNS,
    box = el(
      "section",
      { id: "difference" },
      el("h2", {}, "The difference"),
      told.remarks.map(text => el("p", { class: "soft" }, text + ".")),
    );
  document.body.append(box);
  const heat = (x, most) =>
    `background: rgba(var(--warm), calc(var(--deepest) * ${Math.min(1, x === null ? 0 : x / most).toFixed(3)}))`;
  if (told.bits)
    box.append(
      el("h3", {}, "How far the next tokens' chances part (Kullback-Leibler, bits)"),
      el(
        "div",
        { class: "text" },
        told.pairs.map(([i], n) =>
          el(
            "span",
            {
              class: "token",
              style: heat(told.bits[n], 6),
              title: `${number(told.bits[n])} bits`,
              onclick: () => choose({ run: 0, token: i }),
            },
            token(a, i).replace(/\n/g, "↵\n"),
          ),
        ),
      ),
    );
  if (told.sums)
    box.append(
      el("h3", {}, "How far the sums part, layer by layer (size of the difference by their own)"),
      el(
        "div",
        { class: "scroll" },
        el(
          "table",
          { class: "lens" },
          el(
            "thead",
            {},
            el(
              "tr",
              {},
              el("th"),
              told.pairs.map(([i]) => el("th", {}, visible(token(a, i)))),
            ),
          ),
          told.sums
            .map((row, i) => [row, i])
            .reverse()
            .map(([row, i]) =>
              el(
                "tr",
                {},
                el("th", {}, i ? `layer ${i - 1}` : "embeddings"),
                row.map((x, n) =>
                  el(
                    "td",
                    {},
                    el(
                      "button",
                      {
                        type: "button",
                        tabindex: -1,
                        style: heat(x, 1.2),
                        onclick: () => choose({ run: 0, token: told.pairs[n][0] }),
                      },
                      number(x),
                    ),
                  ),
                ),
              ),
            ),
        ),
      ),
    );
  if (told.heads)
    box.append(
      el("h3", {}, "Which heads read otherwise (share of attention that moved, mean over the text)"),
      el(
        "div",
        { class: "scroll" },
        el(
          "table",
          {},
          told.heads.map((row, layer) =>
            el(
              "tr",
              {},
              el("th", {}, `layer ${layer}`),
              row.map((x, head) =>
                el(
                  "td",
                  { style: heat(x, 0.6) },
                  el(
                    "button",
                    { type: "button", onclick: () => choose({ layer, head, mean: false }) },
                    `head ${head}: ${percent(x)}`,
                  ),
                ),
              ),
            ),
          ),
        ),
      ),
    );
  if (told.writers) {
    const list = el("div");
    box.append(el("h3", {}, "Who wrote it otherwise"), list);
    follow(() => {
      const [i, j] = [at(a), at(b)],
        same = a.writers.targets[i] === b.writers.targets[j];
      const rows = a.writers.names
        .map((name, n) => [name, (b.writers.values[n][j] ?? 0) - (a.writers.values[n][i] ?? 0)])
        .sort((x, y) => Math.abs(y[1]) - Math.abs(x[1]))
        .slice(0, 8);
      list.replaceChildren(
        same
          ? el(
              "p",
              {},
              "What the second adds more to the logit of ",
              written(word(a, a.writers.targets[i])),
              " than the first:",
            )
          : el(
              "p",
              { class: "soft" },
              "Another token follows in each text here: choose one that both share.",
            ),
        same
          ? bars(
              rows.map(([name, x]) => [partName(name), x, (x > 0 ? "+" : "") + number(x)]),
              text => text,
            )
          : "",
      );
    });
  }
}

// ---- The page ----

function start() {
  const view = readAddress();
  document.body.classList.toggle("pair", RUNS.length > 1);
  document.body.append(
    el(
      "header",
      {},
      RUNS.map(run => [
        el("h1", {}, `${run.name}: ${run.title}`),
        el(
          "p",
          {},
          `${run.class}, ${run.family}, in ${run.dtype}; ${run.ids.length} tokens` +
            (run.prompt < run.ids.length ? `, ${run.ids.length - run.prompt} of them generated` : "") +
            (run.start
              ? `; ${run.start.toLocaleString("en")} tokens before them were read and are not shown`
              : "") +
            ".",
        ),
        el(
          "dl",
          {},
          run.facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))),
        ),
        run.bad ? el("p", { class: "alarm", role: "alert" }, run.bad + ".") : null,
      ]).flat(),
    ),
  );
  const views = [
    [
      "text",
      "Text",
      "How likely each token was, and what the model expects after it: point at one, or choose it with click or arrow keys. All below follows it.",
      textView,
    ],
    [
      "attention",
      "Attention",
      "A small map for each layer (rows) and head: queries downwards, keys to the right. Choose one to see it large, and as arcs over the text.",
      attentionView,
    ],
    [
      "lens",
      "Logit lens",
      "What the model would say if it ended after each layer: the final norm and the output matrix on the sum there.",
      lensView,
    ],
    [
      "writers",
      "Who wrote this token",
      "The logit of what follows, split into what each part added. The norms' sizes are those of this pass.",
      writersView,
    ],
    [
      "magnitudes",
      "Magnitudes",
      "The largest number of each layer, against the end of float16.",
      magnitudesView,
    ],
    [
      "block",
      "The block",
      "One layer of this checkpoint, drawn from its modules. Choose a box for its lines in the model file and its values at the chosen token.",
      blockView,
    ],
  ];
  if (RUNS.some(run => run.picture))
    views.splice(2, 0, [
      "picture",
      "Picture",
      "The picture in its patches, each of them a token, and how much the chosen token reads of each.",
      pictureView,
    ]);
  const place = el("span", { class: "chosen" }),
    step = n =>
      el(
        "button",
        {
          type: "button",
          "aria-label": n < 0 ? "token before" : "next token",
          onclick: () =>
            choose({ token: Math.max(0, Math.min(RUNS[chosen.run].ids.length - 1, chosen.token + n)) }),
        },
        n < 0 ? "◀" : "▶",
      );
  document.body.append(
    el(
      "nav",
      { "aria-label": "views" },
      el(
        "div",
        {},
        RUNS.length > 1 ? el("a", { href: "#difference" }, "Difference") : null,
        views.map(([id, title]) => el("a", { href: "#" + id }, title)),
        step(-1),
        step(1),
        place,
      ),
    ),
  );
  follow(() => {
    const run = RUNS[chosen.run],
      i = at(run);
    place.replaceChildren(`token ${i + run.start} `, written(token(run, i)));
  });
  if (DATA.compared) comparedView();
  for (const [id, title, about, draw] of views) section(id, title, about, draw);
  document.getElementById(view)?.scrollIntoView();
  if (parent !== window) addEventListener("scroll", () => parent.postMessage({ look: chosenAsText() }, "*"));
}

start();
