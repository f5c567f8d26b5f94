"""Padding and documents of a call, derived from the arguments that callers of transformers use.

`attention_mask` (or `mask`) says which tokens are real. Documents packed into one row are separated by `position_ids`
(`DataCollatorWithFlattening`), by `cu_seq_lens_q` or `seq_idx` (which it adds for flash attention), or by `reset`.
Positions on padding are ignored. On a real token, the position after the previous one continues the document (the
state's document across calls), the first position of the model (0) starts a document, and an empty row may start at any
position.
"""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longspan import host
from longspan.errors import ConfigError, UnsupportedError

PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Arguments by which transformers passes the starts of sequences to flash attention."""


class Documents(NamedTuple):
    """Padding of a call, and where documents start.

    Attributes:
        mask: (batch, length) bool, True = real token; None = all are.
        reset: (batch, length) bool, True = a new document starts here; None = nowhere.
        positions: (batch, length) int64, the caller's positions, the model's first one on padding; None = not passed.
        shift: (batch,) int64, how far the caller's position of a row's next token is ahead of the state's; None =
            equal.
        ahead: an empty row starts after the first position.
    """

    mask: Tensor | None
    reset: Tensor | None
    positions: Tensor | None
    shift: Tensor | None
    ahead: bool = False


class Past(NamedTuple):
    """Tokens of each row before a call.

    Attributes:
        live: (batch,) int64, tokens since the current document began.
        columns: columns read so far, padding included.
        shift: as in `Documents`.
    """

    live: Tensor
    columns: int
    shift: Tensor | None


@host.eager
def documents(inputs: Tensor, past: Past, arguments: Mapping[str, Any], first: int = 0) -> Documents:
    """Return the padding and documents of a call.

    Args:
        inputs: (batch, length) token ids or (batch, length, dim) embeddings.
        past: tokens of the rows before the call.
        arguments: of the call: attention_mask (batch, length) or (batch, past + length), mask (batch, length), reset
            (batch, length), position_ids (batch or 1, length), and those of `PACKING`; others are not read.
        first: the position id of a document's first token.

    Raises:
        ConfigError: wrong shapes, or positions that neither continue nor start a document.
        UnsupportedError: a mask that does more than mark padding, or positions in more than one dimension.
    """
    mask = _mask(inputs, past.columns, arguments)
    reset = _bool_table(arguments.get("reset"), "reset", inputs)
    borders = _sequence_starts(inputs, arguments)
    if borders is not None:
        reset = borders if reset is None else reset | borders
    positions = arguments.get("position_ids")
    if positions is None or not inputs.shape[0] or not inputs.shape[1]:
        return Documents(mask, reset, None, _shift_without_positions(past, mask, reset))
    read = _read_before(past, arguments.get("attention_mask"))
    return _from_positions(_positions(positions, inputs), past, read, mask, reset, first)


def _bool_table(argument: Any, name: str, inputs: Tensor) -> Tensor | None:
    """Check a (batch, length) argument and convert it to bool; None stays None."""
    if argument is None:
        return None
    expected = tuple(inputs.shape[:2])
    if not isinstance(argument, Tensor) or tuple(argument.shape) != expected:
        shape = tuple(argument.shape) if isinstance(argument, Tensor) else type(argument).__name__
        raise ConfigError(f"{name}: expected a bool tensor of shape {expected}, got {shape}")
    return argument.to(device=inputs.device, dtype=torch.bool)


def _mask(inputs: Tensor, columns: int, arguments: Mapping[str, Any]) -> Tensor | None:
    """Return the mask (batch, length) of real tokens in this call; None = all.

    Args:
        inputs: (batch, length) token ids or (batch, length, dim) embeddings.
        columns: number of columns of earlier calls, which attention_mask may cover, too.
        arguments: attention_mask and mask of the call.
    """
    wide = arguments.get("attention_mask")
    mask = _bool_table(arguments.get("mask"), "mask", inputs)
    if wide is not None:
        if mask is not None:
            raise ConfigError("attention_mask and mask have the same meaning; pass only one of them")
        if not isinstance(wide, Tensor) or wide.ndim != 2:
            shape = tuple(wide.shape) if isinstance(wide, Tensor) else type(wide).__name__
            raise UnsupportedError(
                f"attention_mask has shape {shape}; this model needs (batch, length), 1 for real tokens, as its "
                "mechanism decides which keys are visible (leave out cache_implementation = 'static', which makes such "
                "masks)"
            )
        batch, length = inputs.shape[:2]
        if wide.shape[0] != batch or wide.shape[1] not in (length, columns + length):
            past = f" or {(batch, columns + length)}" if columns else ""
            raise ConfigError(f"attention_mask: expected shape {(batch, length)}{past}, got {tuple(wide.shape)}")
        mask = wide[:, wide.shape[1] - length :].to(device=inputs.device, dtype=torch.bool)
    return mask


def _sequence_starts(inputs: Tensor, arguments: Mapping[str, Any]) -> Tensor | None:
    """Return resets (batch, length) where `cu_seq_lens_q` or `seq_idx` start a sequence inside the call; None =
    nowhere.

    They do not say whether the first sequence of a call continues that of the state; it does.
    """
    queries, keys, index = (arguments.get(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"))
    batch, length = inputs.shape[:2]
    starts: Tensor | None = None
    if index is not None:
        if index.shape[-1] != length or index.ndim != 2 or index.shape[0] not in (1, batch):
            raise ConfigError(f"seq_idx: expected shape {(batch, length)}, got {tuple(index.shape)}")
        changes = (index[:, 1:] != index[:, :-1]).to(inputs.device).expand(batch, -1)
        starts = torch.cat([changes.new_zeros(batch, min(length, 1)), changes], 1)
    if queries is None:
        if keys is not None or any(arguments.get(name) is not None for name in ("max_length_q", "max_length_k")):
            raise ConfigError("cu_seq_lens_k, max_length_q and max_length_k need cu_seq_lens_q; pass it too")
        return starts
    if keys is not None and (keys.shape != queries.shape or not torch.equal(keys.to(queries.device), queries)):
        raise UnsupportedError(
            "cu_seq_lens_k differs from cu_seq_lens_q; pass equal ones, as earlier keys come from the state"
        )
    ends = queries.tolist() if queries.ndim == 1 else []
    rising = all(low <= high for low, high in itertools.pairwise(ends))
    if len(ends) < 2 or ends[0] != 0 or not rising or ends[-1] > batch * length:
        raise ConfigError(
            f"cu_seq_lens_q: expected increasing starts of sequences, from 0 to at most {batch * length} tokens"
        )
    inside = [end for end in ends[1:] if end < batch * length and end % length]
    flat = torch.zeros(batch * length, dtype=torch.bool, device=inputs.device)
    flat[torch.tensor(inside, dtype=torch.int64, device=inputs.device)] = True
    marked = flat.view(batch, length)
    return marked if starts is None else marked | starts


def _positions(positions: Any, inputs: Tensor) -> Tensor:
    """Check position_ids and return them as (batch, length) int64."""
    batch, length = inputs.shape[:2]
    if not isinstance(positions, Tensor) or positions.is_floating_point() or positions.dtype == torch.bool:
        got = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
        raise ConfigError(f"position_ids: expected integers of shape {(batch, length)}, got {got}")
    if positions.ndim > 2:
        raise UnsupportedError(
            f"position_ids has shape {tuple(positions.shape)}; positions in several dimensions (multimodal RoPE) are "
            "not supported, pass (batch, length)"
        )
    table = positions[None] if positions.ndim == 1 else positions
    if table.shape[0] not in (1, batch) or table.shape[1] != length:
        raise ConfigError(f"position_ids: expected shape {(batch, length)}, got {tuple(positions.shape)}")
    return table.to(device=inputs.device, dtype=torch.int64).expand(batch, -1)


def _shift_without_positions(past: Past, mask: Tensor | None, reset: Tensor | None) -> Tensor | None:
    """Return `shift` after a call without position_ids: 0 for rows in which a document starts."""
    if past.shift is None or reset is None:
        return past.shift
    return past.shift.masked_fill(reset.any(1), 0)


def _read_before(past: Past, mask: Tensor | None) -> Tensor:
    """Return the number (batch,) of tokens of earlier calls that the mask of this call marks as real."""
    if mask is None or mask.shape[1] <= past.columns:
        return torch.full_like(past.live, past.columns)
    return mask[:, : past.columns].bool().sum(1).to(past.live.device)


def _from_positions(
    positions: Tensor, past: Past, read: Tensor, mask: Tensor | None, reset: Tensor | None, first: int
) -> Documents:
    """Derive the documents of a call from its position_ids; see `documents`.

    All rows are processed at once, with one read from the device.

    Args:
        positions: (batch, length) position ids.
        past: tokens of the rows before the call.
        read: (batch,) tokens of earlier calls that the mask marks as real.
        mask, reset: (batch, length) bool; None = all real, no reset.
        first: the position id of a document's first token.
    """
    batch, length = positions.shape
    column = torch.arange(length, device=positions.device).expand(batch, -1)
    latest = column if mask is None else torch.where(mask, column, -1).cummax(1).values
    # column of the previous real token; -1 = it is in the state
    previous = torch.cat([latest.new_full((batch, 1), -1), latest[:, :-1]], 1)
    shift = torch.zeros_like(past.live) if past.shift is None else past.shift
    # `generate` counts all tokens that its mask marks as real, across documents
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
        # with a reset after the last real token, the next token starts a document at 0
        shift = shift.masked_fill(count[:, -1] > count.gather(1, latest[:, -1:] + 1)[:, 0], 0)
    anywhere = opens & ~resets & (positions > first)
    flags = torch.stack([wrong.any(), starts.any(), (shift != 0).any(), anywhere.any()])
    bad, packed, shifted, ahead = flags.tolist()
    if bad:
        at_row, at_column = (int(index) for index in wrong.nonzero()[0])
        position, next_position = int(positions[at_row, at_column]), int(before[at_row, at_column]) + 1
        raise ConfigError(
            f"position_ids: row {at_row} has {position} in column {at_column}; use {next_position} to continue the "
            f"document or {first} to start another, and mark padding by attention_mask"
        )
    if packed:
        reset = starts if reset is None else reset | starts
    plain = positions if mask is None else positions.masked_fill(~mask, first)
    return Documents(mask, reset, plain, shift if shifted else None, ahead)
