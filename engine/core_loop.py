"""Where the EngineCore runs: its loop, and the thread or process that carries it."""

import contextlib
import ctypes
import gc
import logging
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Protocol

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import EngineDeadError, EngineError
from engine.messages import (
    AbortRequests,
    AddRequest,
    CoreFailed,
    CoreReady,
    FromCore,
    Ping,
    Pong,
    Shutdown,
    StepOutputs,
    ToCore,
    TokenOutput,
)
from engine.model_runner import resolve_device

logger = logging.getLogger(__name__)

_HANDOVER_S = 0.0003
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

Deliver = Callable[[FromCore], None]


class Inbox(Protocol):
    def get(self, *, wait: bool) -> ToCore | None:
        """The next message; None when there is none and `wait` is not set."""
        ...


def run_core(config: EngineConfig, inbox: Inbox, deliver: Deliver) -> None:
    """Load, warm up, then serve messages until Shutdown. Every failure is delivered, none is raised."""
    try:
        core = EngineCore(config)
        core.warm_up()
        deliver(CoreReady(core.model, core.stats()))
        _serve(core, inbox, deliver)
    except EngineError as error:
        deliver(CoreFailed(error))
    except Exception as error:
        logger.exception("the engine core stopped")
        deliver(CoreFailed(EngineDeadError(f"the engine core stopped: {type(error).__name__}: {error}")))


def _serve(core: EngineCore, inbox: Inbox, deliver: Deliver) -> None:
    while True:
        message = inbox.get(wait=not core.has_work)
        ended: list[TokenOutput] = []
        has_news = False
        while message is not None:
            match message:
                case AddRequest():
                    core.add_request(message)
                case AbortRequests():
                    ended += core.abort(message)
                    has_news = True
                case Ping(number):
                    deliver(Pong(number))
                case Shutdown():
                    return
            message = inbox.get(wait=False)
        if has_news:
            # Also without outputs: who aborts wants to see the freed blocks in the stats.
            deliver(StepOutputs(0.0, tuple(ended), core.stats()))
        if core.has_work:
            deliver(core.step())


class CoreCarrier(Protocol):
    """A running core, seen from the asking side."""

    def send(self, message: ToCore) -> None:
        """Raises EngineDeadError when the core is gone."""
        ...

    @property
    def is_alive(self) -> bool: ...

    def stop(self, timeout_s: float) -> None:
        """Ask the core to stop and wait for it."""
        ...


def start_core(config: EngineConfig, deliver: Deliver) -> CoreCarrier:
    """Start the core where the configuration says. `deliver` is called from another thread."""
    location = config.core
    if location == "auto":
        location = "thread" if resolve_device(config).type == "cpu" else "process"
    return ProcessCore(config, deliver) if location == "process" else ThreadCore(config, deliver)


class _QueueInbox:
    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[ToCore] = queue.SimpleQueue()

    def get(self, *, wait: bool) -> ToCore | None:
        try:
            return self.queue.get(block=wait)
        except queue.Empty:
            return None


class ThreadCore:
    """The core in a thread of this process; heavy ops release the interpreter lock."""

    def __init__(self, config: EngineConfig, deliver: Deliver) -> None:
        self._inbox, self._deliver = _QueueInbox(), deliver
        self._thread = threading.Thread(
            target=run_core, args=(config, self._inbox, self._hand_over), name="engine-core", daemon=True
        )
        self._thread.start()

    def send(self, message: ToCore) -> None:
        if not self.is_alive:
            raise EngineDeadError("the engine core has stopped")
        self._inbox.queue.put(message)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self, timeout_s: float) -> None:
        self._inbox.queue.put(Shutdown())
        self._thread.join(timeout_s)

    def _hand_over(self, message: FromCore) -> None:
        self._deliver(message)
        if isinstance(message, StepOutputs) and message.kind == "prefill" and message.outputs:
            # Let go of the interpreter and the cores, or a first token would wait for the next step's
            # beginning: on two cores 0.3 ms.
            time.sleep(_HANDOVER_S)


class _PipeInbox:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def get(self, *, wait: bool) -> ToCore | None:
        try:
            if not wait and not self._connection.poll():
                return None
            message: ToCore = self._connection.recv()
        except (EOFError, OSError):
            return Shutdown()  # the asking process is gone: there is nobody to work for
        return message


class ProcessCore:
    """The core in a process of its own: the server's Python never waits for the engine's, nor the reverse."""

    def __init__(self, config: EngineConfig, deliver: Deliver) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, child = context.Pipe()
        self._lock = threading.Lock()
        self._process = context.Process(
            target=_process_main, args=(config, child, os.getpid()), name="engine-core", daemon=True
        )
        self._process.start()
        child.close()
        self._reader = threading.Thread(
            target=self._read, args=(deliver,), name="engine-core-reader", daemon=True
        )
        self._is_stopping = False
        self._reader.start()

    def send(self, message: ToCore) -> None:
        try:
            with self._lock:
                self._connection.send(message)
        except (OSError, ValueError):
            raise EngineDeadError("the engine core's process has stopped") from None

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    def stop(self, timeout_s: float) -> None:
        self._is_stopping = True
        with contextlib.suppress(EngineDeadError):
            self.send(Shutdown())
        self._process.join(timeout_s)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(timeout_s)
        self._reader.join(timeout_s)

    def _read(self, deliver: Deliver) -> None:
        while True:
            try:
                message: FromCore = self._connection.recv()
            except (EOFError, OSError):
                if not self._is_stopping:
                    self._process.join(1.0)
                    code = self._process.exitcode
                    deliver(
                        CoreFailed(EngineDeadError(f"the engine core's process ended (exit code {code})"))
                    )
                return
            deliver(message)


def _end_with(process_id: int) -> None:
    """Have Linux kill this process when its parent, of that id, is gone, however that came about.

    A core that hangs reads no pipe, and what takes the replica's place needs the device's memory.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != process_id:  # gone before that
        raise SystemExit("the process that asked for this one has ended")


def _process_main(config: EngineConfig, connection: Connection, asker: int) -> None:
    # Ctrl-C goes to the whole foreground group; the asking process decides when the core stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with(asker)

    def deliver(message: FromCore) -> None:
        if isinstance(message, CoreReady):
            # What is there now stays as long as the process: to look through it for garbage holds up a step.
            gc.collect()
            gc.freeze()
        # A closed pipe shows up at the inbox too, and ends the loop there.
        with contextlib.suppress(OSError):
            connection.send(message)

    run_core(config, _PipeInbox(connection), deliver)
