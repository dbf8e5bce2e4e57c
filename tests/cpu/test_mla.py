"""The CPU kernel against the textbook, with expanded keys and values in float64, and against upstream's own module."""

from __future__ import annotations

import ctypes
import math
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DynamicCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    apply_rotary_pos_emb_interleave,
)

from transformers_k2.cpu import mla

pytestmark = pytest.mark.skipif(not mla.available(), reason="there is no C compiler")


class Sizes(NamedTuple):
    nope: int
    rotary: int
    latent: int
    value: int


K2 = Sizes(128, 64, 512, 128)
AWKWARD = (Sizes(20, 12, 24, 28), Sizes(3, 1, 70, 5), Sizes(50, 66, 100, 61))
DTYPES = (torch.float32, torch.bfloat16)


class Inputs(NamedTuple):
    """What `decode` takes, K2's distribution: scores of a few units, latents as after a norm."""

    q_nope: Tensor
    q_rot: Tensor
    latents: Tensor
    rotary: Tensor
    kv_b: Tensor
    scaling: float


def make(
    batch: int,
    num_queries: int,
    num_heads: int,
    num_tokens: int,
    sizes: Sizes = K2,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    query = torch.randn(batch, num_queries, num_heads, sizes.nope + sizes.rotary) * 2
    cache = torch.randn(batch, num_tokens, sizes.latent + sizes.rotary)
    kv_b = torch.randn(num_heads * (sizes.nope + sizes.value), sizes.latent) * sizes.latent**-0.5
    query, cache, kv_b = query.to(dtype), cache.to(dtype), kv_b.to(dtype)
    return Inputs(
        *query.split((sizes.nope, sizes.rotary), dim=-1),
        *cache.split((sizes.latent, sizes.rotary), dim=-1),
        kv_b,
        (sizes.nope + sizes.rotary) ** -0.5,
    )


def decode(inputs: Inputs, mask: Tensor | None = None) -> Tensor:
    return mla.decode(*inputs, mask, v_head_dim=value_dim(inputs))


def value_dim(inputs: Inputs) -> int:
    return inputs.kv_b.shape[0] // inputs.q_nope.shape[2] - inputs.q_nope.shape[3]


def causal(num_queries: int, num_tokens: int) -> Tensor:
    last = num_tokens - num_queries + torch.arange(num_queries)[:, None]
    return (torch.arange(num_tokens) <= last)[None, None]


def textbook(inputs: Inputs, mask: Tensor | None = None) -> Tensor:
    """In float64, one query and one head at a time."""
    q_nope, q_rot, latents, rotary, kv_b = (part.double() for part in inputs[:5])
    batch, num_queries, num_heads, nope = q_nope.shape
    num_tokens = latents.shape[1]
    if mask is None:
        mask = causal(num_queries, num_tokens)
    bias = torch.where(mask, 0.0, -math.inf) if mask.dtype == torch.bool else mask
    bias = bias.double().expand(batch, num_heads, num_queries, num_tokens)
    out = q_nope.new_zeros(batch, num_queries, num_heads, value_dim(inputs))
    for b in range(batch):
        kv = (latents[b] @ kv_b.T).view(num_tokens, num_heads, -1)
        for head in range(num_heads):
            key, value = kv[:, head, :nope], kv[:, head, nope:]
            for i in range(num_queries):
                scores = (key @ q_nope[b, i, head] + rotary[b] @ q_rot[b, i, head]) * inputs.scaling
                scores = scores + bias[b, head, i]
                if (scores > -math.inf).any():
                    weights = torch.exp(scores - scores.max())
                    out[b, i, head] = weights @ value / weights.sum()
    return out


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Within a few float32 roundings of sums of hundreds of numbers, or one rounding to bfloat16."""
    tolerance = 2e-6 if actual.dtype == torch.float32 else 2**-8
    assert actual.isfinite().all()
    error = (actual.double() - expected).abs().max()
    assert error <= tolerance * max(expected.abs().max().item(), 1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 2, 47, 48, 49, 63, 64, 65, 1000])
def test_every_length_of_the_cache(num_tokens: int, dtype: torch.dtype) -> None:
    inputs = make(1, 1, 5, num_tokens, dtype=dtype)
    assert_close(decode(inputs), textbook(inputs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", AWKWARD)
@pytest.mark.parametrize("num_heads", range(1, 9))
def test_sizes_that_no_vector_divides(num_heads: int, sizes: Sizes, dtype: torch.dtype) -> None:
    inputs = make(3, 2, num_heads, 101, sizes, dtype)
    assert_close(decode(inputs), textbook(inputs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_queries", [1, 2, 3, 4, 5, 16, 20])
def test_several_queries_see_their_past(num_queries: int, dtype: torch.dtype) -> None:
    inputs = make(2, num_queries, 7, 130, AWKWARD[0], dtype)
    assert_close(decode(inputs), textbook(inputs))


def test_more_queries_than_tokens() -> None:
    inputs = make(1, 5, 2, 3, AWKWARD[0])
    out = decode(inputs)
    assert_close(out, textbook(inputs))
    assert (out[:, :2] == 0).all()
    assert (out[:, 2:] != 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_of_k2(dtype: torch.dtype) -> None:
    inputs = make(1, 2, 64, 100, dtype=dtype)
    assert_close(decode(inputs), textbook(inputs))


def test_many_chunks() -> None:
    inputs = make(1, 1, 2, 20_000, AWKWARD[0])
    assert_close(decode(inputs), textbook(inputs))


def test_scores_far_apart() -> None:
    """Weights from 1 to far below the smallest number, and a maximum that comes late."""
    inputs = make(1, 1, 3, 500, AWKWARD[0])
    inputs.latents[0, 450] *= 30
    inputs = inputs._replace(scaling=20.0)
    assert_close(decode(inputs), textbook(inputs))


def masks(batch: int, num_heads: int, num_queries: int, num_tokens: int) -> dict[str, Tensor]:
    """Masks by name. In "some rows" a row of scores is hidden as a whole."""
    padding = torch.arange(num_tokens) >= torch.arange(batch)[:, None] * 60
    random = torch.rand(batch, 1, num_queries, num_tokens) < 0.5
    rows = random.clone()
    rows[0, :, 0] = False
    tail = (torch.arange(num_tokens) < 70).expand(1, 1, num_queries, -1)
    added = torch.randn(batch, 1, num_queries, num_tokens)
    return {
        "left padding": padding[:, None, None] & causal(num_queries, num_tokens),
        "random": random,
        "some rows": rows,
        "all": torch.zeros(1, 1, 1, num_tokens, dtype=torch.bool),
        "long tail": tail,
        "by head": torch.rand(batch, num_heads, num_queries, num_tokens) < 0.5,
        "strided": torch.rand(batch, 1, num_tokens, num_queries).mT < 0.5,
        "added": added,
        "added -inf": added.masked_fill(~rows, -math.inf),
        "added bfloat16": torch.where(random, 0.0, torch.finfo(torch.bfloat16).min).to(torch.bfloat16),
    }


@pytest.mark.parametrize("name", masks(1, 1, 1, 1))
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks(name: str, dtype: torch.dtype) -> None:
    inputs = make(3, 4, 3, 200, AWKWARD[0], dtype)
    mask = masks(3, 3, 4, 200)[name]
    out, expected = decode(inputs, mask), textbook(inputs, mask)
    assert_close(out, expected)
    assert ((out == 0) == (expected == 0)).all()


def test_hidden_tokens_are_not_read() -> None:
    """A static cache's tail may hold anything."""
    inputs = make(1, 1, 2, 400, AWKWARD[0])
    mask = (torch.arange(400) < 100)[None, None, None]
    expected = textbook(inputs, mask)
    inputs.latents[:, 150:] = math.nan
    assert_close(decode(inputs, mask), expected)


@pytest.mark.parametrize("where", ["q_nope", "q_rot", "latents", "rotary", "kv_b"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_propagates(where: str, value: float, dtype: torch.dtype) -> None:
    inputs = make(2, 1, 2, 120, AWKWARD[0], dtype)
    clean = decode(inputs)
    getattr(inputs, where)[..., -1, :] = value  # of kv_b: of W_UV of the last head
    out = decode(inputs)
    assert not out[:, :, 1].isfinite().all()
    if where in ("q_nope", "q_rot", "kv_b"):  # the other head knows nothing of it
        assert torch.equal(out[:, :, 0], clean[:, :, 0])


def test_any_strides() -> None:
    inputs = make(2, 3, 4, 90, AWKWARD[0])
    expected = decode(inputs)
    loose = inputs._replace(
        q_nope=inputs.q_nope.transpose(1, 2).contiguous().transpose(1, 2),
        q_rot=inputs.q_rot.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
        latents=inputs.latents.contiguous(),
        rotary=inputs.rotary.transpose(0, 1).contiguous().transpose(0, 1),
    )
    assert torch.equal(decode(loose), expected)
    buffer = torch.full((2, 128, 36), math.nan)
    buffer[:, :90] = torch.cat((inputs.latents, inputs.rotary), dim=-1)
    view = buffer[:, :90]
    assert torch.equal(decode(inputs._replace(latents=view[..., :24], rotary=view[..., 24:])), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    inputs = make(5, 2, 3, 333, AWKWARD[2], dtype)
    together = decode(inputs)
    for b in range(5):
        one = Inputs(*(part[b : b + 1] for part in inputs[:4]), inputs.kv_b, inputs.scaling)
        assert torch.equal(decode(one)[0], together[b])


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    inputs = make(2, 1, 8, 700, dtype=dtype)
    codes, scales, _ = coded(inputs)
    one = decode(inputs), decode_int8(inputs, codes, scales)
    before = torch.get_num_threads()
    for num_threads in (2, 3):
        torch.set_num_threads(num_threads)
        try:
            several = decode(inputs), decode_int8(inputs, codes, scales)
        finally:
            torch.set_num_threads(before)
        assert all(map(torch.equal, one, several))


def stock(inputs: Inputs, mask: Tensor | None = None) -> Tensor:
    """What transformers computes from latents in their dtype: expanded by a linear layer, then torch's attention."""
    num_heads, nope = inputs.q_nope.shape[2:]
    kv = nn.functional.linear(inputs.latents, inputs.kv_b).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    rotary = inputs.rotary[:, None].expand(-1, num_heads, -1, -1)
    key = torch.cat((kv[..., :nope], rotary), dim=-1)
    query = torch.cat((inputs.q_nope, inputs.q_rot), dim=-1).transpose(1, 2)
    out = nn.functional.scaled_dot_product_attention(
        query, key, kv[..., nope:], attn_mask=mask, scale=inputs.scaling
    )
    return out.transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_less_accurate_than_stock(dtype: torch.dtype) -> None:
    inputs = make(2, 1, 8, 500, dtype=dtype)
    expected = textbook(inputs)
    ours, theirs = (out.double() - expected for out in (decode(inputs), stock(inputs)))
    slack = 1.0 if dtype == torch.bfloat16 else 2.0  # both are off by float32's roundings, in other orders
    assert ours.abs().max() <= slack * theirs.abs().max()
    assert ours.norm() <= slack * theirs.norm()


def test_upstreams_module() -> None:
    """DeepseekV3Attention's own output at its last positions, from what it caches."""
    config = DeepseekV3Config(
        hidden_size=72,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=24,
        qk_nope_head_dim=20,
        qk_rope_head_dim=12,
        v_head_dim=28,
        attn_implementation="sdpa",
    )
    module = DeepseekV3Attention(config, layer_idx=0).eval()
    module.o_proj = nn.Identity()
    hidden, angle = torch.randn(2, 150, 72), torch.rand(1, 150, 6).repeat(1, 1, 2)
    rotation = angle.cos(), angle.sin()
    cache = DynamicCache()
    with torch.no_grad():
        expected = module(hidden, rotation, None, past_key_values=cache)[0]
        query = module.q_proj(hidden).view(2, 150, 4, 32)
        q_rot, _ = apply_rotary_pos_emb_interleave(
            query[..., 20:], query[..., 20:], *rotation, unsqueeze_dim=2
        )
        layer = cache.layers[0]
        latents, rotary = layer.keys[:, 0], layer.values[:, 0]
        inputs = query[:, -9:, :, :20], q_rot[:, -9:], latents, rotary, module.kv_b_proj.weight
        out = mla.decode(*inputs, module.scaling, v_head_dim=28)
    torch.testing.assert_close(out.flatten(2), expected[:, -9:], rtol=1e-5, atol=1e-6)


def test_exponential() -> None:
    """One-hot latents show the weights themselves: e to the power of the scores, the largest of which is zero."""
    num_rows, num = 200, 40
    scores = -torch.rand(num_rows, num) * torch.logspace(-3, 2.1, num_rows)[:, None]
    scores[:, 7] = 0
    inputs = Inputs(
        q_nope=torch.zeros(num_rows, 1, 1, 1),
        q_rot=torch.ones(num_rows, 1, 1, 1),
        latents=torch.eye(num).expand(num_rows, -1, -1),
        rotary=scores[..., None],
        kv_b=torch.cat((torch.zeros(1, num), torch.eye(num))),
        scaling=1.0,
    )
    weights = decode(inputs)[:, 0, 0].double()
    expected = torch.exp(scores.double())
    assert (weights > 0).any(0).all()
    # Half a unit in the last place, and as much for the quotient of both numbers.
    torch.testing.assert_close(weights / weights[:, 7:8], expected, rtol=3 * 2**-24, atol=2e-38)


def coded(inputs: Inputs) -> tuple[Tensor, Tensor, Inputs]:
    """Codes, scales, and inputs that have what these stand for, in float64."""
    codes, scales, values = [], [], []
    for part in (inputs.latents.double(), inputs.rotary.double()):
        for group in part.split(64, dim=-1):
            scale = (group.abs().amax(-1, keepdim=True) / 127).float()
            codes.append(torch.round(group / scale).to(torch.int8))
            scales.append(scale)
            values.append(codes[-1] * scale.double())
    all_values = torch.cat(values, dim=-1)
    width = inputs.latents.shape[-1]
    exact = inputs._replace(latents=all_values[..., :width], rotary=all_values[..., width:])
    return torch.cat(codes, dim=-1), torch.cat(scales, dim=-1), exact


def decode_int8(inputs: Inputs, codes: Tensor, scales: Tensor, mask: Tensor | None = None) -> Tensor:
    rest = codes, scales, inputs.kv_b, inputs.scaling, mask
    return mla.decode_int8(inputs.q_nope, inputs.q_rot, *rest, v_head_dim=value_dim(inputs))


def assert_close_int8(actual: Tensor, expected: Tensor) -> None:
    """Queries and weights are integers of 16 bits: a tenth of what rounding to bfloat16 costs."""
    tolerance = 3e-4 if actual.dtype == torch.float32 else 2**-8 + 3e-4
    error = actual.double() - expected
    assert actual.isfinite().all()
    assert error.abs().max() <= tolerance * expected.abs().max()
    if actual.dtype == torch.float32:
        assert error.norm() <= 2.5e-4 * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((1, 1, 8, 1), K2),
        ((1, 1, 8, 1000), K2),
        ((1, 2, 64, 100), K2),
        *(((3, 2, num_heads, 131), AWKWARD[num_heads % 3]) for num_heads in range(1, 9)),
        ((2, 20, 3, 65), AWKWARD[1]),
    ],
)
def test_int8(shape: tuple[int, int, int, int], sizes: Sizes, dtype: torch.dtype) -> None:
    inputs = make(*shape, sizes, dtype)
    codes, scales, exact = coded(inputs)
    assert_close_int8(decode_int8(inputs, codes, scales), textbook(exact))


@pytest.mark.parametrize("name", masks(1, 1, 1, 1))
def test_int8_masks(name: str) -> None:
    inputs = make(3, 4, 3, 200, AWKWARD[2])
    codes, scales, exact = coded(inputs)
    mask = masks(3, 3, 4, 200)[name]
    assert_close_int8(decode_int8(inputs, codes, scales, mask), textbook(exact, mask))


def test_int8_small_weights_beside_a_large_one() -> None:
    """A sink takes half of the weight; the thousands that share the other half do not vanish."""
    inputs = make(1, 1, 2, 5000, K2)
    inputs.q_nope.mul_(0.02)
    inputs.q_rot.zero_()
    inputs.latents[:, 0] = 0  # its value is zero
    inputs.q_rot[..., 0] = 1.0
    inputs.rotary[..., 0] = 0
    inputs.rotary[:, 0, 0] = math.log(5000) / inputs.scaling
    inputs.latents[:, 1:] += 1.0
    codes, scales, exact = coded(inputs)
    assert_close_int8(decode_int8(inputs, codes, scales), textbook(exact))


@pytest.mark.parametrize("where", ["query", "latent scale", "rotary scale"])
def test_int8_nan_propagates(where: str) -> None:
    inputs = make(2, 1, 2, 120, AWKWARD[0])
    codes, scales, _ = coded(inputs)
    {"query": inputs.q_nope, "latent scale": scales[..., :1], "rotary scale": scales[..., 1:]}[where][1] = (
        math.nan
    )
    out = decode_int8(inputs, codes, scales)
    assert out[1].isnan().any(-1).all()
    assert out[0].isfinite().all()


def test_int8_of_views() -> None:
    inputs = make(2, 1, 3, 100, AWKWARD[2])
    codes, scales, _ = coded(inputs)
    code_buffer, scale_buffer = torch.zeros(2, 128, codes.shape[-1], dtype=torch.int8), torch.zeros(2, 160, 4)
    code_buffer[:, :100], scale_buffer[:, :100] = codes, scales
    loose = decode_int8(inputs, code_buffer[:, :100], scale_buffer[:, :100])
    assert torch.equal(loose, decode_int8(inputs, codes, scales))


def test_takes() -> None:
    inputs = make(1, 1, 2, 5, AWKWARD[0])
    query, latents, kv_b = inputs.q_nope, inputs.latents, inputs.kv_b
    codes = latents.to(torch.int8)
    assert mla.takes(query, latents, kv_b)
    assert mla.takes(query, codes, kv_b)
    assert not mla.takes(query.double(), latents.double(), kv_b.double())
    assert not mla.takes(query, latents.bfloat16(), kv_b)
    assert not mla.takes(query, latents, kv_b.bfloat16())
    assert not mla.takes(query, latents, kv_b.T.contiguous().T)
    assert not mla.takes(query.mT.contiguous().mT, latents, kv_b)
    assert not mla.takes(query.to("meta"), latents.to("meta"), kv_b.to("meta"))
    kv_b.requires_grad_()
    assert not mla.takes(query, latents, kv_b)
    with torch.no_grad():
        assert mla.takes(query, latents, kv_b)


def test_errors() -> None:
    inputs = make(2, 1, 2, 5, AWKWARD[0])
    with pytest.raises(
        ValueError, match=r"q_rot is torch.float32 \[2, 1, 1, 12\].*expected.*\[2, 1, 2, 12\]"
    ):
        decode(inputs._replace(q_rot=inputs.q_rot[:, :, :1]))
    with pytest.raises(ValueError, match=r"The rotary part is torch.bfloat16"):
        decode(inputs._replace(rotary=inputs.rotary.bfloat16()))
    with pytest.raises(ValueError, match="expected bfloat16 or float32"):
        decode(Inputs(*(part.double() for part in inputs[:5]), 1.0))
    with pytest.raises(ValueError, match="expected one token at least"):
        decode(inputs._replace(latents=inputs.latents[:, :0], rotary=inputs.rotary[:, :0]))
    with pytest.raises(ValueError, match="strides"):
        decode(inputs._replace(latents=inputs.latents.mT.contiguous().mT))
    with pytest.raises(ValueError, match="kv_b has strides"):
        decode(inputs._replace(kv_b=inputs.kv_b.repeat(1, 2)[:, :24]))
    with pytest.raises(ValueError, match=r"mask is \[1, 1, 1, 4\].*expected \[2, 2, 1, 5\]"):
        decode(inputs, torch.ones(1, 1, 1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask is torch.int64"):
        decode(inputs, torch.ones(1, 1, 1, 5, dtype=torch.int64))
    codes, scales, _ = coded(inputs)
    with pytest.raises(ValueError, match=r"scales is torch.bfloat16"):
        decode_int8(inputs, codes, scales.bfloat16())
    with pytest.raises(ValueError, match=r"scales is .*expected torch.float32 \[2, 5, 2\]"):
        decode_int8(inputs, codes, scales[..., :1])
    with pytest.raises(ValueError, match=r"The latent part is torch.float32"):
        decode_int8(inputs, codes.float(), scales)


def test_compiled() -> None:
    """One graph, with any number of tokens, and the operators keep torch's rules for such."""
    inputs = make(1, 1, 2, 40, AWKWARD[0])
    codes, scales, _ = coded(inputs)

    def both(latents: Tensor, rotary: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        now = inputs._replace(latents=latents, rotary=rotary)
        return decode(now) * 2 + decode_int8(now, codes, scales)

    parts = inputs.latents, inputs.rotary, codes, scales
    with torch.no_grad():
        compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
        for num in (40, 33):
            shorter = [part[:, :num] for part in parts]
            assert torch.equal(compiled(*shorter), both(*shorter))
    tests = "test_schema", "test_faketensor"
    torch.library.opcheck(mla._decode_op, (*inputs, None, 28), test_utils=tests)
    mask = torch.ones(1, 1, 1, 40, dtype=torch.bool)
    rest = codes, scales, inputs.kv_b, inputs.scaling, mask, 28
    torch.library.opcheck(mla._decode_int8_op, (*inputs[:2], *rest), test_utils=tests)


@pytest.mark.slow
def test_without_vector_instructions(tmp_path: Path) -> None:
    """Plain C gives the same numbers, but for the order within a vector: what other CPUs get."""
    source = Path(mla.__file__).with_suffix(".c")
    path = tmp_path / "plain.so"
    flags = ["-O2", "-std=gnu11", "-shared", "-fPIC", "-Wno-psabi"]
    subprocess.run(["cc", *flags, str(source), "-o", str(path), "-lm"], check=True)
    plain = ctypes.CDLL(str(path))
    for name, (arguments, result) in mla._SIGNATURES.items():
        function = getattr(plain, name)
        function.argtypes, function.restype = arguments, result
    inputs = make(2, 3, 5, 150, AWKWARD[2])
    codes, scales, exact = coded(inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mla, "_library", lambda: plain)
        assert_close(decode(inputs), textbook(inputs))
        assert_close_int8(decode_int8(inputs, codes, scales), textbook(exact))
