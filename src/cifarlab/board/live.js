/* Keeps a run's page up to date: asks every two seconds for the sections that have changed, and shows them in place. */
"use strict";
(() => {
  const EVERY = 2000;  // ms; while nothing runs, and in a tab that nobody sees, five times that
  const first = JSON.parse(document.getElementById("known").textContent);
  const status = document.getElementById("live");
  let known = first.keys;

  function say(text, kind) {
    if (status.textContent !== text) status.textContent = text;
    status.dataset.kind = kind;
  }

  async function look() {
    let running = first.running;
    try {
      const answer = await fetch(`/news/${location.pathname.split("/").pop()}?have=${known.join(",")}`);
      if (answer.status === 404) throw new Error("the run's folder is gone");
      if (!answer.ok) throw new Error(await answer.text());
      const news = await answer.json();
      for (const section of news.sections) if ("html" in section) await cifarlab.refresh(section);
      cifarlab.arrange(news.sections);
      if (known.length) document.getElementById("under").innerHTML = news.under;
      known = news.sections.map((section) => section.key);
      running = news.running;
      say(running ? "running: this page follows it" : "not running", running ? "good" : "");
    } catch (error) {
      say(error instanceof TypeError ? "the board does not answer: is it still running?" : String(error.message), "bad");
    }
    setTimeout(look, running && !document.hidden ? EVERY : 5 * EVERY);
  }

  look();
})();
