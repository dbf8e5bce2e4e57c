"""Recipes: what a file and its overrides mean, and what is refused in which words."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import yaml

from transformers_k2.resources import find, folder, names
from transformers_k2.training import build_config, load_recipe
from transformers_k2.training.recipe import Recipe
from transformers_k2.training.schema import keys

RECIPE = "debug_pretrain"


@pytest.mark.parametrize("name", names("training_recipes"))
def test_every_recipe_is_complete_and_fits_its_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no run has left weights
    recipe = load_recipe(name)
    if (weights := recipe.model.weights) is not None and weights.startswith("runs/"):
        # Made by another recipe first; tests/training/test_recipes_run.py does.
        with pytest.raises(ValueError, match=f"k2 train {Path(weights).name}"):
            build_config(recipe)
        assert Path(weights).name in names("training_recipes")
        return
    assert build_config(recipe).vocab_size >= (recipe.tokenizer.vocab_size or 0)


def test_the_readme_shows_every_key() -> None:
    text = (folder("training_recipes") / "README.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"`([\w.]+)`", text))
    leaves = {name.rsplit(".", 1)[-1] for name in shown}
    missing = [key for key in keys(Recipe) if key not in shown and key.rsplit(".", 1)[-1] not in leaves]
    assert not missing


def test_values_equal_those_that_plain_yaml_reads() -> None:
    values = yaml.safe_load(find("training_recipes", RECIPE).read_text(encoding="utf-8"))
    recipe = load_recipe(RECIPE)
    assert recipe.training.steps == values["training"]["steps"]
    assert recipe.data.source == values["data"]["source"]
    assert recipe.generation.prompt == values["generation"]["prompt"]
    assert recipe.optimizer.lr == float(values["optimizer"]["lr"])  # text to plain YAML: 3e-3


def test_overrides_change_only_their_keys_and_survive_the_round_trip(tmp_path: Path) -> None:
    overrides = [
        "training.steps=7",
        "optimizer.lr=1e-3",
        "data.source=[a.txt, 'b c.txt']",
        "model.overrides.num_hidden_layers=2",
        "model.overrides={hidden_size: 64}",
        "model.overrides.rms_norm_eps=1e-5",
        "optimizer.betas=[0.8, 0.99]",
        "overwrite=true",
        "training.max_grad_norm=null",
    ]
    recipe = load_recipe(RECIPE, overrides)
    plain = load_recipe(RECIPE)
    assert recipe.training.steps == 7
    assert recipe.optimizer.lr == 0.001
    assert recipe.data.source == ["a.txt", "b c.txt"]
    assert recipe.model.overrides == {"hidden_size": 64, "rms_norm_eps": 1e-5}
    assert recipe.optimizer.betas == (0.8, 0.99)
    assert recipe.overwrite
    assert recipe.training.max_grad_norm is None
    assert recipe.generation == plain.generation
    assert recipe.optimizer.weight_decay == plain.optimizer.weight_decay

    saved = tmp_path / "resolved.yaml"
    saved.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(saved) == recipe
    assert yaml.safe_load(saved.read_text(encoding="utf-8"))["optimizer"]["betas"] == [0.8, 0.99]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "training.stepz=5",
            ["unknown key 'training.stepz'", "mean 'training.steps'", "batch_size, micro_batch_size"],
        ),
        ("stepz=5", ["unknown key 'stepz'", "mean 'training.steps'", "output_dir, overwrite, model"]),
        ("trainin.steps=5", ["unknown key 'trainin'", "mean 'training'"]),
        ("data.eval_every=5", ["unknown key 'data.eval_every'", "mean 'training.eval_every'"]),
        ("optimizer.tau=5", ["unknown key 'optimizer.tau'", "name, lr, momentum, nesterov"]),
        ("optimizer={name: adamw, momentum: 1}", ["unknown key 'optimizer.momentum'", "name, lr, betas"]),
        ("optimizer.name=adamv", ["optimizer.name is 'adamv'", "mean 'adamw'"]),
        ("optimizer=adamw", ["optimizer needs the key 'name'", "adamw"]),
        ("optimizer={name: adamw}", ["'optimizer.lr' is missing", "a number > 0"]),
        ("optimizer.momentum=1", ["optimizer.momentum is 1", "a number from 0 to 1, 1 excluded"]),
        ("optimizer.qk_clip_tau=0", ["optimizer.qk_clip_tau is 0", "a number > 0 or null"]),
        ("optimizer.ns_steps=5.0", ["optimizer.ns_steps is 5.0 (float)", "an integer >= 1"]),
        ("optimizer.ns_schedule=fast", ["optimizer.ns_schedule is 'fast'", "muon", "polar_express"]),
        ("optimizer.nesterov=1", ["optimizer.nesterov is 1 (int)", "true or false"]),
        ("training.steps=many", ["training.steps is 'many' (str)", "an integer >= 1"]),
        ("training.steps=0", ["training.steps is 0", "an integer >= 1"]),
        ("training.steps=1.5", ["training.steps is 1.5 (float)", "an integer"]),
        ("training.steps=true", ["training.steps is True (bool)", "an integer"]),
        ("training.steps=", ["training.steps is null", "an integer"]),
        ("overwrite=1", ["overwrite is 1 (int)", "true or false"]),
        ("optimizer.lr=0", ["optimizer.lr is 0", "a number > 0"]),
        ("optimizer.lr=.nan", ["optimizer.lr is nan", "a number > 0"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas is [0.9]", "a list of 2"]),
        ("optimizer.betas=[0.9, 2]", ["optimizer.betas is [0.9, 2]", "from 0 to 1"]),
        ("training.dtype=float16", ["training.dtype is 'float16'", "one of float32, bfloat16"]),
        ("data.source=[1]", ["data.source is [1]", "text or a list, each item text"]),
        ("data.max_bytes=0", ["data.max_bytes is 0", "an integer >= 1 or null"]),
        ("data.held_out_share=0.9", ["data.held_out_share is 0.9", "from 0.0001 to 0.5"]),
        ("schedule.warmup=-1", ["schedule.warmup is -1", "an integer >= 0 or a number from 0 to 1"]),
        ("model=debug_minute", ["model is 'debug_minute'", "a mapping"]),
        ("training.steps.x=1", ["'training.steps' is 4", "not a section"]),
        ("training.steps", ["expected key=value"]),
        ("training..steps=1", ["expected key=value"]),
        ("data.source=[", ["not valid YAML"]),
        ("model.overrides={a: 1, a: 2}", ["the key 'a' is repeated"]),
    ],
)
def test_a_wrong_override_is_named_with_what_was_expected(override: str, expected: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        load_recipe(RECIPE, ["training.steps=4", override])
    message = str(caught.value)
    assert message.startswith(f"override {override!r}: "), message
    assert "\n" not in message
    for part in expected:
        assert part in message, message


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    text = find("training_recipes", RECIPE).read_text(encoding="utf-8")
    path = tmp_path / "mine.yaml"
    for changed, expected in (
        (
            text.replace("  seed: 0\n  cache_dir", "  cache_dir"),
            "mine.yaml: the key 'data.seed' is missing: expected an integer",
        ),
        (
            text.replace("  seed: 0\n  cache_dir", "  sed: 0\n  seed: 0\n  cache_dir"),
            "mine.yaml: unknown key 'data.sed'",
        ),
        (text + "overwrite: true\n", "the key 'overwrite' is repeated"),
        ("- a\n- b\n", "mine.yaml: the recipe is ['a', 'b']: expected a mapping"),
        ("", "mine.yaml: the recipe is None: expected a mapping"),
        ("a: [", "mine.yaml: not valid YAML (line "),
        ("a: \t- b\n\tc: 1", "mine.yaml: not valid YAML (line "),
    ):
        assert changed != text
        path.write_text(changed, encoding="utf-8")
        with pytest.raises(ValueError) as caught:
            load_recipe(path)
        assert expected in str(caught.value)


def test_an_unknown_recipe_lists_the_choices() -> None:
    with pytest.raises(ValueError, match="debug_pretrain"):
        load_recipe("debug_pretrian")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["tokenizer.path=x"], "at most one of them"),
        (["tokenizer.vocab_size=null"], "and so is model.weights"),
        (["model.config=null"], "model.config and model.weights are both null"),
        (["data.weights=[1, 2]"], "data.weights has 2 numbers, data.source 1 parts"),
        (["data.kind=chat"], "would cut conversations in two"),
        (["parallel.engine=accelerate", "parallel.pipeline=2"], "neither pipeline stages"),
        (["memory.recompute=[full, norms]"], "expected 'full' alone"),
        (["memory.recompute=[norms, swiglu]"], "expected k2"),
        (["quantization={method: nf4, group_size: 32, double_quant: true}"], "expected an adapter"),
        (["adapter={rank: 4, alpha: 8, dropout: 0, targets: [q_b_proj]}"], "an adapter needs model.weights"),
        (
            [
                "context={stages: [{steps: 9, sequence_length: 128, rope_scaling: null}], final_rope_scaling: null,"
                " max_position_embeddings: 128, eval_lengths: [128]}"
            ],
            "have 9 steps together",
        ),
        (
            [
                "training.steps=9",
                "context={stages: [{steps: 9, sequence_length: 100, rope_scaling: null}], final_rope_scaling: null,"
                " max_position_embeddings: 128, eval_lengths: [128]}",
            ],
            "expected a divisor of the 1024 tokens",
        ),
        (
            ["training.steps=10", "schedule.warmup=6", "schedule.decay=5"],
            "together 11 steps: expected at most training.steps, 10",
        ),
        (["schedule.warmup=0.5", "schedule.decay=0.6"], "expected at most training.steps"),
        (["optimizer.lr=1e-5"], "schedule.min_lr"),
    ],
)
def test_contradictions_are_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        load_recipe(RECIPE, overrides)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.overrides.hidden_sise=64"], "hidden_size"),
        (["model.config=debug_minut"], "debug_minute"),
        (
            ["model.overrides.vocab_size=999"],
            r"set tokenizer.vocab_size=999 or model.overrides.vocab_size=\d+",
        ),
        (["data.sequence_length=100000"], "max_position_embeddings"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        build_config(load_recipe(RECIPE, overrides))


def test_numbers_are_read_as_people_write_them() -> None:
    for text, value in (
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        (".5e-1", 0.05),
        ("3", 3.0),
        ("1.e2", 100.0),
        ("2.5", 2.5),
    ):
        lr = load_recipe(RECIPE, [f"optimizer.lr={text}", "schedule.min_lr=0"]).optimizer.lr
        assert math.isclose(lr, value, rel_tol=0)
        assert isinstance(lr, float)
