"""Runs of grafting_imagenet/grafting.py as real processes."""

from pathlib import Path
from typing import Any

from processes import Process, Run, until

RANKS = Path(__file__).with_name("ranks.py")


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
