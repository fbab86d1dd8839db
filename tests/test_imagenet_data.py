"""ImageNet's images: folders, odd files, crops, batches over workers and ranks, the ends of processes."""

import contextlib
import io
import itertools
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("torchvision")
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional

from filter_grafting.errors import DataError, GraftingError
from grafting_imagenet import data

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT.parent / "shared" / "data" / "imagenet_sample.tar"
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


def picture(number, width=40, height=30):
    """A smooth RGB picture, another for every number."""
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin((k + 1) * (x / width + number) + 2 * y / height * (k - 1)) for k in range(3)]
    return Image.fromarray(np.stack(waves, 2).astype(np.uint8))


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write(path, contents):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents)
    return str(path)


@pytest.fixture
def folder(tmp_path):
    """Three classes; 17 training and 7 validation images of various sizes, all different."""
    numbers = itertools.count()
    for split, counts in (("train", (8, 5, 4)), ("val", (3, 3, 1))):
        for name, count in zip(("ant", "bee", "cat"), counts, strict=True):
            for k in range(count):
                number = next(numbers)
                image = picture(number, 36 + number, 52 - number)
                write(tmp_path / split / name / f"{k}.jpg", encode(image, "JPEG", quality=95))
    return tmp_path


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """The files of 123 real ImageNet images."""
    if not SAMPLE.exists():
        pytest.skip(f"{SAMPLE} is not there: no real images")
    folder = tmp_path_factory.mktemp("sample")
    with tarfile.open(SAMPLE) as archive:
        archive.extractall(folder, filter="data")
    return ImageFolder(folder / "imagenet_sample").samples


# Folders


def test_a_folder_of_class_folders(folder):
    train, val, classes = data.load(str(folder))
    assert classes == ["ant", "bee", "cat"]
    assert (len(train), len(val)) == (17, 7)
    assert train.paths == [str(path) for path in sorted(folder.glob("train/*/*"))]
    assert train.labels.tolist() == [0] * 8 + [1] * 5 + [2] * 4
    assert val.labels.tolist() == [0] * 3 + [1] * 3 + [2]


def test_the_same_files_as_torchvision(folder):
    write(folder / "train" / "ant" / "more" / "deep" / "x.JPEG", b"")
    write(folder / "train" / "ant" / "notes.txt", b"")
    write(folder / "train" / "bee" / "x.jpeg.part", b"")
    write(folder / "train" / "readme.md", b"")
    train, _, classes = data.load(folder)
    theirs = ImageFolder(folder / "train")
    assert sorted(zip(train.paths, train.labels.tolist(), strict=True)) == sorted(theirs.samples)
    assert classes == theirs.classes


def test_hidden_files_and_folders_are_passed_over(folder):
    write(folder / "train" / ".thumbnails" / "0.jpg", b"")
    write(folder / "train" / "ant" / "._0.jpg", b"")
    train, _, classes = data.load(folder)
    assert len(train) == 17 and classes == ["ant", "bee", "cat"]


def test_a_relative_folder_and_links(folder, monkeypatch, tmp_path):
    os.rename(folder / "train" / "cat", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", folder / "train" / "cat")
    monkeypatch.chdir(folder.parent)
    train, _, _ = data.load(folder.name)
    assert len(train) == 17
    assert data.read_image(train.paths[-1]).shape[0] == 3


def test_test_stands_in_for_val(folder):
    (folder / "val").rename(folder / "test")
    assert len(data.load(folder)[1]) == 7


def remove(path):
    for entry in path.rglob("*"):
        if entry.is_file():
            entry.unlink()
    for entry in sorted(path.rglob("*"), reverse=True):
        entry.rmdir()
    path.rmdir()


def flatten(split):
    for k, path in enumerate(list(split.glob("*/*"))):
        path.rename(split / f"{k}.jpg")
    for path in split.iterdir():
        if path.is_dir():
            path.rmdir()


BAD_FOLDERS = {
    "no train": (lambda f: remove(f / "train"), ["no folder train/", "train/<class>/"]),
    "no val": (lambda f: remove(f / "val"), ["no folder val/", "val/<class>/"]),
    "train is a file": (lambda f: (remove(f / "train"), write(f / "train", b"")), ["no folder train/"]),
    "empty train": (lambda f: (remove(f / "train"), (f / "train").mkdir()), ["train has no class folders"]),
    "flat val": (lambda f: flatten(f / "val"), ["val has images but no class folders", "val/<class>/"]),
    "an empty class": (
        lambda f: (remove(f / "val" / "bee"), (f / "val" / "bee").mkdir()),
        ["val/bee has no image"],
    ),
    "a class without images": (
        lambda f: (remove(f / "train" / "cat"), write(f / "train" / "cat" / "notes.txt", b"")),
        ["train/cat has no image"],
    ),
    "a class only in train": (lambda f: remove(f / "val" / "bee"), ["only train/ has bee"]),
    "a class only in val": (lambda f: write(f / "val" / "dog" / "0.jpg", b""), ["only val/ has dog"]),
    "other classes": (
        lambda f: (
            (f / "val" / "cat").rename(f / "val" / "kat"),
            (f / "train" / "ant").rename(f / "train" / "a"),
        ),
        ["only train/ has a, cat", "only val/ has ant, kat"],
    ),
    "many other classes": (
        lambda f: [write(f / "val" / f"x{k}" / "0.jpg", b"") for k in range(20)],
        ["only val/ has x0, x1, x10 and 17 more"],
    ),
    "a loop of links": (
        lambda f: os.symlink("loop", f / "train" / "loop"),
        ["train/loop cannot be looked into (Too many levels of symbolic links)"],
    ),
    "a name with control codes": (
        lambda f: (f / "val" / "a\x1b[31m\udcff").mkdir(),
        ["a [31m  has no image"],
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_folder_gets_one_sentence(folder, case):
    change, words = BAD_FOLDERS[case]
    change(folder)
    with pytest.raises(DataError) as caught:
        data.load(folder)
    sentence = str(caught.value)
    assert str(folder) in sentence and sentence.isprintable()
    for word in words:
        assert word in sentence


def test_a_folder_that_is_none(folder):
    with pytest.raises(DataError, match="nothing does not exist: give a folder that holds train/"):
        data.load(folder / "nothing")
    with pytest.raises(DataError, match=r"0.jpg is not a folder"):
        data.load(folder / "train" / "ant" / "0.jpg")


def test_a_folder_that_may_not_be_read(folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):  # the tests may run as root, whom no permission stops
        if Path(path).name == "bee":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"train/bee cannot be looked into \(Permission denied\)"):
        data.load(folder)


# Images


def pillow(contents):
    """As torchvision's ImageFolder reads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(np.array(Image.open(io.BytesIO(contents)).convert("RGB"))).permute(2, 0, 1)


def adobe(contents, inverted):
    """A CMYK JPEG of Pillow, which has Adobe's mark and inverted values, with that mark or without it."""
    at = contents.index(b"Adobe") - 4
    length = int.from_bytes(contents[at + 2 : at + 4], "big")
    return contents if inverted else contents[:at] + contents[at + 2 + length :]


def with_orientation():
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned by 90 degrees
    return encode(picture(0), "JPEG", exif=exif)


def animation():
    return encode(picture(0), "GIF", save_all=True, append_images=[picture(1), picture(2)])


def palette_with_transparency():
    image = picture(0).quantize(16)
    return encode(image, "PNG", transparency=bytes(range(16)))


ODD_IMAGES = {
    "grey JPEG": lambda: encode(picture(0).convert("L"), "JPEG"),
    "progressive JPEG": lambda: encode(picture(0), "JPEG", progressive=True),
    "CMYK JPEG by Adobe": lambda: adobe(encode(picture(0).convert("CMYK"), "JPEG"), True),
    "CMYK JPEG": lambda: adobe(encode(picture(0).convert("CMYK"), "JPEG"), False),
    "JPEG with an orientation": with_orientation,
    "JPEG with a tail": lambda: encode(picture(0), "JPEG") + b"more" * 1000,
    "JPEG with damaged EXIF": lambda: encode(picture(0), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"),
    "JPEG of one pixel": lambda: encode(picture(0, 1, 1), "JPEG"),
    "JPEG, very wide": lambda: encode(picture(0, 700, 2), "JPEG"),
    "several JPEGs in one": lambda: encode(picture(0), "MPO", save_all=True, append_images=[picture(1)]),
    "PNG": lambda: encode(picture(0), "PNG"),
    "grey PNG": lambda: encode(picture(0).convert("L"), "PNG"),
    "black and white PNG": lambda: encode(picture(0).convert("1"), "PNG"),
    "palette PNG": lambda: encode(picture(0).quantize(16), "PNG"),
    "palette PNG with transparency": palette_with_transparency,
    "PNG with alpha": lambda: encode(picture(0).convert("RGBA"), "PNG"),
    "grey PNG with alpha": lambda: encode(picture(0).convert("LA"), "PNG"),
    "GIF": lambda: encode(picture(0).quantize(64), "GIF"),
    "animated GIF": animation,
    "WebP": lambda: encode(picture(0), "WEBP"),
    "BMP": lambda: encode(picture(0), "BMP"),
    "TIFF": lambda: encode(picture(0), "TIFF"),
    "CMYK TIFF": lambda: encode(picture(0).convert("CMYK"), "TIFF"),
    "PPM": lambda: encode(picture(0), "PPM"),
}


@pytest.mark.parametrize("kind", ODD_IMAGES)
def test_an_odd_image_is_read_as_torchvision_reads_it(kind, tmp_path):
    contents = ODD_IMAGES[kind]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The image decoding")
        image = data.read_image(write(tmp_path / "x.JPEG", contents))  # whatever the suffix says
    assert image.dtype == torch.uint8
    assert torch.equal(image, pillow(contents))
    for train in (True, False):
        assert data.Prepare(train, 32, 36)(image, "0/0").shape == (3, 32, 32)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_to_8(kind, tmp_path):
    values = np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype(np.uint16)
    image = data.read_image(write(tmp_path / "x.png", encode(Image.fromarray(values), kind)))
    assert torch.equal(image, torch.from_numpy((values >> 8).astype(np.uint8)).expand(3, 30, 40))


def test_without_torchvisions_decoder_pillow_reads_the_same(tmp_path, monkeypatch):
    path = write(tmp_path / "x.jpg", encode(picture(0), "JPEG"))
    image = data.read_image(path)
    monkeypatch.setattr(data, "decode_jpeg", None)
    assert torch.equal(data.read_image(path), image)


JPEG = encode(picture(0), "JPEG")
DAMAGED = {
    "truncated": (JPEG[: len(JPEG) // 2], "runcated"),
    "its last bytes missing": (JPEG[:-20], "runcated"),
    "only its first bytes": (JPEG[:3], "no known format"),
    "empty": (b"", "it is empty"),
    "a text": (b"404 not found\n" * 100, "no known format"),
    "zeros": (bytes(5000), "no known format"),
    "a truncated PNG": (encode(picture(0), "PNG")[:-1000], ""),
    "a PNG with a damaged header": (b"\x89PNG\r\n\x1a\n" + bytes(100), ""),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_is_no_image_is_named(kind, tmp_path):
    contents, words = DAMAGED[kind]
    path = write(tmp_path / "x.jpg", contents)
    with pytest.raises(DataError) as caught:
        data.read_image(path)
    sentence = str(caught.value)
    assert sentence.startswith(f"{path} cannot be read as an image (") and words in sentence
    assert sentence.isprintable() and "0x" not in sentence
    assert isinstance(caught.value, GraftingError)


def test_a_file_that_is_gone_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone.jpg cannot be read as an image \(No such file or directory\)"):
        data.read_image(str(tmp_path / "gone.jpg"))


def test_real_images_are_read_as_torchvision_reads_them(sample):
    for path, _ in sample[::3]:
        assert torch.equal(data.read_image(path), pillow(Path(path).read_bytes()))


# What the network sees


@pytest.mark.parametrize(("height", "width"), [(300, 400), (375, 500), (60, 400), (500, 90), (7, 5)])
def test_windows_equal_torchvisions_in_distribution(height, width):
    torch.manual_seed(0)
    draws = 3000
    image = torch.empty((3, height, width), dtype=torch.uint8)
    crop = transforms.RandomResizedCrop(224)
    theirs = np.array([crop.get_params(image, list(crop.scale), list(crop.ratio)) for _ in range(draws)])
    ours = np.array([data.random_window(height, width, random.Random(f"7/{k}")) for k in range(draws)])
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] > 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()
    # Two samples' empirical distributions of the same thing differ by more than this once in 10,000 times
    # (Kolmogorov and Smirnov).
    bound = math.sqrt(-math.log(1e-4 / 2) / draws)
    for quantity in (
        lambda windows: windows[:, 0],
        lambda windows: windows[:, 1],
        lambda windows: windows[:, 2] * windows[:, 3],
        lambda windows: windows[:, 3] / windows[:, 2],
        lambda windows: windows[:, 0] + windows[:, 2],
    ):
        a, b = np.sort(quantity(ours)), np.sort(quantity(theirs))
        points = np.concatenate([a, b])
        distance = np.abs(np.searchsorted(a, points, "right") - np.searchsorted(b, points, "right")).max() / draws
        assert distance < bound


def test_half_of_all_images_are_mirrored():
    image = torch.arange(64, dtype=torch.uint8).expand(3, 64, 64)
    rows = [data.augment(image, 8, random.Random(f"0/{k}"))[0, 0] for k in range(1000)]
    assert 430 < sum(row[0] > row[-1] for row in rows) < 570  # 4.4 standard deviations


def test_augmented_pixels_equal_torchvisions():
    image = torch.from_numpy(np.array(picture(3, 400, 300))).permute(2, 0, 1)
    for k in range(10):
        ours = data.augment(image, 64, random.Random(f"0/{k}"))
        draw = random.Random(f"0/{k}")
        theirs = functional.resized_crop(image, *data.random_window(300, 400, draw), [64, 64])
        theirs = theirs.flip(-1) if draw.random() < 0.5 else theirs
        assert (ours.int() - theirs.int()).abs().max() <= 1


SIZES = [(400, 300), (300, 401), (256, 256), (224, 900), (31, 33), (1, 5), (500, 375)]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_validation_pixels_equal_torchvisions(width, height):
    image = picture(5, width, height)
    ours = data.central(torch.from_numpy(np.array(image)).permute(2, 0, 1), 56, 64)
    pipeline = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(56)])
    for theirs in (
        pipeline(torch.from_numpy(np.array(image)).permute(2, 0, 1)),
        torch.from_numpy(np.array(pipeline(image))).permute(2, 0, 1),
    ):
        assert ours.shape == theirs.shape
        assert (ours.int() - theirs.int()).abs().max() <= 1


def test_normalise_equals_torchvisions():
    images = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours = data.normalise(images)
    theirs = transforms.Normalize(data.MEAN, data.STD)(images.permute(0, 3, 1, 2) / 255)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert ours.dtype == torch.float32 and ours.is_contiguous(memory_format=torch.channels_last)


def test_real_validation_batches_equal_the_usual_pipeline(sample):
    steps = [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()]
    pipeline = transforms.Compose([*steps, transforms.Normalize(data.MEAN, data.STD)])
    part = sample[:16]
    files = data.Files([path for path, _ in part], torch.tensor([label for _, label in part]))
    (images, labels), *rest = data.Batches(files, 16, "cpu", train=False).epoch(0)
    assert not rest and torch.equal(labels, files.labels)
    theirs = torch.stack([pipeline(Image.open(path).convert("RGB")) for path in files.paths])
    level = 1 / (255 * min(data.STD))  # of 256
    assert (images - theirs).abs().max() < 1.01 * level
    assert (images - theirs).abs().mean() < 0.01 * level


# Batches


def batches(folder, train=True, batch_size=4, **options):
    files = data.load(folder)[0 if train else 1]
    return data.Batches(files, batch_size, "cpu", train=train, image_size=32, **options)


def epoch(batches, seed=0):
    return [(images.clone(), labels.clone()) for images, labels in batches.epoch(seed)]


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for (images, labels), (their_images, their_labels) in zip(ours, theirs, strict=True):
        assert torch.equal(images, their_images) and torch.equal(labels, their_labels)


def test_a_batch(folder):
    made = batches(folder)
    assert made.samples == 17 and len(made) == 4
    for images, labels in made.epoch(0):
        assert images.dtype == torch.float32 and images.shape[1:] == (3, 32, 32)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64 and labels.shape == images.shape[:1]
    # A batch of one image has no statistics for batch norm.
    assert [len(labels) for _, labels in made.epoch(0)] == [4, 4, 4, 4]
    assert [len(labels) for _, labels in batches(folder, batch_size=5).epoch(0)] == [5, 5, 5, 2]
    assert [len(labels) for _, labels in batches(folder, batch_size=1).epoch(0)] == [1] * 17
    assert [len(labels) for _, labels in batches(folder, batch_size=6, world_size=3).epoch(0)] == [2, 2]


def test_training_batches_show_every_image_once_with_its_label(folder):
    made = batches(folder, batch_size=5)
    made._loader.prepare = data.Prepare(False, 32, 36)  # without augmentation an image shows which one it is
    shown = {}
    for images, labels in made.epoch(3):
        shown |= dict(zip([image.numpy().tobytes() for image in images], labels.tolist(), strict=True))
    files = made.files
    plain = data.Batches(files, len(files), "cpu", train=False, image_size=32)
    ((images, labels),) = plain.epoch(0)
    everything = zip([image.numpy().tobytes() for image in images], labels.tolist(), strict=True)
    assert len(shown) == len(files) and shown == dict(everything)


def test_an_epoch_is_a_function_of_its_seed(folder):
    made = batches(folder)
    first = epoch(made, 5)
    assert not torch.equal(first[0][0], epoch(made, 6)[0][0])
    assert_equal(epoch(made, 5), first)


def test_the_same_image_is_augmented_anew_at_every_place(tmp_path):
    path = write(tmp_path / "x.jpg", encode(picture(0), "JPEG"))
    files = data.Files([path] * 8, torch.zeros(8, dtype=torch.int64))
    made = data.Batches(files, 4, "cpu", train=True, image_size=32)
    images = torch.cat([images for seed in (0, 1) for images, _ in made.epoch(seed)])
    assert len({image.mean().item() for image in images}) == 16


@pytest.mark.parametrize("train", [True, False])
def test_the_number_of_workers_changes_nothing(folder, train):
    expected = epoch(batches(folder, train), 2)
    for workers in (1, 2, 9):
        made = batches(folder, train, workers=workers)
        for _ in range(2):
            assert_equal(epoch(made, 2), expected)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_train_on_equal_parts_of_the_same_batches(folder, ranks):
    whole = epoch(batches(folder, batch_size=6), 4)
    parts = [batches(folder, batch_size=6, rank=rank, world_size=ranks) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    assert [len(labels) for _, labels in whole] == [6, 6, 5]
    if ranks == 3:
        whole.pop()  # for which each rank would have one image
    for (images, labels), *shares in zip(whole, *(epoch(part, 4) for part in parts), strict=True):
        size = len(labels) // ranks
        assert [len(share[1]) for share in shares] == [size] * ranks
        for rank, (their_images, their_labels) in enumerate(shares):
            assert torch.equal(their_images, images[: size * ranks][rank::ranks])
            assert torch.equal(their_labels, labels[: size * ranks][rank::ranks])


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_evaluate_every_image_once(folder, ranks):
    whole = torch.cat([images for images, _ in batches(folder, False).epoch(0)])
    made = [batches(folder, False, batch_size=ranks * 2, rank=rank, world_size=ranks) for rank in range(ranks)]
    shares = [epoch(share) for share in made]
    assert [len(share) for share in shares] == [len(share) for share in made]
    for rank, share in enumerate(shares):
        seen = torch.cat([images for images, _ in share]) if share else whole[:0]
        assert torch.equal(seen, whole[rank::ranks])


def test_validation_comes_in_order(folder):
    made = batches(folder, False)
    assert torch.cat([labels for _, labels in made.epoch(0)]).tolist() == made.files.labels.tolist()
    assert [len(labels) for _, labels in made.epoch(0)] == [4, 3]


def test_arguments_that_do_not_go_together(folder):
    with pytest.raises(DataError, match="a batch of 4 images cannot be shared equally by 3 processes"):
        batches(folder, batch_size=4, world_size=3)
    with pytest.raises(DataError, match="17 training images cannot be shared by 20 processes"):
        batches(folder, batch_size=20, world_size=20)
    with pytest.raises(DataError, match="images resized to 31 pixels have no centre of 32"):
        batches(folder, resize=31)
    with pytest.raises(DataError, match="--decode gpu needs a network that trains on CUDA"):
        batches(folder, decode="gpu")


def test_a_broken_off_epoch_leaves_nothing_behind(folder):
    expected = epoch(batches(folder), 1)
    made = batches(folder, workers=2)
    next(made.epoch(0))
    assert_equal(epoch(made, 1), expected)


# Files that cannot be read


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("train", [True, False])
def test_an_unreadable_file_ends_the_epoch_with_its_name(folder, train, workers):
    path = write(folder / ("train" if train else "val") / "bee" / "1.jpg", b"nothing")
    made = batches(folder, train, workers=workers)
    with pytest.raises(DataError) as caught:
        epoch(made)
    assert str(caught.value).startswith(f"{path} cannot be read as an image") and "--skip_bad" in str(caught.value)
    write(Path(path), encode(picture(0), "JPEG"))
    assert len(epoch(made)) == len(made)


def test_skipped_files_are_replaced_in_training(folder):
    order = torch.randperm(17, generator=torch.Generator().manual_seed(1)).tolist()
    clean = batches(folder)
    bad = [clean.files.paths[order[place]] for place in (2, 3, 15, 16)]
    said = []
    for path in bad:
        Path(path).write_bytes(b"")
    whole = epoch(batches(folder, skip_bad=True, say=said.append), 1)
    assert [len(labels) for _, labels in whole] == [4, 4, 4, 4]
    assert len(said) == 4 and all("it is empty" in line for line in said)
    assert all(any(path in line for line in said) for path in bad)
    labels = torch.cat([labels for _, labels in whole]).tolist()
    expected = [int(clean.files.labels[order[{2: 4, 3: 4, 15: 0}.get(place, place)]]) for place in range(16)]
    assert labels == expected
    # The same whoever loads it, and an epoch later nothing is said again.
    made = batches(folder, skip_bad=True, workers=2, say=said.append)
    assert_equal(epoch(made, 1), whole)
    assert len(made.bad) == 4 and len(said) == 8
    assert_equal(epoch(made, 1), whole)
    assert len(said) == 8
    for rank in range(2):
        part = epoch(batches(folder, skip_bad=True, rank=rank, world_size=2, say=said.append), 1)
        assert [len(labels) for _, labels in part] == [2, 2, 2, 2]
        for (images, labels), (all_images, all_labels) in zip(part, whole, strict=False):
            assert torch.equal(images, all_images[rank::2]) and torch.equal(labels, all_labels[rank::2])


def test_skipped_files_are_left_out_in_validation(folder):
    whole = torch.cat([images for images, _ in batches(folder, False).epoch(0)])
    for name in ("ant/1.jpg", "cat/0.jpg"):
        write(folder / "val" / name, JPEG[:100])
    made = batches(folder, False, batch_size=2, skip_bad=True, say=lambda line: None)
    shown = epoch(made)
    assert [len(labels) for _, labels in shown] == [1, 2, 2]  # the last batch had but one image
    assert torch.equal(torch.cat([images for images, _ in shown]), whole[[0, 2, 3, 4, 5]])
    assert torch.cat([labels for _, labels in shown]).tolist() == [0, 0, 1, 1, 1]
    assert sorted(Path(path).name for path in made.bad) == ["0.jpg", "1.jpg"]


@pytest.mark.parametrize(("train", "count"), [(True, "11 of 17"), (False, "7 of 7")])
def test_files_that_are_too_many_to_skip(folder, train, count):
    made = batches(folder, train, skip_bad=True, say=lambda line: None)
    for path in made.files.paths:
        Path(path).unlink()
    with pytest.raises(DataError, match=f"{count} images cannot be read, too many to leave out"):
        epoch(made)


# Processes


def test_a_worker_that_is_killed_ends_the_epoch_with_a_sentence(folder):
    before = set(multiprocessing.active_children())
    made = batches(folder, workers=2)
    expected = epoch(made)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    os.kill(next(iter(workers)).pid, signal.SIGKILL)
    with pytest.raises(DataError, match="the processes that load images have ended before their time"):
        epoch(made)
    assert_equal(epoch(made), expected)  # with new ones
    del made
    deadline = time.monotonic() + 10
    while set(multiprocessing.active_children()) - before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not set(multiprocessing.active_children()) - before


MAIN = f"""
import signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from grafting_imagenet import data

def main(folder, epochs):
    received = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: received.append(number))
    train = data.load(folder)[0]
    made = data.Batches(train, 4, "cpu", train=True, image_size=32, workers=2)
    for seed in range(int(epochs)):
        for images, labels in made.epoch(seed):
            time.sleep(0.01)
        print(seed, len(received), flush=True)
    next(made.epoch(0))  # and it ends while its workers are busy

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


@pytest.fixture
def start(folder):
    """Starts a main process with two workers, in a process group of its own; waits for its first epoch."""
    script = folder / "main.py"
    script.write_text(MAIN)
    started = []

    def start(epochs):
        command = [sys.executable, script, folder, str(epochs)]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout.readline() == "0 0\n"
        return process

    yield start
    for process in started:
        process.kill()


def alive(group):
    """The processes of a group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, _, members = path.read_text().rpartition(")")[2].split()[:3]
            if int(members) == group and state != "Z":
                found.append(path.parent.name)
    return found


def wait_until_none_is_alive(group):
    deadline = time.monotonic() + 20
    while alive(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive(group) == []


def test_workers_outlive_signals_to_the_group_but_not_their_main_process(start):
    process = start(epochs=10**9)
    assert len(alive(process.pid)) >= 4  # itself, two workers, the fork server
    for number in (signal.SIGINT, signal.SIGTERM):
        os.killpg(process.pid, number)
    assert any(process.stdout.readline().endswith(" 2\n") for _ in range(100))
    assert process.stdout.readline().endswith(" 2\n")  # a whole epoch after the signals
    process.kill()
    wait_until_none_is_alive(process.pid)
    assert all(line.endswith(" 2\n") for line in process.stdout)  # no word from any of them


@pytest.mark.slow
def test_workers_end_with_a_main_process_that_ends_in_the_middle_of_an_epoch(start):
    process = start(epochs=1)
    assert process.wait(20) == 0
    assert process.stdout.read() == ""
    wait_until_none_is_alive(process.pid)


# nvJPEG


def test_the_way_by_nvjpeg_makes_the_same_batches(folder, monkeypatch):
    """All of it but the decoder itself: torchvision's on the CPU stands in for it, and also fails all at once."""

    def decode_jpegs(self, files):
        with contextlib.suppress(RuntimeError):
            return [data.decode_jpeg(file, data.ImageReadMode.RGB) for file in files]
        return []

    monkeypatch.setattr(data, "_start_nvjpeg", lambda device: None)
    monkeypatch.setattr(data._GPU, "_decode_jpegs", decode_jpegs)
    write(folder / "train" / "bee" / "0.jpg", encode(picture(1), "PNG"))
    expected = epoch(batches(folder), 1)
    assert_equal(epoch(batches(folder, decode="gpu", workers=2), 1), expected)
    write(folder / "train" / "bee" / "1.jpg", JPEG[:100])
    made = batches(folder, decode="gpu", skip_bad=True, say=lambda line: None)
    assert_equal(epoch(made, 1), epoch(batches(folder, skip_bad=True, say=lambda line: None), 1))
    assert len(made.bad) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nvjpeg_and_the_cpu_agree(sample):
    files = data.Files([path for path, _ in sample], torch.tensor([label for _, label in sample]))
    for train in (True, False):
        made = [
            data.Batches(files, 16, "cuda", train=train, decode=decode, workers=2).epoch(1) for decode in ("cpu", "gpu")
        ]
        for (images, labels), (their_images, their_labels) in zip(*made, strict=True):
            assert images.is_cuda and torch.equal(labels, their_labels)
            assert (images - their_images).abs().mean() < 0.05
