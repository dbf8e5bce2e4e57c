"""FP8 blocks written and recovered: against textbook rounding in float64, torch's cast, transformers' Fp8Quantize."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from checkpoints import fp8_blocks, from_fp8_blocks
from transformers_k2.quantization.codecs import fp8_block

SHAPES = [(576, 256), (192, 200), (1, 1), (128, 128), (129, 127), (300, 384)]


def real_shaped(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """float32 weights whose size differs from block to block."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 1, shape[0]).unsqueeze(1)
    return 0.02 * torch.randn(shape, generator=generator) * sizes


def nearest_even(values: torch.Tensor) -> torch.Tensor:
    """The e4m3 byte of float64 values up to 448: S.1111.110's definition as a table, ties to the even code."""
    codes = torch.arange(127)
    exponent, mantissa = codes // 8, codes % 8
    table = torch.where(
        exponent > 0, 2.0 ** (exponent - 7) * (1 + mantissa / 8), 2.0**-6 * mantissa / 8
    ).double()
    size = values.abs()
    above = torch.searchsorted(table, size).clamp_max(126)
    below = (above - 1).clamp_min(0)
    to_below, to_above = size - table[below], table[above] - size
    even = torch.where(below % 2 == 0, below, above)
    code = torch.where(to_below < to_above, below, torch.where(to_below > to_above, above, even))
    code = torch.where(size >= 448, 126, code)
    return (code + 128 * values.signbit()).to(torch.uint8)


def assert_same_bytes(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype
    assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("shape", [(576, 7168), (1, 1), (130, 257)])
def test_layout_is_what_safetensors_stores(shape: tuple[int, int]) -> None:
    stored = dict(
        zip(fp8_block.NAMES, fp8_block.encode(torch.ones(shape, dtype=torch.bfloat16)), strict=True)
    )
    content = safetensors.torch.save(stored)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    expected = {name: (header[name]["dtype"], tuple(header[name]["shape"])) for name in stored}
    assert fp8_block.layout(*shape) == expected
    assert fp8_block.layout(*shape, block=(32, 64))["weight_scale_inv"] == (
        "F32",
        (-(-shape[0] // 32), -(-shape[1] // 64)),
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_blocks_of_every_dtype(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = real_shaped(shape).to(dtype)
    weight[0, 0] = -0.0
    weight[-1, -1] = 1.0
    codes, scales = fp8_block.encode(weight)
    expected_codes, expected_scales = fp8_blocks(weight)
    assert torch.equal(scales, expected_scales)
    assert_same_bytes(codes, expected_codes)
    grid = scales.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    assert torch.equal(codes.view(torch.uint8), nearest_even((weight.float() / grid).double()))


def test_block_size_strides_and_place() -> None:
    weight = real_shaped((200, 90)).bfloat16()
    codes, scales = fp8_block.encode(weight, (32, 64))
    for row in range(0, 200, 32):
        for col in range(0, 90, 64):
            part = weight[row : row + 32, col : col + 64].float()
            assert scales[row // 32, col // 64] == part.abs().max() / 448
            quotient = (part / scales[row // 32, col // 64]).double()
            assert torch.equal(
                codes[row : row + 32, col : col + 64].view(torch.uint8), nearest_even(quotient)
            )
    place = torch.empty(200, 90, dtype=torch.float8_e4m3fn)
    strided, strided_scales = fp8_block.encode(weight.t().contiguous().t(), (32, 64), out=place)
    assert strided is place
    assert_same_bytes(place, codes)
    assert torch.equal(strided_scales, scales)


def test_bands_of_rows_make_the_whole() -> None:
    weight = real_shaped((576, 300)).bfloat16()
    codes, scales = fp8_block.encode(weight)
    bands = [fp8_block.encode(band) for band in weight.split([256, 128, 192])]
    assert_same_bytes(torch.cat([band[0] for band in bands]), codes)
    assert torch.equal(torch.cat([band[1] for band in bands]), scales)


@pytest.mark.parametrize("power", [-100, -10, 0, 17])
def test_every_bfloat16_is_rounded_to_nearest_even(power: int) -> None:
    """All of magnitude up to 448, ties, e4m3 subnormals and bfloat16 subnormals among them, with the scale 2**power."""
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = patterns[patterns.abs() <= 448]
    values = torch.nn.functional.pad(values, (0, -len(values) % 127)).view(-1, 127)
    values = torch.cat([torch.full((len(values), 1), 448.0, dtype=torch.bfloat16), values], 1)
    weight = values.float() * 2.0**power  # float32's subnormals lose digits: compared with what is left
    codes, scales = fp8_block.encode(weight)
    assert (scales == 2.0**power).all()
    assert torch.equal(codes.view(torch.uint8), nearest_even(weight.double() * 2.0**-power))
    if power == 0:
        assert_same_bytes(fp8_block.encode(values)[0], codes)


def test_float32_beside_every_tie() -> None:
    """Halfway between neighbouring codes, and one, two and three float32 steps to either side."""
    finite = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (finite[1:] + finite[:-1]) / 2
    steps = torch.arange(-3, 4, dtype=torch.int32).unsqueeze(1)
    near = torch.cat([middles.view(torch.int32) + steps, finite[1:].view(torch.int32) + steps.clamp_max(0)])
    weight = near.view(torch.float32)
    weight = torch.cat([weight, -weight])
    weight = torch.cat([torch.full((len(weight), 1), 448.0), weight], 1)
    codes, scales = fp8_block.encode(weight)
    assert (scales == 1).all()
    assert torch.equal(codes.view(torch.uint8), nearest_even(weight.double()))
    assert_same_bytes(codes, weight.to(torch.float8_e4m3fn))


def test_against_transformers() -> None:
    """It multiplies by 448 / amax where we divide by amax / 448: the last digit of a scale and rare ties differ."""
    weight = real_shaped((384, 256)).bfloat16()
    config = SimpleNamespace(weight_block_size=(128, 128), scale_fmt=None)
    theirs = Fp8Quantize(SimpleNamespace(quantization_config=config)).convert({"x.weight": weight})
    codes, scales = fp8_block.encode(weight)
    torch.testing.assert_close(scales, theirs["x.weight_scale_inv"], rtol=2**-22, atol=0)
    assert (codes.float() == theirs["x.weight"].float()).float().mean() > 0.999


def test_zeros_keep_their_sign() -> None:
    weight = torch.zeros(130, 128, dtype=torch.bfloat16)
    weight[3, 5] = -0.0
    weight[129] = 448.0
    codes, scales = fp8_block.encode(weight)
    assert scales.tolist() == [[1.0], [1.0]]
    assert_same_bytes(codes, weight.to(torch.float8_e4m3fn))
    assert codes.view(torch.uint8)[3, 5] == 128


@pytest.mark.parametrize("amax", [1e-45, 3e-43, 2e-42, 1e-38, 4e-36])
def test_blocks_too_small_for_a_scale_stay_finite(amax: float) -> None:
    weight = torch.tensor([[amax, -amax, amax / 2, 0.0]])
    codes, scales = fp8_block.encode(weight)
    assert scales.item() == torch.finfo(torch.float32).tiny
    expected = (weight.double() / scales.double()).float().to(torch.float8_e4m3fn)
    assert_same_bytes(codes, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite(dtype: torch.dtype, bad: float) -> None:
    weight = torch.ones(300, 200, dtype=dtype)
    weight[290, 3] = weight[140, 180] = weight[141, 7] = bad
    with pytest.raises(ValueError, match=f"got {bad} at row 140, column 180"):
        fp8_block.encode(weight)


def assert_recovered(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = fp8_block.recover(weight)
    assert codes.dtype == torch.float8_e4m3fn
    assert torch.equal(from_fp8_blocks(codes, scales, weight.dtype), weight)
    return codes, scales


@pytest.mark.parametrize("shape", [*SHAPES, (256, 1536)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_decoded_weights_are_recovered(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for seed in range(3):
        codes, scales = fp8_blocks(real_shaped(shape, seed))
        assert not torch.equal(
            scales, scales.bfloat16().float()
        )  # of float32 masters: amax / 448 needs its 24 bits
        found, _ = assert_recovered(from_fp8_blocks(codes, scales, dtype))
        assert torch.equal(found.float(), codes.float())


def test_amax_over_448_would_not_recover_them() -> None:
    """What makes `recover` necessary: encoding a rounded weight again loses bits in some blocks."""
    weight = from_fp8_blocks(*fp8_blocks(real_shaped((512, 1024))), torch.bfloat16)
    again = fp8_block.decode(*fp8_block.encode(weight), torch.bfloat16)
    assert not torch.equal(again, weight)
    assert_recovered(weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("largest", [448, 416, 384, 352, 320, 288, 256, 240, 224, 30, 2**-9])
def test_other_largest_codes(largest: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    finite = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = finite[finite <= largest]
    values = finite[torch.randint(len(finite), (3, 128, 128))] * torch.randn(3, 128, 128).sign()
    values[:, 0, 0] = largest
    codes = values.transpose(0, 1).reshape(128, 384).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.2345678e-4, 3.3333333e-5, 0.0070001]])
    assert_recovered(from_fp8_blocks(codes, scales, dtype))


@pytest.mark.parametrize("mantissa", [256, 257, 259, 273, 289, 321, 385, 511])
def test_scales_whose_products_are_ties(mantissa: int) -> None:
    """Nine-bit scales: products with four-bit codes lie between bfloat16 neighbours, a closed end of an interval."""
    torch.manual_seed(mantissa)
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = values[torch.randint(127, (128, 128))]
    codes[0, 0] = 448.0
    for dtype in (torch.bfloat16, torch.float32):
        assert_recovered(from_fp8_blocks(codes, torch.full((1, 1), mantissa * 2.0**-20), dtype))


def test_few_rows_that_say_little() -> None:
    """Zeros in the rows that the first guess looks at, an empty block, signs of zeros."""
    weight = real_shaped((384, 128))
    weight[:100] = 0.0
    weight[256:] = 0.0
    weight[300, 7] = -0.0
    for dtype in (torch.bfloat16, torch.float32):
        decoded = from_fp8_blocks(*fp8_blocks(weight[:256]), dtype)
        assert_recovered(torch.cat([decoded, weight[256:].to(dtype)]))


def test_block_size_of_recovered_weights() -> None:
    masters = real_shaped((96, 150))
    weight = fp8_block.decode(*fp8_block.encode(masters, (32, 64)), torch.bfloat16, (32, 64))
    found = fp8_block.recover(weight, (32, 64))
    assert torch.equal(fp8_block.decode(*found, torch.bfloat16, (32, 64)), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_plain_weights_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(
        ValueError, match=r"6 of 6 blocks of a \[300, 200\] weight .* first is block \[0, 0\]"
    ):
        fp8_block.recover(real_shaped((300, 200)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_changed_weight_is_refused(dtype: torch.dtype) -> None:
    weight = from_fp8_blocks(*fp8_blocks(real_shaped((300, 200))), dtype)
    weight[200, 150] = torch.nextafter(weight[200, 150], torch.tensor(1.0, dtype=dtype))
    with pytest.raises(ValueError, match=r"1 of 6 blocks .* first is block \[1, 1\]"):
        fp8_block.recover(weight)


def test_recover_wants_a_dtype_it_knows_and_finite_weights() -> None:
    with pytest.raises(ValueError, match=r"torch\.bfloat16 or torch\.float32, got torch\.float16"):
        fp8_block.recover(torch.ones(4, 4, dtype=torch.float16))
    with pytest.raises(ValueError, match="got nan at row 1, column 2"):
        fp8_block.recover(
            torch.ones(4, 4).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(torch.nan))
        )
