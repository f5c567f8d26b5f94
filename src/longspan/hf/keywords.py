"""Keywords of a call: none is ever dropped without a word.

Models of transformers pass on whatever keyword they do not know, down to layers that drop it. A misspelt one would so
change nothing and say nothing.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any, NamedTuple

from torch import Tensor
from transformers.utils.generic import TransformersKwargs

from longspan.config import nearest
from longspan.errors import ConfigError, UnsupportedError
from longspan.hf.cache import CACHE_NAMES

# what callers of transformers pass to every model, and which means nothing to one that has no such part
_OF_OTHER_MODELS = (
    "head_mask",
    "cross_attn_head_mask",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "output_router_logits",
)


@functools.cache
def known_keywords(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the arguments of a `forward`, in order, without self and the catch-alls."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(forward).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds and parameter.name != "self")


LOSS_KEYWORDS = frozenset({"num_items_in_batch", "ignore_index", "shift_labels"})
"""What loss functions of transformers take; the last one of those that predict the next token."""

PASSED_ON = (frozenset(TransformersKwargs.__annotations__) | LOSS_KEYWORDS | {"return_dict"}) - {
    *_OF_OTHER_MODELS,
    "is_causal",
}
"""Keywords that models of transformers hand down beside the arguments of their own."""


class _Refusal(NamedTuple):
    """Why a keyword is refused, unless its value is None or the harmless one."""

    reason: str
    harmless: bool | None


_NO_STATE = _Refusal("it reads a whole text in one call and keeps no state; leave {name} out", False)
_WITHOUT_EFFECT = {
    **dict.fromkeys(_OF_OTHER_MODELS, _Refusal("it has nothing that {name} could act on; leave it out", False)),
    **dict.fromkeys((*CACHE_NAMES, "use_cache"), _NO_STATE),
    "shift_labels": _Refusal(
        "it predicts no next token, so its labels cannot be shifted; leave shift_labels out", None
    ),
    "is_causal": _Refusal("whether it is causal is part of the model; leave is_causal out", True),
}


def settle_keywords(keywords: MutableMapping[str, Any], known: Iterable[str], where: str) -> None:
    """Remove keywords that say nothing to this model, and refuse those that nobody here knows.

    Args:
        keywords: of the call, those the model reads taken out already or named in `known`.
        known: names that it takes.
        where: what is called, for messages.

    Raises:
        ConfigError: an unknown one; the nearest known name is part of the message.
        UnsupportedError: one that asks for what a model of longspan does not have.
    """
    names = set(known)
    for name in [name for name in keywords if name not in names]:
        value = keywords.pop(name)
        if name == "token_type_ids":
            # tokenizers make them for every model; of one kind they say nothing
            if isinstance(value, Tensor) and bool((value != 0).any()):
                raise UnsupportedError(f"{where}: it has no token types; token_type_ids may only hold 0")
        elif name not in _WITHOUT_EFFECT:
            raise ConfigError(f"{where}: unknown keyword {name!r}{nearest(name, names)}")
        elif value is not None and value is not _WITHOUT_EFFECT[name].harmless:
            raise UnsupportedError(f"{where}: {_WITHOUT_EFFECT[name].reason.format(name=name)}")
