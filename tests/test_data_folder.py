"""Folders of images and of parquet files, digits, and the choice of images: what is accepted, how it is converted."""

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cifarlab.config import InputError
from cifarlab.data import Dataset, load_dataset
from cifarlab.data.dataset import balanced_subset, hold_out, measure_statistics
from cifarlab.data.folder import natural_order, read_image
from cifarlab.data.inspect import count_classes, draw_contact_sheet, find_duplicates

REAL = Path(os.environ.get("CIFARLAB_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFARLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CIFARLAB_DATA", raising=False)


def colour(seed: int, size: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def image_folder(root: Path, classes: tuple[str, ...] = ("class10", "class2"), test: str = "test", size: int = 32) -> Path:
    for split, offset in (("train", 0), (test, 100)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for index in range(3):
                colour(offset + 10 * label + index, size).save(root / split / name / f"{index}.png")
    return root


@pytest.mark.parametrize("test_name", ["test", "val", "valid", "validation"])
def test_image_folder(test_name: str, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "mine", test=test_name)
    (root / "train" / "class2" / ".DS_Store").write_bytes(b"x")
    (root / "train" / "class2" / "Thumbs.db").write_bytes(b"x")
    (root / "train" / ".hidden").mkdir()
    dataset = load_dataset(root, progress=False)
    assert dataset.class_names == ("class2", "class10")  # natural order
    assert dataset.name == "mine"
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    expected = np.stack([np.asarray(colour(seed)).transpose(2, 0, 1) for seed in (10, 11, 12, 0, 1, 2)])
    np.testing.assert_array_equal(dataset.train.images, expected)  # of the right size: untouched
    np.testing.assert_allclose(dataset.mean, (expected / 255).mean((0, 2, 3)))
    np.testing.assert_allclose(dataset.std, (expected / 255).std((0, 2, 3)))


def test_changed_folder_is_read_again(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "mine")
    first = load_dataset(root, progress=False)
    colour(999).save(root / "train" / "class2" / "0.png")
    changed = load_dataset(root, progress=False)
    assert changed.fingerprint != first.fingerprint
    np.testing.assert_array_equal(changed.train.images[0], np.asarray(colour(999)).transpose(2, 0, 1))
    for split in ("train", "test"):
        (root / split / "class2").rename(root / split / "class3")
    assert load_dataset(root, progress=False).class_names == ("class3", "class10")
    (root / "test").rename(root / "val")
    assert load_dataset(root, progress=False).train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert load_dataset(root, image_size=16, progress=False).train.images.shape == (6, 3, 16, 16)


def bomb_png(path: Path) -> None:
    """A PNG header that announces 100,000 × 100,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b""))


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no test": (lambda root: (root / "test").rename(root / "elsewhere"), "no folder test"),
    "class missing in test": (lambda root: (root / "test" / "class2").rename(root / "x"), r"'class2' has no folder in .*test"),
    "class missing in train": (lambda root: (root / "train" / "class2").rename(root / "x"), r"'class2' has no folder in .*train"),
    "empty class": (lambda root: [file.unlink() for file in (root / "train" / "class2").iterdir()], "holds no image"),
    "text file": (lambda root: (root / "train" / "class2" / "notes.txt").write_text("hello"), r"notes.txt is not an image"),
    "truncated image": (lambda root: os.truncate(root / "test" / "class2" / "1.png", 900), r"class2/1.png is a damaged image"),
    "empty image": (lambda root: os.truncate(root / "test" / "class2" / "1.png", 0), r"1.png is not an image"),
    "bomb": (lambda root: bomb_png(root / "train" / "class2" / "1.png"), r"1.png has .*pixels.*make it smaller"),
    "sub-folder": (lambda root: (root / "train" / "class2" / "more").mkdir(), "more is not a file"),
    "file beside classes": (lambda root: (root / "train" / "readme").write_text("x"), "belong"),
    "link out": (lambda root: (root / "train" / "class2" / "l.png").symlink_to("/etc/passwd"), "leads out of"),
    "dangling link": (lambda root: (root / "train" / "class2" / "l.png").symlink_to(root / "gone"), "is not a file"),
    "PostScript": (lambda root: (root / "train" / "class2" / "a.eps").write_bytes(POSTSCRIPT), "not an image"),
    "float": (lambda root: Image.new("F", (32, 32), 0.5).save(root / "test" / "class2" / "f.tiff"), "floating-point"),
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_bad_folders_are_refused_with_one_sentence(kind: str, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "mine")
    change, message = BAD_FOLDERS[kind]
    change(root)
    with pytest.raises(InputError, match=message) as caught:
        load_dataset(root, progress=False)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.npy"))


def test_one_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two or more"):
        load_dataset(image_folder(tmp_path, ("only",)), progress=False)


def test_a_grey_constant_folder_has_no_statistics(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "mine")
    for file in root.rglob("*.png"):
        Image.new("RGB", (32, 32), (9, 9, 9)).save(file)
    with pytest.raises(InputError, match="the same in all training images"):
        load_dataset(root, progress=False)
    assert load_dataset(root, statistics="imagenet", progress=False).mean == (0.485, 0.456, 0.406)


def test_natural_order() -> None:
    names = ["b", "a10", "a9", "A9", "10", "9", "ü", "a"]
    assert sorted(names, key=natural_order) == ["9", "10", "a", "A9", "a9", "a10", "b", "ü"]


def save(image: Image.Image, path: Path, **options: object) -> np.ndarray:
    image.save(path, **options)  # type: ignore[arg-type]
    return read_image(path, image.width).transpose(1, 2, 0)


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    three = np.repeat(grey[..., None], 3, 2)
    np.testing.assert_array_equal(save(Image.fromarray(grey), tmp_path / "l.png"), three)
    np.testing.assert_array_equal(save(Image.fromarray(grey), tmp_path / "l.bmp"), three)
    np.testing.assert_array_equal(save(Image.fromarray(grey), tmp_path / "l.webp", lossless=True), three)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    np.testing.assert_array_equal(save(deep, tmp_path / "16.png"), three)  # 65535 becomes 255, not "clipped to white"
    np.testing.assert_array_equal(save(deep, tmp_path / "16.tiff"), three)
    bits = Image.fromarray(grey > 99)
    np.testing.assert_array_equal(save(bits, tmp_path / "1.png")[..., 0], np.where(grey > 99, 255, 0))
    palette = colour(0, 16).quantize(20)
    np.testing.assert_array_equal(save(palette, tmp_path / "p.png"), np.asarray(palette.convert("RGB")))
    np.testing.assert_array_equal(save(palette, tmp_path / "p.gif"), np.asarray(palette.convert("RGB")))
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert save(cmyk, tmp_path / "c.tiff")[0, 0].tolist() == [255, 0, 0]


def test_transparency_shows_white(tmp_path: Path) -> None:
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[:, 8:, 3] = 255
    pixels = save(Image.fromarray(rgba), tmp_path / "a.png")
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 15].tolist() == [0, 0, 0]
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.paste(0, (0, 0, 8, 16))
    pixels = save(palette, tmp_path / "p.png", transparency=0)
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 15].tolist() == [40, 50, 60]
    half = Image.new("LA", (16, 16), (0, 128))
    assert save(half, tmp_path / "la.png")[0, 0].tolist() == [127, 127, 127]


def test_exif_orientation_is_honoured(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 16))
    image.paste((255, 0, 0), (0, 0, 16, 8))  # red above
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned a quarter clockwise, so red is on the right
    pixels = save(image, tmp_path / "e.png", exif=exif)
    assert pixels[8, 15].tolist() == [255, 0, 0]
    assert pixels[8, 0].tolist() == [0, 0, 0]


def test_resize_is_lanczos_of_the_whole_picture(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    expected = np.asarray(image.resize((24, 24), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 24), expected)


def parquet_folder(
    root: Path, *, size: int = 32, image: str = "img", names: list[str] | None = None, shards: int = 1, **labels: list[object]
) -> Path:
    """8 train and 8 test images; without `labels` the column label holds 0 and 1 in turn."""
    import io

    root.mkdir(parents=True, exist_ok=True)
    labels = labels or {"label": [0, 1] * 4}
    for split, offset in (("train", 0), ("test", 50)):
        rows = []
        for seed in range(8):
            buffer = io.BytesIO()
            colour(offset + seed, size).save(buffer, "PNG")
            rows.append({"bytes": buffer.getvalue(), "path": None})
        table = pa.table({image: rows, **labels})
        if names:
            features = {"label": {"names": names, "_type": "ClassLabel"}}
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        for part in range(shards):
            rows_each = 8 // shards
            pq.write_table(table.slice(part * rows_each, rows_each), root / f"{split}-{part:05}-of-{shards:05}.parquet")
    return root


def test_parquet_folder_with_names_and_shards(tmp_path: Path) -> None:
    dataset = load_dataset(parquet_folder(tmp_path / "mine", names=["cat", "dog"], shards=2), progress=False)
    assert dataset.class_names == ("cat", "dog")
    assert dataset.train.labels.tolist() == [0, 1] * 4
    np.testing.assert_array_equal(dataset.test.images[7], np.asarray(colour(57)).transpose(2, 0, 1))
    (tmp_path / "mine" / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(InputError, match="1 of the 2 parts"):
        load_dataset(tmp_path / "mine", progress=False)


def test_parquet_without_names_or_with_words(tmp_path: Path) -> None:
    plain = load_dataset(parquet_folder(tmp_path / "a", image="image", size=40), image_size=16, progress=False)
    assert plain.class_names == ("0", "1")
    assert plain.train.images.shape == (8, 3, 16, 16)
    words = load_dataset(parquet_folder(tmp_path / "b", label=["b10", "b9"] * 4), progress=False)
    assert words.class_names == ("b9", "b10")
    assert words.train.labels.tolist() == [1, 0] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": "picture"}, "rename two of them to image and label"),
        ({"target": [0] * 8}, "rename two of them to image and label"),
        ({"label": [0, -1] * 4}, "holds the label -1"),
        ({"label": [0, None] * 4}, "holds the label None"),
        ({"label": [0, 2] * 4}, "no image of class '1'"),
        ({"names": ["a", "b", "c"]}, "no image of class 'c'"),
        ({"names": ["a"]}, "label 1 in train, but 1 classes"),
    ],
)
def test_bad_parquet_is_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    root = parquet_folder(tmp_path / "mine", **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        load_dataset(root, progress=False)


def test_torn_parquet_and_rows_are_refused(tmp_path: Path) -> None:
    root = parquet_folder(tmp_path / "mine")
    file = root / "train-00000-of-00001.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:-30])
    with pytest.raises(InputError, match="is not a sound parquet file"):
        load_dataset(root, progress=False)
    for rows, message in (([None] * 8, "row 0 .*has no image bytes"), ([b"junk"] * 8, "row 0 of .*train.*is not an image")):
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table({"img": pa.array([{"bytes": row, "path": "x.png"} for row in rows], kind), "label": [0, 1] * 4})
        pq.write_table(table, file)
        with pytest.raises(InputError, match=message):
            load_dataset(root, progress=False)


def test_cifar_parquet_must_be_32_by_32_and_have_all_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet_folder(tmp_path / "cifar10" / "plain_text", size=31)
    with pytest.raises(InputError, match=r"row 0 of .* is 31×31, not 32×32"):
        load_dataset("cifar10", data_dir=tmp_path, progress=False)
    parquet_folder(tmp_path / "cifar10" / "plain_text", size=32)
    with pytest.raises(InputError, match="no image of class 'bird'"):
        load_dataset("cifar10", data_dir=tmp_path, progress=False)
    parquet_folder(tmp_path / "cifar10" / "plain_text", size=32, names=["cat", "dog"])
    with pytest.raises(InputError, match="names 2 classes, not 10"):
        load_dataset("cifar10", data_dir=tmp_path, progress=False)


def test_cifar100_parquet_is_not_taken_for_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cifarlab.data.cifar import CIFARS, find_cifar

    labels: dict[str, list[object]] = {"fine_label": [0] * 8, "coarse_label": [0] * 8}
    parquet_folder(tmp_path, **labels)
    assert find_cifar(CIFARS["cifar10"], tmp_path) is None
    assert find_cifar(CIFARS["cifar100"], tmp_path) is not None
    parquet_folder(tmp_path / "other" / "mnist")
    assert find_cifar(CIFARS["cifar10"], tmp_path / "other") is None


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIFARLAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        return load_dataset("digits")


def test_digits_facts(digits: Dataset) -> None:
    from sklearn.datasets import load_digits

    raw = load_digits()
    assert digits.train.images.shape == (1437, 3, 32, 32)
    assert digits.test.images.shape == (360, 3, 32, 32)
    assert digits.class_names == tuple("0123456789")
    np.testing.assert_array_equal(np.concatenate([digits.train.labels, digits.test.labels]), raw.target)
    assert (digits.train.images[:, 0] == digits.train.images[:, 2]).all()
    assert (digits.train.images.min(), digits.train.images.max()) == (0, 255)
    blocks = digits.train.images[:, 0].reshape(-1, 8, 4, 8, 4).mean((2, 4))  # back to 8×8: blurred, but the same picture
    assert np.corrcoef(blocks.ravel(), raw.images[:1437].ravel())[0, 1] > 0.97
    assert load_dataset("digits", image_size=16).train.images.shape[2:] == (16, 16)


def test_hold_out_takes_each_class_alike() -> None:
    labels = np.repeat([0, 1, 2, 3], [100, 50, 3, 1])
    train, val = hold_out(labels, 0.1, seed=3)
    assert np.bincount(labels[val], minlength=4).tolist() == [10, 5, 1, 0]  # small classes give one, but never their last
    assert sorted([*train, *val]) == list(range(154))
    assert (np.diff(train) > 0).all()
    np.testing.assert_array_equal(hold_out(labels, 0.1, seed=3)[1], val)
    assert not np.array_equal(hold_out(labels, 0.1, seed=4)[1], val)
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="val_fraction"):
            hold_out(labels, fraction, 0)


def test_balanced_subset_fills_small_classes_first() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [100, 50, 4]))
    chosen = balanced_subset(labels, 65, seed=1)
    assert len(set(chosen.tolist())) == 65
    counts = np.bincount(labels[chosen])
    assert counts[2] == 4
    assert sorted(counts[:2].tolist()) == [30, 31]
    np.testing.assert_array_equal(balanced_subset(labels, 65, seed=1), chosen)
    assert not np.array_equal(balanced_subset(labels, 65, seed=2), chosen)
    assert balanced_subset(labels, 154, 0).tolist() == list(range(154))
    for count in (0, 155):
        with pytest.raises(InputError, match="train_images"):
            balanced_subset(labels, count, 0)


def test_inspection_finds_planted_duplicates(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "mine", ("a", "b"))
    colour(0).save(root / "train" / "a" / "copy.png")  # in train twice, same label
    colour(100).save(root / "train" / "b" / "leak.png")  # of test/a/0.png, another label
    dataset = load_dataset(root, progress=False)
    found = find_duplicates(dataset)
    assert len(found.groups) == 2
    assert (found.within("train"), found.within("test"), found.across) == (1, 0, 1)
    ((first, second),) = found.conflicts
    assert (first[0], first[2], second) == ("train", 1, ("test", 0, 0))
    assert {name: counts.tolist() for name, counts in count_classes(dataset).items()} == {"train": [4, 4], "test": [3, 3]}


def test_contact_sheet_shows_the_images(digits: Dataset, tmp_path: Path) -> None:
    path = draw_contact_sheet(digits, tmp_path / "new" / "sheet.png", per_class=4)
    sheet = np.asarray(Image.open(path).convert("L")).astype(int)
    first_zero = digits.train.images[np.flatnonzero(digits.train.labels == 0)[0], 0]
    enlarged = np.kron(first_zero, np.ones((2, 2), np.uint8))
    windows = np.lib.stride_tricks.sliding_window_view(sheet, (64, 64))
    assert any((windows[y] == enlarged).all((1, 2)).any() for y in range(30, 60))
    with pytest.raises(InputError, match="cannot be written"):
        draw_contact_sheet(digits, path / "below-a-file.png")


@pytest.mark.skipif(not REAL.is_dir(), reason="no real data: set CIFARLAB_TEST_DATA to its folder")
def test_real_parquet_test_split(tmp_path: Path) -> None:
    """The first 2,000 test images as both splits (the whole set takes longer than a test may)."""
    table = pq.read_table(REAL / "cifar10-jpeg" / "test-00000-of-00001.parquet").slice(0, 2000)
    for split in ("train", "test"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    dataset = load_dataset("cifar10", data_dir=tmp_path, progress=False)
    assert dataset.test.labels[:8].tolist() == [3, 8, 8, 0, 6, 6, 1, 6]  # CIFAR-10's published order: cat, ship, ship, airplane…
    assert find_duplicates(dataset).across == 2000
    assert "2,000 train" in dataset.source
    mean, std = measure_statistics(dataset.train.images)
    np.testing.assert_allclose(mean, dataset.mean, atol=0.01)  # near the published ones: the channels are in order
    np.testing.assert_allclose(std, dataset.std, atol=0.01)
