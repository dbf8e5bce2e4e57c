"""The INT4 grid against compressed-tensors, textbook loops in float64, and torch's own fake quantisation."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as library_dequantize
from compressed_tensors.quantization.lifecycle.forward import quantize as library_quantize
from compressed_tensors.quantization.utils import calculate_qparams

from transformers_k2.quantization import int4
from transformers_k2.quantization.codecs import int4_pack

DTYPES = [torch.bfloat16, torch.float32]
GROUPS_OF_32 = QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=True)


def weights(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Real-shaped: rows of different magnitude, a few outliers, one group of zeros and one of tiny values."""
    w = 0.02 * torch.randn(shape) * torch.logspace(-2, 1, shape[-2]).unsqueeze(1)
    w.view(-1)[:: shape[-1] * 3 + 1] *= 8
    w[..., 0, :32] = 0
    w[..., -1, -32:] = 1e-37 * torch.randn(32)
    return w.to(dtype)


def bits(w: torch.Tensor) -> torch.Tensor:
    """So that equal means the same sign of zero, too."""
    return w.view(torch.uint8)


def library_values(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What published checkpoints are in the dtype of the scales, by the library that reads them: [out, in]."""
    restored = unpack_from_int32(pack_to_int32(codes, 4), 4, codes.shape)
    return library_dequantize(restored, scale, args=GROUPS_OF_32)


def textbook(w: torch.Tensor, group_size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """K2's rule, one weight after the other."""
    codes = torch.empty(w.shape, dtype=torch.int8)
    scale = torch.empty(*w.shape[:-1], w.shape[-1] // group_size, dtype=torch.bfloat16)
    for index in np.ndindex(*scale.shape):
        *row, group = index
        part = slice(group * group_size, (group + 1) * group_size)
        values = w[(*row, part)].double().numpy()
        step = torch.tensor(np.abs(values).max() / 7).bfloat16()
        scale[index] = step
        for offset, value in enumerate(values):
            code = 0 if step == 0 else round(float(value) / float(step))  # Python rounds half to even
            codes[(*row, group * group_size + offset)] = max(-7, min(7, code))
    return codes, scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "group_size"), [((5, 96), 32), ((3, 4, 64), 32), ((2, 1, 40), 8), ((2, 2, 3, 32), 32)]
)
def test_kimi_grid(shape: tuple[int, ...], group_size: int, dtype: torch.dtype) -> None:
    w = weights(*shape, dtype=dtype)
    codes, scale = int4.quantize(w, group_size)
    expected_codes, expected_scale = textbook(w, group_size)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(codes, expected_codes)
    assert codes[..., 0, :8].eq(0).all()


def test_ties_go_to_the_even_code() -> None:
    """With amax 7 the scale is 1, and the weights are their own quotients."""
    w = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -6.5, 5.5]])
    assert int4.quantize(w, 8)[0].tolist() == [[7, 0, 2, 2, 0, -2, -6, 6]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_compressed_tensors_grid(dtype: torch.dtype) -> None:
    w = weights(6, 96, dtype=dtype)
    w[-1, -32:] = 0.01 * torch.randn(32)  # the library puts a floor under scales
    arguments = GROUPS_OF_32
    groups = w.unflatten(1, (3, 32))
    library_scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    library_scale = library_scale.bfloat16()  # as stored
    expected = library_quantize(w, library_scale, zero_point, arguments, dtype=torch.int8)
    codes, scale = int4.quantize(w, convention="compressed_tensors")
    assert scale[0, 0] == 0  # there the library has its epsilon
    library_scale[0, 0] = 0
    assert torch.equal(scale, library_scale)
    assert torch.equal(codes, expected)
    assert not torch.equal(codes, int4.quantize(w)[0])


def test_bfloat16_weights_on_the_grid_stay_there() -> None:
    w = weights(64, 256)
    on_grid = int4.dequantize(*int4.quantize(w), torch.bfloat16)
    again = int4.quantize(on_grid)
    assert torch.equal(int4.dequantize(*again, torch.bfloat16), on_grid)
    assert torch.equal(again[0], int4.quantize(w)[0])


def mantissas(num_rows: int = 1) -> torch.Tensor:
    """bfloat16 scales with each of the 128 mantissas, positive: [rows, 128], magnitudes vary by row."""
    exponents = torch.randint(100, 124, (num_rows, 1), dtype=torch.int16)
    return (exponents * 128 + torch.arange(128, dtype=torch.int16)).view(torch.bfloat16)


@pytest.mark.parametrize("lowest", [-7, -8])
@pytest.mark.parametrize("largest", range(1, 9))
def test_recover_what_the_library_dequantised(largest: int, lowest: int) -> None:
    """Every mantissa of the scale, whatever the largest code of the group, in both conventions; and groups of zeros."""
    codes = torch.randint(max(lowest, -largest), min(7, largest) + 1, (6, 128 * 32), dtype=torch.int8)
    codes.view(6, 128, 32)[:, :, 5] = max(lowest, -largest)
    codes.view(6, 128, 32)[1, ::3] = 0
    w = library_values(codes, mantissas(6))
    found, scale = int4.recover(w)
    assert torch.equal(bits(int4.dequantize(found, scale, torch.bfloat16)), bits(w))
    assert torch.equal(bits(library_values(found, scale)), bits(w))
    wide = library_values(codes, mantissas(6).float())
    assert torch.equal(bits(int4.dequantize(*int4.recover(wide), wide.dtype)), bits(wide))
    chosen, rounded = int4.quantize(w)
    kept = chosen.unflatten(1, (-1, 32)).float() * rounded.float().unsqueeze(-1)
    kept = kept.bfloat16().eq(w.unflatten(1, (-1, 32))).all(-1)
    assert torch.equal(scale[kept], rounded[kept])
    assert torch.equal(found.unflatten(1, (-1, 32))[kept], chosen.unflatten(1, (-1, 32))[kept])
    if largest in (3, 5, 6, 7):  # those that quantize rounds are the reason for recover
        assert not kept.all()


@pytest.mark.parametrize("convention", list(int4.CONVENTIONS))
def test_recover_scales_of_float32_masters(convention: str) -> None:
    """Scales as bf16(amax / 7) of weights that were never bfloat16, a layer of experts, more than a band."""
    w = weights(3, 400, 512, dtype=torch.float32)
    codes, scale = int4.quantize(w, convention=convention)
    served = int4.dequantize(codes, scale, torch.bfloat16)
    again, steps = int4.recover(served)
    assert torch.equal(bits(int4.dequantize(again, steps, torch.bfloat16)), bits(served))
    assert not torch.equal(int4.dequantize(*int4.quantize(served), torch.bfloat16), served)
    noncontiguous = served.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(int4.recover(noncontiguous)[0], again)


def test_recover_among_subnormals() -> None:
    """All groups whose scale is one of the smallest numbers of bfloat16 up to amax 7.8e-38, where steps are coarse."""
    scale = torch.cat([torch.arange(1, 300), torch.arange(300, 1000, 7)]).to(torch.int16).view(torch.bfloat16)
    codes = torch.cat(
        [torch.randint(-k, min(k, 7) + 1, (len(scale), 32), dtype=torch.int8) for k in range(1, 9)]
    )
    w = (codes.double() * scale.double().repeat(8).unsqueeze(1)).bfloat16()
    assert w.float().abs().max() > 7.8e-38
    found, steps = int4.recover(w)
    assert torch.equal(bits(int4.dequantize(found, steps, torch.bfloat16)), bits(w))


def test_recover_accepts_both_zeros() -> None:
    w = int4.dequantize(*int4.quantize(weights(4, 64)), torch.bfloat16)
    negative = torch.where(w == 0, -0.0, w)
    assert not torch.equal(bits(negative), bits(w))
    assert torch.equal(int4.recover(negative)[0], int4.recover(w)[0])


def test_recover_names_what_is_on_no_grid() -> None:
    w = int4.dequantize(*int4.quantize(weights(3, 400, 512)), torch.bfloat16)
    w[0, 7, 40] *= 1.3
    w[0, 7, 500] *= 1.3
    w[2, 399, 0] = 1.7 * w[2, 399, :32].abs().max()
    message = (
        r"\[3, 400, 512\] has 3 groups of 32 weights .* in 2 of 1200 rows \(\[0, 7\], \[2, 399\]\): expected"
    )
    with pytest.raises(ValueError, match=message):
        int4.recover(w)
    with pytest.raises(
        ValueError, match=r"128 groups .* in 8 of 8 rows \(\[0\], \[1\], \[2\], \[3\], \.\.\.\)"
    ):
        int4.recover(torch.randn(8, 512).bfloat16())


@pytest.mark.parametrize("function", [int4.quantize, int4.recover])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_weights_that_are_not_finite(function: Callable[..., Any], dtype: torch.dtype) -> None:
    w = int4.dequantize(*int4.quantize(weights(2, 700, 96, dtype=dtype)), dtype)
    w[0, 3, 95], w[1, 699, 0], w[1, 699, 1] = math.nan, math.inf, -math.inf
    with pytest.raises(
        ValueError, match=r"^\[2, 700, 96\] has 3 weights .* finite, in rows \[0, 3\], \[1, 699\]: "
    ):
        function(w)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("convention", list(int4.CONVENTIONS))
def test_fake_quantize_shows_weights_that_are_not_finite(convention: str, bad: float) -> None:
    w = weights(4, 96)
    expected = int4.fake_quantize(w, convention=convention)
    w[2, 40] = bad
    out = int4.fake_quantize(w, convention=convention)
    assert out[2, 40].isnan()
    assert out.isnan().sum() == 32
    assert torch.equal(out[out.isfinite()], expected[out.isfinite()])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_dequantize_is_what_the_decoder_of_checkpoints_computes(dtype: torch.dtype) -> None:
    codes = torch.randint(-8, 8, (3, 300, 96), dtype=torch.int8)
    scale = torch.rand(3, 300, 3).bfloat16()
    out = int4.dequantize(codes, scale, dtype)
    assert torch.equal(out, (codes.double() * scale.double().repeat_interleave(32, -1)).to(dtype))
    if dtype is not torch.float64:
        assert torch.equal(out[1], int4_pack.decode(pack_to_int32(codes[1], 4), scale[1], dtype))


@pytest.mark.parametrize("shape", [(4, 32), (3, 5, 64), (1, 9), (2, 7), (1, 1), (2, 3, 1, 40), (0, 8)])
def test_packing(shape: tuple[int, ...]) -> None:
    codes = torch.randint(-8, 8, shape, dtype=torch.int8)
    packed = int4.pack(codes)
    if shape[0]:
        assert torch.equal(packed, pack_to_int32(codes, 4))
        assert torch.equal(unpack_from_int32(packed, 4, codes.shape), codes)
    assert packed.shape == (*shape[:-1], -(-shape[-1] // 8))
    assert torch.equal(int4.unpack(packed, shape[-1]), codes)


def test_packing_of_every_pair_of_codes() -> None:
    """In each of the four bytes of an int32, the sign bit among them."""
    values = torch.arange(-8, 8, dtype=torch.int8)
    pairs = torch.cartesian_prod(values, values)
    codes = torch.cat([pairs.roll(shift, 0) for shift in range(4)]).view(4, 512)
    packed = pack_to_int32(codes, 4)
    assert torch.equal(int4.pack(codes), packed)
    assert torch.equal(int4.unpack(packed, 512), codes)
    assert int4.pack(values.view(2, 8)).flatten().tolist() == [0x76543210, 0xFEDCBA98 - (1 << 32)]


def test_packing_of_a_part_of_a_larger_tensor() -> None:
    codes = torch.randint(-8, 8, (6, 80), dtype=torch.int8)
    assert torch.equal(int4.pack(codes[::2, 8:72]), pack_to_int32(codes[::2, 8:72].contiguous(), 4))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("convention", list(int4.CONVENTIONS))
def test_fake_quantize_is_quantize_and_dequantize(convention: str, dtype: torch.dtype) -> None:
    w = weights(3, 700, 96, dtype=dtype)  # more rows than a band
    expected = int4.dequantize(*int4.quantize(w, 32, convention), dtype)
    assert torch.equal(bits(int4.fake_quantize(w, 32, convention)), bits(expected))
    assert torch.equal(
        int4.fake_quantize(w.transpose(1, 2).contiguous().transpose(1, 2), 32, convention), expected
    )


@pytest.mark.parametrize(("convention", "lowest"), [("kimi", -7), ("compressed_tensors", -8)])
def test_gradient_is_that_of_torchs_fake_quantisation(convention: str, lowest: int) -> None:
    w = weights(12, 64, dtype=torch.float32)
    w[-1, -32:] = torch.linspace(
        -0.1, 0.1, 32
    )  # torch's kernel divides by the scale's reciprocal: no subnormals
    w[0, :32] = 0.3
    w.requires_grad_()
    groups = w.detach().clone().view(24, 32).requires_grad_()
    scale = int4.quantize(w.detach(), convention=convention)[1].float().view(24)
    reference = torch.fake_quantize_per_channel_affine(
        groups, scale, torch.zeros(24, dtype=torch.int32), 0, lowest, 7
    )
    upstream = torch.randn(12, 64)
    reference.backward(upstream.view(24, 32))
    out = int4.fake_quantize(w, convention=convention)
    out.backward(upstream)
    assert groups.grad is not None
    assert torch.equal(out.view(24, 32), reference)
    assert torch.equal(w.grad.view(24, 32), groups.grad)
    assert w.grad.eq(0).any() == (convention == "compressed_tensors")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(96, 256), (3, 40, 64)])
@pytest.mark.parametrize("convention", list(int4.CONVENTIONS))
def test_compiled_equals_eager(
    convention: str, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By inductor, in one graph, between operations that it would fuse with. Checkpointed too: once more in backward."""
    for name in (
        "fake_quantize",
        "count_groups",
        "_rule",
    ):  # without the checks of shapes that only tests have
        monkeypatch.setattr(int4, name, inspect.unwrap(getattr(int4, name)))

    def outputs(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x @ (int4.fake_quantize(w * 1.25, 32, convention) * 0.5).mT.relu()

    def checkpointed(w: torch.Tensor, x: torch.Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(outputs, w, x, use_reentrant=False)

    w = weights(*shape, dtype=dtype).requires_grad_()
    x = torch.randn(*shape[:-2], 5, shape[-1]).to(dtype)
    expected = outputs(w, x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), w)
    for function in (outputs, checkpointed):
        torch._dynamo.reset()
        out = torch.compile(function, fullgraph=True)(w, x)
        assert torch.equal(out, expected)
        assert torch.equal(torch.autograd.grad(out.square().sum(), w)[0], gradient)


@pytest.mark.parametrize("convention", list(int4.CONVENTIONS))
def test_fake_quantize_is_one_operation(convention: str) -> None:
    """torch's own checks of a custom operation: schema, aliases, autograd, fake tensors, dynamic shapes."""
    w = weights(5, 64, dtype=torch.float32).requires_grad_()
    torch.library.opcheck(int4._fake_quantize, (w, 32, convention))
    torch.library.opcheck(int4._fake_quantize, (torch.randn(2, 64, 5).mT, 32, convention))
    graph = torch.fx.experimental.proxy_tensor.make_fx(inspect.unwrap(int4.fake_quantize))(
        w.detach(), 32, convention
    )
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert called == ["transformers_k2.int4_fake_quantize.default"]


@pytest.mark.parametrize("convention", list(int4.CONVENTIONS))
def test_gradient_under_recomputation(convention: str) -> None:
    w = weights(2, 7, 64).requires_grad_()
    upstream = torch.randn(2, 7, 64).bfloat16()
    (expected,) = torch.autograd.grad(int4.fake_quantize(w, 32, convention), w, upstream)
    out = torch.utils.checkpoint.checkpoint(int4.fake_quantize, w, 32, convention, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(out, w, upstream)[0], expected)
    (expanded,) = torch.autograd.grad(int4.fake_quantize(w, 32, convention).sum(), w)
    assert torch.equal(expanded * upstream, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: int4.quantize(torch.randn(2, 40)), "group_size is 32, but rows have 40 weights"),
        (lambda: int4.quantize(torch.randn(2, 32), 0), "group_size is 0"),
        (
            lambda: int4.fake_quantize(torch.randn(2, 32), convention="awq"),
            "'awq': expected one of kimi, compressed",
        ),
        (lambda: int4.pack(torch.tensor([[3, 8]], dtype=torch.int8)), "run from 3 to 8"),
        (lambda: int4.unpack(torch.zeros(2, 4, dtype=torch.int32), 33), "expected in_features from 25 to 32"),
        (
            lambda: int4.dequantize(torch.zeros(2, 8, dtype=torch.int8), torch.ones(2, 3), torch.float32),
            "8 inputs",
        ),
        (
            lambda: inspect.unwrap(int4.dequantize)(
                torch.zeros(2, 8, dtype=torch.int8), torch.ones(3, 1), torch.float32
            ),
            r"\[3, 1\] are not those of codes \[2, 8\]: expected \[2, 1\]",
        ),
        (lambda: inspect.unwrap(int4.pack)(torch.tensor([[3, 8]])), "torch.int64: expected torch.int8"),
        (lambda: inspect.unwrap(int4.pack)(torch.tensor([[math.nan]])), "torch.float32: expected torch.int8"),
        (
            lambda: inspect.unwrap(int4.unpack)(torch.tensor([[3, 8]]), 16),
            "torch.int64: expected torch.int32",
        ),
        (lambda: int4.recover(torch.randn(2, 40)), "group_size is 32, but rows have 40 weights"),
        (lambda: int4.recover(torch.zeros(2, 32).half()), "torch.float16: expected torch.bfloat16"),
    ],
)
def test_errors(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()
