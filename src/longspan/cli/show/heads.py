"""Finds the heads of one mechanism in a trained model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from longspan.errors import ConfigError
from longspan.report.heads import Heads

if TYPE_CHECKING:
    from longspan.mixers import Mechanism

C = TypeVar("C", bound="Mechanism")


@dataclass(frozen=True)
class MechanismHeads(Heads, Generic[C]):
    """One mechanism of a layer: number of the layer, number of its first head (both from 1), and its core module."""

    core: C


def find_mechanisms(model: Any, kind: type[C], run: str, name: str) -> list[MechanismHeads[C]]:
    """Return all mechanisms of one class in a model, in the order of the layers, also those inside `mixed_heads`.

    Args:
        model: to search.
        kind: class of the cores to find.
        run: folder of the model, for the error message.
        name: of the mechanism, for the error message.

    Raises:
        ConfigError: the model has no such mechanism.
    """
    from longspan.mechanisms.mixed_heads.layer import MixedHeadsMechanism
    from longspan.mixers import Mechanism

    matches: list[MechanismHeads[C]] = []
    parts: set[int] = set()
    layer, core_names = 0, set()
    for module in model.modules():
        if not isinstance(module, Mechanism) or id(module) in parts:
            continue
        layer += 1
        inside: Sequence[tuple[Mechanism, int]] = [(module, 1)]
        if isinstance(module, MixedHeadsMechanism):
            parts |= {id(part) for part in module.modules()}
            inside = [(core, heads.start + 1) for core, heads in zip(module.cores, module.queries, strict=True)]
        matches += [MechanismHeads(layer, first, core) for core, first in inside if isinstance(core, kind)]
        core_names |= {type(core).__name__.removesuffix("Mechanism") for core, _ in inside}
    if not matches:
        raise ConfigError(
            f"{run}: this run has no layer of {name}, only of {', '.join(sorted(core_names)) or 'no mechanism'}; "
            "give another run"
        )
    return matches
