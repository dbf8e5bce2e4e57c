"""Every recipe in the folder works: it is complete, fits the processes its header names, and takes two steps in small.

Recipes are found by globbing. The small run keeps all that a recipe says about arithmetic, memory, packing, adapters and
quantisation; the model, the text, the number of steps and the number of processes shrink.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_k2 import KimiK2Config, KimiK2ForCausalLM
from transformers_k2.training import Recipe, build_config, load_recipe, train
from transformers_k2.training.chat_data import end_of_turn
from transformers_k2.training.prepare import step_plan
from transformers_k2.training.sources import Source

# peft reads what transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

FOLDER = Path(__file__).resolve().parents[2] / "training_recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
LARGE = [name for name in RECIPES if not name.startswith("debug_")]
TEXT, CHAT = 32, 64  # the shortest sequences; a context stage doubles them

SIZE = {
    "vocab_size": 640, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "q_lora_rank": 24, "kv_lora_rank": 16,
}  # fmt: skip
SMALL = [
    "model.config=debug_minute",
    "model.attention=sdpa",  # torch has no backward pass of flex_attention on the CPU
    "data.held_out_share=0.2",
    "data.weights=null",
    "schedule.warmup=1",
    "schedule.decay=1",
    "router.bias_freeze=1",
    "training.steps=2",
    "training.batch_size=4",
    "training.micro_batch_size=2",
    "training.eval_every=2",
    "training.eval_sequences=6",
    "training.cpu_threads=1",
    "training.data_workers=0",
    "parallel.pipeline=1",
    "parallel.shard=1",
    "parallel.expert=1",
    "generation.max_new_tokens=3",
    "logging.peak_tflops=1",  # not measured
]


@pytest.fixture(autouse=True, scope="module")
def _no_pictures() -> Iterator[None]:
    """Half of the time of runs this small; test_train.py looks at them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda _, path, **options: Path(path).touch())
        yield


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and conversations, both real."""
    folder = tmp_path_factory.mktemp("recipes")
    texts = islice(Source("stdlib"), 60, 72)
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text[:4000]}) for text in texts))
    rows = islice(Source("stdlib_chat").rows(), 80)
    (folder / "chat.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def shrunk(recipe: Recipe, work: Path, output: Path, weights: Path | None, size: dict[str, Any]) -> list[str]:
    """The overrides that leave of a recipe's sizes what takes a second."""
    chat = recipe.data.kind == "chat"
    length = CHAT if chat else TEXT
    changes = [
        *SMALL,
        f"output_dir={output}",
        f"data.cache_dir={work / 'cache'}",
        f"data.sequence_length={length}",
    ]
    changes += [f"model.overrides.{key}={json.dumps(value)}" for key, value in size.items()]
    if recipe.data.source in ("stdlib_chat", "stdlib_chat:json"):
        changes.append("data.max_bytes=12000")
    else:
        changes.append(f"data.source={work / ('chat.jsonl' if chat else 'text.jsonl')}")
    if weights is None:
        changes += ["model.weights=null", f"tokenizer.vocab_size={size['vocab_size']}", "tokenizer.path=null"]
    else:
        changes.append(f"model.weights={weights}")
    if recipe.context is not None:
        assert len(recipe.context.stages) == 2
        changes += [
            f"context.stages={json.dumps([stage(recipe, number) for number in range(2)])}",
            f"context.eval_lengths={[TEXT, 2 * TEXT, 4 * TEXT]}",
        ]
    return changes


def stage(recipe: Recipe, number: int) -> dict[str, Any]:
    assert recipe.context is not None
    scaling = recipe.context.stages[number].rope_scaling
    return {"steps": 1, "sequence_length": TEXT << number, "rope_scaling": scaling}


@pytest.fixture(scope="module")
def bases(work: Path) -> dict[str, Path]:
    """Weights to start from: a small run's, the same in bfloat16, and Moonlight's shape (queries of full rank)."""
    small = shrunk(load_recipe("debug_pretrain"), work, work / "float32", None, SIZE)
    train("debug_pretrain", small, Console(file=io.StringIO()))
    model: Any = AutoModelForCausalLM.from_pretrained(work / "float32")
    tokenizer = AutoTokenizer.from_pretrained(work / "float32")
    full_rank = KimiK2Config.from_dict(model.config.to_dict() | {"q_lora_rank": None})
    models = {
        "bfloat16": model.to(torch.bfloat16),
        "moonlight": KimiK2ForCausalLM(full_rank).bfloat16(),
    }
    for name, one in models.items():
        one.save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)
    return {name: work / name for name in ("float32", *models)}


def test_the_folder_has_a_debug_twin_of_every_large_recipe() -> None:
    assert {name.replace("k2_", "debug_") for name in LARGE} == set(RECIPES) - set(LARGE)


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_starts_from_is_another_recipes_output_or_yours(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.output_dir == f"runs/{name}"
    assert not recipe.overwrite
    assert name in yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["output_dir"]
    weights = recipe.model.weights
    if weights is not None and weights.startswith("runs/"):
        assert weights.removeprefix("runs/") in RECIPES
    else:
        assert weights is None or weights.startswith("weights/")


@pytest.mark.parametrize("name", LARGE)
def test_a_large_recipe_fits_the_processes_its_header_names(name: str) -> None:
    recipe = load_recipe(name)
    if recipe.model.weights is not None:
        recipe = load_recipe(name, ["model.weights=weights/not_read"])  # the size is that of model.config
    found = re.findall(
        r"\((\d+) process(?:es)?\b", (FOLDER / f"{name}.yaml").read_text().partition("\noutput_dir")[0]
    )
    assert len(found) == 1
    processes = int(found[0])
    config = build_config(recipe)
    assert "quantization_config" not in config.to_dict()  # or the saved model would claim to be FP8
    layout = recipe.layout(processes)
    layout.check(config, processes)
    assert layout.replicate == 1  # no process is left over
    if recipe.model.weights is None:
        assert config.max_position_embeddings == recipe.data.sequence_length
    # The rows of every step can be dealt out; the rows themselves are not asked for.
    data: Any = SimpleNamespace(rows=lambda *args, **kwargs: None)
    assert step_plan(recipe, data, layout).num_steps == recipe.training.steps


def test_pretraining_reads_the_reports_tokens() -> None:
    """arXiv 2507.20534, section 2.5: 67 M tokens a step; 10 T at 2e-4, 5.5 T down to 2e-5; then 400 B and 60 B."""
    recipe = load_recipe("k2_pretrain")
    assert recipe.tokens_per_step == 2**26
    decay = recipe.num_steps(recipe.schedule.decay)
    assert decay * 2**26 == pytest.approx(5.5e12, rel=1e-5)
    assert (recipe.training.steps - decay) * 2**26 == pytest.approx(10e12, rel=1e-5)
    context = load_recipe("k2_long_context")
    assert context.context is not None
    assert context.tokens_per_step == 2**26
    tokens = [stage.steps * context.tokens_per_step for stage in context.context.stages]
    assert tokens == pytest.approx([400e9, 60e9], rel=1e-3)
    assert context.optimizer.lr == recipe.schedule.min_lr
    last = context.context
    assert last.final_rope_scaling is not None
    published = json.loads((FOLDER.parent / "configs/kimi_k2_instruct.json").read_text())
    assert last.final_rope_scaling == published["rope_scaling"]
    assert last.max_position_embeddings == published["max_position_embeddings"]


def run_loading_code(code: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the lines print that a run ends with, writing less."""
    assert "max_new_tokens=100" in code
    capsys.readouterr()
    exec(code.replace("max_new_tokens=100", "max_new_tokens=3"), {})
    return capsys.readouterr().out


@pytest.mark.parametrize("name", RECIPES)
def test_two_steps_in_small(
    name: str, work: Path, bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(name)
    if recipe.quantization is not None and recipe.quantization.method == "nf4":
        pytest.importorskip("bitsandbytes")
    moonlight = recipe.model.config == "moonlight_16b_a3b_instruct"
    size = SIZE | {"q_lora_rank": None} if moonlight else SIZE
    start = bases["moonlight" if moonlight else recipe.training.weights_dtype]
    base = None if recipe.model.weights is None else start
    output = tmp_path / "run"
    printed = io.StringIO()
    summary = train(
        name, shrunk(recipe, work, output, base, size), Console(file=printed, width=200, force_terminal=False)
    )
    assert summary is not None
    assert summary.steps == 2
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in line for line in lines) == 2
    assert 3 < summary.held_out_loss < 9  # log(640) is 6.5
    assert summary.bigram_loss < summary.unigram_loss + 0.3
    loaded = run_loading_code(summary.loading_code(), capsys)
    prompt = "" if recipe.data.kind == "chat" else summary.prompt
    assert loaded.strip()
    assert prompt in loaded
    assert summary.reloaded in " ".join(printed.getvalue().replace("\u2502", " ").split())
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.chat_template
    if recipe.adapter is not None:
        saved = json.loads((output / "adapter_config.json").read_text())
        assert saved["base_model_name_or_path"] == str(base)
        assert saved["r"] == recipe.adapter.rank
        moved = {
            key: value
            for key, value in load_file(output / "adapter_model.safetensors").items()
            if "lora_B" in key
        }
        assert moved
        assert all(
            value.any() for key, value in moved.items() if ".experts." not in key
        )  # B is zero at first
        return
    model = AutoModelForCausalLM.from_pretrained(output)
    is_int4 = recipe.quantization is not None  # what has an adapter is done with
    assert ("quantization_config" in json.loads((output / "config.json").read_text())) == is_int4
    assert (summary.int4 is not None) == is_int4
    assert str(model.dtype) == f"torch.{recipe.training.weights_dtype}"
    if recipe.data.kind == "chat":
        assert end_of_turn(tokenizer) in model.generation_config.eos_token_id
        assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == "<|im_end|>"
    if recipe.context is not None:
        assert model.config.max_position_embeddings == recipe.context.max_position_embeddings
        final = recipe.context.final_rope_scaling
        assert final is not None
        assert model.config.rope_parameters["factor"] == final["factor"]
        assert model.config.rope_parameters["rope_type"] == "yarn"
        assert {"before, plain", "before, scaled", "after, plain", "after, scaled"} == (
            summary.context or {}
        ).keys()
