"""Networks small enough for tests. Also a program: `python tests/tiny_models.py '{config}' '{watch}' [kill at update [pause]]`

trains that config in a process of its own, which kills itself with SIGKILL in the forward pass of that update. Lists of configs
and watches are trained one after the other, as one of several ranks at the ports of $MASTER_PORTS.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

import cifarlab as cl
from cifarlab.models import MODELS


def tiny(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 5, stride=4, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2),
        nn.Linear(4 * 7 * 7, num_classes),
    )  # fmt: skip


def tiny_without_norm(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 7 * 7, num_classes))


def registered() -> Iterator[str]:
    MODELS["tiny"], MODELS["tiny-without-norm"] = tiny, tiny_without_norm
    yield "tiny"
    del MODELS["tiny"], MODELS["tiny-without-norm"]


def dies_at(update: int, passed: list[int] | None = None, pause: float = 0.0) -> Any:
    """A builder of the tiny net that kills the process (or, given a list, raises) in the training forward pass of that update.

    pause: seconds that each of them takes.
    """
    calls = 0

    def count(module: nn.Module, _: tuple[Tensor, ...]) -> None:
        nonlocal calls
        calls += module.training
        time.sleep(pause * module.training)
        if calls == update and module.training:
            if passed is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("a power cut")

    def build(num_classes: int) -> nn.Module:
        model = tiny(num_classes)
        model.register_forward_pre_hook(count)
        return model

    return build


if __name__ == "__main__":
    MODELS["tiny"], MODELS["tiny-without-norm"] = tiny, tiny_without_norm
    if len(sys.argv) > 3:
        MODELS["tiny"] = dies_at(int(sys.argv[3]), pause=float((sys.argv[4:] or "0")[0]))
    config, watch = map(json.loads, sys.argv[1:3])
    if isinstance(config, list):
        for port, each, its_watch in zip(os.environ["MASTER_PORTS"].split(","), config, watch, strict=True):
            os.environ["MASTER_PORT"] = port
            cl.train(cl.TrainConfig(**each), cl.WatchConfig(**its_watch))
    else:
        print(cl.train(cl.TrainConfig(**config), cl.WatchConfig(**watch)).path)
