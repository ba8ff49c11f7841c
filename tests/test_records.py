"""Tables of measurements: what is read is what was written, a crash may tear what it likes, and nothing else is taken for one."""

import json
import os
import tracemalloc
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cifarlab.config import InputError
from cifarlab.records import Measured, TableWriter, forget_after, read_table
from cifarlab.runs import Run, RunFolder

ITEMS = ("stem.weight", "stem.bias", "schicht.größe")
COLUMNS = ("norm", "ratio")
RECORD = 8 + 4 * len(ITEMS) * len(COLUMNS)


def values_at(steps: Iterable[int]) -> np.ndarray:
    return np.array([[[step + k + c / 8 for c in range(len(COLUMNS))] for k in range(len(ITEMS))] for step in steps])


def written(path: Path, steps: Iterable[int] = (1, 2, 5), items: tuple[str, ...] = ITEMS) -> Path:
    steps = list(steps)
    writer = TableWriter(path, items, COLUMNS)
    for step in steps:  # one by one: another flush each
        writer.append([step], values_at([step])[:, : len(items)])
    writer.sync()
    writer.close()
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "probes" / "gradient_flow.rec"


names = st.lists(st.text(max_size=8), max_size=4)
floats = st.floats(width=32)


@given(items=names, columns=names, data=st.data())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_what_is_read_is_what_was_written(tmp_path_factory: pytest.TempPathFactory, items: list[str], columns: list[str],
                                          data: st.DataObject) -> None:  # fmt: skip
    path = tmp_path_factory.mktemp("table") / "x.rec"
    steps = sorted(data.draw(st.sets(st.integers(1, 2**62), max_size=4)))
    count = len(steps) * len(items) * len(columns)
    values = np.array(data.draw(st.lists(floats, min_size=count, max_size=count))).reshape(len(steps), len(items), len(columns))
    writer = TableWriter(path, items, columns)
    writer.append(steps, values)
    writer.close()
    table = read_table(path)
    assert (table.name, table.items, table.columns) == ("x", tuple(items), tuple(columns))
    assert table.steps.tolist() == steps
    np.testing.assert_array_equal(table.values, values)
    assert len(table) == len(steps)


def test_columns_and_stretches_of_steps(path: Path) -> None:
    table = read_table(written(path))
    np.testing.assert_array_equal(table["ratio"], values_at([1, 2, 5])[:, :, 1])
    with pytest.raises(KeyError, match="gradient_flow has no column 'mean'; it has norm, ratio"):
        _ = table["mean"]
    for first, last, steps in ((1, 2, [1, 2]), (2, 4, [2]), (3, 4, []), (0, 99, [1, 2, 5])):
        part = table.between(first, last)
        assert part.steps.tolist() == steps
        np.testing.assert_array_equal(part.values, values_at(steps).reshape(-1, len(ITEMS), len(COLUMNS)))


def test_numbers_beyond_float32_are_infinite(path: Path) -> None:
    measured = Measured("gradient_flow", ITEMS, COLUMNS, np.array([1]), np.full((1, 3, 2), -1e300))
    assert (measured.table["norm"] == -np.inf).all()
    with RunFolder(path.parents[1]) as folder:
        folder.table(measured)
    assert (read_table(path)["norm"] == -np.inf).all()


def test_a_file_torn_at_any_byte_is_read_as_far_as_it_is_whole_and_goes_on_whole(path: Path) -> None:
    whole = written(path).read_bytes()
    start = len(whole) - 3 * RECORD
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        kept = [1, 2, 5][: (end - start) // RECORD]
        assert read_table(path).steps.tolist() == kept
        forget_after(path, 99)
        assert path.read_bytes() == whole[: start + len(kept) * RECORD]
        written(path, [1, 2, 5][len(kept) :])
        assert path.read_bytes() == whole


def test_records_after_a_step_are_forgotten(path: Path) -> None:
    for step, kept in ((0, []), (1, [1]), (3, [1, 2]), (5, [1, 2, 5]), (99, [1, 2, 5])):
        path.unlink(missing_ok=True)
        written(path)
        forget_after(path, step)
        assert read_table(path).steps.tolist() == kept
        written(path, [step + 1])
        assert read_table(path).steps.tolist() == [*kept, step + 1]


def test_zeros_that_a_power_cut_left_are_forgotten(path: Path) -> None:
    """A file can have grown on the disk without its content."""
    written(path, range(1, 8))
    with path.open("ab") as file:
        file.write(b"\0" * 5 * RECORD)
    forget_after(path, 9)
    assert read_table(path).steps.tolist() == list(range(1, 8))


def test_a_new_table_appears_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader, or a resume after a crash, never meets half a first line."""

    def power_cut(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", power_cut)
        with pytest.raises(KeyboardInterrupt):
            TableWriter(path, ITEMS, COLUMNS)
    assert not path.exists()
    assert Run(path.parents[1]).tables == {}
    writer = TableWriter(path, ITEMS, COLUMNS)
    assert Run(path.parents[1]).tables["gradient_flow"].items == ITEMS
    assert len(read_table(path)) == 0
    writer.close()


def test_other_items_or_columns_are_refused(path: Path) -> None:
    before = written(path).read_bytes()
    for items, columns in ((ITEMS[:2], COLUMNS), (ITEMS, COLUMNS[:1]), (ITEMS[::-1], COLUMNS)):
        with pytest.raises(InputError, match=r"holds other items or columns \(3 × 2\) .* resume with the same --probes"):
            TableWriter(path, items, columns)
    assert path.read_bytes() == before
    other = path.with_name("weight_flow.rec")
    path.rename(other)
    with pytest.raises(InputError, match="holds other"):
        TableWriter(other, ITEMS, COLUMNS)


@pytest.mark.parametrize(
    "line",
    [
        b"", b"\n", b"{}\n", b"[]\n", b"3\n", b"null\n", b"\xff\xfe\n", b"[" * 99_999 + b"\n", b"1" * 9_999 + b"\n",
        b'{"cifarlab": "records", "format": 2, "name": "x", "items": [], "columns": []}\n',
        b'{"cifarlab": "records", "format": 1, "name": "x", "items": "abc", "columns": []}\n',
        b'{"cifarlab": "records", "format": 1, "name": "x", "items": {"a": 1}, "columns": []}\n',
        b'{"cifarlab": "records", "format": 1, "name": "x", "items": [1], "columns": []}\n',
        b'{"cifarlab": "records", "format": 1, "name": "x", "items": ["a"]}\n',
        b'{"cifarlab": "records", "format": 1, "name": "x", "items": ["a"], "columns": ["b"]}',
        json.dumps({"cifarlab": "records", "format": 1, "name": "x", "items": ["a"] * 40_000, "columns": ["b"] * 40_000}).encode()
        + b"\n",
    ],
    ids=range(16),
)  # fmt: skip
def test_a_foreign_file_is_one_sentence(path: Path, line: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(line + b"\0" * 64)
    for act in (lambda: read_table(path), lambda: forget_after(path, 1), lambda: TableWriter(path, ITEMS, COLUMNS),
                lambda: Run(path.parents[1]).tables):  # fmt: skip
        with pytest.raises(InputError, match=r"gradient_flow.rec is no table of measurements, .*: remove the file$"):
            act()


@given(data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_random_damage_raises_nothing_but_input_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.rec"
    path.unlink(missing_ok=True)
    content = bytearray(written(path, [1, 2]).read_bytes())
    if data.draw(st.booleans()):
        content = bytearray(data.draw(st.binary(max_size=64)) + content[data.draw(st.integers(0, len(content))) :])
    for _ in range(data.draw(st.integers(1, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with suppress(InputError):
        table = read_table(path)
        assert table.values.shape == (len(table), len(table.items), len(table.columns))
        assert table.values.sum() is not None  # all of it can be read
        forget_after(path, 1)
        assert (read_table(path).steps <= 1).all()


def test_a_missing_or_unreadable_table(path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_table(path)
    path.mkdir(parents=True)
    with pytest.raises(InputError, match="cannot be read"):
        read_table(path)


def test_a_hundred_thousand_records_are_not_loaded(path: Path) -> None:
    """Opening a table of 160 MB and looking at a column of its end takes up less than one."""
    items = tuple(f"layer{k}.weight" for k in range(50))
    writer = TableWriter(path, items, [f"c{k}" for k in range(8)])
    for first in range(1, 100_001, 10_000):
        steps = np.arange(first, first + 10_000)
        writer.append(steps, np.broadcast_to(steps[:, None, None] % 1000, (10_000, 50, 8)))
    writer.close()
    tracemalloc.start()
    table = read_table(path)
    assert len(table) == 100_000
    assert (table.between(99_001, 100_000)["c3"][:, 7] == np.arange(99_001, 100_001) % 1000).all()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    forget_after(path, 99_999)
    assert len(read_table(path)) == 99_999
