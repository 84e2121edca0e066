"""The README: every example in it runs, and prints what stands there."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import re
import shutil
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Iterator, Sequence

import pytest
from conftest import PROVIDERS, Program, Result, until
from emulator import Emulator, Reply, document, error, rate_limited

import fallback_llm
from fallback_llm import FallbackLLM, FallbackLLMError, RetryConfig, Verdict

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
KEYS = [f"{provider.upper()}_API_KEY" for provider in PROVIDERS]
CLONED = ("fallback_llm.py", "LICENSE", ".env.example", "tests/demo.py", "tests/emulator.py")
MARK = "   <- stdout (the rest is stderr)"


def blocks(language: str) -> list[str]:
    return [body for kind, body in BLOCKS if kind == language]


def scripts() -> list[str]:
    """The Python blocks; one that imports nothing continues the one before."""
    found: list[str] = []
    for body in blocks("python"):
        if "import" in body:
            found.append(body)
        else:
            found[-1] += body
    return found


def commands() -> list[tuple[str, str]]:
    """The lines behind a prompt, with the output that is shown below each."""
    (console,) = blocks("console")
    return re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", console, re.MULTILINE)


def table(head: str) -> list[list[str]]:
    """The cells of the rows below this head, without their backticks."""
    _, _, below = README.partition(f"| {head} |")
    lines = below.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def zeroed(text: str) -> str:
    """The same with all times 0.00s."""
    return re.sub(r"\d+\.\d\ds", "0.00s", text)


def shell(reader: Program, script: str, **more: Any) -> Result:
    """How a line ends that is typed into the reader's shell."""
    return reader("-c", script, command=["bash"], **more)


@pytest.fixture
def reader(run: Program) -> Program:
    """Who has cloned the repository and installed it, and pasted the emulator's variables.

    `uv` is a stand-in for the real one: it runs the file with the Python of these tests.
    """
    run.plan()  # the emulator answers as it does for everybody
    for provider in PROVIDERS:
        del run.variables[f"{provider.upper()}_MODELS"]
    (run.folder / "tests").mkdir()
    for name in CLONED:
        shutil.copy(str(ROOT / name), str(run.folder / name))
    programs = run.folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, line in (("python", ""), ("uv", "shift; ")):
        (programs / name).write_text(f'#!/bin/sh\n{line}exec "{sys.executable}" "$@"\n')
        (programs / name).chmod(0o755)
    run.variables["PATH"] = f"{programs}:{run.variables['PATH']}"
    return run


# --- Set-up and demo ----------------------------------------------------------------------------


def test_it_is_short() -> None:
    """At most 200 lines, and something to paste by line 12."""
    lines = README.splitlines()
    assert len(lines) <= 200
    assert lines.index("```sh") < 12


def test_the_set_up_is_two_commands() -> None:
    """The two that `.ci/run` takes out of the first block and runs."""
    lines = [line for line in blocks("sh")[0].splitlines() if not line.startswith("git clone")]
    assert len(lines) == 2
    assert all(line.startswith("python3 -m venv .venv && .venv/bin/pip install") for line in lines)


def test_the_transcript_is_the_demos(reader: Program) -> None:
    """stdout and stderr each, and the order in which a terminal shows them."""
    (demo,) = re.findall(r"\.venv/bin/python tests/demo\.py.*", blocks("sh")[0])
    shown = zeroed(blocks("text")[0])
    lines = shown.splitlines(keepends=True)
    stdout = [line.replace(MARK, "") for line in lines if MARK in line]
    stderr = [line for line in lines if MARK not in line]
    reader.variables["PYTHONUNBUFFERED"] = "1"  # Python 3.7 does so only on a terminal
    code, out, told = shell(reader, demo)
    assert (code, out, zeroed(told)) == (0, "".join(stdout), "".join(stderr))
    _, both, _ = shell(reader, f"exec 2>&1; {demo}")
    assert zeroed(both) == shown.replace(MARK, "")


def test_a_key_is_enough(reader: Program) -> None:
    """The lines of the second block, with a key put in, give an answer each; without, none."""
    lines = blocks("sh")[1]
    key = reader.variables["GROQ_API_KEY"]
    for name in KEYS:
        del reader.variables[name]
    assert "GROQ_API_KEY holds a placeholder" in shell(reader, "set -e\n" + lines).stderr
    code, out, _ = shell(reader, "set -e\n" + lines.replace("your_key_here", key))
    assert (code, [asked.provider for asked in reader.asked]) == (0, ["groq", "groq"])
    assert out.count("Hello from the emulator of groq") == 2


def test_uv_installs_what_pip_installs() -> None:
    """The packages at the top of the file are those of requirements.txt."""
    source = (ROOT / "fallback_llm.py").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^# dependencies = (.*)", source, re.MULTILINE)
    required = (ROOT / "requirements.txt").read_text()
    assert json.loads(listed) == re.findall(r"^([\w-]+)>=", required, re.MULTILINE)


def test_the_example_of_an_env_file(reader: Program) -> None:
    """Copied as it is, it does no harm; with a key put in, it works."""
    key = reader.variables["GROQ_API_KEY"]
    for name in KEYS:
        del reader.variables[name]
    ask = '.venv/bin/python fallback_llm.py "What is the capital of France?"'
    code, _, told = shell(reader, "cp .env.example .env; " + ask)
    assert (code, told.count("holds a placeholder"), reader.asked) == (1, 3, [])
    text = (reader.folder / ".env").read_text()
    (reader.folder / ".env").write_text(text.replace("your_groq_api_key_here", key))
    assert shell(reader, ask)[0] == 0


def test_where_keys_come_from() -> None:
    """The links are those of the rows."""
    assert set(re.findall(r"https://[\w./-]+\w", README)) == {
        "https://github.com/example/fallback-llm",
        *(row.key_url for row in fallback_llm.PROVIDERS),
    }


# --- In the shell -------------------------------------------------------------------------------


def test_the_emulator_prints_what_is_to_be_pasted(reader: Program) -> None:
    """In a shell with these lines, the first command prints what stands below it."""
    served = reader.start("tests/emulator.py", command=["python"])
    until(lambda: served.stdout.count("\n") == 6)
    command, output = commands()[0]
    variables: dict[str, str | None] = dict.fromkeys(reader.emulator.environment())
    code, out, _ = shell(reader, served.stdout + command, env=variables)
    assert (code, out, reader.asked) == (0, output, [])
    assert served.signal(signal.SIGINT).code == 0


@pytest.mark.parametrize(("command", "output"), commands(), ids=[pair[0] for pair in commands()])
def test_a_command_prints_what_stands_below_it(reader: Program, command: str, output: str) -> None:
    """All that a terminal would show; `--help` is among them."""
    code, out, _ = shell(reader, f"exec 2>&1; {command}")
    assert (code, zeroed(out)) == (0, zeroed(output))


def test_every_flag_exists() -> None:
    """What looks like a flag of the program is in `--help`."""
    words = re.findall(
        r"(?<![\w-])--?[a-z][\w-]*", re.sub(r"pip install -q -r |pytest -q -n 2", "", README)
    )
    text = "".join(output for command, output in commands() if "--help" in command)
    options = set(re.findall(r"^  (?:(-\w), )?(--[\w-]+)", text, re.MULTILINE))
    assert set(words) <= {name for pair in options for name in pair}


# --- In Python ----------------------------------------------------------------------------------


class LocalServer(BaseHTTPRequestHandler):
    """Plain JSON for who sends no key, as Ollama and llama.cpp do."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = f"{body['model']} at {self.path}, key: {self.headers['Authorization']}"
        data = json.dumps(document("cerebras", Reply(text=text), body["model"])).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


LOCAL_ANSWER = "llama3.2 at /v1/chat/completions, key: None\n"


@pytest.fixture
def ollama(reader: Program) -> Iterator[None]:
    """A local server, to which the variable that the README names leads."""
    with HTTPServer(("127.0.0.1", 0), LocalServer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        reader.variables["OLLAMA_BASE_URL"] = f"http://127.0.0.1:{server.server_port}"
        yield
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("script", scripts(), ids=["one machine", "many machines"])
@pytest.mark.usefixtures("ollama")
def test_python_prints_what_stands_behind_it(reader: Program, script: str) -> None:
    """The lines with # > are the output; what is asked of Ollama prints a line more."""
    if "dask" in script and importlib.util.find_spec("dask") is None:
        pytest.skip("no dask for this Python")
    expected = "".join(re.findall(r"^# > (.*\n)", script, re.MULTILINE))
    expected += LOCAL_ANSWER if "ollama" in script else ""
    (reader.folder / "example.py").write_text(script, encoding="utf-8")
    assert shell(reader, "python -W error example.py") == (0, expected, "")


@pytest.mark.usefixtures("ollama")
def test_a_row_serves_the_command_line(reader: Program) -> None:
    """The example's row, written into PROVIDERS."""
    (row,) = re.findall(r'Provider\("ollama".*?\)\)', README)
    source = (reader.folder / "fallback_llm.py").read_text(encoding="utf-8")
    changed = source.replace("\nPROVIDERS = (\n", f"\nPROVIDERS = (\n    {row},\n")
    (reader.folder / "fallback_llm.py").write_text(changed, encoding="utf-8")
    ask = 'python fallback_llm.py -q --provider ollama "What is the capital of France?"'
    assert shell(reader, ask) == (0, LOCAL_ANSWER, "")


def test_the_table_of_retry_config() -> None:
    """All fields with their defaults, and the flags that set them."""
    rows = table("`RetryConfig` | Default | Flag | Meaning")
    names, defaults, flags = (
        [word for row in rows for word in row[column].replace("`", "").split(", ") if word]
        for column in range(3)
    )
    fields = {field.name: str(field.default) for field in dataclasses.fields(RetryConfig)}
    assert dict(zip(names, defaults)) == fields
    assert {flag.replace("disable-", "") for flag in flags} == {
        "--" + name.replace("_", "-") for name in names if name != "exponential_base"
    }


# --- How it decides, and what goes wrong --------------------------------------------------------

DECISIONS = table("What comes back | Verdict | In this question | In later questions")


def test_the_table_has_every_verdict() -> None:
    """One row for each."""
    assert [row[1].strip("`") for row in DECISIONS] == [verdict.name for verdict in Verdict]


@pytest.mark.parametrize(
    ("status", "name"),
    [
        (int(status.replace("xx", "03")), name.strip("`"))
        for what, name, *_ in DECISIONS
        for status in re.findall(r"\b[45](?:\d\d|xx)", what)
    ],
)
def test_a_status_gets_the_verdict_of_the_table(
    monkeypatch: pytest.MonkeyPatch, emulator: Emulator, status: int, name: str
) -> None:
    """Where the provider says no more than the status."""
    for variable, value in emulator.environment().items():
        monkeypatch.setenv(variable, value)
    emulator.plan("cerebras", Reply(status, body={}))
    once = RetryConfig(max_attempts=1)
    with contextlib.closing(FallbackLLM(once)) as llm, pytest.raises(FallbackLLMError) as caught:
        llm.complete("?", model="cerebras:m")
    verdict = caught.value.attempts[0].verdict
    assert verdict is not None
    assert verdict.name == name


NO_KEYS: dict[str, str | None] = dict.fromkeys(KEYS)
NOBODY = {f"{provider.upper()}_BASE_URL": "http://127.0.0.1:9" for provider in PROVIDERS}
THOUGHT = Reply(text="", reasoning="Let me see.", finish_reason="length")
# message: (changes of the environment, exit code, what Groq replies)
TROUBLE: dict[str, tuple[dict[str, Any], int, Sequence[Reply]]] = {
    "No API keys found!": (NO_KEYS, 1, ()),
    "401 Client Error": ({}, 1, [error("groq", "bad_key")]),
    "402 Client Error": ({}, 1, [Reply(402)]),
    "429 Client Error": ({}, 1, [rate_limited("groq", 600)]),
    "max_tokens was used up": ({}, 1, [THOUGHT]),
    "answer cut at --max-tokens": ({}, 0, [Reply(finish_reason="length")]),
    "Max retries exceeded with url": (NOBODY, 1, ()),
}


@pytest.mark.parametrize(
    "message", [m for row in table("Message | Meaning | What to do") for m in row[0].split("`, `")]
)
def test_a_message_is_one_of_the_program(reader: Program, message: str) -> None:
    """Each that the table explains is on stderr, in a case of that kind."""
    message = message.strip("`")
    changes, code, replies = TROUBLE[message]
    reader.emulator.plan("groq", *replies)
    result = reader("?", "--provider", "groq", "--max-attempts", "1", env=changes)
    assert result.code == code
    assert message in result.stderr


def test_exit_codes(reader: Program) -> None:
    """An answer, none, wrong usage."""
    ask = "python fallback_llm.py"
    assert shell(reader, f"{ask} ?")[0] == 0
    assert shell(reader, f"{ask} ?", env=NO_KEYS)[0] == 1
    assert shell(reader, f"{ask} --nonsense")[0] == 2
