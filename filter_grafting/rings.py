"""How networks exchange weights: through files of a shared directory, or between the processes of one job."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch.distributed
from torch import Tensor

from .states import State


class Exchange(Protocol):
    """What grafting needs of a ring: give the network's own weights of a round, get its neighbour's of that round."""

    def swap(self, state: Mapping[str, Tensor], round: int) -> Mapping[str, Tensor]: ...


class Checkpoint(NamedTuple):
    """A checkpoint that this network published: `extra` as it was given to `publish`, its tensors on the CPU."""

    round: int
    state: State
    extra: Any
    path: Path


class FileRing:
    """Network i's place in a ring of N that exchanges weights through files in a shared directory."""

    directory: Path
    network: int
    networks: int
    neighbour: int
    run: str
    resumed: bool

    def __init__(
        self,
        directory: str | os.PathLike[str],
        network: int,
        networks: int,
        *,
        settings: Mapping[str, Any] | None = None,
        resume: bool = False,
        may_raise: Sequence[str] = (),
        timeout: float = 3600.0,
        keep: float = 0,
        name: str = "ckpt{index}_{round}.t7",
        key: str = "net",
        start_command: Callable[[int], str] | None = None,
        details: Mapping[str, Any] | None = None,
        check: Callable[[], None] = lambda: None,
    ):
        raise NotImplementedError

    def agree(self, settings: Mapping[str, Any], may_raise: Sequence[str] = ()) -> None:
        raise NotImplementedError

    def publish(self, round: int, state: Mapping[str, Tensor], extra: Any = None) -> None:
        raise NotImplementedError

    def wait(self, round: int) -> State:
        raise NotImplementedError

    def swap(self, state: Mapping[str, Tensor], round: int, extra: Any = None) -> State:
        self.publish(round, state, extra)
        return self.wait(round)

    def newest(self) -> Checkpoint | None:
        raise NotImplementedError

    def update(self, state: str, detail: str = "", **fields: Any) -> None:
        raise NotImplementedError

    def progress(self, step: int) -> None:
        raise NotImplementedError

    def path(self, round: int, network: int | None = None) -> Path:
        raise NotImplementedError

    def file(self, kind: str) -> Path:
        raise NotImplementedError

    def leave(self, state: str = "done", detail: str = "") -> None:
        raise NotImplementedError

    def __enter__(self) -> "FileRing":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        raise NotImplementedError


class ProcessGroupRing:
    """The ranks of a process group as a ring: rank r is network r + 1."""

    def __init__(self, group: torch.distributed.ProcessGroup | None = None):
        raise NotImplementedError

    def swap(self, state: Mapping[str, Tensor], round: int) -> State:
        raise NotImplementedError
