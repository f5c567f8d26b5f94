"""The block of every model: a mixer and a feed-forward network, each with its norm and residual."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longspan import mixers
from longspan.errors import ConfigError
from longspan.mixers import BatchLayout, Mixer
from longspan.models.config import StackConfig
from longspan.models.pointwise import RMSNorm, swiglu


def make_norm(config: StackConfig, dim: int | None = None) -> nn.Module:
    """Return the configured norm over a last dimension of width `dim`; None = the model's width."""
    dim = config.dim if dim is None else dim
    if config.norm == "rmsnorm":
        return RMSNorm(dim, config.norm_eps)
    return nn.LayerNorm(dim, eps=config.norm_eps, bias=config.bias)


class FeedForward(nn.Module):
    """Position-wise feed-forward network: swiglu (Shazeer 2020, section 2), gelu or relu.

    With `ffn_chunk` it processes that many tokens at a time (Kitaev et al. 2020, section 3, "Chunking") and, with
    gradients, recomputes each chunk in the backward pass: the inner activations, the widest of a block, then exist for
    one chunk at a time. Dropout is drawn for all tokens at once, as without chunks.
    """

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        inner = config.inner_dim
        self.activation = config.activation
        self.gate_proj = nn.Linear(config.dim, inner, bias=config.bias) if config.activation == "swiglu" else None
        self.up_proj = nn.Linear(config.dim, inner, bias=config.bias)
        self.down_proj = nn.Linear(inner, config.dim, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.chunk = config.ffn_chunk

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim) to (..., dim)."""
        return cast(
            Tensor, self.dropout(self._in_chunks(x) if 0 < self.chunk < x.shape[:-1].numel() else self._rows(x))
        )

    def _in_chunks(self, x: Tensor) -> Tensor:
        """Map (..., dim) to (..., dim) chunk by chunk, recomputing each chunk in the backward pass."""
        parts = x.flatten(0, -2).split(self.chunk)
        if torch.is_grad_enabled():
            # no random numbers are drawn inside, so the generator's state need not be saved
            outputs = [checkpoint(self._rows, part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        else:
            outputs = [self._rows(part) for part in parts]
        return torch.cat(outputs).view(*x.shape[:-1], -1)

    def _rows(self, x: Tensor) -> Tensor:
        """Map (..., dim) to (..., dim) without chunks and dropout."""
        if self.gate_proj is not None:
            inner = swiglu(self.gate_proj(x), self.up_proj(x))
        else:
            inner = F.gelu(self.up_proj(x)) if self.activation == "gelu" else F.relu(self.up_proj(x))
        return cast(Tensor, self.down_proj(inner))

    def flops(self, length: int) -> int:
        """Return the FLOPs of the products for `length` tokens."""
        matrices = 2 if self.gate_proj is None else 3
        return 2 * length * matrices * self.up_proj.in_features * self.up_proj.out_features


class Block(nn.Module):
    """A mixer and a feed-forward network with residuals, pre-norm or post-norm."""

    def __init__(self, config: StackConfig, index: int, causal: bool) -> None:
        super().__init__()
        entry = index % len(config.mixers)
        fields = dict(config.mixers[entry])
        is_rotated = fields.pop("rope", True) and config.positions == "rope"
        self.post = config.norm_position == "post"
        try:
            self.mixer: Mixer = mixers.build(
                fields.pop("name"),
                dim=config.dim,
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                causal=causal,
                bias=config.bias if config.mixer_bias is None else config.mixer_bias,
                rope=config.rope_theta if is_rotated else None,
                dropout=config.dropout,
                **fields,
            )
        except ConfigError as error:
            raise ConfigError(f"model.mixers[{entry}]: {str(error).removeprefix('mixer: ')}") from None
        self.mixer_norm = make_norm(config)
        self.ffn = FeedForward(config)
        self.ffn_norm = make_norm(config)

    def forward(
        self, h: Tensor, state: Any, rows: BatchLayout, collect_aux_losses: bool = False
    ) -> tuple[Tensor, Any, list[Tensor]]:
        """Map h (B, N, dim) and the layer's state to the next h and state, and the auxiliary losses of the layer."""
        aux_losses: list[Tensor] = []
        x = h if self.post else self.mixer_norm(h)
        y, state = self.mixer.mix(x, state, rows, aux_losses if collect_aux_losses else None)
        h = h + y
        if self.post:
            h = self.mixer_norm(h)
            return self.ffn_norm(h + self.ffn(h)), state, aux_losses
        return h + self.feed(h), state, aux_losses

    def attend(
        self, h: Tensor, state: Any, rows: BatchLayout, collect_aux_losses: bool = False
    ) -> tuple[Tensor, Any, list[Tensor]]:
        """Return what the mixer of a pre-norm block adds to the residual (B, N, dim), the next state,
        and auxiliary losses.
        """
        aux_losses: list[Tensor] = []
        y, state = self.mixer.mix(self.mixer_norm(h), state, rows, aux_losses if collect_aux_losses else None)
        return y, state, aux_losses

    def feed(self, h: Tensor) -> Tensor:
        """Return what the feed-forward of a pre-norm block adds to the residual (B, N, dim)."""
        return cast(Tensor, self.ffn(self.ffn_norm(h)))
