"""ImageNet's images: odd files, crops, batches over workers and ranks, the ends of processes."""

import contextlib
import io
import itertools
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import until
from torchvision import transforms
from torchvision.transforms import functional

from grafting_imagenet import data
from grafting_imagenet.data import DataError

ROOT = Path(__file__).resolve().parent.parent
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


# ---- Images


def pillow(contents):
    """As torchvision's ImageFolder reads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(np.array(Image.open(io.BytesIO(contents)).convert("RGB"))).permute(2, 0, 1)


TURNED = Image.Exif()
TURNED[0x112] = 6  # to be turned by 90 degrees
ODD_IMAGES = {
    "grey JPEG": lambda: encode(picture(0).convert("L"), "JPEG"),
    "progressive JPEG": lambda: encode(picture(0), "JPEG", progressive=True),
    "CMYK JPEG": lambda: encode(picture(0).convert("CMYK"), "JPEG"),
    "JPEG with an orientation": lambda: encode(picture(0), "JPEG", exif=TURNED),
    "JPEG with a tail": lambda: encode(picture(0), "JPEG") + b"more" * 1000,
    "JPEG with damaged EXIF": lambda: encode(picture(0), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"),
    "JPEG of one pixel": lambda: encode(picture(0, 1, 1), "JPEG"),
    "several JPEGs in one": lambda: encode(picture(0), "MPO", save_all=True, append_images=[picture(1)]),
    "palette PNG with transparency": lambda: encode(picture(0).quantize(16), "PNG", transparency=bytes(range(16))),
    "PNG with alpha": lambda: encode(picture(0).convert("RGBA"), "PNG"),
    "animated GIF": lambda: encode(picture(0), "GIF", save_all=True, append_images=[picture(1), picture(2)]),
    "WebP": lambda: encode(picture(0), "WEBP"),
    "CMYK TIFF": lambda: encode(picture(0).convert("CMYK"), "TIFF"),
}


@pytest.mark.parametrize("kind", ODD_IMAGES)
def test_an_odd_image_is_read_as_torchvision_reads_it(kind, tmp_path):
    contents = ODD_IMAGES[kind]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The image decoding")
        image = data.read_image(write(tmp_path / "x.JPEG", contents))  # whatever the suffix says
    assert image.dtype == torch.uint8 and torch.equal(image, pillow(contents))
    for train in (True, False):
        assert data.Decoder(1, 32, train).decode(str(tmp_path / "x.JPEG"), "0/0").shape == (32, 32, 3)


def test_without_torchvisions_decoder_pillow_reads_the_same(tmp_path, monkeypatch):
    path = write(tmp_path / "x.jpg", encode(picture(0), "JPEG"))
    image = data.read_image(path)
    monkeypatch.setattr(data, "decode_jpeg", None)
    assert torch.equal(data.read_image(path), image)


JPEG = encode(picture(0), "JPEG")
DAMAGED = {
    "truncated": (JPEG[: len(JPEG) // 2], "runcated"),
    "only its first bytes": (JPEG[:3], "no known format"),
    "empty": (b"", "it is empty"),
    "a text": (b"404 not found\n" * 100, "no known format"),
    "a truncated PNG": (encode(picture(0), "PNG")[:-1000], ""),
    "gone": (None, "No such file or directory"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_is_no_image_is_named(kind, tmp_path):
    contents, words = DAMAGED[kind]
    path = write(tmp_path / "x.jpg", contents or b"")
    if contents is None:
        os.remove(path)
    with pytest.raises(DataError) as caught:
        data.read_image(path)
    sentence = str(caught.value)
    assert sentence.startswith(f"{path} cannot be read as an image (") and words in sentence
    assert sentence.isprintable() and "0x" not in sentence


# ---- What the network sees


@pytest.mark.parametrize(("height", "width"), [(300, 400), (60, 400), (7, 5)])
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
    ):
        a, b = np.sort(quantity(ours)), np.sort(quantity(theirs))
        points = np.concatenate([a, b])
        distance = np.abs(np.searchsorted(a, points, "right") - np.searchsorted(b, points, "right")).max() / draws
        assert distance < bound


def test_crops_and_flips_of_a_seed_stay_what_they_are():
    windows = [data.random_window(300, 400, random.Random(f"7/{k}")) for k in range(3)]
    assert windows == [(1, 87, 286, 306), (77, 190, 138, 114), (7, 52, 290, 286)]
    draw = random.Random("7/3")
    assert data.random_window(60, 500, draw) == (1, 137, 55, 55) and 0.0294 < draw.random() < 0.0295


def test_augmented_pixels_equal_torchvisions():
    image = torch.from_numpy(np.array(picture(3, 400, 300))).permute(2, 0, 1)
    for k in range(10):
        ours = data.augment(image, 64, random.Random(f"0/{k}"))
        draw = random.Random(f"0/{k}")
        theirs = functional.resized_crop(image, *data.random_window(300, 400, draw), [64, 64])
        theirs = theirs.flip(-1) if draw.random() < 0.5 else theirs
        assert (ours.int() - theirs.int()).abs().max() <= 1


@pytest.mark.parametrize(("width", "height"), [(400, 300), (300, 401), (31, 33), (1, 5)])
def test_validation_pixels_equal_torchvisions(width, height):
    image = picture(5, width, height)
    ours = data.central(torch.from_numpy(np.array(image)).permute(2, 0, 1), 56)
    pipeline = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(56)])
    theirs = torch.from_numpy(np.array(pipeline(image))).permute(2, 0, 1)
    assert ours.shape == theirs.shape and (ours.int() - theirs.int()).abs().max() <= 1


# ---- Batches


def batches(folder, train=True, batch_size=4, **options):
    images = data.load(folder)
    return data.Batches(
        images.train if train else images.test, batch_size, "cpu", train=train, image_size=32, **options
    )


def epoch(batches, seed=0):
    return [(images.clone(), labels.clone()) for images, labels in batches.epoch(seed)]


def sizes(batches):
    return [len(labels) for _, labels in batches.epoch(0)]


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for (images, labels), (their_images, their_labels) in zip(ours, theirs, strict=True):
        assert torch.equal(images, their_images) and torch.equal(labels, their_labels)


def test_a_batch(folder):
    made = batches(folder)
    assert made.samples == 17 and len(made) == 4
    state = torch.get_rng_state()
    for images, labels in made.epoch(0):
        assert images.dtype == torch.float32 and images.shape[1:] == (3, 32, 32)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64 and labels.shape == images.shape[:1]
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn from the network's generator"
    assert sizes(made) == [4, 4, 4, 4], "a batch of one image has no statistics for batch norm"
    assert sizes(batches(folder, batch_size=5)) == [5, 5, 5, 2]
    assert sizes(batches(folder, batch_size=1)) == [1] * 17
    assert sizes(batches(folder, batch_size=6, world_size=3)) == [2, 2]
    assert sizes(batches(folder, train=False)) == [4, 3]


def test_training_batches_show_every_image_once_with_its_label(folder, monkeypatch):
    files = data.load(folder).train
    ((images, labels),) = data.Batches(files, len(files), "cpu", train=False, image_size=32).epoch()
    assert torch.equal(labels, files.labels), "validation comes in order"
    everything = zip([image.numpy().tobytes() for image in images], labels.tolist(), strict=True)
    # Without augmentation an image shows which one it is.
    monkeypatch.setattr(data, "augment", lambda image, size, draw: data.central(image, size))
    ((images, labels),) = data.Batches(files, len(files), "cpu", train=True, image_size=32).epoch(3)
    shown = dict(zip([image.numpy().tobytes() for image in images], labels.tolist(), strict=True))
    assert len(shown) == len(files) and shown == dict(everything)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(3))
    assert torch.equal(labels, files.labels[order])


@pytest.mark.parametrize("train", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_neither_workers_nor_a_slow_reader_change_anything(folder, train):
    alone = batches(folder, train, batch_size=2)
    expected = epoch(alone, 2)
    assert_equal(epoch(alone, 2), expected)
    assert train is not torch.equal(expected[0][0], epoch(alone, 3)[0][0]), "an epoch is a function of its seed"
    made = batches(folder, train, batch_size=2, workers=2)
    next(made.epoch(0))  # an epoch that is broken off leaves nothing behind
    assert_equal(epoch(made, 2), expected)
    slow = made.epoch(2)
    for theirs in expected:
        time.sleep(0.1)  # workers go ahead, as far as they may
        assert_equal([next(slow)], [theirs])


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


@pytest.mark.parametrize("ranks", [2, 8])
def test_ranks_evaluate_every_image_once(folder, ranks):
    whole = torch.cat([images for images, _ in batches(folder, False).epoch()])
    for rank in range(ranks):
        share = batches(folder, False, batch_size=ranks * 2, rank=rank, world_size=ranks)
        shown = [images for images, _ in epoch(share)]
        assert len(shown) == len(share) and torch.equal(torch.cat([whole[:0], *shown]), whole[rank::ranks])


def test_arguments_that_do_not_go_together(folder):
    for size, ranks in ((4, 3), (20, 20)):
        with pytest.raises(
            DataError, match=f"17 images in batches of {size} cannot be shared by {ranks} processes: give"
        ):
            batches(folder, batch_size=size, world_size=ranks)


# ---- Files that cannot be read


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("train", [True, False])
def test_an_unreadable_file_ends_the_epoch_with_its_name(folder, train, workers):
    path = write(folder / ("train" if train else "val") / "bee" / "1.jpg", b"nothing")
    with pytest.raises(DataError) as caught:
        epoch(batches(folder, train, workers=workers))
    assert str(caught.value).startswith(f"{path} cannot be read as an image") and "--skip_bad" in str(caught.value)
    assert str(caught.value).isprintable()


def test_skipped_files_are_replaced_in_training(folder, capsys):
    order = torch.randperm(17, generator=torch.Generator().manual_seed(1)).tolist()
    files = data.load(folder).train
    bad = [files.paths[order[place]] for place in (2, 3, 15, 16)]
    for path in bad:
        Path(path).write_bytes(b"")
    made = batches(folder, skip_bad=True)
    whole = epoch(made, 1)
    said = capsys.readouterr().out
    assert len(made.bad) == said.count("it is empty") == 4 and all(path in said for path in bad)
    labels = torch.cat([labels for _, labels in whole]).tolist()
    assert labels == [int(files.labels[order[{2: 4, 3: 4, 15: 0}.get(place, place)]]) for place in range(16)]
    assert_equal(epoch(made, 1), whole)
    assert capsys.readouterr().out == "", "an epoch later nothing is said again"
    assert_equal(epoch(batches(folder, skip_bad=True, workers=1), 1), whole)
    for rank in range(2):
        part = epoch(batches(folder, skip_bad=True, rank=rank, world_size=2), 1)
        assert_equal(part, [(images[rank::2], labels[rank::2]) for images, labels in whole])


def test_skipped_files_are_left_out_in_validation(folder):
    whole = torch.cat([images for images, _ in batches(folder, False).epoch()])
    for name in ("ant/1.jpg", "cat/0.jpg"):
        write(folder / "val" / name, JPEG[:100])
    made = batches(folder, False, batch_size=2, skip_bad=True)
    shown = epoch(made)
    assert [len(labels) for _, labels in shown] == [1, 2, 2]  # the last batch had but one image
    assert torch.equal(torch.cat([images for images, _ in shown]), whole[[0, 2, 3, 4, 5]])
    assert torch.cat([labels for _, labels in shown]).tolist() == [0, 0, 1, 1, 1]
    assert len(made.bad) == 2


@pytest.mark.parametrize(("train", "count"), [(True, "11 of 17"), (False, "7 of 7")])
def test_files_that_are_too_many_to_skip(folder, train, count):
    made = batches(folder, train, skip_bad=True)
    shutil.rmtree(folder)
    with pytest.raises(DataError, match=f"{count} images cannot be read, too many to leave out: is their disk all"):
        epoch(made)


# ---- Processes


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        ("[Errno 24] Too many open files", r"raise the limit of open files \(ulimit -n 4096\), or give fewer"),
        ("received 0 items of ancdata", r"ulimit -n"),
        ("AF_UNIX path too long", r"set TMPDIR=/tmp"),
        ("DataLoader worker exited unexpectedly", r"if memory is short .* fewer --workers or a smaller batch help"),
    ],
)
def test_the_advice_fits_the_cause(cause, words):
    with pytest.raises(DataError, match=rf"images cannot be loaded \(.*\): .*{words}"), data.explaining():
        raise RuntimeError(f"Caught OSError in DataLoader worker process 0.\nTraceback\n{cause}")


def test_too_few_open_files_are_noticed_before_a_worker_starts(folder, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (len(os.listdir("/dev/fd")) + 16, 4096))
    with pytest.raises(DataError, match=r"Too many open files\): raise the limit of open files"):
        batches(folder, workers=2)
    batches(folder, workers=0)


def test_a_worker_that_is_killed_ends_the_epoch_with_a_sentence(folder):
    before = set(multiprocessing.active_children())
    made = batches(folder, workers=2)
    epoch(made)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    os.kill(next(iter(workers)).pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"images cannot be loaded .*exited unexpectedly"):
        epoch(made)
    del made
    for worker in workers:
        worker.join(60)
    assert not set(multiprocessing.active_children()) & workers


MAIN = f"""
import signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from grafting_imagenet import data

if __name__ == "__main__":
    signal.alarm(300)
    received = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: received.append(number))
    train = data.load(sys.argv[1]).train
    made = data.Batches(train, 4, "cpu", train=True, image_size=32, workers=2)
    while len(received) < 2:
        for images, labels in made.epoch(0):
            time.sleep(0.01)
        print("an epoch", flush=True)
    list(made.epoch(1))
    print("done", flush=True)
    unfinished = made.epoch(0)  # and it ends, or is killed, while its workers are busy
    next(unfinished)
    time.sleep(float(sys.argv[2]))
"""


def alive(group):
    """The processes of a group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, _, members = path.read_text().rpartition(")")[2].split()[:3]
            if int(members) == group and state != "Z":
                found.append(path.parent.name)
    return found


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at processes in /proc")
@pytest.mark.parametrize("ending", ["by itself", pytest.param("killed", marks=pytest.mark.slow)])
def test_workers_outlive_signals_to_the_group_but_not_their_main_process(folder, ending):
    script = folder / "main.py"
    script.write_text(MAIN)
    command = [sys.executable, script, folder, "300" if ending == "killed" else "0"]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, start_new_session=True, **output) as process:
        try:
            assert process.stdout.readline() == "an epoch\n"
            assert len(alive(process.pid)) >= 4  # itself, two workers, the fork server
            for number in (signal.SIGINT, signal.SIGTERM):
                os.killpg(process.pid, number)
            assert any(process.stdout.readline() == "done\n" for _ in range(1000)), "an epoch after the signals"
            if ending == "killed":
                process.kill()
            assert process.wait(120) == (-signal.SIGKILL if ending == "killed" else 0)
            assert "Traceback" not in process.stdout.read()
            until(lambda: not alive(process.pid))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
