"""Linear attention: feature maps instead of the softmax, computed in chunks by matrix products.

    o_i = phi_q_i S_i / (phi_q_i . z_i),   S_i = sum_j phi_k_j v_j^T,   z_i = sum_j phi_k_j,   over the visible keys of
    i

(Katharopoulos et al. 2020, section 3.2; the causal sums in chunks: Hua et al. 2022, section 3.2.) Features of keys may
have their own scale, exp(log_scale_j). Row i is then divided by the largest scale among its *visible* keys, so that
nothing overflows and nothing depends on later tokens; a maximum over a chunk or over the call would depend on them.

Only inputs and output have the size of the call: the call is computed in blocks, and the backward pass recomputes each
block from the state at its start.

Sums are carried in fp64 (`sums_dtype`): in fp32 those of 10^7 tokens are off by 5e-3, and from 6.7e7 tokens on nothing
is added any more. What a call reads of them, and its products, are in fp32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longspan import host
from longspan.engine import flash
from longspan.engine.arguments import check_floating, join_tail
from longspan.engine.first_order import FirstOrder
from longspan.engine.linear_chunks import CHUNK, EMPTY, LinearSums, chunk_outputs, divided
from longspan.engine.sums import sums_dtype
from longspan.errors import ConfigError

BLOCK = 2048


def elu_features(x: Tensor, *, queries: bool = False) -> Tensor:
    """Return the features elu(x) + 1 (Katharopoulos et al. 2020, section 3.2), (..., features); exp(x) below 0, for
    accuracy.

    Args:
        x: (..., features), fp32 at least.
        queries: x are queries, which may be scaled by any factor, as the output is a quotient: a vector whose entries
            are all far below 0 then does not underflow.
    """
    check_floating(x=x)
    below = x.clamp(max=0)
    if queries and x.shape[-1]:
        below = below - below.detach().amax(-1, keepdim=True)
    return torch.where(x > 0, x + 1, below.exp())


Features = Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]
"""Maps x (B, heads, n, head_dim), and whether x are keys, to features (B, heads, n, m) and log-scales (B, heads, n)."""


def linear_attention(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    log_scale: Tensor | None = None,
    state: LinearSums | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, LinearSums | None]:
    """Attention by features, in time and memory linear in the length.

    Args:
        phi_q: (batch, heads, length, features).
        phi_k: (batch, kv_heads, length, features), kv_heads dividing heads.
        v: (batch, kv_heads, length, head_dim).
        causal: a query sees no later key.
        log_scale: (batch, kv_heads, length) of each key's features; None = 0.
        state: sums over the keys before this call; None = none. Causal only.
        lengths: (batch,) real tokens of each row, at the front; None = all.
        start: (batch, length) the column where each token's document starts, negative if before the call; None = no
            document starts inside. Bidirectional: tokens of equal start see each other.

    Returns:
        (batch, heads, length, head_dim) in v's dtype, zeros where the denominator is zero, and the sums after the call
        (None if not causal).
    """
    check_call(phi_q, phi_k, v, causal, state)

    def features(x: Tensor, keys: bool) -> tuple[Tensor, Tensor | None]:
        """Split keys into their features and their log-scale, which is the last column."""
        return (x[..., :-1], x[..., -1]) if keys and log_scale is not None else (x, None)

    k = phi_k if log_scale is None else torch.cat([phi_k, log_scale[..., None].to(phi_k.dtype)], -1)
    return feature_attention(
        phi_q, k, v, features, phi_k.shape[-1], causal=causal, state=state, lengths=lengths, start=start
    )


def check_call(q: Tensor, k: Tensor, v: Tensor, causal: bool, state: Any) -> None:
    """Raise a ConfigError for mismatched shapes, non-floating dtypes, or a state in the bidirectional form."""
    check_floating(q=q, k=k, v=v)
    if q.shape[1] % max(k.shape[1], 1) or k.shape[:3] != v.shape[:3] or q.shape[2] != k.shape[2]:
        raise ConfigError(
            f"linear attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not match; expected "
            "(batch, heads, length, ...), with kv_heads of k and v dividing heads"
        )
    if state is not None and not causal:
        raise ConfigError("linear attention: only the causal form accepts a state; pass state=None")


def feature_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Features,
    num_features: int,
    *,
    causal: bool,
    state: LinearSums | None,
    lengths: Tensor | None,
    start: Tensor | None,
    log_totals: bool = False,
) -> tuple[Tensor, LinearSums | None]:
    """Compute `linear_attention` of q, k with features made block by block, so that those of the whole call never
    exist.

    `features` maps q or k to `num_features` features and log-scales; other arguments are those of `linear_attention`.
    With `log_totals` (causal only, and with log-scales of queries) out has one more column, the logarithm of the
    denominator, `EMPTY` where a query sees no key; out is then in fp32 at least.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    with flash.full_precision(q.device):
        q, k, values = (t.to(dtype) for t in (q, k, v))
        column = torch.arange(v.shape[2], device=v.device)
        real = None if lengths is None else column < lengths[:, None]
        if start is not None and lengths is not None and real is not None:
            # padding after a row's real tokens belongs to the document of the last one
            start = join_tail(start, lengths, real)
        if not causal:
            return _bidirectional(q, k, values, features, real, start).to(v.dtype), None
        sums = state or empty_sums(v.shape[0], v.shape[1], num_features, v.shape[3], v.device, dtype)
        wide = sums_dtype(v.device)
        sums = LinearSums(sums.values.to(wide), sums.keys.to(wide), sums.maximum.to(dtype))
        out, *after = _Blocked.apply(LinearCall(features, real, start, log_totals), q, k, values, *sums)
    return (out if log_totals else out.to(v.dtype)), LinearSums(*after)


class LinearCall(NamedTuple):
    """What all blocks of a call share.

    Attributes:
        features: see `Features`.
        real: (batch, length) bool, columns with a token; None = all.
        start: (batch, length) first column of each token's document; None = no limit.
        log_totals: whether outputs have a column with the logarithms of the denominators.
    """

    features: Features
    real: Tensor | None
    start: Tensor | None
    log_totals: bool


def empty_sums(
    batch: int, kv_heads: int, features: int, head_dim: int, device: torch.device | None, dtype: torch.dtype
) -> LinearSums:
    """Return the sums over no keys; `dtype` is that of the maximum."""
    values = torch.zeros(batch, kv_heads, features, head_dim, device=device, dtype=sums_dtype(device))
    return LinearSums(values, values[..., 0].clone(), torch.full((batch, kv_heads), EMPTY, device=device, dtype=dtype))


class _Blocked(FirstOrder):
    """The causal form, block by block; it stores inputs, output and the sums at the start of each block.

    The backward pass recomputes each block, from the last to the first. Results do not depend on the maxima, which only
    set units, so they are constants to it.
    """

    what = "linear attention"

    @staticmethod
    def forward(ctx: Any, call: LinearCall, q: Tensor, k: Tensor, v: Tensor, *sums: Any) -> Any:
        """Compute the output and the sums after the call."""
        out = v.new_empty(*q.shape[:3], v.shape[3] + call.log_totals)
        carried, borders = LinearSums(*sums), []
        for first in range(0, q.shape[2], BLOCK):
            borders.append(carried)
            parts = [t[:, :, first : first + BLOCK] for t in (q, k, v)]
            out[:, :, first : first + BLOCK], carried = _run_block(first, call, parts, carried)
        ctx.save_for_backward(q, k, v, *(t for border in borders for t in border))
        ctx.call = call
        ctx.mark_non_differentiable(carried.maximum)
        # never return inputs, which autograd would take for outputs computed in place
        return out, *(t.clone() if any(t is before for before in sums) else t for t in carried)

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], d_out: Tensor, *d_sums: Any) -> Any:
        """Compute the gradients of q, k, v and of the sums before the call."""
        q, k, v, *flat = saved
        grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
        d_values, d_keys = d_sums[:2]
        for first in reversed(range(0, q.shape[2], BLOCK)):
            index = first // BLOCK * 3
            leaves = [t[:, :, first : first + BLOCK].detach().requires_grad_() for t in (q, k, v)]
            values, keys, maximum = (t.detach() for t in flat[index : index + 3])
            leaves += [values.requires_grad_(), keys.requires_grad_()]
            with torch.enable_grad():
                before = LinearSums(values, keys, maximum)
                out, after = _run_block(first, ctx.call, leaves[:3], before)
            block_grads = torch.autograd.grad(
                (out, after.values, after.keys), leaves, (d_out[:, :, first : first + BLOCK], d_values, d_keys)
            )
            for grad, part in zip(grads, block_grads, strict=False):
                grad[:, :, first : first + BLOCK] = part
            d_values, d_keys = block_grads[3:]
        return None, *grads, d_values, d_keys, None


def _run_block(first: int, call: LinearCall, parts: list[Tensor], sums: LinearSums) -> tuple[Tensor, LinearSums]:
    """Return the outputs of the block of a call that begins at column `first`, from its q, k, v, and the next sums."""
    real = None if call.real is None else call.real[:, first : first + BLOCK]
    start = None if call.start is None else call.start[:, first : first + BLOCK] - first
    return _one_block(call._replace(real=real, start=start), parts[0], parts[1], parts[2], sums)


def _blocks(*tensors: Tensor) -> Any:
    """Yield (first column, parts of the tensors) block by block; one split each, so that gradients are joined once."""
    parts = [tensor.split(BLOCK, 2) for tensor in tensors]
    first = 0
    for block in zip(*parts, strict=True):
        if block[0].shape[2]:
            yield first, block
        first += block[0].shape[2]


def _recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function whose intermediate results are recomputed in the backward pass instead of being stored."""
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _one_block(block: LinearCall, q: Tensor, k: Tensor, v: Tensor, sums: LinearSums) -> tuple[Tensor, LinearSums]:
    """Return the causal outputs of a block and the sums after it: whole chunks, then the rest as a shorter chunk.

    `block` is the call with `real` and `start` of the block's columns, counted from its first.
    """
    phi_q, log_q = block.features(q, False)
    phi_k, scale = _masked(*block.features(k, True), block.real)
    length, start = q.shape[2], block.start
    whole = length // CHUNK * CHUNK
    outs = []
    for first, last, size in ((0, whole, CHUNK), (whole, length, length - whole)):
        if first == last:
            continue
        part = slice(first, last)
        out, sums = chunk_outputs(
            phi_q[:, :, part],
            phi_k[:, :, part],
            v[:, :, part],
            None if scale is None else scale[:, :, part],
            sums,
            None if start is None else start[:, part] - first,
            size,
            block.log_totals,
        )
        outs.append(out)
    out = torch.cat(outs, 2) if len(outs) > 1 else outs[0]
    if block.log_totals and log_q is not None:
        out = torch.cat([out[..., :-1], out[..., -1:] + log_q[..., None]], -1)
    return out, sums


def _masked(phi: Tensor, scale: Tensor | None, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the features and log-scales of keys with those of padding (False in `real`) set to 0 and EMPTY."""
    if real is not None:
        phi = phi.masked_fill(~real[:, None, :, None], 0)
        scale = None if scale is None else scale.masked_fill(~real[:, None], EMPTY)
    return phi, scale


def _bidirectional(
    q: Tensor, k: Tensor, v: Tensor, features: Features, real: Tensor | None, start: Tensor | None
) -> Tensor:
    """Compute the bidirectional form: every token of a document sees all of it."""
    if start is not None:
        return _by_document(q, k, v, features, real, start)
    kv_heads, group = k.shape[1], q.shape[1] // max(k.shape[1], 1)
    total: Tensor | None = None
    most: Tensor | None = None
    for first, (part_k, part_v) in _blocks(k, v):
        live = None if real is None else real[:, first : first + part_k.shape[2]]
        total, most = _recomputed(_add_block, features, part_k, part_v, live, total, most)
    outs = []
    for _, (part,) in _blocks(q):
        outs.append(_recomputed(_read_block, features, part, total, kv_heads, group))
    return torch.cat(outs, 2) if outs else v.new_zeros(*q.shape[:3], v.shape[3])


def _add_block(
    features: Features, k: Tensor, v: Tensor, real: Tensor | None, total: Tensor | None, most: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the sums over keys and values with a block added, and their largest log-scale (None without scales)."""
    phi, scale = _masked(*features(k, True), real)
    ones = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    if scale is None:
        added = (phi.mT @ ones).to(sums_dtype(phi.device))
        return (added if total is None else total + added), None
    largest = scale.detach().amax(-1)
    if most is not None:
        largest = torch.maximum(largest, most)
    added = ((phi * torch.exp(scale - largest[..., None])[..., None]).mT @ ones).to(sums_dtype(phi.device))
    if total is not None and most is not None:
        added = added + total * torch.exp(most - largest)[..., None, None]
    return added, largest


def _read_block(features: Features, q: Tensor, total: Tensor, kv_heads: int, group: int) -> Tensor:
    """Return the outputs of a block of queries from the sums `total` over all keys."""
    phi, _ = features(q, False)
    batch, heads, length, width = phi.shape
    out = divided(phi.reshape(batch, kv_heads, group * length, width) @ total.to(phi.dtype))
    return out.view(batch, heads, length, total.shape[-1] - 1)


def _by_document(q: Tensor, k: Tensor, v: Tensor, features: Features, real: Tensor | None, start: Tensor) -> Tensor:
    """Compute the bidirectional form with each document as its own row."""
    batch, length = start.shape
    column = torch.arange(length, device=q.device)
    here = column.expand(batch, -1) if real is None else torch.where(real, column, -1)
    fresh = (start == column) | (column == 0)
    number = fresh.reshape(-1).cumsum(0).view(batch, length) - 1  # documents, counted through the batch
    position = column - start.clamp(min=0)
    read, counted = host.values(start), np.arange(length)
    count, longest = batch * length, length
    if read is not None:
        count = int(((read == counted) | (counted == 0)).sum())
        longest = int((counted - read.clip(min=0)).max()) + 1
    index = torch.zeros(count, longest, dtype=torch.int64, device=q.device)
    inside = torch.zeros(count, longest, dtype=torch.bool, device=q.device)
    flat = torch.arange(batch * length, device=q.device).view(batch, length)
    index[number, position] = flat
    inside[number, position] = here >= 0

    def apart(t: Tensor) -> Tensor:
        """Arrange (batch, heads, length, dim) with one document per row."""
        return t.transpose(1, 2).flatten(0, 1)[index].transpose(1, 2)

    out = _bidirectional(apart(q), apart(k), apart(v), features, inside, None)
    return out.transpose(1, 2)[number, position].transpose(1, 2)


def linear_cost(length: int, *, features: int, head_dim: int, causal: bool = True) -> int:
    """Return the multiply-adds of the matrix products of one head that has its own key head.

    Args:
        length: tokens.
        features: number of features per query or key.
        head_dim: width of the values.
        causal: see `linear_attention`.
    """
    return group_cost(length, features=features, head_dim=head_dim, group=1, causal=causal)


def group_cost(length: int, *, features: int, head_dim: int, group: int, causal: bool = True) -> int:
    """Return the multiply-adds of the products of one key head and its `group` query heads, for `length` tokens."""
    e = head_dim + 1
    if not causal:
        return length * features * e * (1 + group)
    inside = 0
    for first in range(0, length, BLOCK):
        size = min(BLOCK, length - first)
        inside += (size // CHUNK) * CHUNK * CHUNK + (size % CHUNK) ** 2
    return group * inside * (features + e) + length * features * e * (1 + group)
