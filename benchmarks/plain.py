"""Trains a network on CIFAR images the way most tutorials do: the yardstick for the other benchmarks.

A data set of PIL images with torchvision's transforms, a DataLoader with workers, single precision, and the loss and
the number of correct images read after every batch. It is written to be plain, not to be slow.
"""

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

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


def make_loader(split, batch_size, workers):
    steps = [
        transforms.RandomCrop(32, padding=4),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(data.MEAN, data.STD),
    ]
    images = Images(split, transforms.Compose(steps))
    return DataLoader(images, batch_size, shuffle=True, num_workers=workers, persistent_workers=True)


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


def make_training(name, classes, device):
    network = models.build(name, classes).to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    return network, nn.CrossEntropyLoss(), optimizer
