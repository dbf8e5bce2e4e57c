"""Another rotary scaling on a model that is there: what changes when a run or a user extends the context.

`config.rope_scaling`, the tables of frequencies and, under YaRN, the scale of the attention logits (mscale) belong
together; changing the configuration alone changes nothing. Source: YaRN, arXiv 2309.00071; DeepSeek-V3's mscale.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, yarn_apply_mscale


def set_rope_scaling(
    model: PreTrainedModel, rope_scaling: dict[str, Any] | None, max_position_embeddings: int | None = None
) -> None:
    """Give a Kimi K2 model another `rope_scaling`; weights stay. None is plain RoPE.

    Args:
        max_position_embeddings: the longest sequence, if that changes too.
    """
    config: Any = model.config
    if max_position_embeddings is not None:
        config.max_position_embeddings = max_position_embeddings
    config.rope_scaling = rope_scaling
    config.standardize_rope_params()
    config.validate_rope()
    decoder: Any = model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config).to(model.device)
    for module in model.modules():
        if isinstance(module, DeepseekV3Attention):
            module.scaling = yarn_apply_mscale(config.rope_parameters, module.qk_head_dim**-0.5)
