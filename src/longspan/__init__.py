"""longspan: long-context Transformers that are exact, causal, streaming and trainable."""

from typing import TYPE_CHECKING

from longspan import errors, mixers, models, ops, reference, state
from longspan.errors import CheckpointError, ConfigError, DataError, LongspanError, UnsupportedError
from longspan.lazy import submodules_of
from longspan.models import (
    Decoder,
    DecoderConfig,
    Encoder,
    EncoderConfig,
    MaskedLM,
    RecurrentMemory,
    load_model,
    save_model,
)
from longspan.stream import StreamSession
from longspan.version import __version__

if not TYPE_CHECKING:  # so that type checkers still report misspelled names
    __getattr__ = submodules_of(__name__)

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "LongspanError",
    "MaskedLM",
    "RecurrentMemory",
    "StreamSession",
    "UnsupportedError",
    "__version__",
    "errors",
    "load_model",
    "mixers",
    "models",
    "ops",
    "reference",
    "save_model",
    "state",
]
