"""What a loss landscape costs beside the forward passes that it is made of.

    python benchmarks/landscape.py [--json] [--nets simple_cnn,resnet9] [--grid 21] [--images 250] [--device cuda]

Printed is the time of `measure_landscape` on a plane of grid × grid points, its start included (copy of the model, hash of
weights and images, the centre's own losses), over grid² times the time of a bare forward pass of the same images in the same
batches: for frozen batch norm, and for recomputed (there the bare pass takes the norm images, too). The claim: at most 2 for a
21×21 plane. On a CPU it is processor time of one thread, so that a busy machine disturbs little; on a GPU it is wall time. The
bare pass is the median of passes before and after.
"""

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import torch
from torch import nn

from cifarlab.analysis.landscape import Sample, measure_landscape, random_plane
from cifarlab.models import create_model
from machine import describe_machine


def make_sample(count: int, num_norm: int, device: torch.device) -> Sample:
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> torch.Tensor:
        return torch.randn(n, 3, 32, 32, generator=generator).to(device).contiguous(memory_format=torch.channels_last)

    labels = torch.randint(10, (count,), generator=generator).to(device)
    return Sample(tuple(zip(draw(count).split(125), labels.split(125), strict=True)), tuple(draw(num_norm).split(125)))


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


@torch.inference_mode()
def time_forward(model: nn.Module, sample: Sample, with_norm: bool, device: torch.device) -> float:
    start = clock(device)
    for images in [batch for batch, _ in sample.batches] + (list(sample.norm_batches) if with_norm else []):
        model(images)
    return clock(device) - start


def measure(name: str, grid: int, images: int, device: torch.device) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = create_model(name).eval().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    sample, plane = make_sample(images, images // 2, device), random_plane(model)
    points, rows = np.linspace(-1, 1, grid), []
    for policy in ("frozen", "recomputed"):
        is_anew = policy == "recomputed"
        bare = [time_forward(model, sample, is_anew, device) for _ in range(4)][1:]  # the first warms up
        start = clock(device)
        measure_landscape(model, plane, sample, points, points, batch_norm=policy)  # type: ignore[arg-type]
        spent = clock(device) - start
        bare += [time_forward(model, sample, is_anew, device) for _ in range(3)]
        forward = statistics.median(bare)
        rows.append({"net": name, "batch_norm": policy, "grid": grid, "images": images, "seconds": round(spent, 2),
                     "forward_seconds": round(forward, 4), "ratio": round(spent / (grid**2 * forward), 3)})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--nets", default="simple_cnn,resnet9")
    parser.add_argument("--grid", type=int, default=21)
    parser.add_argument("--images", type=int, default=250)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    rows = [row for name in arguments.nets.split(",") for row in measure(name, arguments.grid, arguments.images, device)]
    if arguments.json:
        print(json.dumps({"machine": describe_machine(device), "rows": rows}, indent=1))
        return
    print(describe_machine(device))
    for row in rows:
        print(f"{row['net']:12} {row['batch_norm']:10} {row['grid']}×{row['grid']}, {row['images']} images: {row['seconds']} s, "
              f"{row['ratio']:.2f} times the forward passes ({row['forward_seconds']} s each)")  # fmt: skip


if __name__ == "__main__":
    main()
