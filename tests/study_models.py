"""Networks for tests of studies and engines: one that kills its process once, one that takes its time. Also a program:

`python tests/study_models.py study …` is the command line with these networks and the tiny ones registered.
"""

import os
import signal
import sys
import time
from pathlib import Path

from torch import Tensor, nn

import tiny_models
from cifarlab.models import MODELS


def mortal(num_classes: int) -> nn.Module:
    """The tiny net; the first process that has done seven updates with it is killed, and leaves a mark at $CIFARLAB_TEST_MARK."""
    updates = 0

    def count(module: nn.Module, _: tuple[Tensor, ...]) -> None:
        nonlocal updates
        updates += module.training
        mark = Path(os.environ["CIFARLAB_TEST_MARK"])
        if updates == 8 and module.training and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    model = tiny_models.tiny(num_classes)
    model.register_forward_pre_hook(count)
    return model


def doomed(num_classes: int) -> nn.Module:
    """A net whose process dies in its first update, always."""
    model = tiny_models.tiny(num_classes)
    model.register_forward_pre_hook(lambda module, _: os.kill(os.getpid(), signal.SIGKILL) if module.training else None)
    return model


def slow(num_classes: int) -> nn.Module:
    """The tiny net, a tenth of a second an update."""
    model = tiny_models.tiny(num_classes)
    model.register_forward_pre_hook(lambda module, _: time.sleep(0.1) if module.training else None)
    return model


def register() -> None:
    MODELS.update({"tiny": tiny_models.tiny, "tiny-without-norm": tiny_models.tiny_without_norm, "mortal": mortal,
                   "doomed": doomed, "slow": slow})  # fmt: skip


if __name__ == "__main__":
    import study_models  # under its own name, so that other processes find its functions
    from cifarlab.cli import main

    study_models.register()
    sys.exit(main(sys.argv[1:]))
