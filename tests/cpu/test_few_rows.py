"""Products of few rows against float64, torch's own bfloat16 and transformers' modules."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Experts,
    DeepseekV3MLP,
)

from transformers_k2.cpu import few_rows, library

BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = [BF16, FP32]
SHAPES = [(88, 72), (1, 1), (5, 16), (37, 3), (19, 520), (130, 2056), (6, 18432)]


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled once for this file, in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv(library.SWITCH, raising=False)
        forget()
        if not few_rows.available():
            pytest.skip("no C compiler here")
        yield
    forget()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[False, True], ids=["avx2", "bf16_instructions"])
def multiplies_bfloat16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Many rows are bfloat16 products where the CPU has instructions for them: either way runs on any CPU."""
    monkeypatch.setattr(few_rows, "has_bfloat16_instructions", lambda: request.param)
    return request.param


def forget() -> None:
    library._LOADED.pop(few_rows.SOURCE, None)
    few_rows._library.cache_clear()


def activations(num_rows: int, num_in: int, dtype: torch.dtype) -> Tensor:
    """With a few large ones, as hidden states have them."""
    x = torch.randn(num_rows, num_in)
    return torch.where(torch.rand_like(x) < 0.01, 50 * x, x).to(dtype)


def matrix(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def experts_module(num_experts: int, hidden: int, middle: int, dtype: torch.dtype) -> DeepseekV3Experts:
    config = DeepseekV3Config(
        hidden_size=hidden, moe_intermediate_size=middle, n_routed_experts=num_experts, num_experts_per_tok=2
    )
    config._experts_implementation = "eager"
    module = DeepseekV3Experts(config)
    for parameter in module.parameters():
        parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
    return module.to(dtype).requires_grad_(False)


def choices(num_tokens: int, num_experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    index = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(num_tokens)])
    return index, torch.rand(num_tokens, top_k)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 7, 16, 24, 49, 100])
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(dtype: torch.dtype, weight_dtype: torch.dtype, num_rows: int) -> None:
    for num_out, num_in in SHAPES:
        x, weight = activations(num_rows, num_in, dtype), matrix(num_out, num_in, dtype=weight_dtype)
        exact, magnitude = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
        actual = few_rows.linear(x, weight)
        assert actual.dtype == dtype
        assert actual.shape == exact.shape
        half_a_step = 2**-8 * exact.abs() if dtype == BF16 else 0
        assert ((actual.double() - exact).abs() <= half_a_step + 2e-6 * magnitude).all()
        if dtype == weight_dtype == BF16 and num_out * num_rows > 100:
            assert relative(actual, exact) <= 1.001 * relative(F.linear(x, weight), exact)


@pytest.mark.parametrize("num_rows", [1, 7, 100])
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_to_another_dtype(dtype: torch.dtype, weight_dtype: torch.dtype, num_rows: int) -> None:
    """Rounded once at the end: what float32 operands give."""
    x, weight = activations(num_rows, 520, dtype), matrix(37, 520, dtype=weight_dtype)
    exact = x.double() @ weight.double().T
    wide = few_rows.linear(x, weight, FP32)
    assert wide.dtype == FP32
    assert relative(wide, exact) < 1e-6
    narrow = few_rows.linear(x, weight, BF16)
    assert narrow.dtype == BF16
    assert relative(narrow, exact) < 1.001 * relative(exact.bfloat16(), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_rows_than_a_band(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands of 7 outputs, of which the last has fewer, and of 11 rows."""
    monkeypatch.setattr(few_rows, "_BAND", 500)
    monkeypatch.setattr(few_rows, "_ROWS_BAND", 72 * 11)
    x, weight = activations(103, 72, dtype), matrix(88, 72, dtype=BF16)
    exact = x.double() @ weight.double().T
    actual = few_rows.linear(x.view(1, 103, 72), weight)
    assert actual.shape == (1, 103, 88)
    assert relative(actual[0], exact) < (1.001 * relative(exact.bfloat16(), exact) if dtype == BF16 else 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_takes_parts_of_longer_rows(dtype: torch.dtype) -> None:
    x, weight = activations(6, 100, dtype), matrix(40, 100, dtype=dtype)
    expected = few_rows.linear(x[:, 3:75].contiguous(), weight[8:, 20:92].contiguous())
    assert few_rows.takes(x[:, 3:75], weight[8:, 20:92])
    assert torch.equal(few_rows.linear(x[:, 3:75], weight[8:, 20:92]), expected)
    assert torch.equal(
        few_rows.linear(x.view(2, 3, 100)[..., 3:75], weight[8:, 20:92]).flatten(0, 1), expected
    )
    assert torch.equal(few_rows.linear(x.T.contiguous().T[:, 3:75], weight[8:, 20:92]), expected)
    assert torch.equal(
        few_rows.linear(x.expand(12, 6, 100)[0:2, 0:1, 3:75], weight[8:, 20:92])[1, 0], expected[0]
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(dtype: torch.dtype) -> None:
    weight = matrix(8, 16, dtype=dtype)
    assert few_rows.linear(torch.zeros(0, 16, dtype=dtype), weight).shape == (0, 8)
    assert few_rows.linear(torch.zeros(2, 0, 16, dtype=dtype), weight).shape == (2, 0, 8)
    assert torch.equal(few_rows.linear(torch.zeros(2, 0), torch.zeros(3, 0)), torch.zeros(2, 3))
    stacks = torch.zeros(2, 8, 16, dtype=dtype), torch.zeros(2, 16, 4, dtype=dtype)
    index, weights = torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1)
    assert few_rows.experts(torch.zeros(0, 16, dtype=dtype), index, weights, *stacks).shape == (0, 16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_batch_and_number_of_threads(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_rows, "has_bfloat16_instructions", lambda: False)  # 24 rows are few then
    num_rows, num_in, num_out = 24, 2100, 300
    x, weight = activations(num_rows, num_in, dtype), matrix(num_out, num_in, dtype=dtype)
    stacks = matrix(9, 2 * 84, num_in, dtype=dtype), matrix(9, num_in, 84, dtype=dtype)
    index, weights = choices(num_rows, 9, 3)
    cases: list[tuple[Callable[..., Tensor], tuple[Tensor, ...], tuple[Tensor | float, ...]]] = [
        (few_rows.linear, (x,), (weight,)),
        (few_rows.gated_mlp, (x,), (stacks[0][0, :84], stacks[0][0, 84:], stacks[1][0])),
        (few_rows.experts, (x, index, weights), stacks),
    ]
    for function, of_rows, others in cases:
        one_by_one = [function(*(t[i : i + 1] for t in of_rows), *others) for i in range(num_rows)]
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            for start, end in ((0, 24), (0, 2), (3, 7), (5, 22)):
                together = function(*(t[start:end] for t in of_rows), *others)
                assert torch.equal(together, torch.cat(one_by_one[start:end])), (function, num_threads)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_seen(dtype: torch.dtype, value: float) -> None:
    x, weight = activations(5, 72, dtype), matrix(40, 72, dtype=dtype)
    before = few_rows.linear(x, weight)
    x[1, 70], x[3, 0] = value, value
    after = few_rows.linear(x, weight)
    assert not after[[1, 3]].isfinite().any()
    torch.testing.assert_close(after, F.linear(x.double(), weight.double()).to(dtype), equal_nan=True)
    assert torch.equal(before[[0, 2, 4]], after[[0, 2, 4]])
    weight[7, 3] = value
    assert not few_rows.linear(x, weight)[:, 7].isfinite().any()
    assert few_rows.linear(x, weight)[[0, 2, 4]][:, [6, 8]].isfinite().all()


@pytest.mark.parametrize("num_tokens", [1, 3, 16, 70, 300])
@pytest.mark.parametrize("sizes", [(72, 40), (64, 17), (200, 130)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts(
    dtype: torch.dtype, sizes: tuple[int, int], num_tokens: int, multiplies_bfloat16: bool
) -> None:
    """One expert has no tokens, some ids are of another process, and the last token has only such."""
    module = experts_module(7, *sizes, dtype)
    x = activations(num_tokens, sizes[0], dtype)
    index, weights = choices(num_tokens, 7, 3)
    index[index == 4] = 7
    index[-1] = 7
    exact = module.double()(x.double(), index, weights.double())
    stock = module.to(dtype)(x, index, weights.to(dtype))
    assert few_rows.takes_experts(x, module.gate_up_proj, module.down_proj, weights)
    for routing in (weights, weights.bfloat16()):
        exact = module.double()(x.double(), index, routing.double())
        module.to(dtype)
        actual = few_rows.experts(x, index, routing, module.gate_up_proj, module.down_proj)
        assert actual.dtype == dtype
        assert not actual[-1].any()
        if num_tokens == 1:
            continue
        if dtype == FP32:
            assert relative(actual, exact) < 1e-6
        else:
            assert relative(actual, exact) < relative(stock, exact)
            if not multiplies_bfloat16 or num_tokens <= few_rows.threshold(dtype):
                assert relative(actual, exact) <= 1.01 * relative(exact.bfloat16(), exact)


def test_many_tokens_of_an_expert_in_bands(
    monkeypatch: pytest.MonkeyPatch, multiplies_bfloat16: bool
) -> None:
    monkeypatch.setattr(few_rows, "_TOKENS_BAND", 50)
    module = experts_module(2, 40, 24, BF16)
    x, (index, weights) = activations(300, 40, BF16), choices(300, 2, 1)
    exact = module.double()(x.double(), index, weights.double())
    module.to(BF16)
    stock = module(x, index, weights)
    actual = few_rows.experts(x, index, weights, module.gate_up_proj, module.down_proj)
    rounded = stock if multiplies_bfloat16 else exact.bfloat16()
    assert relative(actual, exact) <= 1.02 * relative(rounded, exact)


@pytest.mark.parametrize("num_rows", [1, 4, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_mlp(dtype: torch.dtype, num_rows: int) -> None:
    module = DeepseekV3MLP(DeepseekV3Config(hidden_size=72), intermediate_size=88).to(dtype)
    module.requires_grad_(False)
    for parameter in module.parameters():
        parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
    x = activations(num_rows, 72, dtype).view(1, num_rows, 72)
    stock = module(x)
    exact = module.double()(x.double())
    module.to(dtype)
    weights = module.gate_proj.weight, module.up_proj.weight, module.down_proj.weight
    actual = few_rows.gated_mlp(x, *weights)
    assert actual.shape == x.shape
    assert actual.dtype == dtype
    assert relative(actual, exact) < (1e-6 if dtype == FP32 else 1.05 * relative(stock, exact))
    apart = [F.pad(w, (0, 5))[:, :-5] for w in weights]
    assert torch.equal(few_rows.gated_mlp(x, *apart), actual)


def test_takes() -> None:
    x, weight = torch.zeros(2, 16), nn.Parameter(torch.zeros(8, 16))
    assert not few_rows.takes(x, weight)  # its gradient may be wanted
    with torch.no_grad():
        assert few_rows.takes(x, weight)
        assert few_rows.takes(x.bfloat16(), weight.data, weight)
        assert not few_rows.takes(x.double(), weight)
        assert not few_rows.takes(x, weight.half())
        assert not few_rows.takes(x, weight.to("meta"))
        assert not few_rows.takes(x.to("meta"), weight)
        assert not few_rows.takes(x, torch.zeros(16, 8).T)
        stacks = torch.zeros(3, 8, 16), torch.zeros(3, 16, 4)
        assert few_rows.takes_experts(x, *stacks)
        assert not few_rows.takes_experts(x, stacks[0], stacks[1].bfloat16())
        assert not few_rows.takes_experts(
            x, stacks[0].transpose(0, 1).contiguous().transpose(0, 1), stacks[1]
        )
    assert few_rows.takes(x, weight.detach())
    assert not few_rows.takes(x.requires_grad_(), weight.detach())
    assert not few_rows.takes_experts(x.detach(), *stacks, torch.zeros(2, 1, requires_grad=True))


def test_takes_nothing_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.SWITCH, "0")
    forget()
    assert not few_rows.takes(torch.zeros(1, 16), torch.zeros(8, 16))
    with pytest.raises(RuntimeError, match="not available"):
        few_rows.linear(torch.zeros(1, 16), torch.zeros(8, 16))
    monkeypatch.undo()
    forget()
    assert few_rows.takes(torch.zeros(1, 16), torch.zeros(8, 16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_functions_call_the_kernel(dtype: torch.dtype) -> None:
    x, weight = activations(3, 72, dtype), matrix(40, 72, dtype=dtype)
    stacks = matrix(5, 80, 72, dtype=dtype), matrix(5, 72, 40, dtype=dtype)
    index, weights = choices(3, 5, 2)

    def layer(x: Tensor) -> tuple[Tensor, ...]:
        assert few_rows.takes(x, weight)
        assert few_rows.takes_experts(x, *stacks)
        mlp = few_rows.gated_mlp(x, stacks[0][0, :40], stacks[0][0, 40:], stacks[1][0])
        logits = few_rows.linear(x, weight, torch.float32)
        return few_rows.linear(x, weight), logits, mlp + 1, few_rows.experts(x, index, weights, *stacks)

    expected = layer(x)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(str(graph.graph))
        return graph.forward

    for actual, value in zip(torch.compile(layer, backend=backend, fullgraph=True)(x), expected, strict=True):
        assert torch.equal(actual, value)
    for name in ("linear", "gated_mlp", "experts"):
        assert f"transformers_k2.few_rows_{name}" in graphs[0]
    for actual, value in zip(
        torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)(x), expected, strict=True
    ):
        assert torch.equal(actual, value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_custom_operations_keep_their_word(dtype: torch.dtype) -> None:
    ops = torch.ops.transformers_k2
    x, weight = activations(3, 16, dtype), matrix(8, 16, dtype=BF16)
    index, weights = choices(3, 2, 1)
    stacks = matrix(2, 8, 16, dtype=dtype), matrix(2, 16, 4, dtype=dtype)
    for operation, arguments in (
        (ops.few_rows_linear, (x, weight)),
        (ops.few_rows_linear, (x, weight, FP32)),
        (ops.few_rows_gated_mlp, (x, stacks[0][0, :4], stacks[0][0, 4:], stacks[1][0])),
        (ops.few_rows_experts, (x, index, weights, *stacks)),
    ):
        torch.library.opcheck(operation.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_without_avx2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the same source does where vectors are shorter."""
    path = tmp_path / "portable.so"
    flags = ["-O2", "-std=gnu11", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    compiler = os.environ.get("CC", "cc").split()
    subprocess.run([*compiler, *flags, str(few_rows.SOURCE), "-o", str(path), "-lm"], check=True)
    portable, loaded = ctypes.CDLL(str(path)), few_rows._kernel()
    for name in few_rows._SIGNATURES:
        getattr(portable, name).argtypes = getattr(loaded, name).argtypes
        getattr(portable, name).restype = getattr(loaded, name).restype
    monkeypatch.setattr(few_rows, "_library", lambda: portable)
    for dtype in DTYPES:
        module, x = experts_module(5, 72, 40, dtype), activations(5, 72, dtype)
        index, weights = choices(5, 5, 2)
        exact = module.double()(x.double(), index, weights.double())
        module.to(dtype)
        actual = few_rows.experts(x, index, weights, module.gate_up_proj, module.down_proj)
        tolerance = 1e-6 if dtype == FP32 else 1.05 * relative(exact.bfloat16(), exact)
        assert relative(actual, exact) < tolerance


def test_errors() -> None:
    x, weight = torch.zeros(3, 16), torch.zeros(8, 16)
    with pytest.raises(
        ValueError, match=r"x torch.float64 \[3, 16\] on cpu, .* expected bfloat16 or float32"
    ):
        few_rows.linear(x.double(), weight)
    with pytest.raises(ValueError, match=r"weight torch.float32 \[8, 15\]"):
        few_rows.linear(x, weight[:, :15])
    with pytest.raises(ValueError, match="on meta"):
        few_rows.linear(x.to("meta"), weight)
    with pytest.raises(ValueError, match="weight has strides"):
        few_rows.linear(x, torch.zeros(16, 8).T)
    with pytest.raises(ValueError, match=r"out_dtype is torch.float16"):
        few_rows.linear(x, weight, torch.float16)
    with pytest.raises(ValueError, match=r"down torch.float32 \[8, 16\]"):
        few_rows.gated_mlp(x, weight, weight, weight)
    stacks, (index, weights) = (torch.zeros(5, 8, 16), torch.zeros(5, 16, 4)), choices(3, 5, 2)
    for num_tokens in (3, 300):
        tokens = x[:1].expand(num_tokens, 16)
        chosen = index[:1].repeat(num_tokens, 1)
        chosen[-1, 0] = -1
        with pytest.raises(ValueError, match="negative"):
            few_rows.experts(tokens, chosen, weights[:1].repeat(num_tokens, 1), *stacks)
    with pytest.raises(ValueError, match=r"index torch.int32"):
        few_rows.experts(x, index.int(), weights, *stacks)
    with pytest.raises(ValueError, match=r"weights torch.float32 \[2, 2\]"):
        few_rows.experts(x, index, weights[:2], *stacks)
    with pytest.raises(ValueError, match=r"in one dtype"):
        few_rows.experts(x, index, weights, stacks[0].bfloat16(), stacks[1])
