// Draws the page of `page.py`: the data is in the element #data, one run or two. Text of models and people is
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
  large: false, // the big attention map, for the back of a hall
};

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
    rows.map(([text, share, info, remark]) =>
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
        el("td", { class: "number" }, info),
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
