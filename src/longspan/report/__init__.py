"""Reports: tables, figures and a self-contained HTML page, with the numbers as JSON in a second file.

Independent of models and runs: numbers and texts go in, files come out. Figures are in `longspan.report.figures`,
which imports matplotlib; this package itself does not.
"""

from longspan.report.blocks import Block, Code, Passage, Picture, Quote, Recommendation, Section, Text
from longspan.report.page import page, write_report
from longspan.report.style import DARK, LIGHT, Theme
from longspan.report.tables import Table, number, si_bytes
from longspan.report.token_text import TokenSeries, TokenText, change_series, loss_series

__all__ = [
    "DARK",
    "LIGHT",
    "Block",
    "Code",
    "Passage",
    "Picture",
    "Quote",
    "Recommendation",
    "Section",
    "Table",
    "Text",
    "Theme",
    "TokenSeries",
    "TokenText",
    "change_series",
    "loss_series",
    "number",
    "page",
    "si_bytes",
    "write_report",
]
