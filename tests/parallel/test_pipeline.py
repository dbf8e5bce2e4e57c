"""Pipelines over gloo against one process: losses, gradients, norms, and steps of MuonClip.

What the ranks do is in pipeline_ranks.py beside the tests' conftest, where spawned processes can import it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pipeline_ranks import (
    CASES,
    global_batch,
    num_items,
    one_loss,
    one_process,
    run,
    run_pipeline,
    train_one_process,
)
from transformers_k2 import KimiK2Config, KimiK2ForCausalLM
from transformers_k2.parallel import Layout
from transformers_k2.parallel.pipeline import Pipeline, _check, clip_grad_norm

RANKS = [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=RANKS)
def ranks(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def folder(
    ranks: int, tiny_config: Callable[..., KimiK2Config], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A hub folder, and what every rank saw of it."""
    path = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    model = KimiK2ForCausalLM(tiny_config(n_routed_experts=8, num_hidden_layers=4))
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.normal_(std=0.3)
    model.save_pretrained(path / "hub")
    run(run_pipeline, ranks, path)
    return path


def seen(folder: Path, ranks: int) -> list[tuple[str, Layout, list[dict[str, Any]]]]:
    return [
        (name, Layout(**sizes), [torch.load(folder / f"{name} {rank}.pt") for rank in range(ranks)])
        for name, (sizes, _, _) in CASES[ranks].items()
    ]


def assert_all_equal(
    found: list[dict[str, torch.Tensor]], expected: dict[str, torch.Tensor], case: str, **close: float
) -> None:
    """Every rank's tensors are the expected ones, and together they have all names."""
    names = {name for rank in found for name in rank}
    assert names == expected.keys(), case
    for rank, tensors in enumerate(found):
        for name, tensor in tensors.items():
            torch.testing.assert_close(
                tensor, expected[name], **close, msg=lambda text, n=name, r=rank: f"{case} {r} {n}: {text}"
            )


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_losses_gradients_and_norms(folder: Path, ranks: int, kind: str) -> None:
    model, batch = one_process(folder), global_batch(kind, ranks)
    loss = one_loss(model, batch)
    loss.backward()
    grads = {name: param.grad.clone() for name, param in model.named_parameters()}
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
    assert norm > 0.3
    clipped = {name: param.grad.clone() for name, param in model.named_parameters()}
    for case, layout, results in seen(folder, ranks):
        for rank, result in enumerate(results):
            # The columns' parts of the loss add up to the whole one.
            parts = [results[column][f"{kind} loss"] for column in range(layout.data_size)]
            assert torch.equal(result[f"{kind} loss"], parts[layout.data_rank(rank)]), case
            torch.testing.assert_close(sum(parts), loss.detach(), rtol=1e-6, atol=1e-6, msg=case)
            torch.testing.assert_close(result[f"{kind} norm"], norm, rtol=1e-5, atol=0)
            torch.testing.assert_close(result[f"{kind} norm again"], norm, rtol=1e-5, atol=0)
        # Sums over micro-batches and ranks are rounded in another order.
        assert_all_equal([r[f"{kind} grads"] for r in results], grads, case, rtol=1e-4, atol=1e-6)
        assert_all_equal([r[f"{kind} clipped"] for r in results], clipped, case, rtol=1e-4, atol=1e-6)
        assert_all_equal([r[f"{kind} twice a half"] for r in results], grads, case, rtol=1e-4, atol=1e-6)
        assert_all_equal([r[f"{kind} grads in runs"] for r in results], grads, case, rtol=1e-4, atol=1e-6)
        for result in results:
            torch.testing.assert_close(result[f"{kind} loss in runs"], result[f"{kind} loss"])
            for part, whole in zip(
                result[f"{kind} evaluated in runs"], result[f"{kind} evaluated"], strict=True
            ):
                torch.testing.assert_close(part, whole)


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_evaluation(folder: Path, ranks: int, kind: str) -> None:
    model, batch = one_process(folder).eval(), global_batch(kind, ranks)
    with torch.no_grad():
        total = one_loss(model, batch).double() * num_items(batch)
    for case, layout, results in seen(folder, ranks):
        columns = [results[column][f"{kind} evaluated"] for column in range(layout.data_size)]
        assert sum(int(count) for _, count in columns) == num_items(batch), case
        torch.testing.assert_close(sum(nll for nll, _ in columns), total, rtol=1e-6, atol=0, msg=case)
        for rank, result in enumerate(results):
            assert result[f"{kind} evaluated"] == columns[layout.data_rank(rank)], case


def test_packed_rows_do_not_see_each_other(folder: Path, ranks: int) -> None:
    """The loss of packed rows is that of their documents one by one, also where hidden states come from elsewhere."""
    model, batch = one_process(folder).eval(), global_batch("packed", ranks)
    total = torch.zeros((), dtype=torch.float64)
    for ids, positions in zip(batch["input_ids"], batch["position_ids"], strict=True):
        starts = (positions == 0).nonzero()[1:].flatten().tolist()
        for document in torch.tensor_split(ids, starts):
            if len(document) > 1:
                with torch.no_grad():
                    logits = model(document[None], use_cache=False).logits[0, :-1]
                total += F.cross_entropy(logits.double(), document[1:], reduction="sum")
    for case, layout, results in seen(folder, ranks):
        found = sum(results[column]["packed evaluated"][0] for column in range(layout.data_size))
        torch.testing.assert_close(found, total, rtol=1e-5, atol=0, msg=case)


def test_muon_clip(folder: Path, ranks: int) -> None:
    one = train_one_process(folder)
    assert any((stats["gamma"] < 1).any() for stats in one["stats"].values())
    for case, layout, results in seen(folder, ranks):
        if "weights" not in results[0]:
            continue
        assert_all_equal([r["weights"] for r in results], one["weights"], case, rtol=1e-4, atol=1e-5)
        for stage in range(layout.pipeline):
            for name, stats in results[stage * layout.data_size]["stats"].items():
                for key in ("max_logit", "gamma"):
                    torch.testing.assert_close(stats[key], one["stats"][name][key], rtol=1e-4, atol=1e-5)
        assert {name for result in results for name in result["stats"]} == one["stats"].keys()


def test_gradients_are_reduced_once(folder: Path, ranks: int) -> None:
    for case, layout, results in seen(folder, ranks):
        if layout.data_size > 1:
            for result in results:
                many_micro_batches, one_micro_batch = result["reductions"]
                assert many_micro_batches == one_micro_batch > 0, case


def test_half_precision(folder: Path, ranks: int) -> None:
    model, batch = one_process(folder), global_batch("packed", ranks)
    loss = one_loss(model, batch)
    loss.backward()
    for case, layout, results in seen(folder, ranks):
        if layout.data_size == 1:
            continue
        parts = [results[column]["half precision"]["loss"] for column in range(layout.data_size)]
        torch.testing.assert_close(sum(parts), loss.detach(), rtol=1e-2, atol=0)
        for result in results:
            for name, grad in result["half precision"]["grads"].items():
                assert grad.dtype == torch.float32
                expected = model.get_parameter(name).grad
                # Half a percent of noise decides ties between experts otherwise.
                if ".experts." not in name and ".gate." not in name:
                    assert F.cosine_similarity(grad.flatten(), expected.flatten(), 0) > 0.9, (case, name)


def test_norm_of_one_process(tiny_model: KimiK2ForCausalLM) -> None:
    batch = global_batch("plain")
    one_loss(tiny_model, batch).backward()
    expected = torch.stack([p.grad.norm() for p in tiny_model.parameters()]).norm()
    torch.testing.assert_close(clip_grad_norm(tiny_model, Layout(), None), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        clip_grad_norm(tiny_model, Layout(), 2 * float(expected)), expected, rtol=1e-5, atol=0
    )
    torch.testing.assert_close(clip_grad_norm(tiny_model, Layout(), 0.1), expected, rtol=1e-5, atol=0)
    assert clip_grad_norm(tiny_model, Layout(), None).item() == pytest.approx(0.1, rel=1e-4)


def test_refusals(tiny_model: KimiK2ForCausalLM) -> None:
    with pytest.raises(ValueError, match="'zero_bubble': expected one of 1f1b, gpipe"):
        Pipeline(tiny_model, Layout(pipeline=2), "zero_bubble")
    with pytest.raises(ValueError, match="pipeline is 1"):
        Pipeline(tiny_model, Layout())
    with pytest.raises(ValueError, match="micro_batches_per_run is 0"):
        Pipeline(tiny_model, Layout(pipeline=2), micro_batches_per_run=0)
    batch = global_batch("padded")
    _check(batch, 5)
    with pytest.raises(ValueError, match="micro_batch_size is 0"):
        _check(batch, 0)
    with pytest.raises(ValueError, match="expected input_ids and labels"):
        _check({"input_ids": batch["input_ids"]}, 1)
    with pytest.raises(ValueError, match="'token_type_ids'"):
        _check(batch | {"token_type_ids": batch["labels"]}, 1)
    with pytest.raises(ValueError, match="position_ids has 1 rows and input_ids 6"):
        _check(batch | {"position_ids": torch.arange(11)[None]}, 1)
