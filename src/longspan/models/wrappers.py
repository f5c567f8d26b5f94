"""What stands around a model: PEFT, torch.compile, data parallelism, and this library's own faces."""

from collections.abc import Callable
from typing import Any

from torch import nn

# turn models of other libraries into what a session calls as it calls a `Decoder`; None where they know none
OPENERS: list[Callable[[Any], Any]] = []


def unwrapped(model: Any) -> Any:
    """The model inside all that stands around it; a model that nothing stands around is itself."""
    while True:
        within = inside(model)
        if within is None or within is model:
            return model
        model = within


def inside(model: Any) -> Any:
    """The model one layer further inside, None where there is none."""
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
