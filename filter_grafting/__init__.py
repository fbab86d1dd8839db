"""Filter Grafting for Deep Neural Networks (Meng et al., CVPR 2020): the method as a library.

    from filter_grafting import graft
    coefficients = graft(network, neighbour_state_dict)   # blends the network in place
"""

from .grafting import coefficient, graft
from .information import entropy, invalid_filters

__all__ = ["coefficient", "entropy", "graft", "invalid_filters"]
