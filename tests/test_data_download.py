"""Downloading from a real server on this machine: slow, breaking off, wrong, without ranges, and two processes at once."""

import functools
import hashlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from cifarlab.config import InputError
from cifarlab.data import download, load_dataset
from cifarlab.data.cifar import CIFAR10, Cifar

CONTENT = np.random.default_rng(0).bytes(300_000)
NAME = "cifar-10-python.tar.gz"


@dataclass
class Server:
    """What the server does; `requests` keeps the Range header (or "") of each request."""

    content: bytes = CONTENT
    has_ranges: bool = True
    cut_after: int = 0  # bytes sent by each request before it breaks off (0 = never)
    pause: float = 0.0  # seconds between pieces
    status: int = 200
    announces: bool = True
    shift: int = 0  # bytes that its answer to a range begins too late, and says so
    url: str = ""
    requests: list[str] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    def __init__(self, server: Server, *rest: object) -> None:
        self.plan = server
        super().__init__(*rest)  # type: ignore[arg-type]

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        plan = self.plan
        wanted = self.headers.get("Range", "")
        plan.requests.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and plan.has_ranges else 0
        if plan.status != 200 or start >= len(plan.content):
            self.send_error(plan.status if plan.status != 200 else 416)
            return
        body = plan.content[start:]
        self.send_response(206 if start else 200)
        if plan.announces:
            self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start + plan.shift}-{len(plan.content) - 1}/{len(plan.content)}")
        self.end_headers()
        body = body[: plan.cut_after] if plan.cut_after else body
        for place in range(0, len(body), 50_000):
            self.wfile.write(body[place : place + 50_000])
            time.sleep(plan.pause)


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Server]]:
    """Two servers, the mirrors of a small "official" file."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("CIFARLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CIFARLAB_DATA", raising=False)
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.01)
    running, plans = [], []
    for _ in range(2):
        plan = Server()
        server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, plan))
        plan.url = f"http://127.0.0.1:{server.server_port}/{NAME}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
        running.append(server)
        plans.append(plan)
    monkeypatch.setitem(download.MIRRORS, "cifar10", tuple(plan.url for plan in plans))
    yield plans
    for server in running:
        server.shutdown()
        server.server_close()


def small() -> Cifar:
    return replace(CIFAR10, md5=hashlib.md5(CONTENT).hexdigest(), num_bytes=len(CONTENT))


def fetch(folder: Path, url: str = "") -> bytes:
    path = download.download_cifar(small(), folder, url=url, progress=False)
    visible = [file.name for file in path.parent.iterdir() if not file.name.startswith(".") and file.is_file()]
    assert visible == [path.name]
    return path.read_bytes()


def test_first_mirror_suffices_and_a_second_call_asks_nobody(servers: list[Server], tmp_path: Path) -> None:
    assert fetch(tmp_path / "d") == CONTENT
    assert fetch(tmp_path / "d") == CONTENT
    assert [plan.requests for plan in servers] == [[""], []]


def test_a_connection_cut_again_and_again_is_resumed(servers: list[Server], tmp_path: Path) -> None:
    servers[0].cut_after = 100_000
    assert fetch(tmp_path) == CONTENT
    assert servers[0].requests == ["", "bytes=100000-", "bytes=200000-"]
    assert servers[1].requests == []


def test_a_part_left_by_an_earlier_start_is_continued(servers: list[Server], tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:123_456])
    assert fetch(tmp_path) == CONTENT
    assert servers[0].requests == ["bytes=123456-"]


def test_the_next_mirror_continues_where_the_first_failed(servers: list[Server], tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:1000])
    servers[0].status = 503
    assert fetch(tmp_path) == CONTENT
    assert servers[0].requests == ["bytes=1000-"] * 2
    assert servers[1].requests == ["bytes=1000-"]


def test_a_server_without_ranges_is_read_from_the_start(servers: list[Server], tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:1000])
    servers[0].has_ranges = False
    assert fetch(tmp_path) == CONTENT
    assert servers[0].requests == ["bytes=1000-"]


def test_a_wrong_part_is_thrown_away(servers: list[Server], tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(b"x" * 1000)
    assert fetch(tmp_path) == CONTENT
    assert servers[0].requests == ["bytes=1000-", ""]


def test_a_part_that_is_too_long_is_thrown_away(servers: list[Server], tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT + b"x")
    assert fetch(tmp_path) == CONTENT


@pytest.mark.parametrize("wrong", [b"<html>log in</html>", b"y" * len(CONTENT)], ids=["login page", "same length"])
def test_wrong_content_goes_to_the_next_mirror(wrong: bytes, servers: list[Server], tmp_path: Path) -> None:
    servers[0].content = wrong
    assert fetch(tmp_path) == CONTENT
    assert servers[1].requests == [""]


def test_an_unannounced_length_is_read_to_the_end(servers: list[Server], tmp_path: Path) -> None:
    servers[0].announces = False
    servers[0].cut_after = 100_000  # without Content-Length a cut looks like the end: only the size and checksum tell
    servers[0].has_ranges = False
    assert fetch(tmp_path) == CONTENT
    assert servers[1].requests


def test_another_range_than_asked_for_is_not_appended(servers: list[Server], tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:1000])
    servers[0].shift = 7
    assert fetch(tmp_path) == CONTENT
    assert servers[0].requests == ["bytes=1000-"]
    assert servers[1].requests == ["bytes=1000-"]  # the part was left as it was


def test_a_stalled_server_is_left(servers: list[Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.2)
    servers[0].pause = 0.7
    servers[0].has_ranges = False
    assert fetch(tmp_path) == CONTENT
    assert servers[1].requests


def test_failure_tells_what_was_tried_and_what_to_do(servers: list[Server], tmp_path: Path) -> None:
    servers[0].status = 404
    servers[1].content = b"z" * len(CONTENT)
    with pytest.raises(InputError) as caught:
        fetch(tmp_path)
    text = str(caught.value)
    assert f"{servers[0].url} (HTTP 404 Not Found), {servers[1].url} (its file has another checksum)" in text
    assert f"put the file into {tmp_path} yourself, or give --data-url" in text
    assert "\n" not in text
    assert [file.name for file in tmp_path.iterdir() if not file.name.startswith(".")] == []


def test_nobody_there(tmp_path: Path, servers: list[Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(download.MIRRORS, "cifar10", ("http://127.0.0.1:9/x",))
    with pytest.raises(InputError, match="refused"):
        fetch(tmp_path)


def test_an_unwritable_folder_is_named(servers: list[Server], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="give another --data-dir"):
        fetch(tmp_path / "file" / "below")


@pytest.mark.parametrize("url", ["ftp://host/a.tar.gz", "cifar.tar.gz", "https://host/", "javascript:1"])
def test_odd_addresses_are_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give the http, https or file address"):
        download.download_cifar(CIFAR10, tmp_path, url=url, progress=False)


def test_progress_goes_to_stderr(servers: list[Server], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    download.download_cifar(small(), tmp_path, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "Downloading CIFAR-10 from 127.0.0.1" in err
    assert "/s" in err


def archive_bytes(folder: Path) -> bytes:
    """A small CIFAR-10 in the binary version."""
    import io
    import tarfile

    batch = np.hstack([np.arange(10, dtype=np.uint8)[:, None], np.random.default_rng(1).integers(0, 256, (10, 3072), np.uint8)])
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = batch.size
            tar.addfile(info, io.BytesIO(batch.tobytes()))
    return buffer.getvalue()


def test_data_url_takes_another_file_and_keeps_it_apart(servers: list[Server], tmp_path: Path) -> None:
    servers[0].content = archive_bytes(tmp_path)
    url = servers[0].url.replace(NAME, "mine.tar.gz")
    for _ in range(2):
        dataset = load_dataset("cifar10", data_dir=tmp_path / "d", data_url=url, progress=False)
        assert len(dataset.train) == 50
    assert servers[0].requests == [""]
    servers[1].status = servers[0].status = 404
    with pytest.raises(InputError, match="HTTP 404"):  # not taken for the official one
        load_dataset("cifar10", data_dir=tmp_path / "d", progress=False)


def test_data_url_of_a_file_and_of_the_official_name(servers: list[Server], tmp_path: Path) -> None:
    (tmp_path / "mine.tar.gz").write_bytes(archive_bytes(tmp_path))
    url = (tmp_path / "mine.tar.gz").as_uri()
    assert len(load_dataset("cifar10", data_dir=tmp_path / "d", data_url=url, progress=False).test) == 10
    servers[0].content = archive_bytes(tmp_path)
    with pytest.raises(InputError, match=r"bytes, not 170,498,071.*check|put the file"):
        load_dataset("cifar10", data_dir=tmp_path / "e", data_url=servers[0].url, progress=False)


def test_junk_from_data_url_is_refused_by_its_content(servers: list[Server], tmp_path: Path) -> None:
    servers[0].content = b"<html>log in</html>"
    with pytest.raises(InputError, match="is not a whole tar"):
        load_dataset("cifar10", data_dir=tmp_path, data_url=servers[0].url.replace(NAME, "x.tar.gz"), progress=False)


def test_two_processes_download_once(servers: list[Server], tmp_path: Path) -> None:
    servers[0].pause = 0.15
    program = (
        "import sys; from dataclasses import replace; from pathlib import Path\n"
        "from cifarlab.data import download; from cifarlab.data.cifar import CIFAR10\n"
        f"download.MIRRORS['cifar10'] = ({servers[0].url!r},)\n"
        f"cifar = replace(CIFAR10, md5={small().md5!r}, num_bytes={len(CONTENT)})\n"
        f"print(download.download_cifar(cifar, Path({str(tmp_path)!r}), progress=False))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=30)[0].strip() for process in processes]
    assert outputs == [str(tmp_path / NAME)] * 2
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert servers[0].requests == [""]
