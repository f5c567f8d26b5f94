"""Recurrent memory: a model of short segments made endless by memory tokens that it reads and writes itself.

Encoder form (Bulatov et al. 2023, section 2), one block in front, read and written at once:

    [memory', hidden] = backbone([memory, segment])

Decoder form (Bulatov et al. 2022, section 3), read block first, write block last, so that no token sees the writing:

    [., hidden, memory'] = backbone([memory, segment, memory])

The next memory is made of memory' by an update: the paper's overwrite, or a gate that does not forget
(`longspan.models.memory_update`). With `accumulate` (AutoCompressor, Chevalier et al. 2023, section 3) every closed
segment adds summary vectors, written from learned tokens, and the last `max_summaries` segments' are read.

Positions: to the backbone, memory and segment are one sequence. Read tokens take positions 0 .. m - 1, the real tokens
of the segment follow from m on, and write tokens come right behind the last of them.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longspan import state as states
from longspan.errors import ConfigError, UnsupportedError
from longspan.mixers import Rows, Segments
from longspan.models.backbone import Backbone, Ran, wrap_backbone
from longspan.models.memory_update import GatedUpdate, PaperUpdate


class RecurrentState(NamedTuple):
    """What is carried between calls.

    Attributes:
        memory: (batch, columns, dim): the memory tokens; with `accumulate` all summaries, newest last.
        mass: (batch, num_memory_tokens) fp32, the evidence behind each memory token.
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


class Segment(NamedTuple):
    """One segment of every row, as the loop goes over them; all tensors lead with the batch.

    Attributes:
        ids: (B, size) token ids.
        real: (B, size) bool, tokens of the segment, those of earlier calls included.
        fresh: (B, size) bool, tokens of this call.
        begins: (B,) bool, a document begins with this segment.
        closed: (B,) bool, the segment is complete and writes.
        shown: (B,) bool, outputs are wanted.
        resumed: (B,) bool, the backbone's state already holds the start of this segment.
    """

    ids: Tensor
    real: Tensor
    fresh: Tensor
    begins: Tensor
    closed: Tensor
    shown: Tensor
    resumed: Tensor


class RecurrentMemory(nn.Module):
    """A backbone made recurrent over segments by memory tokens.

    Args:
        backbone: a Decoder, an Encoder, or a Hugging Face model that takes `inputs_embeds`.
        num_memory_tokens: memory tokens (of one segment's summary, with `accumulate`).
        segment_length: real tokens of a segment.
        bptt_segments: gradients reach that many segments back, the loss's own counted as the first; None = all.
        update: "gated" or "paper".
        alignment: "left" for streams: borders at multiples of `segment_length`. "right", where the whole text is given
            at once: the remainder goes into the first segment, so that the last is always full.
        accumulate: keep the summaries of several segments instead of one memory.
        max_summaries: segments whose summaries are kept; older ones are dropped.
        vary: in training, each call draws its segment length between (1 - vary) segment_length and segment_length;
            such a call takes and returns no state.
        replay: keep only the memories in the forward pass and recompute segment by segment in the backward pass
            (memory replay, Memformer, Wu et al. 2020, algorithm 1): the same gradients, one segment's activations.
        gate_noise: see `GatedUpdate`.
        gate_penalty: weight of the auxiliary loss on open gates (mean of max(logit, 0)), given to `penalties`.

    Args of a call:
        tokens: (batch, length) token ids.
        state: what the last call returned; None = empty past.
        mask, reset, penalties: as in a Decoder.
        flush: show the outputs of the open segment as if it ended here (encoder form; the decoder form always does).
            The returned state is the same with and without, so the stream may go on.
        gates: a list to which (logits (batch, memory tokens), closed (batch,)) of every segment is appended.

    Returns of a call:
        What the backbone returns, logits or hidden states (batch, length, ...), and the next state. Zeros at padding,
        and in the encoder form at tokens whose segment is still open: those are never shown later.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        num_memory_tokens: int = 10,
        segment_length: int = 499,
        bptt_segments: int | None = None,
        update: Literal["gated", "paper"] = "gated",
        alignment: Literal["left", "right"] = "left",
        accumulate: bool = False,
        max_summaries: int = 8,
        vary: float = 0.0,
        replay: bool = False,
        gate_noise: float = 1.0,
        gate_penalty: float = 0.0,
    ) -> None:
        super().__init__()
        counts = {"num_memory_tokens": num_memory_tokens, "segment_length": segment_length}
        counts |= {"max_summaries": max_summaries, "bptt_segments": 1 if bptt_segments is None else bptt_segments}
        for name, value in counts.items():
            if value < 1:
                raise ConfigError(f"RecurrentMemory.{name} = {value}: must be at least 1")
        if update not in ("gated", "paper") or alignment not in ("left", "right"):
            raise ConfigError(f"RecurrentMemory: update {update!r} or alignment {alignment!r} is unknown")
        if not 0 <= vary < 1:
            raise ConfigError(f"RecurrentMemory.vary = {vary}: must be in [0, 1)")
        self.backbone = backbone
        self._adapter = [wrap_backbone(backbone)]  # in a list, so that it is no second owner of the parameters
        self.num_memory_tokens, self.segment_length, self.bptt_segments = (
            num_memory_tokens,
            segment_length,
            bptt_segments,
        )
        self.alignment, self.accumulate, self.max_summaries = alignment, accumulate, max_summaries
        self.vary, self.replay, self.gate_penalty = vary, replay, gate_penalty
        self.memory = nn.Embedding(num_memory_tokens, self.adapter.dim)
        nn.init.normal_(self.memory.weight, std=self.adapter.embedding_std())
        gated = update == "gated" and not accumulate
        self.update = GatedUpdate(self.adapter.dim, num_memory_tokens, noise=gate_noise) if gated else PaperUpdate()

    @property
    def adapter(self) -> Backbone:
        """The backbone behind its interface."""
        if self._adapter[0].module is not self.backbone:  # copied, or replaced by a wrapper
            self._adapter = [wrap_backbone(self.backbone)]
        return self._adapter[0]

    # -- a call ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        tokens: Tensor,
        state: RecurrentState | None = None,
        *,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        penalties: list[Tensor] | None = None,
        flush: bool = False,
        gates: list[tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, RecurrentState | None]:
        """See the class."""
        size = self._size(state)
        rows = Rows(states.live(state, tokens.shape[0], tokens.device), tokens.shape[1], mask, reset)
        ids = rows.gather(tokens)
        layout = self._layout(rows, size)
        segments = self._segments(rows, layout, ids, state, flush)
        carried = self.init_state(rows.batch, tokens=False) if state is None else state
        active = [segment.fresh.any(1) | segment.closed for segment in segments]
        left = torch.stack(active).long().flip(0).cumsum(0).flip(0) if active else None
        shown = []
        for index, segment in enumerate(segments):
            assert left is not None
            hidden, carried, logits = self._step(segment, self._cut(carried, left[index]), index, penalties)
            shown.append(hidden)
            if logits is not None and gates is not None:
                gates.append((logits, segment.closed))
            if logits is not None and penalties is not None and self.gate_penalty:
                opened = logits.clamp(min=0).mean(1).masked_fill(~segment.closed, 0)
                penalties.append(self.gate_penalty * opened.mean() / len(segments))
        hidden = (
            layout.collect(torch.cat(shown, 1)) if shown else self.memory.weight.new_zeros(*ids.shape, self.adapter.dim)
        )
        seen = (
            layout.collect(torch.cat([(s.shown[:, None] & s.fresh)[..., None] for s in segments], 1)) if shown else None
        )
        out = self.adapter.output(hidden)
        if seen is not None:
            out = out.masked_fill(~seen, 0)
        following = None if self._varies else self._following(state, carried, ids, rows)
        return rows.scatter(out), following

    @property
    def _varies(self) -> bool:
        return self.training and self.vary > 0

    def _size(self, state: RecurrentState | None) -> int:
        if state is not None and (self.alignment == "right" or self._varies):
            why = (
                "right alignment needs the whole text at once"
                if self.alignment == "right"
                else "vary is for whole texts"
            )
            raise UnsupportedError(f"RecurrentMemory: {why}, so it takes no state")
        if not self._varies:
            return self.segment_length
        least = max(1, round((1 - self.vary) * self.segment_length))
        return int(torch.randint(least, self.segment_length + 1, ()))

    def _layout(self, rows: Rows, size: int) -> Segments:
        if self.alignment == "left":
            return rows.segments(size)
        if rows.origin is not None:
            raise UnsupportedError(
                "RecurrentMemory: right alignment takes one text a row; resets need alignment='left'"
            )
        real = torch.arange(rows.length, device=rows.device) < rows.real_tokens()[:, None]
        return Segments(Rows(-rows.real_tokens() % size, rows.length, real), size)

    def _segments(
        self, rows: Rows, layout: Segments, ids: Tensor, state: RecurrentState | None, flush: bool
    ) -> list[Segment]:
        """The call cut into segments."""
        size, stream = layout.size, self.alignment == "left"
        old = None if state is None or not stream else state.tokens
        laid = layout.spread(ids[..., None], None if old is None else old[..., None])[..., 0]
        inside = torch.arange(rows.length, device=rows.device) < rows.real_tokens()[:, None]
        fresh = layout.spread(inside[..., None].long())[..., 0] > 0
        real = layout.real if stream else fresh
        position = layout.spread(((rows.positions + 1) * inside)[..., None])[..., 0]
        count = layout.columns // size
        parts = [t.unflatten(1, (count, size)).unbind(1) for t in (laid, real, fresh, position)] if count else []
        any_real = torch.stack([part.any(1) for part in parts[1]], 1) if count else real
        ended = torch.zeros_like(rows.live, dtype=torch.bool) if rows.emptied is None else rows.emptied
        ended = ended | self._varies
        segments = []
        for index in range(count):
            ids_s, real_s, fresh_s, position_s = (part[index] for part in parts)
            later = any_real[:, index + 1 :].any(1)
            full = real_s.sum(1) == size if stream else any_real[:, index]
            closed = any_real[:, index] & (full | later | ended)
            shown = any_real[:, index] & (closed | flush | self.adapter.causal)
            resumed = (layout.open > 0) if index == 0 and stream else torch.zeros_like(closed)
            segments.append(Segment(ids_s, real_s, fresh_s, position_s[:, 0] == 1, closed, shown, resumed))
        return segments

    def _cut(self, carried: RecurrentState, left: Tensor) -> RecurrentState:
        """Detach the memory k, 2k, ... segments before each row's last; `left` counts them, this one included."""
        if self.bptt_segments is None or not carried.memory.requires_grad:
            return carried
        cut = (left > 0) & (left % self.bptt_segments == 0)
        if not bool(cut.any()):
            return carried
        memory = torch.where(cut[:, None, None], carried.memory.detach(), carried.memory)
        mass = torch.where(cut[:, None], carried.mass.detach(), carried.mass)
        backbone = states.detach(carried.backbone) if bool(cut.all()) else carried.backbone
        return carried._replace(memory=memory, mass=mass, backbone=backbone)

    # -- one segment -----------------------------------------------------------------------------------------------

    def _step(
        self, segment: Segment, carried: RecurrentState, index: int, penalties: list[Tensor] | None
    ) -> tuple[Tensor, RecurrentState, Tensor | None]:
        """Read, run and write one segment: hidden states (B, size, dim), what is carried on, and the gate's logits."""
        begins = segment.begins
        if bool(begins.any()):
            fresh = self._empty_memory(len(begins), carried.memory)
            carried = carried._replace(
                memory=torch.where(begins[:, None, None], fresh, carried.memory),
                mass=carried.mass.masked_fill(begins[:, None], 0),
                written=carried.written.masked_fill(begins, 0),
            )
        needed = segment.closed | segment.shown
        if not bool(needed.any()):
            return self.memory.weight.new_zeros(*segment.ids.shape, self.adapter.dim), carried, None
        before = carried.backbone if index or bool(segment.resumed.any()) else None

        def run(memory: Tensor) -> tuple[Tensor, Tensor, Any]:
            return self._run(segment, memory, carried.written, before, penalties if not self.replay else None)

        if self.replay and self.training and torch.is_grad_enabled():
            hidden, new, following = checkpoint(run, carried.memory, use_reentrant=False)
        else:
            hidden, new, following = run(carried.memory)
        memory, mass, logits = self._write(carried, new, segment.closed)
        written = carried.written + segment.closed.long()
        return hidden, carried._replace(memory=memory, mass=mass, written=written, backbone=following), logits

    def _write(self, carried: RecurrentState, new: Tensor, closed: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.accumulate:
            memory, mass, logits = torch.cat([carried.memory[:, self.num_memory_tokens :], new], 1), carried.mass, None
        else:
            memory, mass, logits = self.update(carried.memory, new, carried.mass)
        if not bool(closed.all()):
            memory = torch.where(closed[:, None, None], memory, carried.memory)
            mass = torch.where(closed[:, None], mass, carried.mass)
        return memory, mass, logits

    def _run(
        self, segment: Segment, memory: Tensor, written: Tensor, before: Any, penalties: list[Tensor] | None
    ) -> tuple[Tensor, Tensor, Any]:
        """Hidden states of the segment (B, size, dim), the new memory (B, memory tokens, dim), the backbone's state."""
        batch, columns = memory.shape[:2]
        embedded = self.adapter.embed(segment.ids).to(memory.dtype)
        readable = memory.new_ones(batch, columns, dtype=torch.bool)
        if self.accumulate:
            column = torch.arange(columns, device=memory.device)
            readable = column >= columns - self.num_memory_tokens * written[:, None]
        write = self.memory.weight.to(memory.dtype).expand(batch, -1, -1) if self.accumulate else memory
        if not self.adapter.causal:
            return self._run_encoder(segment, memory, readable, write, embedded, penalties)
        return self._run_decoder(segment, memory, readable, write, embedded, before, penalties)

    def _run_encoder(
        self,
        segment: Segment,
        memory: Tensor,
        readable: Tensor,
        write: Tensor,
        embedded: Tensor,
        penalties: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor, Any]:
        used = (segment.closed | segment.shown)[:, None]
        front, front_mask = (memory, readable)
        if self.accumulate:
            front = torch.cat([memory, write], 1)
            front_mask = torch.cat([readable, readable.new_ones(write.shape[:2])], 1)
        mask = torch.cat([front_mask & used, segment.real & used], 1)
        ran = self.adapter.run(torch.cat([front, embedded], 1), None, mask, None, penalties)
        columns = front.shape[1]
        new = ran.hidden[:, columns - self.num_memory_tokens : columns]
        return ran.hidden[:, columns:], new, None

    def _run_decoder(
        self,
        segment: Segment,
        memory: Tensor,
        readable: Tensor,
        write: Tensor,
        embedded: Tensor,
        before: Any,
        penalties: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor, Any]:
        columns, size = memory.shape[1], embedded.shape[1]
        streams = self.adapter.streams
        reads = ~segment.resumed if streams and before is not None else torch.ones_like(segment.resumed)
        used = (segment.closed | segment.shown) & reads
        text = segment.fresh if streams and before is not None else segment.real
        closed = segment.closed[:, None]
        parts = [readable & used[:, None], text, closed.expand(-1, self.num_memory_tokens)]
        inputs, reset = [memory, embedded, write], None
        if streams and not bool(segment.closed.all()):
            # one padded place behind the rest, whose reset empties the state of rows that closed their segment
            parts.append(torch.zeros_like(closed))
            inputs.append(write[:, :1])
        mask = torch.cat(parts, 1)
        if streams and (before is not None or len(parts) == 4):
            reset = torch.zeros_like(mask)
            reset[:, 0] = used
            if len(parts) == 4:
                reset[:, -1] = segment.closed
        ran: Ran = self.adapter.run(torch.cat(inputs, 1), before, mask, reset, penalties)
        following = ran.state
        if streams and bool(segment.closed.all()):
            following = None  # every row starts its next segment anew
        new = ran.hidden[:, columns + size : columns + size + self.num_memory_tokens]
        return ran.hidden[:, columns : columns + size], new, following

    # -- state and cost --------------------------------------------------------------------------------------------

    def _empty_memory(self, batch: int, like: Tensor | None = None) -> Tensor:
        """(batch, columns, dim): the learned initial memory, or room for summaries."""
        weight = self.memory.weight
        if self.accumulate:
            return weight.new_zeros(batch, self.max_summaries * self.num_memory_tokens, self.adapter.dim)
        return weight.expand(batch, -1, -1) if like is None else weight.to(like.dtype).expand(batch, -1, -1)

    def init_state(self, batch_size: int, *, tokens: bool = True) -> RecurrentState:
        """The state of an empty past."""
        device = self.memory.weight.device
        zeros = torch.zeros(batch_size, dtype=torch.int64, device=device)
        width = self.segment_length - 1 if tokens else 0
        return RecurrentState(
            memory=self._empty_memory(batch_size),
            mass=torch.zeros(batch_size, self.num_memory_tokens, device=device),
            written=zeros,
            tokens=torch.zeros(batch_size, width, dtype=torch.int64, device=device),
            backbone=self.adapter.init_state(batch_size) if tokens else None,
            live=zeros.clone(),
        )

    def _following(
        self, state: RecurrentState | None, carried: RecurrentState, ids: Tensor, rows: Rows
    ) -> RecurrentState | None:
        if self.alignment == "right":
            return None
        tokens = rows.carry(None if state is None else state.tokens[..., None], ids[..., None], self.segment_length - 1)
        memory, mass, written, backbone = carried.memory, carried.mass, carried.written, carried.backbone
        if rows.emptied is not None:
            gone = rows.emptied
            memory = torch.where(gone[:, None, None], self._empty_memory(rows.batch, memory), memory)
            mass, written = mass.masked_fill(gone[:, None], 0), written.masked_fill(gone, 0)
        if self.adapter.streams and backbone is None:
            backbone = self.adapter.init_state(rows.batch)
        return RecurrentState(memory, mass, written, tokens[..., 0], backbone, rows.live)
