"""Newton-Schulz orthogonalisation: U V^T of the momentum, by matrix products alone.

One odd quintic per step, x <- (a I + b R + c R^2) x with R = x x^T, on matrices whose short side comes first. A table holds
coefficient schedules with their sources. Two evaluations of the same polynomial: the standard one multiplies the n x m
matrix in every step; the Gram one iterates on the n x n matrices and multiplies into x once per restart, which is cheaper
when m is several times n. In floating point the Gram form loses the small singular values, so it restarts from a fresh
Gram matrix and never computes in bf16, whose eight bits are too few for squared singular values.

What it gives up: the symmetry of R and of its powers is not used (torch has no symmetric product), and singular values far
below the largest one stay small: five steps lift them by a factor of 485 ("muon") to 1500 ("cans") and no more.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Coefficients = tuple[float, float, float]
Iteration = Literal["auto", "standard", "gram"]

EPS = 1e-7  # the floor of the norm that is divided by, as in torch.optim.Muon
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_FIRST_RESTART, _RESTART_EVERY = 2, 3  # the first steps grow the small singular values most: restart early
_GRAM_MARGIN, _GRAM_MIN_SIDE = (
    1.3,
    64,
)  # smaller savings and smaller matrices drown in the cost of the extra kernels


class Schedule(NamedTuple):
    """Coefficients (a, b, c) step by step; the last row repeats when more steps are asked for."""

    rows: tuple[Coefficients, ...]
    source: str


def _guarded(*rows: Coefficients) -> tuple[Coefficients, ...]:
    """p(x / 1.01) for all rows but the last: minimax rows are steep where their interval ends; rounding overshoots it."""
    return (*((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in rows[:-1]), rows[-1])


SCHEDULES: dict[str, Schedule] = {
    "muon": Schedule(
        ((3.4445, -4.7750, 2.0315),),
        "Keller Jordan et al., Muon (2024); the five steps of arXiv 2502.16982 and 2507.20534",
    ),
    "polar_express": Schedule(
        _guarded(
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
            (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
            (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
            (1.875, -1.25, 0.375),
        ),
        "Amsel, Persson, Musco, Gower, The Polar Express (arXiv 2505.16932), Algorithm 1: greedy minimax quintics for "
        "singular values in [1e-3, 1], cushioned at 0.024, with the paper's safety factor of 1.01 (not on the last row)",
    ),
    "cans": Schedule(
        _guarded(
            (8.492174566755889, -25.194352424993046, 18.697915058107416),
            (4.219444008812063, -3.1341088096001273, 0.5835045573005015),
            (4.102201555039565, -3.052535004482751, 0.5742015780320153),
            (3.684091749813635, -2.7562047324494836, 0.5404450723953241),
            (2.7329545725087465, -2.0354830712121035, 0.45910244380568194),
            (1.977044779411938, -1.3592395694715702, 0.38608063582425006),
            (1.8753193679256959, -1.2503548074829498, 0.37503548252042046),
            (1.875, -1.25, 0.375),
        ),
        "Grishina, Smirnov, Rakhuba, CANS (arXiv 2506.10935): minimax quintics on the widest [a, 1] that five of them bring "
        "into [1 - delta, 1 + delta]; computed by Remez exchange and bisection for delta = 0.3, which gives a = 5.02e-4; "
        "rows six to eight go on to full accuracy; with Polar Express' safety factor of 1.01, which is not part of CANS",
    ),
}


def newton_schulz(
    matrix: Float[Tensor, "*batch n m"],
    steps: int = 5,
    schedule: str = "muon",
    *,
    dtype: torch.dtype = torch.bfloat16,
    iteration: Iteration = "standard",
    eps: float = EPS,
) -> Float[Tensor, "*batch n m"]:
    """The nearest semi-orthogonal matrix of each [n, m] matrix, approximately; the input is left as it was.

    Args:
        matrix: [..., n, m], floating point. A zero matrix stays zero.
        steps: number of quintics; beyond the schedule's length its last row repeats.
        schedule: a key of `SCHEDULES`. "muon" ends with singular values between about 0.7 and 1.2, not at 1.
        dtype: what the products are computed in. float16 is divided by its norm before it is narrowed.
        iteration: "standard", "gram", or "auto" for whichever `choose_iteration` names.
        eps: floor of the Frobenius norm.

    Returns:
        [..., n, m] in `matrix.dtype`. With the defaults, one 2-D matrix gives the bits of torch.optim.Muon.

    Raises:
        ValueError: fewer than two dimensions, an integer or complex matrix, or an option outside its choices.
    """
    if matrix.ndim < 2:
        raise ValueError(
            f"matrix has shape {list(matrix.shape)}; expected at least two dimensions [..., n, m]."
        )
    if not matrix.is_floating_point():
        raise ValueError(
            f"matrix is {matrix.dtype}; expected a real floating-point dtype such as torch.float32."
        )
    batch = matrix.reshape(math.prod(matrix.shape[:-2]), *matrix.shape[-2:])
    return orthogonalize(batch, steps, schedule, dtype, iteration, eps).to(matrix.dtype).reshape(matrix.shape)


def orthogonalize(
    batch: Float[Tensor, "k n m"],
    steps: int = 5,
    schedule: str = "muon",
    dtype: torch.dtype = torch.bfloat16,
    iteration: Iteration = "standard",
    eps: float = EPS,
) -> Float[Tensor, "k n m"]:
    """`newton_schulz` of k matrices [k, n, m], returned in `dtype`.

    On a CPU the matrices are taken one by one, so the bits of one depend on nothing else in the batch; there a batched
    product is no faster. On other devices the products are batched, and the library may pick its kernel by k: bits repeat
    for equal k only. The "gram" iteration of bfloat16 computes in float16 (three more bits, and range enough: no entry
    of R, Z or Q exceeds fifty, and what underflows in R is lifted by a only) and rounds its result to bfloat16.

    Raises:
        ValueError: an option outside its choices.
    """
    check_options(steps, schedule, dtype, iteration, eps)
    num_matrices, n, m = batch.shape
    if batch.numel() == 0:
        return batch.new_empty(batch.shape, dtype=dtype)
    if iteration == "auto":
        iteration = choose_iteration(n, m, dtype, batch.device, steps)
    compute = torch.float16 if iteration == "gram" and dtype is torch.bfloat16 else dtype
    rows = SCHEDULES[schedule].rows
    rows = rows[:steps] + rows[-1:] * (steps - len(rows))
    iterate = _gram if iteration == "gram" else _standard
    if batch.device.type != "cpu":
        x = iterate(_normalized(batch, compute, eps), rows)
        return (x.mT if n > m else x).to(dtype)
    out = batch.new_empty(batch.shape, dtype=dtype)
    for i in range(num_matrices):
        x = iterate(_normalized(batch[i], compute, eps), rows)
        out[i] = x.mT if n > m else x
    return out


def check_options(steps: int, schedule: str, dtype: torch.dtype, iteration: str, eps: float = EPS) -> None:
    """Raise ValueError for an option outside its choices, so that an optimizer can refuse it when it is built."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"Newton-Schulz steps={steps!r}; expected an integer of at least 1.")
    if schedule not in SCHEDULES:
        raise ValueError(f"Newton-Schulz schedule={schedule!r}; expected one of {', '.join(SCHEDULES)}.")
    if dtype not in DTYPES:
        raise ValueError(f"Newton-Schulz dtype={dtype!r}; expected one of {', '.join(map(str, DTYPES))}.")
    if iteration not in get_args(Iteration):
        raise ValueError(
            f"Newton-Schulz iteration={iteration!r}; expected one of {', '.join(get_args(Iteration))}."
        )
    if not eps > 0:
        raise ValueError(f"Newton-Schulz eps={eps!r}; expected a number above 0.")


def choose_dtype(device: torch.device | str) -> torch.dtype:
    """The compute dtype that "auto" means: bfloat16 where the hardware multiplies it, else float32.

    CUDA from compute capability 8.0; a CPU with AVX512-BF16, AMX-BF16 or Arm's BF16 extension. Elsewhere torch emulates
    bfloat16 products, many times slower than float32.
    """
    device = torch.device(device)
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        native = any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def choose_iteration(
    n: int, m: int, dtype: torch.dtype, device: torch.device | str, steps: int
) -> Literal["standard", "gram"]:
    """What "auto" means: "gram" where it is more accurate than "standard" in bfloat16 and faster than "standard" in `dtype`.

    Faster: at least 1.3x fewer multiplications and a short side of at least 64. For bfloat16 the Gram form computes in
    float16, equally fast on CUDA but not on most CPUs: elsewhere than on CUDA it stays "standard".
    """
    if dtype is torch.bfloat16 and torch.device(device).type != "cuda":
        return "standard"
    saves = flops(n, m, steps, "standard") >= _GRAM_MARGIN * flops(n, m, steps, "gram")
    return "gram" if saves and min(n, m) >= _GRAM_MIN_SIDE else "standard"


def flops(n: int, m: int, steps: int, iteration: Literal["standard", "gram"]) -> int:
    """Multiplications and additions for one [n, m] matrix, products only; symmetric in n and m."""
    n, m = min(n, m), max(n, m)
    if iteration == "standard":
        return 2 * steps * (2 * n * n * m + n**3)
    assert iteration == "gram", iteration
    # Four n x n products a step, but a segment's first step accumulates nothing and its last updates no Gram matrix.
    return sum(2 * (2 * n * n * m + (4 * (stop - start) - 3) * n**3) for start, stop in _segments(steps))


def _segments(steps: int) -> list[tuple[int, int]]:
    """The steps [start, stop) between one fresh Gram matrix and the next."""
    starts = [0, *range(_FIRST_RESTART, steps, _RESTART_EVERY)]
    return list(zip(starts, [*starts[1:], steps], strict=True))


def _normalized(x: Float[Tensor, "*k n m"], dtype: torch.dtype, eps: float) -> Tensor:
    """A copy of Frobenius norm 1 in `dtype`, short side first: [*k, min(n, m), max(n, m)].

    Contiguous before it is transposed, so that the bits do not depend on the strides of the input.
    """
    x = x.to(torch.float32 if dtype is torch.float16 else dtype).contiguous()
    if x.shape[-2] > x.shape[-1]:
        x = x.mT
    return (x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)).to(dtype)


def _standard(x: Float[Tensor, "*k n m"], rows: tuple[Coefficients, ...]) -> Float[Tensor, "*k n m"]:
    """x <- a x + (b R + c R^2) x, R = x x^T: the operations of torch.optim.Muon in the same order."""
    add_product = torch.addmm if x.ndim == 2 else torch.baddbmm
    for a, b, c in rows:
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _gram(x: Float[Tensor, "*k n m"], rows: tuple[Coefficients, ...]) -> Float[Tensor, "*k n m"]:
    """The same polynomial through Q = prod (a I + Z), Z = b R + c R^2: all symmetric and commuting, so R <- P R P."""
    add_product = torch.addmm if x.ndim == 2 else torch.baddbmm
    for start, stop in _segments(len(rows)):
        gram, total = x @ x.mT, None
        for step in range(start, stop):
            a, b, c = rows[step]
            change = add_product(gram, gram, gram, beta=b, alpha=c)  # a step is x <- (a I + change) x
            if total is None:
                total = change.clone()
                total.diagonal(dim1=-2, dim2=-1).add_(a)
            else:
                total = add_product(total, change, total, beta=a)
            if step + 1 < stop:
                gram = add_product(gram, change, gram, beta=a)
                gram = add_product(gram, gram, change, beta=a)
        assert total is not None
        x = total @ x
    return x
