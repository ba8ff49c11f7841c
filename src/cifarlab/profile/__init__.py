"""What a network costs: counted (multiply-adds, bytes, memory), walked (receptive fields), measured (seconds), printed.

    found = profile(module, (3, 32, 32))
    found.forward_macs, found.fields["conv1"].size
    print(found)

Names are loaded when first used. `cifarlab.profile` is the function `profile`, whose other name is `survey`; the counts alone are
`count`'s. The package's other names are imported from it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cifarlab.profile.compare import compare_counters as compare_counters
    from cifarlab.profile.counting import LayerCost as LayerCost
    from cifarlab.profile.counting import Profile as Profile
    from cifarlab.profile.counting import count as count
    from cifarlab.profile.counting import count_macs as count_macs
    from cifarlab.profile.counting import count_parameters as count_parameters
    from cifarlab.profile.latency import measure_layers as measure_layers
    from cifarlab.profile.latency import measure_whole as measure_whole
    from cifarlab.profile.receptive import ReceptiveField as ReceptiveField
    from cifarlab.profile.receptive import effective_receptive_field as effective_receptive_field
    from cifarlab.profile.receptive import receptive_fields as receptive_fields
    from cifarlab.profile.report import format_table as format_table
    from cifarlab.profile.report import to_csv as to_csv
    from cifarlab.profile.report import to_json as to_json
    from cifarlab.profile.roofline import measure_peaks as measure_peaks
    from cifarlab.profile.whole import Survey as Survey
    from cifarlab.profile.whole import draw_survey as draw_survey
    from cifarlab.profile.whole import profile as profile
    from cifarlab.profile.whole import survey as survey

_HOME = {  # public name -> module that defines it
    "LayerCost": "counting",
    "Profile": "counting",
    "count": "counting",
    "count_macs": "counting",
    "count_parameters": "counting",
    "Survey": "whole",
    "draw_survey": "whole",
    "profile": "whole",
    "survey": "whole",
    "ReceptiveField": "receptive",
    "receptive_fields": "receptive",
    "effective_receptive_field": "receptive",
    "measure_layers": "latency",
    "measure_whole": "latency",
    "measure_peaks": "roofline",
    "compare_counters": "compare",
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
