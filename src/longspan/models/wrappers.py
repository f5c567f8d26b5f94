"""Remove wrappers around models: PEFT, torch.compile, data parallelism, and this library's own."""

from collections.abc import Callable
from typing import Any

from torch import nn

# functions that turn a model of another library into one with the interface of a `Decoder`, or return None
OPENERS: list[Callable[[Any], Any]] = []


def unwrapped(model: Any) -> Any:
    """Return the innermost model without any wrapper; a model without wrappers is returned unchanged."""
    while True:
        within = unwrap_once(model)
        if within is None or within is model:
            return model
        model = within


def unwrap_once(model: Any) -> Any:
    """Return the model inside the outermost wrapper; None if there is no wrapper."""
    own: dict[str, Any] = getattr(model, "_modules", {})
    if isinstance(own.get("_orig_mod"), nn.Module):  # torch.compile
        return own["_orig_mod"]
    if isinstance(own.get("module"), nn.Module):  # DistributedDataParallel and alike
        return own["module"]
    if hasattr(type(model), "get_base_model"):  # PEFT
        return model.get_base_model()
    if type(model).__module__.startswith("peft.") and isinstance(own.get("model"), nn.Module):  # its tuners
        return own["model"]
    if isinstance(own.get("inner"), nn.Module):  # ConvertedDecoder
        return own["inner"]
    return None
