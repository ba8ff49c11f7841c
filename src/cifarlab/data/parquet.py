"""Parquet files in the Hugging Face layout: an image column ({bytes, path}, or bytes) and one or two label columns."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifarlab.config import InputError
from cifarlab.data.dataset import Decoded
from cifarlab.data.folder import natural_order, read_image, read_images

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = {"fine": ("fine_label", "label", "labels"), "coarse": ("coarse_label",)}
SMALL = 1 << 28  # bytes that a file may unpack to whatever its size; beyond that, GROWTH times its own
GROWTH = 20
SPLIT_NAMES = {"train": ("train",), "test": ("test", "validation", "valid", "val")}


def find_parquet(folder: Path) -> dict[str, list[Path]] | None:
    """The files of both splits, {"train": […], "test": […]}, directly in `folder`; None when either has none.

    Files are named as Hugging Face does, train-00000-of-00002.parquet, or plainly train.parquet; without test files those of
    validation (valid, val) are the test.

    Raises InputError when a part of "…-of-N" is missing.
    """
    splits = {}
    names = sorted(path for path in folder.glob("*.parquet") if path.is_file())
    for split, prefixes in SPLIT_NAMES.items():
        for prefix in prefixes:
            if files := [path for path in names if re.match(rf"{prefix}[-_.0-9]", path.name)]:
                splits[split] = files
                break
        else:
            return None
    for files in splits.values():
        parts = [re.search(r"-of-([0-9]+)", path.name) for path in files]
        if (last := parts[-1]) and int(last[1]) != len(files):
            raise InputError(f"{folder} holds {len(files)} of the {int(last[1])} parts of {files[-1].name}: add the others")
    return splits


def columns_hint(file: Path) -> set[str]:
    """Which of the known columns a parquet file seems to have, from the bytes of its footer: without loading pyarrow.

    That import takes longer than the whole start from the cache. Reading the file checks properly.
    """
    with file.open("rb") as stream:
        stream.seek(max(file.stat().st_size - (1 << 20), 0))
        tail = stream.read()
    length = int.from_bytes(tail[-8:-4], "little")
    footer = tail[-8 - length : -8] if tail.endswith(b"PAR1") else b""
    known = (*IMAGE_COLUMNS, *LABEL_COLUMNS["fine"], *LABEL_COLUMNS["coarse"])
    return {name for name in known if re.search(rb"(?<!\w)" + name.encode() + rb"(?!\w)", footer)}


def read_parquet(
    splits: dict[str, list[Path]],
    image_size: int,
    *,
    class_names: dict[str, tuple[str, ...]] | None = None,
    resize: bool = True,
) -> Decoded:
    """Images and labels of the files that `find_parquet` found; images as `folder.read_image` gives them.

    Class names come from the Hugging Face metadata, else from `class_names` (those of a known data set, whose label columns
    must then all be there), else they are the labels themselves: words in natural order, or "0", "1", ….

    Raises InputError naming file, row and remedy for a file that is damaged, lacks a column, or holds a wrong image or label.
    """
    images: dict[str, NDArray[np.uint8]] = {}
    columns: dict[str, dict[str, list[Any]]] = {}
    names: dict[str, tuple[str, ...]] = {}
    is_jpeg = False
    for split, files in splits.items():
        reads = []
        columns[split] = {}
        for file in files:
            try:
                blobs, labels, found_names = _read_file(file)
            except InputError:
                raise
            except Exception as error:  # ArrowException and OSError, but UnicodeDecodeError and others too
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise InputError(f"{file} is not a sound parquet file ({reason}): fetch it again") from error
            names |= found_names
            for kind, values in labels.items():
                columns[split].setdefault(kind, []).extend(values)
            is_jpeg = is_jpeg or any(blob[:2] == b"\xff\xd8" for blob in blobs)
            for row, blob in enumerate(blobs):
                reads.append(partial(read_image, blob, image_size, f"row {row} of {file}", resize=resize))
        images[split] = read_images(reads, image_size, str(files[0].parent))
    kinds = tuple(class_names or columns["train"])
    for split, files in splits.items():
        for kind in kinds:
            if len(columns[split].get(kind, ())) != len(images[split]):
                raise InputError(f"{files[0]} has no column {LABEL_COLUMNS[kind][0]!r} for all its images: add it")
    if class_names:
        for kind in kinds:
            if len(names.setdefault(kind, class_names[kind])) != len(class_names[kind]):
                raise InputError(
                    f"{splits['train'][0]} names {len(names[kind])} classes, not {len(class_names[kind])}: "
                    "give its folder as --data instead"
                )
    labels_of: dict[str, dict[str, NDArray[np.int64]]] = {"train": {}, "test": {}}
    for kind in kinds:
        both = columns["train"][kind] + columns["test"][kind]
        if all(isinstance(value, str) for value in both):
            names[kind] = tuple(sorted(set(both), key=natural_order))
            numbers = {name: label for label, name in enumerate(names[kind])}
            for split in splits:
                columns[split][kind] = [numbers[value] for value in columns[split][kind]]
        elif not all(isinstance(value, int) and 0 <= value < len(both) for value in both):
            wrong = next(value for value in both if not (isinstance(value, int) and 0 <= value < len(both)))
            raise InputError(f"{splits['train'][0].parent} holds the label {wrong!r}: labels are 0, 1, … or all words")
        else:
            names.setdefault(kind, tuple(str(label) for label in range(max(both) + 1)))
        for split in splits:
            labels_of[split][kind] = np.array(columns[split][kind], np.int64)
    what = f"parquet, {len(images['train']):,} train and {len(images['test']):,} test images"
    what += ", JPEG-coded" if is_jpeg else ""
    return Decoded(
        images["train"], images["test"], labels_of["train"], labels_of["test"], {kind: names[kind] for kind in kinds}, what
    )


def _read_file(file: Path) -> tuple[list[bytes], dict[str, list[Any]], dict[str, tuple[str, ...]]]:
    """(image files, labels by kind, class names by kind) of one parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as parquet:
        schema = parquet.schema_arrow
        image_column = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
        label_columns = {
            kind: next(name for name in choices if name in schema.names)
            for kind, choices in LABEL_COLUMNS.items()
            if any(name in schema.names for name in choices)
        }
        if image_column is None or "fine" not in label_columns:
            raise InputError(f"{file} has the columns {', '.join(schema.names)}: rename two of them to image and label")
        table = _read_table(parquet, [image_column, *label_columns.values()], file)
    column = table.column(image_column)
    if pa.types.is_struct(column.type) and (field := column.type.get_field_index("bytes")) >= 0:
        column = column.flatten()[field]
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise InputError(f"{file} has images of type {column.type} in column {image_column!r}: store the image files' bytes")
    blobs = column.to_pylist()
    if None in blobs:
        raise InputError(f"row {blobs.index(None)} of {file} has no image bytes: embed the image in the file")
    labels = {kind: table.column(name).to_pylist() for kind, name in label_columns.items()}
    return blobs, labels, _class_names(schema.metadata or {}, label_columns)


def _read_table(parquet: Any, columns: list[str], file: Path) -> Any:
    """The columns of the file; raises InputError where they would take far more memory than its size explains.

    Repeated values are stored once: a file of a megabyte may say that it holds the same photograph a thousand million times.
    """
    import pyarrow as pa

    size = file.stat().st_size
    limit = max(SMALL, GROWTH * size)
    too_much = InputError(f"{file} unpacks to far more than its {size:,} bytes explain: fetch it from a better place")
    facts = parquet.metadata
    stored = sum(facts.row_group(k).total_byte_size for k in range(facts.num_row_groups))
    if facts.num_rows > limit // 8 or not 0 <= stored <= limit:
        raise too_much
    batches = []
    for batch in parquet.iter_batches(batch_size=128, columns=columns, use_threads=False):
        limit -= batch.nbytes
        if limit < 0:
            raise too_much
        batches.append(batch)
    return pa.Table.from_batches(batches, schema=batches[0].schema if batches else parquet.schema_arrow)


def _class_names(metadata: dict[bytes, bytes], label_columns: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """The ClassLabel names that the `datasets` library writes into a file's schema."""
    found = {}
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        for kind, column in label_columns.items():
            names = features[column]["names"]
            if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
                found[kind] = tuple(names)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass  # other writers leave other notes, or none
    return found
