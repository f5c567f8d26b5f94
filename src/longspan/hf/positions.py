"""Padding and documents of a call, from the arguments by which callers of transformers name them.

`attention_mask` (or `mask`) says which tokens are real. Documents packed into one row are told apart by `position_ids`
(`DataCollatorWithFlattening`), by `cu_seq_lens_q` or `seq_idx` (what it adds for flash attention), or by `reset`.
Positions on padding mean nothing. On real tokens the position behind the previous one continues (across calls the
state's own), the first position of the model (0) starts a document, and a row that holds nothing yet may begin
anywhere.
"""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longspan import host
from longspan.errors import ConfigError, UnsupportedError

PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Arguments by which transformers hands sequence borders to flash attention."""


class Documents(NamedTuple):
    """What is padding in a call, and where documents start.

    Attributes:
        mask: (batch, length) bool, True = real token; None = all are.
        reset: (batch, length) bool, True = a new document starts here; None = nowhere.
        positions: (batch, length) int64, as the caller counts them, the model's first one on padding; None = not given.
        shift: (batch,) int64, by how much the caller's position of a row's next token is ahead of the state's; None =
            by nothing.
        ahead: a row that held nothing begins behind the first position.
    """

    mask: Tensor | None
    reset: Tensor | None
    positions: Tensor | None
    shift: Tensor | None
    ahead: bool = False


class Past(NamedTuple):
    """What a row holds before a call.

    Attributes:
        live: (batch,) int64, tokens since the document began.
        columns: read so far, padding included.
        shift: as in `Documents`.
    """

    live: Tensor
    columns: int
    shift: Tensor | None


@host.eager
def documents(inputs: Tensor, past: Past, arguments: Mapping[str, Any], first: int = 0) -> Documents:
    """Padding and documents of a call.

    Args:
        inputs: (batch, length) token ids or (batch, length, dim) embeddings.
        past: what the rows hold already.
        arguments: of the call: attention_mask (batch, length) or (batch, past + length), mask (batch, length), reset
            (batch, length), position_ids (batch or 1, length), and those of `PACKING`; others are not read.
        first: the position of a document's first token.

    Raises:
        ConfigError: shapes that do not fit, or positions that neither continue nor start a document.
        UnsupportedError: a mask that says more than what is padding, or positions in more than one dimension.
    """
    mask = _mask(inputs, past.columns, arguments)
    reset = _table(arguments.get("reset"), "reset", inputs)
    borders = _borders(inputs, arguments)
    if borders is not None:
        reset = borders if reset is None else reset | borders
    positions = arguments.get("position_ids")
    if positions is None or not inputs.shape[0] or not inputs.shape[1]:
        return Documents(mask, reset, None, _shift_without_positions(past, mask, reset))
    read = _read_before(past, arguments.get("attention_mask"))
    return _from_positions(_positions(positions, inputs), past, read, mask, reset, first)


def _table(argument: Any, name: str, inputs: Tensor) -> Tensor | None:
    """A (batch, length) argument as booleans."""
    if argument is None:
        return None
    expected = tuple(inputs.shape[:2])
    if not isinstance(argument, Tensor) or tuple(argument.shape) != expected:
        shape = tuple(argument.shape) if isinstance(argument, Tensor) else type(argument).__name__
        raise ConfigError(f"{name}: expected a bool tensor of shape {expected}, got {shape}")
    return argument.to(device=inputs.device, dtype=torch.bool)


def _mask(inputs: Tensor, columns: int, arguments: Mapping[str, Any]) -> Tensor | None:
    """Real tokens among the columns of this call; None = all."""
    wide = arguments.get("attention_mask")
    mask = _table(arguments.get("mask"), "mask", inputs)
    if wide is not None:
        if mask is not None:
            raise ConfigError("attention_mask and mask say the same thing; pass one of them")
        if not isinstance(wide, Tensor) or wide.ndim != 2:
            shape = tuple(wide.shape) if isinstance(wide, Tensor) else type(wide).__name__
            raise UnsupportedError(
                f"attention_mask of shape {shape}: this model takes (batch, length), 1 for real tokens; who sees whom "
                "is up to its mechanism (cache_implementation = 'static' makes such masks: leave it out)"
            )
        batch, length = inputs.shape[:2]
        if wide.shape[0] != batch or wide.shape[1] not in (length, columns + length):
            past = f" or {(batch, columns + length)}" if columns else ""
            raise ConfigError(f"attention_mask: expected shape {(batch, length)}{past}, got {tuple(wide.shape)}")
        mask = wide[:, wide.shape[1] - length :].to(device=inputs.device, dtype=torch.bool)
    return mask


def _borders(inputs: Tensor, arguments: Mapping[str, Any]) -> Tensor | None:
    """Resets where `cu_seq_lens_q` or `seq_idx` begin another sequence inside the call; None = nowhere.

    Whether the first sequence of a call goes on with what the state holds they do not say: it does.
    """
    queries, keys, index = (arguments.get(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"))
    batch, length = inputs.shape[:2]
    borders: Tensor | None = None
    if index is not None:
        if index.shape[-1] != length or index.ndim != 2 or index.shape[0] not in (1, batch):
            raise ConfigError(f"seq_idx: expected shape {(batch, length)}, got {tuple(index.shape)}")
        changes = (index[:, 1:] != index[:, :-1]).to(inputs.device).expand(batch, -1)
        borders = torch.cat([changes.new_zeros(batch, min(length, 1)), changes], 1)
    if queries is None:
        if keys is not None or any(arguments.get(name) is not None for name in ("max_length_q", "max_length_k")):
            raise ConfigError("cu_seq_lens_k, max_length_q and max_length_k say nothing without cu_seq_lens_q")
        return borders
    if keys is not None and (keys.shape != queries.shape or not torch.equal(keys.to(queries.device), queries)):
        raise UnsupportedError(
            "cu_seq_lens_k differs from cu_seq_lens_q: earlier keys come from the state here, and never with the call"
        )
    ends = queries.tolist() if queries.ndim == 1 else []
    rising = all(low <= high for low, high in itertools.pairwise(ends))
    if len(ends) < 2 or ends[0] != 0 or not rising or ends[-1] > batch * length:
        raise ConfigError(
            f"cu_seq_lens_q: expected the borders of sequences, rising from 0 to {batch * length} tokens at most"
        )
    inside = [end for end in ends[1:] if end < batch * length and end % length]
    flat = torch.zeros(batch * length, dtype=torch.bool, device=inputs.device)
    flat[torch.tensor(inside, dtype=torch.int64, device=inputs.device)] = True
    marked = flat.view(batch, length)
    return marked if borders is None else marked | borders


def _positions(positions: Any, inputs: Tensor) -> Tensor:
    batch, length = inputs.shape[:2]
    if not isinstance(positions, Tensor) or positions.is_floating_point() or positions.dtype == torch.bool:
        raise ConfigError("position_ids: expected whole numbers of shape (batch, length)")
    if positions.ndim > 2:
        raise UnsupportedError(
            f"position_ids of shape {tuple(positions.shape)}: positions in several dimensions (multimodal RoPE) mean "
            "nothing to a mechanism that counts tokens; pass (batch, length)"
        )
    table = positions[None] if positions.ndim == 1 else positions
    if table.shape[0] not in (1, batch) or table.shape[1] != length:
        raise ConfigError(f"position_ids: expected shape {(batch, length)}, got {tuple(positions.shape)}")
    return table.to(device=inputs.device, dtype=torch.int64).expand(batch, -1)


def _shift_without_positions(past: Past, mask: Tensor | None, reset: Tensor | None) -> Tensor | None:
    """The shift behind a call that gives no positions: a document that starts in it is counted as the state does."""
    if past.shift is None or reset is None:
        return past.shift
    return past.shift.masked_fill(reset.any(1), 0)


def _read_before(past: Past, mask: Tensor | None) -> Tensor:
    """(batch,) tokens of earlier calls that the mask of this one calls real."""
    if mask is None or mask.shape[1] <= past.columns:
        return torch.full_like(past.live, past.columns)
    return mask[:, : past.columns].bool().sum(1).to(past.live.device)


def _from_positions(
    positions: Tensor, past: Past, read: Tensor, mask: Tensor | None, reset: Tensor | None, first: int
) -> Documents:
    """See `documents`; all rows at once, and one read of the device."""
    batch, length = positions.shape
    column = torch.arange(length, device=positions.device).expand(batch, -1)
    latest = column if mask is None else torch.where(mask, column, -1).cummax(1).values
    # the column of the real token before each one; -1 = it is in the state
    previous = torch.cat([latest.new_full((batch, 1), -1), latest[:, :-1]], 1)
    shift = torch.zeros_like(past.live) if past.shift is None else past.shift
    # `generate` counts all that its mask calls real, whatever documents began in between
    recounts = (previous < 0) & (positions == (read + first)[:, None]) & (read > 0)[:, None]
    if mask is not None:
        recounts = recounts & mask
    shift = torch.where(recounts.any(1), read - past.live, shift)
    behind = past.live + shift + (first - 1)
    before = torch.where(previous < 0, behind[:, None], positions.gather(1, previous.clamp(min=0)))
    starts = (positions == first) & (positions != before + 1)
    opens = (previous < 0) & (past.live == 0)[:, None] & (positions >= first)
    resets = torch.zeros_like(opens)
    if reset is not None:
        # a reset on padding acts on the next real token
        count = torch.cat([reset.new_zeros(batch, 1, dtype=torch.int64), reset.cumsum(1)], 1)
        resets = (count[:, 1:] > count.gather(1, previous + 1)) & (positions >= first)
    starts = starts & ~opens & ~resets
    wrong = ~(starts | opens | resets | (positions == before + 1))
    if mask is not None:
        starts, opens, resets, wrong = starts & mask, opens & mask, resets & mask, wrong & mask
    begun = torch.where(starts | opens | resets, column, -1).amax(1)
    ahead = positions.gather(1, begun.clamp(min=0)[:, None])[:, 0] - first
    shift = torch.where(begun < 0, shift, ahead)
    if reset is not None and mask is not None:
        # one behind the last real token: what comes next begins anew
        shift = shift.masked_fill(count[:, -1] > count.gather(1, latest[:, -1:] + 1)[:, 0], 0)
    anywhere = opens & ~resets & (positions > first)
    flags = torch.stack([wrong.any(), starts.any(), (shift != 0).any(), anywhere.any()])
    bad, packed, shifted, ahead = flags.tolist()
    if bad:
        at_row, at_column = (int(index) for index in wrong.nonzero()[0])
        at, goes_on = int(positions[at_row, at_column]), int(before[at_row, at_column]) + 1
        raise ConfigError(
            f"position_ids: row {at_row} has {at} at column {at_column}, where {goes_on} would continue its document "
            f"and {first} start another; padding goes by attention_mask"
        )
    if packed:
        reset = starts if reset is None else reset | starts
    plain = positions if mask is None else positions.masked_fill(~mask, first)
    return Documents(mask, reset, plain, shift if shifted else None, ahead)
