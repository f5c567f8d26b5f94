"""What stands around a model of transformers: PEFT, torch.compile, data parallelism, and this library's own faces."""

from typing import Any

from torch import nn


def unwrapped(model: Any) -> Any:
    """The model of transformers inside all that stands around it; a model that nothing stands around is itself."""
    while True:
        inside = _inside(model)
        if inside is None or inside is model:
            return model
        model = inside


def _inside(model: Any) -> Any:
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
