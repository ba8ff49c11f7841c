"""What a network costs: counted (multiply-adds, bytes, memory), walked (receptive fields), measured (seconds), printed.

    profile(module, (3, 32, 32)).forward_macs
    print(format_table(profile(module, (3, 32, 32))))

Names are loaded when first used. `cifarlab.profile` is the function `profile`; the package's other names are imported from it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cifarlab.profile.counting import LayerCost as LayerCost
    from cifarlab.profile.counting import Profile as Profile
    from cifarlab.profile.counting import count_macs as count_macs
    from cifarlab.profile.counting import count_parameters as count_parameters
    from cifarlab.profile.counting import profile as profile
    from cifarlab.profile.report import format_table as format_table
    from cifarlab.profile.report import to_csv as to_csv
    from cifarlab.profile.report import to_json as to_json

_HOME = {  # public name -> module that defines it
    "LayerCost": "counting",
    "Profile": "counting",
    "count_macs": "counting",
    "count_parameters": "counting",
    "profile": "counting",
    "format_table": "report",
    "to_csv": "report",
    "to_json": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
