"""Scaling laws: fits recover the exponents of synthetic runs; optima equal those of a search, costs counted FLOPs."""

import itertools
import math
from typing import Any

import numpy as np
import pytest

import longspan as ls
from longspan.cost import scaling
from longspan.errors import ConfigError

pytest.importorskip("scipy")
SIZES = np.array([1e5, 3e5, 1e6, 3e6, 1e7, 3e7])
GRID = {"N": np.repeat(SIZES, 5), "D": np.tile(np.array([1e6, 1e7, 1e8, 1e9, 1e10]), len(SIZES))}
LAWS: dict[str, dict[str, float]] = {
    "power": {"x_c": 8.8e13, "a": 0.076},
    "floored": {"x_c": 1e6, "a": 0.4, "floor": 1.7},
    "kaplan": {"N_c": 6.4e13, "a_N": 0.076, "D_c": 1.8e13, "a_D": 0.103},
    "chinchilla": {"E": 1.69, "A": 406.4, "a": 0.34, "B": 410.7, "b": 0.28},
}


def runs(form: str, noise: float = 0.0) -> dict[str, Any]:
    law = scaling.Fit(form, LAWS[form], {}, 0.0, 0)
    at = {"x": np.logspace(4, 9, 20)} if form in ("power", "floored") else GRID
    loss = law.predict(**at)
    return {**at, "loss": loss * np.exp(noise * np.random.default_rng(0).standard_normal(loss.shape))}


@pytest.mark.parametrize("form", list(LAWS))
def test_a_fit_recovers_the_exponents(form: Any) -> None:
    fit = scaling.fit(form, runs(form), draws=0)
    for name, value in LAWS[form].items():
        if name in ("a", "b", "a_N", "a_D", "E", "floor"):
            assert fit.parameters[name] == pytest.approx(value, rel=0.01), name
    assert fit.residual < 1e-5
    assert fit.intervals == {}


@pytest.mark.parametrize("form", ["power", "chinchilla"])
def test_intervals_hold_the_truth(form: Any) -> None:
    fit = scaling.fit(form, runs(form, noise=0.01), draws=60)
    for name in ("a", "b"):
        if name in LAWS[form]:
            low, high = fit.intervals[name]
            assert low < LAWS[form][name] < high
            assert high - low < LAWS[form][name]
    assert 0.003 < fit.residual < 0.02


@pytest.mark.parametrize("form", ["kaplan", "chinchilla"])
@pytest.mark.parametrize("same", ["N", "D"])
def test_runs_of_one_size_fix_no_joint_law(form: Any, same: str) -> None:
    varied = "D" if same == "N" else "N"
    table = {same: [1e6] * 6, varied: [1e6, 3e6, 1e7, 3e7, 1e8, 3e8], "loss": [3, 2.7, 2.5, 2.35, 2.25, 2.2]}
    with pytest.raises(
        ConfigError, match=f"runs with 1 distinct values of {same} cannot determine '{form}'; use at least 3"
    ):
        scaling.fit(form, table, draws=0)
    with pytest.raises(ConfigError, match="runs with 1 distinct values of x cannot determine 'power'; use at least 2"):
        scaling.fit("power", {"x": table[same], "loss": table["loss"]}, draws=0)


@pytest.mark.long
def test_parameters_that_the_runs_do_not_determine_are_named() -> None:
    # tokens in proportion to parameters: the two terms stand for each other
    tokens = np.array([1e6, 3e6, 1e7, 3e7, 1e8, 3e8, 1e9])
    table: dict[str, Any] = {"N": tokens / 20, "D": tokens}
    loss = scaling.Fit("chinchilla", LAWS["chinchilla"], {}, 0.0, 0).predict(**table)
    fit = scaling.fit("chinchilla", {**table, "loss": loss}, draws=5)
    assert {"A", "B"} <= set(fit.undetermined)
    assert fit.intervals == {}
    with pytest.raises(ConfigError, match=r"A, .*B.* of 'chinchilla': not determined by these runs"):
        scaling.optimal(fit, 1e20)
    # sizes that hardly differ determine their exponent no better than one
    near = {"N": [1e6, 1.001e6, 1.002e6] * 4, "D": [1e6] * 3 + [1e7] * 3 + [1e8] * 3 + [1e9] * 3}
    near["loss"] = scaling.Fit("chinchilla", LAWS["chinchilla"], {}, 0.0, 0).predict(**near).tolist()
    assert {"A", "a"} <= set(scaling.fit("chinchilla", near, draws=0).undetermined)
    forms: list[Any] = list(LAWS)
    for form in forms:
        assert scaling.fit(form, runs(form, noise=0.01), draws=0).undetermined == ()


def test_draws_look_for_their_least_from_every_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy import optimize  # type: ignore[import-untyped]

    search, limits = optimize.least_squares, []

    def counted(*args: Any, **options: Any) -> Any:
        limits.append(options["max_nfev"])
        return search(*args, **options)

    monkeypatch.setattr(optimize, "least_squares", counted)
    scaling.fit("chinchilla", runs("chinchilla", noise=0.01), draws=3)
    # the limits tell apart the fit of all runs, the search of a draw from every start, and its end from the best
    assert [len(list(searches)) for _, searches in itertools.groupby(limits)] == [6, 7, 1, 7, 1, 7, 1]


def test_one_failed_run_does_not_bend_the_law() -> None:
    table = runs("power")
    table["loss"][7] *= 3
    assert scaling.fit("power", table, draws=0).parameters["a"] == pytest.approx(0.076, rel=0.15)


@pytest.mark.parametrize("form", ["kaplan", "chinchilla"])
@pytest.mark.parametrize("flops", [1e15, 1e21])
def test_the_optimum_is_that_of_a_search(form: str, flops: float) -> None:
    law = scaling.Fit(form, LAWS[form], {}, 0.0, 0)
    optimum = scaling.optimal(law, flops)
    assert 6 * optimum.parameters * optimum.tokens == pytest.approx(flops)
    sizes = np.logspace(2, 14, 200_001)
    losses = law.predict(N=sizes, D=flops / 6 / sizes)
    assert optimum.loss == pytest.approx(float(losses.min()), rel=1e-9)
    assert optimum.parameters == pytest.approx(float(sizes[losses.argmin()]), rel=1e-3)


def test_limits_of_the_joint_law_are_the_single_ones() -> None:
    law, one = LAWS["kaplan"], scaling.Fit("kaplan", LAWS["kaplan"], {}, 0.0, 0)
    by_n = scaling.Fit("power", {"x_c": law["N_c"], "a": law["a_N"]}, {}, 0.0, 0)
    by_d = scaling.Fit("power", {"x_c": law["D_c"], "a": law["a_D"]}, {}, 0.0, 0)
    assert one.predict(N=1e8, D=1e40) == pytest.approx(by_n.predict(x=1e8), rel=1e-6)
    assert one.predict(N=1e60, D=1e9) == pytest.approx(by_d.predict(x=1e9), rel=1e-3)
    values = one.predict(N=SIZES, D=1e9)
    assert (np.diff(values) < 0).all()


def test_costs_count_attention_over_the_context() -> None:
    assert scaling.training_flops(1e6, 1e9) == 6e15
    # Kaplan et al. 2020, table 1, three times forward: 2 n_layer n_ctx d_attn per token, which sees half of n_ctx
    n_ctx = 1024
    flops = scaling.training_flops(1e6, 1e9, num_layers=12, attn_dim=768, attended=n_ctx / 2)
    assert flops == pytest.approx((6e6 + 3 * 2 * 12 * n_ctx * 768) * 1e9)
    common: dict[str, Any] = {"vocab_size": 50, "dim": 32, "num_layers": 2, "num_heads": 4}
    dense: Any = ls.Decoder(ls.DecoderConfig(**common, mixers=({"name": "full"},)))
    near = ls.Decoder(ls.DecoderConfig(**common, mixers=({"name": "window", "window": 16},)))
    own = dense.num_parameters() - dense.embedding.weight.numel()
    assert scaling.non_embedding(dense) == own
    expected = scaling.training_flops(own, 1e6, num_layers=2, attn_dim=32, attended=(1024 + 1) / 2)
    assert scaling.model_training_flops(dense, 1e6, length=1024) == pytest.approx(expected)
    assert scaling.model_training_flops(near, 1e6, length=1024) < expected / 3
    # three times what a forward really computes, except for norms, the softmax and masked halves of tiles
    counted = 3 * (dense.flops(64) - 2 * 64 * 32 * 50) / 64
    assert scaling.model_training_flops(dense, 1, length=64) == pytest.approx(counted, rel=0.25)


def test_n_counts_no_embedding_and_no_output() -> None:
    common: dict[str, Any] = {
        "vocab_size": 50,
        "dim": 32,
        "num_layers": 1,
        "num_heads": 4,
        "mixers": [{"name": "full"}],
    }
    tied, untied = (ls.Decoder(ls.DecoderConfig(**common, tie_embeddings=tie)) for tie in (True, False))
    assert untied.num_parameters() > tied.num_parameters()
    learned: dict[str, Any] = {"output_bias": True, "positions": "learned", "max_positions": 100}
    biased = ls.Decoder(ls.DecoderConfig(**common, **learned))
    assert scaling.non_embedding(tied) == scaling.non_embedding(untied) == scaling.non_embedding(biased)


def test_batches_have_their_limits() -> None:
    assert scaling.critical_batch(3.0) == pytest.approx(2e8 / 3 ** (1 / 0.21))
    at = scaling.critical_batch(3.0)
    assert scaling.least_steps(100, at, 3.0) == pytest.approx(50)
    assert scaling.least_compute(1e9, at, 3.0) == pytest.approx(5e8)
    assert scaling.least_steps(100, 1e30, 3.0) == pytest.approx(100)
    assert scaling.least_compute(1e9, 1e-9, 3.0) == pytest.approx(1e9)


@pytest.mark.parametrize(
    ("form", "table", "message"),
    [
        ("cubic", {}, "unknown form 'cubic'"),
        ("power", {"x": [1.0, 2.0]}, "column 'loss' is missing"),
        ("power", {"x": [1.0, -2.0], "loss": [1.0, 1.0]}, "positive"),
        ("power", {"x": [1.0], "loss": [1.0, 1.0]}, "equal length"),
        ("chinchilla", {"N": [1.0, 2.0], "D": [1.0, 2.0], "loss": [1.0, 1.0]}, "cannot determine 5"),
    ],
)
def test_unusable_runs_are_refused(form: Any, table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scaling.fit(form, table)


def test_a_law_of_one_variable_has_no_optimum() -> None:
    law = scaling.Fit("power", LAWS["power"], {}, 0.0, 0)
    with pytest.raises(ConfigError, match="kaplan or chinchilla"):
        scaling.optimal(law, 1e20)
    with pytest.raises(ConfigError, match="positive"):
        scaling.optimal(law, 0)
    assert math.isclose(float(law.predict(x=8.8e13)), 1.0)
