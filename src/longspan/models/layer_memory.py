"""One segment of the Associative Recurrent Memory Transformer: a memory in every layer, written by the delta rule.

Rodkin et al. 2024, section 3. Memory tokens, the same learned ones for every segment, follow the segment. For a layer
with the memory A (features, dim) and the normalizer z (features), phi = DPFP (`longspan.ops.dpfp`):

    before the layer, for every token x:    x <- x + phi(W_q x) A / (phi(W_q x) . z + 1e-5)
    after it, for its memory tokens m:      k = phi(W_k m), v = W_v m, beta = sigmoid(W_b m), written by
                                            `longspan.ops.associative_write`

Reading an empty memory returns zero, so the first segment reads nothing. W_v starts at zero, as in the authors' code: a
new memory changes nothing until it is trained.

Layer l of segment s only needs layer l - 1 of segment s and layer l of segment s - 1, so cells on one diagonal l + s
can run together (diagonal batching, Sivtsov et al. 2025): `diagonals` runs each as one batch over layers.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from longspan import host, ops
from longspan.contract.maps import table_of
from longspan.errors import UnsupportedError
from longspan.host import Array
from longspan.mixers import BatchLayout
from longspan.models.backbone import Backbone, OwnBackbone
from longspan.models.config import RecurrentConfig
from longspan.models.memory_update import PaperUpdate
from longspan.models.segmenting import Segment
from longspan.models.token_memory import (
    CarriedMemory,
    SegmentOutput,
    Trace,
    assemble,
    count_closed,
    cut_graph,
    last_real,
    where_rows,
)


class Associative(nn.Module):
    """The maps of one layer's memory: keys and queries of width `memory_dim`, followed by the feature map DPFP-`nu`."""

    def __init__(self, dim: int, memory_dim: int, nu: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(dim, memory_dim, bias=False), nn.Linear(dim, memory_dim, bias=False)
        self.value, self.strength = nn.Linear(dim, dim, bias=False), nn.Linear(dim, 1)
        self.nu = nu
        for linear in (self.query, self.key, self.strength):
            nn.init.normal_(linear.weight, std=dim**-0.5)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.strength.bias)

    def read(self, x: Tensor, memory: Tensor, normalizer: Tensor) -> Tensor:
        """Return x (..., n, dim) plus what its queries read from the memory.

        Args:
            x: hidden states (..., n, dim).
            memory: (..., features, dim).
            normalizer: (..., features).
        """
        return x + ops.associative_read(ops.dpfp(self.query(x), self.nu), memory, normalizer).to(x.dtype)

    def write(self, m: Tensor, memory: Tensor, normalizer: Tensor) -> tuple[Tensor, Tensor]:
        """Return memory (..., features, dim) and normalizer (..., features) after writing tokens m (..., n, dim)."""
        phi, strength = ops.dpfp(self.key(m), self.nu), self.strength(m).sigmoid()[..., 0]
        return ops.associative_write(phi, self.value(m), strength, memory, normalizer)

    def forward(self, operation: str, *inputs: Tensor) -> Any:
        """Call `read` or `write`, for `functional_call`, which needs a module call."""
        return (self.read if operation == "read" else self.write)(*inputs)


class _MemoryHooks:
    """Hooks for each layer of a run: reading the memory before it, writing it after it."""

    def __init__(self, owner: "LayerMemory", carried: CarriedMemory, segment: Segment) -> None:
        self.owner, self.closed = owner, segment.closed
        self.memory, self.normalizer = carried.memory, carried.mass
        first = segment.ids.shape[1]
        self.memory_columns = slice(first, first + owner.config.num_memory_tokens)
        self.written: list[tuple[Tensor, Tensor]] = []

    def before(self, index: int, h: Tensor) -> Tensor:
        """Return the input h (batch, columns, dim) of layer `index`, with what it reads from the memory added."""
        return self.owner.layer(index).read(h, self.memory[:, index], self.normalizer[:, index])

    def after(self, index: int, h: Tensor) -> None:
        """Write the memory of layer `index` from its output h (batch, columns, dim) at `memory_columns`."""
        before = self.memory[:, index], self.normalizer[:, index]
        after = self.owner.layer(index).write(h[:, self.memory_columns], *before)
        self.written.append(
            (where_rows(self.closed, after[0], before[0]), where_rows(self.closed, after[1], before[1]))
        )


class LayerMemory(nn.Module):
    """The memories of all layers of one of our models, or of a Hugging Face model whose layers can be found."""

    def __init__(self, config: RecurrentConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config, self.dim, self.layers = config, backbone.dim, backbone.num_layers
        if config.replay:
            raise UnsupportedError(
                "RecurrentMemory.replay: not supported with per_layer, whose memories are as large as activations; set "
                "replay = false"
            )
        if isinstance(backbone, OwnBackbone) and backbone.stack.config.reversible:
            raise UnsupportedError(
                "RecurrentMemory.per_layer: changes every layer's input, so blocks cannot be reversible; set "
                "reversible = false in the model"
            )
        self.features = 2 * config.memory_dim * config.dpfp
        self.tokens = nn.Embedding(config.num_memory_tokens, self.dim)
        nn.init.normal_(self.tokens.weight, std=backbone.embedding_std())
        self.maps = nn.ModuleList(Associative(self.dim, config.memory_dim, config.dpfp) for _ in range(self.layers))
        self.update = PaperUpdate()
        self._tried: dict[Any, bool] = {}

    def _tokens(self) -> Tensor:
        """Return the learned memory tokens (num_memory_tokens, dim)."""
        return table_of(self.tokens, self.config.num_memory_tokens)

    def layer(self, index: int) -> Associative:
        """Return the memory maps of a layer."""
        return cast(Associative, self.maps[index])

    def empty(self, batch: int, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return memories (batch, layers, features, dim) and normalizers (batch, layers, features) of an empty past."""
        weight = self._tokens()
        dtype = torch.promote_types(weight.dtype if like is None else like.dtype, torch.float32)
        memory = torch.zeros(batch, self.layers, self.features, self.dim, dtype=dtype, device=weight.device)
        return memory, memory[..., 0].clone()

    def fit(self, memory: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        """Cast memory and normalizer to the dtype of an empty past, after a call in another precision."""
        dtype = torch.promote_types(self.tokens.weight.dtype, torch.float32)
        return memory.to(dtype), mass.to(dtype)

    def state_nbytes(self, batch_size: int, itemsize: int) -> int:
        """Return the bytes of memories and normalizers, which are in fp32 at least."""
        return batch_size * self.layers * self.features * (self.dim + 1) * max(itemsize, 4)

    def widths(self, causal: bool, written: int) -> tuple[int, int]:
        """Return the number of memory columns before a segment, and after it."""
        return 0, self.config.num_memory_tokens

    def flops(self, width: int, batch_size: int) -> int:
        """Return the FLOPs of reading at `width` columns and writing at the memory tokens."""
        memory, count = self.config.memory_dim, self.config.num_memory_tokens
        read = width * (self.dim * memory + self.features * (self.dim + 1))
        write = count * (self.dim * (memory + self.dim + 1) + self.features * (2 * self.dim + 2))
        return 2 * batch_size * self.layers * (read + write)

    def step(
        self, backbone: Backbone, segment: Segment, carried: CarriedMemory, aux_losses: list[Tensor] | None
    ) -> SegmentOutput:
        """Run one segment: read the memory, run the backbone and write the memory."""
        text = backbone.embed(segment.ids)
        write = self._tokens().to(text.dtype).expand(text.shape[0], -1, -1)
        hooks = _MemoryHooks(self, carried, segment)
        inputs, mask, reset = assemble(backbone, segment, [], text, write, carried.backbone)
        output = backbone.run(inputs, carried.backbone, mask, reset, aux_losses, hooks)
        memory, normalizer = (torch.stack(parts, 1) for parts in zip(*hooks.written, strict=True))
        state = None if host.all_true(segment.closed) else output.state
        hidden = output.hidden[:, : text.shape[1]]
        trace = Trace(
            output.hidden[:, hooks.memory_columns], last_real(hidden, segment), None, segment.closed, segment.shown
        )
        return SegmentOutput(
            hidden, CarriedMemory(memory, normalizer, count_closed(carried.written, segment), state), trace
        )

    def can_batch(self, backbone: Backbone, segments: list[Segment], needs_penalties: bool = False) -> bool:
        """Whether these segments can run along diagonals.

        That needs our own, uniform layers, full segments of one document, and kernels of the mechanism that run for
        several layers at once, without auxiliary losses if they are needed (`needs_penalties`).
        """
        if not isinstance(backbone, OwnBackbone) or len(segments) < 2 or not backbone.has_uniform_layers():
            return False
        full = all(host.all_true(segment.real) and host.all_true(segment.closed) for segment in segments)
        if not full or any(host.any_true(segment.begins) or host.any_true(segment.resumed) for segment in segments[1:]):
            return False
        if any(core.traits.tracks_statistics for core in backbone.stack.cores()):
            return False
        # it is tried out once for each kind of call
        size = segments[0].ids.shape[1]
        weight, graph = self.tokens.weight, (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        kind = weight.device.type
        narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = (size, needs_penalties, graph, weight.dtype, weight.device, narrow, str(backbone.stack.config))
        if key not in self._tried:
            try:
                self._tried[key] = self._try_batch(backbone, size, needs_penalties)
            except Exception:  # vmap may fail in any way; an error of the mechanism itself is raised again later
                self._tried[key] = False
        return self._tried[key]

    def _try_batch(self, backbone: OwnBackbone, size: int, needs_penalties: bool) -> bool:
        """Whether a copy of the first layer, stacked with itself, runs under vmap, forward and backward.

        False also if the layer adds auxiliary losses that are needed.
        """
        block, maps = (copy.deepcopy(module).eval() for module in (backbone.stack.blocks[0], self.layer(0)))
        width = size + self.config.num_memory_tokens
        h = self.tokens.weight.detach().new_zeros(2, 1, width, self.dim).requires_grad_(torch.is_grad_enabled())
        memory, normalizer = (torch.stack([t[:, 0], t[:, 0]]) for t in self.empty(1))
        rows = BatchLayout(torch.zeros(1, dtype=torch.int64, device=h.device), width)
        if needs_penalties and block(h[0].detach(), None, rows, True)[2]:
            return False
        weights = (_stacked([block] * 2), _stacked([maps] * 2))
        out = _batched(_cell(block, maps, rows, size), weights, h, memory, normalizer)
        if h.requires_grad:
            torch.autograd.grad(torch.stack([t.float().sum() for t in out]).sum(), h)
        return True

    def diagonals(
        self, backbone: Backbone, segments: list[Segment], carried: CarriedMemory, left: Array, horizon: int | None
    ) -> tuple[list[Tensor], CarriedMemory, list[Trace]]:
        """Run all segments with the layers of one diagonal as one batch; equals `step` on one segment after another.

        Args:
            backbone, segments: must satisfy `can_batch`.
            carried: the memory before the first segment, emptied in rows where a document begins with it.
            left, horizon: see `cut_graph`; left is (segments, batch).

        Returns:
            Hidden states of each segment, the memory afterwards, and a trace of each segment.
        """
        assert isinstance(backbone, OwnBackbone)
        stack, blocks = backbone.stack, list(backbone.stack.blocks)
        weights, maps = _stacked(blocks), _stacked(list(self.maps))
        count, layers, (batch, size) = len(segments), self.layers, segments[0].ids.shape
        device = segments[0].ids.device
        rows = BatchLayout(torch.zeros(batch, dtype=torch.int64, device=device), size + self.config.num_memory_tokens)
        cell = _cell(blocks[0], self.layer(0), rows, size)
        memories, normalizers = list(carried.memory.unbind(1)), list(carried.mass.unbind(1))
        inner: dict[int, Tensor] = {}
        outputs: list[Tensor] = []
        for diagonal in range(count + layers - 1):
            active = range(max(0, diagonal - count + 1), min(layers, diagonal + 1))
            if diagonal < count:
                text = backbone.embed(segments[diagonal].ids)
                write = self._tokens().to(text.dtype).expand(batch, -1, -1)
                inner[0] = stack.add_positions(torch.cat([text, write], 1), rows)
            for layer in active:
                here = CarriedMemory(memories[layer], normalizers[layer], carried.written, None)
                memories[layer], normalizers[layer], *_ = cut_graph(here, left[diagonal - layer], horizon)
            pick = slice(active.start, active.stop)
            parts = tuple({name: t[pick] for name, t in group.items()} for group in (weights, maps))
            args = [torch.stack([by_layer[layer] for layer in active]) for by_layer in (inner, memories, normalizers)]
            h, memory, normalizer = _batched(cell, parts, *args)
            for number, layer in enumerate(active):
                inner[layer + 1], memories[layer], normalizers[layer] = h[number], memory[number], normalizer[number]
            if active.stop == layers:
                outputs.append(stack.norm(inner[layers]))
        traces = [
            Trace(h[:, size:], h[:, size - 1], None, s.closed, s.shown) for h, s in zip(outputs, segments, strict=True)
        ]
        end = CarriedMemory(torch.stack(memories, 1), torch.stack(normalizers, 1), carried.written + count, None)
        return [h[:, :size] for h in outputs], end, traces


Cell = Callable[[Any, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def _cell(template: nn.Module, maps: nn.Module, rows: BatchLayout, size: int) -> Cell:
    """Return a function that runs one layer over one segment: (weights, h, memory, normalizer) to the next three.

    The weights are two dictionaries, of the block and of the memory maps.
    """

    def cell(parts: Any, h: Tensor, memory: Tensor, normalizer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read the memory, run the layer and write the memory, with the weights `parts`."""
        weight, own = parts
        h = functional_call(maps, own, ("read", h, memory, normalizer))
        h = functional_call(template, weight, (h, None, rows, False))[0]
        return h, *functional_call(maps, own, ("write", h[:, size:], memory, normalizer))

    return cell


def _batched(cell: Cell, parts: Any, *args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `cell` returns, for several layers at once.

    Args:
        cell: see `_cell`.
        parts: weights of the block and of the memory maps by name, with the layers as first dimension.
        args: tensors with the layers as first dimension.

    Returns:
        Three tensors, with the layers as first dimension.
    """
    with warnings.catch_warnings():
        # torch warns about kernels without a batching rule, which run layer by layer
        warnings.filterwarnings("ignore", message="There is a performance drop")
        after: tuple[Tensor, Tensor, Tensor] = vmap(cell, randomness="different")(parts, *args)
    return after


def _stacked(modules: list[nn.Module]) -> dict[str, Tensor]:
    """Stack the parameters and buffers of modules with the same structure by name, differentiably."""
    named = [dict(module.named_parameters()) | dict(module.named_buffers()) for module in modules]
    return {name: torch.stack([tensors[name] for tensors in named]) for name in named[0]}
