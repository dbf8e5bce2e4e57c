"""The output folder: replaced whole and only at the end, and only if it is an earlier run's."""

from __future__ import annotations

import multiprocessing
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from transformers_k2.training.output import check_output, staged


def earlier_run(path: Path) -> Path:
    path.mkdir()
    (path / "recipe.yaml").write_text("old", encoding="utf-8")
    (path / "model.safetensors").write_bytes(b"old")
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {
        file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()
    }


def begin(path: Path, recipe: str = "new", resume: bool = True) -> AbstractContextManager[Path]:
    return staged(path, recipe, resume, lambda text: [] if text == recipe else [f"{text} is not {recipe}"])


def fail_after_writing(path: Path, name: str, error: type[BaseException]) -> None:
    with begin(path) as folder:
        (folder / name).write_bytes(b"half")
        raise error


def test_the_result_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "run"
    with begin(target) as folder:
        (folder / "a").write_text("new", encoding="utf-8")
        assert not target.exists()
    assert contents(target) == {"a": b"new", "recipe.yaml": b"new"}
    assert [path.name for path in target.parent.iterdir()] == ["run"]


def test_a_failure_leaves_the_earlier_run_alone(tmp_path: Path) -> None:
    target = earlier_run(tmp_path / "run")
    before = contents(target)
    with pytest.raises(KeyboardInterrupt):
        fail_after_writing(target, "model.safetensors", KeyboardInterrupt)
    assert contents(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]

    with pytest.raises(RuntimeError):
        fail_after_writing(target, "metrics.jsonl", RuntimeError)
    assert contents(target) == before
    kept = {"metrics.jsonl": b"half", "recipe.yaml": b"new"}
    assert contents(tmp_path / "run.unfinished") == kept  # to look into, and to continue

    with begin(target) as folder:
        assert contents(folder) == kept
        (folder / "b").write_text("new", encoding="utf-8")
    assert contents(target) == {**kept, "b": b"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_unfinished_run_is_continued_by_its_own_recipe_only(tmp_path: Path) -> None:
    target = tmp_path / "run"
    with pytest.raises(RuntimeError):
        fail_after_writing(target, "metrics.jsonl", RuntimeError)
    checkpoints = tmp_path / "run.unfinished" / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "step").touch()
    with pytest.raises(
        ValueError, match=r"unfinished run of another recipe \(new is not other\).*resume=false"
    ):
        begin(target, "other").__enter__()
    assert (checkpoints / "step").exists()
    with begin(target, "other", resume=False) as folder:
        assert contents(folder) == {"recipe.yaml": b"other"}


def test_a_run_killed_between_the_renames_is_found_again(tmp_path: Path) -> None:
    earlier_run(tmp_path / ".run.old")
    (tmp_path / "run.unfinished").mkdir()
    with pytest.raises(RuntimeError), begin(tmp_path / "run"):
        raise RuntimeError
    assert (tmp_path / "run" / "recipe.yaml").read_text(encoding="utf-8") == "old"


def hold(path: Path, entered, leave) -> None:
    with begin(path):
        entered.set()
        leave.wait(60)


def test_two_runs_cannot_write_one_output(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    entered, leave = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "run", entered, leave))
    process.start()
    try:
        assert entered.wait(60)
        with pytest.raises(ValueError, match="being written by another run"), begin(tmp_path / "run"):
            pass
    finally:
        leave.set()
        process.join()
    assert process.exitcode == 0


def test_what_may_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = earlier_run(tmp_path / "run")
    assert check_output(target, overwrite=True) == target
    assert check_output(tmp_path / "none" / "new", overwrite=False) == tmp_path / "none" / "new"
    with pytest.raises(ValueError, match=r"not empty.*overwrite=true"):
        check_output(target, overwrite=False)
    (target / "recipe.yaml").unlink()
    with pytest.raises(ValueError, match="no earlier run"):
        check_output(target, overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        check_output(target / "model.safetensors", overwrite=True)
    (tmp_path / "link").symlink_to(target)
    assert check_output(tmp_path / "none", overwrite=False) == tmp_path / "none"
    monkeypatch.chdir(target)
    for path in (".", "..", tmp_path / "link"):
        with pytest.raises(ValueError, match="holds the current folder"):
            check_output(path, overwrite=True)
