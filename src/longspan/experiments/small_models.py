"""Small models of transformers, trained from nothing in a second.

Claims about pretrained models use them at the size `tiny`, so that they need no packages of pretrained models.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from longspan.hf.decoder import ModelAndTokenizer, open_pretrained
from longspan.tasks.text import TextTask

STEPS, ROWS, LENGTH = 40, 8, 64
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
BEGIN, END, MASK = "<begin>", "<end>", "<mask>"
MASKED = 0.15
ABOUT = f"2 layers of 32 on bytes, trained from nothing for {STEPS} steps of {ROWS * LENGTH} bytes of speeches"
"""The models in words."""


def byte_tokenizer() -> Any:
    """Return a tokenizer of transformers whose tokens are bytes: 256, and begin, end and mask."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = [BEGIN, END, MASK, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    engine: Any = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    fast: Any = PreTrainedTokenizerFast
    return fast(
        tokenizer_object=engine, bos_token=BEGIN, cls_token=BEGIN, sep_token=END, pad_token=END, mask_token=MASK
    )


def open_small_llama(folder: Path) -> ModelAndTokenizer:
    """Open a Llama of 2 layers of 32 and its tokenizer; the first call trains it and saves it in the folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if not (folder / "config.json").is_file():
        tokenizer = byte_tokenizer()
        ends: dict[str, Any] = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": None}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SIZES, **ends))
            _train(model, ((tokens, tokens) for tokens in _batches(tokenizer)))
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return open_pretrained(str(folder))


def train_small_bert() -> ModelAndTokenizer:
    """Train a BERT of 2 layers of 32 on masked bytes, and return its encoder and its tokenizer."""
    from transformers import BertConfig, BertForMaskedLM

    tokenizer = byte_tokenizer()

    def masked() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield tokens with masks, and targets."""
        for tokens in _batches(tokenizer):
            hidden = torch.rand(tokens.shape) < MASKED
            # -100: not predicted, in transformers
            yield tokens.masked_fill(hidden, tokenizer.mask_token_id), tokens.masked_fill(~hidden, -100)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # at the default of 0.02 so short a training leaves attention nearly even, whatever its kernel
        sizes = {**SIZES, "initializer_range": 0.2, "max_position_embeddings": 512}
        model: Any = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes))
        _train(model, masked())
    return ModelAndTokenizer(model.bert.eval(), tokenizer)


def _batches(tokenizer: Any) -> Iterator[torch.Tensor]:
    """Yield the tokens (rows, length) of each step: consecutive parts of speeches."""
    count = STEPS * ROWS * LENGTH
    tokens: list[int] = []
    for _, data in TextTask().texts("train"):
        tokens += tokenizer(bytes(data).decode(), add_special_tokens=False, verbose=False).input_ids
        if len(tokens) >= count:
            break
    yield from torch.tensor(tokens[:count]).view(STEPS, ROWS, LENGTH)


def _train(model: Any, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Train a model of transformers on batches of (tokens, targets)."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=5e-3)
    for tokens, targets in batches:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=tokens, labels=targets).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
