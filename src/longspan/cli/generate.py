"""`longspan generate`."""

import codecs
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longspan.cli.console import harmless, say
from longspan.cli.options import DeviceOption, DtypeOption
from longspan.cli.runs import SET_HELP, open_run
from longspan.cli.stream import open_session
from longspan.errors import ConfigError

if TYPE_CHECKING:
    from longspan.stream import StreamSession
    from longspan.tasks.tokenizers import Tokenizer


def generate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="What to go on from.", show_default=False)
    ] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option("--prompt-file", metavar="FILE", help="A file of any length, or - for standard input."),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="How many tokens to write at most.")] = 200,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="Below 1 bolder in what is likely; 0: always the likeliest.")
    ] = 0.8,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Draw among the k likeliest; 0: among all.")] = 0,
    top_p: Annotated[
        float, typer.Option("--top-p", min=0.0, max=1.0, help="Draw among the likeliest that reach this probability.")
    ] = 0.95,
    seed: Annotated[int, typer.Option("--seed", help="The same seed writes the same text.")] = 0,
    load_state: Annotated[
        Path | None, typer.Option("--load-state", metavar="STATE", help="Go on from a state that `stream` saved.")
    ] = None,
    save_state: Annotated[
        Path | None, typer.Option("--save-state", metavar="STATE", help="Save where the text ends.")
    ] = None,
    echo: Annotated[bool, typer.Option("--echo", help="Write the prompt (of --prompt) too.")] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help=SET_HELP, show_default=False)] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "",
) -> None:
    """Go on writing from a prompt, a file of any length, or a state that was saved.

    Standard output gets the new text alone, as it comes.

    Examples:
      longspan generate runs/first --prompt "My fellow citizens, "
      longspan generate runs/first --prompt-file book.txt --tokens 500 --temperature 0.7
      longspan generate runs/first --load-state book.state --seed 3
    """
    if prompt is not None and prompt_file is not None:
        raise ConfigError("give --prompt or --prompt-file, not both")
    if prompt is None and prompt_file is None and load_state is None:
        raise ConfigError("nothing to go on from: give --prompt TEXT, --prompt-file FILE or --load-state STATE")
    if top_p == 0:
        raise ConfigError("--top-p 0 leaves nothing to draw from; --temperature 0 takes the likeliest token")
    import torch

    model, task = open_run(run, set_ or [], device=device, dtype=dtype)
    session = open_session(model, load_state)
    _read_prompt(session, task.tokenizer, prompt, prompt_file)
    out = Writer()
    if echo and prompt:
        out.write(prompt.encode())
    generator = torch.Generator().manual_seed(seed)
    ends = task.tokenizer.ends
    for token in session.stream(
        tokens,
        temperature=temperature,
        top_k=min(top_k, model.vocab_size) or None,
        top_p=top_p if top_p < 1 else None,
        generator=generator,
        stop=ends,
    ):
        if token not in ends:
            out.write(task.tokenizer.decode([token]))
    out.end()
    if save_state is not None:
        session.save(save_state)
        say(f"saved {save_state}")


def _read_prompt(session: "StreamSession", tokenizer: "Tokenizer", text: str | None, file: str | None) -> None:
    import io

    from longspan.cli import reading, streaming

    streaming.begin(session, tokenizer)
    if file is not None:
        with reading.open_bytes(file) as opened:
            streaming.read_all(session, opened, tokenizer, reading.encoder(tokenizer, file))
    elif text:
        # what the shell could not decode goes back to the bytes it was
        data = text.encode("utf-8", errors="surrogateescape")
        streaming.read_all(session, io.BytesIO(data), tokenizer, reading.encoder(tokenizer, "--prompt"))


class Writer:
    """Bytes to standard output as they come: raw into a file or a pipe, harmless text on a terminal."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace") if sys.stdout.isatty() else None

    def write(self, data: bytes) -> None:
        """Write some bytes."""
        if self._decoder is None:
            sys.stdout.buffer.write(data)
        else:
            sys.stdout.write(harmless(self._decoder.decode(data)))
        sys.stdout.flush()

    def end(self) -> None:
        """Leave a terminal at the start of a line."""
        if self._decoder is not None:
            sys.stdout.write("\n")
            sys.stdout.flush()
