"""`performer-approximation`: error of random features relative to softmax attention."""

from pathlib import Path
from typing import NamedTuple

import torch

from longspan import ops
from longspan.experiments.claims.base import Claim, Figure, Outcome, Say
from longspan.experiments.claims.performer_remedies import measure_remedies, remedies_table
from longspan.experiments.claims.runs import measure_once
from longspan.report.figures import Series, line_figure, picture_of

_SCALES = (0.25, 0.5, 1.0)
_LENGTH, _DIM = 256, 64


class Plan(NamedTuple):
    """Numbers of features, and number of random inputs and projections."""

    features: tuple[int, ...]
    draws: int


PLANS = {
    "tiny": Plan((64, 256), 1),
    "small": Plan((64, 256, 1024), 2),
    "full": Plan((64, 256, 1024, 4096, 16384), 5),
}


@torch.no_grad()
def _error(scale: float, count: int, kind: str, draws: int) -> float:
    """Return the relative error of the outputs, a mean over random inputs and projections."""
    generator, errors = torch.Generator().manual_seed(0), []
    for _ in range(draws):
        q, k, v = (torch.randn(1, 1, _LENGTH, _DIM, generator=generator) for _ in range(3))
        exact = ops.full_attention(scale * q, scale * k, v, causal=False)
        projection = ops.orthogonal_projection(count, _DIM, generator=generator)
        square = torch.tensor(2.0 * scale * scale * _DIM**0.5)
        bound = ops.bounded_constant(square, _DIM) if kind == "bounded" else None
        out, _ = ops.favor_attention(scale * q, scale * k, v, projection, kind=kind, bound=bound, causal=False)
        errors.append(float((out - exact).norm() / exact.norm()))
    return sum(errors) / draws


def _measure(folder: Path, plan: Plan, say: Say) -> Outcome:
    """Compare FAVOR+ with exact attention on random inputs, by number of features, scale and kind of features."""
    counts, draws = plan
    errors_by_input = {
        f"{kind}, inputs of scale {scale:g}": [_error(scale, count, kind, draws) for count in counts]
        for scale in _SCALES
        for kind in ("positive", "hyperbolic", "bounded")
    }
    for name, errors in errors_by_input.items():
        say(f"{name}: " + ", ".join(f"{count:,}: {error:.3f}" for count, error in zip(counts, errors, strict=True)))
    figures = [
        Figure(
            f"relative error, {name}",
            "falls with the number of features",
            ", ".join(f"{count:,}: {error:.3f}" for count, error in zip(counts, errors, strict=True)),
        )
        for name, errors in errors_by_input.items()
    ]
    small = errors_by_input["positive, inputs of scale 0.25"]
    expected_ratio = (counts[-1] / counts[0]) ** 0.5
    falls = small[0] / small[-1] > 0.5 * expected_ratio
    remedies = measure_once(
        folder / f"remedies-{'-'.join(map(str, counts))}x{draws}.json", lambda: measure_remedies(counts, draws)
    )
    say("measured remedies on a trained model")
    shown = {name: errors for name, errors in errors_by_input.items() if name.startswith("positive")}
    drawn = picture_of(
        line_figure,
        "performer-approximation",
        [Series(x=list(counts), y=errors, label=name, kind="marked") for name, errors in shown.items()],
        xlabel="features",
        ylabel="relative error of the output",
        xscale="log2",
        yscale="log",
        xticks=list(counts),
        alt="Relative error of FAVOR+ against the number of features, for three scales of the inputs.",
    )
    return Outcome(
        verdict="holds in part" if falls else "does not hold",
        figures=figures,
        size=f"{_LENGTH} queries and keys of dim {_DIM}, normal random numbers times the scale, mean of {draws} random "
        "inputs and projections, bidirectional",
        note="The error falls with the square root of the number of features for small inputs; at unit variance, which "
        "trained models exceed, no practical number of features approximates softmax attention well. On a trained "
        "model the common offset of the keys and the few keys with most of the weight are larger causes than the "
        "kind of features.",
        data={"features": list(counts), "errors": errors_by_input, "remedies": remedies},
        pictures=[drawn],
        tables=[remedies_table(counts, remedies)],
    )


PERFORMER_APPROXIMATION = Claim(
    name="performer-approximation",
    system="Performer",
    source="Choromanski et al. 2021, section 4.2 and figure 4",
    text="Positive orthogonal random features estimate softmax attention without bias, better with more features.",
    measure=_measure,
    minutes={"tiny": 0.1, "small": 0.2, "full": 1},
    plans=PLANS,
)
