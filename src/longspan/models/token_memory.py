"""One segment of the Recurrent Memory Transformer: memory tokens in the input, read and written by the model itself."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longspan import host
from longspan.contract.maps import table_of
from longspan.host import Array
from longspan.models.backbone import Backbone
from longspan.models.memory_update import GatedUpdate, PaperUpdate
from longspan.models.recurrent_config import RecurrentConfig
from longspan.models.segmenting import Segment


class Trace(NamedTuple):
    """What the memory tokens did in one segment.

    Attributes:
        offered: (batch, num_memory_tokens, dim), the backbone's output at the memory tokens: what the segment, seen
            with all that is remembered, has to say.
        last: (batch, dim), hidden states at the last real token of the segment.
        logits: (batch, num_memory_tokens) fp32 of the gate, above 0 where it writes; None where there is no gate.
        closed: (batch,) bool, rows whose segment is complete, so that it writes.
        shown: (batch,) bool, rows that ran this segment at all.
    """

    offered: Tensor
    last: Tensor
    logits: Tensor | None
    closed: Tensor
    shown: Tensor


class Carried(NamedTuple):
    """What goes from segment to segment; the first four fields of `RecurrentState` that memories own.

    Attributes:
        memory: (batch, ...) what is remembered.
        mass: (batch, ...) fp32, the evidence (token memory) or normaliser (layer memory) behind it.
        written: (batch,) int64, segments closed since the last reset.
        backbone: the backbone's state of the open segment, else None.
    """

    memory: Tensor
    mass: Tensor
    written: Tensor
    backbone: Any


class Stepped(NamedTuple):
    """A segment done: hidden states (batch, size, dim), what is carried on, what the memory did."""

    hidden: Tensor
    carried: Carried
    trace: Trace


def where_rows(rows: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """`yes` in the rows (batch,) that are True, `no` in the others."""
    return torch.where(rows.view(-1, *(1,) * (no.ndim - 1)), yes, no)


def counted(written: Tensor, segment: Segment) -> Tensor:
    """(batch,) segments closed, this one included; it knows its values where it did."""
    return host.derive(lambda before, closed: before + closed, written, segment.closed)


def last_real(hidden: Tensor, segment: Segment) -> Tensor:
    """Hidden states (batch, size, dim) to those at each row's last real token (batch, dim)."""
    if segment.whole:
        return hidden[:, -1]
    place = torch.arange(hidden.shape[1], device=hidden.device)
    index = torch.where(segment.real, place, 0).amax(1)
    return hidden[torch.arange(len(index), device=hidden.device), index]


def known(tensor: Tensor) -> Array:
    """The values of a part of a segment on the host."""
    array = host.values(tensor)
    assert array is not None
    return array


def assemble(
    backbone: Backbone, segment: Segment, front: list[tuple[Tensor, Tensor]], text: Tensor, back: Tensor, before: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Inputs, mask and resets of a causal backbone's run: what is read, the segment, what writes.

    Args:
        backbone: asked whether it carries the open segment.
        segment: at hand.
        front: (embeddings (B, m, dim), readable (B, m)) in front of the text.
        text: (B, size, dim) embeddings of the segment.
        back: (B, m, dim) embeddings of the write tokens.
        before: the backbone's state of the open segment.
    """
    inputs = [*(each for each, _ in front), text, back]
    if segment.whole and before is None and all(host.every(readable) for _, readable in front):
        return torch.cat(inputs, 1), None, None
    carries = backbone.streams and before is not None
    closed, shown, resumed = (known(t) for t in (segment.closed, segment.shown, segment.resumed))
    used = (closed | shown) & ~resumed if carries else closed | shown
    parts = [known(readable) & used[:, None] for _, readable in front]
    parts += [known(segment.fresh if carries else segment.real), closed[:, None].repeat(back.shape[1], 1)]
    # one padded place behind the rest, whose reset empties the state of rows that closed their segment
    emptied = backbone.streams and not closed.all()
    if emptied:
        parts.append(np.zeros_like(closed[:, None]))
        inputs.append(back[:, :1])
    mask, reset = np.concatenate(parts, 1), None
    if backbone.streams and (before is not None or emptied):
        begins = np.zeros_like(mask)
        begins[:, 0] = used
        if emptied:
            begins[:, -1] = closed
        reset = host.put(begins, text.device)
    return torch.cat(inputs, 1), host.put(mask, text.device), reset


class TokenMemory(nn.Module):
    """The memory of RMT and, with `accumulate`, of AutoCompressor; equations in `longspan.models.recurrent`.

    Args:
        config: of the RecurrentMemory.
        dim: width of the backbone.
        std: of the initial memory.
    """

    def __init__(self, config: RecurrentConfig, dim: int, std: float) -> None:
        super().__init__()
        self.config, self.dim = config, dim
        self.tokens = nn.Embedding(config.num_memory_tokens, dim)
        nn.init.normal_(self.tokens.weight, std=std)
        gated = config.update == "gated" and not config.accumulate
        self.update = GatedUpdate(dim, config.num_memory_tokens, noise=config.gate_noise) if gated else PaperUpdate()

    @property
    def columns(self) -> int:
        """Memory vectors that are carried."""
        many = self.config.max_summaries if self.config.accumulate else 1
        return many * self.config.num_memory_tokens

    def empty(self, batch: int, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Memory and mass of an empty past: the learned initial memory, or room for summaries."""
        weight = table_of(self.tokens, self.config.num_memory_tokens)
        dtype = weight.dtype if like is None else like.dtype
        mass = torch.zeros(batch, self.config.num_memory_tokens, device=weight.device)
        if self.config.accumulate:
            return weight.new_zeros(batch, self.columns, self.dim, dtype=dtype), mass
        memory = weight.to(dtype).expand(batch, -1, -1)
        # without a graph a view of a parameter claims to have one, which hooks (torch's counter of FLOPs) stumble over
        return memory if torch.is_grad_enabled() else memory.detach(), mass

    def fit(self, memory: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        """Both in the types of the parameters, whatever precision has left them behind."""
        return memory.to(self.tokens.weight.dtype), mass.float()

    def state_nbytes(self, batch_size: int, itemsize: int) -> int:
        """Bytes of memory and mass."""
        return batch_size * (self.columns * self.dim * itemsize + 4 * self.config.num_memory_tokens)

    def widths(self, causal: bool, written: int) -> tuple[int, int]:
        """Columns in front of a segment before which `written` were closed, and columns behind it."""
        tokens = self.config.num_memory_tokens
        read = min(written, self.config.max_summaries) * tokens if self.config.accumulate else tokens
        if causal:
            return read, tokens
        return read + (tokens if self.config.accumulate else 0), 0

    def flops(self, width: int, batch_size: int) -> int:
        """Of the memory itself: it has no matrix products of its own."""
        return 0

    def step(self, backbone: Backbone, segment: Segment, carried: Carried, penalties: list[Tensor] | None) -> Stepped:
        """Read, run and write one segment."""

        def run(memory: Tensor) -> tuple[Tensor, Tensor, Any, list[Tensor]]:
            found: list[Tensor] = []
            collected = None if penalties is None else found
            hidden, new, following = self._run(backbone, segment, carried._replace(memory=memory), collected)
            return hidden, new, following, found

        if self.config.replay and self.training and torch.is_grad_enabled():
            hidden, new, following, found = checkpoint(run, carried.memory, use_reentrant=False)
        else:
            hidden, new, following, found = run(carried.memory)
        if penalties is not None:
            penalties += found
        memory, mass, logits = self._write(carried, new, segment)
        written = counted(carried.written, segment)
        trace = Trace(new, last_real(hidden, segment), logits, segment.closed, segment.shown)
        return Stepped(hidden, Carried(memory, mass, written, following), trace)

    def _write(self, carried: Carried, new: Tensor, segment: Segment) -> tuple[Tensor, Tensor, Tensor | None]:
        new = new.to(carried.memory.dtype)  # under autocast the backbone's may be narrower
        if self.config.accumulate:
            kept = carried.memory[:, self.config.num_memory_tokens :]
            memory, mass, logits = torch.cat([kept, new], 1), carried.mass, None
        else:
            memory, mass, logits = self.update(carried.memory, new, carried.mass)
        closed = segment.closed
        if not (segment.whole or host.every(closed)):
            memory, mass = where_rows(closed, memory, carried.memory), where_rows(closed, mass, carried.mass)
        return memory, mass, logits

    def _run(
        self, backbone: Backbone, segment: Segment, carried: Carried, penalties: list[Tensor] | None
    ) -> tuple[Tensor, Tensor, Any]:
        """Hidden states of the segment (B, size, dim), the new memory (B, memory tokens, dim), the backbone's state."""
        memory, accumulate = carried.memory, self.config.accumulate
        batch, columns = memory.shape[:2]
        text = backbone.embed(segment.ids).to(memory.dtype)
        seen = np.ones((batch, columns), bool)
        if accumulate:
            seen &= np.arange(columns) >= columns - self.config.num_memory_tokens * known(carried.written)[:, None]
        readable = host.put(seen, memory.device)
        write = memory
        if accumulate:
            write = table_of(self.tokens, self.config.num_memory_tokens).to(memory.dtype).expand(batch, -1, -1)
        if backbone.causal:
            inputs, mask, reset = assemble(backbone, segment, [(memory, readable)], text, write, carried.backbone)
            ran = backbone.run(inputs, carried.backbone, mask, reset, penalties)
            end = columns + text.shape[1]
            following = None if segment.whole or host.every(segment.closed) else ran.state
            return ran.hidden[:, columns:end], ran.hidden[:, end : end + write.shape[1]], following
        used = (known(segment.closed) | known(segment.shown))[:, None]
        front = memory
        if accumulate:
            front, seen = torch.cat([memory, write], 1), np.concatenate([seen, np.ones(write.shape[:2], bool)], 1)
        mask = None
        if accumulate or not segment.whole:
            mask = host.put(np.concatenate([seen & used, known(segment.real) & used], 1), memory.device)
        ran = backbone.run(torch.cat([front, text], 1), None, mask, None, penalties)
        width = front.shape[1]
        return ran.hidden[:, width:], ran.hidden[:, width - self.config.num_memory_tokens : width], None
