"""The image fastorgan:cpu on a real Docker Engine: the organisers' command, the bare run, and what either may touch.

`./build.sh cpu` makes the image. Where there is none of this commit, or no engine answers, the tests are skipped and
say so; with CONTAINER_TESTS=required they fail instead. CONTAINER_TESTS_CT may name a CT to run beside the phantom.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from fastorgan.phantom import make_phantom
from fastorgan.predict import case_name

pytestmark = pytest.mark.slow

IMAGE = "fastorgan:cpu"
ROOT = Path(__file__).parents[1]
LIMIT_BYTES = 500_000_000
PROFILES = ("cpu", "gpu", "train")

CLOSED = (
    *("--network", "none", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
    *("--tmpfs", "/tmp", "--user", "1234:1234"),
)
"""A container that may do nothing but compute, as a user that the image does not know."""


@pytest.fixture(scope="module", autouse=True)
def _engine() -> None:
    lack = None
    if shutil.which("docker") is None:
        lack = "there is no docker command here"
    elif _docker("info", "--format", "{{.ServerVersion}}", check=False).returncode:
        lack = "no Docker engine answers here"
    elif _docker("image", "inspect", IMAGE, check=False).returncode:
        lack = f"there is no image {IMAGE} here; ./build.sh cpu makes it"
    elif _inspect(IMAGE, '{{index .Config.Labels "org.opencontainers.image.revision"}}') != _revision():
        lack = f"{IMAGE} was built from another commit; ./build.sh cpu makes it anew"
    if lack is not None:
        if os.environ.get("CONTAINER_TESTS") == "required":
            pytest.fail(lack)
        pytest.skip(lack)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """CT files, each in a folder of its own, as the organisers hand them over."""
    folder = tmp_path_factory.mktemp("cases")
    phantom = folder / "phantom" / "phantom_0000.nii.gz"
    phantom.parent.mkdir()
    image, _ = make_phantom((192, 192, 90), (2.0, 2.0, 3.3), seed=7)
    nib.save(image, phantom)
    found = [phantom]
    if given := os.environ.get("CONTAINER_TESTS_CT"):
        copy = folder / "given" / Path(given).name
        copy.parent.mkdir()
        shutil.copyfile(given, copy)
        found.append(copy)
    return found


@pytest.fixture(scope="module")
def expected(cases: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, NDArray[np.uint8]]:
    """Labels of a run without a container, by output file name."""
    folder = tmp_path_factory.mktemp("local")
    command = [sys.executable, "-m", "fastorgan", "predict", *map(str, cases), str(folder), "--device", "cpu"]
    # The container does not know this environment. Were kernels of another instruction set asked for here, products
    # would be rounded otherwise and voxels on an edge could fall to the other side.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
    subprocess.run(command, check=True, env={**environment, "PYTHONPATH": str(ROOT / "app")})
    labels = {path.name: _labels(path) for path in sorted(folder.glob("*.nii.gz"))}
    assert sorted(labels) == sorted(_output(case) for case in cases)
    assert all(array.any() for array in labels.values()), "nothing was found, so that nothing can be compared"
    return labels


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """An empty folder that any user may write to."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


@pytest.fixture
def container() -> Iterator[str]:
    """A container's name; the container is gone afterwards."""
    name = f"fastorgan-test-{os.getpid()}"
    yield name
    _docker("rm", "--force", name, check=False)


def test_the_organisers_evaluate_a_saved_archive(
    cases: list[Path], expected: dict[str, NDArray[np.uint8]], tmp_path: Path
) -> None:
    # The team's name is the archive's, cut at its first dot, in lower case.
    subprocess.run([ROOT / "save.sh", "Abdomen.v1", IMAGE], cwd=tmp_path, check=True)
    archive = tmp_path / "Abdomen.v1.tar.gz"
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]
    with tarfile.open(archive) as content:
        manifest = content.extractfile("manifest.json")
        assert manifest is not None
        assert json.load(manifest)[0]["RepoTags"] == ["abdomen:latest"]
    _docker("image", "rm", "abdomen:latest")
    try:
        with archive.open("rb") as stream:
            subprocess.run(["docker", "image", "load"], stdin=stream, check=True)
        assert _inspect("abdomen:latest", "{{.Id}}") == _inspect(IMAGE, "{{.Id}}")
        for case in cases:
            _evaluate_as_organisers(case, expected, tmp_path / case.parent.name)
    finally:
        _docker("image", "rm", "abdomen:latest")


def _evaluate_as_organisers(case: Path, expected: dict[str, NDArray[np.uint8]], folder: Path) -> None:
    shutil.copytree(case.parent, folder / "inputs")
    (folder / "outputs").mkdir()
    # Word for word theirs, but for --gpus, which an engine without NVIDIA's toolkit refuses.
    command = (
        "docker container run --name abdomen --rm -v $PWD/inputs/:/workspace/inputs/ "
        '-v $PWD/outputs/:/workspace/outputs/ abdomen:latest /bin/bash -c "sh predict.sh"'
    )
    subprocess.run(command, shell=True, cwd=folder, check=True)
    _check(folder / "outputs", case, expected)
    assert [path.name for path in (folder / "outputs").iterdir()] == [_output(case)]
    assert [path.name for path in (folder / "inputs").iterdir()] == [case.name]
    assert (folder / "inputs" / case.name).read_bytes() == case.read_bytes()


def test_a_bare_run_without_network_or_rights_gives_the_same_labels_and_a_report(
    cases: list[Path], expected: dict[str, NDArray[np.uint8]], outputs: Path
) -> None:
    for case in cases:
        _docker("run", "--rm", *CLOSED, *_mounts(case, outputs), IMAGE)
        _check(outputs, case, expected)
        report = json.loads((outputs / "run.json").read_text(encoding="utf-8"))
        assert [(record["input"], record["status"]) for record in report["cases"]] == [(f"/inputs/{case.name}", "done")]
        assert report["engine"]["device"] == "cpu"
    assert {path.name for path in outputs.iterdir()} == {"run.json", *map(_output, cases)}


def test_the_organisers_command_runs_as_any_user_in_a_read_only_container(
    cases: list[Path], expected: dict[str, NDArray[np.uint8]], outputs: Path
) -> None:
    places = ("-v", f"{cases[0].parent}:/workspace/inputs:ro", "-v", f"{outputs}:/workspace/outputs")
    _docker("run", "--rm", *CLOSED, *places, IMAGE, "/bin/bash", "-c", "sh predict.sh")
    _check(outputs, cases[0], expected)
    assert [path.name for path in outputs.iterdir()] == [_output(cases[0])]


def test_options_go_to_predict_and_an_empty_report_means_none(cases: list[Path], outputs: Path) -> None:
    options = (*CLOSED, "--env", "REPORT=", *_mounts(cases[0], outputs))
    _docker("run", "--rm", *options, IMAGE, "--threads", "1", "--preview")
    assert sorted(path.name for path in outputs.iterdir()) == ["phantom.nii.gz", "phantom.png"]


def test_a_missing_mount_is_one_line_that_names_it(cases: list[Path], outputs: Path) -> None:
    inputs, results = ("-v", f"{cases[0].parent}:/inputs:ro"), ("-v", f"{outputs}:/outputs")
    for mount, absent in ((results, "/inputs"), (inputs, "/outputs")):
        run = _docker("run", "--rm", *CLOSED, *mount, IMAGE, check=False)
        assert run.returncode == 2
        assert run.stderr.startswith(f"fastorgan: {absent}: ")
        assert run.stderr.count("\n") == 1


def test_a_command_replaces_the_run() -> None:
    assert _docker("run", "--rm", *CLOSED, IMAGE, "/bin/bash", "-c", "pwd; id -u").stdout == "/workspace\n1234\n"
    assert _docker("run", "--rm", *CLOSED, IMAGE, "sh", "-c", "exit 7", check=False).returncode == 7
    phantom = ("fastorgan", "phantom", "/tmp/ct.nii.gz", "--labels", "/tmp/labels.nii.gz")
    assert _docker("run", "--rm", *CLOSED, IMAGE, *phantom).stdout == "/tmp/ct.nii.gz\n/tmp/labels.nii.gz\n"


@pytest.mark.parametrize("organisers", [False, True])
def test_sigterm_stops_the_first_process_at_once_and_leaves_whole_files_only(
    organisers: bool, cases: list[Path], outputs: Path, tmp_path: Path, container: str
) -> None:
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    for number in range(40):
        shutil.copyfile(cases[0], inputs / f"case{number:02}_0000.nii.gz")
    place = "/workspace" if organisers else ""
    mounts = ("-v", f"{inputs}:{place}/inputs:ro", "-v", f"{outputs}:{place}/outputs")
    command = ("/bin/bash", "-c", "sh predict.sh") if organisers else ()
    _docker("run", "--detach", "--name", container, *CLOSED, *mounts, IMAGE, *command)
    deadline = time.monotonic() + 120
    while not (outputs / "case01.nii.gz").exists():
        assert time.monotonic() < deadline, _docker("logs", container).stderr
        time.sleep(0.05)
    begun = time.monotonic()
    _docker("kill", "--signal", "TERM", container)
    code = _docker("wait", container).stdout.strip()
    # docker stop kills after ten seconds.
    assert time.monotonic() - begun < 5
    assert code == "143"
    left = sorted(path.name for path in outputs.iterdir() if path.name != "run.json")
    assert 2 <= len(left) < 40
    assert left == [f"case{number:02}.nii.gz" for number in range(len(left))]
    for name in left:
        _labels(outputs / name)


def test_a_run_writes_nothing_into_the_container(cases: list[Path], outputs: Path, container: str) -> None:
    _docker("run", "--name", container, "--network", "none", *_mounts(cases[0], outputs), IMAGE)
    # The two are the mount points, which the engine makes.
    assert sorted(_docker("diff", container).stdout.split("\n")) == ["", "A /inputs", "A /outputs"]


def test_the_image_holds_what_inference_needs_and_no_more() -> None:
    absent = ["pip", "torch", "setuptools", "batchgenerators", "openvino_telemetry"]
    source = f"import importlib.util as u; print([n for n in {absent!r} if u.find_spec(n)])"
    assert _docker("run", "--rm", *CLOSED, IMAGE, "python3", "-c", source).stdout == "[]\n"
    tools = "for tool in gcc cc make git curl; do command -v $tool; done; true"
    assert _docker("run", "--rm", *CLOSED, IMAGE, "sh", "-c", tools).stdout == ""
    size = int(_inspect(IMAGE, "{{.Size}}"))
    print(f"{IMAGE}: {size / 1e6:.0f} MB")
    assert size < LIMIT_BYTES


def test_the_image_lists_what_it_holds() -> None:
    sbom = json.loads(_docker("run", "--rm", *CLOSED, IMAGE, "cat", "/opt/fastorgan/share/sbom.cdx.json").stdout)
    assert sbom["bomFormat"] == "CycloneDX"
    listed = {part["name"]: part for part in sbom["components"]}
    source = "import importlib.metadata as m; print(*(f'{d.name}=={d.version}' for d in m.distributions()))"
    installed = _docker("run", "--rm", *CLOSED, IMAGE, "/opt/fastorgan/bin/python", "-c", source).stdout.split()
    assert len(installed) > 5
    for name, version in (entry.split("==") for entry in installed):
        assert listed[name]["version"] == version
    query = ("dpkg-query", "--show", "--showformat", "${Package}\n")
    debian = _docker("run", "--rm", *CLOSED, IMAGE, *query).stdout.split()
    assert "libc6" in debian
    assert {*debian, "python", "organs.bin"} <= listed.keys()


def test_python_finds_byte_code_for_all_that_a_run_imports() -> None:
    # -v tells of each module whose byte code is missing or stale that it was made from source.
    source = "import fastorgan.predict, fastorgan.preview, fastorgan.phantom, openvino, tqdm, pynvml"
    run = _docker("run", "--rm", *CLOSED, IMAGE, "python3", "-v", "-c", source)
    imported = [line for line in run.stderr.splitlines() if line.startswith("# code object from ")]
    from_source = [line for line in imported if line.rstrip("'").endswith(".py")]
    assert len(imported) > 300
    assert from_source == []


def test_the_image_says_what_it_is() -> None:
    config = json.loads(_inspect(IMAGE, "{{json .Config}}"))
    labels = {key.removeprefix("org.opencontainers.image."): text for key, text in config["Labels"].items()}
    assert labels["title"] == "fastorgan"
    assert labels["licenses"] == "Apache-2.0"
    assert f"fastorgan {labels['version']}\n" == _docker("run", "--rm", IMAGE, "fastorgan", "--version").stdout
    assert labels["revision"]
    assert labels["base.name"]
    assert config["WorkingDir"] == "/workspace"
    assert config["Healthcheck"] == {"Test": ["NONE"]}
    # The organisers run it as root; whoever else runs it says as whom.
    assert not config.get("User")


@pytest.mark.parametrize("profile", PROFILES)
def test_compose_takes_every_profile_without_a_word(profile: str) -> None:
    run = _compose("--profile", profile, "config")
    assert run.stderr == ""
    assert f"target: {profile}" in run.stdout


def test_compose_runs_the_service_for_the_cpu(
    cases: list[Path], expected: dict[str, NDArray[np.uint8]], outputs: Path
) -> None:
    folders = {"INPUTS": str(cases[0].parent), "OUTPUTS": str(outputs), "OWNER": "1234:1234"}
    _compose("--profile", "cpu", "run", "--rm", "predict-cpu", **folders)
    _check(outputs, cases[0], expected)
    assert (outputs / _output(cases[0])).stat().st_uid == 1234


@pytest.mark.parametrize("name", ["", "Team One", "../team", "-team", "team_", ".v1", "équipe"])
def test_save_refuses_what_is_no_team_name(name: str, tmp_path: Path) -> None:
    run = subprocess.run([ROOT / "save.sh", name, IMAGE], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("save.sh: ")
    assert list(tmp_path.iterdir()) == []


def _docker(*arguments: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
    run = subprocess.run(["docker", *arguments], check=False, capture_output=True, text=True)
    if check and run.returncode:
        pytest.fail(f"docker {' '.join(arguments)}: exit code {run.returncode}\n{run.stdout}{run.stderr}")
    return run


def _compose(*arguments: str, **settings: str) -> "subprocess.CompletedProcess[str]":
    if _docker("compose", "version", check=False).returncode:
        pytest.skip("docker compose is not installed here")
    command = ["docker", "compose", "--file", str(ROOT / "docker-compose.yml"), *arguments]
    run = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, **settings})
    assert run.returncode == 0, run.stdout + run.stderr
    return run


def _inspect(image: str, template: str) -> str:
    return _docker("image", "inspect", "--format", template, image).stdout.strip()


def _revision() -> str:
    run = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, check=False, capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


def _mounts(case: Path, outputs: Path) -> tuple[str, ...]:
    return ("-v", f"{case.parent}:/inputs:ro", "-v", f"{outputs}:/outputs")


def _output(case: Path) -> str:
    return f"{case_name(case)}.nii.gz"


def _labels(path: Path) -> NDArray[np.uint8]:
    image = nib.Nifti1Image.from_filename(path)
    assert image.get_data_dtype() == np.uint8
    return np.asarray(image.dataobj, np.uint8)


def _check(outputs: Path, case: Path, expected: dict[str, NDArray[np.uint8]]) -> None:
    name = _output(case)
    found, local = _labels(outputs / name), expected[name]
    differing = int(np.count_nonzero(found != local))
    print(f"{name}: {differing} of {local.size} voxels differ from the local run's")
    assert found.shape == local.shape
    assert differing == 0
