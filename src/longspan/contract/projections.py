"""Linear projections of hidden states to q, k, v, and of attention outputs back to hidden states."""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from longspan.contract.maps import is_plain


class Projections(nn.Module):
    """The four linear maps of an attention layer; a converted pretrained model brings its own.

    Args:
        dim: width of the hidden states.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: width per head.
        bias: add biases.
        keys: project keys; False for mechanisms whose queries also serve as keys. `k_proj` is then None, and the values
            are passed as a placeholder for k, which is not read.
        value_dim: width of the values and outputs per head; default: head_dim.
    """

    k_proj: nn.Linear | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool = False,
        keys: bool = True,
        value_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.value_dim = head_dim if value_dim is None else value_dim
        self.q_proj = nn.Linear(dim, num_heads * head_dim, bias=bias)
        # registered even if None, so that `load_state_dict` skips the weights that earlier versions saved
        self.register_module("k_proj", nn.Linear(dim, num_kv_heads * head_dim, bias=bias) if keys else None)
        self.v_proj = nn.Linear(dim, num_kv_heads * self.value_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.value_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project x (B, N, dim) to q (B, heads, N, head_dim), k (B, kv_heads, N, head_dim), v (B,
        kv_heads, N, value_dim).
        """
        if self.k_proj is None:
            v = _heads(self.v_proj(x), self.num_kv_heads)
            return _heads(self.q_proj(x), self.num_heads), v, v
        k, v = self.keys_values(x)
        return _heads(self.q_proj(x), self.num_heads), k, v

    def keys_values(self, x: Tensor, kv_heads: slice | None = None) -> tuple[Tensor, Tensor]:
        """Project x (B, M, dim) to k (B, kv_heads, M, head_dim) and v (B, kv_heads, M, value_dim).

        Args:
            x: (B, M, dim) hidden states.
            kv_heads: which kv heads to project; None = all.
        """
        assert self.k_proj is not None, "a mechanism that projects hidden states again has a key projection"
        if kv_heads is None or not (is_plain(self.k_proj) and is_plain(self.v_proj)):
            # adapters, hooks and quantized maps can only be called as a whole; the heads are sliced afterwards
            part = slice(None) if kv_heads is None else kv_heads
            k, v = (_heads(projection(x), self.num_kv_heads)[:, part] for projection in (self.k_proj, self.v_proj))
            return k, v
        first, last, _ = kv_heads.indices(self.num_kv_heads)
        projected = []
        for proj, width in ((self.k_proj, self.head_dim), (self.v_proj, self.value_dim)):
            part = slice(first * width, last * width)
            bias = None if proj.bias is None else proj.bias[part]
            projected.append(_heads(F.linear(x, proj.weight[part], bias), last - first))
        return projected[0], projected[1]

    def output(self, out: Tensor) -> Tensor:
        """Project attention outputs (B, heads, N, value_dim) to hidden states (B, N, dim)."""
        return cast(Tensor, self.o_proj(out.transpose(1, 2).flatten(2)))

    def flops(self, length: int) -> int:
        """Return the FLOPs of the four products for one row of `length` tokens."""
        maps = [linear for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj) if linear is not None]
        return sum(2 * length * linear.in_features * linear.out_features for linear in maps)

    def unused_weights(self) -> list[str]:
        """Return the names of unused weights that earlier versions saved and that loading must ignore."""
        return ["k_proj.weight", "k_proj.bias"] if self.k_proj is None else []


def _heads(x: Tensor, heads: int) -> Tensor:
    """Split (B, N, heads * width) into heads: (B, heads, N, width)."""
    return x.view(*x.shape[:2], heads, x.shape[-1] // heads).transpose(1, 2)
