"""Learned positions: one table, or one for each coordinate of the position."""

from typing import cast

import torch
from torch import Tensor, nn

from longspan.models.config import StackConfig


class FactorisedPositions(nn.Module):
    """The sum of a learned vector for each coordinate: row, column and channel (Child et al. 2019, section 5.3).

    Args:
        shape: sizes of the coordinates; the last counts fastest, so position p has coordinate p % shape[-1] there.
        dim: width of the vectors.
    """

    def __init__(self, shape: tuple[int, ...], dim: int) -> None:
        super().__init__()
        self.shape = shape
        self.tables = nn.ModuleList(nn.Embedding(size, dim) for size in shape)

    def forward(self, positions: Tensor) -> Tensor:
        """Positions (...) to vectors (..., dim)."""
        coordinates = torch.unravel_index(positions, self.shape)
        parts = [cast(Tensor, table(at)) for table, at in zip(self.tables, coordinates, strict=True)]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total


def make_positions(config: StackConfig) -> nn.Module | None:
    """The configured table of positions, or None."""
    if config.positions == "learned":
        return nn.Embedding(config.max_positions, config.dim)
    if config.positions == "factorised":
        return FactorisedPositions(config.position_shape, config.dim)
    return None
