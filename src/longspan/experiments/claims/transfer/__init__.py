"""`transfer`: what attention transfer is worth on a real pretrained model, beside window and sinks, which cost nothing.

SmolLM2-135M-Instruct is converted, taught layer by layer what its own attention computes, then distilled; all variants
read held-out prose, code and documentation, beside the original as far as its positions reach. Every training and every
reading of a document is saved and resumed, and the result is that of the variants that are finished, also where the
claim was interrupted.
"""

from pathlib import Path
from typing import Any

from longspan.errors import LongspanError
from longspan.experiments.claims.base import Claim, Outcome, Say
from longspan.experiments.claims.transfer.plan import ORIGINAL, PLANS, Plan, Variant
from longspan.experiments.claims.transfer.reading import Readings, Setting, readings, save_original, train
from longspan.experiments.claims.transfer.report import outcome
from longspan.experiments.claims.transfer.results import Results
from longspan.experiments.claims.transfer.texts import KINDS, tokens_of, write_texts

__all__ = ["TRANSFER"]


def measure(folder: Path, plan: Plan, say: Say) -> Outcome:
    """Measure the claim; a second call resumes from the folder, and Ctrl-C ends it with what is finished."""
    setting = prepare(folder, plan)
    read: dict[str, Readings] = {}
    trained: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    note = ""
    try:
        read[ORIGINAL] = readings(None, setting)
        say("original: read")
        for variant in plan.variants:
            try:
                trained[variant.folder] = train(variant, setting)
                read[variant.folder] = readings(variant, setting)
            except LongspanError as error:
                # the others are worth having
                failures[variant.folder] = str(error)
            say(_progress(variant, Results(plan, read, trained, failures)))
    except KeyboardInterrupt:
        note = "Interrupted."
    return outcome(Results(plan, read, trained, failures), _layers(setting.original), note)


def prepare(folder: Path, plan: Plan) -> Setting:
    """Write the original model and the texts to the folder of the claim, unless an earlier call did."""
    from longspan.hf.decoder import open_tokenizer

    original = save_original(folder, small=plan.small_model)
    texts = write_texts(folder / "text", plan.training_bytes, plan.documents)
    tokenizer = open_tokenizer(original)
    documents = {
        kind: [
            tokens_of(tokenizer, path, plan.long_tokens if index < plan.long_documents else plan.tokens)
            for index, path in enumerate(paths)
        ]
        for kind, paths in texts.held_out.items()
    }
    return Setting(folder, plan, original, texts, documents)


def _progress(variant: Variant, results: Results) -> str:
    """Return the line of a variant that is finished or failed."""
    if variant.folder in results.failures:
        return f"{variant.name}: {results.failures[variant.folder]}"
    more = [(kind, results.difference(variant.folder, ORIGINAL, (kind,), results.lost)) for kind in KINDS]
    parts = [f"{kind} {interval.value:+.3f}" for kind, interval in more if interval is not None]
    first, last = results.lost
    return f"{variant.name}: {', '.join(parts)} nats above the original at tokens {first:,} to {last:,}"


def _layers(original: Path) -> int:
    """Return the number of layers of the original."""
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(original).num_hidden_layers)


TRANSFER = Claim(
    name="transfer",
    system="Attention transfer",
    source="Zhang et al. 2024 (LoLCATs), section 3; Goldstein et al. 2025 (RADLADS); Xiao et al. 2023 (sinks)",
    text="Taught layer by layer what its own attention computes, then distilled, a pretrained model reads on in "
    "constant memory and wins back most of what a window and sinks lose.",
    measure=measure,
    minutes={"tiny": 0.2, "small": 25, "full": 1560},
    plans=PLANS,
)
