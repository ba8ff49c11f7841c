"""TensorBoard as a mirror: event files in RUN/tensorboard, written without torch or TensorFlow.

`tensorboard --logdir runs` shows all runs side by side. Each session writes a file of its own, which begins with TensorBoard's
own mark for a restart, so that what a crash left beyond the noted step is not shown twice.
"""

import time
from collections.abc import Iterable
from typing import IO, Any

from cifarlab.diagnosis import Alarm
from cifarlab.runs import Run
from cifarlab.trackers.content import Entry, Histogram, Picture, Sheet, describe, scrubbed
from cifarlab.trackers.mirror import Unavailable


class Tensorboard:
    """Scalars, histograms, images and texts, with the optimizer step as x-axis."""

    name, key, with_weights = "TensorBoard", "tensorboard", False

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self.remark = ""

    def open(self, run: Run, memory: dict[str, Any]) -> str:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
            from tensorboard.summary.writer import record_writer
        except ImportError:
            raise Unavailable("it is not installed (pip install 'cifarlab[tensorboard]')") from None
        self._event, self._proto, self._records = event_pb2, summary_pb2, record_writer
        self._tensor, self._types = tensor_pb2, types_pb2
        self._run, self._folder = run, run.path / "tensorboard"
        return "files"

    def begin(self, step: int) -> int:
        self._folder.mkdir(exist_ok=True)
        there = sorted(self._folder.glob("events.out.tfevents.*"))
        # Files are read in the order of their names; two sessions may begin within a second.
        last = int(there[-1].name.split(".")[3]) if there else 0
        path = self._folder / f"events.out.tfevents.{max(int(time.time()), last + 1):010d}.cifarlab"
        self._file = path.open("xb")
        self._writer = self._records.RecordWriter(self._file)
        self._write(0, file_version="brain.Event:2")
        start = step + 1 if there else 1
        self._write(start, session_log=self._event.SessionLog(status=self._event.SessionLog.START))
        if start == 1:
            rows = [(key, _cell(value)) for key, value in describe(self._run).items()]
            self._write(0, summary=self._proto.Summary(value=[self._text("config", markdown(Sheet(("setting", "value"), rows)))]))
        return start - 1

    def send(self, entry: Entry) -> None:
        values = [self._proto.Summary.Value(tag=key, simple_value=value) for key, value in entry.scalars.items()]
        values += [self._histogram(key, histogram) for key, histogram in entry.histograms.items()]
        for key, pictures in entry.pictures.items():
            values += self._images(key, pictures)
        values += [self._text(key, markdown(sheet)) for key, sheet in entry.sheets.items()]
        for alarm in entry.alarms:
            values += [self._text(f"alarm/{alarm['rule']}", str(Alarm.from_dict(alarm))),
                       self._proto.Summary.Value(tag=f"alarms/{alarm['rule']}", simple_value=1.0)]  # fmt: skip
        self._write(entry.step, summary=self._proto.Summary(value=values))

    def flush(self) -> None:
        assert self._file
        self._file.flush()

    def finish(self, summary: dict[str, Any]) -> None:
        if summary:
            rows = [(key, _cell(value)) for key, value in summary.items()]
            text = self._text("summary", markdown(Sheet(("result", "value"), rows)))
            self._write(summary["step"], summary=self._proto.Summary(value=[text]))
        assert self._file
        self._file.close()

    def abandon(self) -> None:
        if self._file:
            self._file.close()

    def _write(self, step: int, **what: Any) -> None:
        self._writer.write(self._event.Event(wall_time=time.time(), step=step, **what).SerializeToString())

    def _histogram(self, tag: str, histogram: Histogram) -> Any:
        middles = (histogram.edges[:-1] + histogram.edges[1:]) / 2
        value = self._proto.HistogramProto(
            min=histogram.edges[0], max=histogram.edges[-1], num=int(histogram.counts.sum()), bucket=histogram.counts,
            bucket_limit=histogram.edges[1:], sum=float(histogram.counts @ middles),
            sum_squares=float(histogram.counts @ middles**2),
        )  # fmt: skip
        return self._proto.Summary.Value(tag=tag, histo=value)

    def _images(self, key: str, pictures: list[Picture]) -> Iterable[Any]:
        for k, picture in enumerate(pictures):
            # TensorBoard shows no captions, so that the names are in the tag; a slash there would begin a new section.
            tag = key if not picture.caption else f"{key}/{k + 1:02d} {scrubbed(picture.caption).replace('/', '∕')}"
            width, height = (int.from_bytes(picture.png[at : at + 4], "big") for at in (16, 20))  # of its IHDR
            image = self._proto.Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=picture.png)
            yield self._proto.Summary.Value(tag=tag, image=image)

    def _text(self, tag: str, text: str) -> Any:
        metadata = self._proto.SummaryMetadata(plugin_data=self._proto.SummaryMetadata.PluginData(plugin_name="text"))
        tensor = self._tensor.TensorProto(dtype=self._types.DT_STRING, string_val=[scrubbed(text).encode()])
        return self._proto.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)


def markdown(sheet: Sheet) -> str:
    """The sheet as a Markdown table; a confusion matrix as a square: rows actual, columns predicted."""
    columns, rows = sheet.columns, sheet.rows
    if sheet.chart == "confusion":
        names = list(dict.fromkeys(row[0] for row in rows))
        columns = ("actual \\ predicted", *names)
        rows = [(name, *(row[2] for row in rows[k * len(names) : (k + 1) * len(names)])) for k, name in enumerate(names)]
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n".join("| " + " | ".join(_cell(value).replace("|", "\\|") for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
