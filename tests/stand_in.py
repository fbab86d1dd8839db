"""Stands in for the authors' own script: a network that knows nothing but the wire format of the save directory.

    python stand_in.py DIRECTORY NETWORK NETWORKS EPOCHS

It writes no status file, writes its checkpoints in place and slowly, looks for the neighbour's now and then, loads it
as soon as the file is there, and blends by a simple average. Instead of training, it adds noise.
"""

import io
import os
import sys
import time

import torch

from grafting_cifar.models import build

directory, network, networks, epochs = sys.argv[1], *map(int, sys.argv[2:])
torch.manual_seed(network)
net = build("resnet20", 2)

for epoch in range(epochs):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    state = {"net": net.state_dict(), "acc": 50.0, "epoch": epoch}
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=epoch % 2 == 0)  # of old torch, or of new
    data = buffer.getvalue()
    os.makedirs(directory, exist_ok=True)
    with open(f"{directory}/ckpt{network % networks}_{epoch}.t7", "wb", buffering=0) as file:
        for part in range(4):
            file.write(data[part * len(data) // 4 : (part + 1) * len(data) // 4])
            time.sleep(0.05)

    path = f"{directory}/ckpt{network - 1}_{epoch}.t7"
    began = time.monotonic()
    while not os.path.exists(path):
        time.sleep(0.5)
        assert time.monotonic() - began < 300, f"there is no {path}"
    neighbour = torch.load(path, weights_only=False)["net"]
    for name, entry in net.state_dict().items():
        entry.copy_((entry + neighbour[name]) / 2)
    print(f"Network:{network}    epoch:{epoch}    accuracy:50.000    best:50.000", flush=True)
