"use strict";
// Everything stored is data: it reaches the page as the text of a node, never as HTML.
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const chunks = document.getElementsByClassName("chunk");
  const ROWS = 25, COMPLETIONS = 20, KEPT = 4, LONG = 1200;

  function make(tag, properties = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name in node) node[name] = value; else node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  }

  function shown(value, digits = 3) {
    if (value === null) return "unknown";
    if (Number.isInteger(value) || Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en");
    return String(Number(value.toPrecision(digits)));
  }

  const counted = (number, one) => `${number.toLocaleString("en")} ${one}${number === 1 ? "" : "s"}`;

  async function unpacked(text) {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  const opened = new Map(); // of chunks, the last few
  async function chunk(number) {
    if (!opened.has(number)) opened.set(number, unpacked(chunks[number].textContent));
    for (const old of opened.keys()) {
      if (opened.size <= KEPT) break;
      if (old !== number) opened.delete(old);
    }
    return opened.get(number);
  }

  // Plots: the numbers under a finger, a mouse or the arrow keys.

  function watchPlot(figure) {
    const chart = data.charts[figure.dataset.chart];
    const [plot, readout] = [figure.querySelector(".plot"), figure.querySelector(".readout")];
    const svg = plot.querySelector("svg"), newest = readout.textContent;
    const legend = [...figure.querySelectorAll(".legend b")].map((node) => [node, chart.lines[node.dataset.line], node.textContent]);
    const [left, right, top, bottom, first, last] = chart.axes;
    const steps = [...new Set(chart.lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
    const cursor = document.createElementNS(svg.namespaceURI, "line");
    cursor.setAttribute("style", "stroke: var(--ink); stroke-width: 1; opacity: 0.55");
    let at = steps.length - 1;

    // In the places of the newest values, so that nothing moves.
    function show(place) {
      at = place;
      const x = last === first ? left : left + ((steps[at] - first) / (last - first)) * (right - left);
      for (const [name, value] of Object.entries({ x1: x, x2: x, y1: top, y2: bottom })) cursor.setAttribute(name, value);
      svg.append(cursor);
      readout.textContent = `at step ${shown(steps[at])}`;
      for (const [node, line] of legend) {
        const found = line.steps.indexOf(steps[at]);
        node.textContent = found < 0 ? "–" : shown(line.values[found]);
      }
    }

    function hide() {
      cursor.remove();
      readout.textContent = newest;
      for (const [node, , text] of legend) node.textContent = text;
    }

    function point(event) {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      const step = first + ((x - left) / (right - left)) * (last - first);
      let nearest = 0;
      steps.forEach((one, place) => { if (Math.abs(one - step) < Math.abs(steps[nearest] - step)) nearest = place; });
      show(nearest);
    }

    plot.addEventListener("pointermove", point);
    plot.addEventListener("pointerdown", point);
    plot.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hide(); });
    plot.addEventListener("focus", () => { if (plot.matches(":focus-visible")) show(at); });
    plot.addEventListener("blur", hide);
    plot.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (move === undefined) return;
      event.preventDefault();
      show(Math.min(Math.max(at + move, 0), steps.length - 1));
    });

    const numbers = make("details", { className: "numbers" }, make("summary", {}, "Numbers"));
    numbers.addEventListener("toggle", () => {
      if (numbers.childElementCount > 1) return;
      const table = make("table", {}, make("tr", {}, ...["step", ...chart.lines.map((line) => line.name)]
        .map((name) => make("th", { scope: "col" }, name))));
      for (const step of steps) {
        const cells = chart.lines.map((line) => line.steps.indexOf(step)).map((place, number) =>
          make("td", {}, place < 0 ? "" : shown(chart.lines[number].values[place], 4)));
        table.append(make("tr", {}, make("td", {}, shown(step)), ...cells));
      }
      numbers.append(make("div", { tabIndex: 0 }, table));
    });
    figure.append(numbers);
  }

  // Questions

  const COLUMNS = [
    ["id", "Question", "question id"], ["bucket", "Correct", "correct"], ["stored", "Stored", "completions stored"],
    ["updated", "Updated", "last update"], ["reward", "Reward", "mean reward"], ["tokens", "Tokens", "mean length"],
    ["replays", "Replays", "replays"],
  ];
  const state = { query: "", bucket: "", sort: "updated", descending: true, page: 0, deep: false };
  let index, haystacks, rows = [], hits = null, search = 0, openRow = null;

  const ageOf = (version) => `${counted(data.now - version, "step")} ago`;
  const cellOf = {
    bucket: (q) => `${index.bucket[q]}/${data.group_size}`, stored: (q) => shown(index.stored[q]),
    updated: (q) => ageOf(index.updated[q]), reward: (q) => shown(index.reward[q]),
    tokens: (q) => Math.round(index.tokens[q]).toLocaleString("en"), replays: (q) => shown(index.replays[q]),
  };

  function marked(text) {
    const query = state.query.toLowerCase(), lower = text.toLowerCase();
    // Some letters are of another length in lower case.
    if (!query || lower.length !== text.length) return [text];
    const parts = [];
    let from = 0;
    for (let at = lower.indexOf(query); at >= 0 && parts.length < 400; at = lower.indexOf(query, from)) {
      parts.push(text.slice(from, at), make("mark", {}, text.slice(at, at + query.length)));
      from = at + query.length;
    }
    return [...parts, text.slice(from)];
  }

  function textOf(text) {
    const pre = make("pre", { dir: "auto" }, ...marked(text));
    const lines = text.split("\n").length;
    if (text.length <= LONG && lines <= 12) return [pre];
    pre.className = "short";
    const more = make("button", { type: "button", className: "more" }, "Show all");
    more.addEventListener("click", () => { pre.className = ""; more.remove(); });
    return [pre, more];
  }

  const messagesOf = (messages) => messages.flatMap(([role, text]) =>
    [...(role ? [make("p", { className: "turn" }, role)] : []), ...textOf(text)]);

  function completionOf(completion, number) {
    const facts = [
      completion.group === undefined ? "" : `group ${completion.group}`, `reward ${shown(completion.reward)}`,
      counted(completion.tokens, "token"), `step ${shown(completion.version)} (${ageOf(completion.version)})`,
      `replayed ${counted(completion.replays, "time")}`, `log-prob ${shown(completion.logp)}`,
      `entropy ${shown(completion.entropy)}`, completion.scored ? "scored, not generated" : "",
    ];
    const node = make("article", { className: "completion" },
      make("p", { className: "facts" }, make("b", {}, `Completion ${number}`), ` ${facts.filter(Boolean).join(" · ")}`));
    if (completion.prompt) node.append(make("h4", {}, "Prompt of this one"), ...messagesOf(completion.prompt));
    for (const [role, text] of completion.text) {
      const turn = make("div", { className: role && role !== "model" ? "others" : "" });
      if (role) turn.append(make("p", { className: "turn" }, role));
      turn.append(...textOf(text));
      node.append(turn);
    }
    return node;
  }

  function fill(texts, question) {
    texts.replaceChildren(make("div", {}, make("h4", {}, "Prompt"), ...messagesOf(question.prompt)));
    for (const [name, text] of question.columns) texts.append(make("div", {}, make("h4", {}, name), ...textOf(text)));
    const all = question.completions;
    function some(from) {
      for (let number = from; number < Math.min(from + COMPLETIONS, all.length); number++) {
        texts.append(completionOf(all[number], number + 1));
      }
      const left = all.length - from - COMPLETIONS;
      if (left <= 0) return;
      const more = make("button", { type: "button", className: "more" }, `Show ${Math.min(left, COMPLETIONS)} of ${left} more`);
      more.addEventListener("click", () => { more.remove(); some(from + COMPLETIONS); });
      texts.append(more);
    }
    some(0);
  }

  async function toggle(row, q) {
    const button = row.querySelector(".id");
    if (openRow) {
      const was = openRow;
      openRow = null;
      was.button.setAttribute("aria-expanded", "false");
      was.detail.remove();
      if (was.q === q) return;
    }
    const texts = make("div", { className: "texts" }, make("p", { className: "quiet" }, "Opening ..."));
    const detail = make("tr", { className: "detail" }, make("td", { colSpan: COLUMNS.length }, texts));
    openRow = { q, button, detail };
    button.setAttribute("aria-expanded", "true");
    row.after(detail);
    if (index.chunk[q] < 0) {
      texts.replaceChildren(make("p", { className: "missing" },
        "The text of its completions is left out of this page, which would be too large: exgrpo-trl show PATH --question " +
        `'${index.id[q]}' shows it.`));
      return;
    }
    try {
      fill(texts, (await chunk(index.chunk[q]))[index.place[q]]);
    } catch (error) {
      texts.replaceChildren(make("p", { className: "missing" }, `It cannot be opened: ${error.message}`));
    }
  }

  function draw() {
    const [head, body] = [byId("table").tHead.rows[0], byId("table").tBodies[0]];
    head.replaceChildren(...COLUMNS.map(([name, title]) => {
      const button = make("button", { type: "button" }, title + (name === state.sort ? (state.descending ? " ↓" : " ↑") : ""));
      button.addEventListener("click", () => {
        state.descending = name === state.sort ? !state.descending : name !== "id";
        state.sort = name;
        refresh();
      });
      const sorted = name === state.sort ? { "aria-sort": state.descending ? "descending" : "ascending" } : {};
      return make("th", { scope: "col", ...sorted }, button);
    }));
    const pages = Math.max(Math.ceil(rows.length / ROWS), 1);
    state.page = Math.min(state.page, pages - 1);
    openRow = null;
    body.replaceChildren(...rows.slice(state.page * ROWS, (state.page + 1) * ROWS).map((q) => {
      const button = make("button", { type: "button", className: "id", "aria-expanded": "false", dir: "auto" }, ...marked(index.id[q]));
      const beginning = make("div", { className: "beginning", dir: "auto" }, ...marked(index.prompt[q]));
      const row = make("tr", { className: "row" }, make("td", {}, button, beginning),
        ...COLUMNS.slice(1).map(([name, title]) => make("td", { "data-name": title.toLowerCase() }, cellOf[name](q))));
      row.addEventListener("click", () => { if (!String(getSelection())) toggle(row, q); });
      return row;
    }));
    byId("table").hidden = !rows.length;
    byId("pages").hidden = pages === 1;
    byId("page").textContent = `${state.page + 1} of ${pages}`;
    byId("back").disabled = state.page === 0;
    byId("on").disabled = state.page === pages - 1;
    byId("sort").value = state.sort;
    byId("direction").textContent = state.descending ? "↓" : "↑";
    byId("direction").setAttribute("aria-label", state.descending ? "highest first" : "lowest first");
  }

  function refresh(keepPage = false) {
    const query = state.query.toLowerCase();
    rows = index.id.map((_, q) => q).filter((q) =>
      (state.bucket === "" || index.bucket[q] === Number(state.bucket)) &&
      (!query || haystacks[q].includes(query) || (hits !== null && hits.has(q))));
    const of = index[state.sort], sign = state.descending ? -1 : 1;
    // Equal ones stay in the order of the index.
    rows.sort((a, b) => sign * (of[a] < of[b] ? -1 : of[a] > of[b] ? 1 : 0) || a - b);
    if (!keepPage) state.page = 0;
    const stored = rows.reduce((sum, q) => sum + index.stored[q], 0);
    say(`${shown(rows.length)} of ${counted(index.id.length, "question")}, with ${counted(stored, "completion")}.`);
    draw();
  }

  function say(text) { byId("found").textContent = text; }

  // Opens one chunk after the other; a new search stops the one before.
  async function searchDeep() {
    const own = ++search, query = state.query.toLowerCase();
    hits = null;
    refresh();
    if (!state.deep || !query) return;
    const found = new Set(), places = new Map();
    index.chunk.forEach((number, q) => places.set(`${number}:${index.place[q]}`, q));
    for (let number = 0; number < chunks.length; number++) {
      const questions = await unpacked(chunks[number].textContent);
      if (own !== search) return;
      questions.forEach((question, place) => {
        const texts = [...question.prompt, ...question.completions.flatMap((one) => [...one.text, ...(one.prompt ?? [])])];
        if (texts.some(([, text]) => text.toLowerCase().includes(query))) found.add(places.get(`${number}:${place}`));
      });
      say(`Searching: ${number + 1} of ${chunks.length} parts, ${counted(found.size, "question")} found.`);
    }
    hits = found;
    refresh();
  }

  async function begin() {
    document.querySelectorAll("figure[data-chart]").forEach(watchPlot);
    if (!data.num_questions) { say("The buffer holds no questions."); return; }
    if (typeof DecompressionStream === "undefined") {
      say("This browser cannot open the table: it needs Chrome 80, Firefox 113, Safari 16.4, or a newer one.");
      return;
    }
    index = await unpacked(byId("index").textContent);
    haystacks = index.id.map((id, q) => `${id}\n${index.prompt[q]}`.toLowerCase());
    const sizes = new Map();
    index.bucket.forEach((bucket) => sizes.set(bucket, (sizes.get(bucket) ?? 0) + 1));
    byId("bucket").append(make("option", { value: "" }, "all"), ...[...sizes.keys()].sort((a, b) => a - b).map((bucket) =>
      make("option", { value: String(bucket) }, `${bucket}/${data.group_size} (${shown(sizes.get(bucket))})`)));
    byId("sort").append(...COLUMNS.map(([name, , title]) => make("option", { value: name }, title)));
    const on = (id, event, action) => byId(id).addEventListener(event, action);
    let waiting;
    on("query", "input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => { state.query = byId("query").value; searchDeep(); }, 120);
    });
    on("bucket", "change", () => { state.bucket = byId("bucket").value; refresh(); });
    on("sort", "change", () => { state.sort = byId("sort").value; state.descending = state.sort !== "id"; refresh(); });
    on("direction", "click", () => { state.descending = !state.descending; refresh(); });
    on("deep", "change", () => { state.deep = byId("deep").checked; searchDeep(); });
    on("back", "click", () => { state.page--; draw(); });
    on("on", "click", () => { state.page++; draw(); byId("found").scrollIntoView(); });
    document.querySelector(".tools").addEventListener("submit", (event) => event.preventDefault());
    document.querySelector(".tools").hidden = false;
    refresh();
  }

  begin().catch((error) => say(`The questions cannot be shown: ${error.message}`));
})();
