"""Whether anything grows: memory over a long training, and what a row costs when there are a million before it.

    python benchmarks/memory.py [--json] [--steps 10000] [--rows 1000000] [--mirror]

Training: a net of 1,000 weights on the digits, one image in eight, every probe on (the dear ones every 200 steps), rows flushed
every 20 steps, an evaluation and a checkpoint every 200, no figures. The resident memory of this process is noted every 100
steps; printed is the slope of a straight line through it from step 2,000 on, in kB for 1,000 steps. --mirror follows the run by
TensorBoard too.

Rows: a run folder is filled as a training does, 20 rows of eight keys at a time, three tables of five items, an evaluation every
100 steps; then it is listed, opened, diagnosed, reported, shown by the board (as it was when its page was last asked for, with
1,000 rows more), and sent by `cifarlab sync` to TensorBoard, which gets only what is new since the line before. Seconds are this
process's processor time, which holds on a busy machine too; memory is what is in use afterwards above what was before, and for
report and board the most that was in use in between, files that are looked at included. --wandb N sends N rows to W&B's own
files too, and tells what a row costs in each tenth of them.
"""

import argparse
import gc
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import cifarlab as cl
from cifarlab.board import live
from cifarlab.board.live import LiveRuns
from cifarlab.diagnosis import diagnose_run
from cifarlab.listing import read_listed
from cifarlab.models import MODELS
from cifarlab.records import Measured
from cifarlab.report.page import build_page
from cifarlab.runs import Run, RunFolder
from cifarlab.trackers.fanout import Pace
from cifarlab.trackers.local import Local
from cifarlab.trackers.mirror import Mirror, sync
from cifarlab.trackers.tensorboard import Tensorboard
from machine import describe_machine

FLUSH = 20
WARM = 2000  # steps after which nothing is loaded or laid out any more


def resident_kb() -> int:
    """Memory of this process that is in use, kB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4


class Noting:
    """Builds the network, and notes the memory at every `every`-th training pass."""

    def __init__(self, every: int) -> None:
        self.every, self.passes = every, 0
        self.steps: list[int] = []
        self.kb: list[int] = []

    def build(self, num_classes: int) -> nn.Module:
        model = nn.Sequential(nn.Conv2d(3, 4, 5, stride=4, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                              nn.Dropout(0.2), nn.Linear(4 * 7 * 7, num_classes))  # fmt: skip
        model.register_forward_pre_hook(self.note)
        return model

    def note(self, module: nn.Module, _: tuple[Tensor, ...]) -> None:
        self.passes += module.training
        if module.training and self.passes % self.every == 0:
            self.steps.append(self.passes)
            self.kb.append(resident_kb())


def measure_training(steps: int, folder: Path, *, mirror: bool) -> dict[str, Any]:
    noting = Noting(100)
    MODELS["memory"] = noting.build
    config = cl.TrainConfig(data="digits", model="memory", train_images=160, batch_size=16, epochs=steps / 10, lr=0.01,
                            eval_every=20)  # fmt: skip
    watch = cl.WatchConfig(runs_dir=folder, name="long", progress="none", forecast=False, figures=False, probes="all",
                           save_every=20, tensorboard=mirror)  # fmt: skip
    begun = time.perf_counter()
    cl.train(config, watch)
    seconds = time.perf_counter() - begun
    at, kb = np.array(noting.steps), np.array(noting.kb)
    late = at > min(WARM, steps // 2)
    slope = np.polyfit(at[late], kb[late], 1)[0]
    return {"steps": steps, "seconds": seconds, "kb_per_1000_steps": 1000 * float(slope), "mb_at_end": kb[-1] / 1024,
            "mb_after_warm_up": kb[late][0] / 1024}  # fmt: skip


def measure_rows(counts: list[int], folder: Path) -> list[dict[str, float]]:
    found = []
    path = folder / "rows"
    with RunFolder(path) as writer:
        begin(writer, max(counts))
        local, step, board = Local(writer, []), 0, LiveRuns(folder)
        for count in counts:
            before = resident_kb()
            while step < count - 1000:
                step = write(local, step)
            shown = lambda: board.news("rows", frozenset())  # noqa: E731
            shown()
            first, begun = step, time.process_time()
            while step < count:
                step = write(local, step)
            row = {"rows": count, "append_us": 1e6 * (time.process_time() - begun) / (step - first),
                   "writer_mb": (resident_kb() - before) / 1024}  # fmt: skip
            for name, look in {"list": lambda: read_listed(path), "open": lambda: Run(path).metrics["train/loss"],
                               "diagnose": lambda: diagnose_run(Run(path)).raised, "report": lambda: build_page([Run(path)]),
                               "board": shown, "sync": lambda: sync(path, Tensorboard())}.items():  # fmt: skip
                gc.collect()
                before, begun = resident_kb(), time.process_time()
                with Peak() as peak:
                    kept = look()
                most = peak.kb if name in ("report", "board") else resident_kb()
                row |= {f"{name}_seconds": time.process_time() - begun, f"{name}_mb": (most - before) / 1024}
                del kept
            found.append(row)
    return found


class Peak:
    """The most memory that was in use meanwhile, looked at ten times a second."""

    def __enter__(self) -> "Peak":
        self.kb, self._done = resident_kb(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.1):
            self.kb = max(self.kb, resident_kb())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


ITEMS = {"conv.weight": [4, 3, 5, 5], "bn.weight": [4], "bn.bias": [4], "fc.weight": [10, 196], "fc.bias": [10]}
COLUMNS = {"gradient_flow": ("norm", "mean_abs", "max_abs", "non_finite"), "weight_flow": ("norm", "mean_abs", "max_abs"),
           "update_flow": ("norm", "mean_abs", "max_abs", "ratio")}  # fmt: skip


def begin(writer: RunFolder, steps: int) -> None:
    """What a training writes before its first step."""
    writer.write_json("config.json", cl.TrainConfig(data="digits", model="simple_cnn").to_dict())
    writer.write_json("environment.json", {"steps_per_epoch": 100, "num_steps": steps, "device": "none", "versions": {}})
    writer.write_json("dataset.json", {
        "source": "made up", "fingerprint": "0", "class_names": ["a", "b"], "mean": [0.5] * 3, "std": [0.2] * 3, "image_size": 32,
        "num_train": 1600, "num_test": 100})  # fmt: skip
    parameters = [{"name": name, "shape": shape, "trainable": True} for name, shape in ITEMS.items()]
    writer.write_json("probes.json", {"every": 200, "parameters": parameters})


def write(local: Local, step: int) -> int:
    """A thousand steps more, as the loop tells them; the last one."""
    for _ in range(1000 // FLUSH):
        steps = np.arange(step + 1, step + FLUSH + 1)
        values = 1e-3 / steps[:, None, None] ** 0.1
        local.tables([Measured(name, tuple(ITEMS), columns, steps, np.tile(values, (1, len(ITEMS), len(columns))))
                      for name, columns in COLUMNS.items()])  # fmt: skip
        local.rows([_row(k) for k in steps.tolist()], Pace(1.0, 1.0))
        step += FLUSH
        if step % 100 == 0:
            local.epoch({"step": step, "epoch": step / 100, "train_epoch/loss": 2.3 / step**0.1, "test/loss": 2.4 / step**0.1,
                         "test/accuracy": 0.5, "time/train_seconds": 0.01 * step}, is_best=False)  # fmt: skip
    return step


def _row(step: int) -> dict[str, float]:
    return {"step": step, "lr": 0.1 / step, "momentum": 0.9, "train/loss": 2.3 / step**0.1, "train/accuracy": 0.1234567,
            "gradient_flow/norm": 1.234567891, "weight_flow/norm": 12.3456789, "update_flow/ratio": 0.00123456}  # fmt: skip


def measure_wandb(rows: int, folder: Path) -> list[dict[str, float]]:
    """Of each tenth of the rows: processor time of a row here, seconds by the clock, memory here above that before."""
    from cifarlab.trackers.wandb import Wandb

    path, found = folder / "wandb-rows", []
    with RunFolder(path) as writer:
        begin(writer, rows)
        local, step = Local(writer, []), 0
        while step < rows:
            step = write(local, step)
    mirror = Mirror(path, Wandb(cl.WatchConfig(wandb_mode="offline")))
    mirror.open()
    mirror.begin()
    before, send, sent = resident_kb(), mirror.sink.send, 0
    mark = time.process_time(), time.perf_counter()

    def counted(entry: Any) -> None:
        nonlocal sent, mark
        send(entry)
        sent += 1
        if sent % (rows // 10) == 0:
            now = time.process_time(), time.perf_counter()
            found.append({"rows": sent, "send_us": 1e6 * (now[0] - mark[0]) / (rows // 10), "seconds": now[1] - mark[1],
                          "mb": (resident_kb() - before) / 1024})  # fmt: skip
            mark = now

    mirror.sink.send = counted  # type: ignore[method-assign]
    mirror.pump()
    mark = time.process_time(), time.perf_counter()
    mirror.finish()
    found.append({"rows": sent, "finish_seconds": time.process_time() - mark[0], "seconds": time.perf_counter() - mark[1],
                  "mb": (resident_kb() - before) / 1024})  # fmt: skip
    mirror.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--mirror", action="store_true", help="follow the training by TensorBoard too")
    parser.add_argument("--wandb", type=int, default=0, help="rows to be sent to W&B's own files too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    live.LEAST, live.SHARE = 0.0, float("inf")  # a page is made anew whenever it is asked for
    counts = [count for count in (1_000, 10_000, 100_000, 1_000_000) if count <= arguments.rows]
    with tempfile.TemporaryDirectory() as folder:
        training = measure_training(arguments.steps, Path(folder), mirror=arguments.mirror) if arguments.steps else None
        rows = measure_rows(counts, Path(folder)) if counts else []
        sent = measure_wandb(arguments.wandb, Path(folder)) if arguments.wandb else []
    machine = describe_machine(torch.device("cpu"))
    if arguments.json:
        print(json.dumps({"machine": machine, "training": training, "rows": rows, "wandb": sent}, indent=1))
        return
    print(", ".join(f"{name} {value}" for name, value in machine.items() if value is not None))
    if training:
        print(f"\n{training['steps']:,} steps in {training['seconds']:.0f} s: {training['kb_per_1000_steps']:+.1f} kB for 1,000 "
              f"steps, {training['mb_after_warm_up']:.1f} MB after the warm-up, {training['mb_at_end']:.1f} MB at the end")
    names = ("list", "open", "diagnose", "report", "board", "sync")
    print(f"\n{'rows':>10} {'append':>9}" + "".join(f"{name:>20}" for name in names))
    for row in rows:
        cells = "".join(f"{row[f'{name}_seconds']:10.3f} s {row[f'{name}_mb']:4.0f} MB" for name in names)
        print(f"{row['rows']:10,} {row['append_us']:6.1f} µs{cells}")
    for row in sent:
        print("W&B", ", ".join(f"{name} {value:,.4g}" for name, value in row.items()))


if __name__ == "__main__":
    main()
