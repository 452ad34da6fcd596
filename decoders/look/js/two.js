// ---- Two runs ----

function comparedView() {
  const info = DATA.compared,
    [a, b] = RUNS,
    box = el(
      "section",
      { id: "difference" },
      el("h2", {}, "The difference"),
      info.remarks.map(text => el("p", { class: "soft" }, text + ".")),
    );
  document.body.append(box);
  const heat = (x, most) =>
    `background: rgba(var(--warm), calc(var(--deepest) * ${Math.min(1, x === null ? 0 : x / most).toFixed(3)}))`;
  if (info.bits)
    box.append(
      el("h3", {}, "How far the next tokens' chances part (Kullback-Leibler, bits)"),
      el(
        "div",
        { class: "text" },
        info.pairs.map(([i], n) =>
          el(
            "span",
            {
              class: "token",
              style: heat(info.bits[n], 6),
              title: `${number(info.bits[n])} bits`,
              onclick: () => choose({ run: 0, token: i }),
            },
            token(a, i).replace(/\n/g, "↵\n"),
          ),
        ),
      ),
    );
  if (info.residual)
    box.append(
      el("h3", {}, "How far the residual streams part, layer by layer (length of the difference by their own)"),
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
              info.pairs.map(([i]) => el("th", {}, visible(token(a, i)))),
            ),
          ),
          info.residual
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
                        onclick: () => choose({ run: 0, token: info.pairs[n][0] }),
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
  if (info.heads)
    box.append(
      el("h3", {}, "Which heads read otherwise (share of attention that moved, mean over the text)"),
      el(
        "div",
        { class: "scroll" },
        el(
          "table",
          {},
          info.heads.map((row, layer) =>
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
  if (info.writers) {
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
