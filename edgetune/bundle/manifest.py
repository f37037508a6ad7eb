"""The manifest: all that a device needs to know of a bundle beyond its weights, as JSON and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from edgetune.bundle.graphs import GraphSpec, InferenceSpec
from edgetune.bundle.specs import (
    AdapterSpec,
    LayerSpec,
    LossSpec,
    OptimizerSpec,
    ParameterSpec,
    PreprocessSpec,
    SavedSpec,
    TensorSpec,
)
from edgetune.errors import BundleError
from edgetune.plain import from_plain

FORMAT_VERSION = 5
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """All that a device needs to know of a bundle beyond its weights.

    Attributes:
        outputs: what the predict graph returns; the loss is computed from the first.
        targets: what the train graph compares the outputs with.
        classes: their names, where the model is a classifier; else empty.
        buffers: what a training step changes besides the parameters (the running statistics of trained batch-norm);
            shapes without a batch. The train graph reads ``<name>`` and returns ``new/<name>``.
        inference: the model for use, without its weights.
        adapter: what made weights of the tail computed ones, None if nothing did.
    """

    format_version: int
    model: str
    made_by: str
    opset: int
    inputs: tuple[TensorSpec, ...]
    features: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    targets: TensorSpec
    classes: tuple[str, ...]
    preprocess: PreprocessSpec
    loss: LossSpec
    optimizer: OptimizerSpec
    codec: str
    layers: tuple[LayerSpec, ...]
    saved: tuple[SavedSpec, ...]
    parameters: tuple[ParameterSpec, ...]
    graphs: Mapping[str, GraphSpec]
    inference: InferenceSpec
    buffers: tuple[TensorSpec, ...] = ()
    adapter: AdapterSpec | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def classifies(self) -> bool:
        """Whether a sample's target is one of ``classes``."""
        return bool(self.classes) and not self.targets.shape

    def to_json(self) -> str:
        """Return the manifest as JSON text; :meth:`from_json` reads it back equal."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Manifest:
        """Return the manifest that ``text`` holds.

        Raises:
            BundleError: not JSON, another format version, or a field missing, unknown or of the wrong type.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise BundleError(f"{MANIFEST} is not JSON ({error}); export the bundle again") from None
        version = data.get("format_version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise BundleError(
                f"the bundle's format version is {version!r}; this EdgeTune reads version {FORMAT_VERSION}: export the "
                "bundle again with this version, or install the version that wrote it"
            )
        manifest: Manifest = from_plain(Manifest, data, "manifest")
        return manifest
