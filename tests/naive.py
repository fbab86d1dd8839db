"""The method once more, by plain loops: what the tests of grafting compare with. And networks to try it on."""

import math

import pytest
import torch
from torch import nn

from filter_grafting import MismatchError, graft

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.cuda))
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def looped_entropy(weight):
    """The definition to the letter, bin by bin over a list of numbers."""
    values = weight.detach().cpu().double().flatten().tolist()
    low, high = min(values), max(values)
    scale = (high - low) / 10
    total = 0.0
    for k in range(10):
        upper = high if k == 9 else low + (k + 1) * scale
        share = sum(low + k * scale <= value < upper for value in values) / len(values)
        total -= share * math.log(share) if share else 0.0
    return total


def looped_coefficient(own, neighbour, a=0.4, c=500, criterion=looped_entropy):
    return round(a / math.pi * math.atan(c * (criterion(own) - criterion(neighbour))) + 0.5, 2)


def looped_graft(model, neighbour, a=0.4, c=500, kinds=CONVOLUTIONS, criterion=looped_entropy):
    """(coefficients, blended state dict): one pass over the entries, in double precision."""
    own = model.state_dict()
    names = [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, kinds)]
    weights = [f"{name}.weight" if name else "weight" for name in names]
    share, coefficients, blended = None, {}, {}
    for key in [weights[0], *own]:
        if key in weights:
            share = looped_coefficient(own[key], neighbour[key], a, c, criterion)
            coefficients[names[weights.index(key)]] = share
        entry, other = own[key].cpu(), neighbour[key].cpu()
        if entry.is_floating_point():
            blended[key] = (share * entry.double() + (1 - share) * other.double()).to(entry.dtype)
        else:
            blended[key] = entry.clone()
    return coefficients, blended


def assert_grafts(model, neighbour, how=(), **options):
    """Grafts a model as the loops do; `how` is for them, and `options` for both of `graft` and them."""
    numbers = {name: options[name] for name in ("a", "c") if name in options}
    coefficients, blended = looped_graft(model, neighbour, **numbers, **dict(how))
    found = graft(model, neighbour, **options)
    assert coefficients_of(found) == coefficients
    assert_blended(model, blended)
    return found


def assert_refused(model, neighbour, message, **options):
    before = snapshot(model)
    with pytest.raises(MismatchError, match=message):
        graft(model, neighbour, **options)
    assert_untouched(model, before)


def coefficients_of(layers):
    return {name: layer.coefficient for name, layer in layers.items()}


def assert_blended(model, expected):
    for key, entry in model.state_dict().items():
        tolerance = TOLERANCE.get(entry.dtype, 0)
        torch.testing.assert_close(entry.cpu(), expected[key], rtol=tolerance, atol=tolerance, msg=key)


def randomised(model, seed=0):
    """Every floating-point entry random (batch norms start out all alike), running variances positive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, entry in model.state_dict().items():
            if entry.is_floating_point():
                values = torch.randn(entry.shape, generator=generator) * torch.rand(1, generator=generator)
                entry.copy_(values.abs() if key.endswith("running_var") else values)
            elif entry.dtype == torch.int64:
                entry.random_(100, generator=generator)
    return model


def pair(make, **options):
    """A network, and its neighbour's state dict."""
    return randomised(make(), 1).to(**options), randomised(make(), 2).to(**options).state_dict()


def snapshot(model):
    return {key: entry.clone() for key, entry in model.state_dict().items()}


def assert_untouched(model, before):
    for key, entry in model.state_dict().items():
        assert torch.equal(entry.nan_to_num(1e9), before[key].nan_to_num(1e9)), key


def same(model, other):
    """Whether two networks, wrapped or not, hold exactly the same."""
    return all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def mixture():
    """Convolutions of every kind, and entries of every kind between them."""
    return nn.Sequential(
        nn.Linear(3, 4),
        nn.Conv2d(4, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=8, bias=False),
        nn.PReLU(8),
        nn.Sequential(nn.Conv2d(8, 4, 1, groups=2), nn.GroupNorm(2, 4)),
        nn.ConvTranspose2d(4, 6, 2, groups=2),
        nn.Conv1d(6, 5, 3),
        nn.BatchNorm1d(5, track_running_stats=False),
        nn.Conv3d(5, 4, 2),
        nn.Linear(5, 3),
    )


def chain(inputs=2, filters=(4, 6), positions=1, bias=True, convolution=nn.Conv2d, norm=nn.BatchNorm2d):
    """0 convolution, 1 batch norm, 2 ReLU, 3 convolution, 4 batch norm ..., then a classifier."""
    layers = []
    for outputs in filters:
        layers += [convolution(inputs, outputs, 3, padding=1, bias=bias), norm(outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers[:-1], nn.Linear(inputs * positions, 3))
