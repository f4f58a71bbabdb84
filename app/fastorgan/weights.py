"""The released weights: where they lie, and that they are what was released."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import WeightsError

MANIFEST = "weights.json"

# Beside the package in a wheel; at the top of the repository in a checkout.
_PLACES = (Path(__file__).parent / "weights", Path(__file__).parents[2] / "weights")


@dataclass(frozen=True)
class Weights:
    """A folder of weights and its manifest.

    The manifest, `weights.json`, gives the version, and per network ("roi", "organs") its variant and the SHA-256 of
    each of its files.

    Attributes:
        folder: where the files lie.
        manifest: as read.
    """

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def find(cls, folder: Path | None = None) -> "Weights":
        """Open `folder`, or the weights that came with fastorgan.

        Raises:
            WeightsError: if there is no manifest, or it is not one of weights.
        """
        places = _PLACES if folder is None else (folder,)
        for place in places:
            path = place / MANIFEST
            if path.is_file():
                try:
                    manifest = json.loads(path.read_text(encoding="utf-8"))
                except (OSError, ValueError) as error:
                    raise WeightsError(f"{path}: not a readable manifest ({error})") from error
                if not _is_manifest(manifest):
                    raise WeightsError(f"{path}: not a manifest of weights; install fastorgan anew or mend it")
                return cls(place, manifest)
        raise WeightsError(f"{places[0] / MANIFEST}: no weights here; install fastorgan anew or name their folder")

    @property
    def version(self) -> str:
        """The release's name."""
        return str(self.manifest["version"])

    @property
    def sha256(self) -> dict[str, str]:
        """SHA-256 by file name, of all files."""
        networks = self.manifest["networks"].values()
        return {name: str(digest) for network in networks for name, digest in network["sha256"].items()}

    def variant(self, network: str) -> str:
        """Which variant of a network the weights are for, such as "slim".

        Raises:
            WeightsError: if the manifest does not have the network.
        """
        if network not in self.manifest["networks"]:
            raise WeightsError(f"{self.folder / MANIFEST}: holds no network {network!r}")
        return str(self.manifest["networks"][network]["variant"])

    def holds(self, network: str, suffix: str) -> bool:
        """Whether the release has a network's file with the given suffix."""
        return f"{network}{suffix}" in self.manifest["networks"].get(network, {}).get("sha256", {})

    def read(self, network: str, suffix: str) -> bytes:
        """Read a network's file with the given suffix, such as ".safetensors", and check it.

        Raises:
            WeightsError: if the file is missing or its SHA-256 differs from the manifest's.
        """
        path = self.folder / f"{network}{suffix}"
        expected = self.manifest["networks"].get(network, {}).get("sha256", {}).get(path.name)
        if expected is None:
            raise WeightsError(f"{path}: not among the files of {self.folder / MANIFEST}")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise WeightsError(f"{path}: cannot be read ({error.strerror or error})") from error
        found = hashlib.sha256(content).hexdigest()
        if found != expected:
            raise WeightsError(
                f"{path}: is not the released file (SHA-256 {found[:12]}…, expected {expected[:12]}…); install it anew"
            )
        return content


def _is_manifest(content: Any) -> bool:
    """Whether parsed JSON has the manifest's keys; which networks it holds is not looked at."""
    return (
        isinstance(content, dict)
        and "version" in content
        and isinstance(content.get("networks"), dict)
        and all(
            isinstance(network, dict) and "variant" in network and isinstance(network.get("sha256"), dict)
            for network in content["networks"].values()
        )
    )
