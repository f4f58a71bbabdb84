"""Add to a CycloneDX SBOM of Python packages what else an image holds: Debian's, Python, the weights.

    python3 sbom.py PACKAGES.json DPKG_STATUS WEIGHTS_FOLDER > SBOM.json

PACKAGES.json is what cyclonedx-py wrote of the image's environment, DPKG_STATUS the image's /var/lib/dpkg/status.
"""

import json
import platform
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote


def debian_components(status: str, release: str) -> list[dict[str, Any]]:
    """Debian's installed packages as components.

    Args:
        status: the text of /var/lib/dpkg/status.
        release: Debian's, such as "debian-12"; an empty string if unknown.
    """
    found = []
    for paragraph in status.split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z-]+): (.*)$", paragraph, re.MULTILINE))
        if fields.get("Status") != "install ok installed":
            continue
        name, version, architecture = fields["Package"], fields["Version"], fields.get("Architecture", "all")
        purl = f"pkg:deb/debian/{quote(name, safe='')}@{quote(version, safe='')}?arch={architecture}"
        if release:
            purl += f"&distro={release}"
        found.append({"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl})
    return found


def weights_components(folder: Path) -> list[dict[str, Any]]:
    """The networks' files as components, with the hashes that the manifest records and inference checks."""
    manifest = json.loads((folder / "weights.json").read_text(encoding="utf-8"))
    found = []
    for network in manifest["networks"].values():
        for name, digest in network["sha256"].items():
            found.append(
                {
                    "type": "machine-learning-model",
                    "bom-ref": f"weights/{name}",
                    "name": name,
                    "version": str(manifest["version"]),
                    "hashes": [{"alg": "SHA-256", "content": digest}],
                }
            )
    return found


def main() -> None:
    """Read the three, write the whole."""
    packages, status, weights = map(Path, sys.argv[1:])
    sbom = json.loads(packages.read_text(encoding="utf-8"))
    release = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text(encoding="utf-8").splitlines() if "=" in line
    )
    distro = f"{release.get('ID', '')}-{release.get('VERSION_ID', '')}".replace('"', "").strip("-")
    python = platform.python_version()
    sbom["components"].append(
        {
            "type": "platform",
            "bom-ref": f"pkg:generic/python@{python}",
            "name": "python",
            "version": python,
            "purl": f"pkg:generic/python@{python}",
        }
    )
    sbom["components"] += debian_components(status.read_text(encoding="utf-8"), distro) + weights_components(weights)
    json.dump(sbom, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
