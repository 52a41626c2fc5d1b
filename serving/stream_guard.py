"""What a stream's client gets to read when the replica's process is killed.

A killed process cannot write, and a proxy in front can only cut the connection. So a second process holds
duplicates of the streams' sockets (`stream_guard_process`): the kernel keeps such a connection open after
the replica's death, and the guard ends it with an error event and the last chunk.
"""

import contextlib
import itertools
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from serving import stream_guard_process
from serving.stream_guard_process import COUNT_BYTES, KEY_BYTES, MAX_MESSAGE_BYTES, bytes_written

logger = logging.getLogger(__name__)

MAX_WORDS_BYTES = MAX_MESSAGE_BYTES - 1 - KEY_BYTES - COUNT_BYTES
_START_TIMEOUT_S = 20.0
_MAX_PID_BYTES = 32
_SOCKET_BYTES = 2**20  # the system may give less: Linux's default is 208 KiB
_BELL_BYTES = 65_536  # what waits unread, until the guard is woken
_OVERHEAD_BYTES = 1_024  # of a message in the socket

Address = tuple[str, int]


class StreamGuard:
    """The guard of one replica process. All methods belong to the event loop; none but the constructor waits.

    It fails open: where a connection cannot be found or the guard is gone, streams run on without it.
    """

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
        self._bell = os.eventfd(0)
        descriptors = theirs.fileno(), self._bell
        command = [sys.executable, "-I", "-S", stream_guard_process.__file__, *map(str, descriptors)]
        with theirs:
            # A session of its own: what ends the replica's group must not end the guard with it.
            subprocess.run(
                command,
                pass_fds=descriptors,
                start_new_session=True,
                check=True,
                timeout=_START_TIMEOUT_S,
            )
        ours.settimeout(_START_TIMEOUT_S)
        self._pid = int(ours.recv(_MAX_PID_BYTES))
        ours.setblocking(False)
        self._control: socket.socket | None = ours
        self._unread_bytes = 0  # at most, since the bell rang
        self._keys = itertools.count()
        self._descriptors: dict[tuple[Address, Address], int] = {}

    def watch(self, scope: Mapping[str, Any], last_words: bytes) -> bytes | None:
        """Say `last_words` (an HTTP/1.1 body's bytes) on this request's connection if this process dies.

        To be called before the first byte of the response: while none was sent, the connection is only cut,
        so that the request is tried elsewhere. Returns what `release` takes.
        """
        if self._control is None or scope.get("http_version") != "1.1":
            return None
        if len(last_words) > MAX_WORDS_BYTES:
            raise ValueError(f"last_words: at most {MAX_WORDS_BYTES} bytes, got {len(last_words)}")
        descriptor = self._descriptor(scope)
        if descriptor is None:
            return None
        try:
            with _borrowed(descriptor) as connection:
                written = bytes_written(connection).to_bytes(COUNT_BYTES, "little")
        except OSError:
            return None
        key = next(self._keys).to_bytes(KEY_BYTES, "little")
        return key if self._send(b"W" + key + written + last_words, [descriptor]) else None

    def release(self, key: bytes) -> None:
        """The stream has ended. At once after its last chunk: what the guard would say then, the proxy takes
        for noise on an idle connection.
        """
        self._send(b"R" + key, [])

    def close(self) -> None:
        """When no stream is open any more: the guard ends without a word."""
        if self._control is not None:
            self._end()

    def _end(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
            os.close(self._bell)

    def _send(self, message: bytes, descriptors: list[int]) -> bool:
        if self._control is None:
            return False
        try:
            socket.send_fds(self._control, [message], descriptors)
        except OSError as error:
            # A guard that misses a release would hold connections open: it must not live on.
            logger.error("the stream guard is gone, a kill will cut streams without an event: %s", error)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            self._end()
            return False
        self._unread_bytes += len(message) + _OVERHEAD_BYTES
        if self._unread_bytes > _BELL_BYTES:
            os.eventfd_write(self._bell, 1)
            self._unread_bytes = 0
        return True

    def _descriptor(self, scope: Mapping[str, Any]) -> int | None:
        """The request's connection. ASGI names its two addresses only; descriptors are looked through once
        for each connection.
        """
        if not scope.get("client") or not scope.get("server"):
            return None
        ends = (_address(scope["client"]), _address(scope["server"]))
        known = self._descriptors.get(ends)
        if known is not None and _ends(known) == ends:
            return known
        self._descriptors = {found: descriptor for descriptor, found in _connections()}
        return self._descriptors.get(ends)


class Watch:
    """One stream's time under the guard; each of its ends comes once, further calls do nothing.

    last_words: of the body, asked for when it begins. That may be at any time before the stream's first byte,
        and is best while the engine computes, for it wakes the guard's process.
    """

    def __init__(
        self, guard: StreamGuard | None, scope: Mapping[str, Any], last_words: Callable[[], bytes]
    ) -> None:
        self._guard, self._scope, self._last_words = guard, scope, last_words
        self._key: bytes | None = None
        self._is_over = False

    def begin(self) -> None:
        if self._guard is not None and self._key is None and not self._is_over:
            self._key = self._guard.watch(self._scope, chunked(self._last_words()))

    def end(self) -> None:
        self._is_over = True
        if self._guard is not None and self._key is not None:
            self._guard.release(self._key)
            self._key = None


def chunked(body: bytes) -> bytes:
    """A body's last part as HTTP/1.1 chunks."""
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


def _connections() -> Iterator[tuple[int, tuple[Address, Address]]]:
    for name in os.listdir("/proc/self/fd"):
        if (ends := _ends(int(name))) is not None:
            yield int(name), ends


def _ends(descriptor: int) -> tuple[Address, Address] | None:
    """(peer, own) addresses of a connected IP socket, None for anything else."""
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return None
        with _borrowed(descriptor) as connection:
            if connection.family not in (socket.AF_INET, socket.AF_INET6):
                return None
            return _address(connection.getpeername()), _address(connection.getsockname())
    except OSError:
        return None


@contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket]:
    connection = socket.socket(fileno=descriptor)
    try:
        yield connection
    finally:
        connection.detach()


def _address(address: Any) -> Address:
    return str(address[0]), int(address[1])
