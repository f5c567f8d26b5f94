"""The tiles of Transformer-XL's relative attention: the shift by strides, the forward and the backward pass.

With d = memory + i - c the distance of query i and key column c, a tile needs (q_i + v) . r_d for its keys. The product
with all distances, farthest first, fills rows of `width` numbers; the same memory read with rows one number shorter
moves each row by one against the row above, which is the shift from distances to keys. Cells outside a row's data hold
-inf, so what the shift brings in from beyond is hidden. The backward pass reads the gradients of the scores with rows
one number longer, which moves them back.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longspan import host
from longspan.ops import flash
from longspan.ops.first_order import FirstOrder
from longspan.ops.tiled import is_view, new_like_heads
from longspan.ops.tiles import ALIGN, HIDDEN, Block, Part, Plan, Run, Visibility, make_blocks, make_parts, take

FORWARD_ENTRIES = 1 << 20  # position scores of one kernel call
BACKWARD_ENTRIES = 1 << 20  # scores of one backward tile over its heads: they stay in cache


class Relative(NamedTuple):
    """What a call needs beside tensors with gradients.

    Attributes:
        forward: tiles of the forward pass.
        backward: tiles of the backward pass, cut at borders where these are columns.
        scale: factor of the scores.
        visibility: what hides keys row by row.
        border: None, a number of query columns per segment, or (batch, length) key columns.
    """

    forward: Plan
    backward: Plan
    scale: float
    visibility: Visibility | None
    border: int | Tensor | None


class Shift:
    """A buffer for the position scores of a run: written by distance, read by key."""

    def __init__(self, plan: Plan, run: Run, rows: int, like: Tensor) -> None:
        self.distances = plan.distances(run)
        # the place of key c in row i's data is c - i + skew
        skew = self.distances - 1 - plan.offset(run)
        front = _round_up(max(0, -skew))
        self.width = _round_up(self.distances + run.queries + max(0, -skew))
        self.queries, self.keys, self.begin = run.queries, run.keys, front + skew
        self.flat = like.new_empty(front + rows * self.width)
        self.flat[:front].fill_(-math.inf)
        self.rows = self.flat[front:].view(rows, self.width)
        self.rows[:, self.distances :].fill_(-math.inf)

    def by_distance(self, heads: int, rows: int) -> Tensor:
        """(heads, rows, distances), farthest first, to write the position scores into."""
        return self.rows[: heads * rows].view(heads, rows, self.width)[:, :, : self.distances]

    def by_key(self, heads: int, tiles: int) -> Tensor:
        """(heads, tiles, queries, keys): the same numbers, -inf where the pattern hides a key."""
        tile = self.queries * self.width
        size = (heads, tiles, self.queries, self.keys)
        return self.flat.as_strided(size, (tiles * tile, tile, self.width - 1, 1), self.begin)


class Unshift:
    """A buffer for gradients of the scores of a run: written by key, read by distance."""

    def __init__(self, plan: Plan, run: Run, heads: int, tiles: int, like: Tensor) -> None:
        self.distances = plan.distances(run)
        skew = max(0, self.distances - 1 - plan.offset(run))
        self.shift = self.distances - 1 - plan.offset(run)
        self.heads, self.tiles, self.run = heads, tiles, run
        self.width = run.keys + skew
        # several tiles of one head are read as one matrix: each must then lie one longer row further
        self.tile = run.queries * (self.width + (tiles > 1))
        self.front = skew
        self.flat = like.new_zeros(self.front + heads * tiles * self.tile)

    def by_key(self) -> Tensor:
        """(heads * tiles, queries, keys)."""
        size = (self.heads * self.tiles, self.run.queries, self.run.keys)
        return self.flat.as_strided(size, (self.tile, self.width, 1), self.front)

    def grouped(self, group: int) -> Tensor:
        """(heads / group * tiles, group * queries, keys); group 1 or one tile."""
        if group == 1:
            return self.by_key()
        size = (self.heads // group, group * self.run.queries, self.run.keys)
        return self.flat.as_strided(size, (group * self.tile, self.width, 1), self.front)

    def by_distance(self) -> Tensor:
        """(heads, tiles * queries, distances), farthest first."""
        size = (self.heads, self.tiles * self.run.queries, self.distances)
        stride = (self.tiles * self.tile, self.width + 1, 1)
        return self.flat.as_strided(size, stride, self.front - self.shift)


def _round_up(value: int) -> int:
    return -(-value // ALIGN) * ALIGN


def relative_forward(q: Tensor, k: Tensor, v: Tensor, r: Tensor, u: Tensor, w: Tensor, spec: Relative) -> Tensor:
    """Relative attention without autograd.

    Args:
        q: (batch, heads, length, head_dim).
        k: (batch, kv_heads, memory + length, head_dim).
        v: like k.
        r: (heads, distances, head_dim), farthest distance first, distance 0 last.
        u: (heads, head_dim) content bias.
        w: (heads, head_dim) position bias.
        spec: the plan.

    Returns:
        (batch, heads, length, head_dim) in q's dtype.
    """
    plan, dtype, target = spec.forward, flash.working_dtype(q, k, v), q.dtype
    q, k, v, r, u, w = (t.to(dtype) for t in (q, k, v, r, u, w))
    heads, batch = q.shape[1], q.shape[0]
    out = new_like_heads(q, q.shape[2], heads, v.shape[3], zero=False, dtype=target)
    with flash.full_precision(q.device):
        r = (r * spec.scale).mT
        for run in plan.runs:
            distances = plan.distances(run)
            most = max(1, FORWARD_ENTRIES // (heads * run.queries * (distances + run.queries)))
            blocks = list(make_blocks(run, batch, most))
            largest = max(block.rows * block.tiles for block in blocks)
            shift = Shift(plan, run, heads * largest * run.queries, q)
            for block in blocks:
                tiles, queries = block.rows * block.tiles, run.queries
                query = take(q, block, run.start, queries, run.step)
                moved = q.new_empty(heads, tiles, queries, q.shape[3])
                torch.add(query.transpose(0, 1), w[:, None, None], out=moved)
                torch.bmm(
                    moved.view(heads, tiles * queries, -1),
                    r[:, :, -distances:],
                    out=shift.by_distance(heads, tiles * queries),
                )
                bias = shift.by_key(heads, tiles)
                seen = None if spec.visibility is None else spec.visibility.seen(run, block)
                if seen is not None:
                    bias.masked_fill_(~seen.transpose(0, 1), HIDDEN)
                part, _ = flash.attend(
                    query + u[:, None],
                    take(k, block, run.low, run.keys, run.step),
                    take(v, block, run.low, run.keys, run.step),
                    scale=spec.scale,
                    mask=bias.transpose(0, 1),
                )
                take(out, block, run.start, queries, run.step).copy_(part)
    return out


class RelativeTiles(FirstOrder):
    """Recomputes each tile's weights in the backward pass and adds into gradients allocated once."""

    what = "relative attention"

    @staticmethod
    def forward(ctx: Any, spec: Relative, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        """`relative_forward`; rest is r, u, w and, where there is a border, stale k and v, used for gradients only."""
        out = relative_forward(q, k, v, rest[0], rest[1], rest[2], spec)
        ctx.save_for_backward(q, k, v, *rest[:3], out)
        ctx.spec = spec
        ctx.stale_dtypes = [t.dtype for t in rest[3:]]
        return out

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v, r, u, w and of stale k and v."""
        with flash.full_precision(grad.device):
            work = _Backward(grad, saved, ctx.spec, len(ctx.stale_dtypes) > 0)
            found = work.run()
        dtypes = [t.dtype for t in saved[:6]] + ctx.stale_dtypes
        return (None, *(g.to(dtype) for g, dtype in zip(found, dtypes, strict=True)))


relative_tiles: Callable[..., Tensor] = RelativeTiles.apply


class _Backward:
    """The gradients of one call and how they are gathered, part by part and tile by tile."""

    def __init__(self, grad: Tensor, saved: tuple[Tensor, ...], spec: Relative, stale: bool) -> None:
        dtype = flash.working_dtype(*saved[:3])
        q, k, v, r, u, w, out = (t.to(dtype) for t in saved)
        self.inputs, self.r, self.u, self.w = (q, k, v, out, grad.to(dtype)), r, u, w
        self.spec, self.plan, self.stale = spec, spec.backward, stale
        self.r_scaled = (r * spec.scale).mT
        self.group = q.shape[1] // k.shape[1]
        self.dq = new_like_heads(q, q.shape[2], q.shape[1], q.shape[3], zero=False, dtype=dtype)
        keyed = (k, v, k, v) if stale else (k, v)
        self.keyed = [new_like_heads(t, t.shape[2], t.shape[1], t.shape[3], zero=True, dtype=dtype) for t in keyed]
        self.dr, self.du, self.dw = torch.zeros_like(r), torch.zeros_like(u), torch.zeros_like(w)

    def run(self) -> list[Tensor]:
        """All gradients, in the order of the function's inputs."""
        q, k = self.inputs[:2]
        size = self.group * max((run.queries * run.keys for run in self.plan.runs), default=1)
        # queries of a group are rows of one product, which several batch rows would tear apart
        for part in make_parts(q.shape[0], k.shape[1], size, BACKWARD_ENTRIES, one_row=self.group > 1):
            self._part(part)
        return [self.dq, *self.keyed[:2], self.dr, self.du, self.dw, *self.keyed[2:]]

    def _part(self, part: Part) -> None:
        heads = slice(part.heads.start * self.group, part.heads.stop * self.group)
        spans = (heads, part.heads, part.heads, heads, heads)
        # heads before batch rows: the distances of a head are shared by its batch rows
        views = [t[part.rows, h].transpose(0, 1).flatten(0, 1) for t, h in zip(self.inputs, spans, strict=True)]
        slots = [t[part.rows, h].transpose(0, 1) for t, h in self._slots(part, heads)]
        totals = [_scratch(t) for t in slots]
        rows = part.rows.stop - part.rows.start
        for run in self.plan.runs:
            _Tile(self, run, rows, heads, views, totals).run_all(part)
        for slot, total in zip(slots, totals, strict=True):
            if not is_view(slot):
                slot.copy_(total.view(slot.shape))

    def _slots(self, part: Part, heads: slice) -> list[tuple[Tensor, slice]]:
        return [(self.dq, heads), *((t, part.heads) for t in self.keyed)]


def _scratch(slot: Tensor) -> Tensor:
    """A gradient slot (heads, rows, ...) as (heads * rows, ...): itself where there is one row, else a copy."""
    return slot[:, 0] if slot.shape[1] == 1 else slot.flatten(0, 1)


class _Tile:
    """The buffers of one run and the products of one tile; h = heads x batch rows of the part."""

    def __init__(
        self, owner: _Backward, run: Run, rows: int, heads: slice, views: list[Tensor], totals: list[Tensor]
    ) -> None:
        self.owner, self.run, self.rows, self.heads = owner, run, rows, heads
        self.q, self.k, self.v, self.out, self.grad = views
        self.dq, *self.keyed = totals
        self.count = heads.stop - heads.start
        self.items, self.height = self.k.shape[0], owner.group * run.queries
        self.distances = owner.plan.distances(run)
        like = self.q
        self.shift = Shift(owner.plan, run, self.count * rows * run.queries, like)
        self.unshift = Unshift(owner.plan, run, self.count, rows, like)
        self.scores = like.new_empty(self.count * rows, run.queries, run.keys)
        self.weights = torch.empty_like(self.scores)
        self.grouped = self.scores.view(self.items, self.height, run.keys)
        self.content = like.new_empty(self.count, rows, run.queries, like.shape[-1])
        self.position = torch.empty_like(self.content)
        self.r = owner.r[heads, -self.distances :]
        self.r_scaled = owner.r_scaled[heads, :, -self.distances :]
        self.u = owner.u[heads, None, None]
        self.w = owner.w[heads, None, None]

    def run_all(self, part: Part) -> None:
        for tile in range(self.run.tiles):
            self._tile(part, tile)

    def _tile(self, part: Part, tile: int) -> None:
        run, rows, count, owner = self.run, self.rows, self.count, self.owner
        scale, dim = owner.spec.scale, self.q.shape[-1]
        start, low = run.start + tile * run.step, run.low + tile * run.step
        here, there = slice(start, start + run.queries), slice(low, low + run.keys)
        query = self.q[:, here].reshape(count, rows, run.queries, dim)
        torch.add(query, self.u, out=self.content)
        torch.add(query, self.w, out=self.position)
        content = self.content.view(self.items, self.height, dim)
        position = self.position.view(count, rows * run.queries, dim)
        grad = self.grad[:, here]
        inner = (grad * self.out[:, here]).sum(-1, keepdim=True).mul_(-scale)
        grad = grad.reshape(self.items, self.height, -1)

        torch.bmm(position, self.r_scaled, out=self.shift.by_distance(count, rows * run.queries))
        bias = self.shift.by_key(count, rows)
        block = Block(part.rows.start, rows, tile, 1)
        seen = None if owner.spec.visibility is None else owner.spec.visibility.seen(run, block)
        if seen is not None:
            bias.masked_fill_(~seen.transpose(0, 1), HIDDEN)
        self.scores.view(bias.shape).copy_(bias)
        self.grouped.baddbmm_(content, self.k[:, there].mT, alpha=scale)
        torch.softmax(self.scores, -1, out=self.weights)
        self.scores.copy_(inner)
        self.grouped.baddbmm_(grad, self.v[:, there].mT, alpha=scale)
        torch.mul(self.scores, self.weights, out=self.unshift.by_key())

        slope = self.unshift.grouped(owner.group)
        self._spread(start, low, slope, content, grad, part)
        dcontent = torch.bmm(slope, self.k[:, there]).view(count, rows * run.queries, dim)
        shifted = self.unshift.by_distance()
        dposition = torch.bmm(shifted, self.r)
        owner.dr[self.heads, -self.distances :].baddbmm_(shifted.mT, position)
        owner.du[self.heads] += dcontent.sum(1)
        owner.dw[self.heads] += dposition.sum(1)
        self.dq[:, here] = dcontent.add_(dposition).view(count * rows, run.queries, dim)

    def _spread(self, start: int, low: int, slope: Tensor, content: Tensor, grad: Tensor, part: Part) -> None:
        """Add to the gradients of the keys and values: those before the border to the stale ones."""
        weights = self.weights.view(self.items, self.height, self.run.keys)
        high, border = low + self.run.keys, self.owner.spec.border

        def add(index: int, begin: int, end: int, mask: Tensor | None = None) -> None:
            if begin >= end:
                return
            columns, keys = slice(begin, end), slice(begin - low, end - low)
            parts = [t[:, :, keys] if mask is None else t[:, :, keys] * mask for t in (slope, weights)]
            self.keyed[index][:, columns].baddbmm_(parts[0].mT, content)
            self.keyed[index + 1][:, columns].baddbmm_(parts[1].mT, grad)

        if not self.owner.stale or border is None:
            add(0, low, high)
            return
        if isinstance(border, int):
            middle = min(max(self.owner.plan.memory + start // border * border, low), high)
            add(2, low, middle)
            add(0, middle, high)
            return
        first = border[part.rows, start : start + self.run.queries].clamp(low, high)
        read, least, most = host.values(border), low, high
        if read is not None:
            read = read[part.rows, start : start + self.run.queries].clip(low, high)
            least, most = int(read.min()), int(read.max())
        add(2, low, least)
        add(0, most, high)
        if least < most:
            own = torch.arange(least, most, device=border.device) >= first[:, :, None]
            shape = (self.count, self.rows, self.run.queries, most - least)
            mine = own.expand(shape).reshape(self.items, self.height, most - least)
            add(0, least, most, mine)
            add(2, least, most, ~mine)
