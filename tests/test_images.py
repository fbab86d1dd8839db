"""Class folders: which files count, which splits, what is said about the rest; and pixels as both scripts see them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from training.images import DataError, checksum, class_folders, normalised, rgb


def write(path, contents=b"an image, as far as anyone has looked"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents)
    return path


@pytest.fixture
def folder(tmp_path):
    """Three classes; 6 training and 4 test images."""
    for split, counts in (("train", (3, 2, 1)), ("test", (1, 2, 1))):
        for name, count in zip(("ant", "bee", "cat"), counts, strict=True):
            for k in range(count):
                write(tmp_path / split / name / f"{k}.jpg")
    return tmp_path


def names(files):
    return [Path(path).name for path in files.paths]


def test_labels_are_ranks_of_sorted_classes_and_paths_are_sorted(folder):
    images = class_folders(str(folder))
    assert images.classes == ["ant", "bee", "cat"]
    assert images.train.paths == [str(path) for path in sorted(folder.glob("train/*/*"))]
    assert images.train.labels.tolist() == [0, 0, 0, 1, 1, 2] and images.train.labels.dtype == torch.int64
    assert images.test.labels.tolist() == [0, 1, 1, 2] and len(images.test) == 4
    assert images.val is None and images.notes == []
    for name in ("x.JPEG", "x.webp", "x.TIFF"):
        write(folder / "train/ant/more/deep" / name)
    train = class_folders(folder).train
    assert sorted(zip(train.paths, train.labels.tolist(), strict=True)) == sorted(ImageFolder(folder / "train").samples)
    write(folder / "train/cat/x.jfif")
    assert "x.jfif" in names(class_folders(folder).train), "which torchvision passes over"


def test_hidden_and_system_files_are_left_out_and_counted(folder):
    expected = class_folders(folder)
    hidden = ["train/.thumbnails/0.jpg", "train/@eaDir/0.jpg", "train/bee/@eaDir/0.jpg/THUMB.jpg", "train/bee/._0.jpg"]
    for path in [*hidden, "train/bee/Thumbs.db", "test/ant/notes.txt"]:
        write(folder / path)
    images = class_folders(folder)
    assert [split.paths for split in (images.train, images.test)] == [expected.train.paths, expected.test.paths]
    assert images.classes == expected.classes
    assert images.notes == [f"left out of {folder}: 4 files that are hidden or no images, such as test/ant/notes.txt"]


def test_which_split_is_for_what(folder):
    shutil.copytree(folder / "test", folder / "val")
    write(folder / "val/cat/only.jpg")
    images = class_folders(folder)
    assert "only.jpg" in names(images.val) and "only.jpg" not in names(images.test)
    shutil.rmtree(folder / "test")
    for _ in range(2):  # without test/, then with one that has no class folders, as ImageNet's
        images = class_folders(folder)
        assert images.val is None and "only.jpg" in names(images.test)
        write(folder / "test/0.jpg")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (shutil.rmtree, "does not exist: the images of each class belong into train/<class>/"),
        (lambda folder: (folder / "train").rename(folder / "training"), "lacks class folders in train/, or"),
        (lambda folder: shutil.rmtree(folder / "test"), "lacks class folders in train/, or in test/ and val/"),
        (lambda folder: (folder / "train/ant").rename(folder / "train/emu"), "but one of them alone has ant, emu"),
        (lambda folder: write(folder / "val/ant/0.jpg"), "train/ and val/ of .*, but one of them alone has bee, cat"),
    ],
)
def test_a_mistaken_folder_is_answered_with_one_sentence(folder, change, words):
    change(folder)
    with pytest.raises(DataError, match=words) as caught:
        class_folders(folder)
    assert str(folder) in str(caught.value)


def test_a_checksum_of_labels_in_their_order_stays_what_it_is_in_checkpoints():
    assert checksum(torch.tensor([1, 0, 2])) == "60c1a87a"


# ---- Pixels

GREY = np.full((4, 4), 200)
COLOURS = {
    "grey": (Image.fromarray(GREY.astype(np.uint8)), [200] * 3),
    "16 bits": (Image.fromarray(GREY.astype(np.uint16) * 257), [200] * 3),
    "16 bits in 32": (Image.fromarray(GREY.astype(np.int32) * 256), [200] * 3),
    "RGBA": (Image.new("RGBA", (4, 4), (10, 20, 30, 99)), [10, 20, 30]),
    "palette": (Image.new("RGB", (4, 4), (10, 20, 30)).quantize(), [10, 20, 30]),
    "CMYK": (Image.new("CMYK", (4, 4), (255, 0, 0, 0)), [0, 255, 255]),
}


@pytest.mark.parametrize("kind", COLOURS)
def test_every_kind_of_image_becomes_rgb(kind):
    image, colour = COLOURS[kind]
    assert np.array(rgb(image)).reshape(-1, 3).tolist() == [colour] * 16


@pytest.mark.parametrize(("height", "width"), [(5, 7), (40, 30)])
def test_normalised_equals_torchvision(height, width):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    images = torch.randint(256, (3, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours = normalised(images, mean, std)
    theirs = transforms.Normalize(mean, std)(images.permute(0, 3, 1, 2) / 255)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert ours.dtype == torch.float32 and ours.is_contiguous(memory_format=torch.channels_last)
