#!/usr/bin/env python
"""Trains a network on CIFAR images the way most tutorials do: the yardstick for the other benchmarks.

    python benchmarks/plain.py --model resnet32 --data path/to/cifar --epochs 1

A data set of PIL images with torchvision's transforms, a DataLoader with 2 workers, single precision, and the loss and
the number of correct images read after every batch. It is written to be plain, not to be slow.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from grafting_cifar import data, models


class Images(Dataset):
    """A split as torchvision's CIFAR10 gives it: one image at a time, as a PIL image, transformed."""

    def __init__(self, split, transform):
        self.images = split.images.numpy()
        self.targets = split.labels.tolist()
        self.transform = transform

    def __getitem__(self, index):
        image = Image.fromarray(self.images[index])
        return self.transform(image), self.targets[index]

    def __len__(self):
        return len(self.targets)


def make_loader(split, batch_size, workers, train):
    steps = [transforms.ToTensor(), transforms.Normalize(data.MEAN, data.STD)]
    if train:
        steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *steps]
    images = Images(split, transforms.Compose(steps))
    return DataLoader(images, batch_size, shuffle=train, num_workers=workers, persistent_workers=workers > 0)


def train(network, loader, criterion, optimizer, device):
    network.train()
    train_loss, correct, total = 0, 0, 0
    for inputs, targets in loader:
        inputs, targets = inputs.to(device), targets.to(device)
        optimizer.zero_grad()
        outputs = network(inputs)
        loss = criterion(outputs, targets)
        loss.backward()
        optimizer.step()
        train_loss += loss.item() * targets.size(0)
        predicted = outputs.argmax(1)
        total += targets.size(0)
        correct += predicted.eq(targets).sum().item()
    return train_loss / total, 100 * correct / total


@torch.no_grad()
def test(network, loader, device):
    network.eval()
    correct, total = 0, 0
    for inputs, targets in loader:
        inputs, targets = inputs.to(device), targets.to(device)
        predicted = network(inputs).argmax(1)
        total += targets.size(0)
        correct += predicted.eq(targets).sum().item()
    return 100 * correct / total


def make_training(name, classes, device):
    network = models.build(name, classes).to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    return network, nn.CrossEntropyLoss(), optimizer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet32", choices=models.NAMES, metavar="NAME", help="(default: resnet32)")
    parser.add_argument("--data", default="glyphs", help="as for grafting_cifar/grafting.py (default: glyphs)")
    parser.add_argument("--images", type=int, help="of the training set (default: all)")
    parser.add_argument("--epochs", type=int, default=1, help="(default: 1)")
    parser.add_argument("--batch_size", type=int, default=128, help="(default: 128)")
    parser.add_argument("--workers", type=int, default=2, help="of the DataLoader (default: 2)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args()

    images = data.select(data.load(args.data), args.images)
    train_loader = make_loader(images.train, args.batch_size, args.workers, train=True)
    test_loader = make_loader(images.test, 100, args.workers, train=False)
    network, criterion, optimizer = make_training(args.model, len(images.classes), args.device)
    for epoch in range(args.epochs):
        began = time.time()
        loss, accuracy = train(network, train_loader, criterion, optimizer, args.device)
        seconds = time.time() - began
        test_accuracy = test(network, test_loader, args.device)
        print(f"epoch {epoch}: loss {loss:.3f}, train {accuracy:.2f} %, test {test_accuracy:.2f} %, {seconds:.1f} s")


if __name__ == "__main__":
    main()
