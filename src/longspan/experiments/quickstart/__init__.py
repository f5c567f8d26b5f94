"""`longspan quickstart`: a fact is told once, two million tokens go by, and it is asked for."""

from longspan.experiments.quickstart.verb import quickstart

__all__ = ["quickstart"]
