"""Blocks of two residual streams, whose activations are found again from their outputs.

    y1 = x1 + mixer(norm(x2))       x2 = y2 - ffn(norm(y1))
    y2 = x2 + ffn(norm(y1))         x1 = y1 - mixer(norm(x2))

Sources: Gomez et al. 2017, "The Reversible Residual Network", equations 6 and 7 (section 3.1); Kitaev et al. 2020,
"Reformer", section 3. Both streams are as wide as the model and begin as the embeddings; their mean goes into the last
norm, where it is the sum. Reformer's code concatenates them instead, which makes the output layer twice as wide and
unties it from the embeddings: `streams = "both"`.

In training the last values of the two streams are all that is kept of the activations, whatever the depth. What does
grow with it, as little as it is: the states of the layers (given and returned, as without reversibility), a copy of
torch's generator for each sublayer (5 KB on a CPU), so that dropout is drawn again as it was, and the choices of
`longspan.contract.replay` (buckets). The price is a second forward pass in the backward pass.

Gradients are those of autograd through the same equations, for whatever the blocks take: embeddings, parameters, the
state that was given; penalties and the returned state have a graph as in other models, so the caller cuts
(`longspan.state.detach`) as usual. Reconstruction rounds: the streams are held in fp32 at least, where the weights are
narrower too (in bf16 what is subtracted would not be what was added). Second derivatives are refused.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from longspan import state as states
from longspan.contract.replay import Choices
from longspan.engine.first_order import FirstOrder
from longspan.mixers import Rows
from longspan.models.blocks import Block


class Streamed(NamedTuple):
    """What a run over all blocks gives: hidden states (B, N, dim or 2 dim), a state a layer, auxiliary losses."""

    hidden: Tensor
    following: list[Any]
    losses: list[Tensor]


def run_reversible(
    blocks: Sequence[Block],
    h: Tensor,
    before: Sequence[Any] | None,
    rows: Rows,
    collect: bool,
    streams: Literal["mean", "both"] = "mean",
    inputs: list[Tensor] | None = None,
) -> Streamed:
    """All blocks, by two streams.

    Args:
        blocks: pre-norm ones.
        h: (B, N, dim), gathered embeddings: both streams begin with them.
        before: one state a layer; None = empty past.
        rows: the layout of the call.
        collect: gather auxiliary losses.
        streams: what of them is returned: their mean, or both side by side, y1 first.
        inputs: what each block begins with is appended in the same form; activations are then stored, as they are
            outputs.
    """
    call = _Call(blocks, [None] * len(blocks) if before is None else list(before), rows, collect, h.dtype)
    wide = h if h.element_size() >= 4 else h.float()
    given = call.given()
    if inputs is None and states.needs_grad(h, *given):
        found = cast("tuple[Tensor, ...]", _TwoStreams.apply(call, wide, *given))
        y1, y2, losses, following = call.sort_out(found)
    else:
        y1 = y2 = wide
        losses, following = [], []
        for index, block in enumerate(blocks):
            if inputs is not None:
                inputs.append(_joined(y1, y2, streams).to(h.dtype))
            f, after, penalties = block.attend(y2.to(h.dtype), call.before[index], rows, collect)
            y1 = y1 + f
            y2 = y2 + block.feed(y1.to(h.dtype))
            following.append(after)
            losses += penalties
    return Streamed(_joined(y1, y2, streams).to(h.dtype), following, losses)


def _joined(y1: Tensor, y2: Tensor, streams: Literal["mean", "both"]) -> Tensor:
    return torch.cat([y1, y2], -1) if streams == "both" else (y1 + y2) / 2


class _Replay:
    """What a sublayer found and did in the forward pass: random generators, and what it chose."""

    def __init__(self, like: Tensor) -> None:
        self.choices = Choices()
        self.generator = torch.get_rng_state()
        self.devices, self.generators = get_device_states(like)
        # said, as torch otherwise takes its own default, which others may have set
        self.kind = like.device.type if self.devices else "cuda"

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Inside, the same is drawn and chosen; outside, nothing was drawn."""
        with torch.random.fork_rng(devices=self.devices, device_type=self.kind):
            torch.set_rng_state(self.generator)
            set_device_states(self.devices, self.generators, device_type=self.kind)
            self.choices.rewind()
            yield


def _learning(*modules: nn.Module) -> list[Tensor]:
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


def _floats(state: Any) -> dict[str, Tensor]:
    return {name: t for name, t in states.tensors(state).items() if t.is_floating_point()}


class _Layer(NamedTuple):
    """Where a layer's part of the given tensors is, and how many it returns."""

    names: list[str]
    attending: int
    feeding: int


class _Call:
    """One call of all blocks: what `_TwoStreams` needs beside tensors.

    Given tensors are, layer by layer, the floating-point part of its state, the parameters of mixer and norm, and those
    of feed-forward and norm; returned are the streams, then layer by layer auxiliary losses and the next state's part.
    """

    def __init__(
        self, blocks: Sequence[Block], before: list[Any], rows: Rows, collect: bool, dtype: torch.dtype
    ) -> None:
        self.blocks, self.before, self.rows, self.collect, self.dtype = blocks, before, rows, collect, dtype
        self.layers: list[_Layer] = []
        self.replays: list[tuple[_Replay, _Replay]] = []
        self.following: list[Any] = []
        self.counts: list[tuple[int, list[str]]] = []
        self.autocast: tuple[str, bool, torch.dtype] | None = None

    def given(self) -> list[Tensor]:
        """The tensors that gradients may be wanted of."""
        found: list[Tensor] = []
        for block, before in zip(self.blocks, self.before, strict=True):
            floats = _floats(before)
            attending, feeding = _learning(block.mixer, block.mixer_norm), _learning(block.ffn, block.ffn_norm)
            self.layers.append(_Layer(list(floats), len(attending), len(feeding)))
            found += [*floats.values(), *attending, *feeding]
        return found

    def sort_out(self, found: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, list[Tensor], list[Any]]:
        """Returned tensors by what they are: two streams, losses, next states."""
        y1, y2, *rest = found
        losses: list[Tensor] = []
        following: list[Any] = []
        place = 0
        for after, (count, names) in zip(self.following, self.counts, strict=True):
            losses += rest[place : place + count]
            place += count
            parts = dict(zip(names, rest[place : place + len(names)], strict=True))
            place += len(names)
            following.append(states.replace(after, parts))
        self.following = []
        return y1, y2, losses, following

    @contextlib.contextmanager
    def precision(self, device: torch.device) -> Iterator[None]:
        """The autocast of the forward pass; casts are not cached, as those of the forward pass have no graph."""
        if self.autocast is None:
            kind = device.type
            self.autocast = (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        kind, enabled, dtype = self.autocast
        with torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False):
            yield


class _TwoStreams(FirstOrder):
    what = "a reversible stack"

    @staticmethod
    def forward(ctx: Any, call: _Call, h: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        y1 = y2 = h
        rest: list[Tensor] = []
        with call.precision(h.device):
            for block, before in zip(call.blocks, call.before, strict=True):
                attending = _Replay(h)
                rows = call.rows.with_choices(attending.choices)
                f, after, losses = block.attend(y2.to(call.dtype), before, rows, call.collect)
                y1 = y1 + f
                feeding = _Replay(h)
                y2 = y2 + block.feed(y1.to(call.dtype))
                floats = _floats(after)
                call.replays.append((attending, feeding))
                call.following.append(after)
                call.counts.append((len(losses), list(floats)))
                rest += [*losses, *floats.values()]
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y1, y2, *given)
        return y1, y2, *rest

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        y1, y2, *given = saved
        d1, d2 = (torch.zeros_like(y1) if d is None else d for d in gradients[:2])
        rest, wanted = list(gradients[2:]), list(ctx.needs_input_grad[2:])
        found: list[Tensor | None] = []
        with call.precision(y1.device):
            for index in reversed(range(len(call.blocks))):
                names, attending, feeding = call.layers[index]
                returned = call.counts[index][0] + len(call.counts[index][1])
                step = _Step(call, index, rest[len(rest) - returned :])
                own = len(given) - len(names) - attending - feeding
                old, wants = given[own : own + len(names)], wanted[own : own + len(names)]
                learnt = given[own + len(names) :]
                y2, d1, of_feeding = step.undo_feed(y1, y2, d1, d2, learnt[attending:])
                y1, d2, of_rest = step.undo_attend(y1, y2, d1, d2, old, wants, learnt[:attending])
                found = [*of_rest, *of_feeding, *found]
                del given[own:], wanted[own:], rest[len(rest) - returned :]
        return None, d1 + d2, *found


class _Step:
    """One block, backwards."""

    def __init__(self, call: _Call, index: int, gradients: list[Tensor | None]) -> None:
        self.call, self.block, self.gradients = call, call.blocks[index], gradients
        self.before, self.names = call.before[index], call.layers[index].names
        self.attending, self.feeding = call.replays[index]

    def undo_feed(
        self, y1: Tensor, y2: Tensor, d1: Tensor, d2: Tensor, learnt: list[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """x2, the gradient of y1, and those of parameters."""
        with torch.enable_grad(), self.feeding.again():
            x = y1.detach().requires_grad_()
            g = self.block.feed(x.to(self.call.dtype))
        own, *others = _gradients([g], [d2], [x, *learnt])
        return y2 - g.detach(), d1 if own is None else d1 + own, others

    def undo_attend(
        self, y1: Tensor, x2: Tensor, d1: Tensor, d2: Tensor, old: list[Tensor], wants: list[bool], learnt: list[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """x1, the gradient of x2, and those of the state that was given and of parameters."""
        call = self.call
        leaves = [t.detach().requires_grad_(want) for t, want in zip(old, wants, strict=True)]
        before = states.replace(states.detach(self.before), dict(zip(self.names, leaves, strict=True)))
        with torch.enable_grad(), self.attending.again():
            x = x2.detach().requires_grad_()
            rows = call.rows.with_choices(self.attending.choices)
            f, after, losses = self.block.attend(x.to(call.dtype), before, rows, call.collect)
        outputs = [f, *losses, *_floats(after).values()]
        inputs = [x, *(leaf for leaf, want in zip(leaves, wants, strict=True) if want), *learnt]
        own, *others = _gradients(outputs, [d1, *self.gradients], inputs)
        kept = iter(others)
        of_state = [next(kept) if want else None for want in wants]
        return y1 - f.detach(), d2 if own is None else d2 + own, [*of_state, *kept]


def _gradients(
    outputs: list[Tensor], gradients: Sequence[Tensor | None], inputs: list[Tensor]
) -> tuple[Tensor | None, ...]:
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
    if not pairs:
        return (None,) * len(inputs)
    kept, given = zip(*pairs, strict=True)
    return torch.autograd.grad(kept, inputs, given, allow_unused=True)
