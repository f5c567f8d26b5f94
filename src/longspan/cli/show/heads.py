"""Heads of a trained model: where those of one mechanism are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from longspan.errors import ConfigError
from longspan.report.heads import Heads

if TYPE_CHECKING:
    from longspan.mixers import Mechanism

C = TypeVar("C", bound="Mechanism")


@dataclass(frozen=True)
class Found(Heads, Generic[C]):
    """A mechanism in a layer (from 1), and the number of its first head there (from 1)."""

    core: C


def find(model: Any, kind: type[C], run: str, name: str) -> list[Found[C]]:
    """The mechanisms of a kind in a model, parts of `heads` among them, in the order of the layers.

    Raises:
        ConfigError: there is none.
    """
    from longspan.mechanisms.mixed_heads.layer import MixedHeadsMechanism
    from longspan.mixers import Mechanism

    matches: list[Found[C]] = []
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
        matches += [Found(layer, first, core) for core, first in inside if isinstance(core, kind)]
        core_names |= {type(core).__name__.removesuffix("Mechanism") for core, _ in inside}
    if not matches:
        raise ConfigError(
            f"{run}: no layer of this run is {name}; its layers are {', '.join(sorted(core_names)) or 'none'}"
        )
    return matches
