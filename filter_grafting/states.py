"""State dicts: under plain names whatever wraps the network, whole whatever shards it, compared before a blend."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import Tensor, nn

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
            raise MismatchError(f"{key}: there is another entry {name!r}; a wrapper's name ('module') is no layer's name")
        plain[name] = entry
    return plain


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model under plain names, with every DTensor gathered (a collective call, then).

    The tensors are the model's own, not copies. What a module keeps beside tensors (`get_extra_state`) is kept as it is.
    """
    return {key: whole(entry) for key, entry in plain_names(model.state_dict()).items()}


def load_plain_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads a state dict under plain names into a model, wrapped and sharded as it may be.

    Raises:
        MismatchError: naming the first entry that differs; the model is then untouched.
    """
    own: dict[str, Any] = model.state_dict()
    check_alike(plain_names(own), state)
    model.load_state_dict({key: placed(state[plain_name(key)], entry) for key, entry in own.items()})


def whole(entry: T) -> T:
    """A DTensor gathered from all its shards (every process of its mesh must call this), anything else as it is."""
    return entry.full_tensor() if hasattr(entry, "full_tensor") else entry  # type: ignore[no-any-return]


def placed(entry: T, like: T) -> T:
    """A whole tensor on the device of another, and sharded as that one is."""
    if not isinstance(entry, Tensor) or not isinstance(like, Tensor):
        return entry
    entry = entry.to(like.device)
    if hasattr(like, "full_tensor"):
        from torch.distributed.tensor import DTensor, Replicate  # here: it is not there on every platform

        everywhere = [Replicate()] * like.device_mesh.ndim
        return DTensor.from_local(entry, like.device_mesh, everywhere).redistribute(placements=like.placements)
    return entry


def is_excluded(key: str, exclude: Sequence[str]) -> bool:
    """Whether one of the patterns (`head.*`, as file names have them) covers an entry."""
    patterns = [exclude] if isinstance(exclude, str) else exclude
    return any(fnmatchcase(key, plain_name(pattern)) for pattern in patterns)


def check_alike(own: Mapping[str, Any], neighbour: Mapping[str, Any], exclude: Sequence[str] = ()) -> None:
    """Checks that two state dicts have the same entries, of the same shapes, and types that can be blended.

    Floating-point types may differ (a copy sent as bfloat16), others not.

    Args:
        own, neighbour: under plain names. A `State` names its source in the message.
        exclude: patterns of entries that are not compared.

    Raises:
        MismatchError: naming the first entry that differs, with both sides.
    """
    source = getattr(neighbour, "source", "")
    for key in [*own, *(key for key in neighbour if key not in own)]:
        if is_excluded(str(key), exclude):
            continue
        here, there = (_form(state[key]) if key in state else "missing" for state in (own, neighbour))
        if key not in own or key not in neighbour or _kind(own[key]) != _kind(neighbour[key]):
            before, side = (f"{source}: ", "there") if source else ("", "in its neighbour")
            raise MismatchError(f"{before}{key}: in the network {here}, {side} {there}")


def _kind(entry: object) -> object:
    """What has to be equal of two entries. What modules keep there beside tensors is theirs, and never blended."""
    if not isinstance(entry, Tensor):
        return None
    return entry.shape, "float" if entry.is_floating_point() else "complex" if entry.is_complex() else entry.dtype


def _form(entry: object) -> str:
    if isinstance(entry, Tensor):
        return f"{tuple(entry.shape)} {str(entry.dtype).removeprefix('torch.')}"
    return f"a {type(entry).__name__}"
