"""Compression functions of the Compressive Transformer (Rae et al. 2019, section 3.2), and their auto-encoder.

A group of `ratio` vectors becomes one slot. "mean" and "max" pool it. "conv" is a convolution of `ratio` taps at a
stride of `ratio`. "dilated" is a stack of convolutions of two taps at dilations 1, 2, 4, ..., each with a residual,
y = (a + b) / 2 + W gelu([a, b]), read at the end of each group; it sees the last 2 ** layers vectors, at least two
groups (the paper gives no sizes). "most_used" keeps, of the vectors that leave the memory together, those with the most
attention. The convolutions begin as means (the paper says nothing of their start).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Compressor(nn.Module):
    """Groups of vectors to slots.

    Args:
        how: "mean", "max", "conv", "dilated" or "most_used".
        dim: width of the vectors.
        ratio: vectors of a group.
        decode: add the decoder of the auto-encoding loss; of functions with parameters only.

    Attributes:
        context: vectors before a group that its slot depends on.
        learns: the function has parameters.
    """

    def __init__(self, how: str, dim: int, ratio: int, decode: bool = False) -> None:
        super().__init__()
        self.how, self.dim, self.ratio = how, dim, ratio
        layers = (2 * ratio - 1).bit_length() if how == "dilated" else 0
        self.context = 2**layers - ratio if layers else 0
        self.learns = how in ("conv", "dilated")
        self.conv = nn.Linear(ratio * dim, dim, bias=False) if how == "conv" else None
        self.layers = nn.ModuleList(nn.Linear(2 * dim, dim, bias=False) for _ in range(layers))
        self.decoder = nn.Linear(dim, ratio * dim, bias=False) if decode and self.learns else None
        with torch.no_grad():
            for layer in self.layers:
                nn.init.zeros_(layer.weight)
            if self.conv is not None:
                self.conv.weight.copy_(torch.eye(dim).repeat(1, ratio) / ratio)
            if self.decoder is not None:
                self.decoder.weight.copy_(torch.eye(dim).repeat(ratio, 1))

    def forward(self, vectors: Tensor, usage: Tensor | None = None, groups: Tensor | None = None) -> Tensor:
        """Compress.

        Args:
            vectors: (batch, context + slots * ratio, dim).
            usage: (batch, slots * ratio) attention each vector got; of "most_used" only.
            groups: (batch,) how many groups are real, the first ones; of "most_used" only.

        Returns:
            (batch, slots, dim).
        """
        if usage is not None and groups is not None:
            return self._most_used(vectors, usage, groups)
        if self.how == "dilated":
            h = vectors.unfold(1, self.context + self.ratio, self.ratio).transpose(2, 3)
            for layer in self.layers:
                pairs = h.unflatten(2, (-1, 2))
                h = pairs.mean(3) + layer(F.gelu(pairs.flatten(3)))
            return h[:, :, 0]
        grouped = vectors.unflatten(1, (-1, self.ratio))
        if self.conv is not None:
            slots: Tensor = self.conv(grouped.flatten(2))
            return slots
        return grouped.amax(2) if self.how == "max" else grouped.mean(2)

    def _most_used(self, vectors: Tensor, usage: Tensor, groups: Tensor) -> Tensor:
        """The `groups` most used of each row's first groups * ratio vectors, in their order; equal ones: the earlier."""
        slots, column = vectors.shape[1] // self.ratio, torch.arange(vectors.shape[1], device=vectors.device)
        real = column < (groups * self.ratio)[:, None]
        order = usage.masked_fill(~real, -1.0).argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(1, order, column.expand_as(order))
        kept = (rank >= groups[:, None]).sort(dim=1, stable=True).indices[:, :slots]
        return vectors.gather(1, kept[..., None].expand(-1, -1, vectors.shape[2]))

    def decode(self, slots: Tensor) -> Tensor | None:
        """(batch, slots, dim) to (batch, slots * ratio, dim), what the auto-encoder makes of them; None without it."""
        return None if self.decoder is None else self.decoder(slots).view(slots.shape[0], -1, self.dim)

    def flops(self, slots: int) -> int:
        """Of one row's compression to so many slots."""
        if self.how == "conv":
            return 2 * slots * self.ratio * self.dim**2
        return 4 * slots * (2 ** len(self.layers) - 1) * self.dim**2


class Frozen(torch.autograd.Function):
    """A projection to keys and values through which gradients reach its input and not its parameters."""

    @staticmethod
    def forward(ctx, project, x):  # type: ignore[no-untyped-def]
        """`project(x)`, its graph kept apart."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            k, v = project(x)
        ctx.inner = x, k, v
        return k.detach(), v.detach()

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        """The gradient of x alone."""
        x, *projected = ctx.inner
        return None, *torch.autograd.grad(projected, x, grads, retain_graph=True)
