"""Real sockets against the emulator: silence, drips, cuts, time limits, connections, threads."""

from __future__ import annotations

import contextlib
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
from typing import Any, Iterator, Optional

import pytest
from emulator import Emulator, Reply, dead_address, document, error, events, rate_limited
from fakes import World, says

from fallback_llm import (
    PROVIDERS,
    AllProvidersFailed,
    Answer,
    Attempt,
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


def verdict_of(attempt: Attempt) -> Optional[str]:
    return attempt.verdict.name if attempt.verdict else None


def ask_text(llm: FallbackLLM) -> str:
    return llm.ask("Where?")


def streamed(llm: FallbackLLM) -> str:
    return "".join(llm.stream("Where?"))


VERBS: list[Any] = [
    pytest.param(ask_text, id="ask"),
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
    llm = program(idle_timeout=0.2)
    started = time.monotonic()
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
        assert trail(here) == [("cerebras", "m"), ("groq", "n")]
    else:
        with pytest.raises(StreamInterrupted) as broken:
            verb(llm)
        assert (broken.value.provider, broken.value.model) == ("cerebras", "m")
        assert "Half an answer".startswith(broken.value.partial)
        assert broken.value.partial
        assert trail(here) == [("cerebras", "m")]
    assert llm.provider_health["cerebras"].consecutive_failures == 1


@pytest.mark.parametrize("fault", ["stall", "huge"])
def test_an_error_whose_words_do_not_end(here: Emulator, fault: str) -> None:
    """Its status says enough."""
    here.plan("cerebras", Reply(401, fault=fault))
    answer = program(idle_timeout=0.2).complete("Where?")
    assert answer.provider == "groq"
    assert answer.attempts[0].status == 401


def test_a_huge_reply_is_a_fault(here: Emulator) -> None:
    """A body has a ceiling: without a time limit too it comes to an end."""
    here.plan("cerebras", Reply(text="word " * 2000, fault="huge"))
    first, second = program().complete("Where?").attempts
    assert verdict_of(first) == "FAULT"
    assert second.provider == "groq"


# Not "huge": a quick machine reaches the ceiling of a body before the limit of time.
ENDLESS = ["silence", "silence-after-headers", "keep-alives", "stall", "drip"]


@pytest.mark.parametrize("fault", ENDLESS)
def test_the_time_limit_holds_whatever_the_body_does(here: Emulator, fault: str) -> None:
    """The whole question ends in time, and nothing is held against the provider."""
    here.plan("cerebras", Reply(fault=fault, text="word " * 50))
    llm = program()
    started = time.monotonic()
    with pytest.raises((AllProvidersFailed, StreamInterrupted)):
        "".join(llm.stream("Where?", provider="cerebras", timeout=0.2))
    with pytest.raises(AllProvidersFailed):
        llm.complete("Where?", provider="cerebras", timeout=0.2)
    assert 0.35 < time.monotonic() - started < 0.4 + SLACK
    assert llm.provider_health["cerebras"] == ProviderHealth()
    assert trail(here) == [("cerebras", "m")] * 2


# Live, what has been shown cannot be taken back.
HALVES: list[Any] = [(ask_text, fault) for fault in ENDLESS]
HALVES += [(streamed, fault) for fault in ENDLESS if fault != "stall"]


@pytest.mark.parametrize(("verb", "fault"), HALVES)
def test_the_first_in_line_gets_half_of_the_time(here: Emulator, verb: Any, fault: str) -> None:
    """The other half is for the next one, who is ready; nobody is blamed for our hurry."""
    here.plan("cerebras", Reply(fault=fault, text="word " * 50))
    here.plan("groq", Reply(text="Paris."))
    llm = program(timeout=1.0)
    assert verb(llm) == "Paris."
    assert trail(here) == [("cerebras", "m"), ("groq", "n")]
    assert llm.provider_health["cerebras"] == ProviderHealth()


def test_the_time_limit_holds_while_connecting(bare: Path) -> None:
    """A port whose queue is full takes no more connections."""
    with dead_address() as (host, port):
        url = f"http://{host}:{port}/v1"
        llm = FallbackLLM(ONCE, providers=[Provider("x", url, None, ("m",))])
        started = time.monotonic()
        assert llm.ask("Where?", timeout=0.3) == ""
        assert time.monotonic() - started < 0.3 + SLACK


def test_a_slow_stream_that_makes_progress_is_not_idle(here: Emulator) -> None:
    """Each piece renews the idle timeout; the caller's own pauses do not count."""
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
    assert first.status == 307
    assert verdict_of(first) == "FAULT"
    assert trail(here) == [("cerebras", "m"), ("groq", "n")]


def test_proxies_of_the_environment(here: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy gets the request, except for a host in NO_PROXY."""
    monkeypatch.setenv("HTTP_PROXY", here.url)
    monkeypatch.setenv("http_proxy", here.url)
    row = Provider("house", "http://house.invalid/v1", None, ("m",))
    through_proxy = FallbackLLM(ONCE, providers=[row])
    assert through_proxy.ask("Where?") == ""  # the emulator is the proxy, and wants a key
    assert trail(here) == [("cerebras", "m")]
    monkeypatch.setenv("NO_PROXY", "house.invalid")
    monkeypatch.setenv("no_proxy", "house.invalid")
    direct = FallbackLLM(ONCE, providers=[row])
    assert direct.ask("Where?") == ""
    assert len(trail(here)) == 1


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_loopback_address_is_never_asked_through_a_proxy(
    here: Emulator, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    """The key would reach the proxy in clear text."""
    monkeypatch.setenv("GROQ_BASE_URL", here.url.replace("127.0.0.1", host))
    with Emulator() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        assert program().complete("Where?", provider="groq").provider == "groq"
        assert proxy.connections == 0
    assert trail(here) == [("groq", "n")]


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
    """Without a path it gets the provider's own; a key goes by plain HTTP to this machine only."""
    monkeypatch.setenv("GROQ_BASE_URL", given)
    settings: Any = {"providers": PROVIDERS, "api_keys": {"groq": "k-11111111"}}
    if asked is None:
        with pytest.raises(ValueError, match="GROQ_BASE_URL"):
            World(**settings).llm.complete("Where?", provider="groq")
    else:
        world = World(**settings)
        world.llm.complete("Where?", provider="groq")
        assert [request.url for request in world.server.asked] == [asked]


@pytest.mark.parametrize("url", ["http://llama:8080/v1", "http://192.168.1.7:8080/v1"])
def test_plain_http_to_a_server_in_the_house(bare: Path, url: str) -> None:
    """There is no key to steal."""
    world = World(providers=[Provider("house", url, None, ("m",))])
    world.llm.complete("Where?")
    assert [request.url for request in world.server.asked] == [f"{url}/chat/completions"]
    assert "authorization" not in {name.lower() for name in world.server.asked[0].headers}


@pytest.mark.parametrize("key_env", ["HOUSE_API_KEY", None])
def test_plain_http_with_a_key_goes_nowhere(bare: Path, key_env: Optional[str]) -> None:
    """Wrong usage, also where the row needs no key but was given one."""
    row = Provider("house", "http://llama:8080/v1", key_env, ("m",))
    with pytest.raises(ValueError, match=r"(?i)house.* must be https://"):
        World(providers=[row], api_keys={"house": "k-11111111"})


def test_plain_http_with_a_key_that_comes_later(bare: Path) -> None:
    """A key that is set afterwards stays here as well."""
    world = World(providers=[Provider("house", "http://llama:8080/v1", None, ("m",))])
    world.llm.api_keys["house"] = "k-11111111"
    with contextlib.suppress(ValueError, FallbackLLMError):
        world.llm.complete("Where?")
    sent = [request.headers.get("Authorization") for request in world.server.asked]
    assert "Bearer k-11111111" not in sent


# --- Many questions -----------------------------------------------------------------------------


def plan_random_faults(asked: Emulator) -> None:
    chance = random.Random(7)  # noqa: S311 - no secret
    faults = ["", "", "", "reset", "close", "html", "empty", "cut", "short", "reset-midway"]
    for name in ("cerebras", "groq"):
        replies = [Reply(fault=fault) for fault in faults]
        replies.append(rate_limited(name, how="none"))
        replies.append(error(name, "server"))
        replies.append(error(name, "too_long"))
        asked.plan(name, *(chance.choice(replies) for _ in range(1500)), Reply())


def test_threads_under_random_faults(here: Emulator) -> None:
    """64 threads on one object: the figures add up, and no request too many reaches a server."""
    plan_random_faults(here)
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

    told = []
    switches = 0
    for result in results:
        told += [(attempt.provider, attempt.model) for attempt in result.attempts]
        providers = [attempt.provider for attempt in result.attempts]
        switches += sum(before != after for before, after in zip(providers, providers[1:]))
        # What a limit refuses may cost no attempt, as long as others are answered.
        asked = [a.provider for a in result.attempts if a.status != 429]
        assert all(asked.count(name) <= 2 for name in providers)
        assert all(providers.count(name) <= 2 + 15 for name in providers)
        assert isinstance(result, Answer) or set(providers) == {"cerebras", "groq"}, result
    assert sorted(told) == sorted(trail(here))

    answered = sum(isinstance(result, Answer) for result in results)
    limited = sum(attempt.status == 429 for result in results for attempt in result.attempts)
    assert llm.get_stats() == {
        "total_requests": 320,
        "successful_requests": answered,
        "failed_requests": 320 - answered,
        "rate_limited_requests": limited,
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


def test_ask_many_gives_a_mistake_in_its_place(bare: Path) -> None:
    """A question that cannot be asked costs no other its answer, and nothing is sent for it."""
    world = World()
    questions: Any = ["Where?", "", {"question": "Where?", "max_tokens": 0}, 7, "Where?"]
    results = list(world.llm.ask_many(questions))
    assert [type(result) for result in results] == [
        Answer,
        ValueError,
        ValueError,
        ValueError,
        Answer,
    ]
    assert "question" in str(results[1])
    assert "max_tokens" in str(results[2])
    assert world.asked == "aa"


def test_ask_many_tells_of_a_mistake_that_all_share(bare: Path) -> None:
    """It is raised at once, before a question is read."""
    world = World()
    with pytest.raises(ValueError, match="workers"):
        world.llm.ask_many(iter(["Where?"]), max_workers=0)
    with pytest.raises(ValueError, match="max_tokens"):
        world.llm.ask_many(iter(["Where?"]), max_tokens=0)
    assert world.asked == ""


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
