"""What the tests share: the emulator, and the real program as a process."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import io
import os
import pty
import py_compile
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import unicodedata
from pathlib import Path
from typing import IO, Any, Callable, Iterator, Mapping, NamedTuple, Sequence

import pytest
from emulator import Asked, Emulator, Reply
from forks import Fork, Forks
from peers import Script, Serve, Server

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `import fallback_llm`
import fallback_llm

PATIENCE = 60.0  # seconds; only a test that fails waits so long
PROVIDERS = ("cerebras", "groq", "openrouter")
STREAMS = {"stdin", "stdout", "stderr"}


class Result(NamedTuple):
    """How a process ended. What is not UTF-8 in its output shows as lone surrogates."""

    code: int  # -2 when SIGINT ended it, which a shell shows as 130
    stdout: str
    stderr: str


class Process:
    """A process under way; its stdout and stderr can be read at any time."""

    def __init__(self, start: Callable[..., Any], more: Mapping[str, Any]) -> None:
        self._stack = contextlib.ExitStack()
        self._stdout = self._temporary_file()
        self._stderr = self._temporary_file()
        streams = {"stdout": self._stdout, "stderr": self._stderr}
        self.popen: subprocess.Popen[bytes] | Fork = start(**{**streams, **more})
        self._stack.enter_context(self.popen)

    def _temporary_file(self) -> IO[bytes]:
        file = tempfile.TemporaryFile()  # noqa: SIM115 - close() closes it
        return self._stack.enter_context(file)

    @property
    def stdout(self) -> str:
        return _content(self._stdout)

    @property
    def stderr(self) -> str:
        return _content(self._stderr)

    def say(self, stdin: bytes) -> None:
        """Writes all that its stdin, a pipe, will bring."""
        assert self.popen.stdin is not None
        with contextlib.suppress(BrokenPipeError), self.popen.stdin as pipe:
            pipe.write(stdin)

    def end(self) -> Result:
        """Its result, when it has ended by itself."""
        return Result(self.popen.wait(timeout=PATIENCE), self.stdout, self.stderr)

    def signal(self, number: int) -> Result:
        """Its result, after a signal."""
        self.popen.send_signal(number)
        return self.end()

    def close(self) -> None:
        self.popen.kill()
        self._stack.close()


def _content(file: IO[bytes]) -> str:
    """All of it, read without moving the position at which a process writes."""
    content = os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0)
    return content.decode("utf-8", "surrogateescape")


@contextlib.contextmanager
def _on_stdin(content: bytes) -> Iterator[IO[str]]:
    """Has it on the standard input of this process, the file descriptor 0."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.seek(0)
        before = os.dup(0)
        os.dup2(file.fileno(), 0)
        try:
            with open(0, closefd=False) as stdin:
                yield stdin
        finally:
            os.dup2(before, 0)
            os.close(before)


def _written(stream: io.TextIOWrapper) -> str:
    """All that was written to it."""
    stream.seek(0)
    return stream.read()


class Terminal:
    """A pseudo-terminal: a process writes to `end`, and `screen` is what its user then sees."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self._user, self.end = pty.openpty()
        self.resize(columns)
        self._received = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def received(self) -> str:
        """All that was written to it so far."""
        return self._received.decode("utf-8", "surrogateescape").replace("\r\n", "\n")

    @property
    def screen(self) -> str:
        """The lines that it shows, as if it were endlessly high, without blanks at their ends."""
        screen = _Screen(self.columns)
        for piece in re.findall(r"\x1b\[[KJ]|.", self.received, re.DOTALL):
            screen.put(piece)
        return "".join(line + "\n" for line in screen.lines())

    def resize(self, columns: int) -> None:
        """Makes it as wide as this; `screen` goes on to show it as wide as it was."""
        fcntl.ioctl(self.end, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        """What the user types; b"\\x03" is Ctrl-C, for who has it as controlling terminal."""
        os.write(self._user, keys)

    def finish(self) -> None:
        """Waits until all that processes wrote has arrived, when they have ended."""
        if self.end >= 0:
            os.close(self.end)
            self.end = -1
        self._reader.join(PATIENCE)

    def close(self) -> None:
        self.finish()
        os.close(self._user)

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # how Linux says that it is the end
            for part in iter(lambda: os.read(self._user, 65536), b""):
                self._received += part


class _Screen:
    """The cells of a terminal that knows newline, carriage return, ESC [K and [J, and wraps."""

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._rows: list[dict[int, str]] = [{}]
        self._row = 0
        self._column = 0

    def put(self, character: str) -> None:
        if character == "\n":
            self._next_row()
        elif character == "\r":
            self._column = 0
        elif character == "\x1b[K":
            row = self._rows[self._row]
            self._rows[self._row] = {at: row[at] for at in row if at < self._column}
        elif character == "\x1b[J":
            self.put("\x1b[K")
            del self._rows[self._row + 1 :]
        else:
            assert character.isprintable() or character in "\t\ufe0f", repr(character)
            self._show(character)

    def lines(self) -> list[str]:
        """The rows down to the last one with something in it."""
        lines = []
        for row in self._rows:
            cells = [row.get(column, " ") for column in range(max(row, default=-1) + 1)]
            lines.append("".join(cells).rstrip())
        while lines and not lines[-1]:
            del lines[-1]
        return lines

    def _show(self, character: str) -> None:
        width = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if character == "\ufe0f":  # it makes an emoji of the one before
            self._rows[self._row][max(0, self._column - 1)] += character
            return
        if self._column + width > self._columns:
            self._next_row()
        self._rows[self._row][self._column] = character
        if width == 2:
            self._rows[self._row][self._column + 1] = ""
        self._column += width

    def _next_row(self) -> None:
        self._row += 1
        self._column = 0
        if self._row == len(self._rows):
            self._rows.append({})


class Program:
    """The program as a process in `folder`, with an environment made from nothing.

    It has a key for each provider and one model of each: one, two, three. Where a command has the
    path of the program, its bytecode is run instead; where there is no such command, it is forked.
    """

    def __init__(
        self, path: Path, bytecode: Path, forks: Forks | None, folder: Path, emulator: Emulator
    ) -> None:
        self.path, self.folder, self.emulator = path, folder, emulator
        self.bytecode = bytecode
        self._forks = forks
        self._source = path
        self.variables = {"PATH": os.environ["PATH"], "HOME": str(folder), "NO_PROXY": "127.0.0.1"}
        self.variables.update(emulator.environment())
        for provider, model in zip(PROVIDERS, ("one", "two", "three")):
            self.variables[f"{provider.upper()}_MODELS"] = model
        self.stack = contextlib.ExitStack()

    @property
    def command(self) -> list[Any]:
        return [sys.executable, self.path]

    @property
    def asked(self) -> list[Asked]:
        """The requests that arrived."""
        return self.emulator.asked

    @property
    def models(self) -> list[str]:
        """The models in the order in which they were asked."""
        return [asked.model for asked in self.asked]

    @property
    def questions(self) -> list[Any]:
        """What the user says in each request."""
        return [asked.body["messages"][-1]["content"] for asked in self.asked]

    def plan(self, *replies: Reply) -> None:
        """Sets the same replies for every provider."""
        for provider in PROVIDERS:
            self.emulator.plan(provider, *replies)

    def __call__(self, *arguments: str | bytes, **more: Any) -> Result:
        """Starts it and waits for its end."""
        return self.start(*arguments, **more).end()

    def start(
        self,
        *arguments: str | bytes,
        stdin: bytes | int = subprocess.DEVNULL,
        env: Mapping[str, str | None] | None = None,
        command: Sequence[Any] | None = None,
        **more: Any,
    ) -> Process:
        """Starts it; the end of the test ends it. `more` goes to Popen.

        stdin: bytes come through a pipe. env: changes of the environment; None takes a variable
        away. command: what stands before the arguments, instead of Python and the program.
        """
        changed = {**self.variables, **(env or {})}
        variables = {name: value for name, value in changed.items() if value is not None}
        more["stdin"] = subprocess.PIPE if isinstance(stdin, bytes) else stdin
        launch = functools.partial(self._launch, arguments, variables, command)
        process = Process(launch, more)
        self.stack.callback(process.close)
        if isinstance(stdin, bytes):
            process.say(stdin)
        return process

    def _launch(
        self,
        arguments: Sequence[str | bytes],
        variables: Mapping[str, str],
        command: Sequence[Any] | None,
        **more: Any,
    ) -> subprocess.Popen[bytes] | Fork:
        forks, folder = self._forks, str(self.folder)
        is_usual = command is None and self.path == self._source and set(more) <= STREAMS
        if is_usual and forks is not None and forks.can(variables):
            return forks.start(arguments, variables, folder, more)
        begin = [
            self.bytecode if part == self._source else part for part in command or self.command
        ]
        return subprocess.Popen([*begin, *arguments], env=variables, cwd=folder, **more)

    def inside(
        self, *arguments: str, stdin: bytes = b"", env: Mapping[str, str | None] | None = None
    ) -> Result:
        """Calls `main` in this process, which is quicker than a new one; no stream is a terminal.

        The threads of a batch that failed may outlive it.
        """
        changed = {**self.variables, **(env or {})}
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
        logger = fallback_llm.logger
        with pytest.MonkeyPatch.context() as patch, _on_stdin(stdin) as stdin_file:
            for name in list(os.environ):
                patch.delenv(name)
            for name, value in changed.items():
                if value is not None:
                    patch.setenv(name, value)
            patch.chdir(self.folder)
            patch.setattr(fallback_llm, "__file__", str(self.path))
            patch.setattr(logger, "handlers", [])
            patch.setattr(logger, "level", logger.level)
            patch.setattr(sys, "stdin", stdin_file)
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            try:
                code = fallback_llm.main(arguments)
            except SystemExit as end:  # --help and --version
                code = int(end.code or 0)
        logger.setLevel(logger.level)  # it remembers what it was asked before
        return Result(code, *(_written(stream) for stream in (out, err)))

    def terminal(self, columns: int = 80) -> Terminal:
        """A new terminal, of which `end` can be a stream of the program."""
        terminal = Terminal(columns)
        self.stack.callback(terminal.close)
        return terminal

    def on_terminal(
        self, *arguments: str, columns: int = 80, env: Mapping[str, str | None] | None = None
    ) -> tuple[int, Terminal]:
        """Its exit code, and the terminal that was all of its streams."""
        terminal = self.terminal(columns)
        end = terminal.end
        code = self(*arguments, env=env, stdin=end, stdout=end, stderr=end).code
        terminal.finish()
        return code, terminal


def until(condition: Callable[[], Any]) -> None:
    """Waits until it holds."""
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.01)


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    """The three providers, all well."""
    with Emulator() as emulator:
        yield emulator


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder to work in, and an environment without keys, addresses, models, proxies."""
    for name in list(os.environ):
        endings = ("_API_KEY", "_BASE_URL", "_MODELS", "_PROXY", "FALLBACK_LLM_PROVIDERS")
        if name.upper().endswith(endings):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def serve(bare: Path) -> Iterator[Serve]:
    """Starts servers; the end of the test ends them."""
    with contextlib.ExitStack() as servers:

        def start(script: Script, **settings: Any) -> Server:
            return servers.enter_context(Server(script, **settings))

        yield start


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the program, alone in a folder: no .env of a developer lies beside it."""
    real = Path(__file__).resolve().parent.parent / "fallback_llm.py"
    return Path(shutil.copy(str(real), str(tmp_path_factory.mktemp("program"))))


@pytest.fixture(scope="session")
def bytecode(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program as Python keeps it after an import, under its own name.

    Python runs such a file as it runs the source, but need not compile it, which takes longer than
    most questions. What is copied, read or imported by a test is the source.
    """
    path = tmp_path_factory.mktemp("bytecode") / program.name
    return compiled(program, path)


def compiled(source: Path, path: Path) -> Path:
    """The path, at which now is the bytecode of a source; Python does not ask how old it is."""
    unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(source), str(path), doraise=True, invalidation_mode=unchecked)
    return path


@pytest.fixture(scope="session")
def forks(program: Path, bytecode: Path) -> Iterator[Forks | None]:
    """What forks the program, on Linux; with ONLY_STARTS in the environment nothing is forked."""
    if sys.platform != "linux" or "ONLY_STARTS" in os.environ:
        yield None
        return
    with Forks(program, bytecode) as forks:
        yield forks


@pytest.fixture
def run(
    program: Path, bytecode: Path, forks: Forks | None, tmp_path: Path, emulator: Emulator
) -> Iterator[Program]:
    """Runs the program in `tmp_path`; what the test does not plan is answered with "Paris."."""
    runs = Program(program, bytecode, forks, tmp_path, emulator)
    runs.plan(Reply(text="Paris."))
    with runs.stack:
        yield runs
