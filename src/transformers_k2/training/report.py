"""What a finished run tells its user: the summary, on the screen and as JSON, and the plot of the losses."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from ..files import replacing, write_text
from ..parallel import Layout
from .baselines import unigram_and_bigram_loss
from .callbacks import Metrics
from .context import ContextLosses
from .data import Data
from .expert_load import LINES as LOAD_LINES
from .expert_load import PICTURE as LOAD_PICTURE
from .expert_load import ExpertLoadMonitor, LoadOutcome
from .int4_report import NUMBERS as INT4_NUMBERS
from .int4_report import PICTURE as INT4_PICTURE
from .int4_report import Int4Outcome
from .muon_clip_monitor import LINES, PICTURE, ClipOutcome, MuonClipMonitor
from .recipe import Recipe
from .rows import predicted_pairs, spread
from .sources import describe

_COUNTED = 200_000  # rows that the counting baselines look at, at most

MODEL_FILES = {
    "config.json": "the model, in the hub's layout, with its safetensors and the tokenizer's files",
}
ADAPTER_FILES = {
    "adapter_config.json": "the adapter, as PEFT reads it, with adapter_model.safetensors and the tokenizer's files",
}
FILES = {
    "recipe.yaml": "the recipe with all overrides: k2 train repeats the run from it",
    "loss.png": "training and held-out loss against the counted baselines",
    "metrics.jsonl": "loss, gradient norm and learning rate of every step",
    "summary.json": "the numbers above",
}
LOAD_FILES = {
    LOAD_PICTURE: "which experts got how many tokens",
    LOAD_LINES: "the same of every step",
}
QK_CLIP_FILES = {
    PICTURE: "largest logit of every head against tau, clips, and the size of the updates",
    LINES: "the same of every step: largest logits, factors and clips per head",
}
INT4_FILES = {
    INT4_PICTURE: "held-out loss on the INT4 grid, and what rounding costs before and after",
    INT4_NUMBERS: "the same as numbers, and how the files compare with what was trained",
}


@dataclass(frozen=True)
class QuantisedBase:
    """The frozen model under an adapter, as it was in memory."""

    method: str  # of the recipe
    group_size: int
    double_quant: bool
    num_bytes: int
    num_float_bytes: int  # of the same weights in the recipe's weights_dtype

    def __str__(self) -> str:
        linear = f", linear layers in NF4{' (double quantisation)' if self.double_quant else ''}"
        return (
            f"frozen, routed experts in INT4 (groups of {self.group_size}){linear if self.method == 'nf4' else ''}: "
            f"{self.num_bytes / 1e6:,.1f} MB, unquantised {self.num_float_bytes / 1e6:,.1f} MB"
        )

    def loading_code(self) -> tuple[str, str]:
        """Imports, and the argument of from_pretrained."""
        if self.method == "int4":
            argument = f"Int4Config({self.group_size})"
            return "from transformers_k2 import Int4Config\n", argument
        options = (
            f"load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant={self.double_quant}"
        )
        nf4 = f"BitsAndBytesConfig(\n    {options}\n)"
        imports = "from transformers import BitsAndBytesConfig\nfrom transformers_k2 import Int4Config\n"
        return imports, f"Int4Config({self.group_size}, linear={nf4})"


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
    bits_per_byte: float | None  # of texts; of conversations only some bytes count
    unigram_loss: float
    bigram_loss: float
    prompt: str
    sample: str
    reloaded: str  # how the reloaded model compares
    qk_clip: ClipOutcome | None = None  # of runs whose optimizer clips
    expert_load: LoadOutcome | None = None
    context: dict[str, dict[int, float]] | None = None  # losses by state and length
    processes: str = "1"
    base: str | None = None  # of an adapter
    quantised_base: QuantisedBase | None = None
    chat: bool = False  # the loss counts assistant turns only
    mfu: float | None = None  # of the last step
    int4: Int4Outcome | None = None  # of INT4 training

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
        numbers = {key: value for key, value in asdict(self).items() if value is not None}
        derived = {"tokens_per_second": self.tokens_per_second, "perplexity": self.perplexity}
        write_text(path, json.dumps({**numbers, **derived}, indent=2) + "\n")

    def loading_code(self) -> str:
        """Python lines that load the result and let it write."""
        adapter = f"model = PeftModel.from_pretrained(model, {self.output_dir!r})\n" if self.base else ""
        inputs = f"inputs = tokenizer({self.prompt!r}, return_tensors='pt')\n"
        if self.chat:
            inputs = (
                f"messages = [{{'role': 'user', 'content': {self.prompt!r}}}]\n"
                "inputs = tokenizer.apply_chat_template(\n"
                "    messages, add_generation_prompt=True, return_tensors='pt', return_dict=True\n)\n"
            )
        peft = "from peft import PeftModel\n" if self.base else ""
        option = ""
        if self.quantised_base is not None:
            imports, argument = self.quantised_base.loading_code()
            peft, option = peft + imports, f", quantization_config={argument}"
        return (
            f"import transformers_k2  # registers kimi_k2\n{peft}"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"tokenizer = AutoTokenizer.from_pretrained({self.output_dir!r})\n"
            f"model = AutoModelForCausalLM.from_pretrained({self.base or self.output_dir!r}{option})\n{adapter}{inputs}"
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
            **({"Base": str(self.quantised_base)} if self.quantised_base else {}),
            "Training": f"{self.steps:,} steps, {self.tokens:,} tokens ({self.passes:.2f} passes) in "
            f"{self.training_seconds:.1f} s: {self.tokens_per_second:,.0f} tokens/s",
            "Processes": self.processes
            + (f"; model FLOPs utilisation {self.mfu:.1%}" if self.mfu is not None else ""),
            "Whole run": f"{self.total_seconds:.0f} s, with preparing the text, evaluating, saving and reloading",
            "Training loss": f"{self.first_loss:.3f} at the first step, {self.last_loss:.3f} at the end",
            "Held-out loss": f"{self.held_out_loss:.3f} (perplexity {self.perplexity:.1f}"
            + (f", {self.bits_per_byte:.3f} bits per byte" if self.bits_per_byte is not None else "")
            + f"), on {self.evaluated_tokens:,} tokens{' of assistant turns' if self.chat else ''}",
            "Counting instead": f"{self.bigram_loss:.3f} with a table of token pairs (bigram), {self.unigram_loss:.3f} "
            "with token frequencies, both counted on the tokens that were trained on",
            **({"QK-Clip": str(self.qk_clip)} if self.qk_clip else {}),
            **({"Expert load": str(self.expert_load)} if self.expert_load else {}),
            **({"INT4": str(self.int4)} if self.int4 else {}),
            "Reloaded": self.reloaded,
        }
        for name, text in rows.items():
            table.add_row(name, Text(text))
        files = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        kinds = {
            **(ADAPTER_FILES if self.base else MODEL_FILES),
            **FILES,
            **(LOAD_FILES if self.expert_load else {}),
            **(QK_CLIP_FILES if self.qk_clip else {}),
            **(INT4_FILES if self.int4 else {}),
        }
        for name, text in kinds.items():
            files.add_row(Text(str(Path(self.output_dir) / name), style="cyan", overflow="fold"), Text(text))
        return Group(
            Panel(table, title=f"[bold]{escape(self.recipe)}[/bold]", title_align="left"),
            *([_context_table(self.context)] if self.context else []),
            Panel(
                Text.assemble((self.prompt, "bold"), self.sample),
                title="The model writes",
                title_align="left",
            ),
            Panel(files, title="Files", title_align="left"),
            Text("\nLoad it:\n", style="bold"),  # no frame: these lines are there to be copied
            Syntax(self.loading_code(), "python", background_color="default", word_wrap=True),
        )


def _context_table(losses: dict[str, dict[int, float]]) -> Panel:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("Held-out loss at length")
    for state in losses:
        table.add_column(state, justify="right")
    for length in next(iter(losses.values())):
        table.add_row(f"{length:,}", *(f"{by_length[length]:.3f}" for by_length in losses.values()))
    return Panel(
        table,
        title="Context: with the first rope scaling (plain) and the final one (scaled)",
        title_align="left",
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
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def summarise(
    recipe: Recipe,
    name: str,
    data: Data,
    parameters: tuple[int, int],
    metrics: Metrics,
    clips: MuonClipMonitor | None,
    loads: ExpertLoadMonitor,
    context: ContextLosses | None,
    sample: str,
    reloaded: str,
    layout: Layout,
    int4: Int4Outcome | None,
    base: QuantisedBase | None,
    total_seconds: float,
) -> RunSummary:
    """The outcome of a run whose parts are these."""
    losses = [loss for _, loss in metrics.training]
    held_out_loss = metrics.held_out[-1][1]
    length = recipe.data.sequence_length
    rows_read = recipe.training.steps * recipe.training.batch_size
    held_out = predicted_pairs(data.held_out, spread(len(data.held_out), recipe.training.eval_sequences))
    rows = data.rows(recipe, length, recipe.data.seed)
    counted = predicted_pairs(rows, range(min(rows_read, len(rows), _COUNTED)))
    unigram, bigram = unigram_and_bigram_loss(counted, held_out, len(data.tokenizer))
    held_out_tokens = data.num_tokens(data.held_out_documents)
    chat = recipe.data.kind == "chat"
    return RunSummary(
        recipe=name,
        source=describe(recipe.data.source),
        output_dir=recipe.output_dir,
        model=recipe.model.config or recipe.model.weights or "",
        num_parameters=parameters[0],
        num_active_parameters=parameters[1],
        training_documents=sum(map(len, data.training_documents)),
        held_out_documents=sum(map(len, data.held_out_documents)),
        skipped_files=data.skipped_files,
        training_tokens=data.num_tokens(data.training_documents),
        held_out_tokens=held_out_tokens,
        evaluated_tokens=len(held_out[1]),
        steps=recipe.training.steps,
        tokens=recipe.training.steps * recipe.tokens_per_step,
        training_seconds=metrics.seconds,
        total_seconds=total_seconds,
        first_loss=losses[0],
        last_loss=float(np.mean(losses[-max(1, len(losses) // 20) :])),
        held_out_loss=held_out_loss,
        bits_per_byte=None if chat else held_out_loss * held_out_tokens / data.held_out_bytes / math.log(2),
        unigram_loss=unigram,
        bigram_loss=bigram,
        prompt=recipe.generation.prompt,
        sample=sample,
        qk_clip=clips.outcome() if clips else None,
        expert_load=loads.outcome(),
        context=context.losses if context else None,
        processes=_describe(layout),
        reloaded=reloaded,
        base=None if recipe.adapter is None else recipe.model.weights,
        quantised_base=base,
        chat=chat,
        mfu=metrics.mfu,
        int4=int4,
    )


def _describe(layout: Layout) -> str:
    parts = [
        f"{size} {name}"
        for size, name in (
            (layout.pipeline, "pipeline stages"),
            (layout.replicate, "copies"),
            (layout.shard, "shards"),
            (layout.expert, "expert-parallel ranks"),
        )
        if size > 1
    ]
    return f"{layout.world_size}{': ' if parts else ''}{', '.join(parts)}"
