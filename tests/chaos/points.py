"""Every moment at which a command is about to write: to a file, a database or a server."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import sys
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.utime",
    "os.truncate",
}
CONNECT = sqlite3.connect
_READS = ("SELECT", "PRAGMA", "EXPLAIN")


class Points:
    """Counts them in this process; at the `at`-th it gets the signal. `tally` is where the count goes."""

    def __init__(
        self, world: Path, tally: Path | None = None, at: int = 0, how: int = signal.SIGKILL
    ) -> None:
        self.world, self.tally, self.at, self.how, self.seen = str(world), tally, at, how, 0

    def install(self) -> None:
        import atexit

        sys.addaudithook(self._audit)
        self._wrap(os, "fsync")
        self._wrap(socket.socket, "sendall")
        self._wrap(socket.socket, "send")
        for module in (sqlite3, sqlite3.dbapi2):
            module.connect = self._connect  # type: ignore[attr-defined]
        import psycopg

        self._wrap(psycopg.Cursor, "execute")
        self._wrap(psycopg.Cursor, "executemany")
        if self.tally:
            atexit.register(lambda: self.tally and self.tally.write_text(str(self.seen)))

    def hit(self) -> None:
        self.seen += 1
        if self.seen == self.at:
            os.kill(os.getpid(), self.how)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str) and isinstance(flags, int) and flags & WRITING and self._ours(path):
                self.hit()
        elif event in CHANGES and self._ours(str(arguments[0])):
            self.hit()

    def _connect(self, *arguments: Any, **named: Any) -> sqlite3.Connection:
        connection = CONNECT(*arguments, **named)
        connection.set_trace_callback(self._statement)
        return connection

    def _ours(self, path: str) -> bool:
        return not path.startswith("/") or path.startswith(self.world)

    def _statement(self, text: str) -> None:
        if not text.lstrip().upper().startswith(_READS):
            self.hit()

    def _wrap(self, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            self.hit()
            return original(*arguments, **named)

        setattr(owner, name, counted)
