"""The board over real HTTP and in a real browser: what it shows, what it follows, what it refuses."""

import http.client
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import cifarlab as cl
import cifarlab.runs as runs_module
from cifarlab.board import live
from cifarlab.board.live import LiveRuns
from cifarlab.board.server import Board
from cifarlab.cli import main
from cifarlab.config import InputError
from cifarlab.models import MODELS
from cifarlab.runs import Run, RunFolder

HOSTILE = "<img src=x onerror=alert(1)> 'quoted' \u202eltr"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two epochs of 20 steps of a tiny network on digits."""
    folder = tmp_path_factory.mktemp("runs")
    config = cl.TrainConfig(data="digits", model="board-tiny", epochs=2, batch_size=36, train_images=720, lr=0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "board-tiny", build_tiny)
        watch = cl.WatchConfig(runs_dir=folder, name="first", progress="none", forecast=False, figures=False, threads=1,
                               probes="gradient_flow")  # fmt: skip
        return cl.train(config, watch)


def build_tiny(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 5, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(196, num_classes))


@contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[Board]:
    with Board(folder, **settings) as board:
        thread = threading.Thread(target=board.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield board
        finally:
            board.shutdown()
            thread.join()


def ask(board: Board, path: str, method: str = "GET", **headers: str) -> tuple[int, str, dict[str, str]]:
    with closing(http.client.HTTPConnection("127.0.0.1", board.server_address[1], timeout=60)) as connection:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), dict(answer.getheaders())


@pytest.fixture
def runs(finished: Run, tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    shutil.copytree(finished.path, folder / "first", ignore=shutil.ignore_patterns("checkpoints"))
    return folder


def cut(path: Path, rows: int) -> bytes:
    """Takes a run's folder back to that many rows, as it was while it ran; gives the rows that are to come."""
    for name in ("result.json", "evaluation.json", "predictions.npz", "samples.npz", "thumbnails.npz"):
        (path / name).unlink(missing_ok=True)
    lines = (path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (path / "metrics.jsonl").write_bytes(b"".join(lines[:rows]))
    return b"".join(lines[rows:])


def test_only_this_machine_reaches_it_and_only_by_its_name(runs: Path) -> None:
    with serving(runs) as board:
        assert board.socket.getsockname()[0] == "127.0.0.1"
        assert not board.is_open
        assert board.url.startswith("http://127.0.0.1:")
        port = board.server_address[1]
        for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}", "LOCALHOST"):
            assert ask(board, "/runs.json", Host=host)[0] == 200
        for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "192.168.1.7", "", "[",
                     "@localhost@evil.example"):  # fmt: skip
            status, told, _ = ask(board, "/runs.json", Host=host)
            assert (status, "first" in told) == (403, False), host
    with serving(runs, host="0.0.0.0") as board:
        assert board.is_open
        assert ask(board, "/runs.json", Host="192.168.1.7")[0] == 200
        assert ask(board, "/runs.json", Host="evil.example")[0] == 403


def test_nothing_outside_the_folder_is_served(runs: Path) -> None:
    shutil.copytree(runs / "first", runs.parent / "outside")
    (runs / "link").symlink_to(runs.parent / "outside")
    (runs / "up").symlink_to("..")
    with serving(runs) as board:
        names = [run["name"] for run in json.loads(ask(board, "/runs.json")[1])["runs"]]
        assert names == ["first"]
        for name in ("link", "up", "..", ".", "../outside", "..%2Foutside", "%2e%2e/outside", "first/../../outside", "", "%00",
                     "up/outside", str(runs.parent / "outside").replace("/", "%2F"), "first/config.json", "nothing"):  # fmt: skip
            for kind in ("run", "news"):
                status, told, _ = ask(board, f"/{kind}/{name}")
                assert (status, told) == (404, "There is no such run here."), name
        for path in ("/etc/passwd", "//etc/passwd", "/runs/first/config.json", "/compare?run=first&run=link",
                     "/compare?run=first", "/compare"):  # fmt: skip
            assert ask(board, path)[0] == 404, path
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert ask(board, "/runs.json", method)[0] == 501
        status, body, headers = ask(board, "/", "HEAD")
        assert (status, body) == (200, "")
        assert headers["X-Content-Type-Options"] == "nosniff"


def test_asking_changes_no_file(runs: Path) -> None:
    def look() -> dict[str, tuple[int, int]]:
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in runs.rglob("*")}

    before = look()
    with serving(runs) as board:
        for path in ("/", "/runs.json", "/run/first", "/news/first"):
            assert ask(board, path)[0] == 200
    assert look() == before


def test_news_are_what_the_page_does_not_know_yet(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "LEAST", 0.0)
    monkeypatch.setattr(live, "SHARE", 1e9)
    rest = cut(runs / "first", 20)
    board = LiveRuns(runs)
    with RunFolder(runs / "first"):
        whole = json.loads(board.news("first", frozenset()) or "")
        assert whole["running"]
        keys = {section["id"]: section["key"] for section in whole["sections"]}
        assert {"summary", "curves", "gradient-flow"} <= keys.keys()
        assert "confusion" not in keys
        again = json.loads(board.news("first", frozenset(keys.values())) or "")
        assert not [section for section in again["sections"] if "html" in section]
        with (runs / "first" / "metrics.jsonl").open("ab") as file:
            file.write(rest)
        later = json.loads(board.news("first", frozenset(keys.values())) or "")
        changed = {section["id"] for section in later["sections"] if "html" in section}
        assert {"summary", "curves"} <= changed
        assert "configuration" not in changed
    ended = json.loads(board.news("first", frozenset(keys.values())) or "")
    assert not ended["running"]


def test_a_page_costs_a_running_training_little(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is asked for, it is made anew only when files have changed, and seldom where that is dear."""
    now, made = [100.0], [0]

    def slowly(run: Run) -> Any:
        made[0] += 1
        now[0] += 2.0
        return []

    for clock in ("monotonic", "thread_time"):
        monkeypatch.setattr(f"cifarlab.board.live.time.{clock}", lambda: now[0])
    monkeypatch.setattr(live, "show_run", slowly)
    board = LiveRuns(runs)
    for second in range(200):
        now[0] += 1
        (runs / "first" / "metrics.jsonl").touch()
        assert board.news("first", frozenset())
        assert made[0] <= 1 + second / 18
    assert made[0] >= 7
    now[0] += 1000
    board.news("first", frozenset())
    before = made[0]
    for _ in range(200):  # nothing changes any more
        now[0] += 1
        board.news("first", frozenset())
    assert made[0] == before


def test_of_a_running_run_new_rows_are_read_only(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "LEAST", 0.0)
    monkeypatch.setattr(live, "SHARE", 1e9)
    looks: list[int] = []

    def show(run: Run) -> Any:
        looks.append(len(run.metrics.rows))
        return []

    monkeypatch.setattr(live, "show_run", show)
    rest = cut(runs / "first", 20)
    size = (runs / "first" / "metrics.jsonl").stat().st_size
    board, read = LiveRuns(runs), runs_module.read_rows
    begun: list[int] = []

    def note(path: Path, start: int = 0) -> Any:
        begun.append(start)
        return read(path, start)

    monkeypatch.setattr(runs_module, "read_rows", note)
    with RunFolder(runs / "first"):
        board.news("first", frozenset())
        with (runs / "first" / "metrics.jsonl").open("ab") as file:
            file.write(rest)
        board.news("first", frozenset())
        assert begun == [0, size]
    board.news("first", frozenset())  # it has ended: nobody follows it any more
    assert looks[0] < looks[1] == looks[2]
    assert not board._followed


def test_the_end_of_a_run_is_shown_at_once(runs: Path) -> None:
    """However dear the page was: a minute of `running` beside `finished` is wrong, and nothing trains beside it any more."""
    board = LiveRuns(runs)
    with RunFolder(runs / "first"):
        assert json.loads(board.news("first", frozenset()) or "")["running"]
        assert json.loads(board.news("first", frozenset()) or "")["running"]
    assert not json.loads(board.news("first", frozenset()) or "")["running"]


def test_a_damaged_run_is_said_and_the_others_are_shown(runs: Path) -> None:
    shutil.copytree(runs / "first", runs / "torn")
    (runs / "torn" / "config.json").write_text("{")
    with serving(runs) as board:
        table = json.loads(ask(board, "/runs.json")[1])
        assert [run["name"] for run in table["runs"]] == ["first"]
        assert "torn is damaged" in table["damaged"][0]
        status, told, _ = ask(board, "/run/torn")
        assert status in (404, 500)
        assert "Traceback" not in told


def test_a_folder_that_comes_later_is_waited_for(tmp_path: Path, finished: Run) -> None:
    with serving(tmp_path / "later") as board:
        assert json.loads(ask(board, "/runs.json")[1])["runs"] == []
        shutil.copytree(finished.path, tmp_path / "later" / "first")
        assert len(json.loads(ask(board, "/runs.json")[1])["runs"]) == 1


def test_a_taken_port_is_said_and_without_one_the_next_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["board", str(tmp_path), "--port", str(port)]) == 2
        assert "choose another --port" in capsys.readouterr().err
    with Board(tmp_path) as one, Board(tmp_path) as two:
        assert one.server_address[1] != two.server_address[1]
    with pytest.raises(InputError, match="or a --host of this machine"):
        Board(tmp_path, host="203.0.113.7")
    for wrong in (["--port", "70000"], ["--port", "-1"]):
        assert main(["board", str(tmp_path), *wrong]) == 2
        assert "is no port" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["board", str(tmp_path / "file")]) == 2


# ---- in a browser --------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A tab in which any error, and any request to elsewhere, fails the test."""
    context = browser.new_context(viewport={"width": 1100, "height": 900})
    tab, wrong = context.new_page(), list[str]()
    tab.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    ours = ("http://127.0.0.1:", "data:")
    tab.on("request", lambda request: None if request.url.startswith(ours) else wrong.append(request.url))
    yield tab
    context.close()
    assert not wrong


def until(page: Any, condition: str) -> None:
    """As Playwright's wait_for_function, which the pages' own policy forbids: it would evaluate a string there."""
    for _ in range(600):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(100)
    pytest.fail(f"not within a minute: {condition}")


def test_the_table_sorts_filters_and_shows_new_runs_without_a_reload(runs: Path, page: Any) -> None:
    shutil.copytree(runs / "first", runs / HOSTILE)
    with serving(runs) as board:
        page.goto(board.url)
        page.wait_for_selector("#table tbody tr >> nth=1")
        page.evaluate("document.body.dataset.mark = 'the same page'")
        assert HOSTILE in page.locator("#table tbody").inner_text()
        assert page.locator("#table img").count() == 0
        result = json.loads((runs / "first" / "result.json").read_text())
        shutil.copytree(runs / "first", runs / "best")
        (runs / "best" / "result.json").write_text(json.dumps(result | {"test/accuracy": 0.999}))
        page.wait_for_selector("#table tbody tr >> nth=2")
        assert page.evaluate("document.body.dataset.mark") == "the same page"
        accuracy = page.get_by_role("button", name="Test accuracy")
        accuracy.click()
        assert page.locator("#table tbody tr").first.locator("th").inner_text() == "best"
        accuracy.click()
        assert page.locator("#table tbody tr").last.locator("th").inner_text() == "best"
        page.fill("#filter", "best digits")
        assert page.locator("#table tbody tr").count() == 1
        page.fill("#filter", "")
        assert page.locator("#compare").is_disabled()
        for name in ("best", "first"):
            page.get_by_label(f"mark {name}", exact=True).check()
        page.locator("#compare").click()
        page.wait_for_selector("html[data-ready]")
        assert page.locator("h1").inner_text() == "2 runs side by side"
        page.get_by_role("link", name="All runs").click()
        page.get_by_role("link", name="<img").click()
        page.wait_for_selector("html[data-ready]")
        assert page.locator("h1").inner_text() == HOSTILE


def test_a_run_is_followed_while_it_trains(runs: Path, page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "LEAST", 0.0)
    monkeypatch.setattr(live, "SHARE", 1e9)
    whole = {name: (runs / "first" / name).read_bytes() for name in ("result.json", "evaluation.json", "predictions.npz")}
    rest = cut(runs / "first", 20)
    with serving(runs) as board:
        with RunFolder(runs / "first"):
            page.goto(board.url + "run/first")
            page.wait_for_selector("#curves [data-drawn]", timeout=60_000)
            page.wait_for_selector("#live[data-kind=good]")
            page.evaluate("document.body.dataset.mark = 'the same page'")
            told = page.locator("#summary .tiles").inner_text()
            assert "20 of 40" in told
            page.locator("#curves [name=smoothing]").fill("2")  # as a person has set it
            points = "cifarlab.charts.get('learning-curves').rows(cifarlab.charts.get('learning-curves').role('loss-raw')).length"
            before = page.evaluate(points)
            with (runs / "first" / "metrics.jsonl").open("ab") as file:
                file.write(rest)
            until(page, f"{points} > {before}")
            assert page.locator("#curves [name=smoothing]").input_value() == "2"
            assert page.locator("#curves svg").count() >= 1
        for name, content in whole.items():
            (runs / "first" / name).write_bytes(content)
        page.wait_for_selector("section#confusion [data-chart]", timeout=60_000)
        until(page, "document.getElementById('live').textContent === 'not running'")
        links = page.locator("nav[aria-label=Sections] a").all_inner_texts()
        assert links == page.locator("main > section > h2").all_inner_texts()
        assert page.evaluate("document.body.dataset.mark") == "the same page"
        page.locator("#confusion").scroll_into_view_if_needed()
        page.wait_for_selector("#confusion [data-drawn]", timeout=60_000)
