"""Style of figures: a light and a dark theme, with colors that color-blind readers can tell apart."""

from dataclasses import dataclass, replace
from typing import Any

PIXELS_PER_INCH = 160
WIDTH = 6.6
"""Width of a figure in inches."""
NARROW_WIDTH = 3.4
"""Width of a figure for phones, on which letters of the same size stay readable."""


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colors and width of a figure.

    Attributes:
        name: "light" or "dark".
        ground: background, the same as that of the page.
        ink: titles and text.
        faint: tick labels and axis labels.
        grid: grid lines and axes.
        colors: of the series, in order.
        width: of the figure in inches.
    """

    name: str
    ground: str
    ink: str
    faint: str
    grid: str
    colors: tuple[str, ...]
    width: float = WIDTH

    @property
    def is_narrow(self) -> bool:
        """Whether the figure is for a phone."""
        return self.width < WIDTH

    def narrow(self) -> "Theme":
        """Return the theme of the same figure for a phone."""
        return replace(self, width=NARROW_WIDTH)

    def settings(self) -> Any:
        """Return the matplotlib settings of this theme, a dict for `rc_context`."""
        faces = ("figure.facecolor", "savefig.facecolor", "axes.facecolor", "legend.facecolor", "legend.edgecolor")
        lines = ("axes.edgecolor", "grid.color", "xtick.color", "ytick.color")
        labels = ("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor")
        return {
            **_SETTINGS,
            **dict.fromkeys(faces, self.ground),
            **dict.fromkeys(lines, self.grid),
            **dict.fromkeys(labels, self.faint),
            **dict.fromkeys(("axes.titlecolor", "text.color", "legend.labelcolor"), self.ink),
        }


# settings that do not depend on the theme
_SETTINGS = {
    "figure.dpi": PIXELS_PER_INCH,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "axes.labelsize": 9.5,
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left", "legend.fancybox"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    "grid.linewidth": 0.8,
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 9),
    "ytick.major.size": 0,
    "legend.framealpha": 0.85,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "font.family": "DejaVu Sans",
}
# Okabe & Ito 2008, ordered so that adjacent colors differ most
LIGHT = Theme(
    name="light",
    ground="#ffffff",
    ink="#1d2430",
    faint="#566072",
    grid="#dfe3ea",
    colors=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
)
# the same hues, light enough for a dark background
DARK = Theme(
    name="dark",
    ground="#14181f",
    ink="#e8ebf0",
    faint="#a3adbd",
    grid="#2c3442",
    colors=("#56b4e9", "#f08a4b", "#2fc69a", "#e3a0c8", "#f0c04f", "#9fc9f2"),
)
