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
    info = el("p");
  pane.append(el("div", { class: "picture" }, canvas), info, el("p", {}, mean));
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
    info.replaceChildren(
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
