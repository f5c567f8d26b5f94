"""`longspan show`: reports of texts, attention patterns, learned spans, sparsity, and scaling laws."""

from longspan.cli.show.patterns import patterns
from longspan.cli.show.scaling import scaling
from longspan.cli.show.spans import spans
from longspan.cli.show.support import support
from longspan.cli.show.text import text

__all__ = ["patterns", "scaling", "spans", "support", "text"]
