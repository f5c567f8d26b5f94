"""Figures: pictures without a display, the same bytes for the same numbers, readable tick labels."""

import io
import struct
from typing import Any

import matplotlib
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from PIL import Image

from longspan.experiments.figures import matrix_figure
from longspan.report import DARK, LIGHT, Theme
from longspan.report.figures import (
    Mark,
    Panel,
    PlainNumbers,
    Series,
    line_figure,
    pattern_figure,
    picture,
    to_png,
)


def draw(theme: Theme = LIGHT, **more: Any) -> Figure:
    series = [
        Series(x=[0, 1, 2, 4], y=[4.0, 3.0, 2.5, 2.4], low=[3.5, 2.8, 2.4, 2.3], high=[4.5, 3.2, 2.6, 2.5], label="a"),
        Series(x=[0, 4], y=[4.0, float("nan")], kind="faint", label="b"),
        Series(x=[1, 4], y=[3.0, 3.0], kind="marked"),
    ]
    marks = [Mark(2, "here"), Mark(3.0, "as high", horizontal=True)]
    return line_figure(series, xlabel="place (MB)", ylabel="bits per byte", theme=theme, marks=marks, **more)


def test_a_figure_is_a_png_and_the_same_one_each_time() -> None:
    first, second = to_png(draw()), to_png(draw())
    assert first == second
    assert first.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", first[16:24])
    assert width > 900
    assert height > 400


def test_themes_differ_and_leave_the_settings_of_matplotlib_alone() -> None:
    before = dict(matplotlib.rcParams)
    pair = picture("name", lambda theme: draw(theme), alt="lines", caption="said")
    assert pair.light != pair.dark
    assert pair.light == to_png(draw(LIGHT))
    assert pair.dark == to_png(draw(DARK))
    assert dict(matplotlib.rcParams) == before


def test_a_logarithmic_axis_shows_zero() -> None:
    axes = draw(xscale="log2", xticks=[0, 1, 2, 4], title="Lines", ylim=(0, None)).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "4"]
    tick_positions = [axes.transData.transform((x, 1))[0] for x in (0, 1, 2, 4)]
    assert tick_positions == sorted(tick_positions)
    assert tick_positions[3] - tick_positions[2] == pytest.approx(tick_positions[2] - tick_positions[1], rel=0.01)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0, 25_000, 50_000], ["0", "25,000", "50,000"]),
        ([2.3, 2.35, 2.4], ["2.30", "2.35", "2.40"]),
        ([-0.5, 0.0, 0.5], ["−0.5", "0.0", "0.5"]),
    ],
)
def test_tick_labels(values: list[float], labels: list[str]) -> None:
    assert PlainNumbers().format_ticks(values) == labels


def test_matrices_are_side_by_side_and_frames_are_on_both_sides_of_the_diagonal() -> None:
    nan = float("nan")
    panels = [
        Panel("one", [[nan, 1.0], [1.0, nan]]),
        Panel("two", [[nan, -2.0], [-2.0, nan]]),
        Panel("three", [[0, 1]]),
    ]
    figure = matrix_figure(panels, labels="AB", marked=[(0, 1)], below="darker: more", theme=DARK)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["one", "two", "three"]
    first = figure.axes[0]
    assert [label.get_text() for label in first.get_yticklabels()] == ["A", "B"]
    frames: list[Any] = list(first.patches)
    assert sorted(frame.get_xy() for frame in frames) == [(-0.5, 0.5), (0.5, -0.5)]
    assert first.get_facecolor() == pytest.approx(to_rgba(DARK.grid)), "empty cells have the color of no value"
    assert to_png(figure).startswith(b"\x89PNG")


def cells(figure: Figure) -> list[Any]:
    image = figure.axes[0].images[0].get_array()
    assert image is not None
    return list(image.tolist())


def test_a_pattern_colors_keys_that_are_read_unread_and_hidden_in_whole_pixels() -> None:
    weights = [[1.0, 0, 0], [0.1, 0.4, 0], [0, 0, 2.0]]
    figure = pattern_figure([Panel("a title that is much longer than the panel\nsecond", weights)] * 3, theme=DARK)
    assert len(figure.axes) == 3
    first = figure.axes[0]
    assert first.get_title(loc="left").splitlines()[-1] == "second"
    image = cells(figure)
    weak = sum(abs(a - b) for a, b in zip(image[1][0], to_rgba(DARK.ground), strict=True))
    assert weak > 0.3, "small weights are visible"
    assert image[1][1] == pytest.approx(to_rgba(DARK.colors[0]), abs=0.01), "the heaviest of its row"
    assert image[2][0] == pytest.approx(to_rgba(DARK.grid)), "an earlier key that is not read"
    assert image[0][2] == pytest.approx(to_rgba(DARK.ground)), "a later key"
    bidirectional = pattern_figure([Panel("t", weights)], bidirectional=True, theme=DARK)
    assert cells(bidirectional)[0][2] == pytest.approx(to_rgba(DARK.grid))
    box = first.get_window_extent()
    assert box.width % 3 == pytest.approx(0, abs=1e-6)
    assert box.width == pytest.approx(box.height)


def test_points_are_not_joined() -> None:
    line = line_figure([Series(x=[1, 2], y=[3, 4], kind="points")], xlabel="x", ylabel="y").axes[0].lines[0]
    assert (line.get_linestyle(), line.get_marker()) == ("None", "o")


def test_a_figure_for_a_phone_is_narrow_with_letters_of_the_same_size() -> None:
    drawn = picture("name", lambda theme: draw(theme, xticks=[2048 * 2**step for step in range(9)]), alt="lines")
    wide, narrow = (struct.unpack(">II", image[16:24]) for image in (drawn.light, drawn.narrow_light))
    assert wide[0] > 1000
    assert narrow[0] < 560, "drawn over 340 pixels of a phone, letters of 9 points have more than 11 pixels"
    assert drawn.narrow_light != drawn.narrow_dark
    ticks = draw(LIGHT.narrow(), xticks=[2048 * 2**step for step in range(9)]).axes[0].get_xticklabels()
    assert {label.get_rotation() for label in ticks} == {40.0}, "they do not fit side by side"
    assert {label.get_rotation() for label in draw(LIGHT.narrow(), xticks=[1, 2]).axes[0].get_xticklabels()} == {0.0}


def test_a_narrow_pattern_has_half_the_columns() -> None:
    panels = [Panel("t", [[1.0]])] * 4
    lefts = [
        len({axes.get_position().x0 for axes in pattern_figure(panels, theme=theme).axes})
        for theme in (LIGHT, LIGHT.narrow())
    ]
    assert lefts == [4, 2]


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_the_background_of_a_figure_is_that_of_the_page(theme: Theme) -> None:
    with Image.open(io.BytesIO(to_png(draw(theme)))) as image:
        corner = image.convert("RGB").getpixel((0, 0))
    assert corner == tuple(bytes.fromhex(theme.ground[1:]))


def test_labels_of_a_logarithmic_axis_have_no_exponents() -> None:
    figure = line_figure([Series(x=[1, 2], y=[2e5, 2e6])], xlabel="x", ylabel="y", yscale="log")
    to_png(figure)
    minor = {label.get_text() for label in figure.axes[0].get_yticklabels(minor=True)}
    assert "300,000" in minor
    assert not any("10^" in text or "e" in text for text in minor)
