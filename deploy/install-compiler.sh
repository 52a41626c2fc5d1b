#!/bin/sh
# Installs a C++ compiler from the distribution, for the native CPU kernels. Without one Peregrine runs too,
# on its slower torch reference, so nothing here fails the set-up.
set -u
say() { echo "set-up: $*" >&2; }
command -v apt-get >/dev/null || { say "no C++ compiler, and no apt-get to install one: continuing without"; exit 0; }
if [ "$(id -u)" = 0 ]; then run=""; elif command -v sudo >/dev/null; then run="sudo -n"; else
  say "no C++ compiler; as root, 'apt-get install g++' would speed up the CPU engine six times"; exit 0
fi
say "installing g++"
$run apt-get update -qq && $run env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends g++ \
  || say "g++ could not be installed: continuing without"
exit 0
