"""Runs of grafting_imagenet/grafting.py as real processes, and the small set of images that they train on."""

import tarfile
from pathlib import Path
from typing import Any

from PIL import Image
from processes import ROOT, Process, Run, until

RANKS = Path(__file__).with_name("ranks.py")
CIFAR_IMAGES = ROOT.parent / "shared" / "data" / "cifar10_jpeg.tar.xz"
CLASSES = ("airplane", "automobile", "bird", "cat")
COUNTS = {"train": 12, "val": 5}  # images per class; 20 for validation, which two ranks share in batches of 6 unequally


def make_class_folders(folder: Path) -> Path:
    """Class folders of CIFAR-10 images, or, where these are not at hand, of the embedded glyphs."""
    places = {(split, name): folder / split / name for split in COUNTS for name in CLASSES}
    for place in places.values():
        place.mkdir(parents=True)
    if CIFAR_IMAGES.exists():
        left = {place: COUNTS[split] for (split, _), place in places.items()}
        with tarfile.open(CIFAR_IMAGES, "r|xz") as archive:
            for member in archive:
                *_, split, name, file = ("", "", *Path(member.name).parts)
                place = places.get(("val" if split == "test" else split, name))
                if left.get(place):
                    (place / file).write_bytes(archive.extractfile(member).read())
                    left[place] -= 1
                if not any(left.values()):
                    return folder
    from grafting_cifar import data

    images = data.load("glyphs")
    for (split, name), place in places.items():
        glyphs = images.train if split == "train" else images.test
        for row in (glyphs.labels == CLASSES.index(name)).nonzero()[: COUNTS[split], 0].tolist():
            Image.fromarray(glyphs.images[row].numpy()).save(place / f"{row}.png")
    return folder


class ImageRun(Run):
    """A ring in one save directory; each network may be trained by several ranks."""

    checkpoint_name, suffix = "pth{}_{}", ".tar"

    def __init__(
        self, directory: Path, data: Path, networks: int = 2, epochs: int = 2, flags: tuple = (), ranks: int = 1
    ):
        super().__init__(directory, data, networks, epochs)
        self.ranks = ranks
        flags_of_all = "-a ranks:tiny -b 12 -j 0 --image_size 32 --lr 0.02 --device cpu -p 0"
        self.flags = ["--data", str(data), *flags_of_all.split(), *flags]

    def start(self, network: int, *flags: str, ranks: int | None = None, **options: Any) -> Process:
        """Starts one network; its process is torchrun's, or that of the network itself if it has one rank."""
        arguments = [str(ranks or self.ranks), *self.arguments(network, *map(str, flags))]
        self.started.append(Process(RANKS, arguments, self.logs / f"{network}.log", **options))
        return self.started[-1]

    def pids(self, network: int, process: Process) -> list[int]:
        """The process ids of a network's ranks, once it trains or waits."""
        until(lambda: self.status(network).get("epoch") is not None, what=lambda: process.output())
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        lead = self.status(network)["pid"]
        assert str(lead) in children
        return [lead, *sorted(int(pid) for pid in children if int(pid) != lead)]
