#!/bin/sh
# Write the archive that FLARE's organisers take: ./save.sh TEAM [IMAGE] makes TEAM.tar.gz of fastorgan:gpu.
# They tag nothing themselves: the image's name must be the archive's, cut at its first dot, in lower case.
set -eu
if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    echo "usage: ./save.sh TEAM [IMAGE]    (IMAGE: fastorgan:gpu)" >&2
    exit 2
fi
name=${1%.tar.gz}
image=${2:-fastorgan:gpu}
team=$(printf '%s' "${name%%.*}" | tr '[:upper:]' '[:lower:]')
case $name:$team in
    */* | *:[!a-z0-9]* | *:*[!a-z0-9_-]* | *: | *:*[_-])
        echo "save.sh: '$name' is no team name: letters, digits, and between them - or _" >&2
        exit 2
        ;;
esac
docker tag "$image" "$team:latest"
part=$(mktemp "./.$team-XXXXXX")
trap 'rm -f "$part" "$part.gz"' EXIT
# Two steps, since sh takes a pipe for good whose first command failed.
docker save "$team:latest" --output "$part"
gzip "$part"
chmod 644 "$part.gz"
mv "$part.gz" "$name.tar.gz"
echo "$name.tar.gz holds $team:latest"
