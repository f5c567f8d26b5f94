"""`generate` for the library's own models, with a state instead of keys and values."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin

from longspan import state as states
from longspan.errors import ConfigError, UnsupportedError
from longspan.hf.cache import CACHE, StateCache, own_cache, refuse_crop, take_cache
from longspan.hf.positions import Past


class StateGeneration(GenerationMixin):
    """Implements transformers' generation interface for a model that carries a state."""

    model: Any

    def _state_cache(self, cache: Any, returns_cache: bool, use_cache: bool | None) -> StateCache | None:
        """Return the cache that a call starts from and fills;
        None = it starts from an empty past and keeps no state.
        """
        if not self.model.traits.streams:
            if cache is not None or use_cache:
                raise UnsupportedError(
                    f"{self.model.why_no_stream()}; pass use_cache=False to the model and to generate"
                )
            return None
        if cache is None and not returns_cache:
            return None
        carried = own_cache(cache, lambda: StateCache([True]))
        carried.begin()
        return carried

    def _past(self, cache: StateCache, inputs: Tensor) -> Past:
        """Return the number of tokens that the rows of a call already have in the cache."""
        live = states.live(cache.state_layers[0].state, inputs.shape[0], inputs.device)
        if live.shape[0] != inputs.shape[0]:
            raise ConfigError(f"the call has {inputs.shape[0]} rows, but its {CACHE} has {live.shape[0]}")
        return Past(live.to(inputs.device), cache.get_seq_length(), cache.shift)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as in transformers; `mask` and `reset` (batch, length) have the same meaning as in a call.

        Raises:
            UnsupportedError: assisted decoding (`assistant_model`, `prompt_lookup_num_tokens`).
        """
        settings = (kwargs.get("generation_config"), self.generation_config)
        lookup = [
            kwargs.get("prompt_lookup_num_tokens"),
            *(getattr(s, "prompt_lookup_num_tokens", 0) for s in settings),
        ]
        if kwargs.get("assistant_model") is not None or any(lookup):
            refuse_crop()
        mask = kwargs.pop("mask", None)
        if mask is not None:
            if kwargs.get("attention_mask") is not None:
                raise ConfigError("attention_mask and mask have the same meaning; pass only one of them")
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
        """Return the arguments of the model's next call; transformers' `generate` calls this before each one.

        Args:
            input_ids: as in transformers, like all arguments that are not listed here.
            next_sequence_length: as in transformers.
            attention_mask: as in transformers.
            inputs_embeds: as in transformers.
            is_first_iteration: as in transformers.
            reset: (batch, length) bool of the whole prompt, True where a document starts; the columns that the call
                reads are passed on, and generated tokens continue the document.
            kwargs: as in transformers.
        """
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
        """Put a `StateCache` into the arguments instead of a KV cache."""
        cache = take_cache(model_kwargs)
        if cache is not None:
            # the caller keeps it, so transformers must not read a token ahead, which it could not undo
            cache._is_user_defined = True
        elif generation_config.use_cache is not False:
            if not self.model.traits.streams:
                raise UnsupportedError(f"{self.model.why_no_stream()}; pass use_cache=False to generate")
            kind = generation_config.cache_implementation
            if kind == "quantized":
                raise UnsupportedError(
                    "cache_implementation = 'quantized': states cannot be quantized; leave the option out"
                )
            # static, sliding and dynamic caches only differ in how they store keys
            cache = StateCache([True], offloading=bool(kind) and kind.startswith("offloaded"))
        if cache is not None:
            model_kwargs[CACHE] = cache
