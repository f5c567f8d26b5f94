"""Replace the attention of pretrained models by another mechanism: in place, reversible, with the pretrained weights.

Each attention module keeps its own weights under their names and gets a submodule `longspan`, the mechanism's core with
its new parameters (gates, projections). Only the computation between q, k, v and the output changes. So
`save_pretrained`, PEFT (`modules_to_save=["longspan"]`) and optimizers see ordinary modules.
"""

import functools
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longspan import host, renames
from longspan import state as states
from longspan.config import to_dict
from longspan.contract.base import Hidden, Mechanism
from longspan.contract.maps import device_and_dtype
from longspan.contract.registry import build_mechanism, mechanism_class
from longspan.errors import ConfigError, UnsupportedError
from longspan.hf.aux_losses import LastAuxLosses
from longspan.hf.cache import on_device, take_cache
from longspan.hf.calls import Call, check_caches, prepare_call
from longspan.hf.converted_config import CORE, mark, unmark
from longspan.hf.families import AttentionModules, Family, attention_modules
from longspan.hf.families.base import HEADS
from longspan.hf.ranking import LayerRanking, automatic
from longspan.hf.resting import KeepsUnusedModules, restore_modules, set_aside_modules
from longspan.models.backbone import foreign_optimizer_groups
from longspan.models.wrappers import unwrap_once, unwrapped


@dataclass(frozen=True)
class Report:
    """Summary of a conversion.

    Attributes:
        name: name of the mixer.
        layers: indices of the converted layers.
        fields: fields of the mixer, with defaults.
        new_parameters: names of the parameters that the conversion added.
        bounded: the state of the whole model does not grow with the text.
        local_layers: indices of the layers that keep their sliding window, as the mixer `window`.
        softmax_layers: indices of the layers that keep softmax, with `layers = "auto:N"`.
        ranking: what the conversion of each layer alone costs, with `layers = "auto:N"`; else None.
    """

    name: str
    layers: tuple[int, ...]
    fields: dict[str, Any]
    new_parameters: tuple[str, ...]
    bounded: bool
    local_layers: tuple[int, ...] = ()
    softmax_layers: tuple[int, ...] = ()
    ranking: LayerRanking | None = None

    def __str__(self) -> str:
        """Return a one-line summary for printing."""
        fields = ", ".join(f"{key}={value!r}" for key, value in self.fields.items())
        state = "state of constant size" if self.bounded else "state that grows with the text"
        local = f", {len(self.local_layers)} local layers keep their window" if self.local_layers else ""
        softmax = f", {len(self.softmax_layers)} layers keep softmax" if self.softmax_layers else ""
        parameters = f"{len(self.new_parameters)} new parameters"
        return f"{len(self.layers)} layers: {self.name}({fields}){local}{softmax}, {parameters}, {state}"


class Converted(KeepsUnusedModules):
    """Mixin placed before the class of an attention module by `convert`;
    its forward runs a mechanism instead of attention.
    """

    longspan: Mechanism
    longspan_family: Family
    longspan_index: int

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle or copy by the name of the original class; the converted class is rebuilt from it when loading."""
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        return (_new_converted, (original_class(self),), *reduced[2:])

    @host.eager
    def forward(self, hidden_states: Tensor, *args: Any, longspan_call: Call | None = None, **kwargs: Any) -> Any:
        """Run the mechanism on hidden states (batch, length, dim).

        Returns what the original forward returns, with None for the attention weights.
        """
        if longspan_call is None:
            raise UnsupportedError(
                "a converted attention module was called on its own; call the whole model, or undo the conversion with "
                "longspan.hf.revert(model)"
            )
        check_caches(args, kwargs)
        rows, index = longspan_call.rows, self.longspan_index
        x, traits = rows.gather(hidden_states), self.longspan.traits
        # an attention transfer computes something else in its forward passes
        if (substitute := self.__dict__.get("longspan_substitute")) is not None:
            return rows.scatter(substitute(x, rows)), None
        q, k, v, gate = self.longspan_family.projected(self, x, traits.uses_keys)
        hidden = Hidden(x, self.longspan_keys_values) if traits.receives_hidden else None
        # in the recomputation of a backward pass the losses were appended already
        aux_losses: list[Tensor] = [] if states.recomputing() else longspan_call.aux_losses
        known = len(aux_losses)
        before = on_device(longspan_call.before.get(index), hidden_states.device)
        out, next_state = self.longspan.run(q, k, v, before, rows, hidden=hidden, aux_losses=aux_losses)
        if longspan_call.graph and not torch.is_grad_enabled() and self.longspan.training:
            _check_reentry(self.longspan, len(aux_losses) > known)
        longspan_call.finish(index, next_state, hidden_states.device)
        # gates and projections may have another dtype than the model
        y = self.longspan_family.output(self, out.to(hidden_states.dtype), gate)
        return rows.scatter(y), None

    def longspan_keys_values(self, x: Tensor, kv_heads: slice | None = None) -> tuple[Tensor, Tensor]:
        """Project x (B, M, dim) to k and v (B, kv_heads, M, head_dim) of all kv heads, or of a slice of them."""
        _, k, v = self.longspan_family.project(self, x)
        part = slice(None) if kv_heads is None else kv_heads
        return k[:, part], v[:, part]


def _check_reentry(core: Mechanism, has_penalties: bool) -> None:
    """Raise if a mixer that learns outside the loss runs without a graph inside a call with one (re-entrant
    checkpointing).

    Args:
        core: the mechanism.
        has_penalties: it added auxiliary losses in this call.

    Raises:
        UnsupportedError: the mixer tracks statistics, or has auxiliary losses, which would not be trained.
    """
    if core.traits.tracks_statistics or has_penalties:
        raise UnsupportedError(
            "re-entrant checkpointing loses the auxiliary losses and statistics of this mixer; call "
            "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
        )


def convert(
    model: Any,
    name: str,
    *,
    layers: Iterable[int] | str | None = None,
    data: Iterable[Tensor | Mapping[str, Any]] | None = None,
    **fields: Any,
) -> Report:
    """Replace the attention of a pretrained model by a mixer, in place.

    Layers that have a sliding window of their own are local already. With `layers = None`, a model that mixes them with
    layers that see the whole text (Gemma 2 and 3, OLMo 3, Qwen2 with `use_sliding_window`) gets the mixer in the
    latter, and its local layers become `window` of their own size, which changes no output. If all layers are local
    (Mistral), all get the mixer, and so does every layer that `layers` names: the window of such a layer no longer
    applies; `window` of the same size with `sinks=0` is exact. Linear attention of hybrids (Qwen3-Next) stays as it is.

    Args:
        model: a transformers model, with or without a head, perhaps inside PEFT: Llama, Mistral, Mixtral, Qwen2, Qwen3,
            Qwen3-MoE, Qwen3-Next, SmolLM, Gemma, Phi-3, OLMo, Granite, Command R7B, StarCoder2, GPT-NeoX, GPT-2, BERT
            and similar ones (`longspan.hf.families`). `revert` undoes the conversion.
        name: name of the mixer. Mixers whose traits are not `convertible` (`transformer_xl`) cannot be used.
        layers: indices of the layers to convert; negative ones count from the end; None = all, see above; "auto:N" =
            these, except for the N layers whose conversion costs most on `data`, which keep softmax. The ranking is
            part of the report (`longspan.hf.ranking`).
        data: text for "auto:N", longer than a segment or a window of the mixer: token ids (rows, length), or dicts of
            `input_ids`, `attention_mask` and `reset`. The model reads it about half as often as it has layers.
        fields: fields of the mixer; some have other defaults than in a new model (`Mechanism.conversion_fields`). The
            gates of `infini` and `memorizing` start at -4, so that a text of one segment gives the original logits and
            a longer one nearly those of local attention; `lsh` and `routing` use the model's keys.

    Returns:
        A summary of the conversion.

    Raises:
        UnsupportedError: the model's family, its positions, caps of its scores, or the mixer do not allow it.
        ConfigError: an unknown mixer or field (with the nearest name), or layers that do not exist or have no softmax
            attention; "auto:N" without `data`.
        DataError: the conversion changes nothing on `data`.
    """
    name, num_softmax = renames.mixer(name), automatic(layers)
    if num_softmax and data is None:
        raise ConfigError(f"convert: layers = {layers!r} ranks the layers on a text; pass data=[token_ids]")
    chosen = None if isinstance(layers, str) else layers
    report = _convert(model, name, chosen, _defaults(name, renames.fields(name, fields)))
    if not num_softmax or data is None:
        return report
    # it needs this module
    from longspan.hf.automatic import keep_costliest

    return keep_costliest(model, report, num_softmax, data)


def convert_without_defaults(model: Any, name: str, layers: Iterable[int], fields: dict[str, Any]) -> None:
    """Convert as `convert` does, but with the defaults of a new model for other fields, and not those of conversions.

    So recorded conversions compute what they did, also where a version of the library has added fields since.
    """
    name = renames.mixer(name)
    _convert(model, name, layers, renames.fields(name, fields))


def _convert(model: Any, name: str, layers: Iterable[int] | None, fields: dict[str, Any]) -> Report:
    """Replace the attention of some layers by a mixer; see `convert`."""
    outside, model = model, unwrapped(model)
    modules = attention_modules(model)
    chosen, local = _layers(model, modules, layers)
    plan = _Plan(name, chosen, _build(model, modules, name, fields, chosen))
    plans = [plan]
    for window, indices in local.items():
        plans.append(_Plan("window", indices, _build(model, modules, "window", {"window": window}, indices)))
    for part in plans:
        _install(model, modules, part)
    base = modules.family.base(model)
    if "longspan_hooks" not in base.__dict__:
        before = base.register_forward_pre_hook(prepare_call, with_kwargs=True)
        base.__dict__["longspan_hooks"] = [before, base.register_forward_hook(_store_states, with_kwargs=True)]
    cores = modules.cores
    report = Report(
        name=name,
        layers=chosen,
        fields=plan.record["fields"],
        new_parameters=tuple(key for key, _ in model.named_parameters() if f".{CORE}." in key),
        bounded=len(cores) == len(modules.convertible) and all(core.traits.bounded for core in cores.values()),
        local_layers=tuple(sorted(index for indices in local.values() for index in indices)),
    )
    _save_with_adapters(outside, [modules.attentions[index] for index in chosen])
    return report


@dataclass(frozen=True)
class _Plan:
    """The layers that get one mixer, with their cores by layer index."""

    name: str
    layers: tuple[int, ...]
    cores: dict[int, Mechanism]

    @property
    def record(self) -> dict[str, Any]:
        """The conversion as plain data, for the configuration."""
        config = to_dict(next(iter(self.cores.values())).config)
        return {"mixer": self.name, "layers": list(self.layers), "fields": config}


def _build(
    model: Any, modules: AttentionModules, name: str, fields: dict[str, Any], layers: tuple[int, ...]
) -> dict[int, Mechanism]:
    """Build the cores of some layers; nothing of the model changes.

    Raises:
        UnsupportedError: the model or the mixer do not allow it.
        ConfigError: wrong fields, or a layer is converted already.
    """
    cores = {}
    for index in layers:
        if index in modules.cores:
            raise ConfigError(f"convert: layer {index} is already converted; call longspan.hf.revert(model) first")
        attention = modules.attentions[index]
        core = build_mechanism(name, modules.family.shape(model, attention), dict(fields), f"convert to {name}")
        _check_fit(name, core, modules.family, model.config.model_type)
        cores[index] = core.to(device_and_dtype(attention).device)
    return cores


def _install(model: Any, modules: AttentionModules, plan: _Plan) -> None:
    """Put cores into their attention modules, and record this in the configuration."""
    for index, core in plan.cores.items():
        attention = modules.attentions[index]
        layout = modules.family.layout(model, attention)
        original: Any = type(attention)
        _set_class(attention, converted_class(original))
        attention.add_module(CORE, core)
        if not core.traits.uses_keys:
            set_aside_modules(attention, modules.family.key_maps)
        attention.longspan_family, attention.longspan_index = modules.family, index
        attention.__dict__[HEADS] = layout
    mark(model.config, plan.record)


def _check_fit(name: str, core: Mechanism, family: Family, model_type: str) -> None:
    """Check that a mechanism can replace the attention of a pretrained model of this family.

    Raises:
        UnsupportedError: the traits of the core do not allow it.
    """
    traits, head_dim = core.traits, core.shape.head_dim
    if not traits.convertible:
        raise UnsupportedError(
            f"{name}: cannot replace pretrained attention: {traits.no_conversion_reason}; choose another mixer"
        )
    if core.value_dim != head_dim:
        raise UnsupportedError(
            f"{name}: needs values of width {core.value_dim} per head; those of this model have width {head_dim}; "
            "choose another mixer"
        )
    if not traits.bidirectional and not family.causal:
        raise UnsupportedError(f"{name}: is causal only, but {model_type} is bidirectional; choose another mixer")


def _save_with_adapters(model: Any, attentions: list[Any]) -> None:
    """Make PEFT train and save the new parameters together with the adapters that the model already has."""
    while model is not None and not hasattr(type(model), "get_base_model"):
        model = unwrap_once(model)
    # buffers (random projections, statistics) must be saved too
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
    """Return the fields of a mixer with the defaults for conversions, also for the mechanisms inside `mixed_heads`."""
    merged = mechanism_class(name, "convert").conversion_fields | fields
    if isinstance(merged.get("mixers"), list | tuple):
        merged["mixers"] = [
            _defaults(part["name"], part) if isinstance(part, dict) and isinstance(part.get("name"), str) else part
            for part in merged["mixers"]
        ]
    return merged


def revert(model: Any, layers: Iterable[int] | None = None) -> None:
    """Undo the conversions of a model, bit for bit; the new parameters of the mixers are dropped.

    Args:
        model: converted in place by `convert`.
        layers: indices of the layers to undo, negative ones counting from the end; None = all converted ones.

    Raises:
        ConfigError: the model, or one of these layers, is not converted.
    """
    model = unwrapped(model)
    modules = attention_modules(model)
    cores = modules.cores
    if not cores:
        raise ConfigError("revert: this model is not converted, so there is nothing to undo")
    chosen = tuple(cores) if layers is None else resolve_layers(layers, len(modules.attentions), "revert")
    if plain := [index for index in chosen if index not in cores]:
        raise ConfigError(f"revert: layer {plain[0]} is not converted; leave it out")
    for index in chosen:
        attention = modules.attentions[index]
        restore_modules(attention)
        delattr(attention, CORE)
        del attention.longspan_family, attention.longspan_index
        attention.__dict__.pop(HEADS, None)
        _set_class(attention, original_class(attention))
    remaining = [
        {**record, "layers": [index for index in record["layers"] if index not in chosen]}
        for record in model.config.longspan
    ]
    unmark(model.config)
    if modules.cores:
        for record in remaining:
            if record["layers"]:
                mark(model.config, record)
        return
    for handle in modules.family.base(model).__dict__.pop("longspan_hooks"):
        handle.remove()


def mechanisms(model: Any) -> dict[int, Mechanism]:
    """Return the cores of a converted model by layer index; empty if it is not converted."""
    return attention_modules(unwrapped(model)).cores


class _Layers(NamedTuple):
    """The layers that get the mixer, and the local layers by the window that they keep."""

    chosen: tuple[int, ...]
    local: dict[int, tuple[int, ...]]


def _layers(model: Any, modules: AttentionModules, layers: Iterable[int] | None) -> _Layers:
    """Return the sorted indices of the layers to convert, negative ones resolved; see `convert`.

    Raises:
        ConfigError: no such layer, or one without softmax attention.
    """
    if layers is None:
        return _all_layers(model, modules)
    resolved = resolve_layers(layers, len(modules.attentions), "convert")
    if others := [index for index in resolved if index in modules.others]:
        raise ConfigError(
            f"convert: layer {others[0]} is linear attention, which cannot be converted; choose among "
            f"{', '.join(map(str, modules.convertible))}"
        )
    return _Layers(resolved, {})


def _all_layers(model: Any, modules: AttentionModules) -> _Layers:
    """Return the layers to convert if the user names none."""
    windows = modules.by_window(model)
    if None not in windows:
        return _Layers(tuple(modules.convertible), {})
    local = {window: tuple(indices) for window, indices in windows.items() if window is not None}
    return _Layers(tuple(windows[None]), local)


def resolve_layers(layers: Iterable[int], count: int, where: str) -> tuple[int, ...]:
    """Return layer indices sorted, negative ones resolved; raises ConfigError for those that do not exist."""
    chosen = tuple(dict.fromkeys(layers))
    bad = [index for index in chosen if not -count <= index < count]
    if bad or not chosen:
        raise ConfigError(f"{where}: layers = {list(chosen)}: must be among the {count} layers 0 to {count - 1}")
    return tuple(sorted({index % count for index in chosen}))


@functools.cache
def converted_class(original: type) -> type:
    """Return the class for converted attention modules of an original class; always the same one for a class."""
    return type(f"Longspan{original.__name__}", (Converted, original), {"__module__": __name__})


def original_class(attention: Any) -> type:
    """Return the class that a converted attention module had before its conversion."""
    return type(attention).__bases__[1]


def _new_converted(original: type) -> Any:
    """Create an empty converted module from its original class (for unpickling)."""
    cls: Any = converted_class(original)
    return cls.__new__(cls)


def _set_class(attention: Any, cls: Any) -> None:
    """Change the class of a module, and the original forward that hooks of accelerate wrap."""
    attention.__class__ = cls
    if "_old_forward" in attention.__dict__:
        attention._old_forward = types.MethodType(cls.forward, attention)


@host.eager
def _store_states(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Store the states in the cache and the auxiliary losses on the model, after a call (a forward hook)."""
    call: Call = kwargs["longspan_call"]
    cache = take_cache(dict(kwargs))
    if cache is not None:
        call.advance(cache)
        cache.end()
    base.__dict__["longspan_aux_losses"] = LastAuxLosses(call.aux_losses, output[0])


def aux_losses(model: Any) -> list[Tensor]:
    """Return the auxiliary losses (spans, commitment) of a converted model's last call, to be added to the loss.

    They carry gradients as long as the call's output, or a loss computed from it, exists; later only their values
    remain.
    """
    inner = unwrapped(model)
    last: LastAuxLosses | None = attention_modules(inner).family.base(inner).__dict__.get("longspan_aux_losses")
    return [] if last is None else last.read()


def after_step(model: Any, step: int, generator: torch.Generator | None = None) -> None:
    """Apply clamps, redraws and statistics of every converted layer after optimizer step `step` (1, 2, ...)."""
    for core in mechanisms(model).values():
        core.after_step(step, generator)


def parameter_groups(model: nn.Module, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups for a torch optimizer: gates and similar parameters with their own settings, the rest
    split into weights with and without decay.

    Args:
        model: a converted model, perhaps inside PEFT; parameters that do not require gradients are left out.
        lr, weight_decay: settings of the run.
    """
    return foreign_optimizer_groups(model, mechanisms(model).values(), lr=lr, weight_decay=weight_decay)
