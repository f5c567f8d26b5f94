"""Helpers to import published weights: a configuration that reports missing fields,
weights that are used exactly once.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from longspan.errors import CheckpointError, ConfigError


class PublishedConfig:
    """A published configuration as plain data; a missing field raises an error.

    Args:
        where: prefix of error messages.
        config: fields by name.
    """

    def __init__(self, where: str, config: Mapping[str, Any]) -> None:
        self.where, self.config = where, config

    def __getitem__(self, name: str) -> Any:
        """Return a field.

        Raises:
            ConfigError: it is missing.
        """
        if name not in self.config:
            raise ConfigError(f"{self.where}: the config has no {name!r}; pass all fields that transformers writes")
        return self.config[name]

    def warn_of_dropout(self, *names: str) -> None:
        """Warn that dropout of attention weights, in fields of these names, is ignored; no warning where it is 0."""
        dropped = [f"{name} = {self.config[name]}" for name in names if self.config.get(name)]
        if dropped:
            warnings.warn(
                f"{self.where}: {', '.join(dropped)} is ignored, as mixers have no dropout of attention weights: the "
                "model is the same in evaluation, but less regularized in training",
                stacklevel=2,
            )


class Renaming:
    """Maps published weights to the names of a model, each of them used exactly once.

    Args:
        where: prefix of error messages.
        weights: published weights by name.

    Attributes:
        ours: weights by the names of the model.
        left: published weights that are not used yet.
    """

    def __init__(self, where: str, weights: Mapping[str, Tensor]) -> None:
        self.where, self.left = where, dict(weights)
        self.ours: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor:
        """Remove and return a published weight.

        Raises:
            CheckpointError: it is missing.
        """
        if name not in self.left:
            raise CheckpointError(f"{self.where}: weight {name!r} is missing; weights and config must be of one model")
        return self.left.pop(name)

    def move(self, ours: str, theirs: str) -> None:
        """Use a published weight unchanged, under our name."""
        self.ours[ours] = self.take(theirs)

    def move_pair(self, ours: str, theirs: str) -> None:
        """Use the weight and bias of a linear map or a norm unchanged, under our names."""
        for part in ("weight", "bias"):
            self.move(f"{ours}.{part}", f"{theirs}.{part}")

    def done(self) -> dict[str, Tensor]:
        """Return all weights by the names of the model.

        Raises:
            CheckpointError: a published weight was not used.
        """
        if self.left:
            more = f" and {len(self.left) - 1} more" if len(self.left) > 1 else ""
            raise CheckpointError(
                f"{self.where}: unexpected weight {min(self.left)!r}{more}; weights and config must be of one model"
            )
        return self.ours
