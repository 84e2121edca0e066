"""The program as its users meet it: a process, its exit code, its stdout and stderr."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import PROVIDERS, Program, Result, until
from emulator import Emulator, Json, Reply, error, rate_limited

import fallback_llm

KEYS = [f"{provider.upper()}_API_KEY" for provider in PROVIDERS]
NO_KEYS: dict[str, str | None] = dict.fromkeys(KEYS)
OWN_LISTS: dict[str, str | None] = {f"{provider.upper()}_MODELS": None for provider in PROVIDERS}
DOWN = Reply(503)
HEADED = "--- more.txt ---\nmore\n\n--- notes.txt ---\nfrom a file\n\nwords"
BELOW = "--max-delay (1) is below --base-delay (2)"
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
PLAIN_PICTURE = """\
Trying provider: cerebras
Trying cerebras model 1/1: one
Success with cerebras one on attempt 1

Response:
{answer}
Response time: 0.00s
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
STREAM = """\
🔄 Trying provider: cerebras
🎯 Trying cerebras model 1/1: one

💡 Response:
Paris.
✅ Success with cerebras one on attempt 1

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


def sum_of(stderr: str) -> list[str]:
    """The lines at the end of a failure: the sum, then one for each provider."""
    lines = stderr.splitlines()
    heads = [
        number
        for number, line in enumerate(lines)
        if re.match("❌ (All|No answer|\\d+ models)", line)
    ]
    assert len(heads) == 1
    return lines[heads[0] :]


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
    result = run.inside("q", *flags)
    assert result[:2] == (0, "Paris.\n")
    assert zeroed(result.stderr) == stderr


def test_verbose_tells_everything_on_stderr(run: Program) -> None:
    """--verbose tells who can be asked, and what, before the walk with its errors and waits."""
    run.emulator.plan("cerebras", rate_limited("cerebras", how="none"), Reply(text="Paris."))
    result = run.inside("q", "-v", "--disable-jitter", "--base-delay", "0.05")
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


def test_nothing_on_stderr_is_obeyed(run: Program) -> None:
    """What comes from a user or a server does not move a terminal's cursor."""
    evil = "a\x1b[31mb\rc\x9bd\x07\r"
    run.plan(Reply(400, body={"error": {"message": evil}}))
    result = run.inside(evil, "-v", "-m", evil)
    assert result.code == 1
    assert "❓ Question: a[31mbcd\n" in result.stderr
    assert re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", result.stderr) is None


def test_words_pipes_and_files_are_the_question(run: Program) -> None:
    """A file or pipe comes first, then a blank line, then the words; flags stand anywhere."""
    (run.folder / "notes.txt").write_bytes(b"\xef\xbb\xbffrom a file\r\n")
    (run.folder / "more.txt").write_text("more\n")
    large = b"0123456\n" * 131072
    table: list[tuple[bytes, list[str], str]] = [
        (b"", ["what", "is", "2+2"], "what is 2+2"),
        (b"", ["--provider", "groq", "what", "is", "--max-tokens", "9", "it"], "what is it"),
        (b"", ["--max-tokens", "9", "--", "-why", "is", "-v"], "-why is -v"),
        (b"", ["-5 + 3 = ?", "--system", ""], "-5 + 3 = ?"),
        (b"capital?\r\n", [], "capital?"),
        (b"Capital?\n", ["-"], "Capital?"),
        (b"one\n  two\n", ["explain", "this"], "one\n  two\n\nexplain this"),
        (b"pipe\n", ["--no-stdin", "words"], "words"),
        (b"pipe\n", ["-f", "-", "words"], "pipe\n\nwords"),
        (b"pipe\n", ["words", "-"], "pipe\n\nwords"),
        (b"", ["--file", "notes.txt", "words"], "from a file\n\nwords"),
        (b"", ["-f", "more.txt", "--file=notes.txt", "words"], HEADED),
        (b"a\0b caf\xc3\xa9", [], "ab café"),
        (b"caf\xe9", [], "café"),
        (b"\xef\xbb\xbfcaf\xc3\xa9", [], "café"),
        ("Café".encode("utf-16"), [], "Café"),
        ("Café".encode("utf-16-le"), [], "Café"),
        (large, ["-"], large.decode().rstrip("\n")),
    ]
    for stdin, arguments, question in table:
        assert run.inside(*arguments, stdin=stdin).code == 0
        assert run.questions[-1] == question
    assert run(b"caf\xe9").code == 0
    assert run.questions[-1] == "caf\ufffd"


def test_parameters_reach_the_provider(run: Program) -> None:
    """The system message comes first; model, provider, temperature and length are as given."""
    chosen = ["-m", "groq:mine", "-s", "French", "--temperature", "0", "--max-tokens", "9"]
    assert run.inside("q", *chosen).code == 0
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
    assert run.inside("q", flag).stdout == stdout


def test_json_is_one_object_with_the_trail(run: Program) -> None:
    """--json names who answered after whom, and escapes control characters."""
    run.emulator.plan("cerebras", DOWN)
    run.emulator.plan("groq", error("groq", "bad_key"))
    run.emulator.plan("openrouter", Reply(text=UNSAFE))
    result = run.inside("q", "--json")
    assert result.code == 0
    assert re.fullmatch(r"\{[^\x00-\x1f\x7f-\x9f]*\}\n", result.stdout)
    told = json.loads(result.stdout)
    assert (told["answer"], told["provider"], told["model"]) == (UNSAFE, "openrouter", "three")
    assert (told["finish_reason"], told["usage"]["prompt_tokens"]) == ("stop", 20)
    assert [attempt["status"] for attempt in told["attempts"]] == [503, 401, 200]
    assert told["elapsed_seconds"] >= 0


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("text", ["Île", "Île 🎉\u2028"], ids=ascii)
def test_json_loses_nothing(run: Program, encoding: str, text: str) -> None:
    """What an encoding cannot carry is escaped, in the JSON of a question and of a batch."""
    run.emulator.plan("cerebras", Reply(text=text))
    (run.folder / "questions.txt").write_text("Où?\n", encoding="utf-8")
    for arguments in (["q", "--json"], ["--batch", "questions.txt"]):
        result = run(*arguments, env={"PYTHONIOENCODING": encoding})
        assert result.code == 0
        line = result.stdout.encode("utf-8", "surrogateescape").decode(encoding)
        told = json.loads(line)
        assert told["answer"] == text
        assert told.get("question", "Où?") == "Où?"


def test_json_tells_tokens_and_time(run: Program) -> None:
    """What a question cost is part of its object, for the whole question and for each attempt."""
    run.emulator.plan("cerebras", Reply(503, delay=0.2))
    run.emulator.plan("groq", Reply(text="Paris.", delay=0.2))
    told = json.loads(run.inside("q", "--json").stdout)
    assert told["usage"]["completion_tokens"] > 0
    assert told["usage"]["total_tokens"] > told["usage"]["completion_tokens"]
    assert [attempt["elapsed"] >= 0.2 for attempt in told["attempts"]] == [True, True]
    assert 0.4 <= told["elapsed_seconds"] < 10


def test_json_of_a_failure(run: Program) -> None:
    """When all fail, stdout is still one object, with the error in place of the answer."""
    run.plan(Reply(400))
    result = run.inside("q", "--json")
    told = json.loads(result.stdout)
    assert (result.code, told["answer"], len(told["attempts"])) == (1, None, 3)
    assert told["error"]


@pytest.mark.parametrize("arguments", [["--help"], ["q", "-h"]], ids=str)
def test_help(run: Program, arguments: list[str]) -> None:
    """Help fits a terminal and has examples, variables, exit codes and the address."""
    result = run.inside(*arguments)
    assert (result.code, result.stderr, run.asked) == (0, "", [])
    lines = result.stdout.splitlines()
    assert len(lines) <= 50
    assert [line for line in lines if len(line) > 80] == []
    assert len([line for line in lines if "python fallback_llm.py " in line]) >= 3
    needed = [*KEYS, "130", "141", "https://", "--max-tokens"]
    assert [words for words in needed if words not in result.stdout] == []


@pytest.mark.parametrize("columns", [60, 70, 80, 200])
def test_the_help_fits_the_terminal(run: Program, columns: int) -> None:
    """It is as wide as the terminal, but never wider than 80 columns."""
    code, terminal = run.on_terminal("--help", columns=columns)
    assert code == 0
    lines = terminal.received.splitlines()
    assert min(columns, 80) - 8 < max(map(len, lines)) <= min(columns, 80)
    examples = [line for line in lines if "python fallback_llm.py " in line]
    assert len(examples) == 3


def test_the_help_says_what_becomes_of_control_characters(run: Program) -> None:
    """They are removed from an answer, and --json has them."""
    assert re.search(
        r"Control characters.* removed .*;\s--json\s+keeps them", run.inside("-h").stdout, re.S
    )


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(run: Program, flag: str) -> None:
    """The version is one line."""
    assert re.fullmatch(r"fallback_llm \d+\.\d+\.\d+\n", run.inside(flag).stdout)


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
        result = process.end()
        expected = (0, "Paris.\n") if redirections in good else (1, "")
        assert result[:2] == expected, redirections
        assert "Traceback" not in result.stderr


def test_a_pipe_that_never_ends(run: Program) -> None:
    """--timeout is a limit for it too; what is on the command line is asked without it."""
    process = run.start("words", "--timeout", "0.5", stdin=subprocess.PIPE)
    nothing = run.start("--timeout", "0.5", stdin=subprocess.PIPE)
    result = process.end()
    assert result[:2] == (0, "Paris.\n")
    assert "⚠️  stdin did not end within 0.5 s: asked without it\n" in result.stderr
    assert run.questions == ["words"]
    assert nothing.end() == (2, "", "error: no question given (stdin did not end within 0.5 s)\n")


@pytest.mark.parametrize("arguments", [["-"], ["-f", "-"], ["--batch", "-", "-q"]], ids=str)
def test_a_question_typed_on_a_terminal(run: Program, arguments: list[str]) -> None:
    """Where - is a terminal, it says how to end what is typed."""
    terminal = run.terminal()
    process = run.start(*arguments, stdin=terminal.end, stderr=terminal.end)
    until(lambda: "reading from the terminal; Ctrl-D ends the text" in terminal.received)
    terminal.type(b"capital?\n\x04")
    assert "Paris." in process.end().stdout
    assert run.questions == ["capital?"]


TEXTS = {
    "UTF-8": "Où?".encode(),
    "UTF-8 with its mark": "Où?".encode("utf-8-sig"),
    "Latin": "Où?".encode("cp1252"),
    "UTF-16": "Où?".encode("utf-16"),
    "UTF-16 without its mark": "Où est-elle ?".encode("utf-16-le"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_in_other_encodings(run: Program, name: str) -> None:
    """-f, stdin and --batch decode them in the same way, as what they probably are."""
    data = TEXTS[name]
    (run.folder / "notes.txt").write_bytes(data)
    assert run.inside("-f", "notes.txt").code == 0
    assert run.inside(stdin=data).code == 0
    assert run.inside("--batch", "notes.txt").code == 0
    assert run.inside("--batch", "-", stdin=data).code == 0
    (question,) = set(run.questions)
    assert question in ("Où?", "Où est-elle ?")


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


@pytest.mark.parametrize("columns", [50, 80, 200])
def test_a_terminal_shows_the_documented_picture(run: Program, columns: int) -> None:
    """On a terminal stdout and stderr make one picture, without colour or other tricks."""
    environment = {"TERM": "xterm-256color", "CI": "1"}
    code, terminal = run.on_terminal("q", columns=columns, env=environment)
    assert code == 0
    assert zeroed(terminal.received) == PICTURE.format(answer="Paris.\n")


@pytest.mark.parametrize(
    "environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"PYTHONIOENCODING": "ascii"}], ids=str
)
def test_plain_words_instead_of_emoji(run: Program, environment: Any) -> None:
    """Where emoji are not wanted or cannot be shown, the words stand alone, without "?"."""
    code, terminal = run.on_terminal("q", env=environment)
    assert code == 0
    assert zeroed(terminal.received) == PLAIN_PICTURE.format(answer="Paris.\n")
    run.emulator.plan("cerebras", error("cerebras", "bad_key"))
    run.emulator.plan("groq", rate_limited("groq", how="none"), Reply(400))
    run.emulator.plan("openrouter", Reply(text="", reasoning="Hm.", finish_reason="length"))
    flags = ["-v", "--stats", "--base-delay", "0.1"]
    code, terminal = run.on_terminal("q", *flags, env=environment)
    assert code == 1
    assert re.search(r"[^\n -~]", terminal.received) is None
    assert "?" not in terminal.received
    assert "\nError in cerebras API request: 401 Client Error" in terminal.received
    assert "\nWaiting 0." in terminal.received
    assert "\nError: All providers and models failed\n" in terminal.received
    assert re.search(r"\n   cerebras one: 401 .* -> check CEREBRAS_API_KEY", terminal.received)


@pytest.mark.parametrize("columns", [50, 200])
def test_a_stream_on_a_terminal(run: Program, columns: int) -> None:
    """The answer ends with its line, before anything else is said."""
    code, terminal = run.on_terminal("q", "--stream", columns=columns)
    assert code == 0
    assert zeroed(terminal.screen) == STREAM


def test_a_broken_stream_on_a_terminal(run: Program) -> None:
    """Its error has a line of its own, and is told once."""
    run.emulator.plan("cerebras", Reply(text="Paris is big", fault="cut"))
    code, terminal = run.on_terminal("q", "--stream")
    assert code == 1
    assert re.search(r"\nPari\n❌ cerebras one broke off: .*\n\Z", terminal.screen)
    assert terminal.screen.count("❌") == 1


def test_a_wait_on_a_terminal(run: Program) -> None:
    """How long is left is shown, and is gone after the wait."""
    run.emulator.plan("groq", rate_limited("groq", 2), Reply(text="Paris."))
    flags = ["--provider", "groq", "--base-delay", "2", "--disable-jitter"]
    code, terminal = run.on_terminal("q", *flags, columns=50)
    assert code == 0
    assert re.search(r"\b2 s left.*\b1 s left", terminal.received, re.DOTALL) is not None
    assert "\n⏳ Waiting 2.00s before retry...\n✅ Success" in terminal.screen
    assert "left" not in terminal.screen


def test_a_wait_fits_the_terminal_of_stderr(run: Program) -> None:
    """What is redrawn does not wrap, also where stdout is a file."""
    run.emulator.plan("groq", rate_limited("groq", 1), Reply(text="Paris."))
    terminal = run.terminal(columns=30)
    flags = ["--provider", "groq", "--base-delay", "1.5", "--disable-jitter"]
    result = run("q", *flags, stderr=terminal.end)
    assert result[:2] == (0, "Paris.\n")
    terminal.finish()
    assert "2 s left" in terminal.received
    assert "left" not in terminal.screen


def test_a_failure_on_a_terminal(run: Program) -> None:
    """The sum stands first, and then one provider a line, whatever the terminal's width."""
    run.plan(DOWN)
    flags = ["-q", "--max-attempts", "1"]
    code, terminal = run.on_terminal("q", *flags, columns=200)
    assert code == 1
    head, *lines = terminal.screen.splitlines()
    assert head == "❌ All providers and models failed"
    assert [line.split()[0] for line in lines] == list(PROVIDERS)


def test_no_question_on_a_terminal(run: Program) -> None:
    """On a terminal the usage and two examples come at once, instead of a silent wait."""
    code, terminal = run.on_terminal()
    assert (code, run.asked) == (2, [])
    assert "usage: " in terminal.received
    assert terminal.received.count("python fallback_llm.py ") == 2


# --- Bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "values", "allowed"),
    [
        ("--max-tokens", "0 -5 abc 1.5 1e3 99999999999999", "whole number"),
        ("--max-attempts", "0 -1 x", "whole number"),
        ("--base-delay", "-1 nan inf 1e999 abc", "0"),
        ("--max-delay", "-1 nan inf", "0"),
        ("--timeout", "0 -1 nan", "0"),
        ("--temperature", "9 nan", "from 0 to 2"),
        ("--provider", "nope", "cerebras, groq, openrouter"),
        ("--file", "missing.txt .", ""),
        ("--verb", "", "did you mean --verbose"),
        ("--idle-timeout", "0 -1 nan", "0"),
        ("-5+3?", "", "put -- before"),
    ],
)
def test_a_bad_value_is_refused(run: Program, flag: str, values: str, allowed: str) -> None:
    """One line names flag, value and what is allowed; the exit code is 2, nothing is sent."""
    for value in values.split():
        refused(run, run.inside("q", flag, value), flag, value, allowed)
    if not values:
        refused(run, run.inside("q", flag), flag, allowed)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["q", "--max-tokens"], ["--max-tokens"]),
        (["q", "--base-delay=-inf"], ["--base-delay", "-inf", "0"]),
        (["q", "--base-delay", "-inf"], ["--base-delay"]),
        (["q", "--max-tokens", "gsk_" + "k" * 20], ["--max-tokens", "a text of 24 characters"]),
        (["q", "--quiet", "--verbose"], ["--quiet", "not allowed with", "--verbose"]),
        (["q", "--maxtokens", "5"], ["--maxtokens", "did you mean --max-tokens"]),
        (["q", "--max=5"], ["--max ", "did you mean --max-"]),
        (["q", "-model", "x"], ["-model", "did you mean --model"]),
        (["q", "-timeout=5"], ["-timeout", "did you mean --timeout"]),
        (["q", "-stream"], ["-stream", "did you mean --stream"]),
        (["q", "-verison"], ["-verison", "did you mean --version"]),
        (["q", "--base-delay", "2", "--max-delay", "1"], [BELOW]),
        (["q", "--expect-json", "--stream"], ["--expect-json", "--stream"]),
        (["q", "--json", "--stream"], ["--json", "not allowed with", "--stream"]),
        (["--batch", "q.txt", "--stream"], ["--batch", "not allowed with", "--stream"]),
        (["--check", "--stream"], ["--stream", "not allowed with", "--check"]),
        (["--check", "--batch", "q.txt"], ["--batch", "not allowed with", "--check"]),
        (["--list-models", "q"], ["--list-models takes no question"]),
        (["--check", "-f", "q.txt"], ["--check takes no question"]),
        (["q", "-o", "answers.jsonl"], ["--output needs --batch"]),
        (["q", "--workers", "2"], ["--workers needs --batch"]),
        (["q", "-f", ""], ["--file '': No such file"]),
        (["--batch", ""], ["--batch '': No such file"]),
        (["q", "-m", " "], ["-m must be"]),
        (["q", "-m", ""], ["-m must be"]),
        (["-"], ["no question given (stdin was empty)"]),
        *[([empty], ["the question is empty"]) for empty in ("", "   ", "\n\t", "\u200b")],
        ([], ["no question given (stdin was empty)"]),
    ],
    ids=ascii,
)
def test_a_bad_command_line_is_refused(
    run: Program, arguments: list[str], words: list[str]
) -> None:
    """One line says what is wrong; the exit code is 2, nothing is sent."""
    refused(run, run.inside(*arguments), *words)


def test_only_near_flags_are_suggested(run: Program) -> None:
    """What is like no flag gets no suggestion."""
    result = run.inside("q", "--bogus")
    refused(run, result, "--bogus")
    assert "did you mean" not in result.stderr


def test_one_hint_is_enough(run: Program) -> None:
    """What was probably meant, or else how to write a question that looks like a flag."""
    assert run.inside("q", "--verb").stderr.count("(") == 1
    assert run.inside("q", "--bogus").stderr.count("(") == 1


# --- Options in the environment -----------------------------------------------------------------


def with_options(text: str) -> dict[str, str | None]:
    """An environment with these options."""
    return {"FALLBACK_LLM_OPTS": text}


def test_options_from_the_environment(run: Program) -> None:
    """They stand before the arguments, which win, and are split as a shell splits them."""
    options = with_options("-q --provider openrouter,groq -s 'be brief' --max-tokens 9")
    assert run.inside("q", "--max-tokens", "7", env=options) == (0, "Paris.\n", "")
    (asked,) = run.asked
    assert (asked.provider, asked.body["max_tokens"]) == ("openrouter", 7)
    assert asked.body["messages"][0]["content"] == "be brief"
    assert run.inside("-V", env=options).code == 0


@pytest.mark.parametrize(
    ("options", "arguments", "words"),
    [
        ("--max-tokens x", ["q"], ["--max-tokens", "'x'"]),
        ("-s 'be brief", ["q"], ["quotation"]),
        ("--maxtokens 5", ["q"], ["did you mean --max-tokens"]),
        ("-q", ["-v", "q"], ["--quiet", "--verbose"]),
        ("--stream", ["--json", "q"], ["--stream", "--json"]),
    ],
)
def test_a_mistake_in_the_options(
    run: Program, options: str, arguments: list[str], words: list[str]
) -> None:
    """The error names the variable, so that nobody looks for it on the command line."""
    result = run.inside(*arguments, env=with_options(options))
    refused(run, result, "error: FALLBACK_LLM_OPTS: ", *words)


def test_a_mistake_beside_the_options(run: Program) -> None:
    """The error is of the command line alone."""
    result = run.inside("q", "--bogus", env=with_options("-q"))
    refused(run, result, "--bogus")
    assert "FALLBACK_LLM_OPTS" not in result.stderr
    assert "FALLBACK_LLM_OPTS" in run.inside("--help").stdout


# --- Waits, files -------------------------------------------------------------------------------


def test_the_longest_wait_bounds_the_first_one(run: Program) -> None:
    """`--max-delay` alone, below the first wait that is usual, lowers it."""
    run.emulator.plan("groq", rate_limited("groq", how="none"), Reply(text="Paris."))
    result = run.inside("q", "--provider", "groq", "--max-delay", "0.05", "--disable-jitter")
    assert result[:2] == (0, "Paris.\n")
    assert "⏳ Waiting 0.05s before retry...\n" in result.stderr


@pytest.mark.parametrize("start", [b"\x89PNG\r\n\x1a\n\0\0\0\r", b"PK\x03\x04\x14\0\0\0", b"\0"])
def test_a_binary_file_is_refused(run: Program, start: bytes) -> None:
    """What is no text is not sent as one."""
    (run.folder / "picture").write_bytes(start + bytes(range(256)))
    refused(run, run.inside("q", "-f", "picture"), "--file picture", "binary")
    refused(run, run.inside("--batch", "picture"), "--batch picture", "binary")


def refused(run: Program, result: Result, *words: str) -> None:
    """Asserts that it was refused, in these words."""
    assert (result.code, result.stdout, run.asked) == (2, "", [])
    assert re.fullmatch(r"error: .+\n", result.stderr)
    assert [word for word in words if word not in result.stderr] == []


def test_plain_http_is_for_this_machine(run: Program) -> None:
    """A key is not sent unencrypted to another host."""
    foreign = {"GROQ_BASE_URL": "http://llm.invalid/v1"}
    refused(run, run.inside("q", env=foreign), "GROQ_BASE_URL", "https://", "llm.invalid")


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
    result = run.inside("q", env=dict(zip(KEYS, keys)))
    assert (result.code, result.stdout, run.asked) == (1, "", [])
    heading = "❌ No API keys found! Please set environment variables:\n   " + ", ".join(KEYS)
    hosts = ["cloud.cerebras.ai", "console.groq.com", "openrouter.ai"]
    assert heading in result.stderr
    assert re.findall(r"https://([\w.]+)", result.stderr) == hosts
    assert re.search(r"\bexport \w+_API_KEY=", result.stderr)
    assert ("placeholder" in result.stderr) == (keys[1] == "changeme")


def test_the_chosen_provider_has_no_key(run: Program) -> None:
    """A provider that was asked for by name is not replaced by another."""
    result = run.inside("q", "--provider", "groq", env={"GROQ_API_KEY": None})
    assert (result.code, result.stdout, run.asked) == (1, "", [])
    assert "GROQ_API_KEY" in result.stderr
    assert "https://console.groq.com" in result.stderr


@pytest.mark.parametrize("flags", [[], ["--verbose"]], ids=str)
def test_one_key_is_enough(run: Program, flags: list[str]) -> None:
    """Providers without a key are skipped; only --verbose mentions them."""
    result = run.inside("q", *flags, env={"CEREBRAS_API_KEY": None, "GROQ_API_KEY": None})
    assert (result.code, run.models) == (0, ["three"])
    assert ("GROQ_API_KEY" in result.stderr) == bool(flags)


def test_keys_as_people_paste_them(run: Program) -> None:
    """White space and quotes around a key are no part of it."""
    run.plan(DOWN)
    keys = [run.variables[name] for name in KEYS]
    dirty = [f"{keys[0]}\n", f'" {keys[1]}"\t', f"'{keys[2]}'\r\n"]
    run.inside("q", "--max-attempts", "1", env=dict(zip(KEYS, dirty)))
    assert bearers(run) == keys


def test_keys_that_cannot_be_one(run: Program) -> None:
    """A key with an impossible character is named and not shown."""
    values = ["csk-\u2019secret", "gsk_\xa0secret", "sk-or-\nsecret"]
    result = run.inside("q", env=dict(zip(KEYS, values)))
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
    result = run.inside(*arguments.split())
    assert result.code == 1
    assert [key for key in keys if key[8:20] in result.stdout + result.stderr] == []


def test_dotenv_in_its_spellings(run: Program) -> None:
    """Byte order mark, CRLF, export, spaces, quotes and comments are understood."""
    run.plan(DOWN)
    (run.folder / ".env").write_bytes(
        b"\xef\xbb\xbfexport CEREBRAS_API_KEY=csk-one\r\nGROQ_MODELS=mine\r\n"
        b'GROQ_API_KEY = "gsk-two" # groq\r\nOPENROUTER_API_KEY=sk-or-three # openrouter\r\n'
    )
    run.inside("q", "--max-attempts", "1", env={**dict.fromkeys(KEYS), "GROQ_MODELS": None})
    assert bearers(run) == ["csk-one", "gsk-two", "sk-or-three"]
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
    result = run.inside("q")
    assert result[:2] == (0, "Paris.\n")
    assert [line.count("save it as UTF-8") for line in result.stderr.split("\n") if ".env" in line]


def test_a_malformed_line_of_a_dotenv(run: Program) -> None:
    """It is told of in our words, with the file's name, and not under -q."""
    (run.folder / ".env").write_text("GROQ_API_KEY: x\nGROQ_MODELS=mine\nnot = so = \n")
    result = run.inside("q", "--provider", "groq", env={"GROQ_MODELS": None})
    assert (result.stdout, run.models) == ("Paris.\n", ["mine"])
    (warning,) = [line for line in result.stderr.splitlines() if ".env" in line]
    assert re.search(r"/\.env\b.*\bline.* 1\b", warning)
    assert "dotenv could not parse" not in result.stderr
    assert run.inside("q", "-q") == (0, "Paris.\n", "")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("GROQ_API_KEY=x".encode("utf-16"), "save it as UTF-8"),
        (b"GROQ_API_KEY: x\n", "line 1"),
        (b"GROQ_API_KEY=gsk_x1\n", "pip install python-dotenv"),
    ],
    ids=["UTF-16", "malformed", "without python-dotenv"],
)
def test_no_key_because_of_a_dotenv(run: Program, content: bytes, told: str) -> None:
    """When no key is found, what is wrong with a .env is told under -q as well."""
    (run.folder / ".env").write_bytes(content)
    environment = dict(NO_KEYS)
    if "install" in told:
        missing = 'raise ImportError("No module named dotenv", name="dotenv")\n'
        (run.folder / "dotenv.py").write_text(missing)
        environment["PYTHONPATH"] = str(run.folder)
    result = run("q", "-q", env=environment)
    assert (result.code, result.stdout, run.asked) == (1, "", [])
    (line,) = [line for line in result.stderr.splitlines() if f"{run.folder}/.env" in line]
    assert told in line


@pytest.mark.parametrize("flags", [[], ["-v"]], ids=str)
def test_names_in_a_dotenv_that_have_no_effect(run: Program, flags: list[str]) -> None:
    """An address always, as questions would go elsewhere; other names like ours with -v."""
    (run.folder / ".env").write_text("GROQ_KEY=x\nGROQ_BASE_URL=y\nGROQ_MODELS=z\nPATH=/\n")
    told = re.findall(r"(\w+) has no effect", run.inside("q", *flags).stderr)
    assert told == (["GROQ_KEY", "GROQ_BASE_URL"] if flags else ["GROQ_BASE_URL"])


@pytest.mark.parametrize("blank", [" ", "\n", " \n", "\t", "\r\n", "\\"])
def test_a_dotenv_of_blanks(run: Program, blank: str) -> None:
    """A large .env does not keep it from answering; python-dotenv alone needs a minute."""
    for size in (60_000, 300_000):
        content = "A=b" + blank * (size // len(blank))
        (run.folder / ".env").write_bytes(content.encode())
        started = time.monotonic()
        assert run.inside("q", "-q") == (0, "Paris.\n", "")
        assert time.monotonic() - started < 15


@pytest.mark.parametrize("variable", ["XDG_CONFIG_HOME", "HOME"])
def test_keys_in_the_configuration_folder(run: Program, variable: str) -> None:
    """Who installed the command keeps them there; the other places come first."""
    home = run.folder / "home"
    configuration = home / ".config" if variable == "HOME" else home
    (configuration / "fallback_llm").mkdir(parents=True)
    keys = "CEREBRAS_API_KEY=csk-home\nGROQ_API_KEY=gsk-home\n"
    (configuration / "fallback_llm" / ".env").write_text(keys)
    (run.folder / ".env").write_text("CEREBRAS_API_KEY=csk-folder\n")
    run.plan(DOWN)
    run.inside("q", "--max-attempts", "1", env={**NO_KEYS, variable: str(home)})
    assert bearers(run) == ["csk-folder", "gsk-home"]


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
    result = run.inside("q", "--max-attempts", "1", env={"CEREBRAS_MODELS": ",".join(models)})
    assert (result.stdout, run.models) == ("Paris.\n", [*models, "two"])
    assert result.stderr.count("❌ Error in cerebras API request: ") == len(failures)


def test_no_connection_falls_back(run: Program) -> None:
    """A provider that cannot be connected to is left with all its models."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and nobody listens
        base_url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        result = run.inside("q", env={"CEREBRAS_MODELS": "a,b", "CEREBRAS_BASE_URL": base_url})
    assert (result.stdout, run.models) == ("Paris.\n", ["two"])
    told = r"❌ Error in cerebras API request: HTTPConnectionPool\(.*\): Max retries exceeded.*\n"
    assert re.search(told, result.stderr) is not None


def test_a_network_error_is_told_once(run: Program) -> None:
    """Without a network nothing is told twice, and the sum says what to do in plain words."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and nobody listens
        base_url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        addresses = {f"{provider.upper()}_BASE_URL": base_url for provider in PROVIDERS}
        no_waits = ["--base-delay", "0", "--max-delay", "0"]
        result = run.inside("q", *no_waits, env={**OWN_LISTS, **addresses})
    assert result[:2] == (1, "")
    lines = result.stderr.splitlines()
    assert len(lines) == len(set(lines))
    for provider in PROVIDERS:
        assert result.stderr.count(f"❌ Error in {provider} API request: ") == 1
    _, *told = sum_of(result.stderr)
    assert len(told) == 3
    for line in told:
        assert re.search(
            r"cannot reach 127\.0\.0\.1:\d+ \(.*refused\) → is the server running\?", line
        )


def test_a_redirect_is_not_followed(run: Program) -> None:
    """A provider that sends the program elsewhere has failed."""
    run.emulator.plan("cerebras", Reply(302, headers={"location": "/v1/models"}))
    assert run.inside("q").stdout == "Paris.\n"
    assert run.models == ["one", "two"]


@pytest.mark.parametrize(
    ("replies", "told"),
    [
        ([error(name, "bad_key") for name in PROVIDERS], [*KEYS, "401", "unknown"]),
        ([error(name, "bad_request") for name in PROVIDERS], ["400", "Not a chat request"]),
        ([error(name, "gone") for name in PROVIDERS], ["no model mine", "-m", "--list-models"]),
        ([Reply(text="", reasoning="Hm.", finish_reason="length")] * 3, ["--max-tokens"]),
        ([rate_limited(name, 3600) for name in PROVIDERS], ["1 hour"]),
        ([Reply(400, body={"error": {"message": "\x1b[31m" + "x" * 999}})] * 3, ["[31mxxx"]),
    ],
    ids=["401", "400", "gone", "only reasoning", "limits of an hour", "an evil message"],
)
@pytest.mark.parametrize("flags", [[], ["-q"]], ids=str)
def test_what_cannot_get_better_is_asked_once(
    run: Program, replies: list[Reply], told: list[str], flags: list[str]
) -> None:
    """Each provider is asked once; after the sum each has a line with its reason and a way out."""
    for name, reply in zip(PROVIDERS, replies):
        run.emulator.plan(name, reply)
    result = run.inside("q", "-m", "mine", *flags)
    assert result[:2] == (1, "")
    assert [asked.provider for asked in run.asked] == list(PROVIDERS)
    head, *lines = sum_of(result.stderr)
    assert head == "❌ All providers and models failed"
    assert len(lines) < 10
    for line, provider in zip(lines, PROVIDERS):
        assert re.match(f"   {provider} mine: .+ → .+", line)
    assert [words for words in told if words not in "\n".join(lines)] == []
    assert re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]|x{301}", result.stderr) is None
    if flags:
        assert result.stderr.splitlines() == [head, *lines]


@pytest.mark.parametrize(
    ("flags", "environment", "told"),
    [
        ("", {}, "All providers and models failed"),
        ("", {**NO_KEYS, "GROQ_API_KEY": "gsk_x1"}, "All providers and models failed"),
        (
            "--provider groq",
            {},
            "No answer: without --provider, cerebras or openrouter could answer",
        ),
        ("--provider groq,cerebras,openrouter", {}, "All providers and models failed"),
        ("-m groq:mine", {}, "No answer: without -m, cerebras or openrouter could answer"),
    ],
    ids=["all", "one key", "one provider", "all by name", "one model"],
)
def test_the_sum_says_who_was_asked(run: Program, flags: str, environment: Any, told: str) -> None:
    """All have failed only where all were asked."""
    run.plan(Reply(400))
    result = run.inside("q", *flags.split(), env=environment)
    assert result[:2] == (1, "")
    assert sum_of(result.stderr)[0] == f"❌ {told}"


def test_the_sum_says_who_was_not_asked(run: Program) -> None:
    """A time limit can end before everybody had a turn."""
    run.plan(Reply(text="Paris.", delay=30))
    names = ",".join(f"model-{number}" for number in range(40))
    result = run.inside("q", "--timeout", "0.6", env={"CEREBRAS_MODELS": names})
    assert result[:2] == (1, "")
    head = sum_of(result.stderr)[0]
    told = re.fullmatch(
        r"❌ No answer within the time limit of 0\.6 s: (\d+) models of cerebras not asked; "
        r"1 model of groq not asked; 1 model of openrouter not asked",
        head,
    )
    assert told is not None
    assert int(told.group(1)) == 40 - len(run.asked)


def test_flags_are_named_in_advice_and_servers_are_quoted(run: Program) -> None:
    """What a server said keeps its words, also where they are names of ours."""
    body = {"error": {"message": "max_tokens, timeout → base_delay"}}
    run.emulator.plan("cerebras", Reply(400, body=body))
    run.emulator.plan("groq", Reply(text="", reasoning="Hm.", finish_reason="length"))
    run.emulator.plan("openrouter", Reply(400))
    stderr = run.inside("q").stderr
    assert "max_tokens, timeout → base_delay → " in stderr
    assert re.search(r"groq two: .* → .*--max-tokens", stderr)


@pytest.mark.parametrize(
    ("model", "near"),
    [
        ("gpt-oss-120", "gpt-oss-120b"),
        ("groq:gpt-oss-20", "openai/gpt-oss-20b"),
        ("openrouter:gemma-4-31b-it", "google/gemma-4-31b-it:free"),
    ],
)
def test_a_typo_in_a_model(run: Program, model: str, near: str) -> None:
    """The nearest model that is listed, and the list, are suggested."""
    for provider in PROVIDERS:
        run.emulator.plan(provider, error(provider, "gone"))
    first_line = sum_of(run.inside("q", "-m", model, env=OWN_LISTS).stderr)[1]
    assert f"did you mean {near}?" in first_line
    assert "--list-models" in first_line


def test_a_refused_key_is_told_although_another_provider_answers(run: Program) -> None:
    """Who holds a refused key learns which variable it is in."""
    run.emulator.plan("cerebras", error("cerebras", "bad_key"))
    result = run.inside("q")
    assert (result.stdout, run.models) == ("Paris.\n", ["one", "two"])
    assert "CEREBRAS_API_KEY" in result.stderr


def test_a_total_failure_is_told_once(run: Program) -> None:
    """The same error of a model is not told for each of its attempts."""
    run.plan(DOWN)
    no_waits = ["--base-delay", "0", "--max-delay", "0"]
    result = run.inside("q", *no_waits, env=OWN_LISTS)
    assert result[:2] == (1, "")
    models = len(set(run.models))
    assert len(run.models) == 5 * models
    lines = result.stderr.splitlines()
    errors = [line for line in lines if line.startswith("❌ Error in ")]
    assert len(errors) == models
    others = [line for line in lines if line not in errors]
    assert len(others) == len(set(others))


def test_several_providers_keep_the_order_that_was_given(run: Program) -> None:
    """--provider takes names in any case, and nobody else is asked."""
    run.plan(DOWN)
    assert run.inside("q", "--provider", "OpenRouter,groq", "--max-attempts", "1").code == 1
    assert run.models == ["three", "two"]


def test_attempts_are_limited_for_each_model(run: Program) -> None:
    """With everything down each model is asked --max-attempts times; -q leaves the sum."""
    run.plan(DOWN)
    result = run.inside("q", "-q", "--max-attempts", "3", "--base-delay", "0", "--max-delay", "0")
    assert result[:2] == (1, "")
    assert sorted(run.models) == sorted(["one", "two", "three"] * 3)
    assert sum_of(result.stderr) == result.stderr.splitlines()
    assert len(result.stderr.splitlines()) == 4


def test_waits_are_exact_without_jitter(run: Program) -> None:
    """A rate limit without a hint is waited out in doubled waits, up to the longest allowed."""
    run.emulator.plan("groq", rate_limited("groq", how="none"))
    waits = ["--disable-jitter", "--base-delay", "0.05", "--max-delay", "0.15"]
    result = run.inside("q", "--provider", "groq", "--max-attempts", "4", *waits)
    assert (result.code, run.models) == (1, ["two"] * 4)
    told = re.findall(r"⏳ Waiting (.*)s before retry\.\.\.\n", result.stderr)
    assert told == ["0.05", "0.10", "0.15"]
    assert "🔄 groq two exhausted all 4 retry attempts\n" in result.stderr


def test_a_hint_is_waited_out(run: Program) -> None:
    """The last candidate is asked again when the server said so, not before."""
    run.emulator.plan("groq", rate_limited("groq", 0.5), Reply(text="Paris."))
    assert run.inside("q", "--provider", "groq", "--base-delay", "0").code == 0
    first, second = run.asked
    assert second.at - first.at >= 0.5


def test_a_hint_that_is_too_long_is_not(run: Program) -> None:
    """Somebody else is asked at once; when there is nobody, it says when to come back."""
    run.emulator.plan("groq", rate_limited("groq", 3600))
    assert run.inside("q", "--provider", "groq,openrouter").stdout == "Paris.\n"
    result = run.inside("q", "--provider", "groq")
    assert (result.code, run.models) == (1, ["two", "three", "two"])
    assert "1 hour" in result.stderr


def test_no_wait_asks_somebody_else(run: Program) -> None:
    """With --no-wait no rate limit is waited out while others are there."""
    run.emulator.plan("cerebras", rate_limited("cerebras", 1))
    assert run.inside("q", "--no-wait").code == 0
    assert run.models == ["one", "two"]


def test_the_time_limit_ends_everything(run: Program) -> None:
    """--timeout ends a question that is kept alive for ever, by whomever."""
    run.plan(Reply(fault="keep-alives"))
    started = time.monotonic()
    assert run.inside("q", "--timeout", "0.6")[:2] == (1, "")
    assert run.asked[-1].at < run.asked[0].at + 0.6
    assert time.monotonic() - started < 10


def test_the_time_limit_is_shared(run: Program) -> None:
    """While another is ready, an attempt gets at most half of what is left."""
    run.emulator.plan("cerebras", Reply(fault="keep-alives"))
    assert run.inside("q", "--timeout", "2").stdout == "Paris.\n"
    assert run.models == ["one", "two"]
    assert run.asked[1].at - run.asked[0].at == pytest.approx(1, abs=0.4)


def test_how_long_a_silence_is_waited_for(run: Program) -> None:
    """--idle-timeout says so, for all providers."""
    run.emulator.plan("cerebras", Reply(fault="silence"))
    result = run.inside("q", "--idle-timeout", "0.5")
    assert result[:2] == (0, "Paris.\n")
    assert "❌ Error in cerebras API request: silent for 0.5 s\n" in result.stderr


def test_an_answer_cut_at_max_tokens(run: Program) -> None:
    """A cut answer is printed, with a note that names the limit."""
    run.emulator.plan("cerebras", Reply(text="Paris is", finish_reason="length"))
    for flags in ([], ["-q"], ["-q", "--stream"], ["-q", "--json"]):
        result = run.inside("q", "--max-tokens", "300", *flags)
        assert result.code == 0
        assert "Paris is" in result.stdout
        assert re.findall(".*cut.*", result.stderr) == ["✂️  answer cut at --max-tokens 300"]
        if flags:
            assert result.stderr.count("\n") == 1


def test_a_broken_stream_is_not_continued_by_another(run: Program) -> None:
    """Once text was shown, a break is an error; before that, the next model answers."""
    run.emulator.plan("cerebras", error("cerebras", "in_stream"), Reply(text="abc", fault="cut"))
    assert run.inside("q", "--stream").stdout == "Paris.\n"
    result = run.inside("q", "--stream")
    assert (result.code, result.stdout, run.models) == (1, "a\n", ["one", "two", "one"])
    assert result.stderr.splitlines()[-1].startswith("❌")


# --- Answers that are JSON ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": [1]}', {"a": [1]}),
        ('```json\n{"a": [1]}\n```', {"a": [1]}),
        ('\n```\r\n["```"]\r\n```\n', ["```"]),
        ('Sure!\n\n```json\n{"a": [1]}\n```\n\nThat is all.', {"a": [1]}),
        ("Here:\n  ```\n[]\n  ```", []),
        ("[]", []),
        ('"Paris."', "Paris."),
        ("0", 0),
        ("null", None),
    ],
)
def test_an_answer_that_is_json(run: Program, text: str, value: Any) -> None:
    """It is printed without a fence; in the object of --json it is a value, not a text."""
    run.emulator.plan("cerebras", Reply(text=text))
    result = run.inside("q", "--expect-json", "-q")
    assert (result.code, result.stderr) == (0, "")
    assert json.loads(result.stdout) == value
    told = json.loads(run.inside("q", "--expect-json", "--json").stdout)
    assert (told["answer"], told["error"], told["provider"]) == (value, None, "cerebras")


@pytest.mark.parametrize(
    "text",
    [
        'Sure! {"a": 1}',
        '{"a": 1',
        "Paris.",
        "NaN",
        "[1e999]",
        "```json\nParis.\n```",
        "```json\n1\n```\nor\n```json\n2\n```",
        "```json\n1\n",
        "[" * 100_000,
    ],
    ids=lambda text: str(text)[:20],
)
def test_an_answer_that_is_not_json(run: Program, text: str) -> None:
    """The next model is asked, and is trusted as much as before."""
    run.emulator.plan("cerebras", Reply(text=text))
    run.emulator.plan("groq", Reply(text="{}"))
    result = run.inside("q", "--expect-json", "--json", "--stats")
    assert result.code == 0
    assert run.models == ["one", "two"]
    told = json.loads(result.stdout)
    assert told["answer"] == {}
    assert [attempt["verdict"] for attempt in told["attempts"]] == ["rejected", None]
    assert "   rate_limited_requests: 0\n" in result.stderr


def test_no_answer_is_json(run: Program) -> None:
    """It fails like any other question, and says why of each provider."""
    result = run.inside("q", "--expect-json", "-q", "--max-attempts", "1")
    assert result[:2] == (1, "")
    head, *lines = sum_of(result.stderr)
    assert head == "❌ 3 models answered; none was accepted"
    assert len(lines) == 3
    for line in lines:
        assert "not accepted" in line


# --- Signals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "flags", "sign"),
    [
        (Reply(fault="silence"), [], "🎯 Trying"),
        (rate_limited("cerebras", 20), ["--base-delay", "25"], "⏳ Waiting"),
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


def test_the_file_has_its_run_bit() -> None:
    """A checkout can be started by its name."""
    real = Path(__file__).resolve().parent.parent / "fallback_llm.py"
    assert real.stat().st_mode & 0o111 == 0o111


def test_the_installed_command(run: Program) -> None:
    """It calls itself by its name, in the help and where no question was asked."""
    command = run.folder / "fallback-llm"
    command.write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        f"sys.path.insert(0, {str(run.path.parent)!r})\n"
        "from fallback_llm import main\n"
        "sys.exit(main())\n"
    )
    command.chmod(0o755)
    assert run("q", command=[command]).stdout == "Paris.\n"
    terminal = run.terminal()
    streams: dict[str, Any] = dict.fromkeys(["stdin", "stdout", "stderr"], terminal.end)
    assert run(command=[command], **streams).code == 2
    terminal.finish()
    for text in (run("--help", command=[command]).stdout, terminal.received):
        assert "usage: fallback-llm " in text
        assert '\n  fallback-llm "What is' in text
        assert " | fallback-llm " in text
        assert "fallback_llm.py" not in text
    assert "fallback_llm.py" in run("--help").stdout


def test_a_loop_that_reads_lines(run: Program) -> None:
    """With --no-stdin the lines are left to the loop of a shell; the help says so."""
    (run.folder / "questions.txt").write_text("one\ntwo\nthree\n")
    loop = 'while read -r line; do "$@" --no-stdin -q "$line"; done < questions.txt'
    assert run(command=["/bin/sh", "-c", loop, "-", *run.command]) == (0, "Paris.\n" * 3, "")
    assert run.questions == ["one", "two", "three"]
    assert re.search(r"loop.*--no-stdin.*--batch", run("--help").stdout)


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
        assert not {"requests", "urllib3", "dotenv"} & set(sys.modules)
    """
    path = {"PYTHONPATH": str(run.path.parent)}
    assert run(command=[sys.executable, "-c", script], env=path) == (0, "", "")


# --- Health -------------------------------------------------------------------------------------


def test_check_tells_who_can_answer(run: Program) -> None:
    """--check has a line for each provider and costs no tokens."""
    keys = {"GROQ_API_KEY": "gsk_wrong", "OPENROUTER_API_KEY": None}
    result = run.inside("--check", env=dict(keys, CEREBRAS_MODELS="gpt-oss-120b,gone"))
    assert result.code == 0
    head, cerebras, groq, openrouter = unwrapped(result.stdout)
    served = r"cerebras +accepted +\d+\.\d+ .*: gpt-oss-120b\b.*\bnot .*: gone$"
    assert re.match(served, cerebras)
    assert re.match(r"groq +refused", groq)
    assert re.match(r"openrouter +missing", openrouter)
    for title in head.split():
        column = head.index(title)
        for line in (cerebras, groq, openrouter):
            assert line[column] != " "
            assert column == 0 or line[column - 1] == " "
    assert {asked.path for asked in run.asked} == {"/v1/models", "/openai/v1/models"}


def unwrapped(table: str) -> list[str]:
    """The lines of a table, each with what was wrapped under its last column."""
    return re.sub(r"\n +", " ", table).splitlines()


def test_check_of_models_that_are_not_served(run: Program) -> None:
    """Who serves none of the listed models cannot answer; there is no empty list of those."""
    result = run.inside("--check")
    assert result.code == 1
    assert re.search(r"^cerebras +accepted +\S+ +not served: one$", result.stdout, re.MULTILINE)
    assert "served: -" not in result.stdout
    assert re.search(r"exit codes:(.*\n)?.*--check", run.inside("--help").stdout)


def test_check_when_nobody_can_answer(run: Program) -> None:
    """OpenRouter's models list takes any key, so its /key is asked; no good key at all is 1."""
    result = run.inside("--check", "--json", env=dict.fromkeys(KEYS, "sk-wrong"))
    assert result.code == 1
    assert "/api/v1/key" in [asked.path for asked in run.asked]
    assert [report["provider"] for report in json.loads(result.stdout)] == list(PROVIDERS)


def test_check_fits_a_narrow_terminal(run: Program) -> None:
    """Its table is as wide as the terminal, from 60 columns on."""
    code, terminal = run.on_terminal("--check", columns=60, env=OWN_LISTS)
    assert code == 0
    lines = terminal.received.splitlines()
    assert max(len(line) for line in lines if "waiting" not in line) <= 60


def test_check_fits_80_columns(run: Program) -> None:
    """Long notes are wrapped, and stand below each other."""
    result = run.inside("--check", env={**OWN_LISTS, "GROQ_API_KEY": None})
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    column = lines[0].index("MODELS")
    wrapped = [line for line in lines if line.startswith(" ")]
    assert wrapped
    for line in wrapped:
        assert re.match(rf" {{{column}}}[^ ]", line)
    assert ", ".join(fallback_llm.PROVIDERS[-1].models) in unwrapped(result.stdout)[-1]


def test_check_asks_all_at_once(run: Program) -> None:
    """On a terminal it says whom it waits for; the table has the order of questions."""
    run.emulator.plan("cerebras/models", Reply(fault="silence"))
    terminal = run.terminal(columns=40)
    process = run.start("--check", "--timeout", "0.7", env=OWN_LISTS, stderr=terminal.end)
    until(lambda: "waiting for cerebras\r" in terminal.received)
    assert {asked.provider for asked in run.asked} == set(PROVIDERS)
    result = process.end()
    assert result.code == 0
    heads = [line.split()[0] for line in unwrapped(result.stdout)]
    assert heads == ["PROVIDER", *PROVIDERS]
    assert re.search(r"^cerebras +not checked", result.stdout, re.MULTILINE)
    terminal.finish()
    assert "waiting for cerebras, groq, openrouter\r" in terminal.received
    assert terminal.screen == ""


@pytest.mark.parametrize("flags", [["-q"], []], ids=str)
def test_check_is_silent_elsewhere(run: Program, flags: list[str]) -> None:
    """Without a terminal nothing is redrawn."""
    assert run.inside("--check", *flags, env=OWN_LISTS).stderr == ""


def test_list_models(run: Program) -> None:
    """--list-models is `provider<tab>model`, or the same as JSON."""
    lines = run.inside("--list-models", env={"GROQ_MODELS": None}).stdout.splitlines()
    assert {line.split("\t")[0] for line in lines} == set(PROVIDERS)
    assert "groq\topenai/gpt-oss-120b" in lines
    asked = ["--list-models", "--provider", "groq", "--json"]
    told = json.loads(run.inside(*asked, env={"GROQ_MODELS": None}).stdout)
    listed = [f"{row['provider']}\t{row['model']}" for row in told]
    assert listed == [line for line in lines if line.startswith("groq\t")]
    assert [request for request in run.asked if request.body] == []


def test_list_models_in_the_order_of_questions(run: Program) -> None:
    """Those that are asked come first, as they are asked, then what else is served."""
    ours = {"GROQ_MODELS": "qwen/qwen3.8-27b,openai/gpt-oss-20b"}
    chosen = ["--list-models", "--provider", "openrouter,groq"]
    result = run.inside(*chosen, env={**OWN_LISTS, **ours})
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.startswith("groq\t")] == lines[-3:]
    assert lines[-3:] == [
        "groq\tqwen/qwen3.8-27b",
        "groq\topenai/gpt-oss-20b",
        "groq\topenai/gpt-oss-120b",
    ]
    assert result.stderr == ""
    run.plan(DOWN)
    run.inside("q", "--provider", "groq", "--max-attempts", "1", env=ours)
    assert [asked.model for asked in run.asked if asked.body] == ours["GROQ_MODELS"].split(",")


def test_lists_of_models_that_are_only_ours(run: Program) -> None:
    """Where a provider's own list is not to be had, ours is shown, and that it is ours."""
    run.emulator.plan("groq/models", Reply(500))
    result = run.inside("--list-models", env={"OPENROUTER_API_KEY": None})
    lines = result.stdout.splitlines()
    assert "groq\ttwo" in lines
    assert "openrouter\tthree" in lines
    assert re.findall("cerebras|groq|openrouter", result.stderr) == ["groq", "openrouter"]
    groq, openrouter = result.stderr.splitlines()
    assert re.fullmatch("⚠️  groq: .+; these are the models we ask", groq)
    assert re.fullmatch("⚠️  openrouter: no key; these are the models we ask", openrouter)
