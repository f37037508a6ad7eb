"""The laws of codecs as tests, for the codecs of this project and for those of others (docs/codecs.md).

Needs onnx, and one of the engines' runtimes or both; nobody imports it but tests.
"""

from __future__ import annotations

from edgetune.testing.cases import GEOMETRIES, full_ranks, inputs_for, some_ranks, tensor
from edgetune.testing.coders import ENGINES, ORACLE, Coded, Coder, Emitted, Oracle, coder_for, run_on
from edgetune.testing.conformance import BrokenLawError, Check, check_codec, checks, registered
from edgetune.testing.laws import Tolerance, distance

__all__ = [
    "ENGINES", "GEOMETRIES", "ORACLE", "BrokenLawError", "Check", "Coded", "Coder", "Emitted", "Oracle", "Tolerance",
    "check_codec", "checks", "coder_for", "distance", "full_ranks", "inputs_for", "registered", "run_on", "some_ranks",
    "tensor",
]  # fmt: skip
