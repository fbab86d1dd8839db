"""The CIFAR models: names, sizes and state dicts are a wire format; the outputs are computed again here."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grafting_cifar.models import build, wide_resnet

BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def convolutions(network):
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}


def bn(name):
    return [f"{name}.{entry}" for entry in BN]


def with_statistics(network):
    """In evaluation mode, with running statistics that matter."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


def normalised(x, state, norm):
    mean, var, scale, shift = (state[f"{norm}.{entry}"].view(-1, 1, 1) for entry in (*BN[2:4], *BN[:2]))
    return (x - mean) / (var + 1e-5).sqrt() * scale + shift


@pytest.mark.parametrize("name", ["resnet20_leaky", "mobilenetv2_w025", "vgg16"])
def test_logits_for_each_class_and_a_gradient_for_each_parameter(name):
    network = build(name, 7)
    logits = network(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


# ResNets


@pytest.mark.parametrize(
    ("name", "blocks", "weights"), [("resnet20", 3, 269_722), ("resnet32", 5, 464_154), ("resnet56_leaky", 9, 853_018)]
)
def test_resnet_sizes_and_names(name, blocks, weights):
    network = build(name, 10)
    names = ["conv1.weight", *bn("bn1")]
    for stage in (1, 2, 3):
        for k in range(blocks):
            for half in (1, 2):
                names += [f"layer{stage}.{k}.conv{half}.weight", *bn(f"layer{stage}.{k}.bn{half}")]
    assert list(network.state_dict()) == [*names, "linear.weight", "linear.bias"]
    assert parameters(network) == weights
    assert sum(module.out_channels for module in convolutions(network).values()) == 16 + 2 * blocks * 112


@pytest.mark.parametrize(("name", "slope"), [("resnet20", 0.0), ("resnet20_leaky", 0.01)])
def test_resnet_computed_from_its_state_dict(name, slope):
    network = with_statistics(build(name, 10))
    state = network.state_dict()

    def conv_bn(x, conv, norm, stride):
        return normalised(F.conv2d(x, state[f"{conv}.weight"], stride=stride, padding=1), state, norm)

    def activation(x):
        return torch.where(x > 0, x, slope * x)

    images = torch.randn(3, 3, 32, 32)
    x = activation(conv_bn(images, "conv1", "bn1", 1))
    for stage in (1, 2, 3):
        for k in range(3):
            block = f"layer{stage}.{k}"
            stride = 2 if stage > 1 and k == 0 else 1
            out = activation(conv_bn(x, f"{block}.conv1", f"{block}.bn1", stride))
            out = conv_bn(out, f"{block}.conv2", f"{block}.bn2", 1)
            if stride == 2:  # option A: every other pixel, zero channels before and after
                zeros = torch.zeros(3, x.shape[1] // 2, *out.shape[2:])
                x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], dim=1)
            x = activation(out + x)
    expected = x.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]

    with torch.no_grad():
        torch.testing.assert_close(network(images), expected, rtol=1e-3, atol=1e-4)


def test_resnet_weights_are_kaiming_normal():
    network = build("resnet32", 100)
    for module in convolutions(network).values():
        weight = module.weight.detach()
        if weight.numel() > 5000:
            deviation = math.sqrt(2 / weight[0].numel())
            assert weight.std().item() == pytest.approx(deviation, rel=0.06)
            assert weight.abs().max().item() > 3 * deviation  # a uniform distribution would end at 1.73


# MobileNetV2


def test_mobilenetv2_sizes_and_names():
    network = build("mobilenetv2", 10)
    names = ["conv1.weight", *bn("bn1")]
    for k in range(17):
        for half in (1, 2, 3):
            names += [f"layers.{k}.conv{half}.weight", *bn(f"layers.{k}.bn{half}")]
        if k in (0, 1, 10, 16):  # the blocks of stride 1 that change the number of channels
            names += [f"layers.{k}.shortcut.0.weight", *bn(f"layers.{k}.shortcut.1")]
    names += ["conv2.weight", *bn("bn2"), "linear.weight", "linear.bias"]
    assert list(network.state_dict()) == names
    assert parameters(network) == 2_296_922


# Wide ResNets


def test_wide_resnet_sizes_and_shortcuts():
    with torch.device("meta"):
        network = build("wrn28_10", 10)
    assert parameters(network) == 36_479_194  # as its authors count it: 36.5 M
    shortcuts = [name for name in convolutions(network) if "shortcut" in name]
    assert shortcuts == [f"layer{stage}.0.shortcut.0" for stage in (1, 2, 3)]
    assert network(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)


def test_wide_resnet_computed_from_its_state_dict():
    network = with_statistics(wide_resnet.WideResNet(1, 2, 10))
    state, images = network.state_dict(), torch.randn(3, 3, 32, 32)

    def bn_relu(x, norm):
        return torch.relu(normalised(x, state, norm))

    x = F.conv2d(images, state["conv1.weight"], padding=1)
    for stage, stride in ((1, 1), (2, 2), (3, 2)):
        block = f"layer{stage}.0"
        activated = bn_relu(x, f"{block}.bn1")
        out = bn_relu(F.conv2d(activated, state[f"{block}.conv1.weight"], stride=stride, padding=1), f"{block}.bn2")
        x = F.conv2d(activated, state[f"{block}.shortcut.0.weight"], stride=stride)
        x = x + F.conv2d(out, state[f"{block}.conv2.weight"], padding=1)
    expected = bn_relu(x, "bn1").mean((2, 3)) @ state["linear.weight"].T
    with torch.no_grad():
        torch.testing.assert_close(network(images), expected, rtol=1e-3, atol=1e-4)


# VGG


def test_vgg16_sizes_and_names():
    network = build("vgg16", 100)
    names = []
    for k in (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40):
        names += [f"features.{k}.weight", f"features.{k}.bias", *bn(f"features.{k + 1}")]
    assert list(network.state_dict()) == [*names, "classifier.weight", "classifier.bias"]
    widths = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    assert [module.out_channels for module in convolutions(network).values()] == widths
    assert parameters(network) == 14_774_436
