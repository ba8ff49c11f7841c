"""Everything about a network's cost at once: counted, walked and measured, joined by the layers' names; and its figures."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cifarlab.figures import draw_effective_field, draw_flops, draw_receptive_field, draw_roofline, save_figure
from cifarlab.profile.counting import Profile, profile
from cifarlab.profile.latency import LayerTime, measure_layers, measure_whole
from cifarlab.profile.receptive import ERF, ReceptiveField, effective_receptive_field, receptive_fields
from cifarlab.profile.roofline import LayerRoof, Peaks, measure_peaks, place_layers


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What `survey` found. The dicts are keyed by the layers' dotted names; those of times are empty when nothing was timed."""

    profile: Profile
    shape: tuple[int, int, int]
    fields: dict[str, ReceptiveField]
    times: dict[str, LayerTime]
    whole: LayerTime | None
    peaks: Peaks | None
    roofs: dict[str, LayerRoof]
    effective: ERF | None

    @property
    def columns(self) -> dict[str, dict[str, Any]]:
        """What to put beside the counts in a table: heading -> layer -> value."""
        fields = {name: field for name, field in self.fields.items() if field.size}
        columns: dict[str, dict[str, Any]] = {
            "field size": {name: field.size for name, field in fields.items()},
            "field stride": {name: field.stride for name, field in fields.items()},
            "field offset": {name: field.offset for name, field in fields.items()},
        }
        if self.times:
            columns |= {
                "ms fwd": {name: time.forward_ms for name, time in self.times.items()},
                "ms bwd": {name: time.backward_ms for name, time in self.times.items()},
                "GFLOP/s fwd": {name: roof.gflops for name, roof in self.roofs.items()},
                "% of roof": {name: 100 * roof.share for name, roof in self.roofs.items()},
                "bound by": {name: roof.bound for name, roof in self.roofs.items()},
            }
        return columns

    @property
    def remarks(self) -> list[str]:
        """Sentences that belong under the table: the whole step's time, the machine's roofs, what could not be followed."""
        told = []
        if self.whole and self.peaks:
            batch = self.profile.input_shapes[0][0]
            forward, backward = self.whole.forward_ms, self.whole.backward_ms
            speed = 1000 * batch / (forward + backward)
            told.append(f"measured at batch {batch}: forward {forward:.1f} ms, backward {backward:.1f} ms, {speed:,.0f} images/s")
            gflops = self.profile.training_flops / (forward + backward) / 1e6
            told.append(f"achieved {gflops:,.0f} GFLOP/s, {100 * gflops / self.peaks.gflops:.0f} % of this machine's own "
                        f"{self.peaks.gflops:,.0f} GFLOP/s in matrix products")  # fmt: skip
            told.append(f"memory moves {self.peaks.gbytes_per_second:.1f} GB/s: below {self.peaks.ridge:.1f} FLOP/byte "
                        "a layer waits for it")  # fmt: skip
        if self.effective:
            side = self.effective.mass_side
            told.append(f"effective receptive field of {self.effective.layer}'s centre output: 95 % of the gradient in "
                        f"{side}×{side} pixels (core {self.effective.core_side:.1f})")  # fmt: skip
        unknown = sorted({name for field in self.fields.values() for name in field.unknown})
        if unknown:
            told.append(f"receptive fields behind these operations are not known: {', '.join(unknown)}")
        return told


def survey(module: nn.Module, shape: tuple[int, int, int], *, batch_size: int = 1, timed: bool = True, effective: bool = False,
           strict: bool = False) -> Survey:  # fmt: skip
    """Counts, receptive fields and, if timed, milliseconds under this machine's roofs, on the module's device.

    shape: (C, H, W) of one image. Timing takes about twenty training steps, and two seconds for the roofs.
    The module stays as it is.
    """
    counted = profile(module, shape, batch_size=batch_size, strict=strict)
    weights = next(module.parameters(), torch.empty(0))
    whole, peaks, times, roofs = None, None, {}, {}
    if timed:
        with torch.random.fork_rng():
            inputs = torch.randn(batch_size, *shape, device=weights.device, dtype=weights.dtype)
        if any(w.ndim == 4 and w.is_contiguous(memory_format=torch.channels_last) for w in module.parameters()):
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        times, whole = measure_layers(module, inputs), measure_whole(module, inputs)
        peaks = measure_peaks(weights.device, weights.dtype)
        roofs = place_layers(counted.layers, times, peaks)
    return Survey(profile=counted, shape=shape, fields=receptive_fields(module, shape), times=times, whole=whole, peaks=peaks,
                  roofs=roofs, effective=effective_receptive_field(module, shape) if effective else None)  # fmt: skip


def draw_survey(found: Survey, folder: Path, *, title: str) -> list[Path]:
    """FLOP by layer, receptive field by depth and, where they were measured, roofline and effective field, as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    batch = found.profile.input_shapes[0][0]
    layers = [layer for layer in found.profile.layers if layer.forward_macs]
    forward, backward = ([getattr(layer, macs) // batch for layer in layers] for macs in ("forward_macs", "backward_macs"))
    chart = draw_flops([layer.name for layer in layers], forward, backward, title=f"FLOP by layer: {title}")
    drawn = [save_figure(chart, folder / "flops.png")]
    sizes = [field.size if field.size else (math.nan, math.nan) for field in found.fields.values()]
    chart = draw_receptive_field(list(found.fields), sizes, found.shape[1:], title=f"Receptive field by depth: {title}")
    drawn.append(save_figure(chart, folder / "receptive_field.png"))
    if found.peaks:
        roofs = found.roofs
        chart = draw_roofline(
            list(roofs), [roof.intensity for roof in roofs.values()], [roof.gflops for roof in roofs.values()],
            [found.times[name].forward_ms for name in roofs], peak_gflops=found.peaks.gflops,
            peak_gbytes_per_second=found.peaks.gbytes_per_second, title=f"Roofline, forward: {title}",
        )  # fmt: skip
        drawn.append(save_figure(chart, folder / "roofline.png"))
    if found.effective:
        drawn.append(save_figure(draw_effective_field(found.effective.array), folder / "effective_field.png"))
    return drawn
