"""What readers of published weights share: a configuration that says what it lacks, weights that are each used once."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from longspan.errors import CheckpointError, ConfigError


class PublishedConfig:
    """A published configuration, as plain data.

    Args:
        where: what errors begin with.
        config: fields by name.
    """

    def __init__(self, where: str, config: Mapping[str, Any]) -> None:
        self.where, self.config = where, config

    def __getitem__(self, name: str) -> Any:
        if name not in self.config:
            raise ConfigError(f"{self.where}: the config has no {name!r}; give all that transformers writes")
        return self.config[name]

    def warn_of_dropout(self, *names: str) -> None:
        """Say that dropout of attention weights, under these names, is not taken over; nothing where it is 0."""
        dropped = [f"{name} = {self.config[name]}" for name in names if self.config.get(name)]
        if dropped:
            warnings.warn(
                f"{self.where}: {', '.join(dropped)} is not taken over, as no mixer drops attention weights: the same "
                "model in evaluation, less regularized in training",
                stacklevel=2,
            )


class Renaming:
    """Published weights under the names of a model, each of them used once.

    Args:
        where: what errors begin with.
        given: published weights.

    Attributes:
        ours: weights by the names of the model.
        left: published ones that are not used yet.
    """

    def __init__(self, where: str, weights: Mapping[str, Tensor]) -> None:
        self.where, self.left = where, dict(weights)
        self.ours: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor:
        """A published weight. Raises CheckpointError: it is not there."""
        if name not in self.left:
            raise CheckpointError(f"{self.where}: missing weight {name!r}; the config is of another model")
        return self.left.pop(name)

    def move(self, ours: str, theirs: str) -> None:
        """One weight as it is."""
        self.ours[ours] = self.take(theirs)

    def move_pair(self, ours: str, theirs: str) -> None:
        """Weight and bias of a linear map or a norm."""
        for part in ("weight", "bias"):
            self.move(f"{ours}.{part}", f"{theirs}.{part}")

    def done(self) -> dict[str, Tensor]:
        """All weights. Raises CheckpointError: a published one is left over."""
        if self.left:
            more = f" and {len(self.left) - 1} more" if len(self.left) > 1 else ""
            raise CheckpointError(
                f"{self.where}: unexpected weight {min(self.left)!r}{more}; they belong to another model"
            )
        return self.ours
