"""cifarlab: a lab for small image classifiers.

    import cifarlab as cl
    run = cl.train(cl.recipes.quick(epochs=2))
    run.metrics["train/loss"]

Names are loaded when they are first used, so that importing cifarlab takes no time and no torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cifarlab import figures as figures
    from cifarlab import recipes as recipes
    from cifarlab.checks import Remark as Remark
    from cifarlab.checks.whole import check as check
    from cifarlab.checks.whole import check_objects as check_objects
    from cifarlab.config import InputError as InputError
    from cifarlab.config import TrainConfig as TrainConfig
    from cifarlab.config import WatchConfig as WatchConfig
    from cifarlab.data import Dataset as Dataset
    from cifarlab.data import Split as Split
    from cifarlab.data import load_dataset as load_dataset
    from cifarlab.evaluate import Evaluation as Evaluation
    from cifarlab.forecast import Forecast as Forecast
    from cifarlab.forecast import forecast_run as forecast_run
    from cifarlab.inference import evaluate_run as evaluate_run
    from cifarlab.inference import predict as predict
    from cifarlab.lr_curve import LrRange as LrRange
    from cifarlab.lr_curve import load_range as load_range
    from cifarlab.lr_range import lr_range as lr_range
    from cifarlab.lr_range import lr_range_on as lr_range_on
    from cifarlab.models import create_model as create_model
    from cifarlab.models import list_models as list_models
    from cifarlab.probes.watch import watch as watch
    from cifarlab.profile import profile as profile
    from cifarlab.runs import Run as Run
    from cifarlab.runs import load_run as load_run
    from cifarlab.studies.conduct import study as study
    from cifarlab.studies.reported import report as report
    from cifarlab.train import train as train

__version__ = "0.1.0"

_HOME = {  # public name -> module that defines it
    "InputError": "config",
    "TrainConfig": "config",
    "WatchConfig": "config",
    "recipes": "recipes",
    "Remark": "checks",
    "check": "checks.whole",
    "check_objects": "checks.whole",
    "Dataset": "data",
    "Split": "data",
    "load_dataset": "data",
    "profile": "profile",
    "Forecast": "forecast",
    "forecast_run": "forecast",
    "lr_range": "lr_range",
    "lr_range_on": "lr_range",
    "LrRange": "lr_curve",
    "figures": "figures",
    "load_range": "lr_curve",
    "watch": "probes.watch",
    "create_model": "models",
    "list_models": "models",
    "Evaluation": "evaluate",
    "evaluate_run": "inference",
    "predict": "inference",
    "Run": "runs",
    "load_run": "runs",
    "report": "studies.reported",
    "study": "studies.conduct",
    "train": "train",
}

__all__ = sorted(_HOME)


class _Package(ModuleType):
    """`train`, `profile`, `lr_range`, `report` are modules and functions: the function is meant, whoever imported the module."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Python binds a module in its package once it is imported.
        if name not in ("train", "profile", "lr_range", "report") or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cifarlab' has no attribute {name!r}")
    module = import_module(f"cifarlab.{_HOME[name]}")
    value = globals()[name] = module if _HOME[name] == name and not hasattr(module, name) else getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
