#!/bin/sh
# Resolve the images' requirements anew and write the lock files beside this script. Needs uv (pip install uv), which
# reads the packages' metadata and downloads none of them. The hashes name the files; whichever index serves a file,
# pip refuses any other.
set -eu
cd "$(dirname "$0")/.."

lock() {
    output=docker/$1
    shift
    uv pip compile --quiet --generate-hashes --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-header \
        --no-annotate --no-emit-index-url --upgrade --output-file "$output" "$@"
}

# Telemetry has no place beside patients' scans, and OpenVINO's runtime does without it.
lock requirements-cpu.txt --no-emit-package openvino-telemetry pyproject.toml
# torch 2.8 with CUDA 12.8 runs on the widest range of cards: Volta to Blackwell, driver 525 or newer. Triton serves
# torch.compile alone, and setuptools serves Triton.
echo "torch==2.8.0" | lock requirements-gpu.txt --constraint docker/requirements-cpu.txt --extra gpu \
    --no-emit-package openvino-telemetry --no-emit-package triton --no-emit-package setuptools pyproject.toml -
# unittest2 and what comes with it serve batchgenerators' own tests, which the image has not.
lock requirements-train.txt --constraint docker/requirements-gpu.txt --extra gpu --extra train \
    --no-emit-package openvino-telemetry --no-emit-package triton --no-emit-package setuptools \
    --no-emit-package unittest2 --no-emit-package argparse --no-emit-package traceback2 --no-emit-package linecache2 \
    pyproject.toml
python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' |
    lock requirements-build.txt -
# What lists the images' contents; it stays out of them.
echo "cyclonedx-bom>=7.5,<8" | lock requirements-sbom.txt -
