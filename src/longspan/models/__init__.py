"""The library's own models: one stack for all mixers."""

from longspan.models.config import DecoderConfig, EncoderConfig, StackConfig
from longspan.models.decoder import Decoder
from longspan.models.encoder import Encoder
from longspan.models.io import load_model, load_weights, model_hash, save_model
from longspan.models.recurrent import RecurrentMemory, RecurrentState
from longspan.models.stack import Stack, StackState

__all__ = [
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "RecurrentMemory",
    "RecurrentState",
    "Stack",
    "StackConfig",
    "StackState",
    "load_model",
    "load_weights",
    "model_hash",
    "save_model",
]
