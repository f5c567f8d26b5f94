"""`longspan quickstart-lm`: train, stop, resume, stream, measure, check, draw; each step is one thin file."""

from longspan.experiments.quickstart_lm.verb import quickstart_lm

__all__ = ["quickstart_lm"]
