#!/bin/sh
# Build an image: ./build.sh [cpu|gpu|train] [options of docker build]. The result is fastorgan:cpu, and so on.
# BASE names another base image than the Dockerfile's.
set -eu
cd "$(dirname "$0")"
case ${1:-} in
    '' | -*) target=cpu ;;
    cpu | gpu | train) target=$1 && shift ;;
    *) echo "build.sh: there is no target $1; choose cpu, gpu or train" >&2 && exit 2 ;;
esac
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' app/fastorgan/__init__.py)
revision=$(git rev-parse HEAD 2>/dev/null) || revision=unknown
export DOCKER_BUILDKIT=1
docker build --target "$target" --tag "fastorgan:$target" --build-arg "VERSION=$version" \
    --build-arg "REVISION=$revision" ${BASE:+--build-arg "BASE=$BASE"} "$@" .
docker image ls "fastorgan:$target"
