"""What the claim `transfer` does: its variants, in the order in which they are measured, and its sizes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from longspan.hf.check import EDGES

Loss = Literal["heads", "outputs"]
Training = Literal["none", "transfer", "tuning"]
ORIGINAL = "original"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A converted model."""

    name: str
    """in tables"""
    folder: str
    """of its files"""
    mixer: str = ""
    """that replaces attention; empty: attention stays, in segments of a recurrent memory"""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """of the mixer; of the recurrent memory for one without a mixer"""
    training: Training = "transfer"
    """none; attention transfer and distillation; or tuning on the loss, for a recurrent memory"""
    softmax: int = 0
    """layers that keep softmax, those whose transfer leaves the largest errors"""
    loss: Loss = "heads"
    lr: float | None = None
    """of the transfer; None: that of the plan"""
    branches: bool = False
    """it can be read with its memory, or its local attention, left out"""
    long: bool = False
    """it is read beyond the positions of the original"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of the claim.

    A step of transfer or distillation reads `batch * length` tokens, the same number for every variant; the recurrent
    memory is tuned for as many steps as these together.
    """

    variants: tuple[Variant, ...]
    length: int
    """tokens per training piece"""
    batch: int
    """pieces per step"""
    steps: int
    """of layer-by-layer transfer"""
    distill: int
    """steps of distillation after the transfer, at a tenth of its rate"""
    lr: float
    """of the transfer; it falls along a cosine"""
    training_bytes: int
    """text to learn from, per kind"""
    documents: int
    """held-out documents per kind"""
    tokens: int
    """that are read of each: the positions that the original was trained for"""
    long_documents: int
    """of the documents, those that are read further where a variant asks for it, and with branches left out"""
    long_tokens: int
    edges: tuple[int, ...] = EDGES
    """of the ranges of positions"""
    lost: tuple[int, int] = (2048, 8192)
    """range of positions where the share that is won back is measured"""
    small_model: bool = False
    """use a model that is trained from nothing in a second instead of SmolLM2-135M-Instruct"""


def variants(window: int, softmax: tuple[int, ...], *, segment: int, memory_tokens: int = 16) -> tuple[Variant, ...]:
    """Return the variants of the claim.

    Args:
        window: tokens that local attention sees.
        softmax: numbers of layers that keep softmax in hybrids; the first is measured early, the others late.
        segment: tokens per segment of infini and of the recurrent memory.
        memory_tokens: of the recurrent memory.
    """
    # from 0, gates receive gradients at once; untrained, this costs less than 0.004 nats over gates of -8
    linear = {"window": window, "gate_init": 0.0}

    def hybrid(layers: int) -> Variant:
        """Return window_linear with softmax in some layers."""
        return Variant(
            name=f"{layers} softmax + window_linear",
            folder=f"softmax-{layers}",
            mixer="window_linear",
            fields=linear,
            softmax=layers,
            branches=True,
        )

    first, *others = map(hybrid, softmax)
    return (
        Variant(
            name="window + sinks",
            folder="window",
            mixer="window",
            fields={"window": window},
            training="none",
            long=True,
        ),
        Variant(
            name="window_linear",
            folder="window_linear",
            mixer="window_linear",
            fields=linear,
            branches=True,
            long=True,
        ),
        first,
        Variant(
            name="infini",
            folder="infini",
            mixer="infini",
            # gates are all that is new, and the run is short: at their own rate they would hardly move from -4
            fields={"segment": segment, "gate_lr": 0.1},
            loss="outputs",
            lr=1e-4,
            branches=True,
            long=True,
        ),
        # these have nothing of their own to learn, or need other queries and keys
        Variant(name="performer", folder="performer", mixer="performer", loss="outputs", lr=1e-3),
        Variant(name="gated_delta", folder="gated_delta", mixer="gated_delta", loss="outputs", lr=1e-3),
        Variant(
            name="recurrent memory",
            folder="rmt",
            fields={"num_memory_tokens": memory_tokens, "segment_length": segment},
            training="tuning",
        ),
        *others,
        # the projections are trained too, at a rate at which they keep what they know
        Variant(
            name="window_linear, projections too",
            folder="window_linear-outputs",
            mixer="window_linear",
            fields=linear,
            loss="outputs",
            lr=5e-4,
            branches=True,
            long=True,
        ),
    )


# one of each kind: untrained, transferred, with softmax in one layer, and tuned
_TINY = tuple(
    variant
    for variant in variants(8, (1,), segment=16, memory_tokens=2)
    if variant.folder in ("window", "window_linear", "softmax-1", "rmt")
)
PLANS: dict[str, Plan] = {
    "tiny": Plan(
        variants=_TINY,
        length=48,
        batch=1,
        steps=2,
        distill=1,
        lr=1e-2,
        training_bytes=1500,
        documents=2,
        tokens=64,
        long_documents=1,
        long_tokens=96,
        edges=(0, 16, 32, 64, 96),
        lost=(32, 64),
        small_model=True,
    ),
    # at tokens 2,048 to 4,096, two documents per kind, four variants, a few steps
    "small": Plan(
        variants=variants(512, (10,), segment=512)[:4],
        length=1024,
        batch=1,
        steps=10,
        distill=5,
        lr=1e-2,
        training_bytes=500_000,
        documents=2,
        tokens=4096,
        long_documents=1,
        long_tokens=4096,
        edges=(0, 512, 1024, 2048, 4096),
        lost=(2048, 4096),
    ),
    "full": Plan(
        variants=variants(512, (10, 3, 6), segment=512),
        length=2048,
        batch=1,
        steps=50,
        distill=300,
        # a first try of 60 steps at a constant 1e-2 lowered the errors of heads by a quarter and raised the loss; five
        # steps of distillation lowered the divergence of a piece to 0.0525 at 1e-2 and to 0.0542 at 1e-3
        lr=2e-2,
        training_bytes=2_000_000,
        documents=6,
        tokens=8192,
        long_documents=2,
        long_tokens=32_768,
    ),
}
"""Expected at `full` on two cores that do nothing else: a variant that is trained reads 716,800 tokens, 102,400 in the
transfer (7 CPU ms per token, measured with pieces of 1,024 on one thread) and 614,400 in the distillation (about 20 CPU
ms, measured with pieces of 512): 3.6 CPU hours, so 2 to 2.5 hours each, eight of them. Reading 8,192 tokens of 18
documents takes about 15 minutes per variant, and the documents of 32,768 tokens and the branches another 4 hours
together. About 26 hours in all; it resumes, and the table is built from the variants that are finished."""
