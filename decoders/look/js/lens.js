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
    const positions = [...Array(to - from).keys()].map(i => from + i);
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
            positions.map(at => el("th", { scope: "col" }, visible(token(run, at)))),
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
              positions.map(at => cell(i, at)),
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
      () => positions.length,
      () => rows.indexOf(layer) * positions.length + query - from,
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
