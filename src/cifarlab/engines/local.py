"""The engine of this machine: worker processes that share its cores and GPUs."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any

from cifarlab.config import InputError
from cifarlab.engines.engine import Ended, Job, pack_model

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class LocalEngine:
    """So many worker processes at once that their threads are no more than the cores, and each sees one GPU where there are some.

    jobs: at most so many at once (0: one a GPU, or as many as the cores allow). Workers do many jobs one after the other, so
    torch is loaded once in each; one that dies is replaced. They end with this process, however that ends.
    """

    def __init__(self, *, jobs: int = 0, threads: int = 1, device: str = "auto", logs: Path, cores: int = 0) -> None:
        self.cores = cores or count_cores()
        if threads > self.cores:
            raise InputError(f"threads={threads} is more than this machine has: {self.cores} core(s); choose fewer")
        self.threads, self._logs, self._gpus = threads, logs, visible_gpus(device)
        fitting = self.cores // threads
        self.jobs = min(jobs or len(self._gpus) or fitting, fitting)
        self.capped = jobs > self.jobs
        self._idle: list[_Worker] = []
        self._busy: dict[Path, _Worker] = {}
        self._answers: queue.Queue[tuple[_Worker, dict[str, Any] | None]] = queue.Queue()
        self._numbers = set(range(self.jobs))  # of workers that may still be started

    @property
    def slots(self) -> int:
        return self.jobs

    @property
    def description(self) -> str:
        gpus = f", GPU {', '.join(self._gpus)}" if self._gpus else ""
        return f"this machine: {self.jobs} at once, {self.threads} thread(s) each, {self.cores} core(s){gpus}"

    def start(self, job: Job) -> None:
        message = job.message() | {"model": pack_model(job.config.model)}
        if self._gpus:
            message["watch"]["device"] = "cuda"  # the worker sees one, and numbers it 0
        worker = self._idle.pop() if self._idle else self._spawn()
        self._busy[job.path] = worker
        worker.job = job
        worker.tell(message)

    def _spawn(self) -> "_Worker":
        number = self._numbers.pop()
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environment |= {name: str(self.threads) for name in THREAD_VARIABLES}
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[number % len(self._gpus)]
        return _Worker(number, environment, self._logs / f"worker-{number}.log", self._answers)

    def wait(self, seconds: float) -> list[Ended]:
        try:
            found = [self._answers.get(timeout=seconds)]
            while not self._answers.empty():
                found.append(self._answers.get())
        except queue.Empty:
            return []
        ended = []
        for worker, answer in found:
            job, worker.job = worker.job, None
            if job:
                del self._busy[job.path]
            if answer is None:  # the process is gone
                worker.hang_up()
                self._numbers.add(worker.number)
                self._idle = [other for other in self._idle if other is not worker]
            else:
                self._idle.append(worker)
            if job and answer is None:
                ended.append(Ended(job, "crashed", worker.death()))
            elif job and answer:
                ended.append(Ended(job, answer["how"], answer["reason"]))
        return ended

    def stop(self, job: Job) -> None:
        self._busy[job.path].tell({"stop": True})

    def close(self) -> None:
        """Lets running trainings save and leave, half a minute long; then they are killed."""
        workers = [*self._idle, *self._busy.values()]
        for worker in workers:
            worker.hang_up()
        for worker in workers:
            try:
                worker.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            worker.thread.join()
        self._idle, self._busy = [], {}


class _Worker:
    def __init__(self, number: int, environment: dict[str, str], log: Path,
                 answers: "queue.Queue[tuple[_Worker, dict[str, Any] | None]]") -> None:  # fmt: skip
        self.number, self._log = number, log
        self.job: Job | None = None
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as errors:
            # A session of its own: Ctrl-C is for the study, which then lets its workers save.
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cifarlab.engines.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                env=environment, text=True, start_new_session=True)  # fmt: skip
        self.thread = threading.Thread(target=self._listen, args=(self.process.stdout, answers), daemon=True)
        self.thread.start()

    def _listen(self, stdout: IO[str], answers: "queue.Queue[tuple[_Worker, dict[str, Any] | None]]") -> None:
        with stdout:
            for line in stdout:
                answers.put((self, json.loads(line)))
        self.process.wait()
        answers.put((self, None))

    def tell(self, message: dict[str, Any]) -> None:
        try:
            assert self.process.stdin
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError):
            pass  # it has died: its listener says so

    def hang_up(self) -> None:
        try:
            assert self.process.stdin
            self.process.stdin.close()
        except BrokenPipeError:
            pass

    def death(self) -> str:
        code = self.process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return how + (f": {lines[-1].strip()[:200]}" if lines and code >= 0 else "")


def count_cores() -> int:
    """Cores that this process may use, which may be fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus(device: str) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs that may be used; empty for another device."""
    if device.startswith("cuda:"):
        return [device.removeprefix("cuda:")]
    if device not in ("auto", "cuda"):
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip() not in ("", "-1")]
    import torch

    return [str(k) for k in range(torch.cuda.device_count())]
