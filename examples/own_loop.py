"""Two networks in a training loop of your own, a process each, which graft through files in a shared directory.

    python examples/own_loop.py 1 & python examples/own_loop.py 2

Killed at any moment and started again, a network goes on from its last checkpoint to the very same weights.
"""

import logging
import sys

import torch
from task import build, test, train

from filter_grafting import FileRing, Grafting

logging.basicConfig(level=logging.INFO, format="%(message)s")  # a network that waits says for whom
NETWORK, EPOCHS = int(sys.argv[1]), 4

model = build(NETWORK)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
with FileRing("own_loop_run", NETWORK, 2, settings={"lr": 0.05}, resume=True) as ring:
    grafting = Grafting(model, ring, checkpoint={"optimizer": optimizer})
    for epoch in range(grafting.round, EPOCHS):
        train(model, optimizer, seed=1000 * NETWORK + epoch)  # an order of its own for each network and epoch
        print(f"network {NETWORK}, epoch {epoch}: accuracy {test(model):.3f}", flush=True)
        if epoch + 1 < EPOCHS:
            grafting.step()
torch.save(model.state_dict(), f"own_loop_run/final{NETWORK}.t7")
