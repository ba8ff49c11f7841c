"""A profile printed: tables for people, JSON and CSV for programs. Units are in every heading and every key."""

import csv
import io
import json
import random
import textwrap
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from cifarlab.profile.counting import LayerCost, Profile

Columns = Mapping[str, Mapping[str, Any]]
"""More columns, as heading -> {layer's path -> value}: numbers, words, or tuples of numbers such as (height, width)."""

COUNTS = (
    *("parameters", "trainable_parameters", "parameter_bytes"),
    *("forward_macs", "backward_macs", "forward_flops", "training_flops", "forward_other", "backward_other"),
    *("bytes_read", "bytes_written", "backward_bytes", "activation_bytes"),
)


def format_table(profile: "Profile", columns: Columns | None = None, *, title: str = "", width: int = 100,
                 ridge: float | None = None) -> str:  # fmt: skip
    """The summary as plain text of that width: a table of work, one of memory (and `columns`), totals, what is most expensive.

    Layers are shown as a tree. MAC and FLOP stand side by side; "other" is the work that is no multiply-add, in FLOP. The memory
    table has the bytes read, written, moved in backward, and kept for backward. `title` stands for the class name.
    ridge: FLOP per byte at which this machine changes from bound by memory to bound by compute (its peak FLOP/s over its
    bytes/s); without it only clear cases are called either.
    """
    load_rich()
    from rich.console import Console
    from rich.measure import Measurement

    from cifarlab import __version__

    told = io.StringIO()
    console = Console(file=told, width=width, highlight=False, markup=False, emoji=False, color_system=None)
    device = "" if profile.device == "meta" else f" · counted on {profile.device}, for the module cannot run on meta tensors"
    console.print(f"{title or profile.kind} · input {_shapes(profile)} · cifarlab {__version__}{device}")
    console.print(f"rule: {profile.rule}\n")
    console.print(_work_table(profile))
    console.print()
    columns = columns or {}
    memory = _memory_table(profile, columns)
    if columns and Measurement.get(console, console.options.update(width=10 * width), memory).maximum > width:
        console.print(_memory_table(profile, {}))
        memory = _extra_table(profile, columns)
        console.print()
    console.print(memory)
    lines = told.getvalue().splitlines()
    for sentence in ("", *_totals(profile), "", *_insights(profile, ridge, width), *_remarks(profile)):
        lines += wrap(sentence, width) or [""]
    return "\n".join(line.rstrip() for line in lines)


def load_rich() -> None:
    """Imports rich, which draws from Python's generator as it is imported, and puts that back: printing changes nothing."""
    state = random.getstate()
    import rich.console  # noqa: F401

    random.setstate(state)


def wrap(sentence: str, width: int = 100) -> list[str]:
    """A sentence in lines of at most that width, indented from the second on."""
    return textwrap.wrap(sentence, width, subsequent_indent=" " * 6)


def to_json(profile: "Profile", columns: Columns | None = None, more: Mapping[str, Any] | None = None) -> str:
    """All counts as a JSON object: exact integers, units in the keys, layers in order.

    columns: keys of the layers; more: keys of the object.
    """
    layers = [
        {"name": layer.name, "kind": layer.kind, "what": layer.what, "output_shape": layer.output_shape, "calls": layer.calls}
        | {key: getattr(layer, key) for key in COUNTS}
        | {"forward_flop_per_byte": layer.arithmetic_intensity}
        | {heading: values.get(layer.name) for heading, values in (columns or {}).items()}
        for layer in profile.layers
    ]
    return json.dumps(
        {
            "model": profile.kind,
            "rule": profile.rule,
            "input_shapes": profile.input_shapes,
            "backward": profile.backward,
            "counted_on": profile.device,
            "notes": profile.notes,
            "total": {key: profile.total(key) for key in COUNTS} | {"forward_flop_per_byte": profile.arithmetic_intensity},
            "uncounted": profile.uncounted,
            **(more or {}),
            "layers": layers,
        },
        indent=2,
        ensure_ascii=False,
        default=str,
    )


def to_csv(profile: "Profile", columns: Columns | None = None) -> str:
    """All counts as CSV: a heading, then one row a layer; shapes as 1x64x32x32, units in the headings."""
    extra = columns or {}
    told = io.StringIO()
    writer = csv.writer(told, lineterminator="\n")
    writer.writerow(["name", "kind", "what", "output_shape", "calls", *COUNTS, "forward_flop_per_byte", *extra])
    for layer in profile.layers:
        more = [values.get(layer.name) for values in extra.values()]
        row: list[Any] = [layer.name, layer.kind, layer.what, layer.output_shape, layer.calls]
        row += [*(getattr(layer, key) for key in COUNTS), layer.arithmetic_intensity, *more]
        writer.writerow("x".join(map(str, value)) if isinstance(value, tuple | list) else value for value in row)
    return told.getvalue()


# ---- the tables ----------------------------------------------------------------------------------------------------------


def _work_table(profile: "Profile") -> "Table":
    training = profile.backward
    headings = [
        *("layer", "output", "para-\nmeters", "MAC\nfwd", "FLOP\nfwd", *["FLOP\nfwd+bwd"] * training),
        *("other\nfwd", *["other\nfwd+bwd"] * training, "share\nof FLOP"),
    ]
    table = _table(headings)
    table.columns[1].justify = table.columns[-1].justify = "left"
    most = max((_work(profile, layer) for layer in profile.layers), default=0) or 1
    for label, layer in _tree(profile):
        if layer is None:
            table.add_row(label)
            continue
        flops = [layer.forward_flops, *[layer.training_flops] * training]
        other = [layer.forward_other, *[layer.forward_other + layer.backward_other] * training]
        work = _work(profile, layer)
        share = f"{100 * work / _total_work(profile):4.1f} % {_bar(work / most, 6)}" if work else ""
        numbers = map(_short, (layer.parameters, layer.forward_macs, *flops, *other))
        table.add_row(label, _shape(layer.output_shape), *numbers, share)
    return table


def _memory_table(profile: "Profile", columns: Columns) -> "Table":
    training = profile.backward
    headings = ["layer", "bytes\nread", "bytes\nwritten", *["bytes\nbwd", "bytes\nkept"] * training, "FLOP/\nbyte"]
    table = _table([*headings, *_fold(columns)])
    for label, layer in _tree(profile):
        if layer is None:
            table.add_row(label)
            continue
        numbers = [layer.bytes_read, layer.bytes_written, *[layer.backward_bytes, layer.activation_bytes] * training]
        more = [_text(values.get(layer.name)) for values in columns.values()]
        table.add_row(label, *map(_short, numbers), f"{layer.arithmetic_intensity:.3g}", *more)
    return table


def _extra_table(profile: "Profile", columns: Columns) -> "Table":
    table = _table(["layer", *_fold(columns)])
    for label, layer in _tree(profile):
        table.add_row(label, *(_text(values.get(layer.name)) for values in columns.values() if layer))
    return table


def _fold(headings: Iterable[str]) -> list[str]:
    return [heading.replace(" ", "\n", 1) for heading in headings]


def _table(headings: list[str]) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(*headings, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=0)
    for column in table.columns:
        column.justify, column.no_wrap = "right", True
    table.columns[0].justify = "left"
    return table


def _tree(profile: "Profile") -> Iterable[tuple[str, "LayerCost | None"]]:
    """(indented label, layer); a container without work of its own has a line too, with None."""
    shown = {""}
    if all(layer.name for layer in profile.layers):
        yield profile.kind, None
    for layer in profile.layers:
        parts = layer.name.split(".") if layer.name else []
        for depth in range(1, len(parts)):
            path = ".".join(parts[:depth])
            if path not in shown:
                shown.add(path)
                yield "  " * depth + parts[depth - 1], None
        shown.add(layer.name)
        label = "  " * len(parts) + (f"{parts[-1]} {layer.kind}" if parts else layer.kind)
        yield label if len(label) <= 32 else label[:31] + "…", layer


# ---- the sentences -------------------------------------------------------------------------------------------------------


def _totals(profile: "Profile") -> list[str]:
    work = f"{profile.forward_macs:,} MAC = {profile.forward_flops:,} FLOP, and {profile.forward_other:,} other FLOP"
    lines = [
        f"parameters  {profile.parameters:,} ({profile.trainable_parameters:,} trainable), {_bytes(profile.parameter_bytes)}",
        f"forward     {work}",
    ]
    moved = f"memory      {_bytes(profile.forward_bytes)} moved forward ({profile.arithmetic_intensity:.3g} FLOP/byte)"
    if profile.backward:
        flops = 2 * profile.backward_macs
        lines += [
            f"backward    {profile.backward_macs:,} MAC = {flops:,} FLOP, and {profile.backward_other:,} other FLOP",
            f"both        {profile.training_flops:,} FLOP without other; loss and optimizer are not in it",
        ]
        moved += f", {_bytes(profile.backward_bytes)} backward; {_bytes(profile.activation_bytes)} kept for backward"
    return [*lines, moved]


def _insights(profile: "Profile", ridge: float | None, width: int) -> list[str]:
    """The three kinds of layer with most work, then those that lead in memory: a line that names them, and one of insight."""
    alike: dict[str, list[LayerCost]] = {}
    for layer in profile.layers:
        if _work(profile, layer):
            alike.setdefault(layer.what, []).append(layer)
    lines = ["most expensive" + (", forward + backward:" if profile.backward else ", forward:")] if alike else []
    for what, layers in sorted(alike.items(), key=lambda item: -sum(_work(profile, layer) for layer in item[1]))[:3]:
        share = sum(_work(profile, layer) for layer in layers) / _total_work(profile)
        parameters, own = sum(layer.parameters for layer in layers), sum(layer.parameter_bytes for layer in layers)
        moved = sum(layer.forward_bytes for layer in layers)
        intensity = sum(layer.forward_flops + layer.forward_other for layer in layers) / moved if moved else 0.0
        times = f"{len(layers)} layers of " if len(layers) > 1 else ""
        head = f"  {100 * share:.0f} % of the FLOP: {times}{what}"
        named = (f"{head} ({names});" for names in (_names(layers), f"{_where(layers[0])} …"))
        lines += [
            next((line for line in named if len(line) <= width), f"{head};"),
            f"      {_short(parameters) or 0} of {_short(profile.parameters)} parameters ({_bytes(own)}), "
            f"{intensity:.3g} FLOP/byte: {_bound(intensity, ridge)}",
        ]
    for words, key in (("of the bytes moved forward", "forward_bytes"), ("of the memory kept for backward", "activation_bytes")):
        if total := profile.total(key):
            kinds: dict[str, int] = {}
            for layer in profile.layers:
                kinds[layer.kind] = kinds.get(layer.kind, 0) + getattr(layer, key)
            kind = max(kinds, key=lambda kind: kinds[kind])
            top = max(profile.layers, key=lambda layer: getattr(layer, key))
            lines += [
                f"  {100 * kinds[kind] / total:.0f} % {words}: {kind};",
                f"      the largest single layer is {_where(top)} ({top.what}) with {_bytes(getattr(top, key))}",
            ]
    return lines


def _remarks(profile: "Profile") -> list[str]:
    lines = [f"note: {note}" for note in profile.notes]
    if idle := [layer.name for layer in profile.layers if not layer.calls]:
        lines.append(f"note: never called, so without work: {', '.join(idle)}")
    if profile.uncounted:
        told = ", ".join(f"{name} ({times}×)" for name, times in profile.uncounted.items())
        lines.append(f"NOT COUNTED, for want of a rule: {told}")
    else:
        lines.append("every operation met is counted")
    return lines


def _bound(intensity: float, ridge: float | None) -> str:
    if ridge is not None:
        return f"bound by {'compute' if intensity >= ridge else 'memory'} here (ridge at {ridge:.3g})"
    if intensity >= 40:
        return "bound by compute"
    return "bound by memory" if intensity <= 4 else "compute or memory, by machine"


def _work(profile: "Profile", layer: "LayerCost") -> int:
    return layer.training_flops if profile.backward else layer.forward_flops


def _total_work(profile: "Profile") -> int:
    return profile.training_flops if profile.backward else profile.forward_flops


def _where(layer: "LayerCost") -> str:
    return layer.name or "the root"


def _names(layers: list["LayerCost"]) -> str:
    names = [_where(layer) for layer in layers]
    return ", ".join(names) if len(names) < 3 else f"{names[0]} … {names[-1]}"


def _shapes(profile: "Profile") -> str:
    return ", ".join(map(_shape, profile.input_shapes)) or "none"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "" if shape is None else "×".join(map(str, shape)) or "scalar"


def _short(number: float) -> str:
    """Three digits and a decimal prefix: 37,748,736 is 37.7M; blank for 0."""
    if not number:
        return ""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * factor:
            digits = 2 if number < 9.995 * factor else 1 if number < 99.95 * factor else 0
            return f"{number / factor:.{digits}f}{prefix}"
    return f"{number:.3g}"


def _bytes(number: float) -> str:
    return f"{_short(number) or '0'}B".replace("kB", " kB").replace("MB", " MB").replace("GB", " GB").replace("TB", " TB")


def _text(value: Any) -> str:
    match value:
        case None:
            return ""
        case float():
            return f"{value:.3g}"
        case tuple() | list():
            return _text(value[0]) if len(set(value)) == 1 else "×".join(map(_text, value))
        case _:
            return str(value)


def _bar(share: float, width: int) -> str:
    """A bar of that many characters at share 1, in eighths of a character."""
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
