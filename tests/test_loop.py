"""One epoch of training and testing, rates and averages, computed again by another route."""

import copy
import math
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from filter_grafting.errors import MismatchError
from training import loop
from training.loop import Diverged, TrainingStep, evaluate, initial_rate, learning_rate, train_one_epoch
from training.models import load_optimizer

CPU = torch.device("cpu")


class Batches:
    """Images of a few numbers, in batches of which the last is smaller."""

    def __init__(self, count=22, size=8, classes=7):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(count, 3, 4, 4, generator=generator)
        self.labels = torch.randint(classes, (count,), generator=generator)
        self.size, self.seeds = size, []

    def __len__(self):
        return -(-len(self.labels) // self.size)

    def epoch(self, seed):
        self.seeds.append(seed)
        return zip(self.images.split(self.size), self.labels.split(self.size), strict=True)


def make_model(classes=7):
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(20, classes))


def make_optimizer(model, **options):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, fused=True, **options)


def train(model, rate=0.1, **options):
    step = TrainingStep(model, make_optimizer(model), device=CPU)
    return train_one_epoch(step, Batches(), lambda _: rate, **{"seed": 0, **options})


# One epoch


def test_an_epoch_of_training_is_that_of_a_plain_loop():
    batches, model = Batches(), make_model()
    plain, rates = copy.deepcopy(model), []
    optimizer = torch.optim.SGD(plain.parameters(), 1.0, momentum=0.9, weight_decay=5e-4)
    losses, correct, correct5 = [], 0, 0
    for step, (x, y) in enumerate(batches.epoch(0)):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - (2 + step / 3) / 4)
        scores = plain(x)
        loss = F.cross_entropy(scores, y, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses += [loss.item()] * len(y)
        correct += (scores.argmax(1) == y).sum().item()
        correct5 += sum(label in row.topk(5).indices for row, label in zip(scores, y, strict=True))

    def rate(progress):
        rates.append(progress)
        return 0.1 * (1 - progress / 4)

    def smoothed(outputs, labels):
        return loop.cross_entropy(outputs, labels, smoothing=0.1)

    step = TrainingStep(model, make_optimizer(model), smoothed, device=CPU, top5=True)
    result = train_one_epoch(step, batches, rate, seed=5, epoch=2)
    for key, entry in model.state_dict().items():
        torch.testing.assert_close(entry, plain.state_dict()[key])
    assert result[:3] == pytest.approx((sum(losses) / 22, 100 * correct / 22, 100 * correct5 / 22))
    assert batches.seeds[-1] == 5 and rates[1:4] == pytest.approx([2, 2 + 1 / 3, 2 + 2 / 3])


def test_evaluation_counts_every_image_once_and_learns_nothing():
    batches, model = Batches(), make_model()
    before = copy.deepcopy(model.state_dict())
    result = evaluate(model, batches, device=CPU, top5=True)
    scores = model.eval()(batches.images)
    hits = (scores.argsort(1, descending=True)[:, :5] == batches.labels[:, None]).any(1)
    correct = (scores.argmax(1) == batches.labels).float().mean().item()
    expected = F.cross_entropy(scores, batches.labels).item(), 100 * correct, 100 * hits.float().mean().item()
    assert result[:3] == pytest.approx(expected)
    assert evaluate(model, batches, device=CPU).top5 is None
    assert all(torch.equal(entry, before[key]) for key, entry in model.state_dict().items())


def test_the_seconds_of_an_epoch_have_the_wait_for_the_device_in_them():
    def reduce(totals):  # to what a GPU has not computed yet
        return SimpleNamespace(tolist=lambda: (time.sleep(0.3), totals.tolist())[1])

    assert train(make_model(), reduce=reduce).seconds > 0.3
    assert evaluate(make_model(), Batches(), device=CPU, reduce=reduce).seconds > 0.3


def test_dropout_follows_from_the_seed_and_the_rank():
    def weights(seed, rank):
        model = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(48, 7, bias=False))
        nn.init.ones_(model[2].weight)
        train(model, seed=seed, rank=rank)
        return model[2].weight

    assert torch.equal(weights(1, 0), weights(1, 0))
    assert not any(torch.equal(weights(1, 0), weights(*other)) for other in ((1, 1), (2, 0)))


def test_a_loss_that_is_no_number_is_said():
    with pytest.raises(Diverged, match=r"the training loss became nan at a learning rate of 1e\+30"):
        train(make_model(), 1e30)
    model = make_model()
    step = TrainingStep(model, make_optimizer(model), device=CPU)
    with pytest.raises(Diverged, match=r"at a learning rate of 2e\+30"):
        train_one_epoch(step, Batches(), lambda progress: 3e30 * progress, seed=0)  # a warm-up, in three steps


# Rates


def test_networks_start_at_different_rates():
    assert [initial_rate(0.1, i, 2, True) for i in (1, 2)] == pytest.approx([0.05, 0.1])
    assert [initial_rate(0.1, i, 4, True) for i in (1, 4)] == pytest.approx([0.1 * (1 - math.sqrt(0.5)) / 2, 0.1])
    assert initial_rate(0.1, 1, 2, False) == 0.1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"epochs": 200, "cosine": False}, {0: 0.1, 59.99: 0.1, 60: 0.01, 119: 0.01, 120: 0.001}),
        ({"epochs": 200, "cosine": True}, {0: 0.1, 50: 0.0853553, 100: 0.05, 199.99: 0}),
        ({"epochs": 10, "cosine": True, "warmup": 5}, {0: 0, 1: 0.02, 4.5: 0.09, 5: 0.1, 7.5: 0.05, 10: 0}),
    ],
)
def test_steps_a_cosine_and_a_warm_up(options, expected):
    found = [learning_rate(0.1, progress, step_epochs=60, **options) for progress in expected]
    assert found == pytest.approx(list(expected.values()), abs=1e-6)


# Averages of weights


def test_a_moving_average_follows_every_step():
    model = make_model()
    optimizer, steps = make_optimizer(model), []
    average = loop.moving_average(model, optimizer, 0.75)
    expected = [weight.detach().double() for weight in model.parameters()]
    optimizer.register_step_post_hook(lambda *_: steps.append([one.detach().clone() for one in model.parameters()]))
    train_one_epoch(TrainingStep(model, optimizer, device=CPU), Batches(), lambda _: 0.1, seed=0)
    assert len(steps) == 3
    for weights in steps:
        expected = [0.75 * mean + 0.25 * new for mean, new in zip(expected, weights, strict=True)]
    for found, mean in zip(average.parameters(), expected, strict=True):
        torch.testing.assert_close(found, mean.float())
    assert average[1].num_batches_tracked == 3
    assert average[1].running_mean.any() and not torch.allclose(average[1].running_mean, model[1].running_mean)


def test_stochastic_weight_averaging_is_the_mean_of_epoch_ends_with_statistics_of_its_own():
    model, batches = make_model(), Batches()
    average, ends = copy.deepcopy(model), []
    for count in (0, 0, 1, 2):  # the second epoch end is the first that counts
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn(weight.shape))
        ends.append([weight.detach().clone() for weight in model.parameters()])
        loop.add_to_mean(average, model, count, batches.epoch(0))
        if count == 0:
            assert all(torch.equal(own, other) for own, other in zip(average.parameters(), ends[-1], strict=True))
    for found, *each in zip(average.parameters(), *ends[1:], strict=True):
        torch.testing.assert_close(found, sum(each) / 3)
    outputs = [average[0](x) for x in batches.images.split(8)]
    means = torch.stack([output.mean((0, 2, 3)) for output in outputs]).mean(0)
    torch.testing.assert_close(average[1].running_mean, means)
    assert [key for key, _ in average.named_parameters()] == [key for key, _ in model.named_parameters()]


def test_papa_once_an_epoch_pulls_two_networks_as_far_as_every_ten_steps():
    models = [make_model(), make_model()]
    with torch.no_grad():
        models[1].load_state_dict({key: 1 - 2 * entry for key, entry in models[0].state_dict().items()})
    before = [copy.deepcopy(model.state_dict()) for model in models]
    for model, neighbour in zip(models, reversed(before), strict=True):
        loop.pull(model, neighbour, networks=2, rate=0.5, pulls=39)
    for key in before[0]:
        one, two = (state[key].double() for state in before)
        for _ in range(39 if before[0][key].is_floating_point() else 0):
            mean = (one + two) / 2
            one, two = (entry + 0.01 * 0.5 * (mean - entry) for entry in (one, two))
        for model, expected in zip(models, (one, two), strict=True):
            torch.testing.assert_close(model.state_dict()[key].double(), expected, rtol=1e-5, atol=1e-5)


def test_weights_of_two_names_are_averaged_and_pulled_once():
    layer = nn.Linear(2, 2, bias=False)
    model, before = nn.Sequential(layer, layer), layer.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    average = loop.moving_average(model, optimizer, 0.75)
    layer.weight.grad = torch.ones(2, 2)
    optimizer.step()
    torch.testing.assert_close(average[0].weight, before - 0.25)
    loop.pull(model, dict.fromkeys(model.state_dict(), before), networks=2, rate=1, pulls=1)
    torch.testing.assert_close(layer.weight, before - 1 + 0.005)


def test_papa_pulls_only_towards_a_network_that_is_alike():
    with pytest.raises(MismatchError, match=r"4.weight: in the network \(7, 20\) float32, in its neighbour \(3, 20\)"):
        loop.pull(make_model(), make_model(3).state_dict(), networks=2, rate=1, pulls=1)


# An optimizer's state


def test_momentum_saved_in_another_memory_layout_moves_the_right_weights():
    """As PyTorch's example saves it (contiguous), for weights in channels_last."""
    source, x = make_model(), torch.randn(4, 3, 4, 4)
    earlier = torch.optim.SGD(source.parameters(), 0.1, momentum=0.9)
    source(x).square().sum().backward()
    earlier.step()
    models = copy.deepcopy(source).to(memory_format=torch.channels_last), copy.deepcopy(source)
    for model, fused in zip(models, (True, False), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        load_optimizer(optimizer, earlier.state_dict())
        optimizer.param_groups[0]["fused"] = fused
        model.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    for ours, reference in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
