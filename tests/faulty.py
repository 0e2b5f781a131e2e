"""A proxy before a real server on loopback that fails on purpose, so many times and then no more."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

CHUNK = 64 << 10
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Slow down.</Message></Error>"


@dataclass
class Fault:
    """What happens to a connection. `after`: bytes of the body that still pass; `times`: connections."""

    kind: Literal["503", "reset", "truncate", "stall"]
    times: int
    after: int = 0
    method: str = ""
    """Only requests that begin so; empty: every one."""


@dataclass
class Proxy:
    """`url` is where clients go; `faults` are used up one connection after another, oldest first."""

    target: tuple[str, int]
    faults: list[Fault] = field(default_factory=list)
    seen: int = 0
    """Faults that have happened."""
    delay: float = 0.0
    """Seconds before every piece of an answer."""
    url: str = ""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._server.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """One request; the answer closes the connection, so that the next one meets the next fault."""
        with client, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                more = client.recv(CHUNK)
                if not more:
                    return
                head += more
            fault = self._next(head)
            if fault and fault.kind == "503":
                client.sendall(
                    b"HTTP/1.1 503 Slow Down\r\nConnection: close\r\nContent-Type: application/xml\r\n"
                    + f"Content-Length: {len(SLOW_DOWN)}\r\n\r\n".encode()
                    + SLOW_DOWN
                )
                return
            if fault and fault.kind == "stall":
                time.sleep(fault.after)
                return
            with socket.create_connection(self.target) as server:
                first, _, rest = head.partition(b"\r\n")
                server.sendall(first + b"\r\nConnection: close\r\n" + rest)
                upwards = threading.Thread(target=self._upwards, args=(client, server, fault), daemon=True)
                upwards.start()
                self._downwards(server, client, fault)
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)  # it is being read from: closing alone would not end it
                upwards.join(5)

    def _next(self, head: bytes) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and head.startswith(fault.method.encode()):
                    fault.times -= 1
                    self.seen += 1
                    return fault
        return None

    def _upwards(self, client: socket.socket, server: socket.socket, fault: Fault | None) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := client.recv(CHUNK):
                passed += len(data)
                server.sendall(data)
                if fault and fault.kind == "reset" and passed > fault.after:
                    _reset(client)
                    _reset(server)
                    return

    def _downwards(self, server: socket.socket, client: socket.socket, fault: Fault | None) -> None:
        head = b""
        while b"\r\n\r\n" not in head and (data := server.recv(CHUNK)):
            head += data
        head, end, body = head.partition(b"\r\n\r\n")
        client.sendall(head + end)
        passed = 0
        while data := body or server.recv(CHUNK):
            body = b""
            if self.delay:
                time.sleep(self.delay)
            if fault and fault.kind == "truncate":
                data = data[: max(0, fault.after - passed)]
                if not data:
                    return
            passed += len(data)
            client.sendall(data)


def _reset(connection: socket.socket) -> None:
    """Closes with a TCP reset instead of a polite end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RD)  # wakes whoever reads
    connection.close()


@contextlib.contextmanager
def faulty(url: str) -> Iterator[Proxy]:
    """A proxy before the server at `url`."""
    parts = urlsplit(url)
    assert parts.hostname
    assert parts.port
    proxy = Proxy((parts.hostname, parts.port))
    try:
        yield proxy
    finally:
        proxy.close()
