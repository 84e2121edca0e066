"""What holds whatever happens: the right answer, an end in time, nothing lost, no key shown."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import re
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator
from urllib.parse import quote

import peers
import pytest
from conftest import until
from fakes import Asked, Crowd, FakeClock, Reply, World, event, fails, limited, row, says
from peers import EVENT_STREAM, SLACK, Peer, Serve, document, echo, page

from fallback_llm import (
    AllProvidersFailed,
    Answer,
    FallbackLLM,
    FallbackLLMError,
    NoProviderError,
    Provider,
    RetryConfig,
)

pytestmark = pytest.mark.usefixtures("bare")

ONCE = RetryConfig(max_attempts=1)
ONE = (row("one", "a"),)
BOTH = (row("one", "a"), row("two", "c"))
GONE = Reply(404, {"error": {"message": "Never heard of it", "code": "model_not_found"}})
SILENT = says("Late.", takes=1e6)


def listing(*models: str, **more: Any) -> Reply:
    return Reply(body={"data": [{"id": model} for model in models]}, **more)


def client(*urls: str, **settings: Any) -> FallbackLLM:
    """A client that asks these servers once each: one, two ..."""
    names = ("one", "two", "three")
    rows = [Provider(name, url, None, ("m",)) for name, url in zip(names, urls)]
    return FallbackLLM(ONCE, providers=rows, **settings)


@contextlib.contextmanager
def lasts_at_most(seconds: float) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds + SLACK


# --- Each question gets its own answer ----------------------------------------------------------


def interim(status: str, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode()


INTERIM = [
    pytest.param([interim("100 Continue")], id="100"),
    pytest.param([interim("102 Processing")], id="102"),
    pytest.param([interim("103 Early Hints", "Link: </a.css>; rel=preload")], id="103"),
    pytest.param([interim("103 Early Hints", "Content-Length: 5")], id="103 with a length"),
    pytest.param([interim("104 Upload Resumption")], id="104"),
    pytest.param([interim("199 Something New")], id="199"),
    pytest.param([interim("110")], id="without a reason"),
    pytest.param([interim("102 Processing")] * 3, id="several"),
    pytest.param([interim("100 Continue"), interim("103 Early Hints", "A: b")], id="of two kinds"),
]


@pytest.mark.parametrize("pause", [0.0, 0.05])
@pytest.mark.parametrize("first", INTERIM)
def test_interim_replies_are_skipped(serve: Serve, first: list[bytes], pause: float) -> None:
    """A reply of 1xx is none: the next one on the connection answers the same question."""

    def script(peer: Peer) -> None:
        while True:
            question = peer.read().question
            for reply in first:
                peer.send(reply)
                peer.pause(pause)
            peer.send(document(question))

    server = serve(script)
    llm = client(server.url)
    texts = [llm.ask(question) for question in ("one", "two", "three")]
    assert (texts, server.questions) == (["one", "two", "three"], ["one", "two", "three"])


WHOLE = document("Odd.")
BODY = WHOLE.partition(b"\r\n\r\n")[2]
ODD = [
    pytest.param(interim("101 Switching Protocols", "Upgrade: websocket"), id="101"),
    pytest.param(interim("204 No Content"), id="204"),
    pytest.param(interim("204 No Content", "Content-Length: 0"), id="204 with a length"),
    pytest.param(interim("304 Not Modified"), id="304"),
    pytest.param(interim("304 Not Modified", "Content-Length: 50"), id="304 with a length"),
    pytest.param(
        page(200, BODY, more="Transfer-Encoding: chunked\r\n").replace(BODY, b"")
        + (b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n"),
        id="a length and chunks",
    ),
    pytest.param(
        page(200, BODY, more=f"Content-Length: {len(BODY) + 3}\r\n") + b"abc", id="two lengths"
    ),
    pytest.param(page(200, BODY, more="Connection: close\r\n"), id="one that says that it ends"),
    pytest.param(WHOLE.replace(b"HTTP/1.1", b"HTTP/1.0"), id="HTTP/1.0"),
    pytest.param(WHOLE.replace(b"Content-Length: ", b"Content-Length: -"), id="a length below 0"),
    pytest.param(
        WHOLE.replace(b"Content-Length: ", b"Content-Length: x"), id="a length of letters"
    ),
]


@pytest.mark.parametrize("odd", ODD)
def test_a_connection_is_kept_after_an_ordinary_reply_only(serve: Serve, odd: bytes) -> None:
    """On the one that spoke oddly, each question would get the answer to the one before."""

    def script(peer: Peer) -> None:
        before = peer.read().question
        peer.send(odd)
        while True:
            question = peer.read().question
            peer.send(document(before))
            before = question

    server = serve(script)
    llm = client(server.url, idle_timeout=0.2)
    for question in ("first", "second", "third"):
        assert llm.ask(question) in ("", "Odd.")
    assert server.connections == 3


STREAM = EVENT_STREAM + b"Transfer-Encoding: chunked\r\n\r\n"
CHUNK = event("Odd.", "stop") + b"data: [DONE]\n\n"
STRAY = [
    pytest.param(WHOLE, b"\r\nAnd more.", id="more than its length"),
    pytest.param(WHOLE, document("Stray."), id="a second reply"),
    pytest.param(page(429, b"{}"), document("Stray."), id="an answer after a refusal"),
    pytest.param(page(503, b"Down."), document("Stray."), id="an answer after a fault"),
    pytest.param(WHOLE, page(408, b"{}"), id="a farewell"),
    pytest.param(
        STREAM + b"%x\r\n" % len(CHUNK) + CHUNK + b"\r\n0\r\n\r\n",
        document("Stray."),
        id="a reply after a stream",
    ),
]


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(("reply", "stray"), STRAY)
def test_what_nobody_asked_for_answers_nothing(
    serve: Serve, reply: bytes, stray: bytes, at_once: bool
) -> None:
    """What comes after a reply, with it or later, is not the answer to the next question."""
    is_sent = threading.Event()

    def script(peer: Peer) -> None:
        peer.read()
        peer.send(reply, stray if at_once else b"")
        if not at_once:
            peer.pause(0.05)
            peer.send(stray)
        is_sent.set()
        echo(peer)

    llm = client(serve(script).url)
    llm.ask("first")
    assert is_sent.wait(SLACK)
    assert llm.ask("second") in ("second", "Odd.", "")


LENGTHS = [
    pytest.param("Content-Length: 5\r\n", id="another one"),
    pytest.param("Content-Length: 99999\r\n", id="a longer one"),
    pytest.param("Content-Length: 5, 7\r\n", id="a list"),
]


@pytest.mark.parametrize("more", LENGTHS)
def test_a_reply_with_two_lengths(serve: Serve, more: str) -> None:
    """The server was reached and spoke nonsense: no trouble of the network."""
    server = serve(peers.replies(page(200, BODY, more=more)))
    other = serve(peers.says("Paris."))
    first = client(server.url, other.url).complete("Where?").attempts[0]
    assert first.verdict is not None
    assert first.verdict.name == "FAULT"
    assert "length" in first.reason.lower()
    assert "reach" not in first.reason


def test_a_length_that_is_told_twice(serve: Serve) -> None:
    """The same number is no contradiction."""
    server = serve(peers.replies(page(200, BODY, more=f"Content-Length: {len(BODY)}\r\n")))
    assert client(server.url).ask("Where?") == "Odd."


# --- Nobody waits for ever ----------------------------------------------------------------------


def test_the_list_of_a_gone_provider_comes_last() -> None:
    """It hangs; the second provider answers at once."""
    world = World({"a": [GONE], "b": [GONE], "one/models": [listing(takes=1e6)]}, timeout=6.0)
    assert (world.llm.ask("Where?"), world.clock.now) == ("C", 0.0)
    assert world.asked == "abc"


def test_a_list_gets_a_share_of_the_time() -> None:
    """Two providers are gone; the first list hangs, the second one has something."""
    script = {"a": [GONE], "c": [GONE], "one/models": [SILENT], "two/models": [listing("new")]}
    world = World(script, providers=BOTH, timeout=6.0)
    assert (world.llm.ask("Where?"), world.llm.models["two"]) == ("NEW", ["new"])
    assert world.clock.now < 6


@pytest.mark.parametrize("timeout", [1.0, 6.0, 60.0])
def test_a_list_that_hangs_ends_in_time(timeout: float) -> None:
    world = World({"a": [GONE], "one/models": [SILENT]}, providers=ONE, timeout=timeout)
    assert world.llm.ask("Where?") == ""
    assert world.clock.now <= timeout + 0.5


BAD_LISTS = [
    pytest.param([fails(503)], id="503"),
    pytest.param([limited(5)], id="429"),
    pytest.param([SILENT], id="silence"),
    pytest.param([Reply(error=ConnectionResetError("reset"))], id="no connection"),
    pytest.param([Reply(body="<html>Busy</html>")], id="a web page"),
    pytest.param([Reply(body={"data": None})], id="no list"),
    pytest.param([listing()], id="an empty list"),
    pytest.param([fails(503), fails(500), SILENT], id="several"),
]


@pytest.mark.parametrize("bad", BAD_LISTS)
def test_a_list_that_could_not_be_had_is_asked_for_again(bad: list[Reply]) -> None:
    """Later: a hiccup must not cost the provider all questions of a process."""
    script = {"a": [GONE], "one/models": [*bad, listing("new")]}
    world = World(script, providers=ONE, timeout=60.0)
    texts = []
    for _ in range(5):
        texts.append(world.llm.ask("Where?"))
        world.clock.wait(3600)
    assert texts[-1] == "NEW"


@pytest.mark.parametrize("threads", [2, 8, 40])
@pytest.mark.parametrize("takes", [0.2, 1.0, 5.0])
def test_who_needs_a_list_waits_for_it(threads: int, takes: float) -> None:
    """While one thread asks for it, the questions of the others are not lost."""
    gone = Reply(404, GONE.body, takes=0.01)
    script = {"a": [gone], "one/models": [listing("new", takes=takes)], "new": [says(takes=0.01)]}
    crowd = Crowd(threads, script, providers=ONE)
    crowd.ask(4 * threads)
    assert (crowd.lost, len(crowd.answers)) == (0, 4 * threads)
    lists = [asked for asked in crowd.server.asked if asked.model == "one/models"]
    assert len(lists) == 1


def test_who_needs_a_list_keeps_to_its_own_time_limit() -> None:
    script = {"a": [GONE], "one/models": [listing("new", takes=100.0)]}
    crowd = Crowd(4, script, providers=ONE, timeout=5.0)
    crowd.ask(4)
    assert crowd.took <= 5.5


SOON = [0.5, 1.0, 2.0]


@pytest.mark.parametrize("seconds", SOON)
def test_who_is_ready_soon_is_left_some_time(seconds: float) -> None:
    """The first one hangs, the second one's pause ends in time: the first is not given all."""
    world = World(
        {"a": [SILENT], "c": [limited(seconds), says("C")]}, max_attempts=1, providers=BOTH
    )
    world.llm.ask("Where?", provider="two")
    asked = world.clock.now
    assert world.llm.ask("Where?", timeout=6.0) == "C"
    assert world.clock.now - asked <= 6


def test_who_is_not_ready_in_time_is_left_none() -> None:
    """Then all of the time is the first one's."""
    script = {"a": [says("A", takes=5.5)], "c": [limited(30)]}
    world = World(script, max_attempts=1, providers=BOTH)
    world.llm.ask("Where?", provider="two")
    assert world.llm.ask("Where?", timeout=6.0) == "A"


@pytest.mark.parametrize("timeout", [1.0, 4.0, 19.0])
def test_a_silence_is_learned_under_a_short_time_limit(timeout: float) -> None:
    """Half of the limit is less than the idle timeout: the silence ends with the share."""
    script = {"a": [SILENT], "c": [says("C", takes=0.1)]}
    rows = [row("one", "a", idle_timeout=10.0), row("two", "c")]
    world = World(script, providers=rows, timeout=timeout)
    took = [world.llm.complete("Where?").elapsed for _ in range(6)]
    assert sum(seconds > 0.2 for seconds in took) <= 3
    assert took[-1] == pytest.approx(0.1)


def test_who_was_silent_once_is_asked_again_later() -> None:
    """What was learned is forgotten; a provider that has recovered is used again."""
    script = {"a": [SILENT] * 3 + [says("A", takes=0.1)], "c": [says("C", takes=0.1)]}
    rows = [row("one", "a", idle_timeout=10.0), row("two", "c")]
    world = World(script, providers=rows, timeout=4.0)
    for _ in range(40):
        text = world.llm.ask("Where?")
        world.clock.wait(30)
    assert text == "A"


# --- Time that our own work takes ---------------------------------------------------------------

BOMBS = [
    pytest.param(b"data: {}\n\n" * 600000, id="empty objects"),
    pytest.param(b": wait\n\n" * 1000000, id="comments"),
    pytest.param(b'data: {"choices": []}\n\n' * 400000, id="no choices"),
    pytest.param(b"\n" * 8000000, id="blank lines"),
    pytest.param(event("") * 150000, id="empty texts"),
]


@pytest.mark.parametrize("events", BOMBS)
def test_the_time_limit_holds_for_events_that_were_packed(serve: Serve, events: bytes) -> None:
    """A few kilobytes unpack to events that take many seconds to read."""
    packed = gzip.compress(events, 1)

    def script(peer: Peer) -> None:
        peer.read()
        peer.send(EVENT_STREAM, b"Content-Encoding: gzip\r\n")
        peer.send(b"Content-Length: %d\r\n\r\n" % (len(packed) + 9), packed)
        peer.pause(peers.FOR_EVER)

    llm = client(serve(script).url)
    started = time.process_time()
    assert llm.ask("Where?", timeout=0.2) == ""
    assert time.process_time() - started < 2.0  # of the processor: other programs do not count


def test_an_answer_has_a_ceiling() -> None:
    """What no model says is not read, however well it would parse."""
    pad = "x" * 12000000
    for body in (
        json.dumps({**says("A").body, "pad": pad}),
        b": " + pad.encode() + b"\n\n" + event("A", "stop"),
        event("A") + event(pad) + event("", "stop"),
    ):
        world = World({"a": [Reply(body=body)]})
        answer = world.llm.complete("Where?")
        verdict = answer.attempts[0].verdict
        assert verdict is not None
        assert (answer.text, verdict.name) == ("B", "FAULT")


def test_a_long_answer_is_read() -> None:
    """A million characters are far below the ceiling."""
    text = "word " * 200000
    assert World({"a": [says(text)]}).llm.ask("Where?") == text
    assert World({"a": [Reply(body=event(text) + event("", "stop"))]}).llm.ask("Where?") == text


def test_a_stream_of_many_events_is_read() -> None:
    """Each word comes with hundreds of bytes around it: the ceiling is for what is said."""
    frame = {"id": "chatcmpl-" + "0" * 40, "system_fingerprint": "f" * 120, "obfuscation": "x" * 90}
    body = event("word ", **frame) * 30000 + event("", "stop")
    assert len(body) > 10000000
    assert World({"a": [Reply(body=body)]}).llm.ask("Where?") == "word " * 30000


def test_a_list_has_a_ceiling() -> None:
    """A provider's list of models of many megabytes is none."""
    huge = {"data": [{"id": "new", "pad": "x" * 6000000}]}
    world = World({"a": [GONE], "one/models": [Reply(body=huge)]}, providers=ONE)
    assert world.llm.ask("Where?") == ""
    many = listing("new", *[f"other-{number}" for number in range(3000)])
    world = World({"a": [GONE], "one/models": [many]}, providers=ONE)
    assert world.llm.ask("Where?") == "NEW"


# --- Names that are looked up -------------------------------------------------------------------

Lookup = Callable[[], None]


@pytest.fixture
def look_up(monkeypatch: pytest.MonkeyPatch) -> Callable[[Lookup], None]:
    """Sets what happens while the name `slow.test`, which is this machine, is looked up."""
    real = socket.getaddrinfo

    def use(happens: Lookup) -> None:
        def getaddrinfo(host: Any, *arguments: Any, **more: Any) -> Any:
            if host in ("slow.test", b"slow.test"):
                happens()
                host = "127.0.0.1"
            return real(host, *arguments, **more)

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    return use


def named(server: peers.Server) -> str:
    return f"http://slow.test:{server.port}/v1"


def test_a_slow_name_server_leaves_time_to_connect(
    serve: Serve, look_up: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes longer than the connect timeout; after it the host is reached, if it is far away."""
    gone = [0.0]
    real = time.monotonic
    connect = socket.socket.connect
    given = []

    def connect_far(sock: socket.socket, address: Any) -> None:
        given.append(sock.gettimeout())
        connect(sock, address)

    def clock() -> float:
        return real() + gone[0]

    def take_long() -> None:
        gone[0] += 5.2

    look_up(take_long)
    server = serve(peers.says("Paris."))
    monkeypatch.setattr(time, "monotonic", clock)
    monkeypatch.setattr(socket.socket, "connect", connect_far)
    assert client(named(server), clock=clock).complete("Where?", timeout=60).text == "Paris."
    assert all(seconds is None or seconds >= 1 for seconds in given), given


def test_the_time_limit_holds_while_a_name_is_looked_up(serve: Serve, look_up: Any) -> None:
    answered = threading.Event()
    look_up(lambda: answered.wait(peers.FOR_EVER) and None)
    server = serve(echo)
    with lasts_at_most(0.3):
        assert client(named(server)).ask("Where?", timeout=0.3) == ""
    with lasts_at_most(0.6):
        assert client(named(server), server.url).ask("Where?", timeout=0.6) == "Where?"
    answered.set()


def test_a_name_that_is_unknown_is_told(look_up: Any) -> None:
    def fail() -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    look_up(fail)
    with pytest.raises(AllProvidersFailed, match=r"slow\.test"):
        client("http://slow.test:9/v1").complete("Where?", timeout=5)


# --- Slots and locks ----------------------------------------------------------------------------


class Handler(logging.Handler):
    """Calls a function for each record."""

    def __init__(self, function: Callable[[logging.LogRecord], object]) -> None:
        super().__init__()
        self.emit = function  # type: ignore[assignment,method-assign]


@contextlib.contextmanager
def handling(function: Callable[[logging.LogRecord], object]) -> Iterator[None]:
    """A handler of the program's own lines, down to DEBUG."""
    log = logging.getLogger("fallback_llm")
    level = log.level
    handler = Handler(function)
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


class Raiser:
    """Raises at the record of this number, counted from `ready`."""

    def __init__(self, error: Any, number: int) -> None:
        self.error, self.number, self.count = error, number, 0

    def __call__(self, _: logging.LogRecord) -> None:
        self.count += 1
        if self.count == self.number:
            raise self.error


ERRORS = [KeyboardInterrupt, SystemExit, RuntimeError, OSError, GeneratorExit]


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("error", ERRORS)
def test_an_error_in_a_log_handler_costs_no_slot(error: Any, number: int, live: bool) -> None:
    """Wherever it comes out, the next questions are asked as if nothing had been."""

    def reply(asked: Asked) -> Reply:
        odd = len([one for one in world.server.asked if one.model == asked.model]) % 2
        return limited(1) if odd else says("A")

    world = World({"a": [reply], "b": [fails(500)]}, providers=(row("one", "b", "a"),))
    for _ in range(70):
        with handling(Raiser(error, number)), contextlib.suppress(error):
            if live:
                "".join(world.llm.stream("Where?", timeout=60.0))
            else:
                world.llm.complete("Where?", timeout=60.0)
        world.clock.wait(60)
    started = world.clock.now
    assert world.llm.complete("Where?", timeout=60.0).text == "A"
    assert world.clock.now - started < 10


def test_an_error_of_the_callers_accept_costs_no_slot() -> None:
    def explode(_: str) -> bool:
        raise OSError("of the caller")

    world = World(providers=ONE)
    for _ in range(70):
        with pytest.raises(OSError, match="of the caller"):
            world.llm.complete("Where?", accept=explode, timeout=60.0)
    assert world.llm.complete("Where?", timeout=60.0).text == "A"
    assert world.slept == []


@pytest.mark.parametrize("remaining", [0, 1, 3, 9])
def test_a_log_handler_may_ask(remaining: int) -> None:
    """A nested question does not wait for the slot of the one that it interrupts."""
    left = [remaining]

    def reply(_: Asked) -> Reply:
        left[0] = max(0, left[0] - 1)
        headers = {"x-ratelimit-remaining-requests": str(left[0])}
        return Reply(200, says("A").body, headers)

    world = World({"a": [reply]}, providers=ONE)
    for _ in range(3):
        world.llm.ask("Where?")
    texts: list[str] = []
    busy: list[bool] = []

    def ask(record: logging.LogRecord) -> None:
        if busy:
            return
        busy.append(True)
        try:
            texts.append(world.llm.ask(f"Summarize: {record.getMessage()}", timeout=30.0))
        finally:
            busy.clear()

    with handling(ask):
        assert world.llm.ask("Where?", timeout=60.0) == "A"
    assert texts
    assert set(texts) == {"A"}


def test_a_log_handler_may_look(caplog: pytest.LogCaptureFixture) -> None:
    world = World({"a": [limited(1), says("A")]})
    seen = []
    with handling(lambda _: seen.append((world.llm.get_stats(), world.llm.provider_health))):
        assert world.llm.ask("Where?") == "A"
    assert len(seen) >= 4


LOOKS: Any = {
    "get_stats": lambda llm: llm.get_stats(),
    "reset_stats": lambda llm: llm.reset_stats(),
    "provider_health": lambda llm: llm.provider_health,
    "models": lambda llm: (llm.models, llm.api_keys, llm.fallback_order),
    "repr": repr,
}


@pytest.mark.parametrize("look", list(LOOKS.values()), ids=list(LOOKS))
def test_a_signal_handler_may_look_at_any_moment(look: Any) -> None:
    """It runs between any two lines of its own thread, which may hold any lock just then."""
    script = {"a": [limited(1), fails(500), says("A")], "b": [GONE], "c": [fails(401)]}
    world = World(script)
    looks = [0]

    def trace(frame: Any, kind: str, _: object) -> Any:
        if not frame.f_code.co_filename.endswith("fallback_llm.py"):
            return None
        if kind == "line":
            looks[0] += 1
            look(world.llm)
        return trace

    def ask() -> None:
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            for _ in range(3):
                world.llm.ask("Where?")
        finally:
            sys.settrace(before)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    last = -1
    while thread.is_alive():
        thread.join(SLACK)
        assert not thread.is_alive() or looks[0] != last, "it waits for its own lock"
        last = looks[0]
    assert looks[0] > 500


# --- Nothing is lost ----------------------------------------------------------------------------

DELAYS: Any = [
    {"base_delay": 0, "max_delay": 0},
    {"base_delay": 0.01, "max_delay": 0.02},
    {"base_delay": 0, "max_delay": 0, "max_attempts": 1},
    {},
]


@pytest.mark.parametrize("config", DELAYS, ids=str)
@pytest.mark.parametrize("threads", [33, 64, 128])
def test_a_crowd_without_a_limit_loses_nothing(threads: int, config: Any) -> None:
    """However short the waits may be: our own hold is never a reason to give up."""
    crowd = Crowd(threads, {"a": [says(takes=0.3)]}, providers=ONE, **config)
    crowd.ask(3 * threads)
    assert (crowd.lost, len(crowd.answers)) == (0, 3 * threads)


@pytest.mark.parametrize("timeout", [0.7, 1.0, 5.0])
def test_a_crowd_with_a_time_limit_loses_nothing(timeout: float) -> None:
    """Whoever would wait past its limit asks all the same."""
    crowd = Crowd(64, {"a": [says(takes=0.3)]}, providers=ONE, timeout=timeout)
    crowd.ask(192)
    assert (crowd.lost, [error.attempts for error in crowd.errors]) == (0, [])


@pytest.mark.parametrize("threads", [8, 32, 64])
@pytest.mark.parametrize("hint", [60.0, 4.0, None])
def test_nothing_is_lost_beside_a_provider_without_a_limit(threads: int, hint: Any) -> None:
    """The first one is soon rate-limited, the second one answers in a second, for all."""

    def first(asked: Asked) -> Reply:
        begun[0] += 1
        return says("A", takes=0.3) if begun[0] <= 6 else limited(hint)

    begun = [0]
    script = {"a": [first], "c": [says("C", takes=1.0)]}
    crowd = Crowd(threads, script, providers=BOTH, timeout=5.0)
    crowd.ask(6 * threads)
    assert (crowd.lost, len(crowd.answers)) == (0, 6 * threads)


class Window:
    """So many answers in each minute, then refusals that do not say when to come back."""

    def __init__(self, limit: int) -> None:
        self.limit, self.minute, self.taken = limit, -1, 0

    def __call__(self, asked: Asked) -> Reply:
        minute = int(asked.at // 60)
        if minute != self.minute:
            self.minute, self.taken = minute, 0
        self.taken += 1
        return says("A", takes=3.0) if self.taken <= self.limit else limited(takes=0.05)


@pytest.mark.parametrize("threads", [16, 64])
@pytest.mark.parametrize("limit", [20, 60])
def test_nothing_is_lost_to_a_limit_that_gives_no_hint(threads: int, limit: int) -> None:
    """The quota would hold all questions: no attempts are wasted on the minute's rest."""
    crowd = Crowd(threads, {"a": [Window(limit)]}, providers=ONE)
    crowd.ask(120)
    assert crowd.lost == 0


# --- What the caller changes or closes meanwhile ------------------------------------------------


CHANGES: Any = {
    "its key": lambda llm: llm.api_keys.update(one=None),
    "all keys": lambda llm: llm.api_keys.clear(),
    "its models": lambda llm: llm.models.update(one=[]),
    "its place": lambda llm: llm.fallback_order.remove("one"),
    "all places": lambda llm: llm.fallback_order.clear(),
}


@pytest.mark.parametrize("reply", [GONE, fails(401), fails(500), limited(99)])
@pytest.mark.parametrize("change", list(CHANGES.values()), ids=list(CHANGES))
def test_a_change_while_a_question_runs(change: Any, reply: Reply) -> None:
    """It is for the next question; this one goes on with whom it had."""
    again = Reply(reply.status, reply.body, reply.headers, meanwhile=lambda: change(world.llm))
    rows = [row("one", "a", key_env="ONE_KEY"), row("two", "c", key_env="TWO_KEY")]
    keys = {"one": "k-11111111", "two": "k-22222222"}
    world = World({"a": [again]}, providers=rows, api_keys=keys, max_attempts=1)
    assert (world.llm.complete("Where?").text, world.asked) == ("C", "ac")


class Gate:
    """Sleep that lasts until it is opened."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.waiting = 0
        self.clock = FakeClock()

    def sleep(self, seconds: float) -> None:
        self.waiting += 1
        self.open.wait(peers.FOR_EVER)
        self.clock.wait(seconds)


def test_a_closed_batch_sends_nothing_more() -> None:
    """Its questions wait out a rate limit when it is closed; nobody would read their answers."""
    gate = Gate()
    questions = [str(number) for number in range(9)]

    def reply(asked: Asked) -> Reply:
        if asked.body["messages"][-1]["content"] == "0":
            return says("A")
        return limited(1.5)

    before = threading.active_count()
    world = World({"a": [reply]}, gate.clock, providers=ONE, sleep=gate.sleep)
    answers = world.llm.ask_many(questions, max_workers=9)
    first = next(answers)
    assert isinstance(first, Answer)
    until(lambda: gate.waiting >= 8)
    asked = len(world.server.asked)
    closing = threading.Thread(target=answers.close)  # type: ignore[attr-defined]
    closing.start()
    closing.join(0.3)  # it may wait for the threads
    gate.open.set()
    closing.join()
    until(lambda: threading.active_count() <= before)
    assert len(world.server.asked) == asked


def test_a_batch_that_is_closed_at_once_sends_nothing() -> None:
    world = World()
    answers = world.llm.ask_many(["Where?"] * 9)
    answers.close()  # type: ignore[attr-defined]
    assert world.asked == ""


# --- Keys ---------------------------------------------------------------------------------------

KEY = "Zk8Qw2Lr6Xb4Vh1Pc9Fj3Ms7Ga5EoTyU"  # of no known form
GROQ_KEY = "gsk_Wq5Nz0Dk8Yt2Lr6Xb4Vh1Pc9Fj3Ms7Ga5Eo"
KEYS = [GROQ_KEY, "sk-or-v1-" + "0a1b2c3d" * 8, "csk-" + "k5m2x8q4" * 6, "sk-proj-" + KEY, KEY]
LONGEST = 7  # characters of a key that may be seen


def shown_of(key: str, text: str) -> int:
    """How many characters of it stand in a text, one after the other."""
    pieces = [key[at : at + LONGEST + 1] for at in range(len(key) - LONGEST)]
    return sum(piece.lower() in text.lower() for piece in pieces)


def told(world: World, caplog: pytest.LogCaptureFixture) -> str:
    """All that is told of a question that fails."""
    caplog.set_level(logging.DEBUG)
    with pytest.raises(FallbackLLMError) as failed:
        world.llm.complete("Where?")
    error = failed.value
    return "\n".join([caplog.text, str(error), repr(error), repr(vars(error))])


def refusing(reply: Reply, key: str = KEY) -> World:
    rows = [row("one", "a", key_env="ONE_KEY")]
    return World({"a": [reply]}, providers=rows, api_keys={"one": key}, max_attempts=1)


FORMS: Any = {
    "the title of a page": lambda text: Reply(403, f"<html><title>{text}</title></html>"),
    "a page without a title": lambda text: Reply(502, f"<html><body><p>{text}</p></body></html>"),
    "text": lambda text: Reply(500, text),
    "a message": lambda text: Reply(400, {"error": {"message": text}}),
    "a field": lambda text: Reply(422, {"detail": [{"msg": text}]}),
    "inside a 200": lambda text: Reply(200, {"error_message": text}),
    "inside a stream": lambda text: Reply(200, event(error={"message": text})),
    "a refusal": lambda text: Reply(
        403, {"error": {"message": text, "code": "content_policy_violation"}}
    ),
}


@pytest.mark.parametrize("blank", ["x", "x ", "%20"])
@pytest.mark.parametrize("form", list(FORMS.values()), ids=list(FORMS))
def test_no_half_of_a_key_stays_where_a_text_is_cut(
    form: Any, blank: str, caplog: pytest.LogCaptureFixture
) -> None:
    """However long what stands before it is: it is masked first, and cut then."""
    for length in range(20, 420, 7):
        pad = (blank * length)[:length]
        reply = form(f"{pad}&key={KEY}&then={'y' * 400}")
        assert shown_of(KEY, told(refusing(reply), caplog)) == 0, length
        caplog.clear()


@pytest.mark.parametrize("form", list(FORMS.values()), ids=list(FORMS))
def test_no_half_of_another_key_stays_either(form: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A key that is not ours is known by its beginning."""
    for length in range(20, 420, 7):
        reply = form(f"{'x' * length}={GROQ_KEY}&then={'y' * 400}")
        assert shown_of(GROQ_KEY[4:], told(refusing(reply), caplog)) == 0, length
        caplog.clear()


ODD_KEY = "ab+Cd/eF12=gH34&iJ56%kL78?mN90"
ECHOES = [
    ODD_KEY,
    ODD_KEY.upper(),
    ODD_KEY.lower(),
    ODD_KEY.swapcase(),
    quote(ODD_KEY),
    quote(ODD_KEY, safe=""),
    quote(ODD_KEY, safe="").lower(),
    f"Bearer%20{quote(ODD_KEY, safe='')}",
    f"'{ODD_KEY}'",
    f"key={ODD_KEY}&x=1",
]


@pytest.mark.parametrize("echoed", ECHOES)
@pytest.mark.parametrize("form", list(FORMS.values()), ids=list(FORMS))
def test_a_key_that_is_written_in_another_way(
    form: Any, echoed: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In a URL, in any case, among others."""
    text = told(refusing(form(f"No: {echoed} is wrong"), ODD_KEY), caplog)
    letters = re.sub(r"%(25)?[0-9a-fA-F]{2}|[^a-zA-Z0-9]", "", text).lower()
    plain = re.sub("[^a-zA-Z0-9]", "", ODD_KEY).lower()
    assert plain not in letters
    assert shown_of(ODD_KEY, text) == 0


@pytest.mark.parametrize("key", ["k", "no", "key"])
def test_a_short_key_garbles_no_message(key: str, caplog: pytest.LogCaptureFixture) -> None:
    """A local server's key may be a letter; it is no secret, and stands in many a word."""
    words = "The key of a local knight is known, notice all of it"
    assert words in told(refusing(Reply(400, {"error": {"message": words}}), key), caplog)


IDS = ["org-AbCdEfGh12345678IjKl", "org_01jq8m3x5v7n2k4p6r8t", "proj_AbCdEfGh12345678IjKl"]
IDS += ["user-AbCdEfGh12345678IjKl", "user_2abcdefgh0123456789", "proj-0123456789abcdef"]


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("form", list(FORMS.values()), ids=list(FORMS))
def test_ids_of_accounts_are_not_shown(
    form: Any, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """They stand in many a provider's errors, and logs are shared."""
    text = told(refusing(form(f"Rate limit reached in organization {name} on requests")), caplog)
    assert shown_of(name[5:], text) == 0
    assert "Rate limit reached" in text


def assign(llm: FallbackLLM, name: str, value: object) -> None:
    setattr(llm, name, value)
    llm.ask("Where?")


def mistakes(key: str) -> Iterator[Any]:
    """Calls that put a key in the place of something else."""
    wrong: Any = FallbackLLM
    config: Any = RetryConfig
    make: Any = Provider
    url = "https://one/v1"
    world: Any = World(providers=ONE)
    llm: Any = world.llm
    yield "FallbackLLM(key)", lambda: wrong(key)
    yield "FallbackLLM({name: key})", lambda: wrong({"groq": key})
    yield "api_keys=key", lambda: wrong(api_keys=key)
    yield "api_keys=[key]", lambda: wrong(api_keys=[key])
    yield "api_keys={key: name}", lambda: wrong(api_keys={key: "groq"})
    yield "api_keys={key: key}", lambda: wrong(api_keys={key: key})
    yield "timeout=key", lambda: wrong(timeout=key)
    yield "idle_timeout=key", lambda: wrong(idle_timeout=key)
    yield "providers=key", lambda: wrong(providers=key)
    yield "providers=[key]", lambda: wrong(providers=[key])
    yield "RetryConfig(key)", lambda: config(key)
    yield "RetryConfig(base_delay=key)", lambda: config(base_delay=key)
    yield "ask(q, key)", lambda: llm.ask("Where?", key)
    yield "ask(q, 500, key)", lambda: llm.ask("Where?", 500, key)
    yield "ask(provider=[key])", lambda: llm.ask("Where?", provider=[key])
    yield "ask(timeout=key)", lambda: llm.ask("Where?", timeout=key)
    yield "ask(temperature=key)", lambda: llm.ask("Where?", temperature=key)
    yield "ask(accept=key)", lambda: llm.ask("Where?", accept=key)
    yield "ask(messages=key)", lambda: llm.ask("Where?", messages=key)
    yield "ask(messages=[key])", lambda: llm.ask("Where?", messages=[key])
    yield "ask(model=provider:key)", lambda: llm.ask("Where?", model=f"nobody:{key}", provider=key)
    yield "ask(key=...)", lambda: llm.ask("Where?", **{key: 1})
    yield "stream(q, 500, key)", lambda: list(llm.stream("Where?", 500, key))
    yield "ask_many(key)", lambda: llm.ask_many(key)
    yield "ask_many(max_workers=key)", lambda: llm.ask_many(["Where?"], key)
    yield "key_env=key", lambda: make("mine", url, key, ("m",))
    yield "Provider(key)", lambda: make(key + "!", url, None, ("m",))
    yield "Provider(models=key)", lambda: make("mine", url, None, key)
    yield "Provider(idle_timeout=key)", lambda: make("mine", url, None, ("m",), key)
    yield "retry_config = key", lambda: assign(llm, "retry_config", key)
    yield "timeout = key", lambda: assign(llm, "timeout", key)
    yield "fallback_order = [key]", lambda: assign(llm, "fallback_order", [key])
    yield "models = {key: ...}", lambda: assign(llm, "models", {key: ["m"]})
    yield "api_keys = key", lambda: assign(llm, "api_keys", key)


@pytest.mark.parametrize("key", KEYS, ids=["groq", "openrouter", "cerebras", "openai", "unknown"])
@pytest.mark.parametrize("place", [name for name, _ in mistakes("k")])
def test_a_key_in_the_wrong_place_is_not_repeated(place: str, key: str) -> None:
    """The mistake is named, and whatever may be a key is only described."""
    with pytest.raises((ValueError, TypeError)) as refused:
        dict(mistakes(key))[place]()
    error: Any = refused.value
    while error is not None:
        assert shown_of(key, f"{error} {error!r}") == 0
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert str(refused.value)


@pytest.mark.parametrize("key", KEYS[:4])
def test_a_key_as_a_model_is_not_sent(key: str) -> None:
    """A text that begins as keys do is no model; sent, it would go to a stranger."""
    world = World()
    with pytest.raises(ValueError, match="model") as refused:
        world.llm.ask("Where?", model=key)
    assert shown_of(key, str(refused.value)) == 0
    assert world.asked == ""


UNREAD = ["${MY_GROQ}", "${MY_GROQ:-none}", "$MY_GROQ", "$(pass show groq)"]
COMMENTED = ["gsk_0123456789abcdefghij#mine", "gsk_0123456789abcdefghij # mine", "gsk_0123 # old"]


@pytest.mark.parametrize("where", ["the environment", "a file"])
@pytest.mark.parametrize("value", UNREAD + COMMENTED)
def test_a_key_that_was_not_read_as_it_was_meant(
    value: str,
    where: str,
    bare: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A reference that nobody followed, a comment: it is told, and not sent."""
    monkeypatch.setenv("MY_GROQ", KEY)
    if where == "a file":
        (bare / ".env").write_text(f"ONE_KEY='{value}'\n")
    else:
        monkeypatch.setenv("ONE_KEY", value)
    rows = [row("one", "a", key_env="ONE_KEY"), row("two", "c")]

    world = World(providers=rows[:1])
    with pytest.raises(NoProviderError, match="ONE_KEY") as refused:
        world.llm.complete("Where?")
    sign = "#" if "#" in value else "$"
    assert sign in str(refused.value)
    assert "0123456789" not in str(refused.value)
    assert world.asked == ""

    caplog.clear()
    world = World(providers=rows)
    assert (world.llm.ask("Where?"), world.asked) == ("C", "c")
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert [line for line in warnings if "ONE_KEY" in line and sign in line]
    assert "0123456789" not in caplog.text


@pytest.mark.parametrize("key", [*KEYS, "local", "k", "a-b_c.d~e", "q7" * 150])
def test_a_key_of_any_ordinary_form_is_sent(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused is what cannot be meant."""
    monkeypatch.setenv("ONE_KEY", key)
    world = World(providers=[row("one", "a", key_env="ONE_KEY")])
    assert world.llm.ask("Where?") == "A"
    assert world.server.asked[0].headers["Authorization"] == f"Bearer {key}"


def work_of(function: Callable[[], object]) -> int:
    """How much work it is: the calls that are made, which other programs do not change."""
    calls = [0]

    def count(*_: object) -> None:
        calls[0] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(before)
    return calls[0]


def test_keys_that_change_all_the_time_cost_nothing() -> None:
    """Some old ones may be remembered, to be masked; but each new one is about as little work."""
    rows = [row("one", "a", key_env="ONE_KEY"), row("two", "c")]
    reply = Reply(400, {"error": {"message": "No. " * 50}})
    world = World({"a": [reply]}, providers=rows, api_keys={"one": "k" * 40})

    def use(first: int, count: int) -> None:
        for number in range(first, first + count):
            world.llm.api_keys["one"] = f"user-key-{number:06}-abcdefghijklmnop"
            assert world.llm.ask("Where?") == "C"

    use(0, 17)
    early = work_of(lambda: use(17, 3))
    for number in (20, 50, 80, 110, 140):
        use(number, 27)
        assert work_of(lambda: use(number + 27, 3)) < 2.5 * early  # noqa: B023 - it is used at once
