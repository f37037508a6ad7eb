"""Trainable re-parametrisations of convolution weights: CSG and BCSG.

Omidvar et al., "Associative Convolutional Layers", AISTATS 2021. ``slices`` is the arithmetic, ``settings`` the
spelling, ``maps`` what is drawn or read, ``merge`` the way back to ordinary weights: all of these know numpy alone.
``torch`` trains any torch model with them.
"""

from edgetune.adapters.maps import first_codes, first_map, map_name, save_maps
from edgetune.adapters.merge import merge
from edgetune.adapters.settings import AdapterSettings, parse
from edgetune.adapters.slices import Slicing, cut_apart, expand

__all__ = [
    "AdapterSettings",
    "Slicing",
    "cut_apart",
    "expand",
    "first_codes",
    "first_map",
    "map_name",
    "merge",
    "parse",
    "save_maps",
]
