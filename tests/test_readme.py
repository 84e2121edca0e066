"""The README: every example in it runs, and prints what stands there."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import re
import shlex
import shutil
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Dict, Iterator, NamedTuple, Optional, Sequence

import pytest
from conftest import PROVIDERS, Program, Result, until
from emulator import Emulator, Reply, document, error, options_parser, rate_limited

import fallback_llm
from fallback_llm import FallbackLLM, FallbackLLMError, RetryConfig, Verdict

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
KEYS = [f"{provider.upper()}_API_KEY" for provider in PROVIDERS]
CLONED = ("fallback_llm.py", "LICENSE", ".env.example", "tests/demo.py", "tests/emulator.py")
MARK = "   <- stdout (the rest is stderr)"


def blocks(language: str) -> list[str]:
    return [body for kind, body in BLOCKS if kind == language]


def scripts() -> dict[str, str]:
    """The Python blocks by title; one that imports nothing continues the one before."""
    found: dict[str, str] = {}
    title = ""
    part = r"^(?:#+ |\*\*)(?P<title>\w[\w ]*)|^```python\n(?P<body>.*?)^```$"
    for match in re.finditer(part, README, re.MULTILINE | re.DOTALL):
        body = match.group("body")
        if body is None:
            title = match.group("title")
        elif "import" in body:
            assert title not in found, f"two examples with the title {title}"
            found[title] = body
        else:
            found[list(found)[-1]] += body
    return found


def commands(console: str) -> list[tuple[str, str]]:
    """The lines behind a prompt, with the output that is shown below each."""
    return re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", console, re.MULTILINE)


SCRIPTS = scripts()
QUICK_START, *CONSOLES = blocks("console")
COMMANDS = [pair for console in CONSOLES for pair in commands(console)]


def table(head: str) -> list[list[str]]:
    """The cells of the rows below this head, without their backticks."""
    _, _, below = README.partition(f"| {head} |")
    lines = below.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def zeroed(text: str) -> str:
    """The same with all times 0.00."""
    return re.sub(r"\b\d+\.\d\d(?=s|  )", "0.00", text)


def shell(reader: Program, script: str, **more: Any) -> Result:
    """How a line ends that is typed into the reader's shell."""
    return reader("-c", script, command=["bash"], **more)


@pytest.fixture
def reader(run: Program) -> Program:
    """Who has cloned the repository and installed it, and pasted the emulator's variables.

    The programs that fetch and install something are stand-ins; `uv` runs the file with the Python
    of these tests.
    """
    run.plan()  # the emulator answers as it does for everybody
    for provider in PROVIDERS:
        del run.variables[f"{provider.upper()}_MODELS"]
    (run.folder / "tests").mkdir()
    for name in CLONED:
        shutil.copy(str(ROOT / name), str(run.folder / name))
    (run.folder / "__pycache__").mkdir()  # as it is after the first import
    shutil.copy(
        str(run.bytecode), importlib.util.cache_from_source(str(run.folder / "fallback_llm.py"))
    )
    programs = run.folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").touch()
    python = f'exec "{sys.executable}" "$@"'
    stand_ins = {"python": python, "uv": f"shift; {python}"}
    stand_ins.update({"git": "ln -s . fallback-llm", "python3": "", "pip": ""})
    for name, line in stand_ins.items():
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    run.variables["PATH"] = f"{programs}:{run.variables['PATH']}"
    return run


@pytest.fixture
def with_one_key(reader: Program) -> Program:
    """A reader whose only key is in no variable yet; see `key_of_groq`."""
    for name in KEYS:
        del reader.variables[name]
    return reader


def key_of_groq(reader: Program) -> str:
    return reader.emulator.environment()["GROQ_API_KEY"]


# --- The page -----------------------------------------------------------------------------------


def test_the_first_screen_shows_an_answer() -> None:
    """From the first question to its answer there are three lines of progress."""
    lines = README.splitlines()
    answer = lines.index("The capital of France is Paris.")
    assert answer <= 24
    assert [line[0] for line in lines[answer - 5 : answer - 2]] == ["🔄", "🎯", "✅"]


def test_prose_is_wrapped() -> None:
    """At 100 columns, but for tables."""
    assert not [line for line in PROSE.splitlines() if len(line) > 100 and line[0] != "|"]


def test_every_link_leads_to_a_section() -> None:
    """The table of contents lists them all, in their order."""
    sections = re.findall(r"^## (.*)", PROSE, re.MULTILINE)
    anchors = [section.lower().replace(" ", "-") for section in sections]
    (contents,) = re.findall(r"^\[Install\].*?\n\n", README, re.MULTILINE | re.DOTALL)
    assert re.findall(r"\]\(#([\w-]+)\)", contents) == anchors
    assert set(re.findall(r"\]\(#([\w-]+)\)", README)) == set(anchors)


def test_where_keys_come_from() -> None:
    """The addresses are those of the rows, and the project's."""
    assert set(re.findall(r"https://[\w./-]+\w", README)) == {
        "https://github.com/example/fallback-llm",
        *(row.key_url for row in fallback_llm.PROVIDERS),
    }


def test_the_changelog_begins_with_this_version() -> None:
    _, _, changelog = README.partition("## Changelog\n\n")
    assert changelog.startswith(f"**{fallback_llm.__version__}** (")


def test_the_map_of_the_file() -> None:
    """Its sections, by number and name."""
    source = (ROOT / "fallback_llm.py").read_text(encoding="utf-8")
    sections = re.findall(r"^# --- (\d+)\. ([\w ]+\w)", source, re.MULTILINE)
    assert [row[0] for row in table("Section | What it holds")] == [
        " ".join(section) for section in sections
    ]


def test_the_map_of_the_tests() -> None:
    """Each file of `tests/` once."""
    listed = [
        name for row in table("In `tests/` | What it holds") for name in row[0].split("`")[1::2]
    ]
    assert sorted(listed) == sorted(path.name for path in (ROOT / "tests").glob("*.py"))


# --- Set-up and demo ----------------------------------------------------------------------------


def test_the_two_commands_without_a_key() -> None:
    """Those that `.ci/run` takes out of the first block and runs."""
    lines = blocks("sh")[0].splitlines()
    assert len(lines) == 2
    assert all(line.startswith("python3 -m venv .venv && .venv/bin/pip install") for line in lines)


def test_the_quick_start_prints_what_stands_there(with_one_key: Program) -> None:
    """Its commands, typed into one shell; with the placeholder for a key there is no answer."""
    with_one_key.emulator.plan("groq", Reply(text="The capital of France is Paris."))
    typed, outputs = zip(*commands(QUICK_START))
    script = "\n".join(["set -e; exec 2>&1", *typed])
    assert "GROQ_API_KEY holds a placeholder" in shell(with_one_key, script).stdout
    (with_one_key.folder / "fallback-llm").unlink()
    script = script.replace("your_key_here", key_of_groq(with_one_key))
    code, out, _ = shell(with_one_key, script)
    assert (code, zeroed(out)) == (0, zeroed("".join(outputs)))


def test_uv_needs_no_installation(reader: Program) -> None:
    (command,) = re.findall(r"`(uv run .*?)`", README)
    assert shell(reader, command)[0] == 0


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


def test_uv_installs_what_pip_installs() -> None:
    """The packages at the top of the file are those of requirements.txt."""
    source = (ROOT / "fallback_llm.py").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^# dependencies = (.*)", source, re.MULTILINE)
    required = (ROOT / "requirements.txt").read_text()
    assert json.loads(listed) == re.findall(r"^([\w-]+)>=", required, re.MULTILINE)


def test_the_example_of_an_env_file(with_one_key: Program) -> None:
    """Copied as it is, it does no harm; with a key put in, it works."""
    (copy,) = re.findall(r"`(cp \.env\.example .*?)`", README)
    ask = 'python fallback_llm.py "What is the capital of France?"'
    code, _, told = shell(with_one_key, f"{copy}; {ask}")
    assert (code, told.count("holds a placeholder"), with_one_key.asked) == (1, 3, [])
    file = with_one_key.folder / ".env"
    text = file.read_text().replace("your_groq_api_key_here", key_of_groq(with_one_key))
    file.write_text(text)
    assert shell(with_one_key, ask)[0] == 0


def test_the_env_file_of_an_installed_command(with_one_key: Program) -> None:
    """In the user's configuration folder."""
    (path,) = set(re.findall(r"`~/(\.config/.*?)`", README))
    file = with_one_key.folder / path  # that folder is its home, too
    file.parent.mkdir(parents=True)
    file.write_text(f"GROQ_API_KEY={key_of_groq(with_one_key)}\n")
    assert with_one_key("?").code == 0


# --- In the shell -------------------------------------------------------------------------------


@pytest.mark.parametrize("row", table("To see | Run `python tests/emulator.py` with"))
def test_the_emulators_options_are_its_own(row: list[str]) -> None:
    options_parser().parse_args(shlex.split(row[1].strip("`")))


def test_the_emulator_prints_what_is_to_be_pasted(reader: Program) -> None:
    """In a shell with these lines, the first command prints what stands below it."""
    served = reader.start("tests/emulator.py", command=["python"])
    until(lambda: served.stdout.count("\n") == 6)
    command, output = COMMANDS[0]
    variables: dict[str, str | None] = dict.fromkeys(reader.emulator.environment())
    code, out, _ = shell(reader, served.stdout + command, env=variables)
    assert (code, out, reader.asked) == (0, output, [])
    assert served.signal(signal.SIGINT).code == -signal.SIGINT


@pytest.mark.parametrize(("command", "output"), COMMANDS, ids=[pair[0] for pair in COMMANDS])
def test_a_command_prints_what_stands_below_it(reader: Program, command: str, output: str) -> None:
    """All that a terminal would show; `--help` is among them."""
    code, out, _ = shell(reader, f"exec 2>&1; {command}")
    assert (code, zeroed(out)) == (0, zeroed(output))


def test_a_loop_needs_its_flag(reader: Program) -> None:
    """Without --no-stdin, the first question swallows the lines of the others."""
    (loop,) = [command for command, _ in COMMANDS if "while read" in command]
    assert shell(reader, loop.replace("--no-stdin", ""))[0] == 0
    assert reader.questions == ["Peru\n\nCapital of France?"]


def test_every_flag_exists() -> None:
    """What looks like a flag is in `--help` of the program or the emulator."""
    help_text = "".join(output for command, output in COMMANDS if "--help" in command)
    options = re.findall(r"^  (?:(-\w), )?(--[\w-]+)", help_text, re.MULTILINE)
    present, _, _ = PROSE.partition("## Changelog")
    texts = re.findall(r"`((?:fallback-llm )?-[^`]+)`", present)
    for command, _ in COMMANDS:
        texts.extend(part for part in re.split(r"[|;]", command) if "fallback_llm.py" in part)
    words = re.findall(r"(?<![\w-])--?[a-z][\w-]*", "\n".join(texts))
    assert len(words) > 20
    of_the_emulator = re.findall(r"--[a-z-]+", options_parser().format_help())
    assert set(words) <= {name for pair in options for name in pair}.union(of_the_emulator)


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


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS.keys())
@pytest.mark.usefixtures("ollama")
def test_python_prints_what_stands_behind_it(reader: Program, script: str) -> None:
    """The lines with # > are the output; what is asked of Ollama prints a line more."""
    skip_unless_it_can_run(script)
    expected = "".join(re.findall(r"^# > (.*\n)", script, re.MULTILINE))
    expected += LOCAL_ANSWER if "ollama" in script else ""
    (reader.folder / "example.py").write_text(script, encoding="utf-8")
    assert shell(reader, "PYTHONPATH=tests python -W error example.py") == (0, expected, "")


def skip_unless_it_can_run(script: str) -> None:
    """Not all packages can be installed on the oldest Pythons."""
    for name in re.findall(r"^(?:import|from) (\w+)", script, re.MULTILINE):
        if name not in ("emulator", "fallback_llm") and importlib.util.find_spec(name) is None:
            pytest.skip(f"no {name} for this Python")
    if "to_thread" in script and sys.version_info < (3, 9):
        pytest.skip("no asyncio.to_thread in this Python")


CLIENT = """
import sys
import warnings

warnings.simplefilter("ignore")  # newer releases want another package than httpx
from fastapi.testclient import TestClient

client = TestClient(app, raise_server_exceptions=False)
path, question = sys.argv[1:]
reply = client.get(path, params={"question": question})
print(reply.status_code, reply.text)
"""
HELLO = "Hello from the emulator of cerebras, asked for gpt-oss-120b; no model was called."
NO_MODEL = '{"detail":"no model could answer"}'


@pytest.mark.parametrize(
    ("path", "question", "replies", "expected"),
    [
        ("/ask", "?", [], f'200 "{HELLO}"'),
        ("/ask", "", [], '422 {"detail":"the question is empty"}'),
        ("/ask", "?", [Reply(401)], f"503 {NO_MODEL}"),
        ("/stream", "?", [], f"200 {HELLO}"),
        ("/stream", "", [], '422 {"detail":"the question is empty"}'),
        ("/stream", "?", [Reply(401)], f"503 {NO_MODEL}"),
    ],
)
def test_the_web_endpoints(
    reader: Program, path: str, question: str, replies: list[Reply], expected: str
) -> None:
    """What their clients get: an answer, or a status that tells whose fault it is, and no more."""
    script = SCRIPTS["A web endpoint"] + CLIENT
    skip_unless_it_can_run(script)
    reader.plan(*replies)
    (reader.folder / "endpoint.py").write_text(script, encoding="utf-8")
    code, out, _ = shell(reader, f"python endpoint.py {path} '{question}'")
    assert (code, out) == (0, expected + "\n")


@pytest.mark.usefixtures("ollama")
def test_variables_add_a_provider(reader: Program) -> None:
    """The lines of the example, with the address of the local server; it is asked first."""
    (lines,) = (block for block in blocks("sh") if "OLLAMA_MODELS" in block)
    address = reader.variables["OLLAMA_BASE_URL"]
    lines = lines.replace("http://localhost:11434/v1", f"{address}/v1")
    ask = 'python fallback_llm.py -q "What is the capital of France?"'
    assert shell(reader, lines + ask) == (0, LOCAL_ANSWER, "")


def test_the_table_of_retry_config() -> None:
    """All fields with their defaults, and the flags that set them."""
    rows = table("`RetryConfig` | Default | Flag | Meaning")
    names, defaults, flags = (
        [word for row in rows for word in row[column].replace("`", "").split(", ") if word]
        for column in range(3)
    )
    fields = {field.name: str(field.default) for field in dataclasses.fields(RetryConfig)}
    assert dict(zip(names, defaults)) == fields
    renamed = {"jitter": "disable-jitter", "wait_on_rate_limit": "no-wait"}
    assert flags == [
        "--" + renamed.get(name, name).replace("_", "-")
        for name in names
        if name != "exponential_base"
    ]


def test_options_from_the_environment(reader: Program) -> None:
    """Those of the example; the command line's come after them."""
    meanings = {row[0].strip("`"): row[1] for row in table("Variable | Meaning | In `.env` too")}
    options = meanings["FALLBACK_LLM_OPTS"].split("`")[1]
    reader.variables["FALLBACK_LLM_OPTS"] = options
    assert [reader("?").stderr, reader("?", "--provider", "openrouter").stderr] == ["", ""]
    assert [asked.provider for asked in reader.asked] == ["groq", "openrouter"]


def test_the_table_of_variables(reader: Program) -> None:
    """Those of keys and models are read from .env, those of addresses are not."""
    rows = table("Variable | Meaning | In `.env` too")
    in_env_files = {name: row[2] for row in rows for name in row[0].split("`")[1::2]}
    for name in reader.emulator.environment():
        is_key = name.endswith("_API_KEY")
        assert in_env_files[name] == ("yes" if is_key else "no")
        if is_key:
            del reader.variables[name]
    key = key_of_groq(reader)
    text = f"GROQ_API_KEY={key}\nGROQ_MODELS=m\nGROQ_BASE_URL=http://127.0.0.1:9\n"
    (reader.folder / ".env").write_text(text)
    assert reader("?").code == 0
    assert reader.models == ["m"]
    assert in_env_files["GROQ_MODELS"] == "yes"


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


NO_KEYS: Dict[str, Optional[str]] = dict.fromkeys(KEYS)
NOBODY = {f"{provider.upper()}_BASE_URL": "http://127.0.0.1:9" for provider in PROVIDERS}
THOUGHT = Reply(text="", reasoning="Let me see.", finish_reason="length")


class Trouble(NamedTuple):
    """How a message comes about."""

    replies: Sequence[Reply] = ()  # of Groq
    variables: Dict[str, Any] = {}  # noqa: RUF012 - it is never changed
    flags: Sequence[str] = ()
    code: int = 1


TROUBLE = {
    "No API keys found!": Trouble(variables=NO_KEYS),
    "No usable key for": Trouble(variables={"GROQ_API_KEY": None}),
    "is not read: pip install python-dotenv": Trouble(variables={"PYTHONPATH": "broken"}, code=0),
    "401 Client Error": Trouble([error("groq", "bad_key")]),
    "402 Client Error": Trouble([Reply(402)]),
    "429 Client Error": Trouble([rate_limited("groq", 600)]),
    "max_tokens was used up": Trouble([THOUGHT]),
    "answer cut at --max-tokens": Trouble([Reply(finish_reason="length")], code=0),
    "the answer was not accepted": Trouble(flags=["--expect-json"]),
    "silent for": Trouble([Reply(fault="silence")], flags=["--idle-timeout", "0.1"]),
    "Max retries exceeded with url": Trouble(variables=NOBODY),
}
MESSAGES = [
    name.strip("`")
    for row in table("Message | Meaning | What to do")
    for name in row[0].split("`, `")
]


def test_the_messages_are_explained() -> None:
    """Those below, and one of the shell."""
    assert sorted(MESSAGES) == sorted([*TROUBLE, "Argument list too long"])


@pytest.mark.parametrize("message", TROUBLE)
def test_a_message_is_one_of_the_program(reader: Program, message: str) -> None:
    """It is on stderr, in a case of that kind."""
    trouble = TROUBLE[message]
    (reader.folder / ".env").touch()
    (reader.folder / "broken").mkdir()
    (reader.folder / "broken" / "dotenv.py").write_text("raise ImportError")
    reader.emulator.plan("groq", *trouble.replies)
    flags = ["--provider", "groq", "-m", "m", "--max-attempts", "1", *trouble.flags]
    result = reader("?", *flags, env=trouble.variables)
    assert result.code == trouble.code
    assert message in result.stderr


def test_a_long_argument_is_refused_by_the_shell(reader: Program) -> None:
    """The same text comes through stdin."""
    ask = "python fallback_llm.py -q"
    text = "head -c 200000 /dev/zero | tr '\\0' a"
    assert "Argument list too long" in shell(reader, f'{ask} "$({text})"').stderr
    assert shell(reader, f"{text} | {ask}")[0] == 0


@pytest.mark.parametrize(
    "name", [row[0].strip("`") for row in table("Exception | Meaning | It also has")]
)
def test_an_exception_has_what_the_table_says(name: str) -> None:
    (row,) = [r for r in table("Exception | Meaning | It also has") if r[0].strip("`") == name]
    raised = getattr(fallback_llm, name)()
    assert isinstance(raised, FallbackLLMError)
    names = [word for word in re.findall(r"`(\w+)`", row[2]) if word != "None"]
    assert set(vars(raised)) == {"attempts", *names}


def test_exit_codes(reader: Program) -> None:
    """An answer, none, wrong usage."""
    ask = "python fallback_llm.py"
    assert shell(reader, f"{ask} ?")[0] == 0
    assert shell(reader, f"{ask} ?", env=NO_KEYS)[0] == 1
    assert shell(reader, f"{ask} --nonsense")[0] == 2
