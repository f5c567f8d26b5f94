"""Pages for all readers: landmarks, ids, names of tables and their rows, figures for phones, nothing from elsewhere."""

import re
from html.parser import HTMLParser

from longspan.report import Code, Picture, Section, Table, Text, TokenText, loss_series, page

FIGURE = Picture(
    name="f", light=b"wide", dark=b"dark", narrow_light=b"phone", narrow_dark=b"night", alt="falling", caption="said"
)
LOSSES = Table(
    columns=("", "bits", "how"), rows=[("first", "1.5", "all"), ("", "2.5", "part")], caption="Losses. Low is good."
)
STEPS = Table(columns=("step", "loss"), rows=[("1", "2.0")])


class Elements(HTMLParser):
    """Collects the elements of a page: tag, attributes and the tags that they are in."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.parents: list[str] = []
        self.path: list[str] = []
        self.feed(html)
        assert self.path == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self.parents.append(" ".join(self.path))
        if tag not in ("meta", "source", "img"):
            self.path.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.path.pop() == tag

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def sections(count: int = 5) -> list[Section]:
    texts = TokenText(tokens=["a", " "], names=["", "space"], series=[loss_series([None, 1.0])])
    all_sections = [
        Section("Loss & cost", [LOSSES, LOSSES]),
        Section("Steps", [STEPS]),
        Section("Steps", [FIGURE, Code("longspan --help")]),
        Section("…", [Text("A paragraph.")]),
        Section("Text", [texts]),
    ]
    return all_sections[:count]


def test_landmarks_and_the_skip_link() -> None:
    shown = Elements(page("Title", sections()))
    assert [len(shown.of(tag)) for tag in ("header", "nav", "main", "footer", "h1")] == [1, 1, 1, 1, 1]
    skip, *_ = shown.of("a")
    assert skip["href"] == "#" + shown.of("main")[0]["id"]
    outside = [tag for (tag, _), parents in zip(shown.elements, shown.parents, strict=True) if parents == "html body"]
    assert outside == ["a", "header", "nav", "main", "footer", "script"], "all content is in a landmark"
    assert shown.of("html")[0]["lang"] == "en"


def test_ids_are_unique_and_the_contents_link_to_every_heading() -> None:
    shown = Elements(page("Title", sections()))
    ids = [attributes["id"] for _, attributes in shown.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    headings = [heading["id"] for heading in shown.of("h2")]
    assert headings == ["section-loss-cost", "section-steps", "section-steps-2", "section-", "section-text"]
    assert [link["href"] for link in shown.of("a")[1:]] == [f"#{heading}" for heading in headings]
    assert not Elements(page("Title", sections(4))).of("nav"), "a short page needs no contents"


def test_tables_have_headings_and_names() -> None:
    shown = Elements(page("Title", [Section("Loss", [LOSSES])]))
    assert [heading["scope"] for heading in shown.of("th")] == ["col", "col", "row"], "empty cells are no headings"


def test_every_table_scrolls_in_a_named_region_that_takes_the_focus() -> None:
    shown = Elements(page("Title", sections()))
    regions = [attributes for attributes in shown.of("div") if attributes.get("role") == "region"]
    assert [region["aria-label"] for region in regions] == ["Table: Losses", "Table: Losses 2", "Table: Steps"]
    assert {region["tabindex"] for region in regions} == {"0"}
    assert all(
        "main div" in parents for tag, parents in zip(shown.elements, shown.parents, strict=True) if tag[0] == "table"
    )
    assert [code["tabindex"] for code in shown.of("pre")] == ["0"]


def test_a_phone_gets_the_narrow_figure() -> None:
    html = page("Title", [Section("Figure", [FIGURE])])
    shown = Elements(html)
    media = [source["media"] for source in shown.of("source")]
    assert media == [
        "screen and (max-width: 34rem) and (prefers-color-scheme: dark)",
        "screen and (max-width: 34rem)",
        "screen and (prefers-color-scheme: dark)",
    ]
    assert [image["alt"] for image in shown.of("img")] == ["falling"]
    wide = Picture(name="f", light=b"wide", dark=b"dark", alt="falling")
    assert len(Elements(page("Title", [Section("Figure", [wide])])).of("source")) == 1


def test_nothing_comes_from_elsewhere() -> None:
    html = page("Title", sections())
    links = [
        value
        for _, attributes in Elements(html).elements
        for name, value in attributes.items()
        if name in ("href", "src", "srcset", "action", "data", "poster")
    ]
    assert links
    assert all(re.match(r"#|data:image/png;base64,", link) for link in links)
    assert not re.search(r"@import|url\(|https?:", html)
