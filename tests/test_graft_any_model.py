"""Models that are not ours: other layers, wrappers, shared memory, other types. Nothing is left out silently."""

import ast
import itertools
import logging
import re
from pathlib import Path

import pytest
import torch
from naive import (
    assert_blended,
    assert_grafts,
    assert_refused,
    chain,
    coefficients_of,
    looped_coefficient,
    looped_graft,
    mixture,
    pair,
    randomised,
    same,
    snapshot,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, prune

import filter_grafting
from filter_grafting import MismatchError, graft, invalid_filters, l1_norm, load_plain_state, plain_state

# layers=, criterion= and exclude=


def transformer():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm(9), nn.Linear(4, 40), nn.Linear(40, 4), nn.LayerNorm(9))


def looped_l1_norm(weight):
    return sum(abs(value) for value in weight.flatten().tolist())


@pytest.mark.parametrize(
    ("how", "options"),
    [
        ({"kinds": (nn.Conv2d, nn.Linear)}, {"layers": (nn.Conv2d, nn.Linear), "c": 5}),
        ({"kinds": nn.LayerNorm}, {"layers": lambda module: isinstance(module, nn.LayerNorm), "c": 5}),
        ({"kinds": nn.Linear, "criterion": looped_l1_norm}, {"layers": nn.Linear, "c": 0.01, "criterion": l1_norm}),
    ],
)
def test_other_layers_and_another_criterion_set_the_coefficients(how, options):
    assert len(set(coefficients_of(assert_grafts(*pair(transformer), how, **options)).values())) > 1


def test_a_layer_with_several_weights_is_judged_by_its_largest():
    model, neighbour = pair(lambda: nn.Sequential(nn.LSTM(4, 6), nn.ReLU()))
    expected = looped_coefficient(model.state_dict()["0.weight_hh_l0"], neighbour["0.weight_hh_l0"])
    assert graft(model, neighbour, layers=nn.LSTM)["0"].coefficient == expected


def test_one_warning_where_convolutions_are_a_small_part_and_an_error_where_there_is_none(caplog):
    model, neighbour = pair(transformer)
    with caplog.at_level(logging.WARNING, "filter_grafting"):
        graft(model, neighbour, layers=nn.Conv2d)
        graft(*pair(lambda: chain(positions=300)), level="filter")  # which has no layers= to advise
        assert not caplog.records
        graft(model, neighbour)
        graft(model, neighbour)
    (line,) = caplog.messages
    share = 16 / sum(entry.numel() for entry in model.state_dict().values())
    assert f"convolutions hold {share:.1%} of the weights" in line and "layers=(nn.Conv2d, nn.Linear)" in line
    without, said = pair(lambda: nn.Linear(3, 3)), r"^Linear has no .* layers=\(nn\.Conv2d, nn\.Linear\)"
    for options in {}, {"layers": nn.Embedding}:
        assert_refused(*without, said, **options)
    assert_refused(*without, "^Linear has no convolution, and .* a chain of them$", level="filter")


@pytest.mark.parametrize("exclude", ["head.*", ["module.head.w*", "head._orig_mod.bias"]])
def test_excluded_entries_stay_own_and_are_not_compared(exclude):
    def make(classes):
        return nn.ModuleDict({"body": mixture(), "head": nn.Conv1d(3, classes, 1)})

    model, neighbour = randomised(make(7)), randomised(make(9), 2).state_dict()
    own = snapshot(model)
    coefficients, blended = looped_graft(model["body"], {key.removeprefix("body."): x for key, x in neighbour.items()})
    found = graft(model, neighbour, exclude=exclude)
    assert coefficients_of(found) == {f"body.{name}": share for name, share in coefficients.items()}
    assert_blended(model["body"], blended)
    assert torch.equal(model["head"].weight, own["head.weight"])
    assert_refused(model, neighbour, r"^head\.weight: in the network \(7, 3, 1\) float32, in its neighbour \(9, 3, 1\)")


# Wrappers


def partly(wrap):
    def apply(model):
        model[5], model[1] = wrap(model[5]), wrap(model[1])
        return model

    return apply


WRAPS = {
    "plain": lambda model: model,
    # DataParallel moves a model to the GPU, if there is one.
    "data parallel of compiled": lambda model: nn.DataParallel(torch.compile(model)).cpu(),
    "partly compiled": partly(torch.compile),
    "checkpointed": partly(checkpoint_wrapper),
}


@pytest.mark.parametrize(("here", "there"), list(itertools.permutations(WRAPS, 2)))
def test_wrappers_are_looked_through_on_both_sides(here, there):
    model, neighbour = randomised(mixture(), 1), randomised(mixture(), 2)
    coefficients, blended = looped_graft(model, neighbour.state_dict())
    filters = invalid_filters(model, 0.5)
    wrapped, state = WRAPS[here](model), WRAPS[there](neighbour).state_dict()
    assert invalid_filters(wrapped, 0.5) == filters
    assert coefficients_of(graft(wrapped, state)) == coefficients
    for key, entry in plain_state(wrapped).items():
        torch.testing.assert_close(entry, blended[key], msg=key)
    load_plain_state(wrapped, snapshot(randomised(mixture(), 3)))
    assert same(wrapped, randomised(mixture(), 3))


# Weights that are shared, or computed from others


def tied(seed):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 3), nn.Conv2d(2, 3, 3))
    model[2].weight = model[0].weight
    randomised(model, seed)
    model[1 if seed == 1 else 0].weight.data **= 3  # each network has another poor layer
    return model


def test_tied_weights_are_blended_once_by_the_first_of_their_layers_unless_the_neighbours_are_not():
    model, neighbour = tied(1), tied(2).state_dict()
    own, loose = snapshot(model), {**neighbour, "2.weight": neighbour["2.weight"] + 1}
    assert_refused(model, loose, r"^2\.weight: in the network it is 0\.weight, in its neighbour they")
    share = graft(model, neighbour)["0"].coefficient
    assert model[2].weight is model[0].weight
    torch.testing.assert_close(model[0].weight.data, share * own["0.weight"] + (1 - share) * neighbour["0.weight"])


@pytest.mark.parametrize("name", ["0.weight", "2.weight"])
def test_a_tied_weight_stays_own_whichever_of_its_names_is_excluded(name):
    model, neighbour = tied(1), tied(2).state_dict()
    own = snapshot(model)
    graft(model, neighbour, exclude=(name,))
    assert torch.equal(model[0].weight, own["0.weight"]) and not torch.equal(model[1].weight, own["1.weight"])


def overlapping(seed):
    """A buffer that is a part of the last convolution's own row of memory, and one that repeats a number."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 3))
    model[0].register_buffer("part", torch.empty(0))
    randomised(model, seed)
    model[0].part = model[1].weight.data[0]
    model[1].register_buffer("repeated", torch.full((1, 1), float(seed)).expand(3, 4))
    model[seed - 1].weight.data **= 3
    return model


def test_of_entries_that_overlap_the_first_ones_share_counts_and_what_repeats_is_blended_once():
    model, neighbour = overlapping(1), snapshot(overlapping(2))
    own = snapshot(model)
    first, last = (layer.coefficient for layer in graft(model, neighbour).values())
    assert first != last
    for key, rows, share in ("0.part", ..., first), ("1.weight", slice(1, 2), last), ("1.repeated", ..., last):
        blended = share * own[key][rows] + (1 - share) * neighbour[key][rows]
        torch.testing.assert_close(model.state_dict()[key][rows], blended)


def parametrized():
    return nn.Sequential(nn.Conv2d(2, 3, 3), parametrizations.weight_norm(nn.Conv2d(3, 3, 2)))


def pruned():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 2))
    prune.custom_from_mask(model[1], "weight", (torch.arange(36).view(3, 3, 2, 2) % 3 > 0).float())
    return model


@pytest.mark.parametrize(
    ("make", "judged"),
    [
        (parametrized, lambda state: state["1.parametrizations.weight.original1"]),
        (pruned, lambda state: state["1.weight_orig"] * state["1.weight_mask"]),
    ],
)
def test_what_a_weight_is_computed_from_is_blended(make, judged):
    model, neighbour = make(), make()
    own, other = snapshot(model), neighbour.state_dict()
    shares = {"0": looped_coefficient(own["0.weight"], other["0.weight"], c=5)}
    shares["1"] = looped_coefficient(judged(own), judged(other), c=5)
    assert coefficients_of(graft(model, other, c=5)) == shares
    for key, entry in model.state_dict().items():
        torch.testing.assert_close(entry, shares[key[0]] * own[key] + (1 - shares[key[0]]) * other[key], msg=key)


# Types, and words


@pytest.mark.parametrize("there", [torch.bfloat16, torch.float64])
def test_a_neighbour_in_another_floating_point_type(there):
    model, neighbour = pair(mixture)
    assert_grafts(model, {key: x.to(there) if x.is_floating_point() else x for key, x in neighbour.items()})


@pytest.mark.parametrize(
    "entry",
    [
        torch.ones(3).to(torch.float8_e4m3fn),
        torch.ones(3, dtype=torch.int8),
        torch.ones(3, device="meta"),
        torch.eye(3).to_sparse(),
        nn.parameter.UninitializedParameter(),
    ],
    ids=["float8", "int8", "meta", "sparse", "lazy"],
)
def test_what_cannot_be_blended_is_named_and_can_be_excluded(entry):
    model, neighbour = pair(lambda: nn.Sequential(nn.Conv2d(2, 3, 3)))
    own = snapshot(model)
    (model.register_parameter if isinstance(entry, nn.Parameter) else model.register_buffer)("odd", entry)
    with pytest.raises(MismatchError, match=r"^odd: .*; exclude=\('odd',\) keeps"):
        graft(model, {"odd": entry, **neighbour})
    assert torch.equal(model[0].weight, own["0.weight"])
    graft(model, {"odd": entry, **neighbour}, exclude=("odd",))
    assert not torch.equal(model[0].weight, own["0.weight"])


def test_nothing_is_printed_and_no_message_names_a_flag(capfd):
    graft(*pair(mixture))
    assert capfd.readouterr() == ("", "")
    for path in Path(filter_grafting.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            assert not re.search(r"(?<!-)--[a-z]", text), (path, text)
