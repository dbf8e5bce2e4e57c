"""The Kimi K2 model classes: transformers' DeepSeek-V3, renamed, with strict loading and hub-shaped saving.

K2's arithmetic is DeepSeek-V3's. For training and short inputs upstream's forward pass is kept, and given the same weights
the logits are `torch.equal`; what follows cached tokens goes the shorter ways of attention.py and few_tokens.py, whose
classes take the places of upstream's. This file adds the construction from our own base model (so that task heads and
PEFT see one class tree), and the two ends where the stock classes go wrong on published checkpoints: `from_pretrained`
(see loading.py) and `save_pretrained` (see saving.py).
"""

# Annotations stay objects here: transformers reads from that of a forward which outputs the class has.
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3ForCausalLM,
    DeepseekV3Model,
    DeepseekV3PreTrainedModel,
)
from transformers.utils.generic import can_return_tuple

from . import few_tokens, loading, saving
from .attention import KimiK2Attention, causal_or_given
from .configuration_kimi_k2 import KimiK2Config
from .few_tokens import KimiK2TopkRouter
from .generation import LatentGeneration
from .linear_cross_entropy import IGNORE_INDEX, LanguageModelHead
from .preflight import IGNORED_KEYS


class KimiK2PreTrainedModel(DeepseekV3PreTrainedModel):
    """Loading and saving for every Kimi K2 class."""

    config_class: ClassVar[type] = KimiK2Config
    # What a K2 checkpoint may hold beside the language model: the stray rope buffers, K2.5's vision tower and projector.
    # Upstream's list also hides `model.layers.61.*`: DeepSeek's extra prediction layer, which K2 does not have.
    _keys_to_ignore_on_load_unexpected = IGNORED_KEYS

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # Upstream searches the source of the class's own module for the experts' decorator; it is in DeepSeek's module.
        # Answering for ourselves we would be held to the eager loop over experts.
        return DeepseekV3PreTrainedModel._can_set_experts_implementation()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """Load a checkpoint in any published form; see `transformers.PreTrainedModel.from_pretrained` for the options.

        bf16, FP8 (128x128 blocks) and compressed-tensors INT4 checkpoints load, with or without K2.5's
        `language_model.` prefix. INT4 experts stay packed. FP8 stays FP8 where transformers' own FP8 kernels can run (CUDA
        capability >= 8.9 or XPU), and is dequantised to `dtype` elsewhere. What else can become of them is in
        quantization_choice.py.

        Args:
            dequantize: everything in `dtype`, whatever the files hold.
            quantization_config: `Int4Config()` quantises the routed experts of bf16 and FP8 files; one of bitsandbytes or
                quanto does so too, and has the linear layers; the checkpoint's own is the default.
            strict: a missing or left-over tensor of the language model is an error (default). With `strict=False` it is
                only reported, as in transformers.

        Raises:
            ValueError: the folder, its index, a shard, a tensor's shape or the configuration is wrong; told in one line,
                from the files' headers, before any weight is allocated.
        """
        return loading.from_pretrained(
            cls, super().from_pretrained, pretrained_model_name_or_path, *model_args, **kwargs
        )

    @staticmethod
    def _load_pretrained_model(*args: Any, **kwargs: Any) -> Any:
        """The step of transformers' from_pretrained that reads files: ours reads FP8 and INT4 (see lazy_weights.py)."""
        return loading.load_weights(DeepseekV3PreTrainedModel._load_pretrained_model, *args, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        """What `AutoModel*.from_config` calls; K2.5's wrapper stands for the text configuration inside it."""
        return super()._from_config(loading.text_config(config), **kwargs)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As torch's, for the names that `save_pretrained` writes too: one tensor per expert and projection.

        Trainer resumes so, and without this it would leave the experts as they are, with a warning.
        """
        return super().load_state_dict(loading.stack_experts(self, state_dict), strict, assign)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save in the hub's layout: one tensor per expert and projection, and the hub's config.json.

        The folder changes only when every file is complete: new files are written under a temporary name, synced, then
        renamed, the index last. See `transformers.PreTrainedModel.save_pretrained` for the options.

        Args:
            keep_auto_map: keep the `auto_map` of the configuration that was loaded (left out by default).
        """
        saving.save_pretrained(self, super().save_pretrained, save_directory, *args, **kwargs)


class KimiK2Model(KimiK2PreTrainedModel, DeepseekV3Model):
    """The decoder without a head. Input ids [batch, sequence] -> hidden states [batch, sequence, hidden]."""

    def __init__(self, config: KimiK2Config) -> None:
        super().__init__(config)
        few_tokens.install(self)
        for layer in self.layers:
            # The layers build upstream's. A new one would draw its weights again; this has no state of its own.
            layer.self_attn.__class__ = KimiK2Attention

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As upstream's."""
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        attention_mask = causal_or_given(self.config, inputs, attention_mask, past_key_values, self.training)
        with few_tokens.kernels(inputs, past_key_values):
            return super().forward(
                input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, **kwargs
            )


class KimiK2ForCausalLM(LatentGeneration, KimiK2PreTrainedModel, DeepseekV3ForCausalLM):
    """The decoder with its language-model head. Input ids [batch, sequence] -> logits [batch, sequence, vocab].

    Attributes:
        loss_chunk_tokens: when set, a forward with labels computes the loss for that many tokens at a time and returns
            no logits (see linear_cross_entropy.py). A choice of the training run, not saved with the model.
    """

    loss_chunk_tokens: int | None = None

    def __init__(self, config: KimiK2Config) -> None:
        super(DeepseekV3ForCausalLM, self).__init__(
            config
        )  # its own __init__ would build DeepSeek's base model
        self.model = KimiK2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = few_tokens.KimiK2Head(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """As upstream's. With `labels` and `loss_chunk_tokens` set, the loss is computed without logits (None then).

        Raises:
            ValueError: `loss_chunk_tokens` is set and `lm_head` was replaced (an adapter on it, quantisation), or
                `logits_to_keep` is given too.
        """
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
        }
        if labels is None or self.loss_chunk_tokens is None:
            with few_tokens.kernels(input_ids if inputs_embeds is None else inputs_embeds, past_key_values):
                return super().forward(**inputs, labels=labels, logits_to_keep=logits_to_keep, **kwargs)
        if not isinstance(self.lm_head, LanguageModelHead):
            raise ValueError(
                f"loss_chunk_tokens is {self.loss_chunk_tokens}, but lm_head was replaced by a "
                f"{type(self.lm_head).__name__}, which returns logits only: leave lm_head out of adapters and quantisation, "
                f"or set loss_chunk_tokens to None."
            )
        if isinstance(logits_to_keep, torch.Tensor) or logits_to_keep != 0:
            raise ValueError(
                f"logits_to_keep is {logits_to_keep}, expected 0: with labels and loss_chunk_tokens there are no logits."
            )
        outputs = self.model(**inputs, **kwargs)
        ignore_index = kwargs.get("ignore_index", IGNORE_INDEX)
        targets = kwargs.get("shift_labels")
        if targets is None:
            targets = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        loss = self.lm_head(
            outputs.last_hidden_state,
            labels=targets,
            chunk_tokens=self.loss_chunk_tokens,
            num_items=kwargs.get("num_items_in_batch"),
            ignore_index=ignore_index,
        )
        return MoeCausalLMOutputWithPast(
            loss=loss,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


class KimiK2ForSequenceClassification(GenericForSequenceClassification, KimiK2PreTrainedModel):
    """The decoder with a classifier on the last token. Input ids [batch, sequence] -> logits [batch, labels]."""


class KimiK2ForTokenClassification(GenericForTokenClassification, KimiK2PreTrainedModel):
    """The decoder with a classifier on every token. Input ids [batch, sequence] -> logits [batch, sequence, labels]."""


__all__ = [
    "KimiK2ForCausalLM",
    "KimiK2ForSequenceClassification",
    "KimiK2ForTokenClassification",
    "KimiK2Model",
    "KimiK2PreTrainedModel",
    "KimiK2TopkRouter",
]
