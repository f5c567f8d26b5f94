"""The family of a model, and its attention modules."""

from dataclasses import dataclass
from typing import Any

from longspan.contract.base import Mechanism
from longspan.errors import UnsupportedError
from longspan.hf.families.absolute import GPT2, Bert
from longspan.hf.families.base import Family
from longspan.hf.families.hybrid import OlmoHybrid, Qwen3Next
from longspan.hf.families.rotary import Cohere2, Gemma, GPTNeoX, Llama, Olmo, Phi3

_FAMILIES: tuple[Family, ...] = (
    Llama(),
    Gemma(),
    Phi3(),
    Olmo(),
    Cohere2(),
    GPTNeoX(),
    Qwen3Next(),
    OlmoHybrid(),
    GPT2(),
    Bert(),
)


def model_types() -> tuple[str, ...]:
    """Return the transformers model types that can be converted."""
    return tuple(kind for family in _FAMILIES for kind in family.model_types)


@dataclass(frozen=True)
class AttentionModules:
    """The family of a model and the attention module of each layer.

    Attributes:
        family: reads the modules.
        attentions: one entry per layer; None = a layer of another kind (linear attention), which stays as it is.
    """

    family: Family
    attentions: list[Any]

    @property
    def convertible(self) -> list[int]:
        """Indices of the layers with softmax attention."""
        return [index for index, attention in enumerate(self.attentions) if attention is not None]

    @property
    def others(self) -> list[int]:
        """Indices of the layers of another kind."""
        return [index for index, attention in enumerate(self.attentions) if attention is None]

    def by_window(self, model: Any) -> dict[int | None, list[int]]:
        """Return the layers with softmax attention by the size of their own sliding window; None = they have none."""
        layers: dict[int | None, list[int]] = {}
        for index in self.convertible:
            layers.setdefault(self.family.window(model, self.attentions[index]), []).append(index)
        return layers

    @property
    def cores(self) -> dict[int, Mechanism]:
        """The mechanisms of converted attention modules, by layer index."""
        return {
            index: attention.longspan
            for index, attention in enumerate(self.attentions)
            if hasattr(attention, "longspan_family")
        }


def attention_modules(model: Any) -> AttentionModules:
    """Return the family and the attention modules of a model.

    Raises:
        UnsupportedError: its model type cannot be converted, or not with the installed transformers.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    for family in _FAMILIES:
        if kind in family.model_types:
            if reason := family.why_not(model):
                raise UnsupportedError(f"a model of type {kind!r} cannot be converted: {reason}")
            return AttentionModules(family, list(family.attentions(model)))
    known = ", ".join(model_types())
    raise UnsupportedError(f"a model of type {kind!r} cannot be converted; supported types: {known}")


def layers_name(model: Any) -> str:
    """Return the dotted name of the list of layers inside a model; raises as `attention_modules` does."""
    modules = attention_modules(model)
    first = modules.convertible[0]
    attention: str = next(name for name, module in model.named_modules() if module is modules.attentions[first])
    return attention.rsplit(f".{first}.", 1)[0]
