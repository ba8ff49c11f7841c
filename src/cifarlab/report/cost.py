"""FLOPs, parameters and receptive fields, layer by layer."""

import json
from typing import Any

import numpy as np

from cifarlab.config import InputError
from cifarlab.figures import draw_flops, draw_receptive_field
from cifarlab.report.charts import take_chart
from cifarlab.report.section import Section, amount, count, make_section
from cifarlab.runs import Run


def show_cost(run: Run) -> Section | None:
    path = run.path / "cost.json"
    if not path.exists():
        return None
    try:
        cost = json.loads(path.read_bytes())
        layers, total, fields = cost["layers"], cost["total"], cost.get("receptive_fields") or {}
        rows = [_row(layer, total["forward_flops"], fields.get(layer["name"])) for layer in layers]
        names, macs = [layer["name"] for layer in layers], [float(layer["forward_macs"]) for layer in layers]
        shape = cost["input_shapes"][0][1:]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}): remove it") from None
    charts = [take_chart("flops", draw_flops(names, macs), draw_flops)]
    known = {name: field for name, field in fields.items() if field and field["size"]}
    if known and len(shape) == 3:
        sizes = np.array([field["size"] for field in known.values()], dtype=float)
        drawn = draw_receptive_field([name or cost["model"] for name in known], sizes, tuple(shape[1:]))
        charts.append(take_chart("receptive-field", drawn, draw_receptive_field))
    columns = [("Layer", "text"), ("Kind", "text"), ("Output", "text"), ("Parameters", "number"), ("FLOP forward", "number"),
               ("Share", "number")] + [("Receptive field", "number"), ("Its stride", "number")] * bool(known)  # fmt: skip
    told = (f"One image of {'×'.join(map(str, shape))} costs {amount(total['forward_flops'] / 1e9)} GFLOP = "
            f"{amount(total['forward_macs'] / 1e9)} GMAC forward; {count(total['parameters'])} parameters.")  # fmt: skip
    return make_section("cost", "FLOPs and receptive field", "cost.html", *charts, rule=_sentence(cost["rule"]), layers=rows,
                        columns=columns, told=told, has_fields=bool(known))  # fmt: skip


def _row(layer: dict[str, Any], whole: float, field: dict[str, Any] | None) -> dict[str, Any]:
    size, stride = ((field or {}).get(key) for key in ("size", "stride"))
    return {
        "name": layer["name"], "kind": layer["kind"], "output": (layer["output_shape"] or [])[1:],
        "parameters": layer["parameters"], "flops": layer["forward_flops"], "share": layer["forward_flops"] / max(whole, 1),
        "field": max(size) if size else None, "stride": max(stride) if stride else None,
    }  # fmt: skip


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
