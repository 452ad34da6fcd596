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
      "What the model would say if it ended after each layer: the final norm and the output matrix on the residual stream there.",
      lensView,
    ],
    [
      "writers",
      "Who wrote this token",
      "The logit of what follows, split into what each part added (direct logit attribution). The norms' sizes are those of this pass.",
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
