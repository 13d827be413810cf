#!/bin/sh
# Installs the named Debian packages that are missing. Does nothing on a machine without dpkg.
set -eu
command -v dpkg-query >/dev/null || { echo "not a Debian machine: install by hand: $*"; exit 0; }
missing=
for package in "$@"; do
    state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) || state=
    [ "$state" = installed ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0
echo "installing:$missing"
as_root=
[ "$(id -u)" = 0 ] || as_root=sudo
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086 # a list of words
$as_root apt-get update -qq &&
    $as_root apt-get install -o DPkg::Lock::Timeout=300 -y -qq --no-install-recommends $missing \
        >/dev/null
