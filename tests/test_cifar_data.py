"""CIFAR's images: every source, the cache that processes share, and the augmentation."""

import contextlib
import itertools
import multiprocessing
import os
import shutil
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import datasets

from grafting_cifar import data, glyphs
from grafting_cifar.data import Batches, DataError, Images, Split, crop_and_flip, load, select
from training.process import UsageError


@pytest.fixture(autouse=True)
def user_cache(tmp_path_factory, monkeypatch):
    """No test reads or leaves a cache in the home folder of whoever runs it."""
    folder = tmp_path_factory.mktemp("user_cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def picture(seed=0, size=(32, 32)):
    return Image.fromarray(np.random.default_rng(seed).integers(256, size=(*size[::-1], 3), dtype=np.uint8))


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


@pytest.fixture
def folder(tmp_path):
    """A class folder: two classes, three different images of each for training and two for testing."""
    numbers = itertools.count()
    for split, count in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            for k in range(count):
                save(picture(next(numbers)), tmp_path / split / name / f"{k}.png")
    return tmp_path


def caches(folder):
    return list((folder / ".grafting_cache").glob("*.pt"))


@pytest.fixture
def decoded(monkeypatch):
    """The files that were decoded, and not taken from a cache."""
    paths = []
    read = data.read_image
    monkeypatch.setattr(data, "read_image", lambda path: paths.append(path) or read(path))
    return paths


def uint8(images):
    """The way back from normalised images: uint8 (n, h, w, 3)."""
    values = images.permute(0, 2, 3, 1) * torch.tensor(data.STD) + torch.tensor(data.MEAN)
    return (values * 255).round().to(torch.uint8)


# ---- Augmentation


def test_crop_and_flip_is_exact_at_every_offset():
    images = torch.randint(256, (162, 32, 32, 3), dtype=torch.uint8)
    dy, dx, flip = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2)).unbind(1)
    actual = crop_and_flip(images, dy, dx, flip.bool())
    padded = F.pad(images.permute(0, 3, 1, 2), (4, 4, 4, 4))
    for k, (y, x, mirrored) in enumerate(zip(dy.tolist(), dx.tolist(), flip.tolist(), strict=True)):
        expected = padded[k, :, y : y + 32, x : x + 32]
        assert torch.equal(actual[k].permute(2, 0, 1), expected.flip(2) if mirrored else expected)


# ---- Batches


@pytest.fixture
def split():
    generator = torch.Generator().manual_seed(0)
    return Split(torch.randint(256, (50, 32, 32, 3), generator=generator, dtype=torch.uint8), torch.arange(50))


def test_order_crops_and_flips_follow_from_the_seed_and_stay_what_they_are(split):
    state = torch.get_rng_state()
    images, labels = map(torch.cat, zip(*Batches(split, 16, "cpu", augment=True).epoch(7), strict=True))
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn from the network's generator"
    assert labels[:10].tolist() == [15, 7, 27, 19, 5, 47, 17, 3, 18, 41]
    assert zlib.crc32(uint8(images).contiguous().numpy()) == 0x3ED35683, "runs are no longer comparable with older ones"


@pytest.mark.parametrize("augment", [True, False])
def test_every_image_comes_once_in_batches_that_are_whole_but_the_last(split, augment):
    batches = Batches(split, 16, "cpu", augment)
    assert (len(batches), batches.samples) == (4, 50)
    epoch = list(batches.epoch(0))
    assert [len(labels) for _, labels in epoch] == [16, 16, 16, 2]
    for images, labels in epoch:
        assert images.shape == (len(labels), 3, 32, 32) and labels.dtype == torch.int64
        assert images.dtype == torch.float32 and images.is_contiguous(memory_format=torch.channels_last)
    images, labels = map(torch.cat, zip(*epoch, strict=True))
    assert torch.equal(labels.sort().values if augment else labels, split.labels)
    assert augment or torch.equal(uint8(images), split.images)


# ---- Which of them


def test_selected_images_are_the_same_for_everyone(split):
    images = Images(split, None, split, [str(k) for k in range(50)], [])
    chosen = select(images, 5, 3, 4)
    assert [part.labels.tolist() for part in chosen[:3]] == [[13, 25, 26, 37, 41], [3, 8, 32], [13, 25, 26, 37]]
    assert all(torch.equal(part.images, split.images[part.labels]) for part in chosen[:3])
    held_out = select(images, val=20)
    assert sorted(held_out.train.labels.tolist() + held_out.val.labels.tolist()) == list(range(50))
    for words, asked in ("--images 40 and --val 11", (40, 11)), ("--images 51", (51,)), ("--val 50", (None, 50)):
        with pytest.raises(UsageError, match=f"got {words}, but there are 50 images to train on"):
            select(images, *asked)
    with pytest.raises(UsageError, match="got --test_images 51, but there are 50 to test on"):
        select(images, test_images=51)
    with pytest.raises(UsageError, match=r"got --val 5, but these images have a val/ .*: leave out --val"):
        select(images._replace(val=split), val=5)


# ---- Class folders


def test_a_class_folder(folder):
    save(picture(99), folder / "val/cat/0.png")
    save(picture(98), folder / "val/dog/0.jfif", format="PNG")
    (folder / "train/cat/notes.txt").write_text("not an image")
    images = load(str(folder))
    assert images.classes == ["cat", "dog"] and "train/cat/notes.txt" in images.notes[0]
    for split, numbers in zip(images[:3], (range(6), (99, 98), range(6, 10)), strict=True):
        half = len(numbers) // 2
        assert split.labels.tolist() == [0] * half + [1] * half and split.labels.dtype == torch.int64
        assert np.array_equal(split.images, np.stack([picture(number) for number in numbers]))
    again = load(folder)
    assert again.notes == images.notes and torch.equal(again.val.images, images.val.images)


def test_large_images_are_resized_with_antialiasing(folder):
    board = (np.indices((320, 480)).sum(0) % 2 * 255).astype(np.uint8)
    save(Image.fromarray(board), folder / "train/cat/0.png")
    smooth = picture(1, (8, 6)).resize((800, 600), Image.Resampling.BICUBIC)
    save(smooth, folder / "train/cat/1.jpg", quality=95)  # decoded at a fraction of its size
    loaded = load(folder).train.images
    assert 120 < loaded[0].min() <= loaded[0].max() < 136
    expected = np.asarray(smooth.resize((32, 32), Image.Resampling.BILINEAR), dtype=float)
    assert np.abs(loaded[1].numpy() - expected).mean() < 3


def test_a_mistaken_folder_is_answered_with_one_sentence(folder):
    path = folder / "train/dog/1.png"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match=f"{path} cannot be read as an image "):
        load(folder)
    assert not caches(folder)
    shutil.rmtree(folder / "train")
    wanted = "has neither train/<class>/ and test/<class>/ nor the CIFAR10 files: give a folder that has, an empty one"
    for wrong in folder, folder / "missing":
        with pytest.raises(DataError, match=f"{wrong} {wanted}"):
            load(wrong)


# ---- The cache


def test_the_second_start_decodes_nothing_and_maps_the_cache(folder, decoded, capsys):
    first = load(folder)
    assert len(decoded) == 10 and "Decoding the 10 images" in capsys.readouterr().out
    second = load(folder)
    assert len(decoded) == 10 and capsys.readouterr().out == ""
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first.train, second.train, strict=True))
    assert second.classes == first.classes and len(caches(folder)) == 1
    if (maps := Path("/proc/self/maps")).exists():
        assert str(caches(folder)[0]) in maps.read_text()
    second.train.images.zero_()
    assert load(folder).train.images.any(), "writing to the images changes no file"


def test_a_changed_folder_and_a_damaged_cache_are_decoded_again(folder, decoded):
    load(folder)
    for change in (
        lambda: (folder / "train/cat/1.png").rename(folder / "train/dog/9.png"),
        lambda: os.utime(folder / "train/cat/2.png", ns=(1, 1)),
        lambda: damage(caches(folder)[0]),
    ):
        decoded.clear()
        change()
        images = load(folder)
        assert len(decoded) == 10 and len(caches(folder)) == 1, "the old cache is gone"
        expected = [data.read_image(path) for path in sorted((folder / "train/cat").iterdir())]
        assert np.array_equal(images.train.images[: len(expected)], expected)


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_where_the_folder_cannot_be_written_the_cache_is_the_users_or_in_memory(folder, user_cache, decoded):
    (folder / ".grafting_cache").write_text("a file in the way: permissions would not stop root")
    load(folder)
    assert load(folder).notes == [] and len(decoded) == 10
    assert len(list(user_cache.glob("filter_grafting/*/images-*.pt"))) == 1
    shutil.rmtree(user_cache / "filter_grafting")
    (user_cache / "filter_grafting").write_text("")
    images = load(folder)
    assert np.array_equal(images.train.images[0], picture(0))
    assert "the images are kept in memory: neither" in images.notes[0]


def log_sum(folder):
    with open(folder / "log", "a", buffering=1) as log, contextlib.redirect_stdout(log):
        print(int(load(folder).train.images.sum()))


def test_of_processes_that_start_together_one_decodes(folder):
    processes = [multiprocessing.get_context("fork").Process(target=log_sum, args=[folder]) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    said = (folder / "log").read_text()
    assert said.count("Decoding") == 1 and said.count(f"{int(load(folder).train.images.sum())}\n") == 2


# ---- The standard files, which torchvision downloads and checks


def test_the_standard_files_are_read_once(tmp_path, monkeypatch):
    made = []

    class Standard(datasets.CIFAR100):
        def __init__(self, root, train, download):
            made.append((root, train, download))
            self.data = np.full((3, 32, 32, 3), 7 + train, dtype=np.uint8)
            self.targets, self.classes = [0, 99, 5], [f"class {k}" for k in range(100)]

    monkeypatch.setattr(data, "CIFAR100", Standard)
    for _ in range(2):
        images = load(tmp_path, 100)
        assert images.val is None and images.classes[99] == "class 99"
        assert [split.images.unique().item() for split in (images.train, images.test)] == [8, 7]
        assert images.train.labels.tolist() == [0, 99, 5]
    assert made == [(tmp_path, True, True), (tmp_path, False, True)]
    assert data.socket.getdefaulttimeout() == 30, "a silent firewall"
    data.socket.setdefaulttimeout(None)


def test_without_a_network_the_user_is_told_what_to_put_where(tmp_path, monkeypatch):
    def unreachable(*arguments, **options):
        raise urllib.error.URLError("Network is unreachable")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    assert "Network is unreachable" in str(caught.value)
    archive = "cifar-10-python.tar.gz"
    assert str(caught.value).endswith(f"put {archive} from https://www.cs.toronto.edu/~kriz/{archive} into {tmp_path}")


# ---- Glyphs


def test_glyphs_are_the_same_for_everyone_and_in_equal_shares():
    drawn = glyphs.draw()
    for (images, labels), n in zip(drawn, (10_000, 2_000), strict=True):
        assert images.shape == (n, 32, 32, 3) and images.dtype == torch.uint8
        assert torch.bincount(labels).tolist() == [n // 10] * len(glyphs.CLASSES)
        assert len({image.tobytes() for image in images.numpy()}) == n
    generator = np.random.default_rng(2020)
    labels = generator.permutation(np.arange(10_000) % 10)
    images = np.stack([glyphs.draw_image(str(label), generator) for label in labels[:20]])
    assert np.array_equal(drawn[0][1], labels) and np.array_equal(drawn[0][0][:20], images)
    assert (glyphs.VERSION, zlib.crc32(images)) == ("2", 0x4A696FEC), "new images, new version"


def test_glyphs_are_drawn_once(tmp_path, monkeypatch):
    def draw():
        return [(torch.zeros((n, 32, 32, 3), dtype=torch.uint8), torch.zeros(n, dtype=torch.int64)) for n in (3, 2)]

    monkeypatch.setattr(data, "DEFAULT_DATA", tmp_path)
    monkeypatch.setattr(glyphs, "draw", draw)
    assert [len(split.labels) for split in (load("glyphs").train, load("glyphs").test)] == [3, 2]
    assert load("glyphs").classes == list("0123456789") and len(caches(tmp_path)) == 1
    with pytest.raises(UsageError, match="glyphs has 10 classes, not 100: leave out --cifar 100"):
        load("glyphs", 100)
