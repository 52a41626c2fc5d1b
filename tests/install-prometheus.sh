#!/bin/sh
# Installs Prometheus and promtool from the distribution, for the tests of rules and dashboards. Without them
# those tests are skipped and say so, so nothing here fails the set-up.
set -u
command -v promtool >/dev/null && exit 0
say() { echo "set-up: $*" >&2; }
command -v apt-get >/dev/null || { say "no promtool, and no apt-get to install it: its tests will be skipped"; exit 0; }
if [ "$(id -u)" = 0 ]; then run=""; elif command -v sudo >/dev/null; then run="sudo -n"; else
  say "no promtool; as root, 'apt-get install prometheus' would have the rules tested"; exit 0
fi
say "installing prometheus"
# The package would start servers on all addresses where there is a service manager: masked, nothing runs but tests
# ('systemctl unmask prometheus' is for who wants it).
command -v systemctl >/dev/null && $run systemctl mask prometheus.service prometheus-node-exporter.service >/dev/null 2>&1
$run apt-get update -qq && $run env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends prometheus \
  || say "prometheus could not be installed: its tests will be skipped"
exit 0
