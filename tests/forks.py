"""The program forked from a Python that has imported what it needs, instead of started anew.

To start Python and to import requests takes longer than most of what the tests ask. One process
does that once and is forked for each run: in the child the program is the main module, it has its
own arguments, variables, folder and streams, and it ends as Python ends. What depends on how
Python itself starts (its flags and variables, the locale) is not for this.
"""

from __future__ import annotations

import array
import contextlib
import gc
import importlib
import io
import json
import marshal
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import types
from pathlib import Path
from typing import IO, Any, Dict, List, Mapping, NoReturn, Optional, Sequence, Tuple

STARTS_OF_PYTHON = ("PYTHON", "LC_", "LANG", "TZ")  # variables that it reads when it starts
HEADER = struct.Struct("!I")  # how long the rest of a request is
STATUS = struct.Struct("!i")  # the number of a process, then how it ended


class Fork:
    """A run under way, with what the tests need of Popen."""

    def __init__(self, control: socket.socket, request: Any, streams: Mapping[str, Any]) -> None:
        self.stdin: Optional[IO[bytes]] = None
        self.stdout: Optional[IO[bytes]] = None
        self.returncode: Optional[int] = None
        self._status, told = os.pipe()
        ends = [told]  # what the other side gets, and nobody needs here
        for name in ("stdin", "stdout", "stderr"):
            ends.append(self._end(name, streams[name]))
        message = json.dumps(request).encode()
        rights = array.array("i", [*ends[1:], told])
        control.sendmsg(
            [HEADER.pack(len(message))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
        )
        control.sendall(message)
        for end in ends:
            os.close(end)
        (self.pid,) = STATUS.unpack(os.read(self._status, STATUS.size))

    def _end(self, name: str, stream: Any) -> int:
        """The end of the stream that the run gets."""
        if stream == subprocess.DEVNULL:
            return os.open(os.devnull, os.O_RDWR)
        if stream != subprocess.PIPE:
            return os.dup(stream if isinstance(stream, int) else stream.fileno())
        reader, writer = os.pipe()
        if name == "stdin":
            self.stdin = open(writer, "wb")  # noqa: SIM115 - it is closed at the end
            return reader
        self.stdout = open(reader, "rb")  # noqa: SIM115
        return writer

    def poll(self) -> Optional[int]:
        """The exit code, if there is one yet."""
        return self._ended(0)

    def wait(self, timeout: Optional[float] = None) -> int:
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("the program", timeout or 0)
        return code

    def _ended(self, timeout: Optional[float]) -> Optional[int]:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            (self.returncode,) = STATUS.unpack(os.read(self._status, STATUS.size))
            os.close(self._status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Fork:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (self.stdin, self.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self.wait()


class Forks:
    """Runs of the program: its source tells what it imports, its bytecode is what runs."""

    def __init__(self, source: Path, bytecode: Path) -> None:
        self._paths = [str(source), str(bytecode)]
        self._control: Optional[socket.socket] = None

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        if self._control is not None:
            self._control.close()
            self._server.wait()

    def can(self, environment: Mapping[str, str]) -> bool:
        """Whether a fork is like a start with these variables."""
        return not any(name.startswith(STARTS_OF_PYTHON) for name in environment)

    def start(
        self,
        arguments: Sequence[str | bytes],
        environment: Mapping[str, str],
        folder: str,
        streams: Mapping[str, Any],
    ) -> Fork:
        """Runs the program; streams: those that it gets, each as Popen takes it."""
        if self._control is None:
            self._control = self._serve(environment)
        words = [os.fsdecode(argument) for argument in arguments]
        request = {"arguments": words, "environment": dict(environment), "folder": folder}
        return Fork(self._control, request, streams)

    def _serve(self, environment: Mapping[str, str]) -> socket.socket:
        ours, theirs = socket.socketpair()
        number = theirs.fileno()
        command = [sys.executable, __file__, *self._paths, str(number)]
        environment = {name: environment[name] for name in ("PATH", "HOME")}
        self._server = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, pass_fds=[number]
        )
        theirs.close()
        return ours


# --- The process that is forked -----------------------------------------------------------------


def serve(source: str, bytecode: str, number: int) -> None:
    """Forks for each request until the other end is closed.

    A child leaves through all that is on the stack here: nothing may be caught or cleaned up.
    """
    code = marshal.loads(Path(bytecode).read_bytes()[16:])  # noqa: S302 - we have compiled it
    import_all(Path(source).read_text(encoding="utf-8"))
    control = socket.socket(fileno=number)
    awake, alarm = os.pipe()
    waits_for: List[Any] = [control, awake]
    os.set_blocking(alarm, False)
    signal.set_wakeup_fd(alarm)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: Dict[int, int] = {}  # where to tell of which child
    gc.freeze()
    while True:
        ready, _, _ = select.select(waits_for, [], [])
        if awake in ready:
            os.read(awake, 65536)
            tell_who_ended(running)
        if control not in ready:
            continue
        received = receive(control)
        if received is None:
            return
        request, ends = received
        told = ends.pop()
        child = os.fork()
        if child == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            control.close()
            for descriptor in (awake, alarm, told, *running.values()):
                os.close(descriptor)
            become(code, bytecode, request, ends)
        running[child] = told
        os.write(told, STATUS.pack(child))
        for end in ends:
            os.close(end)


def import_all(source: str) -> None:
    """Imports what the program imports, early or late."""
    for pair in re.findall(r"(?m)^ *(?:from ([\w.]+) import|import ([\w.]+))", source):
        with contextlib.suppress(ImportError):
            importlib.import_module("".join(pair))
    with contextlib.suppress(ImportError):
        importlib.import_module("encodings.idna")  # for the name of a host


def receive(control: socket.socket) -> Optional[Tuple[Any, List[int]]]:
    """A request, its streams, and where to tell of its child; None at the end."""
    ends = array.array("i")
    head, rights, _, _ = control.recvmsg(HEADER.size, socket.CMSG_SPACE(4 * ends.itemsize))
    if not head:
        return None
    for _, _, data in rights:
        ends.frombytes(data)
    (length,) = HEADER.unpack(head)
    message = b""
    while len(message) < length:
        message += control.recv(length - len(message))
    return json.loads(message.decode()), ends.tolist()


def tell_who_ended(running: Dict[int, int]) -> None:
    for child in [*running]:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            by_signal = os.WIFSIGNALED(status)
            code = -os.WTERMSIG(status) if by_signal else os.WEXITSTATUS(status)
            told = running.pop(child)
            with contextlib.suppress(BrokenPipeError):
                os.write(told, STATUS.pack(code))
            os.close(told)


def become(code: types.CodeType, path: str, request: Any, ends: Sequence[int]) -> NoReturn:
    """Is the program from here on, as if Python had been started with it."""
    os.chdir(request["folder"])
    for number, end in enumerate(ends):
        os.dup2(end, number)
        os.close(end)
    set_locale = {name: os.environ[name] for name in ("LC_CTYPE",) if name in os.environ}
    os.environ.clear()
    os.environ.update(set_locale)  # by Python, when it started without any
    os.environ.update(request["environment"])
    sys.stdin = sys.__stdin__ = like(sys.stdin, 0, "r")  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = like(sys.stdout, 1, "w")  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = like(sys.stderr, 2, "w")  # type: ignore[misc]
    sys.argv = [path, *request["arguments"]]
    sys.path[0] = os.path.dirname(path)
    module = types.ModuleType("__main__")
    module.__file__ = path
    sys.modules["__main__"] = module
    exec(code, module.__dict__)  # noqa: S102 - it is what this is for
    sys.exit()


def like(stream: Any, number: int, mode: str) -> io.TextIOWrapper:
    """A standard stream, as Python makes it when it starts."""
    binary: Any = open(number, mode + "b", closefd=False)  # noqa: SIM115 - it stays open
    binary.raw.name = stream.name
    text = io.TextIOWrapper(
        binary,
        encoding=stream.encoding,
        errors=stream.errors,
        newline="\n",
        line_buffering=stream.line_buffering or os.isatty(number),
    )
    text.mode = mode  # type: ignore[misc]
    return text


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
