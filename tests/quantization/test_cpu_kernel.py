"""The CPU kernel against float64 products with dequantised weights, and how it comes into being."""

from __future__ import annotations

import ctypes
import inspect
import itertools
import logging
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from transformers_k2.cpu import library
from transformers_k2.quantization import cpu_kernel
from transformers_k2.quantization.cpu_kernel import grouped_linear, linear

SHAPES = [(1, 32), (17, 96), (576, 64), (33, 160), (40, 2048), (35, 9248)]
DTYPES = [torch.bfloat16, torch.float32]
HALF = 2**-8  # of the last bit of a bfloat16, at most, in relation to the number


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Compiled once for this file, in a cache of its own; the path of the library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv(library.SWITCH, raising=False)
        library._LOADED.clear()
        if not cpu_kernel.available():
            pytest.skip("no C compiler here")
        yield library.compiled(cpu_kernel.SOURCE)
    library._LOADED.clear()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def other_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache; nothing is loaded yet."""
    loaded = cpu_kernel._library()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library._LOADED.clear()
    yield tmp_path / "transformers_k2"
    monkeypatch.undo()
    library._LOADED.clear()
    assert cpu_kernel._library() is not None
    assert loaded is not None


def matrix(*shape: int, group_size: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The hub's form, scales, and the float64 weights: every code occurs, and magnitudes differ from row to row."""
    codes = torch.randint(-8, 8, shape, dtype=torch.int8)
    codes.view(-1)[:16] = torch.arange(-8, 8)
    scale = torch.rand(*shape[:-1], shape[-1] // group_size) * torch.logspace(-3, -1, shape[-2]).unsqueeze(1)
    scale = scale.bfloat16()
    return pack(codes), scale, dequantised(codes, scale)


def pack(codes: torch.Tensor) -> torch.Tensor:
    return pack_to_int32(codes.flatten(0, -2), 4).view(*codes.shape[:-1], -1)


def dequantised(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return codes.double() * scale.double().repeat_interleave(codes.shape[-1] // scale.shape[-1], -1)


def activations(num_rows: int, num_in: int, dtype: torch.dtype) -> torch.Tensor:
    """With a few large ones, and groups of very different magnitudes, as hidden states have them."""
    x = torch.randn(num_rows, num_in) * torch.logspace(-2, 1, num_in // 32).repeat_interleave(32)
    return torch.where(torch.rand_like(x) < 0.01, 100 * x, x).to(dtype)


def bound(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The largest error: in bfloat16 the result's rounding and 2^-15 of a group's largest input; float32 is 20 times finer
    than the sum of all products' rounding."""
    magnitude = x.double().abs() @ weight.abs().T
    if x.dtype == torch.float32:
        return 3e-7 * magnitude
    largest = x.double().abs().unflatten(1, (-1, 32)).amax(-1).repeat_interleave(32, 1)
    return (
        (HALF + 1e-5) * (x.double() @ weight.T).abs() + 2**-14 * (largest @ weight.abs().T) + 3e-7 * magnitude
    )


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def in_forks(*checks: Callable[[], bool]) -> list[int]:
    """Each in a process of its own, at once: 0 if it is true, otherwise 1, or a signal's number."""
    children = []
    for check in checks:
        if (child := os.fork()) == 0:
            code = 1
            try:
                code = 0 if check() else 1
            finally:
                os._exit(code)  # or this process would go on with the tests
        children.append(child)
    return [os.waitpid(child, 0)[1] for child in children]


@pytest.mark.parametrize("num_rows", [1, 3, 16, 33])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_product(dtype: torch.dtype, shape: tuple[int, int], num_rows: int) -> None:
    packed, scale, weight = matrix(*shape)
    x = activations(num_rows, shape[1], dtype)
    expected = x.double() @ weight.T
    actual = linear(x, packed, scale)
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    assert ((actual.double() - expected).abs() <= bound(x, weight)).all()
    if dtype == torch.float32:
        assert relative(actual, expected) < 1e-6


def test_bfloat16_is_no_worse_than_pytorch() -> None:
    packed, scale, weight = matrix(256, 1024)
    x = torch.randn(4, 1024).bfloat16()
    expected = x.double() @ weight.T
    error = relative(linear(x, packed, scale), expected)
    assert error <= relative(F.linear(x, weight.bfloat16()), expected)
    assert error <= 1.02 * relative(expected.bfloat16(), expected)


@pytest.mark.parametrize("group_size", [64, 96, 128, 192])
@pytest.mark.parametrize("dtype", DTYPES)
def test_larger_groups(dtype: torch.dtype, group_size: int) -> None:
    packed, scale, weight = matrix(19, 5 * group_size, group_size=group_size)
    x = activations(3, 5 * group_size, dtype)
    actual = linear(x, packed, scale)
    assert ((actual.double() - x.double() @ weight.T).abs() <= bound(x, weight)).all()


def test_every_code_in_every_place() -> None:
    places, codes = 64, torch.arange(-8, 8, dtype=torch.int8)
    weights = torch.zeros(places, 16, places, dtype=torch.int8)
    weights[range(places), :, range(places)] = codes
    packed = pack(weights.flatten(0, 1))
    result = linear(torch.ones(1, places), packed, torch.ones(places * 16, 2, dtype=torch.bfloat16))
    assert torch.equal(result.view(places, 16), codes.float().expand(places, 16))


@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-38, 1e-30, 1e30, 2e38])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_any_size(dtype: torch.dtype, value: float) -> None:
    packed, _, _ = matrix(8, 64)
    scale = torch.full((8, 2), value).bfloat16()
    x = torch.randn(2, 64).clamp_(-2, 2).mul_(2**-8 if value > 1 else 1).to(dtype)
    codes = (
        torch.stack([packed.view(torch.uint8) & 15, packed.view(torch.uint8) >> 4], -1).flatten(1).double()
        - 8
    )
    weight = dequantised(codes, scale)
    actual = linear(x, packed, scale)
    assert actual.isfinite().all()
    smallest = 64 * 2**-149 + (2**-134 if dtype == torch.bfloat16 else 0)  # steps of what is not normal
    assert ((actual.double() - x.double() @ weight.T).abs() <= bound(x, weight) + smallest).all()
    assert bool(actual.any()) == (value > 0)


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-20, 1e20, 1e30])
def test_inputs_of_any_size(size: float) -> None:
    packed, scale, weight = matrix(8, 64)
    x = torch.randn(2, 64) * size
    actual = linear(x, packed, scale)
    assert ((actual.double() - x.double() @ weight.T).abs() <= bound(x, weight) + 1e-42).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_seen(dtype: torch.dtype, value: float) -> None:
    packed, scale, _ = matrix(40, 96)
    x = torch.randn(5, 96).to(dtype)
    expected = linear(x, packed, scale)
    x[1, 70], x[3, 0] = value, value
    actual = linear(x, packed, torch.where(torch.rand(40, 3) < 0.2, 0, scale))
    assert actual[[1, 3]].isnan().all()
    actual = linear(x, packed, scale)
    assert torch.equal(actual[[0, 2, 4]], expected[[0, 2, 4]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros(dtype: torch.dtype) -> None:
    packed, scale, _ = matrix(8, 64)
    assert not linear(torch.zeros(2, 64, dtype=dtype), packed, scale).any()
    assert linear(torch.zeros(0, 64, dtype=dtype), packed, scale).shape == (0, 8)
    assert linear(torch.zeros(2, 3, 64, dtype=dtype), packed, scale).shape == (2, 3, 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts(dtype: torch.dtype) -> None:
    packed, scale, weight = matrix(6, 70, 96)
    counts = [0, 3, 1, 0, 9, 0]
    ends = list(itertools.accumulate(counts))
    x = activations(15, 96, dtype)
    out = torch.full((15, 70), 7.0, dtype=dtype)
    assert grouped_linear(x, ends, packed, scale, out) is out
    for expert, rows in enumerate(x[:13].split(counts)):
        start = ends[expert] - counts[expert]
        place = out[start : ends[expert]]
        assert (
            (place.double() - rows.double() @ weight[expert].T).abs() <= bound(rows, weight[expert])
        ).all()
    assert not out[13:].any()
    assert torch.equal(grouped_linear(x, torch.tensor(ends), packed, scale), out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_batch_and_number_of_threads(dtype: torch.dtype) -> None:
    packed, scale, _ = matrix(3, 200, 4128)
    x, ends = activations(45, 4128, dtype), [1, 1, 45]
    expected = torch.cat(
        [linear(row, packed[0 if i == 0 else 2], scale[0 if i == 0 else 2])[None] for i, row in enumerate(x)]
    )
    for num_threads in (1, 2, 5, 2):
        torch.set_num_threads(num_threads)
        assert torch.equal(grouped_linear(x, ends, packed, scale), expected)


def test_callers_at_once_and_after_a_fork() -> None:
    """Python threads, and a process that was forked, where OpenMP has no threads any more: a DataLoader's worker has one."""
    packed, scale, _ = matrix(512, 512)
    x = torch.randn(4, 512)
    expected = linear(x, packed, scale)
    torch.set_num_threads(2)  # the number is a thread's own
    equal: list[bool] = []

    def call() -> None:
        torch.set_num_threads(2)
        equal.extend(torch.equal(linear(x, packed, scale), expected) for _ in range(50))

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == 150 * [True]

    def in_worker() -> bool:
        torch.set_num_threads(1)
        return torch.equal(linear(x, packed, scale), expected)

    assert in_forks(in_worker) == [0]


def test_plain_c_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled where there is no AVX2."""
    path = tmp_path / "portable.so"
    flags = [*library.FLAGS, "-DINT4_PORTABLE", "-Wall", "-Wextra", "-Werror"]
    compiler = os.environ.get("CC", "cc").split()
    subprocess.run([*compiler, *flags, str(cpu_kernel.SOURCE), "-o", str(path)], check=True)
    packed, scale, weight = matrix(2, 70, 2144)
    cases = [activations(num_rows, 2144, dtype) for dtype in DTYPES for num_rows in (1, 2, 3, 9)]
    expected = [grouped_linear(x, [1, len(x)], packed, scale) for x in cases]
    portable = ctypes.CDLL(str(path))
    portable.int4_scratch.restype = ctypes.c_int64
    loaded = cpu_kernel._library()
    assert loaded is not None
    for name in ("int4_scratch", "int4_grouped"):
        getattr(portable, name).argtypes = getattr(loaded, name).argtypes
    monkeypatch.setattr(cpu_kernel, "_library", lambda: portable)
    for x, value in zip(cases, expected, strict=True):
        actual = grouped_linear(x, [1, len(x)], packed, scale)
        assert ((actual[1:].double() - x[1:].double() @ weight[1].T).abs() <= bound(x[1:], weight[1])).all()
        assert torch.equal(actual, value)


def test_processes_compile_at_once(other_cache: Path) -> None:
    packed, scale = torch.full((1, 4), -1, dtype=torch.int32), torch.ones(1, 1, dtype=torch.bfloat16)
    assert in_forks(*[lambda: linear(torch.ones(1, 32), packed, scale).item() == 224] * 3) == [0, 0, 0]
    assert [path.suffix for path in other_cache.iterdir()] == [".so"]
    assert other_cache.stat().st_mode & 0o777 == 0o700


def test_library_is_kept(other_cache: Path) -> None:
    assert cpu_kernel.available()
    (path,) = other_cache.iterdir()
    before = path.stat().st_mtime_ns
    library._LOADED.clear()
    assert cpu_kernel.available()
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("PATH", "", "No such file"),
        ("CC", "false", "false --version failed"),
        (library.SWITCH, "0", f"{library.SWITCH}=0"),
    ],
)
def test_not_available(
    variable: str,
    value: str,
    message: str,
    other_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    packed, scale, _ = matrix(8, 64)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv(variable, value)
    with caplog.at_level(logging.INFO, logger=library.__name__):
        assert not cpu_kernel.available()
        assert not cpu_kernel.available()
    assert len(caplog.records) == 1
    assert message in caplog.text
    with pytest.raises(RuntimeError, match="not available"):
        linear(torch.zeros(1, 64), packed, scale)


def test_code_of_others_is_not_loaded(other_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    other_cache.mkdir()
    other_cache.chmod(0o777)
    assert not cpu_kernel.available()
    assert "others may write" in caplog.text
    other_cache.chmod(0o700)
    library._LOADED.clear()
    assert cpu_kernel.available()
    (path,) = other_cache.iterdir()
    path.chmod(0o722)
    library._LOADED.clear()
    assert not cpu_kernel.available()


def test_folder_that_cannot_be_made(other_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    other_cache.write_text("a file")
    assert not cpu_kernel.available()
    assert "File exists" in caplog.text


def test_errors() -> None:
    packed, scale, _ = matrix(2, 16, 64)
    x, call = torch.zeros(3, 64), inspect.unwrap(grouped_linear)  # without the tests' own check of shapes
    with pytest.raises(ValueError, match="expected groups of a multiple of 32"):
        call(x, [1, 3], packed, scale.repeat_interleave(2, -1))
    with pytest.raises(ValueError, match=r"scale is .* expected torch.bfloat16 \[2, 16, 2\]"):
        call(x, [1, 3], packed, scale[:, :8])
    with pytest.raises(ValueError, match=r"packed is torch.int64"):
        call(x, [1, 3], packed.long(), scale)
    with pytest.raises(ValueError, match="packed has strides"):
        call(x, [1, 3], packed.transpose(0, 1).contiguous().transpose(0, 1), scale)
    with pytest.raises(ValueError, match=r"x is torch.float64"):
        call(x.double(), [1, 3], packed, scale)
    with pytest.raises(ValueError, match=r"x is .* \[3, 32\]"):
        call(x[:, :32], [1, 3], packed, scale)
    with pytest.raises(ValueError, match=r"out is .* expected torch.float32 \[3, 16\]"):
        call(x, [1, 3], packed, scale, torch.zeros(2, 16))
    with pytest.raises(ValueError, match=r"out is torch.bfloat16"):
        call(x, [1, 3], packed, scale, torch.zeros(3, 16).bfloat16())
    with pytest.raises(ValueError, match=r"scale has strides"):
        call(x, [1, 3], packed, scale.transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(ValueError, match="ends has 1 numbers"):
        call(x, [3], packed, scale)
    for ends in ([2, 1], [1, 4], [-1, 3]):
        with pytest.raises(ValueError, match="expected ascending numbers from 0 to 3"):
            call(x, ends, packed, scale)
