"""Base of decoders and encoders: embeddings, positions, blocks, cost, initialization, parameter groups."""

from collections.abc import Hashable
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longspan import host
from longspan import state as states
from longspan.contract.base import merge_traits, optimizer_groups, why_no_stream
from longspan.contract.maps import device_and_dtype
from longspan.errors import ConfigError, DataError, UnsupportedError
from longspan.mixers import BatchLayout, Mechanism, Traits
from longspan.models.blocks import Block, make_norm
from longspan.models.config import StackConfig
from longspan.models.positions import make_positions
from longspan.models.reversible import run_reversible


class StackState(NamedTuple):
    """State of a model: one mixer state per layer,
    and the live tokens (batch,) int64 (real tokens since the last reset).
    """

    layers: tuple[Any, ...]
    live: Tensor


class LayerHooks(Protocol):
    """Hooks of a per-layer memory, which run before and after each layer."""

    def before(self, index: int, h: Tensor) -> Tensor:
        """Return what replaces the input h (B, N, dim) of layer `index`, token by token."""

    def after(self, index: int, h: Tensor) -> None:
        """Receive the output h (B, columns, dim) of layer `index` in the column order of the call, zeros at padding."""


class Stack(nn.Module):
    """Embeddings and blocks; the base of Decoder and Encoder.

    Real tokens are gathered once, before the embedding, so that no layer computes padding between tokens.

    Initialization: weights of linear maps and embeddings are normal with standard deviation `init_std`, those that
    write into the residual stream (o_proj, down_proj) smaller by sqrt(2 num_layers); biases 0, norms 1. The field
    `init` selects another scheme.
    """

    causal: bool = True

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = self._make_embedding()
        self.position_embedding = make_positions(config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, index, self.causal) for index in range(config.num_layers))
        last_norm = config.norm_position == "pre" if config.final_norm is None else config.final_norm
        self.norm = make_norm(config, config.hidden_dim) if last_norm else nn.Identity()
        self._initialize()

    def _make_embedding(self) -> nn.Module:
        """Build the token embedding, from ids (...) to (..., dim)."""
        return nn.Embedding(self.config.vocab_size, self.config.dim)

    def _initialize(self) -> None:
        """Initialize all weights as the configuration says."""
        config, deep = self.config, (2 * self.config.num_layers) ** 0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = 0.125 / module.in_features**0.5 if config.init == "sparse" else config.init_std
                if name.startswith("embedding."):
                    std = module.in_features**-0.5  # keeps the scale of the embeddings that it maps to `dim`
                nn.init.normal_(module.weight, std=std / deep if name.endswith(("o_proj", "down_proj")) else std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                of_positions = name.startswith("position_embedding")
                count = max(1, len(config.position_shape)) if of_positions and not config.position_dims else 1
                std = 0.125 / (config.dim * count) ** 0.5 if config.init == "sparse" else config.init_std
                nn.init.normal_(module.weight, std=std)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.config.vocab_size

    @property
    def layers(self) -> list[Block]:
        """The blocks, in order."""
        return [cast(Block, block) for block in self.blocks]

    @property
    def traits(self) -> Traits:
        """The combined capability flags of all layers."""
        return merge_traits([block.mixer.traits for block in self.layers])

    def why_no_stream(self) -> str:
        """Name the first layer that does not stream, with the reason; "" if all layers stream."""
        return why_no_stream(self.cores())

    def embed(self, tokens: Tensor, rows: BatchLayout) -> Tensor:
        """Embed token ids (B, N), as returned by `rows.gather`; returns (B, N, dim), learned positions included."""
        return self.add_positions(self.embedding(tokens), rows)

    def add_positions(self, h: Tensor, rows: BatchLayout) -> Tensor:
        """Scale embeddings (B, N, dim), add learned positions and apply dropout, as configured."""
        if self.config.scale_embeddings:
            h = h * self.config.dim**0.5
        if self.position_embedding is not None:
            largest, maximum = rows.largest_position, self.config.num_positions - 1
            if largest > maximum:
                raise UnsupportedError(
                    f"position {largest} exceeds the largest learned position, {maximum}; reset at documents, raise "
                    "max_positions, or use positions = 'rope' or 'none'"
                )
            h = h + self.position_embedding(rows.positions.clamp(0, maximum))
        return cast(Tensor, self.dropout(h))

    def run(
        self,
        tokens: Tensor | None,
        state: StackState | None,
        mask: Tensor | None,
        reset: Tensor | None,
        aux_losses: list[Tensor] | None,
        inputs_embeds: Tensor | None = None,
        hooks: "LayerHooks | None" = None,
        inputs: list[Tensor] | None = None,
        keep_state: bool = True,
    ) -> tuple[Tensor, StackState | None, BatchLayout]:
        """Run all layers on gathered rows.

        Args:
            tokens: (B, columns) token ids, or None with inputs_embeds.
            state, mask, reset, aux_losses: as in a call of a `Decoder`.
            inputs_embeds: (B, columns, dim) instead of tokens.
            hooks: run before and after each layer; None = none.
            inputs: a list to which the input (B, N, dim) of each layer is appended.
            keep_state: whether the caller reads the next state.

        Returns:
            Hidden states (B, N, hidden_dim) after the last norm, the next state (None without `keep_state`), and the
            layout that scatters them back.
        """
        streams = all(core.traits.streams for core in self.cores())
        layers = None if state is None else state.layers
        if state is not None and not streams:
            raise UnsupportedError(f"{self.why_no_stream()}; call the model with state=None")
        h, rows = self._embed_call(tokens, state, mask, reset, inputs_embeds)
        rows.keeps_state = keep_state
        if self.config.reversible:
            if hooks is not None:
                raise UnsupportedError("per_layer memory does not support reversible blocks; set reversible = false")
            h, next_states = run_reversible(self.layers, h, layers, rows, aux_losses, self.config.streams, inputs)
        else:
            next_states = []
            recomputes = self.config.checkpoint and self.training and torch.is_grad_enabled()
            for index, block in enumerate(self.blocks):
                if hooks is not None:
                    h = hooks.before(index, h)
                if inputs is not None:
                    inputs.append(h)
                call = h, None if layers is None else layers[index], rows, aux_losses is not None
                h, after, losses = checkpoint(block, *call, use_reentrant=False) if recomputes else block(*call)
                if hooks is not None:
                    hooks.after(index, rows.scatter(h))
                next_states.append(after)
                if aux_losses is not None:
                    aux_losses.extend(losses)
        return self.norm(h), StackState(tuple(next_states), rows.live) if streams and keep_state else None, rows

    def _embed_call(
        self,
        tokens: Tensor | None,
        state: StackState | None,
        mask: Tensor | None,
        reset: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> tuple[Tensor, BatchLayout]:
        """Return the input (B, N, dim) of the first layer, after `rows.gather`, and the layout of the call."""
        inputs = tokens if inputs_embeds is None else inputs_embeds
        if inputs is None or (tokens is not None and inputs_embeds is not None):
            raise ConfigError("tokens and inputs_embeds: pass exactly one of them")
        if tokens is not None and tokens.ndim != 2:
            raise ConfigError(f"tokens have shape {tuple(tokens.shape)}, expected (batch, length)")
        offset = states.live(state, inputs.shape[0], inputs.device)
        if offset.shape[0] != inputs.shape[0]:
            raise ConfigError(f"tokens have {inputs.shape[0]} rows, the state {offset.shape[0]}; pass equal numbers")
        reads: dict[Hashable, Tensor] = {}
        for index, core in enumerate(self.cores()):
            reads |= core.layout_inputs(None if state is None else state.layers[index])
        rows = BatchLayout(offset, inputs.shape[1], mask, reset, reads=reads)
        gathered = rows.gather(inputs)
        if tokens is None:
            return self.add_positions(gathered, rows), rows
        self.check_tokens(gathered)
        return self.embed(gathered, rows), rows

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise a DataError if tokens are not integers or, on the CPU, not ids of the vocabulary."""
        if tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise DataError(f"tokens are {tokens.dtype}, expected integers")
        if tokens.device.type == "cpu" and tokens.numel():
            read = host.values(tokens)
            if read is None:
                return
            low, high = int(read.min()), int(read.max())
            if low < 0 or high >= self.config.vocab_size:
                bad = low if low < 0 else high
                raise DataError(
                    f"token id {bad} is outside the model's vocabulary of {self.config.vocab_size}; "
                    "encode the text with the model's tokenizer"
                )

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> StackState:
        """Return the state of an empty past; device and dtype default to those of the parameters."""
        layers = tuple(block.mixer.init_state(batch_size, device=device, dtype=dtype) for block in self.layers)
        where = device or device_and_dtype(self).device
        return StackState(layers, torch.zeros(batch_size, dtype=torch.int64, device=where))

    def state_nbytes(self, batch_size: int, length: int, dtype: torch.dtype = torch.float32) -> int:
        """Return the exact bytes of the state after `length` live tokens, counts included."""
        return 8 * batch_size + sum(block.mixer.state_nbytes(batch_size, length, dtype) for block in self.layers)

    def flops(self, length: int, *, batch_size: int = 1) -> int:
        """Return the FLOPs (2 per multiply-add) of one forward pass of `length` tokens from an empty past, with logits.

        For an adaptive softmax the full distribution is counted, though losses need less.
        """
        positions = batch_size * length
        return self.block_flops(length, batch_size) + self.embed_flops(positions) + self.output_flops(positions)

    def block_flops(self, length: int, batch_size: int) -> int:
        """Return the FLOPs of the layers alone."""
        return sum(
            block.mixer.flops(length, batch_size=batch_size) + block.ffn.flops(batch_size * length)
            for block in self.layers
        )

    def embed_flops(self, positions: int) -> int:
        """Return the FLOPs of embedding `positions` tokens: 0 for a table lookup."""
        return 0

    def output_flops(self, positions: int) -> int:
        """Return the FLOPs of everything after the last norm at `positions` positions."""
        return 0

    def output_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that only logits use, not hidden states;
        none if the output layer has only tied weights.
        """
        return []

    def pairs(self, length: int) -> int:
        """Return the attended (query, key) pairs of one row of `length` tokens, summed over heads and layers."""
        return sum(block.mixer.pairs(length) for block in self.layers)

    def num_parameters(self) -> int:
        """Return the number of parameters, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def after_step(self, step: int, generator: torch.Generator | None = None) -> None:
        """Apply clamps, redraws and statistics of every layer after optimizer step `step` (1, 2, ...)."""
        for block in self.layers:
            block.mixer.after_step(step, generator)

    @property
    def redraw_count(self) -> int:
        """A number that changes whenever a layer redraws its random projections, which invalidates states."""
        return sum(block.mixer.redraw_count for block in self.layers)

    def parameter_groups(self, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return parameter groups for a torch optimizer.

        Weights of linear maps decay; embeddings, norms and vectors do not; groups that a mechanism declares (gates,
        compressors) follow with their own settings.
        """
        linear = [module.weight for module in self.modules() if isinstance(module, nn.Linear)]
        return optimizer_groups(self.parameters(), linear, self.cores(), lr=lr, weight_decay=weight_decay)

    def cores(self) -> list[Mechanism]:
        """Return the mechanisms of all layers."""
        return [block.mixer.core for block in self.layers]
