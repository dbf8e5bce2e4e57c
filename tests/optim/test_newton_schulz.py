"""Oracles: torch.optim.Muon's own function bit by bit, U p(S) V^T by torch.linalg.svd in float64, torch's FLOP counter, and
for the coefficient tables a Remez exchange written from the papers' definitions."""

import importlib
import inspect
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.utils.flop_counter import FlopCounterMode

from transformers_k2.optim.newton_schulz import (
    EPS,
    SCHEDULES,
    check_options,
    choose_dtype,
    choose_iteration,
    flops,
    newton_schulz,
    orthogonalize,
)

SHAPES = [(64, 200), (200, 64), (48, 48), (33, 17), (129, 257), (1, 77), (77, 1), (1, 1)]


def spread(n: int, m: int, decades: float) -> Tensor:
    """A float32 [n, m] matrix with singular values from 1 down to 10^-decades, n <= m."""
    generator = torch.Generator().manual_seed(n * m)
    u = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(m, n, dtype=torch.float64, generator=generator))[0]
    return (u * torch.logspace(0, -decades, n, dtype=torch.float64) @ v.T).float()


def textbook(matrix: Tensor, schedule: str, steps: int) -> Tensor:
    """U p(S) V^T in float64, p the schedule's polynomials one after the other on the normalised singular values."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    rows = SCHEDULES[schedule].rows
    for step in range(steps):
        a, b, c = rows[min(step, len(rows) - 1)]
        s = a * s + b * s**3 + c * s**5
    return u * s @ v


def relative_error(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_default_has_the_bits_of_torch_optim_muon(shape: tuple[int, int], dtype: torch.dtype):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)).mul(3e-3).to(dtype)
    kept = matrix.clone()
    result = newton_schulz(matrix)
    assert torch.equal(matrix, kept)
    expected = _zeropower_via_newtonschulz(matrix.clone(), SCHEDULES["muon"].rows[0], 5, EPS)
    assert result.dtype is dtype
    assert torch.equal(result, expected.to(dtype))


@pytest.mark.parametrize("iteration", ["standard", "gram"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_zero_stays_zero_and_empty_stays_empty(iteration, dtype: torch.dtype):
    zero = torch.zeros(2, 5, 9)
    assert torch.equal(newton_schulz(zero, dtype=dtype, iteration=iteration), zero)
    for shape in [(0, 5, 9), (2, 0, 9), (2, 5, 0), (0, 4), (4, 0), (0, 0)]:
        result = newton_schulz(torch.zeros(shape), dtype=dtype, iteration=iteration)
        assert result.shape == shape
        assert result.dtype is torch.float32


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("iteration", ["standard", "gram"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(33, 65), (65, 33)])
def test_the_bits_of_a_matrix_depend_on_nothing_else_in_the_batch(shape, dtype, iteration, num_threads: int):
    generator = torch.Generator().manual_seed(2)
    batch = torch.randn(7, *shape, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        whole = orthogonalize(batch, 5, "muon", dtype, iteration)
        order = torch.randperm(7, generator=generator)
        assert torch.equal(orthogonalize(batch[order], 5, "muon", dtype, iteration), whole[order])
        for part in (batch[:1], batch[1:4], batch[4:]):
            start = part.storage_offset() // (shape[0] * shape[1])
            alone = orthogonalize(part.clone(), 5, "muon", dtype, iteration)
            assert torch.equal(alone, whole[start : start + len(part)])
    finally:
        torch.set_num_threads(before)
    assert whole.dtype is dtype
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("iteration", ["standard", "gram"])
def test_the_batched_products_of_other_devices_are_the_same_iteration(iteration):
    abstract = orthogonalize(torch.empty(3, 70, 40, device="meta"), 5, "cans", torch.bfloat16, iteration)
    assert abstract.shape == (3, 70, 40)
    assert abstract.dtype is torch.bfloat16
    module = importlib.import_module(
        "transformers_k2.optim.newton_schulz"
    )  # the package has a function of that name
    batch = torch.randn(3, 70, 40, generator=torch.Generator().manual_seed(7))
    iterate = getattr(module, f"_{iteration}")
    together = iterate(module._normalized(batch, torch.float32, EPS), SCHEDULES["cans"].rows[:5]).mT
    torch.testing.assert_close(
        together, orthogonalize(batch, 5, "cans", torch.float32, iteration), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(33, 17), (64, 200)])
def test_strides_and_leading_dimensions_do_not_matter(shape: tuple[int, int], dtype: torch.dtype):
    base = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(3))
    result = newton_schulz(base, dtype=dtype)
    assert result.shape == base.shape
    for i, j in itertools.product(range(2), range(3)):
        assert torch.equal(result[i, j], newton_schulz(base[i, j], dtype=dtype))
    transposed = base.mT.contiguous().mT
    sliced = torch.stack([base, base + 1], dim=-1)[..., 0]
    for view in (transposed, sliced):
        assert not view.is_contiguous()
        assert torch.equal(newton_schulz(view, dtype=dtype), result)
        assert torch.equal(newton_schulz(view[1, 2], dtype=dtype), result[1, 2])


@pytest.mark.parametrize("steps", [1, 3, 5, 10])
@pytest.mark.parametrize("iteration", ["standard", "gram"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_float32_follows_the_polynomial_on_the_singular_values(schedule: str, iteration, steps: int):
    # Singular values are at least 1e-3 of the norm: rounding noise (1e-7) does not grow into a direction of its own.
    # Measured: 7e-5 at the most (ten chaotic steps of "muon"), 3e-5 up to five steps.
    for matrix in (
        torch.randn(90, 251, generator=torch.Generator().manual_seed(4)),
        spread(64, 130, 2),
        spread(40, 40, 2).T,
    ):
        result = newton_schulz(matrix, steps, schedule, dtype=torch.float32, iteration=iteration)
        assert relative_error(result, textbook(matrix, schedule, steps)) < (5e-5 if steps <= 5 else 2e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gram_in_half_precision_is_more_accurate_than_standard_bfloat16(schedule: str):
    # Singular values over four decades, below what bf16 resolves in R. Measured, relative to float64: standard bf16 0.09,
    # 0.13, 0.18 (muon, polar_express, cans); Gram 0.018, 0.022, 0.034, five times less. Gram in bf16 itself diverges.
    matrix = spread(256, 896, 4)
    expected = textbook(matrix, schedule, 5)
    standard = relative_error(newton_schulz(matrix, 5, schedule), expected)
    asked_for_bf16 = relative_error(newton_schulz(matrix, 5, schedule, iteration="gram"), expected)
    half = relative_error(newton_schulz(matrix, 5, schedule, dtype=torch.float16, iteration="gram"), expected)
    assert standard < 0.25
    assert max(half, asked_for_bf16) < 0.05
    assert max(half, asked_for_bf16) < standard / 2


def test_float16_is_normalised_before_it_is_narrowed():
    matrix = torch.randn(20, 50, generator=torch.Generator().manual_seed(5))
    for iteration in ("standard", "gram"):
        expected = newton_schulz(matrix, dtype=torch.float16, iteration=iteration)
        for power in (-24, 30):  # far outside float16; a power of two changes no mantissa
            scaled = newton_schulz(matrix * 2.0**power, dtype=torch.float16, iteration=iteration)
            assert torch.equal(scaled, expected)


@pytest.mark.parametrize("iteration", ["standard", "gram"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_singular_value_of_one_does_not_overshoot(schedule: str, iteration):
    # Rank one: rounding in bf16 lifts the norm over 1, where minimax rows without the safety factor run off to infinity.
    for matrix in (torch.ones(96, 200), torch.full((33, 100), 1 / 3), torch.randn(1, 300)):
        for steps in (5, 8):
            result = newton_schulz(matrix, steps, schedule, iteration=iteration)
            assert 0.6 < torch.linalg.matrix_norm(result, 2) < 1.35


@pytest.mark.parametrize("schedule", ["polar_express", "cans"])
def test_without_the_safety_factor_it_would_overshoot(schedule: str):
    guarded = raw = 1.0078125  # the next bf16 number after 1
    for row, unguarded_row in zip(SCHEDULES[schedule].rows[:5], unguarded(schedule), strict=False):
        guarded, raw = evaluate(row, guarded), evaluate(unguarded_row, raw)
    assert 0.6 < guarded < 1.35
    assert raw > 1e6


# --- where the tables come from ---


def unguarded(schedule: str) -> list[tuple[float, float, float]]:
    rows = SCHEDULES[schedule].rows
    return [(a * 1.01, b * 1.01**3, c * 1.01**5) for a, b, c in rows[:-1]] + [rows[-1]]


def evaluate(row: tuple[float, float, float], x):
    return row[0] * x + row[1] * x**3 + row[2] * x**5


def minimax_quintic(low: float, high: float) -> tuple[tuple[float, float, float], float]:
    """The odd quintic nearest to 1 on [low, high] and its error, by Remez exchange on four alternating points."""
    if low > (1 - 1e-5) * high:  # the alternation points coincide: the limit is Newton-Schulz of order five
        return (1.875 / high, -1.25 / high**3, 0.375 / high**5), 0.0
    points = np.array([low, 0.75 * low + 0.25 * high, 0.25 * low + 0.75 * high, high])
    for _ in range(50):
        system = np.stack([points, points**3, points**5, np.array([1.0, -1.0, 1.0, -1.0])], axis=1)
        a, b, c, error = np.linalg.solve(system, np.ones(4))
        extrema = np.sqrt(np.sort(np.roots([5 * c, 3 * b, a]).real))
        if np.abs(extrema - points[1:3]).max() < 1e-12:
            break
        points[1:3] = extrema
    return (float(a), float(b), float(c)), float(error)


def test_polar_express_is_the_greedy_composition_of_its_paper():
    low, high, rows = 1e-3, 1.0, []
    for _ in range(7):
        row, _ = minimax_quintic(max(low, 0.02407327424182761 * high), high)  # the paper's cushion
        centre = 2 / (evaluate(row, low) + evaluate(row, high))
        row = tuple(centre * coefficient for coefficient in row)
        low = evaluate(row, low)
        high = 2 - low
        rows.append(row)
    np.testing.assert_allclose(unguarded("polar_express")[:7], rows, rtol=1e-8)
    assert low > 1 - 2e-9  # seven rows bring all of [1e-3, 1] to 1
    assert SCHEDULES["polar_express"].rows[-1] == (1.875, -1.25, 0.375)


def cans_composition(low: float, num_rows: int) -> tuple[list[tuple[float, float, float]], float]:
    rows, high, error = [], 1.0, 0.0
    for _ in range(num_rows):
        row, error = minimax_quintic(low, high)
        low, high = 1 - error, 1 + error
        rows.append(row)
    return rows, error


def test_cans_is_the_widest_interval_that_five_quintics_bring_within_delta():
    low, high = 1e-6, 0.5
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if cans_composition(middle, 5)[1] > 0.3 else (low, middle)
    assert high == pytest.approx(5.02e-4, rel=1e-3)
    rows, _ = cans_composition(high, 7)
    np.testing.assert_allclose(unguarded("cans")[:7], rows, rtol=1e-8)
    x = np.geomspace(high, 1.0, 20001)
    for row in unguarded("cans")[:5]:
        x = evaluate(row, x)
    assert np.abs(1 - x).max() == pytest.approx(0.3, abs=1e-6)


def test_the_slope_at_zero_grows_from_muon_to_polar_express_to_cans():
    slopes = [np.prod([row[0] for row in (unguarded(s) * 5)[:5]]) for s in ("polar_express", "cans")]
    assert 3.4445**5 < slopes[0] < slopes[1]


# --- choices ---


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 6, 11])
@pytest.mark.parametrize("iteration", ["standard", "gram"])
@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (7, 7)])
def test_flops_are_those_that_torch_counts(shape: tuple[int, int], iteration, steps: int):
    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.randn(3, *shape), steps, "muon", torch.float32, iteration)
    assert counter.get_total_flops() == 3 * flops(*shape, steps, iteration)


def test_auto_takes_gram_where_it_is_cheaper_and_safe():
    assert choose_iteration(2048, 7168, torch.bfloat16, "cuda", 5) == "gram"  # an expert of K2
    assert choose_iteration(7168, 2048, torch.bfloat16, "cuda", 5) == "gram"
    assert choose_iteration(7168, 8192, torch.bfloat16, "cuda", 5) == "standard"  # o_proj: nearly square
    assert choose_iteration(2048, 7168, torch.bfloat16, "cpu", 5) == "standard"
    assert choose_iteration(256, 1024, torch.float32, "cpu", 5) == "gram"
    assert choose_iteration(32, 1024, torch.float32, "cpu", 5) == "standard"
    assert choose_iteration(0, 1024, torch.float32, "cpu", 5) == "standard"
    for shape, iteration in (((64, 256), "gram"), ((64, 100), "standard")):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(6))
        automatic = newton_schulz(matrix, dtype=torch.float32, iteration="auto")
        assert torch.equal(automatic, newton_schulz(matrix, dtype=torch.float32, iteration=iteration))


def test_the_compute_dtype_is_bfloat16_only_where_the_hardware_has_it(monkeypatch: pytest.MonkeyPatch):
    assert choose_dtype("meta") is torch.float32
    for capabilities, expected in (
        ({"avx2": True, "avx512_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"neon": True, "bf16": True}, torch.bfloat16),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert choose_dtype(torch.device("cpu")) is expected
    for capability, expected in (((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert choose_dtype("cuda:1") is expected


def test_the_keys_that_the_dtype_is_chosen_by_exist_in_torch():
    capabilities = torch.cpu.get_capabilities()
    names = {"x86_64": {"avx512_bf16", "amx_bf16"}, "aarch64": {"bf16"}, "arm64": {"bf16"}}
    assert names[capabilities["architecture"]] <= set(capabilities)


def unchecked(function: Callable) -> Callable:
    """Without the annotations' run-time check, which a user does not have."""
    return inspect.unwrap(function)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0; expected an integer of at least 1"),
        ({"steps": 2.5}, "steps=2.5; expected an integer"),
        ({"steps": True}, "steps=True; expected an integer"),
        ({"schedule": "newton"}, "schedule='newton'; expected one of muon, polar_express, cans"),
        (
            {"dtype": torch.int8},
            "dtype=torch.int8; expected one of torch.bfloat16, torch.float16, torch.float32",
        ),
        ({"iteration": "fast"}, "iteration='fast'; expected one of auto, standard, gram"),
        ({"eps": 0.0}, "eps=0.0; expected a number above 0"),
    ],
)
def test_an_option_outside_its_choices_is_named(options: dict, message: str, monkeypatch: pytest.MonkeyPatch):
    module = importlib.import_module(
        "transformers_k2.optim.newton_schulz"
    )  # the package has a function of that name
    for name in ("orthogonalize", "check_options"):
        monkeypatch.setattr(module, name, unchecked(getattr(module, name)))
    with pytest.raises(ValueError, match=message):
        unchecked(newton_schulz)(torch.randn(3, 4), **options)
    defaults = {"steps": 5, "schedule": "muon", "dtype": torch.float32, "iteration": "auto"}
    with pytest.raises(ValueError, match=message):
        unchecked(check_options)(**defaults | options)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.randn(5), r"shape \[5\]; expected at least two dimensions"),
        (torch.ones(3, 4, dtype=torch.int64), "torch.int64; expected a real floating-point dtype"),
        (torch.ones(3, 4, dtype=torch.complex64), "torch.complex64; expected a real floating-point dtype"),
    ],
)
def test_what_is_no_real_matrix_is_refused(matrix: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        unchecked(newton_schulz)(matrix)
