"""Filter Grafting for Deep Neural Networks (Meng et al., CVPR 2020): the method as a library.

from filter_grafting import graft
layers = graft(model, neighbour_state_dict)  # blends the model in place
"""

from .errors import (
    AliveError,
    AlreadyRunError,
    CheckpointError,
    GraftingError,
    MismatchError,
    NeighbourTimeout,
    RefusedError,
    SettingsError,
    UnreadableError,
    WriteError,
)
from .grafting import Layer, coefficient, graft, graft_ring
from .information import entropy, invalid_filters, l1_norm
from .rings import Checkpoint, Exchange, FileRing, ProcessGroupRing
from .scheduler import Grafting
from .states import State, load_plain_state, plain_state

__version__ = "1.0.0"

__all__ = [
    "AliveError",
    "AlreadyRunError",
    "Checkpoint",
    "CheckpointError",
    "Exchange",
    "FileRing",
    "Grafting",
    "GraftingError",
    "Layer",
    "MismatchError",
    "NeighbourTimeout",
    "ProcessGroupRing",
    "RefusedError",
    "SettingsError",
    "State",
    "UnreadableError",
    "WriteError",
    "coefficient",
    "entropy",
    "graft",
    "graft_ring",
    "invalid_filters",
    "l1_norm",
    "load_plain_state",
    "plain_state",
]
