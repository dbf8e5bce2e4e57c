"""YaRN as published (arXiv 2309.00071, sections 3.2 to 3.4), written out in float64, against what the model computes.

The paper gives the share of the original frequency as a ramp over r, the number of turns a dimension makes within the
original context: none of it below beta_slow, all of it above beta_fast. Between the two the authors' code, and
DeepSeek's and Kimi's after it, run the ramp over the dimension's index; so does this file, its ends found from r.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

from transformers_k2 import KimiK2Config, KimiK2ForCausalLM, resources

THETA, ORIGINAL = 50000.0, 4096
POSITIONS = [0, 1, 2, 4095, 4096, 4097, 31337, 65537, 99991, 131071, 131072, 200003, 262143]
PUBLISHED = [(32.0, 1.0, 131072), (64.0, 1.0, 262144), (64.0, 32.0, 262144), (32.0, 32.0, 131072)]


def yarn(factor: float, beta_fast: float, beta_slow: float = 1.0) -> dict:
    scaling = {"type": "yarn", "factor": factor, "beta_fast": beta_fast, "beta_slow": beta_slow}
    return scaling | {"mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": ORIGINAL}


def frequencies(dim: int, factor: float, beta_fast: float, beta_slow: float = 1.0) -> np.ndarray:
    """theta'_i for i < dim / 2, in float64."""

    def turns(index: int) -> float:  # r(d) = L / lambda_d
        return ORIGINAL * THETA ** (-2 * index / dim) / (2 * math.pi)

    last_kept = max(index for index in range(dim) if turns(index) >= beta_fast)
    first_stretched = next(index for index in itertools.count() if turns(index) <= beta_slow)
    index = np.arange(dim // 2)
    kept = 1 - np.clip((index - last_kept) / (first_stretched - last_kept), 0, 1)
    plain = THETA ** (-2.0 * index / dim)
    return (1 - kept) * plain / factor + kept * plain


def mscale(factor: float) -> float:
    """sqrt(1 / t) of equation 22."""
    return 0.1 * math.log(factor) + 1


@pytest.mark.parametrize(("factor", "beta_fast", "length"), PUBLISHED)
def test_frequencies_and_scaling(factor: float, beta_fast: float, length: int) -> None:
    config = KimiK2Config(
        rope_scaling=yarn(factor, beta_fast),
        rope_theta=THETA,
        max_position_embeddings=length,
        num_hidden_layers=1,
    )
    rope = DeepseekV3RotaryEmbedding(config)
    wanted = frequencies(64, factor, beta_fast)
    assert rope.inv_freq.shape == (32,)
    np.testing.assert_allclose(rope.inv_freq.double().numpy(), wanted, rtol=5e-7)  # a few float32 roundings
    assert (
        rope.attention_scaling == 1.0
    )  # mscale / mscale_all_dim; the square of it scales the softmax instead
    with torch.device("meta"):
        attention = DeepseekV3Attention(config, 0)
    assert attention.scaling == pytest.approx(mscale(factor) ** 2 / math.sqrt(192), rel=1e-12)


def test_the_ramp_of_the_published_sizes() -> None:
    """Dimension 64, base 50000: turns fall below 32 after index 8, below 1 after index 19."""
    plain = THETA ** (-np.arange(32) / 32)
    ratio = plain / frequencies(64, 64.0, 1.0)
    np.testing.assert_allclose(ratio, [1.0] * 20 + [64.0] * 12)  # beta_fast = beta_slow: a step
    share = (frequencies(64, 64.0, 32.0) / plain - 1 / 64) / (1 - 1 / 64)
    np.testing.assert_allclose(share[:9], 1)
    np.testing.assert_allclose(share[20:], 0, atol=1e-12)
    np.testing.assert_allclose(np.diff(share[8:21]), -1 / 12)


@pytest.mark.parametrize(("factor", "beta_fast", "length"), PUBLISHED)
def test_cos_and_sin_to_the_end_of_the_context(factor: float, beta_fast: float, length: int) -> None:
    config = KimiK2Config(
        rope_scaling=yarn(factor, beta_fast), rope_theta=THETA, max_position_embeddings=length
    )
    positions = [position for position in POSITIONS if position < length]
    cos, sin = DeepseekV3RotaryEmbedding(config)(torch.zeros(1), torch.tensor([positions]))
    angles = np.array(positions)[:, None] * frequencies(64, factor, beta_fast)
    # The angle is a float32: its frequency carries a few roundings and the product one more, each relative.
    bound = angles * 6e-7 + 1e-6
    for got, wanted in ((cos, np.cos(angles)), (sin, np.sin(angles))):
        assert got.shape == (1, len(positions), 64)
        for half in got[0].double().split(32, -1):
            assert (np.abs(half.numpy() - wanted) <= bound).all()


@pytest.mark.parametrize("by", ["attribute", "config.json", "transformers 5 name"])
def test_a_debug_size_extended_by_an_edit(by: str, tmp_path: Path) -> None:
    """The debug sizes have plain RoPE; long context is an edit of their configuration, as for the published sizes."""
    path = resources.find("configs", "debug_0_2b")
    plain = KimiK2Config.from_pretrained(path)
    assert plain.rope_parameters == {"rope_type": "default", "rope_theta": THETA}
    np.testing.assert_allclose(
        DeepseekV3RotaryEmbedding(plain).inv_freq, THETA ** (-np.arange(16) / 16), rtol=5e-7
    )
    if by == "attribute":
        config = plain
        config.rope_scaling = yarn(32.0, 32.0)
    elif by == "config.json":
        edited = json.loads(path.read_text()) | {
            "rope_scaling": yarn(32.0, 32.0),
            "max_position_embeddings": 131072,
        }
        (tmp_path / "config.json").write_text(json.dumps(edited))
        config = KimiK2Config.from_pretrained(tmp_path)
    else:
        parameters = yarn(32.0, 32.0) | {"rope_type": "yarn", "rope_theta": THETA}
        config = KimiK2Config.from_pretrained(path, rope_parameters=parameters)
    rope = DeepseekV3RotaryEmbedding(config)
    np.testing.assert_allclose(rope.inv_freq.double().numpy(), frequencies(32, 32.0, 32.0), rtol=5e-7)
    assert rope.attention_scaling == 1.0
    width = config.qk_nope_head_dim + config.qk_rope_head_dim
    assert DeepseekV3Attention(config, 0).scaling == pytest.approx(
        mscale(32.0) ** 2 / math.sqrt(width), rel=1e-12
    )


def test_plain_rope_scales_nothing() -> None:
    config = KimiK2Config(rope_theta=THETA, num_hidden_layers=1)
    with torch.device("meta"):
        assert DeepseekV3Attention(config, 0).scaling == pytest.approx(192**-0.5, rel=1e-12)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_whole_attention_layer_in_float64(attention: str, tiny_model: KimiK2ForCausalLM) -> None:
    """Latent attention by the book: pairs of neighbouring features are complex numbers turned by position x theta'."""
    tiny_model.set_attn_implementation(attention)
    config, layer = tiny_model.config, tiny_model.model.layers[1].self_attn
    heads, nope, rope, value, rank = 4, 20, 12, 28, 24
    positions = np.array([0, 1, 5, 4096, 70001, 70002, 131071])
    length = len(positions)
    hidden = torch.randn(1, length, 72)
    weight = {name: tensor.detach().double().numpy() for name, tensor in layer.named_parameters()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight[name]

    turn = np.exp(1j * positions[:, None] * frequencies(rope, 32.0, 1.0))

    def rotate(x: np.ndarray) -> np.ndarray:  # (length, ..., rope) -> complex (length, ..., rope / 2)
        return (x[..., ::2] + 1j * x[..., 1::2]) * turn.reshape(length, *[1] * (x.ndim - 2), rope // 2)

    x = hidden[0].double().numpy()
    query = norm(x @ weight["q_a_proj.weight"].T, "q_a_layernorm.weight") @ weight["q_b_proj.weight"].T
    query = query.reshape(length, heads, nope + rope)
    latent = x @ weight["kv_a_proj_with_mqa.weight"].T
    expanded = norm(latent[:, :rank], "kv_a_layernorm.weight") @ weight["kv_b_proj.weight"].T
    expanded = expanded.reshape(length, heads, nope + value)
    turned = np.einsum("qhi,ki->hqk", rotate(query[..., nope:]), rotate(latent[:, rank:]).conj()).real
    scores = np.einsum("qhi,khi->hqk", query[..., :nope], expanded[..., :nope]) + turned
    scores = scores * mscale(32.0) ** 2 / math.sqrt(nope + rope)
    scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
    share = np.exp(scores - scores.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    mixed = np.einsum("hqk,khv->qhv", share, expanded[..., nope:]).reshape(length, heads * value)
    wanted = mixed @ weight["o_proj.weight"].T

    cos_sin = tiny_model.model.rotary_emb(hidden, torch.from_numpy(positions)[None])
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    with torch.no_grad():
        got = layer(hidden, cos_sin, mask)[0]
    assert config.rope_interleave
    # Near 131072 a float32 angle is off by some thousandths.
    np.testing.assert_allclose(got[0].numpy(), wanted, rtol=0, atol=1e-3 * np.abs(wanted).max())
    near = layer(hidden[:, :3], [part[:, :3] for part in cos_sin], mask[..., :3, :3])[0]
    np.testing.assert_allclose(near[0].detach().numpy(), wanted[:3], rtol=0, atol=2e-6 * np.abs(wanted).max())
