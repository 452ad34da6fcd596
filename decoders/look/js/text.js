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
