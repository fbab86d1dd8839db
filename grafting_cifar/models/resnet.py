"""ResNets for 32x32 images (He et al., "Deep Residual Learning for Image Recognition", section 4.2).

6n + 2 layers: a 3x3 convolution, three stages of n blocks with 16, 32 and 64 filters, and a linear layer. The
shortcuts are the paper's option A, which has no parameters: every convolution lies on the main path.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _activation(leaky: bool) -> nn.Module:
    return nn.LeakyReLU(0.01, inplace=True) if leaky else nn.ReLU(inplace=True)


def _conv3x3(inputs: int, filters: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, filters, kernel_size=3, stride=stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and the shortcut around them."""

    def __init__(self, inputs: int, filters: int, stride: int, leaky: bool) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, filters, stride)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = _conv3x3(filters, filters)
        self.bn2 = nn.BatchNorm2d(filters)
        self.activation = _activation(leaky)
        self.stride = stride
        # Zero channels go on both sides, as published: a neighbour's channels must mean the same as ours.
        self.missing = (filters - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:  # (n, inputs, h, w) -> (n, filters, h / stride, w / stride)
        out = self.activation(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.missing:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.missing, self.missing))
        out += x
        return self.activation(out)


class ResNet(nn.Module):
    """The network of 6 * blocks + 2 layers; leaky replaces every ReLU by a leaky one (slope 0.01)."""

    def __init__(self, blocks: int, num_classes: int = 10, leaky: bool = False) -> None:
        super().__init__()
        self.conv1 = _conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.activation = _activation(leaky)
        self.layer1 = self._stage(blocks, 16, 16, 1, leaky)
        self.layer2 = self._stage(blocks, 16, 32, 2, leaky)
        self.layer3 = self._stage(blocks, 32, 64, 2, leaky)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(blocks: int, inputs: int, filters: int, stride: int, leaky: bool) -> nn.Sequential:
        first = BasicBlock(inputs, filters, stride, leaky)
        return nn.Sequential(first, *(BasicBlock(filters, filters, 1, leaky) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:  # (n, 3, 32, 32) -> (n, num_classes)
        x = self.activation(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def resnet(num_classes: int = 10, depth: int = 32, leaky: bool = False) -> ResNet:
    return ResNet((depth - 2) // 6, num_classes, leaky)
