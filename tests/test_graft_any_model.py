"""Models that are not ours: other layers, wrappers, shared memory, other types. Nothing is left out silently."""

import ast
import copy
import logging
import re
from pathlib import Path

import pytest
import torch
from naive import (
    assert_blended,
    assert_untouched,
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
from filter_grafting import MismatchError, graft, invalid_filters, l1_norm, plain_state
from filter_grafting.states import load_plain_state


def assert_refused(model, neighbour, message, **options):
    before = snapshot(model)
    with pytest.raises(MismatchError, match=message):
        graft(model, neighbour, **options)
    assert_untouched(model, before)


def assert_grafts_as(expected_kinds, model, neighbour, **options):
    coefficients, blended = looped_graft(model, neighbour, c=5, kinds=expected_kinds)
    assert coefficients_of(graft(model, neighbour, c=5, **options)) == coefficients
    assert_blended(model, blended)
    return coefficients


# layers=


def transformer():
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.LayerNorm(9), nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 4), nn.LayerNorm(9)
    )


@pytest.mark.parametrize(
    ("layers", "kinds"),
    [
        (nn.Linear, nn.Linear),
        ((nn.Conv2d, nn.Linear), (nn.Conv2d, nn.Linear)),
        (lambda module: isinstance(module, nn.LayerNorm), nn.LayerNorm),
    ],
)
def test_other_layers_set_the_coefficients(layers, kinds):
    assert len(set(assert_grafts_as(kinds, *pair(transformer), layers=layers).values())) > 1


def test_gpt2_grafts_by_its_own_conv1d():
    transformers = pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=30, n_positions=8)
    model, neighbour = pair(lambda: transformers.GPT2LMHeadModel(config))
    names = assert_grafts_as((Conv1D, nn.Embedding), model, neighbour, layers=(Conv1D, nn.Embedding))
    assert "transformer.h.0.mlp.c_fc" in names
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize(
    ("layer", "weight"),
    [(nn.MultiheadAttention(8, 2), "in_proj_weight"), (nn.LSTM(4, 6), "weight_hh_l0"), (nn.LSTM(9, 6), "weight_ih_l0")],
)
def test_a_layer_with_several_weights_is_judged_by_its_largest(layer, weight):
    model, neighbour = pair(lambda: nn.Sequential(copy.deepcopy(layer), nn.ReLU()))
    expected = looped_coefficient(model.state_dict()[f"0.{weight}"], neighbour[f"0.{weight}"])
    assert graft(model, neighbour, layers=lambda module: True)["0"].coefficient == expected


def test_another_criterion():
    model, neighbour = pair(chain)
    coefficients, blended = looped_graft(
        model, neighbour, c=0.01, criterion=lambda weight: sum(abs(value) for value in weight.flatten().tolist())
    )
    assert coefficients_of(graft(model, neighbour, c=0.01, criterion=l1_norm)) == coefficients
    assert len(set(coefficients.values())) > 1
    assert_blended(model, blended)


def test_one_warning_where_convolutions_are_a_small_part(caplog):
    class Small(nn.Sequential):
        pass

    model, neighbour = pair(lambda: Small(*transformer()))
    with caplog.at_level(logging.WARNING, "filter_grafting"):
        for _ in range(3):
            graft(model, neighbour)
    assert len(caplog.records) == 1
    share = 16 / sum(entry.numel() for entry in model.state_dict().values())
    assert f"Small: convolutions hold {share:.1%} of the weights" in caplog.text
    assert "layers=(nn.Conv2d, nn.Linear)" in caplog.text and "most weights are in Linear and" in caplog.text
    caplog.clear()
    graft(model, neighbour, layers=nn.Conv2d)
    graft(*pair(mixture))
    graft(model, neighbour, exclude=("2.*", "4.*"))  # what is not blended does not count
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({}, "convolution"),
        ({"level": "filter"}, "convolution"),
        ({"layers": nn.Embedding}, "layer that layers= selects"),
        ({"layers": nn.Sequential}, "layer that layers= selects"),
    ],
)
def test_without_a_layer_to_compare_the_same_advice_is_an_error(options, what):
    model, neighbour = pair(lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    assert_refused(model, neighbour, rf"^Sequential has no {what} .* layers=\(nn\.Conv2d, nn\.Linear\)", **options)


# exclude=


@pytest.mark.parametrize("exclude", [("head.*",), "head.*", ["module.head.w*", "head._orig_mod.bias"]])
def test_excluded_entries_stay_own_whatever_they_are(exclude):
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


def test_a_mask_of_minus_infinity_can_be_excluded():
    model, neighbour = pair(chain)
    model.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
    neighbour["mask"] = model.mask.clone()
    assert_refused(model, neighbour, r"^mask: the network holds a value that is not finite; exclude=\('mask',\)")
    graft(model, neighbour, exclude=("mask",))
    assert model.mask[0, 1] == -torch.inf


# Wrappers


def partly(wrap):
    def apply(model):
        model[5] = wrap(model[5])
        model[1] = wrap(model[1])
        return model

    return apply


WRAPS = {
    "plain": lambda model: model,
    "compiled": torch.compile,
    "data parallel": nn.DataParallel,
    "compiled data parallel": lambda model: torch.compile(nn.DataParallel(model)),
    "data parallel of compiled": lambda model: nn.DataParallel(torch.compile(model)),
    "partly compiled": partly(torch.compile),
    "partly data parallel": partly(lambda part: nn.DataParallel(torch.compile(part))),
    "checkpointed": partly(checkpoint_wrapper),
}


@pytest.mark.parametrize("there", ["plain", "data parallel of compiled", "partly compiled"])
@pytest.mark.parametrize("here", WRAPS)
def test_wrappers_are_looked_through_on_both_sides(here, there):
    model, neighbour = randomised(mixture(), 1), randomised(mixture(), 2)
    coefficients, blended = looped_graft(model, neighbour.state_dict())
    filters, inner = invalid_filters(model, 0.5), list(model.parameters())
    wrapped, state = WRAPS[here](model), WRAPS[there](neighbour).state_dict()
    assert invalid_filters(wrapped, 0.5) == filters
    assert coefficients_of(graft(wrapped, state)) == coefficients
    for key, entry in plain_state(wrapped).items():
        torch.testing.assert_close(entry, blended[key], msg=key)
    assert all(new is old for new, old in zip(wrapped.parameters(), inner, strict=True))
    load_plain_state(wrapped, snapshot(randomised(mixture(), 3)))
    assert same(wrapped, randomised(mixture(), 3))


def test_two_names_that_are_one_without_wrappers_are_refused():
    model = nn.ModuleDict({"conv": nn.Conv2d(1, 2, 3), "module": nn.ModuleDict({"conv": nn.Conv2d(1, 2, 3)})})
    assert_refused(model, model.state_dict(), r"^module\.conv\.weight: without its wrappers' names it is conv\.weight")


# Shared memory


def blended_by_address(model, neighbour):
    """Number by number, in state-dict order: whatever lies at one address is blended once. {address: number}"""
    own, share, numbers = model.state_dict(), None, {}
    share = looped_coefficient(own["conv.weight"], neighbour["conv.weight"])
    for key, entry in own.items():
        if key in ("last.weight", "tied.weight"):
            share = looped_coefficient(entry, neighbour[key])
        flat = zip(addresses(entry), entry.flatten().tolist(), neighbour[key].flatten().tolist(), strict=True)
        for address, mine, other in flat:
            numbers.setdefault(address, share * mine + (1 - share) * other)
    return numbers


def addresses(entry):
    storage = entry.untyped_storage()
    room = torch.arange(storage.nbytes() // entry.element_size())
    covered = room.as_strided(entry.shape, entry.stride(), entry.storage_offset())
    return [(storage.data_ptr(), k) for k in covered.flatten().tolist()]


class Sharing(nn.Module):
    """A buffer that is a part of a later one, one that overlaps it, one that repeats a number, and tied weights."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        everything = torch.zeros(20)
        self.conv.register_buffer("part", everything[4:8])
        self.last = nn.Conv2d(3, 3, 3)
        self.last.register_buffer("whole", everything)
        self.last.register_buffer("strided", everything[1::3].view(7, 1))
        self.last.register_buffer("repeated", torch.zeros(1, 1).expand(3, 4))
        self.tied = nn.Conv2d(2, 3, 3)
        self.tied.weight = self.conv.weight


def make_sharing(seed):
    model, generator = Sharing(), torch.Generator().manual_seed(seed)
    powers = [seed, *[1] * 2, 4 - seed, *[1] * 4, seed, 1]  # the neighbour's first convolution is poor, its last rich
    with torch.no_grad():
        for entry, power in zip(model.state_dict().values(), powers, strict=True):
            part = entry[:1, :1] if entry.shape == (3, 4) else entry
            part.copy_(torch.randn(part.shape, generator=generator) ** power)
    return model


def test_entries_that_share_memory_are_blended_once_by_what_they_cover():
    model, neighbour = make_sharing(1), make_sharing(3).state_dict()
    expected = blended_by_address(model, neighbour)
    assert len({layer.coefficient for layer in graft(model, neighbour).values()}) > 1
    for key, entry in model.state_dict().items():
        assert entry.flatten().tolist() == pytest.approx([expected[x] for x in addresses(entry)], 1e-6, 1e-6), key


def test_all_weights_in_one_row_of_memory():
    model, neighbour = pair(mixture)
    row = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(row, model.parameters())  # from now on, views of it
    assert len({entry.untyped_storage().data_ptr() for entry in model.parameters()}) == 1
    assert_grafts_as(tuple(type(module) for module in mixture() if "Conv" in str(type(module))), model, neighbour)


def test_weights_that_only_the_network_ties_are_refused():
    model, neighbour = make_sharing(1), make_sharing(3).state_dict()
    neighbour["tied.weight"] = neighbour["tied.weight"] + 1
    assert_refused(model, neighbour, r"^tied\.weight: in the network it is conv\.weight, in its neighbour they differ")


def test_memory_shared_between_types_is_blended_once():
    model, neighbour = (nn.Sequential(nn.Conv2d(2, 3, 3)) for _ in range(2))
    for network in model, neighbour:
        values = torch.randn(6)
        network.register_buffer("real", values)
        network.register_buffer("complex", torch.view_as_complex(values.view(3, 2)))
    expected, neighbour = snapshot(model), neighbour.state_dict()
    w = graft(model, neighbour)["0"].coefficient
    torch.testing.assert_close(model.real, w * expected["real"] + (1 - w) * neighbour["real"])
    assert torch.equal(torch.view_as_real(model.complex).flatten(), model.real)


def test_a_state_dict_of_copies_is_refused():
    model, neighbour = pair(chain)
    model.register_state_dict_post_hook(
        lambda module, state, *_: state.update({k: v.clone() for k, v in state.items()})
    )
    assert_refused(model, neighbour, r"^0\.weight: the state dict holds a copy, not the model's own \(FSDP1\?\)")


# Weights that are computed from others


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize(
    ("wrap", "judged"),
    [
        (parametrizations.weight_norm, "parametrizations.weight.original1"),
        (parametrizations.orthogonal, "parametrizations.weight.original"),
        (nn.utils.weight_norm, "weight_v"),
    ],
)
def test_what_a_parametrization_computes_from_is_blended(wrap, judged):
    def make():
        torch.manual_seed(0)  # of what an orthogonal parametrization keeps for itself
        return nn.Sequential(nn.Conv2d(2, 3, 3), wrap(nn.Conv2d(3, 3, 2)), nn.BatchNorm2d(3))

    model, neighbour = make(), make()
    with torch.no_grad():
        for parameter in neighbour.parameters():
            parameter.copy_(torch.randn_like(parameter) ** (3 if parameter is neighbour[0].weight else 1))
    own, other = snapshot(model), neighbour.state_dict()
    shares = {k: looped_coefficient(own[key], other[key], c=5) for k, key in (("0", "0.weight"), ("1", f"1.{judged}"))}
    assert coefficients_of(graft(model, other, c=5)) == shares and len(set(shares.values())) == 2
    for key, entry in model.state_dict().items():
        share = shares[key[0]] if key[0] in shares else shares["1"]
        if entry.is_floating_point() and not key.endswith("base"):
            torch.testing.assert_close(entry, share * own[key] + (1 - share) * other[key], msg=key)


@pytest.mark.parametrize("wrap", [nn.utils.spectral_norm, parametrizations.spectral_norm])
def test_what_has_no_mean_is_refused_and_can_be_excluded(wrap):
    model, neighbour = (nn.Sequential(wrap(nn.Conv2d(3, 3, 3))) for _ in range(2))
    own = snapshot(model)
    assert_refused(model, neighbour.state_dict(), r"_u: a mask or state of a parametrization .* exclude=\('0.*_u',\)")
    graft(model, neighbour.state_dict(), exclude=("*_u", "*_v"))
    for key, entry in model.state_dict().items():
        assert torch.equal(entry, own[key]) == key.endswith(("_u", "_v")), key


def test_a_pruned_layer_is_judged_by_what_is_left_of_it():
    model, neighbour = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)) for _ in range(2))
    mask = (torch.arange(144).view(4, 4, 3, 3) % 3 > 0).float()
    prune.custom_from_mask(model[1], "weight", mask)
    prune.custom_from_mask(neighbour[1], "weight", mask)
    own, other = snapshot(model), neighbour.state_dict()
    found = graft(model, other)["1"]
    assert found.coefficient == looped_coefficient(own["1.weight_orig"] * mask, other["1.weight_orig"] * mask)
    mixed = found.coefficient * own["1.weight_orig"] + (1 - found.coefficient) * other["1.weight_orig"]
    torch.testing.assert_close(model.state_dict()["1.weight_orig"], mixed)
    assert torch.equal(model.state_dict()["1.weight_mask"], mask)
    other["1.weight_mask"] = 1 - mask
    assert_refused(model, other, r"^1\.weight_mask: a mask or state of a parametrization has no mean of two")


def test_excluding_a_pruned_weight_leaves_its_mask_alone():
    def make():
        return nn.Sequential(nn.Conv2d(2, 3, 3), prune.l1_unstructured(nn.Conv2d(3, 3, 2), "weight", 0.5))

    model, neighbour = make(), make().state_dict()
    before = snapshot(model)
    neighbour["1.weight_mask"] = before["1.weight_mask"]
    graft(model, neighbour, exclude=("1.weight_orig",))
    assert all(
        torch.equal(model.state_dict()[f"1.{key}"], before[f"1.{key}"]) for key in ("weight_orig", "weight_mask")
    )


# Types


@pytest.mark.parametrize("there", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("here", [torch.float32, torch.bfloat16, torch.float64])
def test_a_neighbour_in_another_floating_point_type(here, there):
    model, neighbour = pair(mixture)
    model.to(here)
    neighbour = {key: x.to(there) if x.is_floating_point() else x for key, x in neighbour.items()}
    coefficients, blended = looped_graft(model, neighbour)
    assert coefficients_of(graft(model, neighbour)) == coefficients
    assert_blended(model, blended)


def mixed_types():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    for layer, kind in zip(model, (torch.float16, torch.float32, torch.float64, torch.bfloat16), strict=True):
        layer.to(kind)
    return model


def test_types_may_be_mixed_within_a_network():
    assert_grafts_as((nn.Conv2d,), *pair(mixed_types))


def test_complex_entries_are_blended_but_set_no_coefficient():
    def make():
        model = nn.Sequential(nn.Conv2d(2, 3, 3))
        model.register_parameter("wave", nn.Parameter(torch.randn(3, dtype=torch.cfloat)))
        return model

    model, neighbour = make(), make().state_dict()
    own = snapshot(model)
    share = graft(model, neighbour)["0"].coefficient
    torch.testing.assert_close(model.wave.detach(), share * own["wave"] + (1 - share) * neighbour["wave"])
    model = nn.Sequential(nn.Conv2d(2, 3, 3, dtype=torch.cfloat))
    assert_refused(model, model.state_dict(), r"^0\.weight: weight: got torch\.complex64 .* exclude=\('0\.weight',\)")


def frozen(values):
    return nn.Parameter(values, requires_grad=False)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (torch.ones(3).to(torch.float8_e4m3fn), "it is torch.float8_e4m3fn: numbers without their scale"),
        (frozen(torch.ones(3).to(torch.float8_e5m2)), "it is torch.float8_e5m2"),
        (torch.ones(3, dtype=torch.int8), "it is torch.int8: numbers without their scale"),
        (frozen(torch.ones(3, dtype=torch.uint8)), "it is a parameter of torch.uint8, which has no mean"),
        (torch.ones(3, device="meta"), "it is on the meta device, without values"),
        (torch.eye(3).to_sparse(), "it is a Tensor of layout torch.sparse_coo"),
        (torch.nested.as_nested_tensor([torch.ones(2)], layout=torch.jagged), "it is a NestedTensor"),
        (nn.parameter.UninitializedParameter(), "it has no values before the first batch"),
    ],
)
def test_what_cannot_be_blended_is_named_and_can_be_excluded(entry, message):
    model, neighbour = pair(lambda: nn.Sequential(nn.Conv2d(2, 3, 3)))
    own = snapshot(model)
    (model.register_parameter if isinstance(entry, nn.Parameter) else model.register_buffer)("odd", entry)
    with pytest.raises(MismatchError, match=rf"^odd: in the network {re.escape(message)}.*; exclude=\('odd',\) keeps"):
        graft(model, {"odd": entry, **neighbour})
    assert torch.equal(model[0].weight, own["0.weight"])
    graft(model, {"odd": entry, **neighbour}, exclude=("odd",))
    assert not torch.equal(model[0].weight, own["0.weight"])


def test_what_modules_keep_beside_tensors_is_left_alone_if_it_is_their_extra_state():
    class Remembering(nn.Conv2d):
        def get_extra_state(self):
            return {"note": self.note}

        def set_extra_state(self, state):
            self.note = state["note"]

    model, neighbour = nn.Sequential(Remembering(1, 2, 3)), nn.Sequential(Remembering(1, 2, 3))
    model[0].note, neighbour[0].note = "mine", "yours"
    graft(model, neighbour.state_dict())
    assert model[0].note == "mine"
    load_plain_state(model, plain_state(neighbour))
    assert model[0].note == "yours"
    model.register_state_dict_post_hook(lambda module, state, *_: state.update(packed=(1, 2)))
    with pytest.raises(MismatchError, match=r"^packed: in the network it is a tuple; exclude=\('packed',\)"):
        graft(model, model.state_dict())


# Words


def test_nothing_is_printed_and_no_message_names_a_flag(capfd):
    graft(*pair(mixture))
    assert capfd.readouterr() == ("", "")
    for path in Path(filter_grafting.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"), path
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            assert not re.search(r"(?<!-)--[a-z]", text), (path, text)
