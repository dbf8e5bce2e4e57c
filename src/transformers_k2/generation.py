"""What `generate` does differently for K2: long prompts go in chunks, and the quantised cache is one of latents.

A prompt of 32K tokens in one forward holds activations of all its tokens, those of the chosen experts eight times over;
transformers can feed it in chunks (`prefill_chunk_size`), but does so only when told. Given up: a chunk reads all weights
and expands what is cached again, a tenth more work at this size.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.utils import GenerationMixin

from .latent_cache import LatentCache

PREFILL_CHUNK = 4096
INT8 = "int8"


class LatentGeneration(GenerationMixin):
    """transformers' `generate`, with defaults for multi-head latent attention.

    * Prompts of more than `PREFILL_CHUNK` token ids go in chunks of that size, unless `prefill_chunk_size` says otherwise,
      the cache is static, whose prefill upstream may compile, or the decoding is assisted, which has a prefill of its own
      (`GenerationSession` chunks that one too).
    * `cache_implementation="quantized"` gives a `LatentCache` of 8 bits, which needs no other package, unless
      `cache_config` names another `backend` ("quanto", "hqq").
    """

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        cache = model_kwargs.get("past_key_values")
        if (
            generation_config.prefill_chunk_size is None
            and input_ids.shape[1] > PREFILL_CHUNK
            and cache is not None
            and not cache.is_compileable
        ):
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = PREFILL_CHUNK
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        options = generation_config.cache_config or {}
        cache = model_kwargs.get("past_key_values")
        if (
            generation_config.cache_implementation == "quantized"
            and options.get("backend", INT8) == INT8
            and (cache is None or (isinstance(cache, LatentCache) and cache.latent_dtype == INT8))
            and generation_config.use_cache is not False
        ):
            unknown = sorted(set(options) - {"backend"})
            if unknown:
                raise ValueError(
                    f"cache_config has {', '.join(unknown)}: the cache of 8-bit latents has no options; leave them out, or "
                    f"name the backend they are for ('quanto', 'hqq')."
                )
            # A cache that is there is an assistant's, who has the settings of the model it helps.
            if cache is None:
                model_kwargs["past_key_values"] = LatentCache(config=self.config, dtype=INT8)
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
