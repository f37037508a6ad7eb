"""The target ``ort-training``: a bundle as artifacts that Microsoft's onnxruntime-training 1.19 loads and trains with.

Knows the bundle, the plan and onnx; needs no training build, only the package ``flatbuffers``.
"""

from edgetune.export.ort_training.artifacts import FILES, write_ort_training

__all__ = ["FILES", "write_ort_training"]
