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
Ends = tuple[Address, Address]


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
        self._descriptors: dict[Ends, int] = {}

    def watch(self, scope: Mapping[str, Any], last_words: bytes) -> bytes | None:
        """Say `last_words` on this request's connection if this process dies: bytes as they go over it, those
        of a response's body `chunked`.

        To be called before the first byte of the response: while none was sent, the connection is only cut,
        so that the request is tried elsewhere. Returns what `release` takes.
        """
        if self._control is None or scope.get("http_version") != "1.1":
            return None
        if len(last_words) > MAX_WORDS_BYTES:
            raise ValueError(f"last_words: at most {MAX_WORDS_BYTES} bytes, got {len(last_words)}")
        if not scope.get("client") or not scope.get("server"):
            return None
        ends = _address(scope["client"]), _address(scope["server"])
        if (known := self._written(ends)) is None:
            # ASGI names a connection's addresses only: descriptors are looked through once for each.
            self._descriptors = {found: descriptor for descriptor, found in _connections()}
            if (known := self._written(ends)) is None:
                return None
        descriptor, written = known
        key = next(self._keys).to_bytes(KEY_BYTES, "little")
        message = b"W" + key + written.to_bytes(COUNT_BYTES, "little") + last_words
        return key if self._send(message, [descriptor]) else None

    def release(self, key: bytes) -> None:
        """The stream has ended. At once after its last chunk: what the guard would say then, the proxy takes
        for noise on an idle connection.
        """
        self._send(b"R" + key, [])

    def close(self) -> None:
        """When no stream is open any more: the guard ends without a word."""
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
            self.close()
            return False
        self._unread_bytes += len(message) + _OVERHEAD_BYTES
        if self._unread_bytes > _BELL_BYTES:
            os.eventfd_write(self._bell, 1)
            self._unread_bytes = 0
        return True

    def _written(self, ends: Ends) -> tuple[int, int] | None:
        """The connection's descriptor and how much was written to it; None where none is known."""
        descriptor = self._descriptors.get(ends)
        if descriptor is None:
            return None
        # Named, not asked for: three system calls.
        family = socket.AF_INET6 if ":" in ends[0][0] else socket.AF_INET
        try:
            connection = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=descriptor)
        except OSError:
            return None
        try:
            # The descriptor may be another connection's by now.
            if (_address(connection.getpeername()), _address(connection.getsockname())) != ends:
                return None
            return descriptor, bytes_written(connection)
        except OSError:
            return None
        finally:
            connection.detach()


class Watch:
    """One stream's time under the guard; each of its ends comes once, further calls do nothing.

    last_words: as `StreamGuard.watch` takes them, asked for when it begins. That may be at any time before
        the stream's first byte, and is best while the engine computes.
    """

    def __init__(
        self, guard: StreamGuard | None, scope: Mapping[str, Any], last_words: Callable[[], bytes]
    ) -> None:
        self._guard, self._scope, self._last_words = guard, scope, last_words
        self._key: bytes | None = None
        self._is_over = False

    def begin(self) -> None:
        if self._guard is not None and self._key is None and not self._is_over:
            self._key = self._guard.watch(self._scope, self._last_words())

    def end(self) -> None:
        self._is_over = True
        if self._guard is not None and self._key is not None:
            self._guard.release(self._key)
            self._key = None


def chunked(body: bytes) -> bytes:
    """A body's last part as HTTP/1.1 chunks."""
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


def _connections() -> Iterator[tuple[int, Ends]]:
    """Descriptors of connected IP sockets, and (peer, own) addresses."""
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        try:
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            connection = socket.socket(fileno=descriptor)
        except OSError:
            continue
        try:
            if connection.family in (socket.AF_INET, socket.AF_INET6):
                yield descriptor, (_address(connection.getpeername()), _address(connection.getsockname()))
        except OSError:
            continue  # not connected
        finally:
            connection.detach()


def _address(address: Any) -> Address:
    return str(address[0]), int(address[1])
