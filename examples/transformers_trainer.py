"""Two ConvNeXts, each a process with the Trainer of transformers, which graft after every epoch.

    python examples/transformers_trainer.py 1 & python examples/transformers_trainer.py 2

Killed and started again, a network goes on from the Trainer's last checkpoint.
"""

import sys
from typing import Any

import numpy as np
import torch
from task import images
from torch import nn
from transformers import ConvNextConfig, ConvNextForImageClassification, EvalPrediction, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from filter_grafting import FileRing
from filter_grafting.callbacks.transformers import GraftingCallback

NETWORK, DIRECTORY = int(sys.argv[1]), "transformers_run"


def dataset(seed: int) -> Any:
    pairs = zip(*images(256, seed, noise=1), strict=True)
    return [{"pixel_values": image, "labels": label} for image, label in pairs]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(np.argmax(prediction.predictions, axis=-1) == prediction.label_ids))}


torch.manual_seed(NETWORK)  # each network starts from weights of its own
shape: dict[str, Any] = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 4}
model = ConvNextForImageClassification(ConvNextConfig(**shape, num_stages=2, hidden_sizes=[16, 32], depths=[1, 1]))
output = f"{DIRECTORY}/trainer{NETWORK}"
often: dict[str, Any] = {"eval_strategy": "epoch", "save_strategy": "epoch", "report_to": "none", "use_cpu": True}
arguments = TrainingArguments(output, num_train_epochs=4, learning_rate=3e-3, seed=NETWORK, **often)
with FileRing(DIRECTORY, NETWORK, 2, settings={"lr": 3e-3}, resume=True) as ring:
    # Most of its weights are in linear layers.
    callbacks: list[Any] = [GraftingCallback(ring, layers=(nn.Conv2d, nn.Linear))]
    data = {"train_dataset": dataset(seed=1), "eval_dataset": dataset(seed=2)}
    trainer = Trainer(model, arguments, compute_metrics=accuracy, callbacks=callbacks, **data)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(output))  # None on a first run
