"""Kill a run at random moments and let the same command continue it: is the result the same to the bit?

    python benchmarks/surviving.py [--kills 20] [--processes 2] [key=value ...]

Prints a row for each kill: the step that was done, the newest checkpoint, and what the next start continued from. Ends
with status 1 if weights or metrics differ from those of a run that nobody killed.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from training_ranks import Run, lines, same_weights, text_file


def newest(run: Run) -> str:
    """The newest finished checkpoint of an unfinished run."""
    found = sorted(path.name for path in (run.unfinished / "checkpoints").glob("step-*"))
    return found[-1] if found else "none"


def steps(run: Run) -> int:
    """Steps in the metrics of an unfinished run."""
    path = run.unfinished / "metrics.jsonl"
    return path.read_bytes().count(b'"loss"') if path.exists() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="key=value")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    root = Path(tempfile.mkdtemp(prefix="surviving-"))
    text = text_file(root)
    Run(text, root / "warm", options.overrides, options.processes).finish()
    started = time.perf_counter()
    expected = Run(text, root / "expected", options.overrides, options.processes).finish()
    seconds = time.perf_counter() - started
    print(f"undisturbed: {seconds:.1f} s; a kill comes at a random moment of that\n")
    print("| kill | run | after s | steps done | newest checkpoint |\n|---|---|---|---|---|")
    kills = same = number = 0
    while kills < options.kills:
        number += 1
        run = Run(text, root / f"run{number}", options.overrides, options.processes)
        while not run.output.exists():
            processes = run.start()
            moment = rng.uniform(0, seconds)
            deadline = time.monotonic() + moment
            while time.monotonic() < deadline and any(process.is_alive() for process in processes):
                time.sleep(0.005)
            if all(process.exitcode == 0 for process in processes):
                continue
            for process in processes:
                process.kill()
            run.wait(processes)
            kills += 1
            print(f"| {kills} | {number} | {moment:.2f} | {steps(run)} | {newest(run)} |", flush=True)
        equal = same_weights(run.output, expected) and all(
            lines(run.output, name) == lines(expected, name)
            for name in ("metrics.jsonl", "qk_clip.jsonl", "expert_load.jsonl")
        )
        same += equal
        shutil.rmtree(run.output)
    print(
        f"\n{kills} kills in {number} runs; {same} of {number} runs ended with the same weights and metrics to the bit"
    )
    if same == number:
        shutil.rmtree(root)
    return int(same != number)


if __name__ == "__main__":
    raise SystemExit(main())
