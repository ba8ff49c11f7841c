"""Weights & Biases as a mirror of the run folder: never read back, never asking, never in the way."""

import os
import secrets
import shlex
import struct
import time
from collections.abc import Iterator
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

from cifarlab.config import WatchConfig
from cifarlab.diagnosis import Alarm
from cifarlab.runs import Run
from cifarlab.trackers.content import Entry, Histogram, Picture, Sheet, describe, scrubbed
from cifarlab.trackers.mirror import Unavailable

INIT_SECONDS = 30.0
"""How long W&B may take to answer at the beginning."""
FINISH_SECONDS = 45.0
"""How long W&B may take at the end to send what it has not sent yet."""
BLOCK = 32 * 1024  # of W&B's own files
TAIL_BLOCKS = 64  # in which the last step is looked for at first


def is_wanted(watch: WatchConfig) -> bool:
    """--wandb and --no-wandb decide; else any --wandb-… flag that names something means yes."""
    named = watch.wandb_project or watch.wandb_name or watch.wandb_entity or watch.wandb_tags or watch.wandb_weights
    return watch.wandb if watch.wandb is not None else bool(named)


class Wandb:
    """Sends each step under its own number, so that W&B itself knows how far it is: online its server is asked, offline its file.

    Never prompts: online without a key becomes offline.
    """

    name, key = "W&B", "wandb"

    def __init__(self, watch: WatchConfig) -> None:
        self._watch, self.with_weights = watch, watch.wandb_weights
        self._run: Any = None
        self.remark = ""

    def open(self, run: Run, memory: dict[str, Any]) -> str:
        # Its reports of its own errors carry our tracebacks to others, and delay the exit by 10 s where there is no network.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            import wandb
        except ImportError:
            raise Unavailable("it is not installed (pip install 'cifarlab[wandb]')") from None
        self._wandb, self._of, self._memory = wandb, run, memory
        watch, mode = self._watch, self._watch.wandb_mode
        for key, given in (("project", watch.wandb_project), ("name", watch.wandb_name), ("entity", watch.wandb_entity),
                           ("tags", watch.wandb_tags)):  # fmt: skip
            if given:
                memory[key] = scrubbed(given)
        chosen = os.environ.get("WANDB_MODE", "online") if mode == "online" else mode
        self._mode: Any = "offline" if chosen in ("offline", "dryrun") else "online"
        if chosen == "disabled":
            raise Unavailable("WANDB_MODE is disabled")
        if self._mode == "online" and not _has_key(wandb):
            self._mode = "offline"
            self.remark = (f"W&B has no API key, so its files stay in {run.path / 'wandb'}: after `wandb login`, send all with "
                           f"`cifarlab sync {shlex.quote(str(run.path))} --wandb`")  # fmt: skip
        return str(self._mode)

    def begin(self, step: int) -> int:
        wandb, memory, path = self._wandb, self._memory, self._of.path
        memory.setdefault("id", secrets.token_hex(4))
        begun = last_step(path / "wandb", memory["id"]) if self._mode == "offline" else 0
        while any(path.glob(f"wandb/*run-{datetime.now():%Y%m%d_%H%M%S}-{memory['id']}")):
            time.sleep(0.05)  # two sessions in one second would write to one folder, and the second over the first
        wanted = dict(
            silent=True, console="off", init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS, finish_timeout_raises=True,
            program="cifarlab", save_code=False, x_disable_stats=True,
            # What W&B would find out by itself holds the bare command line and the git remote, with the secrets in them.
            x_disable_meta=True, disable_git=True, x_save_requirements=False,
        )  # fmt: skip
        known = getattr(wandb.Settings, "model_fields", wanted)  # an older W&B does not have them all
        tags = [tag.strip() for tag in memory.get("tags", "").split(",") if tag.strip()]
        self._run = wandb.init(
            project=memory.get("project") or os.environ.get("WANDB_PROJECT") or "cifarlab", entity=memory.get("entity") or None,
            name=memory.get("name") or scrubbed(path.name), tags=tags or None, id=memory["id"], resume="allow",
            mode=self._mode, dir=str(path), config=describe(self._of), reinit="create_new",
            settings=wandb.Settings(**{key: value for key, value in wanted.items() if key in known}),
        )  # fmt: skip
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self._last = begun if self._mode == "offline" else max(int(self._run.starting_step) - 1, 0)
        return self._last

    def send(self, entry: Entry) -> None:
        wandb = self._wandb
        row: dict[str, Any] = {"step": entry.step, **entry.scalars}
        row |= {key: self._histogram(histogram) for key, histogram in entry.histograms.items()}
        row |= {key: [self._image(picture) for picture in pictures] for key, pictures in entry.pictures.items()}
        for key, sheet in entry.sheets.items():
            row |= self._sheet(key, sheet)
        row |= {f"alarms/{alarm['rule']}": 1.0 for alarm in entry.alarms}
        # What comes after the last step (a figure drawn anew) needs a number that W&B has not seen.
        self._last = entry.step if entry.step > self._last else self._last + 1
        self._run.log(row, step=self._last, commit=True)  # else it would wait, and overwrite the summary at the end
        for values in entry.alarms:
            alarm = Alarm.from_dict(values)
            self._run.summary[f"alarm/{alarm.rule}"] = scrubbed(str(alarm))
            self._run.alert(title=f"cifarlab: {alarm.rule.replace('_', ' ')}", text=scrubbed(str(alarm)))
        if entry.weights:
            artifact = wandb.Artifact(f"weights-{self._memory['id']}", type="model")
            artifact.add_file(str(entry.weights), name=entry.weights.name, policy="immutable")
            self._run.log_artifact(artifact)

    def flush(self) -> None:
        pass  # W&B's own process writes; after a crash its file or server tells how far it got

    def finish(self, summary: dict[str, Any]) -> None:
        run, self._run = self._run, None
        run.summary.update(summary)
        if "state" not in summary:  # interrupted, or sent while it runs: it will be gone on with
            run.mark_preempting()
        run.finish(exit_code=0 if summary.get("state") in ("finished", "swept") else 1)
        if self._mode == "offline":
            until = time.monotonic() + 10  # it closes its file a moment after it has said that all is done
            while (found := last_step(self._of.path / "wandb", self._memory["id"])) < self._last:
                if time.monotonic() > until:
                    raise Unavailable(f"its file ends at step {found:,}, before step {self._last:,} (is the disk full?)")
                time.sleep(0.05)

    def abandon(self) -> None:
        if self._run is not None:
            run, self._run = self._run, None
            run.finish(exit_code=1)

    def _histogram(self, histogram: Histogram) -> Any:
        return self._wandb.Histogram(np_histogram=(histogram.counts, histogram.edges))

    def _image(self, picture: Picture) -> Any:
        from PIL import Image

        return self._wandb.Image(Image.open(BytesIO(picture.png)), caption=scrubbed(picture.caption) or None)

    def _sheet(self, key: str, sheet: Sheet) -> dict[str, Any]:
        table = self._wandb.Table(columns=list(sheet.columns), data=[list(scrubbed(row)) for row in sheet.rows])
        if sheet.chart == "confusion":
            fields = {column: column for column in sheet.columns}
            chart = self._wandb.plot_table("wandb/confusion_matrix/v1", table, fields, {"title": "Confusion matrix"})
            return {key: chart}
        if sheet.chart == "bar":
            title = f"{sheet.columns[1].capitalize()} by {sheet.columns[0]}"
            return {key: table, f"{key}_chart": self._wandb.plot.bar(table, sheet.columns[0], sheet.columns[1], title=title)}
        return {key: table}


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


def last_step(folder: Path, run_id: str) -> int:
    """The last step in W&B's offline files of that run: what it really has, also after a crash; 0 without any."""
    return max(map(_last_in, folder.glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")), default=0)


def _last_in(path: Path) -> int:
    """Of one file, from its end: of a million rows its half gigabyte took longer to read than W&B to close it."""
    from wandb.proto import wandb_internal_pb2

    proto: Any = wandb_internal_pb2  # its names are made when it is imported
    blocks = TAIL_BLOCKS
    while True:
        start = max(0, path.stat().st_size // BLOCK + 1 - blocks)
        records = map(proto.Record.FromString, _records(path, start))
        last = max((record.history.step.num for record in records if record.HasField("history")), default=0)
        if last or not start:
            return int(last)
        blocks *= 8


def _records(path: Path, start: int = 0) -> Iterator[bytes]:
    """The records of a .wandb file that begin in that block or later, as far as it is whole.

    7 bytes, then LevelDB's log: blocks of 32 KiB, in them chunks: 1 a whole record, else its first (2), middle (3), last (4).
    """
    with path.open("rb") as file:
        base = file.seek(start * BLOCK)
        content = file.read()
    position, joined = 7 * (not start), b""
    is_known = False  # whether the record was begun in what is read
    while position + 7 <= len(content):
        if (rest := BLOCK - (base + position) % BLOCK) < 7:
            position += rest
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        chunk = content[position + 7 : position + 7 + length]
        if kind not in (1, 2, 3, 4) or len(chunk) < length:
            return
        is_known = is_known or kind in (1, 2)
        joined += chunk
        position += 7 + length
        if kind in (1, 4):
            if is_known:
                yield joined
            joined = b""
