#!/usr/bin/env python
"""How long networks wait for each other: from a checkpoint's rename to its weights in the reader, and whole rings.

    python benchmarks/exchange.py
    python benchmarks/exchange.py --sizes 2 20 --repetitions 20 --networks 2 4 --epochs 3

First table: two processes; one publishes checkpoints, the other waits for each of them as a network does. The clock
starts at the rename that makes a checkpoint appear, and stops when the reader has its weights on the device.

Second table: rings of N processes whose epochs are a sleep. What an epoch takes beyond the sleep is the cost of the
exchange, and should not grow with N. In the first epoch the processes start: it does not count.
"""

import os
import random
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from benchmarks import tools
from filter_grafting import FileRing

ENTRIES = 200  # of a state dict; a ResNet-32 has 159


class Network(NamedTuple):
    sleep: tuple[float, float]  # an epoch's, in seconds: at least, at most
    megabytes: float  # that it publishes


def train(folder: str, i: int, ring: list[Network], epochs: int, device: torch.device) -> list[tuple[float, float]]:
    """Of each epoch of network i: the moment of its end, and the seconds from the neighbour's rename to its weights."""
    torch.set_num_threads(1)
    size = max(1, round(ring[i - 1].megabytes * 1e6 / 4 / ENTRIES))
    contents, results = {f"layer{k}.weight": torch.randn(size, device=device) for k in range(ENTRIES)}, []
    with FileRing(folder, i, len(ring), timeout=120) as exchange:
        for epoch in range(epochs):
            time.sleep(random.uniform(*ring[i - 1].sleep))
            exchange.publish(epoch, contents)
            latency = 0.0
            if len(ring) > 1:
                found = exchange.wait(epoch)
                _ = {key: entry.to(device) for key, entry in found.items()}
                tools.wait_for(device)
                latency = time.time() - os.stat(found.source).st_ctime  # a file's is that of its rename
            results.append((time.monotonic(), latency))  # the same clock in all processes
    return results


def run(ring: list[Network], epochs: int, device: torch.device) -> list[list[tuple[float, float]]]:
    """What each network of a ring returns."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(len(ring), tools.processes()) as pool:
        networks = [pool.submit(train, folder, i, ring, epochs, device) for i in range(1, len(ring) + 1)]
        return [network.result() for network in networks]


def main(arguments: list[str] | None = None) -> None:
    parser = tools.parser(__doc__, repetitions=100)
    flag = parser.add_argument
    flag("--sizes", nargs="*", type=float, default=[2, 20, 200], metavar="MB", help="of checkpoints")
    flag("--networks", nargs="*", type=tools.count, default=[1, 2, 4, 8, 16], metavar="N", help="in a ring")
    flag("--epochs", type=tools.count, default=10, help="of a ring")
    flag("--sleep", type=float, default=1.0, metavar="SECONDS", help="an epoch's training")
    flag("--rings", type=tools.count, default=3, help="of each N")
    args = tools.parse(parser, arguments)

    caption = f"From the rename of a neighbour's checkpoint to its weights on {args.device}, in another process."
    table = tools.Table("exchange, latency", caption, args)
    for size in args.sizes:
        # The second publishes when the first waits, at any moment between two of its looks.
        reader, _ = run([Network((0, 0), 0.001), Network((0.05, 0.15), size)], args.repetitions + 1, args.device)
        table.add(**{"checkpoint (MB)": size, "latency (ms)": [1000 * latency for _, latency in reader[1:]]})

    caption = (
        f"Rings of N processes that sleep {args.sleep:g} s an epoch; {args.epochs} epochs, {args.rings} rings each."
    )
    table = tools.Table("exchange, rings", caption, args)
    for n in args.networks:
        sample = []
        for _ in range(args.rings):
            results = run([Network((args.sleep, args.sleep), 0.1)] * n, args.epochs + 1, args.device)
            first, *_, last = (max(end for end, _ in epoch) for epoch in zip(*results, strict=True))
            sample.append((last - first) / args.epochs)
        beyond = [1000 * (seconds - args.sleep) for seconds in sample]
        table.add(**{"N": n, "wall time per epoch (s)": sample, "beyond the sleep (ms)": beyond})


if __name__ == "__main__":
    main()
