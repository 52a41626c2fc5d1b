"""`python -m tests.load.own_cluster`: a cluster for a load run, until a signal. Prints its address when it is
ready.

Of an engine double (tests.timed_engine, tests.scheduled_engine), or of the configured model.
"""

import argparse
import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from deploy.cluster import running_cluster, started
from deploy.config import load_config
from tests.scheduled_engine import start_scheduled_engine, start_slow_first
from tests.timed_engine import start_timed_engine

DOUBLES = {
    "timed": start_timed_engine,
    "slow-first": start_slow_first,
    "scheduled": start_scheduled_engine,
}
_STOP_TIMEOUT_S = 120


@contextlib.contextmanager
def running(*arguments: str, port: int) -> Iterator[str]:
    """Such a cluster in a process of its own; its address."""
    with launched(*arguments, port=port):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def launched(*arguments: str, port: int) -> Iterator[subprocess.Popen[str]]:
    """As `running`; the process."""
    command = [sys.executable, "-m", "tests.load.own_cluster", "--port", str(port), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as cluster:
        try:
            assert cluster.stdout is not None
            for line in cluster.stdout:
                if line.startswith("ready"):
                    break
            else:
                raise RuntimeError(f"{' '.join(command)} did not start")
            yield cluster
        finally:
            cluster.send_signal(signal.SIGTERM)
            cluster.wait(_STOP_TIMEOUT_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=[*DOUBLES, "real"], default="timed")
    parser.add_argument("--policy", default="latency")
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--max-num-seqs", type=int, default=64, help="of each replica (all but timed)")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--config", type=Path, help="what else is configured")
    parser.add_argument("--log", type=argparse.FileType("w"), help="gets the log lines of all processes")
    options = parser.parse_args()
    double = {"model": "double", "served_model_name": "double"} if options.engine != "real" else {}
    config = load_config(
        options.config,
        {
            "engine": {"max_num_seqs": options.max_num_seqs, **double},
            "routing": {"policy": options.policy},
            "cluster": {"replicas": options.replicas, "port": options.port},
        },
    )
    # Blocked before Ray starts its threads, so that sigwait gets them.
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    factory = DOUBLES.get(options.engine)
    cluster = (
        started(config, factory=factory, log_to=options.log)
        if factory
        else running_cluster(config, options.log)
    )
    with cluster as url:
        print(f"ready {url}", flush=True)
        signal.sigwait(signals)


if __name__ == "__main__":
    main()
