"""Log lines of this process: their form, their level, and where they go. Standard logging does the rest.

Lines are written by a thread of their own, so that a slow reader never holds up a token. Where they go:
LOG_SOCKET names a Unix socket on which the command that started this process collects the lines of all
(`deploy.log_relay`); empty, nobody reads them and warnings alone go to standard error; unset, all of them do.
"""

import json
import logging
import logging.handlers
import os
import queue
import re
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from serving.telemetry.settings import LogSettings

LOG_SOCKET = "PEREGRINE_LOG_SOCKET"
ACCESS_LOGGER = "peregrine.access"
OWN_LOGGERS = ("kernels", "engine", "monitoring", "serving", "deploy", "peregrine")
# About a minute of lines at a hundred requests a second; what finds it full is counted and dropped.
_QUEUE_LINES = 8192
_SIMPLE = re.compile(r"[\w.:/+-]+")

_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class _KeepsQuiet(logging.Formatter):
    """Exceptions without their messages, which may quote a prompt: kind and place are enough to find them."""

    shows_messages = False

    def formatException(self, ei: _ExcInfo) -> str:  # logging's name
        if self.shows_messages or ei[1] is None:
            return super().formatException(ei)
        lines = []
        error: BaseException | None = ei[1]
        while error is not None:
            frames = "".join(traceback.format_tb(error.__traceback__))
            lines.append(f"{frames}{type(error).__module__}.{type(error).__qualname__}")
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        return "\ncaused by\n".join(lines)


class JsonLines(_KeepsQuiet, JsonFormatter):
    """One JSON object a line."""

    def __init__(self) -> None:
        super().__init__(
            "%(levelname)s %(name)s %(message)s",
            rename_fields={"levelname": "level", "name": "logger"},
            json_ensure_ascii=False,
        )

    def add_fields(
        self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]
    ) -> None:
        log_data["time"] = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        super().add_fields(log_data, record, message_dict)
        log_data["level"] = record.levelname.lower()


class TextLines(_KeepsQuiet):
    """For people: time, level, message, then what else the record carries as key=value."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        more = " ".join(f"{k}={_plain(v)}" for k, v in _extras(record).items())
        name = "" if record.name == ACCESS_LOGGER else f" {record.name}:"
        # What a client sent may be in here; a line break would let it write lines of its own.
        message = record.getMessage().replace("\r", "\\r").replace("\n", "\\n")
        line = f"{time} {record.levelname:<7}{name} {message}" + (f"  {more}" if more else "")
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _extras(record: logging.LogRecord) -> Mapping[str, Any]:
    """What the caller added; Ray adds fields of its own, which begin with an underscore."""
    known = {*RESERVED_ATTRS, "message", "color_message"}
    if record.name == ACCESS_LOGGER:
        known |= {"method", "route", "status"}  # the message has them
    return {k: v for k, v in record.__dict__.items() if k not in known and k[0] != "_" and v is not None}


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str) and _SIMPLE.fullmatch(value):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


class _NeverWaits(logging.handlers.QueueHandler):
    """Into the writer's queue. What does not fit is counted, and told before the next line that does."""

    def __init__(self, lines: "queue.Queue[Any]") -> None:
        super().__init__(lines)
        self.num_dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # same process: formatted by the writer, not on the event loop

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            if self.num_dropped:
                told = logging.LogRecord(
                    "peregrine",
                    logging.WARNING,
                    __file__,
                    0,
                    "%d log lines dropped",
                    (self.num_dropped,),
                    None,
                )
                self.queue.put_nowait(told)
                self.num_dropped = 0
            self.queue.put_nowait(record)
        except queue.Full:
            self.num_dropped += 1


class _ToSocket(logging.handlers.SocketHandler):
    """Whole lines, where the standard library would send pickles."""

    def makePickle(self, record: logging.LogRecord) -> bytes:  # logging's name
        return (self.format(record) + "\n").encode("utf-8", "backslashreplace")


class LogWriter:
    """Writes this process's lines until `stop`."""

    def __init__(self, settings: LogSettings, environ: Mapping[str, str] = os.environ) -> None:
        socket = environ.get(LOG_SOCKET)
        target: logging.Handler = _ToSocket(socket, None) if socket else logging.StreamHandler(sys.stderr)
        formatter: JsonLines | TextLines = TextLines() if settings.format == "text" else JsonLines()
        formatter.shows_messages = settings.prompts
        target.setFormatter(formatter)
        level = logging.getLevelNamesMapping()[settings.level.upper()]
        if socket == "":
            level = max(level, logging.WARNING)
        self._entrance = _NeverWaits(queue.Queue(_QUEUE_LINES))
        self._listener = logging.handlers.QueueListener(self._entrance.queue, target)
        self._target = target
        self._listener.start()
        root = logging.getLogger()
        # Ray's workers come with a handler of their own on the root logger: lines would come twice.
        self._former = [h for h in root.handlers if isinstance(h, logging.StreamHandler)]
        for handler in self._former:
            root.removeHandler(handler)
        root.addHandler(self._entrance)
        for name in OWN_LOGGERS:
            logging.getLogger(name).setLevel(level)

    def stop(self) -> None:
        """Writes what waits. Idempotent."""
        root = logging.getLogger()
        if self._entrance not in root.handlers:
            return
        root.removeHandler(self._entrance)
        for handler in self._former:
            root.addHandler(handler)
        for name in OWN_LOGGERS:
            logging.getLogger(name).setLevel(logging.NOTSET)
        self._listener.stop()
        self._target.close()
