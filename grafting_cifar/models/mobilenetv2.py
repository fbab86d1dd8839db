"""MobileNetV2 for 32x32 images (Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks").

It differs from the ImageNet network as the published CIFAR one does: stride 1 in the stem and in the second
stage (the images are small), ReLU instead of ReLU6, and a 1x1 convolution on the shortcut wherever a block of
stride 1 changes the number of channels. A width below 1 makes every layer narrower but the last convolution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Expansion, filters, blocks, stride of the first block.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _conv1x1(inputs: int, filters: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, filters, kernel_size=1, bias=False)


class Block(nn.Module):
    """Inverted residual: expand (1x1), filter each channel (3x3, depthwise), project (1x1, no activation)."""

    def __init__(self, inputs: int, filters: int, expansion: int, stride: int) -> None:
        super().__init__()
        middle = expansion * inputs
        self.conv1 = _conv1x1(inputs, middle)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride=stride, padding=1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = _conv1x1(middle, filters)
        self.bn3 = nn.BatchNorm2d(filters)
        self.stride = stride
        self.shortcut = nn.Sequential()
        if stride == 1 and inputs != filters:
            self.shortcut = nn.Sequential(_conv1x1(inputs, filters), nn.BatchNorm2d(filters))

    def forward(self, x: Tensor) -> Tensor:  # (n, inputs, h, w) -> (n, filters, h / stride, w / stride)
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self._filter_channels(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        return out + self.shortcut(x) if self.stride == 1 else out

    def _filter_channels(self, x: Tensor) -> Tensor:
        if self.stride == 1 or x.device.type != "cpu":
            return self.conv2(x)
        # On a CPU, its gradient takes up to twenty times as long in bfloat16 as in fp32: autocast is to leave it out.
        with torch.autocast("cpu", enabled=False):
            return self.conv2(x.to(self.conv2.weight.dtype))


def _scaled(filters: int, width: float) -> int:
    """width times as many filters, to a multiple of 8 that is at least nine tenths of that, as the authors round it."""
    rounded = max(8, int(filters * width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * filters * width else rounded


class MobileNetV2(nn.Module):
    def __init__(self, num_classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        inputs = _scaled(32, width)
        self.conv1 = nn.Conv2d(3, inputs, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        blocks = []
        for expansion, filters, count, stride in _STAGES:
            filters = _scaled(filters, width)
            for k in range(count):
                blocks.append(Block(inputs, filters, expansion, stride if k == 0 else 1))
                inputs = filters
        self.layers = nn.Sequential(*blocks)
        self.conv2 = _conv1x1(inputs, 1280)
        self.bn2 = nn.BatchNorm2d(1280)
        self.linear = nn.Linear(1280, num_classes)

    def forward(self, x: Tensor) -> Tensor:  # (n, 3, 32, 32) -> (n, num_classes)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layers(x)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def mobilenetv2(num_classes: int = 10, width: float = 1.0) -> MobileNetV2:
    return MobileNetV2(num_classes, width)
