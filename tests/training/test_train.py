"""`train` from end to end on a small real text: what it writes, and whether the numbers are the ones torch gets."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math
import sysconfig
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
import yaml
from matplotlib import image
from rich.console import Console
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_k2 import KimiK2ForCausalLM, KimiK2Tokenizer
from transformers_k2.optim import SCHEDULES, muon_clip
from transformers_k2.optim.options import STATE_DTYPES
from transformers_k2.parallel import Layout, RandomWeights, build_model
from transformers_k2.training import NonFiniteLossError, RunSummary, build_config, load_recipe, train
from transformers_k2.training.optimizers import OPTIMIZERS, AdamW, MuonClip
from transformers_k2.training.recipe import Recipe
from transformers_k2.training.report import smooth
from transformers_k2.training.rows import JoinedRows, Row
from transformers_k2.training.sources import Source
from transformers_k2.training.token_cache import build_cache, encode_texts, split

RECIPE = "debug_pretrain"
ADAMW = "optimizer={name: adamw, lr: 3e-3, betas: [0.9, 0.95], weight_decay: 0.1, eps: 1e-8}"
SMALL = [
    "tokenizer.vocab_size=640",
    "model.overrides={vocab_size: 640, num_hidden_layers: 2, hidden_size: 32, intermediate_size: 48,"
    " n_routed_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 16, q_lora_rank: 24, kv_lora_rank: 16}",
    "data.sequence_length=33",
    "training.batch_size=4",
    "training.steps=2",
    "training.eval_every=2",
    "training.eval_sequences=9",
    "generation.max_new_tokens=5",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One real text file."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes((Path(sysconfig.get_path("stdlib")) / "json" / "decoder.py").read_bytes())
    return path


def places(text: Path, output: Path) -> list[str]:
    return [f"data.source={text}", f"output_dir={output}", f"data.cache_dir={text.parent / 'cache'}"]


def run(text: Path, output: Path, *overrides: str) -> tuple[RunSummary, str]:
    console = Console(width=160, record=True, file=io.StringIO())
    summary = train(RECIPE, [*SMALL, *places(text, output), *overrides], console)
    return summary, console.export_text()


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunSummary, Path, str]:
    output = tmp_path_factory.mktemp("runs") / "small"
    summary, printed = run(text, output)
    return summary, output, printed


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def rows_of(folder: Path, text: Path) -> tuple[Recipe, list[Row], list[Row], float]:
    """The rows of a finished run, put together again from its recipe and tokenizer, and bytes per held-out token."""
    recipe = load_recipe(folder / "recipe.yaml")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    source, length, seed = Source(str(text)), recipe.data.sequence_length, recipe.data.seed
    cache = build_cache(
        source, lambda batch: encode_texts(batch, tokenizer), tokenizer, folder / "again", seed
    )
    training, held_out = split(cache, recipe.data.held_out_share)
    order = JoinedRows(cache, training, length, seed)
    wanted = recipe.training.steps * recipe.training.batch_size
    judged = JoinedRows(cache, held_out, length, shuffle=False)
    count = min(len(judged), recipe.training.eval_sequences)
    numbers = np.linspace(0, len(judged) - 1, count).astype(int)
    tokens = sum(len(cache.tokens(number)) for number in held_out)
    return (
        recipe,
        [order.row(index) for index in range(wanted)],
        [judged.row(number) for number in numbers],
        sum(cache.num_bytes[number] for number in held_out) / tokens,
    )


def test_a_run_leaves_a_folder_that_the_auto_classes_load(finished: tuple[RunSummary, Path, str]) -> None:
    summary, folder, _ = finished
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model) is KimiK2ForCausalLM
    assert type(tokenizer) is KimiK2Tokenizer
    assert model.config.use_cache
    assert (model.config.eos_token_id, model.config.pad_token_id) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    assert model.config.vocab_size == len(tokenizer) == 640
    output = model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert output.shape[0] == 1
    assert summary.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert summary.num_active_parameters == summary.num_parameters - routed // 2  # 2 of 4 experts
    assert sorted(path.name for path in folder.parent.iterdir()) == ["small"]
    assert not list(folder.glob("*.bin"))  # nothing pickled


def test_the_resolved_recipe_is_the_file_and_the_overrides(
    finished: tuple[RunSummary, Path, str], text: Path
) -> None:
    _, folder, _ = finished
    expected = load_recipe(RECIPE, [*SMALL, *places(text, folder)])
    assert load_recipe(folder / "recipe.yaml") == expected


def test_the_plot_is_a_picture(finished: tuple[RunSummary, Path, str]) -> None:
    _, folder, _ = finished
    pixels = image.imread(folder / "loss.png")
    assert pixels.shape[0] >= 400
    assert pixels.shape[1] >= 800
    assert len({tuple(pixel) for pixel in pixels[::4, ::4, :3].reshape(-1, 3).tolist()}) > 20
    assert (folder / "loss.png").stat().st_size > 10_000


def test_the_summary_says_what_happened(finished: tuple[RunSummary, Path, str]) -> None:
    summary, folder, printed = finished
    saved = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert saved["held_out_loss"] == summary.held_out_loss
    assert summary.steps == 2
    assert summary.tokens == 2 * 4 * 33
    assert summary.tokens_per_second == pytest.approx(summary.tokens / summary.training_seconds)
    assert summary.perplexity == pytest.approx(math.exp(summary.held_out_loss))
    for part in (
        f"{summary.held_out_loss:.3f}",
        f"{summary.bigram_loss:.3f}",
        str(folder / "loss.png"),
        f"AutoModelForCausalLM.from_pretrained({str(folder)!r})",
        "Training the tokenizer",
        "Tokenising",
        "step 2/2: loss",
    ):
        assert part in printed


def test_the_losses_are_those_of_a_forward_pass_by_hand(
    finished: tuple[RunSummary, Path, str], text: Path
) -> None:
    summary, folder, _ = finished
    recipe, training, held_out, bytes_per_token = rows_of(folder, text)

    def mean_loss(model: torch.nn.Module, ids: torch.Tensor) -> float:
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()

    ids = torch.stack([row["input_ids"] for row in held_out])
    assert summary.evaluated_tokens == ids[:, 1:].numel()
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    assert summary.held_out_loss == pytest.approx(mean_loss(reloaded, ids), rel=1e-5)  # sums in another order

    config = build_config(recipe)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, key, getattr(reloaded.config, key))
    fresh = build_model(config, Layout(), RandomWeights(config, recipe.training.seed))
    first = torch.stack([training[item]["input_ids"] for item in range(4)])
    assert summary.first_loss == pytest.approx(mean_loss(fresh, first), rel=1e-5)
    assert summary.bits_per_byte == pytest.approx(summary.held_out_loss / math.log(2) / bytes_per_token)


def test_the_learning_rate_follows_the_formula(text: Path, tmp_path: Path) -> None:
    settings = [
        "training.steps=12",
        "schedule.warmup=3",
        "schedule.decay=0.5",
        "optimizer.lr=0.004",
        "schedule.min_lr=0.001",
    ]
    run(text, tmp_path / "run", *settings)
    rates = [line["learning_rate"] for line in lines(tmp_path / "run") if "loss" in line]
    low, high = 0.001, 0.004
    warmup = [low + (high - low) * step / 3 for step in range(3)]
    decay = [low + (high - low) * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    assert rates == pytest.approx([*warmup, high, high, high, *decay], rel=1e-9)


def test_the_same_seed_gives_the_same_run(
    finished: tuple[RunSummary, Path, str], text: Path, tmp_path: Path
) -> None:
    summary, folder, _ = finished
    again, _ = run(text, tmp_path / "again")
    other, _ = run(text, tmp_path / "other", "training.seed=1")

    def numbers(path: Path) -> list[dict]:
        timed = ("seconds", "tokens_per_second", "mfu")
        return [{key: value for key, value in line.items() if key not in timed} for line in lines(path)]

    assert numbers(tmp_path / "again") == numbers(folder)
    assert again.sample == summary.sample
    first, second, third = (
        load_file(path / "model.safetensors") for path in (folder, tmp_path / "again", tmp_path / "other")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert other.first_loss != summary.first_loss
    assert not torch.equal(first["lm_head.weight"], third["lm_head.weight"])


def test_accumulated_gradients_are_those_of_the_whole_batch(
    finished: tuple[RunSummary, Path, str], text: Path, tmp_path: Path
) -> None:
    _, folder, _ = finished
    run(text, tmp_path / "run", "training.micro_batch_size=1")
    whole, pieces = (
        [line["loss"] for line in lines(path) if "loss" in line] for path in (folder, tmp_path / "run")
    )
    assert pieces == pytest.approx(whole, rel=1e-5)  # sums in another order


@pytest.mark.parametrize("optimizer", ["adamw", "muonclip"])
def test_divergence_stops_the_run_and_touches_nothing(text: Path, tmp_path: Path, optimizer: str) -> None:
    output = tmp_path / "run"
    run(text, output)
    before = contents(output)
    settings = [
        *([ADAMW] if optimizer == "adamw" else []),
        "optimizer.lr=1e38",
        "training.max_grad_norm=null",
        "schedule.warmup=0",
        "training.steps=6",
        "overwrite=true",
    ]
    with pytest.raises(NonFiniteLossError) as caught:
        run(text, output, *settings)
    assert "Training stopped at step" in str(caught.value)
    assert "Try a lower optimizer.lr" in str(caught.value)
    assert contents(output) == before
    bad = lines(tmp_path / "run.unfinished")[-1]
    assert bad["step"] == 1  # the second step would have been the first bad one to be logged
    if optimizer == "adamw":
        assert "gradient norm is" in str(caught.value)
    else:  # the logits of the next forward pass told it first
        assert "attention logits of heads" in str(caught.value) or "gradient norm is" in str(caught.value)


def test_an_earlier_run_is_replaced_only_when_asked(
    finished: tuple[RunSummary, Path, str], text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    run(text, output)
    (output / "left_over.txt").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match="overwrite=true"):
        run(text, output)
    assert (output / "left_over.txt").exists()
    summary, _ = run(
        text, output, "overwrite=true", "tokenizer.vocab_size=null", f"tokenizer.path={finished[1]}"
    )
    assert not (output / "left_over.txt").exists()
    assert summary.held_out_loss == finished[0].held_out_loss  # the same tokenizer, loaded instead of trained


def test_a_tokenizer_that_is_too_large_is_refused(
    finished: tuple[RunSummary, Path, str], text: Path, tmp_path: Path
) -> None:
    settings = [
        "tokenizer.vocab_size=null",
        f"tokenizer.path={finished[1]}",
        "model.overrides.vocab_size=600",
    ]
    with pytest.raises(ValueError, match=r"640 ids.*only 600: set model.overrides.vocab_size=640"):
        run(text, tmp_path / "run", *settings)


def test_processes_without_a_meeting_place_are_refused(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, but RANK"):
        run(text, tmp_path / "run")


def test_the_number_of_threads_is_the_recipes_while_it_runs(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    forward = KimiK2ForCausalLM.forward

    @functools.wraps(forward)  # Trainer reads its signature
    def watched(*args, **kwargs):
        seen.append(torch.get_num_threads())
        return forward(*args, **kwargs)

    monkeypatch.setattr(KimiK2ForCausalLM, "forward", watched)
    before = torch.get_num_threads()
    run(text, tmp_path / "run", "training.cpu_threads=2")
    assert set(seen) == {2}
    assert torch.get_num_threads() == before


def test_smoothing_is_centred() -> None:
    straight = [2.0 * step for step in range(9)]
    assert smooth(straight, 3) == pytest.approx(straight)  # a trailing mean would lag
    assert smooth([0.0, 3.0, 0.0, 3.0, 0.0], 1) == pytest.approx([0.0, 1.0, 2.0, 1.0, 0.0])


def test_adamw_decays_every_parameter_once(finished: tuple[RunSummary, Path, str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished[1])
    factory, options = AdamW("adamw", lr=0.1, betas=(0.9, 0.95), weight_decay=0.25, eps=1e-8).cls_and_kwargs()
    optimizer = factory()(model, **options)  # as Trainer calls it
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    before = model.model.norm.weight.detach().clone()
    for parameter in held:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.model.norm.weight.detach(), before * (1 - 0.1 * 0.25), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_table_is_keyed_by_name(name: str) -> None:
    recipe = load_recipe(RECIPE, [ADAMW] if name == "adamw" else [])
    assert isinstance(recipe.optimizer, OPTIMIZERS[name])


def test_muonclip_takes_what_a_recipe_sets() -> None:
    recipe = load_recipe(RECIPE)
    settings = yaml.safe_load(recipe.to_yaml())["optimizer"]
    del settings["name"]
    _, options = recipe.optimizer.cls_and_kwargs()
    assert options == settings | {"betas": tuple(settings["betas"]), "process_group": None}
    assert muon_clip(**options)[1] == options
    hints = get_type_hints(MuonClip)
    assert get_args(hints["ns_schedule"]) == tuple(SCHEDULES)
    assert set(get_args(hints["state_dtype"])) == set(STATE_DTYPES)


def test_a_run_with_muonclip_shows_its_clips(text: Path, tmp_path: Path) -> None:
    summary, printed = run(
        text, tmp_path / "run", "optimizer.qk_clip_tau=0.5", "training.steps=3", "training.eval_every=3"
    )
    outcome = summary.qk_clip
    assert outcome is not None
    steps = [
        json.loads(line)
        for line in (tmp_path / "run" / "qk_clip.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [step["step"] for step in steps] == [1, 2, 3]
    logits = [[logit for item in step["attention"].values() for logit in item["max_logit"]] for step in steps]
    assert outcome.peak_logit == max(map(max, logits)) > 0.5 == outcome.tau
    assert outcome.num_heads == 4
    assert outcome.heads_clipped == sum(max(head) > 0.5 for head in zip(*logits, strict=True)) > 0
    assert image.imread(tmp_path / "run" / "qk_clip.png").shape[1] >= 800
    saved = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert saved["qk_clip"] == dataclasses.asdict(outcome)
    assert "QK-Clip" in printed
    wide = Console(width=600, record=True, file=io.StringIO())
    wide.print(summary)
    shown = wide.export_text()
    for part in (
        str(outcome),
        str(tmp_path / "run" / "qk_clip.png"),
        str(tmp_path / "run" / "qk_clip.jsonl"),
    ):
        assert part in shown


@pytest.mark.parametrize("settings", [[ADAMW], ["optimizer.qk_clip_tau=null"]])
def test_a_run_that_does_not_clip_says_nothing_of_it(text: Path, tmp_path: Path, settings: list[str]) -> None:
    summary, printed = run(text, tmp_path / "run", *settings)
    assert summary.qk_clip is None
    assert not list((tmp_path / "run").glob("qk_clip*"))
    assert "qk_clip" not in json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert "qk_clip" not in printed
    assert "QK-Clip" not in printed
