"""Learned positions: one table, or one for each coordinate of the position."""

from typing import cast

import torch
from torch import Tensor, nn

from longspan.models.config import StackConfig


class FactorizedPositions(nn.Module):
    """A learned vector for each coordinate of a position (row, column, channel): their sum, or concatenated.

    Source: the sum, Child et al. 2019, section 5.3. Concatenated they are the axial positions of Reformer (Kitaev et
    al. 2020; in its code, not its paper): sum of size * width parameters, where sums need `dim` for every size.

    Args:
        shape: sizes of the coordinates; the last is fastest, so position p has coordinate p % shape[-1] there.
        dim: width of the vectors.
        widths: width of each coordinate's vector, with the sum dim; () = vectors of width dim are summed.
    """

    def __init__(self, shape: tuple[int, ...], dim: int, widths: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.shape, self.concatenates = shape, bool(widths)
        dims = widths or (dim,) * len(shape)
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size, width in zip(shape, dims, strict=True))

    def forward(self, positions: Tensor) -> Tensor:
        """Map positions (...) to vectors (..., dim)."""
        coordinates = torch.unravel_index(positions, self.shape)
        parts = [cast(Tensor, table(index)) for table, index in zip(self.tables, coordinates, strict=True)]
        if self.concatenates:
            return torch.cat(parts, -1)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total


def make_positions(config: StackConfig) -> nn.Module | None:
    """Return the configured module of learned positions, or None."""
    if config.positions == "learned":
        return nn.Embedding(config.max_positions, config.dim)
    if config.positions == "factorized":
        return FactorizedPositions(config.position_shape, config.dim, config.position_dims)
    return None
