"""`generate` of the library's own models: a state in the place of keys and values."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin

from longspan import state as states
from longspan.errors import ConfigError, UnsupportedError
from longspan.hf.cache import CACHE, StateCache, own_cache, take_cache
from longspan.hf.positions import Past


class StateGeneration(GenerationMixin):
    """What transformers' generation asks of a model, for one that carries a state."""

    model: Any

    def _carried(self, cache: Any, returns_cache: bool, use_cache: bool | None) -> StateCache | None:
        """The state that a call begins with and fills; None: it begins with an empty past and keeps nothing."""
        if not self.model.traits.streams:
            if cache is not None or use_cache:
                raise UnsupportedError(
                    f"{self.model.why_no_stream()}; call the model, and generate, with use_cache=False"
                )
            return None
        if cache is None and not returns_cache:
            return None
        carried = own_cache(cache, lambda: StateCache([True]))
        carried.begin()
        return carried

    def _past(self, cache: StateCache, inputs: Tensor) -> Past:
        """What the rows of a call hold already."""
        live = states.live(cache.state_layers[0].state, inputs.shape[0], inputs.device)
        if live.shape[0] != inputs.shape[0]:
            raise ConfigError(f"the call has {inputs.shape[0]} rows, its {CACHE} {live.shape[0]}")
        return Past(live.to(inputs.device), cache.get_seq_length(), cache.shift)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; `mask` and `reset` (batch, length) act as in a call."""
        mask = kwargs.pop("mask", None)
        if mask is not None:
            if kwargs.get("attention_mask") is not None:
                raise ConfigError("attention_mask and mask say the same thing; pass one of them")
            kwargs["attention_mask"] = mask.long()
        parent: Any = super()
        return parent.generate(*args, **kwargs)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        reset: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers; of `reset`, which is that of the prompt, the columns of this call."""
        parent: Any = super()
        inputs: dict[str, Any] = parent.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if reset is not None:
            read = inputs.get("inputs_embeds")
            length = (inputs["input_ids"] if read is None else read).shape[1]
            past = inputs[CACHE].get_seq_length() if inputs.get(CACHE) is not None else 0
            inputs["reset"] = F.pad(reset, (0, max(0, past + length - reset.shape[1])))[:, past : past + length]
        return inputs

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        """A state in the place of keys and values."""
        cache = take_cache(model_kwargs)
        if cache is not None:
            # it outlives the call: transformers then reads no token ahead that it would have to take back
            cache._is_user_defined = True
        elif generation_config.use_cache is not False:
            if not self.model.traits.streams:
                raise UnsupportedError(f"{self.model.why_no_stream()}; generate with use_cache=False")
            kind = generation_config.cache_implementation
            if kind == "quantized":
                raise UnsupportedError(
                    "cache_implementation = 'quantized': states have no quantized form; leave it out"
                )
            # static, sliding and dynamic ones differ in how they store keys, of which there are none
            cache = StateCache([True], offloading=bool(kind) and kind.startswith("offloaded"))
        if cache is not None:
            model_kwargs[CACHE] = cache
