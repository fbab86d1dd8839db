"""State dicts: under plain names whatever wraps the network, whole whatever shards it, compared before a blend."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .errors import MismatchError

T = TypeVar("T")

# DistributedDataParallel, DataParallel and AveragedModel; torch.compile; FSDP; activation checkpoints.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


class State(dict[str, Tensor]):
    """A state dict that knows where it came from: `source`, such as a file's name, is named when it does not fit."""

    def __init__(self, entries: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] = (), source: str = "") -> None:
        super().__init__(entries)
        self.source = source


def plain_name(key: str) -> str:
    """The name of an entry or module without wrappers: `module._orig_mod.conv.weight` is `conv.weight`.

    `module`, `_orig_mod` and the like are dropped wherever they stand as a whole segment of the name.
    """
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def plain_names(entries: Mapping[str, T]) -> dict[str, T]:
    """The same entries in the same order under plain names (see `plain_name`).

    Raises:
        MismatchError: if two entries have the same plain name.
    """
    plain: dict[str, T] = {}
    for key, entry in entries.items():
        name = plain_name(str(key))
        if name in plain:
            raise MismatchError(f"{key}: without its wrappers' names it is {name}, as another is: rename one of them")
        plain[name] = entry
    return plain


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by plain name, in order, without what wraps them; a shared one has several names."""
    return {plain_name(name): module for name, module in model.named_modules(remove_duplicate=False)}


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model under plain names, with every DTensor gathered (a collective call, then).

    The tensors are the model's own, not copies. What a module keeps beside tensors (`get_extra_state`) is there, too.
    """
    return {key: whole(entry) for key, entry in plain_names(model.state_dict()).items()}


def load_plain_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads a state dict under plain names into a model, wrapped and sharded as it may be.

    Raises:
        MismatchError: naming the first entry that differs; the model is then untouched.
    """
    own: dict[str, Any] = model.state_dict()
    check_alike(plain_names(own), state)
    for key, entry in own.items():
        own[key] = placed(state[plain_name(key)], entry)
    model.load_state_dict(own)  # which also says of which version its modules are: some ask for that


def whole(entry: T) -> T:
    """A DTensor gathered from all its shards (every process of its mesh must call this), anything else as it is."""
    return entry.full_tensor() if hasattr(entry, "full_tensor") else entry


def local(entry: Tensor) -> Tensor:
    """This process's shard of a DTensor, any other tensor as it is: what can be changed in place."""
    return entry.to_local() if hasattr(entry, "to_local") else entry


def placed(entry: Any, like: Any) -> Any:
    """A whole tensor on the device of another, and sharded as that one is; anything else as it is."""
    if isinstance(entry, Tensor) and isinstance(like, Tensor):
        entry = entry.to(like.device)
    if hasattr(like, "device_mesh"):
        from torch.distributed.tensor import DTensor, Replicate  # here: it is not there on every platform

        everywhere = DTensor.from_local(entry, like.device_mesh, [Replicate()] * like.device_mesh.ndim)
        return everywhere.redistribute(placements=like.placements)
    return entry


def place(entry: Tensor) -> tuple[int, object]:
    """Where a tensor lies: (what all that share its memory have in common, which part of that it is)."""
    entry = local(entry)
    return int(entry.untyped_storage()._cdata), (entry.storage_offset(), entry.shape, entry.stride())


def excluded(exclude: Sequence[str], keys: Collection[str]) -> set[str]:
    """The entries that patterns cover (`head.*`, as file names have them).

    Raises:
        ValueError: if a pattern covers none: what it was meant for would be blended.
    """
    found: set[str] = set()
    for pattern in [exclude] if isinstance(exclude, str) else exclude:  # a single one, not its letters
        covered = {key for key in keys if fnmatchcase(key, plain_name(pattern))}
        if not covered:
            raise ValueError(f"exclude: {pattern!r} fits no entry; expected patterns such as {next(iter(keys), '*')!r}")
        found |= covered
    return found


def check_alike(own: Mapping[str, Any], neighbour: Mapping[str, Any], skip: Collection[str] = ()) -> None:
    """Checks that two state dicts have the same entries, of the same shapes, and types that can be blended.

    Floating-point types may differ (a copy sent as bfloat16), others not.

    Args:
        own, neighbour: under plain names. A `State` names its source in the message.
        skip: entries that are not compared.

    Raises:
        MismatchError: naming the first entry that differs, with both sides.
    """
    for key in dict.fromkeys([*own, *neighbour]):
        alike = key in own and key in neighbour and _kind(own[key]) == _kind(neighbour[key])
        if not alike and key not in skip:
            source = getattr(neighbour, "source", "")
            before, side = (f"{source}: ", "there") if source else ("", "in its neighbour")
            here, there = (_form(state[key]) if key in state else "missing" for state in (own, neighbour))
            raise MismatchError(f"{before}{key}: in the network {here}, {side} {there}")


def _kind(entry: object) -> object:
    """What has to be equal of two entries. What modules keep there beside tensors is theirs, and never blended."""
    if not isinstance(entry, Tensor) or is_lazy(entry):
        return isinstance(entry, Tensor)
    return entry.shape, "float" if entry.is_floating_point() else "complex" if entry.is_complex() else entry.dtype


def _form(entry: object) -> str:
    if isinstance(entry, Tensor) and not is_lazy(entry):
        return f"{tuple(entry.shape)} {str(entry.dtype).removeprefix('torch.')}"
    return f"a {type(entry).__name__}"


def advice(key: str) -> str:
    return f"; exclude=({key!r},) keeps the network's own"


def is_weight(entry: Tensor) -> bool:
    """Whether an entry has a mean of two: integers and booleans have none, and stay the network's own."""
    return entry.is_floating_point() or entry.is_complex()


def obstacle(entry: Any) -> str:
    """Why an entry cannot be blended; empty if it can, or is none of the weights."""
    if not isinstance(entry, Tensor):
        return f"it is a {type(entry).__name__}"
    if is_lazy(entry) or entry.is_meta:
        return "it has no values yet"
    if entry.layout != torch.strided or (local(entry) is entry and is_traceable_wrapper_subclass(entry)):
        return f"it is a {type(entry).__name__} of layout {entry.layout}, which cannot be blended in place"
    if entry.is_quantized or entry.dtype == torch.int8 or (is_weight(entry) and entry.itemsize < 2):
        return f"it is {entry.dtype}: numbers without their scale cannot be blended"
    if not is_weight(entry) and isinstance(entry, nn.Parameter):
        return f"it is a parameter of {entry.dtype}, which has no mean"
    return ""


def paired(
    model: nn.Module, neighbour: Mapping[str, Any], exclude: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Any], State]:
    """(entries to blend, all of the network's, all of its neighbour's), under plain names, and compared.

    To blend are all floating-point and complex entries of the model that no pattern excludes, once if it has several
    names.

    Raises:
        ValueError: if a pattern covers no entry.
        MismatchError: naming the first entry that differs, or whose blend is not possible or has no meaning.
    """
    if not isinstance(neighbour, Mapping):
        raise MismatchError(f"the neighbour is a {type(neighbour).__name__}: expected its state dict")
    own: dict[str, Any] = plain_names(model.state_dict(keep_vars=True))
    source = getattr(neighbour, "source", "")
    other = State({key: whole(entry) for key, entry in plain_names(neighbour).items()}, source)
    skip = excluded(exclude, [*own, *other])
    check_alike(own, other, skip)
    return _blendable(model, own, other, skip), own, other


def _blendable(model: nn.Module, own: Mapping[str, Any], other: State, skip: Collection[str]) -> dict[str, Tensor]:
    tensors = [*model.parameters(), *model.buffers()]
    memory = {place(tensor)[0] for tensor in tensors if not obstacle(tensor)}
    kept = {place(own[key]) for key in skip if key in own and not obstacle(own[key])}  # under whatever other name
    entries: dict[object, tuple[str, Tensor]] = {}  # by where they lie, under their first name
    for key, entry in own.items():
        if key in skip or (key.endswith("_extra_state") and not isinstance(entry, Tensor)):
            continue
        for side, value in ("the network", entry), ("its neighbour", other[key]):
            if why := obstacle(value):
                raise MismatchError(f"{key}: in {side} {why}{advice(key)}")
        if not is_weight(entry):
            continue
        if _is_bookkeeping(key, entry, own):
            if not torch.equal(whole(entry), other[key].to(entry.device, entry.dtype)):
                raise MismatchError(f"{key}: a mask or state of a parametrization has no mean of two{advice(key)}")
            continue
        at = place(entry)
        if at[0] not in memory:
            raise MismatchError(f"{key}: the state dict holds a copy, not the model's own (FSDP1?){advice(key)}")
        if at in kept:
            continue
        name, _ = entries.setdefault(at, (key, entry))
        if name != key and not torch.equal(other[name], other[key]):
            raise MismatchError(f"{key}: in the network it is {name}, in its neighbour they differ{advice(key)}")
    return dict(entries.values())


def _is_bookkeeping(key: str, entry: Tensor, own: Mapping[str, Any]) -> bool:
    """Whether an entry is no weight, but what pruning or a parametrization computes a weight with."""
    stem, _, ending = key.rpartition("_")
    of_weight = ending in ("mask", "u", "v") and f"{stem}_orig" in own
    return (of_weight or "parametrizations" in key.split(".")) and not isinstance(entry, nn.Parameter)
