"""The application with all commands; the only place that turns exceptions into one line and an exit code."""

import contextlib
import inspect
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn

import typer

from longspan import renames
from longspan.cli.compare import compare
from longspan.cli.console import any_encoding, say
from longspan.cli.convert import convert
from longspan.cli.cost import cost
from longspan.cli.evaluate import evaluate
from longspan.cli.generate import generate
from longspan.cli.list_runs import runs
from longspan.cli.mixers import mixers
from longspan.cli.plan import plan
from longspan.cli.recipes import recipes
from longspan.cli.show import patterns, scaling, spans, support, text
from longspan.cli.stream import stream
from longspan.cli.train import train
from longspan.cli.transfer import transfer
from longspan.errors import LongspanError
from longspan.experiments.quickstart import quickstart
from longspan.experiments.quickstart_lm import quickstart_lm
from longspan.experiments.reproduce import reproduce
from longspan.process import handling, stop_signals
from longspan.version import __version__

USER_ERROR, INTERRUPTED = 2, 130

HELP = """Train long-context Transformers and read text of any length with them, in constant memory.

A typical workflow, from a recipe to generated text:

  longspan train quickstart-lm -o runs/first
  longspan eval runs/first book.txt
  longspan stream runs/first book.txt --save-state book.state
  longspan generate runs/first --load-state book.state --tokens 200

`train` writes a run: a folder with the model, its tokenizer and its log. Every other command takes that folder, and
`runs` lists all of them.
`eval` measures how well the model predicts a text, with and without its memory. `stream` reads one text of any length
and can be stopped and resumed anywhere. `generate` continues a prompt or a saved state.

For a pretrained Hugging Face model, `longspan convert` replaces the attention by another mechanism, and `longspan
transfer` also teaches it what the attention computed; every other command takes the folder that they write, like a run.

`longspan show` writes HTML reports: what a run does with your text, token by token; which keys each mechanism reads;
the learned spans and sparsity of the heads of a run; and scaling laws fitted to many runs.

New here? `longspan quickstart` trains a model to recall a fact after two million tokens (ten minutes);
`longspan quickstart-lm` streams a whole book through a language model (seven minutes). Both write an HTML report.
Help on one command: longspan stream --help
"""

app = typer.Typer(
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
VERBS: dict[str, Callable[..., Any]] = {
    "train": train,
    "eval": evaluate,
    "stream": stream,
    "generate": generate,
    "convert": convert,
    "transfer": transfer,
    "mixers": mixers,
    "cost": cost,
    "plan": plan,
    "compare": compare,
    "recipes": recipes,
    "runs": runs,
    "reproduce": reproduce,
    "quickstart": quickstart,
    "quickstart-lm": quickstart_lm,
}


def unwrap(text: str) -> str:
    """Return a help text with the lines of each paragraph joined, so that it fits any terminal; keep indented lines."""
    lines: list[str] = []
    for line in inspect.cleandoc(text).splitlines():
        joins = line and not line.startswith(" ") and lines and lines[-1] and not lines[-1].startswith(" ")
        if joins:
            lines[-1] += f" {line}"
        else:
            lines.append(line)
    return "\n".join(lines).replace("[", r"\[")


for name, verb in VERBS.items():
    app.command(name, help=unwrap(verb.__doc__ or ""))(verb)

_SHOW = (
    "Write reports: what a run does with a text, token by token; attention patterns; learned spans and sparsity of a "
    "run; scaling laws of many runs."
)
show = typer.Typer(add_completion=False)
app.add_typer(show, name="show", help=_SHOW)
SHOW_VERBS: dict[str, Callable[..., Any]] = {
    "text": text,
    "patterns": patterns,
    "spans": spans,
    "support": support,
    "scaling": scaling,
}
for name, verb in SHOW_VERBS.items():
    show.command(name, help=unwrap(verb.__doc__ or ""))(verb)


@show.callback(invoke_without_command=True)
def _show_help(context: typer.Context) -> None:
    """Print the help of `longspan show` if no subcommand was given."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def _show_version(show: bool) -> None:
    """Print the version and exit if `--version` was given."""
    if show:
        print(f"longspan {__version__}")
        raise typer.Exit


@app.callback(help=unwrap(HELP), invoke_without_command=True)
def _global_options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (or set LONGSPAN_DEBUG=1).")
    ] = False,
) -> None:
    """Accept the options of `longspan` itself; print the help if no command was given."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def start(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit the process, as `longspan.cli.main` describes."""
    warnings.simplefilter("always", renames.RenamedWarning)
    warnings.showwarning = _show_warning
    if not sys.stderr.isatty():
        # progress bars of other libraries redraw their line, which would fill a log file
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
    """Print a warning: one line for an old name, without file and line number; others as Python does."""
    if issubclass(category, renames.RenamedWarning):
        say(f"warning: {message}")
    else:
        _python_shows(message, category, *where, **options)


_python_shows = warnings.showwarning


def run(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code; print errors as one line on standard error."""
    with any_encoding(), orderly_end():
        code = _run(arguments)
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            _leave_output()
        except OSError as error:
            # a full disk may show up only here, because small output waits in a buffer
            _leave_output()
            if code == 0:
                print(f"longspan: error: standard output: {error.strerror or error}", file=sys.stderr)
                code = USER_ERROR
        return code


def _leave_output() -> None:
    """Redirect standard output to the null device, so that the flush at exit does not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def orderly_end() -> contextlib.AbstractContextManager[None]:
    """Return a context in which SIGTERM and SIGHUP raise KeyboardInterrupt as Ctrl-C does, so that cleanup code runs.

    Commands that save when they are stopped install their own handlers inside it.
    """
    unhandled = [number for number in stop_signals() if signal.getsignal(number) is signal.SIG_DFL]
    return handling(unhandled, signal.default_int_handler)


def _run(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code; exceptions that `explain` does not know are raised."""
    # accepted anywhere on the line, because users append it to a command that has just failed
    debug = "--debug" in arguments or os.environ.get("LONGSPAN_DEBUG", "") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        code: Any = app(args=arguments, prog_name="longspan", standalone_mode=False)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # the process that read our output has exited, as in `longspan stream ... | head`
        _leave_output()
        return 0
    except Exception as error:
        if debug:
            raise
        message = explain(error)
        if message is None:
            raise
        print(f"longspan: error: {message}", file=sys.stderr)
        return USER_ERROR
    return code if isinstance(code, int) else 0


def explain(error: Exception) -> str | None:
    """Return a user error as one line of text; None for a bug of the library, whose traceback should be shown."""
    if isinstance(error, LongspanError):
        text = str(error)
    elif isinstance(error, typer.Abort):
        text = "stopped"
    elif hasattr(error, "format_message") and hasattr(error, "exit_code"):
        # a usage error; depending on the version, its class is click's or typer's copy of click
        context = getattr(error, "ctx", None)
        text = f"{error.format_message()} See `{context.command_path if context else 'longspan'} --help`."
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        text = "out of memory; reduce train.lanes, train.segment_length or the size of the model"
    else:
        return None
    return " ".join(text.split())
