"""Filter Grafting for Deep Neural Networks (Meng et al., CVPR 2020): the method as a library.

    from filter_grafting import graft
    coefficients = graft(network, neighbour_state_dict)   # blends the network in place
"""

from importlib import import_module

_MODULES = {"coefficient": "grafting", "graft": "grafting", "entropy": "information", "invalid_filters": "information"}
__all__ = sorted(_MODULES)


def __getattr__(name: str):
    # With the first name that needs it torch is imported, not before: the status of a run must not wait for it.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
