"""Losses that ONNX has as operators."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from edgetune.engines.torch_ops.base import Call, Kernel


def _nll(n: Call, log_p: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    # Without ignore_index every target counts; no class has this number, so nothing is left out.
    ignored = n.get("ignore_index", torch.iinfo(torch.int32).min)
    extents = log_p.shape[2:]
    if len(extents) == 1:
        log_p = log_p.unsqueeze(-1)
        target = target.unsqueeze(-1)
    loss = functional.nll_loss(
        log_p, target.long(), weight, ignore_index=ignored, reduction=n.get("reduction", "mean")
    )  # fmt: skip
    return loss.reshape([log_p.shape[0], *extents]) if n.get("reduction", "mean") == "none" else loss


def _softmax_cross_entropy(
    n: Call, scores: Tensor, target: Tensor, weight: Tensor | None = None
) -> Tensor | tuple[Tensor, ...]:
    log_p = torch.log_softmax(scores, 1)
    loss = _nll(n, log_p, target, weight)
    return loss if n.outputs == 1 else (loss, log_p)


KERNELS: dict[str, Kernel] = {
    "NegativeLogLikelihoodLoss": _nll,
    "SoftmaxCrossEntropyLoss": _softmax_cross_entropy,
}
