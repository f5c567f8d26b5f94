"""Recurrent memory: a model of short segments reads texts of any length by memory tokens that it reads and writes
itself.

Encoder form (Bulatov et al. 2023, section 2), one block in front, read and written at once:

    [memory', hidden] = backbone([memory, segment])

Decoder form (Bulatov et al. 2022, section 3), read block first, write block last, so that no token sees the writing:

    [., hidden, memory'] = backbone([memory, segment, memory])

An update turns memory' into the next memory: the paper's overwrite, or a gate that does not forget
(`longspan.models.memory_update`). With `accumulate` (AutoCompressor, Chevalier et al. 2023, section 3) every completed
segment adds summary vectors, written from learned tokens, and those of the last `max_summaries` segments are read. With
`per_layer` (ARMT, Rodkin et al. 2024) every layer has its own memory (`longspan.models.layer_memory`).

Positions: for the backbone, memory and segment are one sequence. Read tokens have positions 0 .. m - 1, the real tokens
of the segment follow from m on, and write tokens come right after the last of them.
"""

import contextlib
import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from longspan import host
from longspan import state as states
from longspan.config import from_dict
from longspan.contract.explain import Diagnostic
from longspan.contract.gradients import with_gradients
from longspan.contract.maps import device_and_dtype, table_of
from longspan.errors import UnsupportedError
from longspan.mixers import BatchLayout, Traits
from longspan.models.backbone import Backbone, wrap_backbone
from longspan.models.config import RecurrentConfig
from longspan.models.decoder import Decoder, last_of_each_row
from longspan.models.encoder import Encoder
from longspan.models.head import AdaptiveHead, CalledHead, Head
from longspan.models.layer_memory import LayerMemory
from longspan.models.memory_update import GatedUpdate
from longspan.models.segmenting import Segment, cut_segments, segment_layout
from longspan.models.token_memory import CarriedMemory, TokenMemory, Trace, cut_graph
from longspan.models.wrappers import unwrapped


class RecurrentState(NamedTuple):
    """State of a recurrent memory between calls.

    Attributes:
        memory: (batch, columns, dim): the memory tokens; with `accumulate` all summaries, newest last; with `per_layer`
            (batch, layers, features, dim).
        mass: (batch, num_memory_tokens) fp32, the evidence for each memory token; with `per_layer` the normalizers
            (batch, layers, features).
        written: (batch,) int64, segments completed since the last reset.
        tokens: (batch, segment_length - 1) int64, ids of the last tokens, newest last; the last of them belong to the
            current segment.
        backbone: the backbone's state of the current segment (decoder form over a Decoder), else None.
        live: (batch,) int64, live tokens (real tokens since the last reset).
    """

    memory: Tensor
    mass: Tensor
    written: Tensor
    tokens: Tensor
    backbone: Any
    live: Tensor

    def accumulators(self) -> tuple[str, ...]:
        """Return the names of fields that stay in fp32 at least; with `per_layer` they include the memories."""
        return ("memory", "mass") if self.memory.ndim == 4 else ("mass",)


def _layout_inputs(state: RecurrentState | None) -> dict[Hashable, Tensor]:
    """Return the counts of a state that decide the layout of a call."""
    if state is None:
        return {}
    reads: dict[Hashable, Tensor] = {"written": state.written}
    return reads if state.backbone is None else {**reads, "backbone": state.backbone.live}


class RecurrentMemory(nn.Module):
    """A backbone made recurrent over segments by memory tokens.

    Args:
        backbone: a Decoder, an Encoder, or a Hugging Face model that takes `inputs_embeds`.
        config: the configuration; None = built from `fields`.
        fields: those of `RecurrentConfig`: num_memory_tokens, segment_length, bptt_segments, update, ...

    Args of a call:
        tokens: (batch, length) token ids.
        state: the state that the previous call returned; None = empty past.
        mask, reset, aux_losses: as in a Decoder.
        flush: return the outputs of an incomplete segment as if it ended here (encoder form; the decoder form always
            does). The returned state is the same with and without, so the stream can continue.
        traces: a list to which a `Trace` of every segment is appended.

    Returns of a call:
        The backbone's outputs, logits or hidden states (batch, length, ...), and the next state. Zeros at padding, and
        in the encoder form at tokens of an incomplete segment; later calls do not return these.

    Raises:
        ConfigError: an unknown field or an invalid value; a module that is not a backbone.
    """

    def __init__(self, backbone: nn.Module, config: RecurrentConfig | None = None, **fields: Any) -> None:
        super().__init__()
        own = from_dict(RecurrentConfig, fields, "RecurrentMemory")
        self.config = own if config is None else replace(config, **fields)
        # wrappers (PEFT) are removed: their adapters act inside the model, and their own call has no segments
        backbone = unwrapped(backbone)
        inner = getattr(backbone, "model", None)
        backbone = self.backbone = inner if isinstance(inner, (Decoder, Encoder)) else backbone
        self._adapter = [wrap_backbone(backbone)]  # in a list, so that parameters are not registered twice
        self.cell: TokenMemory | LayerMemory
        if self.config.per_layer:
            self.cell = LayerMemory(self.config, self.adapter)
        else:
            self.cell = TokenMemory(self.config, self.adapter.dim, self.adapter.embedding_std())
        like = next((p for p in backbone.parameters() if p.is_floating_point()), None)
        if like is not None:  # memory tokens are inputs of the backbone, as embeddings are
            self.cell.to(like.device, like.dtype)

    @property
    def adapter(self) -> Backbone:
        """The backbone behind a common interface."""
        if self._adapter[0].module is not self.backbone:  # copied, or replaced by a wrapper
            self._adapter = [wrap_backbone(self.backbone)]
        return self._adapter[0]

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.adapter.vocab_size

    @property
    def memory(self) -> nn.Embedding:
        """The learned memory tokens (num_memory_tokens, dim)."""
        return self.cell.tokens

    @property
    def update(self) -> nn.Module:
        """The module that updates the memory after a segment."""
        return self.cell.update

    @property
    def traits(self) -> Traits:
        """Capability flags of this model; in the encoder form outputs appear when a segment is complete."""
        return Traits(
            causal=self.adapter.causal,
            bidirectional=False,
            streams=self.config.alignment == "left",
            bounded=True,
            segment=self.config.segment_length,
            horizon=self.config.bptt_segments,
        )

    def why_no_stream(self) -> str:
        """Return the reason why this model does not stream; "" if it does."""
        return (
            ""
            if self.traits.streams
            else "alignment = 'right' needs the whole text in one call; use 'left' for streams"
        )

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
        """Return logits or hidden states (batch, length, ...) of tokens (batch, length), and the next state; see the
        class for arguments.
        """
        (hidden, shown), next_state, rows = self.run(
            tokens, state, mask=mask, reset=reset, aux_losses=aux_losses, flush=flush, traces=traces
        )
        out = self.adapter.output(hidden)
        return rows.scatter(out if shown is None else out.masked_fill(~shown, 0)), next_state

    def hidden(
        self, tokens: Tensor, state: RecurrentState | None = None, **call: Any
    ) -> tuple[Tensor, RecurrentState | None]:
        """Return the last hidden states (batch, length, dim), zeros where logits are zero, and the next state.

        Arguments are those of a call.
        """
        (h, shown), next_state, rows = self.run(tokens, state, **call)
        return rows.scatter(h if shown is None else h.masked_fill(~shown, 0)), next_state

    def head(self) -> Head | CalledHead | AdaptiveHead:
        """Return the backbone's output layer; raises UnsupportedError if it is not a linear map."""
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
        """Run a call up to the hidden states; arguments are those of a call.

        Returns:
            A pair of hidden states (B, N, dim) and a mask (B, N, 1) of tokens whose outputs are returned (None = all),
            the next state, and the layout of the call.
        """
        stream = self.config.alignment == "left"
        with states.all_or_nothing():
            size = self._size(state)
            offset = states.live(state, tokens.shape[0], tokens.device)
            rows = BatchLayout(offset, tokens.shape[1], mask, reset, reads=_layout_inputs(state))
            ids = rows.gather(tokens)
            layout = segment_layout(rows, size, self.config.alignment)
            old = None if state is None or not stream else state.tokens
            flushed = flush or self.adapter.causal
            segments = cut_segments(layout, rows, ids, old, stream=stream, flush=flushed, ended=self._varies)
            outputs, carried, new_traces = self._run_segments(segments, self._start(state, rows), aux_losses)
            if traces is not None:
                traces += new_traces
            self._add_gate_penalty(new_traces, aux_losses)
            next_state = self._next_state(state, carried, ids, rows)
            if not segments:
                hidden = carried.memory.new_zeros(*ids.shape, self.adapter.dim, dtype=device_and_dtype(self).dtype)
                return (hidden, None), next_state, rows
            # the memory is not written if no segment is completed, and not read in the first segment
            joined = torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]
            hidden = with_gradients(layout.collect(joined), self.cell)
            if all(segment.whole for segment in segments):
                return (hidden, None), next_state, rows
            shown = layout.collect(torch.cat([(s.shown[:, None] & s.fresh)[..., None] for s in segments], 1))
            return (hidden, shown), next_state, rows

    def last(
        self, tokens: Tensor, state: RecurrentState | None = None, **call: Any
    ) -> tuple[Tensor, RecurrentState | None]:
        """Return only the logits (batch, vocab_size) of each row's last real token,
        and the next state (decoder form).
        """
        (hidden, _), next_state, rows = self.run(tokens, state, flush=True, **call)
        return self.adapter.output(last_of_each_row(hidden, rows)), next_state

    def _run_segments(
        self, segments: list[Segment], carried: CarriedMemory, aux_losses: list[Tensor] | None
    ) -> tuple[list[Tensor], CarriedMemory, list[Trace]]:
        """Run the segments one after another or, if configured, along diagonals: layer l of segment s at step l + s.

        Returns:
            Hidden states of each segment, the memory afterwards, and a trace of each segment.
        """
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
            return cell.diagonals(self.adapter, segments, self._reset_memory(segments[0], carried), left, horizon)
        outputs: list[Tensor] = []
        traces: list[Trace] = []
        for index, segment in enumerate(segments):
            carried = cut_graph(self._reset_memory(segment, carried), left[index], horizon)
            if not (segment.whole or host.any_true(segment.closed) or host.any_true(segment.shown)):
                outputs.append(
                    carried.memory.new_zeros(*segment.ids.shape, self.adapter.dim, dtype=device_and_dtype(self).dtype)
                )
                continue
            if not index and not host.any_true(segment.resumed):
                carried = carried._replace(backbone=None)  # the state holds no tokens of a current segment
            hidden, carried, trace = cell.step(self.adapter, segment, carried, aux_losses)
            outputs.append(hidden)
            traces.append(trace)
        return outputs, carried, traces

    def explain(self, traces: list[Trace], state: RecurrentState | None) -> list[Diagnostic]:
        """Return what the segments of a call write: (batch, memory tokens, segments), NaN for incomplete segments.

        Args:
            traces: of the call, made in evaluation.
            state: before the call; None = empty.

        Returns:
            The share that the segment has in each memory token after its gate; nothing for a memory without gates.
        """
        shares, mass = [], None if state is None else state.mass
        for trace in traces:
            if trace.logits is None:
                return []
            weights = GatedUpdate.weights(trace.logits)
            total = weights if mass is None else mass + weights
            share = weights / total.clamp(min=1e-30)
            shares.append(share.masked_fill(~trace.closed[:, None], math.nan))
            mass = total
        caption = (
            "Share of the segment of the token in each memory token after the segment: 1 replaces all that earlier "
            "segments wrote, 0 writes nothing; none while the segment is incomplete."
        )
        values = torch.stack(shares, -1)
        return [Diagnostic(name="write of the segment", caption=caption, values=values, per="memory token")]

    def _add_gate_penalty(self, traces: list[Trace], aux_losses: list[Tensor] | None) -> None:
        """Append the auxiliary loss on open gates to `aux_losses`, if it is configured."""
        if aux_losses is None or not self.config.gate_penalty:
            return
        for trace in traces:
            if trace.logits is not None:
                opened = trace.logits.clamp(min=0).mean(1).masked_fill(~trace.closed, 0)
                aux_losses.append(self.config.gate_penalty * opened.mean() / len(traces))

    @contextlib.contextmanager
    def segments_of(self, size: int) -> Iterator[None]:
        """Context with another segment length, for a curriculum; calls inside it take no state from outside."""
        config, self.config = self.config, replace(self.config, segment_length=size)
        try:
            yield
        finally:
            self.config = config

    @property
    def _varies(self) -> bool:
        """Whether each call draws its segment length at random."""
        return self.training and self.config.vary > 0

    def _size(self, state: RecurrentState | None) -> int:
        """Return the segment length of a call, drawn at random in training with `vary`.

        Raises:
            UnsupportedError: a state was passed, but segments are not at fixed positions.
        """
        if state is not None and (self.config.alignment == "right" or self._varies):
            field = "alignment = 'right'" if self.config.alignment == "right" else "vary"
            raise UnsupportedError(f"RecurrentMemory: {field} needs the whole text in one call; pass state=None")
        if not self._varies:
            return self.config.segment_length
        least = max(1, round((1 - self.config.vary) * self.config.segment_length))
        return int(torch.randint(least, self.config.segment_length + 1, ()))

    def _reset_memory(self, segment: Segment, carried: CarriedMemory) -> CarriedMemory:
        """Empty the memory of rows in which a document begins with this segment."""
        begins = segment.begins
        if not host.any_true(begins):
            return carried
        written = host.derive(lambda before, begin: before * ~begin, carried.written, begins)
        return carried.put(begins, *self.cell.empty(len(begins), carried.memory))._replace(written=written)

    def _start(self, state: RecurrentState | None, rows: BatchLayout) -> CarriedMemory:
        """Return the memory that a call starts with; its counts have host values."""
        if state is None:
            memory, mass = self.cell.empty(rows.batch)
            return CarriedMemory(memory, mass, host.put(np.zeros(rows.batch, np.int64), memory.device), None)
        memory, mass = self.cell.fit(state.memory, state.mass)
        read, backbone = rows.read(_layout_inputs(state)), state.backbone
        if backbone is not None:
            backbone = backbone._replace(live=host.remember(backbone.live.view_as(backbone.live), read["backbone"]))
        return CarriedMemory(
            memory, mass, host.remember(state.written.view_as(state.written), read["written"]), backbone
        )

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> RecurrentState:
        """Return the state of an empty past; device and dtype default to those of the parameters."""
        weight = table_of(self.memory, self.config.num_memory_tokens)
        memory, mass = self.cell.empty(batch_size, weight.to(device=device, dtype=dtype))
        zeros = torch.zeros(batch_size, dtype=torch.int64, device=device or weight.device)
        tokens = zeros.new_zeros(batch_size, self.config.segment_length - 1)
        backbone = self.adapter.init_state(batch_size, device=device, dtype=dtype)
        return RecurrentState(memory.to(zeros.device), mass.to(zeros.device), zeros, tokens, backbone, zeros.clone())

    def _next_state(
        self, state: RecurrentState | None, carried: CarriedMemory, ids: Tensor, rows: BatchLayout
    ) -> RecurrentState | None:
        """Return the state after a call; None if calls take whole texts."""
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
        if backbone is not None:  # new tensor objects, as host values are only valid within a call
            backbone = backbone._replace(live=backbone.live.view_as(backbone.live))
        return RecurrentState(memory, mass, written.view_as(written), tokens[..., 0], backbone, rows.live)

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype = torch.float32) -> int:
        """Return the exact bytes of the state after `length` live tokens in every row, counts included."""
        size = self.config.segment_length
        own = self.cell.state_nbytes(batch_size, dtype.itemsize) + batch_size * 8 * (2 + size - 1)
        front, _ = self.cell.widths(self.adapter.causal, length // size)
        inside = front + length % size if length % size else 0
        return own + self.adapter.state_nbytes(batch_size, inside, dtype)

    def flops(self, length: int, *, batch_size: int = 1) -> int:
        """Return the FLOPs (2 per multiply-add) of one forward pass of `length` tokens from an empty past, with
        `flush`.

        Raises:
            UnsupportedError: the backbone is not a model of this library.
        """
        positions, size = batch_size * length, self.config.segment_length
        # an incomplete segment is embedded in full width
        embedded = batch_size * -(-length // size) * size
        adapter, cell = self.adapter, self.cell
        total = self._sum_segments(
            length, lambda width: adapter.flops(width, batch_size) + cell.flops(width, batch_size)
        )
        assert isinstance(self.backbone, (Decoder, Encoder))
        return total + self.backbone.embed_flops(embedded) + self.backbone.output_flops(positions)

    def pairs(self, length: int) -> int:
        """Return the attended (query, key) pairs of one row:
        those of the backbone in all segments, memory tokens included.
        """
        return self._sum_segments(length, self.adapter.pairs)

    def _sum_segments(self, length: int, cost: Callable[[int], int]) -> int:
        """Sum the cost of all segments of a text, where `cost(columns)` is that of one run over that many columns."""
        count, rest = divmod(length, self.config.segment_length)
        causal, size = self.adapter.causal, self.config.segment_length
        total = opened = 0
        if rest and self.config.alignment == "right":
            # the remainder comes first, and is completed like the others
            total, opened = cost(sum(self.cell.widths(causal, 0)) + rest), 1
        last = opened + count
        # the number of accumulated summaries grows; from `steady` on every segment costs the same
        steady = max(opened, min(last, self.config.max_summaries if self.config.accumulate else 0))
        total += sum(cost(sum(self.cell.widths(causal, index)) + size) for index in range(opened, steady))
        if last > steady:
            total += (last - steady) * cost(sum(self.cell.widths(causal, last)) + size)
        if rest and not opened:
            front, back = self.cell.widths(causal, count)
            total += cost(front + rest + (0 if causal else back))
        return total

    def num_parameters(self) -> int:
        """Return the number of parameters, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def after_step(self, step: int, generator: torch.Generator | None = None) -> None:
        """Apply clamps, redraws and statistics of the backbone after optimizer step `step` (1, 2, ...)."""
        self.adapter.after_step(step, generator)

    @property
    def redraw_count(self) -> int:
        """A number that changes whenever the backbone redraws its random projections, which invalidates states."""
        return self.adapter.redraw_count

    def parameter_groups(self, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return parameter groups for a torch optimizer: the backbone's, and the memory's without weight decay."""
        groups = self.adapter.parameter_groups(lr=lr, weight_decay=weight_decay)
        own = [parameter for parameter in self.cell.parameters() if parameter.requires_grad]
        return [*groups, {"name": "memory", "params": own, "lr": lr, "weight_decay": 0.0}]
