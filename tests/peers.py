"""A server that does with its sockets what a test says.

def script(peer: Peer) -> None:
    peer.read()
    peer.send(document("Paris."))

with Server(script) as server:
    FallbackLLM(providers=[Provider("one", server.url, None, ("m",))]).ask("Where?")
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from typing import Any, Callable, List, NamedTuple

SLACK = 10.0  # seconds that a busy machine may add
FOR_EVER = 40.0  # seconds that an attack lasts: far more than any limit here and SLACK
GAP = 0.05  # seconds between two drops: the shortest limit is several of them
EVENT_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


class Request(NamedTuple):
    """One request that arrived."""

    head: str
    question: str  # the last message


class Peer:
    """The server's end of one connection."""

    def __init__(self, server: Server, connection: socket.socket) -> None:
        self._server = server
        self._connection = connection
        self._unread = b""
        self.slow_until = 0.0  # until then, there is a pause after each read

    def read(self) -> Request:
        """The next request. Raises EOFError if the client has closed the connection."""
        while b"\r\n\r\n" not in self._unread:
            self._receive()
        head, _, self._unread = self._unread.partition(b"\r\n\r\n")
        length = 0
        for line in head.split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        while len(self._unread) < length:
            self._receive()
        body = json.loads(self._unread[:length] or b"{}")
        self._unread = self._unread[length:]
        messages = body.get("messages", [{"content": ""}])
        request = Request(head.decode("latin-1"), messages[-1]["content"])
        self._server.requests.append(request)
        return request

    def send(self, *parts: bytes) -> None:
        self._connection.sendall(b"".join(parts))

    def send_chunk(self, data: bytes) -> None:
        """A chunk of a chunked body."""
        self.send(b"%x\r\n" % len(data), data, b"\r\n")

    def repeat(self, data: bytes) -> None:
        """Sends the same for as long as an attack lasts."""
        end = time.monotonic() + FOR_EVER
        while time.monotonic() < end:
            self.send(data)
            self.pause(GAP)

    def pause(self, seconds: float) -> None:
        """Waits; the end of the test ends it."""
        if self._server.stopping.wait(seconds):
            raise EOFError

    def reset(self) -> None:
        """Closes with an RST."""
        linger = struct.pack("ii", 1, 0)
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._connection.close()

    def _receive(self) -> None:
        data = self._connection.recv(65536)
        if not data:
            raise EOFError
        self._unread += data
        if time.monotonic() < self.slow_until:
            self._server.received_slowly += len(data)
            self.pause(0.2)


Script = Callable[[Peer], None]  # what a server does with each connection


class Server:
    """A port of 127.0.0.1 that runs its script for each connection, in a thread of its own."""

    def __init__(self, script: Script, receive_buffer: int = 0) -> None:
        self.requests: List[Request] = []
        self.connections = 0
        self.received_slowly = 0  # bytes
        self.stopping = threading.Event()
        self._script = script
        self._open: List[socket.socket] = []
        self._threads: List[threading.Thread] = []
        self._listener = socket.socket()
        if receive_buffer:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(128)
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Server:
        self._start(self._accept)
        return self

    def __exit__(self, *error: object) -> None:
        self.stopping.set()
        for sock in [self._listener, *self._open]:
            with contextlib.suppress(OSError):  # it may be closed
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    @property
    def questions(self) -> List[str]:
        return [request.question for request in self.requests]

    def _start(self, function: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the end
            while True:
                connection = self._listener.accept()[0]
                self._open.append(connection)
                self.connections += 1
                self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, EOFError):
            self._script(Peer(self, connection))


Serve = Callable[..., Server]


def document(text: str) -> bytes:
    """A whole reply as plain JSON, after which the connection is kept."""
    choice = {"index": 0, "message": {"content": text}, "finish_reason": "stop"}
    return page(200, json.dumps({"choices": [choice]}).encode())


def page(status: int, body: bytes, kind: str = "application/json", more: str = "") -> bytes:
    head = f"HTTP/1.1 {status} Some Words\r\nContent-Type: {kind}\r\n{more}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def says(text: str) -> Script:
    """Answers every request."""
    return replies(document(text))


def replies(reply: bytes) -> Script:
    """Sends the same bytes to every request."""

    def script(peer: Peer) -> None:
        while True:
            peer.read()
            peer.send(reply)

    return script


def echo(peer: Peer) -> None:
    """Answers every question with itself."""
    while True:
        peer.send(document(peer.read().question))
