"""`rmt-flops`: the factor by which recurrent memory saves FLOPs."""

from pathlib import Path

from longspan.cost import OPT, recurrent_ratio
from longspan.experiments.claims.base import Claim, Figure, Outcome, Say
from longspan.report.figures import Series, line_figure, picture_of

_PAPER = {"125M": 295, "175B": 29}


def _measure(folder: Path, plan: None, say: Say) -> Outcome:
    """Compute the ratio of FLOPs, whole text over recurrent memory, for the OPT sizes; nothing is trained."""
    counts = [4**power for power in range(7)]
    ratios = {name: [recurrent_ratio(shape, segments=count) for count in counts] for name, shape in OPT.items()}
    figures = [
        Figure(
            f"times fewer FLOPs, OPT-{name}, 4,096 segments of 512",
            f"{_PAPER[name]}" if name in _PAPER else "",
            f"{ratio[-1]:.1f}",
        )
        for name, ratio in ratios.items()
    ]
    series = [Series(x=counts, y=ratio, label=f"OPT-{name}", kind="marked") for name, ratio in ratios.items()]
    drawn = picture_of(
        line_figure,
        "rmt-flops",
        series,
        xlabel="segments of 512 tokens",
        ylabel="times fewer FLOPs than attention over the whole text",
        xscale="log2",
        yscale="log",
        xticks=counts,
        alt="Factor of saved FLOPs against the number of segments, for five sizes of OPT.",
    )
    holds = all(round(ratios[name][-1]) == value for name, value in _PAPER.items())
    return Outcome(
        verdict="holds" if holds else "does not hold",
        figures=figures,
        size="computed by the paper's convention (Hoffmann et al. 2022, appendix F); nothing is run",
        data={"segments": counts, "ratios": ratios},
        pictures=[drawn],
    )


RMT_FLOPS = Claim(
    name="rmt-flops",
    system="Recurrent Memory Transformer",
    source="Bulatov et al. 2023, figure 2 and section 4",
    text="Over 4,096 segments recurrent memory needs up to 295 times fewer FLOPs than the same model needs for the "
    "whole text.",
    measure=_measure,
    minutes={"tiny": 0.1, "small": 0.1, "full": 0.1},
)
