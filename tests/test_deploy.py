"""The examples for clusters: valid by their schemas, and their command one that fastorgan takes."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import pytest

DEPLOY = Path(__file__).parents[1] / "deploy"
JOB = DEPLOY / "kubernetes-job.yaml"
ARRAY = DEPLOY / "slurm-array.sbatch"


def job() -> Any:
    return pytest.importorskip("yaml").safe_load(JOB.read_text(encoding="utf-8"))


@pytest.mark.parametrize("version", ["1.33", "1.35"])
def test_the_job_is_what_kubernetes_takes(version: str) -> None:
    schemas = pytest.importorskip("kubernetes_validate")
    schemas.validate(job(), version, strict=True)
    broken = job()
    broken["spec"]["completionMod"] = broken["spec"].pop("completionMode")
    with pytest.raises(schemas.ValidationError):
        schemas.validate(broken, version, strict=True)


def test_every_index_of_the_job_is_a_shard_of_its_own() -> None:
    spec = job()["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    values = {variable["name"]: variable.get("value") for variable in container["env"]}
    # A variable can be used in those behind it only.
    assert [*values].index("JOB_COMPLETION_INDEX") < [*values].index("REPORT")
    assert int(values["SHARDS"]) == spec["completions"]
    assert "$(JOB_COMPLETION_INDEX)/$(SHARDS)" in container["args"]
    assert values["REPORT"].endswith("$(JOB_COMPLETION_INDEX).json")
    # The exit code that a user's mistake has; to try again would not mend it.
    assert spec["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"] == [2]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}


def test_the_array_is_a_clean_script() -> None:
    subprocess.run(["bash", "-n", ARRAY], check=True)
    checker = shutil.which("shellcheck", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    if checker is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([checker, "--shell=bash", ARRAY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_arrays_directives_come_before_its_commands() -> None:
    # SLURM reads none behind the first command.
    head = re.split(r"^(?!#)\S", ARRAY.read_text(encoding="utf-8"), maxsplit=1, flags=re.MULTILINE)[0]
    found = re.findall(r"^#SBATCH --([a-z-]+)", head, re.MULTILINE)
    assert found == re.findall(r"^#SBATCH --([a-z-]+)", ARRAY.read_text(encoding="utf-8"), re.MULTILINE)
    assert {"array", "cpus-per-task", "mem", "time", "output"} <= set(found)


@pytest.mark.skipif(not (DEPLOY.parent / "weights" / "organs.xml").is_file(), reason="no released weights")
def test_the_arrays_tasks_share_the_cases(tmp_path: Path, blocks: Any) -> None:
    (tmp_path / "in").mkdir()
    for name in "abc":
        nib.save(blocks[0], tmp_path / "in" / f"{name}.nii.gz")
    # As the nodes' PATH would have it.
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "fastorgan"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m fastorgan "$@"\n')
    command.chmod(0o755)
    for task in (1, 2):
        of_slurm = {
            "SLURM_ARRAY_TASK_ID": str(task),
            "SLURM_ARRAY_TASK_MIN": "1",
            "SLURM_ARRAY_TASK_COUNT": "2",
            "SLURM_CPUS_PER_TASK": "1",
        }
        environment = os.environ | of_slurm | {"PATH": f"{command.parent}:{os.environ['PATH']}"}
        environment["PYTHONPATH"] = str(DEPLOY.parent / "app")
        done = subprocess.run(
            ["bash", ARRAY, "in", "out"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert [line.split()[1] for line in done.stdout.splitlines()] == (
            ["out/a.nii.gz:", "out/c.nii.gz:"] if task == 1 else ["out/b.nii.gz:"]
        )
    assert sorted(path.name for path in (tmp_path / "out" / "reports").iterdir()) == ["0.json", "1.json"]
