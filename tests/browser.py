"""A headless Chromium for the tests that look at pages: Debian's, driven by Playwright; one a session."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


def open_browser() -> Iterator[Any]:
    """The browser, or a skip that says what is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[dev]'")
    found = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    path = os.environ.get("CHROMIUM") or next(filter(None, found), "")
    if not path:
        pytest.skip("no chromium: apt-get install chromium, or set CHROMIUM to its path")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Opened:
    """A page in a context of its own, with what it complained of and asked for."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.context = browser.new_context(**({"viewport": {"width": 1200, "height": 900}} | options))
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.dialogs: list[str] = []
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))
        self.page.goto(path.resolve().as_uri())
        self.page.wait_for_selector("html[data-ready=yes]")

    def draw(self, *ids: str) -> None:
        """Waits until these charts are there, or all of them."""
        which = list(ids) or self.page.evaluate("[...cifarlab.charts.keys()]")
        charts = "ids.map(id => cifarlab.charts.get(id))"
        drawn = f"Promise.all({charts}.map(chart => chart.view || chart.draw()))"
        self.page.evaluate(f"ids => {drawn}.then(() => null)", which)  # a view is too deep to be handed over

    def rows(self, chart: str, role: str) -> list[dict[str, Any]]:
        """Of a drawn chart, the data that its view holds."""
        view = "const chart = cifarlab.charts.get(id); return chart.view.data(chart.role(role)).map(row => ({...row}))"
        return list(self.page.evaluate(f"([id, role]) => {{ {view}; }}", [chart, role]))

    def close(self) -> None:
        self.context.close()
        assert self.complaints == []
        assert self.dialogs == []
        assert [url[:100] for url in self.requests if not url.startswith(("file:", "data:"))] == []
        assert len([url for url in self.requests if url.startswith("file:")]) == 1  # the page itself
