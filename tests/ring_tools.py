"""Tools of the tests of rings: a clock that runs ahead, neighbours on paper, and processes of a group."""

import heapq
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from filter_grafting.checkpoint import write_atomically


def in_processes(work: Callable[[int, Path], None], count: int, folder: Path) -> None:
    """Runs `work(rank, folder)` in each process of a gloo group; they are forked, so that torch is imported once."""
    mp.start_processes(_work, (work, count, folder), nprocs=count, daemon=True, start_method="fork")


def _work(rank: int, work: Callable[[int, Path], None], count: int, folder: Path) -> None:
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=count)
    try:
        work(rank, folder)
    finally:
        dist.destroy_process_group()


def write_status(directory: Path, network: int, **fields: object) -> None:
    """The status file of a network that is only on paper, on a host whose locks say nothing here."""
    status = {"network": network, "num": 2, "state": "training", "detail": "", "epoch": 6, "host": "elsewhere"}
    data = json.dumps({**status, "pid": 1, "time": 0, "beat": 0, **fields}).encode()
    write_atomically(directory / f"network{network}.json", data, durable=False)


def snapshot(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()} if directory.exists() else {}


class Clock:
    """Stands in for the module `time`: a wait of hours takes no time, and things happen at chosen moments of it."""

    def __init__(self) -> None:
        self.now, self.plan = 5000.0, []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(1.0, seconds)
        while self.plan and self.plan[0][0] <= self.now:
            heapq.heappop(self.plan)[2]()

    def after(self, seconds: float, action: Callable[[], object]) -> None:
        heapq.heappush(self.plan, (self.now + seconds, len(self.plan), action))

    def every(self, seconds: float, action: Callable[[], object], until: float) -> None:
        for count in range(1, int(until / seconds) + 1):
            self.after(count * seconds, action)
