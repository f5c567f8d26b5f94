"""Associative memory written by the delta rule (ARMT, Rodkin et al. 2024, section 3): a matrix and its normalizer.

Shapes: memory (batch, ..., features, dim), normalizer (batch, ..., features), keys and queries (batch, ..., n,
features), values (batch, ..., n, dim).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from longspan.engine import flash
from longspan.engine.arguments import check_floating
from longspan.engine.segments import Layout, SegmentMemory, attend_open, attend_segments, inside_cost

EPSILON = 1e-5
SMALL = 1e-10
"""A key whose squared feature norm is below this counts as new, whatever it shares with other keys."""


def dpfp(x: Tensor, nu: int = 3) -> Tensor:
    """Return deterministic parameter-free projection features (Schlag et al. 2021, section 5.3): sparse, >= 0.

    With r = [relu(x), relu(-x)], these are the products of r with itself shifted by 1 ... nu positions, concatenated.

    Args:
        x: (..., d).
        nu: number of shifts.

    Returns:
        (..., 2 d nu).
    """
    check_floating(x=x)
    r = torch.cat([x.relu(), (-x).relu()], -1)
    return torch.cat([r * r.roll(j, -1) for j in range(1, nu + 1)], -1)


def associative_read(phi_q: Tensor, memory: Tensor, normalizer: Tensor) -> Tensor:
    """Return the memory's answers phi_q A / (phi_q . z + 1e-5); zeros where nothing was written.

    Args:
        phi_q: query features (batch, ..., n, features).
        memory: A (batch, ..., features, dim).
        normalizer: z (batch, ..., features).

    Returns:
        (batch, ..., n, dim) in the memory's dtype.
    """
    phi_q = phi_q.to(memory.dtype)
    with flash.full_precision(phi_q.device):
        return (phi_q @ memory) / ((phi_q @ normalizer[..., None]) + EPSILON)


def associative_write(
    phi_k: Tensor,
    values: Tensor,
    strength: Tensor,
    memory: Tensor,
    normalizer: Tensor,
    *,
    constant_gamma: bool = True,
    damped: bool = False,
) -> tuple[Tensor, Tensor]:
    """Write n key-value pairs into the memory at once by the delta rule; return the new memory and normalizer.

        v' = phi_k A / (phi_k . z + 1e-5)      what is stored under the key
        A <- A + sum strength phi_k (v - v')
        z <- z + sum gamma phi_k,  gamma = clip(1 - phi_k . z / |phi_k|^2, 0, 1), 1 where |phi_k|^2 < 1e-10

    So a key that is written again replaces its value and adds nothing to the normalizer. All pairs correct the same A
    at once. If n of them have similar keys, and z has seen such keys less often than n beta / 2 times (or has seen
    shorter ones), the correction is more than twice the error, and A grows without bound over segments. `damped`
    divides every beta by

        max(1, max_i sum_j beta_j phi_i . phi_j / (phi_i . z'))      z': the normalizer after the write

    so that together they never correct more than the error. It does not change the write of a single pair.

    Args:
        phi_k: key features (batch, ..., n, features).
        values: (batch, ..., n, dim).
        strength: beta (batch, ..., n) in [0, 1]; 0 writes nothing, but still updates the normalizer.
        memory: A (batch, ..., features, dim).
        normalizer: z (batch, ..., features).
        constant_gamma: no gradient flows through gamma, as in ARMT.
        damped: limit the joint correction as described above; ARMT does not.

    Returns:
        New tensors: memory (batch, ..., features, dim) and normalizer (batch, ..., features).
    """
    phi_k, values, strength = (t.to(memory.dtype) for t in (phi_k, values, strength))
    with flash.full_precision(phi_k.device):
        known = (phi_k @ normalizer[..., None])[..., 0]
        size = phi_k.square().sum(-1)
        # without the mask, zero features would give the gradient of 0 / 0, which is not finite
        gamma = torch.where(size < SMALL, 1, 1 - known / size.clamp(min=SMALL)).clamp(0, 1)
        gamma = gamma.detach() if constant_gamma else gamma
        next_normalizer = normalizer + (gamma[..., None] * phi_k).sum(-2)
        if damped:
            joint_correction = (phi_k @ phi_k.mT @ strength[..., None]) / (phi_k @ next_normalizer[..., None] + EPSILON)
            strength = strength / joint_correction.amax((-2, -1)).clamp(min=1)[..., None]
        change = strength[..., None] * (values - associative_read(phi_k, memory, normalizer))
        return memory + phi_k.mT @ change, next_normalizer


class AssociativeMaps(NamedTuple):
    """The weights of the associative memory of one layer.

    Attributes:
        tokens: (kv_heads, num_memory_tokens, head_dim), memory queries that attend to a complete segment.
        query, key: (head_dim, memory_dim), projections of queries and keys into the memory.
        value: (head_dim, head_dim), projection of values into the memory.
        strength: (head_dim,), projection to the write strength before its sigmoid.
        nu: number of shifts in the DPFP feature map.
    """

    tokens: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    strength: Tensor
    nu: int = 3


class AssociativeRule(NamedTuple):
    """Reads and writes a layer's associative memory: memory queries summarize a segment for the delta rule."""

    maps: AssociativeMaps

    @property
    def features(self) -> int:
        """Number of rows (features) of the memory."""
        return 2 * self.maps.key.shape[1] * self.maps.nu

    def memory_dtype(self, v: Tensor) -> torch.dtype:
        """Return the dtype of the memory for values v: fp32 or wider.

        fp64 is not needed: the delta rule corrects errors and the normalizer counts no key twice, so neither drifts.
        """
        return torch.promote_types(v.dtype, torch.float32)

    def read(self, q: Tensor, memory: SegmentMemory, inside: Tensor) -> Tensor:
        """Return a segment's outputs (batch, heads, size, head_dim): local attention `inside` plus memory reads of
        q.
        """
        batch, heads, size, dim = q.shape
        kv_heads = memory.values.shape[1]
        rows = q.to(memory.values.dtype).reshape(batch, kv_heads, heads // kv_heads * size, dim)
        phi = dpfp(rows @ self.maps.query.to(rows.dtype), self.maps.nu)
        answers = associative_read(phi, memory.values, memory.keys)
        return inside + answers.view(batch, heads, size, inside.shape[-1]).to(inside.dtype)

    def write(self, k: Tensor, v: Tensor, memory: SegmentMemory) -> tuple[Tensor, Tensor]:
        """Return values and normalizer after a complete segment, k and v (batch, kv_heads, size, head_dim)."""
        dtype = memory.values.dtype
        k, v = k.to(dtype), v.to(dtype)
        key, value = self.maps.key.to(dtype), self.maps.value.to(dtype)
        weights = summary_weights(k, self.maps)
        attended_k, attended_v = weights @ k, weights @ v
        beta = write_strengths(attended_k, self.maps)
        phi = dpfp(attended_k @ key, self.maps.nu)
        return associative_write(
            phi, attended_v @ value, beta, memory.values, memory.keys, constant_gamma=False, damped=True
        )


def summary_weights(k: Tensor, maps: AssociativeMaps) -> Tensor:
    """Return the weights (..., kv_heads, memory tokens, size) of the keys k (..., kv_heads, size, head_dim) of a
    complete segment in what its memory tokens write.
    """
    weights: Tensor = (maps.tokens.to(k.dtype) @ k.mT * k.shape[-1] ** -0.5).softmax(-1)
    return weights


def write_strengths(attended_k: Tensor, maps: AssociativeMaps) -> Tensor:
    """Return beta (..., memory tokens) from the weighted sums of keys (..., memory tokens, head_dim)."""
    strengths: Tensor = (attended_k @ maps.strength.to(attended_k.dtype)).sigmoid()
    return strengths


def associative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: AssociativeMaps,
    *,
    segment: int,
    state: SegmentMemory | None = None,
    local: tuple[Tensor, Tensor] | None = None,
    real: Tensor | None = None,
    begins: Tensor | None = None,
    bptt_segments: int | None = None,
) -> tuple[Tensor, SegmentMemory]:
    """Run causal attention inside segments plus an associative memory; return outputs and next memory.

    Args:
        q: (batch, heads, length, head_dim), before RoPE; column 0 is the first of a segment.
        k, v: (batch, kv_heads, length, head_dim), before RoPE.
        maps: the memory's weights.
        segment: segment length in columns.
        state: memory of the segments before; None = empty.
        local: q and k with RoPE, for the attention inside segments; None = q and k themselves.
        real: (batch, length) bool, columns that hold a token, first in each segment; None = all.
        begins: (batch, segments) bool, segments at which a document begins; None = none.
        bptt_segments: number of segments through which gradients flow back, a row's last one included; None = all.

    Returns:
        Outputs (batch, heads, length, head_dim) in v's dtype, and the memory after all complete segments.
    """
    layout = Layout(segment, real, begins, bptt_segments)
    return attend_segments(q, k, v, AssociativeRule(maps), layout, state=state, local=local)


def associative_open(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: AssociativeMaps,
    *,
    segment: int,
    state: SegmentMemory | None = None,
    local: tuple[Tensor, Tensor] | None = None,
    lengths: Tensor | None = None,
    memory_lengths: Tensor | None = None,
    closes: Tensor | None = None,
    bptt_segments: int | None = None,
) -> tuple[Tensor, SegmentMemory]:
    """Run `associative_attention` on a call that stays inside the incomplete segment of every row, as in decoding.

    Args:
        q: (batch, heads, length, head_dim), before RoPE.
        k, v: (batch, kv_heads, earlier + length, head_dim); the first columns are earlier tokens of the segment.
        maps, segment, state, bptt_segments: as in `associative_attention`.
        local: q and k with RoPE; None = q and k themselves.
        lengths: (batch,) number of real tokens of each row, which come first; None = all.
        memory_lengths: (batch,) number of earlier keys that belong to the segment, newest last; None = all.
        closes: (batch,) bool, rows whose segment is complete after this call, so that it is written; None = none.

    Returns:
        Outputs (batch, heads, length, head_dim) in v's dtype, and the memory after the call.
    """
    return attend_open(
        q,
        k,
        v,
        AssociativeRule(maps),
        Layout(segment, horizon=bptt_segments),
        state=state,
        local=local,
        lengths=lengths,
        memory_lengths=memory_lengths,
        closes=closes,
    )


def associative_cost(
    length: int, *, segment: int, head_dim: int, group: int, tokens: int, memory_dim: int, nu: int
) -> tuple[int, int]:
    """Count the work of associative attention for `length` tokens from an empty state.

    Args:
        length: tokens.
        segment: positions per segment.
        head_dim: width of a head.
        group: query heads per kv head.
        tokens: number of memory tokens that summarize a segment.
        memory_dim: width of the memory's queries and keys.
        nu: parameter of the feature map DPFP; it has 2 * memory_dim * nu features.

    Returns:
        The multiply-adds of the memory per kv head, its query heads included, and the scores of the local attention
        per query head.
    """
    features = 2 * memory_dim * nu
    read = group * length * (head_dim * memory_dim + features * (head_dim + 1)) if length > segment else 0
    write = tokens * (2 * segment * head_dim + head_dim * (memory_dim + head_dim + 1))
    write += tokens * features * (2 * head_dim + 3 + tokens) + tokens**2
    return read + length // segment * write, inside_cost(length, segment)
