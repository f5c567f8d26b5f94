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
"""square of features below which a key counts as new whatever it shares with others"""


def dpfp(x: Tensor, nu: int = 3) -> Tensor:
    """Deterministic parameter-free projection (Schlag et al. 2021, section 5.3), non-negative and sparse.

    With r = [relu(x), relu(-x)]: the products of r with itself rolled by 1 ... nu places, side by side.

    Of x (..., d), they are (..., 2 d nu).
    """
    check_floating(x=x)
    r = torch.cat([x.relu(), (-x).relu()], -1)
    return torch.cat([r * r.roll(j, -1) for j in range(1, nu + 1)], -1)


def associative_read(phi_q: Tensor, memory: Tensor, normalizer: Tensor) -> Tensor:
    """What the memory A answers: phi_q A / (phi_q . z + 1e-5), z its normalizer; zeros where nothing was written.

    Shapes are those of the module; the answers (batch, ..., n, dim) have the memory's dtype.
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
    """All n pairs written at once by the delta rule.

        v' = phi_k A / (phi_k . z + 1e-5)      what is stored under the key
        A <- A + sum strength phi_k (v - v')
        z <- z + sum gamma phi_k,  gamma = clip(1 - phi_k . z / |phi_k|^2, 0, 1), 1 where |phi_k|^2 < 1e-10

    so that a key written again replaces its value and adds nothing to the normalizer. All pairs correct the same A at
    once: where n of them ask alike and z has seen such keys less often than n beta / 2 times, or shorter ones, the
    correction is more than twice what is wrong, and A grows without bound over segments. `damped` divides every beta by

        max(1, max_i sum_j beta_j phi_i . phi_j / (phi_i . z'))      z': the normalizer after the write

    so that together they never correct more than what is wrong; a pair alone is not changed by it.

    Args:
        phi_k, values, memory, normalizer: see the module.
        strength: beta (batch, ..., n) in [0, 1]; 0 writes nothing, the normalizer apart.
        constant_gamma: gamma is not differentiated, as in ARMT.
        damped: see above; ARMT's are not.

    Returns:
        Memory and normalizer, new tensors.
    """
    phi_k, values, strength = (t.to(memory.dtype) for t in (phi_k, values, strength))
    with flash.full_precision(phi_k.device):
        known = (phi_k @ normalizer[..., None])[..., 0]
        size = phi_k.square().sum(-1)
        # zero features have no direction: without the mask the gradient of 0 / 0 is not finite
        gamma = torch.where(size < SMALL, 1, 1 - known / size.clamp(min=SMALL)).clamp(0, 1)
        gamma = gamma.detach() if constant_gamma else gamma
        after = normalizer + (gamma[..., None] * phi_k).sum(-2)
        if damped:
            together = (phi_k @ phi_k.mT @ strength[..., None]) / (phi_k @ after[..., None] + EPSILON)
            strength = strength / together.amax((-2, -1)).clamp(min=1)[..., None]
        change = strength[..., None] * (values - associative_read(phi_k, memory, normalizer))
        return memory + phi_k.mT @ change, after


class AssociativeMaps(NamedTuple):
    """The weights of an associative memory in a layer.

    Attributes:
        tokens: (kv_heads, num_memory_tokens, head_dim), what the closed segment is asked.
        query, key: (head_dim, memory_dim).
        value: (head_dim, head_dim).
        strength: (head_dim,).
        nu: of the feature map.
    """

    tokens: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    strength: Tensor
    nu: int = 3


class AssociativeRule(NamedTuple):
    """Memory queries attend to the closed segment; what they find is written by the delta rule, and added when read."""

    maps: AssociativeMaps

    @property
    def features(self) -> int:
        """Rows of the memory."""
        return 2 * self.maps.key.shape[1] * self.maps.nu

    def memory_dtype(self, v: Tensor) -> torch.dtype:
        """Fp32 at least: the delta rule corrects, and the normalizer counts no key twice, so that neither runs away."""
        return torch.promote_types(v.dtype, torch.float32)

    def read(self, q: Tensor, memory: SegmentMemory, inside: Tensor) -> Tensor:
        """The local attention, and what the memory answers to each query."""
        batch, heads, size, dim = q.shape
        kv_heads = memory.values.shape[1]
        rows = q.to(memory.values.dtype).reshape(batch, kv_heads, heads // kv_heads * size, dim)
        phi = dpfp(rows @ self.maps.query.to(rows.dtype), self.maps.nu)
        answers = associative_read(phi, memory.values, memory.keys)
        return inside + answers.view(batch, heads, size, inside.shape[-1]).to(inside.dtype)

    def write(self, k: Tensor, v: Tensor, memory: SegmentMemory) -> tuple[Tensor, Tensor]:
        """A full segment."""
        dtype = memory.values.dtype
        k, v = k.to(dtype), v.to(dtype)
        tokens, _, key, value, strength = (t.to(dtype) for t in self.maps[:5])
        weights = (tokens @ k.mT * k.shape[3] ** -0.5).softmax(-1)
        heard_k, heard_v = weights @ k, weights @ v
        beta = (heard_k @ strength).sigmoid()
        phi = dpfp(heard_k @ key, self.maps.nu)
        return associative_write(
            phi, heard_v @ value, beta, memory.values, memory.keys, constant_gamma=False, damped=True
        )


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
    """Causal attention inside segments, and an associative memory of those before; arguments as `infini_attention`."""
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
    """The same within the open segment of every row; arguments as `infini_open`."""
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
    """Multiply-adds of the memory of one kv head and its query heads, and local score entries of one query head.

    Of `length` tokens from an empty past, with `group` query heads a kv head; see `AssociativeMaps`.
    """
    features = 2 * memory_dim * nu
    read = group * length * (head_dim * memory_dim + features * (head_dim + 1)) if length > segment else 0
    write = tokens * (2 * segment * head_dim + head_dim * (memory_dim + head_dim + 1))
    write += tokens * features * (2 * head_dim + 3 + tokens) + tokens**2
    return read + length // segment * write, inside_cost(length, segment)
