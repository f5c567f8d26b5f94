"""`compressive` as a module without q, k, v projections; the equations are in the package docstring."""

import functools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longspan import host, ops
from longspan import state as states
from longspan.config import check_least
from longspan.contract.base import Hidden, ParameterGroup, Shape, Traits
from longspan.contract.relative import NO_CONVERSION, RelativeMechanism, carry_hidden
from longspan.contract.rows import BatchLayout
from longspan.errors import ConfigError
from longspan.host import Array
from longspan.mechanisms.compressive.compressors import (
    Compressor,
    Project,
    SlotLayout,
    UsageLayout,
    auxiliary_loss,
    slot_layout,
    usage_layout,
)
from longspan.mechanisms.compressive.operation import (
    CallSegments,
    CompressiveSizes,
    attend_segments,
    attention_layout,
    call_segments,
    column_list,
    pick,
)


@dataclass(frozen=True, kw_only=True)
class CompressiveConfig:
    """Configuration of `compressive`.

    Attributes:
        segment: segment length in positions.
        mem_len: number of positions before its segment that a token sees uncompressed.
        compressed_len: number of compressed slots before them that a token sees.
        ratio: number of vectors compressed into one slot.
        compression: compression function: "mean", "max", "conv", "dilated" or "most_used" (the vectors that got the
            most attention).
        loss: auxiliary loss that trains a compression function with parameters: "attention" (the paper's best),
            "auto_encoding" or "none".
        loss_weight: weight of that loss.
        compressor_lr: learning rate of the compression function's parameters; None = that of the run.
    """

    segment: int = 512
    mem_len: int = 512
    compressed_len: int = 512
    ratio: int = 3
    compression: Literal["mean", "max", "conv", "dilated", "most_used"] = "conv"
    loss: Literal["attention", "auto_encoding", "none"] = "attention"
    loss_weight: float = 1.0
    compressor_lr: float | None = None

    def __post_init__(self) -> None:
        check_least(
            self, "compressive", {"segment": 1, "mem_len": 0, "compressed_len": 0, "ratio": 1, "loss_weight": 0}
        )
        if self.compressor_lr is not None and self.compressor_lr <= 0:
            raise ConfigError(
                f"compressive.compressor_lr = {self.compressor_lr}: must be positive, or None for the run's rate"
            )


class CompressiveState(NamedTuple):
    """Memories of the Compressive Transformer: recent hidden states and compressed slots."""

    # (batch, columns, dim), newest last: the incomplete segment, the memory before it, and before that vectors that
    # wait to fill a group (or are context of the compression). Unused columns are zero and masked.
    hidden: Tensor
    compressed: Tensor  # (batch, compressed_len, dim), newest last
    # (batch, columns) fp32 or wider, "most_used" only: attention that each vector of `hidden` got since the segment
    # began (waiting vectors: until they left the memory); otherwise (batch, 0)
    usage: Tensor
    live: Tensor  # (batch,) tokens since the last reset

    def accumulators(self) -> tuple[str, ...]:
        """Names of the fields that stay in fp32 or wider when the state is cast."""
        return ("usage",)


class Inputs(NamedTuple):
    """Arguments of a call, or of one segment of it."""

    q: Tensor  # q, k, v: (batch, heads or kv_heads, length, head_dim)
    k: Tensor
    v: Tensor
    x: Tensor  # (batch, length, dim), the hidden states that q, k, v are projections of
    project: Project  # hidden states to keys and values
    r: Tensor | None  # (heads, distances, head_dim), projected distances; None = project the queries instead
    aux_losses: list[Tensor] | None  # receives the compressor's auxiliary loss; None = it does not learn


class CompressiveMechanism(RelativeMechanism):
    """Compressive Transformer attention without q, k, v projections: relative positions, memory, compressed memory."""

    Config = CompressiveConfig
    config: CompressiveConfig
    examples = (
        {"segment": 4, "mem_len": 4, "compressed_len": 4, "ratio": 2},
        {"segment": 4, "mem_len": 3, "compressed_len": 5, "ratio": 3, "compression": "mean"},
        {"segment": 5, "mem_len": 2, "compressed_len": 3, "ratio": 2, "compression": "max"},
        {"segment": 3, "mem_len": 4, "compressed_len": 2, "ratio": 4, "compression": "dilated"},
        {"segment": 4, "mem_len": 4, "compressed_len": 3, "ratio": 3, "compression": "most_used"},
        {"segment": 4, "mem_len": 2, "compressed_len": 4, "ratio": 3, "loss": "auto_encoding"},
    )

    def __init__(self, shape: Shape, config: CompressiveConfig) -> None:
        super().__init__(shape, config)
        if not shape.causal:
            raise ConfigError(
                "compressive: recurrence is causal; there is no bidirectional form, build it with causal=True"
            )
        # without slots nothing is compressed, so use a function without parameters
        how = config.compression if config.compressed_len else "mean"
        self.compressor = Compressor(how, shape.dim, config.ratio, decode=config.loss == "auto_encoding")
        self.sizes = CompressiveSizes(config.segment, config.mem_len, config.compressed_len, config.ratio)
        self.reach = config.segment + config.mem_len + config.compressed_len
        waiting = config.ratio - 1 + self.compressor.context if config.compressed_len else 0
        self.capacity = waiting + config.mem_len + config.segment - 1
        self.counts_usage = config.compression == "most_used" and config.compressed_len > 0

    affine_in_values = True
    """Slots are made of hidden states and only add a constant to a map times the values; see `contract.explain`."""

    @functools.cached_property
    def traits(self) -> Traits:
        """Capability flags: causal only, constant-size state, needs hidden states, gradients stay inside the segment.

        "most_used" selects by the data. The output is not linear in the values, because slots are made of hidden
        states.
        """
        return Traits(
            bidirectional=False,
            bounded=True,
            selects=self.counts_usage,
            segment=self.config.segment,
            horizon=1,
            receives_hidden=True,
            linear_in_values=False,
            no_conversion_reason=NO_CONVERSION,
        )

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return the optimizer group of the compression function (rate `compressor_lr`); empty if not trained."""
        parameters = list(self.compressor.parameters())
        return [ParameterGroup("compressor", parameters, lr=self.config.compressor_lr)] if parameters else []

    # -- the call --------------------------------------------------------------------------------------------------

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: CompressiveState | None,
        rows: BatchLayout,
        *,
        hidden: Hidden | None = None,
        aux_losses: list[Tensor] | None = None,
    ) -> tuple[Tensor, CompressiveState]:
        """Return outputs (batch, heads, length, head_dim) over slots, memory and segment, and the next memories.

        Args:
            q: (batch, heads, length, head_dim).
            k, v: (batch, kv_heads, length, head_dim).
            state: memories of the tokens before the call; None = empty.
            rows: batch layout of the call (padding, documents, positions).
            hidden: the layer's input (batch, length, dim) and its projection to keys and values.
            aux_losses: list to which the compressor's auxiliary loss is appended; None = do not compute it.
        """
        assert hidden is not None, "compressive projects hidden states"
        distances = self._distances(rows)
        one_segment = rows.inside(self.config.segment) or not rows.batch
        projects_queries = one_segment and not self.counts_usage and self.projects_queries(q, distances, k, v)
        r = None if projects_queries else self.relative(distances, rows)
        inputs = Inputs(q, k, v, hidden.x, hidden.project, r, aux_losses if self._learns(rows) else None)
        if state is None:
            state = self.init_state(rows.batch, q.device, hidden.x.dtype)
        if one_segment:
            return self._within_segment(inputs, state, rows)
        if self.counts_usage:
            return self._segment_by_segment(inputs, state, rows)
        return self._all_segments(inputs, state, rows)

    def _learns(self, rows: BatchLayout) -> bool:
        """Whether the compressor gets an auxiliary loss in this call."""
        config = self.config
        has_loss = self.compressor.learns and config.loss != "none" and config.loss_weight > 0
        return has_loss and config.compressed_len > 0 and rows.learns

    def _distances(self, rows: BatchLayout) -> int:
        """Return the number of distances that (query, key) pairs of the call can have."""
        if not rows.plain:
            return self.reach
        first = rows.offset_range[0]
        _, tokens, visible = self._document(first + rows.length, first)
        return int((tokens + visible).max(initial=1))

    def _within_segment(
        self, inputs: Inputs, state: CompressiveState, rows: BatchLayout
    ) -> tuple[Tensor, CompressiveState]:
        """Compute a call that stays inside the incomplete segment of every row and may complete it.

        Used for single tokens of a stream and for whole segments. Returns outputs and the next state.
        """
        q, k, v, segment = inputs.q, inputs.k, inputs.v, self.config.segment
        past, memory_lengths = self._past(state, rows)
        if past is not None:
            past_k, past_v = inputs.project(past)
            k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        real: dict[str, Any] = {"lengths": rows.lengths, "memory_lengths": memory_lengths}
        usage = state.usage
        if inputs.r is None:
            scores = self.position_scores(q, k.shape[2], rows)
            out = ops.relative_decode(q, k, v, scores, self.content_bias, **real)
        else:
            biases = inputs.r, self.content_bias, self.position_bias
            out = ops.relative_attention(q, k, v, *biases, **real)
            if self.counts_usage:
                usage = self._usage_layout(rows).add(usage, ops.attention_usage(q, k, *biases, **real))
        compressed = rows.clear_reset(state.compressed)
        if (rows.offsets % segment + rows.lengths_read == segment).any():
            layout = self._slot_layout(rows)
            compressed = pick(self._compress(inputs, state, usage, layout), layout.carried)
        if self.counts_usage:
            usage = self._usage_layout(rows).carry(usage, rows)
        return out, CompressiveState(self._carry_hidden(state, inputs.x, rows), compressed, usage, rows.live)

    def _past(self, state: CompressiveState, rows: BatchLayout) -> tuple[Tensor | None, Tensor | None]:
        """Return the hidden states (batch, columns, dim) that the call sees besides its own, and how many are real.

        They are slots, memory and incomplete segment, newest last. The counts are (batch,), None = all real.
        """
        sizes, low, high = self.sizes, *rows.offset_range
        if low == high:
            opened = low % sizes.segment
            slots, memory = sizes.visible(low - opened)
            past = state.hidden[:, self.capacity - memory - opened :]
            if slots:
                past = torch.cat([state.compressed[:, sizes.compressed_len - slots :], past], 1)
            return (past if past.shape[1] else None), None

        def layout() -> tuple[Tensor, Tensor]:
            """Return which columns of the joined slots and hidden states each row sees.

            Returns:
                Column indices (batch, columns), newest last, and how many of them are real (batch,).
            """
            opened = rows.offsets % sizes.segment
            slots, memory = sizes.visible(rows.offsets - opened)
            count, near = slots + memory + opened, (memory + opened)[:, None]
            back = np.arange(count.max(), 0, -1)
            column = sizes.compressed_len - back + np.where(back <= near, self.capacity, near)
            return host.put(column.clip(min=0), rows.device), host.put(count, rows.device)

        column, count = rows.cached(("compressive past", sizes, self.capacity), layout)
        joined = torch.cat([state.compressed, state.hidden], 1)
        return joined.gather(1, column[..., None].expand(-1, -1, joined.shape[2])), count

    def _all_segments(
        self, inputs: Inputs, state: CompressiveState, rows: BatchLayout
    ) -> tuple[Tensor, CompressiveState]:
        """Compute any call with all segments at once; return outputs and the next state.

        This is possible because slots are made of hidden states only, so they are known before attention is computed.
        """
        q, k, v, x, project, r, _ = inputs
        assert r is not None, "only a call inside the incomplete segment projects queries instead of distances"
        slot_layout = self._slot_layout(rows)
        slots = self._compress(inputs, state, None, slot_layout)
        visible = project(pick(slots, slot_layout.visible))
        segments = self._segments(rows)
        memory = int((segments.opened + self.sizes.visible(segments.border)[1] - segments.column).max(initial=0))
        past, detached_kv = state.hidden[:, self.capacity - memory :], None
        if torch.is_grad_enabled():
            detached_kv = project(torch.cat([past, x], 1).detach())
        if detached_kv is None or past.requires_grad:
            past_k, past_v = project(past)
        else:
            past_k, past_v = (t[:, :, :memory] for t in detached_kv)
        k, v, learns = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2), detached_kv is not None
        layout = rows.cached(
            ("compressive attention", self.sizes, k.shape[1:], learns),
            lambda: attention_layout(segments, self.sizes, q, k, visible[0], detached_kv=learns),
        )
        biases = r, self.content_bias, self.position_bias
        out = attend_segments(layout, q, k, v, visible, biases, detached_kv)
        compressed = pick(slots, slot_layout.carried)
        return out, CompressiveState(self._carry_hidden(state, x, rows), compressed, state.usage, rows.live)

    def _segment_by_segment(
        self, inputs: Inputs, state: CompressiveState, rows: BatchLayout
    ) -> tuple[Tensor, CompressiveState]:
        """Compute a call of "most_used" one segment after another; return outputs and the next state.

        Compression depends on the attention of a whole segment and must be done before the next segment begins.
        """
        layout, outputs = rows.segments(self.config.segment), []
        spread = [layout.spread(t) for t in (inputs.q, inputs.k, inputs.v, inputs.x)]
        for columns, begins, part in rows.cached(
            ("compressive parts", self.sizes), lambda: self._segment_layouts(rows)
        ):
            if begins is not None:
                emptied = [t.masked_fill(begins.view(-1, *(1,) * (t.ndim - 1)), 0) for t in state]
                state = CompressiveState(*emptied)
            q, k, v = (part.gather(t[:, :, columns].transpose(1, 2)).transpose(1, 2) for t in spread[:3])
            inner = inputs._replace(q=q, k=k, v=v, x=part.gather(spread[3][:, columns]))
            out, state = self._within_segment(inner, state, part)
            outputs.append(part.scatter(out.transpose(1, 2)).transpose(1, 2))
        hidden, compressed, usage = (rows.clear_reset(t) for t in state[:3])
        return layout.collect(torch.cat(outputs, 2)), CompressiveState(hidden, compressed, usage, rows.live)

    def _segment_layouts(self, rows: BatchLayout) -> list[tuple[slice, Tensor | None, BatchLayout]]:
        """Return for each segment of all rows: columns, rows (batch,) where a document begins or None, layout."""
        segment, live, parts = self.config.segment, rows.offsets, []
        layout = rows.segments(segment)
        positions = layout.spread_positions()
        for first in range(0, layout.columns, segment):
            columns = slice(first, first + segment)
            begins, real = positions[:, first] == 1, positions[:, columns] > 0
            part = BatchLayout(host.put(np.where(begins, 0, live), rows.device), segment, host.put(real, rows.device))
            parts.append((columns, host.put(begins, rows.device) if begins.any() else None, part))
            live = part.lives
        return parts

    # -- compression -----------------------------------------------------------------------------------------------

    def _segments(self, rows: BatchLayout) -> CallSegments:
        """Return the segments of the call, computed once for all layers."""
        key = "compressive segments", self.sizes
        return rows.cached(key, lambda: call_segments(rows.positions_read, rows.lengths_read, self.sizes))

    def _slot_layout(self, rows: BatchLayout) -> SlotLayout:
        """Return the slot layout of the call, computed once for all layers."""
        sizes = self.sizes, self.compressor.context, self.capacity
        return rows.cached(("compressive slots", *sizes), lambda: slot_layout(rows, self._segments(rows), *sizes))

    def _usage_layout(self, rows: BatchLayout) -> UsageLayout:
        """Return the usage layout of the call, computed once for all layers."""
        sizes = self.sizes, self.capacity
        return rows.cached(("compressive usage", *sizes), lambda: usage_layout(rows, *sizes))

    def _compress(self, inputs: Inputs, state: CompressiveState, usage: Tensor | None, layout: SlotLayout) -> Tensor:
        """Return a list (slots, dim): a zero vector, the state's slots, and those made in this call.

        Appends the compressor's auxiliary loss to `inputs.aux_losses` unless it is None.
        """
        if not len(layout.groups):
            return column_list(state.compressed)
        old = pick(column_list(state.hidden, inputs.x).detach(), layout.vectors)
        if self.counts_usage:
            assert usage is not None
            columns = column_list(usage[:, : self.capacity], usage[:, self.capacity :])
            new = self.compressor(old, pick(columns, layout.vectors), layout.groups)
        else:
            with torch.set_grad_enabled(inputs.aux_losses is not None):
                new = self.compressor(old).to(old.dtype)
        if inputs.aux_losses is not None:
            queries = pick(inputs.q.transpose(1, 2).flatten(0, 1), layout.queries).transpose(1, 2)
            old = old[:, self.compressor.context :]
            loss = auxiliary_loss(self.compressor, self.config.loss, old, new, queries, layout, inputs.project)
            inputs.aux_losses.append(self.config.loss_weight * loss)
        return column_list(state.compressed, new.detach())

    def _carry_hidden(self, state: CompressiveState, x: Tensor, rows: BatchLayout) -> Tensor:
        """Return the next state's hidden states (batch, capacity, dim), detached before the incomplete segment."""
        return carry_hidden(state.hidden, x, rows, self.capacity, self.config.segment)

    # -- state and cost ---------------------------------------------------------------------------------------------

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype) -> CompressiveState:
        """Return the empty state of `batch_size` rows, at full capacity (zeros)."""

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            """Return a zero tensor (batch_size, *shape)."""
            return torch.zeros(batch_size, *shape, device=device, dtype=dtype)

        usage = zeros(self.capacity if self.counts_usage else 0, dtype=torch.promote_types(dtype, torch.float32))
        hidden, compressed = (zeros(n, self.shape.dim) for n in (self.capacity, self.config.compressed_len))
        return CompressiveState(hidden, compressed, usage, zeros(dtype=torch.int64))

    def fit(self, state: CompressiveState | None, k: Tensor, hidden: Hidden | None = None) -> CompressiveState | None:
        """Cast the state to the dtype of this call's hidden states, after a call in another precision (autocast)."""
        return states.fit(state, k.dtype if hidden is None else hidden.x.dtype)

    def flops(self, length: int, batch_size: int = 1) -> int:
        """Count the FLOPs (2 per multiply-add) for `batch_size` rows, without the auxiliary loss.

        Covers attention of every segment, projecting the memory again, compression, and the projected distances.
        """
        shape, sizes = self.shape, self.sizes
        width, projection = shape.num_heads * shape.head_dim, 4 * shape.dim * shape.num_kv_heads * shape.head_dim
        border, tokens, visible = self._document(length)
        ended = border[tokens == sizes.segment]
        new_slots = sizes.closed_slots(ended + sizes.segment) - sizes.closed_slots(ended)
        row = self.compressor.flops(int((new_slots > 0).sum() * new_slots.max(initial=0)))
        if self.counts_usage:
            for queries, keys in zip(tokens.tolist(), visible.tolist(), strict=True):
                content, position = ops.relative_cost(queries, memory=keys)
                row += (6 * content + 4 * position) * width + projection * keys
        else:
            content, position = ops.compressive_cost(length, **sizes._asdict())
            row += (4 * content + 2 * position) * width + projection * int(sizes.closed_slots(border).max(initial=0))
        return batch_size * row + 2 * int((tokens + visible).max(initial=1)) * shape.dim * width

    def _document(self, length: int, first: int = 0) -> tuple[Array, Array, Array]:
        """Return start, token count and number of earlier keys of each segment of a document, from `first` on.

        The keys are those that the segment sees before its own tokens (slots and memory).
        """
        segment = self.config.segment
        border = np.arange(first - first % segment, length, segment)
        return border, np.minimum(segment, length - border), sum(self.sizes.visible(border))

    def pairs(self, length: int) -> int:
        """Count the attended pairs of a query and a token or slot, for `length` tokens, summed over query heads."""
        _, tokens, visible = self._document(length)
        return self.shape.num_heads * int((tokens * (tokens + 1) // 2 + tokens * visible).sum())
