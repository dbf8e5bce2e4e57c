"""What a finished run tells its user: the summary, on the screen and as JSON, and the plot of the losses."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from ..files import write_text
from .muon_clip_monitor import LINES, PICTURE, ClipOutcome

FILES = {
    "config.json": "the model, in the hub's layout, with model.safetensors and the tokenizer's files",
    "recipe.yaml": "the recipe with all overrides: k2 train repeats the run from it",
    "loss.png": "training and held-out loss against the counted baselines",
    "metrics.jsonl": "loss, gradient norm and learning rate of every step",
    "summary.json": "the numbers above",
}
QK_CLIP_FILES = {
    PICTURE: "largest logit of every head against tau, clips, and the size of the updates",
    LINES: "the same of every step: largest logits, factors and clips per head",
}


@dataclass(frozen=True)
class RunSummary:
    """The outcome of a run. Losses are means in nats per token."""

    recipe: str
    source: str
    output_dir: str
    model: str
    num_parameters: int
    num_active_parameters: int
    training_documents: int
    held_out_documents: int
    skipped_files: int
    training_tokens: int  # in the training text
    held_out_tokens: int  # in the held-out text
    evaluated_tokens: int  # of them, predicted at each evaluation
    steps: int
    tokens: int  # read by all steps
    training_seconds: float  # steps only: no evaluation, no preparation
    total_seconds: float
    first_loss: float  # of the first step
    last_loss: float  # mean of the last twentieth of the steps
    held_out_loss: float
    bits_per_byte: float
    unigram_loss: float
    bigram_loss: float
    prompt: str
    sample: str
    qk_clip: ClipOutcome | None = None  # of runs whose optimizer clips

    @property
    def tokens_per_second(self) -> float:
        """Training throughput."""
        return self.tokens / self.training_seconds

    @property
    def perplexity(self) -> float:
        """Of the held-out tokens."""
        return math.exp(self.held_out_loss)

    @property
    def passes(self) -> float:
        """How often the steps went through the training text."""
        return self.tokens / self.training_tokens

    def save(self, path: Path) -> None:
        """Write all numbers as JSON."""
        numbers = asdict(self)
        if self.qk_clip is None:
            del numbers["qk_clip"]
        derived = {"tokens_per_second": self.tokens_per_second, "perplexity": self.perplexity}
        write_text(path, json.dumps({**numbers, **derived}, indent=2) + "\n")

    def loading_code(self) -> str:
        """Python lines that load the result and let it write."""
        return (
            "import transformers_k2  # registers kimi_k2\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"tokenizer = AutoTokenizer.from_pretrained({self.output_dir!r})\n"
            f"model = AutoModelForCausalLM.from_pretrained({self.output_dir!r})\n"
            f"inputs = tokenizer({self.prompt!r}, return_tensors='pt')\n"
            "output = model.generate(**inputs, max_new_tokens=100, do_sample=True)\n"
            "print(tokenizer.decode(output[0]))"
        )

    def __rich__(self) -> RenderableType:
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), title_justify="left")
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        skipped = f", {self.skipped_files} files that are not text left out" if self.skipped_files else ""
        rows = {
            "Text": f"{self.source}: {self.training_documents:,} documents, {self.training_tokens:,} tokens to train "
            f"on; {self.held_out_documents:,} documents, {self.held_out_tokens:,} tokens held out{skipped}",
            "Model": f"{self.model}: {self.num_parameters / 1e6:.2f} M parameters, "
            f"{self.num_active_parameters / 1e6:.2f} M of them used per token",
            "Training": f"{self.steps:,} steps, {self.tokens:,} tokens ({self.passes:.2f} passes) in "
            f"{self.training_seconds:.1f} s: {self.tokens_per_second:,.0f} tokens/s",
            "Whole run": f"{self.total_seconds:.0f} s, with preparing the text, evaluating, saving and reloading",
            "Training loss": f"{self.first_loss:.3f} at the first step, {self.last_loss:.3f} at the end",
            "Held-out loss": f"{self.held_out_loss:.3f} (perplexity {self.perplexity:.1f}, {self.bits_per_byte:.3f} "
            f"bits per byte), on {self.evaluated_tokens:,} tokens",
            "Counting instead": f"{self.bigram_loss:.3f} with a table of token pairs (bigram), {self.unigram_loss:.3f} "
            "with token frequencies, both counted on the tokens that were trained on",
            **({"QK-Clip": str(self.qk_clip)} if self.qk_clip else {}),
            "Reloaded": "with AutoModelForCausalLM and AutoTokenizer: the logits are the same to the bit",
        }
        for name, text in rows.items():
            table.add_row(name, Text(text))
        files = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, text in {**FILES, **(QK_CLIP_FILES if self.qk_clip else {})}.items():
            files.add_row(Text(str(Path(self.output_dir) / name), style="cyan", overflow="fold"), Text(text))
        return Group(
            Panel(table, title=f"[bold]{escape(self.recipe)}[/bold]", title_align="left"),
            Panel(
                Text.assemble((self.prompt, "bold"), self.sample),
                title="The model writes",
                title_align="left",
            ),
            Panel(files, title="Files", title_align="left"),
            Text("\nLoad it:\n", style="bold"),  # no frame: these lines are there to be copied
            Syntax(self.loading_code(), "python", background_color="default", word_wrap=True),
        )


def smooth(losses: Sequence[float], reach: int) -> list[float]:
    """The mean of each loss and up to `reach` neighbours on either side, as many on both: the curve does not lag."""
    reaches = [min(reach, step, len(losses) - 1 - step) for step in range(len(losses))]
    return [fmean(losses[step - near : step + near + 1]) for step, near in enumerate(reaches)]


def plot_losses(
    path: Path,
    training: Sequence[tuple[int, float]],
    held_out: Sequence[tuple[int, float]],
    tokens_per_step: int,
    baselines: dict[str, float],
    title: str,
) -> None:
    """Draw the losses over the tokens read, as PNG.

    Args:
        training, held_out: (step, loss) pairs.
        baselines: names and losses of two constant reference lines.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    thousands = tokens_per_step / 1000
    tokens = [step * thousands for step, _ in training]
    losses = [loss for _, loss in training]
    axes.plot(tokens, losses, color="#9ecae1", linewidth=0.8, label="training, each step")
    axes.plot(
        tokens, smooth(losses, len(losses) // 50), color="#08519c", linewidth=1.8, label="training, smoothed"
    )
    axes.plot(
        [step * thousands for step, _ in held_out],
        [loss for _, loss in held_out],
        color="#d94801",
        marker="o",
        markersize=5,
        linewidth=1.4,
        clip_on=False,
        zorder=3,
        label="held out",
    )
    right = tokens[-1]
    for (name, loss), style in zip(baselines.items(), ("--", ":"), strict=True):
        axes.axhline(loss, color="#525252", linestyle=style, linewidth=1.1, label=f"{name}, {loss:.2f}")
    if held_out:
        step, loss = held_out[-1]
        axes.annotate(  # right of the curve, where nothing else is drawn
            f"{loss:.2f}",
            (step * thousands, loss),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color="#d94801",
            fontsize=10,
            fontweight="bold",
            annotation_clip=False,
        )
    axes.set(title=title, xlabel="Training tokens read (thousands)", ylabel="Loss (nats per token)")
    axes.set_xlim(0, right)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(path)
