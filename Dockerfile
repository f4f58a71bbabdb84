# fastorgan as a container image. Targets: cpu (no torch in it), gpu (torch with its CUDA libraries; needs only the
# driver on the host) and train (gpu, training/ and what that needs). Build with ./build.sh [cpu|gpu|train].
#
# BASE: an image with Python 3.11, pip, venv and /bin/bash, the same for all stages.
ARG BASE=python:3.11-slim-bookworm

# Third-party packages, from lock files alone: a change of fastorgan's own code leaves these layers as they are.
# Byte code is compiled here, since nothing can be written where the image runs. It is never compared with its source
# again: one file less to look at per module, and no matter what times a copy gives the files.
FROM ${BASE} AS deps
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
    PIP_NO_DEPS=1 PIP_NO_COMPILE=1 PIP_ONLY_BINARY=:all: PIP_REQUIRE_HASHES=1
RUN python3 -m venv --without-pip /opt/fastorgan
COPY docker/strip.sh /build/

FROM deps AS deps-cpu
COPY docker/requirements-cpu.txt /build/
RUN pip --python /opt/fastorgan/bin/python install -r /build/requirements-cpu.txt \
    && sh /build/strip.sh /opt/fastorgan/lib/python3.11/site-packages \
    && python3 -m compileall -q --invalidation-mode unchecked-hash /opt/fastorgan/lib

FROM deps AS deps-gpu
COPY docker/requirements-gpu.txt /build/
RUN pip --python /opt/fastorgan/bin/python install -r /build/requirements-gpu.txt

# torch's tests of itself are in part for a newer Python, and do not compile.
FROM deps-gpu AS deps-gpu-stripped
RUN sh /build/strip.sh /opt/fastorgan/lib/python3.11/site-packages \
    && python3 -m compileall -q -x '/(test|tests|_internal)/' --invalidation-mode unchecked-hash /opt/fastorgan/lib

# Not stripped: augmentation and the export of weights use the rest of SciPy and OpenVINO.
FROM deps-gpu AS deps-train
COPY docker/requirements-train.txt /build/
RUN pip --python /opt/fastorgan/bin/python install -r /build/requirements-train.txt \
    && python3 -m compileall -q -x '/(test|tests|_internal)/' --invalidation-mode unchecked-hash /opt/fastorgan/lib

# fastorgan itself, with the weights that its wheel carries.
FROM deps AS app
COPY docker/requirements-build.txt /build/
RUN python3 -m venv /opt/build && /opt/build/bin/pip install -r /build/requirements-build.txt
COPY pyproject.toml README.md LICENSE /build/
COPY app /build/app
COPY weights /build/weights
RUN PIP_REQUIRE_HASHES=0 /opt/build/bin/pip wheel --no-build-isolation --wheel-dir /wheels /build \
    && PIP_REQUIRE_HASHES=0 pip --python /opt/fastorgan/bin/python install --no-index --prefix /staging /wheels/*.whl \
    && python3 -m compileall -q --invalidation-mode unchecked-hash -s /staging -p /opt/fastorgan /staging/lib
COPY docker/entrypoint.sh predict.sh /build/
# Modes for any user, whatever umask the checkout had.
RUN install -m 755 /build/entrypoint.sh /staging/bin/entrypoint.sh && install -D -m 755 /build/predict.sh /workspace/predict.sh

# What each image holds, for whoever must know when a weakness is found: CycloneDX, in the image at
# /opt/fastorgan/share/sbom.cdx.json. The tool that lists it stays out.
FROM deps AS lister
COPY docker/requirements-sbom.txt docker/sbom.py /build/
RUN python3 -m venv /opt/lister && /opt/lister/bin/pip install -r /build/requirements-sbom.txt
COPY --from=app /staging /opt/fastorgan
COPY docker/list.sh /build/

FROM lister AS sbom-cpu
COPY --from=deps-cpu /opt/fastorgan /opt/fastorgan
RUN sh /build/list.sh

FROM lister AS sbom-gpu
COPY --from=deps-gpu-stripped /opt/fastorgan /opt/fastorgan
RUN sh /build/list.sh

FROM lister AS sbom-train
COPY --from=deps-train /opt/fastorgan /opt/fastorgan
RUN sh /build/list.sh

FROM ${BASE} AS runtime
# The official images come without byte code of the standard library, and every start would compile it anew. Where it
# is there, this does nothing.
RUN python3 -m compileall -q -x '/(test|tests|idlelib|lib2to3|turtledemo|ensurepip|distutils|config-.*|.*-packages)/' \
    "$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
ENV PATH=/opt/fastorgan/bin:$PATH PYTHONDONTWRITEBYTECODE=1
WORKDIR /workspace
ENTRYPOINT ["/opt/fastorgan/bin/entrypoint.sh"]
CMD []
HEALTHCHECK NONE
ARG BASE
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="fastorgan" \
    org.opencontainers.image.description="Liver, kidneys, spleen and pancreas in abdominal CT. Not a medical device." \
    org.opencontainers.image.authors="The fastorgan developers" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version=${VERSION} \
    org.opencontainers.image.revision=${REVISION} \
    org.opencontainers.image.base.name=${BASE}

# The driver's parts that the NVIDIA container toolkit lends: CUDA, and NVML for the memory's readings. The driver's
# cache of compiled kernels would be written to the home folder.
FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility CUDA_CACHE_DISABLE=1

FROM cuda AS train
COPY --from=deps-train /opt/fastorgan /opt/fastorgan
COPY --from=app /staging /opt/fastorgan
COPY --from=sbom-train /sbom.cdx.json /opt/fastorgan/share/sbom.cdx.json
COPY --from=app /workspace /workspace
COPY training /workspace/training

FROM cuda AS gpu
COPY --from=deps-gpu-stripped /opt/fastorgan /opt/fastorgan
COPY --from=app /staging /opt/fastorgan
COPY --from=sbom-gpu /sbom.cdx.json /opt/fastorgan/share/sbom.cdx.json
COPY --from=app /workspace /workspace

# Last, so that it is what `docker build .` makes.
FROM runtime AS cpu
COPY --from=deps-cpu /opt/fastorgan /opt/fastorgan
COPY --from=app /staging /opt/fastorgan
COPY --from=sbom-cpu /sbom.cdx.json /opt/fastorgan/share/sbom.cdx.json
COPY --from=app /workspace /workspace
