"""Scaling laws: what training costs, power laws fitted to runs of one's own, and how to spend a budget.

Training costs C = 6 N D (Kaplan et al. 2020, section 2.1) for N parameters without embeddings and D tokens, plus the
term of the context that the paper drops where the model is wide: in each layer every query meets `attended` keys, 4
FLOPs a channel forward and three times that in training. For dense causal attention over n tokens `attended` is about
n / 2 and the term is the paper's 2 n_layer n_ctx d_attn a token; for the mechanisms of this library it is their own
number.

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
# a direction of the parameters that changes the losses so much less than the others is not determined by the runs
_SINGULAR = 1e-4
# nor is a parameter that changes them so much less than another
_SILENT = 1e-6
# logarithm of a parameter; beyond it there are no more numbers
_LARGEST = 700.0
PF_DAY = 8.64e19
"""FLOPs of a petaflop/s-day"""
KAPLAN_CRITICAL = (2e8, 0.21)
"""tokens and exponent of the critical batch, Kaplan et al. 2020, section 5.1"""


def training_flops(
    parameters: float, tokens: float, *, num_layers: int = 0, attn_dim: int = 0, attended: float = 0.0
) -> float:
    """FLOPs of training: 6 N D and the term of the context.

    Args:
        parameters: N, without embeddings.
        tokens: D.
        num_layers, attn_dim: of the model: layers, and heads times their width.
        attended: keys that a query meets in one layer, on average.
    """
    return (6.0 * parameters + 12.0 * num_layers * attn_dim * attended) * tokens


def model_training_flops(model: Any, tokens: float, *, length: int) -> float:
    """The same for a Decoder or Encoder, whose mechanisms say how many keys a query meets in texts of `length`."""
    pairs = model.pairs(length) / length
    shape = model.config
    head_dim = shape.head_dim or shape.dim // shape.num_heads
    return float((6.0 * non_embedding(model) + 12.0 * head_dim * pairs) * tokens)


def non_embedding(model: Any) -> int:
    """Parameters without the tables of embeddings and positions and the output layer (which may be the first)."""
    names = ("embedding.", "head.", "output.", "output_bias", "position_embedding.")
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(names))


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes:
        form: its name.
        parameters: by name, as in the formulas of the module.
        intervals: 95 %, by name, from drawing the runs anew; empty where there are too few, or a parameter is not
            determined.
        residual: root mean square of log(predicted loss / loss).
        runs: how many were fitted.
        undetermined: parameters that these runs do not determine, as others make up for them.
    """

    form: str
    parameters: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    residual: float
    runs: int
    undetermined: tuple[str, ...] = ()

    def predict(self, **at: Any) -> Any:
        """The loss at `x`, or at `N` and `D`; numbers or arrays."""
        form = _FORMS[self.form]
        with np.errstate(over="ignore"):
            values = [self.parameters[name] for name in form.names]
            return form.loss(values, *(np.asarray(at[key]) for key in form.inputs))


@dataclass(frozen=True)
class _Form:
    names: tuple[str, ...]
    inputs: tuple[str, ...]
    loss: Callable[..., Any]
    starts: Callable[..., list[list[float]]]
    values: int
    """different values of each input at least; with fewer, no number of runs determines the parameters"""


def _power(p: Sequence[float], x: Array) -> Any:
    scale, exponent = p
    return (scale / x) ** exponent


def _floored(p: Sequence[float], x: Array) -> Any:
    return p[2] + _power(p[:2], x)


def _kaplan(p: Sequence[float], n: Array, d: Array) -> Any:
    n_c, a_n, d_c, a_d = p
    return ((n_c / n) ** (a_n / a_d) + d_c / d) ** a_d


def _chinchilla(p: Sequence[float], n: Array, d: Array) -> Any:
    e, a, alpha, b, beta = p
    return e + a / n**alpha + b / d**beta


def _power_starts(x: Array, loss: Array) -> list[list[float]]:
    """From the straight line through the logarithms, which is the solution where there is no floor."""
    slope, height = np.polyfit(np.log(x), np.log(loss), 1)
    exponent = max(-slope, 1e-3)
    return [[math.exp(min(height / exponent, 600.0)), exponent]]


def _floored_starts(x: Array, loss: Array) -> list[list[float]]:
    floors = [share * float(loss.min()) for share in (0.1, 0.5, 0.9)]
    return [[*_power_starts(x, loss - floor)[0], floor] for floor in floors]


def _kaplan_starts(n: Array, d: Array, loss: Array) -> list[list[float]]:
    return [
        [*_power_starts(n, loss)[0], *_power_starts(d, loss)[0]],
        [8.8e13, 0.076, 5.4e13, 0.095],
        [1e8, 0.2, 1e9, 0.2],
    ]


def _chinchilla_starts(n: Array, d: Array, loss: Array) -> list[list[float]]:
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
        draws: bootstrap draws of the runs for the intervals; 0: none.
        seed: of the draws.

    Raises:
        ConfigError: columns that are missing, unequal or not positive; fewer runs than parameters, or too few different
            values of x, of N or of D for any number of runs to fix them.
        UnsupportedError: scipy is missing.
    """
    if form not in _FORMS:
        raise ConfigError(f"{form!r} is no form; {', '.join(_FORMS)} are")
    shape = _FORMS[form]
    columns = _columns(runs, (*shape.inputs, "loss"))
    count = len(columns[0])
    if count < len(shape.names):
        raise ConfigError(f"{count} runs cannot fix {len(shape.names)} parameters of {form!r}; more runs are needed")
    for name, column in zip(shape.inputs, columns, strict=False):
        if (different := len(np.unique(column))) < shape.values:
            raise ConfigError(
                f"runs of {different} different {name} cannot fix {form!r}: {shape.values} are needed at least"
            )
    best, residual = _solve(shape, columns, shape.starts(*columns))
    lost = _undetermined(shape, columns, best)
    # what is not determined may wander anywhere from draw to draw, and take the other parameters along
    drawn = _draws(shape, columns, best, draws if count > len(shape.names) and not lost else 0, seed)
    intervals: dict[str, tuple[float, float]] = {}
    if drawn:
        low, high = np.quantile(drawn, (0.025, 0.975), axis=0).tolist()
        intervals = dict(zip(shape.names, zip(low, high, strict=True), strict=True))
    return Fit(form, dict(zip(shape.names, best, strict=True)), intervals, residual, count, lost)


def _draws(shape: _Form, columns: list[Array], best: list[float], draws: int, seed: int) -> list[list[float]]:
    """Parameters of runs drawn anew; each from every start, as a draw may have its least elsewhere than all runs."""
    generator, drawn = np.random.default_rng(seed), []
    count = len(columns[0])
    for _ in range(draws):
        chosen = generator.integers(0, count, count)
        part = [column[chosen] for column in columns]
        fixed = all(len(np.unique(column)) >= shape.values for column in part[:-1])
        if fixed and len(set(chosen.tolist())) >= len(shape.names):
            # from all starts a little of the way, from the best of them to the end
            near, _ = _solve(shape, part, [best, *shape.starts(*part)], tolerance=1e-6, evaluations=25)
            drawn.append(_solve(shape, part, [near], tolerance=1e-10, evaluations=200)[0])
    return drawn


def _undetermined(shape: _Form, columns: list[Array], best: list[float]) -> tuple[str, ...]:
    """Parameters along whose change, with that of others, the losses of the runs stay as they are."""
    *inputs, _ = columns
    at, step = np.log(np.maximum(best, 1e-300)), 1e-5

    def losses(values: Array) -> Array:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            return np.asarray(np.log(shape.loss(np.exp(values), *inputs)))

    slopes = [(losses(at + offset) - losses(at - offset)) / (2 * step) for offset in step * np.eye(len(best))]
    jacobian = np.nan_to_num(np.stack(slopes, axis=1), posinf=0.0, neginf=0.0)
    sizes = np.linalg.norm(jacobian, axis=0)
    silent = sizes <= _SILENT * sizes.max()
    if silent.all():
        return shape.names
    _, strengths, directions = np.linalg.svd(jacobian[:, ~silent] / sizes[~silent], full_matrices=False)
    lost = silent.copy()
    weak = directions[strengths < _SINGULAR * strengths[0]]
    lost[~silent] = (np.abs(weak) > 0.1).any(axis=0)
    return tuple(name for name, gone in zip(shape.names, lost.tolist(), strict=True) if gone)


def _columns(runs: Mapping[str, Sequence[float]], names: Sequence[str]) -> list[Array]:
    missing = [name for name in names if name not in runs]
    if missing:
        raise ConfigError(f"runs: no column {missing[0]!r}; expected {', '.join(names)}")
    columns = [np.asarray(runs[name], dtype=np.float64) for name in names]
    if len({len(column) for column in columns}) != 1 or any(not (column > 0).all() for column in columns):
        raise ConfigError(f"runs: columns {', '.join(names)} must be of one length and positive")
    return columns


def _solve(
    form: _Form, columns: list[Array], starts: list[list[float]], tolerance: float = 1e-14, evaluations: int = 2000
) -> tuple[list[float], float]:
    """The best of several starts, and its residual."""
    try:
        from scipy.optimize import least_squares  # type: ignore[import-untyped]
    except ImportError:
        raise UnsupportedError("fits of scaling laws need scipy; pip install 'longspan[scaling]'") from None
    *inputs, loss = columns
    target = np.log(loss)

    def error(values: Array) -> Array:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            difference = np.log(form.loss(np.exp(np.clip(values, -_LARGEST, _LARGEST)), *inputs)) - target
        return np.asarray(np.nan_to_num(difference, nan=1e3, posinf=1e3, neginf=-1e3))

    options = {"loss": "soft_l1", "f_scale": 0.1, "x_scale": "jac", "max_nfev": evaluations}
    options |= dict.fromkeys(("xtol", "ftol", "gtol"), tolerance)
    solutions = [least_squares(error, np.log(np.maximum(start, 1e-300)), **options) for start in starts]
    best = min(solutions, key=lambda solution: solution.cost)
    # of runs that are nearly alike the scale may lie beyond all numbers, which it then has no part in
    values = [float(value) for value in np.exp(np.clip(best.x, -_LARGEST, _LARGEST))]
    return values, float(np.sqrt(np.mean(error(best.x) ** 2)))


@dataclass(frozen=True)
class Allocation:
    """How to spend a budget.

    Attributes:
        parameters: N, without embeddings.
        tokens: D.
        loss: expected.
    """

    parameters: float
    tokens: float
    loss: float


def optimal(law: Fit, flops: float) -> Allocation:
    """The N and D of least loss with 6 N D = `flops`, in closed form; the term of the context is left out.

    Of Chinchilla's form (Hoffmann et al. 2022, equation 4) and of Kaplan's (from the derivative of equation 1.5).

    Raises:
        ConfigError: a law that knows only one of N and D, or whose scales and exponents the runs do not determine; or
            no FLOPs.
    """
    # the loss that is left at any size moves no optimum
    if lost := [name for name in law.undetermined if name != "E"]:
        raise ConfigError(f"{', '.join(lost)} of {law.form!r} not determined by these runs; vary N and D apart")
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
        raise ConfigError(
            f"a law of form {law.form!r} cannot weigh parameters against tokens; fit kaplan or chinchilla"
        )
    d = budget / n
    return Allocation(n, d, float(law.predict(N=n, D=d)))


def critical_batch(loss: float, *, law: tuple[float, float] = KAPLAN_CRITICAL) -> float:
    """Tokens of the batch at which time and compute are traded evenly: B* / L^(1 / a_B)."""
    return float(law[0] / loss ** (1 / law[1]))


def least_steps(steps: float, batch: float, loss: float) -> float:
    """Steps that would have been needed at a batch far above the critical one: S / (1 + B_crit / B)."""
    return steps / (1 + critical_batch(loss) / batch)


def least_compute(flops: float, batch: float, loss: float) -> float:
    """FLOPs that would have been needed at a batch far below the critical one: C / (1 + B / B_crit)."""
    return flops / (1 + batch / critical_batch(loss))
