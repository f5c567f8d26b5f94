"""Small models of every mechanism, the library's own and converted ones, for the reports re-enacted in this folder."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import longspan as ls

VOCAB, DIM, HEADS = 50, 16, 2

# one form of each mechanism that is cheap, crosses its segments within some ten tokens, and suits two heads
FIELDS: dict[str, dict[str, Any]] = {
    "full": {},
    "window": {"window": 4},
    "window_linear": {"window": 4, "num_features": 5, "sinks": 2},
    "linear": {},
    "gated_delta": {},
    "performer": {"num_features": 8},
    "infini": {"segment": 4},
    "associative": {"segment": 4, "num_memory_tokens": 3, "memory_dim": 4},
    "sparse": {"pattern": "fixed", "stride": 4, "summary": 1},
    "adaptive_span": {"max_span": 9, "ramp": 3, "initial": 0.4},
    "entmax": {},
    "bp": {"k": 2, "max_level": 3},
    "lsh": {"bucket_size": 2, "num_hashes": 2, "num_buckets": 4, "selection": "strict"},
    "routing": {"num_clusters": 3, "window": 4, "selection": "strict"},
    "memorizing": {"window": 4, "max_memories": 10, "k": 3},
    "transformer_xl": {"segment": 4, "mem_len": 4},
    "compressive": {"segment": 4, "mem_len": 4, "compressed_len": 4, "ratio": 2},
    "mixed_heads": {
        "mixers": [{"name": "window", "num_heads": 1, "window": 4}, {"name": "full", "num_heads": 1}],
    },
}
NAMES = ls.mixers.names()
CONVERTIBLE = [
    name for name in NAMES if ls.mixers.build(name, dim=DIM, num_heads=HEADS, **FIELDS[name]).traits.convertible
]


def own(name: str = "full", *, layers: int = 1, **fields: Any) -> ls.Decoder:
    """A Decoder of one mechanism, in evaluation mode; `fields` of `DecoderConfig`."""
    torch.manual_seed(0)
    mixers = ({"name": name, **FIELDS[name]},)
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "dim": DIM, "num_layers": layers, "num_heads": HEADS}
    return ls.Decoder(ls.DecoderConfig(**(sizes | {"mixers": mixers} | fields))).eval()


def llama(*, layers: int = 1, **fields: Any) -> Any:
    """A tiny Llama with random weights, in evaluation mode; `fields` of `LlamaConfig`."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": DIM,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | fields))).eval()


def converted(name: str, **options: Any) -> Any:
    """A tiny Llama converted to a mechanism; `options` of `llama`."""
    hf = pytest.importorskip("longspan.hf")
    model = llama(**options)
    hf.convert(model, name, **FIELDS[name])
    return model


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids (rows, length), never 0."""
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def labeled(name: str) -> Callable[[str], str]:
    """For `msg=` of `torch.testing.assert_close`: its message behind a name."""
    return lambda message: f"{name}: {message}"
