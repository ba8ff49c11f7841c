"""A model card of a run: Markdown whose front matter the Hugging Face Hub reads, with the run's own numbers and nothing made up.

Source: Mitchell et al. 2018 (arXiv:1810.03993) for what a card tells; the Hub's metadata for how the front matter is spelt.
"""

import json
import math
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from cifarlab.config import TrainConfig
from cifarlab.figures.style import plain_text
from cifarlab.lr_curve import tell_origin
from cifarlab.recipes import RECIPES
from cifarlab.report.facts import Facts
from cifarlab.report.findings import Finding, find
from cifarlab.runs import Run, write_atomically

FILE = "MODEL_CARD.md"
ON_THE_HUB = {"cifar10": ("CIFAR-10", "uoft-cs/cifar10"), "cifar100": ("CIFAR-100", "uoft-cs/cifar100")}


def write_model_card(run: Run) -> Path:
    """Puts MODEL_CARD.md into the run's folder. On the Hub it is called README.md."""
    path = run.path / FILE
    write_atomically(path, build_model_card(run).encode())
    return path


def build_model_card(run: Run, findings: list[Finding] | None = None) -> str:
    """The card as text. findings: of `find(run)`, where they are known already.

    No licence is named: whose the weights are, a program cannot know. Paths of the machine are left out.
    """
    facts = Facts(run)
    findings = find(run) if findings is None else findings
    front = "\n".join(["---", *_yaml(_metadata(facts)), "---"])
    return "\n\n".join([front, *_body(facts, findings)]) + "\n"


# ---- front matter --------------------------------------------------------------------------------------------------------


def _metadata(f: Facts) -> dict[str, Any]:
    if f.config is None:
        return {"library_name": "pytorch", "tags": ["cifarlab"]}
    name, hub = ON_THE_HUB.get(f.config.data, (_data_name(f), ""))
    if hub and not f.is_official:  # else its numbers would stand in the Hub's table of that data set
        name, hub = f"{name}, not the official pixels", ""
    found: dict[str, Any] = {"library_name": "cifarlab", "pipeline_tag": "image-classification"}
    found["tags"] = list(dict.fromkeys(["image-classification", "pytorch", "cifarlab", f.config.model]))
    if hub:
        found["datasets"] = [hub]
    metrics = _metrics(f)
    if metrics:
        dataset: dict[str, Any] = {"name": name, "type": hub or _slug(name), "split": "test"}
        if f.config.data == "cifar100":
            dataset["config"] = f.config.labels
        result = {"task": {"type": "image-classification", "name": "Image Classification"}, "dataset": dataset,
                  "metrics": metrics}  # fmt: skip
        found |= {"metrics": ["accuracy"], "model-index": [{"name": _name(f), "results": [result]}]}
    return found


def _metrics(f: Facts) -> list[dict[str, Any]]:
    """Accuracy, and what else was measured at the end; of a finished run only."""
    if f.evaluation is None or not math.isfinite(f.test_accuracy):
        return []
    result, averages = f.run.result, f.run.evaluation.get("macro") or {}
    given = [("accuracy", "Accuracy", f.test_accuracy), ("accuracy", "Top-5 accuracy", result.get("test/top5")),
             ("accuracy", "Accuracy with test-time augmentation", result.get("test/tta_accuracy")),
             ("f1", "Macro F1", averages.get("f1")), ("loss", "Cross-entropy", result.get("test/loss")),
             ("expected_calibration_error", "ECE (15 bins)", f.calibration.ece if f.calibration else None)]  # fmt: skip
    return [{"type": kind, "name": name, "value": round(float(value), 6)} for kind, name, value in given
            if value is not None and math.isfinite(float(value))]  # fmt: skip


def _yaml(value: Any, indent: str = "") -> list[str]:
    """Lines of YAML: blocks for what nests, JSON for the rest. All text is quoted, so that no name can mean anything else."""
    if isinstance(value, dict):
        lines = []
        for key, item in value.items():
            is_block = isinstance(item, dict | list)
            lines.append(f"{indent}{key}:" if is_block else f"{indent}{key}: {_scalar(item)}")
            lines += _yaml(item, f"{indent}  ") if is_block else []
        return lines
    lines = []
    for item in value:
        first, *rest = _yaml(item, f"{indent}  ") if isinstance(item, dict) else [f"{indent}  {_scalar(item)}"]
        lines += [f"{indent}- {first[len(indent) + 2 :]}", *rest]
    return lines


def _scalar(value: Any) -> str:
    """In JSON, which is YAML where all characters are printable."""
    return json.dumps(plain_text(value) if isinstance(value, str) else value, ensure_ascii=False)


# ---- text ----------------------------------------------------------------------------------------------------------------


def _body(f: Facts, findings: list[Finding]) -> list[str]:
    run, config = f.run, f.config
    parts = [f"# {_markdown(_name(f))}"]
    if config is None:
        return [*parts, "A network trained in a loop of its own, which cifarlab watched. What it is for, and on what data, only "
                        "its author can tell."]  # fmt: skip
    data = ON_THE_HUB.get(config.data, (_data_name(f), ""))[0]
    classes = [_markdown(plain_text(name, 60)) for name in run.dataset["class_names"]]
    listed = ", ".join(classes[:20]) + (f" and {len(classes) - 20} more" if len(classes) > 20 else "")
    parts.append(f"`{_code(config.model)}`, an image classifier of {len(classes)} classes trained from scratch on "
                 f"{_markdown(data)} with cifarlab: {listed}.")  # fmt: skip
    metrics = _metrics(f)
    if metrics:
        rows = [f"| {metric['name']} | {metric['value']:.4f} |" for metric in metrics]
        low, high = f.test_interval
        n = len(f.evaluation.labels) if f.evaluation else 0
        parts += ["## Results", "\n".join([f"| on {n:,} test images | |", "|---|---:|", *rows]),
                  f"Another test set of this size could show an accuracy from {low:.4f} to {high:.4f} (95 % interval); another "
                  "training run differs too. The test set chose nothing: the numbers are those of the "
                  + ("best step on held-out images." if config.val_fraction else "last step.")]  # fmt: skip
    else:
        parts += ["## Results", f"None: the run is {run.result.get('state', 'not finished')}."]
    if findings:
        lines = [f"- {_markdown(finding.sentence)}" for finding in findings]
        parts += ["## What its numbers say", "\n".join(lines)]
    side = run.dataset["image_size"]
    parts += [
        "## Use and limits",
        f"It sorts {side}×{side} RGB images into exactly the classes above, and gives one of them to any picture at all. Its "
        "numbers "
        "hold for images like those of its data set; for others nothing is known. It was not examined for bias or for safety.",
        "## How it was trained",
        _trained(f),
        "All settings:",
        _fenced(json.dumps(_settings(config), indent=1, ensure_ascii=False), "json"),
        "Again:",
        _fenced(command_line(config), "sh"),
        "## How to use it",
        _fenced('import cifarlab as cl\n\nprint(cl.predict("this-folder", ["image.png"]))  # the folder with config.json and '
                "model.safetensors", "python"),
    ]  # fmt: skip
    return parts


def _trained(f: Facts) -> str:
    run, config = f.run, f.config
    assert config is not None
    environment = run.environment if (run.path / "environment.json").exists() else {}
    num_train, seconds = config.train_images or run.dataset["num_train"], run.result.get("train_seconds")
    images = f"{num_train:,} images" + (f" ({100 * config.val_fraction:g} % of them held out)" if config.val_fraction else "")
    told = [f"{config.epochs:g} epochs over {images}, batch {config.batch_size}, {config.optimizer} at a learning rate of "
            f"{config.lr:g} ({config.schedule}), seed {config.seed}"]  # fmt: skip
    if origin := tell_origin(run.path, config):
        told.append(origin.rstrip("."))
    if environment.get("parameters"):
        told.append(f"{environment['parameters']:,} parameters, {environment['forward_macs'] / 1e9:.4g} GMAC an image (forward)")
    if seconds:
        device = plain_text(str(environment.get("device", "")), 80)
        told.append(f"{seconds:,.0f} s of training" + (f" on {_markdown(device)}" if device else ""))
    versions = environment.get("versions") or {}
    if versions:
        told.append(", ".join(f"{name} {versions[name]}" for name in ("cifarlab", "torch", "python") if name in versions))
    commit = (environment.get("git") or {}).get("commit")
    if commit:
        told.append(f"commit {str(commit)[:12]}" + (" with uncommitted changes" if environment["git"].get("changed") else ""))
    if not f.is_official and config.data in ON_THE_HUB:
        told.append("the images are not the data set's own pixels (JPEG-coded, or a part of it)")
    return "\n".join(f"- {line}" for line in told)


def command_line(config: TrainConfig) -> str:
    """The `cifarlab train …` that trains this config again: its recipe, and a flag for each setting that is not the recipe's.

    Data of one's own are named by their folder's name alone.
    """
    recipe = config.recipe if config.recipe in RECIPES else "resnet18-cosine"
    usual, words = RECIPES[recipe].build(), ["cifarlab", "train", recipe]
    for name, value in _settings(config).items():
        if name in ("recipe", "lr_from") or value == getattr(usual, name):
            continue
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return shlex.join(words)


def _settings(config: TrainConfig) -> dict[str, Any]:
    """All, without folders of this machine. lr_from is the folder of a range test."""
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "lr_from"}
    return values | {"data": config.data if config.data in (*ON_THE_HUB, "digits") else plain_text(Path(config.data).name)}


def _name(f: Facts) -> str:
    return plain_text(f.run.path.resolve().name) or "run"


def _data_name(f: Facts) -> str:
    return plain_text(str(f.run.dataset.get("name", ""))) or "images"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "images"


def _markdown(text: str) -> str:
    """Text that stays text: Markdown's signs and HTML's are escaped."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]#|~$])", r"\\\1", text)


def _code(text: str) -> str:
    return plain_text(text).replace("`", "'")


def _fenced(text: str, language: str) -> str:
    """A block of code, with a fence longer than any run of backticks in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
