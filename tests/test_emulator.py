"""The emulator as a tool: its options, what they do to a question, and what it prints."""

from __future__ import annotations

import http.client
import json
import os
import shlex
import signal
import socket
import time
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Sequence

import emulator as tool
import pytest
from conftest import Program, until
from emulator import DIALECTS, FAULTS, MORE_HELP, MUTE, NAMES, Asked, Emulator, Reply

from fallback_llm import FallbackLLM

PROVIDERS = [dialect.name for dialect in DIALECTS]
QUESTION = "What is the capital of France?"
IN_JSON = 'Reply in JSON only: {"capital": <the capital of France>}'


class Told(NamedTuple):
    """What came back; a status of 0: nothing that is HTTP."""

    status: int
    text: str
    retry_after: str | None = None

    @property
    def answer(self) -> Any:
        return json.loads(self.text)["choices"][0]["message"]["content"]


def ask(emulator: Emulator, provider: str, question: str = QUESTION, **more: Any) -> Told:
    """A plain request, without retries."""
    dialect = DIALECTS[PROVIDERS.index(provider)]
    body = {"model": "m", "messages": [{"role": "user", "content": question}], **more}
    headers = {"Authorization": f"Bearer {dialect.key}"}
    connection = http.client.HTTPConnection(emulator.url[len("http://") :], timeout=10)
    try:
        connection.request("POST", dialect.path + "/chat/completions", json.dumps(body), headers)
        reply = connection.getresponse()
        return Told(reply.status, reply.read().decode(), reply.getheader("retry-after"))
    except (OSError, http.client.HTTPException):
        return Told(0, "")
    finally:
        connection.close()


def get(emulator: Emulator, provider: str, path: str, timeout: float) -> int:
    """The status, 0 without one."""
    dialect = DIALECTS[PROVIDERS.index(provider)]
    connection = http.client.HTTPConnection(emulator.url[len("http://") :], timeout=timeout)
    try:
        headers = {"Authorization": f"Bearer {dialect.key}"}
        connection.request("GET", dialect.path + path, headers=headers)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def started(*arguments: str) -> Emulator:
    return tool.prepared(tool.parsed(arguments))


def statuses(provider: str, *arguments: str, count: int = 4) -> list[int]:
    """What this many questions in a row get."""
    with started(*arguments) as emulator:
        return [ask(emulator, provider).status for _ in range(count)]


# --- What the options do ------------------------------------------------------------------------


def test_without_options_everybody_answers() -> None:
    """With a text that says where it comes from."""
    with started() as emulator:
        for provider in PROVIDERS:
            told = f"Hello from the emulator of {provider}, asked for m; no model was called."
            assert ask(emulator, provider).answer == told


@pytest.mark.parametrize(
    ("question", "more"),
    [
        pytest.param(IN_JSON, {}, id="in the question"),
        pytest.param("?", {"response_format": {"type": "json_object"}}, id="as a parameter"),
    ],
)
def test_who_asks_for_json_gets_some(question: str, more: dict[str, Any]) -> None:
    with started() as emulator:
        assert ask(emulator, "groq", question, **more).answer == '{"capital": "Paris"}'


def test_an_answer_for_everybody() -> None:
    """Also for who asks for JSON, and from providers that have no fault."""
    with started("--answer", "It is Lima.", "--fault", "503,ok", "--provider", "groq") as emulator:
        assert [ask(emulator, "groq").status for _ in range(2)] == [503, 200]
        for provider in PROVIDERS:
            assert ask(emulator, provider, IN_JSON).answer == "It is Lima."


@pytest.mark.parametrize(
    ("faults", "found"),
    [
        ("503", [503, 503, 503, 503]),
        ("429,503,ok", [429, 503, 200, 200]),
        ("ok,404", [200, 404, 404, 404]),
        ("close, reset, 418", [0, 0, 418, 418]),
    ],
)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_faults_come_in_order_and_the_last_one_repeats(
    provider: str, faults: str, found: list[int]
) -> None:
    assert statuses(provider, "--fault", faults) == found


@pytest.mark.parametrize(
    ("provider", "fault", "path", "status"),
    [
        ("groq", "503", "/models", 503),
        ("groq", "503,ok", "/models", 200),
        ("groq", "429", "/models", 200),
        ("groq", "timeout", "/models", 0),
        ("groq", "close", "/models", 0),
        ("groq", "cut", "/models", 200),
        ("cerebras", "401", "/models", 401),
        ("openrouter", "401", "/key", 401),
        ("openrouter", "401", "/models", 200),
    ],
)
def test_an_outage_is_everywhere(provider: str, fault: str, path: str, status: int) -> None:
    """A refused key is where one is needed, and what is wrong with an answer is only there."""
    with started("--fault", fault, "--provider", provider) as emulator:
        assert get(emulator, provider, path, timeout=10 if status else 0.2) == status


def test_others_have_no_fault() -> None:
    arguments = ("--fault", "500", "--provider", "cerebras,groq")
    assert [statuses(name, *arguments, count=1) for name in PROVIDERS] == [[500], [500], [200]]


@pytest.mark.parametrize("status", ["401", "402", "403", "404", "413", "429", "500", "503"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_status_has_the_words_of_the_provider(provider: str, status: str) -> None:
    """Other ones have an error of its shape."""
    with started("--fault", status) as emulator:
        told = ask(emulator, provider)
    assert told.status == int(status)
    assert "An emulated" not in told.text


@pytest.mark.parametrize("provider", ["cerebras", "groq"])
def test_how_long_a_rate_limit_asks_to_wait(provider: str) -> None:
    with started("--fault", "429", "--retry-after", "2") as emulator:
        assert ask(emulator, provider).retry_after == "2"


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("html", "<!DOCTYPE html>"),
        ("empty", ""),
        ("error-in-200", '"error"'),
        ("error-midway", '"finish_reason":"error"'),
        ("no-choices", '"choices":[]'),
        ("no-text", '"content":null'),
        ("malformed", ",}"),
    ],
)
def test_a_200_without_an_answer(fault: str, text: str) -> None:
    with started("--fault", fault) as emulator:
        told = ask(emulator, "groq")
    assert told.status == 200
    assert text in told.text


@pytest.mark.parametrize("fault", ["error-in-200", "error-midway", "no-choices", "malformed"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_our_client_survives_what_holds_no_answer(
    bare: Path, emulator: Emulator, monkeypatch: pytest.MonkeyPatch, provider: str, fault: str
) -> None:
    """It asks for a stream."""
    for name, value in emulator.environment().items():
        monkeypatch.setenv(name, value)
    emulator.plan(provider, Reply(fault=fault))
    others = [name for name in PROVIDERS if name != provider]
    answer = FallbackLLM().complete(QUESTION, provider=[provider, *others])
    assert (answer.attempts[0].provider, answer.provider) == (provider, others[0])


def test_a_quota_is_that_of_an_account() -> None:
    """Three a minute of each provider that is named."""
    arguments = ("--quota", "3", "--provider", "groq")
    assert statuses("groq", *arguments) == [200, 200, 200, 429]
    assert statuses("cerebras", *arguments) == [200] * 4


def test_a_delay_comes_before_each_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before a fault, and not before the replies of others."""
    waited: list[float] = []

    def wait(link: object, seconds: float) -> None:
        waited.extend([seconds] * (seconds > 0))

    monkeypatch.setattr(tool._Link, "wait", wait)
    arguments = ("--delay", "7", "--fault", "503,ok", "--provider", "groq")
    with started(*arguments) as emulator:
        found = [ask(emulator, name).status for name in ("groq", "groq", "cerebras")]
    assert (found, waited) == ([503, 200, 200], [7, 7])


# --- What it prints -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quota", "0"], "--quota must be a whole number from 1 to 1000000, not '0'"),
        (["--quota", "1.5"], "--quota must be a whole number from 1 to 1000000, not '1.5'"),
        (["--delay", "nan"], "--delay must be a number from 0 to 86400, not 'nan'"),
        (["--port", "http"], "--port must be a whole number from 0 to 65535, not 'http'"),
        (["--provider", "grok"], "--provider must be one or more of cerebras, groq, openrouter,"),
        (["--fault", "503,600"], "a status from 400 to 599, not '600'"),
        (["--fault", ""], "--fault must be one or more of ok, no-text, timeout, "),
        (["--fault"], "--fault expected one argument"),
        (["--provider", "groq"], "--provider needs --fault, --delay or --quota"),
        (["--retry-after", "2", "--fault", "503"], "--retry-after needs --fault 429"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_options(
    arguments: Sequence[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says which, and what is allowed."""
    with pytest.raises(SystemExit) as ended:
        tool.parsed(arguments)
    out, told = capsys.readouterr()
    assert (ended.value.code, out, told.count("\n")) == (2, "", 1)
    assert told.startswith("error: ")
    assert words in told


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit) as ended:
            tool.serve(tool.parsed(["--port", port]))
    assert ended.value.code == 2
    assert (
        capsys.readouterr().err == f"error: --port {port} cannot be used: Address already in use\n"
    )


def test_help_names_every_fault(capsys: pytest.CaptureFixture[str]) -> None:
    """And its examples are right."""
    with pytest.raises(SystemExit):
        tool.parsed(["--help"])
    assert MORE_HELP.strip() in capsys.readouterr().out
    listed = MORE_HELP.partition("faults:")[2].partition("examples:")[0]
    assert not [name for name in NAMES if name not in listed]
    assert {name for name in FAULTS if name} < set(NAMES)


def examples() -> Iterator[list[str]]:
    """The arguments in the examples of --help."""
    for text in MORE_HELP.splitlines():
        if text.startswith("  python "):
            yield shlex.split(text)[2:]


@pytest.mark.parametrize("arguments", list(examples()), ids=str)
def test_an_example_of_the_help_serves(arguments: list[str]) -> None:
    with started(*arguments) as emulator:
        assert emulator.url


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("ok", "groq m 200 answered"),
        ("cut", "groq m 200 cut"),
        ("timeout", "groq m --- silence"),
        ("503", "groq m 503 m is over capacity"),
        ("502", "groq m 502 Bad Gateway"),
        ("404", "groq m 404 There is no model `m`"),
    ],
)
def test_a_line_for_a_request(fault: str, words: str) -> None:
    """After the time of day."""
    asked = Asked(0.0, "groq", "/openai/v1/chat/completions", "m", {}, {})
    at, _, found = tool.line(asked, tool.named("groq", fault)).partition(" ")
    assert found == words
    assert len(at) == len("12:34:56")


def test_a_line_tells_the_hint_and_hides_control_characters() -> None:
    asked = Asked(0.0, "cerebras", "/v1/chat/completions", "m\n\x1b", {}, {})
    told = tool.line(asked, tool.named("cerebras", "429", 2))
    assert told[9:] == "cerebras m?? 429 All tokens per minute are used up (Retry-After: 2)"
    asked = Asked(0.0, "", "/favicon.ico", "", {}, {})
    assert tool.line(asked, Reply(fault="close"))[9:] == "- /favicon.ico --- close"


def test_every_request_is_told() -> None:
    """As soon as it is known what becomes of it."""
    told: list[str] = []
    options = tool.parsed(["--quota", "1"])
    with tool.prepared(
        options, lambda asked, reply: told.append(tool.line(asked, reply))
    ) as served:
        for _ in range(2):
            ask(served, "cerebras")
    wait = "(Retry-After: 60)"
    assert [line[9:] for line in told] == [
        "cerebras m 200 answered",
        f"cerebras m 429 All requests per minute are used up {wait}",
    ]


def test_what_sends_no_status() -> None:
    """In the lines as on the wire."""
    for fault in ("reset", "close"):
        assert statuses("groq", "--fault", fault, count=1) == [0]
        assert fault in MUTE


def test_ctrl_c_stops_it_and_the_loop_around_it(run: Program) -> None:
    """Quietly. It says on stderr what it does, so that stdout can be pasted as it is."""
    path = tool.__file__
    loop = 'while true; do "$0" "$1"; echo again; done'
    served = run.start("-c", loop, run.command[0], path, command=["bash"], start_new_session=True)
    until(lambda: served.stdout.count("\n") == 6)
    address = served.stdout.split("BASE_URL=")[1].split()[0]
    connection = http.client.HTTPConnection(address[len("http://") :], timeout=10)
    connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {DIALECTS[0].key}"})
    connection.getresponse().read()
    connection.close()
    os.killpg(served.popen.pid, signal.SIGINT)
    code, out, told = served.end()
    assert code == -signal.SIGINT
    assert "again" not in out
    first, *lines = told.splitlines()
    assert first == "Paste these lines into another shell. Ctrl-C ends the emulator."
    assert [line[9:] for line in lines] == ["cerebras /v1/models 200 answered"]


def test_a_proxy_is_not_asked_for_the_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who has one gets one line more to paste."""

    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", stop)
    for proxy, count in ("", 6), ("http://127.0.0.1:9", 7):
        monkeypatch.setenv("http_proxy", proxy)
        with pytest.raises(KeyboardInterrupt):
            tool.serve(tool.parsed([]))
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == count
        assert ("export no_proxy=127.0.0.1" in lines) == bool(proxy)
