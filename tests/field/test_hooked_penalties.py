"""Auxiliary losses reach the loss where every module has hooks, as those of accelerate under a device map."""

from typing import Any

import pytest
import torch

from longspan.errors import UnsupportedError

from .models import FIELDS, VOCAB, llama, own, tokens

accelerate = pytest.importorskip("accelerate")
NAMES = ["adaptive_span", "routing", "compressive", "mixed_heads"]


def hooked(model: Any) -> Any:
    """A hook around every module that moves its inputs."""
    for module in model.modules():
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
    return model


def fields_of(name: str) -> dict[str, Any]:
    if name != "mixed_heads":
        return FIELDS[name]
    return {
        "mixers": [
            {"name": "adaptive_span", "num_heads": 1, **FIELDS["adaptive_span"]},
            {"name": "full", "num_heads": 1},
        ]
    }


@pytest.mark.parametrize("kind", ["own", "converted"])
@pytest.mark.parametrize("name", NAMES)
def test_losses_are_those_without_hooks(name: str, kind: str) -> None:
    hf = pytest.importorskip("longspan.hf")

    def make() -> Any:
        torch.manual_seed(0)
        if kind == "own":
            mixer = {"name": name, **fields_of(name)}
            return hf.LongspanForCausalLM.wrap(own("full", mixers=(mixer,)).train())
        model = llama()
        try:
            hf.convert(model, name, **fields_of(name))
        except UnsupportedError as error:
            pytest.skip(str(error))
        return model.train()

    text = tokens(2, 9)
    assert text.max() < VOCAB

    def loss(model: Any) -> torch.Tensor:
        detached: torch.Tensor = model(input_ids=text, labels=text).loss.detach()
        return detached

    assert torch.equal(loss(hooked(make())), loss(make()))
