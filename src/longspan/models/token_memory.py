"""One segment of the Recurrent Memory Transformer: memory tokens in the input, read and written by the model itself."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longspan import host
from longspan import state as states
from longspan.contract.maps import table_of
from longspan.host import Array
from longspan.models.backbone import Backbone
from longspan.models.config import RecurrentConfig
from longspan.models.memory_update import GatedUpdate, PaperUpdate
from longspan.models.segmenting import Segment


class Trace(NamedTuple):
    """Record of what the memory tokens did in one segment.

    Attributes:
        offered: (batch, num_memory_tokens, dim), the backbone's output at the memory tokens, which the update may
            write.
        last: (batch, dim), hidden states at the last real token of the segment.
        logits: (batch, num_memory_tokens) fp32 of the gate, which writes where they are above 0; None without a gate.
        closed: (batch,) bool, rows whose segment is complete, so that it writes the memory.
        shown: (batch,) bool, rows whose outputs in this segment are returned.
    """

    offered: Tensor
    last: Tensor
    logits: Tensor | None
    closed: Tensor
    shown: Tensor


class CarriedMemory(NamedTuple):
    """The memory passed from segment to segment.

    Attributes:
        memory: (batch, ...) the memory itself.
        mass: (batch, ...) fp32, its evidence (token memory) or normalizer (layer memory).
        written: (batch,) int64, segments completed since the last reset.
        backbone: the backbone's state of the current segment, else None.
    """

    memory: Tensor
    mass: Tensor
    written: Tensor
    backbone: Any

    def put(self, rows: Tensor, memory: Tensor, mass: Tensor) -> "CarriedMemory":
        """Return a copy with another memory and mass in the rows (batch,) that are True."""
        return self._replace(memory=where_rows(rows, memory, self.memory), mass=where_rows(rows, mass, self.mass))


class SegmentOutput(NamedTuple):
    """Output of one segment: hidden states (batch, size, dim), the memory afterwards, and a trace."""

    hidden: Tensor
    carried: CarriedMemory
    trace: Trace


def where_rows(rows: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Return `yes` in the rows (batch,) that are True, `no` in the others."""
    return torch.where(rows.view(-1, *(1,) * (no.ndim - 1)), yes, no)


def count_closed(written: Tensor, segment: Segment) -> Tensor:
    """Return the number (batch,) of completed segments, this one included, keeping host values."""
    return host.derive(lambda before, closed: before + closed, written, segment.closed)


def cut_graph(carried: CarriedMemory, left: Array, horizon: int | None) -> CarriedMemory:
    """Detach the memory before a segment from the graph, where gradients should end.

    Args:
        carried: the memory before the segment.
        left: (batch,) number of segments up to the row's end, this one included; detached where it is a multiple of
            `horizon`.
        horizon: segments that gradients reach; None = never detach.
    """
    if horizon is None or not carried.memory.requires_grad:
        return carried
    cut = (left > 0) & (left % horizon == 0)
    if not cut.any():
        return carried
    if cut.all():
        carried = carried._replace(backbone=states.detach(carried.backbone))
    return carried.put(host.put(cut, carried.memory.device), carried.memory.detach(), carried.mass.detach())


def last_real(hidden: Tensor, segment: Segment) -> Tensor:
    """Return the hidden states (batch, dim) at each row's last real token, of hidden (batch, size, dim)."""
    if segment.whole:
        return hidden[:, -1]
    column = torch.arange(hidden.shape[1], device=hidden.device)
    index = torch.where(segment.real, column, 0).amax(1)
    return hidden[torch.arange(len(index), device=hidden.device), index]


def assemble(
    backbone: Backbone, segment: Segment, front: list[tuple[Tensor, Array]], text: Tensor, back: Tensor, before: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Build the inputs, mask and resets of a backbone's run: memory to read, the segment, memory to write.

    Args:
        backbone: determines whether the start of the segment is in its state.
        segment: the segment to run.
        front: pairs of embeddings (B, m, dim) and a mask (B, m), to be read before the text.
        text: (B, size, dim) embeddings of the segment.
        back: (B, m, dim) embeddings of memory tokens after the text: in the decoder form they only write, and only
            where a segment is complete.
        before: the backbone's state after the part of the segment that earlier calls read; None = they read nothing.

    Returns:
        Inputs (B, columns, dim), and mask and resets (B, columns) or None if not needed.
    """
    inputs = [*(embeddings for embeddings, _ in front), text, back]
    if segment.whole and before is None and all(is_visible.all() for _, is_visible in front):
        return torch.cat(inputs, 1), None, None
    carries = backbone.streams and before is not None
    closed, resumed = host.known(segment.closed), host.known(segment.resumed)
    active = closed | host.known(segment.shown)
    used = active & ~resumed if carries else active
    parts = [is_visible & used[:, None] for _, is_visible in front]
    parts.append(host.known(segment.fresh if carries else segment.real) & active[:, None])
    parts.append((closed if backbone.causal else active)[:, None].repeat(back.shape[1], 1))
    # one column of padding at the end, whose reset empties the state of rows that completed their segment
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
    """The memory of RMT and, with `accumulate`, of AutoCompressor; for equations see `longspan.models.recurrent`.

    Its tokens have the backbone's width `dim` and are initialized with standard deviation `std`.
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
        """Number of memory vectors that are carried."""
        many = self.config.max_summaries if self.config.accumulate else 1
        return many * self.config.num_memory_tokens

    def empty(self, batch: int, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return memory (batch, columns, dim) and mass of an empty past:
        the learned initial memory, or zeros for summaries.
        """
        weight = table_of(self.tokens, self.config.num_memory_tokens)
        dtype = weight.dtype if like is None else like.dtype
        mass = torch.zeros(batch, self.config.num_memory_tokens, device=weight.device)
        if self.config.accumulate:
            return weight.new_zeros(batch, self.columns, self.dim, dtype=dtype), mass
        memory = weight.to(dtype).expand(batch, -1, -1)
        # without gradients a view of a parameter still requires them, which breaks hooks (torch's counter of FLOPs)
        return memory if torch.is_grad_enabled() else memory.detach(), mass

    def fit(self, memory: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        """Cast memory and mass to the dtypes of the parameters, after a call in another precision."""
        return memory.to(self.tokens.weight.dtype), mass.float()

    def state_nbytes(self, batch_size: int, itemsize: int) -> int:
        """Return the bytes of memory and mass."""
        return batch_size * (self.columns * self.dim * itemsize + 4 * self.config.num_memory_tokens)

    def widths(self, causal: bool, written: int) -> tuple[int, int]:
        """Return the number of memory columns before a segment, when `written` segments are complete, and after it."""
        tokens = self.config.num_memory_tokens
        read = min(written, self.config.max_summaries) * tokens if self.config.accumulate else tokens
        if causal:
            return read, tokens
        return read + (tokens if self.config.accumulate else 0), 0

    def flops(self, width: int, batch_size: int) -> int:
        """Return 0: the memory itself has no matrix products."""
        return 0

    def step(
        self, backbone: Backbone, segment: Segment, carried: CarriedMemory, aux_losses: list[Tensor] | None
    ) -> SegmentOutput:
        """Run one segment: read the memory, run the backbone and update the memory."""

        def run(memory: Tensor) -> tuple[Tensor, Tensor, Any, list[Tensor]]:
            """Run the backbone; return its results and the auxiliary losses (a function of the memory,
            for checkpointing).
            """
            losses: list[Tensor] = []
            before = carried._replace(memory=memory)
            return *self._run(backbone, segment, before, None if aux_losses is None else losses), losses

        if self.config.replay and self.training and torch.is_grad_enabled():
            hidden, new, state, losses = checkpoint(run, carried.memory, use_reentrant=False)
        else:
            hidden, new, state, losses = run(carried.memory)
        if aux_losses is not None:
            aux_losses += losses
        new = new.to(carried.memory.dtype)  # under autocast the backbone's may be narrower
        if self.config.accumulate:
            older = carried.memory[:, self.config.num_memory_tokens :]
            memory, mass, logits = torch.cat([older, new], 1), carried.mass, None
        else:
            memory, mass, logits = self.update(carried.memory, new, carried.mass)
        trace = Trace(new, last_real(hidden, segment), logits, segment.closed, segment.shown)
        after = carried._replace(written=count_closed(carried.written, segment), backbone=state)
        if segment.whole or host.all_true(segment.closed):
            return SegmentOutput(hidden, after._replace(memory=memory, mass=mass), trace)
        return SegmentOutput(hidden, after.put(segment.closed, memory, mass), trace)

    def _run(
        self, backbone: Backbone, segment: Segment, carried: CarriedMemory, aux_losses: list[Tensor] | None
    ) -> tuple[Tensor, Tensor, Any]:
        """Return hidden states (B, size, dim) of the segment, new memory (B, memory tokens, dim)
        and the backbone's state.
        """
        memory, tokens = carried.memory, self.config.num_memory_tokens
        batch, columns = memory.shape[:2]
        text, write = backbone.embed(segment.ids).to(memory.dtype), memory
        is_written = np.ones((batch, columns), bool)
        if self.config.accumulate:
            is_written = np.arange(columns) >= columns - tokens * host.known(carried.written)[:, None]
            write = table_of(self.tokens, tokens).to(memory.dtype).expand(batch, -1, -1)
        front, back = [(memory, is_written)], write if backbone.causal else write[:, :0]
        if self.config.accumulate and not backbone.causal:
            front.append((write, np.ones(write.shape[:2], bool)))
        inputs, mask, reset = assemble(backbone, segment, front, text, back, carried.backbone)
        output = backbone.run(inputs, carried.backbone, mask, reset, aux_losses)
        first = sum(embeddings.shape[1] for embeddings, _ in front)
        last = first + text.shape[1]
        new = output.hidden[:, last : last + tokens] if backbone.causal else output.hidden[:, first - tokens : first]
        state = None if segment.whole or host.all_true(segment.closed) else output.state
        return output.hidden[:, first:last], new, state
