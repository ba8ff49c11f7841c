"""Weights & Biases as a mirror of the run folder: the same rows, never read back, never in the way."""

import os
import sys
from pathlib import Path
from typing import Any

from cifarlab.config import TrainConfig, WatchConfig
from cifarlab.diagnosis import Alarm
from cifarlab.records import Measured
from cifarlab.runs import Row, write_atomically
from cifarlab.trackers.fanout import Pace


def is_wanted(watch: WatchConfig) -> bool:
    """--wandb and --no-wandb decide; else any --wandb-… flag means yes."""
    return watch.wandb if watch.wandb is not None else bool(watch.wandb_project or watch.wandb_name)


class Wandb:
    """Sends rows with the optimizer step as x-axis, the config and the final result.

    Never prompts: online without a key becomes offline. Any failure of W&B ends the mirror with one line that says so;
    the training goes on, and the run folder has everything.
    """

    def __init__(self, config: TrainConfig, watch: WatchConfig, folder: Path, facts: dict[str, Any]) -> None:
        self._folder = folder
        self._run: Any = None
        self._exit_code = 1  # until the run has ended well
        try:
            import wandb
        except ImportError:
            _say("W&B is not installed (pip install 'cifarlab[wandb]'), so nothing is sent to it; the run folder has everything")
            return
        except Exception as error:  # an installation that does not fit its other packages
            self._lose(error)
            return
        mode: Any = os.environ.get("WANDB_MODE", "online") if watch.wandb_mode == "online" else watch.wandb_mode
        if mode == "online" and not _has_key(wandb):
            mode = "offline"
            _say(f"W&B has no API key, so its files stay in {folder / 'wandb'}: after `wandb login`, send them with "
                 f"`wandb sync {folder / 'wandb' / 'offline-run-*'}`")  # fmt: skip
        id_file = folder / "wandb_id.txt"
        try:
            self._run = wandb.init(
                project=watch.wandb_project or os.environ.get("WANDB_PROJECT") or "cifarlab",
                name=watch.wandb_name or folder.name, mode=mode, dir=str(folder), config=config.to_dict() | facts,
                id=id_file.read_text().strip() if id_file.exists() else None, resume="allow",
                # What W&B would find out by itself holds the bare command line and the git remote, with the secrets in them.
                settings=wandb.Settings(silent=True, console="off", init_timeout=30, program="cifarlab", x_disable_stats=True,
                                        x_disable_meta=True, disable_git=True, save_code=False),
            )  # fmt: skip
            write_atomically(id_file, self._run.id.encode())
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # W&B raises many types, and none of them may end a training
            self._lose(error)

    def rows(self, rows: list[Row], pace: Pace) -> None:
        for row in rows:
            self._send(row)

    def tables(self, tables: list[Measured]) -> None:
        pass  # their whole-model numbers are in the rows

    def alarm(self, alarm: Alarm) -> None:
        self._send({"step": alarm.noticed, f"alarm/{alarm.rule}": 1.0})
        if self._run is not None:
            try:
                self._run.summary[f"alarm/{alarm.rule}"] = str(alarm)
                self._run.alert(title=f"cifarlab: {alarm.rule.replace('_', ' ')}", text=str(alarm))
            except Exception as error:
                self._lose(error)

    def epoch(self, row: Row, *, is_best: bool) -> None:
        self._send(row)

    def finish(self, result: dict[str, Any]) -> None:
        self._exit_code = 0 if result["state"] in ("finished", "swept") else 1
        if self._run is not None:
            try:
                self._run.summary.update(result)
            except Exception as error:
                self._lose(error)

    def close(self) -> None:
        if self._run is not None:
            try:
                self._run.finish(exit_code=self._exit_code)
            except Exception as error:
                self._lose(error)
            self._run = None

    def _send(self, row: Row) -> None:
        if self._run is not None:
            try:
                self._run.log(dict(row))
            except Exception as error:
                self._lose(error)

    def _lose(self, error: Exception) -> None:
        self._run = None
        why = " ".join(f"{type(error).__name__}: {error}".split())
        _say(f"W&B stopped taking rows ({why}); the run goes on and its folder has everything")


def _has_key(wandb: Any) -> bool:
    """Whether W&B could log in without asking: a key in the environment, its settings or the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except TypeError:  # W&B before 0.31 has no `prompt`
        return bool(wandb.api.api_key)
    except Exception:
        return False


def _say(text: str) -> None:
    print(text, file=sys.stderr)
