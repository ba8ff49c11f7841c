"""What was run, where, and the command that runs it again."""

import shlex
from dataclasses import fields
from typing import Any

from cifarlab.config import TrainConfig
from cifarlab.lr_curve import tell_origin
from cifarlab.recipes import RECIPES, load_recipe
from cifarlab.report.section import Section, make_section
from cifarlab.report.summary import read_facts
from cifarlab.runs import Run


def show_configuration(run: Run) -> Section | None:
    environment = read_facts(run, "environment.json")
    typed = shlex.join(map(str, environment["command"])) if environment.get("command") else ""
    if run.is_watched:
        return None
    config = run.config
    changed: list[tuple[str, Any, Any]] | None = None
    if config.recipe in RECIPES:
        usual = load_recipe(config.recipe).to_dict()
        left_out = ("recipe", "lr_from", *(["precision"] if usual["precision"] == "auto" else []))  # a run's is never auto
        changed = [(name, value, usual[name]) for name, value in config.to_dict().items()
                   if value != usual[name] and name not in left_out]  # fmt: skip
    commit = (environment.get("git") or {}).get("commit", "")
    note = ("Equal settings give equal numbers, bit for bit, on the same machine with the same number of threads and torch "
            f"{environment.get('versions', {}).get('torch', '?')}; elsewhere the last digits differ."
            + (f" The code's commit: {commit[:12]}." if commit else "")
            + (f" {origin}" if (origin := tell_origin(run.path, config)) else ""))  # fmt: skip
    return make_section("configuration", "Configuration", "configuration.html", command=to_command(config, environment),
                        note=note, typed=typed, changed=changed, recipe=config.recipe,
                        settings=list(config.to_dict().items()))  # fmt: skip


def to_command(config: TrainConfig, environment: dict[str, Any]) -> str:
    """`cifarlab train RECIPE --field value …`: every setting that is not the recipe's, and the number of threads."""
    known = config.recipe in RECIPES
    usual = load_recipe(config.recipe if known else "resnet18-cosine")
    words = ["cifarlab", "train", *([config.recipe] if known else [])]
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name == "recipe" or not field.compare or value == getattr(usual, field.name):
            continue
        flag = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", repr(value) if isinstance(value, float) else str(value)]
    if environment.get("threads"):
        words += ["--threads", str(environment["threads"])]
    if environment.get("ranks", 1) > 1:
        words[:1] = ["torchrun", "--nproc-per-node", str(environment["ranks"]), "-m", "cifarlab"]
    return shlex.join(words)


def show_environment(run: Run) -> Section | None:
    environment = read_facts(run, "environment.json")
    if not environment:
        return None
    git = environment.get("git") or {}
    facts = [("run folder", str(run.path)), ("device", environment.get("device")), ("processor", environment.get("processor")),
             ("cores", environment.get("cores")), ("threads", environment.get("threads")),
             ("processes", environment.get("ranks")), ("system", environment.get("platform")),
             ("commit", git.get("commit", "") + (" (with uncommitted changes)" if git.get("changed") else "")),
             *((name, version) for name, version in environment.get("versions", {}).items())]  # fmt: skip
    return make_section("environment", "Environment", "environment.html", facts=[pair for pair in facts if pair[1] is not None])
