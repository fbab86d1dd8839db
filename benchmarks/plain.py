"""Trains as most tutorials and the PyTorch ImageNet example do: the yardstick for the other benchmarks.

A data set of PIL images with torchvision's transforms, a DataLoader with workers, single precision, and the loss and
the number of correct images read after every batch. It is written to be plain, not to be slow.
"""

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms


class Images(Dataset):
    """One image at a time, of an array or a file, as a PIL image that is cropped, mirrored and normalised."""

    def __init__(self, images, labels, crop, mean, std):
        self.images, self.labels = images, labels
        steps = [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(mean, std)]
        self.transform = transforms.Compose(steps)

    def __getitem__(self, index):
        image = self.images[index]
        picture = Image.open(image).convert("RGB") if isinstance(image, str) else Image.fromarray(image)
        return self.transform(picture), self.labels[index]

    def __len__(self):
        return len(self.labels)


def make_loader(images, batch_size, workers, device):
    options = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": device.type == "cuda"}
    return DataLoader(images, batch_size, shuffle=True, **options)


def train(network, loader, optimizer, device):
    network.train()
    train_loss, correct, total = 0, 0, 0
    for inputs, targets in loader:
        inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        optimizer.zero_grad()
        outputs = network(inputs)
        loss = torch.nn.functional.cross_entropy(outputs, targets)
        loss.backward()
        optimizer.step()
        train_loss += loss.item() * targets.size(0)
        total += targets.size(0)
        correct += outputs.argmax(1).eq(targets).sum().item()
    return train_loss / total, 100 * correct / total
