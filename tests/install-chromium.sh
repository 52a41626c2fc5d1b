#!/bin/sh
# Installs Chromium from the distribution, for the tests of the status page; they are skipped, with this reason,
# where there is none. Playwright's own download of a browser is not used.
set -u
for name in chromium chromium-browser google-chrome; do command -v $name >/dev/null && exit 0; done
say() { echo "set-up: $*" >&2; }
command -v apt-get >/dev/null || { say "no Chromium, and no apt-get to install it: its tests are skipped"; exit 0; }
if [ "$(id -u)" = 0 ]; then run=""; elif command -v sudo >/dev/null; then run="sudo -n"; else
  say "no Chromium; as root, 'apt-get install chromium' would add the tests of the status page"; exit 0
fi
say "installing chromium"
$run apt-get update -qq && $run env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 \
  install -y -qq --no-install-recommends chromium || say "chromium could not be installed: its tests are skipped"
exit 0
