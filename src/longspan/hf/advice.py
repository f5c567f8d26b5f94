"""What to expect of a conversion before any training, from measurements, and what to do next."""

from longspan.hf.convert import Report

MEASURED = {
    "window": 0.03,
    "window_linear": 0.03,
    "memorizing": 0.02,
    "infini": 0.11,
    "associative": 0.15,
    "entmax": 0.21,
    "adaptive_span": 0.71,
    "sparse": 1.52,
    "bp": 2.23,
    "performer": 4.85,
    "linear": 5.86,
    "routing": 7.98,
    "lsh": 7.99,
}
"""Nats per token above the original, by mixer, for conversions with default fields: SmolLM2-135M-Instruct (4-bit
weights), tokens 512 to 2,047 of the King James Bible. `longspan convert --check FILE` measures any model and text."""
LITTLE, MUCH = 0.1, 0.5
"""Losses in nats per token, below the first of which a conversion is used as it is, above the second not at all."""


def advice(more: float) -> str:
    """Return what to do with a conversion that loses `more` nats per token without training."""
    if more < LITTLE:
        return "It predicts nearly as before: use it as it is, or train it on long texts, so that it uses its memory."
    if more < MUCH:
        return "It predicts worse than before: teach it with `longspan transfer`, or train it on long texts."
    return "It is of no use before training: teach it with `longspan transfer`, then train it on long texts."


def expectation(report: Report) -> str:
    """Return what to expect of a conversion without training, and on a second line what to do next."""
    known = MEASURED.get(report.name)
    if known is None:
        return "Without training: not measured for this mixer; `longspan convert --check FILE` measures it on a text."
    return (
        f"Without training, {report.name} with its default fields lost {known:.2f} nats per token on SmolLM2-135M, at "
        f"tokens 512 to 2,047 of a book; --check FILE measures this model.\n{advice(known)}"
    )
