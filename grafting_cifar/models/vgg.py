"""VGG-16 with batch norm for 32x32 images (Simonyan and Zisserman, "Very Deep Convolutional Networks ...").

The thirteen 3x3 convolutions of the ImageNet network, and one linear layer where it has three: a chain of
convolution and batch-norm pairs without shortcuts, which is what grafting at filter level needs.
"""

import torch
from torch import Tensor, nn

# Filters of the convolutions of each stage; a 2x2 max pooling ends a stage.
_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(nn.Module):
    def __init__(self, stages: tuple[tuple[int, ...], ...], num_classes: int = 10) -> None:
        super().__init__()
        layers, inputs = [], 3
        for stage in stages:
            for filters in stage:
                # In front of a batch norm the bias changes nothing; the published state dicts have it.
                layers += [nn.Conv2d(inputs, filters, kernel_size=3, padding=1), nn.BatchNorm2d(filters)]
                layers += [nn.ReLU(inplace=True)]
                inputs = filters
            layers += [nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:  # (n, 3, 32, 32) -> (n, num_classes)
        return self.classifier(torch.flatten(self.features(x), 1))


def vgg(num_classes: int = 10) -> VGG:
    return VGG(_STAGES, num_classes)
