"""`longspan quickstart-lm`: train, stream, stop, resume, measure, check, and write a page."""

from longspan.experiments.quickstart_lm.verb import quickstart_lm

__all__ = ["quickstart_lm"]
