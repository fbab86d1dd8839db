#!/usr/bin/env python
"""How long networks wait for each other: from a checkpoint's rename to its weights in the reader, and whole rings.

    python benchmarks/exchange.py
    python benchmarks/exchange.py --sizes 2 20 --repetitions 20 --networks 2 4 --epochs 3

First table: two processes; one publishes checkpoints, the other waits for each of them as a network does. The clock
starts at the rename that makes a checkpoint appear, and stops when the reader has its weights on the device.

Second table: rings of N processes whose epochs are a sleep. What an epoch takes beyond the sleep is the cost of the
exchange, and should not grow with N.
"""

import multiprocessing
import os
import random
import sys
import tempfile
import time
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from benchmarks import tools
from filter_grafting import FileRing

ENTRIES = 200  # of a state dict; a ResNet-32 has 159


def weights(megabytes: float, device: torch.device) -> dict[str, torch.Tensor]:
    size = max(1, round(megabytes * 1e6 / 4 / ENTRIES))
    return {f"layer{k}.weight": torch.randn(size, device=device) for k in range(ENTRIES)}


def write(directory: str, megabytes: float, repetitions: int, device: torch.device, line: Connection) -> None:
    """Network 2: publishes a checkpoint soon after the reader has asked for it, and tells when it was renamed."""
    torch.set_num_threads(1)
    contents, renamed, replace = weights(megabytes, device), [], os.replace

    def replace_and_tell(source: str, target: str) -> None:
        moment = time.monotonic()  # the same clock in all processes
        replace(source, target)
        if str(target).endswith(".t7"):
            renamed.append(moment)

    os.replace = replace_and_tell
    random.seed(0)
    with FileRing(directory, 2, 2, timeout=120) as ring:
        for epoch in range(repetitions + 1):
            line.recv()
            time.sleep(random.uniform(0.05, 0.15))  # at any moment between two looks of the reader
            ring.publish(epoch, contents)
            line.send(renamed[-1])


def read(directory: str, repetitions: int, device: torch.device, line: Connection, out: Connection) -> None:
    """Network 1, which waits; sends the milliseconds of each repetition as soon as it has them."""
    torch.set_num_threads(1)
    with FileRing(directory, 1, 2, timeout=120) as ring:
        for epoch in range(repetitions + 1):
            ring.publish(epoch, {"weight": torch.zeros(1)})
            line.send("waiting")
            state = {key: entry.to(device) for key, entry in ring.wait(epoch).items()}
            del state
            tools.wait_for(device)
            arrived = time.monotonic()
            milliseconds = 1000 * (arrived - line.recv())
            if epoch:  # in the first one modules are imported
                out.send(milliseconds)


def train(directory: str, network: int, networks: int, epochs: int, nap: float, ready: Barrier, out: Connection):
    torch.set_num_threads(1)
    with FileRing(directory, network, networks, timeout=120) as ring:
        contents = weights(0.1, torch.device("cpu"))
        ready.wait(timeout=600)
        began = time.monotonic()
        for epoch in range(epochs):
            time.sleep(nap)
            ring.publish(epoch, contents)
            if networks > 1:
                ring.wait(epoch)
        out.send((began, time.monotonic()))


def gather(processes: list, results: Connection, count: int) -> list:
    """What the processes send, up to `count` things: fewer, if one of them fails, and a word about it."""
    for process in processes:
        process.start()
    received, living = [], [process.sentinel for process in processes]
    try:
        while len(received) < count:
            if results in wait([results, *living]):
                received.append(results.recv())
            elif failed := [process.name for process in processes if process.exitcode]:
                print(f"{', '.join(failed)} failed; the message is above", file=sys.stderr, flush=True)
                return received
            else:
                living = [process.sentinel for process in processes if process.exitcode is None]
        return received
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()


def measure_latency(megabytes: float, repetitions: int, device: torch.device, folder: str | None) -> list[float]:
    context = multiprocessing.get_context("spawn")
    (mine, other), (results, out) = context.Pipe(), context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        writer = context.Process(target=write, args=(directory, megabytes, repetitions, device, mine))
        reader = context.Process(target=read, args=(directory, repetitions, device, other, out))
        return gather([writer, reader], results, repetitions)


def measure_ring(networks: int, epochs: int, nap: float, folder: str | None) -> list[float]:
    """Wall seconds per epoch, from the first network's first to the last one's last; nothing if one failed."""
    context = multiprocessing.get_context("spawn")
    ready, (results, out) = context.Barrier(networks), context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        shared = (networks, epochs, nap, ready, out)
        members = [context.Process(target=train, args=(directory, i, *shared)) for i in range(1, networks + 1)]
        times = gather(members, results, networks)
    return (
        [(max(end for _, end in times) - min(begin for begin, _ in times)) / epochs] if len(times) == networks else []
    )


def main() -> int:
    parser = tools.parser(__doc__, repetitions=100)
    tools.add_device(parser)
    flag, whole = parser.add_argument, True
    flag("--sizes", nargs="*", type=float, default=[2, 20, 200], metavar="MB", help="of checkpoints")
    flag("--networks", nargs="*", type=tools.count, default=[1, 2, 4, 8, 16], metavar="N", help="in a ring")
    flag("--epochs", type=tools.count, default=10, help="of a ring")
    flag("--sleep", type=float, default=1.0, metavar="SECONDS", help="an epoch's training")
    flag("--rings", type=tools.count, default=3, help="of each N")
    flag("--folder", metavar="DIR", help="where to write (default: the system's folder for temporary files)")
    args = parser.parse_args()
    device = tools.device_of(parser, args)
    caption = f"From the rename of a neighbour's checkpoint to its weights on {device.type}, in another process."
    table = tools.Table("exchange, latency", caption, args.json, device)
    for size in args.sizes:
        sample = measure_latency(size, args.repetitions, device, args.folder)
        whole &= len(sample) == args.repetitions
        table.add(**{"checkpoint (MB)": size, "n": len(sample), "latency (ms)": sample})
    caption = (
        f"Rings of N processes that sleep {args.sleep:g} s an epoch; {args.epochs} epochs, {args.rings} rings each."
    )
    table = tools.Table("exchange, rings", caption, args.json, device)
    for networks in args.networks:
        sample = []
        for _ in range(args.rings):
            sample += measure_ring(networks, args.epochs, args.sleep, args.folder)
        whole &= len(sample) == args.rings
        beyond = [1000 * (seconds - args.sleep) for seconds in sample]
        table.add(
            **{"N": networks, "n": len(sample), "wall time per epoch (s)": sample, "beyond the sleep (ms)": beyond}
        )
    return int(not whole)


if __name__ == "__main__":
    sys.exit(main())
