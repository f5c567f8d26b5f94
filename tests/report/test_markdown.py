"""Pages as Markdown."""

from longspan.report import Block, Code, Passage, Picture, Quote, Section, Table, Text
from longspan.report.markdown import markdown


def test_every_block_has_a_form() -> None:
    table = Table(columns=("a", "b"), rows=[("x|\ny", "1")], right=(1,), caption="Numbers.")
    picture = Picture(name="loss", light=b"", dark=b"", alt="Loss.", caption="Lower is better.")
    blocks: list[Block] = [
        Text("A sentence."),
        table,
        picture,
        Code("longspan runs"),
        Quote("Once ", "upon"),
        Passage([("a", True)]),
    ]
    text = markdown("Title", [Section("Part", blocks)], lead="About.")
    assert text.startswith("# Title\n\nAbout.\n\n## Part\n\nA sentence.\n")
    assert "Numbers.\n\n| a | b |\n| --- | ---: |\n| x\\| y | 1 |\n" in text
    assert "![Loss.](figures/loss.png)\n\nLower is better." in text
    assert "```\nlongspan runs\n```" in text
    assert "> Once **upon**" in text
    assert text.endswith("> **a**\n")
