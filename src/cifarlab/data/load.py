"""load_dataset: from a name or a folder to two splits of images in memory."""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cifarlab.config import MAX_IMAGE_SIZE, InputError, did_you_mean
from cifarlab.data.cache import Entry, cache_folder, hash_files, load_decoded
from cifarlab.data.cifar import CIFARS, Cifar, Found, find_cifar, found_archive
from cifarlab.data.dataset import Dataset, Decoded, Split
from cifarlab.data.digits import read_digits
from cifarlab.data.folder import find_images, read_folder
from cifarlab.data.parquet import find_parquet, read_parquet

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def load_dataset(
    name_or_path: str | Path,
    *,
    data_dir: Path | str | None = None,
    data_url: str = "",
    labels: str = "fine",
    image_size: int = 32,
    statistics: str = "dataset",
    progress: bool = True,
) -> Dataset:
    """Both splits of a data set: images uint8 N×3×H×W (memory-mapped, read-only), labels int64 in 0…K−1, names, statistics.

    name_or_path: "cifar10", "cifar100", "digits", or a folder: of images (train/<class>/*, test/<class>/*) or of parquet files.
    CIFAR is looked for in data_dir, $CIFARLAB_DATA and the cache folder, in that order and in every layout `find_cifar` knows;
    when none has it, it is downloaded into the first of them (from `data_url`, else from known mirrors).
    labels: "fine", or "coarse" for the 20 superclasses of CIFAR-100. image_size: side in pixels of digits, folders and parquet.
    statistics: "dataset" (published ones for CIFAR, else measured on the training images) or "imagenet".
    progress: say on stderr what takes long.

    The first start decodes (60,000 JPEG images of parquet files: 6 to 20 s on 2 CPU cores), later ones take the cache (0.2 s).

    Raises InputError for anything that cannot be used; nothing is then left behind but a download's part, to be resumed.
    """
    name = str(name_or_path)
    if statistics not in ("dataset", "imagenet"):
        raise InputError(f"statistics={statistics!r} is unknown: it must be dataset or imagenet")
    if labels not in ("fine", "coarse") or (labels == "coarse" and name != "cifar100"):
        raise InputError(f"labels={labels!r} cannot be used with {name!r}: it must be fine, or coarse with cifar100")
    if not 1 <= image_size <= MAX_IMAGE_SIZE:
        raise InputError(f"image_size={image_size} cannot be used: it must be at least 1, at most {MAX_IMAGE_SIZE}")
    if data_url and name not in CIFARS:
        raise InputError(f"data_url={data_url!r} cannot be used with {name!r}: only cifar10 and cifar100 are downloaded")

    if name in CIFARS:
        if image_size != 32:
            raise InputError(f"image_size={image_size} cannot be used with {name}, whose images are 32×32: leave it at 32")
        entry, where = _load_cifar(CIFARS[name], data_dir, data_url, progress)
    elif name == "digits":
        entry, where = load_decoded(f"digits {image_size}", lambda: _checked(read_digits(image_size), "digits")), ""
    else:
        path = Path(name_or_path).expanduser()
        if not path.is_dir():
            near = did_you_mean(name, (*CIFARS, "digits"))
            raise InputError(f"data={name!r} is neither cifar10, cifar100, digits nor a folder{near or ': check the path'}")
        entry, where = _load_folder(path, image_size, progress), str(path)
        name = path.resolve().name

    decoded = entry.decoded
    if statistics == "imagenet":
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    elif str(name_or_path) in CIFARS:
        mean, std = CIFARS[name].mean, CIFARS[name].std
    else:
        mean, std = entry.mean, entry.std
        if min(std) == 0:
            raise InputError(f"a colour channel of {name} is the same in all training images: use statistics=imagenet")
    return Dataset(
        name=name,
        source=f"{decoded.what}, in {where}" if where else decoded.what,
        train=Split(decoded.train_images, decoded.train_labels[labels]),
        test=Split(decoded.test_images, decoded.test_labels[labels]),
        class_names=decoded.class_names[labels],
        mean=mean,
        std=std,
        fingerprint=entry.fingerprints[labels],
    )


def data_folders(data_dir: Path | str | None = None) -> list[Path]:
    """Where CIFAR is looked for, in order: data_dir, $CIFARLAB_DATA, the cache folder. Downloads go to the first."""
    named = (data_dir, os.environ.get("CIFARLAB_DATA"))
    return [*(Path(folder).expanduser() for folder in named if folder), cache_folder()]


def _load_cifar(cifar: Cifar, data_dir: Path | str | None, data_url: str, progress: bool) -> tuple[Entry, str]:
    folders = data_folders(data_dir)
    found: Found | None = None
    for folder in folders:
        try:
            found = found or find_cifar(cifar, folder)
        except OSError as error:
            raise InputError(f"{folder} cannot be read ({error}): check its permissions or give another --data-dir") from error
    if not found:
        from cifarlab.data.download import download_cifar  # here, because its imports cost every start 0.05 s

        found = found_archive(cifar, download_cifar(cifar, folders[0], url=data_url, progress=progress))
    where = str(found.path)
    return _load_files(f"{cifar.name} {cifar.layouts}", found.files, found.root, found.decode, where, progress), where


def _load_folder(folder: Path, image_size: int, progress: bool) -> Entry:
    try:
        if (folder / "train").is_dir():
            images = find_images(folder)
            # Files are hashed with their names below the folder, so classes and splits are part of the content.
            return _load_files(
                f"images {image_size}", images.files, folder, partial(read_folder, images, image_size), str(folder), progress
            )
        if splits := find_parquet(folder):
            files = splits["train"] + splits["test"]
            decode = partial(read_parquet, splits, image_size)
            return _load_files(f"parquet {image_size}", files, folder, decode, str(folder), progress)
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error}): check its permissions") from error
    for cifar in CIFARS.values():
        if find_cifar(cifar, folder):
            raise InputError(f"{folder} holds {cifar.title}: give --data {cifar.name} --data-dir {folder}")
    raise InputError(
        f"{folder} is not a data set: it must hold train/<class>/<images> and test/<class>/<images>, "
        "or train-*.parquet and test-*.parquet"
    )


def _load_files(kind: str, files: list[Path], root: Path, decode: Callable[[], Decoded], where: str, progress: bool) -> Entry:
    def decode_aloud() -> Decoded:
        if progress:
            print(f"Decoding {where} (once; the next start takes the cache)", file=sys.stderr)
        return _checked(decode(), where)

    try:
        content = hash_files(files, root)
    except OSError as error:
        raise InputError(f"{error.filename or where} cannot be read ({error.strerror}): check its permissions") from error
    return load_decoded(f"{kind} {content}", decode_aloud)


def _checked(decoded: Decoded, where: str) -> Decoded:
    """The same; raises InputError when a label is out of range or a class has no image in one of the splits."""
    for split, labels_by_kind in (("train", decoded.train_labels), ("test", decoded.test_labels)):
        for kind, labels in labels_by_kind.items():
            names = decoded.class_names[kind]
            present = set(labels.tolist())
            if wrong := present - set(range(len(names))):
                raise InputError(f"{where} has the label {wrong.pop()} in {split}, but {len(names)} classes: correct the label")
            for label, name in enumerate(names):
                if label not in present:
                    raise InputError(f"{where} has no image of class {name!r} in {split}: add some, or remove the class")
    return decoded
