"""Reversible blocks with two residual streams, whose activations are reconstructed from their outputs.

    y1 = x1 + mixer(norm(x2))       x2 = y2 - ffn(norm(y1))
    y2 = x2 + ffn(norm(y1))         x1 = y1 - mixer(norm(x2))

Sources: Gomez et al. 2017, "The Reversible Residual Network", equations 6 and 7 (section 3.1); Kitaev et al. 2020,
"Reformer", section 3. Both streams are as wide as the model and start as the embeddings; the last norm receives their
mean, where the papers have the sum. Reformer's code concatenates them instead, which makes the output layer twice as
wide and unties it from the embeddings: `streams = "both"`.

In training only the last values of the two streams are stored, whatever the depth. What still grows with depth: the
states of the layers, a copy of torch's generator for each sublayer (5 KB on a CPU), so that the same dropout is drawn
replaying, and the choices of `longspan.contract.replay` (buckets). The price is a second forward pass.

Gradients are those of autograd through the same equations, for all inputs of the blocks: embeddings, parameters and the
state. Penalties and the returned state have a graph as in other models, so the caller cuts it (`longspan.state.detach`)
as usual. Reconstruction rounds, so the streams are in fp32 at least, even if the weights are narrower (in bf16 the
subtraction would not backward the addition). Second derivatives are refused.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from longspan import state as states
from longspan.contract.replay import Choices
from longspan.engine.first_order import FirstOrder
from longspan.mixers import BatchLayout
from longspan.models.blocks import Block


def run_reversible(
    blocks: Sequence[Block],
    h: Tensor,
    before: Sequence[Any] | None,
    rows: BatchLayout,
    aux_losses: list[Tensor] | None,
    streams: Literal["mean", "both"] = "mean",
    inputs: list[Tensor] | None = None,
) -> tuple[Tensor, list[Any]]:
    """Run all blocks with two residual streams.

    Args:
        blocks: pre-norm blocks.
        h: (B, N, dim), gathered embeddings: the initial value of both streams.
        before: one state per layer; None = empty past.
        rows: layout of the call.
        aux_losses: a list to which auxiliary losses are appended; None = they are not needed.
        streams: "mean" returns the mean of the streams, "both" concatenates them, y1 first.
        inputs: a list to which the input of each block is appended in the same form; activations are then stored,
            because they are outputs.

    Returns:
        Hidden states (B, N, dim or 2 dim) and the next state of each layer.
    """
    call = _Call(blocks, before, rows, aux_losses is not None, h.dtype)
    y1 = y2 = h if h.element_size() >= 4 else h.float()
    inputs_of_layers = [t for layer in call.layers for t in layer.inputs]
    if inputs is None and states.needs_grad(h, *inputs_of_layers):
        y1, y2, *returned = cast("tuple[Tensor, ...]", _TwoStreams.apply(call, y1, *inputs_of_layers))
        losses, next_states = call.unpack(returned)
    else:
        losses, next_states = [], []
        for layer in call.layers:
            if inputs is not None:
                inputs.append(_joined(y1, y2, streams).to(h.dtype))
            f, after, added = layer.block.attend(y2.to(h.dtype), layer.before, rows, call.collect)
            y1 = y1 + f
            y2 = y2 + layer.block.feed(y1.to(h.dtype))
            next_states.append(after)
            losses += added
    if aux_losses is not None:
        aux_losses += losses
    return _joined(y1, y2, streams).to(h.dtype), next_states


def _joined(y1: Tensor, y2: Tensor, streams: Literal["mean", "both"]) -> Tensor:
    """Return the mean of the two streams, or both concatenated."""
    return torch.cat([y1, y2], -1) if streams == "both" else (y1 + y2) / 2


class _Replay:
    """Records random generators and discrete choices of a sublayer in the forward pass, to repeat them."""

    def __init__(self, like: Tensor) -> None:
        self.choices = Choices()
        self.generator = torch.get_rng_state()
        self.devices, self.generators = get_device_states(like)
        # explicit, because torch's default device type may have been changed
        self.kind = like.device.type if self.devices else "cuda"

    @contextlib.contextmanager
    def replaying(self) -> Iterator[None]:
        """Context with gradients in which the same random numbers and choices occur;
        afterwards generators are restored.
        """
        with torch.random.fork_rng(devices=self.devices, device_type=self.kind), torch.enable_grad():
            torch.set_rng_state(self.generator)
            set_device_states(self.devices, self.generators, device_type=self.kind)
            self.choices.rewind()
            yield


def _learning(*modules: nn.Module) -> list[Tensor]:
    """Return the parameters of modules that require gradients."""
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


def _floats(state: Any) -> dict[str, Tensor]:
    """Return the floating-point tensors of a state by name."""
    return {name: t for name, t in states.tensors(state).items() if t.is_floating_point()}


class _Layer:
    """One block in a call.

    Attributes:
        block, before: the block, and its state before the call.
        names: names of the floating-point tensors of that state.
        inputs: tensors that may need gradients: those tensors, the parameters of mixer and norm (`attending` of them),
            and those of feed-forward and norm.
        replays: records of the mixer and of the feed-forward.
        after, losses, after_names: the next state, how many auxiliary losses the block added, and the names of the
            floating-point tensors of that state; the autograd function returns these losses and tensors.
    """

    replays: tuple[_Replay, _Replay]
    after: Any
    losses: int
    after_names: list[str]

    def __init__(self, block: Block, before: Any) -> None:
        self.block, self.before, floats = block, before, _floats(before)
        attending = _learning(block.mixer, block.mixer_norm)
        self.names, self.attending = list(floats), len(attending)
        self.inputs = [*floats.values(), *attending, *_learning(block.ffn, block.ffn_norm)]

    def backward(
        self,
        call: "_Call",
        streams: tuple[Tensor, ...],
        inputs: list[Tensor],
        wants: list[bool],
        outer: list[Tensor | None],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor | None]]:
        """Reconstruct the inputs of one block from its outputs and compute the gradients.

        Args:
            call: the call of all blocks.
            streams: the outputs y1, y2 of the block and their gradients.
            inputs: tensors of the layer that may need gradients.
            wants: for each of its state tensors, whether its gradient is needed.
            outer: gradients of the losses and state tensors that the block returned.

        Returns:
            The inputs x1, x2 and their gradients, and the gradients of `inputs`.
        """
        (y1, y2, d1, d2), (attending, feeding) = streams, self.replays
        count = len(self.names)
        with feeding.replaying():
            x = y1.detach().requires_grad_()
            g = self.block.feed(x.to(call.dtype))
        own, *of_feeding = _gradients([g], [d2], [x, *inputs[count + self.attending :]])
        x2, d1 = y2 - g.detach(), d1 if own is None else d1 + own
        leaves = [t.detach().requires_grad_(want) for t, want in zip(inputs[:count], wants, strict=False)]
        before = states.replace(states.detach(self.before), dict(zip(self.names, leaves, strict=True)))
        with attending.replaying():
            x = x2.detach().requires_grad_()
            rows = call.rows.with_choices(attending.choices)
            f, after, losses = self.block.attend(x.to(call.dtype), before, rows, call.collect)
        learnt = [leaf for leaf in leaves if leaf.requires_grad] + inputs[count : count + self.attending]
        own, *rest_gradients = _gradients([f, *losses, *_floats(after).values()], [d1, *outer], [x, *learnt])
        rest = iter(rest_gradients)
        of_state = [next(rest) if leaf.requires_grad else None for leaf in leaves]
        return y1 - f.detach(), x2, d1, d2 if own is None else d2 + own, [*of_state, *rest, *of_feeding]


class _Call:
    """One call of all blocks: what `_TwoStreams` needs in addition to tensors."""

    def __init__(
        self,
        blocks: Sequence[Block],
        before: Sequence[Any] | None,
        rows: BatchLayout,
        collect: bool,
        dtype: torch.dtype,
    ) -> None:
        self.rows, self.collect, self.dtype = rows, collect, dtype
        self.layers = [_Layer(block, None if before is None else before[i]) for i, block in enumerate(blocks)]
        self.autocast: tuple[str, bool, torch.dtype] | None = None

    def unpack(self, returned: list[Tensor]) -> tuple[list[Tensor], list[Any]]:
        """Split the tensors returned after the streams into auxiliary losses and next states."""
        losses, next_states, rest = list[Tensor](), [], iter(returned)
        for layer in self.layers:
            losses += [next(rest) for _ in range(layer.losses)]
            next_states.append(states.replace(layer.after, {name: next(rest) for name in layer.after_names}))
            layer.after = None
        return losses, next_states

    @contextlib.contextmanager
    def precision(self, device: torch.device) -> Iterator[None]:
        """Context with the autocast of the forward pass;
        casts are not cached, because those of the forward pass have no graph.
        """
        if self.autocast is None:
            kind = device.type
            self.autocast = (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        kind, enabled, dtype = self.autocast
        with torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False):
            yield


class _TwoStreams(FirstOrder):
    """Autograd function of reversible blocks: stores only the last values of the two streams,
    and recomputes the rest.
    """

    what = "a reversible stack"

    @staticmethod
    def forward(ctx: Any, call: _Call, h: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run all blocks without a graph; return both streams,
        then auxiliary losses and state tensors of each layer.
        """
        y1 = y2 = h
        rest: list[Tensor] = []
        with call.precision(h.device):
            for layer in call.layers:
                attending = _Replay(h)
                rows = call.rows.with_choices(attending.choices)
                f, layer.after, losses = layer.block.attend(y2.to(call.dtype), layer.before, rows, call.collect)
                y1 = y1 + f
                layer.replays = attending, _Replay(h)
                y2 = y2 + layer.block.feed(y1.to(call.dtype))
                floats = _floats(layer.after)
                layer.losses, layer.after_names = len(losses), list(floats)
                rest += [*losses, *floats.values()]
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y1, y2, *inputs)
        return y1, y2, *rest

    @staticmethod
    def gradients(ctx: Any, saved: tuple[Any, ...], *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Reconstruct the blocks from last to first and compute the gradients of all inputs."""
        call: _Call = ctx.call
        y1, y2, *inputs = saved
        d1, d2 = (torch.zeros_like(y1) if d is None else d for d in gradients[:2])
        rest, needs = list(gradients[2:]), list(ctx.needs_input_grad[2:])
        input_gradients: list[Tensor | None] = []
        with call.precision(y1.device):
            for layer in reversed(call.layers):
                own, wants = _pop_last(inputs, len(layer.inputs)), _pop_last(needs, len(layer.inputs))
                outer = _pop_last(rest, layer.losses + len(layer.after_names))
                y1, y2, d1, d2, of_layer = layer.backward(call, (y1, y2, d1, d2), own, wants, outer)
                input_gradients = [*of_layer, *input_gradients]
        return None, d1 + d2, *input_gradients


def _pop_last(items: list[Any], count: int) -> list[Any]:
    """Remove the last `count` items of a list and return them."""
    first = len(items) - count
    last = items[first:]
    del items[first:]
    return last


def _gradients(
    outputs: list[Tensor], gradients: Sequence[Tensor | None], inputs: list[Tensor]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of inputs, skipping outputs without a gradient; None for unused inputs."""
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
    if not pairs:
        return (None,) * len(inputs)
    graphs, outer = zip(*pairs, strict=True)
    return torch.autograd.grad(graphs, inputs, outer, allow_unused=True)
