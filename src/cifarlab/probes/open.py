"""The probes of a training run, by its settings."""

from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer

from cifarlab.config import TrainConfig, WatchConfig
from cifarlab.data.augment import normalize_batch
from cifarlab.data.batches import Batches
from cifarlab.data.dataset import Dataset, Split, balanced_subset
from cifarlab.distributed import autocast_dtype
from cifarlab.probes import choose_probes
from cifarlab.probes.fixed_batch import FixedBatch
from cifarlab.probes.incident import save_incident
from cifarlab.probes.panel import Panel, choose_parameters, describe_parameters
from cifarlab.runs import RunFolder

FIXED_IMAGES = 64
"""Training images, without augmentation, that the probes of a fixed batch are measured on. A unit that is active for one image
in fifty is then missed with a chance of 27 %, in twenty of 4 %: enough for a rule that asks for three of four units."""
LOSS_IMAGES = 32
"""Of these, for curvature and noise: a Hessian-vector product costs three to five forward and backward passes."""


def open_panel(config: TrainConfig, watch: WatchConfig, folder: RunFolder | None, model: nn.Module, optimizer: Optimizer,
               split: Split, dataset: Dataset, batches: Batches, num_steps: int) -> Panel:  # fmt: skip
    """The panel of a run; an idle one where `folder` is None (ranks but the first) or nothing is to be probed.

    All ranks hold the same gradients and weights after a backward pass, so that one of them is enough.
    """
    names = choose_probes(watch.probes) if folder else frozenset()
    parameters = choose_parameters(model.named_parameters(), watch.probe_include, watch.probe_exclude) if names else {}
    criterion = partial(F.cross_entropy, label_smoothing=config.label_smoothing)
    dtype = autocast_dtype(config.precision)

    @cache
    def fixed(num_images: int) -> FixedBatch:
        chosen = balanced_subset(split.labels, min(num_images, len(split)), config.seed)
        pixels, labels = torch.tensor(split.images[chosen]), torch.tensor(split.labels[chosen], device=batches.device)
        images = normalize_batch(pixels, dataset.mean, dataset.std, batches.device, config.channels_last)
        return FixedBatch(images, labels, criterion)

    def keep_incident(step: int, is_late: bool = False) -> None:
        assert folder
        images, labels = batches.at(step)
        indices = batches.indices_at(step)
        save_incident(folder.path, step, model, None if is_late else optimizer, images, labels, criterion=criterion,
                      indices=indices, size=config.micro_batch_size, dtype=dtype)  # fmt: skip

    if folder and names:
        folder.write_json("probes.json", {"probes": sorted(names), "every": watch.probe_every, "num_classes": dataset.num_classes,
                                          "parameters": describe_parameters(model, parameters)})  # fmt: skip
    chosen = {id(p) for p in parameters.values()}
    left_out = [p for p in choose_parameters(model.named_parameters()).values() if id(p) not in chosen] if names else []
    is_scaled = config.precision == "fp16"  # the scaler skips steps that are not finite: they are no incidents
    return Panel(model, parameters, names, every=watch.probe_every, last_step=num_steps, optimizer=optimizer,
                 images=lambda: fixed(FIXED_IMAGES).images, dtype=lambda: dtype, batch=lambda: fixed(LOSS_IMAGES),
                 weights_are_ours=True, left_out=left_out,
                 on_non_finite=None if is_scaled or not names else keep_incident)  # fmt: skip
