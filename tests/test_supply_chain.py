"""What is run is what was released: no pickle, no network, weights as recorded, and a list of what an image holds."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest

from fastorgan.__main__ import main
from fastorgan.errors import WeightsError
from fastorgan.phantom import make_phantom
from fastorgan.report import NOTICE
from fastorgan.weights import Weights

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "app" / "fastorgan"

UNSAFE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
NETWORKED = {"socket", "ssl", "http", "urllib", "ftplib", "smtplib", "requests", "httpx", "urllib3", "aiohttp"}

WATCH = """
import sys
DENIED = ("pickle.find_class", "socket.connect", "socket.getaddrinfo", "socket.bind", "socket.sendto", "urllib.Request")
def watch(event, arguments):
    # Where pydicom and requests are installed, nibabel's import of them asks whether there is IPv6 by this one.
    if event in DENIED and not (event == "socket.bind" and arguments[1] == ("::1", 0)):
        print(f"denied: {event} {arguments}", file=sys.stderr, flush=True)
        import os
        os._exit(99)
sys.addaudithook(watch)
from fastorgan.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small phantom."""
    path = tmp_path_factory.mktemp("ct") / "ct.nii.gz"
    image, _ = make_phantom((96, 96, 45), (4.0, 4.0, 6.6), seed=3)
    nib.save(image, path)
    return path


def load_script(name: str) -> ModuleType:
    """Import a script of docker/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docker" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "app")}


# Pickle and network


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_no_module_unpickles_or_knows_a_network(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        assert not {name.partition(".")[0] for name in names} & (UNSAFE | NETWORKED), ast.unparse(node)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"torch.load", "np.load", "numpy.load", "eval", "exec"}, f"{path.name}:{node.lineno}"


def run_watched(ct: Path, output: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", WATCH, "predict", str(ct), str(output), "--device", "cpu", *options]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment())


def test_a_run_unpickles_nothing_and_calls_nobody(ct: Path, tmp_path: Path) -> None:
    run = run_watched(ct, tmp_path / "labels.nii.gz", "--report", str(tmp_path / "run.json"), "--preview")
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "labels.nii.gz").is_file()


@pytest.mark.slow
def test_a_run_with_torch_unpickles_nothing_and_calls_nobody(ct: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    run = run_watched(ct, tmp_path / "labels.nii.gz", "--engine", "torch")
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("deed", ["pickle.loads(pickle.dumps(Path))", "socket.create_connection(('127.0.0.1', 9))"])
def test_the_watch_would_notice(deed: str) -> None:
    source = WATCH.replace("from fastorgan", f"import pickle, socket\nfrom pathlib import Path\n{deed}\nfrom fastorgan")
    run = subprocess.run([sys.executable, "-c", source, "--version"], check=False, capture_output=True, text=True)
    assert run.returncode == 99
    assert run.stderr.startswith("denied: ")


def test_no_interface_is_needed(ct: Path, tmp_path: Path) -> None:
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rn", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no network namespace can be made here")
    # Only the loopback is there, and it is down.
    probe = "cut -d: -f1 /proc/net/dev | tail -n +3 | tr -d ' '; cat /proc/net/route | tail -n +2"
    inside = subprocess.run([unshare, "-rn", "sh", "-c", probe], check=True, capture_output=True, text=True)
    assert inside.stdout.split() == ["lo"]
    command = [sys.executable, "-m", "fastorgan", "predict", str(ct), "--device", "cpu"]
    alone = [unshare, "-rn", *command[:4], str(ct), str(tmp_path / "alone.nii.gz"), "--device", "cpu"]
    beside = [*command[:4], str(ct), str(tmp_path / "beside.nii.gz"), "--device", "cpu"]
    for run in (alone, beside):
        done = subprocess.run(run, check=False, capture_output=True, text=True, env=environment())
        assert done.returncode == 0, done.stderr
    files = [tmp_path / "alone.nii.gz", tmp_path / "beside.nii.gz"]
    first, second = (np.asarray(nib.Nifti1Image.from_filename(path).dataobj) for path in files)
    assert first.any()
    assert np.array_equal(first, second)


# Weights


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A copy of the released weights, to be spoilt."""
    folder = tmp_path / "weights"
    shutil.copytree(ROOT / "weights", folder)
    return folder


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", sorted(Weights.find().sha256))
def test_one_bit_of_any_weights_file_is_noticed(name: str, weights: Path) -> None:
    flip_a_bit(weights / name)
    network, _, kind = name.partition(".")
    network, dash, form = network.partition("-")
    with pytest.raises(WeightsError, match=rf"^{re.escape(str(weights / name))}: is not the released file \(SHA-256 "):
        Weights.find(weights).read(network, f"{dash}{form}.{kind}")


@pytest.mark.parametrize("engine", ["openvino", "torch"])
@pytest.mark.parametrize("network", ["roi", "organs"])
def test_a_run_refuses_spoilt_weights_in_one_line(
    network: str, engine: str, weights: Path, ct: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(engine)
    for file in weights.glob(f"{network}*"):
        flip_a_bit(file)
    out = tmp_path / "out"
    options = ["--device", "cpu", "--engine", engine, "--weights", str(weights)]
    assert main(["predict", str(ct), str(out), *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fastorgan: {weights / network}")
    assert ": is not the released file (SHA-256 " in said
    assert said.count("\n") == 1
    assert not list(out.glob("*.nii.gz"))


# What users and auditors are told


def test_it_is_said_that_this_is_no_medical_device() -> None:
    assert "not a medical device" in NOTICE
    for name in ("README.md", "SECURITY.md", "weights/README.md"):
        assert "not a medical device" in (ROOT / name).read_text(encoding="utf-8").lower(), name


def test_debians_packages_are_listed() -> None:
    status = (
        "Package: zlib1g\nStatus: install ok installed\nArchitecture: amd64\nVersion: 1:1.2.13.dfsg-1\nDescription: x\n"
        " more\n\nPackage: gone\nStatus: deinstall ok config-files\nVersion: 1\n"
    )
    purl = "pkg:deb/debian/zlib1g@1%3A1.2.13.dfsg-1?arch=amd64&distro=debian-12"
    assert load_script("sbom").debian_components(status, "debian-12") == [
        {"type": "library", "bom-ref": purl, "name": "zlib1g", "version": "1:1.2.13.dfsg-1", "purl": purl}
    ]


def test_the_weights_are_listed_with_the_hashes_that_are_checked() -> None:
    manifest = json.loads((ROOT / "weights" / "weights.json").read_text(encoding="utf-8"))
    recorded = {name: digest for network in manifest["networks"].values() for name, digest in network["sha256"].items()}
    listed = load_script("sbom").weights_components(ROOT / "weights")
    assert {part["name"]: part["hashes"][0]["content"] for part in listed} == recorded


@pytest.mark.parametrize(
    ("packages", "line", "known"),
    [
        ([{"name": "a", "version": "1", "vulns": []}], "lock: no weakness is known in 1 packages", False),
        (
            [{"name": "a", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}],
            "lock: a 1: CVE-1, mended in 2",
            True,
        ),
        ([{"name": "a", "skip_reason": "not found"}], "lock: 1 of 1 packages could not be asked about", False),
    ],
)
def test_an_audit_fails_by_what_is_known_alone(packages: list[object], line: str, known: bool) -> None:
    assert load_script("audit").verdict("lock", {"dependencies": packages}) == ([line], known)
