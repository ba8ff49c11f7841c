"""What the probes cost: step time with and without each set, beside histogram logging of the same tensors as others do it.

    python benchmarks/probes.py [--json] [--nets simple_cnn,resnet18,fast,RECIPE,MODEL] [--ways none,cheap,watch]
                                [--precision fp32,bf16] [--rounds 40] [--device cuda] [--processor-time]

Every way takes its turn, one training step each, in rounds. Two figures a way: the median over the rounds of the whole step
with it divided by the plain step of the same round, which has the noise of forward and backward in it; and what the part behind
the backward pass (hooks and optimizer) takes longer, a mean that has one flush in 20 steps in it. The sets that measure at an
interval are measured at each step, and at their interval worked out for the last line. cl.watch is the whole of it: hooks,
flushes, diagnosis, a run folder on the disk, but no figures and no rare probes. wandb.watch is the real one, in offline mode,
at each step (it comes with every 1,000th by default); its gradient hooks run in the backward pass, so that only its ratio
tells. TensorBoard's add_histogram is the real one, too. Both are left out where they are not installed. On a busy machine the
figures mean little by the wall's clock: take one thread (OMP_NUM_THREADS=1) and --processor-time there.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cifarlab.config import TrainConfig
from cifarlab.distributed import autocast, autocast_dtype, pick_precision
from cifarlab.models import create_model
from cifarlab.optim.optimizers import build_optimizer
from cifarlab.probes.fixed_batch import FixedBatch
from cifarlab.probes.moments import Moments
from cifarlab.probes.open import FIXED_IMAGES, LOSS_IMAGES
from cifarlab.probes.panel import Panel
from cifarlab.probes.watch import watch
from cifarlab.recipes import RECIPES
from machine import describe_machine

FLOWS = ("gradient_flow", "weight_flow", "update_flow")
EVERY = 200  # the default interval
BLOCK = 20  # steps between two flushes
WARM_UP = 20  # rounds left out: in its first steps cl.watch looks at more, and its first flush loads what it needs


NETS = ("simple_cnn", "resnet18", "fast")  # beside these, any recipe and any model


def find_net(name: str) -> tuple[Callable[[], nn.Module], TrainConfig]:
    """(what builds it, its settings) of one of NETS, a recipe or a model; of a model alone the settings are ResNet-18's."""
    recipe = {"simple_cnn": "simplecnn-adam", "resnet18": "resnet18-cosine"}.get(name, name)
    if recipe in RECIPES:
        config = RECIPES[recipe].build()
        return lambda: create_model(config.model), config
    create_model(name)  # which says what there is
    return lambda: create_model(name), RECIPES["resnet18-cosine"].build()


def nothing() -> None:
    pass


@dataclass
class Turn:
    """One way of looking on: what is called before and after the optimizer's step, at which net."""

    before: Callable[[], Any] = nothing
    after: Callable[[], Any] = nothing
    attach: Callable[[], Any] = nothing
    detach: Callable[[], Any] = nothing
    note: Callable[[torch.Tensor], Any] = lambda loss: None
    close: Callable[[], Any] = nothing
    trained: "Trained | None" = None  # of its own, where it cannot be taken off between two turns


Trained = tuple[nn.Module, torch.optim.Optimizer]


def probe_turn(model: nn.Module, optimizer: torch.optim.Optimizer, names: tuple[str, ...], images: torch.Tensor,
               labels: torch.Tensor, dtype: torch.dtype | None, ours: bool, is_rare: bool = False) -> Turn:  # fmt: skip
    panel = Panel(model, dict(model.named_parameters()), names, every=1 if is_rare else 10**9, optimizer=optimizer,
                  weights_are_ours=ours, images=lambda: images[:FIXED_IMAGES], dtype=lambda: dtype,
                  batch=lambda: FixedBatch(images[:LOSS_IMAGES], labels[:LOSS_IMAGES]))  # fmt: skip
    step = 1

    def after() -> None:
        nonlocal step
        panel.after_update(step)
        if step % BLOCK == 0:
            panel.read()
        step += 1

    return Turn(lambda: panel.before_update(step), after)


def watch_turn(trained: Trained, folder: str) -> Turn:
    model, optimizer = trained
    watched = watch(model, optimizer, "watched", runs_dir=folder, probes=",".join(FLOWS), every=10**9, flush_every=BLOCK,
                    figures=False, say=None)  # fmt: skip
    return Turn(note=lambda loss: watched.log(loss=loss), close=watched.close, trained=trained)


def wandb_turn(model: nn.Module, folder: str) -> Turn | None:
    try:
        import wandb
    except ImportError:
        return None
    os.environ |= {"WANDB_SILENT": "true"} | dict.fromkeys(("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"), folder)
    run = wandb.init(project="benchmark", mode="offline", settings=wandb.Settings(console="off", x_disable_stats=True))
    return Turn(after=lambda: run.log({"x": 1}), attach=lambda: run.watch(model, log="all", log_freq=1),
                detach=lambda: run.unwatch(model), close=run.finish)  # fmt: skip


def tensorboard_turn(model: nn.Module, folder: str) -> Turn | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    writer: Any = SummaryWriter(folder)
    step = 0

    def before() -> None:
        nonlocal step
        step += 1
        for name, p in model.named_parameters():
            writer.add_histogram(f"weights/{name}", p, step)
            if p.grad is not None:
                writer.add_histogram(f"gradients/{name}", p.grad, step)

    return Turn(before)


def measure(net: str, wanted: list[str], rounds: int, device: torch.device, folder: str, precision: str,
            clock: Callable[[], float]) -> dict[str, Any]:  # fmt: skip
    build, config = find_net(net)
    precision = pick_precision(precision or config.precision, device)
    size, pieces = config.batch_size, -(-config.batch_size // (config.micro_batch_size or config.batch_size))
    kwargs = {"memory_format": torch.channels_last} if config.channels_last else {}

    def make() -> Trained:
        torch.manual_seed(0)
        model = build().to(device).to(**kwargs)  # type: ignore[call-overload]
        return model, build_optimizer(model, replace(config, lr=1e-4))  # so low that nothing explodes on noise

    model, optimizer = make()
    images = torch.randn(size, 3, 32, 32, device=device).to(**kwargs)  # type: ignore[call-overload]
    labels = torch.randint(10, (size,), device=device)
    probing = partial(probe_turn, model, optimizer, images=images, labels=labels,
                      dtype=autocast_dtype(precision))  # fmt: skip
    turns: dict[str, Callable[[], Turn | None]] = {
        "none": Turn,
        "the cheap three, in our loop": lambda: probing(FLOWS, ours=True),
        "the cheap three, where others write weights": lambda: probing(FLOWS, ours=False),
        "the same by cl.watch, flushes and files too": lambda: watch_turn(make(), f"{folder}/{net}-{precision}"),
        "activations + batch_norm": lambda: probing(("activations", "batch_norm"), ours=True, is_rare=True),
        "distributions": lambda: probing(("distributions",), ours=True, is_rare=True),
        "noise": lambda: probing(("noise",), ours=True, is_rare=True),
        "wandb.watch at every step": lambda: wandb_turn(model, folder),
        "TensorBoard histograms at every step": lambda: tensorboard_turn(model, folder),
    }
    ours = model, optimizer
    chosen = {name: make_turn() for name, make_turn in turns.items() if name == "none" or any(word in name for word in wanted)}
    ways = {name: turn for name, turn in chosen.items() if turn is not None}
    whole: dict[str, list[float]] = {name: [] for name in ways}  # seconds of the whole step
    section: dict[str, list[float]] = {name: [] for name in ways}  # of what follows the backward pass
    for round_number in range(rounds + WARM_UP):
        for name, turn in ways.items():
            model, optimizer = turn.trained or ours
            turn.attach()
            begun = clock()
            total = torch.zeros((), device=device)
            for piece, targets in zip(images.chunk(pieces), labels.chunk(pieces), strict=True):
                with autocast(device, precision):
                    loss = F.cross_entropy(model(piece), targets) / pieces
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
            if device.type == "cuda":
                torch.cuda.synchronize()
            middle = clock()
            turn.note(total)
            turn.before()
            optimizer.step()
            turn.after()
            if device.type == "cuda":
                torch.cuda.synchronize()
            end = clock()
            optimizer.zero_grad(set_to_none=True)
            if round_number >= WARM_UP:
                whole[name].append(end - begun)
                section[name].append(end - middle)
            turn.detach()
    for turn in ways.values():
        turn.close()
    plain = whole["none"]
    rows = {}
    for name, times in whole.items():
        ratio = statistics.median(with_it / without for with_it, without in zip(times, plain, strict=True))
        # Hooks that run in the backward pass (wandb.watch's) are not in the section: of those the whole step tells.
        extra = statistics.mean(section[name]) - statistics.mean(section["none"])
        rows[name] = {"seconds": statistics.median(times), "ratio": ratio, "extra": extra}
    base = statistics.median(plain)
    cheap, rare = "the cheap three, in our loop", ("activations + batch_norm", "distributions")
    default = None
    if {cheap, *rare} <= rows.keys():
        default = 1 + (rows[cheap]["extra"] + sum(rows[name]["extra"] for name in rare) / EVERY) / base
    return {"net": net, "precision": precision, "batch": size, "parameters": sum(p.numel() for p in model.parameters()),
            "way": Moments(list(model.parameters())).way, "base": base, "rows": rows, "default": default}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--ways", default="", help="words that the wanted ways have in their names (default: all ways)")
    parser.add_argument("--precision", default="", help="of forward and backward, or several with commas (default: the recipe's)")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--processor-time", action="store_true", help="seconds of this process instead of the wall's clock")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        clock = time.process_time if arguments.processor_time else time.perf_counter
        wanted = arguments.ways.split(",")
        results = [measure(net, wanted, arguments.rounds, device, folder, precision, clock)
                   for net in arguments.nets.split(",") for precision in arguments.precision.split(",")]  # fmt: skip
    machine = describe_machine(device)
    if arguments.json:
        print(json.dumps({"machine": machine, "rounds": arguments.rounds, "results": results}, indent=1))
        return
    print(", ".join(f"{name} {value}" for name, value in machine.items() if value is not None))
    for result in results:
        print(f"\n{result['net']} in {result['precision']}, batch {result['batch']}, {result['parameters']:,} parameters; "
              f"{arguments.rounds} rounds, measured by {result['way']}")  # fmt: skip
        for name, row in result["rows"].items():
            print(f"  {name:44}{1000 * row['seconds']:9.1f} ms   × {row['ratio']:.3f}   {1000 * row['extra']:+8.2f} ms"
                  f" = {100 * row['extra'] / result['base']:+6.2f} %")  # fmt: skip
        if result["default"] is not None:
            print(f"  {'--probes default: all that, at its interval':42}{'':9}      × {result['default']:.4f}")


if __name__ == "__main__":
    main()
