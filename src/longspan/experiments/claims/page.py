"""Results on disk, and docs/claims.md made of them."""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longspan.experiments.claims.base import Claim, Outcome, Size
from longspan.files import read_json, write_atomically, write_json
from longspan.version import __version__

_HEAD = """# What the papers claim, and what came out here

Made by `longspan reproduce --docs` from the results in `docs/claims/`; edit neither by hand. Every claim says what was
measured, how large, and by which command, also where it falls short. Corpora and models of the papers' size are out of
reach of two cores, so a claim about them is re-enacted in small.
"""


def save_result(folder: Path, claim: Claim, size: Size, outcome: Outcome, seconds: float) -> Path:
    """Write `folder/NAME.json` and the figures beside it; the path."""
    path = folder / f"{claim.name}.json"
    for drawn in outcome.pictures:
        write_atomically(folder / f"{drawn.name}.png", _writer(drawn.light))
    record = {
        "claim": claim.name,
        "system": claim.system,
        "source": claim.source,
        "text": claim.text,
        "command": f"longspan reproduce {claim.name}" + (" --full" if size == "full" else ""),
        "verdict": outcome.verdict,
        "figures": [asdict(figure) for figure in outcome.figures],
        "size": outcome.size,
        "note": outcome.note,
        "minutes": round((outcome.seconds or seconds) / 60, 1),
        "version": __version__,
        "pictures": [{"file": f"{drawn.name}.png", "alt": drawn.alt} for drawn in outcome.pictures],
        "data": outcome.data,
    }
    write_json(path, record)
    return path


def _writer(image: bytes) -> Callable[[Path], object]:
    return lambda to: to.write_bytes(image)


def read_results(folder: Path, order: Iterable[str]) -> list[dict[str, Any]]:
    """The results of a folder, those that are there, in an order of names."""
    return [read_json(folder / f"{name}.json") for name in order if (folder / f"{name}.json").is_file()]


def markdown(records: list[dict[str, Any]], folder: str = "claims") -> str:
    """docs/claims.md."""
    lines = [_HEAD, "| claim | system | verdict | command |", "|---|---|---|---|"]
    lines += ["| [{claim}](#{claim}) | {system} | {verdict} | `{command}` |".format(**record) for record in records]
    for record in records:
        lines += ["", f"## {record['claim']}", "", f"{record['text']} ({record['source']})", ""]
        lines += ["| measured | paper | here |", "|---|---|---|"]
        lines += [f"| {figure['what']} | {figure['paper']} | {figure['ours']} |" for figure in record["figures"]]
        lines += ["", f"**{record['verdict'].capitalize()}.** {record['note']}".rstrip(), ""]
        lines += [f"Size: {record['size']}. Command: `{record['command']}` ({record['minutes']:g} minutes)."]
        for drawn in record["pictures"]:
            lines += ["", f"![{drawn['alt']}]({folder}/{drawn['file']})"]
    return "\n".join(lines) + "\n"
