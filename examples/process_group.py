"""The ranks of one torchrun job as a ring: each trains a network, and no folder is shared.

    torchrun --nproc_per_node 2 examples/process_group.py

On several machines the same, with torchrun's --nnodes and --rdzv_endpoint. On GPUs, give "nccl" for "gloo", call
torch.cuda.set_device(int(os.environ["LOCAL_RANK"])) first, and put the model and the images there.
"""

import torch
import torch.distributed as dist
from task import build, test, train

from filter_grafting import Grafting, ProcessGroupRing

EPOCHS = 4

dist.init_process_group("gloo")
ring = ProcessGroupRing()
model = build(ring.network)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
grafting = Grafting(model, ring)
for epoch in range(EPOCHS):
    train(model, optimizer, seed=1000 * ring.network + epoch)  # an order of its own for each network and epoch
    print(f"network {ring.network}, epoch {epoch}: accuracy {test(model):.3f}", flush=True)
    if epoch + 1 < EPOCHS:
        grafting.step()
dist.destroy_process_group()
