"""Mechanisms that mix local attention and a memory by gates, and a way to use one of the two alone.

A converted model may live off its window while its memory adds nothing, which short texts do not show. The loss without
each branch shows what the branch is worth (imbalance of hybrids: arXiv:2510.05901).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from longspan.contract.base import Mechanism
from longspan.errors import ConfigError

Branch = Literal["local", "memory"]
CLOSED = 1e4
"""Size of a gate that leaves one branch alone: far beyond any log-sum-exp of scores."""


class GatedBranches(Mechanism):
    """Base of cores with a parameter `gate` (heads,): the larger it is, the larger is the share of the memory.

    Such a core uses `mixing_gate` in its place.
    """

    gate: nn.Parameter
    branch: Branch | None = None
    """The branch to use alone; None = both. See `only_branch`."""

    @property
    def mixing_gate(self) -> Tensor:
        """The gates (heads,), or constants if one branch is used alone."""
        if self.branch is None:
            return self.gate
        return torch.full_like(self.gate, CLOSED if self.branch == "memory" else -CLOSED)


@contextmanager
def only_branch(model: nn.Module, branch: Branch) -> Iterator[None]:
    """Context in which mechanisms that mix two branches use one of them alone.

    "local" leaves the memory out, "memory" the local attention; where the memory is still empty, local attention is
    used in both. Denominators are those of what is left. States are written as always, so a text should be read from
    its start inside the context.

    Args:
        model: a longspan model or a converted one.
        branch: the branch to use.

    Raises:
        ConfigError: no mechanism of the model has two branches.
    """
    cores = [module for module in model.modules() if isinstance(module, GatedBranches)]
    if not cores:
        raise ConfigError(
            "only_branch: no layer of this model mixes local attention and a memory by gates; infini, memorizing and "
            "window_linear do"
        )
    before = [core.branch for core in cores]
    try:
        for core in cores:
            core.branch = branch
        yield
    finally:
        for core, previous in zip(cores, before, strict=True):
            core.branch = previous
