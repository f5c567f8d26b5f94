"""`longspan quickstart`: recall a fact after two million tokens."""

from longspan.experiments.quickstart.verb import quickstart

__all__ = ["quickstart"]
