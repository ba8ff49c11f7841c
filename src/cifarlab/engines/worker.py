"""The process behind a slot of the local engine: trains the jobs that come in on stdin, one after the other.

    python -m cifarlab.engines.worker

A line in is a job (JSON), or {"stop": true}; a line out says how it ended. When stdin closes, since the study ended or was
killed, the training saves its state and the process leaves: nothing is left running behind.
"""

import json
import os
import queue
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from cifarlab.config import InputError, TrainConfig, WatchConfig
from cifarlab.engines.engine import clear_torn_start, unpack_model


class Stop(BaseException):
    """SIGTERM outside the training's steps: while data are read, or nothing is done at all."""


def train_job(message: dict[str, Any]) -> tuple[str, str]:
    """(how, reason) of `Ended`, for a job as `Job.message` gives it; the run goes on from its checkpoint where there is one."""
    from cifarlab.train import Interrupted, train

    try:
        unpack_model(message["config"]["model"], message.get("model", ""), message["sys_path"])
        clear_torn_start(Path(message["path"]))
        wait_for_lock(Path(message["path"]))
        train(TrainConfig.from_dict(message["config"]), WatchConfig(**message["watch"]))
    except (Interrupted, Stop):
        return "stopped", ""
    except InputError as error:
        return "refused", str(error)
    except Exception as error:
        return "crashed", f"{type(error).__name__}: {error}"
    return "done", ""


def wait_for_lock(path: Path, seconds: float = 60.0) -> None:
    """Gives the process that held the run before, whose study was killed, the time to save and leave."""
    from filelock import FileLock, Timeout

    if path.is_dir():
        try:
            with FileLock(path / ".lock").acquire(timeout=seconds):
                pass
        except Timeout:
            pass  # train says it better


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print must not get between the answers
    jobs: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            message = json.loads(line)
            if "stop" in message:
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                jobs.put(message)
        os.kill(os.getpid(), signal.SIGTERM)  # first this: who finds the None leaves at once
        jobs.put(None)

    def on_term(number: int, frame: FrameType | None) -> None:
        raise Stop

    signal.signal(signal.SIGTERM, on_term)
    threading.Thread(target=listen, daemon=True).start()
    while True:
        is_busy = False
        try:
            message = jobs.get()
            if message is None:
                return
            is_busy = True
            how, reason = train_job(message)
        except Stop:
            how, reason = "stopped", ""
        if is_busy:
            try:
                print(json.dumps({"how": how, "reason": reason}), file=answers, flush=True)
            except BrokenPipeError:  # nobody wants to know any more
                return


if __name__ == "__main__":
    main()
