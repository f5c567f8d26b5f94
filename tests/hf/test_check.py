"""The loss before and after a conversion: pieces with a cache give that of one pass."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.hf.conftest import ids, make

from longspan import hf, mixers
from longspan.hf import check
from longspan.hf.advice import LITTLE, MEASURED, MUCH, advice, expectation


@pytest.mark.parametrize(
    ("name", "fields"),
    [(None, {}), ("window", {"window": 5}), ("lsh", {"bucket_size": 4, "num_buckets": 4, "selection": "sorted"})],
)
def test_pieces_give_the_loss_of_one_pass(
    name: str | None, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "CHUNK", 7)
    model, text = make("llama").eval(), ids(1, 40)
    if name:
        hf.convert(model, name, **fields)
    with torch.no_grad():
        logits = model(text).logits[0, :-1]
    expected = F.cross_entropy(logits, text[0, 1:], reduction="none").numpy()
    np.testing.assert_allclose(check.token_nats(model, text), expected, atol=1e-5)


def test_ranges_are_means_and_bits_count_bytes() -> None:
    class Tokenizer:
        def decode(self, tokens: Any, **_: Any) -> str:
            return "ab" * len(tokens)

    before, after = np.ones(1299), np.full(1299, 3.0)
    after[512:1024] = 2
    report = check.compare(Tokenizer(), torch.zeros(1, 1300, dtype=torch.int64), before, after)
    assert [part[:2] for part in report.ranges] == [(0, 512), (512, 1024), (1024, 1299)]
    assert [part.after for part in report.ranges] == [3, 2, 3]
    assert report.before == pytest.approx(1 / np.log(2) / 2)
    assert report.more == pytest.approx((787 * 2 + 512) / 1299)
    assert report.tokens == 1300


def test_advice_follows_what_is_lost() -> None:
    assert len({advice(LITTLE / 2), advice((LITTLE + MUCH) / 2), advice(2 * MUCH)}) == 3
    model = make("llama")
    report = hf.convert(model, "window", window=4)
    assert MEASURED["window"] < LITTLE
    assert advice(MEASURED["window"]) in expectation(report)
    assert set(MEASURED) <= set(mixers.names())
