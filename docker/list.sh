#!/bin/sh
# List what an image holds: Python's packages by cyclonedx-py, the rest by sbom.py. The result is /sbom.cdx.json.
set -eu
/opt/lister/bin/cyclonedx-py environment --output-reproducible --output-format JSON -o /tmp/packages.json \
    /opt/fastorgan/bin/python
site=$(/opt/fastorgan/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
python3 /build/sbom.py /tmp/packages.json /var/lib/dpkg/status "$site/fastorgan/weights" > /sbom.cdx.json
