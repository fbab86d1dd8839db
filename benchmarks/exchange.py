#!/usr/bin/env python
"""How long networks wait for each other: rings of N processes whose epochs are a sleep.

    python benchmarks/exchange.py
    python benchmarks/exchange.py --sizes 2 20 200 --networks 2 --sleep 0.1 --epochs 100

What an epoch takes beyond the sleep is the cost of the exchange, and should not grow with N. In the first epoch the
processes start: it does not count. The latency is from the rename that makes a neighbour's checkpoint appear, or from
the moment at which its reader begins to wait, if that is later, until the reader has the weights on the device.
"""

import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from benchmarks import tools
from filter_grafting import FileRing

ENTRIES = 200  # of a state dict; a ResNet-32 has 159


def train(
    folder: str, i: int, n: int, epochs: int, sleep: float, megabytes: float, device: torch.device
) -> list[tuple[float, float]]:
    """(moment of its end, latency in seconds) of each epoch of network i of n."""
    torch.set_num_threads(1)
    size = max(1, round(megabytes * 1e6 / 4 / ENTRIES))
    contents, results = {f"layer{k}.weight": torch.randn(size, device=device) for k in range(ENTRIES)}, []
    with FileRing(folder, i, n, timeout=120) as ring:
        for epoch in range(epochs):
            time.sleep(sleep)
            ring.publish(epoch, contents)
            waits_from, latency = time.time(), 0.0
            if n > 1:
                found = ring.wait(epoch)
                _ = {key: entry.to(device) for key, entry in found.items()}
                tools.wait_for(device)
                renamed = os.stat(found.source).st_ctime
                latency = time.time() - max(waits_from, renamed)
            results.append((time.time(), latency))
    return results


def main(arguments: list[str] | None = None) -> None:
    parser = tools.parser(__doc__, repetitions=3)
    flag = parser.add_argument
    flag("--sizes", nargs="+", type=float, default=[2], metavar="MB", help="of checkpoints")
    flag("--networks", nargs="+", type=tools.count, default=[1, 2, 4, 8, 16], metavar="N", help="in a ring")
    flag("--epochs", type=tools.count, default=10, help="of a ring")
    flag("--sleep", type=float, default=1.0, metavar="SECONDS", help="an epoch's training")
    args = tools.parse(parser, arguments)
    what = f"Rings of N processes that sleep {args.sleep:g} s an epoch; {args.epochs} epochs"
    table = tools.Table("exchange", f"{what}, {args.repetitions} rings each.", args)
    for n, size in ((n, size) for n in args.networks for size in args.sizes):
        seconds, latencies = [], []
        for _ in range(args.repetitions):
            with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(n, tools.processes()) as pool:
                options = (n, args.epochs + 1, args.sleep, size, args.device)
                networks = [pool.submit(train, folder, i, *options) for i in range(1, n + 1)]
                results = [network.result() for network in networks]
            first, *_, last = (max(end for end, _ in epoch) for epoch in zip(*results, strict=True))
            seconds.append((last - first) / args.epochs)
            latencies += [1000 * latency for network in results for _, latency in network[1:] if n > 1]
        row = {"N": n, "checkpoint (MB)": size, "latency (ms)": latencies or "–", "wall time per epoch (s)": seconds}
        row["beyond the sleep (ms)"] = [1000 * (one - args.sleep) for one in seconds]
        table.add(**row)


if __name__ == "__main__":
    main()
