"""K2's attention: upstream's module, which while it generates works on the cached latents instead of expanding them all.

transformers expands the whole cache into keys and values of every head at every step. Here a forward without gradients
chooses, by the multiply-adds it takes (mla.py), between queries absorbed into the space of latents and keys and values
expanded block by block. Parameters, names and the cache's contents are upstream's, kv_b_proj stays one matrix.

Left to upstream, bit for bit: forwards with gradients (training, and QK-Clip's observation of it), eager attention (which
returns its weights), autocast, flex and flash attention but for single queries without a mask, and prompts short enough
that one call of SDPA is as good. What the rest gives up is equality of the last bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_interleave,
)

from . import few_tokens, mla, padded_sdpa
from .cpu import mla as cpu_mla
from .cpu import small
from .latent_cache import Int8LatentLayer, LatentLayer, adopt
from .optim.observe import recording

# Attention split by heads, with whole latents on every rank: transformers' own plan for DeepSeek-V3 leaves it whole. For
# `DistributedConfig(tp_plan=TP_PLAN_HEADS)`, which adds it to the model's plan.
TP_PLAN_HEADS = {
    "model.layers.*.self_attn.q_b_proj": "colwise",
    "model.layers.*.self_attn.kv_b_proj": "colwise",
    "model.layers.*.self_attn.o_proj": "rowwise",
}
_BLOCKWISE = ("sdpa", padded_sdpa.NAME)
# Scores of a first prefill for which upstream's single call is kept: 16 MB in float32.
_FEW_SCORES = 1 << 22
# What the CPU kernel takes at a time; for more, matrix products of torch are as good.
_FEW_QUERIES = 16


# In the place of a mask for SDPA: query i of q sees all but the last q - i - 1 tokens. transformers has None for that, but
# only where nothing is cached, and makes a mask of queries times keys otherwise. Four dimensions pass it unchanged.
CAUSAL = torch.empty(0, 0, 0, 0)


def causal_or_given(
    config: PreTrainedConfig, inputs: Tensor | None, mask: Any, cache: Cache | None, training: bool
) -> Any:
    """CAUSAL where it says all that the model's mask [b, T] says, else that mask.

    Args:
        inputs: ids [b, q] or embeddings [b, q, hidden].
        cache: what the inputs follow.
    """
    if inputs is None or cache is None or cache.is_compileable or torch.compiler.is_compiling():
        return mask
    num_queries = inputs.shape[1]
    if num_queries == 1 or config._attn_implementation not in _BLOCKWISE or not _is_ours(inputs.device.type):
        return mask
    num_keys = cache.get_seq_length() + num_queries
    if num_keys == num_queries or (training and config.attention_dropout):
        return mask
    if mask is not None and (mask.shape != (inputs.shape[0], num_keys) or not mask.all()):
        return mask
    return CAUSAL


def _is_ours(device: str) -> bool:
    """Whether attention may read latents: no gradients, nobody who watches, no casts."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled(device):
        return False
    return torch.compiler.is_compiling() or not recording()  # compiled modules cannot be watched


class _Stored(NamedTuple):
    """A layer's latents, this forward's included."""

    num_keys: int
    read: mla.Latents
    codes: Int8LatentLayer | None = None


class KimiK2Attention(DeepseekV3Attention):
    """Multi-head latent attention. Hidden states [b, q, hidden] -> ([b, q, hidden], weights or None)."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As upstream's, from the cached latents where no gradients are needed."""
        if past_key_values is not None:
            adopt(past_key_values)
        if not self._reads_latents(hidden_states, attention_mask, past_key_values):
            return super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )[:2]
        batch, num_queries, _ = hidden_states.shape
        q_nope, q_rot, c, k_rot = self._project(hidden_states, position_embeddings)
        stored = self._store(past_key_values, c, k_rot)
        if isinstance(attention_mask, Tensor) and attention_mask.shape == CAUSAL.shape:
            attention_mask = None  # it may be another tensor: layers on other devices get copies
        elif attention_mask is None and 1 < num_queries < stored.num_keys:
            # Upstream's mask for the first tokens in a static cache: what is behind them is not seen.
            stored = stored._replace(num_keys=num_queries)
        output = self._attend(q_nope, q_rot, stored, attention_mask)
        return few_tokens.linear(self.o_proj, output.reshape(batch, num_queries, -1)), None

    def expand_kv(self, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [b, 1, s, rank] and rotated keys [b, 1, s, d] -> keys and values [b, heads, s, ...], `torch.equal`.

        In one operation, which recompute.py can repeat: upstream writes the keys piece by piece into an empty tensor.
        """
        widths = [self.qk_nope_head_dim, self.v_head_dim]
        both = self.kv_b_proj(kv_nope).unflatten(-1, (-1, sum(widths))).squeeze(1).transpose(1, 2)
        k_nope, values = both.split(widths, dim=-1)
        return torch.cat((k_nope, k_rot.expand(-1, both.shape[1], -1, -1)), dim=-1), values

    def _reads_latents(self, hidden_states: Tensor, mask: Any, cache: Cache | None) -> bool:
        """Whether this forward is ours."""
        if not _is_ours(hidden_states.device.type) or (self.training and self.attention_dropout):
            return False
        num_queries = hidden_states.shape[1]
        implementation = self.config._attn_implementation
        if implementation not in _BLOCKWISE:
            return implementation != "eager" and cache is not None and mask is None and num_queries == 1
        if cache is not None:
            # The length of a static cache is a tensor; its first prefill comes without a mask.
            follows = (
                num_queries == 1 or mask is not None
                if cache.is_compileable
                else cache.get_seq_length(self.layer_idx) > 0
            )
            if follows:
                return True
        return hidden_states.shape[0] * self.num_heads * num_queries**2 > _FEW_SCORES

    def _project(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries [b, q, heads, nope] and [b, q, heads, rotary], latents [b, q, rank], rotated keys [b, q, rotary]."""
        if self.q_proj is not None:
            query, is_ours = few_tokens.project(self.q_proj, hidden_states)
        else:
            assert self.q_a_proj is not None
            assert self.q_a_layernorm is not None
            assert self.q_b_proj is not None
            query = self.q_a_layernorm(few_tokens.linear(self.q_a_proj, hidden_states))
            query, is_ours = few_tokens.project(self.q_b_proj, query)
        query = query.view(*query.shape[:2], -1, self.qk_head_dim)
        q_nope, q_rot = query.split_with_sizes((self.qk_nope_head_dim, self.qk_rope_head_dim), dim=-1)
        compressed, is_ours_too = few_tokens.project(self.kv_a_proj_with_mqa, hidden_states)
        c, k_rot = compressed.split_with_sizes((self.kv_lora_rank, self.qk_rope_head_dim), dim=-1)
        interleaved = bool(self.config.rope_interleave)
        if is_ours and is_ours_too and small.takes_rotation(q_rot, k_rot, *position_embeddings):
            small.rotate_(q_rot, k_rot, *position_embeddings, interleaved)
        else:
            rotate = apply_rotary_pos_emb_interleave if interleaved else apply_rotary_pos_emb
            q_rot, k_rot = rotate(q_rot, k_rot[:, :, None], *position_embeddings, unsqueeze_dim=2)
            k_rot = k_rot[:, :, 0]
        return q_nope, q_rot, self.kv_a_layernorm(c), k_rot

    def _store(self, cache: Cache | None, c: Tensor, k_rot: Tensor) -> _Stored:
        if cache is not None:
            keys, values = c.unsqueeze(1), k_rot.unsqueeze(1)
            layer = cache.layers[self.layer_idx] if self.layer_idx < len(cache.layers) else None
            if isinstance(layer, LatentLayer) and not cache.offloading:
                layer.append(keys, values)

                def read(start: int, stop: int) -> tuple[Tensor, Tensor]:
                    keys, values = layer.latents(start, stop)
                    return keys.select(1, 0), values.select(1, 0)

                codes = layer if isinstance(layer, Int8LatentLayer) else None
                return _Stored(layer.get_seq_length(), read, codes)
            keys, values = cache.update(keys, values, self.layer_idx)
            c, k_rot = keys.select(1, 0), values.select(1, 0)
        return _Stored(c.shape[1], lambda start, stop: (c[:, start:stop], k_rot[:, start:stop]))

    def _attend(self, q_nope: Tensor, q_rot: Tensor, stored: _Stored, mask: Tensor | None) -> Tensor:
        """[b, q, heads, nope], [b, q, heads, rotary] -> [b, q, heads, value]."""
        num_queries, num_keys = q_nope.shape[1], stored.num_keys
        value_dim = cast(int, self.v_head_dim)
        kv_b = few_tokens.plain_weight(self.kv_b_proj, q_nope)
        # An adapted, quantised or offloaded kv_b_proj shows its matrix by what it makes of the identity's rows, unless a
        # hook looks at the rows first: PEFT's chooses an adapter for each row of a batch.
        sees_rows = kv_b is None and len(self.kv_b_proj._forward_pre_hooks) > 0
        num_unfolded = self.kv_lora_rank if kv_b is None else 0
        sizes = self.kv_lora_rank, self.qk_nope_head_dim, value_dim
        if sees_rows or not mla.absorbs(num_queries, num_keys, *sizes, num_unfolded):
            query = torch.cat((q_nope, q_rot), dim=-1).transpose(1, 2)

            def expand(latents: Tensor) -> Tensor:
                return few_tokens.linear(self.kv_b_proj, latents)

            return mla.expanded(query, stored.read, num_keys, expand, self.scaling, mask, value_dim)
        if kv_b is None:
            # The last row is zero: what is made of it is a bias. Added to all keys of a head it changes no weight.
            rows = torch.eye(
                self.kv_lora_rank + 1, self.kv_lora_rank, dtype=q_nope.dtype, device=q_nope.device
            )
            rows = self.kv_b_proj(rows)
            bias = rows[-1]
            output = self._absorb(q_nope, q_rot, stored, (rows[:-1] - bias).T.contiguous(), mask)
            return output + bias.view(-1, self.qk_nope_head_dim + value_dim)[:, self.qk_nope_head_dim :]
        return self._absorb(q_nope, q_rot, stored, kv_b, mask)

    def _absorb(
        self, q_nope: Tensor, q_rot: Tensor, stored: _Stored, kv_b: Tensor, mask: Tensor | None
    ) -> Tensor:
        """`_attend` in the space of latents, with the matrix [heads * (nope + value), rank]."""
        num_queries, num_keys = q_nope.shape[1], stored.num_keys
        value_dim = cast(int, self.v_head_dim)
        if num_queries <= _FEW_QUERIES:
            if stored.codes is not None:
                codes, scales = stored.codes.codes, stored.codes.scales
                if cpu_mla.takes(q_nope, codes, kv_b):
                    return cpu_mla.decode_int8(
                        q_nope, q_rot, codes, scales, kv_b, self.scaling, mask, v_head_dim=value_dim
                    )
            else:
                c, k_rot = stored.read(0, num_keys)
                if cpu_mla.takes(q_nope, c, kv_b):
                    return cpu_mla.decode(
                        q_nope, q_rot, c, k_rot, kv_b, self.scaling, mask, v_head_dim=value_dim
                    )
        return mla.absorbed(
            q_nope.transpose(1, 2),
            q_rot.transpose(1, 2),
            stored.read,
            num_keys,
            kv_b,
            self.scaling,
            mask,
            value_dim,
        )
