"""Loss, learning rate and intervals against closed forms and plain loops."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from longspan.config import from_dict
from longspan.errors import ConfigError, DataError
from longspan.train import TrainConfig, bootstrap, next_token_loss, paired_bootstrap, token_nats


def test_the_loss_is_the_sum_over_graded_tokens() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 5, 7, dtype=torch.float64), torch.randint(7, (2, 5))
    expected = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(token_nats(logits, targets), expected)
    graded = torch.rand(2, 5) < 0.5
    torch.testing.assert_close(next_token_loss(logits, targets, graded), expected[graded].sum())
    torch.testing.assert_close(next_token_loss(logits, targets), expected.sum())
    assert token_nats(logits.bfloat16(), targets).dtype == torch.float32


def test_ungraded_tokens_have_no_gradient() -> None:
    logits = torch.randn(1, 3, 4, requires_grad=True)
    next_token_loss(logits, torch.tensor([[1, 2, 3]]), torch.tensor([[True, False, True]])).backward()
    assert logits.grad is not None
    assert logits.grad[0, 1].abs().max() == 0
    assert logits.grad[0, 0].abs().max() > 0


def test_the_rate_warms_up_and_then_follows_a_cosine() -> None:
    config = TrainConfig(steps=110, warmup=10, min_lr_ratio=0.1)
    rates = [config.rate(step, 0.0) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_constant_rate_falls_linearly_over_the_rest_of_the_run() -> None:
    config = TrainConfig(steps=100, warmup=10, constant=0.9, min_lr_ratio=0.05)
    rates = [config.rate(step, 0.0) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10:90] == [1.0] * 80
    assert rates[90:96] == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    assert rates[100] == pytest.approx(0.05)
    with pytest.raises(ConfigError, match=r"train\.constant = 1\.5: must be from 0 to 1"):
        TrainConfig(constant=1.5)


def test_the_schedule_follows_time_or_steps_whichever_is_further() -> None:
    config = TrainConfig(steps=100, minutes=1, warmup=0)
    assert config.rate(50, 0.0) == pytest.approx(config.rate(0, 30.0))
    assert config.fraction_done(10, 30.0) == 0.5
    assert config.fraction_done(80, 30.0) == 0.8
    assert not config.is_done(99, 59.0)
    assert config.is_done(100, 0.0)
    assert config.is_done(0, 60.0)


def test_the_default_is_1000_steps_without_a_time_limit() -> None:
    assert TrainConfig().step_limit == 1000
    assert TrainConfig(minutes=5).step_limit is None
    assert TrainConfig(minutes=5, steps=7).step_limit == 7


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lanes": 0}, r"train.lanes = 0: must be at least 1"),
        ({"lr": -1.0}, r"train.lr = -1.0: must be at least 0"),
        ({"lr": math.nan}, r"train.lr = nan"),
        ({"steps": -1}, r"train.steps = -1: must be at least 0"),
        ({"betas": (0.9, 1.0)}, r"train.betas = \[0.9, 1.0\]: must be two numbers"),
        ({"seed": -1}, r"train.seed = -1: must be at least 0"),
    ],
)
def test_invalid_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**fields)


def test_unknown_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="train: unknown field 'step'; did you mean 'steps'"):
        from_dict(TrainConfig, {"step": 3}, "train")


def test_bootstrap_agrees_with_a_plain_loop() -> None:
    generator = np.random.default_rng(1)
    units = generator.integers(100, 1000, 12)
    nats = units * generator.uniform(0.5, 1.5, 12)
    value, low, high = bootstrap(nats, units, samples=20_000)
    assert value == pytest.approx(nats.sum() / units.sum() / math.log(2))
    drawn = [generator.integers(0, 12, 12) for _ in range(20_000)]
    plain = [nats[index].sum() / units[index].sum() / math.log(2) for index in drawn]
    assert (low, high) == pytest.approx(np.quantile(plain, [0.025, 0.975]).tolist(), abs=0.01)
    assert bootstrap(nats, units, samples=20_000) == (value, low, high)


def test_pairing_removes_the_variance_between_documents() -> None:
    generator = np.random.default_rng(2)
    units = np.full(20, 1000)
    hard = 1000 * generator.uniform(0.5, 1.5, 20)
    value, low, high = paired_bootstrap(hard + 10, hard, units)
    assert value == pytest.approx(0.01 / math.log(2))
    assert high - low < 1e-9
    with pytest.raises(DataError, match="cannot compare evaluations of 20 and 19 documents"):
        paired_bootstrap(hard, hard[1:], units)


def test_one_document_has_no_interval() -> None:
    value, low, high = bootstrap(np.array([math.log(2)]), np.array([1]))
    assert value == pytest.approx(1)
    assert math.isnan(low)
    assert math.isnan(high)
