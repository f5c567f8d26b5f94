"""longspan: long-context Transformers that are exact, causal, streaming and trainable."""

from longspan import errors, mixers, ops, reference, state
from longspan.errors import CheckpointError, ConfigError, DataError, LongspanError, UnsupportedError

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "LongspanError",
    "UnsupportedError",
    "__version__",
    "errors",
    "mixers",
    "ops",
    "reference",
    "state",
]
