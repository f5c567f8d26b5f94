"""What brings random features nearer to softmax attention, tried on queries and keys of a trained model.

A trained model has larger queries and keys than random inputs, keys with a common offset, and most weight on a few near
keys. Each remedy is for one of these; those that change queries or keys leave softmax attention exactly as it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longspan import ops
from longspan.mechanisms.performer.operation import favor_features
from longspan.report import Table
from longspan.tasks.base import evenly, heads
from longspan.train import load_run
from longspan.train.layer_hooks import watch_layers
from longspan.train.starts import start_folder

START, LENGTH = "code", 512
NEAR = 64
"""distance up to which the last remedy computes the weights of keys exactly"""

Heads = tuple[Tensor, Tensor, Tensor]
"""q, k and v, (batch, heads, length, head_dim)."""


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """A change of the estimate."""

    name: str
    cause: str
    """of the error, which it addresses"""
    kind: str = "positive"
    """of features"""
    changes: tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], ...] = ()
    """replace queries and keys by others with the same softmax attention, one after another"""
    near: int = 0
    """keys nearer than this get their exact weight"""


def centered(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract the mean of the keys: adds the same number to all scores of a query, which softmax ignores."""
    return q, k - k.mean(-2, keepdim=True)


def balanced(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Apply A^-1/2 to queries and A^1/2 to keys, so that their second moments agree; scores do not change.

    Among all linear maps that leave scores alone, this one makes the sum of their squared norms smallest, on which the
    variance of the features depends. A is the geometric mean of the inverse second moment of the keys and the second
    moment of the queries.
    """
    queries, keys = _second_moment(q), _second_moment(k)
    root, inverse = _power(keys, 0.5), _power(keys, -0.5)
    mean = inverse @ _power(root @ queries @ root, 0.5) @ inverse
    return (q.double() @ _power(mean, -0.5)).to(q), (k.double() @ _power(mean, 0.5)).to(k)


REMEDIES = (
    Remedy(name="none: positive features, as in the paper", cause=""),
    Remedy(name="hyperbolic features", cause="variance of the features", kind="hyperbolic"),
    Remedy(name="bounded features (FAVOR++)", cause="variance of the features", kind="bounded"),
    Remedy(name="keys minus their mean", cause="common offset of the keys", changes=(centered,)),
    Remedy(name="second moments of queries and keys made equal", cause="unequal directions", changes=(balanced,)),
    Remedy(name="both", cause="norms of queries and keys", changes=(centered, balanced)),
    Remedy(
        name=f"both, and exact weights of the {NEAR} nearest keys on each side",
        cause="few keys have most of the weight",
        changes=(centered, balanced),
        near=NEAR,
    ),
)


@torch.no_grad()
def trained_heads(start: str = START, length: int = LENGTH) -> list[Heads]:
    """Return queries, keys and values of each layer of a start on the first bytes of a held-out document."""
    model, task = load_run(start_folder(start))
    document, layers = evenly(heads(task.documents("validation"), length), 1), list[Heads]()
    watch_layers(model, document, model.cores(), lambda _, arguments, *__: layers.append(arguments[:3]), chunk=length)
    return layers


def estimate(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, remedy: Remedy) -> Tensor:
    """Return bidirectional attention by random features with a remedy, (batch, heads, length, head_dim)."""
    for change in remedy.changes:
        q, k = change(q, k)
    scale = q.shape[-1] ** -0.25
    bound = None
    if remedy.kind == "bounded":
        square = (q.square().sum(-1).mean() + k.square().sum(-1).mean()) * scale**2
        bound = ops.bounded_constant(square, q.shape[-1])
    if not remedy.near:
        return ops.favor_attention(q, k, v, projection, kind=remedy.kind, bound=bound, causal=False)[0]
    products = [favor_features(x.double() * scale, projection, kind=remedy.kind, bound=bound) for x in (q, k)]
    left, right = (phi * factor.exp()[..., None] for phi, factor in products if factor is not None)
    exact = (q.double() @ k.double().mT * scale**2).exp()
    positions = torch.arange(q.shape[-2])
    is_near = (positions[:, None] - positions).abs() < remedy.near
    weights = torch.where(is_near, exact, left @ right.mT)
    return ((weights / weights.sum(-1, keepdim=True)) @ v.double()).to(v)


@torch.no_grad()
def error(layer: Heads, count: int, remedy: Remedy, draws: int) -> float:
    """Return the relative error of the output of a layer with `count` features, a mean over projections."""
    q, k, v = layer
    exact = ops.full_attention(q, k, v, causal=False)
    generator, errors = torch.Generator().manual_seed(0), []
    for _ in range(draws):
        projection = ops.orthogonal_projection(count, q.shape[-1], generator=generator)
        errors.append(float((estimate(q, k, v, projection, remedy) - exact).norm() / exact.norm()))
    return sum(errors) / draws


def measure_remedies(counts: Sequence[int], draws: int) -> dict[str, list[float]]:
    """Return the error of every remedy by number of features, the mean over the layers of the trained model."""
    layers = trained_heads()
    return {
        remedy.name: [float(np.mean([error(layer, count, remedy, draws) for layer in layers])) for count in counts]
        for remedy in REMEDIES
    }


def remedies_table(counts: Sequence[int], errors: dict[str, list[float]]) -> Table:
    """Return the table of tries."""
    rows: list[Any] = [
        [remedy.name, remedy.cause, *(f"{value:.2f}" for value in errors[remedy.name])] for remedy in REMEDIES
    ]
    return Table(
        columns=["remedy", "for", *(f"{count:,} features" for count in counts)],
        rows=rows,
        right=list(range(2, 2 + len(counts))),
        caption=f"Tries: relative error on queries and keys of the start `{START}`, {LENGTH} bytes, bidirectional, the "
        "mean over its layers. Remedies that change queries or keys leave softmax attention as it is.",
    )


def _second_moment(x: Tensor) -> Tensor:
    """Return the second moment of (batch, heads, length, dim) over the length, (batch, heads, dim, dim) fp64."""
    x = x.double()
    moment = x.mT @ x / x.shape[-2]
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    # a direction that no vector has would make it singular
    return moment + 1e-6 * mean * torch.eye(x.shape[-1], dtype=x.dtype)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """Return a power of symmetric positive matrices (..., dim, dim)."""
    values, vectors = torch.linalg.eigh(matrix)
    power: Tensor = (vectors * values.clamp_min(1e-12).pow(exponent)[..., None, :]) @ vectors.mT
    return power
