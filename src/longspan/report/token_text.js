for (const root of document.querySelectorAll(".tokens")) {
  const data = JSON.parse(root.querySelector(".data").textContent);
  const text = root.querySelector(".text"), detail = root.querySelector(".detail"), spans = [...text.children];
  const shading = root.querySelector(".shading"), layerOf = root.querySelector(".layer");
  const AROUND = innerWidth < 540 ? 7 : 12;
  let selected = -1, shades = [];

  const element = (tag, content, name) => {
    const node = document.createElement(tag);
    node.append(...[content].flat());
    if (name) node.className = name;
    return node;
  };
  const write = (value, digits = 3) =>
    value === null ? "–" : (Number.isInteger(value) ? String(value) : value.toPrecision(digits)).replace("-", "−");
  const layer = () => (layerOf ? data.layers[layerOf.value] : null);
  const nameOf = token => data.names[token] || data.tokens[token];
  // a token between a few characters before and after it
  function quoted(position, snippet) {
    const token = position - data.first;
    const [before, own, after] = snippet ?? [
      data.tokens.slice(Math.max(token - AROUND, 0), token).join(""),
      data.tokens[token] || data.names[token],
      data.tokens.slice(token + 1, token + 1 + AROUND).join(""),
    ];
    const plain = part => part.replaceAll("\n", "↵");
    return element("code", [plain(before.slice(-AROUND)), element("mark", plain(own)), plain(after.slice(0, AROUND))]);
  }

  // the mean of the rows at each token, null where one of them has no number
  const mean = rows => rows[0].map((_, token) =>
    rows.some(row => row[token] === null) ? null : rows.reduce((sum, row) => sum + row[token], 0) / rows.length);
  function seriesOfLayer() {
    const offered = [];
    for (const item of layer()?.diagnostics ?? []) {
      if (item.discrete || !Array.isArray(item.values[0])) continue;
      const values = mean(item.values), known = values.filter(value => value !== null);
      const low = Math.min(...known), high = Math.max(...known);
      const edges = high > low ? [1, 2, 3, 4, 5, 6, 7].map(step => low + ((high - low) * step) / 8) : [];
      const legend = edges.map((edge, step) => ["b" + step, "below " + write(edge)]);
      legend.push(edges.length ? ["b7", write(edges[6]) + " and more"] : ["b0", known.length ? write(low) : "–"]);
      const name = item.name + (item.values.length > 1 ? `, mean by ${item.per}` : "");
      offered.push({ name, unit: "", caption: item.caption, values, edges, legend, shades: legend.map(entry => entry[0]) });
    }
    return offered;
  }
  function offerShades() {
    shades = [...data.series, ...seriesOfLayer()];
    const kept = Math.min(shading.value, shades.length - 1);
    shading.replaceChildren(...shades.map((series, index) => new Option(series.name, index)));
    shading.value = kept;
  }
  function shade() {
    const series = shades[shading.value];
    spans.forEach((span, token) => {
      const value = series.values[token];
      const known = value !== null;
      const name = known ? series.shades[series.edges.filter(edge => edge <= value).length] : "none";
      span.className = name + (span.dataset.rank ? " read" : "");
      span.title = nameOf(token) + ": " + (known ? write(value) + " " + series.unit : "–");
    });
    root.querySelector(".caption").textContent = series.name + ": " + series.caption;
    const entries = series.legend.map(([name, range]) => element("li", [element("span", "", name), range]));
    root.querySelector(".legend").replaceChildren(...entries);
  }
  function listOf(title, index, weight, snippets) {
    const items = index.map((position, rank) => {
      const back = data.first + selected - position;
      const where = back ? `${back} before` : "itself";
      return element("li", [quoted(position, snippets?.[position]), ` ${write(weight[rank])} `, element("span", where, "faint")]);
    });
    return [element("p", title), element("ol", items)];
  }
  function describe() {
    const parts = [element("p", [quoted(data.first + selected), ` position ${data.first + selected}. `,
      data.series.map(series => {
        const value = series.values[selected];
        const sign = series.signed && value > 0 ? "+" : "";
        return `${series.name}: ${value === null ? "–" : sign + write(value) + " " + series.unit}`;
      }).join("; ")])];
    const here = layer();
    for (const span of text.querySelectorAll(".read")) {
      span.classList.remove("read");
      delete span.dataset.rank;
    }
    if (here) {
      const index = here.positions?.[selected];
      if (index) {
        index.forEach((position, rank) => {
          const span = spans[position - data.first];
          if (position !== data.first + selected) {
            span.classList.add("read");
            span.dataset.rank = rank + 1;
          }
        });
        parts.push(...listOf(
          `${here.label}: tokens with the largest weights, mean over heads (sum of all shown: ${write(here.sum[selected])})`,
          index, here.weights[selected]));
      } else if (here.positions) {
        parts.push(element("p", "This token was not read by the model.", "faint"));
      }
      for (const item of here.retrievals ?? [])
        if (item.positions[selected]?.length)
          parts.push(...listOf(item.name, item.positions[selected], item.weights[selected], item.snippets));
      for (const item of here.diagnostics ?? []) {
        const values = Array.isArray(item.values[0]) ? item.values.map(row => row[selected]) : item.values;
        const by = values.length > 1 ? `, by ${item.per}` : "";
        parts.push(element("p", `${item.name}${by}: ${values.map(value => write(value)).join(", ")}`));
      }
      if (here.note) parts.push(element("p", here.note, "faint"));
    }
    detail.replaceChildren(...parts);
  }
  function select(token) {
    if (selected >= 0) spans[selected].setAttribute("aria-selected", "false");
    selected = Math.max(0, Math.min(spans.length - 1, token));
    spans[selected].setAttribute("aria-selected", "true");
    text.setAttribute("aria-activedescendant", spans[selected].id);
    describe();
    // the panel covers the lower part of the window
    const box = spans[selected].getBoundingClientRect(), bottom = detail.getBoundingClientRect().top;
    if (box.top < 8) scrollBy(0, box.top - 60);
    else if (box.bottom > bottom - 8) scrollBy(0, box.bottom - bottom + 60);
  }
  function line(direction) {
    const from = spans[Math.max(selected, 0)], left = from.offsetLeft;
    let best = -1, near = Infinity, top = null;
    for (let token = selected + direction; token >= 0 && token < spans.length; token += direction) {
      const span = spans[token];
      if (span.offsetTop === from.offsetTop) continue;
      if (top === null) top = span.offsetTop;
      if (span.offsetTop !== top) break;
      if (Math.abs(span.offsetLeft - left) < near) [best, near] = [token, Math.abs(span.offsetLeft - left)];
    }
    return best < 0 ? selected : best;
  }
  const keys = {
    ArrowRight: () => selected + 1, ArrowLeft: () => selected - 1, ArrowDown: () => line(1), ArrowUp: () => line(-1),
    Home: () => 0, End: () => spans.length - 1,
  };
  text.addEventListener("keydown", event => {
    if (!(event.key in keys) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    select(keys[event.key]());
  });
  text.addEventListener("click", event => {
    const span = event.target.closest('[role="option"]');
    if (span) select(spans.indexOf(span));
  });
  shading.addEventListener("change", shade);
  layerOf?.addEventListener("change", () => {
    offerShades();
    if (selected >= 0) describe();
    shade();
  });
  offerShades();
}
