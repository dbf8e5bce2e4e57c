"""Does a LoRA adapter teach a behaviour? Held-out questions, answered before and after debug_lora by plain PEFT.

The chat model of debug_sft answers in sentences; debug_lora teaches it to answer as JSON. Here both are loaded as anyone
would load them (AutoModelForCausalLM, PeftModel), asked questions that neither run trained on, and their greedy replies
are checked by a program: is it an object with the one key `answer`? Printed: a table, and the ratio last. Beside the
shares stands the loss on the same questions' JSON answers.

What it gives up: the share counts the form of an answer; a model of 1.5 M parameters knows few of the facts.
Runs that are not in --folder are trained first: debug_pretrain, debug_sft and debug_lora, five minutes of one idle core.

    python benchmarks/adapter.py [--folder runs] [--prompts 128]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_k2.training import load_recipe, prepare_data, train
from transformers_k2.training.stdlib_chat import STYLES

CHAIN = ("debug_pretrain", "debug_sft", "debug_lora")
BATCH = 32
LONGEST = 96  # new tokens; held-out answers have 60 at most


def prepare(folder: Path) -> None:
    """Train what is not there."""
    for before, name in zip((None, *CHAIN), CHAIN, strict=False):
        if not (folder / name / "summary.json").is_file():
            weights = [f"model.weights={folder / before}"] if before else []
            train(name, [f"output_dir={folder / name}", f"data.cache_dir={folder / 'cache'}", *weights])


def held_out(folder: Path, tokenizer: Any, count: int) -> tuple[str, list[tuple[list[int], list[int]]]]:
    """The style that the adapter was trained on, and (prompt ids, answer ids) of conversations it was not trained on."""
    recipe = load_recipe(folder / CHAIN[-1] / "recipe.yaml")
    assert isinstance(recipe.data.source, str)
    with Progress(disable=True) as progress:
        data = prepare_data(recipe, tokenizer, folder / CHAIN[-1], progress)
    (cache,), (numbers,) = data.caches, data.held_out_documents
    assert cache.loss is not None
    found = []
    for number in numbers[:: max(len(numbers) // count, 1)][:count].tolist():
        start, stop = int(cache.offsets[number]), int(cache.offsets[number + 1])
        ids, loss = cache.ids[start:stop].tolist(), cache.loss[start:stop].tolist()
        found.append((ids[: loss.index(1)], ids[loss.index(1) :]))
    return recipe.data.source.partition(":")[2], found


@torch.no_grad()
def loss(model: Any, rows: list[tuple[list[int], list[int]]]) -> float:
    """Mean over the tokens of the answers."""
    total, count = 0.0, 0
    for prompt, answer in rows:
        labels = torch.tensor([[-100] * len(prompt) + answer])
        total += len(answer) * float(model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss)
        count += len(answer)
    return total / count


@torch.no_grad()
def replies(model: Any, tokenizer: Any, rows: list[tuple[list[int], list[int]]]) -> list[str]:
    """Greedy answers to the prompts."""
    texts: list[str] = []
    for start in range(0, len(rows), BATCH):
        prompts = [prompt for prompt, _ in rows[start : start + BATCH]]
        inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
        texts += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="of the runs (runs)")
    parser.add_argument("--prompts", type=int, default=128, help="held-out questions (128)")
    options = parser.parse_args()
    prepare(options.folder)
    base_folder, adapter_folder = options.folder / CHAIN[1], options.folder / CHAIN[2]
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    style, rows = held_out(options.folder, tokenizer, options.prompts)
    model: Any = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    table = Table(title=f"Answers in the style {style!r} to {len(rows)} questions held out of both runs")
    for heading in ("model", "in the style", "share", "loss on such answers", "an answer"):
        table.add_column(heading)
    shares: list[int] = []
    for name in ("debug_sft", "debug_sft + debug_lora"):
        if shares:
            model = PeftModel.from_pretrained(model, str(adapter_folder)).eval()
        answers = replies(model, tokenizer, rows)
        shares.append(sum(STYLES[style].holds(answer) for answer in answers))
        share = f"{shares[-1] / len(rows):.0%}"
        table.add_row(name, str(shares[-1]), share, f"{loss(model, rows):.3f}", answers[0])
    console = Console()
    console.print(table)
    console.print(f"before {shares[0] / len(rows):.3f}, after {shares[1] / len(rows):.3f}", highlight=False)


if __name__ == "__main__":
    main()
