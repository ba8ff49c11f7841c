"""Both engines by one contract: equal numbers, crashes gone on from the last checkpoint, failures told; Ray on two real nodes."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import cifarlab as cl
from cifarlab.config import InputError
from cifarlab.engines.engine import Ended, Engine, Job, Runner, pack_model
from cifarlab.engines.local import LocalEngine, visible_gpus
from cifarlab.engines.ray import pack, unpack
from cifarlab.models import MODELS
from cifarlab.runs import Run

TESTS = Path(__file__).parent
needs_ray = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="Ray is not installed: pip install 'cifarlab[ray]'")


@pytest.fixture
def models(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The networks of study_models, and a mark that is not there yet."""
    import study_models

    monkeypatch.setenv("CIFARLAB_TEST_MARK", str(tmp_path / "mark"))
    before = dict(MODELS)
    study_models.register()
    yield
    MODELS.clear()
    MODELS.update(before)


def small(**changes: Any) -> cl.TrainConfig:
    """Twelve updates of the tiny net: two epochs of six."""
    settings: dict[str, Any] = dict(data="digits", model="tiny", train_images=96, batch_size=16, epochs=2, lr=0.05)
    return cl.TrainConfig(**(settings | changes))


def job(config: cl.TrainConfig, path: Path, **watch: Any) -> Job:
    settings: dict[str, Any] = dict(progress="none", forecast=False, figures=False, save_every=0.5, log_every=1)
    return Job(config=config, path=path, watch=cl.WatchConfig(**(settings | watch)))


def finish(engine: Engine, jobs: list[Job], retries: int = 2) -> tuple[list[Ended], list[str]]:
    said: list[str] = []
    runner = Runner(engine, retries=retries, say=said.append)
    runner.submit(jobs)
    ended: list[Ended] = []
    while runner.open:
        assert len(runner.running) <= engine.slots
        ended += runner.step(0.5)
    return ended, said


def numbers(run: Run) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in run.metrics.rows]


@contextmanager
def local(folder: Path, jobs: int) -> Iterator[LocalEngine]:
    engine = LocalEngine(jobs=jobs, cores=jobs, logs=folder / "logs", device="cpu")
    try:
        yield engine
    finally:
        engine.close()


def alone(config: cl.TrainConfig, folder: Path) -> Run:
    """The same by `cl.train`, in this process."""
    return cl.train(config, cl.WatchConfig(runs_dir=folder, name=config.hash, threads=1, progress="none", forecast=False,
                                           figures=False))  # fmt: skip


def test_numbers_are_the_same_whatever_the_jobs_and_the_order(models: None, tmp_path: Path) -> None:
    """Also that a crash is invisible, that what cannot run is told, and that the other jobs go on."""
    configs = {"a": small(), "b": small(lr=0.1, optimizer="adam", seed=1, mixup_alpha=0.3)}
    with local(tmp_path, 1) as engine:
        jobs = [job(config, tmp_path / "one" / name) for name, config in configs.items()]
        ended, _ = finish(engine, [*jobs, job(small(cutout=99), tmp_path / "one" / "bad")])
        assert {each.job.path.name: each.how for each in ended} == {"a": "done", "b": "done", "bad": "refused"}
        assert "cutout=99 does not fit" in next(each.reason for each in ended if each.how == "refused")
    with local(tmp_path, 2) as engine:
        jobs = [job(config, tmp_path / "two" / name) for name, config in reversed(configs.items())]
        jobs.append(job(small(model="mortal"), tmp_path / "two" / "mortal"))
        jobs.append(job(small(model="doomed"), tmp_path / "two" / "doomed"))
        ended, said = finish(engine, jobs, retries=1)
        hows = {each.job.path.name: each.how for each in ended}
        assert hows == {"a": "done", "b": "done", "mortal": "done", "doomed": "crashed"}
        assert "killed by SIGKILL" in next(each.reason for each in ended if each.how == "crashed")
        assert sum("it goes on from its last checkpoint" in line for line in said) == 2  # mortal once, doomed once
    for name, config in {**configs, "mortal": small(model="mortal")}.items():  # the mark is there now: it lives through
        reference = alone(config, tmp_path / "alone")
        for folder in ("one", "two") if name in configs else ("two",):
            run = Run(tmp_path / folder / name)
            assert run.result["state"] == "finished"
            assert numbers(run) == numbers(reference)
            assert run.environment["threads"] == 1


def test_a_stopped_job_saves_and_goes_on_later(models: None, tmp_path: Path) -> None:
    long = job(small(model="slow", epochs=3, lr=0.02), tmp_path / "run", save_every=0)
    with local(tmp_path, 1) as engine:
        runner = Runner(engine)
        runner.submit([long])
        deadline = time.monotonic() + 60
        while not Run(long.path).metrics.rows and time.monotonic() < deadline:
            assert not runner.step(0.1)
        runner.stop(long)
        ended: list[Ended] = []
        while not ended:
            ended = runner.step(0.5)
        assert ended[0].how == "stopped"
        assert 0 < len(Run(long.path).metrics.rows) < 18
        again, _ = finish(engine, [long])
        assert again[0].how == "done"
    assert Run(long.path).result["step"] == 18


def test_workers_end_with_their_study(models: None, tmp_path: Path) -> None:
    """A closed stdin is all that a killed study leaves: the worker saves, and is gone."""
    message = job(small(model="slow", epochs=100), tmp_path / "run", save_every=0).message()
    message["model"] = pack_model("slow")
    worker = subprocess.Popen([sys.executable, "-m", "cifarlab.engines.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              text=True)  # fmt: skip
    assert worker.stdin
    assert worker.stdout
    with worker.stdin, worker.stdout:
        worker.stdin.write(json.dumps(message) + "\n")
        worker.stdin.flush()
        deadline = time.monotonic() + 60
        while not Run(tmp_path / "run").metrics.rows and time.monotonic() < deadline:
            time.sleep(0.1)
        worker.stdin.close()
        assert worker.wait(timeout=30) == 0
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_jobs_do_not_oversubscribe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LocalEngine(jobs=8, threads=2, cores=5, logs=tmp_path, device="cpu")
    assert (engine.slots, engine.capped) == (2, True)
    assert LocalEngine(threads=1, cores=3, logs=tmp_path, device="cpu").slots == 3
    with pytest.raises(InputError, match=r"threads=9 is more than this machine has: 4 core\(s\)"):
        LocalEngine(threads=9, cores=4, logs=tmp_path, device="cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert visible_gpus("auto") == ["2", "5"]
    assert visible_gpus("cpu") == []
    assert LocalEngine(cores=16, logs=tmp_path, device="cuda").slots == 2
    started: list[dict[str, str]] = []

    class Fake:
        def __init__(self, number: int, environment: dict[str, str], *_: Any) -> None:
            started.append(environment)

        def tell(self, message: dict[str, Any]) -> None:
            assert message["watch"]["device"] == "cuda"

    monkeypatch.setattr("cifarlab.engines.local._Worker", Fake)
    engine = LocalEngine(jobs=4, threads=2, cores=16, logs=tmp_path, device="cuda")
    for k in range(4):
        engine.start(job(small(), tmp_path / str(k)))
    assert sorted(each["CUDA_VISIBLE_DEVICES"] for each in started) == ["2", "2", "5", "5"]
    assert all(each["OMP_NUM_THREADS"] == "2" for each in started)


def test_a_model_that_no_other_process_finds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "mine", lambda num_classes: None)
    with pytest.raises(InputError, match="model 'mine' cannot be built in another process"):
        pack_model("mine")
    assert pack_model("resnet18") == ""


def test_a_run_folder_is_packed_and_unpacked_whole(tiny: str, tmp_path: Path) -> None:
    run = cl.train(small(), job(small(), tmp_path, runs_dir=tmp_path).watch)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "stale").touch()
    unpack(pack(run.path), tmp_path / "there")
    files = {path.relative_to(run.path) for path in run.path.rglob("*") if path.is_file()} - {Path(".lock")}
    assert {path.relative_to(tmp_path / "there") for path in (tmp_path / "there").rglob("*") if path.is_file()} == files
    assert all((run.path / name).read_bytes() == (tmp_path / "there" / name).read_bytes() for name in files)
    assert pack(tmp_path / "nothing") == b""


# ---- Ray -----------------------------------------------------------------------------------------------------------------


def descendants(pid: int) -> list[int]:
    """The process and all that it started, by their ids."""
    found = [pid]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            child, parent = int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if parent == pid:
            found += descendants(child)
    return found


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """(address, that for Ray's client, kill the worker node) of a head and a worker of one core each, processes of their own."""
    import socket
    import tempfile

    with socket.socket() as free, socket.socket() as other:
        free.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        port, client = free.getsockname()[1], other.getsockname()[1]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONWARNINGS": "ignore"}
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder, open(tmp_path / "ray.log", "wb") as log:

        def start(*arguments: str) -> None:
            command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", "1", "--num-gpus", "0",
                       "--object-store-memory", "80000000", *arguments]  # fmt: skip
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))

        def kill(process: subprocess.Popen[bytes]) -> None:
            for pid in descendants(process.pid):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            process.wait()

        try:
            start("--head", "--port", str(port), "--ray-client-server-port", str(client), "--include-dashboard", "false",
                  "--temp-dir", folder, "--disable-usage-stats")  # fmt: skip
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.2)
            start("--address", f"127.0.0.1:{port}")
            while (tmp_path / "ray.log").read_text().count("Ray runtime started") < 2 and time.monotonic() < deadline + 60:
                time.sleep(0.2)
            yield f"127.0.0.1:{port}", f"ray://127.0.0.1:{client}", lambda: kill(processes[1])
        finally:
            for process in reversed(processes):
                kill(process)


@needs_ray
@pytest.mark.skipif(sys.platform != "linux", reason="finds the cluster's processes in /proc")
def test_a_study_on_two_nodes_survives_the_death_of_one(
    cluster: tuple[str, str, Callable[[], None]], models: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker is killed when checkpoints of both running trials have arrived; the numbers are those of one process."""
    address, client_address, kill_worker = cluster
    command = [sys.executable, str(TESTS / "study_models.py"), "study", "learning-rate", "--progress", "lines", "--device", "cpu",
               "--set", "train_images=96", "batch_size=16"]  # fmt: skip
    program = [*command, "model=slow", "epochs=6", "lr=0.02", "--seeds", "0,1,2"]
    quiet = os.environ | {"PYTHONWARNINGS": "ignore", "RAY_AUTH_MODE": "disabled"}
    out = (tmp_path / "out").open("wb")
    elsewhere = ["--folder", str(tmp_path / "ray"), "--ray", address, "--no-share"]
    on_ray = subprocess.Popen([*program, *elsewhere], env=quiet, stdout=out, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and on_ray.poll() is None:
        arrived = {path.parent.parent.name for path in (tmp_path / "ray").glob("*/trials/*/checkpoints/step-*")}
        open_ones = [name for name in arrived if not list((tmp_path / "ray").glob(f"*/trials/{name}/result.json"))]
        if len(open_ones) == 2:
            break
        time.sleep(0.1)
    kill_worker()
    code = on_ray.wait(timeout=100)
    out.close()
    told = (tmp_path / "out").read_text()
    assert code == 0, told
    assert "on the cluster): it goes on from its last checkpoint" in told
    folder = next((tmp_path / "ray").glob("learning-rate-*"))
    runs = [Run(path) for path in (folder / "trials").iterdir()]
    monkeypatch.setitem(MODELS, "slow", MODELS["tiny"])  # the same numbers, sooner
    assert len(runs) == 3
    for run in runs:
        assert run.result["state"] == "finished"
        assert numbers(run) == numbers(alone(run.config, tmp_path / "alone"))
    assert not list(folder.glob(".shared-*"))
    # What is left of the cluster trains on, here for Ray's client, and right in the study's folder, since it sees it.
    here = ["--folder", str(tmp_path / "shared"), "--ray", client_address]
    one = [*command, "model=tiny", "epochs=1", "lr=0.02", "--seeds", "5", *here]
    shared = subprocess.run(one, env=quiet, capture_output=True, text=True, timeout=100)
    assert shared.returncode == 0, shared.stdout + shared.stderr
    assert "1 machine(s)" in shared.stdout


def test_an_address_where_no_cluster_is(tmp_path: Path) -> None:
    if not importlib.util.find_spec("ray"):
        from cifarlab.engines.ray import RayEngine

        with pytest.raises(InputError, match="pip install 'cifarlab"):
            RayEngine("auto", folder=tmp_path)
