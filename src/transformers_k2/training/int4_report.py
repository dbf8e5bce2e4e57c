"""What INT4 training came to: held-out losses with and without rounding, and whether the file is what was trained.

Losses are measured before and after; the file is compared weight by weight and code by code with what the forward passes
computed with. What it gives up: the comparison of models that are split over processes, of which no process has the whole.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..checkpoint import Checkpoint
from ..files import replacing, write_text
from ..quantization import int4
from ..quantization.qat import set_rounding, settings
from ..quantization.targets import STACKS
from .trainer import RecipeTrainer

_BYTES = {"F32": 4, "BF16": 2, "I32": 4}
PICTURE, NUMBERS = "int4_qat.png", "int4_qat.json"


@dataclass(frozen=True)
class Agreement:
    """The file against the model that was trained: how many of its INT4 weights and codes are others, and the logits."""

    different_weights: int
    different_codes: int
    same_logits: bool


@dataclass(frozen=True)
class Int4Outcome:
    """Held-out losses in nats per token, and the file.

    `start` is the model that the run began with, `trained` the one it ended with; rounded means INT4 weights.
    """

    start: float
    start_rounded: float  # what quantising without training gives
    trained: float  # float masters
    trained_rounded: float  # what training computed with, and the file holds
    num_weights: int  # that are INT4
    moved_codes: float | None  # share of the codes that training changed
    file_bytes: int
    unpacked_bytes: int  # of the same weights in the dtype of the others
    agreement: Agreement | None

    def __str__(self) -> str:
        text = (
            f"held-out loss {self.start:.4f} at the start, {self.start_rounded:.4f} with those weights rounded to INT4; "
            f"{self.trained_rounded:.4f} after training on the grid ({self.trained:.4f} without the rounding)"
        )
        if self.moved_codes is not None:
            text += f"; {self.moved_codes:.1%} of {self.num_weights:,} codes moved"
        text += f". Files: {self.file_bytes / 1e6:,.1f} MB, unpacked {self.unpacked_bytes / 1e6:,.1f} MB"
        if self.agreement is not None:
            logits = "equal" if self.agreement.same_logits else "NOT equal"
            text += (
                f"; read back: {self.agreement.different_weights} different weights, {self.agreement.different_codes} "
                f"different codes, logits of training forward and file {logits}"
            )
        return text

    def save(self, path: Path) -> None:
        """Write all numbers as JSON."""
        write_text(path, json.dumps(asdict(self), indent=2) + "\n")


class Int4Losses:
    """Measures a prepared model before and after training; collective."""

    def __init__(self, model: nn.Module, trainer: RecipeTrainer) -> None:
        self.model, self.trainer = model, trainer
        self.start, self.start_rounded = self._measure()
        whole = trainer.pipeline is None and not any(isinstance(item, DTensor) for item in model.parameters())
        self._codes = _codes(model) if whole else None
        self.trained = self.trained_rounded = float("nan")

    def measure_after(self) -> None:
        """The model rounds afterwards."""
        self.trained, self.trained_rounded = self._measure()

    def outcome(self, folder: Path, agreement: Agreement | None) -> Int4Outcome:
        """Together with the file in `folder`."""
        moved = None
        if self._codes is not None:
            now = _codes(self.model)
            num = sum(codes.numel() for codes in now.values())
            moved = sum(int((now[name] != codes).sum()) for name, codes in self._codes.items()) / num
        num_weights, file_bytes, saved = _sizes(folder)
        return Int4Outcome(
            start=self.start,
            start_rounded=self.start_rounded,
            trained=self.trained,
            trained_rounded=self.trained_rounded,
            num_weights=num_weights,
            moved_codes=moved,
            file_bytes=file_bytes,
            unpacked_bytes=file_bytes + saved,
            agreement=agreement,
        )

    def _measure(self) -> tuple[float, float]:
        losses = []
        for on in (False, True):
            set_rounding(self.model, on)
            losses.append(self.trainer.held_out_loss(self.trainer.held_out))
        return losses[0], losses[1]


@torch.no_grad()
def compare(model: nn.Module, loaded: nn.Module, folder: Path, same_logits: bool) -> Agreement:
    """A prepared model that this process holds whole against the file, and against what was loaded from it, dequantised."""
    tensors = Checkpoint.open(folder).tensors
    weights = codes = 0
    for name, how in settings(model).items():
        parameter = model.get_parameter(name).to(how.dtype)
        rounded = int4.fake_quantize(parameter, how.group_size, how.convention)
        weights += int((loaded.get_parameter(name).to(rounded.device) != rounded).sum())
        expected, _ = int4.quantize(parameter, how.group_size, how.convention)
        for part, matrix in _parts(name, expected):
            with safe_open(tensors[f"{part}_packed"].shard, framework="pt") as file:
                stored = int4.unpack(file.get_tensor(f"{part}_packed"), matrix.shape[-1])
            codes += int((stored != matrix.cpu()).sum())
    return Agreement(weights, codes, same_logits)


def _sizes(folder: Path) -> tuple[int, int, int]:
    """Of a hub folder: how many weights are INT4, the bytes of its tensors, and how many more they were unpacked."""
    tensors = Checkpoint.open(folder).tensors
    sizes = {name: torch.Size(info.shape).numel() * _BYTES[info.dtype] for name, info in tensors.items()}
    num_weights = saved = 0
    for name in [name.removesuffix("_packed") for name in sizes if name.endswith("_packed")]:
        with safe_open(tensors[f"{name}_shape"].shard, framework="pt") as file:
            num = int(file.get_tensor(f"{name}_shape").prod())
        num_weights += num
        saved += num * _BYTES[tensors["model.embed_tokens.weight"].dtype]
        saved -= sum(sizes[f"{name}_{part}"] for part in ("packed", "scale", "shape"))
    return num_weights, sum(sizes.values()), saved


def _parts(name: str, weight: Tensor) -> list[tuple[str, Tensor]]:
    """A weight's names in the file, and what of it they are."""
    path, _, last = name.rpartition(".")
    if last not in STACKS:
        return [(name, weight)]
    return [
        (f"{path}.{expert}.{part}.weight", matrix)
        for expert, both in enumerate(weight)
        for part, matrix in zip(STACKS[last], both.chunk(len(STACKS[last])), strict=True)
    ]


@torch.no_grad()
def _codes(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: int4.quantize(model.get_parameter(name).to(how.dtype), how.group_size, how.convention)[0].cpu()
        for name, how in settings(model).items()
    }


def plot_int4(path: Path, outcome: Int4Outcome, held_out: Sequence[tuple[int, float]], title: str) -> None:
    """Draw the held-out losses over the steps, and what rounding costs before and after training, as PNG.

    Args:
        held_out: (step, loss) pairs of the run.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    losses, costs = figure.subplots(1, 2, width_ratios=(2, 1))
    figure.suptitle(title)
    steps = [0, *(step for step, _ in held_out)]
    curve = [outcome.start_rounded, *(loss for _, loss in held_out)]
    losses.plot(steps, curve, color="#d94801", marker="o", label="training on the grid")
    losses.axhline(outcome.start, color="#08519c", linestyle="--", linewidth=1.2, label="start, float")
    losses.set(xlabel="Step", ylabel="Held-out loss (nats per token)")
    losses.legend(frameon=False)
    names = ("start\n(rounding a\nfinished model)", "trained\n(rounding its\nmasters)")
    values = (outcome.start_rounded - outcome.start, outcome.trained_rounded - outcome.trained)
    bars = costs.bar(names, values, color=("#08519c", "#d94801"), width=0.5)
    costs.bar_label(bars, [f"{value:+.2g}" for value in values], padding=3)
    costs.axhline(0, color="#525252", linewidth=0.8)
    costs.set(ylabel="INT4 minus float (nats)")
    costs.margins(y=0.2)
    for axes in (losses, costs):
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
