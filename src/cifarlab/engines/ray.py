"""The engine of a Ray cluster: a trial is a task with its need of cores and GPUs, and its run folder comes back to the driver.

Where a worker sees the study's folder (a shared file system), it trains right in it. Elsewhere it trains in a folder of its own
and sends that to the driver at each checkpoint and at the end, through an actor on the driver's node; so when a worker dies or is
preempted, the next one goes on from the last checkpoint that arrived. Ray itself retries nothing: `Runner` does, the same for all
engines.

Needs `pip install 'cifarlab[ray]'`, of the same version on every machine of the cluster. Ray is imported where it is used.
"""

import contextlib
import io
import logging
import os
import shutil
import tarfile
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from cifarlab.config import InputError
from cifarlab.engines.engine import Ended, Job, pack_model

POLL = 0.25  # seconds between two looks at a worker's checkpoints


class RayEngine:
    """Tasks on the Ray cluster at `address` ("auto", "host:port" or "ray://host:port"); "local" starts one on this machine.

    gpus: of each trial, a fraction too; None is one where the cluster has any and the device is not cpu. share: whether workers
    may write to the study's folder themselves where they see it.
    """

    def __init__(self, address: str, *, threads: int = 1, gpus: float | None = None, device: str = "auto", folder: Path,
                 share: bool = True) -> None:  # fmt: skip
        try:
            import ray
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
        except ImportError:
            raise InputError("--ray needs Ray: pip install 'cifarlab[ray]'") from None
        self._ray: Any = ray  # its own types do not say that functions become remote
        self.threads, self.address = threads, address
        self._ours = not ray.is_initialized()
        if self._ours:
            try:
                ray.init(None if address == "local" else address, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
                raise InputError(f"no Ray cluster answers at {address!r} ({error}): start one with `ray start --head`, "
                                 "or give --ray local") from None  # fmt: skip
        self._gpus = gpus if gpus is not None else float(device != "cpu" and self._resources.get("GPU", 0) > 0)
        self._token = folder / f".shared-{uuid.uuid4().hex}"
        if share:
            folder.mkdir(parents=True, exist_ok=True)
            self._token.touch()
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._mailbox = self._ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()
        self._run = self._ray.remote(run_trial)
        self._tasks: dict[Any, Job] = {}

    @property
    def _resources(self) -> dict[str, float]:
        return dict(self._ray.cluster_resources())

    @property
    def slots(self) -> int:
        """How many trials the cluster's machines of this moment take; none while it has no machine."""
        resources = self._resources
        slots = resources.get("CPU", 0) // self.threads
        return int(min(slots, resources.get("GPU", 0) / self._gpus) if self._gpus else slots)

    @property
    def description(self) -> str:
        nodes = sum(node["Alive"] for node in self._ray.nodes())
        gpus = f" and {self._gpus:g} GPU" if self._gpus else ""
        return f"Ray at {self.address}: {nodes} machine(s), {self.slots} at once, {self.threads} core(s){gpus} each"

    def start(self, job: Job) -> None:
        message = job.message() | {"model": pack_model(job.config.model, self._ray.cloudpickle.dumps)}
        packed = pack(job.path)
        task = self._run.options(num_cpus=self.threads, num_gpus=self._gpus, max_retries=0).remote(
            message, packed, self._mailbox, str(self._token.absolute())
        )
        self._tasks[task] = job

    def wait(self, seconds: float) -> list[Ended]:
        done, _ = self._ray.wait(list(self._tasks), num_returns=1, timeout=seconds)
        for name, packed in self._ray.get(self._mailbox.take.remote()).items():
            job = next((job for job in self._tasks.values() if job.path.name == name), None)
            if job:
                unpack(packed, job.path)
        ended = []
        for task in done:
            job = self._tasks.pop(task)
            try:
                how, reason, packed = self._ray.get(task)
                if packed:
                    unpack(packed, job.path)
                ended.append(Ended(job, how, reason))
            except self._ray.exceptions.TaskCancelledError:
                ended.append(Ended(job, "stopped"))
            except self._ray.exceptions.RayTaskError as error:  # our code could not even be started over there
                ended.append(Ended(job, "refused", f"a worker of the cluster could not begin ({error.cause}): the same cifarlab "
                                                   "must be installed on all its machines"))  # fmt: skip
            except self._ray.exceptions.RayError as error:
                ended.append(Ended(job, "crashed", f"{type(error).__name__} on the cluster"))
        return ended

    def stop(self, job: Job) -> None:
        for task, other in self._tasks.items():
            if other is job:
                self._ray.cancel(task, force=False)

    def close(self) -> None:
        self._token.unlink(missing_ok=True)
        for job in list(self._tasks.values()):
            self.stop(job)
        deadline = time.monotonic() + 30
        while self._tasks and time.monotonic() < deadline:
            self.wait(1.0)
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(self._mailbox)
        if self._ours:
            self._ray.shutdown()


class Mailbox:
    """The newest state of each run, on the driver's node, until the driver takes it."""

    def __init__(self) -> None:
        self._packed: dict[str, bytes] = {}

    def put(self, name: str, packed: bytes) -> None:
        self._packed[name] = packed

    def take(self) -> dict[str, bytes]:
        packed, self._packed = self._packed, {}
        return packed


def run_trial(message: dict[str, Any], packed: bytes, mailbox: Any, token: str) -> tuple[str, str, bytes]:
    """(how, reason, run folder) of a job, on a machine of the cluster. The folder is empty where it is shared."""
    from cifarlab.engines.worker import train_job

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    if Path(token).exists():
        return (*_train_patiently(train_job, message), b"")
    with tempfile.TemporaryDirectory(prefix="cifarlab-") as folder:
        path = Path(folder) / Path(message["path"]).name
        unpack(packed, path)
        there = {"path": str(path), "watch": message["watch"] | {"runs_dir": folder}}
        done = threading.Event()
        postman = threading.Thread(target=_post, args=(path, mailbox, done), daemon=True)
        postman.start()
        try:
            how, reason = _train_patiently(train_job, message | there)
        finally:
            done.set()
            postman.join()
        return how, reason, pack(path)


def _train_patiently(train_job: Any, message: dict[str, Any]) -> tuple[str, str]:
    try:
        how, reason = train_job(message)
    except KeyboardInterrupt:  # cancelled before or after the loop, which alone saves
        how, reason = "stopped", ""
    return how, reason


def _post(path: Path, mailbox: Any, done: threading.Event) -> None:
    """Sends the run's folder each time that it has a new checkpoint, until `done`."""
    import ray

    sent = _newest(path)
    while not done.wait(POLL):
        newest = _newest(path)
        if newest and newest != sent and (packed := pack(path)):
            ray.get(mailbox.put.remote(path.name, packed))
            sent = newest


def _newest(path: Path) -> str:
    return max((found.name for found in (path / "checkpoints").glob("step-*")), default="")


def pack(path: Path) -> bytes:
    """A run's folder as a tar; empty where there is none, or where it changed under our hands (the next look will do).

    Checkpoints first: rows are on the disk before the checkpoint that counts on them, so rows read later are enough for it.
    """
    if not (path / "config.json").exists():
        return b""
    content = io.BytesIO()
    checkpoints = sorted((path / "checkpoints").glob("step-*"))
    rest = [found for found in sorted(path.iterdir()) if found.name not in ("checkpoints", ".lock") and found.suffix != ".tmp"]
    try:
        with tarfile.open(fileobj=content, mode="w") as tar:
            for found in [*checkpoints, *rest]:
                tar.add(found, arcname=str(found.relative_to(path)), filter=_settled)
    except OSError:  # a checkpoint was pruned, or a file grew while it was read
        return b""
    return content.getvalue()


def _settled(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if info.name.endswith(".tmp") else info


def unpack(packed: bytes, path: Path) -> None:
    """Puts the packed folder in the place of that one, whole or not at all."""
    if not packed:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (path.with_name(f".{path.name}.{kind}") for kind in ("new", "old"))
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        tar.extractall(fresh, filter="data")
    if path.exists():
        os.rename(path, old)
    os.rename(fresh, path)
    shutil.rmtree(old, ignore_errors=True)
