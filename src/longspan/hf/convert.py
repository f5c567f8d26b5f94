"""Pretrained models with another mechanism in the place of their attention: in place, reversible, weights kept.

Each attention module keeps its own weights under their own names and gets a submodule `longspan`, the mechanism's core
with its new parameters (gates, projections); only what happens between q, k, v and the output changes. So
`save_pretrained`, PEFT (`modules_to_save=["longspan"]`) and optimisers see ordinary modules.
"""

import functools
import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longspan import host, renames
from longspan import state as states
from longspan.config import to_dict
from longspan.contract.base import Hidden, Mechanism
from longspan.contract.maps import place_of
from longspan.contract.registry import build_mechanism, mechanism_class
from longspan.errors import ConfigError, UnsupportedError
from longspan.hf.aux_losses import LastAuxLosses
from longspan.hf.cache import on_device, take_cache
from longspan.hf.calls import Call, check_caches, prepare_call
from longspan.hf.converted_config import CORE, mark, unmark
from longspan.hf.families import Family, find
from longspan.hf.resting import Resting, put_aside, wake
from longspan.models.backbone import groups_of
from longspan.models.wrappers import inside, unwrapped


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        name: of the mixer.
        layers: that were converted.
        fields: of the mixer, defaults filled in.
        new_parameters: names of the parameters that were not there before.
        bounded: the state of the whole model does not grow with the text.
    """

    name: str
    layers: tuple[int, ...]
    fields: dict[str, Any]
    new_parameters: tuple[str, ...]
    bounded: bool

    def __str__(self) -> str:
        fields = ", ".join(f"{key}={value!r}" for key, value in self.fields.items())
        state = "constant state" if self.bounded else "a state that grows with the text"
        return f"{len(self.layers)} layers: {self.name}({fields}), {len(self.new_parameters)} new parameters, {state}"


class Converted(Resting):
    """Stands before the class of a converted attention module; see `convert`."""

    longspan: Mechanism
    longspan_family: Family
    longspan_index: int

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name the original class; the converted one is made of it again where they are read."""
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        return (_blank, (original_class(self),), *reduced[2:])

    @host.eager
    def forward(self, hidden_states: Tensor, *args: Any, longspan_call: Call | None = None, **kwargs: Any) -> Any:
        """What the module's own forward returns, without attention weights."""
        if longspan_call is None:
            raise UnsupportedError(
                "a converted attention module was called outside its model; call the model, or longspan.hf.revert it"
            )
        check_caches(args, kwargs)
        rows, index = longspan_call.rows, self.longspan_index
        x, traits = rows.gather(hidden_states), self.longspan.traits
        q, k, v = self.longspan_family.project(self, x, traits.uses_keys)
        hidden = Hidden(x, self.longspan_keys_values) if traits.receives_hidden else None
        # what is made again in a backward pass was appended already
        aux_losses: list[Tensor] = [] if states.recomputing() else longspan_call.aux_losses
        known = len(aux_losses)
        before = on_device(longspan_call.before.get(index), hidden_states.device)
        out, next_state = self.longspan.run(q, k, v, before, rows, hidden=hidden, aux_losses=aux_losses)
        if longspan_call.graph and not torch.is_grad_enabled() and self.longspan.training:
            _check_reentry(self.longspan, len(aux_losses) > known)
        longspan_call.finish(index, next_state, hidden_states.device)
        # gates and projections may be of another precision than the model
        y = self.longspan_family.output(self, out.to(hidden_states.dtype))
        return rows.scatter(y), None

    def longspan_keys_values(self, x: Tensor, kv_heads: slice | None = None) -> tuple[Tensor, Tensor]:
        """See `Projections.keys_values`."""
        _, k, v = self.longspan_family.project(self, x)
        part = slice(None) if kv_heads is None else kv_heads
        return k[:, part], v[:, part]


def _check_reentry(core: Mechanism, penalised: bool) -> None:
    """Refuse what trains without a graph inside a call that has one.

    Raises:
        UnsupportedError: the mixer counts its training forwards, or has auxiliary losses, which would go unlearned.
    """
    if core.traits.tracks_statistics or penalised:
        raise UnsupportedError(
            "this mixer learns beside the loss, which re-entrant checkpointing loses; call "
            "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
        )


def convert(model: Any, name: str, *, layers: Iterable[int] | None = None, **fields: Any) -> Report:
    """Put a mixer into the place of a pretrained model's attention.

    Args:
        model: of transformers, with or without a head, perhaps inside PEFT: Llama, Mistral, Qwen2, Qwen3, SmolLM,
            GPT-2, BERT and those built alike (`longspan.hf.families`). Changed in place; `revert` undoes it.
        name: of the mixer. Those whose traits are not `convertible` (`transformer_xl`) cannot be used.
        layers: which; negative ones count from the end; None = all.
        fields: of the mixer; some begin elsewhere than in a new model (`Mechanism.conversion_fields`). The gates of
            `infini` and `memorizing` begin at -4, so that a text of one segment gives the original logits and a longer
            one nearly those of local attention; `lsh` and `routing` use the model's keys.

    Returns:
        What was done.

    Raises:
        UnsupportedError: the model's family, its positions, or the mixer do not allow it.
        ConfigError: an unknown mixer or field (with the nearest name), or layers that are not there.
    """
    outside, model = model, unwrapped(model)
    modules = find(model)
    chosen = _layers(layers, len(modules.attentions))
    name = renames.mixer(name)
    fields = _defaults(name, renames.fields(name, fields))
    if taken := [index for index in chosen if index in modules.cores]:
        raise ConfigError(f"convert: layer {taken[0]} is converted already; longspan.hf.revert(model) first")
    cores = {}
    for index in chosen:
        attention = modules.attentions[index]
        core = build_mechanism(name, modules.family.shape(model, attention), dict(fields), f"convert to {name}")
        _check_fit(name, core, modules.family, model.config.model_type)
        cores[index] = core.to(place_of(attention).device)
    for index, core in cores.items():
        attention = modules.attentions[index]
        original: Any = type(attention)
        _turn(attention, converted_class(original))
        attention.add_module(CORE, core)
        if not core.traits.uses_keys:
            put_aside(attention, modules.family.key_maps)
        attention.longspan_family, attention.longspan_index = modules.family, index
    base = modules.family.base(model)
    if "longspan_hooks" not in base.__dict__:
        before = base.register_forward_pre_hook(prepare_call, with_kwargs=True)
        base.__dict__["longspan_hooks"] = [before, base.register_forward_hook(_after, with_kwargs=True)]
    record = {"mixer": name, "layers": list(chosen), "fields": to_dict(next(iter(cores.values())).config)}
    mark(model.config, record)
    report = Report(
        name=name,
        layers=chosen,
        fields=record["fields"],
        new_parameters=tuple(key for key, _ in model.named_parameters() if f".{CORE}." in key),
        bounded=len(modules.cores) == len(modules.attentions)
        and all(core.traits.bounded for core in modules.cores.values()),
    )
    _save_with_adapters(outside, [modules.attentions[index] for index in chosen])
    return report


def _check_fit(name: str, core: Mechanism, family: Family, model_type: str) -> None:
    """Refuse a mechanism that a pretrained model of this family cannot hold.

    Raises:
        UnsupportedError: the traits of the core say so.
    """
    traits, head_dim = core.traits, core.shape.head_dim
    if not traits.convertible:
        raise UnsupportedError(f"{name} does not convert: {traits.no_conversion_reason}")
    if core.value_dim != head_dim:
        raise UnsupportedError(f"{name} takes values of {core.value_dim} a head; those of this model have {head_dim}")
    if not traits.bidirectional and not family.causal:
        raise UnsupportedError(f"{name} is causal only; {model_type} sees both sides")


def _save_with_adapters(model: Any, attentions: list[Any]) -> None:
    """Let PEFT train and save new parameters with the adapters that stand around them already."""
    while model is not None and not hasattr(type(model), "get_base_model"):
        model = inside(model)
    # draws and statistics count too
    attentions = [attention for attention in attentions if attention.longspan.state_dict()]
    if model is None or not attentions:
        return
    from peft import utils

    wrap: Any = utils.ModulesToSaveWrapper
    adapters = list(model.peft_config)
    for settings in model.peft_config.values():
        settings.modules_to_save = sorted({*(settings.modules_to_save or ()), CORE})
    for attention in attentions:
        wrapper = wrap(attention.longspan, adapters[0])
        for adapter in adapters[1:]:
            wrapper.update(adapter)
        wrapper.set_adapter(model.active_adapter)
        setattr(attention, CORE, wrapper)


def _defaults(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Fields with what conversions begin from, in the parts of `mixed_heads` too."""
    merged = mechanism_class(name, "convert").conversion_fields | fields
    if isinstance(merged.get("mixers"), list | tuple):
        merged["mixers"] = [
            _defaults(part["name"], part) if isinstance(part, dict) and isinstance(part.get("name"), str) else part
            for part in merged["mixers"]
        ]
    return merged


def revert(model: Any) -> None:
    """Give a converted model its own attention back, bit for bit; what the mixers learnt is dropped.

    Raises:
        ConfigError: the model is not converted.
    """
    model = unwrapped(model)
    modules = find(model)
    if not modules.cores:
        raise ConfigError("revert: this model is not converted")
    for index in modules.cores:
        attention = modules.attentions[index]
        wake(attention)
        delattr(attention, CORE)
        del attention.longspan_family, attention.longspan_index
        _turn(attention, original_class(attention))
    for handle in modules.family.base(model).__dict__.pop("longspan_hooks"):
        handle.remove()
    unmark(model.config)


def mechanisms(model: Any) -> dict[int, Mechanism]:
    """The cores of a converted model, by layer; empty where it is not converted."""
    return find(unwrapped(model)).cores


def _layers(layers: Iterable[int] | None, count: int) -> tuple[int, ...]:
    chosen = tuple(range(count)) if layers is None else tuple(dict.fromkeys(layers))
    bad = [index for index in chosen if not -count <= index < count]
    if bad or not chosen:
        raise ConfigError(f"convert: layers = {list(chosen)}: this model has {count} layers, 0 to {count - 1}")
    return tuple(sorted(index % count for index in chosen))


@functools.cache
def converted_class(original: type) -> type:
    """The class of converted attention modules of a class; one and the same for all of them."""
    return type(f"Longspan{original.__name__}", (Converted, original), {"__module__": __name__})


def original_class(attention: Any) -> type:
    """The class that a converted attention module had before."""
    return type(attention).__bases__[1]


def _blank(original: type) -> Any:
    cls: Any = converted_class(original)
    return cls.__new__(cls)


def _turn(attention: Any, cls: Any) -> None:
    """Change the class of a module, and what hooks of accelerate wrap as its own forward."""
    attention.__class__ = cls
    if "_old_forward" in attention.__dict__:
        attention._old_forward = types.MethodType(cls.forward, attention)


@host.eager
def _after(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Keep the states, where there is a cache."""
    call: Call = kwargs["longspan_call"]
    cache = take_cache(dict(kwargs))
    if cache is not None:
        call.advance(cache)
        cache.end()
    base.__dict__["longspan_aux_losses"] = LastAuxLosses(call.aux_losses, output[0])


def aux_losses(model: Any) -> list[Tensor]:
    """Auxiliary losses of a converted model's last call (spans, commitment), to be added to the loss.

    They can be trained through while the call's output, or a loss made of it, exists; later their values are left.
    """
    inner = unwrapped(model)
    last: LastAuxLosses | None = find(inner).family.base(inner).__dict__.get("longspan_aux_losses")
    return [] if last is None else last.read()


def after_step(model: Any, step: int, generator: torch.Generator | None = None) -> None:
    """Call after each optimiser step (1, 2, ...): clamps, redraws, statistics of every converted layer."""
    for core in mechanisms(model).values():
        core.after_step(step, generator)


def parameter_groups(model: nn.Module, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for a torch optimiser: gates and the like with settings of their own, the rest as `decay_groups` has it.

    Args:
        model: converted, perhaps inside PEFT; parameters that need no gradient are left out.
        lr, weight_decay: of the run.
    """
    return groups_of(model, mechanisms(model).values(), lr=lr, weight_decay=weight_decay)
