"""Compression functions of the Compressive Transformer (Rae et al. 2019, section 3.2) and their auxiliary losses.

A group of `ratio` vectors becomes one slot. "mean" and "max" pool it. "conv" is a convolution with `ratio` taps and
stride `ratio`. "dilated" is a stack of convolutions with two taps and dilations 1, 2, 4, ..., each with a residual, y =
(a + b) / 2 + W gelu([a, b]), read at the end of each group; it sees the last 2 ** layers vectors, at least two groups
(the paper gives no sizes). "most_used" keeps, of the vectors that leave the memory together, those that got the most
attention. Convolutions are initialized as means (the paper does not specify it).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan import host, ops
from longspan.contract.maps import CalledParameters
from longspan.contract.rows import BatchLayout
from longspan.engine.first_order import FirstOrder
from longspan.mechanisms.compressive.operation import CallSegments, CompressiveSizes

Project = Callable[[Tensor], tuple[Tensor, Tensor]]


class Compressor(nn.Module):
    """Compresses groups of `ratio` vectors into one slot each.

    Args:
        how: compression function, "mean", "max", "conv", "dilated" or "most_used"; see the module docstring.
        dim: width of the vectors.
        ratio: vectors per slot.
        decode: also create the decoder for the auto-encoding loss (for functions with parameters).

    Attributes:
        context: number of vectors before a group that its slot depends on.
        learns: whether the function has parameters.
    """

    def __init__(self, how: str, dim: int, ratio: int, decode: bool = False) -> None:
        super().__init__()
        self.how, self.dim, self.ratio = how, dim, ratio
        layers = (2 * ratio - 1).bit_length() if how == "dilated" else 0
        self.context = 2**layers - ratio if layers else 0
        self.learns = how in ("conv", "dilated")
        # plain parameters, because models reinitialize the weights of `nn.Linear`
        self.layers = CalledParameters(torch.zeros(dim, 2 * dim) for _ in range(layers))
        self.conv = nn.Parameter(torch.eye(dim).repeat(1, ratio) / ratio) if how == "conv" else None
        self.decoder = nn.Parameter(torch.eye(dim).repeat(ratio, 1)) if decode and self.learns else None

    def unused_weights(self) -> list[str]:
        """Names of unused weights that earlier versions saved for functions without parameters."""
        return [] if self.learns else ["conv", "decoder", *(f"layers.{index}" for index in range(64))]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load the parameters, ignoring unused weights saved by earlier versions."""
        for name in self.unused_weights():
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(
        self, vectors: Tensor, usage: Tensor | None = None, groups: Tensor | None = None, *, decode: bool = False
    ) -> Tensor:
        """Compress groups of vectors into slots, or decode slots.

        Args:
            vectors: (batch, context + slots * ratio, dim), or slots (batch, slots, dim) with `decode`.
            usage: (batch, slots * ratio) attention that each vector got; "most_used" only.
            groups: (batch,) number of real groups, which come first; "most_used" only.
            decode: decode slots with the auto-encoder's decoder instead.

        Returns:
            Slots (batch, slots, dim), or reconstructed vectors (batch, slots * ratio, dim) with `decode`.
        """
        if decode:
            assert self.decoder is not None, "built without a decoder"
            return F.linear(vectors, self.decoder).view(vectors.shape[0], -1, self.dim)
        if usage is not None and groups is not None:
            return self._most_used(vectors, usage, groups)
        if self.how == "dilated":
            h = vectors.unfold(1, self.context + self.ratio, self.ratio).transpose(2, 3)
            for layer in self.layers():
                pairs = h.unflatten(2, (-1, 2))
                h = pairs.mean(3) + F.linear(F.gelu(pairs.flatten(3)), layer)
            ends: Tensor = h[:, :, 0]
            return ends
        grouped = vectors.unflatten(1, (-1, self.ratio))
        if self.conv is not None:
            return F.linear(grouped.flatten(2), self.conv)
        pooled: Tensor = grouped.amax(2) if self.how == "max" else grouped.mean(2)
        return pooled

    def _most_used(self, vectors: Tensor, usage: Tensor, groups: Tensor) -> Tensor:
        """Select the `groups` most used of a row's first groups * ratio vectors, in their order; ties go to the first.

        vectors is (batch, slots * ratio, dim), the result (batch, slots, dim).
        """
        slots, column = vectors.shape[1] // self.ratio, torch.arange(vectors.shape[1], device=vectors.device)
        real = column < (groups * self.ratio)[:, None]
        order = usage.masked_fill(~real, -1.0).argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(1, order, column.expand_as(order))
        chosen = (rank >= groups[:, None]).sort(dim=1, stable=True).indices[:, :slots]
        return vectors.gather(1, chosen[..., None].expand(-1, -1, vectors.shape[2]))

    def flops(self, slots: int) -> int:
        """Count the FLOPs of compressing one row into `slots` slots."""
        if self.how == "conv":
            return 2 * slots * self.ratio * self.dim**2
        evaluated: int = 2 ** len(self.layers) - 1
        return 4 * slots * evaluated * self.dim**2


class Frozen(FirstOrder):
    """Autograd function: a projection to keys and values whose gradients reach its input but not its parameters."""

    what = "the loss of a compressor"

    @staticmethod
    def forward(ctx: Any, project: Project, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return `project(x)` (keys, values), recorded in a separate graph."""
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            k, v = project(inner)
        ctx.inner = inner, k, v
        ctx.save_for_backward(x)
        return k.detach(), v.detach()

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], *grads: Tensor) -> tuple[None, Tensor]:
        """Return the gradient of x only."""
        x, *projected = ctx.inner
        return None, torch.autograd.grad(projected, x, grads, retain_graph=True)[0]


def frozen(project: Project, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values of x, whose gradients reach x but not the parameters of `project`."""
    projected: tuple[Tensor, Tensor] = Frozen.apply(project, x)
    return projected


class SlotLayout(NamedTuple):
    """What a call compresses, and where the new slots are stored.

    A *closing* segment is one that is completed in the call, so that slots are made at its end. Indices refer to
    concatenated lists whose entry 0 is a zero vector.
    """

    # (closing, context + most slots * ratio) index into [zero, the state's hidden states, the call's]
    vectors: Tensor
    groups: Tensor  # (closing,) number of real slots of each segment, which come first
    queries: Tensor  # (closing, most tokens) the call's tokens in each segment, flattened over the batch
    lengths: Tensor  # (closing,) number of real tokens of each segment, which come first
    # (batch, columns) slots that the call's segments see, index into [zero, the state's slots, new slots]
    visible: Tensor
    carried: Tensor  # (batch, compressed_len) slots of the next state, index into the same list


def slot_layout(
    rows: BatchLayout, segments: CallSegments, sizes: CompressiveSizes, context: int, capacity: int
) -> SlotLayout:
    """Compute the slot layout of a call on the host.

    Args:
        rows: batch layout of the call.
        segments: segments of the call.
        sizes: sizes of segment and memories.
        context: `Compressor.context`.
        capacity: number of hidden states in the state.
    """
    old_slots, compressed_len = rows.batch * sizes.compressed_len, sizes.compressed_len
    closing = CallSegments(*(field[segments.new_slots > 0, None] for field in segments))
    group = np.arange(closing.new_slots.max(initial=0))
    first = sizes.closed_slots(closing.border) * sizes.ratio - context
    position = first + np.arange(context + len(group) * sizes.ratio)
    column = closing.column - closing.opened - closing.border + position  # negative: in the state
    in_state = 1 + (closing.row + 1) * capacity + column
    vectors = np.where(column < 0, in_state, 1 + rows.batch * capacity + closing.row * rows.length + column)
    vectors[(position < 0) | (position >= closing.border + sizes.segment)] = 0
    query = np.minimum(np.arange(closing.tokens.max(initial=0)), closing.tokens - 1)
    # slots of a row: those of the state, then the new ones
    new_slots = np.zeros(rows.batch, np.int64)
    np.add.at(new_slots, segments.row, segments.new_slots)
    slots = np.zeros((rows.batch, compressed_len + new_slots.max(initial=0)), np.int64)
    slots[:, :compressed_len] = 1 + np.arange(old_slots).reshape(rows.batch, compressed_len)
    row, column = np.broadcast_arrays(closing.row, compressed_len + closing.new_slots_before + group)
    real = group < closing.new_slots
    slots[row[real], column[real]] = (1 + old_slots + np.arange(real.size).reshape(real.shape))[real]
    live_before, live = (sizes.visible(count - count % sizes.segment)[0] for count in (rows.offsets, rows.lives))
    last = np.arange(compressed_len)
    carried = np.take_along_axis(slots, new_slots[:, None] + last, 1) * (last >= compressed_len - live[:, None])
    visible_end = compressed_len + segments.new_slots_before.max(initial=0)
    return SlotLayout(
        vectors=host.put(vectors, rows.device),
        groups=host.put(closing.new_slots[:, 0], rows.device),
        queries=host.put(closing.row * rows.length + closing.column + query, rows.device),
        lengths=host.put(closing.tokens[:, 0], rows.device),
        visible=host.put(slots[:, compressed_len - live_before.max(initial=0) : visible_end], rows.device),
        carried=host.put(carried, rows.device),
    )


def auxiliary_loss(
    compressor: Compressor, kind: str, old: Tensor, new: Tensor, q: Tensor, layout: SlotLayout, project: Project
) -> Tensor:
    """Return the loss from which a compressor learns in one call: a mean squared error with gradients for it only.

    Args:
        compressor: the compression function.
        kind: "attention" (reconstruct the attention of queries) or "auto_encoding" (reconstruct the vectors).
        old: (closing, slots * ratio, dim), vectors that left the memory.
        new: (closing, slots, dim), slots made of them.
        q: (closing, heads, length, head_dim), queries of the segments.
        layout: slot layout of the call.
        project: maps hidden states to keys and values.
    """
    groups, lengths = layout.groups, layout.lengths
    if kind == "auto_encoding":
        dtype = torch.promote_types(old.dtype, torch.float32)
        error: Tensor = (compressor(new, decode=True).to(dtype) - old).square().mean(2)
        real = torch.arange(old.shape[1], device=old.device) < (groups * compressor.ratio)[:, None]
        return (error * real).sum() / real.sum().clamp(min=1)
    with torch.no_grad():
        k, v = project(old)
    error = ops.attention_reconstruction(q.detach(), k, v, *frozen(project, new), groups=groups, lengths=lengths)
    return error.sum() / (lengths * (groups > 0)).sum().clamp(min=1)


class UsageLayout(NamedTuple):
    """How "most_used" counts the attention that vectors get: those of the state (capacity), then those of the call."""

    visible: Tensor  # (batch, capacity + length) bool, in the memory or the current segment
    # (batch, capacity + length) number of the segment's queries that see a vector, if it ends; else its length
    queries: Tensor
    # (batch, capacity) bool, vectors whose count the next state keeps: not those already compressed, and none of the
    # memory when a new segment starts
    carried: Tensor
    segment: int  # segment length

    def add(self, usage: Tensor, received: Tensor) -> Tensor:
        """Return usage plus this call's attention, (batch, capacity + length).

        Where a segment ends, the counts become the mean over the queries that saw the vector, times the segment length.

        Args:
            usage: (batch, capacity), counts of the state.
            received: (batch, columns), attention of this call, from `ops.attention_usage`.
        """
        columns = self.visible.shape[1]
        received = F.pad(received, (columns - received.shape[1], 0)) * self.visible
        usage = F.pad(usage, (0, columns - usage.shape[1])) + received
        return usage * (self.segment / self.queries.to(usage.dtype))

    def carry(self, usage: Tensor, rows: BatchLayout) -> Tensor:
        """Return the counts (batch, capacity) of the next state, from the result of `add`."""
        capacity = self.carried.shape[1]
        return rows.carry(usage[:, :capacity, None], usage[:, capacity:, None], capacity)[..., 0] * self.carried


def usage_layout(rows: BatchLayout, sizes: CompressiveSizes, capacity: int) -> UsageLayout:
    """Compute the usage layout of a call inside each row's incomplete segment; arguments as in `slot_layout`."""
    opened = (rows.offsets % sizes.segment)[:, None]
    closes = opened + rows.lengths_read[:, None] == sizes.segment
    rank = np.arange(-capacity, rows.length) + opened  # position in the current segment, negative before it
    memory = sizes.visible(rows.offsets[:, None] - opened)[1]
    averaged = closes & (rank >= 0) & (rank < sizes.segment)
    live = rows.lives[:, None]
    position = np.arange(-capacity, 0) + live
    waits = position >= sizes.closed_slots(live - live % sizes.segment) * sizes.ratio
    return UsageLayout(
        visible=host.put(rank >= -memory, rows.device),
        queries=host.put(np.where(averaged, sizes.segment - rank, sizes.segment), rows.device),
        carried=host.put(waits & (~closes | (position < live - sizes.mem_len)), rows.device),
        segment=sizes.segment,
    )
