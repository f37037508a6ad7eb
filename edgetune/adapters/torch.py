"""CSG in PyTorch: any model is trained with W = csg(c), or W₀ + csg(c), through torch's own parametrisations.

    attach(model, parse("csg:residual=no"))     # from scratch: codes and map are the model's parameters
    ...train as usual...
    save_maps("map.safetensors", maps_of(model))   # for another model: csg:map=map.safetensors
    detach(model)                               # ordinary weights again: export it like any other model

Knows torch; nothing else of the package imports it.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from edgetune.adapters.maps import draw_bits, first_codes, first_map, unpack_bits
from edgetune.adapters.settings import BINARY, AdapterSettings
from edgetune.adapters.slices import Slicing
from edgetune.bundle import Array
from edgetune.errors import UsageError, choices

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class SharedMap(nn.Module):
    """The map [n_c, s] of all slices of one shape: a parameter, a buffer, or a seed.

    A binary map is in the state dictionary as three integers; its floats never are.
    """

    def __init__(self, settings: AdapterSettings, index: int) -> None:
        super().__init__()
        self.slice = settings.slices[index]
        self.seed = settings.seed if settings.map == BINARY else None
        value = torch.from_numpy(first_map(settings, index))
        if settings.freeze:
            self.register_buffer("value", value, persistent=self.seed is None)
        else:
            self.value: Tensor = nn.Parameter(value)

    def get_extra_state(self) -> Tensor:
        """Return what a binary map follows from: seed, n_c, s; nothing for others."""
        return torch.tensor([] if self.seed is None else [self.seed, *self.value.shape], dtype=torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        """Make the binary map that ``state`` tells.

        Raises:
            UsageError: the map here is none, or of another shape.
        """
        own = self.get_extra_state()
        if own.shape != state.shape or not torch.equal(own[1:].cpu(), state[1:].cpu()):
            raise UsageError(f"a CSG state {state.tolist()} does not fit the map {own.tolist()} (seed, code, elements)")
        if self.seed is not None:
            self.seed, code, elements = (int(number) for number in state)
            self.value.copy_(torch.from_numpy(unpack_bits(draw_bits(self.seed, code, elements), elements)))


class Csg(nn.Module):
    """Computes one set of filters from its codes [n, n_c]: what ``adapters.expand`` does."""

    def __init__(self, shared: SharedMap, cut: Slicing, codes: Tensor, start: Tensor | None) -> None:
        super().__init__()
        self.shared = shared
        self.cut = cut
        self._codes = codes
        self.start: Tensor | None
        self.register_buffer("start", start)

    def forward(self, codes: Tensor) -> Tensor:
        """Return the filters of the shape ``cut.shape``."""
        cut = self.cut
        parts = (codes @ self.shared.value).reshape(cut.apart)
        whole = parts.permute(cut.interleaved).reshape(cut.covered)
        made = whole[tuple(slice(0, extent) for extent in cut.shape)]
        return made if self.start is None else made + self.start

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the codes to begin with; torch asks for them once, when the parametrisation is registered."""
        return self._codes.to(weight)


def attach(model: nn.Module, settings: AdapterSettings, layers: Collection[str] | None = None) -> list[str]:
    """Make convolutions of ``model`` compute their weights from codes; return the names of those modules.

    Args:
        layers: names of the modules to be taken; by default every convolution but the first, in the order in which the
            model holds them, that a slice serves with fewer numbers. As in the export, others are left alone.

    Raises:
        UsageError: a name is unknown, or nothing is left to be taken.
    """
    known = {name: module for name, module in model.named_modules() if isinstance(module, _CONVOLUTIONS)}
    unknown = set(layers or ()) - set(known)
    if unknown:
        raise UsageError(f"the model has no convolution '{sorted(unknown)[0]}'; choose from: {choices(known)}")
    shared: dict[int, SharedMap] = {}
    taken = []
    for name in list(known)[1:] if layers is None else layers:
        module = known[name]
        index = settings.slice_for(tuple(module.weight.shape))
        if index is None:
            continue
        cut, code = Slicing(tuple(module.weight.shape), settings.slices[index]), settings.codes[index]
        if not cut.shrinks(code):
            continue
        if index not in shared:
            shared[index] = SharedMap(settings, index).to(module.weight)
        codes = torch.from_numpy(first_codes(settings, f"{name}.weight", cut, code))
        start = module.weight.detach().clone() if settings.residual else None
        parametrize.register_parametrization(module, "weight", Csg(shared[index], cut, codes, start))
        taken.append(name)
    if not taken:
        raise UsageError("adapter: no convolution of this model can be generated from these slices with fewer numbers")
    return taken


def detach(model: nn.Module) -> None:
    """Give every convolution of ``model`` the weight that it computes now, as an ordinary parameter."""
    for module in [module for module in model.modules() if _is_attached(module)]:
        if len(list(module.get_submodule("parametrizations").children())) > 1:  # somebody's own, of the bias
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
            continue
        # torch's own removal takes the weight away from the class, which every copy of the model shares.
        ordinary = parametrize.type_before_parametrizations(module)
        weight = nn.Parameter(_weight(module).detach().clone())
        del module.parametrizations
        module.__class__ = ordinary
        module.register_parameter("weight", weight)


def maps_of(model: nn.Module) -> dict[tuple[int, ...], Array]:
    """Return the maps [n_c, s] of an attached model by the shape of their slices, as ``save_maps`` takes them."""
    found = {}
    for module in model.modules():
        if isinstance(module, SharedMap):
            found[module.slice] = module.value.detach().cpu().numpy()
    return found


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _is_attached(module: nn.Module) -> bool:
    if not isinstance(module, _CONVOLUTIONS) or not parametrize.is_parametrized(module, "weight"):
        return False
    steps = module.get_submodule("parametrizations.weight")
    return any(isinstance(step, Csg) for step in steps.children())
