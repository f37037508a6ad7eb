"""The model in use as one ONNX file that any runtime loads: the bundle's graph for inference, and weights put into it.

The device has no onnx package. So the file is written as a merge (``engines.wire``): the bundle's ``infer.onnx`` as it
stands, behind it a model that holds nothing but initializers, and what the file says of itself (``metadata_props``).
Weights go from file to file piece by piece. Knows bytes and files; nothing of training.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from edgetune.agent.storage import guard
from edgetune.bundle import WEIGHTS, Bundle, Place, places_in
from edgetune.engines import wire
from edgetune.errors import BundleError, StateError

MOST_BYTES = 2**31 - 1
"""What a message of Protocol Buffers may have, and so an ONNX file with its weights inside."""
_NUMPY = {number: name for name, number in wire.ELEMENT_TYPES.items()}


def skeleton_of(bundle: Bundle) -> Place:
    """Return where the bundle's graph for inference lies."""
    path = bundle.path / bundle.manifest.inference.file
    size = path.stat().st_size
    return Place(path, "uint8", (size,), 0, size)


def inference_places(bundle: Bundle, trained: Mapping[str, Place] | None = None) -> dict[str, Place]:
    """Return where every weight lies that the bundle's graph for inference lacks.

    Args:
        trained: parameters by name, and buffers as ``buffer/<name>`` (so a checkpoint holds them); None: as exported.

    Raises:
        BundleError: one is missing, or of another shape than the exported one.
    """
    manifest, exported = bundle.manifest, places_in(bundle.path / WEIGHTS)
    own = {spec.name: spec.name for spec in manifest.parameters}
    own |= {spec.name: f"buffer/{spec.name}" for spec in manifest.buffers}
    found = {}
    for name in manifest.inference.tensors:
        place = exported.get(name)
        if place is None:
            raise BundleError(f"the bundle '{bundle.path}' has no weight '{name}'; export it again")
        if trained is not None and name in own:
            fresh = trained.get(own[name])
            if fresh is None or (fresh.shape, fresh.dtype) != (place.shape, place.dtype):
                raise BundleError(
                    f"the checkpoint does not fit the bundle: '{name}' should have the shape {place.shape}; "
                    "restore it, or give the bundle that it was made with"
                )
            place = fresh
        found[name] = place
    return found


def about(bundle: Bundle) -> dict[str, str]:
    """Return what a file says of the bundle that it is made of; lists and objects as JSON."""
    manifest, preprocess = bundle.manifest, bundle.manifest.preprocess
    return {
        "model": manifest.model,
        "bundle": bundle.digest,
        "classes": json.dumps(manifest.classes),
        "preprocess": json.dumps({"color": preprocess.color, "mean": preprocess.mean, "std": preprocess.std}),
    }


def write_model(path: Path, skeleton: Place, weights: Mapping[str, Place], metadata: Mapping[str, str]) -> str:
    """Write the file ``path`` and flush it to the disk; return its SHA-256.

    Args:
        skeleton: the graph without these ``weights``, as :func:`skeleton_of` or :func:`open_model` gives it.

    Raises:
        StorageError: the disk refused; there is no ``path``. BundleError: the file would exceed :data:`MOST_BYTES`.
    """
    heads = {name: _tensor_head(name, place) for name, place in weights.items()}
    sizes = {name: len(heads[name]) + place.length for name, place in weights.items()}
    graph_bytes = sum(len(wire.head(wire.GRAPH_INITIALIZER, size)) + size for size in sizes.values())
    if graph_bytes + skeleton.length > MOST_BYTES:
        raise BundleError(f"the model has {graph_bytes} bytes of weights; an ONNX file can have {MOST_BYTES}")

    def content() -> Iterator[bytes]:
        yield from skeleton.pieces()
        yield wire.head(wire.MODEL_GRAPH, graph_bytes)
        for name, place in weights.items():
            yield wire.head(wire.GRAPH_INITIALIZER, sizes[name]) + heads[name]
            yield from place.pieces()
        for key, value in metadata.items():
            entry = wire.message(wire.ENTRY_KEY, key.encode()) + wire.message(wire.ENTRY_VALUE, value.encode())
            yield wire.message(wire.MODEL_METADATA, entry)

    digest = hashlib.sha256()
    with guard(f"cannot write the model {path}"):
        try:
            with path.open("wb") as stream:
                for piece in content():
                    digest.update(piece)
                    stream.write(piece)
                stream.flush()
                os.fsync(stream.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    return digest.hexdigest()


def _tensor_head(name: str, place: Place) -> bytes:
    """Return a TensorProto up to its raw data, which are the last field."""
    dims = b"".join(wire.number(wire.TENSOR_DIMS, extent) for extent in place.shape)
    kind = wire.number(wire.TENSOR_TYPE, wire.ELEMENT_TYPES[place.dtype])
    return dims + kind + wire.message(wire.TENSOR_NAME, name.encode()) + wire.head(wire.TENSOR_RAW, place.length)


@dataclass(frozen=True)
class ModelFile:
    """What a file that :func:`write_model` made consists of: the graph alone, the weights that were put into it, and
    what it says of itself."""

    skeleton: Place
    weights: Mapping[str, Place]
    metadata: Mapping[str, str]


def open_model(path: Path) -> ModelFile:
    """Return what lies where in a file; no weight is read.

    Raises:
        StateError: it is missing or damaged.
    """
    weights, metadata, graphs, end = dict[str, Place](), dict[str, str](), 0, 0
    try:
        with path.open("rb") as stream:
            size = path.stat().st_size
            for field in wire.fields_in(stream, 0, size):
                if field.number == wire.MODEL_METADATA:
                    stream.seek(field.offset)
                    entry = stream.read(field.length)
                    metadata[wire.text(entry, wire.ENTRY_KEY)] = wire.text(entry, wire.ENTRY_VALUE)
                elif field.number == wire.MODEL_GRAPH and (graphs := graphs + 1) == 2:
                    inside = wire.fields_in(stream, field.offset, field.offset + field.length)
                    weights = dict(_tensor_in(stream, path, tensor) for tensor in inside)
                if graphs < 2:
                    end = field.offset + field.length
        if graphs != 2:
            raise ValueError(f"it holds {graphs} graphs, not a graph and its weights")
    except (OSError, ValueError, KeyError, BundleError) as error:
        raise StateError(f"the model {path} cannot be read ({error}); restore it, or roll back") from None
    return ModelFile(Place(path, "uint8", (end,), 0, end), weights, metadata)


def _tensor_in(stream: BinaryIO, path: Path, tensor: wire.FieldPlace) -> tuple[str, Place]:
    """Return the name of a TensorProto and where its raw data lie (nowhere, if it holds them in another field)."""
    shape, kind, name, offset, length = list[int](), 0, "", 0, 0
    for part in wire.fields_in(stream, tensor.offset, tensor.offset + tensor.length):
        if part.number == wire.TENSOR_DIMS:
            shape.append(part.value)
        elif part.number == wire.TENSOR_TYPE:
            kind = part.value
        elif part.number == wire.TENSOR_NAME:
            stream.seek(part.offset)
            name = stream.read(part.length).decode()
        elif part.number == wire.TENSOR_RAW:
            offset, length = part.offset, part.length
    return name, Place(path, _NUMPY[kind], tuple(shape), offset, length)


def classes_of(model: ModelFile) -> tuple[str, ...]:
    """Return the names of the classes that a file says it tells apart.

    Raises:
        StateError: it says nothing, or something else than a list of names.
    """
    try:
        names = json.loads(model.metadata["classes"])
    except (KeyError, ValueError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise StateError(f"{model.skeleton.path} does not say which classes it tells apart; restore it from a copy")
    return tuple(names)


def copy(source: Path, target: Path) -> None:
    """Copy a file onto the disk, piece by piece."""
    with source.open("rb") as reading, target.open("wb") as writing:
        shutil.copyfileobj(reading, writing, 1 << 20)
        writing.flush()
        os.fsync(writing.fileno())
