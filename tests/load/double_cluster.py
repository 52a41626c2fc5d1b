"""`python -m tests.load.double_cluster`: a cluster of the timed engine double (tests.timed_engine), until a
signal. Prints its address when it is ready.
"""

import argparse
import signal

from deploy.cluster import started
from deploy.config import load_config
from tests.timed_engine import start_slow_first, start_timed_engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default="latency")
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--slow-first", action="store_true", help="the first replica at half speed")
    options = parser.parse_args()
    config = load_config(
        None,
        {
            "engine": {"model": "double", "served_model_name": "double"},
            "routing": {"policy": options.policy},
            "cluster": {"replicas": options.replicas, "port": options.port},
        },
    )
    # Blocked before Ray starts its threads, so that sigwait gets them.
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    with started(config, factory=start_slow_first if options.slow_first else start_timed_engine) as url:
        print(f"ready {url}", flush=True)
        signal.sigwait(signals)


if __name__ == "__main__":
    main()
