"""Whatever goes wrong with a tracker, the training goes on, one line says how to send it later, and no secret gets anywhere."""

import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cifarlab as cl
from cifarlab.cli import main
from cifarlab.runs import Run
from cifarlab.trackers import mirror, open
from cifarlab.trackers.wandb import is_wanted

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT / "tests"))
from fake_wandb import FakeWandb  # noqa: E402
from mirror_reading import read_tensorboard, read_wandb  # noqa: E402

sys.path.pop(0)
wandb = pytest.importorskip("wandb", reason="W&B is not installed (pip install 'cifarlab[wandb]')")
pytest.importorskip("tensorboard", reason="TensorBoard is not installed (pip install 'cifarlab[tensorboard]')")

KEY = "0123456789abcdef" * 2 + "01234567"
SECRETS = {"WANDB_API_KEY": KEY, "HF_TOKEN": "hf_" + "a1B2" * 8, "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7PLANTED",
           "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/planted", "MY_SERVICE_PASSWORD": "correct-horse-battery"}  # fmt: skip


@pytest.fixture(autouse=True)
def own_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B with a home of its own, no key, and nobody to ask."""
    (tmp_path / "home").mkdir()
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for name in ("WANDB_MODE", "WANDB_PROJECT", "NETRC", *SECRETS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a tracker prompted"))
    monkeypatch.setattr("getpass.getpass", lambda *_: pytest.fail("a tracker prompted"))
    monkeypatch.setattr(mirror, "LOOK_EVERY", 0.05)
    yield
    wandb.teardown()  # it keeps the settings of the first use


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandb]:
    server = FakeWandb()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    yield server
    server.close()


CONFIG = cl.TrainConfig(data="digits", model="tiny", train_images=96, batch_size=16, epochs=2, lr=0.05)


def settings(folder: Path, **watch: Any) -> dict[str, Any]:
    return dict(runs_dir=folder, name="run", progress="none", forecast=False, figures=False) | watch


def train(folder: Path, config: cl.TrainConfig = CONFIG, **watch: Any) -> Run:
    return cl.train(config, cl.WatchConfig(**settings(folder, **watch)))


def train_apart(
    folder: Path, code: str = "", config: cl.TrainConfig = CONFIG, **watch: Any
) -> "subprocess.CompletedProcess[str]":
    """Trains in a process of its own, whose end is waited for: nothing may hang there either."""
    config_text, watch_text = json.dumps(config.to_dict()), json.dumps(settings(folder, **watch), default=str)
    program = f"""
import json, sys, cifarlab as cl
sys.path.insert(0, "tests")
import tiny_models
from cifarlab.models import MODELS
MODELS["tiny"] = tiny_models.tiny
{code}
run = cl.train(cl.TrainConfig(**json.loads({config_text!r})), cl.WatchConfig(**json.loads({watch_text!r})))
print(run.result["state"])
"""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, cwd=PROJECT)


# ---- no key, no W&B, W&B that raises -------------------------------------------------------------------------------------


def test_online_without_a_key_stays_on_this_machine_and_says_so_in_one_line(
    tiny: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path, wandb_project="p")
    assert run.result["state"] == "finished"
    errors = capfd.readouterr().err
    assert errors == (f"cifarlab: W&B has no API key, so its files stay in {run.path / 'wandb'}: after `wandb login`, send all "
                      f"with `cifarlab sync {run.path} --wandb`\n")  # fmt: skip
    assert read_wandb(run.path).order == list(range(1, 13))


def test_the_mode_of_the_environment_holds(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "of-the-environment")
    run = train(tmp_path, wandb=True)
    assert capfd.readouterr().err == ""
    assert read_wandb(run.path).runs[0].project == "of-the-environment"


@pytest.mark.parametrize(("module", "name"), [("wandb", "W&B"), ("tensorboard.compat.proto", "TensorBoard")])
def test_without_the_package_the_training_goes_on(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], module: str, name: str
) -> None:
    key = module.partition(".")[0]
    monkeypatch.setitem(sys.modules, module, None)
    run = train(tmp_path, **{key: True})
    assert run.result["state"] == "finished"
    line = (f"cifarlab: {name} gets nothing: it is not installed (pip install 'cifarlab[{key}]'). The run goes on and its folder "
            f"has everything; send it later: cifarlab sync {run.path} --{key}\n")  # fmt: skip
    assert capfd.readouterr().err == line
    assert main(["sync", str(run.path), f"--{key}"]) == 2
    assert "not installed" in capfd.readouterr().err


def test_the_command_for_later_can_be_pasted_whatever_the_folder_is_called(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    run = train(tmp_path / "my runs", wandb_project="p", tensorboard=True)
    told = capfd.readouterr().err
    for key in ("wandb", "tensorboard"):
        assert f"cifarlab sync '{run.path}' --{key}" in told


class Failing:
    """A W&B run one of whose methods raises."""

    id = "abc"

    def __init__(self, what: str) -> None:
        self.what = what

    def __getattr__(self, name: str) -> Any:
        if name == "summary":
            return self
        return self.fail if name == self.what else lambda *_, **__: None

    def fail(self, *_: Any, **__: Any) -> None:
        raise ConnectionError(f"no route\nto https://me:{SECRETS['HF_TOKEN']}@host")


@pytest.mark.parametrize("what", ["init", "log", "update", "finish"])
def test_a_failing_mirror_is_said_once_and_the_training_goes_on(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], what: str
) -> None:
    failing = Failing(what)
    monkeypatch.setattr(wandb, "init", failing.fail if what == "init" else lambda **_: failing)
    run = train(tmp_path, wandb_mode="offline", wandb_project="p")
    assert run.result["state"] == "finished"
    assert len(run.metrics["train/loss"]) == 12
    told = capfd.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith("cifarlab: W&B gets nothing")
    assert "ConnectionError: no route to https://[secret removed]@host. The run goes on and its folder has everything" in told
    assert told.endswith(f"send it later: cifarlab sync {run.path} --wandb\n")


class Stuck:
    """A sink that takes a few entries and then blocks for good."""

    name, key, with_weights, remark = "Sticky", "sticky", False, ""

    def __init__(self, where: str) -> None:
        self.where = where
        self.entries: list[int] = []

    def open(self, run: Run, memory: dict[str, Any]) -> str:
        return "there"

    def begin(self, step: int) -> int:
        self.block("begin")
        return step

    def send(self, entry: Any) -> None:
        self.entries.append(entry.step)
        self.block("send")

    def flush(self) -> None:
        pass

    def finish(self, summary: dict[str, Any]) -> None:
        self.block("finish")

    def abandon(self) -> None:
        pass

    def block(self, where: str) -> None:
        if where == self.where:
            threading.Event().wait()


@pytest.mark.parametrize("where", ["begin", "send", "finish"])
def test_a_tracker_that_blocks_is_left_behind(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], where: str
) -> None:
    monkeypatch.setattr(open, "Tensorboard", lambda: Stuck(where))
    monkeypatch.setattr(mirror, "PATIENCE", 0.3)
    begun = time.monotonic()
    run = train(tmp_path, tensorboard=True)
    assert run.result["state"] == "finished"
    assert time.monotonic() - begun < 15
    told = capfd.readouterr().err
    assert told.count("\n") == 1
    assert "it has not moved for 0 s. The run goes on and its folder has everything; send it later" in told


def test_a_slow_tracker_is_waited_for_as_long_as_it_moves(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Stuck("never")
    monkeypatch.setattr(slow, "block", lambda where: time.sleep(0.15))
    monkeypatch.setattr(open, "Tensorboard", lambda: slow)
    monkeypatch.setattr(mirror, "PATIENCE", 0.6)  # all its entries take three times as long
    train(tmp_path, tensorboard=True)
    assert slow.entries == list(range(1, 13))


# ---- a server that does not answer ---------------------------------------------------------------------------------------


def test_a_server_that_never_answers_hangs_neither_training_nor_exit(server: FakeWandb, tmp_path: Path) -> None:
    server.is_mute = True
    begun = time.monotonic()
    done = train_apart(tmp_path, "from cifarlab.trackers import wandb\nwandb.INIT_SECONDS = 2.0", wandb_project="p")
    assert time.monotonic() - begun < 40
    assert (done.returncode, done.stdout) == (0, "finished\n"), done.stderr
    ours = [line for line in done.stderr.splitlines() if line.startswith("cifarlab")]
    assert len(ours) == 1
    assert f"send it later: cifarlab sync {tmp_path / 'run'} --wandb" in ours[0]
    # Later, with the server back.
    server.is_mute = False
    assert main(["sync", str(tmp_path / "run"), "--wandb"]) == 0
    assert [row["_step"] for row in server.history] == list(range(1, 13))


def test_a_server_that_falls_silent_gets_the_rest_later(
    server: FakeWandb, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may have taken the rows all the same: then it does not get them twice."""
    server.swallows_answers = True
    begun = time.monotonic()
    done = train_apart(tmp_path, "from cifarlab.trackers import wandb\nwandb.FINISH_SECONDS = 2.0", wandb_project="p")
    assert time.monotonic() - begun < 60
    assert (done.returncode, done.stdout) == (0, "finished\n"), done.stderr
    ours = [line for line in done.stderr.splitlines() if line.startswith("cifarlab")]
    assert len(ours) == 1
    assert "Timed out finishing run. The run goes on" in ours[0]
    had = len(server.history)
    server.swallows_answers = False
    assert main(["sync", str(tmp_path / "run"), "--wandb"]) == 0
    assert f"({12 - had} steps sent)" in capsys.readouterr().out
    assert [row["_step"] for row in server.history] == [row["step"] for row in server.history] == list(range(1, 13))
    assert len({given["name"] for given in server.upserted if given["name"]}) == 1  # always the same run
    assert main(["sync", str(tmp_path / "run"), "--wandb"]) == 0
    assert "nothing new to send" in capsys.readouterr().out
    assert len(server.history) == 12
    assert server.summary["test/accuracy"] == Run(tmp_path / "run").result["test/accuracy"]


def test_what_a_server_lost_is_sent_again(tiny: str, server: FakeWandb, tmp_path: Path) -> None:
    run = train(tmp_path, wandb_project="p")
    assert [row["_step"] for row in server.history] == list(range(1, 13))
    server.history, server.summary["_step"] = server.history[:5], 5
    notes = run.path / "mirrors" / "wandb.json"
    notes.write_text(json.dumps(json.loads(notes.read_bytes()) | {"clean": []}))  # as after a crash
    assert main(["sync", str(run.path), "--wandb"]) == 0
    assert [row["_step"] for row in server.history] == list(range(1, 13))


# ---- a full disk ---------------------------------------------------------------------------------------------------------

LIMIT = """
import resource
def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
"""
BETWEEN = LIMIT + """
from cifarlab.trackers.local import Local
from cifarlab.train import State
calls = 0
rows = Local.rows
def limited(self, new, pace):
    global calls
    calls += 1
    if calls == {first}:
        limit(1200)
    if calls == {last}:
        limit(resource.RLIM_INFINITY)
    rows(self, new, pace)
Local.rows = limited
"""


def test_mirrors_that_find_the_disk_full_are_sent_later(tmp_path: Path) -> None:
    """Their files are the largest, so that a limit for each file leaves room for the run folder's own."""
    config = replace(CONFIG, epochs=10)
    done = train_apart(tmp_path, LIMIT + "limit(26_000)", config, wandb_mode="offline", wandb_project="p", tensorboard=True)
    assert (done.returncode, done.stdout) == (0, "finished\n"), done.stderr
    ours = sorted(line for line in done.stderr.splitlines() if "gets nothing" in line)
    assert len(ours) == 2, done.stderr  # beside what is said of the cache and of pictures that found no room either
    for line, name, key in zip(ours, ("TensorBoard", "W&B"), ("tensorboard", "wandb"), strict=True):
        assert line.startswith(f"cifarlab: {name} gets nothing after step ")
        assert line.endswith(f"send it later: cifarlab sync {tmp_path / 'run'} --{key}")
    assert main(["sync", str(tmp_path / "run"), "--wandb", "--wandb-mode", "offline", "--tensorboard"]) == 0
    assert [event.step for event in read_tensorboard(tmp_path / "run").Scalars("train/loss")] == list(range(1, 61))
    found = read_wandb(tmp_path / "run", whole=False)
    assert set(found.order) == set(range(1, 61))


def test_a_run_folder_that_is_full_for_a_while_loses_nothing(tiny: str, tmp_path: Path) -> None:
    undisturbed = train(tmp_path / "other", log_every=1)
    done = train_apart(tmp_path, BETWEEN.format(first=4, last=9), log_every=1, save_every=0.5)
    assert (done.returncode, done.stdout) == (0, "finished\n"), done.stderr
    ours = [line for line in done.stderr.splitlines() if line.startswith("cifarlab")]
    assert sum("the run goes on, keeps what is new in memory and tries again" in line for line in ours) == 1
    assert sum("no checkpoint of step 6" in line for line in ours) == 1
    assert len(ours) == 2
    run = Run(tmp_path / "run")
    for key in ("train/loss", "lr", "test/accuracy", "gradient_flow/norm"):
        assert run.metrics[key].tolist() == undisturbed.metrics[key].tolist()
    for name, table in undisturbed.tables.items():
        assert table.values.tobytes() == run.tables[name].values.tobytes()


def test_a_run_folder_that_stays_full_is_an_error_at_the_end(tmp_path: Path) -> None:
    code = "import atexit\natexit.register(lambda: print(sorted({'wandb', 'tensorboard'} & set(sys.modules))))"
    done = train_apart(tmp_path, BETWEEN.format(first=4, last=99) + code, log_every=1)
    assert (done.returncode, done.stdout) == (1, "[]\n")  # trackers that nobody asked for are not imported
    assert not any((tmp_path / "run" / name).exists() for name in ("wandb", "tensorboard", "mirrors"))
    assert "File too large" in done.stderr.splitlines()[-1]
    assert not Run(tmp_path / "run").is_finished


# ---- secrets -------------------------------------------------------------------------------------------------------------


def test_no_secret_gets_anywhere(
    tiny: str, server: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the environment, on the command line, in a URL; looked for in every byte written, said or sent."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    arguments = ["train", "quick", "--model", "tiny", "--train-images", "64", "--epochs", "1",
                 "--runs-dir", str(tmp_path / "runs"), "--name", "run", "--no-forecast", "--no-figures", "--progress", "none",
                 "--wandb-project", "p", "--tensorboard",
                 "--wandb-name", f"with {SECRETS['HF_TOKEN']}", "--wandb-tags", SECRETS["AWS_ACCESS_KEY_ID"]]  # fmt: skip
    url = f"https://me:{SECRETS['MY_SERVICE_PASSWORD']}@example.org/x?token=abcdefgh12345678"
    monkeypatch.setattr(sys, "argv", ["cifarlab", *arguments, "--data-url", url, "--api-key", "abcdefgh12345678"])
    assert main(arguments) == 0
    assert main(["sync", str(tmp_path / "runs" / "run"), "--wandb", "--wandb-mode", "offline"]) == 0
    wandb.teardown()
    said = "".join(capfd.readouterr())
    everything = {"said": said.encode(), "sent": b"\n".join(server.bodies)}
    everything |= {str(path): path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    assert any("tfevents" in name for name in everything)
    assert any(name.endswith(".wandb") for name in everything)
    assert b"[secret removed]" in everything["sent"]
    for where, content in everything.items():
        for secret in (*SECRETS.values(), "abcdefgh12345678"):
            assert secret.encode() not in content, (secret, where)


def test_no_password_in_what_a_failed_download_says(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    url = "http://me:correct-horse@127.0.0.1:9/cifar-10-python.tar.gz"
    for address in (url, url.replace("http", "gopher")):
        assert main(["data", "cifar10", "--data-dir", str(tmp_path / "none"), "--data-url", address]) == 2
        told = "".join(capfd.readouterr())
        assert "correct-horse" not in told
        assert "[secret removed]@127.0.0.1:9" in told


# ---- what is not finite, and when a mirror is wanted ---------------------------------------------------------------------


def test_a_diverged_run_is_mirrored_with_its_nan(tiny: str, tmp_path: Path) -> None:
    run = train(tmp_path, replace(CONFIG, model="tiny-without-norm", lr=1e30), wandb_mode="offline", wandb_project="p",
                tensorboard=True)  # fmt: skip
    assert run.result["state"] == "diverged"
    found, events = read_wandb(run.path), read_tensorboard(run.path)
    at = run.result["step"]
    assert math.isnan(float(found.history[at]["train/loss"]))
    assert math.isnan(next(event.value for event in events.Scalars("train/loss") if event.step == at))
    assert found.summary["state"] == "diverged"
    assert found.exit_codes == [1]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, False),
        ({"wandb": True}, True),
        ({"wandb_project": "p"}, True),
        ({"wandb_name": "n"}, True),
        ({"wandb_entity": "e"}, True),
        ({"wandb_tags": "a,b"}, True),
        ({"wandb_weights": True}, True),
        ({"wandb_project": "p", "wandb_name": "n", "wandb": False}, False),
    ],
)
def test_when_a_mirror_is_wanted(given: dict[str, Any], wanted: bool) -> None:
    assert is_wanted(cl.WatchConfig(**given)) is wanted
