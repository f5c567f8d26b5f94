"""Small models of transformers with random weights, in fp64."""

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
LONG = {"max_position_embeddings": 512}


def make(kind: str, **more: Any) -> Any:
    """A model by the name of its family."""
    torch.manual_seed(0)
    # no end token: generation is compared over its whole length
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    if kind == "gpt2":
        sizes: dict[str, Any] = {"vocab_size": 29, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 512}
        config = transformers.GPT2Config(**(sizes | ends | more))
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(**SIZES, **LONG, **more))
    else:
        name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
        heads = {"num_key_value_heads": 2, "head_dim": 4} if kind == "qwen3" else {"num_key_value_heads": 2}
        config = getattr(transformers, f"{name}Config")(**(SIZES | LONG | heads | ends | more))
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            # initial weights are so small that every mechanism would give nearly the same
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.double().eval()


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(1, 29, (rows, length), generator=torch.Generator().manual_seed(seed))


def save_llama(folder: Path) -> Path:
    """A small Llama with a byte-level tokenizer, as a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    engine: Any = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    table = {"<|begin|>": 0} | {symbol: index + 1 for index, symbol in enumerate(alphabet)}
    engine.model = models.BPE(vocab=table, merges=[])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=engine, bos_token="<|begin|>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        bos_token_id=0,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return folder
