"""ImageNet's images: odd files, crops, batches over workers and ranks, files that cannot be read."""

import io
import itertools
import random
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision import transforms
from torchvision.transforms import functional

from grafting_imagenet import data
from grafting_imagenet.data import DataError

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

TURNED = Image.Exif()
TURNED[0x112] = 6  # to be turned by 90 degrees
ODD_IMAGES = {
    "CMYK JPEG": lambda: encode(picture(0).convert("CMYK"), "JPEG"),
    "JPEG with an orientation": lambda: encode(picture(0), "JPEG", exif=TURNED),
    "JPEG with a tail": lambda: encode(picture(0), "JPEG") + b"more" * 1000,
    "JPEG with damaged EXIF": lambda: encode(picture(0), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"),
    "palette PNG with transparency": lambda: encode(picture(0).quantize(16), "PNG", transparency=bytes(range(16))),
    "animated GIF": lambda: encode(picture(0), "GIF", save_all=True, append_images=[picture(1), picture(2)]),
}


@pytest.mark.parametrize("kind", ODD_IMAGES)
def test_an_odd_image_is_read_as_torchvision_reads_it(kind, tmp_path, monkeypatch):
    path = write(tmp_path / "x.JPEG", ODD_IMAGES[kind]())  # whatever the suffix says
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The image decoding")
        assert torch.equal(data.read_image(path), expected)
    for train in (True, False):
        assert data.Decoder(1, 32, train).decode(path, "0/0").shape == (32, 32, 3)
    monkeypatch.setattr(data, "decode_jpeg", None)  # as in a torchvision without it
    assert torch.equal(data.read_image(path), expected)


JPEG = encode(picture(0), "JPEG")


def test_what_is_no_image_is_named(tmp_path):
    for contents, words in (JPEG[: len(JPEG) // 2], "runcated"), (JPEG[:3], "no known format"), (b"", "it is empty"):
        path = write(tmp_path / "x.jpg", contents)
        with pytest.raises(DataError) as caught:
            data.read_image(path)
        sentence = str(caught.value)
        assert sentence.startswith(f"{path} cannot be read as an image (") and words in sentence
        assert sentence.isprintable()
    with pytest.raises(DataError, match="No such file or directory"):
        data.read_image(str(tmp_path / "gone.jpg"))


# ---- What the network sees


@pytest.mark.parametrize(("height", "width"), [(300, 400), (60, 400)])
def test_windows_equal_torchvisions_in_distribution(height, width):
    torch.manual_seed(0)
    image, crop = torch.empty((3, height, width), dtype=torch.uint8), transforms.RandomResizedCrop(224)
    theirs = np.array([crop.get_params(image, list(crop.scale), list(crop.ratio)) for _ in range(2000)])
    ours = np.array([data.random_window(height, width, random.Random(f"7/{k}")) for k in range(2000)])
    for windows in (ours, theirs):
        assert (windows >= 0).all() and (windows[:, :2] + windows[:, 2:] <= [height, width]).all()
    for column in range(4):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-4


def test_augmented_pixels_equal_torchvisions():
    image = torch.from_numpy(np.array(picture(3, 400, 300))).permute(2, 0, 1)
    for k in range(10):
        ours = data.augment(image, 64, random.Random(f"0/{k}"))
        draw = random.Random(f"0/{k}")
        theirs = functional.resized_crop(image, *data.random_window(300, 400, draw), [64, 64])
        theirs = theirs.flip(-1) if draw.random() < 0.5 else theirs
        assert (ours.int() - theirs.int()).abs().max() <= 1


@pytest.mark.parametrize(("width", "height"), [(300, 401), (31, 33), (1, 5)])
def test_validation_pixels_equal_torchvisions(width, height):
    image = picture(5, width, height)
    ours = data.central(torch.from_numpy(np.array(image)).permute(2, 0, 1), 56)
    pipeline = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(56)])
    theirs = torch.from_numpy(np.array(pipeline(image))).permute(2, 0, 1)
    assert ours.shape == theirs.shape and (ours.int() - theirs.int()).abs().max() <= 1


# ---- Batches


def batches(folder, train=True, batch_size=4, **options):
    images = data.load(folder)
    files = images.train if train else images.test
    return data.Batches(files, batch_size, "cpu", train=train, image_size=32, **options)


def epoch(batches, seed=0):
    return list(batches.epoch(seed))


def assert_equal(ours, theirs):
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
    for options, sizes in (
        ({"batch_size": 4}, [4, 4, 4, 4]),  # one image more has no statistics for batch norm
        ({"batch_size": 5}, [5, 5, 5, 2]),
        ({"batch_size": 1}, [1] * 17),
        ({"train": False}, [4, 3]),
    ):
        assert [len(labels) for _, labels in epoch(batches(folder, **options))] == sizes


def test_training_batches_show_every_image_once_with_its_label(folder, monkeypatch):
    # Without augmentation an image shows which one it is.
    monkeypatch.setattr(data, "augment", lambda image, size, draw: data.central(image, size))
    files, order = data.load(folder).train, torch.randperm(17, generator=torch.Generator().manual_seed(3))
    made = (data.Batches(files, 17, "cpu", train=train, image_size=32) for train in (False, True))
    ((images, labels),), ((shuffled, theirs),) = (epoch(each, 3) for each in made)
    assert torch.equal(labels, files.labels), "validation comes in order"
    assert torch.equal(shuffled, images[order]) and torch.equal(theirs, labels[order])


def test_neither_workers_nor_a_slow_reader_change_anything(folder):
    alone = batches(folder, batch_size=2)
    expected = epoch(alone, 2)
    assert_equal(epoch(alone, 2), expected)
    assert not torch.equal(expected[0][0], epoch(alone, 3)[0][0]), "an epoch is a function of its seed"
    made = batches(folder, batch_size=2, workers=2)
    next(made.epoch(0))  # an epoch that is broken off leaves nothing behind
    slow = made.epoch(2)
    for theirs in expected:
        time.sleep(0.1)  # workers go ahead, as far as they may
        assert_equal([next(slow)], [theirs])
    assert_equal(epoch(made, 2), expected)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_train_on_equal_parts_of_the_same_batches(folder, ranks):
    whole = epoch(batches(folder, batch_size=6), 4)
    parts = [batches(folder, batch_size=6, rank=rank, world_size=ranks) for rank in range(ranks)]
    assert [len(labels) for _, labels in whole] == [6, 6, 5]
    if ranks == 3:
        whole.pop()  # for which each rank would have one image
    for (images, labels), *shares in zip(whole, *(epoch(part, 4) for part in parts), strict=True):
        size = len(labels) // ranks * ranks
        expected = [(images[:size][rank::ranks], labels[:size][rank::ranks]) for rank in range(ranks)]
        assert_equal(shares, expected)


@pytest.mark.parametrize("ranks", [2, 8])
def test_ranks_evaluate_every_image_once(folder, ranks):
    whole = torch.cat([images for images, _ in batches(folder, False).epoch()])
    for rank in range(ranks):
        share = batches(folder, False, batch_size=ranks * 2, rank=rank, world_size=ranks)
        shown = [images for images, _ in epoch(share)]
        assert len(shown) == len(share) and torch.equal(torch.cat([whole[:0], *shown]), whole[rank::ranks])


# ---- Files that cannot be read


def test_an_unreadable_file_ends_the_epoch_with_its_name(folder):
    path = write(folder / "val" / "bee" / "1.jpg", b"nothing")
    with pytest.raises(DataError) as caught:
        epoch(batches(folder, False, workers=1))
    assert str(caught.value).startswith(f"{path} cannot be read as an image") and "--skip_bad" in str(caught.value)


def test_skipped_files_are_replaced_in_training_and_left_out_in_validation(folder, capsys):
    order = torch.randperm(17, generator=torch.Generator().manual_seed(1)).tolist()
    files, whole = data.load(folder).train, epoch(batches(folder), 1)
    bad = [write(folder / files.paths[order[place]], b"") for place in (2, 3, 13)]
    made = batches(folder, skip_bad=True)
    shown = epoch(made, 1)
    said = capsys.readouterr().out
    assert len(made.bad) == said.count("it is empty") == 3 and all(path in said for path in bad)
    rows = {0: [0, 1, 0, 1], 3: [0, 2, 2, 3]}  # in their place comes another image of the batch
    expected = [
        (images[rows.get(k, slice(4))], labels[rows.get(k, slice(4))]) for k, (images, labels) in enumerate(whole)
    ]
    assert_equal(shown, expected)
    assert_equal(epoch(made, 1), shown)
    assert capsys.readouterr().out == "", "an epoch later nothing is said again"

    whole = torch.cat([images for images, _ in batches(folder, False).epoch()])
    for name in ("ant/1.jpg", "cat/0.jpg"):
        write(folder / "val" / name, JPEG[:100])
    made = batches(folder, False, batch_size=2, skip_bad=True)
    shown = epoch(made)
    assert torch.equal(torch.cat([images for images, _ in shown]), whole[[0, 2, 3, 4, 5]])
    assert torch.cat([labels for _, labels in shown]).tolist() == [0, 0, 1, 1, 1]
    assert len(made.bad) == 2


def test_files_that_are_too_many_to_skip(folder):
    made = batches(folder, batch_size=12, skip_bad=True)
    for path in data.load(folder).train.paths[:11]:
        write(folder / path, b"")
    with pytest.raises(DataError, match="11 of 17 images cannot be read, too many to leave out: is their disk all"):
        epoch(made)
