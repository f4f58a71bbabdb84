#!/bin/sh
# Take out of an installed set of packages what inference never loads: strip.sh SITE_PACKAGES
# tests/test_container.py runs every command of the image on what is left.
set -eu
cd "$1"

# OpenVINO: keep the runtime, the CPU's plugin, the reader of its own model format and the threads' library.
find openvino/libs -type f ! -name 'libopenvino.so*' ! -name 'libopenvino_*_cpu_plugin.so' \
    ! -name 'libopenvino_ir_frontend.so*' ! -name 'libtbb*.so*' ! -name 'libhwloc.so*' -delete
rm -rf openvino/include openvino/cmake openvino/tools openvino/torch
find openvino/frontend -mindepth 1 -maxdepth 1 -type d -exec rm -rf {} +

# SciPy: keep image filters and splines, and the subpackages that these import.
for part in cluster datasets differentiate fftpack integrate io misc odr signal stats; do
    rm -rf "scipy/$part"
done

# numpy.testing, which SciPy imports, takes one module from numpy's tests.
find . -type d -name tests ! -path './numpy/_core/tests' -prune -exec rm -rf {} +
find numpy/_core/tests -mindepth 1 ! -name __init__.py ! -name _natype.py -delete
rm -rf numpy/_core/include numpy/_core/lib numpy/random/lib numpy/distutils numpy/typing/tests
rm -rf nibabel/benchmarks bin ../../../bin/ovc ../../../bin/benchmark_app

# torch: nothing is compiled in the image; of its programs, importing it asks for this one.
rm -rf torch/include torch/share torch/test nvidia/*/include
[ ! -d torch/bin ] || find torch/bin -type f ! -name torch_shm_manager -delete
find . \( -name '*.a' -o -name '*.pyi' -o -name '*.pyx' -o -name '*.pxd' \) -delete
