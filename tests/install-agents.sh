#!/bin/sh
# Installs the clients and agent frameworks of docs/recipes.md, for its tests, which are skipped, with this reason,
# where they are not there. The Python ones get an environment of their own: they pin what the server pins otherwise.
# usage: install-agents.sh PYTHON VENV
set -u
cd "$(dirname "$0")/agents" || exit 1
say() { echo "set-up: $*" >&2; }

[ -x "$2/bin/python" ] || "$1" -m venv "$2" || exit 1
if ! cmp -s constraints.txt "$2/installed.txt"; then
  say "installing agent frameworks"
  "$2/bin/python" -m pip --disable-pip-version-check install --quiet --no-compile -c constraints.txt -r requirements.txt &&
    cp constraints.txt "$2/installed.txt" || say "agent frameworks could not be installed: their tests are skipped"
fi

if ! command -v npm >/dev/null && command -v apt-get >/dev/null; then
  if [ "$(id -u)" = 0 ]; then run=""; else run="sudo -n"; fi
  say "installing node and npm"
  $run apt-get update -qq && $run env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 \
    install -y -qq --no-install-recommends nodejs npm || say "node could not be installed"
fi
if ! command -v npm >/dev/null; then say "no npm: the tests of Node's clients are skipped"; exit 0; fi
if ! cmp -s package-lock.json node_modules/installed.json; then
  say "installing node's clients"
  npm ci --no-audit --no-fund --silent && cp package-lock.json node_modules/installed.json ||
    say "node's clients could not be installed: their tests are skipped"
fi
exit 0
