"""What a figure was measured on: every benchmark prints it."""

import platform
from pathlib import Path

import torch


def describe_machine(device: torch.device) -> dict[str, object]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "cpu": cpu, "instructions": capability, "threads": torch.get_num_threads(), "gpu": gpu, "torch": torch.__version__,
        "python": platform.python_version(),
    }  # fmt: skip
