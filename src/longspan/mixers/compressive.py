"""Compressive Transformer: what falls out of Transformer-XL's memory is compressed, `ratio` vectors to one slot.

    h~ = [SG(compressed), SG(memory), h],  q = h W_q,  k = h~ W_k,  v = h~ W_v
    at a segment's end: old = what leaves the memory,  compressed <- last slots of [compressed, f_c(old)]

One softmax over all three, with Transformer-XL's relative positions; distances count slots, so the newest slot stands
mem_len + 1 before the segment. Source: Rae et al. 2019, section 3, algorithms 1 and 2. For `mem_len + compressed_len`
keys of memory, tokens up to mem_len + ratio * compressed_len back are seen.

Memory holds hidden states, projected again at each use, so that W_k and W_v go on learning from it; gradients do not
pass a segment border (horizon 1). Segment borders are positions and compression happens there only. Vectors that left
the memory and do not fill a group yet (ratio - 1 at most) wait, seen by nobody; so any segment goes with any ratio.

The loss of the model never reaches f_c. f_c learns from an auxiliary loss, appended to `penalties` by calls that close
a segment: attention reconstruction, || attend(h, old) - attend(h, f_c(old)) ||^2 for the queries of the segment (those
of this call), content only, or auto-encoding, || old - g(f_c(old)) ||^2; both as means. Its gradients reach f_c (and g)
only. The parameters are an optimiser group of their own, "compressor".
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from longspan import host, ops
from longspan import state as states
from longspan.config import check_least
from longspan.errors import ConfigError
from longspan.mixers.base import Hidden, ParameterGroup, Shape, Traits
from longspan.mixers.choices import recording
from longspan.mixers.compressive_layout import (
    CompressiveState,
    Inputs,
    Piece,
    Sizes,
    attend,
    carry_usage,
    count_usage,
    lines_of,
    make_layout,
    pick,
)
from longspan.mixers.compressors import AuxiliaryLoss, Compressor
from longspan.mixers.linear import emptied_rows
from longspan.mixers.relative import NO_CONVERSION, RelativeCore
from longspan.mixers.rows import Rows


@dataclass(frozen=True, kw_only=True)
class CompressiveConfig:
    """Fields of `compressive`.

    Attributes:
        segment: positions of a segment.
        mem_len: positions before its segment that a token sees as they are.
        compressed_len: slots before them that it sees.
        ratio: vectors compressed to one slot.
        compression: "mean", "max", "conv", "dilated" or "most_used"; see `longspan.mixers.compressors`.
        loss: what a compression with parameters learns from: "attention" (the paper's best), "auto_encoding" or "none".
        loss_weight: of that loss.
        compressor_lr: learning rate of the compression's parameters; None = the run's.
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
            raise ConfigError(f"compressive.compressor_lr = {self.compressor_lr}: must be positive, or left out")


class CompressiveCore(RelativeCore):
    """See the module."""

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
            raise ConfigError("compressive: recurrence over segments is causal; there is no bidirectional form")
        # with no slots nothing is compressed, and a function without parameters stands for what would do it
        how = config.compression if config.compressed_len else "mean"
        self.compressor = Compressor(how, shape.dim, config.ratio, decode=config.loss == "auto_encoding")
        self.fields = {name: getattr(config, name) for name in ("segment", "mem_len", "compressed_len", "ratio")}
        self.reach = config.segment + config.mem_len + config.compressed_len
        waiting = config.ratio - 1 + self.compressor.context if config.compressed_len else 0
        self.capacity = waiting + config.mem_len + config.segment - 1
        self.counts_usage = config.compression == "most_used" and config.compressed_len > 0
        self.sizes = Sizes(**self.fields, context=self.compressor.context, capacity=self.capacity)

    @property
    def traits(self) -> Traits:
        """Bounded; gradients stay inside the segment; "most_used" selects; slots are made of hidden states."""
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
        """The compression's parameters."""
        parameters = list(self.compressor.parameters())
        return [ParameterGroup("compressor", parameters, lr=self.config.compressor_lr)] if parameters else []

    # -- what is where ---------------------------------------------------------------------------------------------

    def _pieces(self, rows: Rows) -> list[Piece]:
        """The call cut at the segment borders; the same for all layers."""
        segment = self.config.segment

        def plain() -> list[Piece]:
            first, pieces, column = rows.offset_range[0], [], 0
            while column < rows.length:
                end = min(rows.length, column + segment - (first + column) % segment)
                if (first + column) % segment == 0 and not self.counts_usage:
                    end = rows.length  # without usage, segments do not wait for each other
                offset = host.remember(rows.offset + column, rows.offsets + column)
                pieces.append(Piece(slice(column, end), None, Rows(offset, end - column)))
                column = end
            return pieces

        def spread() -> list[Piece]:
            layout = rows.segments(segment)
            position, live, pieces = layout.spread_positions(), rows.offsets, []
            for column in range(0, layout.columns, segment):
                here = slice(column, column + segment)
                begins = position[:, column] == 1
                offset = host.put(np.where(begins, 0, live), rows.device)
                part = Rows(offset, segment, host.put(position[:, here] > 0, rows.device))
                pieces.append(Piece(here, host.put(begins, rows.device) if begins.any() else None, part))
                live = part.lives
            return pieces

        return rows.cached(("compressive", segment, self.counts_usage), plain if rows.plain else spread)

    # -- the call --------------------------------------------------------------------------------------------------

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: CompressiveState | None,
        rows: Rows,
        *,
        hidden: Hidden | None = None,
        penalties: list[Tensor] | None = None,
    ) -> tuple[Tensor, CompressiveState]:
        """See `Core.forward`."""
        assert hidden is not None, "compressive projects hidden states"
        segment, loss = self.config.segment, None
        if penalties is not None and self._learns():
            loss = AuxiliaryLoss(self.compressor, self.config.loss)
        inside = rows.inside(segment)
        distances = self._distances(rows)
        folded = inside and not self.counts_usage and self.folds(q, distances, k, v)
        r = None if folded else self.relative(distances, rows)
        given = Inputs(q, k, v, hidden.x, hidden.project, r, loss)
        if inside:
            out, state = self._inside(given, state, rows)
        elif rows.plain or self.counts_usage:
            out, state = self._in_pieces(given, state, rows)
        else:
            out, state = self._in_parts(given, state, rows)
        lost = None if loss is None else loss.mean()
        if penalties is not None and lost is not None:
            penalties.append(self.config.loss_weight * lost)
        return out, state

    def _learns(self) -> bool:
        config = self.config
        wanted = self.compressor.learns and config.loss != "none" and config.loss_weight > 0
        return wanted and config.compressed_len > 0 and (torch.is_grad_enabled() or recording())

    def _distances(self, rows: Rows) -> int:
        """Distances that pairs of the call have at most."""
        if not rows.plain:
            return self.reach
        first, most = rows.offset_range[0], 1
        for border in range(first - first % self.config.segment, first + rows.length, self.config.segment):
            end = min(border + self.config.segment, first + rows.length)
            most = max(most, end - border + sum(self.sizes.seen(border)))
            if most == self.reach:
                break
        return most

    def _in_pieces(self, given: Inputs, state: CompressiveState | None, rows: Rows) -> tuple[Tensor, CompressiveState]:
        """A call that reaches over segment borders or begins documents."""
        parts: tuple[Tensor, ...] = given[:4]
        layout, outs = None, []
        if not rows.plain:
            layout = rows.segments(self.config.segment)
            parts = tuple(layout.spread(t) for t in parts)
        q, k, v = (t.transpose(1, 2) for t in parts[:3])
        if state is None:
            state = self.init_state(rows.batch, q.device, given.x.dtype)
        for columns, begins, part in self._pieces(rows):
            if begins is not None:
                kept = [t.masked_fill(begins.view(-1, *(1,) * (t.ndim - 1)), 0) for t in state]
                state = CompressiveState(kept[0], kept[1], kept[2], kept[3])
            if not part.length:
                outs.append(torch.zeros_like(q[:, columns]))
                continue
            heads = [part.gather(t[:, columns]).transpose(1, 2) for t in (q, k, v)]
            inner = given._replace(q=heads[0], k=heads[1], v=heads[2], x=part.gather(parts[3][:, columns]))
            many = part.plain and part.length > self.config.segment
            out, state = (self._aligned if many else self._inside)(inner, state, part)
            outs.append(part.scatter(out.transpose(1, 2)))
        out = (torch.cat(outs, 1) if outs else torch.zeros_like(q)).transpose(1, 2)
        if layout is not None:
            out = layout.collect(out)
        left = [emptied_rows(rows, t) for t in state[:3]]
        return out, CompressiveState(left[0], left[1], left[2], rows.live)

    def _inside(self, given: Inputs, state: CompressiveState | None, rows: Rows) -> tuple[Tensor, CompressiveState]:
        """A call within the open segment of every row, to its end at most."""
        q, k, v, _, project, r, _ = given
        past, memory_lengths = self._past(state, rows)
        if past is not None:
            old_k, old_v = project(past)
            k, v = torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)
        seen: dict[str, Any] = {"lengths": rows.lengths, "memory_lengths": memory_lengths}
        if r is None:
            scores = self.position_scores(q, k.shape[2], rows)
            out = ops.relative_decode(q, k, v, scores, self.content_bias, **seen)
            return out, self._next(given, state, None, rows)
        biases = r, self.content_bias, self.position_bias
        out = ops.relative_attention(q, k, v, *biases, **seen)
        usage = ops.attention_usage(q, k, *biases, **seen) if self.counts_usage else None
        return out, self._next(given, state, usage, rows)

    def _past(self, state: CompressiveState | None, rows: Rows) -> tuple[Tensor | None, Tensor | None]:
        """Hidden states (batch, columns, dim) that the call sees besides its own; how many are real, newest last."""
        if state is None or not rows.batch:
            return None, None
        low, high = rows.offset_range
        segment, capacity = self.config.segment, self.capacity
        if low == high:
            opened = low % segment
            slots, older = self.sizes.seen(low - opened)
            if not slots + older + opened:
                return None, None
            near = state.hidden[:, capacity - older - opened :]
            return (torch.cat([state.compressed[:, -slots:], near], 1) if slots else near), None

        def layout() -> tuple[Tensor, Tensor]:
            opened = rows.offsets % segment
            slots, older = self.sizes.seen(rows.offsets - opened)
            near, count = older + opened, slots + older + opened
            back = np.arange(count.max(), 0, -1)
            far = self.config.compressed_len + near[:, None] - back  # among the slots
            place = np.where(back <= near[:, None], self.config.compressed_len + capacity - back, far)
            return host.put(place.clip(min=0), rows.device), host.put(count, rows.device)

        place, count = rows.cached(("compressive past", self.sizes), layout)
        if not place.shape[1]:
            return None, None
        joined = torch.cat([state.compressed, state.hidden], 1)
        return joined.gather(1, place[..., None].expand(-1, -1, joined.shape[2])), count

    def _aligned(self, given: Inputs, state: CompressiveState, rows: Rows) -> tuple[Tensor, CompressiveState]:
        """Several segments at once, from a border on, the rows laid out alike: slots are made of inputs alone."""
        q, k, v, x, project, r, loss = given
        assert r is not None, "only a call within the open segment folds queries"
        config, first, stale = self.config, rows.offset_range[0], None
        new, spans = self._all_slots(state, x, rows, trains=loss is not None)
        before, last = self.sizes.closed(first), first + (rows.length - 1) // config.segment * config.segment
        held = min(before, config.compressed_len)
        slots = torch.cat([state.compressed[:, config.compressed_len - held :], new.detach()], 1)
        slots_k, slots_v = project(slots[:, : held + self.sizes.closed(last) - before])
        older = min(first, config.mem_len)
        past = state.hidden[:, self.capacity - older :].detach()
        if torch.is_grad_enabled():
            stale = project(torch.cat([past, x.detach()], 1))
            past_k, past_v = (t[:, :, :older].detach() for t in stale)
        else:
            past_k, past_v = project(past)
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        out = ops.compressive_attention(
            q,
            k,
            v,
            slots_k,
            slots_v,
            r,
            self.content_bias,
            self.position_bias,
            **self.fields,
            position=first,
            stale=stale,
        )
        for number, (low, high, old) in enumerate(spans):
            if loss is not None and low < high:
                queries = q[:, :, number * config.segment : (number + 1) * config.segment]
                groups, lengths = (torch.full_like(rows.offset, n) for n in (high - low, config.segment))
                loss.add(old, new[:, low:high], queries, project, groups, lengths)
        compressed = torch.cat([state.compressed, new.detach()], 1)[:, new.shape[1] :].clone()
        return out, CompressiveState(self._carry_hidden(state, x, rows), compressed, state.usage, rows.live)

    def _in_parts(self, given: Inputs, state: CompressiveState | None, rows: Rows) -> tuple[Tensor, CompressiveState]:
        """Rows laid out unlike each other, over segment borders and documents, all segments at once."""
        q, k, v, x, project, r, loss = given
        assert r is not None, "only a call within the open segment folds queries"
        if state is None:
            state = self.init_state(rows.batch, x.device, x.dtype)
        context, sizes = self.compressor.context, self.sizes
        layout = rows.cached(("compressive layout", sizes), lambda: make_layout(rows, sizes))
        lines = torch.cat([state.hidden, x], 1).detach().flatten(0, 1)
        made = lines[:0]
        if len(layout.groups):
            old = lines.index_select(0, layout.old.clamp(min=0).flatten()).unflatten(0, layout.old.shape)
            old = old.masked_fill((layout.old < 0)[..., None], 0.0)
            with torch.set_grad_enabled(loss is not None):
                new = self.compressor(old).to(old.dtype)
            if loss is not None:
                queries = pick(lines_of(q), layout.queries)
                loss.add(old[:, context:], new, queries, project, layout.groups, layout.lengths)
            made = new.detach().flatten(0, 1)
        slots = torch.cat([state.compressed.flatten(0, 1), made, lines.new_zeros(1, lines.shape[1])])
        stale = None
        if torch.is_grad_enabled():
            stale = project(torch.cat([state.hidden, x], 1).detach())
        if stale is None or state.hidden.requires_grad:
            old_k, old_v = project(state.hidden)
        else:
            old_k, old_v = (t[:, :, : self.capacity] for t in stale)
        own = torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)
        out = attend(layout, q, project(slots[None]), stale or own, own, (r, self.content_bias, self.position_bias))
        compressed = slots.index_select(0, layout.carried.flatten()).unflatten(0, layout.carried.shape)
        return out, CompressiveState(self._carry_hidden(state, x, rows), compressed, state.usage, rows.live)

    def _all_slots(
        self, state: CompressiveState, x: Tensor, rows: Rows, *, trains: bool
    ) -> tuple[Tensor, list[tuple[int, int, Tensor]]]:
        """Slots that a call makes, and for every segment that ends: which of them, and what they are made of."""
        config, context, first = self.config, self.compressor.context, rows.offset_range[0]
        ends = range(first + config.segment, first + rows.length + 1, config.segment)
        made = [self.sizes.closed(end) for end in ends]
        before = self.sizes.closed(first)
        if made[-1] == before:
            return x[:, :0], [(0, 0, x[:, :0]) for _ in made]
        joined = torch.cat([state.hidden, x], 1).detach()
        column = self.capacity - first + before * config.ratio
        old = joined[:, column - context : column + (made[-1] - before) * config.ratio]
        with torch.set_grad_enabled(trains):
            new = self.compressor(old).to(old.dtype)
        edges = [0, *(each - before for each in made)]
        spans = [(a, b, old[:, context + a * config.ratio : context + b * config.ratio]) for a, b in pairwise(edges)]
        return new, spans

    # -- what is carried on ----------------------------------------------------------------------------------------

    def _next(
        self, given: Inputs, state: CompressiveState | None, received: Tensor | None, rows: Rows
    ) -> CompressiveState:
        segment, x = self.config.segment, given.x
        if state is None:
            state = self.init_state(rows.batch, x.device, x.dtype)
        closes = rows.closes(segment)
        usage = state.usage if received is None else count_usage(state.usage, received, closes, rows, self.sizes)
        compressed = state.compressed
        if self.config.compressed_len and (rows.offsets % segment + rows.lengths_read == segment).any():
            compressed = self._compress(given, state, usage, closes, rows)
        carried = self._carry_hidden(state, x, rows)
        if received is not None:
            usage = carry_usage(usage, closes, rows, self.sizes)
        compressed, usage = emptied_rows(rows, compressed), emptied_rows(rows, usage)
        return CompressiveState(carried, compressed, usage, rows.live)

    def _carry_hidden(self, state: CompressiveState, x: Tensor, rows: Rows) -> Tensor:
        """What lies before the open segment is memory: it is read, not trained through."""
        carried = rows.carry(state.hidden, x, self.capacity)
        if not carried.requires_grad:
            return carried
        slot = torch.arange(self.capacity, device=x.device)
        is_open = slot >= (self.capacity - rows.live % self.config.segment)[:, None]
        some = self.capacity > 0 and (rows.lives % self.config.segment).any()
        return torch.where(is_open[..., None], carried, carried.detach()) if some else carried.detach()

    def _compress(self, given: Inputs, state: CompressiveState, usage: Tensor, closes: Tensor, rows: Rows) -> Tensor:
        """The compressed memory after the segments that end here."""
        config, context, loss = self.config, self.compressor.context, given.loss
        before, groups = self.sizes.groups(closes, rows.offset)
        closing = rows.offsets % config.segment + rows.lengths_read == config.segment
        most = int(self.sizes.groups(closing, rows.offsets)[1].max())
        if not most:
            return state.compressed
        joined = torch.cat([state.hidden, given.x], 1).detach()
        position = (before * config.ratio - context)[:, None] + torch.arange(
            context + most * config.ratio, device=joined.device
        )
        column = (self.capacity - rows.offset[:, None] + position).clamp(0, joined.shape[1] - 1)
        old = joined.gather(1, column[..., None].expand(-1, -1, joined.shape[2]))
        if context:
            old = old.masked_fill((position < 0)[..., None], 0.0)
        with torch.set_grad_enabled(loss is not None):
            if self.counts_usage:
                new = self.compressor(old, usage.gather(1, column), groups)
            else:
                new = self.compressor(old).to(old.dtype)
        if loss is not None:
            loss.add(old[:, context:], new, given.q, given.project, groups, rows.real_tokens())
        slot = torch.arange(config.compressed_len, device=joined.device) + groups[:, None]
        place = slot[..., None].expand(-1, -1, joined.shape[2])
        return torch.cat([state.compressed, new.detach()], 1).gather(1, place)

    # -- what it costs ---------------------------------------------------------------------------------------------

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype) -> CompressiveState:
        """Full capacity, nothing live."""

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(batch_size, *shape, device=device, dtype=dtype)

        usage = zeros(self.capacity if self.counts_usage else 0, dtype=torch.promote_types(dtype, torch.float32))
        hidden, compressed = (zeros(n, self.shape.dim) for n in (self.capacity, self.config.compressed_len))
        return CompressiveState(hidden, compressed, usage, zeros(dtype=torch.int64))

    def fit(self, state: CompressiveState | None, k: Tensor, hidden: Hidden | None = None) -> CompressiveState | None:
        """See `Core.fit`; what is carried are hidden states."""
        return states.fit(state, k.dtype if hidden is None else hidden.x.dtype)

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype) -> int:
        """`capacity` vectors, `compressed_len` slots, a count a row, and a number a vector of "most_used"."""
        vectors = (self.capacity + self.config.compressed_len) * self.shape.dim * dtype.itemsize
        usage = self.capacity * max(dtype.itemsize, 4) if self.counts_usage else 0
        return batch_size * (vectors + usage + 8)

    def flops(self, length: int, batch_size: int = 1) -> int:
        """Attention of every segment, memory projected again, compression, the distances; no auxiliary loss."""
        config, shape = self.config, self.shape
        width, projected = shape.num_heads * shape.head_dim, 4 * shape.dim * shape.num_kv_heads * shape.head_dim
        last = max(0, length - 1) // config.segment * config.segment
        most = max((size + sum(self.sizes.seen(border)) for border, size in self._sizes(length)), default=1)
        row = self.compressor.flops(self.sizes.closed(length // config.segment * config.segment))
        if self.counts_usage:
            for border, size in self._sizes(length):
                content, position = ops.relative_cost(size, memory=sum(self.sizes.seen(border)))
                row += (6 * content + 4 * position) * width + projected * sum(self.sizes.seen(border))
        else:
            content, position = ops.compressive_cost(length, **self.fields)
            row += (4 * content + 2 * position) * width + projected * self.sizes.closed(last)
        return batch_size * row + 2 * most * shape.dim * width

    def _sizes(self, length: int) -> list[tuple[int, int]]:
        """The border at which each segment of a document begins, and the segment's tokens."""
        segment = self.config.segment
        return [(border, min(segment, length - border)) for border in range(0, length, segment)]

    def pairs(self, length: int) -> int:
        """Pairs of the definition, a head: a token, and the slots and positions that it sees."""
        total: int = sum(n * (n + 1) // 2 + n * sum(self.sizes.seen(border)) for border, n in self._sizes(length))
        return self.shape.num_heads * total
