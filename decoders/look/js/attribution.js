// ---- Who wrote this token ----

function writersView(run, pane) {
  const box = el("div");
  pane.append(box);
  follow(() => {
    const query = at(run),
      info = run.writers,
      share = Object.fromEntries(info.names.map((name, n) => [name, info.values[n][query] ?? 0]));
    const rows = [
      ["embeddings", ["embeddings"]],
      ...[...Array(run.layers).keys()].map(i => [
        `layer ${i}`,
        info.names.filter(name => name.startsWith(`layers.${i}.`)),
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
    const best = info.names
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
        written(word(run, info.targets[query])),
        ` with a logit of ${number(info.logits[query])}, the sum of:`,
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
          info.by_head
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
