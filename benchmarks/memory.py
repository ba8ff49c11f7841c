"""Whether anything grows: memory over a long training, and what a row costs when there are a million before it.

    python benchmarks/memory.py [--json] [--steps 10000] [--rows 1000000] [--mirror]

Training: a net of 1,000 weights on the digits, one image in eight, every probe on (the dear ones every 200 steps), rows flushed
every 20 steps, an evaluation and a checkpoint every 200, no figures. The resident memory of this process is noted every 100
steps; printed is the slope of a straight line through it from step 2,000 on, in kB for 1,000 steps. --mirror follows the run by
TensorBoard too.

Rows: a run folder is filled with rows of eight keys, 20 at a time; then it is listed, opened, diagnosed and sent by `cifarlab
sync` to TensorBoard, which gets only what is new since the line before. Seconds are this process's processor time, which holds on
a busy machine too; memory is that of this process above what it was before.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import cifarlab as cl
from cifarlab.diagnosis import diagnose_run
from cifarlab.listing import read_listed
from cifarlab.models import MODELS
from cifarlab.runs import Run, RunFolder
from cifarlab.trackers.mirror import sync
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
        writer.write_json("config.json", cl.TrainConfig(model="simple_cnn").to_dict())
        step = 0
        for count in counts:
            before = resident_kb()
            while step < count:
                begun = time.process_time()
                for _ in range(min(1000, count - step) // FLUSH):
                    writer.rows([_row(step + k) for k in range(1, FLUSH + 1)])
                    step += FLUSH
                last = 1e6 * (time.process_time() - begun) / min(1000, count)
            row = {"rows": count, "append_us": last, "writer_mb": (resident_kb() - before) / 1024}
            for name, look in {"list": lambda: read_listed(path), "open": lambda: Run(path).metrics["train/loss"],
                               "diagnose": lambda: diagnose_run(Run(path)).raised,
                               "sync": lambda: sync(path, Tensorboard())}.items():  # fmt: skip
                before, begun = resident_kb(), time.process_time()
                kept = look()
                row |= {f"{name}_seconds": time.process_time() - begun, f"{name}_mb": (resident_kb() - before) / 1024}
                del kept
            found.append(row)
    return found


def _row(step: int) -> dict[str, float]:
    return {"step": step, "lr": 0.1 / step, "momentum": 0.9, "train/loss": 2.3 / step**0.1, "train/accuracy": 0.1234567,
            "gradient_flow/norm": 1.234567891, "weight_flow/norm": 12.3456789, "update_flow/ratio": 0.00123456}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--mirror", action="store_true", help="follow the training by TensorBoard too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    counts = [count for count in (1_000, 10_000, 100_000, 1_000_000) if count <= arguments.rows]
    with tempfile.TemporaryDirectory() as folder:
        training = measure_training(arguments.steps, Path(folder), mirror=arguments.mirror) if arguments.steps else None
        rows = measure_rows(counts, Path(folder))
    machine = describe_machine(torch.device("cpu"))
    if arguments.json:
        print(json.dumps({"machine": machine, "training": training, "rows": rows}, indent=1))
        return
    print(", ".join(f"{name} {value}" for name, value in machine.items() if value is not None))
    if training:
        print(f"\n{training['steps']:,} steps in {training['seconds']:.0f} s: {training['kb_per_1000_steps']:+.1f} kB for 1,000 "
              f"steps, {training['mb_after_warm_up']:.1f} MB after the warm-up, {training['mb_at_end']:.1f} MB at the end")
    names = ("list", "open", "diagnose", "sync")
    print(f"\n{'rows':>10} {'append':>9}" + "".join(f"{name:>20}" for name in names))
    for row in rows:
        cells = "".join(f"{row[f'{name}_seconds']:10.3f} s {row[f'{name}_mb']:4.0f} MB" for name in names)
        print(f"{row['rows']:10,} {row['append_us']:6.1f} µs{cells}")


if __name__ == "__main__":
    main()
