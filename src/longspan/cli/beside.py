"""Other readings of a text for `longspan eval --task lm`: one branch of a model alone, and other models beside it."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast, get_args

from longspan.cli.evaluate import BRANCHES, EvaluateOptions
from longspan.cli.runs import open_any_run, open_run
from longspan.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from longspan.hf.baselines import Baseline
    from longspan.tasks import TextTask
    from longspan.tasks.tokenizers import Tokenizer

_SAMPLE = b"It is 5 o'clock; the tokenizers agree.\n\tdef f(x): return x\n"


@dataclass(frozen=True, kw_only=True)
class OtherReading:
    """A reading of the documents with the state carried, by a part of the model or by another model.

    Attributes:
        name: of the reading.
        description: how exactly the text is read, in words.
        model: that reads.
        context: in which it reads.
        positions: number of tokens from the start of a document that it reads; None = all.
        is_other_model: whether its time and memory are of interest too.
    """

    name: str
    description: str
    model: Any
    context: AbstractContextManager[Any]
    positions: int | None = None
    is_other_model: bool = False


def other_readings(model: Any, task: "TextTask", options: EvaluateOptions) -> Iterator[OtherReading]:
    """Yield the readings that `--branches` and `--beside` ask for; every model is opened when it is yielded.

    Args:
        model, task: of the run.
        options: of the command.

    Raises:
        ConfigError: the model has no branches, or `--beside` names what does not fit the run.
        CheckpointError: `--beside` names a folder that cannot be opened.
        UnsupportedError: another model does not stream.
    """
    from longspan.contract.branches import only_branch

    if options.branches:
        for name, branch in BRANCHES.items():
            without = {"local": "the memory", "memory": "local attention"}[branch]
            description = f"the layers' outputs without {without}; the state is carried"
            yield OtherReading(name=name, description=description, model=model, context=only_branch(model, branch))
    for name in options.beside or []:
        yield _other_model(name, task.tokenizer, options)


def _other_model(name: str, tokenizer: "Tokenizer", options: EvaluateOptions) -> OtherReading:
    """Open another model: a folder, or the run's model with simpler attention; raises as `other_readings`."""
    from longspan.hf.baselines import Baseline, local_tokens

    loading: dict[str, Any] = {"device": options.device, "dtype": options.dtype}
    if name in get_args(Baseline):
        model = _baseline(cast("Baseline", name), options.run, loading)
        local = local_tokens(model.inner)
        description = {
            "original": "the attention before the conversion, with the weights of the run",
            "window": f"a window of {local:,} tokens in each layer, with the weights of the run",
            "sinks": f"a window of {local:,} tokens and the first 4, with the weights of the run",
        }[name]
    else:
        model, task = open_run(name, **loading)
        if task.tokenizer.encode(_SAMPLE).tolist() != tokenizer.encode(_SAMPLE).tolist():
            raise ConfigError(
                f"--beside {name}: has another tokenizer than {options.run}; losses by token need the same"
            )
        description = f"the model in {name}"
    if not model.traits.streams:
        raise UnsupportedError(f"--beside {name}: {model.why_no_stream()}; it cannot carry a state through the text")
    positions = _positions(model)
    if positions is not None:
        description += f"; only the first {positions:,} tokens of a document, the positions that it was trained for"
    return OtherReading(
        name=name,
        description=f"{description}; the state is carried",
        model=model,
        context=contextlib.nullcontext(),
        positions=positions,
        is_other_model=True,
    )


def _baseline(name: "Baseline", run: str, loading: dict[str, Any]) -> Any:
    """Open the model of a run again, with simpler attention."""
    from longspan.hf.baselines import replace_attention
    from longspan.hf.decoder import ConvertedDecoder

    model = open_any_run(run, **loading)[0]
    if not isinstance(model, ConvertedDecoder):
        raise ConfigError(f"--beside {name}: {run} is not a converted model; name the folder of another run instead")
    replace_attention(model.inner, name)
    return ConvertedDecoder(model.inner)


def _positions(model: Any) -> int | None:
    """Return the number of positions that a pretrained model with growing attention was trained for; None = no limit.

    A model with a state of constant size is converted, in order to read on.
    """
    config = getattr(getattr(model, "inner", None), "config", None)
    positions = None if model.traits.bounded else getattr(config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) else None
