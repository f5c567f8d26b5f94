"""`longspan show`: what mechanisms look at, and what those of a trained model have learned to look at."""

from longspan.cli.show.patterns import patterns
from longspan.cli.show.scaling import scaling
from longspan.cli.show.spans import spans
from longspan.cli.show.support import support

__all__ = ["patterns", "scaling", "spans", "support"]
