"""Whether a training repeats: the same config twice, compared bit by bit, as it is and with --deterministic.

    python benchmarks/repeat.py [--json] [--device auto] [--recipe quick] [--epochs 1] [--precision fp32]

On a CPU both ways repeat on one number of threads; a third pair there is on one thread and two, whose sums are in another order.
On a GPU some of cuDNN's fastest backward kernels add in the order in which their blocks end. Printed are the first step whose
loss differs, the largest difference of a weight at the end, beside the largest weight, and the time of the two trainings.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import cifarlab as cl
from cifarlab.checkpoint import load_weights
from cifarlab.distributed import pick_device
from cifarlab.recipes import load_recipe
from machine import describe_machine


def compare(first: cl.Run, second: cl.Run) -> dict[str, Any]:
    losses, others = (run.metrics["train/loss"] for run in (first, second))
    differing = (losses != others).nonzero()[0]
    weights, other_weights = (load_weights(run.path / "model.safetensors") for run in (first, second))
    gaps = [float((value.double() - other_weights[name].double()).abs().max()) for name, value in weights.items()]
    return {
        "equal": not len(differing) and all(torch.equal(weights[name], other_weights[name]) for name in weights),
        "first_step": int(differing[0]) + 1 if len(differing) else 0,
        "largest_gap": max(gaps), "largest_weight": max(float(value.double().abs().max()) for value in weights.values()),
        "test_accuracy": [run.result["test/accuracy"] for run in (first, second)],
        "seconds": [run.result["train_seconds"] for run in (first, second)],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--recipe", default="quick")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--precision", default="fp32")
    given = parser.parse_args()
    device = pick_device(given.device)
    base = replace(load_recipe(given.recipe), epochs=given.epochs, precision=given.precision)
    threads = (1, 1)
    ways = {"as it is": (base, threads), "--deterministic": (replace(base, deterministic=True), threads)}
    if device.type == "cpu":
        ways["on one thread and two"] = (base, (1, 2))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (config, counts) in ways.items():
            watch = cl.WatchConfig(runs_dir=Path(folder), device=given.device, progress="none", forecast=False, figures=False,
                                   probes="none")  # fmt: skip
            runs = [cl.train(config, replace(watch, name=f"{len(found)}-{k}", threads=count)) for k, count in enumerate(counts)]
            found[name] = compare(*runs)
    machine = describe_machine(device)
    if given.json:
        print(json.dumps({"machine": machine, "recipe": given.recipe, "pairs": found}, indent=1))
        return
    print(", ".join(f"{name} {value}" for name, value in machine.items() if value is not None))
    for name, pair in found.items():
        told = "equal bit by bit" if pair["equal"] else (
            f"losses differ from step {pair['first_step']:,} on; weights by up to {pair['largest_gap']:.2g} "
            f"(the largest is {pair['largest_weight']:.3g})")  # fmt: skip
        scores, seconds = (" and ".join(f"{value:{form}}" for value in pair[key])
                           for key, form in (("test_accuracy", ".4f"), ("seconds", ".2f")))  # fmt: skip
        print(f"{name:24} {told}; test accuracy {scores}; {seconds} s")


if __name__ == "__main__":
    main()
