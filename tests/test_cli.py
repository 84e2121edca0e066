"""The program as its users meet it: a process, its exit code, its stdout and stderr."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import PROVIDERS, Program, Result, until
from emulator import Emulator, Json, Reply, error, rate_limited

KEYS = [f"{provider.upper()}_API_KEY" for provider in PROVIDERS]
DOWN = Reply(503)
UNSAFE = "a\x1b[31mb\x1b]52;c;eA\x07c\x1b[6nd\x9b\x85e\x08f\x7fg\rh\r\ni\tj\0"
SAFE = "a[31mb]52;c;eAc[6ndefgh\ni\tj"

PICTURE = """\
🔄 Trying provider: cerebras
🎯 Trying cerebras model 1/1: one
✅ Success with cerebras one on attempt 1

💡 Response:
{answer}
⏱️  Response time: 0.00s
"""
FALLBACK = """\
🔄 Trying provider: cerebras
🎯 Trying cerebras model 1/1: one
❌ Error in cerebras API request: 503 Server Error: Service Unavailable
🔄 cerebras one failed, trying next model...
🔄 Trying provider: groq
🎯 Trying groq model 1/1: two
✅ Success with groq two on attempt 1

💡 Response:

⏱️  Response time: 0.00s
"""
STATISTICS = """
📊 Usage Statistics:
   total_requests: 1
   successful_requests: 1
   failed_requests: 0
   rate_limited_requests: 0
   provider_switches: 1
"""


def bearers(run: Program) -> list[str]:
    """The keys that were sent."""
    return [asked.headers["authorization"][len("Bearer ") :] for asked in run.asked]


def zeroed(stderr: str) -> str:
    """The same with all times 0.00s, and without a provider's own words on 503."""
    return re.sub(r"(Service Unavailable).*", r"\1", re.sub(r"\d+\.\d\ds", "0.00s", stderr))


# --- Normal use ---------------------------------------------------------------------------------


def test_stdout_has_the_answer_and_stderr_the_walk(run: Program) -> None:
    """A healthy first provider gets one request; the documented lines go to stderr."""
    result = run("capital of France?")
    assert result[:2] == (0, "Paris.\n")
    assert zeroed(result.stderr) == PICTURE.format(answer="")
    assert (run.models, run.questions) == (["one"], ["capital of France?"])


@pytest.mark.parametrize(
    ("flags", "stderr"),
    [
        (["--stats"], FALLBACK + STATISTICS),
        (["--quiet"], ""),
        (["-q", "--stream"], ""),
    ],
    ids=["--stats", "--quiet", "-q --stream"],
)
def test_flags_change_stderr_alone(run: Program, flags: list[str], stderr: str) -> None:
    """A fallback is told on stderr, as the flags want it; stdout stays the same."""
    run.emulator.plan("cerebras", DOWN)
    result = run("q", *flags)
    assert result[:2] == (0, "Paris.\n")
    assert zeroed(result.stderr) == stderr


def test_verbose_tells_everything_on_stderr(run: Program) -> None:
    """--verbose tells who can be asked, and what, before the walk with its errors and waits."""
    run.emulator.plan("cerebras", rate_limited("cerebras", how="none"), Reply(text="Paris."))
    result = run("q", "-v", "--disable-jitter", "--base-delay", "0.05")
    assert result[:2] == (0, "Paris.\n")
    lines = iter(re.sub(r"\d+\.\d+s$|(?<=Requests).*", "", result.stderr, flags=re.M).splitlines())
    expected = [
        "🚀 Initializing Fallback LLM System...",
        "✅ Available providers: cerebras, groq, openrouter",
        "❓ Question: q",
        "🤔 Thinking...",
        "🎯 Trying cerebras model 1/1: one",
        "❌ Error in cerebras API request: 429 Client Error: Too Many Requests",
        "⏳ Waiting 0.05s before retry...",
        "✅ Success with cerebras one on attempt 2",
        "⏱️  Response time: ",
    ]
    assert [line for line in expected if line not in lines] == []  # in this order


def test_words_pipes_and_files_are_the_question(run: Program) -> None:
    """A file or pipe comes first, then a blank line, then the words; flags stand anywhere."""
    (run.folder / "notes.txt").write_bytes(b"\xef\xbb\xbffrom a file\r\n")
    large = b"0123456\n" * 131072
    table: list[tuple[bytes, list[str | bytes], str]] = [
        (b"", ["what", "is", "2+2"], "what is 2+2"),
        (b"", ["--provider", "groq", "what", "is", "--max-tokens", "9", "it"], "what is it"),
        (b"", ["--max-tokens", "9", "--", "-why", "is", "-v"], "-why is -v"),
        (b"", ["-5 + 3 = ?", "--system", ""], "-5 + 3 = ?"),
        (b"", [b"caf\xe9"], "caf\ufffd"),
        (b"capital?\r\n", [], "capital?"),
        (b"Capital?\n", ["-"], "Capital?"),
        (b"one\n  two\n", ["explain", "this"], "one\n  two\n\nexplain this"),
        (b"pipe\n", ["--no-stdin", "words"], "words"),
        (b"pipe\n", ["-f", "-", "words"], "pipe\n\nwords"),
        (b"", ["--file", "notes.txt", "words"], "from a file\n\nwords"),
        (b"a\0b caf\xe9", [], "ab caf\ufffd"),
        (b"\xef\xbb\xbfcaf\xc3\xa9", [], "café"),
        ("Café".encode("utf-16"), [], "Café"),
        (large, ["-"], large.decode().rstrip("\n")),
    ]
    processes = [run.start(*arguments, stdin=stdin) for stdin, arguments, _ in table]
    assert [process.end().code for process in processes] == [0] * len(table)
    assert sorted(run.questions) == sorted(question for *_, question in table)


def test_parameters_reach_the_provider(run: Program) -> None:
    """The system message comes first; model, provider, temperature and length are as given."""
    chosen = ["-m", "groq:mine", "-s", "French", "--temperature", "0", "--max-tokens", "9"]
    assert run("q", *chosen).code == 0
    assert [(asked.provider, asked.model) for asked in run.asked] == [("groq", "mine")]
    body = run.asked[0].body
    assert (body["temperature"], body["max_tokens"]) == (0, 9)
    assert [(message["role"], message["content"]) for message in body["messages"]] == [
        ("system", "French"),
        ("user", "q"),
    ]


@pytest.mark.parametrize("flag", ["--quiet", "--stream"])
@pytest.mark.parametrize(
    ("text", "stdout"),
    [(f"\n \n  {UNSAFE} \n\n", f"  {SAFE} \n"), ("<think>Lyon?</think>\n\nParis.", "Paris.\n")],
    ids=["blank lines and control characters", "thinking"],
)
def test_the_answer_is_cleaned(run: Program, flag: str, text: str, stdout: str) -> None:
    """It loses its thinking, blank lines around it and what a terminal would obey, no more."""
    run.emulator.plan("cerebras", Reply(text=text, pieces=len(text)))
    assert run("q", flag).stdout == stdout


def test_json_is_one_object_with_the_trail(run: Program) -> None:
    """--json names who answered after whom, and escapes control characters."""
    run.emulator.plan("cerebras", DOWN)
    run.emulator.plan("groq", error("groq", "bad_key"))
    run.emulator.plan("openrouter", Reply(text=UNSAFE))
    result = run("q", "--json")
    assert result.code == 0
    assert re.fullmatch(r"\{[^\x00-\x1f\x7f-\x9f]*\}\n", result.stdout)
    told = json.loads(result.stdout)
    assert (told["answer"], told["provider"], told["model"]) == (UNSAFE, "openrouter", "three")
    assert (told["finish_reason"], told["usage"]["prompt_tokens"]) == ("stop", 20)
    assert [attempt["status"] for attempt in told["attempts"]] == [503, 401, 200]
    assert told["elapsed_seconds"] >= 0


def test_json_of_a_failure(run: Program) -> None:
    """When all fail, stdout is still one object, with the error in place of the answer."""
    run.plan(Reply(400))
    result = run("q", "--json")
    told = json.loads(result.stdout)
    assert (result.code, told["answer"], len(told["attempts"])) == (1, None, 3)
    assert told["error"]


@pytest.mark.parametrize("arguments", [["--help"], ["q", "-h"]], ids=str)
def test_help(run: Program, arguments: list[str]) -> None:
    """Help fits a terminal and has examples, variables, exit codes and the address."""
    result = run(*arguments)
    assert (result.code, result.stderr, run.asked) == (0, "", [])
    lines = result.stdout.splitlines()
    assert len(lines) <= 50
    assert [line for line in lines if len(line) > 80] == []
    assert len([line for line in lines if "python fallback_llm.py " in line]) >= 3
    needed = [*KEYS, "130", "141", "https://", "--max-tokens"]
    assert [words for words in needed if words not in result.stdout] == []


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(run: Program, flag: str) -> None:
    """The version is one line."""
    assert re.fullmatch(r"fallback_llm \d+\.\d+\.\d+\n", run(flag).stdout)


# --- Pipes, files, terminals --------------------------------------------------------------------


def test_a_silent_pipe_is_told_of(run: Program) -> None:
    """A pipe that says nothing is waited for, but not in silence; --no-stdin leaves it alone."""
    process = run.start("words", stdin=subprocess.PIPE)
    assert run.start("q", "--no-stdin", stdin=subprocess.PIPE).end().stdout == "Paris.\n"
    until(lambda: "waiting for piped input; use --no-stdin" in process.stderr)
    process.say(b"pipe\n")
    assert process.end().code == 0
    assert run.questions == ["q", "pipe\n\nwords"]


def test_closed_streams(run: Program) -> None:
    """No stream is needed but stdout, and none of them makes it crash."""
    good = ["<&-", "2>&-", "2>/dev/full", "<&- 2>&-"]
    shell = ["/bin/sh", "-c"]
    processes = {
        redirections: run.start(
            "q", command=[*shell, f'exec "$@" {redirections}', "-", *run.command]
        )
        for redirections in [*good, ">&-", "<&- >&- 2>&-"]
    }
    for redirections, process in processes.items():
        result, good_one = process.end(), redirections in good
        assert result[:2] == ((0, "Paris.\n") if good_one else (1, "")), redirections
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize("flags", [["--json"], ["--stream"]], ids=str)
def test_the_reader_goes_away(run: Program, flags: list[str]) -> None:
    """`| head -1` ends it with 141 and without a word."""
    run.emulator.plan("cerebras", Reply(text="line\n" * 200_000, pieces=40))
    process = run.start("q", "-q", *flags, stdout=subprocess.PIPE)
    assert process.popen.stdout is not None
    assert process.popen.stdout.read(5) in (b"line\n", b'{"ans')
    process.popen.stdout.close()
    assert process.end() == (141, "", "")


@pytest.mark.parametrize("arguments", ["q", "q --stream", "--help"])
def test_a_full_disk(run: Program, arguments: str) -> None:
    """A stdout that takes nothing is one line and 1."""
    with open("/dev/full", "wb") as full:
        result = run(*arguments.split(), "-q", stdout=full)
    assert result.code == 1
    assert re.fullmatch(r"error: .*No space left on device.*\n", result.stderr)


def test_a_stream_is_shown_as_it_comes(run: Program) -> None:
    """With --stream the first words are out while the provider still thinks."""
    run.emulator.plan("cerebras", Reply(text="Paris is in France.", fault="stall"))
    process = run.start("q", "--stream")
    until(lambda: process.stdout.startswith("Paris"))
    assert process.popen.poll() is None


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1", "TERM": "dumb", "CI": "1"}])
def test_a_terminal_shows_the_documented_picture(run: Program, environment: Any) -> None:
    """On a terminal stdout and stderr make one picture, without colour or other tricks."""
    shown, code = on_a_terminal(run, ["q"], {"TERM": "xterm-256color", **environment})
    assert (zeroed(shown), code) == (PICTURE.format(answer="Paris.\n"), 0)


def test_no_question_on_a_terminal(run: Program) -> None:
    """On a terminal the usage and two examples come at once, instead of a silent wait."""
    shown, code = on_a_terminal(run, [], {})
    assert (code, run.asked) == (2, [])
    assert "usage: " in shown
    assert shown.count("python fallback_llm.py ") == 2


def on_a_terminal(run: Program, arguments: list[str], env: Any) -> tuple[str, int]:
    """All that a terminal shows, and the exit code."""
    master, slave = pty.openpty()
    code = run(*arguments, env=env, stdin=slave, stdout=slave, stderr=slave).code
    os.close(slave)
    shown = b""
    with open(master, "rb", buffering=0) as terminal:
        try:
            for part in iter(lambda: terminal.read(65536), b""):
                shown += part
        except OSError:  # how Linux says that it is the end
            pass
    return shown.decode().replace("\r\n", "\n"), code


# --- Bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "values", "allowed"),
    [
        ("--max-tokens", "0 -5 abc 1.5 1e3 99999999999999", "whole number"),
        ("--max-attempts", "0 -1 x", "whole number"),
        ("--base-delay", "-1 nan inf -inf 1e999 abc", "0"),
        ("--max-delay", "-1 nan inf", "0"),
        ("--timeout", "0 -1 nan", "0"),
        ("--temperature", "9 nan", "from 0 to 2"),
        ("--provider", "nope", "cerebras, groq, openrouter"),
        ("--file", "missing.txt .", ""),
        ("--maxtokens", "5", "did you mean --max-tokens"),
        ("--max", "5", "did you mean --max-"),
        ("--verb", "", "did you mean --verbose"),
        ("--max-delay", "1", "--max-delay must be >= --base-delay"),
        ("-5+3?", "", "after --"),
    ],
)
def test_a_bad_value_is_refused(run: Program, flag: str, values: str, allowed: str) -> None:
    """One line names flag, value and what is allowed; the exit code is 2, nothing is sent."""
    processes = {value: run.start("q", flag, value) for value in values.split()}
    for value, process in (processes or {"": run.start("q", flag)}).items():
        refused(run, process.end(), flag, value, allowed)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["q", "--max-tokens"], ["--max-tokens"]),
        (["q", "--quiet", "--verbose"], ["--quiet", "not allowed with", "--verbose"]),
        (["-"], ["no question: stdin was empty"]),
        *[([empty], ["the question is empty"]) for empty in ("", "   ", "\n\t", "\u200b")],
        ([], ["no question: stdin was empty"]),
    ],
    ids=ascii,
)
def test_a_bad_command_line_is_refused(
    run: Program, arguments: list[str], words: list[str]
) -> None:
    """One line says what is wrong; the exit code is 2, nothing is sent."""
    refused(run, run(*arguments), *words)


def refused(run: Program, result: Result, *words: str) -> None:
    """Asserts that it was refused, in these words."""
    assert (result.code, result.stdout, run.asked) == (2, "", [])
    assert re.fullmatch(r"error: .+\n", result.stderr)
    assert [word for word in words if word not in result.stderr] == []


def test_plain_http_is_for_this_machine(run: Program) -> None:
    """A key is not sent unencrypted to another host."""
    foreign = {"GROQ_BASE_URL": "http://llm.invalid/v1"}
    refused(run, run("q", env=foreign), "GROQ_BASE_URL", "https://", "llm.invalid")


# --- Keys and configuration ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        [None, None, None],
        ["", "  ", '""'],
        ["your_cerebras_key_here", "changeme", "<key>"],
    ],
    ids=str,
)
def test_no_key_at_all(run: Program, keys: list[str | None]) -> None:
    """Without a real key it says which variables to set and where keys come from."""
    result = run("q", env=dict(zip(KEYS, keys)))
    assert (result.code, result.stdout, run.asked) == (1, "", [])
    heading = "❌ No API keys found! Please set environment variables:\n   " + ", ".join(KEYS)
    hosts = ["cloud.cerebras.ai", "console.groq.com", "openrouter.ai"]
    assert heading in result.stderr
    assert re.findall(r"https://([\w.]+)", result.stderr) == hosts
    assert re.search(r"\bexport \w+_API_KEY=", result.stderr)
    assert ("placeholder" in result.stderr) == (keys[1] == "changeme")


def test_the_chosen_provider_has_no_key(run: Program) -> None:
    """A provider that was asked for by name is not replaced by another."""
    result = run("q", "--provider", "groq", env={"GROQ_API_KEY": None})
    assert (result.code, result.stdout, run.asked) == (1, "", [])
    assert "GROQ_API_KEY" in result.stderr
    assert "https://console.groq.com" in result.stderr


@pytest.mark.parametrize("flags", [[], ["--verbose"]], ids=str)
def test_one_key_is_enough(run: Program, flags: list[str]) -> None:
    """Providers without a key are skipped; only --verbose mentions them."""
    result = run("q", *flags, env={"CEREBRAS_API_KEY": None, "GROQ_API_KEY": None})
    assert (result.code, run.models) == (0, ["three"])
    assert ("GROQ_API_KEY" in result.stderr) == bool(flags)


def test_keys_as_people_paste_them(run: Program) -> None:
    """White space and quotes around a key are no part of it."""
    run.plan(DOWN)
    keys = [run.variables[name] for name in KEYS]
    dirty = [f"{keys[0]}\n", f'" {keys[1]}"\t', f"'{keys[2]}'\r\n"]
    run("q", "--max-attempts", "1", env=dict(zip(KEYS, dirty)))
    assert bearers(run) == keys


def test_keys_that_cannot_be_one(run: Program) -> None:
    """A key with an impossible character is named and not shown."""
    values = ["csk-\u2019secret", "gsk_\xa0secret", "sk-or-\nsecret"]
    result = run("q", env=dict(zip(KEYS, values)))
    assert (result.code, result.stdout, run.asked) == (1, "", [])
    told = [f"{name} contains a character that cannot be in a key" for name in KEYS]
    assert [line for line in told if line not in result.stderr] == []
    assert "secret" not in result.stderr


@pytest.mark.parametrize("arguments", ["q -v --stats", "q --json", "--check"])
def test_no_key_is_ever_shown(run: Program, arguments: str) -> None:
    """A server that repeats the keys does not bring them to stdout or stderr."""
    keys = [run.variables[name] for name in KEYS]
    said = " ".join(keys)
    echo = Reply(400, body={"error": {"message": said, "code": said}}, headers={"x-key": said})
    run.plan(echo)
    for path in ("cerebras/models", "groq/models", "openrouter/models", "openrouter/key"):
        run.emulator.plan(path, echo)
    result = run(*arguments.split())
    assert result.code == 1
    assert [key for key in keys if key[8:20] in result.stdout + result.stderr] == []


def test_dotenv_in_its_spellings(run: Program) -> None:
    """Byte order mark, CRLF, export, spaces, quotes and comments are understood, $ is literal."""
    run.plan(DOWN)
    (run.folder / ".env").write_bytes(
        b"\xef\xbb\xbfexport CEREBRAS_API_KEY=csk-one\r\nGROQ_MODELS=mine\r\n"
        b'GROQ_API_KEY = "gsk-$HOME" # groq\r\nOPENROUTER_API_KEY=sk-or-three # openrouter\r\n'
    )
    run("q", "--max-attempts", "1", env={**dict.fromkeys(KEYS), "GROQ_MODELS": None})
    assert bearers(run) == ["csk-one", "gsk-$HOME", "sk-or-three"]
    assert run.models == ["one", "mine", "three"]


@pytest.mark.parametrize(
    ("environment", "here", "used"),
    [("key1", "key2", "key1"), ("", "key2", "key2"), (None, "your_groq_api_key_here", "key3")],
)
def test_which_key_wins(run: Program, environment: Any, here: str, used: str) -> None:
    """First the environment, then .env in the current folder, then .env beside the program."""
    run.path = Path(shutil.copy(str(run.path), str(run.folder)))
    (run.folder / ".env").write_text("GROQ_API_KEY=key3\n")
    run.folder = run.folder / "current"
    run.folder.mkdir()
    (run.folder / ".env").write_text(f"GROQ_API_KEY={here}\n")
    run("q", "--provider", "groq", env={"GROQ_API_KEY": environment})
    assert bearers(run) == [used]


@pytest.mark.parametrize(
    "content", ["GROQ_API_KEY=x".encode("utf-16"), b"# caf\xe9\n", b"GROQ_API_KEY=a\0b\n"]
)
def test_a_dotenv_that_cannot_be_read(run: Program, content: bytes) -> None:
    """One warning names the file; the keys of the environment still work."""
    (run.folder / ".env").write_bytes(content)
    result = run("q")
    assert result[:2] == (0, "Paris.\n")
    assert [line.count("save it as UTF-8") for line in result.stderr.split("\n") if ".env" in line]


def test_a_hostile_dotenv(run: Program) -> None:
    """A .env sets keys and models only; another address, proxy or certificate has no effect.

    That the real address is still asked shows at the proxy, which the environment may set.
    """
    with Emulator() as trap:
        proxies = "".join(f"{scheme}_PROXY={trap.url}\n" for scheme in ("HTTP", "HTTPS", "ALL"))
        others = f"GROQ_BASE_URL={trap.url}\nREQUESTS_CA_BUNDLE=/nothing\nNETRC=/nothing\n"
        (run.folder / ".env").write_text(proxies + others)
        assert run("q", env={"NO_PROXY": None}).stdout == "Paris.\n"
        real = {"GROQ_BASE_URL": None, "HTTPS_PROXY": run.emulator.url}
        assert run("q", "--provider", "groq", "--max-attempts", "1", env=real).code == 1
        assert trap.asked == []
    assert run.asked[-1].path.endswith("443")  # CONNECT api.groq.com:443


def test_netrc_and_no_proxy(run: Program) -> None:
    """An entry in ~/.netrc replaces no key; what NO_PROXY names is asked without the proxy."""
    (run.folder / ".netrc").write_text("machine 127.0.0.1 login me password mine\n")
    assert run("q", env={"HTTP_PROXY": "http://127.0.0.1:9"}).stdout == "Paris.\n"
    assert bearers(run) == [run.variables["CEREBRAS_API_KEY"]]


# --- Network, retries, fallback -----------------------------------------------------------------


def test_every_failure_falls_back(run: Program) -> None:
    """Bad statuses, broken connections and answers that are none lead to the next model."""
    null = {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}
    bodies: list[Json] = [{"error": {"message": "no"}}, {"choices": []}, null]
    failures = [
        *[Reply(status) for status in (429, 500, 502, 503, 529, 404, 400, 413, 422)],
        *[Reply(fault=fault) for fault in ("html", "empty", "cut", "short")],
        *[Reply(body=body) for body in bodies],
        *[Reply(text=""), Reply(text=" \n", stream=False), error("cerebras", "in_stream")],
    ]
    models = [f"model-{number}" for number in range(len(failures))]
    for model, reply in zip(models, failures):
        run.emulator.plan(f"cerebras/{model}", reply)
    result = run("q", "--max-attempts", "1", env={"CEREBRAS_MODELS": ",".join(models)})
    assert (result.stdout, run.models) == ("Paris.\n", [*models, "two"])
    assert result.stderr.count("❌ Error in cerebras API request: ") == len(failures)


def test_no_connection_falls_back(run: Program) -> None:
    """A provider that cannot be connected to is left with all its models."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and nobody listens
        base_url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        result = run("q", env={"CEREBRAS_MODELS": "a,b", "CEREBRAS_BASE_URL": base_url})
    assert (result.stdout, run.models) == ("Paris.\n", ["two"])
    assert "Max retries exceeded" in result.stderr


def test_a_redirect_is_not_followed(run: Program) -> None:
    """A provider that sends the program elsewhere has failed."""
    run.emulator.plan("cerebras", Reply(302, headers={"location": "/v1/models"}))
    assert run("q").stdout == "Paris.\n"
    assert run.models == ["one", "two"]


@pytest.mark.parametrize(
    ("replies", "told"),
    [
        ([error(name, "bad_key") for name in PROVIDERS], [*KEYS, "401", "unknown"]),
        ([error(name, "bad_request") for name in PROVIDERS], ["400", "Not a chat request"]),
        ([error(name, "gone") for name in PROVIDERS], ["no model mine", "-m"]),
        ([Reply(text="", reasoning="Hm.", finish_reason="length")] * 3, ["--max-tokens"]),
        ([rate_limited(name, 3600) for name in PROVIDERS], ["3600"]),
        ([Reply(400, body={"error": {"message": "\x1b[31m" + "x" * 999}})] * 3, ["[31mxxx"]),
    ],
    ids=["401", "400", "gone", "only reasoning", "limits of an hour", "an evil message"],
)
def test_what_cannot_get_better_is_asked_once(
    run: Program, replies: list[Reply], told: list[str]
) -> None:
    """Each provider is asked once; at the end each has a line with its reason and a way out."""
    for name, reply in zip(PROVIDERS, replies):
        run.emulator.plan(name, reply)
    result = run("q", "-m", "mine")
    assert result[:2] == (1, "")
    assert [asked.provider for asked in run.asked] == list(PROVIDERS)
    end = re.split(r"(?m)^(?:🔄|🎯|🔑|❌ Error).*\n", result.stderr)[-1]
    assert len(end.splitlines()) <= 10
    assert end.endswith("\n❌ All providers and models failed\n")
    for line, provider in zip(end.splitlines(), PROVIDERS):
        assert provider in line
    assert [words for words in told if words not in end] == []
    assert re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]|x{301}", result.stderr) is None


def test_a_refused_key_is_told_although_another_provider_answers(run: Program) -> None:
    """Who holds a refused key learns which variable it is in."""
    run.emulator.plan("cerebras", error("cerebras", "bad_key"))
    result = run("q")
    assert (result.stdout, run.models) == ("Paris.\n", ["one", "two"])
    assert "CEREBRAS_API_KEY" in result.stderr


def test_several_providers_keep_the_order_that_was_given(run: Program) -> None:
    """--provider takes names in any case, and nobody else is asked."""
    run.plan(DOWN)
    assert run("q", "--provider", "OpenRouter,groq", "--max-attempts", "1").code == 1
    assert run.models == ["three", "two"]


def test_attempts_are_limited_for_each_model(run: Program) -> None:
    """With everything down each model is asked --max-attempts times; -q leaves one line."""
    run.plan(DOWN)
    result = run("q", "-q", "--max-attempts", "3", "--base-delay", "0", "--max-delay", "0")
    assert (result[:2], sorted(run.models)) == ((1, ""), sorted(["one", "two", "three"] * 3))
    assert re.fullmatch(r"❌ .+\n", result.stderr)


def test_waits_are_exact_without_jitter(run: Program) -> None:
    """A rate limit without a hint is waited out in doubled waits, up to the longest allowed."""
    run.emulator.plan("groq", rate_limited("groq", how="none"))
    waits = ["--disable-jitter", "--base-delay", "0.05", "--max-delay", "0.15"]
    result = run("q", "--provider", "groq", "--max-attempts", "4", *waits)
    assert (result.code, run.models) == (1, ["two"] * 4)
    told = re.findall(r"⏳ Waiting (.*)s before retry\.\.\.\n", result.stderr)
    assert told == ["0.05", "0.10", "0.15"]
    assert "🔄 groq two exhausted all 4 retry attempts\n" in result.stderr


def test_a_hint_is_waited_out(run: Program) -> None:
    """The last candidate is asked again when the server said so, not before."""
    run.emulator.plan("groq", rate_limited("groq", 0.5), Reply(text="Paris."))
    assert run("q", "--provider", "groq", "--base-delay", "0").code == 0
    first, second = run.asked
    assert second.at - first.at >= 0.5


def test_a_hint_that_is_too_long_is_not(run: Program) -> None:
    """Somebody else is asked at once; when there is nobody, it says when to come back."""
    run.emulator.plan("groq", rate_limited("groq", 3600))
    assert run("q", "--provider", "groq,openrouter").stdout == "Paris.\n"
    result = run("q", "--provider", "groq")
    assert (result.code, run.models) == (1, ["two", "three", "two"])
    assert "3600" in result.stderr


def test_eager_asks_somebody_else(run: Program) -> None:
    """With --eager no rate limit is waited out while others are there."""
    run.emulator.plan("cerebras", rate_limited("cerebras", 1))
    assert run("q", "--eager").code == 0
    assert run.models == ["one", "two"]


def test_the_time_limit_ends_everything(run: Program) -> None:
    """--timeout ends a question that is kept alive for ever, and nobody else is asked."""
    run.plan(Reply(fault="keep-alives"))
    assert run("q", "--timeout", "1")[:2] == (1, "")
    assert run.models == ["one"]


def test_an_answer_cut_at_max_tokens(run: Program) -> None:
    """A cut answer is printed, with a note that names the limit."""
    run.emulator.plan("cerebras", Reply(text="Paris is", finish_reason="length"))
    result = run("q", "--max-tokens", "300")
    assert result[:2] == (0, "Paris is\n")
    assert "answer cut at --max-tokens 300" in result.stderr


def test_a_broken_stream_is_not_continued_by_another(run: Program) -> None:
    """Once text was shown, a break is an error; before that, the next model answers."""
    run.emulator.plan("cerebras", error("cerebras", "in_stream"), Reply(text="abc", fault="cut"))
    assert run("q", "--stream").stdout == "Paris.\n"
    result = run("q", "--stream")
    assert (result.code, result.stdout, run.models) == (1, "a\n", ["one", "two", "one"])
    assert result.stderr.splitlines()[-1].startswith("❌")


# --- Signals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "flags", "sign"),
    [
        (Reply(fault="silence"), [], "🎯 Trying"),
        (rate_limited("cerebras", 20), ["--max-attempts", "9"], "⏳ Waiting"),
        (Reply(text="Paris is big", fault="stall"), ["--stream"], "Pari"),
    ],
    ids=["waiting for an answer", "waiting before a retry", "streaming"],
)
def test_ctrl_c(run: Program, reply: Reply, flags: list[str], sign: str) -> None:
    """Ctrl-C ends it with one line, and by the signal, so that a loop of a shell ends too."""
    run.emulator.plan("cerebras", reply)
    process = run.start("q", *flags)
    until(lambda: run.asked and sign in process.stdout + process.stderr)
    told = process.stderr
    result = process.signal(signal.SIGINT)
    assert result.code == -signal.SIGINT
    assert result.stderr[len(told) :].strip() == "Interrupted."
    assert run.models == ["one"]


def test_sigterm_leaves_no_half_object(run: Program) -> None:
    """SIGTERM ends it as it ends any program, with nothing on stdout."""
    run.emulator.plan("cerebras", Reply(text="Paris.", fault="stall"))
    process = run.start("q", "--json")
    until(lambda: run.asked)
    assert process.signal(signal.SIGTERM)[:2] == (-signal.SIGTERM, "")


# --- Encodings ----------------------------------------------------------------------------------


def test_encodings(run: Program) -> None:
    """UTF-8 unless the environment says otherwise; what cannot be encoded becomes "?"."""
    run.emulator.plan("cerebras", Reply(text="Île 🎉", headers={"content-type": "text/plain"}))
    table: list[tuple[dict[str, str], str]] = [
        ({"LC_ALL": "C"}, "Île 🎉\n"),
        ({"LC_ALL": "POSIX"}, "Île 🎉\n"),
        ({"PYTHONIOENCODING": "ascii"}, "?le ?\n"),
        ({"PYTHONIOENCODING": "cp1252"}, "\udccele ?\n"),
        ({"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}, "?le ?\n"),
    ]
    processes = [run.start("q", env=environment) for environment, _ in table]
    results = [process.end() for process in processes]
    assert [result[:2] for result in results] == [(0, stdout) for _, stdout in table]
    assert ["Success with cerebras" in result.stderr for result in results] == [True] * len(table)


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=str)
def test_half_a_character(run: Program, flags: list[str]) -> None:
    """A lone surrogate in an answer does no harm."""
    choice = b'{"message": {"content": "a\\ud83db"}, "finish_reason": "stop"}'
    run.emulator.plan("cerebras", Reply(body=b'{"choices": [%b]}' % choice))
    result = run("q", *flags)
    assert result.code == 0
    assert re.search(r"a(\?|\ufffd|\\ud83d|\\ufffd)b", result.stdout)


# --- As a file and as a module ------------------------------------------------------------------


def test_before_anything_is_installed(run: Program) -> None:
    """--help works, and a question tells what to install."""
    bare = [sys.executable, "-S", run.path]
    assert run("--help", command=bare).code == 0
    told = "missing package: requests - run: pip install requests python-dotenv\n"
    assert run("q", "-q", command=bare) == (1, "", told)


def test_without_dotenv(run: Program) -> None:
    """Without python-dotenv a .env gets one warning, and the environment is enough."""
    (run.folder / ".env").write_text("GROQ_API_KEY=x\n")
    missing = 'raise ImportError("No module named dotenv", name="dotenv")\n'
    (run.folder / "dotenv.py").write_text(missing)
    result = run("q", env={"PYTHONPATH": str(run.folder)})
    assert result[:2] == (0, "Paris.\n")
    assert result.stderr.count("python-dotenv") == 1


def test_the_script_on_stdin(run: Program) -> None:
    """`curl ... | python - question` works and reads the .env of the current folder."""
    (run.folder / ".env").write_text(f"GROQ_API_KEY={run.variables['GROQ_API_KEY']}\n")
    python, path = run.command
    result = run("q", stdin=path.read_bytes(), env=dict.fromkeys(KEYS), command=[python, "-"])
    assert (result.stdout, run.models, run.questions) == ("Paris.\n", ["two"], ["q"])


def test_an_executable_file(run: Program) -> None:
    """Copied alone and made executable, it starts by its name with the python3 of the PATH."""
    script = Path(shutil.copy(str(run.path), str(run.folder)))
    python = run.folder / "python3"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    script.chmod(0o755)
    path = f"{run.folder}{os.pathsep}{os.environ['PATH']}"
    assert run("q", command=[script], env={"PATH": path}).stdout == "Paris.\n"


def test_the_script_header_names_what_it_needs(program: Path) -> None:
    """Runners of single scripts find the Python version and the packages."""
    text = program.read_text(encoding="utf-8")
    (header,) = re.findall(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", text)
    assert 'requires-python = ">=3.7"' in header
    assert sorted(re.findall(r'"([\w-]+)[>="]', header))[-2:] == ["python-dotenv", "requests"]


@pytest.mark.parametrize("arguments", ["q", "--check"])
def test_nothing_is_left_open(run: Program, arguments: str) -> None:
    """With warnings as errors there is nothing to warn of."""
    strict = [sys.executable, "-W", "error", "-X", "dev", run.path]
    result = run(*arguments.split(), command=strict, env={"GROQ_MODELS": None})
    assert result.code == 0
    assert re.search("Warning|Traceback", result.stderr) is None


def test_import_does_nothing(run: Program) -> None:
    """An import reads nothing, says nothing, changes nothing and loads no package."""
    (run.folder / ".env").write_text("GROQ_API_KEY=x\n")
    script = """if True:
        import logging, os, signal, sys
        before = dict(os.environ), signal.getsignal(signal.SIGINT), sys.stdout.errors
        import fallback_llm
        assert before == (dict(os.environ), signal.getsignal(signal.SIGINT), sys.stdout.errors)
        assert not logging.getLogger().handlers
        assert not {"requests", "dotenv", "argparse"} & set(sys.modules)
    """
    path = {"PYTHONPATH": str(run.path.parent)}
    assert run(command=[sys.executable, "-c", script], env=path) == (0, "", "")


# --- Health -------------------------------------------------------------------------------------


def test_check_tells_who_can_answer(run: Program) -> None:
    """--check has a line for each provider and costs no tokens."""
    keys = {"GROQ_API_KEY": "gsk_wrong", "OPENROUTER_API_KEY": None}
    result = run("--check", env=dict(keys, CEREBRAS_MODELS="gpt-oss-120b,gone"))
    assert result.code == 0
    cerebras, groq, openrouter = result.stdout.splitlines()
    assert re.match(r"cerebras\b.*accepted.*\d+\.\d+ ?s.*gpt-oss-120b.*not.*gone", cerebras)
    assert re.match(r"groq\b.*refused", groq)
    assert re.match(r"openrouter\b.*missing", openrouter)
    assert [asked.path for asked in run.asked] == ["/v1/models", "/openai/v1/models"]


def test_check_when_nobody_can_answer(run: Program) -> None:
    """OpenRouter's models list takes any key, so its /key is asked; no good key at all is 1."""
    result = run("--check", "--json", env=dict.fromkeys(KEYS, "sk-wrong"))
    assert result.code == 1
    assert "/api/v1/key" in [asked.path for asked in run.asked]
    assert [report["provider"] for report in json.loads(result.stdout)] == list(PROVIDERS)


def test_list_models(run: Program) -> None:
    """--list-models is `provider<tab>model`, or the same as JSON."""
    lines = run("--list-models", env={"GROQ_MODELS": None}).stdout.splitlines()
    assert {line.split("\t")[0] for line in lines} == set(PROVIDERS)
    assert "groq\topenai/gpt-oss-120b" in lines
    asked = ["--list-models", "--provider", "groq", "--json"]
    told = json.loads(run(*asked, env={"GROQ_MODELS": None}).stdout)
    listed = [f"{row['provider']}\t{row['model']}" for row in told]
    assert listed == [line for line in lines if line.startswith("groq\t")]
    assert [request for request in run.asked if request.body] == []
