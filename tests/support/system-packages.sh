#!/bin/sh
# Installs the Debian packages named as arguments when run as root; otherwise says
# which are missing. Does nothing when all are there.
set -eu

missing=
for package in "$@"; do
  if command -v dpkg-query >/dev/null 2>&1; then
    state=$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null || true)
    [ "$state" = "install ok installed" ] || missing="$missing $package"
  else
    echo "This is not Debian: make sure that you have what its package $package has." >&2
  fi
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" -ne 0 ]; then
  echo "Missing Debian packages:$missing" >&2
  echo "Install them as root: apt-get install --no-install-recommends$missing" >&2
  exit 1
fi
export DEBIAN_FRONTEND=noninteractive
echo "installing Debian packages:$missing"
apt-get -qq update
# shellcheck disable=SC2086  # a list of names
apt-get -qq install -y --no-install-recommends $missing >/dev/null
