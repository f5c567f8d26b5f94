"""Scaling laws: the cost of training, power laws fitted to your own runs, and the best use of a compute budget.

Training costs C = 6 N D (Kaplan et al. 2020, section 2.1) for N parameters without embeddings and D tokens, plus a
context term that the paper drops for wide models: in each layer every query meets `attended` keys, at 4 FLOPs per
channel in the forward pass and three times that in training. For dense causal attention over n tokens `attended` is
about n / 2 and the term is the paper's 2 n_layer n_ctx d_attn per token; the mechanisms of this library report their
own number.

Forms of the loss, in nats:

    power      L(x) = (x_c / x)^a, with or without a floor        Kaplan et al. 2020, equations 1.1 to 1.3
    kaplan     L(N, D) = ((N_c / N)^(a_N / a_D) + D_c / D)^a_D     Kaplan et al. 2020, equation 1.5
    chinchilla L(N, D) = E + A / N^a + B / D^b                     Hoffmann et al. 2022, equation 2
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from longspan.errors import ConfigError, UnsupportedError

Array = NDArray[np.float64]
# a direction in parameter space is undetermined if it changes the losses by less than this share of the strongest one
_SINGULAR = 1e-4
# a parameter is undetermined if it changes the losses by less than this share of the most effective one
_SILENT = 1e-6
# largest logarithm of a parameter that does not overflow
_LARGEST = 700.0
PF_DAY = 8.64e19
"""FLOPs of a petaflop/s-day"""
KAPLAN_CRITICAL = (2e8, 0.21)
"""tokens and exponent of the critical batch, Kaplan et al. 2020, section 5.1"""


def training_flops(
    parameters: float, tokens: float, *, num_layers: int = 0, attn_dim: int = 0, attended: float = 0.0
) -> float:
    """Return the FLOPs of training: 6 N D plus the context term.

    Args:
        parameters: N, without embeddings.
        tokens: D.
        num_layers: layers of the model.
        attn_dim: heads times their width.
        attended: number of keys that a query meets in one layer, on average.
    """
    return (6.0 * parameters + 12.0 * num_layers * attn_dim * attended) * tokens


def model_training_flops(model: Any, tokens: float, *, length: int) -> float:
    """Return the training FLOPs of a Decoder or Encoder on texts of `length` tokens: 6 N D plus the context term.

    The mechanisms of the model report how many keys a query meets.

    Args:
        model: a Decoder or Encoder.
        tokens: D, the number of training tokens.
        length: tokens per text.
    """
    pairs = model.pairs(length) / length
    shape = model.config
    head_dim = shape.head_dim or shape.dim // shape.num_heads
    return float((6.0 * non_embedding(model) + 12.0 * head_dim * pairs) * tokens)


def non_embedding(model: Any) -> int:
    """Return the number of parameters without embeddings, position tables and the output layer."""
    names = ("embedding.", "head.", "output.", "output_bias", "position_embedding.")
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(names))


@dataclass(frozen=True)
class Fit:
    """A fitted scaling law.

    Attributes:
        form: its name.
        parameters: by name, as in the formulas of the module.
        intervals: 95 % confidence intervals by name, from bootstrap samples of the runs; empty if there are too few
            runs, or if a parameter is undetermined.
        residual: root mean square of log(predicted loss / loss).
        runs: number of runs fitted.
        undetermined: parameters that these runs do not determine, because others can compensate for them.
    """

    form: str
    parameters: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    residual: float
    runs: int
    undetermined: tuple[str, ...] = ()

    def predict(self, **at: Any) -> Any:
        """Return the predicted loss at `x`, or at `N` and `D`; numbers or arrays."""
        form = _FORMS[self.form]
        with np.errstate(over="ignore"):
            values = [self.parameters[name] for name in form.names]
            return form.loss(values, *(np.asarray(at[key]) for key in form.inputs))


@dataclass(frozen=True)
class _Form:
    """A form of scaling law: parameter names, input columns, the loss function and start values for the fit."""

    names: tuple[str, ...]
    inputs: tuple[str, ...]
    loss: Callable[..., Any]
    starts: Callable[..., list[list[float]]]
    values: int
    """smallest number of distinct values of each input that can determine the parameters"""


def _power(p: Sequence[float], x: Array) -> Any:
    """Return the loss (x_c / x)^a for p = (x_c, a)."""
    scale, exponent = p
    return (scale / x) ** exponent


def _floored(p: Sequence[float], x: Array) -> Any:
    """Return the loss floor + (x_c / x)^a for p = (x_c, a, floor)."""
    return p[2] + _power(p[:2], x)


def _kaplan(p: Sequence[float], n: Array, d: Array) -> Any:
    """Return the loss of Kaplan's form for p = (N_c, a_N, D_c, a_D), parameters n and tokens d."""
    n_c, a_n, d_c, a_d = p
    return ((n_c / n) ** (a_n / a_d) + d_c / d) ** a_d


def _chinchilla(p: Sequence[float], n: Array, d: Array) -> Any:
    """Return the loss of Chinchilla's form for p = (E, A, a, B, b), parameters n and tokens d."""
    e, a, alpha, b, beta = p
    return e + a / n**alpha + b / d**beta


def _power_starts(x: Array, loss: Array) -> list[list[float]]:
    """Return start values of a power law: the line through the logarithms, which is the best fit without a floor."""
    slope, height = np.polyfit(np.log(x), np.log(loss), 1)
    exponent = max(-slope, 1e-3)
    return [[math.exp(min(height / exponent, 600.0)), exponent]]


def _floored_starts(x: Array, loss: Array) -> list[list[float]]:
    """Return start values of a power law with a floor, one set for each of three guesses of the floor."""
    floors = [share * float(loss.min()) for share in (0.1, 0.5, 0.9)]
    return [[*_power_starts(x, loss - floor)[0], floor] for floor in floors]


def _kaplan_starts(n: Array, d: Array, loss: Array) -> list[list[float]]:
    """Return start values of Kaplan's form: from single power laws, from the paper, and generic ones."""
    return [
        [*_power_starts(n, loss)[0], *_power_starts(d, loss)[0]],
        [8.8e13, 0.076, 5.4e13, 0.095],
        [1e8, 0.2, 1e9, 0.2],
    ]


def _chinchilla_starts(n: Array, d: Array, loss: Array) -> list[list[float]]:
    """Return start values of Chinchilla's form, for several guesses of the floor and the exponents."""
    centers = [float(np.exp(np.log(sizes).mean())) for sizes in (n, d)]
    starts = []
    for share, exponent in itertools.product((0.2, 0.8), (0.1, 0.3, 0.6)):
        rest = float((loss - share * loss.min()).mean())
        of_n, of_d = (rest / 2 * center**exponent for center in centers)
        starts.append([share * float(loss.min()), of_n, exponent, of_d, exponent])
    return starts


_FORMS: dict[str, _Form] = {
    "power": _Form(("x_c", "a"), ("x",), _power, _power_starts, 2),
    "floored": _Form(("x_c", "a", "floor"), ("x",), _floored, _floored_starts, 3),
    "kaplan": _Form(("N_c", "a_N", "D_c", "a_D"), ("N", "D"), _kaplan, _kaplan_starts, 3),
    "chinchilla": _Form(("E", "A", "a", "B", "b"), ("N", "D"), _chinchilla, _chinchilla_starts, 3),
}


def fit(
    form: Literal["power", "floored", "kaplan", "chinchilla"],
    runs: Mapping[str, Sequence[float]],
    *,
    draws: int = 200,
    seed: int = 0,
) -> Fit:
    """Fit a law to runs: least squares of log(predicted loss / loss), robust against single runs that failed.

    Args:
        form: see the module; "floored" is a power law above a constant.
        runs: columns `loss` (nats) and `x`, or `N` and `D`.
        draws: bootstrap samples of the runs for the intervals; 0 = no intervals.
        seed: of the bootstrap samples.

    Raises:
        ConfigError: columns that are missing, of unequal length or not positive; fewer runs than parameters, or too few
            distinct values of x, of N or of D to determine them.
        UnsupportedError: scipy is missing.
    """
    if form not in _FORMS:
        raise ConfigError(f"unknown form {form!r} of scaling law; known: {', '.join(_FORMS)}")
    shape = _FORMS[form]
    columns = _columns(runs, (*shape.inputs, "loss"))
    count = len(columns[0])
    if count < len(shape.names):
        raise ConfigError(f"{count} runs cannot determine {len(shape.names)} parameters of {form!r}; add more runs")
    for name, column in zip(shape.inputs, columns, strict=False):
        if (different := len(np.unique(column))) < shape.values:
            raise ConfigError(
                f"runs with {different} distinct values of {name} cannot determine {form!r}; "
                f"use at least {shape.values}"
            )
    best, residual = _solve(shape, columns, shape.starts(*columns))
    undetermined = _undetermined(shape, columns, best)
    # undetermined parameters vary arbitrarily between bootstrap samples, and other parameters with them
    samples = _bootstrap(shape, columns, best, draws if count > len(shape.names) and not undetermined else 0, seed)
    intervals: dict[str, tuple[float, float]] = {}
    if samples:
        low, high = np.quantile(samples, (0.025, 0.975), axis=0).tolist()
        intervals = dict(zip(shape.names, zip(low, high, strict=True), strict=True))
    return Fit(form, dict(zip(shape.names, best, strict=True)), intervals, residual, count, undetermined)


def _bootstrap(shape: _Form, columns: list[Array], best: list[float], draws: int, seed: int) -> list[list[float]]:
    """Return the parameters fitted to each bootstrap sample of the runs.

    Samples that cannot determine the parameters are skipped. Every fit begins from `best` and from all start values of
    the form, as the best fit of a sample may be far from `best`.

    Args:
        shape: form of the law.
        columns: inputs and loss of the runs.
        best: parameters fitted to all runs.
        draws: number of samples.
        seed: of the samples.
    """
    generator, samples = np.random.default_rng(seed), []
    count = len(columns[0])
    for _ in range(draws):
        chosen = generator.integers(0, count, count)
        sampled = [column[chosen] for column in columns]
        determined = all(len(np.unique(column)) >= shape.values for column in sampled[:-1])
        if determined and len(set(chosen.tolist())) >= len(shape.names):
            # a few evaluations from every start, then the best of them to convergence
            near, _ = _solve(shape, sampled, [best, *shape.starts(*sampled)], tolerance=1e-6, evaluations=25)
            samples.append(_solve(shape, sampled, [near], tolerance=1e-10, evaluations=200)[0])
    return samples


def _undetermined(shape: _Form, columns: list[Array], best: list[float]) -> tuple[str, ...]:
    """Return the names of parameters that can change, together with others, without changing the losses of the runs."""
    *inputs, _ = columns
    at, step = np.log(np.maximum(best, 1e-300)), 1e-5

    def losses(values: Array) -> Array:
        """Return the logarithms of the predicted losses of all runs for logarithms of the parameters."""
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            return np.asarray(np.log(shape.loss(np.exp(values), *inputs)))

    slopes = [(losses(at + offset) - losses(at - offset)) / (2 * step) for offset in step * np.eye(len(best))]
    jacobian = np.nan_to_num(np.stack(slopes, axis=1), posinf=0.0, neginf=0.0)
    sizes = np.linalg.norm(jacobian, axis=0)
    silent = sizes <= _SILENT * sizes.max()
    if silent.all():
        return shape.names
    _, strengths, directions = np.linalg.svd(jacobian[:, ~silent] / sizes[~silent], full_matrices=False)
    undetermined = silent.copy()
    weak = directions[strengths < _SINGULAR * strengths[0]]
    undetermined[~silent] = (np.abs(weak) > 0.1).any(axis=0)
    return tuple(name for name, is_free in zip(shape.names, undetermined.tolist(), strict=True) if is_free)


def _columns(runs: Mapping[str, Sequence[float]], names: Sequence[str]) -> list[Array]:
    """Return the named columns of the runs as arrays, checked: present, of equal length, positive."""
    missing = [name for name in names if name not in runs]
    if missing:
        raise ConfigError(f"runs: column {missing[0]!r} is missing; expected {', '.join(names)}")
    columns = [np.asarray(runs[name], dtype=np.float64) for name in names]
    if len({len(column) for column in columns}) != 1 or any(not (column > 0).all() for column in columns):
        raise ConfigError(f"runs: columns {', '.join(names)} must be positive and of equal length")
    return columns


def _solve(
    form: _Form, columns: list[Array], starts: list[list[float]], tolerance: float = 1e-14, evaluations: int = 2000
) -> tuple[list[float], float]:
    """Fit a law from several starts; return the parameters of the best fit and their root mean square residual."""
    try:
        from scipy.optimize import least_squares  # type: ignore[import-untyped]
    except ImportError:
        raise UnsupportedError("fits of scaling laws need scipy; pip install 'longspan[scaling]'") from None
    *inputs, loss = columns
    target = np.log(loss)

    def error(values: Array) -> Array:
        """Return log(predicted loss / loss) of every run for logarithms of the parameters."""
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            difference = np.log(form.loss(np.exp(np.clip(values, -_LARGEST, _LARGEST)), *inputs)) - target
        return np.asarray(np.nan_to_num(difference, nan=1e3, posinf=1e3, neginf=-1e3))

    options = {"loss": "soft_l1", "f_scale": 0.1, "x_scale": "jac", "max_nfev": evaluations}
    options |= dict.fromkeys(("xtol", "ftol", "gtol"), tolerance)
    solutions = [least_squares(error, np.log(np.maximum(start, 1e-300)), **options) for start in starts]
    best = min(solutions, key=lambda solution: solution.cost)
    # if all runs are nearly alike, the scale may overflow; it then has no influence
    values = [float(value) for value in np.exp(np.clip(best.x, -_LARGEST, _LARGEST))]
    return values, float(np.sqrt(np.mean(error(best.x) ** 2)))


@dataclass(frozen=True)
class Allocation:
    """The best use of a compute budget.

    Attributes:
        parameters: N, without embeddings.
        tokens: D.
        loss: predicted loss.
    """

    parameters: float
    tokens: float
    loss: float


def optimal(law: Fit, flops: float) -> Allocation:
    """Return the N and D of least loss with 6 N D = `flops`, in closed form; the context term is ignored.

    For Chinchilla's form see Hoffmann et al. 2022, equation 4; for Kaplan's it follows from the derivative of equation
    1.5.

    Raises:
        ConfigError: a law of only one of N and D, a law whose scales or exponents the runs do not determine, or flops
            <= 0.
    """
    # the irreducible loss E does not move the optimum
    if undetermined := [name for name in law.undetermined if name != "E"]:
        raise ConfigError(
            f"{', '.join(undetermined)} of {law.form!r}: not determined by these runs; vary N and D independently"
        )
    if flops <= 0:
        raise ConfigError(f"flops = {flops}: must be positive")
    p, budget = law.parameters, flops / 6
    if law.form == "chinchilla":
        ratio = (p["a"] * p["A"] / (p["b"] * p["B"])) ** (1 / (p["a"] + p["b"]))
        n = ratio * budget ** (p["b"] / (p["a"] + p["b"]))
    elif law.form == "kaplan":
        power = p["a_N"] / p["a_D"]
        n = (power * p["N_c"] ** power * budget / p["D_c"]) ** (1 / (power + 1))
    else:
        raise ConfigError(f"a law of form {law.form!r} does not depend on both N and D; fit kaplan or chinchilla")
    d = budget / n
    return Allocation(n, d, float(law.predict(N=n, D=d)))


def critical_batch(loss: float, *, law: tuple[float, float] = KAPLAN_CRITICAL) -> float:
    """Return the critical batch size in tokens, B* / L^(1 / a_B), which balances time against compute."""
    return float(law[0] / loss ** (1 / law[1]))


def least_steps(steps: float, batch: float, loss: float) -> float:
    """Return the steps needed at a batch far above the critical one: S / (1 + B_crit / B)."""
    return steps / (1 + critical_batch(loss) / batch)


def least_compute(flops: float, batch: float, loss: float) -> float:
    """Return the FLOPs needed at a batch far below the critical one: C / (1 + B / B_crit)."""
    return flops / (1 + batch / critical_batch(loss))
