"""The architectures: one file a family, and a table of names.

A model takes normalised images (N×3×H×W, H and W at least 32) and gives logits (N×K). To add one, write its file and a line in
MODELS.
"""

from collections.abc import Callable
from fnmatch import fnmatchcase

from torch import nn

from cifarlab.config import InputError, did_you_mean
from cifarlab.models.airbench import airbench, airbench_large, airbench_residual
from cifarlab.models.resnet import resnet18, resnet18_imagenet_stem, resnet34
from cifarlab.models.resnet9 import ResNet9
from cifarlab.models.separable import Separable
from cifarlab.models.simple_cnn import SimpleCNN

__all__ = ["MODELS", "create_model", "list_models"]

MAX_CLASSES = 100_000  # more than ImageNet-21k has; a last layer for it fits into memory

MODELS: dict[str, Callable[[int], nn.Module]] = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet18-imagenet-stem": resnet18_imagenet_stem,
    "simple_cnn": SimpleCNN,
    "resnet9": ResNet9,
    "separable": Separable,
    "airbench": airbench,
    "airbench-large": airbench_large,
    "airbench-residual": airbench_residual,
}


def create_model(name: str, num_classes: int = 10) -> nn.Module:
    """A new model of that name with `num_classes` outputs, its weights drawn from torch's global generator.

    Raises InputError for a name that is not in `list_models()`, for fewer than one class and more than MAX_CLASSES.
    """
    if name not in MODELS:
        raise InputError(f"model {name!r} is not one of {', '.join(MODELS)}{did_you_mean(name, MODELS)}")
    if not 1 <= num_classes <= MAX_CLASSES:
        least_most = f"it must be at least 1, at most {MAX_CLASSES:,}"
        raise InputError(f"num_classes={num_classes} cannot be used for model {name!r}: {least_most}")
    return MODELS[name](num_classes)


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that match a shell pattern, e.g. `resnet*`."""
    return [name for name in MODELS if fnmatchcase(name, pattern)]
