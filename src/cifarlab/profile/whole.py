"""Everything about a network's cost at once: counted, walked and measured, joined by the layers' names; and its figures."""

import math
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifarlab.config import InputError
from cifarlab.figures import draw_effective_field, draw_flops, draw_receptive_field, draw_roofline, save_figure
from cifarlab.profile.counting import Profile, bring_to, count, dtype_of, home_of, random_states_kept
from cifarlab.profile.latency import LayerTime, measure_layers, measure_whole
from cifarlab.profile.receptive import ERF, ReceptiveField, effective_receptive_field, receptive_fields
from cifarlab.profile.report import format_table, wrap
from cifarlab.profile.roofline import LayerRoof, Peaks, beaten_peak, measure_peaks, place_layers

KEYS = {  # of a program's output, for the table's headings
    "field size": "field_size_pixels", "field stride": "field_stride_pixels", "field offset": "field_offset_pixels",
    "ms fwd": "ms_forward", "ms bwd": "ms_backward", "GFLOP/s fwd": "gflops_forward", "GFLOP/s bwd": "gflops_backward",
    "roof% fwd": "share_of_roof", "roof% bwd": "share_of_roof_backward", "bound by": "bound_by",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Survey(Profile):
    """The counts, and what else was asked for. The dicts are keyed by the layers' dotted names, and empty when nothing was timed.

    `print(survey)` gives the tables; the receptive fields are walked when they are first asked for.
    """

    times: dict[str, LayerTime] = field(default_factory=dict)
    whole: LayerTime | None = None
    peaks: Peaks | None = None
    threads: int = 1
    """Of torch, when it was timed."""
    roofs: dict[str, LayerRoof] = field(default_factory=dict)
    """Of the forward pass."""
    backward_roofs: dict[str, LayerRoof] = field(default_factory=dict)
    effective: ERF | None = None
    module: nn.Module = field(repr=False, compare=False)
    inputs: Any = field(repr=False, compare=False, default=None)

    @property
    def batch(self) -> int:
        return self.input_shapes[0][0] if self.input_shapes and self.input_shapes[0] else 1

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of the first input N×C×H×W, if there is one."""
        return next(((s[1], s[2], s[3]) for s in self.input_shapes if len(s) == 4), None)

    @property
    def fields(self) -> dict[str, ReceptiveField]:
        """Empty where the inputs are no images or the walk fails: then the remarks say so."""
        return self._walk[0]

    @cached_property
    def _walk(self) -> tuple[dict[str, ReceptiveField], str]:
        if self.image_shape is None:
            return {}, "no input is a batch of images N×C×H×W"
        try:
            return receptive_fields(self.module, self.image_shape, inputs=self.inputs), ""
        except InputError as error:  # the module could be counted: one thing that is not known does not take away the rest
            return {}, str(error)

    @property
    def columns(self) -> dict[str, dict[str, Any]]:
        """What to put beside the counts in a table: heading -> layer -> value."""
        known = {name: field for name, field in self.fields.items() if field.size}
        columns: dict[str, dict[str, Any]] = {
            "field size": {name: field.size for name, field in known.items()},
            "field stride": {name: field.stride or "varies" for name, field in known.items()},
            "field offset": {name: field.offset for name, field in known.items()},
        } if known else {}  # fmt: skip
        if self.times:
            columns |= {
                "ms fwd": {name: time.forward_ms for name, time in self.times.items()},
                "ms bwd": {name: time.backward_ms for name, time in self.times.items()},
                "GFLOP/s fwd": {name: roof.gflops for name, roof in self.roofs.items()},
                "GFLOP/s bwd": {name: roof.gflops for name, roof in self.backward_roofs.items()},
                "roof% fwd": {name: 100 * roof.share for name, roof in self.roofs.items()},
                "roof% bwd": {name: 100 * roof.share for name, roof in self.backward_roofs.items()},
                "bound by": {name: roof.bound for name, roof in self.roofs.items()},
            }
        return columns

    @property
    def keyed_columns(self) -> dict[str, dict[str, Any]]:
        """The columns for JSON and CSV: their names have units, and a share is from 0 to 1."""
        columns = {KEYS[heading]: values for heading, values in self.columns.items()}
        if self.roofs:
            for key, roofs in (("", self.roofs), ("_backward", self.backward_roofs)):
                columns[f"share_of_roof{key}"] = {name: roof.share for name, roof in roofs.items()}
                columns[f"bound_by{key}"] = {name: roof.bound for name, roof in roofs.items()}
        if unknown := {name: "; ".join(field.unknown) for name, field in self.fields.items() if field.unknown}:
            columns["field_unknown_behind"] = unknown
        return columns

    @property
    def passes(self) -> dict[str, LayerRoof]:
        """Both passes of every layer under the roofs, by the name to print; the backward one's ends in "bwd"."""
        forward = {name or self.kind: roof for name, roof in self.roofs.items()}
        return forward | {f"{name or self.kind} bwd": roof for name, roof in self.backward_roofs.items()}

    @property
    def measured(self) -> dict[str, Any] | None:
        """Times of the whole net and this machine's roofs, for JSON; None when nothing was timed."""
        if not (self.whole and self.peaks):
            return None
        return {
            "batch": self.batch, "forward_ms": self.whole.forward_ms, "backward_ms": self.whole.backward_ms,
            "peak_gflops": self.peaks.gflops, "peak_gbytes_per_second": self.peaks.gbytes_per_second, "threads": self.threads,
        }  # fmt: skip

    @property
    def effective_sizes(self) -> dict[str, Any] | None:
        """The effective receptive field in three numbers, for JSON."""
        if not self.effective:
            return None
        return {"layer": self.effective.layer, "mass_side_pixels": self.effective.mass_side,
                "core_side_pixels": self.effective.core_side}  # fmt: skip

    @property
    def remarks(self) -> list[str]:
        """Sentences that belong under the table: the whole step's time, the machine's roofs, what could not be followed."""
        told = []
        if self.whole and self.peaks:
            forward, backward = self.whole.forward_ms, self.whole.backward_ms
            spent, flops = forward, self.forward_flops
            line = f"measured at batch {self.batch}: forward {forward:.1f} ms"
            if self.trainable_parameters:
                spent, flops = forward + backward, self.training_flops if self.backward else 2 * self.forward_flops
                line += f", backward {backward:.1f} ms, {1000 * self.batch / spent:,.0f} images/s in training"
            told.append(line)
            if self.backward or not self.trainable_parameters:
                gflops = flops / spent / 1e6
                told.append(f"achieved {gflops:,.0f} GFLOP/s, {100 * gflops / self.peaks.gflops:.0f} % of this machine's own "
                            f"{self.peaks.gflops:,.0f} GFLOP/s in matrix products")  # fmt: skip
            if beaten := beaten_peak(self.passes, self.peaks):
                told.append(beaten)
            told.append(f"memory moves {self.peaks.gbytes_per_second:.1f} GB/s: below {self.peaks.ridge:.1f} FLOP/byte "
                        "a layer waits for it")  # fmt: skip
        if self.effective:
            side = self.effective.mass_side
            told.append(f"effective receptive field of {self.effective.layer or self.kind}'s centre output: 95 % of the gradient "
                        f"in {side}×{side} pixels (core {self.effective.core_side:.1f})")  # fmt: skip
        if self._walk[1]:
            told.append(f"receptive fields are not known: {self._walk[1]}")
        if any(field.size and not field.stride for field in self.fields.values()):
            told.append("field stride varies where branches of different strides meet: size is that of the largest field there")
        unknown = sorted({name for field in self.fields.values() for name in field.unknown})
        if unknown:
            told.append(f"receptive fields behind these operations are not known: {', '.join(unknown)}")
        return told

    def format(self, *, title: str = "", width: int = 100) -> str:
        """The tables with all columns, and the remarks under them, as plain text of that width."""
        ridge = self.peaks.ridge if self.peaks else None
        remarks = [line for remark in self.remarks for line in wrap(remark, width)]
        return "\n".join([format_table(self, self.columns, title=title, width=width, ridge=ridge), *remarks])

    def __str__(self) -> str:
        return self.format()


def survey(module: nn.Module, input_shape: tuple[int, ...] | None = None, *, batch_size: int = 1, inputs: Any = None,
           backward: bool = True, strict: bool = False, timed: bool = False, effective: bool = False) -> Survey:  # fmt: skip
    """What a module costs, layer by layer: its counts, as `count` gives them (see there for the arguments); and if wanted more.

    timed: milliseconds of each layer under this machine's roofs, on the module's device, with inputs of random numbers where only
    a shape was given; about twenty training steps, and some seconds for the roofs. effective: the effective receptive field of
    the last map. `fields` has the theoretical receptive fields of a net for images. The module and all random states stay as
    they are; fields asked for later are those of the module as it is then.

    Raises InputError as `count` does, and when a timed step would not fit into the memory of this machine.
    """
    counted = count(module, input_shape, batch_size=batch_size, inputs=inputs, backward=backward, strict=strict)
    known: dict[str, Any] = vars(counted) | {"module": module, "inputs": inputs}
    found, home = Survey(**known), home_of(module)
    if effective:
        given = inputs if isinstance(inputs, Tensor) and inputs.ndim == 4 and inputs.device.type != "meta" else found.image_shape
        if given is None:
            raise InputError("an effective receptive field needs an input N×C×H×W, and there is none: leave effective out")
        _check_memory(counted, home, "the effective receptive field", 16 / found.batch if inputs is None else 1.0)
        more = None if isinstance(given, Tensor) else inputs
        known["effective"] = effective_receptive_field(module, given, inputs=more)
    if timed:
        _check_memory(counted, home, "a training step")
        with random_states_kept(home):
            given = torch.empty(batch_size, *(input_shape or ()), dtype=dtype_of(module.parameters()), device="meta")
            given = bring_to(home, given if inputs is None else inputs)
        is_channels_last = any(w.ndim == 4 and w.is_contiguous(memory_format=torch.channels_last) and w.shape[1] > 1
                               for w in module.parameters())  # fmt: skip
        if is_channels_last and isinstance(given, Tensor) and given.ndim == 4:
            given = given.contiguous(memory_format=torch.channels_last)
        known["times"], known["whole"] = measure_layers(module, given), measure_whole(module, given)
        known["threads"] = torch.get_num_threads()
        known["peaks"] = measure_peaks(home, dtype_of(module.parameters()))
        known["roofs"] = place_layers(counted.layers, known["times"], known["peaks"])
        if backward:
            known["backward_roofs"] = place_layers(counted.layers, known["times"], known["peaks"], backward=True)
    return Survey(**known)


profile = survey


def _check_memory(counted: Profile, home: torch.device, what: str, factor: float = 1.0) -> None:
    if home.type == "meta":
        raise InputError("a module on the meta device can only be counted: move it to a device, or leave timed and effective out")
    needed = factor * (counted.activation_bytes + max((layer.forward_bytes for layer in counted.layers), default=0))
    is_cuda = home.type == "cuda"
    there = torch.cuda.mem_get_info(home)[1] if is_cuda else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise InputError(f"{what} would need {needed / 1e9:,.0f} GB and this machine has {there / 1e9:,.0f} GB: give a smaller "
                         "input or batch, or only have it counted")  # fmt: skip


def draw_survey(found: Survey, folder: Path, *, title: str) -> list[Path]:
    """FLOP by layer, receptive field by depth and, where they were measured, roofline and effective field, as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = [layer for layer in found.layers if layer.forward_macs]
    forward, backward = ([getattr(layer, macs) // found.batch for layer in layers] for macs in ("forward_macs", "backward_macs"))
    chart = draw_flops([layer.name or layer.kind for layer in layers], forward, backward,
                       title=f"FLOP by layer, for one image: {title}")  # fmt: skip
    drawn = [save_figure(chart, folder / "flops.png")]
    if found.image_shape and found.fields:
        sizes = [field.size if field.size else (math.nan, math.nan) for field in found.fields.values()]
        names = [name or found.kind for name in found.fields]
        chart = draw_receptive_field(names, sizes, found.image_shape[1:], title=f"Receptive field by depth: {title}")
        drawn.append(save_figure(chart, folder / "receptive_field.png"))
    if found.peaks:
        spent = [found.times[name].forward_ms for name in found.roofs]
        spent += [found.times[name].backward_ms for name in found.backward_roofs]
        roofs = found.passes.values()
        chart = draw_roofline(
            list(found.passes), [roof.intensity for roof in roofs], [roof.gflops for roof in roofs], spent,
            ["forward"] * len(found.roofs) + ["backward"] * len(found.backward_roofs),
            peak_gflops=found.peaks.gflops, peak_gbytes_per_second=found.peaks.gbytes_per_second, title=f"Roofline: {title}",
        )  # fmt: skip
        drawn.append(save_figure(chart, folder / "roofline.png"))
    if found.effective:
        drawn.append(save_figure(draw_effective_field(found.effective.array), folder / "effective_field.png"))
    return drawn
