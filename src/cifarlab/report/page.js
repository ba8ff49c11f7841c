/* The page's own program: draws charts when they come into view, and wires sliders, sorting, pictures and printing.

   Data stand in <script type="application/json" id="data-SECTION">: {charts, data, more}; see charts.py. Whoever has newer rows
   of a section calls cifarlab.update(section, data) with the same shape, and its charts are drawn anew, controls as they stand.
   Text from the data only ever becomes textContent. */
"use strict";
(() => {
  const $ = (selector, place = document) => place.querySelector(selector);
  const $$ = (selector, place = document) => [...place.querySelectorAll(selector)];
  const sections = {};
  const charts = new Map();  // id -> Chart

  // ---- data ----

  function unpack(packed) {
    const names = Object.keys(packed.columns);
    const columns = names.map((name) => {
      const column = packed.columns[name];
      return Array.isArray(column) ? column : column.at.map((place) => column.of[place]);
    });
    return Array.from({length: packed.n}, (_, row) => {
      const values = {};
      names.forEach((name, k) => { if (columns[k][row] !== null) values[name] = columns[k][row]; });
      return values;
    });
  }

  function walk(node, visit) {
    if (Array.isArray(node)) node.forEach((value) => walk(value, visit));
    else if (node && typeof node === "object") {
      visit(node);
      for (const [key, value] of Object.entries(node)) if (key !== "datasets" && key !== "values") walk(value, visit);
    }
  }

  // ---- charts ----

  const MANY = 3000;  // rows from which on a chart is painted instead of being built of elements, which browsers move slowly

  class Chart {
    constructor(place) {
      this.place = place;
      this.id = place.dataset.chart;
      this.section = place.dataset.section;
      this.variant = "";
      this.signals = {};
      this.replaced = {};          // data name -> rows that a control has put in place of the chart's own
      this.reshape = (spec) => spec;  // what a control changes in the specification
      this.view = null;
      this.frame = $(".frame", place);
      this.words = this.frame.getAttribute("aria-label");
    }

    get packed() { return sections[this.section]; }
    get specs() { return this.packed.charts[this.id].specs; }
    rows(name) { return unpack(this.packed.data[name]); }
    role(name) { return this.specs[this.variant].usermeta.roles[name]; }

    names(spec) {
      const found = new Set();
      walk(spec, (node) => { if (node.data && node.data.name) found.add(node.data.name); });
      return [...found];
    }

    // Everything below waits for promises only, never for the network or a timer: so what `beforeprint` asks for is there in time.
    async draw() {
      const turn = this.turn = (this.turn || 0) + 1;
      const room = this.drawnAt = this.frame.clientWidth || 640;
      const spec = this.reshape(structuredClone(this.specs[this.variant]));
      spec.background = null;
      spec.padding = {left: 2, right: 6, top: 6, bottom: 2};
      spec.datasets = Object.fromEntries(this.names(spec).map((name) => [name, this.replaced[name] || this.rows(name)]));
      for (const param of spec.params || []) if (param.name in this.signals) param.value = this.signals[param.name];
      if (room < 700) loosen(spec, room);
      for (let round = 0; round < 3; round += 1) {
        await this.render(spec);
        if (turn !== this.turn) return;  // asked for once more while it was drawn
        const excess = this.width() - room;
        if (excess <= 0 || !narrow(spec, excess, room)) break;
      }
      this.place.dataset.drawn = "yes";
    }

    width() {
      const drawn = $("svg, canvas", this.frame);
      // A canvas has its width in points in its style, but only on screens with more pixels than points.
      return drawn ? parseFloat(drawn.style.width) || parseFloat(drawn.getAttribute("width")) : 0;
    }

    async render(spec) {
      if (this.view) this.view.finalize();
      this.view = null;
      // `ast` has Vega walk its expressions instead of compiling them, which the page's policy forbids.
      const marks = Object.values(spec.datasets).reduce((sum, rows) => sum + rows.length, 0);
      const made = await window.vegaEmbed(this.frame, spec, {ast: true, mode: "vega-lite", actions: false, defaultStyle: false,
        renderer: marks > MANY ? "canvas" : "svg", tooltip: tip, logLevel: 1});
      this.view = made.view;
      this.frame.setAttribute("role", "img");  // Vega has put its own words there
      this.frame.setAttribute("aria-label", this.words);
      $("svg, canvas", this.frame).setAttribute("aria-hidden", "true");
      if (this.onclick) this.view.addEventListener("click", (event, item) => { if (item && item.datum) this.onclick(item.datum); });
    }

    signal(name, value) {
      this.signals[name] = value;
      if (this.view) this.view.signal(name, value).run();
    }

    feed(name, rows) {
      if (rows) this.replaced[name] = rows; else delete this.replaced[name];
      if (this.view) this.view.data(name, rows || this.rows(name)).run();
    }
  }

  // A chart that is too wide for a phone: parts under each other instead of beside each other, then narrower ones.
  function loosen(spec, room) {
    spec.config = {...spec.config, legend: {...(spec.config || {}).legend, layout: {bottom: {direction: "vertical", anchor: "start"}}}};
    walk(spec, (node) => {
      if (node.legend && typeof node.legend === "object") {
        node.legend.orient = "bottom";
        node.legend.columns = 1;
        node.legend.direction = node.legend.gradientLength ? "horizontal" : "vertical";
        node.legend.labelLimit = Math.max(120, room - 70);
        node.legend.titleLimit = Math.max(120, room - 40);
        if (node.legend.gradientLength) node.legend.gradientLength = Math.min(200, room - 90);
      } else if (node.field && node.scale && node.legend === undefined && node.scale.scheme) node.legend = {orient: "bottom"};
      if (node.axis && typeof node.axis === "object") {
        node.axis.labelLimit = Math.min(node.axis.labelLimit || 110, 110);
        if (node.axis.tickCount > 5) node.axis.tickCount = 4;
      }
      if (node.title && node.title.text) node.title.limit = room - 20;
    });
  }

  function narrow(spec, excess, room) {
    if (spec.hconcat) {
      spec.vconcat = spec.hconcat;
      delete spec.hconcat;
      delete spec.bounds;  // parts that were as high as each other now stand under each other, with their axes
      spec.spacing = 30;
      return true;
    }
    let changed = false;
    (function shrink(node, less) {
      if (Array.isArray(node)) { node.forEach((value) => shrink(value, less)); return; }
      if (!node || typeof node !== "object") return;
      if (node.hconcat && node !== spec) { node.vconcat = node.hconcat; delete node.hconcat; delete node.bounds; changed = true; }
      if (typeof node.width === "number" && node.width > 120) {
        const width = Math.max(120, Math.min(node.width - excess, room - 60));
        less = node.width - width;
        node.width = width;
        changed = changed || less > 0;
        walk(node, ({encoding}) => {  // names that were as wide as their cells would now stand on each other
          const axis = encoding && encoding.x && encoding.x.axis, domain = encoding && encoding.x && encoding.x.scale && encoding.x.scale.domain;
          if (axis && axis.labelOverlap === false && domain && width < (axis.labelFontSize || 10) * domain.length) axis.labelOverlap = "parity";
        });
      }
      // What stands at a place of the picture moves with its right edge.
      if (node.encoding && node.encoding.x && node.encoding.x.value > 60) node.encoding.x.value -= less;
      for (const [key, value] of Object.entries(node)) if (!["datasets", "config", "encoding"].includes(key)) shrink(value, less);
    })(spec, 0);
    return changed;
  }

  // ---- what is said of what is pointed at ----

  const box = Object.assign(document.createElement("div"), {id: "tip", hidden: true});
  box.setAttribute("role", "status");

  function tip(handler, event, item, value) {
    if (value === null || value === undefined || value === "") { box.hidden = true; return; }
    const lines = typeof value === "object" ? Object.entries(value).map(([key, told]) => `${key}: ${told}`) : [String(value)];
    box.replaceChildren(...lines.map((line) => Object.assign(document.createElement("div"), {textContent: line, dir: "auto"})));
    box.hidden = false;
    const left = Math.min(event.clientX + 14, window.innerWidth - box.offsetWidth - 8);
    const top = event.clientY + 18 + box.offsetHeight > window.innerHeight ? event.clientY - box.offsetHeight - 12 : event.clientY + 18;
    box.style.left = `${Math.max(4, left)}px`;
    box.style.top = `${Math.max(4, top)}px`;
  }

  // ---- controls ----

  // A map over steps: its slider moves the frame, and the layers of that step stand beside it.
  function wireSteps(controls) {
    const chart = charts.get(controls.dataset.for), slider = $("input", controls), told = $("output", controls);
    const bins = () => chart.rows(chart.role("bins"));
    const show = () => {
      const bin = bins()[slider.value];
      chart.signal("at", (bin.x + bin.x2) / 2);
      told.textContent = bin.told;
      slider.setAttribute("aria-valuetext", bin.told);
    };
    slider.max = bins().length - 1;
    slider.value = slider.max;
    told.textContent = bins()[slider.max].told;
    slider.setAttribute("aria-valuetext", told.textContent);
    slider.addEventListener("input", show);
    chart.refreshed = () => { const last = slider.value === slider.max; slider.max = bins().length - 1; if (last) slider.value = slider.max; show(); };
  }

  // Learning curves: smoothing, logarithmic loss, and what the time axis counts.
  const WINDOWS = [0, 0.1, 0.25, 0.5, 1, 2, 5];  // epochs

  function wireCurves(controls) {
    const chart = charts.get(controls.dataset.for), smoothing = $("[name=smoothing]", controls);
    const more = () => chart.packed.more, told = $("output", controls);
    const unit = () => $("[name=unit]:checked", controls).value;
    const asDrawn = Number(smoothing.value);

    function place(epoch) {
      if (unit() === "step") return epoch * more().steps_per_epoch;
      if (unit() !== "time") return epoch;
      const times = more().times;  // [epoch, minutes], rising
      let k = times.findIndex((pair) => pair[0] >= epoch);
      k = k < 0 ? times.length - 1 : Math.max(k, 1);
      const [[a, s], [b, t]] = [times[k - 1], times[k]];
      return s + (t - s) * (epoch - a) / (b - a || 1);
    }

    // The mean over a window around each point, which lags behind nothing.
    function smooth(rows, width) {
      const out = [];
      for (const split of new Set(rows.map((row) => row.split))) {
        const part = rows.filter((row) => row.split === split);
        let first = 0, last = 0, sum = 0;
        for (const row of part) {
          while (last < part.length && part[last].epoch <= row.epoch + width / 2 + 1e-9) sum += part[last++].value;
          while (part[first].epoch < row.epoch - width / 2 - 1e-9) sum -= part[first++].value;
          out.push({...row, value: sum / (last - first)});
        }
      }
      return out;
    }

    function feed() {
      const width = WINDOWS[smoothing.value];
      for (const quantity of ["loss", "accuracy"]) {
        const raw = chart.rows(chart.role(`${quantity}-raw`)), line = chart.rows(chart.role(`${quantity}-line`));
        const dense = new Set(raw.map((row) => row.split));
        const smoothed = Number(smoothing.value) === asDrawn ? line
          : [...smooth(raw, width), ...smooth(line.filter((row) => !dense.has(row.split)), width)];
        const marks = smoothed.length ? smoothed : line;
        const own = chart.rows(chart.role(`${quantity}-marks`));
        const moved = (rows) => rows.map((row) => ({...row, epoch: place(row.epoch)}));
        chart.replaced[chart.role(`${quantity}-raw`)] = moved(raw);
        chart.replaced[chart.role(`${quantity}-line`)] = moved(smoothed);
        chart.replaced[chart.role(`${quantity}-marks`)] = moved(Number(smoothing.value) === asDrawn ? own
          : own.filter((row) => !dense.has(row.split)));
      }
      told.textContent = WINDOWS[smoothing.value] ? `${WINDOWS[smoothing.value]} epoch${WINDOWS[smoothing.value] === 1 ? "" : "s"}` : "none";
      smoothing.setAttribute("aria-valuetext", told.textContent);
    }

    chart.reshape = (spec) => {
      const names = {epoch: "epoch", step: "step", time: "training time (min)"};
      walk(spec, (node) => {
        if (node.field !== "epoch" || !node.type) return;
        node.title = names[unit()];
        if (node.scale && node.scale.domain) node.scale.domain = node.scale.domain.map(place);
        if (unit() !== "epoch" && node.axis) delete node.axis.tickMinStep;
      });
      return spec;
    };

    smoothing.addEventListener("input", () => {
      feed();
      if (!chart.view) return;
      for (const [name, rows] of Object.entries(chart.replaced)) chart.view.data(name, rows);
      chart.view.run();
    });
    for (const input of $$("[name=unit], [name=log]", controls)) {
      input.addEventListener("change", () => {
        const log = $("[name=log]", controls);
        chart.replaced = {};
        chart.variant = log && log.checked ? "log" : "";
        feed();
        chart.draw();
      });
    }
    chart.refreshed = () => { chart.replaced = {}; feed(); };
    feed();
  }

  // ---- tables that sort ----

  function wireSorting(table) {
    const heads = $$("thead th", table);
    heads.forEach((head, column) => {
      const button = $("button", head);
      if (!button) return;
      button.addEventListener("click", () => {
        const falling = head.getAttribute("aria-sort") === "descending" ? false
          : head.getAttribute("aria-sort") === "ascending" ? true : head.dataset.kind === "number";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", falling ? "descending" : "ascending");
        const body = $("tbody", table);
        const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
        const number = (text) => (text === "" ? -Infinity : Number(text));
        const rows = [...body.rows].sort((a, b) => (head.dataset.kind === "number"
          ? number(key(a)) - number(key(b)) : key(a).localeCompare(key(b), undefined, {numeric: true})) * (falling ? -1 : 1));
        body.append(...rows);
      });
    });
  }

  // ---- pictures ----

  function picture(pictures, place, size) {
    const image = document.createElement("span"), scale = size / Math.max(pictures.width, pictures.height);
    const [column, row] = [place % pictures.columns, Math.floor(place / pictures.columns)];
    image.className = "picture";
    image.setAttribute("role", "img");
    image.style.width = `${pictures.width * scale}px`;
    image.style.height = `${pictures.height * scale}px`;
    image.style.backgroundImage = `url("${pictures.uri}")`;
    image.style.backgroundSize = `${pictures.width * pictures.columns * scale}px ${pictures.height * pictures.rows * scale}px`;
    image.style.backgroundPosition = `${-column * pictures.width * scale}px ${-row * pictures.height * scale}px`;
    return image;
  }

  function figureOf(pictures, place, size) {
    const found = pictures.pictures[place], figure = document.createElement("figure");
    const [index, truth, predicted, share] = found, image = picture(pictures, place, size);
    const names = pictures.names, caption = document.createElement("figcaption");
    const said = truth === predicted ? names[truth] : `${names[truth]} → ${names[predicted]}`;
    const words = [said, `${(100 * share).toFixed(1)} % sure`, ...(index >= 0 ? [`image ${index}`] : [])];
    image.setAttribute("aria-label", words.join(", "));
    caption.append(...words.map((text) => Object.assign(document.createElement("bdi"), {textContent: text})));
    figure.append(image, caption);
    return figure;
  }

  function openCell(truth, predicted) {
    const pictures = sections.confusion.more.pictures, dialog = $("#cell"), names = sections.confusion.more.names;
    const places = pictures ? pictures.cells[`${truth},${predicted}`] || [] : [];
    const count = sections.confusion.more.counts[truth][predicted];
    const heading = $("h3", dialog);
    const quoted = (name) => Object.assign(document.createElement("bdi"), {textContent: name});
    heading.replaceChildren(...(truth === predicted ? [quoted(names[truth]), ", recognised"]
      : [quoted(names[truth]), " taken for ", quoted(names[predicted])]));
    $("p", dialog).textContent = `${count.toLocaleString("en")} image${count === 1 ? "" : "s"}`
      + (places.length === count ? ", surest first" : places.length ? `; the ${places.length} kept in the run's folder, surest first`
        : "; none is kept in the run's folder");
    $(".pictures", dialog).replaceChildren(...places.map((place) => figureOf(pictures, place, 96)));
    if (!dialog.open) dialog.showModal();
  }

  function wirePictures(place) {
    const confusion = charts.get("confusion");
    if (confusion) confusion.onclick = (datum) => { if (datum.cell) openCell(datum.cell[0], datum.cell[1]); };
    for (const button of $$("[data-cell]", place)) button.addEventListener("click", () => openCell(...button.dataset.cell.split(",").map(Number)));
    const mistakes = $("#mistakes .pictures"), pictures = sections.confusion && sections.confusion.more.pictures;
    if (mistakes && pictures) mistakes.replaceChildren(...pictures.mistakes.slice(0, 24).map((place) => figureOf(pictures, place, 88)));
  }

  // ---- life of the page ----

  function update(name, data) {
    sections[name] = data;
    for (const chart of charts.values()) {
      if (chart.section !== name || !(chart.id in data.charts)) continue;
      if (chart.refreshed) chart.refreshed();
      if (chart.turn) chart.draw();
    }
  }

  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      seen.unobserve(entry.target);
      const chart = charts.get(entry.target.dataset.chart);
      if (chart && !chart.turn) chart.draw();
    }
  }, {rootMargin: "400px"});

  // Brings to life what is new in a part of the page; charts that are known, and their controls, live already.
  function wire(part) {
    for (const table of $$("table.sortable", part)) wireSorting(table);
    const fresh = $$("[data-chart]", part).filter((place) => !(charts.get(place.dataset.chart) || {place: null}).place?.isSameNode(place));
    for (const place of fresh) charts.set(place.dataset.chart, new Chart(place));
    wirePictures(part);
    for (const place of fresh) {
      for (const controls of $$(".controls[data-kind=steps]", place)) wireSteps(controls);
      for (const controls of $$(".controls[data-kind=curves]", place)) wireCurves(controls);
      for (const controls of $$(".controls", place)) controls.hidden = false;
      seen.observe(place);
    }
  }

  // A section with newer content, in place: {id, title, html, data}. Its charts stay, with the controls as somebody has set them,
  // and so do the order of sorted tables and what was unfolded; what is around them is new. The HTML comes from the same
  // templates as the page's.
  function refresh({id, title, html, data}) {
    let place = document.getElementById(id);
    if (!place) {
      place = Object.assign(document.createElement("section"), {id});
      place.setAttribute("aria-labelledby", `h-${id}`);
      $("main").append(place);
    }
    const heading = Object.assign(document.createElement("h2"), {id: `h-${id}`, textContent: title});
    const next = Object.assign(document.createElement("template"), {innerHTML: html}).content;
    const sorted = $$("table.sortable", place).map((table) => {
      const column = $$("thead th", table).findIndex((head) => head.hasAttribute("aria-sort"));
      return [column, column < 0 ? "" : $$("thead th", table)[column].getAttribute("aria-sort")];
    });
    $$("details", place).forEach((old, k) => { const same = $$("details", next)[k]; if (same) same.open = old.open; });
    const focused = place.contains(document.activeElement) ? document.activeElement : null;
    sections[id] = data;
    const staying = [];
    for (const mark of $$("[data-chart]", next)) {
      const chart = charts.get(mark.dataset.chart);
      if (!chart || !place.contains(chart.place) || !data) continue;
      for (const name of [".frame", ".controls"]) {
        const [old, fresh] = [$(name, chart.place), $(name, mark)];
        if (!old || !fresh) continue;
        if (name === ".frame") old.setAttribute("aria-label", fresh.getAttribute("aria-label"));
        fresh.replaceWith(old);
      }
      seen.unobserve(chart.place);
      chart.place = mark;
      if (!chart.turn) seen.observe(mark);
      staying.push(chart);
    }
    place.replaceChildren(heading, next);
    for (const [name, chart] of charts) if (!chart.place.isConnected) { if (chart.view) chart.view.finalize(); charts.delete(name); }
    wire(place);
    $$("table.sortable", place).forEach((table, k) => {
      const [column, way] = sorted[k] || [-1, ""];
      if (column < 0) return;
      const head = $$("thead th", table)[column], button = head && $("button", head);
      for (let turn = 0; button && turn < 2 && head.getAttribute("aria-sort") !== way; turn += 1) button.click();
    });
    if (focused && focused.isConnected && focused !== document.activeElement) focused.focus({preventScroll: true});
    return Promise.all(staying.map((chart) => {
      if (chart.refreshed) chart.refreshed();
      return chart.turn ? chart.draw() : null;
    }));
  }

  // The sections in this order, and the links to them; what is no longer among them goes.
  function arrange(wanted) {
    const main = $("main"), links = $("nav[aria-label=Sections] .in");
    const ids = wanted.map((section) => section.id);
    for (const place of $$(":scope > section", main)) if (!ids.includes(place.id)) place.remove();
    if ($$("a", links).map((link) => link.hash.slice(1)).join() === ids.join()) return;
    links.replaceChildren(...wanted.map(({id, title}) => Object.assign(document.createElement("a"), {href: `#${id}`, textContent: title})));
    ids.forEach((id) => main.append(document.getElementById(id)));
  }

  function drawAll() {
    return Promise.all([...charts.values()].filter((chart) => !chart.turn).map((chart) => chart.draw()));
  }

  function setTheme(theme) {
    document.documentElement.dataset.theme = theme;
    $("#theme").setAttribute("aria-pressed", String(theme === "dark"));
  }

  function start() {
    document.body.append(box);
    for (const script of $$("script[id^='data-']")) sections[script.id.slice(5)] = JSON.parse(script.textContent);
    const dark = window.matchMedia("(prefers-color-scheme: dark)");
    setTheme(dark.matches ? "dark" : "light");
    dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
    $("#theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
    const dialog = $("#cell");
    if (dialog) dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
    wire(document.body);
    // On paper nothing unfolds: what stands folded under a chart is opened for the time of printing.
    let unfolded = [];
    window.addEventListener("beforeprint", () => {
      unfolded.push(...$$("details.how:not([open])"));
      for (const details of unfolded) details.open = true;
      drawAll();
    });
    window.addEventListener("afterprint", () => {
      for (const details of unfolded) details.open = false;
      unfolded = [];
    });
    $("#print").addEventListener("click", () => drawAll().then(() => window.print()));
    let waiting = 0;
    window.addEventListener("resize", () => {
      cancelAnimationFrame(waiting);
      waiting = requestAnimationFrame(() => {
        for (const chart of charts.values()) if (chart.turn && Math.abs(chart.frame.clientWidth - chart.drawnAt) > 24) chart.draw();
      });
    });
    document.documentElement.dataset.ready = "yes";
  }

  window.cifarlab = {update, refresh, arrange, charts, drawAll, sections};
  start();
})();
