"""A text on a page: shaded and described without scripts, with its numbers for the script, and never as markup."""

import json
import re

from longspan.report import Section, TokenText, change_series, loss_series, page

TOKENS = ["", "</script>", " ", "b\n"]
NAMES = ["start of the document", "", "space", ""]
BITS = [None, 0.25, 3.5, 9.0]


def shown() -> str:
    text = TokenText(
        tokens=TOKENS,
        names=NAMES,
        series=[loss_series(BITS), change_series("saved", "bits saved", [None, None, -0.6, 0.2])],
        layers=[{"label": "Layer 1 <b>", "positions": [None, [1], [1], [2]], "weights": [None, [1], [1], [0.5]]}],
    )
    return page("Text", [Section("Text", [text])])


def test_tokens_are_shaded_and_named() -> None:
    html = shown()
    pattern = r'<span id="t\d" role="option" aria-selected="false" class="(\w+)" title="(.*?)">(.*?)</span>'
    spans = re.findall(pattern, html, re.DOTALL)
    assert spans == [
        ("none", "start of the document: –", "·"),
        ("b0", "&lt;/script&gt;: 0.25 bits", "&lt;/script&gt;"),
        ("b4", "space: 3.5 bits", " "),
        ("b7", "b\n: 9 bits", "b↵\n"),
    ]
    assert '<li><span class="b4"></span>3 to 4</li>' in html
    assert '<li><span class="b0"></span>below 0.5</li>' in html
    assert '<li><span class="b7"></span>8 and more</li>' in html


def test_the_page_is_self_contained_and_its_data_are_no_markup() -> None:
    html = shown()
    assert "http://" not in html
    assert "https://" not in html
    assert html.count("</script>") == 2
    (data,) = re.findall(r'<script type="application/json" class="data">(.*?)</script>', html, re.S)
    numbers = json.loads(data)
    assert numbers["tokens"] == TOKENS
    assert numbers["series"][0]["values"] == BITS
    assert "Layer 1 &lt;b&gt;" in html


def test_numbers_on_a_border_belong_to_the_upper_range() -> None:
    losses = loss_series([])
    assert [losses.shade(value) for value in (0.0, 0.5, 0.99, 1.0, 8.0, None)] == ["b0", "b1", "b1", "b2", "b7", "none"]
    changes = change_series("saved", "", [])
    assert [changes.shade(value) for value in (-3.0, -0.2, 0.0, 0.2, 3.0)] == ["b6", "b2", "b0", "n2", "n6"]
    assert [changes.write(value) for value in (-0.25, 0.25, None)] == ["−0.25 bits", "+0.25 bits", "–"]
    assert len(changes.shades) == len(changes.edges) + 1
