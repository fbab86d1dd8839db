"""Three networks that train in turn in one process, and graft without files: `graft_ring` blends all at once.

python examples/one_process.py
"""

import torch
from task import build, test, train

from filter_grafting import graft_ring

NETWORKS, EPOCHS = 3, 4

models = [build(network) for network in range(1, NETWORKS + 1)]
optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in models]
for epoch in range(EPOCHS):
    for k, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
        train(model, optimizer, seed=1000 * k + epoch)  # an order of its own for each network and epoch
    print(f"epoch {epoch}: accuracies {', '.join(f'{test(model):.3f}' for model in models)}")
    if epoch + 1 < EPOCHS:
        found = graft_ring(models)
        print("  network 1 keeps", {name: layer.coefficient for name, layer in found[0].items()})
