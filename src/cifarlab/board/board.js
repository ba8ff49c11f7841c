/* The table of all runs, asked for anew every two seconds. What comes is text, and only ever becomes textContent. */
"use strict";
(() => {
  const EVERY = 2000;  // ms
  const $ = (selector) => document.querySelector(selector);
  const body = $("#table tbody"), heads = [...document.querySelectorAll("#table th[data-key]")];
  const marked = new Set();
  const NUMBERS = new Set(["accuracy", "train_seconds", "alarms"]);
  const rows = new Map();  // run's name -> its <tr>, kept, so that marks and focus stay
  let runs = [], order = {key: "started", falling: true};

  function time(seconds) {
    if (seconds === null) return "–";
    if (seconds < 60) return `${seconds.toFixed(1)} s`;
    const whole = Math.round(seconds), two = (number) => String(number).padStart(2, "0");
    return `${Math.floor(whole / 3600)}:${two(Math.floor(whole / 60) % 60)}:${two(whole % 60)}`;
  }

  function told(run, key) {
    if (key === "accuracy") return run.accuracy === null ? "–" : `${(100 * run.accuracy).toFixed(2)} %`;
    if (key === "train_seconds") return time(run.train_seconds);
    if (key === "alarms") return run.alarms ? String(run.alarms) : "";
    if (key === "state" && run.state === "running" && run.num_steps) {
      return `running, ${Math.floor(100 * run.step / run.num_steps)} %`;
    }
    return String(run[key]);
  }

  function build(run) {
    const row = document.createElement("tr"), box = document.createElement("input"), first = row.insertCell();
    box.type = "checkbox";
    box.setAttribute("aria-label", `mark ${run.name}`);
    box.addEventListener("change", () => { marked[box.checked ? "add" : "delete"](run.name); count(); });
    first.append(box);
    for (const head of heads) {
      const cell = document.createElement(head.dataset.key === "name" ? "th" : "td"), text = document.createElement("bdi");
      cell.className = NUMBERS.has(head.dataset.key) ? "number" : head.dataset.key === "name" ? "names-cell" : "";
      if (head.dataset.key === "name") {
        const link = document.createElement("a");
        cell.scope = "row";
        link.href = `/run/${encodeURIComponent(run.name)}`;
        link.append(text);
        cell.append(link);
      } else cell.append(text);
      row.append(cell);
    }
    return row;
  }

  function fill(row, run) {
    row.dataset.state = run.state;
    heads.forEach((head, k) => {
      const text = row.cells[k + 1].querySelector("bdi"), now = told(run, head.dataset.key);
      if (text.textContent !== now) text.textContent = now;
    });
  }

  function compare(a, b) {
    const [x, y] = [a[order.key], b[order.key]];
    if (x === y) return a.name.localeCompare(b.name, undefined, {numeric: true});
    if (x === null || y === null) return x === null ? 1 : -1;  // what lacks the number comes last
    const rising = NUMBERS.has(order.key) ? x - y : String(x).localeCompare(String(y), undefined, {numeric: true});
    return order.falling ? -rising : rising;
  }

  function show() {
    const wanted = $("#filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const kept = runs.filter((run) => {
      const words = [run.name, run.recipe, run.model, run.data, run.state].join(" ").toLowerCase();
      return wanted.every((word) => words.includes(word));
    }).sort(compare);
    for (const name of [...rows.keys()]) if (!runs.some((run) => run.name === name)) { rows.delete(name); marked.delete(name); }
    const now = kept.map((run) => {
      if (!rows.has(run.name)) rows.set(run.name, build(run));
      fill(rows.get(run.name), run);
      return rows.get(run.name);
    });
    if (now.length !== body.rows.length || now.some((row, k) => row !== body.rows[k])) {
      const focused = document.activeElement;
      body.replaceChildren(...now);
      if (focused && focused.isConnected && focused !== document.activeElement) focused.focus();
    }
    const running = runs.filter((run) => run.state === "running").length;
    const words = runs.length ? `${runs.length} run${runs.length === 1 ? "" : "s"}, ${running} running`
      + (kept.length < runs.length ? `, ${kept.length} shown` : "") : "no run here yet: it appears as soon as one begins";
    if ($("#told").textContent !== words) $("#told").textContent = words;
    count();
  }

  function count() { $("#compare").disabled = marked.size < 2; }

  async function look() {
    try {
      const answer = await fetch("/runs.json");
      if (!answer.ok) throw new Error();
      const found = await answer.json();
      runs = found.runs;
      $("#folder").textContent = found.folder;
      $("#damaged").replaceChildren(...found.damaged.map((text) => Object.assign(document.createElement("li"), {textContent: text})));
      show();
    } catch {
      $("#told").textContent = "the board does not answer: is it still running?";
    }
    setTimeout(look, document.hidden ? 5 * EVERY : EVERY);
  }

  heads.forEach((head) => head.querySelector("button").addEventListener("click", () => {
    const key = head.dataset.key;
    order = {key, falling: order.key === key ? !order.falling : NUMBERS.has(key) || key === "started"};
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order.falling ? "descending" : "ascending");
    show();
  }));
  $("#filter").addEventListener("input", show);
  $("#tools").addEventListener("submit", (event) => {
    event.preventDefault();
    location.href = `/compare?${[...marked].map((name) => `run=${encodeURIComponent(name)}`).join("&")}`;
  });
  look();
})();
