"""Glyphs: 12,000 images of the digits 0-9, drawn on the spot, the same for everyone; for tries without a download."""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

SIZE = 32  # pixels, as CIFAR's
VERSION = "2"  # to be raised with every change of the images
CLASSES = list("0123456789")
CHARACTERS = "0123456789ABCDEFGHJKLMNPQRSTUVWXYZ"
LUMA = np.array([299, 587, 114])  # brightness of red, green and blue, in thousandths


def draw() -> list[tuple[Tensor, Tensor]]:
    """The images, uint8 (n, 32, 32, 3), and labels, int64 (n,), to train on (n = 10,000) and to test on (2,000)."""
    random = np.random.default_rng(2020)
    return [draw_split(count, random) for count in (10_000, 2_000)]


def draw_split(count: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    labels = random.permutation(np.arange(count) % 10)
    images = np.stack([draw_image(str(label), random) for label in labels])
    return torch.from_numpy(images), torch.from_numpy(labels)


def draw_image(digit: str, random: np.random.Generator) -> np.ndarray:
    """A bright digit near the middle of a dark ground, over smaller and dimmer glyphs at the edges: uint8 (32, 32, 3).

    Most images are easy to read; some, by the cubes of the blur and the noise, hardly. A network that finds nothing
    easy in its first steps at lr 0.1 turns its features off, and stays at 10 % for epochs: so it was with digits
    brighter or darker than the ground, with clutter of their own brightness, and with noise on every image.
    """
    ground = random.integers(80, size=3)
    image = Image.new("RGB", (SIZE, SIZE), tuple(ground.tolist()))
    for _ in range(random.integers(1, 4)):
        along, across = random.uniform(0, SIZE), SIZE * random.integers(2)
        border = (along, across) if random.random() < 0.5 else (across, along)
        clutter = _glyph(CHARACTERS[random.integers(len(CHARACTERS))], random.integers(12, 19))
        _paint(image, _tilt(clutter, 180, random), border, _ink(ground, 15, 60, random))
    mask = _tilt(_glyph(digit, random.integers(18, 29)), 25, random)
    _paint(image, mask, SIZE / 2 + random.uniform(-3, 3, size=2), _ink(ground, 110, 255, random))
    image = image.filter(ImageFilter.GaussianBlur(4 * random.random() ** 3))
    noise = random.normal(0, 60 * random.random() ** 3, size=(SIZE, SIZE, 3))
    return np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)


def _ink(ground: np.ndarray, least: int, most: int, random: np.random.Generator) -> tuple[int, ...]:
    """A colour that is brighter than the ground by least to most (of 255)."""
    while True:
        ink = random.integers(256, size=3)
        if 1000 * least <= (ink - ground) @ LUMA <= 1000 * most:  # in integers: the same on every machine
            return tuple(ink.tolist())


def _tilt(mask: Image.Image, degrees: float, random: np.random.Generator) -> Image.Image:
    return mask.rotate(random.uniform(-degrees, degrees), Image.Resampling.BICUBIC, expand=True)


def _paint(image: Image.Image, mask: Image.Image, centre: Sequence[float], ink: tuple[int, ...]) -> None:
    image.paste(ink, (round(centre[0] - mask.width / 2), round(centre[1] - mask.height / 2)), mask)


@functools.cache
def _glyph(character: str, size: int) -> Image.Image:
    """The character in Pillow's own font: white on black, cut to its bounding box."""
    font = ImageFont.load_default(size)
    left, top, right, bottom = font.getbbox(character)
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), character, fill=255, font=font)
    return mask
