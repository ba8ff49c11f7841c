"""What following a run costs: step time of SimpleCNN at batch 128 with each tracker, beside the same step without.

    python benchmarks/trackers.py [--json] [--rounds 12] [--steps 40] [--batch 128] [--threads 1]

Each way writes what a training writes: every step's row and the three cheap probes' tables, flushed every 20 steps, into a run
folder of its own (`local`), and with a mirror that follows that folder in its thread (`local + …`, looking every 2 seconds, as
in training; W&B offline). A round is `steps` steps of each way in turn, so that pairs are neighbours in time; printed are the
medians over rounds of the difference to the steps of the same round that write nothing. W&B's own process and the mirrors'
threads take their share of the cores while the steps run: that is part of the cost. The network trains and is probed alike in
all ways. On a busy machine these figures mean little; the CPU time of this process for writing a step, and for sending it
later by `cifarlab sync`, which is printed below them, holds there too (W&B's own process is not in it).
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from cifarlab.config import TrainConfig, WatchConfig
from cifarlab.models import create_model
from cifarlab.probes.panel import Panel
from cifarlab.records import Reading
from cifarlab.runs import RunFolder
from cifarlab.trackers.fanout import Pace
from cifarlab.trackers.local import Local
from cifarlab.trackers.mirror import LiveMirror, Sink, sync
from cifarlab.trackers.tensorboard import Tensorboard
from cifarlab.trackers.wandb import Wandb
from machine import describe_machine

FLUSH = 20
FLOWS = ("gradient_flow", "weight_flow", "update_flow")


class Way:
    """A run folder that grows by the rows it is given, and whoever follows it."""

    def __init__(self, path: Path, mirror: str, panel: Panel) -> None:
        self.step, self.seconds = 0, []
        self._folder = RunFolder(path)
        self._folder.write_json("config.json", TrainConfig(model="simple_cnn").to_dict())
        parameters = [{"name": name, "shape": [1], "trainable": True} for name in panel.items]
        self._folder.write_json("probes.json", {"every": 200, "parameters": parameters})
        self._local = Local(self._folder, [])
        sinks: dict[str, Any] = {"tensorboard": Tensorboard, "wandb": lambda: Wandb(WatchConfig(wandb_mode="offline"))}
        self._mirrors = [LiveMirror(path, sinks[name]()) for name in sinks if name in mirror]

    def write(self, losses: list[float], reading: Reading) -> None:
        first = self.step - len(losses) + 1
        for table in reading.tables:
            table.steps[:] = range(first, self.step + 1)
            self._local.tables([table])
        whole = list(reading.rows.values())
        self._local.rows([{"step": first + k, "lr": 1e-3, "train/loss": loss, "train/accuracy": 0.5} | whole[k]
                          for k, loss in enumerate(losses)], Pace(1.0, 1.0))  # fmt: skip

    def close(self) -> None:
        for mirror in self._mirrors:
            mirror.close()
        self._folder.close()


def measure(rounds: int, steps: int, batch: int, folder: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = create_model("simple_cnn").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    images = torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,))
    panel = Panel(model, dict(model.named_parameters()), FLOWS, every=10**9, optimizer=optimizer, weights_are_ours=True)
    names = ("nothing", "local", "local + tensorboard", "local + wandb", "local + both")
    mirrors = {"local + both": "tensorboard wandb"}
    ways = {name: None if name == "nothing" else Way(Path(folder) / name.replace(" ", ""), mirrors.get(name, name), panel)
            for name in names}  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(rounds + 1):
        order = names if round_number % 2 else names[::-1]
        for name in order:
            way, losses = ways[name], []
            begun = time.perf_counter()
            for k in range(steps):
                loss = F.cross_entropy(model(images), labels)
                loss.backward()  # type: ignore[no-untyped-call]
                panel.before_update(k + 1)
                optimizer.step()
                panel.after_update(k + 1)
                optimizer.zero_grad(set_to_none=True)
                losses.append(loss.item())
                if way:
                    way.step += 1
                if (k + 1) % FLUSH == 0:
                    reading = panel.read()
                    if way:
                        way.write(losses, reading)
                    losses = []
            if round_number:  # the first warms up
                seconds[name].append((time.perf_counter() - begun) / steps)
    for way in ways.values():
        if way:
            way.close()
    plain = seconds["nothing"]
    rows = {}
    for name in names[1:]:
        extra = sorted(1000 * (a - b) for a, b in zip(seconds[name], plain, strict=True))
        shares = [a / b - 1 for a, b in zip(seconds[name], plain, strict=True)]
        quarter = len(extra) // 4
        rows[name] = {"extra_ms": statistics.median(extra), "extra_ms_quartiles": [extra[quarter], extra[-1 - quarter]],
                      "share_of_step": statistics.median(shares)}  # fmt: skip
    return {"net": "simple_cnn", "batch": batch, "step_ms": 1000 * statistics.median(plain), "rows": rows,
            "cpu_ms": measure_cpu(Path(folder) / "cpu", panel, reading)}  # fmt: skip


def measure_cpu(path: Path, panel: Panel, reading: Reading, flushes: int = 100) -> dict[str, float]:
    """CPU milliseconds a step: writing it to the run folder, and sending it from there."""
    way = Way(path, "", panel)
    begun = time.process_time()
    for _ in range(flushes):
        way.step += FLUSH
        way.write([0.5] * FLUSH, reading)
    way.close()
    found = {"writing the run folder": time.process_time() - begun}
    sinks: dict[str, Sink] = {"sending to TensorBoard": Tensorboard(), "sending to W&B": Wandb(WatchConfig(wandb_mode="offline"))}
    for name, sink in sinks.items():
        begun = time.process_time()
        sync(path, sink)
        found[name] = time.process_time() - begun
    return {name: 1000 * seconds / way.step for name, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=40, help="of each way in each round; a multiple of 20")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(WANDB_CACHE_DIR=folder, WANDB_CONFIG_DIR=folder, WANDB_DATA_DIR=folder, WANDB_SILENT="true")
        result = measure(arguments.rounds, arguments.steps, arguments.batch, folder)
    found = {"machine": describe_machine(torch.device("cpu")), "rounds": arguments.rounds, "steps": arguments.steps} | result
    if arguments.json:
        print(json.dumps(found, indent=1))
        return
    print(", ".join(f"{name} {value}" for name, value in found["machine"].items() if value is not None))
    for name, ms in found["cpu_ms"].items():
        print(f"  {name:24}{ms:8.3f} ms of CPU a step")
    print(f"\n{found['net']}, batch {found['batch']}: {found['step_ms']:.1f} ms a step that is probed and written nowhere")
    for name, row in found["rows"].items():
        low, high = row["extra_ms_quartiles"]
        print(f"  {name:22}{row['extra_ms']:+8.2f} ms  {100 * row['share_of_step']:+6.2f} %   ({low:+.2f} … {high:+.2f})")


if __name__ == "__main__":
    main()
