"""Statistics and the recommendation, on numbers whose answers are known."""

import math

import numpy as np
import pytest
from tests.comparison.records import record

from longspan.comparison import Compared
from longspan.comparison.advice import advise, choose
from longspan.errors import DataError

BITS = np.linspace(1.0, 2.0, 20)


def test_the_lowest_loss_comes_first_and_differences_are_paired() -> None:
    compared = Compared({"b": [record(BITS + 0.1)], "a": [record(BITS)]})
    assert compared.names == ["a", "b"]
    gap = compared.difference("b", "a")
    # the same difference in every document has no uncertainty, however much documents differ
    assert gap == pytest.approx((0.1, 0.1, 0.1))
    assert compared.bits("a").high - compared.bits("a").low > 0.1
    assert compared.as_good == ["a"]


def test_losses_are_means_over_seeds() -> None:
    compared = Compared({"a": [record(BITS), record(BITS + 0.2)]})
    assert compared.bits("a").value == pytest.approx(1.6)
    assert compared.by_seed("a") == pytest.approx([1.5, 1.7])


def test_a_constant_state_wins_among_the_good_ones_and_then_speed() -> None:
    growing = {"bounded": False, "state": {"2048": 1, "65536": 2, "1048576": 3}, "bytes_per_second": 9000.0}
    compared = Compared(
        {
            "full": [record(BITS, **growing)],
            "slow": [record(BITS + 0.01)],
            "fast": [record(BITS + 0.015, bytes_per_second=2000.0)],
            "bad": [record(BITS + 0.5, bytes_per_second=8000.0)],
        }
    )
    assert set(compared.as_good) == {"full", "slow", "fast"}
    assert choose(compared) == "fast"
    first = advise(compared).reasons[0]
    assert first.startswith("Take fast")
    assert "that of full grows" in first
    assert "+0.015" in first
    # a model whose interval reaches beyond the limit is not as good
    wide = Compared({"full": [record(BITS)], "slow": [record(BITS + 0.01 + 0.2 * np.resize([1, -1], 20))]})
    assert wide.as_good == ["full"]


def test_different_texts_are_refused() -> None:
    with pytest.raises(DataError, match="a and b have different held-out texts; give a common one with --data"):
        Compared({"a": [record(BITS)], "b": [record(BITS, text="other")]})
    with pytest.raises(DataError, match="different held-out texts"):
        Compared({"a": [record(BITS)], "b": [record(BITS[:-1])]})


def test_a_curve_that_falls_is_named() -> None:
    falling = record(BITS)
    falling["training"]["curve"] = [[step, 0, 0.0, 3 - step / 80] for step in range(10, 81, 10)]
    compared = Compared({"a": [falling], "b": [record(BITS + 1)]})
    assert compared.fall("a") == pytest.approx(0.25)
    assert (compared.trend("a"), compared.trend("b")) == ("still falling", "flat")
    assert any("loss of a still fell" in line for line in advise(compared).limits)
    falling["training"]["curve"] = falling["training"]["curve"][:3]
    assert compared.trend("a") == ""


def with_distances(near: float, middle: float, far: float) -> dict[str, object]:
    """Losses in nats of bytes that occurred 1, 256 and 1,024 bytes before; only the last two have enough together."""
    counts = [1000, 800, 300]
    nats = [count * loss for count, loss in zip(counts, (near, middle, far), strict=True)]
    return {"distances": {"edges": [1, 256, 1024], "nats": [nats, nats], "units": [counts, counts]}}


def test_far_context_is_all_beyond_the_farthest_distance_with_enough_bytes() -> None:
    compared = Compared(
        {
            "near": [record(BITS[:2], **with_distances(1.0, 1.0, 1.0))],
            "far": [record(BITS[:2] + 0.3, **with_distances(2.0, 0.5, 0.5))],
            # better in the middle, worse over all that is farther
            "middle": [record(BITS[:2] + 0.3, **with_distances(1.0, 0.9, 2.0))],
        }
    )
    for name, nats in (("far", -0.5), ("middle", (-80 + 300) / 1100)):
        measured = compared.far_difference(name, "near")
        assert measured is not None
        distance, gap = measured
        assert distance == 256
        assert gap.value == pytest.approx(nats / math.log(2))
    lines = [line for line in advise(compared).reasons if "far context" in line]
    assert ["take far" in line and "256 or more" in line for line in lines] == [True]


def test_what_is_not_settled_is_named() -> None:
    noise = 0.2 * np.resize([1, -1], 20)
    compared = Compared({"a": [record(BITS)], "b": [record(BITS + 0.03 + noise)], "c": [record(BITS + 0.5)]})
    assert compared.unsettled == ["b"]
    assert any(line.startswith("May be as good as a") and "b +0.030" in line for line in advise(compared).limits)


def test_a_rising_curve_a_cut_run_and_an_unlearned_text_are_named() -> None:
    rising, cut = record(BITS + 4), record(BITS + 4.1)
    rising["training"]["curve"] = [[step, 0, 0.0, 2 + step / 80] for step in range(10, 81, 10)]
    cut["training"] |= {"steps": 40, "tokens": 4000}
    compared = Compared({"a": [rising], "b": [cut]})
    assert compared.trend("a") == "rising"
    limits = " ".join(advise(compared).limits)
    assert "loss of a rose" in limits
    assert "ended b before" in limits
    assert "a read 2.0 times as much as b" in limits
    assert "No model has learned the text" in limits


def test_failures_and_recipes_that_were_not_tried_are_limits() -> None:
    compared = Compared({"a": [record(BITS)], "b": [record(BITS)]}, {"c-0": "out of memory"})
    limits = " ".join(advise(compared, ["lsh"]).limits)
    assert "c-0" in limits
    assert "Not tried: lsh" in limits
    assert "trained once" in limits
