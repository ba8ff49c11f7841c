"""The house's own rules: imports point down only, and who does not compute imports no torch."""

import ast
import graphlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import cifarlab

PROJECT = Path(__file__).parent.parent
PACKAGE = PROJECT / "src" / "cifarlab"
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = [  # bottom to top: a room imports from lower floors; on its own floor too, but not in a circle
    {"config"},
    {"records", "arrays", "environment", "memory", "recipes", "lr_curve", "calibration", "statistics"},
    {"runs"},
    {"figures", "diagnosis"},
    {"distributed", "listing"},
    {"gallery", "data", "models", "optim", "profile", "checks", "checkpoint", "evaluate", "probes", "trackers", "analysis",
     "forecast", "thumbnails", "report"},
    {"out_of_memory"},
    {"inference", "train", "lr_range"},
    {"engines"},
    {"studies", "board"},
    {"cli"},
    {"__main__"},
]


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module imported anywhere in the tree, in functions too, but for types only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ([f"cifarlab.{alias.name}" for alias in node.names] if node.module == "cifarlab" else [node.module or "."])
        else:
            yield from imported(node)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_point_down_only() -> None:
    floor_of = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    graph: dict[str, set[str]] = {}
    for path in FILES:
        room = room_of(path)
        if room == "__init__":
            continue  # it hands out names from all floors, lazily
        assert room in floor_of, f"{path.name} has no floor yet: give it one here and in the design"
        for module in imported(ast.parse(path.read_text())):
            assert not module.startswith("."), f"{path} imports {module}: write the full name"
            if not module.startswith("cifarlab.") or module == "cifarlab.__version__":
                continue
            other = module.split(".")[1]
            assert floor_of[other] <= floor_of[room], f"{path.relative_to(PROJECT)} imports {module}, which is above it"
            graph.setdefault(room, set()).update({other} - {room})
    assert len(graph) > 10
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_names_and_docstrings() -> None:
    assert not {path.stem for path in FILES} & {"utils", "util", "common", "helpers", "misc"}
    without = [path.name for path in FILES if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not without


def test_trackers_of_others_are_imported_where_they_are_used() -> None:
    for path in FILES:
        tree = ast.parse(path.read_text())
        at_top = {module.split(".")[0] for node in tree.body for module in imported(ast.Module([node], []))
                  if isinstance(node, ast.Import | ast.ImportFrom)}  # fmt: skip
        assert not at_top & {"wandb", "tensorboard", "ray", "optuna"}, path


TORCHLESS = [
    "config", "recipes", "runs", "records", "environment", "diagnosis", "figures", "gallery", "listing", "probes",
    "optim.schedules", "lr_curve", "checks", "analysis.grid",
    "calibration", "thumbnails", "report.page", "report.findings", "report.paired", "report.pictures", "report.model_card",
    "board.live", "board.server",
    "data.dataset", "data.cache", "trackers.mirror", "trackers.wandb", "trackers.tensorboard",
    "statistics", "studies", "studies.conduct", "studies.reported", "engines.local", "engines.ray",
    "data.load", "data.cifar", "data.parquet", "data.folder", "data.digits", "data.download", "data.splits", "data.inspect",
]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("import " + ", ".join(f"cifarlab.{name}" for name in TORCHLESS), {"torch", "wandb", "tensorboard"}),
        ("import cifarlab", {"torch", "numpy"}),
        ("from cifarlab.cli import main; main(['--help'])", {"torch", "numpy"}),
        ("from cifarlab.cli import main; main(['recipes'])", {"torch", "numpy"}),
        ("from cifarlab.cli import main; main(['runs', '.'])", {"torch", "wandb", "altair"}),
        ("from cifarlab.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass", {"torch", "numpy"}),
    ],
    ids=["the reading half", "import", "--help", "recipes", "runs", "train --help"],
)
def test_no_torch_where_nothing_is_computed(code: str, unwanted: set[str]) -> None:
    code += f"\nimport sys; loaded = {unwanted!r} & set(sys.modules); sys.exit(f'loaded {{loaded}}' if loaded else 0)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_version_is_said_once() -> None:
    assert tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"] == cifarlab.__version__


def test_every_public_name_is_there() -> None:
    for name in cifarlab.__all__:
        assert getattr(cifarlab, name) is not None
        assert name in dir(cifarlab)
    # The module of that name is not in the function's way.
    code = "from cifarlab.train import State; import cifarlab; assert cifarlab.train.__name__ == 'train'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = cifarlab.trian
