"""The zoo: every model runs, is what it says, and leaves nothing at a trivial value."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tools.gradients import first_output
from tools.zoo import PLAIN, ZOO, zoo_model


@pytest.mark.parametrize("name", [model.name for model in PLAIN])
def test_outputs_are_as_declared_and_drawn_by_the_seed_alone(name: str) -> None:
    entry = zoo_model(name)
    inputs = [torch.from_numpy(value) for value in entry.draw(2).values()]
    before = torch.random.get_rng_state()
    model = entry.factory()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        output = first_output(model(*inputs))
        assert torch.equal(output, first_output(entry.factory()(*inputs)))
        assert not torch.equal(output, first_output(entry.factory(1)(*inputs)))
        alone = first_output(model(*(value[:1] for value in inputs)))
    assert output.shape[:2] == (2, entry.classes)
    assert (output.ndim == 2) == (entry.kind == "classification")
    assert torch.allclose(output[:1], alone, atol=1e-5), "samples must not depend on one another"
    assert 0.01 < float(output.std()) < 50


@pytest.mark.parametrize("name", [model.name for model in PLAIN])
def test_no_parameter_or_statistic_is_trivial(name: str) -> None:
    model = zoo_model(name).factory()
    for key, value in model.named_parameters():
        assert bool((value != 0).all()), key
        assert value.numel() == 1 or float(value.detach().std()) > 0, key
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            assert bool((module.running_mean != 0).all())
            assert bool((module.running_var != 1).all())


def test_names_are_unique_and_an_unknown_one_is_refused() -> None:
    assert {model.name for model in PLAIN} <= set(ZOO)
    with pytest.raises(ValueError, match=r"no model is called 'alexnet'; choose one of: .*unet3d"):
        zoo_model("alexnet")
