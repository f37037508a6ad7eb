"""The bundle: the one thing that passes from the host to the device, and all that both know of it.

A bundle is a directory of plain files::

    manifest.json         everything below, versioned; the sha256 of every other file
    weights.safetensors   all weights; the graphs' constants point into it as ONNX external data
    trunk.onnx            frozen prefix: inputs -> features
    train.onnx            features, targets, parameters, bases -> loss, gradients, captured energy (readable: one
                          model-local function per idea)
    train.flat.onnx       the same with every function inlined, in the order in which it must be executed
    calibrate.onnx        features, parameters -> Gram matrices of every tensor that will be compressed
    update.onnx           parameters, gradients, optimizer state -> new parameters, new state
    accumulate.onnx       the mean (or sum) of gradients so far, those of the next piece of a batch -> that of both
    predict.onnx          features, parameters -> the model's outputs
    infer.onnx            inputs -> the model's outputs, for use and not for training; without its weights

This module may know numpy, safetensors and the errors; it must not know onnx, a runtime, or how a graph was made.
"""

from __future__ import annotations

from edgetune.bundle.files import WEIGHTS, Array, Bundle, sha256_of, sync_directory, write_manifest
from edgetune.bundle.graphs import ChoiceSpec, GraphSpec, InferenceSpec, StageSpec, TensorUse, WireSpec, Workspace
from edgetune.bundle.manifest import FORMAT_VERSION, MANIFEST, Manifest
from edgetune.bundle.specs import (
    TRACED,
    AdaptedWeightSpec,
    AdapterMapSpec,
    AdapterSpec,
    LayerSpec,
    LossSpec,
    ModeSpec,
    OptimizerSpec,
    OptionSpec,
    ParameterSpec,
    PreprocessSpec,
    SavedSpec,
    TensorSpec,
)
from edgetune.bundle.tensors import Place, places_in

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "TRACED",
    "WEIGHTS",
    "AdaptedWeightSpec",
    "AdapterMapSpec",
    "AdapterSpec",
    "Array",
    "Bundle",
    "ChoiceSpec",
    "GraphSpec",
    "InferenceSpec",
    "LayerSpec",
    "LossSpec",
    "Manifest",
    "ModeSpec",
    "OptimizerSpec",
    "OptionSpec",
    "ParameterSpec",
    "Place",
    "PreprocessSpec",
    "SavedSpec",
    "StageSpec",
    "TensorSpec",
    "TensorUse",
    "WireSpec",
    "Workspace",
    "places_in",
    "sha256_of",
    "sync_directory",
    "write_manifest",
]
