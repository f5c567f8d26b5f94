"""`performer-speed`: time against length, beside dense attention and a layer without attention."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan import ops
from longspan.claims.base import Claim, Figure, Outcome, Size
from longspan.report.figures import Series, line_figure, picture

_LENGTHS = {"small": (1024, 4096), "full": (1024, 4096, 16384, 65536)}
_DENSE_MOST = 16384
_HEADS, _DIM, _FEATURES = 4, 64, 256
_PAIRS = 3


def _layers() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    projection = ops.orthogonal_projection(_FEATURES, _DIM, generator=torch.Generator().manual_seed(0))
    return {
        "dense": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "performer": lambda q, k, v: ops.favor_attention(q, k, v, projection)[0],
        "performer, both sides": lambda q, k, v: ops.favor_attention(q, k, v, projection, causal=False)[0],
        "linear": lambda q, k, v: ops.linear_attention(F.elu(q) + 1, F.elu(k) + 1, v)[0],
        "no attention": lambda q, k, v: v * 1.0,
    }


def _seconds(layer: Callable[[Tensor, Tensor, Tensor], Tensor], length: int) -> float:
    """Of a forward and backward, the least of a few; the layers are timed in turn."""
    inputs = [torch.randn(1, _HEADS, length, _DIM, requires_grad=True) for _ in range(3)]
    started = time.perf_counter()
    layer(*inputs).sum().backward()
    return time.perf_counter() - started


def _run(folder: Path, size: Size, say: Callable[[str], None]) -> Outcome:
    layers, found = _layers(), {}
    for length in _LENGTHS[size]:
        names = [name for name in layers if name != "dense" or length <= _DENSE_MOST]
        rounds = [{name: _seconds(layers[name], length) for name in names} for _ in range(_PAIRS + 1)][1:]
        found[length] = {name: min(each[name] for each in rounds) for name in names}
        say(f"{length:,}: " + ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in found[length].items()))
    lengths = list(found)
    slopes = {name: _slope(found, name) for name in layers if sum(name in each for each in found.values()) > 1}
    figures = [
        Figure(
            f"milliseconds forward and backward, {name}",
            {"dense": "quadratic", "no attention": "the bound"}.get(name, "linear, near the bound"),
            ", ".join(f"{length:,}: {1e3 * each[name]:.1f}" for length, each in found.items() if name in each)
            + f" (last two: time grows as length^{slopes[name]:.2f})",
        )
        for name in slopes
    ]
    series = [
        Series(
            x=[length for length in lengths if name in found[length]],
            y=[1e3 * found[length][name] for length in lengths if name in found[length]],
            label=name,
            kind="marked",
        )
        for name in layers
    ]
    drawn = picture(
        "performer-speed",
        lambda theme: line_figure(
            series,
            xlabel="length",
            ylabel="milliseconds, forward and backward",
            xscale="log2",
            yscale="log",
            xticks=lengths,
            theme=theme,
        ),
        alt="Time of dense, performer and linear attention and of no attention against length, both logarithmic.",
    )
    linear = slopes["performer"] < 1.25 and slopes["dense"] > 1.5
    return Outcome(
        verdict="holds in part" if linear else "does not hold",
        figures=figures,
        size=f"operations alone, batch 1, {_HEADS} heads of {_DIM}, {_FEATURES} features, fp32, least of {_PAIRS} "
        f"rounds in one process, {torch.get_num_threads()} threads",
        note="Linear in the length, and past dense attention from a few thousand tokens on. Near the bound of no "
        "attention at all it is not, on a CPU: 256 features are four times the work of the values themselves.",
        data={str(length): each for length, each in found.items()},
        pictures=[drawn],
    )


def _slope(found: dict[int, dict[str, float]], name: str) -> float:
    """How time grows between the two longest lengths measured, as a power of the length."""
    first, last = [length for length in found if name in found[length]][-2:]
    return math.log(found[last][name] / found[first][name]) / math.log(last / first)


PERFORMER_SPEED = Claim(
    name="performer-speed",
    system="Performer",
    source="Choromanski et al. 2021, section 4.1 and figure 3",
    text="Time grows linearly with the length and comes near that of a layer without attention.",
    run=_run,
    minutes={"small": 0.2, "full": 2},
)
