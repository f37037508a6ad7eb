"""A trained adapter back into ordinary weights. Knows the bundle; runs on a device."""

from __future__ import annotations

import math
from collections.abc import Mapping

from safetensors import safe_open

from edgetune.adapters.maps import unpack_bits
from edgetune.adapters.slices import expand
from edgetune.bundle import WEIGHTS, AdapterMapSpec, Array, Bundle
from edgetune.errors import BundleError


def merge(bundle: Bundle, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Return the trained tensors of ``bundle`` under the model's own names, what an adapter made put together.

    Args:
        tensors: values of the trained tensors: ``session.parameters()``, the tensors of a checkpoint, or what a device
            sent. Others in it are left out.

    Raises:
        BundleError: a trained tensor is missing.
    """
    missing = [spec.name for spec in bundle.manifest.parameters if spec.name not in tensors]
    if missing:
        raise BundleError(f"'{missing[0]}' is trained in '{bundle.path}' and missing here; give all trained tensors")
    adapter = bundle.manifest.adapter
    if adapter is None:
        return {spec.name: tensors[spec.name] for spec in bundle.manifest.parameters}
    own = {spec.codes for spec in adapter.weights} | {spec.name for spec in adapter.maps}
    merged = {spec.name: tensors[spec.name] for spec in bundle.manifest.parameters if spec.name not in own}
    with safe_open(bundle.path / WEIGHTS, framework="numpy") as stream:

        def map_of(spec: AdapterMapSpec) -> Array:
            if spec.trained:
                return tensors[spec.name]
            if spec.bits is not None:
                return unpack_bits(stream.get_tensor(spec.bits), math.prod(spec.slice))
            value: Array = stream.get_tensor(spec.name)
            return value

        maps = {spec.name: (spec, map_of(spec)) for spec in adapter.maps}
        for weight in adapter.weights:
            spec, shared = maps[weight.map]
            made = expand(tensors[weight.codes], shared, weight.shape, spec.slice)
            merged[weight.weight] = made + stream.get_tensor(weight.weight) if adapter.residual else made
    return merged
