"""Generation over pipeline stages and tensor-parallel ranks against transformers' own DeepSeek-V3 in one process.

What the ranks do is in stage_ranks.py beside the tests' conftest, where spawned processes can import it.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DeepseekV3ForCausalLM, PreTrainedTokenizerFast

from checkpoints import INT4_CONFIG, SHAPE, decoded, hub_config, per_expert, stock_model, to_int4, write
from pipeline_ranks import run
from stage_ranks import CASES, NUM_LAYERS, PLANS, PROMPT, SIZES, continued, generate, one_process, run_stages
from transformers_k2 import KimiK2Config, KimiK2ForCausalLM
from transformers_k2.parallel.stages import (
    KimiK2StageForCausalLM,
    Stage,
    even_split,
    load_stage,
    main,
    stage_bytes,
)

RANKS = [2, pytest.param(3, marks=pytest.mark.slow)]
CLOSE = {"rtol": 1e-4, "atol": 2e-5}  # float32, summed in another order


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """A hub checkpoint in bf16, with layers of which one is dense."""
    return per_expert(stock_model(**SIZES))


@pytest.fixture(scope="module")
def folder(tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stages")
    write(path / "bf16", tensors, hub_config(**SIZES))
    write(path / "int4", to_int4(tensors), hub_config(quantization_config=INT4_CONFIG, **SIZES))
    return path


@pytest.fixture(scope="module")
def stock(tensors: dict[str, torch.Tensor]) -> DeepseekV3ForCausalLM:
    return one_process(tensors)


@pytest.fixture(scope="module")
def expected(stock: DeepseekV3ForCausalLM) -> dict[str, torch.Tensor]:
    """The texts of the one process."""
    return {name: generate(stock, arguments) for name, arguments in CASES.items()}


@pytest.fixture(scope="module", params=RANKS)
def ranks(request: pytest.FixtureRequest, folder: Path) -> list[dict[str, Any]]:
    """What every rank saw."""
    run(run_stages, request.param, folder)
    return [
        torch.load(folder / f"seen {request.param} {rank}.pt", weights_only=False)
        for rank in range(request.param)
    ]


def test_every_way_to_generate_equals_one_process(
    ranks: list[dict[str, Any]], expected: dict[str, torch.Tensor], stock: DeepseekV3ForCausalLM
) -> None:
    for name, text in expected.items():
        for rank, seen in enumerate(ranks):
            assert torch.equal(seen[name], text), f"{name}, rank {rank}"
    second_turn = continued(stock)
    assert all(torch.equal(seen["continued"], second_turn) for seen in ranks)
    assert len({tuple(ranks[0][name][0].tolist()) for name in ("left-padded", "beams", "sampled")}) == 3


def test_logits_and_caches(ranks: list[dict[str, Any]], stock: DeepseekV3ForCausalLM) -> None:
    with torch.no_grad():
        expected = stock(PROMPT, use_cache=False).logits
    for seen in ranks:
        torch.testing.assert_close(seen["logits"], expected, **CLOSE)
        torch.testing.assert_close(seen["last logits"], expected[:, [2, 5]], **CLOSE)
        assert torch.equal(seen["logits"], ranks[0]["logits"])
    # One layer of the cache for each of the stage's own: the last token of 20 is not fed again.
    assert [seen["cache"] for seen in ranks] == [(count, 11 + 19) for count in ranks[0]["bf16"]["split"]]


def test_a_split_by_hand(ranks: list[dict[str, Any]], expected: dict[str, torch.Tensor]) -> None:
    for seen in ranks:
        split, text = seen["by hand"]
        assert split == (2, 3) if len(ranks) == 2 else (2, 1, 2)
        assert torch.equal(text, expected["left-padded"])


def test_stages_work_on_a_prompt_at_the_same_time(ranks: list[dict[str, Any]]) -> None:
    """A stage begins the next chunk while the stage behind it works on this one."""
    for here, behind in itertools.pairwise(seen["busy"] for seen in ranks):
        assert len(here) == len(behind) == 7
        assert all(ended <= began for (_, ended), (began, _) in zip(here, behind, strict=True))
        overlaps = [here[number + 1][0] < behind[number][1] for number in range(6)]
        assert any(overlaps)


def test_int4_stays_packed(ranks: list[dict[str, Any]], tensors: dict[str, torch.Tensor]) -> None:
    expected = generate(one_process(decoded(to_int4(tensors), torch.float32)), CASES["greedy"])
    for seen in ranks:
        assert torch.equal(seen["int4"]["greedy"], expected)
        assert torch.int32 in seen["int4"]["dtypes"]


@pytest.mark.parametrize("codec", ["bf16", "int4"])
def test_each_rank_holds_and_reads_its_own_layers(
    ranks: list[dict[str, Any]], folder: Path, codec: str
) -> None:
    whole = KimiK2ForCausalLM.from_pretrained(folder / codec, dtype=torch.float32)
    held = [seen[codec]["held"] for seen in ranks]
    assert sum(held) == sum(value.nbytes for value in whole.parameters())  # nothing twice
    assert max(held) < 0.7 * sum(held)
    names = [name for seen in ranks for name in seen[codec]["names"]]
    assert sorted(names) == sorted(whole.state_dict())
    if (
        codec == "int4"
    ):  # read by our own reader, tensor by tensor; the shapes of packed weights are looked at by all
        read = [{name for name in seen[codec]["read"] if not name.endswith("_shape")} for seen in ranks]
        assert all(read)
        assert not any(one & other for one, other in itertools.combinations(read, 2))


def test_rank_zero_decides_when_a_text_ends(
    ranks: list[dict[str, Any]], expected: dict[str, torch.Tensor]
) -> None:
    text = expected["greedy"]
    for seen in ranks:
        assert torch.equal(seen["stopped"], text[:, :14])  # another rank's own criterion says 13
        assert torch.equal(seen["in time"], text[:, :14])
        assert torch.equal(seen["by config"], text[:, :15])
    assert ranks[0]["heard"] == [*text[0, :14].tolist(), -1]
    assert all(seen["heard"] is None for seen in ranks[1:])


def test_errors_name_both_sides(ranks: list[dict[str, Any]]) -> None:
    count = len(ranks)
    for rank, seen in enumerate(ranks):
        errors = seen["errors"]
        assert f"split (5,) has 1 stages, but {count} processes run" in errors["too few"]
        assert "a stage without layers" in errors["empty stage"]
        assert f"has {count} layers, but the model has 5" in errors["wrong sum"]
        assert f"split is ({6 - count}, 1" in errors["of another rank"]
        assert f"but ({', '.join('1' * (count - 1))}, {6 - count}) on rank 0" in errors["of another rank"]
        assert "prefill_chunk is 0" in errors["chunk"]
        assert "generate: inputs is int64 [1, 11] with checksum" in errors["ids"]
        assert "inputs is int64 [1, 10]" in errors["shape"]
        assert "top_k is 9 on rank 1, but None on rank 0" in errors["options"]
        assert "labels is given" in errors["labels"]
        assert "output_hidden_states is given" in errors["hidden states"]
        assert "was given no tokens" in errors["nothing"]
        assert f"it has {seen['bf16']['split'][rank]} of 5 layers" in errors["saved"]
        assert all(text.startswith("ValueError") for text in errors.values())


def test_nobody_waits_for_ever(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks[:-1]:
        assert "imed out" in seen["silent"]
        assert seen["death"].startswith("RuntimeError") or "closed" in seen["death"]
    assert "death" not in ranks[-1]


@pytest.mark.parametrize("plan", PLANS)
def test_tensor_parallel_equals_one_process(
    ranks: list[dict[str, Any]], expected: dict[str, torch.Tensor], plan: str
) -> None:
    if len(ranks) != 2:
        pytest.skip("two ranks")
    for seen in ranks:
        found = dict(seen["tensor parallel"][plan])
        # K2's own plan leaves attention whole; with heads, each rank has two of the four.
        assert found.pop("rows") == 4 * 64 // (2 if plan == "with heads" else 1)
        for name, text in found.items():
            assert torch.equal(text, expected[name]), name


@pytest.mark.parametrize("codec", ["bf16", pytest.param("int4", marks=pytest.mark.slow)])
def test_layers_on_disk(folder: Path, tensors: dict[str, torch.Tensor], tmp_path: Path, codec: str) -> None:
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "disk"}
    places |= {f"model.layers.{number}": "disk" if number % 2 else "cpu" for number in range(NUM_LAYERS)}
    model = KimiK2ForCausalLM.from_pretrained(
        folder / codec, dtype=torch.float32, device_map=places, offload_folder=tmp_path
    )
    assert model.model.layers[1].self_attn.kv_b_proj.weight.is_meta
    plain = tensors if codec == "bf16" else decoded(to_int4(tensors), torch.float32)
    oracle = one_process(plain)
    for name in ("left-padded", "in chunks", "static cache"):
        assert torch.equal(generate(model, CASES[name]), generate(oracle, CASES[name])), name


def test_stages_are_even_in_bytes(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    for codec, stored in (("bf16", tensors), ("int4", to_int4(tensors))):
        sizes = [0] * NUM_LAYERS
        for name, tensor in stored.items():
            if name.endswith("weight_shape"):
                continue
            place = int(name.split(".")[2]) if ".layers." in name else 0 if "embed" in name else -1
            sizes[place] += tensor.nbytes
        found = stage_bytes(KimiK2Config.from_pretrained(folder / codec))
        assert found == pytest.approx(sizes, rel=1e-3)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5, 7])
def test_the_largest_stage_is_as_small_as_can_be(num_stages: int) -> None:
    sizes = torch.randint(1, 20, (7,), generator=torch.Generator().manual_seed(num_stages)).tolist()

    def largest(split: tuple[int, ...]) -> int:
        ends = [0, *itertools.accumulate(split)]
        return max(sum(sizes[start:end]) for start, end in itertools.pairwise(ends))

    ways = [way for way in itertools.product(range(1, 8), repeat=num_stages) if sum(way) == 7]
    found = even_split(sizes, num_stages)
    assert sum(found) == 7
    assert min(found) >= 1
    assert largest(found) == min(map(largest, ways))


def test_k2_thinking_over_two_machines() -> None:
    thinking = KimiK2Config(quantization_config=INT4_CONFIG)
    sizes = stage_bytes(thinking)
    assert sum(sizes) == pytest.approx(594e9, rel=0.01)  # the hub's files
    assert even_split(sizes, 2) == (31, 30)  # the dense layer is smaller than one of experts


def test_more_stages_than_layers() -> None:
    with pytest.raises(ValueError, match="4 processes run, but the model has 3 layers"):
        even_split([1, 2, 3], 4)


@pytest.mark.slow
def test_the_command(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    words = {f"w{number}": number for number in range(SHAPE["vocab_size"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder / "bf16")
    prompt = " ".join(f"w{number}" for number in PROMPT[0])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "transformers_k2.parallel.stages", str(folder / "bf16"), "--prompt", prompt]
    done = subprocess.run(
        [*command, "--dtype", "float32", "--max-new-tokens", "4", "--split", "3,2"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"w{number}" for number in expected["greedy"][0, 11:15]]
    assert "stage 1: layers 3 to 4" in done.stderr
    done = subprocess.run([*command, "--split", "3,3"], capture_output=True, text=True, timeout=300)
    assert "split (3, 3) has 6 layers, but the model has 5" in done.stderr


def test_tied_weights_are_refused(tiny_config: Callable[..., KimiK2Config]) -> None:
    with pytest.raises(ValueError, match="tie_word_embeddings is True"):
        KimiK2StageForCausalLM(tiny_config(tie_word_embeddings=True), Stage(0, (2, 1)))


def test_without_processes(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="start them with torchrun"):
        load_stage(folder / "bf16")
    with pytest.raises(SystemExit):
        main([str(folder), "--prompt", "a"])
    assert "start it with torchrun" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    for options, message in (
        (["--prompt", ""], "--prompt is empty"),
        (["--temperature", "-1"], "-1.0: expected 0"),
    ):
        with pytest.raises(SystemExit):
            main([str(folder), "--prompt", "a", *options])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--node-rank 1" in capsys.readouterr().out
