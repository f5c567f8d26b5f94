"""longspan: long-context Transformers that are exact, causal, streaming and trainable."""

__version__ = "0.1.0"
