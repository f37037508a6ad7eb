"""Every codec on every kind of layer: the weight gradient is the exact rule applied to what the codec decodes.

Only dW may be touched: bias and what lies before the layer get their exact gradients, whatever the codec.
"""

from __future__ import annotations

import numpy as np
import pytest

from edgetune.codecs import CODECS, Codec, codec_named, label_of
from edgetune.testing import inputs_for
from tests.autodiff.layers import BATCH, CASES, Emitted, run, train_model
from tests.autodiff.parity import relative_error

KINDS = (
    "conv1d everything",
    "conv2d several per group",
    "conv3d everything",
    "conv3d depthwise",
    "spread2d everything",
    "linear of 2 axes",
    "linear of 3 axes",
    "linear of 4 axes",
    "linear of windows",
)
SUBJECTS: tuple[Codec, ...] = (
    *(codec for codec in CODECS.values() if codec.name not in ("dense", "recompute")),
    *(codec_named(f"{name}:storage=float16") for name in ("hosvd", "svd", "asi", "dct", "int4")),
    codec_named("hosvd:storage=log8"),
    codec_named("hosvd:cut=c"),
    codec_named("patch:size=3"),
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("codec", SUBJECTS, ids=label_of)
def test_the_weight_gradient_is_that_of_the_decoded_tensor(codec: Codec, kind: str) -> None:
    case = CASES[kind]
    emitted = Emitted.of(case, label_of(codec))
    slot = emitted.slot
    if not codec.applies(slot.saved):
        assert slot.only.codec.name == "dense", "what a codec does not apply to is stored as it is"
        return
    assert slot.only.codec == codec and slot.only.encoded is not None
    ranks = {mode.letter: -(-(BATCH if mode.size is None else mode.size) // 2) for mode, _ in slot.only.inputs}
    inputs = inputs_for(codec, slot.saved, BATCH, 0, ranks)
    x, targets = case.batch()
    feeds = {"x": x, "targets": targets, **case.parameters()}
    feeds |= {name: inputs[mode.letter] for mode, name in slot.only.inputs}
    (call,) = [node for node in emitted.g.nodes if emitted.made.parameters["weight"] in node.output]
    dy, kept = str(call.input[0]), slot.only.encoded
    assert set(call.input) == {dy, *kept.stored, *kept.bases.values()}, "no way leads back to the activation"
    wanted = {**emitted.made.parameters, dy: dy, **{name: name for name in kept.stored}}
    model = train_model(emitted.g, emitted.library, emitted.graph, feeds, list(wanted.values()))
    found = run(model, feeds)
    stored = {tensor.name: found[name] for tensor, name in zip(codec.stored(slot.saved), kept.stored, strict=True)}
    decoded = codec.decode(stored, slot.saved, inputs).reshape(BATCH, *case.shape)
    made = {name: found[tensor] for name, tensor in wanted.items()}
    expected = case.torch_gradients()
    expected["weight"] = case.weight_gradient(np.asarray(decoded, np.float64), made[dy])
    for name, value in expected.items():
        assert relative_error(made[name], value) <= 1e-5, name
    if codec.lossy:
        assert relative_error(decoded, x) > 1e-5, "the codec lost nothing, so nothing was tested"
