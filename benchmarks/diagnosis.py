"""What the rules cost a running training: milliseconds of a look at twenty steps of a network with ResNet-18's 62 tensors.

    python benchmarks/diagnosis.py [--tensors 62] [--looks 100]
"""

import argparse
import time

import numpy as np

from cifarlab.diagnosis import Diagnosis, Facts
from cifarlab.diagnosis.evidence import Parameter
from cifarlab.records import Table

HEALTHY = {  # one value for each column of the tables that have a row for every step
    "gradient_flow": dict(mean_abs=1e-3, max_abs=1e-2, norm=0.1, clipped_mean_abs=1e-3, clipped_max_abs=1e-2, clipped_norm=0.1,
                          zero_share=0.0, non_finite=0.0),
    "weight_flow": dict(mean=0.0, mean_abs=0.1, max_abs=1.0, norm=2.0, variance=0.01),
    "update_flow": dict(norm=2e-3, ratio=1e-3, mean=0.0, mean_abs=1e-5, max_abs=1e-4, variance=1e-10),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tensors", type=int, default=62)
    parser.add_argument("--looks", type=int, default=100)
    arguments = parser.parse_args()
    facts = Facts(parameters=tuple(Parameter(f"layer{k}.weight", (8, 8)) for k in range(arguments.tensors)), num_classes=10)
    steps = np.arange(1, 20 * arguments.looks + 1)
    tables = [
        Table(name, tuple(p.name for p in facts.parameters), tuple(columns), steps,
              np.tile(np.array(list(columns.values()), np.float32), (len(steps), arguments.tensors, 1)))
        for name, columns in HEALTHY.items()
    ]  # fmt: skip
    rows = [{"step": int(s), "lr": 0.1, "train/loss": 2.3 * 0.999**s, "gradient_flow/norm": 1.0} for s in steps]
    diagnosis, times = Diagnosis(facts), []
    for start in range(0, len(steps), 20):
        parts = [table.between(start + 1, start + 20) for table in tables]
        begun = time.perf_counter()
        raised = diagnosis.see(rows[start : start + 20], parts)
        times.append(time.perf_counter() - begun)
        assert not raised, raised
    half = times[len(times) // 2 :]  # at first there is less to look back at
    print(f"{1000 * np.median(half):.2f} ms, {arguments.tensors} tensors, 20 steps (median of {len(half)} looks)")


if __name__ == "__main__":
    main()
