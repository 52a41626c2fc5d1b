"""The guard speaks when its replica is killed, and only then."""

import contextlib
import os
import signal
import socket
import subprocess
import sys

import psutil
import pytest

from serving.stream_guard import StreamGuard, Watch, chunked

WORDS = chunked(b'data: {"error":{}}\n\n')
TIMEOUT_S = 20.0

# A replica of a few lines: answers two connections of three with the beginning of a body, ends one, waits.
REPLICA = """
import socket, sys, time
from serving.stream_guard import StreamGuard, chunked
guard = StreamGuard()
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
connections = []
for what in ("cut", "whole", "silent"):
    connection, peer = listener.accept()
    connections.append(connection)
    connection.recv(100)
    connection.sendall(b"an earlier answer")
    scope = {"client": peer, "server": connection.getsockname(), "http_version": "1.1"}
    key = guard.watch(scope, chunked(b'data: {"error":{}}\\n\\n'))
    assert key is not None
    if what != "silent":
        connection.sendall(b"5\\r\\nhello\\r\\n")
    if what == "whole":
        connection.sendall(b"0\\r\\n\\r\\n")
        guard.release(key)
print("ready", flush=True)
time.sleep(60)
"""


def read_all(connection: socket.socket) -> bytes:
    data = b""
    while part := connection.recv(4096):
        data += part
    return data


def test_a_killed_process_leaves_last_words_on_the_streams_that_had_begun():
    replica = subprocess.Popen([sys.executable, "-c", REPLICA], stdout=subprocess.PIPE, text=True)
    try:
        address = ("127.0.0.1", int(replica.stdout.readline()))
        with contextlib.ExitStack() as stack:
            cut, whole, silent = (
                stack.enter_context(socket.create_connection(address, TIMEOUT_S)) for _ in range(3)
            )
            for client in (cut, whole, silent):
                client.sendall(b"x")
            assert replica.stdout.readline() == "ready\n"
            os.kill(replica.pid, signal.SIGKILL)
            assert read_all(cut) == b"an earlier answer5\r\nhello\r\n" + WORDS
            assert read_all(whole) == b"an earlier answer5\r\nhello\r\n0\r\n\r\n"
            assert read_all(silent) == b"an earlier answer"
    finally:
        replica.kill()
        replica.wait(TIMEOUT_S)
        replica.stdout.close()


@pytest.fixture
def connection():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname(), TIMEOUT_S)
        server, peer = listener.accept()
        with client, server:
            yield client, server, {"client": peer, "server": server.getsockname(), "http_version": "1.1"}


def test_a_released_connection_closes_when_the_replica_closes_it(connection):
    client, server, scope = connection
    guard = StreamGuard()
    for _ in range(3):
        guard.release(guard.watch(scope, WORDS))
    server.close()
    assert read_all(client) == b""
    guard.close()


def test_many_messages_at_once_find_room(connection):
    client, server, scope = connection
    guard = StreamGuard()
    keys = [guard.watch(scope, words) for words in [WORDS] * 400]
    assert None not in keys
    for key in keys:
        guard.release(key)
    server.close()
    assert read_all(client) == b""
    guard.close()


def test_a_guard_that_was_killed_is_done_without(connection):
    client, server, scope = connection
    guard = StreamGuard()
    os.kill(guard._pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(guard._pid)] if psutil.pid_exists(guard._pid) else [], TIMEOUT_S)
    assert guard.watch(scope, WORDS) is None
    assert guard.watch(scope, WORDS) is None
    server.sendall(b"still there")
    assert client.recv(100) == b"still there"
    guard.close()


@pytest.mark.parametrize(
    "change", [{"client": ("127.0.0.1", 1)}, {"client": None}, {"http_version": "1.0"}, {"server": None}]
)
def test_what_cannot_be_guarded_runs_on(connection, change):
    _, _, scope = connection
    guard = StreamGuard()
    assert guard.watch({**scope, **change}, WORDS) is None
    guard.close()


def test_too_many_last_words_are_an_error(connection):
    guard = StreamGuard()
    with pytest.raises(ValueError, match="at most"):
        guard.watch(connection[2], b"x" * 70_000)
    guard.close()


class CountingGuard:
    """What was asked of it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, bytes]] = []

    def watch(self, scope, last_words: bytes) -> bytes:
        self.calls.append(("watch", last_words))
        return b"key"

    def release(self, key: bytes) -> None:
        self.calls.append(("release", key))


def test_a_watch_begins_once_and_ends_once():
    guard = CountingGuard()
    watch = Watch(guard, {}, lambda: b"words")
    for _ in range(2):
        watch.begin()
    for _ in range(2):
        watch.end()
    assert guard.calls == [("watch", b"words"), ("release", b"key")]


def test_a_watch_that_is_over_does_not_begin():
    guard = CountingGuard()
    watch = Watch(guard, {}, lambda: b"words")
    watch.end()
    watch.begin()
    assert guard.calls == []
    Watch(None, {}, lambda: b"words").begin()
