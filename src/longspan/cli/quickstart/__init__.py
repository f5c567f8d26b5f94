"""`longspan quickstart`: train, stop, resume, stream, measure, check, draw; each step is one thin file."""

from longspan.cli.quickstart.verb import quickstart

__all__ = ["quickstart"]
