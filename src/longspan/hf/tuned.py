"""Pretrained models in training: what of them learns, and how runs keep them.

A recipe names them by `kind = "pretrained"`: a folder that `longspan convert` wrote or, with a table `memory`, any
causal model of transformers, made recurrent. New parameters (gates, projections, memory tokens) always learn; of the
rest nothing, low-rank adapters (Hu et al. 2021, by the library peft), or everything. Importing this module makes the
kind known to `longspan.models`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from longspan.config import check_least, to_dict
from longspan.errors import ConfigError, UnsupportedError
from longspan.hf.converted_config import CORE
from longspan.hf.decoder import ConvertedDecoder, open_pretrained, open_tokenizer
from longspan.hf.families import find
from longspan.hf.loading import load
from longspan.models.io import is_converted
from longspan.models.tables import register_kind

KIND = "pretrained"


@dataclass(frozen=True, kw_only=True)
class TunedConfig:
    """Which pretrained model, and what of it learns; the `[model]` table of a recipe."""

    source: str = ""
    """a folder that `longspan convert` wrote; with a table `memory`, any causal model of transformers"""
    tune: Literal["lora", "all", "new"] = "lora"
    """lora: adapters beside the linear maps; all: every weight; new: only what the conversion or the memory added"""
    lora_rank: int = 16
    lora_alpha: float = 32.0
    """adapters are scaled by lora_alpha / lora_rank"""
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = ()
    """ends of the names of linear maps that get adapters, such as "q_proj"; empty: all in the layers"""
    vocab_size: int = 0
    """token ids of the task; the model's own number may be larger"""

    def __post_init__(self) -> None:
        check_least(self, "model", {"lora_rank": 1, "lora_alpha": 0, "lora_dropout": 0})
        if not self.source:
            raise ConfigError("model.source: which pretrained model? A folder that `longspan convert` wrote")


class TunedDecoder(ConvertedDecoder):
    """A converted model of which a part learns; its `state_dict` holds that part only.

    Args:
        config: which model, and what of it learns.

    Raises:
        CheckpointError: the folder holds no converted model.
        ConfigError: adapters for maps that are not there.
        UnsupportedError: a layer does not stream.
    """

    def __init__(self, config: TunedConfig) -> None:
        model = load(config.source)
        freeze(model, config)
        super().__init__(model)
        self.config = config
        if self.vocab_size < config.vocab_size:
            raise ConfigError(f"{config.source}: knows {self.vocab_size} token ids, the task has {config.vocab_size}")

    @staticmethod
    def backbone(config: TunedConfig) -> nn.Module:
        """The model itself, for a recurrent memory around it."""
        model = load(config.source) if is_converted(config.source) else open_pretrained(config.source).model
        freeze(model, config)
        model.longspan_table = {"kind": KIND, **to_dict(config)}
        return cast(nn.Module, model)

    def describe(self) -> dict[str, Any]:
        """The table of a recipe."""
        return {"kind": KIND, **to_dict(self.config)}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """What learns, and the buffers of the mechanisms; the rest stands in `source`."""
        learns = {name: parameter.detach() for name, parameter in self.named_parameters() if parameter.requires_grad}
        saved = {name for name in super().state_dict() if f".{CORE}." in name}
        return learns | {name: buffer for name, buffer in self.named_buffers() if name in saved}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` gave."""
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def export(self, folder: Path) -> None:
        """Write a converted model that needs neither `source` nor peft: adapters become part of the weights.

        Args:
            folder: to be filled, with the tokenizer of `source` too.
        """
        merge_adapters(self.inner)
        self.inner.save_pretrained(folder)
        open_tokenizer(self.config.source).save_pretrained(folder)


def freeze(model: Any, config: TunedConfig) -> None:
    """Let learn what `config.tune` says, in place.

    Raises:
        ConfigError: `lora_targets` that no map's name ends with.
        UnsupportedError: the library peft is missing.
    """
    if config.tune == "lora":
        add_adapters(model, config)
    for name, parameter in model.named_parameters():
        new = f".{CORE}." in name or ".lora_" in name
        parameter.requires_grad_(config.tune == "all" or new)


def add_adapters(model: Any, config: TunedConfig) -> None:
    """Put adapters beside linear maps of the layers; raises as `freeze` does."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UnsupportedError("model.tune = 'lora' needs peft; pip install 'longspan[hf]'") from None
    from transformers.pytorch_utils import Conv1D

    prefixes = {id(layer): name for name, layer in model.named_modules()}
    attentions = find(model).attentions
    # the list of layers is what all attention modules have in common
    layers = prefixes[id(attentions[0])].rsplit(".0.", 1)[0]
    maps = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name.startswith(f"{layers}.") and f".{CORE}." not in name
    }
    chosen = {name for name in maps if not config.lora_targets or name.endswith(tuple(config.lora_targets))}
    if not chosen:
        known = sorted({name.rsplit(".", 1)[-1] for name in maps})
        raise ConfigError(
            f"model.lora_targets = {list(config.lora_targets)}: no map is called so; {', '.join(known)} are"
        )
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        target_modules=sorted(chosen),
        fan_in_fan_out=any(isinstance(maps[name], Conv1D) for name in chosen),
    )
    inject_adapter_in_model(settings, model)


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Add adapters to the weights they stand beside, and take them away, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, module.get_base_layer())


register_kind(KIND, TunedDecoder, TunedConfig)
