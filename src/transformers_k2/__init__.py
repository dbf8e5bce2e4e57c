"""Kimi K2 for Hugging Face transformers: `import transformers_k2` registers the family with the Auto classes."""

from __future__ import annotations

from .configuration_kimi_k2 import KimiK2Config
from .latent_cache import LatentCache
from .modeling_kimi_k2 import (
    KimiK2ForCausalLM,
    KimiK2ForSequenceClassification,
    KimiK2ForTokenClassification,
    KimiK2Model,
    KimiK2PreTrainedModel,
)
from .optim import MuonClip, muon_clip
from .quantization.hf_quantizer import Int4Config
from .registration import register
from .session import GenerationSession
from .tokenization_kimi_k2 import KimiK2Tokenizer
from .tokenizer_training import train_tokenizer

__version__ = "0.1.0"

register()

__all__ = [
    "GenerationSession",
    "Int4Config",
    "KimiK2Config",
    "KimiK2ForCausalLM",
    "KimiK2ForSequenceClassification",
    "KimiK2ForTokenClassification",
    "KimiK2Model",
    "KimiK2PreTrainedModel",
    "KimiK2Tokenizer",
    "LatentCache",
    "MuonClip",
    "muon_clip",
    "train_tokenizer",
]
