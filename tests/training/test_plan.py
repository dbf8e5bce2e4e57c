"""Recipes as plans: every recipe of the folder, and that what the recipe says is what is planned."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from transformers_k2 import KimiK2Config
from transformers_k2.parallel import Layout
from transformers_k2.parallel.planner import plan
from transformers_k2.resources import find
from transformers_k2.training.plan import plan_options, plan_recipe
from transformers_k2.training.prepare import build_config
from transformers_k2.training.recipe import Recipe, load_recipe

FOLDER = Path(__file__).parents[2] / "training_recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str, *overrides: str) -> Recipe:
    recipe = load_recipe(name)
    if recipe.model.config is None:  # the weights of a run that has not been
        overrides = ("model.config=debug_minute", *overrides)
    return load_recipe(name, overrides)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name[:3] == "k2_" else ()) for name in RECIPES]
)
def test_every_recipe(name: str) -> None:
    """On as many GPUs as its header names, and on the fewest that its layout has."""
    recipe = load(name)
    named = re.search(r"\((\d+) process", (FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    sizes = {fewest(recipe)} | ({int(named[1])} if named else set())
    for num_gpus in sizes:
        per_node = min(num_gpus, 8)
        made = plan_recipe(recipe, num_gpus // per_node, per_node)
        assert made.layout.world_size == num_gpus
        if (name, num_gpus) != ("k2_pretrain", 256):  # see the next test
            assert made.fits, [one.change for one in made.advice]
        assert bool(made.notes) == (recipe.adapter is not None or recipe.quantization is not None)


def fewest(recipe: Recipe) -> int:
    parallel = recipe.parallel
    return parallel.pipeline * (parallel.expert if parallel.shard == "all" else parallel.shard)


@pytest.mark.slow
def test_pretraining_on_32_nodes_is_as_its_header_says() -> None:
    assert fewest(load("k2_pretrain")) == 256
    assert not plan_recipe(load("k2_pretrain"), 32).fits
    for changes in (
        ["optimizer.master_weights=false"],
        ["memory.recompute=[full]", "parallel.micro_batches_per_run=32"],
    ):
        assert plan_recipe(load("k2_pretrain", *changes), 32).fits


def test_what_the_recipe_says_is_planned() -> None:
    recipe = load("debug_pretrain", "parallel.shard=all", "parallel.expert=2", "memory.recompute=[full]")
    made = plan_recipe(recipe, 1, 4, gpu_memory=3.0)
    expected = plan(
        build_config(recipe),
        Layout(shard=4, expert=2),
        micro_batch_size=2,  # the recipe's 8 are a step's
        sequence_length=128,
        batch_size=8,
        dtype="float32",
        mixed_precision=False,
        recompute=("full",),
        experts="grouped_mm",
        loss_chunk_tokens=None,
        gpus_per_node=4,
        gpu_memory=3.0,
    )
    assert made.stages == expected.stages
    assert made.capacity == expected.capacity


def test_the_longest_sequences_count() -> None:
    recipe = load("debug_long_context")
    assert recipe.context is not None
    lengths = [options["sequence_length"] for options in plan_options(recipe, 1)]
    assert lengths == [stage.sequence_length for stage in recipe.context.stages]
    tokens = {options["sequence_length"] * options["batch_size"] for options in plan_options(recipe, 1)}
    assert tokens == {recipe.tokens_per_step}
    made = plan_recipe(recipe, 1, 1)
    config = KimiK2Config.from_json_file(find("configs", "debug_minute"))
    others = [plan(config, Layout(), gpus_per_node=1, **options) for options in plan_options(recipe, 1)]
    assert made.fullest.peak == max(one.fullest.peak for one in others)


def test_refusals() -> None:
    recipe = load("debug_pretrain", "parallel.pipeline=3")
    with pytest.raises(ValueError, match="expected a multiple"):
        plan_recipe(recipe, 1, 4)
    with pytest.raises(ValueError, match="no option colour"):
        plan_recipe(load("debug_pretrain"), 1, 1, colour=1)
    with pytest.raises(ValueError, match="expected a multiple of 6, 3 data ranks"):
        plan_recipe(load("debug_pretrain"), 1, 3)


def test_another_size_takes_the_place_of_the_recipes(tmp_path: Path) -> None:
    (folder := tmp_path / "model").mkdir()
    (folder / "config.json").write_text(find("configs", "debug_0_2b").read_text(encoding="utf-8"))
    recipe = load("debug_pretrain")
    by_name, by_folder = (plan_recipe(recipe, 1, 2, size) for size in ("debug_0_2b", str(folder)))
    assert by_name.stages == by_folder.stages
    assert by_name.num_parameters > 100 * plan_recipe(recipe, 1, 2).num_parameters


def test_copies_that_do_not_fit_are_told_of_shards() -> None:
    made = plan_recipe(load("debug_pretrain"), 1, 8, "moonlight_16b_a3b_instruct")
    assert not made.fits
    best = made.advice[0]
    assert best.change == "shards in the place of copies (shard 8)"
    assert best.fits
    after = plan_recipe(load("debug_pretrain", "parallel.shard=8"), 1, 8, "moonlight_16b_a3b_instruct")
    assert after.fits
    assert made.fullest.peak - after.fullest.peak == pytest.approx(best.saves)
