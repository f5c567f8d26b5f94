"""Reports: matplotlib figures, tables and one self-contained HTML page with the numbers beside it as JSON.

Knows nothing of models or runs: numbers and words go in, files come out. Importing it loads matplotlib and jinja2, so
the command line does so only where a report is written.
"""

from longspan.report.figures import Figure, Mark, Series, line_figure
from longspan.report.page import Block, Code, Picture, Quote, Section, Text, page, picture, write_report
from longspan.report.style import DARK, LIGHT, Theme
from longspan.report.tables import Check, Table, check_table, number, si_bytes

__all__ = [
    "DARK",
    "LIGHT",
    "Block",
    "Check",
    "Code",
    "Figure",
    "Mark",
    "Picture",
    "Quote",
    "Section",
    "Series",
    "Table",
    "Text",
    "Theme",
    "check_table",
    "line_figure",
    "number",
    "page",
    "picture",
    "si_bytes",
    "write_report",
]
