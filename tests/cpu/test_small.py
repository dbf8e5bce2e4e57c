"""Norms, rotary positions and the choice of experts against transformers' modules and functions, and torch.topk."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DynamicCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3RMSNorm,
    DeepseekV3TopkRouter,
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_interleave,
)

from transformers_k2 import KimiK2ForCausalLM
from transformers_k2.cpu import library, small
from transformers_k2.few_tokens import KimiK2TopkRouter, _state

BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = [BF16, FP32]


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled once for this file, in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv(library.SWITCH, raising=False)
        forget()
        if not small.available():
            pytest.skip("no C compiler here")
        yield
    forget()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


@pytest.fixture
def portable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the same source does where vectors are shorter."""
    path = tmp_path / "portable.so"
    flags = ["-O2", "-std=gnu11", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    compiler = os.environ.get("CC", "cc").split()
    subprocess.run([*compiler, *flags, str(small.SOURCE), "-o", str(path), "-lm"], check=True)
    loaded = ctypes.CDLL(str(path))
    for name, (arguments, result) in small._SIGNATURES.items():
        getattr(loaded, name).argtypes, getattr(loaded, name).restype = arguments, result
    monkeypatch.setattr(small, "_library", lambda: loaded)


def forget() -> None:
    library._LOADED.pop(small.SOURCE, None)
    small._library.cache_clear()


def activations(*shape: int, dtype: torch.dtype) -> Tensor:
    """With a few large ones, as hidden states have them."""
    x = torch.randn(shape)
    return torch.where(torch.rand_like(x) < 0.01, 50 * x, x).to(dtype)


# Norms.


def reference_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    module = DeepseekV3RMSNorm(x.shape[-1], eps)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module(x)


def check_norm(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    for num_rows, size in ((1, 7168), (3, 1024), (40, 576), (2, 72), (1, 7), (5, 33), (1, 1)):
        x = activations(num_rows, size, dtype=dtype)
        weight = (1 + 0.2 * torch.randn(size)).to(weight_dtype)
        for scale in (1.0, 1e-4, 1e4):
            actual, expected = small.rms_norm(x * scale, weight, 1e-6), reference_norm(x * scale, weight)
            assert actual.dtype == expected.dtype
            error = (actual.double() - expected.double()).abs() / expected.double().abs().clamp(min=1e-30)
            if dtype == FP32:  # sums in another order
                assert error.max() < 2**-21
            else:  # which seldom changes the first rounding, and then by a step
                assert error.max() <= 2**-7 * 1.01
                assert (error == 0).double().mean() > 0.99 - 1 / size


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    check_norm(dtype, weight_dtype)


def test_rms_norm_of_parts_of_rows() -> None:
    wide = activations(2, 3, 100, dtype=BF16)
    weight = torch.rand(72).bfloat16()
    expected = small.rms_norm(wide[..., 9:81].contiguous(), weight, 1e-5)
    for part, value in (
        (wide[..., 9:81], expected),
        (wide.transpose(0, 1)[..., 9:81], expected.transpose(0, 1)),
        (wide[:, :1, 9:81].expand(-1, 2, -1), expected[:, :1].expand(-1, 2, -1)),
    ):
        actual = small.rms_norm(part, weight, 1e-5)
        assert torch.equal(actual, value)
        assert actual.is_contiguous()
    assert small.rms_norm(torch.zeros(0, 72), weight, 1e-6).shape == (0, 72)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_has_the_same_bits_for_any_batch_and_number_of_threads(dtype: torch.dtype) -> None:
    x, weight = activations(70, 2100, dtype=dtype), torch.rand(2100).to(dtype)
    one_by_one = torch.cat([small.rms_norm(row, weight, 1e-6) for row in x.split(1)])
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        assert torch.equal(small.rms_norm(x, weight, 1e-6), one_by_one)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_shows_what_is_not_finite(dtype: torch.dtype, value: float) -> None:
    x, weight = activations(5, 72, dtype=dtype), torch.rand(72).to(dtype)
    before = small.rms_norm(x, weight, 1e-6)
    x[1, 70], x[3, 0] = value, value
    after, expected = small.rms_norm(x, weight, 1e-6), reference_norm(x, weight)
    assert torch.equal(after.isnan(), expected.isnan())
    assert after[[1, 3]].isnan().any()
    assert torch.equal(before[[0, 2, 4]], after[[0, 2, 4]])


# Rotary positions.


def check_rotation(dtype: torch.dtype, interleaved: bool, *, num_tables: int | None = None) -> None:
    """All are parts of longer rows, of which the rest stays. Tables with unequal halves, which upstream may look at."""
    reference = apply_rotary_pos_emb_interleave if interleaved else apply_rotary_pos_emb
    for batch, num_queries, num_heads, size in (
        (1, 1, 8, 64), (3, 5, 4, 64), (2, 3, 2, 6), (1, 7, 64, 128), (2, 1, 1, 22), (2, 130, 5, 64), (1, 2, 1, 512)
    ):  # fmt: skip
        heads = activations(batch, num_queries, num_heads, 32 + size, dtype=dtype)
        compressed = activations(batch, num_queries, 40 + size, dtype=dtype)
        cos, sin = torch.randn(2, num_tables or batch, num_queries, size).to(dtype)
        query, k_rot = heads[..., 32:], compressed[..., 40:]
        expected = reference(query, k_rot[:, :, None], cos, sin, unsqueeze_dim=2)
        rests = heads[..., :32].clone(), compressed[..., :40].clone()
        assert small.takes_rotation(query, k_rot, cos, sin)
        small.rotate_(query, k_rot, cos, sin, interleaved)
        assert torch.equal(query, expected[0])
        assert torch.equal(k_rot, expected[1][:, :, 0])
        assert torch.equal(heads[..., :32], rests[0])
        assert torch.equal(compressed[..., :40], rests[1])


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotate(dtype: torch.dtype, interleaved: bool, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    check_rotation(dtype, interleaved)
    check_rotation(dtype, interleaved, num_tables=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotate_of_heads_before_queries(dtype: torch.dtype) -> None:
    query, k_rot = torch.randn(2, 4, 3, 16).to(dtype).transpose(1, 2), torch.randn(2, 3, 16).to(dtype)
    cos, sin = torch.randn(2, 2, 3, 16).to(dtype)
    expected = apply_rotary_pos_emb_interleave(query, k_rot[:, :, None], cos, sin, unsqueeze_dim=2)
    small.rotate_(query, k_rot, cos, sin, True)
    assert torch.equal(query, expected[0])
    assert torch.equal(k_rot, expected[1][:, :, 0])


def test_rotation_that_is_left_to_torch() -> None:
    query, k_rot, cos = torch.zeros(2, 3, 4, 16), torch.zeros(2, 3, 16), torch.zeros(2, 3, 16)
    assert small.takes_rotation(query, k_rot, cos, cos)
    for arguments in (
        (query.double(), k_rot.double(), cos.double(), cos.double()),
        (query, k_rot.bfloat16(), cos, cos),
        (query, k_rot, cos, cos.bfloat16()),
        (query.to("meta"), k_rot, cos, cos),
        (query, k_rot, cos, cos.to("meta")),
        (query, k_rot[:1], cos, cos),
        (query, k_rot, cos[:, :1], cos[:, :1]),
        (query, k_rot, cos, cos[:1]),
        (query[..., :15], k_rot[..., :15], cos[..., :15].contiguous(), cos[..., :15].contiguous()),
        (query, k_rot, cos.mT.contiguous().mT, cos),
        (query.mT.contiguous().mT, k_rot, cos, cos),
        (torch.zeros(1, 1, 1, 514), torch.zeros(1, 1, 514), torch.zeros(1, 1, 514), torch.zeros(1, 1, 514)),
    ):
        assert not small.takes_rotation(*arguments)
        with pytest.raises(ValueError, match=r"query torch.* sin torch.* expected one dtype"):
            small.rotate_(*arguments, True)
    with torch.enable_grad():
        assert not small.takes_rotation(query.clone().requires_grad_(), k_rot, cos, cos)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_rotates_in_place_what_is_its_own(
    tiny_model: KimiK2ForCausalLM, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token after others: as by torch's operations, and what a hook holds of a layer's output stays."""
    calls: list[Tensor] = []
    rotate = small.rotate_
    monkeypatch.setattr(small, "rotate_", lambda *given: (calls.append(given[0]), rotate(*given)))
    tiny_model.to(dtype)
    ids = torch.randint(3, tiny_model.config.vocab_size, (2, 9))

    def last_logits() -> Tensor:
        cache = DynamicCache()
        tiny_model(ids[:, :8], past_key_values=cache)
        calls.clear()
        return tiny_model(ids[:, 8:], past_key_values=cache).logits

    actual = last_logits()
    assert len(calls) == tiny_model.config.num_hidden_layers
    held: list[tuple[Tensor, Tensor]] = []
    attention = tiny_model.model.layers[0].self_attn
    for projection in (attention.q_b_proj, attention.kv_a_proj_with_mqa):
        hook = projection.register_forward_hook(lambda _, __, out: held.append((out, out.clone())))
        torch.testing.assert_close(last_logits(), actual)
        assert len(calls) == tiny_model.config.num_hidden_layers - 1
        hook.remove()
    assert len(held) == 4
    for output, before in held:
        assert torch.equal(output, before)
    monkeypatch.setattr(small, "takes_rotation", lambda *_: False)
    assert torch.equal(last_logits(), actual)
    assert not calls


# The choice of experts.


def check_routing(num_tokens: int, num_experts: int, top_k: int, normalise: bool) -> None:
    logits, bias = 4 * torch.randn(num_tokens, num_experts), torch.randn(num_experts)
    assert small.takes_routing(logits, bias)
    weights, index = small.route(logits, bias, top_k, normalise, 2.5)
    scores = logits.double().sigmoid()
    expected = scores.gather(1, torch.topk(scores + bias, top_k)[1].sort()[0])
    index, order = index.sort()
    assert torch.equal(index, torch.topk(scores + bias, top_k)[1].sort()[0])
    if normalise:
        expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(weights.gather(1, order).double(), 2.5 * expected, rtol=5e-7, atol=0)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("sizes", [(1, 384, 8), (40, 384, 8), (3, 8, 8), (5, 7, 1), (2, 1, 1), (0, 8, 2)])
def test_route(sizes: tuple[int, int, int], normalise: bool) -> None:
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        check_routing(*sizes, normalise)


def test_route_takes_parts_of_rows_and_extreme_logits() -> None:
    logits = torch.tensor([[200.0, -200.0, 0.0, 88.9, -88.9, 1.0], [-200.0] * 6])
    weights, index = small.route(logits[:, :5], torch.zeros(6)[:5], 5, False, 1.0)
    torch.testing.assert_close(weights, logits.sigmoid().gather(1, index), rtol=3e-7, atol=1e-38)
    weights, _ = small.route(logits[1:], torch.zeros(6), 3, True, 1.0)
    assert torch.equal(weights, torch.zeros(1, 3))  # nothing divided by next to nothing


def test_route_counts_nan_as_the_largest() -> None:
    logits, bias = torch.randn(4, 16), torch.zeros(16)
    logits[1, [3, 7]] = math.nan
    logits[2] = math.nan
    logits[3, 5] = math.nan
    bias[11] = -math.inf
    for top_k in (1, 3):
        weights, index = small.route(logits, bias, top_k, False, 1.0)
        expected = torch.topk(logits.sigmoid() + bias, top_k)[1]
        for row in (0, 3):
            assert set(index[row].tolist()) == set(expected[row].tolist())
        assert len(set(index[1].tolist()) & {3, 7}) == min(top_k, 2)
        assert len(set(index[2].tolist())) == top_k
        assert weights[2].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 6, 100])
def test_router(dtype: torch.dtype, num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module, with a bias in either dtype, against upstream's."""
    sizes = {
        "hidden_size": 64,
        "n_routed_experts": 24,
        "num_experts_per_tok": 4,
        "n_group": 1,
        "topk_group": 1,
    }
    config = DeepseekV3Config(**sizes)
    upstream, ours = DeepseekV3TopkRouter(config), KimiK2TopkRouter(config)
    upstream.weight.normal_()
    upstream.e_score_correction_bias.normal_(0, 0.1)
    upstream.to(dtype)
    ours.to(dtype).load_state_dict(upstream.state_dict())
    x = torch.randn(1, num_tokens, 64).to(dtype)
    expected = upstream(x)
    calls = []
    monkeypatch.setattr(
        small, "route", lambda *given, route=small.route: calls.append(given) or route(*given)
    )
    monkeypatch.setattr(_state(), "on", True)
    logits, weights, index = ours(x)
    assert len(calls) == 1
    index, order = index.sort()
    upstream_index, upstream_order = expected[2].sort()
    torch.testing.assert_close(logits, expected[0])
    assert torch.equal(index, upstream_index)
    torch.testing.assert_close(weights.gather(1, order), expected[1].gather(1, upstream_order))


# All of them.


def test_without_avx2(portable: None) -> None:
    for dtype in DTYPES:
        check_norm(dtype, dtype)
        check_rotation(dtype, True)
        check_rotation(dtype, False)
    check_routing(5, 40, 8, True)


def test_takes_nothing_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 1, 1, 16)
    calls: list[tuple[Callable[..., bool], tuple[Tensor, ...]]] = [
        (small.takes_norm, (x, x[0, 0, 0])),
        (small.takes_rotation, (x, x[0], x[0], x[0])),
        (small.takes_routing, (x[0, 0], x[0, 0, 0])),
    ]
    assert all(takes(*tensors) for takes, tensors in calls)
    monkeypatch.setenv(library.SWITCH, "0")
    forget()
    assert not any(takes(*tensors) for takes, tensors in calls)
    with pytest.raises(RuntimeError, match="not available"):
        small.rms_norm(x, x[0, 0, 0], 1e-6)
    monkeypatch.undo()
    forget()
    assert all(takes(*tensors) for takes, tensors in calls)


def test_takes_no_gradients() -> None:
    x, weight = torch.zeros(2, 16), nn.Parameter(torch.zeros(16))
    assert small.takes_norm(x, weight)
    assert not small.takes_norm(x.double(), weight)
    assert not small.takes_norm(x.to("meta"), weight)
    assert not small.takes_routing(x.bfloat16(), weight)
    with torch.enable_grad():
        assert not small.takes_norm(x, weight)
        assert not small.takes_routing(x, weight)
        assert small.takes_norm(x, weight.detach())


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_functions(dtype: torch.dtype) -> None:
    """A norm stays the kernel's; what is in place, or several results, is left to the compiler."""
    x, weight = activations(3, 72, dtype=dtype), torch.rand(72).to(dtype)
    heads = torch.zeros(1, 1, 1, 8)

    def layer(x: Tensor) -> tuple[Tensor, bool, bool]:
        assert small.takes_norm(x, weight)
        taken = small.takes_rotation(heads, heads[0], heads[0], heads[0])
        return small.rms_norm(x, weight, 1e-6), taken, small.takes_routing(heads[0, 0], heads[0, 0, 0])

    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(str(graph.graph))
        return graph.forward

    actual, *taken = torch.compile(layer, backend=backend, fullgraph=True)(x)
    assert torch.equal(actual, layer(x)[0])
    assert taken == [False, False]
    assert "transformers_k2.small_rms_norm" in graphs[0]
    operation = torch.ops.transformers_k2.small_rms_norm.default
    for arguments in ((x, weight.float(), 1e-6), (x[:, :40], weight[:40], 1e-6)):
        torch.library.opcheck(operation, arguments, test_utils=("test_schema", "test_faketensor"))


def test_errors() -> None:
    x = torch.zeros(3, 16)
    with pytest.raises(ValueError, match=r"weight torch.float32 \[15\]"):
        small.rms_norm(x, torch.ones(15), 1e-6)
    with pytest.raises(
        ValueError, match=r"x torch.float64 \[3, 16\] on cpu, .* expected bfloat16 or float32"
    ):
        small.rms_norm(x.double(), torch.ones(16), 1e-6)
    with pytest.raises(ValueError, match=r"bias torch.float32 \[15\]"):
        small.route(x, torch.ones(15), 2, True, 1.0)
    with pytest.raises(ValueError, match=r"logits torch.bfloat16 \[3, 16\]"):
        small.route(x.bfloat16(), torch.ones(16), 2, True, 1.0)
    for top_k in (0, 17):
        with pytest.raises(ValueError, match=f"top_k is {top_k}: expected 1 to 16"):
            small.route(x, torch.ones(16), top_k, True, 1.0)
