"""A folder of images: train/<class>/*, test/<class>/*. Also how any one image file becomes pixels."""

import io
import os
import re
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cifarlab.config import InputError
from cifarlab.data.dataset import Decoded, check_size

if TYPE_CHECKING:
    from PIL import Image

BACKGROUND = (255, 255, 255)
"""What shows through transparent pixels: white."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # no format whose reader starts another program, as EPS
MAX_PIXELS = 64_000_000
IGNORED = {"thumbs.db", "desktop.ini", "__macosx"}
TEST_NAMES = ("test", "val", "valid", "validation")


@dataclass(frozen=True)
class ImageFolder:
    """The files of a folder of images, by class; found, not yet read. Paths are below root; class_names in natural order."""

    root: Path
    class_names: tuple[str, ...]
    train: tuple[tuple[Path, int], ...]
    test: tuple[tuple[Path, int], ...]
    test_name: str

    @property
    def files(self) -> list[Path]:
        return [file for file, _ in self.train + self.test]


def natural_order(name: str) -> tuple[list[tuple[int, int | str]], str]:
    """Sort key by which "class2" comes before "class10"; case counts only between names that are equal without it."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part)) if part.isdecimal() else (1, part.casefold()) for part in parts if part], name


def find_images(root: Path) -> ImageFolder:
    """The images of root/train/<class>/ and root/test/<class>/; without test/, those of val/, valid/ or validation/.

    Hidden files, Thumbs.db, desktop.ini and __MACOSX are passed over. Links are followed inside `root` only.

    Raises InputError when the two splits have different classes, a class is empty, a folder stands where an image should,
    or a link leads out of `root`.
    """
    test_name = next((name for name in TEST_NAMES if (root / name).is_dir()), "")
    if not test_name:
        raise InputError(f"{root} has a folder train but no folder test (or val): put images not trained on into {root / 'test'}")
    train, test = _list_split(root, "train"), _list_split(root, test_name)
    for here, there, place in ((train, test, test_name), (test, train, "train")):
        if missing := sorted(set(here) - set(there), key=natural_order):
            raise InputError(f"class {missing[0]!r} has no folder in {root / place}: train and {test_name} need the same classes")
    names = tuple(sorted(train, key=natural_order))
    if len(names) < 2:
        raise InputError(f"{root / 'train'} holds {len(names)} class folders: a classifier needs two or more")
    splits = [tuple((file, label) for label, name in enumerate(names) for file in split[name]) for split in (train, test)]
    return ImageFolder(root, names, splits[0], splits[1], test_name)


def _list_split(root: Path, split: str) -> dict[str, list[Path]]:
    classes = {}
    for folder in _entries(root / split, root):
        if not folder.is_dir():
            raise InputError(f"{folder} is a file where only class folders belong: move it into a class folder or away")
        files = _entries(folder, root)
        if not files:
            raise InputError(f"class folder {folder} holds no image: put some in, or delete the class from both splits")
        for file in files:
            if not file.is_file():
                raise InputError(f"{file} is not a file, and class folders hold images only: move its images up or away")
        classes[folder.name] = sorted(files, key=lambda file: natural_order(file.name))
    return classes


def _entries(folder: Path, root: Path) -> list[Path]:
    found = []
    inside = root.resolve()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in IGNORED:
                continue
            if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(inside):
                raise InputError(f"link {entry.path} leads out of {root}: copy what it points at, or delete it")
            found.append(Path(entry.path))
    return found


def read_folder(folder: ImageFolder, image_size: int) -> Decoded:
    """Every image of the folder as RGB, image_size × image_size (see `read_image` for the rules).

    Raises InputError naming the file that is not a readable image.
    """
    splits = []
    for split in (folder.train, folder.test):
        reads = [partial(read_image, file, image_size) for file, _ in split]
        images = read_images(reads, image_size, str(folder.root), threads=min(8, os.cpu_count() or 1))
        splits.append((images, np.array([label for _, label in split], np.int64)))
    (train, train_labels), (test, test_labels) = splits
    what = f"folder of images, {len(train):,} in train and {len(test):,} in {folder.test_name}, {image_size}×{image_size}"
    if folder.test_name == "test" and (folder.root / "val").is_dir():
        what += " (its val folder is not used)"
    return Decoded(train, test, {"fine": train_labels}, {"fine": test_labels}, {"fine": folder.class_names}, what)


def read_images(
    reads: Sequence[Callable[[], NDArray[np.uint8]]], image_size: int, where: str, *, threads: int = 1
) -> NDArray[np.uint8]:
    """The results of `reads`, stacked (uint8, N×3×S×S). Threads help with photographs, and hinder with 32×32 images."""
    check_size(len(reads), image_size, where)
    images = np.empty((len(reads), 3, image_size, image_size), np.uint8)
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable files; bombs have a limit of their own here
        results = pool.map(lambda read: read(), reads) if threads > 1 else (read() for read in reads)
        try:
            for index, image in enumerate(results):
                images[index] = image
        except BaseException:
            pool.shutdown(cancel_futures=True)  # an error in the first image must not wait for the last
            raise
    return images


def read_image(source: Path | bytes, image_size: int, where: str = "", *, resize: bool = True) -> NDArray[np.uint8]:
    """One image file (path, or its bytes) as uint8, 3×S×S with S = image_size.

    First frame; turned upright as its EXIF orientation says; transparent pixels on white; 16-bit grey divided by 257; CMYK,
    palette and the rest by Pillow's conversion to RGB. An image of another size is resized with the Lanczos filter, both
    sides to S: nothing is cut off, and a picture that is not square is squeezed. One of the right size is left untouched.

    Raises InputError naming `where` (default: the path) when it is no image, is damaged, has more than 64 million pixels, or,
    with resize=False, another size.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    where = where or str(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(f"{where} has {image.width}×{image.height} pixels, over {MAX_PIXELS:,}: make it smaller")
            rgb = _to_rgb(ImageOps.exif_transpose(image), where)
    except Image.DecompressionBombError as error:
        raise InputError(f"{where} has far more than {MAX_PIXELS:,} pixels: make it smaller") from error
    except UnidentifiedImageError as error:
        kinds = ", ".join(FORMATS)
        raise InputError(f"{where} is not an image that can be read ({kinds}): move it away or convert it") from error
    except InputError:
        raise
    # Pillow's readers raise nearly anything on damaged files.
    except Exception as error:
        raise InputError(f"{where} is a damaged image ({error}): replace or remove it") from error
    if rgb.size != (image_size, image_size):
        if not resize:
            raise InputError(f"{where} is {rgb.width}×{rgb.height}, not {image_size}×{image_size}: it is not a CIFAR image")
        rgb = rgb.resize((image_size, image_size), Image.Resampling.LANCZOS)
    return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))


def _to_rgb(image: "Image.Image", where: str) -> "Image.Image":
    from PIL import Image

    if image.mode == "F":
        raise InputError(f"{where} holds floating-point pixels, whose range is unknown: save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip at 255
        grey: NDArray[Any] = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise InputError(f"{where} holds pixels outside 0…65535: save it with 8 or 16 bits")
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), rgba).convert("RGB")
    return image.convert("RGB")
