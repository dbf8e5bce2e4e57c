"""transformers' own model tests, run on our classes: each that passes on DeepSeek-V3 must pass on Kimi K2.

They are not part of the installed package, so pip downloads transformers' source distribution (kept in pytest's cache);
nothing of it is kept in this repository. It lacks four modules that the tests import: two mixins, for which an empty
class will do, a table of values and the starter of processes, which are written here. What the missing mixins test,
generation above all, is in tests/test_generation.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import transformers

HERE = Path(__file__).parent
MINUTES = 60
STAND_INS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": (
        "config_common_kwargs = {'return_dict': False, 'output_hidden_states': True, 'dtype': 'float16',\n"
        "    'chunk_size_feed_forward': 3, 'architectures': ['SomeModel'], 'problem_type': 'regression',\n"
        "    'id2label': {0: 'no', 1: 'yes'}, 'label2id': {'no': 0, 'yes': 1}}\n"
    ),
    "distributed_testing_utils.py": (HERE / "distributed_testing_utils.py").read_text(),
    "test_k2_suite.py": (HERE / "suite.py").read_text(),
}


def source_distribution(cache: Path) -> Path:
    """The archive of the installed version, downloaded unless it is there already."""
    archive = cache / f"transformers-{transformers.__version__}.tar.gz"
    if not archive.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        command += ["--no-binary", ":all:", "--dest", str(cache), f"transformers=={transformers.__version__}"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if run.returncode:
            pytest.skip(
                f"transformers' source distribution cannot be downloaded: {run.stderr.strip()[-300:]}"
            )
    return archive


def unpack(archive: Path, folder: Path) -> None:
    """`folder/tests`: the distribution's tests, what they lack, and our suite among them."""
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            _, _, member.name = member.name.partition("/")
            if member.name.startswith("tests/"):
                tar.extract(member, folder, filter="data")
    for name, text in STAND_INS.items():
        path = folder / "tests" / name
        assert not path.exists(), f"the distribution has {name} now: the stand-in can go"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    for package in (folder / "tests", *{(folder / "tests" / name).parent for name in STAND_INS}):
        (package / "__init__.py").touch()
    (folder / "pytest.ini").write_text("[pytest]\n")


def start(family: str, folder: Path) -> subprocess.Popen:
    # One thread each: the two families run side by side, and some tests start two processes more.
    environment = os.environ | {"K2_SUITE_FAMILY": family, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        "pytest.ini",
        "-p",
        "no:cacheprovider",
        "-q",
        "-W",
        "ignore",
    ]
    command += ["--tb=short", f"--junitxml={family}.xml", "tests/test_k2_suite.py"]
    with (folder / f"{family}.log").open("w") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)


def outcomes(report: Path) -> dict[str, str]:
    """Test name -> "passed", "skipped", "failure" or "error"."""
    cases = {}
    for case in ElementTree.parse(report).iter("testcase"):
        bad = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        cases[case.attrib["name"]] = bad[0] if bad else "passed"
    return cases


@pytest.mark.slow
def test_what_passes_on_deepseek_passes_on_kimi(
    tmp_path: Path, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture
) -> None:
    unpack(source_distribution(pytestconfig.cache.mkdir("transformers_source")), tmp_path)
    runs = {family: start(family, tmp_path) for family in ("stock", "ours")}
    try:
        for run in runs.values():
            run.wait(timeout=60 * MINUTES)
    finally:
        for run in runs.values():
            run.kill()
    logs = {family: (tmp_path / f"{family}.log").read_text() for family in runs}
    assert all((tmp_path / f"{family}.xml").exists() for family in runs), "\n".join(logs.values())[-3000:]
    stock, ours = (outcomes(tmp_path / f"{family}.xml") for family in runs)
    passed = {name for name, outcome in stock.items() if outcome == "passed"}
    different = {name: ours.get(name, "absent") for name in passed if ours.get(name) != "passed"}
    with capsys.disabled():
        for family, found in (("DeepSeek-V3", stock), ("Kimi K2", ours)):
            counts = {outcome: list(found.values()).count(outcome) for outcome in sorted(set(found.values()))}
            print(
                f"\n{family}: {', '.join(f'{count} {outcome}' for outcome, count in counts.items())}", end=""
            )
    assert len(passed) > 100
    assert different == {}, f"{different}\n{logs['ours'][-6000:]}"
    shutil.rmtree(tmp_path / "tests")
