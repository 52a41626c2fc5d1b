"""Speaks for a replica that was killed: ends its open streams in the API's form. Run as a script, by path.

It holds a duplicate of each streaming connection's socket and what to say on it. No byte of a living stream
passes through it: it writes once, when its replica's end of the control socket closes. Imports the standard
library alone, so that it starts in milliseconds and weighs little.

Messages wait in the socket until somebody rings the bell or a quarter of a second is over: each of them would
have this process take a core just while the engine computes. The replica's end wakes it at once.

It says its process id first. Control messages, one a packet: b"W" + key + bytes written before + last words,
with the connection's descriptor; b"R" + key.
"""

import contextlib
import fcntl
import os
import select
import signal
import socket
import struct
import sys
import termios

KEY_BYTES = 8
COUNT_BYTES = 8
MAX_MESSAGE_BYTES = 65_536
_READ_PERIOD_S = 0.25
_SEND_TIMEOUT_S = 1.0
_TCPI_BYTES_ACKED = 120  # its offset in Linux' struct tcp_info (include/uapi/linux/tcp.h)


def bytes_written(connection: socket.socket) -> int:
    """How much was ever written to a TCP connection, up to a constant: what was acknowledged, and what waits.

    Only while nobody writes. Raises OSError.
    """
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    (acknowledged,) = struct.unpack_from("Q", info, _TCPI_BYTES_ACKED)
    (waiting,) = struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)))
    return int(acknowledged) + int(waiting)


def main(control: socket.socket, bell: int) -> None:
    """Until the replica is gone; then the last words, and the end.

    bell: an event descriptor.
    """
    held: dict[bytes, tuple[int, int, bytes]] = {}
    control.setblocking(False)
    poller = select.poll()
    poller.register(control, 0)  # its end alone
    poller.register(bell, select.POLLIN)
    while _read(control, held):
        if bell in dict(poller.poll(_READ_PERIOD_S * 1e3)):
            os.eventfd_read(bell)
    for descriptor, written_before, words in held.values():
        with contextlib.suppress(OSError), socket.socket(fileno=descriptor) as connection:
            if bytes_written(connection) == written_before:
                continue  # no byte of an answer: cut, so that the request is tried elsewhere
            connection.settimeout(_SEND_TIMEOUT_S)
            connection.sendall(words)
            connection.shutdown(socket.SHUT_WR)


def _read(control: socket.socket, held: dict[bytes, tuple[int, int, bytes]]) -> bool:
    """What has come. Returns whether more may."""
    while True:
        try:
            message, descriptors, _, _ = socket.recv_fds(control, MAX_MESSAGE_BYTES, 1)
        except BlockingIOError:
            return True
        if not message:
            return False
        kind, key, rest = message[:1], message[1 : 1 + KEY_BYTES], message[1 + KEY_BYTES :]
        if kind == b"W" and descriptors:
            held[key] = descriptors[0], int.from_bytes(rest[:COUNT_BYTES], "little"), rest[COUNT_BYTES:]
        elif kind == b"R" and key in held:
            os.close(held.pop(key)[0])


if __name__ == "__main__":
    # An orphan: Ray kills the children of a worker that it ends.
    if os.fork():
        os._exit(0)
    # Ctrl-C goes to the whole group; this process ends with its replica, not before it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    control.sendall(str(os.getpid()).encode())
    main(control, int(sys.argv[2]))
