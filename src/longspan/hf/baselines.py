"""Simpler attention for the weights of a converted model, to compare the model with."""

from typing import Any, Literal

from longspan.errors import ConfigError
from longspan.hf.convert import convert, mechanisms, revert
from longspan.hf.opening import convert_exactly

Baseline = Literal["original", "window", "sinks"]
WINDOW = 512
"""tokens of the window if no mechanism of the model has a local part"""


def local_tokens(model: Any) -> int:
    """Return the tokens that the mechanisms of a converted model see exactly: the smallest window or segment.

    Args:
        model: of transformers, converted.
    """
    configs = [core.config for core in mechanisms(model).values()]
    sizes = [getattr(config, name, None) for config in configs for name in ("window", "segment")]
    return min((size for size in sizes if isinstance(size, int) and size > 0), default=WINDOW)


def replace_attention(model: Any, baseline: Baseline) -> None:
    """Give a converted model other attention, in place; its other weights stay as they are.

    Args:
        model: of transformers, converted; adapters stay.
        baseline: "original": the attention that it had before its conversion; "window": a window of `local_tokens` in
            each layer; "sinks": the same with the first 4 tokens of a document in sight, at positions counted inside
            the cache.

    Raises:
        ConfigError: another name.
    """
    if baseline not in ("original", "window", "sinks"):
        raise ConfigError(f"baseline {baseline!r}: must be original, window or sinks")
    window = local_tokens(model)
    revert(model)
    if baseline == "original":
        convert_exactly(model)
    else:
        # conversions have sinks
        fields: dict[str, Any] = {} if baseline == "sinks" else {"sinks": 0}
        convert(model, "window", window=window, **fields)
