"""Pretrained models in training: which of their parameters are trained, and how runs store them.

A recipe selects them by `kind = "pretrained"`: a folder that `longspan convert` wrote or, with a table `memory`, any
causal model of transformers, made recurrent. New parameters (gates, projections, memory tokens) are always trained. Of
the others nothing is trained, or low-rank adapters (Hu et al. 2021, by the library peft), or everything. Importing this
module registers the kind with `longspan.models`.
"""

import logging
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
from longspan.hf.families import layers_name
from longspan.hf.loading import load
from longspan.models.io import is_converted
from longspan.models.tables import register_kind

KIND = "pretrained"


@dataclass(frozen=True, kw_only=True)
class TunedConfig:
    """The `[model]` table of a recipe for a pretrained model: which one, and which parameters are trained."""

    source: str = ""
    """a folder that `longspan convert` wrote; with a table `memory`, any causal model of transformers"""
    tune: Literal["lora", "all", "new"] = "lora"
    """trained are: lora: adapters of the linear maps; all: every weight; new: only parameters of mixers and memory"""
    lora_rank: int = 16
    lora_alpha: float = 32.0
    """adapters are scaled by lora_alpha / lora_rank"""
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = ()
    """suffixes of the names of linear maps that get adapters, such as "q_proj"; empty: all in the layers"""
    checkpoint: bool = False
    """keep only the inputs of layers for the backward pass, and compute the rest again: much less memory, a fifth to a
    third more time; gradients are the same"""
    vocab_size: int = 0
    """number of token ids of the task; the model may have more"""

    def __post_init__(self) -> None:
        check_least(self, "model", {"lora_rank": 1, "lora_alpha": 0, "lora_dropout": 0})
        if not self.source:
            raise ConfigError("model.source is empty; set it to a folder that `longspan convert` wrote")


class TunedDecoder(ConvertedDecoder):
    """A converted model of which only some parameters are trained; its `state_dict` contains only these.

    Args:
        config: which model, and which of its parameters are trained.

    Raises:
        CheckpointError: the folder contains no converted model.
        ConfigError: `lora_targets` matches no linear map, or the vocabulary is too small.
        UnsupportedError: a layer does not stream.
    """

    def __init__(self, config: TunedConfig) -> None:
        model = load(config.source)
        prepare_training(model, config)
        super().__init__(model)
        self.config = config
        if self.vocab_size < config.vocab_size:
            raise ConfigError(
                f"{config.source}: has {self.vocab_size} token ids, but the task needs {config.vocab_size}; use the "
                "tokenizer of the model"
            )

    @staticmethod
    def backbone(config: TunedConfig) -> nn.Module:
        """Return the transformers model itself, to be wrapped in a recurrent memory."""
        model = load(config.source) if is_converted(config.source) else open_pretrained(config.source).model
        prepare_training(model, config)
        model.longspan_table = {"kind": KIND, **to_dict(config)}
        return cast(nn.Module, model)

    def describe(self) -> dict[str, Any]:
        """Return the model table of a recipe."""
        return {"kind": KIND, **to_dict(self.config)}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the trained parameters and the buffers of the mechanisms; the other weights are in `source`."""
        learns = {name: parameter.detach() for name, parameter in self.named_parameters() if parameter.requires_grad}
        saved = {name for name in super().state_dict() if f".{CORE}." in name}
        return learns | {name: buffer for name, buffer in self.named_buffers() if name in saved}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load parameters and buffers that `state_dict` returned.

        `strict` is ignored: missing names keep their weights from `source`, and unknown names are skipped.
        """
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def export(self, folder: Path) -> None:
        """Write a converted model that needs neither `source` nor peft: adapters are merged into the weights.

        Args:
            folder: is filled with the model and the tokenizer of `source`.
        """
        merge_adapters(self.inner)
        self.inner.save_pretrained(folder)
        open_tokenizer(self.config.source).save_pretrained(folder)


def prepare_training(model: Any, config: TunedConfig) -> None:
    """Make only the parameters selected by `config.tune` trainable, in place; adds adapters for "lora", and recomputes
    layers in the backward pass if `config.checkpoint` says so.

    Raises:
        ConfigError: `lora_targets` matches no linear map.
        UnsupportedError: the library peft is missing, or the model cannot recompute its layers.
    """
    if config.checkpoint:
        checkpoint_layers(model)
    if config.tune == "lora":
        add_adapters(model, config)
    for name, parameter in model.named_parameters():
        new = f".{CORE}." in name or ".lora_" in name
        parameter.requires_grad_(config.tune == "all" or new)


def checkpoint_layers(model: Any) -> None:
    """Make a model of transformers keep only the inputs of its layers in training, in place.

    Raises:
        UnsupportedError: its class does not allow it.
    """
    # the name in transformers 5.23 and later, which deprecate the other one
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError:
        raise UnsupportedError(
            f"model.checkpoint: {type(model).__name__} cannot recompute its layers; set model.checkpoint = false"
        ) from None
    for name in ("modeling_layers", "utils.generic"):
        logging.getLogger(f"transformers.{name}").addFilter(_keeps_record)


def _keeps_record(record: logging.LogRecord) -> bool:
    """Return whether a log record is not about caches, which layers that are converted do not read: their states are
    carried in either case.
    """
    return "is incompatible with gradient checkpointing" not in record.getMessage()


def add_adapters(model: Any, config: TunedConfig) -> None:
    """Add low-rank adapters to linear maps of the layers, in place; raises as `prepare_training` does."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UnsupportedError("model.tune = 'lora' needs peft; pip install 'longspan[hf]'") from None
    from transformers.pytorch_utils import Conv1D

    layers = layers_name(model)
    maps = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name.startswith(f"{layers}.") and f".{CORE}." not in name
    }
    chosen = {name for name in maps if not config.lora_targets or name.endswith(tuple(config.lora_targets))}
    if not chosen:
        known = sorted({name.rsplit(".", 1)[-1] for name in maps})
        raise ConfigError(
            f"model.lora_targets = {list(config.lora_targets)}: matches no linear map; known: {', '.join(known)}"
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
    """Merge adapters into the weights of their linear maps and remove them, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, module.get_base_layer())


register_kind(KIND, TunedDecoder, TunedConfig)
