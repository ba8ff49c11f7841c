"""Arrays out of .npz files of which nothing is known: no pickle is read, and no more memory taken than the file itself explains.

`numpy.load` refuses pickles too, but believes what a file says of its sizes: a few bytes of header make it ask for terabytes,
and a few megabytes of deflated zeros for gigabytes.
"""

import io
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from cifarlab.config import InputError

SMALL = 1 << 26  # bytes that a compressed file may unpack to whatever its size; beyond that, GROWTH times its own
GROWTH = 20
_HEADER_LIMIT = 10_000  # characters; numpy's own limit


def read_arrays(path: Path, names: Sequence[str] | None = None, *, remedy: str) -> dict[str, NDArray[Any]]:
    """The arrays of these names (default: all) in an .npz file.

    Raises FileNotFoundError, and InputError, which ends in `remedy`, for a file that is damaged, lacks one of them, holds Python
    objects, or unpacks to far more than its size.
    """
    limit = max(SMALL, GROWTH * path.stat().st_size)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            found = {}
            for name in members if names is None else names:
                if name not in members:
                    raise ValueError(f"it has no array {name!r}")
                limit -= members[name].file_size
                if limit < 0:
                    raise ValueError("it unpacks to far more than its size explains")
                with archive.open(members[name]) as file:
                    found[name] = _read_array(file.read(members[name].file_size))
            return found
    except Exception as error:  # zip, zlib and numpy's readers raise a dozen types for a damaged file
        told = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(f"{path} cannot be read ({told}): {remedy}") from None


def _read_array(content: bytes) -> NDArray[Any]:
    """What an .npy file of that content holds; raises ValueError where content and header are of different sizes."""
    stream = io.BytesIO(content)
    version = npy.read_magic(stream)
    read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read_header is None:
        raise ValueError(f"its version {version} is unknown")
    shape, is_fortran, dtype = read_header(stream, max_header_size=_HEADER_LIMIT)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which could run a program")
    if dtype.itemsize == 0 or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(content) - stream.tell():
        raise ValueError("its header and its content are of different sizes")
    flat = np.frombuffer(content, dtype, offset=stream.tell())
    return flat.reshape(shape, order="F" if is_fortran else "C").copy()
