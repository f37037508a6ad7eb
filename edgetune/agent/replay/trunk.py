"""What the features of a bundle's trunk depend on, as one hash. Knows bundles; nothing of replay."""

from __future__ import annotations

import dataclasses
import hashlib
import json

from edgetune.bundle import WEIGHTS, Bundle

_PIECE_BYTES = 1 << 20


def trunk_digest(bundle: Bundle) -> str:
    """Return the SHA-256 over the trunk's graph, all weights that are not trained, and how a sample is preprocessed.

    Two bundles with the same digest make the same features of a sample. Frozen weights of the tail count too: which
    constants a graph reads is not in the manifest.

    Raises:
        OSError: the file of weights cannot be read.
    """
    manifest = bundle.manifest
    spec = manifest.graphs.get("trunk")
    trained = {parameter.name for parameter in manifest.parameters} | {buffer.name for buffer in manifest.buffers}
    told = {
        "inputs": [dataclasses.asdict(one) for one in manifest.inputs],
        "features": [dataclasses.asdict(one) for one in manifest.features],
        "preprocess": dataclasses.asdict(manifest.preprocess),
        "graph": [] if spec is None else [manifest.files[stage.file] for stage in spec.run_stages()],
    }
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    with (bundle.path / WEIGHTS).open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        for name in sorted(set(header) - trained - {"__metadata__"}):
            begin, end = header[name]["data_offsets"]
            digest.update(f"{name} {header[name]['dtype']} {header[name]['shape']}\n".encode())
            stream.seek(8 + size + begin)
            for start in range(begin, end, _PIECE_BYTES):
                digest.update(stream.read(min(_PIECE_BYTES, end - start)))
    return digest.hexdigest()
