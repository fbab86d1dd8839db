#!/usr/bin/env python
"""How long networks wait for each other: from a checkpoint's rename to its weights in the reader, and whole rings.

    python benchmarks/exchange.py
    python benchmarks/exchange.py --sizes 2 20 --repetitions 20 --networks 2 4 --epochs 3

First table: two processes; one publishes checkpoints, the other waits for each of them as a network does. The clock
starts at the rename that makes a checkpoint appear (the moment before it, in the writer), and stops when the reader has
its weights.

Second table: rings of N processes whose epochs are a sleep. What an epoch takes beyond the sleep is the cost of the
exchange, and should not grow with N.
"""

import multiprocessing
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from benchmarks import tools
from filter_grafting.exchange import Ring

ENTRIES = 200  # of a state dict; a ResNet-32 has 159


def enter(directory: str, network: int, networks: int) -> Ring:
    ring = Ring(directory, network, networks, timeout=120)
    ring.join(resume=False)
    ring.agree({"num": networks})
    return ring


def weights(megabytes: float) -> dict[str, torch.Tensor]:
    count = max(1, round(megabytes * 1e6 / 4 / ENTRIES))
    return {f"layer{k}.weight": torch.randn(count) for k in range(ENTRIES)}


# From rename to weights


def write(directory: str, megabytes: float, repetitions: int, line: Connection) -> None:
    """Network 2: publishes a checkpoint soon after the reader has asked for it, and tells when it was renamed."""
    torch.set_num_threads(1)
    ring, contents, renamed = enter(directory, 2, 2), {"net": weights(megabytes)}, []
    replace = os.replace

    def replace_and_tell(source: str, target: str) -> None:
        moment = time.monotonic()  # the same clock in all processes
        replace(source, target)
        if str(target).endswith(".t7"):
            renamed.append(moment)

    os.replace = replace_and_tell
    random.seed(0)
    for epoch in range(repetitions + 1):
        line.recv()
        time.sleep(random.uniform(0.05, 0.15))  # at any moment between two looks of the reader
        ring.publish(epoch, contents)
        ring.flush()
        line.send(renamed[-1])
    ring.leave("done")


def read(directory: str, repetitions: int, line: Connection, results: Connection) -> None:
    """Network 1, which waits."""
    torch.set_num_threads(1)
    ring, seconds = enter(directory, 1, 2), []
    for epoch in range(repetitions + 1):
        ring.publish(epoch, {"net": {"weight": torch.zeros(1)}})
        ring.flush()
        line.send("waiting")
        ring.wait(epoch)
        arrived = time.monotonic()
        seconds.append(arrived - line.recv())
    ring.leave("done")
    results.send(seconds[1:])  # without the first, in which modules are imported


def measure_latency(megabytes: float, repetitions: int, folder: str) -> dict[str, object]:
    context = multiprocessing.get_context("spawn")
    writer_end, reader_end = context.Pipe()
    results, sender = context.Pipe(duplex=False)
    directory = tempfile.mkdtemp(dir=folder)
    processes = [
        context.Process(target=write, args=(directory, megabytes, repetitions, writer_end)),
        context.Process(target=read, args=(directory, repetitions, reader_end, sender)),
    ]
    try:
        milliseconds = [1000 * value for value in gather(processes, results, 1)[0]]
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return {
        "checkpoint (MB)": megabytes,
        "n": repetitions,
        "median (ms)": statistics.median(milliseconds),
        "worst (ms)": max(milliseconds),
        "best (ms)": min(milliseconds),
    }


# Rings


def train(
    directory: str, network: int, networks: int, epochs: int, nap: float, ready: Barrier, out: Connection
) -> None:
    torch.set_num_threads(1)
    ring = enter(directory, network, networks)
    contents = {"net": weights(0.1)}
    ready.wait(timeout=600)
    began = time.monotonic()
    for epoch in range(epochs):
        ring.update("training", epoch=epoch)
        time.sleep(nap)
        ring.publish(epoch, contents)
        if networks > 1:
            ring.wait(epoch)
    ring.flush()
    out.send((began, time.monotonic()))
    ring.leave("done")


def measure_ring(networks: int, epochs: int, nap: float, folder: str) -> float:
    """Wall seconds per epoch, from the first network's first to the last one's last."""
    context = multiprocessing.get_context("spawn")
    directory, ready = tempfile.mkdtemp(dir=folder), context.Barrier(networks)
    results, sender = context.Pipe(duplex=False)
    processes = [
        context.Process(target=train, args=(directory, network, networks, epochs, nap, ready, sender))
        for network in range(1, networks + 1)
    ]
    try:
        begins, ends = zip(*gather(processes, results, networks), strict=True)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return (max(ends) - min(begins)) / epochs


def gather(processes: list, results: Connection, count: int) -> list:
    """What `count` of the processes send; raises if one of them fails."""
    for process in processes:
        process.start()
    try:
        received = []
        while len(received) < count:
            if results.poll(0.2):
                received.append(results.recv())
            elif failed := [process.name for process in processes if process.exitcode not in (None, 0)]:
                raise SystemExit(f"{', '.join(failed)} failed")
        return received
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()


def main() -> None:
    parser = tools.parser(__doc__, repetitions=100)
    parser.add_argument(
        "--sizes", nargs="*", type=float, default=[2, 20, 200], metavar="MB", help="of checkpoints (default: 2 20 200)"
    )
    parser.add_argument(
        "--networks", nargs="*", type=tools.at_least(1), default=[1, 2, 4, 8, 16], metavar="N",
        help="in a ring (default: 1 2 4 8 16)",
    )  # fmt: skip
    parser.add_argument("--epochs", type=tools.at_least(1), default=10, help="of a ring (default: 10)")
    parser.add_argument("--sleep", type=float, default=1.0, metavar="SECONDS", help="an epoch's training (default: 1)")
    parser.add_argument("--rings", type=tools.at_least(1), default=3, help="of each N, in turns (default: 3)")
    parser.add_argument("--folder", help="where to write (default: the system's folder for temporary files)")
    args = parser.parse_args()
    if args.sizes:
        tools.report(
            "exchange, latency",
            "From the rename of a neighbour's checkpoint to its weights in memory, in another process.",
            [measure_latency(size, args.repetitions, args.folder) for size in args.sizes],
            args.json,
        )
    if args.networks:
        seconds = {networks: [] for networks in args.networks}
        for _ in range(args.rings):
            for networks in args.networks:
                seconds[networks].append(measure_ring(networks, args.epochs, args.sleep, args.folder))
        smallest = 2 if 2 in seconds else args.networks[0]
        tools.report(
            "exchange, rings",
            f"Rings of N processes that sleep {args.sleep:g} s an epoch; {args.epochs} epochs, n = {args.rings} rings "
            f"of each, in turns; medians (lowest to highest).",
            [
                {
                    "N": networks,
                    "wall time per epoch (s)": sample,
                    "beyond the sleep (ms)": 1000 * (statistics.median(sample) - args.sleep),
                    f": that of N = {smallest}": tools.ratio(sample, seconds[smallest]),
                }
                for networks, sample in seconds.items()
            ],
            args.json,
        )


if __name__ == "__main__":
    main()
