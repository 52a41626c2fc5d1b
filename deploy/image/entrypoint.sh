#!/bin/sh
# What a container of the image does, by its first argument:
#   serve ...       `peregrine serve`: one machine, everything in this container (the default)
#   node ...        a node of a Ray cluster: the command that follows, or KubeRay's, in the environment it needs
#   drain S         take this node out of the Ray cluster; back once its streams have ended, after S s at most
#   prefetch MARK MODEL [OPTIONS]  fetch; with options of `peregrine quantize` quantize; then write MARK
#   wait-for FILE S until FILE is there, for S seconds at most
#   health          0 if the server on PEREGRINE_PORT (8000) answers 200 to /health
#   smoke URL       stream one completion
#   anything else   a `peregrine` command: fetch, quantize, version ...
# The root may be read-only and the user any number: what is written goes to /tmp and PEREGRINE_CACHE_DIR.
set -eu

say() { echo "peregrine-entrypoint: $*" >&2; }

# Processes of this node that may have streams; [] so that grep does not find itself.
left() { grep -hs -a -o -e "ray::Serve[R]eplica[^ ]*" -e "[h]aproxy.cfg" /proc/[0-9]*/cmdline | tr '\0\n' '  ' | tr -s ' '; }

# A user without a line in /etc/passwd (OpenShift gives such numbers) has no name, which torch asks for.
id -un >/dev/null 2>&1 || { export USER=peregrine LOGNAME=peregrine; }
# /home/peregrine may be part of a read-only root.
[ -w "${HOME:-/}" ] || export HOME=/tmp

cache=${PEREGRINE_CACHE_DIR:=/cache}
mkdir -p "$cache" 2>/dev/null || true
if [ ! -w "$cache" ]; then
  say "PEREGRINE_CACHE_DIR=$cache cannot be written by user $(id -u): mount a volume there (fsGroup $(id -g))"
  exit 1
fi
export PEREGRINE_CACHE_DIR HF_HOME="${HF_HOME:-$cache/huggingface}"
# Compiled kernels belong to a machine, not to a volume that several share.
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-/tmp/triton}"

# Files that the image brings along; a link, so that a mounted cache does not hold them twice.
if [ -d "${PEREGRINE_SEED_CACHE_DIR:-}/models" ]; then
  mkdir -p "$cache/models"
  for file in "$PEREGRINE_SEED_CACHE_DIR"/models/*; do
    [ -e "$cache/models/${file##*/}" ] || ln -sf "$file" "$cache/models/"
  done
fi

case "${1:-serve}" in
  node)
    shift
    ulimit -n "${RAY_START_ULIMIT_OPEN_FILES:-65536}" 2>/dev/null || ulimit -n "$(ulimit -Hn)"
    if [ $# -eq 0 ]; then
      : "${KUBERAY_GEN_RAY_START_CMD:?node: no command given, and none from KubeRay}"
      set -- bash -c "exec $KUBERAY_GEN_RAY_START_CMD"
    fi
    exec peregrine node -- "$@"
    ;;
  drain)
    # Serve starts replicas elsewhere and lets those here finish what they have. Where the head is gone too,
    # nobody is there to tell, and the streams end with the cluster.
    timeout 20 ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "the pod is to end" \
      --deadline-remaining-seconds "$2" || say "the cluster could not be told"
    deadline=$(($(date +%s) + $2))
    # A proxy here may carry streams of replicas elsewhere.
    while [ -n "$(left)" ]; do
      [ "$(date +%s)" -lt "$deadline" ] || { say "streams are left after $2 s"; exit 1; }
      grep -qs "raylet/[r]aylet" /proc/[0-9]*/cmdline || exit 0
      [ $(($(date +%s) % 15)) -ne 0 ] || say "left: $(left)"
      sleep 1
    done
    ;;
  prefetch)
    mark=$2 model=$3
    shift 3
    peregrine fetch "$model"
    [ $# -eq 0 ] || peregrine quantize "$model" "$@"
    mkdir -p "$(dirname "$mark")"
    touch "$mark"
    ;;
  wait-for)
    deadline=$(($(date +%s) + $3))
    until [ -e "$2" ]; do
      [ "$(date +%s)" -lt "$deadline" ] || { say "$2 is not there after $3 s"; exit 1; }
      say "waiting for $2"
      sleep 5
    done
    ;;
  smoke)
    shift
    exec python -m deploy.smoke "$@"
    ;;
  health)
    exec python -c 'import sys, urllib.request
urllib.request.urlopen(sys.argv[1], timeout=4)' "http://127.0.0.1:${PEREGRINE_PORT:-8000}/health"
    ;;
  "" | -*) exec peregrine serve "$@" ;;
  *) exec peregrine "$@" ;;
esac
