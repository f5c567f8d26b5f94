"""lm-evaluation-harness: use any run or converted model as one of its models. Needs the extra `eval`.

    import lm_eval
    from longspan.harness import LongspanLM

    lm_eval.simple_evaluate(LongspanLM("runs/xl"), tasks=["lambada_openai"])

Contexts are read by streaming sessions, so they may have any length, with a constant state where the mixers allow;
common prefixes of requests are read once. `run_preset` evaluates a run by a benchmark of long contexts. Rolling
likelihoods cover the whole text, never windows of it.

On the command line it is `--model longspan --model_args run=runs/xl`. `lm_eval` finds it in releases that load plugins
(by the entry point `longspan` of the group `lm_eval.models`); `longspan-lm-eval`, or `python -m longspan.harness`,
works with any release (0.4.13 does not load plugins).
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any, NamedTuple, cast

from longspan.errors import ConfigError, DataError, LongspanError, UnsupportedError

try:
    import lm_eval  # type: ignore[import-untyped]
    from lm_eval.api.model import TemplateLM  # type: ignore[import-untyped]
    from lm_eval.api.registry import model_registry  # type: ignore[import-untyped]
except ImportError as error:
    raise UnsupportedError("longspan.harness needs lm-eval; pip install 'longspan[eval]'") from error

import torch

from longspan.stream import StreamSession
from longspan.tasks import TextTask
from longspan.train import open_run


class Preset(NamedTuple):
    """What to run of a benchmark of long contexts.

    Attributes:
        tasks: names of the harness.
        lengths: lengths of the texts, one evaluation for each, in the words of the benchmark; empty = its own.
        limit: documents per task; None = all.
    """

    tasks: tuple[str, ...]
    lengths: tuple[Any, ...] = ()
    limit: int | None = None


PRESETS: Mapping[str, Mapping[str, Preset]] = {
    # Hsieh et al. 2024, arXiv:2404.06654; lengths in tokens
    "ruler": {
        "small": Preset(("niah_single_1", "niah_multikey_1", "ruler_vt"), (4096,), 20),
        "full": Preset(("ruler",), (4096, 8192, 16384, 32768, 65536, 131072)),
    },
    # Kuratov et al. 2024, arXiv:2406.10149; lengths of the dataset, which has the later ones for five tasks
    "babilong": {
        "small": Preset(("babilong_qa1", "babilong_qa2"), ("0k", "4k"), 50),
        "full": Preset(
            tuple(f"babilong_qa{task}" for task in range(1, 6)),
            ("0k", "1k", "2k", "4k", "8k", "16k", "32k", "64k", "128k"),
        ),
    },
    # Bai et al. 2023, arXiv:2308.14508; "_e" has texts of evenly spread lengths
    "longbench": {
        "small": Preset(("longbench_passage_retrieval_en_e", "longbench_hotpotqa_e", "longbench_trec_e"), (), 20),
        "full": Preset(("longbench_e",)),
    },
}


class Score(NamedTuple):
    """A figure of the harness.

    Attributes:
        task, metric: in the harness's names.
        length: of the texts; "" = the benchmark's own.
        value: of the metric.
        error: standard error; None = not known.
    """

    task: str
    length: str
    metric: str
    value: float
    error: float | None


def find_preset(name: str) -> Preset:
    """Return the preset of a name such as `ruler`, `ruler:small` or `ruler:full`; raises ConfigError for others."""
    benchmark, _, size = name.partition(":")
    try:
        return PRESETS[benchmark][size or "small"]
    except KeyError:
        names = ", ".join(f"{known}[:small|full]" for known in PRESETS)
        raise ConfigError(f"{name!r}: not a benchmark of long contexts; choose one of {names}") from None


def run_preset(run: str | Path, preset: Preset) -> list[Score]:
    """Evaluate a run by a benchmark of long contexts; the harness loads its texts from the hub.

    Args:
        run: the folder of a run, or of a model that `longspan convert` wrote.
        preset: see `find_preset`.

    Raises:
        DataError: the texts cannot be loaded.
        CheckpointError, UnsupportedError: see `LongspanLM`.
    """
    model, scores = LongspanLM(run), list[Score]()
    for length in preset.lengths or (None,):
        metadata: dict[str, Any] = {"tokenizer": str(run)}
        if length is not None:
            # RULER takes a list of lengths, BABILong one name
            metadata["max_seq_lengths"] = [length] if isinstance(length, int) else length
        try:
            report = lm_eval.simple_evaluate(
                model=model, tasks=list(preset.tasks), limit=preset.limit, metadata=metadata, log_samples=False
            )
        except LongspanError:
            raise
        except (OSError, ValueError, ImportError, AssertionError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise DataError(
                f"{', '.join(preset.tasks)}: the harness cannot load this benchmark: {reason[0]}; it needs the hub, "
                "and for RULER pip install 'lm_eval[ruler]' and a model with a tokenizer of transformers"
            ) from error
        for task, figures in report["results"].items():
            scores += _scores(task, "" if length is None else str(length), figures)
    return scores


def _scores(task: str, length: str, figures: Mapping[str, Any]) -> Iterator[Score]:
    """Yield the figures of a task: "metric,filter", with the standard error as "metric_stderr,filter"."""
    for key, value in figures.items():
        metric, _, kind = key.partition(",")
        # RULER reports -1 for the lengths that were not asked for
        if not kind or metric.endswith("_stderr") or not isinstance(value, int | float) or value < 0:
            continue
        error = figures.get(f"{metric}_stderr,{kind}")
        yield Score(task, length, metric, float(value), float(error) if isinstance(error, int | float) else None)


class LongspanLM(TemplateLM):  # type: ignore[misc]
    """A model of this library, or one it converted, as a model of lm-evaluation-harness.

    Args:
        run: the folder of a run, or of a model that `longspan convert` wrote.
        max_gen_toks: maximal number of generated tokens, where the task does not set it.

    Raises:
        ConfigError: a model object was passed instead of its folder.
        CheckpointError: the folder is not a run, or its model does not read text.
        UnsupportedError: a layer does not stream, so that its likelihood of a token would depend on later tokens.
    """

    def __init__(self, run: str | Path, max_gen_toks: int = 256, **_: Any) -> None:
        super().__init__()
        if not isinstance(run, (str, Path)):
            raise ConfigError(
                f"LongspanLM needs the path of a folder, not a {type(run).__name__}; call save_pretrained of the model "
                "and its tokenizer, and pass that folder"
            )
        self.run, self.max_gen_toks = str(run), int(max_gen_toks)
        self.model, task, notes = open_run(self.run, text=True)
        for note in notes:
            print(note, file=sys.stderr, flush=True)
        self.task_tokenizer = cast(TextTask, task).tokenizer
        self._start = StreamSession(self.model)
        self._start.feed([self.task_tokenizer.begin])

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token; the tokenizer's own if the task has several."""
        return self.task_tokenizer.ends[0]

    @property
    def prefix_token_id(self) -> int:
        """The token that begins every document and replaces an empty context."""
        return self.task_tokenizer.begin

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer in the harness's caches."""
        return self.run

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the token ids of a text."""
        return [int(token) for token in self.task_tokenizer.encode(string.encode())]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Return, for each request, the log-likelihood
        of its continuation and whether greedy decoding would produce it.
        """
        likelihoods: dict[int, tuple[float, bool]] = {}
        contexts = [self._context(context) for _, context, _ in requests]
        for index, session in self._read(contexts):
            scores = session.fork().score(requests[index][2])
            likelihoods[index] = (-float(scores.nats.cpu().double().sum()), bool(scores.likeliest.all()))
            self.cache_hook.add_partial("loglikelihood", requests[index][0], likelihoods[index])
        return [likelihoods[index] for index in range(len(requests))]

    def _context(self, tokens: list[int]) -> list[int]:
        """Remove a leading begin-of-document token, because every session already starts with it."""
        return tokens[1:] if tokens[:1] == [self.prefix_token_id] else tokens

    def _read(self, contexts: Sequence[list[int]]) -> Iterator[tuple[int, StreamSession]]:
        """Yield the index of each context with a session that has read it;
        equal contexts and the common prefix are read once.
        """
        if not contexts:
            return
        # the first and the last of the sorted contexts have the shortest common prefix, which all share
        pairs = zip(min(contexts), max(contexts), strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        start = self._start.fork()
        start.feed(contexts[0][:shared])
        order = sorted(range(len(contexts)), key=contexts.__getitem__)
        for context, same in groupby(order, key=contexts.__getitem__):
            session = start.fork()
            session.feed(context[shared:])
            for index in same:
                yield index, session

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text as a document of its own."""
        likelihoods = []
        for request in requests:
            (text,) = request.args
            nats = self._start.fork().score(self.tok_encode(text)).nats
            likelihoods.append(-float(nats.cpu().double().sum()))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), likelihoods[-1])
        return likelihoods

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return a continuation for each request, cut before the first of its stop strings."""
        continuations: dict[int, str] = {}
        contexts = [self._context(self.tok_encode(request.args[0])) for request in requests]
        for index, session in self._read(contexts):
            continuations[index] = self._answer(session.fork(), dict(requests[index].args[1]))
            self.cache_hook.add_partial("generate_until", requests[index].args, continuations[index])
        return [continuations[index] for index in range(len(requests))]

    def _answer(self, session: StreamSession, options: dict[str, Any]) -> str:
        """Return the text that a session generates until a stop string, an end-of-text token or the largest length.

        Args:
            session: after the prompt; it is advanced.
            options: of the request, in the harness's names: until, do_sample, temperature, top_p, max_gen_toks.
        """
        until = options.get("until") or []
        ends = [until] if isinstance(until, str) else list(until)
        drawn = bool(options.get("do_sample", False))
        temperature = float(options.get("temperature", 1.0 if drawn else 0.0)) if drawn else 0.0
        tokens: list[int] = []
        for token in session.stream(
            int(options.get("max_gen_toks", self.max_gen_toks)),
            temperature=temperature,
            top_p=options.get("top_p"),
            generator=torch.Generator().manual_seed(0),
        ):
            if token in self.task_tokenizer.ends:
                break
            tokens.append(token)
            text = self._text(tokens)
            if any(end in text for end in ends):
                return text[: min(text.index(end) for end in ends if end in text)]
        return self._text(tokens)

    def _text(self, tokens: list[int]) -> str:
        """Decode token ids to text, replacing invalid UTF-8."""
        return self.task_tokenizer.decode(tokens).decode("utf-8", errors="replace")


def main() -> None:
    """Run the harness's own command line with the model `longspan` registered.

    It is the console script `longspan-lm-eval` and `python -m longspan.harness`. Releases of lm-eval that load plugins
    find the model by its entry point, so that plain `lm_eval` is enough there.
    """
    from lm_eval.__main__ import cli_evaluate  # type: ignore[import-untyped]

    cli_evaluate()


# releases that load plugins have registered the model already, by importing this module
if "longspan" not in model_registry:
    model_registry.register("longspan")(LongspanLM)

if __name__ == "__main__":
    main()
