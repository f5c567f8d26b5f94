"""Recurrent memory: a model of short segments made endless by memory tokens that it reads and writes itself.

Encoder form (Bulatov et al. 2023, section 2), one block in front, read and written at once:

    [memory', hidden] = backbone([memory, segment])

Decoder form (Bulatov et al. 2022, section 3), read block first, write block last, so that no token sees the writing:

    [., hidden, memory'] = backbone([memory, segment, memory])

The next memory is made of memory' by an update: the paper's overwrite, or a gate that does not forget
(`longspan.models.memory_update`). With `accumulate` (AutoCompressor, Chevalier et al. 2023, section 3) every closed
segment adds summary vectors, written from learned tokens, and the last `max_summaries` segments' are read. With
`per_layer` (ARMT, Rodkin et al. 2024) every layer has a memory of its own (`longspan.models.layer_memory`).

Positions: to the backbone, memory and segment are one sequence. Read tokens take positions 0 .. m - 1, the real tokens
of the segment follow from m on, and write tokens come right behind the last of them.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from longspan import host
from longspan import state as states
from longspan.config import from_dict
from longspan.contract.gradients import with_gradients
from longspan.contract.maps import place_of, table_of
from longspan.errors import UnsupportedError
from longspan.mixers import BatchLayout, Traits
from longspan.models.backbone import Backbone, wrap_backbone
from longspan.models.config import RecurrentConfig
from longspan.models.decoder import Decoder, last_of_each_row
from longspan.models.encoder import Encoder
from longspan.models.head import AdaptiveHead, CalledHead, Head
from longspan.models.layer_memory import LayerMemory
from longspan.models.segmenting import Segment, cut_segments, lay_out
from longspan.models.token_memory import Carried, TokenMemory, Trace, cut_graph
from longspan.models.wrappers import unwrapped


class RecurrentState(NamedTuple):
    """What is carried between calls.

    Attributes:
        memory: (batch, columns, dim): the memory tokens; with `accumulate` all summaries, newest last; with
            `per_layer` (batch, layers, features, dim).
        mass: (batch, num_memory_tokens) fp32, the evidence behind each memory token; with `per_layer` the normalizers
            (batch, layers, features).
        written: (batch,) int64, segments closed since the last reset.
        tokens: (batch, segment_length - 1) int64, ids of the last tokens, newest last; the open segment is among them.
        backbone: the backbone's state of the open segment (decoder form over a Decoder), else None.
        live: (batch,) int64, live tokens.
    """

    memory: Tensor
    mass: Tensor
    written: Tensor
    tokens: Tensor
    backbone: Any
    live: Tensor

    def accumulators(self) -> tuple[str, ...]:
        """Fields that are fp32 at least: with `per_layer` the memories too."""
        return ("memory", "mass") if self.memory.ndim == 4 else ("mass",)


def _reads(state: RecurrentState | None) -> dict[Hashable, Tensor]:
    """Counts of a state that lay a call out."""
    if state is None:
        return {}
    reads: dict[Hashable, Tensor] = {"written": state.written}
    return reads if state.backbone is None else {**reads, "backbone": state.backbone.live}


class RecurrentMemory(nn.Module):
    """A backbone made recurrent over segments by memory tokens.

    Args:
        backbone: a Decoder, an Encoder, or a Hugging Face model that takes `inputs_embeds`.
        config: how; None takes `fields`.
        fields: those of `RecurrentConfig`: num_memory_tokens, segment_length, bptt_segments, update, ...

    Args of a call:
        tokens: (batch, length) token ids.
        state: what the last call returned; None = empty past.
        mask, reset, penalties: as in a Decoder.
        flush: show the outputs of the open segment as if it ended here (encoder form; the decoder form always does).
            The returned state is the same with and without, so the stream may go on.
        traces: a list to which a `Trace` of every segment is appended.

    Returns of a call:
        What the backbone returns, logits or hidden states (batch, length, ...), and the next state. Zeros at padding,
        and in the encoder form at tokens whose segment is still open: those are never shown later.

    Raises:
        ConfigError: an unknown field or a value that does not fit; a module that is no backbone.
    """

    def __init__(self, backbone: nn.Module, config: RecurrentConfig | None = None, **fields: Any) -> None:
        super().__init__()
        own = from_dict(RecurrentConfig, fields, "RecurrentMemory")
        self.config = own if config is None else replace(config, **fields)
        # what stands around a model stays outside: its adapters act inside, its own face knows no segments
        backbone = unwrapped(backbone)
        inner = getattr(backbone, "model", None)
        backbone = self.backbone = inner if isinstance(inner, (Decoder, Encoder)) else backbone
        self._adapter = [wrap_backbone(backbone)]  # in a list, so that it is no second owner of the parameters
        self.cell: TokenMemory | LayerMemory
        if self.config.per_layer:
            self.cell = LayerMemory(self.config, self.adapter)
        else:
            self.cell = TokenMemory(self.config, self.adapter.dim, self.adapter.embedding_std())
        like = next((p for p in backbone.parameters() if p.is_floating_point()), None)
        if like is not None:  # a memory is read as embeddings are
            self.cell.to(like.device, like.dtype)

    @property
    def adapter(self) -> Backbone:
        """The backbone behind its interface."""
        if self._adapter[0].module is not self.backbone:  # copied, or replaced by a wrapper
            self._adapter = [wrap_backbone(self.backbone)]
        return self._adapter[0]

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self.adapter.vocab_size

    @property
    def memory(self) -> nn.Embedding:
        """The learned memory tokens (num_memory_tokens, dim)."""
        return self.cell.tokens

    @property
    def update(self) -> nn.Module:
        """How a segment changes the memory."""
        return self.cell.update

    @property
    def traits(self) -> Traits:
        """What this model promises; in the encoder form outputs appear when a segment closes."""
        return Traits(
            causal=self.adapter.causal,
            bidirectional=False,
            streams=self.config.alignment == "left",
            bounded=True,
            segment=self.config.segment_length,
            horizon=self.config.bptt_segments,
        )

    def why_no_stream(self) -> str:
        """Why this model does not stream, where it does not."""
        return "" if self.traits.streams else "alignment = 'right' needs the whole text in one call; 'left' streams"

    def forward(
        self,
        tokens: Tensor,
        state: RecurrentState | None = None,
        *,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        aux_losses: list[Tensor] | None = None,
        flush: bool = False,
        traces: list[Trace] | None = None,
    ) -> tuple[Tensor, RecurrentState | None]:
        """See the class."""
        (hidden, seen), next_state, rows = self.run(
            tokens, state, mask=mask, reset=reset, aux_losses=aux_losses, flush=flush, traces=traces
        )
        out = self.adapter.output(hidden)
        return rows.scatter(out if seen is None else out.masked_fill(~seen, 0)), next_state

    def hidden(
        self, tokens: Tensor, state: RecurrentState | None = None, **call: Any
    ) -> tuple[Tensor, RecurrentState | None]:
        """Like a call, but what logits are made of: hidden states (batch, length, dim), zeros where logits are."""
        (h, seen), next_state, rows = self.run(tokens, state, **call)
        return rows.scatter(h if seen is None else h.masked_fill(~seen, 0)), next_state

    def head(self) -> Head | CalledHead | AdaptiveHead:
        """The backbone's output layer; an UnsupportedError where it has none that is a linear map."""
        return self.adapter.head()

    @host.eager
    def run(
        self,
        tokens: Tensor,
        state: RecurrentState | None = None,
        *,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        aux_losses: list[Tensor] | None = None,
        flush: bool = False,
        traces: list[Trace] | None = None,
    ) -> tuple[tuple[Tensor, Tensor | None], RecurrentState | None, BatchLayout]:
        """A call up to the hidden states: ((B, N, dim) hidden, (B, N, 1) bool shown), the next state, the rows."""
        stream = self.config.alignment == "left"
        with states.all_or_nothing():
            size = self._size(state)
            offset = states.live(state, tokens.shape[0], tokens.device)
            rows = BatchLayout(offset, tokens.shape[1], mask, reset, reads=_reads(state))
            ids = rows.gather(tokens)
            layout = lay_out(rows, size, self.config.alignment)
            old = None if state is None or not stream else state.tokens
            flushed = flush or self.adapter.causal
            segments = cut_segments(layout, rows, ids, old, stream=stream, flush=flushed, ended=self._varies)
            shown, carried, new_traces = self._all(segments, self._carried(state, rows), aux_losses)
            if traces is not None:
                traces += new_traces
            self._penalise(new_traces, aux_losses)
            next_state = self._next(state, carried, ids, rows)
            if not segments:
                hidden = carried.memory.new_zeros(*ids.shape, self.adapter.dim, dtype=place_of(self).dtype)
                return (hidden, None), next_state, rows
            # nothing is written where no segment closes, nor read in the first
            laid = torch.cat(shown, 1) if len(shown) > 1 else shown[0]
            hidden = with_gradients(layout.collect(laid), self.cell)
            if all(segment.whole for segment in segments):
                return (hidden, None), next_state, rows
            seen = layout.collect(torch.cat([(s.shown[:, None] & s.fresh)[..., None] for s in segments], 1))
            return (hidden, seen), next_state, rows

    def last(
        self, tokens: Tensor, state: RecurrentState | None = None, **call: Any
    ) -> tuple[Tensor, RecurrentState | None]:
        """Like a call of the decoder form, but only the logits (batch, vocab_size) of each row's last real token."""
        (hidden, _), next_state, rows = self.run(tokens, state, flush=True, **call)
        return self.adapter.output(last_of_each_row(hidden, rows)), next_state

    def _all(
        self, segments: list[Segment], carried: Carried, aux_losses: list[Tensor] | None
    ) -> tuple[list[Tensor], Carried, list[Trace]]:
        """Segment after segment, or along diagonals: hidden states, what is carried on, what the memory did."""
        if not segments:
            return [], carried, []
        active = np.stack([host.known(segment.fresh).any(1) | host.known(segment.closed) for segment in segments])
        left, horizon = active[::-1].cumsum(0)[::-1], self.config.bptt_segments
        cell, diagonal = self.cell, self.config.diagonal
        if (
            diagonal
            and isinstance(cell, LayerMemory)
            and cell.can_batch(self.adapter, segments, aux_losses is not None)
        ):
            return cell.diagonals(self.adapter, segments, self._begin(segments[0], carried), left, horizon)
        shown: list[Tensor] = []
        traces: list[Trace] = []
        for index, segment in enumerate(segments):
            carried = cut_graph(self._begin(segment, carried), left[index], horizon)
            if not (segment.whole or host.some(segment.closed) or host.some(segment.shown)):
                shown.append(carried.memory.new_zeros(*segment.ids.shape, self.adapter.dim, dtype=place_of(self).dtype))
                continue
            if not index and not host.some(segment.resumed):
                carried = carried._replace(backbone=None)  # nothing of an open segment is in it
            hidden, carried, trace = cell.step(self.adapter, segment, carried, aux_losses)
            shown.append(hidden)
            traces.append(trace)
        return shown, carried, traces

    def _penalise(self, traces: list[Trace], aux_losses: list[Tensor] | None) -> None:
        if aux_losses is None or not self.config.gate_penalty:
            return
        for trace in traces:
            if trace.logits is not None:
                opened = trace.logits.clamp(min=0).mean(1).masked_fill(~trace.closed, 0)
                aux_losses.append(self.config.gate_penalty * opened.mean() / len(traces))

    @contextlib.contextmanager
    def segments_of(self, size: int) -> Iterator[None]:
        """Segments of another length for a while, as a curriculum wants them; such a call takes no earlier state."""
        config, self.config = self.config, replace(self.config, segment_length=size)
        try:
            yield
        finally:
            self.config = config

    @property
    def _varies(self) -> bool:
        return self.training and self.config.vary > 0

    def _size(self, state: RecurrentState | None) -> int:
        if state is not None and (self.config.alignment == "right" or self._varies):
            right = "right alignment needs the whole text at once"
            why = right if self.config.alignment == "right" else "vary is for whole texts"
            raise UnsupportedError(f"RecurrentMemory: {why}, so it takes no state")
        if not self._varies:
            return self.config.segment_length
        least = max(1, round((1 - self.config.vary) * self.config.segment_length))
        return int(torch.randint(least, self.config.segment_length + 1, ()))

    def _begin(self, segment: Segment, carried: Carried) -> Carried:
        """Empty the memory of rows in which a document begins with this segment."""
        begins = segment.begins
        if not host.some(begins):
            return carried
        written = host.derive(lambda before, begin: before * ~begin, carried.written, begins)
        return carried.put(begins, *self.cell.empty(len(begins), carried.memory))._replace(written=written)

    def _carried(self, state: RecurrentState | None, rows: BatchLayout) -> Carried:
        """What the call begins with; its counts know their values."""
        if state is None:
            memory, mass = self.cell.empty(rows.batch)
            return Carried(memory, mass, host.put(np.zeros(rows.batch, np.int64), memory.device), None)
        memory, mass = self.cell.fit(state.memory, state.mass)
        read, backbone = rows.read(_reads(state)), state.backbone
        if backbone is not None:
            backbone = backbone._replace(live=host.remember(backbone.live.view_as(backbone.live), read["backbone"]))
        return Carried(memory, mass, host.remember(state.written.view_as(state.written), read["written"]), backbone)

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> RecurrentState:
        """The state of an empty past; device and dtype default to those of the parameters."""
        weight = table_of(self.memory, self.config.num_memory_tokens)
        memory, mass = self.cell.empty(batch_size, weight.to(device=device, dtype=dtype))
        zeros = torch.zeros(batch_size, dtype=torch.int64, device=device or weight.device)
        tokens = zeros.new_zeros(batch_size, self.config.segment_length - 1)
        backbone = self.adapter.init_state(batch_size, device=device, dtype=dtype)
        return RecurrentState(memory.to(zeros.device), mass.to(zeros.device), zeros, tokens, backbone, zeros.clone())

    def _next(
        self, state: RecurrentState | None, carried: Carried, ids: Tensor, rows: BatchLayout
    ) -> RecurrentState | None:
        if self.config.alignment == "right" or self._varies:
            return None
        width = self.config.segment_length - 1
        tokens = rows.carry(None if state is None else state.tokens[..., None], ids[..., None], width)
        if rows.emptied is not None:
            carried = carried.put(rows.emptied, *self.cell.empty(rows.batch, carried.memory))
            carried = carried._replace(written=carried.written.masked_fill(rows.emptied, 0))
        memory, mass, written, backbone = carried
        if self.adapter.streams and backbone is None:
            backbone = self.adapter.init_state(rows.batch)
        if backbone is not None:  # of their own, as nothing outside a call knows its values
            backbone = backbone._replace(live=backbone.live.view_as(backbone.live))
        return RecurrentState(memory, mass, written.view_as(written), tokens[..., 0], backbone, rows.live)

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype = torch.float32) -> int:
        """Exact bytes of the state after `length` live tokens in every row, counts included."""
        size = self.config.segment_length
        own = self.cell.state_nbytes(batch_size, dtype.itemsize) + batch_size * 8 * (2 + size - 1)
        front, _ = self.cell.widths(self.adapter.causal, length // size)
        inside = front + length % size if length % size else 0
        return own + self.adapter.state_nbytes(batch_size, inside, dtype)

    def flops(self, length: int, *, batch_size: int = 1) -> int:
        """FLOPs (2 per multiply-add) of one forward of `length` tokens from an empty past, with `flush`.

        Raises:
            UnsupportedError: the backbone is not of this library.
        """
        positions, size = batch_size * length, self.config.segment_length
        # an open segment is embedded as wide as a whole one
        embedded = batch_size * -(-length // size) * size
        adapter, cell = self.adapter, self.cell
        total = self._sum(length, lambda width: adapter.flops(width, batch_size) + cell.flops(width, batch_size))
        assert isinstance(self.backbone, (Decoder, Encoder))
        return total + self.backbone.embed_flops(embedded) + self.backbone.output_flops(positions)

    def pairs(self, length: int) -> int:
        """Attended (query, key) pairs of one row: those of the backbone over its segments with their memory tokens."""
        return self._sum(length, self.adapter.pairs)

    def _sum(self, length: int, cost: Callable[[int], int]) -> int:
        """The cost of all segments, given that of a run over so many columns."""
        count, rest = divmod(length, self.config.segment_length)
        causal, size = self.adapter.causal, self.config.segment_length
        total = opened = 0
        if rest and self.config.alignment == "right":
            # the remainder comes first, and closes as the others do
            total, opened = cost(sum(self.cell.widths(causal, 0)) + rest), 1
        last = opened + count
        # accumulated summaries are read as they come; from `steady` on every segment is alike
        steady = max(opened, min(last, self.config.max_summaries if self.config.accumulate else 0))
        total += sum(cost(sum(self.cell.widths(causal, index)) + size) for index in range(opened, steady))
        if last > steady:
            total += (last - steady) * cost(sum(self.cell.widths(causal, last)) + size)
        if rest and not opened:
            front, back = self.cell.widths(causal, count)
            total += cost(front + rest + (0 if causal else back))
        return total

    def num_parameters(self) -> int:
        """Parameters, shared ones once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def after_step(self, step: int, generator: torch.Generator | None = None) -> None:
        """Call after each optimiser step (1, 2, ...): what the backbone does between steps."""
        self.adapter.after_step(step, generator)

    @property
    def redraw_count(self) -> int:
        """Changes whenever the backbone redraws its random projections, which voids carried states."""
        return self.adapter.redraw_count

    def parameter_groups(self, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for a torch optimiser: the backbone's, and the memory's without weight decay."""
        groups = self.adapter.parameter_groups(lr=lr, weight_decay=weight_decay)
        own = [parameter for parameter in self.cell.parameters() if parameter.requires_grad]
        return [*groups, {"name": "memory", "params": own, "lr": lr, "weight_decay": 0.0}]
