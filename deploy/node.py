"""A node of a cluster of several: its environment, and its processes' log lines on standard output."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from deploy.config import PeregrineConfig
from deploy.log_relay import log_relay
from deploy.ray_environment import of_node


def run(config: PeregrineConfig, command: Sequence[str]) -> int:
    """The command's status, after it has ended; where it leaves Ray behind (no --block) it takes our place.

    Standard output has log lines alone; what Ray says goes to standard error.

    Raises:
        OSError: there is no such command.
        RuntimeError: HAProxy is asked for and not there.
    """
    environment = of_node(config)
    if not any("--block" in word for word in command):
        os.execvpe(
            command[0], list(command), os.environ | environment
        )  # nobody would be there to collect lines
    with tempfile.TemporaryDirectory(prefix="pg-") as directory, log_relay(Path(directory), sys.stdout):
        child = subprocess.Popen(command, env=os.environ | environment, stdout=sys.stderr)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda received, _: child.send_signal(received))
        status = child.wait()
    return status if status >= 0 else 128 - status
