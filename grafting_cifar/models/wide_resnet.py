"""Wide residual networks for 32x32 images (Zagoruyko and Komodakis, "Wide Residual Networks"), without dropout.

6n + 4 layers: a 3x3 convolution, three stages of n pre-activation blocks with 16k, 32k and 64k filters, and a linear
layer. Where a block changes the number of channels, a 1x1 convolution of the activated input is its shortcut.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WideBlock(nn.Module):
    """Batch norm, ReLU and a 3x3 convolution, twice, and the shortcut around them."""

    def __init__(self, inputs: int, filters: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, filters, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        self.shortcut = nn.Sequential()
        if inputs != filters:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, filters, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:  # (n, inputs, h, w) -> (n, filters, h / stride, w / stride)
        activated = F.relu(self.bn1(x), inplace=True)
        out = self.conv2(F.relu(self.bn2(self.conv1(activated)), inplace=True))
        return out + (self.shortcut(activated) if len(self.shortcut) else x)


class WideResNet(nn.Module):
    """The network of 6 * blocks + 4 layers, width times as wide as a ResNet."""

    def __init__(self, blocks: int, width: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layer1 = self._stage(blocks, 16, 16 * width, 1)
        self.layer2 = self._stage(blocks, 16 * width, 32 * width, 2)
        self.layer3 = self._stage(blocks, 32 * width, 64 * width, 2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.linear = nn.Linear(64 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.linear.bias)

    @staticmethod
    def _stage(blocks: int, inputs: int, filters: int, stride: int) -> nn.Sequential:
        first = WideBlock(inputs, filters, stride)
        return nn.Sequential(first, *(WideBlock(filters, filters, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:  # (n, 3, 32, 32) -> (n, num_classes)
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = F.relu(self.bn1(x), inplace=True)
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def wide_resnet(num_classes: int = 10) -> WideResNet:
    return WideResNet(4, 10, num_classes)
