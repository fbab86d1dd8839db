"""The images: every source, the cache that processes share, and the augmentation against torchvision's."""

import errno
import functools
import hashlib
import http.server
import io
import itertools
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import threading
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from grafting_cifar import data
from grafting_cifar.data import Batches, DataError, Split, crop_and_flip, load, normalise

ROOT = Path(__file__).resolve().parent.parent
CIFAR = ROOT.parent / "shared" / "data" / "cifar10_jpeg.tar.xz"


@pytest.fixture(autouse=True)
def user_cache(tmp_path_factory, monkeypatch):
    """No test reads or leaves a cache in the home folder of whoever runs it."""
    folder = tmp_path_factory.mktemp("user_cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def picture(seed=0, size=(32, 32)):
    pixels = np.random.default_rng(seed).integers(256, size=(*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


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
    return [path.parent for path in (folder / ".grafting_cache").glob("*/*/contents.json")]


@pytest.fixture
def decoded(monkeypatch):
    """The files that were decoded, and not taken from a cache."""
    paths = []
    read = data._read_image
    monkeypatch.setattr(data, "_read_image", lambda path: paths.append(path) or read(path))
    return paths


def epoch(split, seed=0, augment=True, batch_size=16):
    images, labels = zip(*Batches(split, batch_size, "cpu", augment).epoch(seed), strict=True)
    return torch.cat(images), torch.cat(labels)


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
        expected = expected.flip(2) if mirrored else expected
        assert torch.equal(actual[k].permute(2, 0, 1), expected)


def test_crop_and_flip_takes_any_size():
    images = torch.randint(256, (2, 5, 7, 1), dtype=torch.uint8)
    four = torch.tensor([4, 4])
    actual = crop_and_flip(images, four, four, torch.tensor([False, True]))
    assert torch.equal(actual, torch.stack([images[0], images[1].flip(1)]))


def test_normalise_equals_torchvision():
    transforms = pytest.importorskip("torchvision.transforms")
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(data.MEAN, data.STD)])
    images = torch.randint(256, (5, 32, 32, 3), dtype=torch.uint8)
    actual = normalise(images)
    expected = torch.stack([transform(Image.fromarray(image.numpy())) for image in images])
    assert actual.dtype == torch.float32
    assert actual.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)


def placements(images):
    """dy, dx, flip of crops of an image whose red and green are the row and the column of a pixel, from 1 on.

    What is not of the image must be black.
    """
    images = images.long()
    flip = images[:, 16, 17, 1] < images[:, 16, 16, 1]
    dy = images[:, 16, 16, 0] - 1 - 16 + 4
    dx = images[:, 16, 16, 1] - 1 - torch.where(flip, 15, 16) + 4
    steps = torch.arange(32)
    y = dy[:, None] - 4 + steps  # (n, 32): which row of the image each row of the crop is
    x = dx[:, None] - 4 + torch.where(flip[:, None], 31 - steps, steps)
    inside = ((y >= 0) & (y < 32))[:, :, None] & ((x >= 0) & (x < 32))[:, None, :]
    assert torch.equal(images[..., 0], (y + 1)[:, :, None] * inside)
    assert torch.equal(images[..., 1], (x + 1)[:, None, :] * inside)
    return dy, dx, flip


def test_augmentation_equals_torchvision_in_distribution():
    transforms = pytest.importorskip("torchvision.transforms")
    n = 4050
    rows, columns = torch.meshgrid(torch.arange(1, 33), torch.arange(1, 33), indexing="ij")
    image = torch.stack([rows, columns, rows], dim=2).to(torch.uint8)

    split = Split(image.expand(n, -1, -1, -1), torch.zeros(n, dtype=torch.int64))
    ours = uint8(epoch(split, seed=3, batch_size=512)[0])

    torch.manual_seed(3)
    transform = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()])
    pil = Image.fromarray(image.numpy())
    theirs = torch.stack([torch.from_numpy(np.array(transform(pil))) for _ in range(n)])

    for images in (ours, theirs):
        dy, dx, flip = placements(images)
        counts = torch.bincount(dy * 18 + dx * 2 + flip, minlength=162).double()
        # 162 equally likely cases, 25 of each expected: chi-square with a mean of 161 and a deviation of 18.
        assert counts.numel() == 162
        assert ((counts - n / 162) ** 2 / (n / 162)).sum() < 161 + 4 * 18


# ---- Batches


@pytest.fixture
def split():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (50, 32, 32, 3), generator=generator, dtype=torch.uint8)
    return Split(images, torch.arange(50))


def test_test_batches_are_the_images_in_order(split):
    images, labels = epoch(split, augment=False)
    assert torch.equal(uint8(images), split.images)
    assert torch.equal(labels, split.labels)


@pytest.mark.parametrize("augment", [True, False])
def test_every_batch_is_whole_but_the_last(split, augment):
    batches = Batches(split, 16, "cpu", augment)
    assert (len(batches), batches.samples) == (4, 50)
    sizes = []
    for images, labels in batches.epoch(0):
        assert images.shape == (len(labels), 3, 32, 32)
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64
        sizes.append(len(labels))
    assert sizes == [16, 16, 16, 2]


def test_training_batches_are_a_function_of_the_seed(split):
    torch.manual_seed(0)
    images, labels = epoch(split, seed=1)
    torch.manual_seed(1)
    again, labels_again = epoch(split, seed=1)
    other, labels_other = epoch(split, seed=2)
    assert torch.equal(images, again) and torch.equal(labels, labels_again)
    assert not torch.equal(labels, labels_other) and not torch.equal(images, other)


def test_training_batches_show_every_image_once_with_its_label(split):
    images, labels = epoch(split, seed=1)
    assert torch.equal(labels.sort().values, split.labels)
    padded = F.pad(split.images.permute(0, 3, 1, 2), (4, 4, 4, 4))
    for image, label in zip(uint8(images).permute(0, 3, 1, 2), labels.tolist(), strict=True):
        windows = padded[label].unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4)  # (9, 9, 3, 32, 32)
        assert any((windows == x).flatten(2).all(dim=2).any() for x in (image, image.flip(2)))


def test_on_the_cpu_the_images_are_not_copied(split):
    batches = Batches(split, 16, "cpu", augment=True)
    assert batches.images.data_ptr() == split.images.data_ptr()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("augment", [True, False])
def test_on_cuda_the_host_never_waits_for_the_device(split, augment):
    batches = Batches(split, 16, "cuda", augment)
    list(batches.epoch(0))  # what is made only once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        labels = [labels for _, labels in batches.epoch(0)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(torch.cat(labels).cpu().sort().values, split.labels)


# ---- Class folders


def test_a_class_folder(folder):
    train, test, classes = load(folder)
    assert classes == 2
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert test.labels.tolist() == [0, 0, 1, 1]
    assert (train.images.dtype, train.labels.dtype) == (torch.uint8, torch.int64)
    for k in range(6):
        assert np.array_equal(train.images[k], picture(k))
    for k in range(4):
        assert np.array_equal(test.images[k], picture(6 + k))


def test_a_relative_path_and_a_string(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert len(load(folder.name)[0].images) == 6


def test_val_stands_in_for_test(folder):
    (folder / "test").rename(folder / "val")
    assert len(load(folder)[1].images) == 4


def test_test_goes_before_val(folder):
    save(picture(), folder / "val/cat/0.png")
    assert len(load(folder)[1].images) == 4


def test_images_in_sub_folders_count_and_other_files_do_not(folder):
    save(picture(), folder / "train/cat/more/9.png")
    (folder / "train/cat/notes.txt").write_text("not an image")
    (folder / "train/cat/._0.png").write_bytes(b"what macOS leaves behind")
    (folder / "train/.hidden").mkdir()
    train, _, classes = load(folder)
    assert classes == 2
    assert train.labels.tolist() == [0] * 4 + [1] * 3


def test_every_kind_of_image_becomes_rgb(folder):
    grey = np.full((32, 32), 200)
    images = {
        "0.png": (Image.fromarray(grey.astype(np.uint8)), [200] * 3),
        "1.png": (Image.fromarray(grey.astype(np.uint16) * 257), [200] * 3),
        "2.tif": (Image.fromarray(grey.astype(np.uint16) * 256), [200] * 3),
        "3.tif": (Image.fromarray(grey.astype(np.int32) * 256), [200] * 3),
        "4.png": (Image.new("RGBA", (32, 32), (10, 20, 30, 255)), [10, 20, 30]),
        "5.png": (Image.new("LA", (32, 32), (70, 128)), [70] * 3),
        "6.gif": (Image.new("RGB", (32, 32), (10, 20, 30)).quantize(), [10, 20, 30]),
        "7.TIFF": (Image.new("CMYK", (32, 32), (255, 0, 0, 0)), [0, 255, 255]),
        "8.bmp": (Image.new("1", (32, 32), 1), [255] * 3),
        "9.webp": (Image.new("RGB", (32, 32), (10, 20, 30)), [10, 20, 30]),
    }
    shutil.rmtree(folder / "train/cat")
    for name, (image, _) in images.items():
        save(image, folder / "train/cat" / name, **({"lossless": True} if name == "9.webp" else {}))
    save(images["6.gif"][0], folder / "train/cat/a.png", transparency=b"\0\1")
    train, _, _ = load(folder)
    colours = [colour for _, colour in images.values()] + [[10, 20, 30]]
    for image, colour in zip(train.images[: len(colours)], colours, strict=True):
        assert image.reshape(-1, 3).unique(dim=0).tolist() == [colour]


def test_large_images_are_resized_with_antialiasing(folder):
    board = (np.indices((320, 480)).sum(0) % 2 * 255).astype(np.uint8)
    save(Image.fromarray(board), folder / "train/cat/0.png")
    train, _, _ = load(folder)
    assert 120 < train.images[0].min() <= train.images[0].max() < 136


def test_a_large_jpeg_is_close_to_its_full_decoding(folder):
    image = picture(1, (8, 6)).resize((800, 600), Image.Resampling.BICUBIC)
    (folder / "train/cat/0.png").unlink()
    save(image, folder / "train/cat/0.jpg", quality=95)
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR), dtype=float)
    assert np.abs(load(folder)[0].images[0].numpy() - expected).mean() < 3


def remove(path):
    return lambda folder: shutil.rmtree(folder / path)


def empty(path):
    def change(folder):
        shutil.rmtree(folder / path)
        (folder / path).mkdir()

    return change


def rename(old, new):
    return lambda folder: (folder / old).rename(folder / new)


def rename_both(folder):
    for name in ("train", "test"):
        (folder / name).rename(folder / f"{name}ing")


def truncate(folder):
    path = folder / "train/dog/1.png"
    path.write_bytes(path.read_bytes()[:500])


MISTAKES = {
    "missing": (remove("."), ["no folder"]),
    "no train": (remove("train"), ["no train/ but has test/", "train/<class>/"]),
    "other names": (rename_both, ["no train/ but has t", "ing/", ".png: put", "empty folder"]),
    "no test": (remove("test"), ["neither test/ nor val/", "test/<class>/"]),
    "train without classes": (empty("train"), ["train has no class folders", "train/<class>/"]),
    "test without classes": (empty("test"), ["test has no class folders", "test/<class>/"]),
    "class without images": (empty("train/dog"), ["train/dog has no image"]),
    "class only in test": (remove("train/dog"), ["only test/ has dog"]),
    "classes that differ": (rename("train/dog", "train/emu"), ["only train/ has emu and only test/ has dog"]),
    "truncated image": (truncate, ["train/dog/1.png cannot be read as an image"]),
    "empty image": (lambda folder: (folder / "train/dog/1.png").write_bytes(b""), ["train/dog/1.png cannot"]),
    "broken link": (lambda folder: (folder / "train/dog/9.png").symlink_to("x"), ["train/dog/9.png cannot"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistaken_folder_is_answered_with_one_sentence(folder, mistake):
    change, parts = MISTAKES[mistake]
    change(folder)
    with pytest.raises(DataError) as caught:
        load(folder)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".")
    for part in (str(folder), *parts):
        assert part in sentence
    assert not caches(folder)


def test_a_file_is_not_a_folder(folder):
    with pytest.raises(DataError, match=r"0\.png is not a folder: give one with train/<class>/"):
        load(folder / "train/cat/0.png")


# ---- The cache


def test_the_second_start_decodes_nothing(folder, decoded, capsys):
    first = load(folder)
    assert len(decoded) == 10
    assert "Decoding the 10 images" in capsys.readouterr().out
    second = load(folder)
    assert len(decoded) == 10
    assert capsys.readouterr().out == ""
    for ours, theirs in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(ours, theirs)
    assert second[2] == 2


def test_the_cache_is_mapped_into_memory_and_writing_to_it_stays_here(folder):
    train, _, _ = load(folder)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(caches(folder)[0] / "train_images.npy") in maps.read_text()
    train.images.zero_()
    assert load(folder)[0].images.any()


def touch(folder):
    path = folder / "train/cat/1.png"
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1000))


CHANGES = {
    "added": lambda folder: save(picture(99), folder / "train/cat/9.png"),
    "removed": lambda folder: (folder / "test/cat/1.png").unlink(),
    "moved": rename("train/cat/1.png", "train/dog/9.png"),
    "replaced": lambda folder: save(picture(99, (40, 40)), folder / "train/cat/1.png"),
    "touched": touch,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_folder_is_decoded_again(folder, decoded, change):
    load(folder)
    decoded.clear()
    CHANGES[change](folder)
    train, test, _ = load(folder)
    assert len(decoded) == len(train.images) + len(test.images)
    assert len(caches(folder)) == 1, "the old cache is gone"
    expected = [data._read_image(path) for path in sorted((folder / "train/cat").iterdir())]
    assert np.array_equal(train.images[: len(expected)], expected)


def flip_a_bit(path, byte=-1, bit=0):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "emptied": lambda path: path.write_bytes(b""),
    "changed": flip_a_bit,
    "removed": Path.unlink,
}


@pytest.mark.parametrize("name", ["train_images.npy", "test_labels.npy", "contents.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_made_again(folder, decoded, name, damage):
    expected = load(folder)[0].images.clone()
    DAMAGES[damage](caches(folder)[0] / name)
    assert torch.equal(load(folder)[0].images, expected)
    assert len(decoded) == 20
    load(folder)
    assert len(decoded) == 20


@pytest.mark.parametrize("name", ["train_labels.npy", "contents.json"])
def test_any_flipped_bit_at_its_beginning_is_noticed_or_harmless(folder, decoded, name):
    (train, test, classes), (cache,) = load(folder), caches(folder)
    whole = (cache / name).read_bytes()
    for k in range(8 * 100):
        flip_a_bit(cache / name, k // 8, k % 8)
        if loaded := data._read_cache(cache):
            assert loaded[2] == classes
            assert torch.equal(loaded[0].labels, train.labels) and torch.equal(loaded[1].images, test.images)
        (cache / name).write_bytes(whole)


def test_where_the_folder_cannot_be_written_the_cache_is_the_users(folder, user_cache, decoded):
    (folder / ".grafting_cache").write_text("a file in the way: permissions would not stop root")
    load(folder)
    load(folder)
    assert len(decoded) == 10
    assert len(list(user_cache.glob("filter_grafting/*/*/train_images.npy"))) == 1


def test_where_nothing_can_be_written_the_images_are_kept_in_memory(folder, user_cache, capsys):
    (folder / ".grafting_cache").write_text("")
    (user_cache / "filter_grafting").write_text("")
    assert np.array_equal(load(folder)[0].images[0], picture(0))
    assert "can be written: the images are kept in memory" in capsys.readouterr().out


def test_a_full_disk_leaves_the_images_in_memory(folder, monkeypatch, capsys):
    def full(path, array):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "save", full)
    assert np.array_equal(load(folder)[0].images[0], picture(0))
    assert "No space left on device" in capsys.readouterr().out
    assert [path.name for path in (folder / ".grafting_cache/images").iterdir()] == ["lock"]


def python(code, *arguments):
    """A process that runs code, in which data is our module and folder the first argument."""
    start = "import os, sys, time\nfrom grafting_cifar import data\nfolder = sys.argv[1]\n"
    command = [sys.executable, "-c", start + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_of_processes_that_start_together_one_decodes(folder, tmp_path):
    code = """
        read = data._read_image
        def slow(path):
            time.sleep(0.1)
            return read(path)
        data._read_image = slow
        print("ready", flush=True)
        while not os.path.exists(sys.argv[2]):
            time.sleep(0.001)
        print(data.load(folder)[0].images.sum().item())
    """
    processes = [python(code, folder, tmp_path / "go") for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert "".join(outputs).count("Decoding") == 1
    assert len({output.splitlines()[-1] for output in outputs}) == 1


def test_what_a_killed_process_leaves_is_not_read_and_is_removed(folder):
    code = """
        import numpy, signal
        numpy.save = lambda path, array: os.kill(os.getpid(), signal.SIGKILL)
        data.load(folder)
    """
    process = python(code, folder)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    place = folder / ".grafting_cache/images"
    assert [path.suffix for path in place.iterdir() if path.is_dir()] == [".tmp"]
    assert np.array_equal(load(folder)[0].images[0], picture(0))
    assert [path for path in place.iterdir() if path.is_dir()] == caches(folder)


def test_a_wait_says_for_whom_and_ends(folder, monkeypatch, capsys):
    lock = folder / ".grafting_cache/images/lock"
    lock.parent.mkdir(parents=True)
    code = """
        import fcntl, sys
        with open(sys.argv[1], "w") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            print("process 7 on there", file=file, end="", flush=True)
            print("locked", flush=True)
            sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        clock = itertools.count(step=4)
        monkeypatch.setattr(data.time, "monotonic", lambda: next(clock))
        monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
        monkeypatch.setattr(data, "_LOCK_MINUTES", 2)
        with pytest.raises(DataError, match=r"Waited \d+ s for process 7 on there, .*: see whether"):
            load(folder)
        process.communicate()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(re.fullmatch(r"Waiting \d+ s for process 7 on there, .*", line) for line in lines)


# ---- The standard files


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(params=[10, 100])
def standard(request, tmp_path, monkeypatch):
    """cifar, its archive in miniature, torchvision's class, which can download it, and a check of the images."""
    datasets = pytest.importorskip("torchvision.datasets")
    cifar = request.param
    dataset = {10: datasets.CIFAR10, 100: datasets.CIFAR100}[cifar]
    generator = np.random.default_rng(cifar)
    key = {10: "labels", 100: "fine_labels"}[cifar]
    contents, images, labels = {}, {}, {}
    for name, _ in dataset.train_list + dataset.test_list:
        images[name] = generator.integers(256, size=(4, 3, 32, 32), dtype=np.uint8)
        labels[name] = generator.integers(cifar, size=4).tolist()
        contents[name] = {"data": images[name].reshape(4, -1), key: labels[name]}
    contents[dataset.meta["filename"]] = {dataset.meta["key"]: [str(k) for k in range(cifar)]}

    archive = tmp_path / "elsewhere" / dataset.filename
    archive.parent.mkdir()
    sums = {}
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in contents.items():
            content = pickle.dumps(content)
            sums[name] = hashlib.md5(content).hexdigest()
            member = tarfile.TarInfo(f"{dataset.base_folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

    handler = functools.partial(Handler, directory=archive.parent)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    for files in ("train_list", "test_list"):
        monkeypatch.setattr(dataset, files, [[name, sums[name]] for name, _ in getattr(dataset, files)])
    monkeypatch.setattr(dataset, "meta", dataset.meta | {"md5": sums[dataset.meta["filename"]]})
    monkeypatch.setattr(dataset, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(dataset, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")

    def check(loaded):
        train, test, classes = loaded
        assert classes == cifar
        for split, files in ((train, dataset.train_list), (test, dataset.test_list)):
            expected = np.concatenate([images[name] for name, _ in files]).transpose(0, 2, 3, 1)
            assert np.array_equal(split.images, expected)
            assert split.images.is_contiguous()
            assert split.labels.tolist() == [label for name, _ in files for label in labels[name]]

    yield cifar, archive, dataset, check
    server.shutdown()
    server.server_close()


@pytest.fixture
def target(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def test_standard_files_that_are_there(standard, target):
    cifar, archive, dataset, check = standard
    shutil.unpack_archive(archive, target)
    archive.unlink()
    check(load(target, cifar))
    check(load(target / dataset.base_folder, cifar))


def test_an_archive_that_is_there(standard, target):
    cifar, archive, _, check = standard
    archive.rename(target / archive.name)
    check(load(target, cifar))


def test_the_download_goes_where_the_user_said_and_is_quiet_in_a_log(standard, target, capsys):
    cifar, _, dataset, check = standard
    check(load(target, cifar))
    assert (target / dataset.base_folder).is_dir()
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [f"Downloading CIFAR-{cifar} to {target}, once ..."]
    assert captured.err == ""


def test_the_default_folder_is_made(standard, target, monkeypatch):
    cifar, _, _, check = standard
    monkeypatch.setattr(data, "DEFAULT_FOLDER", target / "default")
    check(load(target / "default", cifar))


def test_standard_files_are_read_once(standard, target, monkeypatch):
    cifar, _, _, check = standard
    load(target, cifar)
    monkeypatch.setattr(data, "_read_standard", None)
    check(load(target, cifar))


def test_without_a_network_the_user_is_told_what_to_put_where(standard, target, monkeypatch, capsys):
    cifar, archive, dataset, _ = standard

    def unreachable(*arguments, **options):
        raise urllib.error.URLError("Network is unreachable")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(DataError) as caught:
        load(target, cifar)
    sentence = str(caught.value)
    assert "\n" not in sentence
    for part in ("Network is unreachable", f"put {archive.name}", dataset.url, f"into {target}."):
        assert part in sentence
    assert capsys.readouterr().err == ""


def test_beside_other_data_sets_the_standard_files_are_welcome(standard, target):
    cifar, _, _, check = standard
    save(picture(), target / "imagenet/train/n01440764/0.png")
    check(load(target, cifar))


def test_cifar_is_10_or_100():
    with pytest.raises(ValueError, match="10 or 100"):
        load("glyphs", 20)


# ---- Glyphs


@pytest.fixture(scope="session")
def glyphs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "DEFAULT_FOLDER", tmp_path_factory.mktemp("data"))
        return load("glyphs")


def test_glyphs(glyphs):
    train, test, classes = glyphs
    assert classes == 10
    for split, n in ((train, 10_000), (test, 2_000)):
        assert split.images.shape == (n, 32, 32, 3)
        assert split.images.dtype == torch.uint8
        assert torch.bincount(split.labels).tolist() == [n // 10] * 10
        assert split.images.flatten(1).unique(dim=0).shape[0] == n


def test_glyphs_are_the_same_for_everyone(glyphs):
    generator = np.random.default_rng(2020)
    labels = generator.permutation(np.arange(10_000) % 10)
    images = [data._draw_image(str(label), generator) for label in labels[:20]]
    assert np.array_equal(glyphs[0].labels, labels)
    assert np.array_equal(glyphs[0].images[:20], images)
    assert (data._GLYPHS_VERSION, zlib.crc32(np.stack(images))) == ("2", 0x4A696FEC), "new images, new version"


@pytest.mark.slow
def test_after_five_epochs_a_resnet20_reads_most_glyphs_but_not_all(glyphs):
    from grafting_cifar.models import build

    train, test, classes = glyphs
    torch.manual_seed(0)
    network = build("resnet20", classes).to(memory_format=torch.channels_last)
    batches = Batches(train, 128, "cpu", augment=True)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5 * len(batches))
    for k in range(5):
        for images, labels in batches.epoch(k):
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.inference_mode():
        right = sum((network(x).argmax(1) == y).sum() for x, y in Batches(test, 500, "cpu", False).epoch(0))
    assert 80 < 100 * right.item() / len(test.labels) < 98


# ---- Real images


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory):
    if not CIFAR.exists():
        pytest.skip(f"the real images, {CIFAR}, are not on this machine")
    folder = tmp_path_factory.mktemp("real")
    with tarfile.open(CIFAR, "r|xz") as tar:
        for member in tar:
            if member.name.endswith("77.jpg"):  # one in a hundred
                path = folder / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(tar.extractfile(member).read())
    return folder / "cifar10"


def test_real_images(cifar10):
    train, test, classes = load(cifar10)
    assert classes == 10
    assert torch.bincount(train.labels).tolist() == [50] * 10
    assert torch.bincount(test.labels).tolist() == [10] * 10
    pixels = train.images.double() / 255
    assert pixels.mean((0, 1, 2)).tolist() == pytest.approx(data.MEAN, abs=0.03)
    names = sorted(path.name for path in (cifar10 / "train").iterdir())
    paths = [path for name in names for path in sorted((cifar10 / "train" / name).iterdir())]
    for k in random.Random(0).sample(range(500), 20):
        with Image.open(paths[k]) as image:
            assert np.array_equal(train.images[k], image)
        assert names[train.labels[k]] == paths[k].parent.name
