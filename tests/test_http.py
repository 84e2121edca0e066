"""Real sockets against the emulator: silence, drips, cuts, time limits, connections, threads."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import random
import socket
import threading
import time
import zlib
from pathlib import Path
from typing import Any, Iterator

import pytest
from emulator import Emulator, Reply, document, error, events, rate_limited
from fakes import World, says

from fallback_llm import (
    PROVIDERS,
    AllProvidersFailed,
    Answer,
    FallbackLLM,
    FallbackLLMError,
    Provider,
    ProviderHealth,
    RetryConfig,
    StreamInterrupted,
)

SLACK = 10.0  # seconds that a busy machine may add; no test passes because of it
ONCE = RetryConfig(max_attempts=1)


@pytest.fixture
def here(bare: Path, monkeypatch: pytest.MonkeyPatch, emulator: Emulator) -> Emulator:
    """The emulator, and an environment that points the program at it."""
    for name, value in emulator.environment().items():
        monkeypatch.setenv(name, value)
    return emulator


def program(config: RetryConfig = ONCE, idle_timeout: float = 60.0, **settings: Any) -> FallbackLLM:
    """Cerebras with one model, with this idle timeout, then Groq with one."""
    cerebras, groq, _ = PROVIDERS
    rows = [
        Provider("cerebras", cerebras.base_url, cerebras.key_env, ("m",), idle_timeout),
        Provider("groq", groq.base_url, groq.key_env, ("n",)),
    ]
    return FallbackLLM(config, providers=rows, **settings)


def trail(asked: Emulator) -> list[tuple[str, str]]:
    return [(request.provider, request.model) for request in asked.asked]


def streamed(llm: FallbackLLM) -> str:
    return "".join(llm.stream("Where?"))


VERBS: list[Any] = [
    pytest.param(lambda llm: llm.ask("Where?"), id="ask"),
    pytest.param(lambda llm: llm.complete("Where?").text, id="complete"),
    pytest.param(streamed, id="stream"),
]
SPEECHLESS = ["silence", "silence-after-headers", "keep-alives", "reset", "close", "html", "empty"]
SPEECHLESS += ["short", "drip"]  # these are plain JSON: no text before the end
HALFWAY = ["stall", "reset-midway", "cut"]


@pytest.mark.parametrize("fault", SPEECHLESS)
@pytest.mark.parametrize("verb", VERBS)
def test_a_fault_leads_to_the_next(here: Emulator, verb: Any, fault: str) -> None:
    """At once, or after the idle timeout of the row; it counts once."""
    here.plan("cerebras", Reply(fault=fault))
    here.plan("groq", Reply(text="Paris."))
    llm, started = program(idle_timeout=0.2), time.monotonic()
    assert verb(llm) == "Paris."
    assert time.monotonic() - started < 0.2 + SLACK
    assert trail(here) == [("cerebras", "m"), ("groq", "n")]
    assert llm.provider_health["cerebras"].consecutive_failures == 1


@pytest.mark.parametrize("fault", HALFWAY)
@pytest.mark.parametrize("verb", VERBS)
def test_half_an_answer_is_none(here: Emulator, verb: Any, fault: str) -> None:
    """Buffered, the next is asked; streamed, it has been shown and is told as broken."""
    here.plan("cerebras", Reply(text="Half an answer", fault=fault))
    here.plan("groq", Reply(text="Paris."))
    llm = program(idle_timeout=0.5)
    if verb is not streamed:
        assert verb(llm) == "Paris."
    else:
        with pytest.raises(StreamInterrupted) as broken:
            verb(llm)
        assert (broken.value.provider, broken.value.model) == ("cerebras", "m")
        assert "Half an answer".startswith(broken.value.partial)
        assert broken.value.partial
    assert len(trail(here)) == 1 + (verb is not streamed)
    assert llm.provider_health["cerebras"].consecutive_failures == 1


@pytest.mark.parametrize("fault", ["stall", "huge"])
def test_an_error_whose_words_do_not_end(here: Emulator, fault: str) -> None:
    """Its status says enough."""
    here.plan("cerebras", Reply(401, fault=fault))
    answer = program(idle_timeout=0.2).complete("Where?")
    assert (answer.provider, answer.attempts[0].status) == ("groq", 401)


def test_a_huge_reply_is_a_fault(here: Emulator) -> None:
    """A body has a ceiling: without a time limit too it comes to an end."""
    here.plan("cerebras", Reply(text="word " * 2000, fault="huge"))
    first, second = program().complete("Where?").attempts
    assert (first.verdict and first.verdict.name, second.provider) == ("FAULT", "groq")


ENDLESS = ["silence", "silence-after-headers", "keep-alives", "stall", "drip", "huge"]


@pytest.mark.parametrize("fault", ENDLESS)
def test_the_time_limit_holds_whatever_the_body_does(here: Emulator, fault: str) -> None:
    """The whole question ends in time, and nothing is held against the provider."""
    here.plan("cerebras", Reply(fault=fault, text="word " * 50))
    llm, started = program(), time.monotonic()
    with pytest.raises((AllProvidersFailed, StreamInterrupted)):
        "".join(llm.stream("Where?", timeout=0.2))
    with pytest.raises(AllProvidersFailed):
        llm.complete("Where?", timeout=0.2)
    assert 0.35 < time.monotonic() - started < 0.4 + SLACK
    assert llm.provider_health["cerebras"] == ProviderHealth()
    assert trail(here) == [("cerebras", "m")] * 2


def test_the_time_limit_holds_while_connecting(bare: Path) -> None:
    """A port whose queue is full takes no more connections."""
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for client in (first, second):
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}/v1"
        llm = FallbackLLM(ONCE, providers=[Provider("x", url, None, ("m",))])
        started = time.monotonic()
        assert llm.ask("Where?", timeout=0.3) == ""
        assert time.monotonic() - started < 0.3 + SLACK


def test_a_slow_stream_that_makes_progress_is_no_silence(here: Emulator) -> None:
    """Each piece begins the silence anew; the caller's own pauses are no silence either."""
    here.plan("cerebras", Reply(text="Once upon a time", pieces=4, gap=0.2))
    assert program(idle_timeout=0.5).complete("Where?").provider == "cerebras"
    here.plan("cerebras", Reply(text="Once upon a time", pieces=2, gap=0.1))
    pieces = []
    for piece in program(idle_timeout=0.4).stream("Where?"):
        pieces.append(piece)
        time.sleep(0.5)
    assert "".join(pieces) == "Once upon a time"


# --- Connections --------------------------------------------------------------------------------


def test_a_connection_is_kept(here: Emulator) -> None:
    """One for all that a thread asks of a host, after errors and streams too."""
    limit = rate_limited("cerebras", how="none")
    here.plan("cerebras", Reply(), limit, Reply(), error("cerebras", "server"), Reply())
    llm = program(RetryConfig(max_attempts=2, base_delay=0.0))
    for _ in range(5):
        llm.ask("Where?")
        "".join(llm.stream("Where?"))
    assert len(here.asked) >= 12
    assert here.connections <= 2  # one; a busy machine may lose one


def test_as_many_connections_as_threads(here: Emulator, caplog: pytest.LogCaptureFixture) -> None:
    """No more, all of them reused, and no word about a pool that is full."""
    caplog.set_level(logging.DEBUG, "urllib3")
    llm = program()
    for _ in range(3):
        assert all(isinstance(a, Answer) for a in llm.ask_many(["Where?"] * 60, max_workers=16))
    assert here.connections <= 16
    assert "pool is full" not in caplog.text


@pytest.mark.parametrize("fault", ["reset", "close", "short", "silence", "cut"])
def test_nothing_is_sent_again_in_secret(here: Emulator, fault: str) -> None:
    """The trail and the server count the same requests, on new connections and on kept ones."""
    here.plan("cerebras", Reply(), Reply(fault=fault), Reply(), Reply(fault=fault), Reply())
    llm = program(idle_timeout=0.5)
    trails = [llm.complete("Where?").attempts for _ in range(2)]
    told = [(attempt.provider, attempt.model) for each in trails for attempt in each]
    assert told == trail(here) == [("cerebras", "m"), ("cerebras", "m"), ("groq", "n")]


def test_headers_are_our_own(here: Emulator, bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """User-Agent and key, whatever ~/.netrc says; no cookies."""
    (bare / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(bare / "netrc"))
    here.plan("cerebras", Reply(headers={"Set-Cookie": "a=b; Path=/"}))
    llm = program()
    for _ in range(2):
        llm.complete("Where?")
    for asked in here.asked:
        assert asked.headers["user-agent"].startswith("fallback_llm")
        assert asked.headers["authorization"] == f"Bearer {llm.api_keys['cerebras']}"
        assert "cookie" not in asked.headers


def test_a_redirect_is_not_followed(here: Emulator) -> None:
    location = {"Location": f"{here.url}/openai/v1/chat/completions"}
    here.plan("cerebras", Reply(307, body="", headers=location))
    first = program().complete("Where?").attempts[0]
    assert (first.status, first.verdict and first.verdict.name) == (307, "FAULT")
    assert trail(here) == [("cerebras", "m"), ("groq", "n")]


def test_proxies_of_the_environment(here: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy gets the request, except for a host in NO_PROXY."""
    monkeypatch.setenv("CEREBRAS_BASE_URL", "http://localhost:1")  # where nobody listens
    monkeypatch.setenv("HTTP_PROXY", here.url)
    monkeypatch.setenv("http_proxy", here.url)
    assert program().complete("Where?").provider == "cerebras"
    monkeypatch.setenv("NO_PROXY", "localhost")
    monkeypatch.setenv("no_proxy", "localhost")
    assert program().complete("Where?").provider == "groq"


def test_certificates_of_the_environment(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """REQUESTS_CA_BUNDLE is obeyed."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(bare))
    world = World()
    world.llm.ask("Where?")
    assert world.server.settings["verify"] == str(bare)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@pytest.mark.parametrize("streamed", [False, True], ids=["JSON", "events"])
def test_compressed_bodies_are_read(here: Emulator, encoding: str, streamed: bool) -> None:
    """Whole ones; half of one is a fault."""
    told = Reply(text="Paris.")
    body = "".join(events("cerebras", told)) if streamed else json.dumps(document("cerebras", told))
    packed = gzip.compress(body.encode()) if encoding == "gzip" else zlib.compress(body.encode())
    headers = {"Content-Encoding": encoding}
    here.plan("cerebras", *(Reply(body=part, headers=headers) for part in (packed, packed[:-20])))
    llm = program()
    assert llm.complete("Where?").text == "Paris."
    assert llm.complete("Where?").provider == "groq"


def test_closing_a_stream_closes_its_connection(bare: Path) -> None:
    """The server sees the end, although it had more to say."""
    ended = threading.Event()

    def serve() -> None:
        connection = listener.accept()[0]
        with connection:
            head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
            connection.sendall(head + events("groq", Reply(text="Once"))[1].encode())
            connection.settimeout(60)
            while connection.recv(65536):
                pass
            ended.set()

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        server = threading.Thread(target=serve, daemon=True)
        server.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        llm = FallbackLLM(ONCE, providers=[Provider("x", url, None, ("m",))])
        pieces: Any = llm.stream("Where?")
        assert "Once".startswith(next(pieces))
        pieces.close()
        assert ended.wait(60)
        server.join()


# --- Addresses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("https://example.org", "https://example.org/openai/v1/chat/completions"),
        ("https://example.org/", "https://example.org/openai/v1/chat/completions"),
        ("https://example.org/v9/", "https://example.org/v9/chat/completions"),
        ("http://localhost:8080", "http://localhost:8080/openai/v1/chat/completions"),
        ("http://127.0.0.1:8080/v1", "http://127.0.0.1:8080/v1/chat/completions"),
        ("http://[::1]:8080", "http://[::1]:8080/openai/v1/chat/completions"),
        ("http://example.org", None),
        ("http://127.0.0.1.example.org/v1", None),
        ("http://localhost@example.org/v1", None),
        ("ftp://localhost/v1", None),
        ("example.org", None),
    ],
)
def test_a_base_url(bare: Path, monkeypatch: pytest.MonkeyPatch, given: str, asked: Any) -> None:
    """Without a path it gets the provider's own; plain HTTP only goes to this machine."""
    monkeypatch.setenv("GROQ_BASE_URL", given)
    settings: Any = {"providers": PROVIDERS, "api_keys": {"groq": "k-11111111"}}
    if asked is None:
        with pytest.raises(ValueError, match="GROQ_BASE_URL"):
            World(**settings).llm.complete("Where?", provider="groq")
    else:
        world = World(**settings)
        world.llm.complete("Where?", provider="groq")
        assert [request.url for request in world.server.asked] == [asked]


# --- Many questions -----------------------------------------------------------------------------


def test_threads_under_random_faults(here: Emulator) -> None:
    """64 threads on one object: the figures add up, and no request too many reaches a server."""
    chance = random.Random(7)  # noqa: S311 - no secret
    faults = ["", "", "", "reset", "close", "html", "empty", "cut", "short", "reset-midway"]
    for name in ("cerebras", "groq"):
        spoilt = [Reply(fault=fault) for fault in faults]
        spoilt += [rate_limited(name, how="none"), error(name, "server"), error(name, "too_long")]
        here.plan(name, *(chance.choice(spoilt) for _ in range(1500)), Reply())
    llm = program(RetryConfig(max_attempts=2, base_delay=0.0))
    results: list[Any] = []

    def work() -> None:
        for _ in range(5):
            try:
                results.append(llm.complete("Where?", timeout=120))
            except FallbackLLMError as failure:
                results.append(failure)

    threads = [threading.Thread(target=work) for _ in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    trails = [result.attempts for result in results]
    told = sorted((attempt.provider, attempt.model) for each in trails for attempt in each)
    assert told == sorted(trail(here))
    assert max(len(each) for each in trails) <= 2 * 2
    switches = sum(a.provider != b.provider for each in trails for a, b in zip(each, each[1:]))
    answered = sum(isinstance(result, Answer) for result in results)
    assert llm.get_stats() == {
        "total_requests": 320,
        "successful_requests": answered,
        "failed_requests": 320 - answered,
        "rate_limited_requests": sum(a.status == 429 for each in trails for a in each),
        "provider_switches": switches,
    }


def test_ask_many_keeps_the_order(here: Emulator) -> None:
    """Answers in the order of the questions, however long each takes; a failure in its place."""
    here.plan("cerebras/slow", Reply(text="slow", delay=0.4))
    here.plan("cerebras/bad", error("cerebras", "bad_request"))
    here.plan("cerebras/m", Reply(text="quick"))
    ask: Any = [{"question": "1", "model": "slow"}, "2", {"question": "3", "model": "bad"}, "4"]
    results = list(program().ask_many(ask, max_workers=4, provider="cerebras"))
    assert [getattr(result, "text", type(result)) for result in results] == [
        "slow",
        "quick",
        AllProvidersFailed,
        "quick",
    ]


def test_ask_many_works_side_by_side(here: Emulator) -> None:
    here.plan("cerebras", Reply(delay=0.2))
    started = time.monotonic()
    assert len(list(program().ask_many(["Where?"] * 80, max_workers=80))) == 80
    assert time.monotonic() - started < 80 * 0.2


def test_ask_many_is_lazy(bare: Path) -> None:
    """Of a million questions only those are read that are asked now or next."""
    read = []

    def questions() -> Iterator[str]:
        for number in range(1000000):
            read.append(number)
            yield str(number)

    world = World({"a": [lambda asked: says(asked.body["messages"][-1]["content"])]})
    answers = world.llm.ask_many(questions(), max_workers=4)
    assert read == []
    texts = [getattr(answer, "text", "") for answer in itertools.islice(answers, 100)]
    assert texts == [str(number) for number in range(100)]
    answers.close()  # type: ignore[attr-defined]
    assert len(read) < 200


def test_ask_many_tells_of_a_mistake(bare: Path) -> None:
    """A question that cannot be asked is an error of the caller, not a failure."""
    for mistake in ("", {"question": "Where?", "max_tokens": 0}):
        with pytest.raises(ValueError, match=r"question|max_tokens"):
            list(World().llm.ask_many(["Where?", mistake]))
    with pytest.raises(ValueError, match="workers"):
        list(World().llm.ask_many(["Where?"], max_workers=0))


@pytest.mark.filterwarnings("ignore")  # those of dask and of what it needs
def test_processes_of_a_cluster(here: Emulator) -> None:
    """An object goes to other processes, finds its keys there, and its answers come back."""
    distributed = pytest.importorskip("distributed")
    bag = pytest.importorskip("dask.bag")
    here.plan("cerebras", Reply(text="Paris."))
    questions = [f"Where? {number}" for number in range(20)]
    local = {"n_workers": 2, "threads_per_worker": 4, "dashboard_address": None}
    asks = bag.from_sequence(questions, npartitions=4).map(program().complete)
    with distributed.LocalCluster(processes=True, **local) as cluster, distributed.Client(cluster):
        answers = asks.compute()
    assert [answer.text for answer in answers] == ["Paris."] * 20
    assert sorted(asked.body["messages"][0]["content"] for asked in here.asked) == sorted(questions)
