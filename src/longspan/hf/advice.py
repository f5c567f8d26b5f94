"""What to expect of a conversion before any training, from measurements, and what to do next."""

from longspan.hf.convert import Report

MEASURED: dict[str, float] = {}
"""Bits per byte above the original, by mixer, for conversions with default fields: SmolLM2-135M-Instruct (4-bit
weights), the first 2,048 tokens of the King James Bible. `longspan convert --check FILE` measures another model."""
LITTLE, MUCH = 0.05, 0.3


def advice(more: float) -> str:
    """Return what to do with a conversion that loses `more` bits per byte without training."""
    if more < LITTLE:
        return "It predicts nearly as before: use it as it is, or train it on long texts, so that it uses its memory."
    if more < MUCH:
        return "It predicts worse than before: teach it with `longspan transfer`, or train it on long texts."
    return "It is of no use before training: teach it with `longspan transfer`, then train it on long texts."


def expectation(report: Report) -> str:
    """Return two lines: what to expect of a conversion without training, and what to do next."""
    known = MEASURED.get(report.name)
    if known is None:
        return "Without training: not measured for this mixer; `longspan convert --check FILE` measures it on a text."
    return (
        f"Without training, {report.name} with its default fields lost {known:.2f} bits per byte on 2,048 tokens with "
        f"SmolLM2-135M; --check FILE measures this model.\n{advice(known)}"
    )
