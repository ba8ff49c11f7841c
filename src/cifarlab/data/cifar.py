"""CIFAR-10 and CIFAR-100 as their author gives them out: python and binary version, as tar.gz or unpacked.

The python version is made of pickles, and a pickle can run any program. So they are read by an unpickler that knows the four
names that CIFAR's files contain, and answers even those with inert stand-ins: nothing that a file asks for is ever called.
Archives are read in memory, member by member; nothing of them is written to disk.
"""

import gzip
import hashlib
import io
import pickle
import pickletools
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from cifarlab.config import InputError
from cifarlab.data.dataset import Decoded
from cifarlab.data.parquet import columns_hint, find_parquet, read_parquet

PIXELS = 3 * 32 * 32
MAX_MEMBER = 256 << 20  # the largest official member is CIFAR-100's train, 155 MB
MAX_ARCHIVE = 1 << 30

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100_CLASSES = tuple(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
    forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
    mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
    sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree
    wolf woman worm
    """.split()  # noqa: SIM905
)
CIFAR100_SUPERCLASSES = tuple(
    """
    aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices household_furniture insects
    large_carnivores large_man-made_outdoor_things large_natural_outdoor_scenes large_omnivores_and_herbivores medium_mammals
    non-insect_invertebrates people reptiles small_mammals trees vehicles_1 vehicles_2
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Layout:
    """The files of one version of one data set. train, test, meta are names inside the folder that the archive holds."""

    archive: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: tuple[str, ...]

    @property
    def is_binary(self) -> bool:
        return self.train[0].endswith(".bin")


@dataclass(frozen=True)
class Cifar:
    """What is known of one of the two data sets; md5 and num_bytes are those of the official python archive."""

    name: str
    title: str
    class_names: dict[str, tuple[str, ...]]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    layouts: tuple[Layout, ...]
    md5: str
    num_bytes: int


CIFAR10 = Cifar(
    "cifar10",
    "CIFAR-10",
    {"fine": CIFAR10_CLASSES},
    (0.4914, 0.4822, 0.4465),
    (0.2470, 0.2435, 0.2616),
    (
        Layout(
            "cifar-10-python.tar.gz",
            "cifar-10-batches-py",
            tuple(f"data_batch_{i}" for i in range(1, 6)),
            ("test_batch",),
            ("batches.meta",),
        ),
        Layout(
            "cifar-10-binary.tar.gz",
            "cifar-10-batches-bin",
            tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
            ("test_batch.bin",),
            ("batches.meta.txt",),
        ),
    ),
    "c58f30108f718f92721af3b95e74349a",
    170_498_071,
)
CIFAR100 = Cifar(
    "cifar100",
    "CIFAR-100",
    {"fine": CIFAR100_CLASSES, "coarse": CIFAR100_SUPERCLASSES},
    (0.5071, 0.4865, 0.4409),
    (0.2673, 0.2564, 0.2762),
    (
        Layout("cifar-100-python.tar.gz", "cifar-100-python", ("train",), ("test",), ("meta",)),
        Layout(
            "cifar-100-binary.tar.gz",
            "cifar-100-binary",
            ("train.bin",),
            ("test.bin",),
            ("fine_label_names.txt", "coarse_label_names.txt"),
        ),
    ),
    "eb9058c3a382ffc7106e4002c42a8d85",
    169_001_437,
)
CIFARS = {"cifar10": CIFAR10, "cifar100": CIFAR100}


@dataclass(frozen=True)
class Found:
    """A copy of a CIFAR set on disk: where it is, the files to hash, and how to decode it."""

    path: Path
    root: Path
    files: list[Path]
    decode: Callable[[], Decoded]


def find_cifar(cifar: Cifar, folder: Path) -> Found | None:
    """The first copy of the data set in `folder`, its direct sub-folders, or one level deeper where a name says CIFAR.

    In each place, in this order: unpacked python version, python archive, unpacked binary version, binary archive, parquet.
    Parquet files in a sub-folder count only when its name says that they are this set, or is Hugging Face's plain_text or data.
    """
    for place, is_named in _places(cifar, folder):
        for layout in cifar.layouts:
            files = [place / name for name in (*layout.train, *layout.test)]
            if all(file.is_file() for file in files):
                files += [file for name in layout.meta if (file := place / name).is_file()]
                return Found(place, place, files, partial(_read_unpacked, cifar, layout, place))
            if (archive := place / layout.archive).is_file():
                return found_archive(cifar, archive)
        if is_named and (splits := find_parquet(place)):
            hint = columns_hint(splits["train"][0])
            if hint & {"img", "image"} and hint & {"label", "fine_label"} and ("fine_label" in hint) == (cifar is CIFAR100):
                files = splits["train"] + splits["test"]
                return Found(place, place, files, partial(_read_cifar_parquet, cifar, splits))
    return None


def found_archive(cifar: Cifar, archive: Path) -> Found:
    """An archive of the data set under whatever name; the version is told by the members."""
    return Found(archive, archive.parent, [archive], partial(_read_archive, cifar, archive))


def _places(cifar: Cifar, folder: Path) -> Iterator[tuple[Path, bool]]:
    """(folder to look into, whether parquet files there can be this data set's)."""
    says_cifar = re.compile(r"cifar[-_ ]?100" if cifar is CIFAR100 else r"cifar[-_ ]?10(?!0)", re.IGNORECASE)
    if not folder.is_dir():
        return
    yield folder, True
    for child in _sub_folders(folder):
        is_named = bool(says_cifar.search(child.name))
        yield child, is_named or child.name in ("plain_text", "data")
        if is_named:
            for grandchild in _sub_folders(child):
                yield grandchild, True


def _sub_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _read_cifar_parquet(cifar: Cifar, splits: dict[str, list[Path]]) -> Decoded:
    decoded = read_parquet(splits, 32, class_names=cifar.class_names, resize=False)
    remark = "" if "JPEG" not in decoded.what else " (lossy: not the official pixels)"
    return _describe(cifar, decoded, decoded.what + remark, splits["train"][0].parent)


def _read_unpacked(cifar: Cifar, layout: Layout, folder: Path) -> Decoded:
    members = {}
    for name in (*layout.train, *layout.test, *layout.meta):
        file = folder / name
        if file.is_file():
            if file.stat().st_size > MAX_MEMBER:
                raise InputError(f"{file} is larger than any file of {cifar.title}: fetch it again")
            members[name] = file.read_bytes()
    return _read_members(cifar, layout, members, folder)


def _read_archive(cifar: Cifar, archive: Path) -> Decoded:
    wanted = {name for layout in cifar.layouts for name in (*layout.train, *layout.test, *layout.meta)}
    members: dict[str, bytes] = {}
    try:
        with gzip.open(archive) as unzipped:
            stream = _Bounded(unzipped, archive)
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    _check_member(member, archive)
                    name = PurePosixPath(member.name).name
                    if member.isfile() and name in wanted:
                        if name in members:
                            raise InputError(f"{archive} holds {name!r} twice: fetch it again")
                        file = tar.extractfile(member)
                        data = file.read() if file else b""
                        if len(data) != member.size:
                            raise EOFError(f"{name} ends early")
                        members[name] = data
            while stream.read(1 << 20):  # to the end, where gzip's own checksum is
                pass
    except InputError:
        raise
    except Exception as error:  # tarfile's and zlib's own, but RecursionError too, of headers that call for further headers
        raise InputError(
            f"{archive} is not a whole tar.gz archive ({str(error) or type(error).__name__}): delete it, and fetch it again or "
            "let cifarlab do so"
        ) from error
    for layout in cifar.layouts:
        if any(name in members for name in layout.train):
            decoded = _read_members(cifar, layout, members, archive)
            if archive.name == cifar.layouts[0].archive and archive.stat().st_size == cifar.num_bytes:
                with archive.open("rb") as file:
                    if hashlib.file_digest(file, "md5").hexdigest() == cifar.md5:
                        return _describe(cifar, decoded, "official python archive, MD5 verified", archive)
            return decoded
    raise InputError(f"{archive} holds no files of {cifar.title}: put {cifar.layouts[0].archive} in its place")


class _Bounded(io.RawIOBase):
    """A stream that ends in an InputError after MAX_ARCHIVE bytes: what a compression bomb meets."""

    def __init__(self, stream: gzip.GzipFile, archive: Path) -> None:
        self.stream, self.archive, self.left = stream, archive, MAX_ARCHIVE

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(min(size, 1 << 20) if size >= 0 else 1 << 20)
        self.left -= len(data)
        if self.left < 0:
            raise InputError(f"{self.archive} unpacks to more than {MAX_ARCHIVE >> 30} GiB, more than CIFAR can: fetch it again")
        return data


def _check_member(member: tarfile.TarInfo, archive: Path) -> None:
    """Refuse what no CIFAR archive holds. Nothing is extracted, so it could do no harm; but such a file is not to be trusted."""
    path = PurePosixPath(member.name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", member.name):
        raise InputError(f"{archive} holds {member.name!r}, a path that climbs out of the archive: fetch it from a better place")
    if not (member.isfile() or member.isdir()):
        raise InputError(f"{archive} holds {member.name!r}, a link or device and no plain file: fetch it from a better place")
    if member.size > MAX_MEMBER:
        raise InputError(f"{archive} holds {member.name!r} of {member.size:,} bytes, more than any file of CIFAR: fetch it again")


def _read_members(cifar: Cifar, layout: Layout, members: dict[str, bytes], where: Path) -> Decoded:
    read = _read_binary if layout.is_binary else _read_python
    images: list[NDArray[np.uint8]] = []
    labels: list[dict[str, NDArray[np.int64]]] = []
    for names in (layout.train, layout.test):
        batches = []
        for name in names:
            if name not in members:
                raise InputError(f"{where} lacks {name!r}, a part of {cifar.title}: fetch it again")
            batches.append(read(cifar, members.pop(name), f"{name!r} of {where}"))
        images.append(np.concatenate([batch[0] for batch in batches]).reshape(-1, 3, 32, 32))
        labels.append({kind: np.concatenate([batch[1][kind] for batch in batches]) for kind in cifar.class_names})
    class_names = _read_names(cifar, layout, members, where)
    decoded = Decoded(images[0], images[1], labels[0], labels[1], class_names, "")
    return _describe(cifar, decoded, "binary version" if layout.is_binary else "python version", where)


def _describe(cifar: Cifar, decoded: Decoded, what: str, where: Path) -> Decoded:
    """The same with labels checked, and a line that says whether the number of images is the official one."""
    for split, labels in (("training", decoded.train_labels), ("test", decoded.test_labels)):
        for kind, names in cifar.class_names.items():
            if len(labels[kind]) and not 0 <= labels[kind].min() <= labels[kind].max() < len(names):
                wrong = next(int(label) for label in labels[kind] if not 0 <= label < len(names))
                raise InputError(
                    f"{where} holds the {kind} label {wrong} among its {split} images, but {cifar.title} has 0…{len(names) - 1}: "
                    "fetch it again"
                )
    num_train, num_test = len(decoded.train_images), len(decoded.test_images)
    if (num_train, num_test) != (50_000, 10_000):
        what = f"{what.partition(',')[0]}, a part of it: {num_train:,} train and {num_test:,} test images, not the official file"
    return Decoded(
        decoded.train_images,
        decoded.test_images,
        decoded.train_labels,
        decoded.test_labels,
        decoded.class_names,
        what if what.startswith(cifar.title) else f"{cifar.title}, {what}",
    )


_Batch = tuple[NDArray[np.uint8], dict[str, NDArray[np.int64]]]


def _read_binary(cifar: Cifar, data: bytes, where: str) -> _Batch:
    """Records of one label byte (CIFAR-100: coarse, then fine) and 3,072 pixel bytes: red, green, blue plane."""
    kinds = list(reversed(cifar.class_names))
    record = len(kinds) + PIXELS
    if not data or len(data) % record:
        raise InputError(f"{where} has {len(data):,} bytes, no multiple of {record:,} (labels and a 32×32 image): fetch it again")
    table = np.frombuffer(data, np.uint8).reshape(-1, record)
    return table[:, len(kinds) :], {kind: table[:, column].astype(np.int64) for column, kind in enumerate(kinds)}


def _read_python(cifar: Cifar, data: bytes, where: str) -> _Batch:
    """A pickled dict: b"data" N×3072 uint8, and b"labels" (CIFAR-100: b"fine_labels", b"coarse_labels"), a list of N ints."""
    batch = _unpickle(data, where)
    images = batch.get("data")
    if not isinstance(images, _Array):
        raise InputError(f"{where} holds no array 'data': it is not {cifar.title}'s python version, so fetch it again")
    pixels = images.build(where)
    labels = {}
    for kind in cifar.class_names:
        key = "labels" if cifar is CIFAR10 else f"{kind}_labels"
        values = batch.get(key)
        if not isinstance(values, list) or not all(type(value) is int and abs(value) < 1 << 31 for value in values):
            raise InputError(f"{where} holds no list of whole numbers {key!r}: it is not {cifar.title}'s, so fetch it again")
        if len(values) != len(pixels):
            raise InputError(f"{where} has {len(values):,} {key} for {len(pixels):,} images: fetch it again")
        labels[kind] = np.array(values, np.int64)
    return pixels, labels


def _read_names(cifar: Cifar, layout: Layout, members: dict[str, bytes], where: Path) -> dict[str, tuple[str, ...]]:
    """Class names of the meta files, where they are there; else the known ones."""
    names = dict(cifar.class_names)
    for file in layout.meta:
        if file not in members:
            continue
        if layout.is_binary:
            kind = "coarse" if file.startswith("coarse") else "fine"
            found: dict[str, object] = {kind: members[file].decode("utf-8", "replace").split()}
        else:
            meta = _unpickle(members[file], f"{file!r} of {where}")
            keys = {kind: "label_names" if cifar is CIFAR10 else f"{kind}_label_names" for kind in names}
            found = {kind: meta.get(key) for kind, key in keys.items()}
        for kind, value in found.items():
            texts = [_text(name) for name in value] if isinstance(value, list) else []
            if len(set(texts)) != len(names[kind]) or not all(text and text.isprintable() for text in texts):
                raise InputError(f"{file!r} of {where} does not hold {len(names[kind])} different class names: fetch it again")
            names[kind] = tuple(texts)
    return names


def _text(value: object) -> str:
    """Text of what was a str in Python 2 (bytes here) or 3; "" for anything else."""
    return value.decode("latin1") if isinstance(value, bytes) else value if isinstance(value, str) else ""


def _unpickle(data: bytes, where: str) -> dict[str, Any]:
    """The dict of a CIFAR pickle, keys as text, its arrays as `_Array`."""
    try:
        # The C unpickler keeps its memo in an array as long as the largest index: four bytes of input, 64 GB of memory.
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(data):
                raise ValueError("it wants more memory than its size explains")
        value = _Unpickler(data).load()
    except InputError as error:
        raise InputError(f"{where} is a pickle that {error}: do not use it, fetch it from a better place") from error
    # A damaged pickle raises nearly anything.
    except Exception as error:
        raise InputError(f"{where} is not a whole pickle ({error or type(error).__name__}): fetch it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{where} holds no dict, as CIFAR's files do: fetch it again")
    return {_text(key): content for key, content in value.items()}


class _Unpickler(pickle.Unpickler):
    """Knows the names in CIFAR's files and no others. The stand-ins are new for each file, so none can prepare the next one."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self.left = len(data)

    def _encode(self, text: str, encoding: object) -> bytes:
        self.left -= len(text)
        if self.left < 0:  # one long text, encoded again and again
            raise InputError("makes more bytes than it holds, which CIFAR's files never do")
        return text.encode("latin1")

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return lambda *_: _Array()
        if (module, name) == ("numpy", "ndarray"):
            return "ndarray"  # only ever handed to _reconstruct
        if (module, name) == ("numpy", "dtype"):
            return lambda *arguments: _Dtype(_text(arguments[0]))
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in the old protocols
            return self._encode
        raise InputError(f"asks for {module}.{name}, which CIFAR's files never do")

    def persistent_load(self, pid: object) -> NoReturn:
        raise InputError("asks for an outside object, which CIFAR's files never do")


class _Dtype:
    """Stands in for numpy.dtype: keeps its name."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        pass  # byte order and the like: one byte has none


class _Array:
    """Stands in for numpy.ndarray: keeps the state it is given, until `build` has looked at it."""

    __slots__ = ("state",)

    def __setstate__(self, state: object) -> None:
        self.state = state

    def build(self, where: str) -> NDArray[np.uint8]:
        """The array, uint8, N×3072."""
        match getattr(self, "state", None):
            case (int(), (int(rows), int(columns)), _Dtype(name="u1" | "|u1" | "uint8"), (0 | 1) as is_fortran, bytes(raw)):
                if columns != PIXELS:
                    raise InputError(f"{where} has images of {columns:,} bytes, not {PIXELS:,} (3×32×32): fetch it again")
                if rows < 1 or rows * columns != len(raw):
                    raise InputError(f"{where} has {len(raw):,} bytes for {rows:,} images of {columns:,}: fetch it again")
                return np.frombuffer(raw, np.uint8).reshape((rows, columns), order="F" if is_fortran else "C")
        raise InputError(f"{where} holds no two-dimensional array of bytes, as CIFAR's files do: fetch it again")
