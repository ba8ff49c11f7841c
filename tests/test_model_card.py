"""The model card: YAML and Markdown that hold whatever a run is called, and the run's own numbers."""

import html
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt

from cifarlab.config import TrainConfig
from cifarlab.recipes import RECIPES, load_recipe
from cifarlab.report.model_card import build_model_card, command_line, write_model_card
from cifarlab.runs import Run

sys.path.insert(0, str(Path(__file__).parent))
from run_folders import calibrated_logits, make_run

sys.path.pop(0)
yaml = pytest.importorskip("yaml", reason="PyYAML is not installed (pip install 'cifarlab[dev]')")
CONFIG = TrainConfig(epochs=12.0, model="resnet18")
HOSTILE = ["yes", "- a: b", "# no comment", "{x: [", "'\"\\", "a\n---\nlicense: mit", "<script>alert(1)</script>",
           "\u202etxt.exe", "\x85\u2028\x00", "| a | `b` **c** [d](javascript:e)"]  # fmt: skip


def front_matter(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    return dict(yaml.safe_load(card.split("\n---\n")[0]))


def test_the_card_holds_the_runs_numbers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "my-run", config=CONFIG)
    path = write_model_card(run)
    assert path == run.path / "MODEL_CARD.md"
    card = path.read_text()
    front = front_matter(card)
    assert "license" not in front
    assert front["library_name"] == "cifarlab"
    assert front["datasets"] == ["uoft-cs/cifar10"]
    assert front["tags"] == ["image-classification", "pytorch", "cifarlab", "resnet18"]
    (index,) = front["model-index"]
    assert index["name"] == "my-run"
    (result,) = index["results"]
    assert result["task"]["type"] == front["pipeline_tag"] == "image-classification"
    assert result["dataset"] == {"name": "CIFAR-10", "type": "uoft-cs/cifar10", "split": "test"}
    logits, labels = calibrated_logits()
    values = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert values["Accuracy"] == pytest.approx(np.mean(logits.argmax(axis=1) == labels))
    assert values["Cross-entropy"] == pytest.approx(run.result["test/loss"], abs=1e-6)
    assert f"| Accuracy | {values['Accuracy']:.4f} |" in card
    assert "/data" not in card  # where the data lay is nobody's business


@pytest.mark.parametrize("name", ["plain", "- a: {b", "'\"#", "<b>`x`"])
def test_hostile_names_stay_text(name: str, tmp_path: Path) -> None:
    config = replace(CONFIG, model="a: [b\n---", data="/home/me/my\nimages: x", recipe="```\nrm -rf")
    run = make_run(tmp_path / name, config=config, names=HOSTILE,
                   dataset={"name": "my\nimages: {x", "source": "/home/me/secret"})  # fmt: skip
    card = build_model_card(run)
    front = front_matter(card)
    assert front["model-index"][0]["name"] == name
    assert front["tags"][-1] == "a: [b ---"
    assert front["model-index"][0]["results"][0]["dataset"] == {"name": "my images: {x", "type": "my-images-x", "split": "test"}
    assert "license" not in front
    assert "datasets" not in front
    assert card.count("\n---\n") == 1
    assert "/home/me" not in card
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(card.split("\n---\n")[1])
    text = html.unescape(re.sub(r"<[^>]*>", "", page))
    assert set(re.findall(r"<(\w+)", page)) <= set("h1 h2 p ul li code pre table thead tbody tr th td".split())  # noqa: SIM905
    assert "<script>alert(1)</script>" in text
    assert "| a | `b` **c** [d](javascript:e)" in text
    assert page.startswith(f"<h1>{html.escape(name)}".replace("&#x27;", "'"))
    assert not set(card) & set("\x85\u2028\x00\u202e")


def test_pixels_that_are_not_the_sets_own_are_not_put_in_its_table(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", config=CONFIG, dataset={"source": "CIFAR-10, parquet, JPEG-coded"})
    front = front_matter(build_model_card(run))
    assert "datasets" not in front
    assert front["model-index"][0]["results"][0]["dataset"]["name"] == "CIFAR-10, not the official pixels"


def test_runs_without_numbers_have_a_card_without(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", config=CONFIG, is_finished=False, result={"state": "diverged", "step": 3})
    card = build_model_card(run)
    assert "model-index" not in front_matter(card)
    assert "None: the run is diverged." in card
    (run.path / "config.json").unlink()
    (run.path / "watch.json").write_text("{}")
    card = build_model_card(Run(run.path))
    assert front_matter(card) == {"library_name": "pytorch", "tags": ["cifarlab"]}


def test_the_command_trains_the_same_config() -> None:
    from cifarlab.cli import main  # noqa: F401  the flags are those of the fields: see test_cli

    for name in RECIPES:
        assert command_line(load_recipe(name)) == f"cifarlab train {name}"
    changed = load_recipe("quick", lr=0.5, nesterov=True, decay_norms=False, seed=3, data="my images")
    assert command_line(changed) == "cifarlab train quick --data 'my images' --lr 0.5 --nesterov --no-decay-norms --seed 3"
