"""Check the keywords of a call, so that none is dropped silently.

Models of transformers pass unknown keywords on to layers that drop them, so a misspelled one would have no effect and
raise no error.
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

# keywords that callers of transformers pass to every model, for parts that our models do not have
_FOR_OTHER_PARTS = (
    "head_mask",
    "cross_attn_head_mask",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "output_router_logits",
)


@functools.cache
def known_keywords(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the arguments of a `forward`, in order, without self and the catch-alls."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(forward).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds and parameter.name != "self")


LOSS_KEYWORDS = frozenset({"num_items_in_batch", "ignore_index", "shift_labels"})
"""Keywords of transformers' loss functions; `shift_labels` only of those that predict the next token."""

PASSED_ON = (frozenset(TransformersKwargs.__annotations__) | LOSS_KEYWORDS | {"return_dict"}) - {
    *_FOR_OTHER_PARTS,
    "is_causal",
}
"""Keywords that transformers models pass on to layers and losses, in addition to their own arguments."""


class _Refusal(NamedTuple):
    """The reason why a keyword is not supported, unless its value is None or `harmless`."""

    reason: str
    harmless: bool | None


_NO_STATE = _Refusal("this model reads a whole text in one call and keeps no state; leave {name} out", False)
_WITHOUT_EFFECT = {
    **dict.fromkeys(_FOR_OTHER_PARTS, _Refusal("this model has no part that uses {name}; leave it out", False)),
    **dict.fromkeys((*CACHE_NAMES, "use_cache"), _NO_STATE),
    "shift_labels": _Refusal(
        "this model does not predict the next token, so labels cannot be shifted; leave shift_labels out", None
    ),
    "is_causal": _Refusal("causality is fixed when the model is built; leave is_causal out", True),
}


def check_keywords(keywords: MutableMapping[str, Any], known: Iterable[str], where: str) -> None:
    """Remove keywords that have no effect on this model, and raise for unknown or unsupported ones.

    Args:
        keywords: of the call; changed in place.
        known: names that the model accepts; these stay.
        where: name of the model in messages.

    Raises:
        ConfigError: an unknown keyword; the message suggests the nearest known name.
        UnsupportedError: a keyword for something that longspan's models do not support.
    """
    names = set(known)
    for name in [name for name in keywords if name not in names]:
        value = keywords.pop(name)
        if name == "token_type_ids":
            # tokenizers make them for every model; all zeros mean nothing
            if isinstance(value, Tensor) and bool((value != 0).any()):
                raise UnsupportedError(f"{where}: this model has no token types; token_type_ids must be all 0")
        elif name not in _WITHOUT_EFFECT:
            raise ConfigError(f"{where}: unknown keyword {name!r}{nearest(name, names)}")
        elif value is not None and value is not _WITHOUT_EFFECT[name].harmless:
            raise UnsupportedError(f"{where}: {_WITHOUT_EFFECT[name].reason.format(name=name)}")
