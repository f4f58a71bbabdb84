"""The lock files of the images against pyproject.toml: what changes there must be locked anew by docker/lock.sh."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]

EXTRAS = {"cpu": (), "gpu": ("gpu",), "train": ("gpu", "train")}


@pytest.mark.parametrize("target", EXTRAS)
def test_each_requirement_of_fastorgan_is_locked_to_a_version_that_it_allows(target: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"]]
    for extra in EXTRAS[target]:
        wanted += project["optional-dependencies"][extra]
    locked = _locked(target)
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        assert name in locked, f"{name} is not in the lock for {target}; run docker/lock.sh"
        assert locked[name] in requirement.specifier, f"{name} {locked[name]} is not {requirement.specifier}"


def test_the_build_backend_is_locked_to_a_version_that_the_project_allows() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    locked = _locked("build")
    for requirement in map(Requirement, build):
        assert locked[canonicalize_name(requirement.name)] in requirement.specifier


@pytest.mark.parametrize("target", [*EXTRAS, "build", "sbom"])
def test_every_locked_package_has_hashes_and_none_a_host(target: str) -> None:
    text = _text(target)
    entries = re.split(r"\n(?=\S)", text.strip())
    assert len(entries) == len(_locked(target))
    assert all("--hash=sha256:" in entry for entry in entries)
    assert "://" not in text
    assert "index" not in text


def test_the_image_for_the_cpu_has_neither_torch_nor_telemetry() -> None:
    assert not {"torch", "triton", "openvino-telemetry"} & set(_locked("cpu"))


def test_all_images_have_the_same_versions() -> None:
    cpu, gpu, train = (_locked(target) for target in EXTRAS)
    assert cpu.items() <= gpu.items() <= train.items()


def _text(target: str) -> str:
    return (ROOT / "docker" / f"requirements-{target}.txt").read_text(encoding="utf-8")


def _locked(target: str) -> dict[str, Version]:
    found = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", _text(target), re.MULTILINE)
    return {canonicalize_name(name): Version(version) for name, version in found}
