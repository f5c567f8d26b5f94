"""Reports: tables, figures and one self-contained HTML page with the numbers beside it as JSON.

Knows nothing of models or runs: numbers and words go in, files come out. Figures are in `longspan.report.figures`,
which loads matplotlib; this package itself does not.
"""

from longspan.report.page import Block, Code, Passage, Picture, Quote, Section, Text, page, write_report
from longspan.report.style import DARK, LIGHT, Theme
from longspan.report.tables import Table, number, si_bytes

__all__ = [
    "DARK",
    "LIGHT",
    "Block",
    "Code",
    "Passage",
    "Picture",
    "Quote",
    "Section",
    "Table",
    "Text",
    "Theme",
    "number",
    "page",
    "si_bytes",
    "write_report",
]
