"""What hostile and broken networks do: raw sockets, forks, proxies, dripped bytes, echoed keys."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Iterator, List

import pytest
from emulator import Emulator, dead_address
from fakes import DONE, event
from peers import (
    EVENT_STREAM,
    FOR_EVER,
    SLACK,
    Peer,
    Script,
    Serve,
    Server,
    document,
    echo,
    page,
    replies,
    says,
)

from fallback_llm import (
    AllProvidersFailed,
    Answer,
    Attempt,
    FallbackLLM,
    Provider,
    RetryConfig,
    StreamInterrupted,
)

LIMIT = 0.2  # seconds after which an attack is given up
ONCE = RetryConfig(max_attempts=1)
KEY = "k-0123456789abcdefghijklmnop"
ROOT = Path(__file__).resolve().parent.parent


def row(name: str, url: str, idle_timeout: float = 60.0) -> Provider:
    return Provider(name, url, None, ("m",), idle_timeout)


def client(*servers: Server, idle_timeout: float = 60.0, **settings: Any) -> FallbackLLM:
    """A client that asks these servers: one, two ... The idle timeout is that of the first."""
    names = ("one", "two", "three")
    rows = [row(name, server.url) for name, server in zip(names, servers)]
    rows[0] = row("one", servers[0].url, idle_timeout)
    return FallbackLLM(settings.pop("config", ONCE), providers=rows, **settings)


@contextlib.contextmanager
def lasts_at_most(seconds: float) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds + SLACK


def buffered(llm: FallbackLLM, **arguments: Any) -> str:
    return llm.complete("Where?", **arguments).text


def live(llm: FallbackLLM, **arguments: Any) -> str:
    return "".join(llm.stream("Where?", **arguments))


def failed_attempt(llm: FallbackLLM) -> Attempt:
    """The first attempt of a question that another provider answers."""
    answer = llm.complete("Where?")
    assert answer.text == "Paris."
    return answer.attempts[0]


def failure_of(llm: FallbackLLM) -> str:
    """The message of a question that nobody answers."""
    with pytest.raises(AllProvidersFailed) as failed:
        llm.complete("Where?")
    return str(failed.value)


both = pytest.mark.parametrize("verb", [buffered, live])


# --- Forks --------------------------------------------------------------------------------------

FORK_AND_ASK = """
import os, signal, sys
from fallback_llm import FallbackLLM, Provider

llm = FallbackLLM(providers=[Provider("echo", sys.argv[1], None, ("m",))])
assert llm.complete("before").text == "before"   # its connection is kept


def wrong(name):
    signal.alarm(60)                             # who hangs is killed
    asked = [f"{name} {number}" for number in range(50)]
    return sum(llm.complete(question).text != question for question in asked)


def begin_together():
    os.close(writer)
    os.read(reader, 1)
"""

OS_FORK = (
    FORK_AND_ASK
    + """
reader, writer = os.pipe()
children = []
for number in range(4):
    child = os.fork()
    if child == 0:
        begin_together()
        os._exit(wrong(f"child {number}"))
    children.append(child)
begin_together()
mistakes = [wrong("parent")]
for child in children:
    mistakes.append(os.waitpid(child, 0)[1])
print(mistakes)
"""
)

MULTIPROCESSING_FORK = (
    FORK_AND_ASK
    + """
import multiprocessing

with multiprocessing.get_context("fork").Pool(4) as pool:
    result = pool.map_async(wrong, ["a", "b", "c", "d"], 1)
    mistakes = [wrong("parent"), *result.get(60)]
print(mistakes)
"""
)

FORK_AMONG_THREADS = """
import itertools, os, signal, sys, threading
from fallback_llm import FallbackLLM, Provider

llm = FallbackLLM(providers=[Provider("echo", sys.argv[1], None, ("m",))])
over = threading.Event()
wrong = []


def ask(name):
    for number in itertools.count():
        question = f"{name} {number}"
        if llm.complete(question).text != question:
            wrong.append(question)
        if over.is_set():
            return


threads = [threading.Thread(target=ask, args=(f"thread {number}",)) for number in range(4)]
for thread in threads:
    thread.start()
statuses = set()
for number in range(20):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(llm.complete(f"child {number}").text != f"child {number}")
    statuses.add(os.waitpid(child, 0)[1])
over.set()
for thread in threads:
    thread.join()
print(sorted(statuses), wrong)
"""


def output_of(script: str, url: str, folder: Path) -> str:
    """What a script prints that was given the URL, in a process of its own."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script, url]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=str(folder), env=environment, stdout=subprocess.PIPE, timeout=120, check=True
    )
    return done.stdout.decode().strip()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize(
    "script", [pytest.param(OS_FORK, id="os"), pytest.param(MULTIPROCESSING_FORK, id="pool")]
)
def test_processes_do_not_get_the_answers_of_others(bare: Path, serve: Serve, script: str) -> None:
    """After a fork, parent and children ask at the same time over connections of their own."""
    server = serve(echo)
    assert output_of(script, server.url, bare) == "[0, 0, 0, 0, 0]"
    assert len(server.requests) == 1 + 5 * 50
    assert server.connections >= 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_while_threads_ask(bare: Path, serve: Serve) -> None:
    """A child does not inherit a lock that some thread holds just then."""
    assert output_of(FORK_AMONG_THREADS, serve(echo).url, bare) == "[0] []"


# --- Streams that mislead -----------------------------------------------------------------------


@both
def test_a_finish_reason_in_every_chunk_is_not_the_end(serve: Serve, verb: Any) -> None:
    """Some gateways send it; the answer ends with [DONE], which has a second after each."""

    def script(peer: Peer) -> None:
        peer.read()
        peer.send(EVENT_STREAM, b"\r\n")
        for number in range(4):
            peer.pause(0.4 if number else 0)
            peer.send(event(f"{number} ", "stop"))
        peer.send(DONE)

    assert verb(client(serve(script))) == "0 1 2 3 "


HEARTBEATS = [
    pytest.param(b": keep-alive\n\n", id="comment"),
    pytest.param(b"event: ping\ndata: {}\n\n", id="ping"),
    pytest.param(b'event: ping\ndata: {"type": "ping"}\n\n', id="ping with a type"),
    pytest.param(b"data: {}\n\n", id="empty object"),
    pytest.param(b"data:\n\n", id="empty data"),
    pytest.param(b'data: {"choices": []}\n\n', id="no choices"),
    pytest.param(event(""), id="empty text"),
    pytest.param(event(" "), id="white space as text"),
    pytest.param(event("\n"), id="new lines as text"),
    pytest.param(b"\n", id="blank lines"),
    pytest.param(b" ", id="blanks"),
]


@both
@pytest.mark.parametrize("heartbeat", HEARTBEATS)
def test_heartbeats_are_not_progress(serve: Serve, verb: Any, heartbeat: bytes) -> None:
    """However long they go on, the idle timeout ends the attempt."""

    def script(peer: Peer) -> None:
        peer.read()
        peer.send(EVENT_STREAM, b"\r\n", event(None))
        peer.repeat(heartbeat)

    llm = client(serve(script), serve(says("Paris.")), idle_timeout=LIMIT)
    with lasts_at_most(LIMIT):
        assert verb(llm) == "Paris."


@both
def test_heartbeats_between_the_words_do_no_harm(serve: Serve, verb: Any) -> None:
    def script(peer: Peer) -> None:
        peer.read()
        peer.send(EVENT_STREAM, b"\r\n")
        peer.send(b"".join(event("word ") + beat for beat in beats))
        peer.send(event(None, "stop"), DONE)

    beats = [b": keep-alive\n\n", b"event: ping\ndata: {}\n\n", b"data: {}\n\n", b"data:\n\n"]
    assert verb(client(serve(script))) == "word word word word "


@pytest.mark.parametrize("blank", [" ", "\n", "\u200b"])
def test_blanks_after_a_word_are_not_progress(serve: Serve, blank: str) -> None:
    """A model that is caught in a loop writes new lines without end."""

    def script(peer: Peer) -> None:
        peer.read()
        peer.send(EVENT_STREAM, b"\r\n", event("Once"))
        peer.repeat(event(blank))

    with lasts_at_most(LIMIT):
        llm = client(serve(script), serve(says("Paris.")), idle_timeout=LIMIT)
        assert buffered(llm) == "Paris."
    with lasts_at_most(0.5), pytest.raises(StreamInterrupted):
        live(client(serve(script), serve(says("Paris.")), idle_timeout=0.5))


def test_a_malformed_event_ends_a_buffered_answer(serve: Serve) -> None:
    """It can no longer become one, so it is not read to its end."""

    def script(peer: Peer) -> None:
        peer.read()
        peer.send(EVENT_STREAM, b"\r\n", event("Once "), b'data: {"choices": [{"del\n\n')
        peer.repeat(event("upon "))

    llm = client(serve(script), serve(says("Paris.")))
    with lasts_at_most(0):
        attempt = failed_attempt(llm)
    assert attempt.verdict is not None
    assert attempt.verdict.name == "FAULT"


@both
def test_errors_that_are_nested_almost_too_deep(serve: Serve, verb: Any) -> None:
    """Python's limit of recursion may be met anywhere, in json or in our own looking."""
    depths = range(800, 1000)
    bodies = iter([nested(depth, "message") for depth in depths])

    def script(peer: Peer) -> None:
        while True:
            peer.read()
            peer.send(page(400, next(bodies)))

    llm = client(serve(script), serve(says("Paris.")))
    for _ in depths:
        assert verb(llm) == "Paris."


def nested(depth: int, name: str = "error") -> bytes:
    """An error in an error in an error ..."""
    return b'{"error": ' + b'{"%s": ' % name.encode() * depth + b'"no"' + b"}" * (depth + 1)


@both
@pytest.mark.parametrize("depth", [100, 985, 5000, 100000])
@pytest.mark.parametrize("status", [200, 400, 500])
def test_an_error_nested_deep(serve: Serve, verb: Any, status: int, depth: int) -> None:
    """It is an error like others, whatever Python's limit of recursion."""
    first = serve(replies(page(status, nested(depth))))
    assert verb(client(first, serve(says("Paris.")))) == "Paris."


@both
@pytest.mark.parametrize("depth", [100, 985, 5000, 100000])
def test_an_error_nested_deep_in_a_stream(serve: Serve, verb: Any, depth: int) -> None:
    def script(peer: Peer) -> None:
        peer.read()
        peer.send(EVENT_STREAM, b"\r\ndata: ", nested(depth), b"\n\n")

    assert verb(client(serve(script), serve(says("Paris.")))) == "Paris."


@both
@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip", "deflate", "gzip, gzip", "nonsense"])
def test_a_body_that_is_not_encoded_as_it_says(serve: Serve, verb: Any, encoding: str) -> None:
    """It is read as it is, or it is a fault; never an exception of a library."""
    body = document("Rome.").partition(b"\r\n\r\n")[2]
    first = serve(replies(page(200, body, more=f"Content-Encoding: {encoding}\r\n")))
    assert verb(client(first, serve(says("Paris.")))) in ("Rome.", "Paris.")


@both
def test_a_body_that_grows_when_it_is_unpacked(serve: Serve, verb: Any) -> None:
    """A hundred kilobytes become a hundred megabytes: a reply has a ceiling."""
    packed = gzip.compress(b" " * 100000000)
    first = serve(replies(page(200, packed, more="Content-Encoding: gzip\r\n")))
    assert verb(client(first, serve(says("Paris.")))) == "Paris."


# --- Time limits --------------------------------------------------------------------------------


def drips_its_status_line(peer: Peer) -> None:
    peer.read()
    peer.send(b"HTTP/1.1 200 ")
    peer.repeat(b"O")


def drips_a_header(peer: Peer) -> None:
    peer.read()
    peer.send(EVENT_STREAM, b"X-Long: ")
    peer.repeat(b"a")


def drips_headers(peer: Peer) -> None:
    peer.read()
    peer.send(EVENT_STREAM)
    peer.repeat(b"X-Many: a\r\n")


def continues_for_ever(peer: Peer) -> None:
    peer.read()
    peer.repeat(b"HTTP/1.1 100 Continue\r\n\r\n")


def drips_a_chunk_size(peer: Peer) -> None:
    peer.read()
    peer.send(EVENT_STREAM, b"Transfer-Encoding: chunked\r\n\r\n")
    peer.repeat(b"0")


def drips_a_chunk_extension(peer: Peer) -> None:
    peer.read()
    peer.send(EVENT_STREAM, b"Transfer-Encoding: chunked\r\n\r\n10;name=")
    peer.repeat(b"a")


def drips_trailers(peer: Peer) -> None:
    peer.read()
    peer.send(EVENT_STREAM, b"Transfer-Encoding: chunked\r\n\r\n")
    peer.send_chunk(b": nothing was said\n\n")
    peer.send(b"0\r\n")
    peer.repeat(b"X-Trailer: a\r\n")


DRIPS = [
    drips_its_status_line,
    drips_a_header,
    drips_headers,
    continues_for_ever,
    drips_a_chunk_size,
    drips_a_chunk_extension,
    drips_trailers,
]


@both
@pytest.mark.parametrize("script", DRIPS)
def test_the_time_limit_holds_for_drips(serve: Serve, verb: Any, script: Script) -> None:
    """A socket's own timeout would begin anew with each byte."""
    llm = client(serve(script))
    with lasts_at_most(LIMIT), pytest.raises(AllProvidersFailed):
        verb(llm, timeout=LIMIT)


@both
@pytest.mark.parametrize("script", DRIPS)
def test_the_idle_timeout_holds_for_drips(serve: Serve, verb: Any, script: Script) -> None:
    """Without a time limit, too, the next provider is asked."""
    llm = client(serve(script), serve(says("Paris.")), idle_timeout=LIMIT)
    with lasts_at_most(LIMIT):
        assert verb(llm) == "Paris."


@both
def test_trailers_after_done_are_not_waited_for(serve: Serve, verb: Any) -> None:
    """The answer is whole, and given."""

    def script(peer: Peer) -> None:
        peer.read()
        peer.send(EVENT_STREAM, b"Transfer-Encoding: chunked\r\n\r\n")
        peer.send_chunk(event("Paris.", "stop") + DONE)
        peer.send(b"0\r\n")
        peer.repeat(b"X-Trailer: a\r\n")

    with lasts_at_most(0):
        assert verb(client(serve(script))) == "Paris."


@both
def test_words_after_done_are_not_waited_for(serve: Serve, verb: Any) -> None:
    def script(peer: Peer) -> None:
        peer.read()
        peer.send(EVENT_STREAM, b"\r\n", event("Paris.", "stop"), DONE)
        peer.repeat(event(" Or not."))

    with lasts_at_most(0):
        assert verb(client(serve(script))) == "Paris."


def test_the_time_limit_holds_for_a_silent_handshake(serve: Serve) -> None:
    """The server accepts the connection and then says nothing of TLS."""
    silent = serve(lambda peer: peer.pause(FOR_EVER))
    llm = FallbackLLM(ONCE, providers=[row("one", f"https://127.0.0.1:{silent.port}/v1")])
    with lasts_at_most(LIMIT), pytest.raises(AllProvidersFailed):
        llm.complete("Where?", timeout=LIMIT)


def test_nobody_waits_for_the_models_list_of_another_thread(serve: Serve) -> None:
    """A list is asked for when all models are gone; other questions go on meanwhile."""
    listing_asked = threading.Event()
    may_list = threading.Event()
    gone = {"error": {"message": "There is no such model", "code": "model_not_found"}}
    listed = {"data": [{"id": "new"}]}

    def script(peer: Peer) -> None:
        while True:
            request = peer.read()
            if request.head.startswith("GET"):
                listing_asked.set()
                may_list.wait(FOR_EVER)
                peer.send(page(200, json.dumps(listed).encode()))
            elif may_list.is_set():
                peer.send(document("Paris."))
            else:
                peer.send(page(404, json.dumps(gone).encode()))

    llm = client(serve(script))
    answers: List[Answer] = []
    other = threading.Thread(target=lambda: answers.append(llm.complete("Where?")))
    other.start()
    assert listing_asked.wait(SLACK)
    with pytest.raises(AllProvidersFailed):
        llm.complete("Where?", timeout=1)
    may_list.set()
    other.join()
    # The other one was still waiting for its list, or it would have no answer.
    assert [answer.model for answer in answers] == ["new"]


def give_addresses(monkeypatch: pytest.MonkeyPatch, *addresses: Any) -> None:
    """Every name resolves to these."""

    def getaddrinfo(*_: Any, **__: Any) -> List[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def test_the_addresses_of_a_host_share_the_time(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forty dead ones do not take forty times as long."""
    llm = FallbackLLM(ONCE, providers=[row("one", "http://localhost/v1")])
    with dead_address() as dead:
        give_addresses(monkeypatch, *[dead] * 40)
        with lasts_at_most(LIMIT), pytest.raises(AllProvidersFailed):
            llm.complete("Where?", timeout=LIMIT)


def test_a_living_address_behind_a_dead_one(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its share of the time is left for it."""
    server = serve(says("Paris."))
    llm = FallbackLLM(ONCE, providers=[row("one", "http://localhost/v1")])
    with dead_address() as dead:
        give_addresses(monkeypatch, dead, ("127.0.0.1", server.port))
        assert llm.complete("Where?", timeout=2).text == "Paris."


def test_a_large_upload_over_a_slow_line(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take longer than the connect timeout, which is shortened here."""
    monkeypatch.setattr("fallback_llm.CONNECT_TIMEOUT", 1.0)

    def script(peer: Peer) -> None:
        peer.slow_until = time.monotonic() + 2
        peer.read()
        peer.send(document("Long."))

    # What was not read by then is more than a sender's buffer holds: it was still sending.
    server = serve(script, receive_buffer=65536)
    assert client(server).complete("x" * 8000000).text == "Long."
    assert server.received_slowly < 3000000


# --- Kept connections ---------------------------------------------------------------------------


def test_a_kept_connection_that_was_closed(serve: Serve) -> None:
    """It is an attempt of its own, and the same model is asked again at once on a fresh one."""

    def script(peer: Peer) -> None:
        peer.read()
        peer.send(document("Paris."))
        peer.read()  # and the connection ends without a reply

    first = serve(script)
    second = serve(says("Rome."))
    llm = client(first, second, config=RetryConfig(max_attempts=3))
    assert llm.complete("1").text == "Paris."
    answer = llm.complete("2")
    assert answer.text == "Paris."
    assert [attempt.provider for attempt in answer.attempts] == ["one", "one"]
    assert [attempt.number for attempt in answer.attempts] == [1, 2]
    assert answer.attempts[0].status is None
    assert answer.attempts[1].waited == 0
    assert first.questions == ["1", "2", "2"]
    assert second.connections == 0
    assert llm.provider_health["one"].consecutive_failures == 0


def test_a_kept_connection_that_was_reset(serve: Serve) -> None:
    """The same for an RST."""

    def script(peer: Peer) -> None:
        peer.read()
        peer.send(document("Paris."))
        peer.read()
        peer.reset()

    first = serve(script)
    llm = client(first, serve(says("Rome.")), config=RetryConfig(max_attempts=3))
    llm.complete("1")
    answer = llm.complete("2")
    assert [attempt.provider for attempt in answer.attempts] == ["one", "one"]
    assert first.questions == ["1", "2", "2"]


def test_a_closed_connection_is_asked_again_once(serve: Serve) -> None:
    """When the fresh one ends without a reply as well, the next provider is asked."""
    is_ill = threading.Event()

    def script(peer: Peer) -> None:
        while True:
            peer.read()
            if is_ill.is_set():
                return
            peer.send(document("Paris."))

    first = serve(script)
    llm = client(first, serve(says("Rome.")), config=RetryConfig(max_attempts=5))
    llm.complete("1")
    is_ill.set()
    answer = llm.complete("2")
    assert [attempt.provider for attempt in answer.attempts] == ["one", "one", "two"]
    assert first.questions == ["1", "2", "2"]


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(b"SSH-2.0-OpenSSH_9.6\r\n", id="another protocol"),
        pytest.param(b"HTTP/1.1 200", id="half a status line"),
        pytest.param(EVENT_STREAM, id="half of the headers"),
        pytest.param(EVENT_STREAM + b"X-A: b\r\n" * 200 + b"\r\n", id="too many headers"),
        pytest.param(EVENT_STREAM + b"\r\n", id="no body"),
    ],
)
def test_a_kept_connection_that_spoke_is_not_asked_again(serve: Serve, reply: bytes) -> None:
    """Once a byte of a reply has come, the request may have been worked on."""

    def script(peer: Peer) -> None:
        peer.read()
        peer.send(document("Paris."))
        peer.read()
        peer.send(reply)

    first = serve(script)
    llm = client(first, serve(says("Rome.")), config=RetryConfig(max_attempts=5))
    llm.complete("1")
    answer = llm.complete("2")
    assert [attempt.provider for attempt in answer.attempts] == ["one", "two"]
    assert first.questions == ["1", "2"]
    assert llm.provider_health["one"].consecutive_failures == 1


def test_a_fresh_connection_that_is_closed_is_a_failure(serve: Serve) -> None:
    """The next provider is asked at once."""

    def script(peer: Peer) -> None:
        peer.read()

    first = serve(script)
    llm = client(first, serve(says("Paris.")), config=RetryConfig(max_attempts=5))
    answer = llm.complete("Where?")
    assert [attempt.provider for attempt in answer.attempts] == ["one", "two"]
    assert first.questions == ["Where?"]
    assert llm.provider_health["one"].consecutive_failures == 1


def test_a_connection_is_closed_between_two_questions(serve: Serve) -> None:
    """The client sees it in time, and nothing is lost."""
    ended = threading.Event()

    def script(peer: Peer) -> None:
        peer.read()
        peer.send(document("Paris."))
        ended.set()

    first = serve(script)
    llm = client(first, config=RetryConfig(max_attempts=3))
    for _ in range(5):
        ended.clear()
        assert llm.complete("Where?").text == "Paris."
        assert ended.wait(SLACK)


# --- Reasons in our own words -------------------------------------------------------------------

THEIR_WORDS = ("timed out", "IncompleteRead", "Connection broken", "InvalidChunkLength", "EOF")


def stalls(peer: Peer) -> None:
    peer.read()
    peer.send(EVENT_STREAM, b"\r\n", event("Par"))
    peer.pause(FOR_EVER)


def cuts_a_chunk(peer: Peer) -> None:
    peer.read()
    peer.send(EVENT_STREAM, b"Transfer-Encoding: chunked\r\n\r\n")
    peer.send_chunk(event("Par"))
    peer.send(b"100\r\ndata: ")


def cuts_between_chunks(peer: Peer) -> None:
    peer.read()
    peer.send(EVENT_STREAM, b"Transfer-Encoding: chunked\r\n\r\n")
    peer.send_chunk(event("Par"))


def cuts_a_document(peer: Peer) -> None:
    peer.read()
    peer.send(document("Paris.")[:-10])


def ends_too_soon(peer: Peer) -> None:
    peer.read()
    peer.send(EVENT_STREAM, b"\r\n", event("Par"))


def resets_midway(peer: Peer) -> None:
    peer.read()
    peer.send(EVENT_STREAM, b"\r\n", event("Par"))
    peer.pause(0.2)  # the text is to be read before the RST discards it
    peer.reset()


def sends_a_bad_chunk_size(peer: Peer) -> None:
    peer.read()
    peer.send(EVENT_STREAM, b"Transfer-Encoding: chunked\r\n\r\nlarge\r\n", event("Par"))


CUTS = [
    cuts_a_chunk,
    cuts_between_chunks,
    cuts_a_document,
    ends_too_soon,
    resets_midway,
    sends_a_bad_chunk_size,
]


@pytest.mark.parametrize("script", CUTS)
def test_a_cut_is_told_in_our_own_words(serve: Serve, script: Script) -> None:
    attempt = failed_attempt(client(serve(script), serve(says("Paris."))))
    assert not any(words in attempt.reason for words in THEIR_WORDS), attempt.reason
    assert "cut" in attempt.reason


def test_a_stall_is_told_in_our_own_words(serve: Serve) -> None:
    attempt = failed_attempt(client(serve(stalls), serve(says("Paris.")), idle_timeout=0.3))
    assert not any(words in attempt.reason for words in THEIR_WORDS), attempt.reason
    assert "silent for 0.3 s" in attempt.reason


@pytest.mark.parametrize("status", [400, 404])
def test_advice_for_a_web_page(serve: Serve, status: int) -> None:
    """A wrong base URL leads to some site."""
    body = b"<!DOCTYPE html><html><head><title>Welcome to nginx</title></head></html>"
    failure = failure_of(client(serve(replies(page(status, body, "text/html")))))
    assert "ONE_BASE_URL" in failure
    assert "web page" in failure
    assert "Welcome to nginx" in failure
    assert "try again later" not in failure


def test_advice_for_a_redirect(serve: Serve) -> None:
    """It names the host to which it leads, which nobody asks."""
    more = "Location: https://login.example.org/sso?token=secret\r\n"
    server = serve(replies(page(302, b"", more=more)))
    failure = failure_of(client(server))
    assert "login.example.org" in failure
    assert "ONE_BASE_URL" in failure
    assert "secret" not in failure
    assert len(server.requests) == 1


def test_advice_for_a_server_without_tls(serve: Serve) -> None:
    """The address begins with https, and the server knows nothing of it."""
    server = serve(lambda peer: peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
    url = f"https://127.0.0.1:{server.port}/v1"
    failure = failure_of(FallbackLLM(ONCE, providers=[row("one", url)]))
    assert "no secure connection to 127.0.0.1" in failure
    assert "REQUESTS_CA_BUNDLE" in failure
    assert "try again later" not in failure


def test_advice_for_a_missing_file_of_certificates(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere/ca.pem")
    server = serve(says("Paris."))
    secure = row("one", f"https://127.0.0.1:{server.port}/v1")
    llm = FallbackLLM(ONCE, providers=[secure, row("two", server.url)])
    attempt = failed_attempt(llm)
    assert attempt.provider == "one"
    failure = failure_of(FallbackLLM(ONCE, providers=[secure]))
    assert "CA certificates" in failure
    assert "REQUESTS_CA_BUNDLE" in failure
    assert "try again later" not in failure


# --- Proxies ------------------------------------------------------------------------------------


def use_proxy(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, address)
        monkeypatch.setenv(name.lower(), address)


FAR = row("far", "https://far.example/v1")


@pytest.mark.parametrize("address", ["http://joe:pw-secret@", "http://", "http://:8080"])
def test_a_proxy_without_a_host(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    """Whoever needs no proxy is asked; nobody sees a traceback."""
    use_proxy(monkeypatch, address)
    near = row("near", serve(says("Paris.")).url)
    attempt = failed_attempt(FallbackLLM(ONCE, providers=[FAR, near]))
    assert attempt.provider == "far"
    assert "HTTPS_PROXY" in failure_of(FallbackLLM(ONCE, providers=[FAR]))


PASSWORDS = [
    "p@ss-w0rd-x",
    "secr/et-w0rd",
    "secr#et-w0rd",
    "one:two-w0rd",
    "a@b/c#d?e-w0rd",
    "p%40ss",
]


@pytest.mark.parametrize("password", PASSWORDS)
def test_a_password_of_a_proxy_is_never_shown(
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    password: str,
) -> None:
    """Not even in part, whatever libraries make of the address."""
    caplog.set_level(logging.DEBUG)
    proxy = serve(lambda peer: peer.send(b"HTTP/1.1 403 Forbidden\r\n\r\n"))
    use_proxy(monkeypatch, f"http://joe:{password}@127.0.0.1:{proxy.port}")
    llm = FallbackLLM(ONCE, providers=[FAR])
    with pytest.raises(AllProvidersFailed) as failed:
        llm.complete("Where?")
    shown = [str(failed.value), caplog.text, *(each.reason for each in failed.value.attempts)]
    for part in pieces_of(password, 4):
        assert not any(part in text for text in shown), (part, shown)


def pieces_of(secret: str, length: int) -> List[str]:
    """All that is so long in a secret."""
    return [secret[start : start + length] for start in range(len(secret) - length + 1)]


@pytest.mark.parametrize("status", [401, 403, 407])
def test_advice_for_a_proxy_that_refuses(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """It is the proxy that refuses, not the provider: no key is to be checked."""
    proxy = serve(replies(page(status, b"")))
    use_proxy(monkeypatch, f"http://127.0.0.1:{proxy.port}")
    near = row("near", serve(says("Paris.")).url)
    assert failed_attempt(FallbackLLM(ONCE, providers=[FAR, near])).provider == "far"
    assert proxy.requests[0].head.startswith("CONNECT far.example:443")
    failure = failure_of(FallbackLLM(ONCE, providers=[FAR]))
    assert "proxy" in failure
    assert str(status) in failure
    assert "HTTPS_PROXY" in failure
    assert "try again later" not in failure


@pytest.mark.parametrize("drip", [b"HTTP/1.1 100 Continue\r\n\r\n", b"a"])
def test_the_time_limit_holds_for_a_proxy(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, drip: bytes
) -> None:
    """Its reply to CONNECT may be dripped, too."""

    def script(peer: Peer) -> None:
        peer.read()
        peer.repeat(drip)

    use_proxy(monkeypatch, f"http://127.0.0.1:{serve(script).port}")
    with lasts_at_most(LIMIT), pytest.raises(AllProvidersFailed):
        FallbackLLM(ONCE, providers=[FAR]).complete("Where?", timeout=LIMIT)


def test_a_proxy_of_a_kind_that_needs_another_package(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """requests speaks SOCKS with PySocks only."""
    use_proxy(monkeypatch, "socks5://joe:pw-secret@127.0.0.1:1")
    near = row("near", serve(says("Paris.")).url)
    assert failed_attempt(FallbackLLM(ONCE, providers=[FAR, near])).provider == "far"
    failure = failure_of(FallbackLLM(ONCE, providers=[FAR]))
    assert "pw-secret" not in failure
    assert "HTTPS_PROXY" in failure


def test_a_proxy_that_is_not_there(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    use_proxy(monkeypatch, "http://127.0.0.1:1")
    failure = failure_of(FallbackLLM(ONCE, providers=[FAR]))
    assert "cannot reach the proxy (connection refused)" in failure


# --- Keys ---------------------------------------------------------------------------------------


def client_with_key(monkeypatch: pytest.MonkeyPatch, server: Server, key: str) -> FallbackLLM:
    monkeypatch.setenv("ONE_API_KEY", key)
    return FallbackLLM(ONCE, providers=[Provider("one", server.url, "ONE_API_KEY", ("m",))])


def texts_of(llm: FallbackLLM, caplog: pytest.LogCaptureFixture) -> str:
    """All that a question shows that fails: logs, messages and the trail."""
    with pytest.raises(AllProvidersFailed) as failed:
        llm.complete("Where?")
    error = failed.value
    return "\n".join([caplog.text, str(error), repr(error), repr(error.attempts), repr(llm)])


ENCODED = base64.b64encode(KEY.encode()).decode()
BEARER_ENCODED = base64.b64encode(f"Bearer {KEY}".encode()).decode()
COLON_ENCODED = base64.urlsafe_b64encode(f"key:{KEY}".encode()).decode()

ECHOES = [
    pytest.param(KEY, id="as it is"),
    pytest.param(f"Bearer {KEY}", id="with its scheme"),
    pytest.param(KEY.upper(), id="in capitals"),
    pytest.param(KEY[:12] + "\n" + KEY[12:], id="newline"),
    pytest.param(KEY[:12] + " " + KEY[12:], id="blank"),
    pytest.param(KEY[:12] + "\u200b" + KEY[12:], id="zero width"),
    pytest.param("x" * 3985 + " " + KEY, id="at the cut"),
    pytest.param("x " * 1990 + KEY, id="at the cut, among words"),
]


def secrets() -> List[str]:
    """What may stand nowhere: each half of the key and of its base64."""
    found = [KEY[2:12], KEY[12:], KEY[12:].upper()]
    for encoded in (ENCODED, BEARER_ENCODED, COLON_ENCODED):
        found += [encoded[12:24], encoded[24:36]]
    return found


@pytest.mark.parametrize("echo_of_key", ECHOES)
def test_an_echoed_key_is_never_shown(
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    echo_of_key: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    body = json.dumps({"error": {"message": f"Bad key {echo_of_key}"}}).encode()
    llm = client_with_key(monkeypatch, serve(replies(page(401, body))), KEY)
    shown = texts_of(llm, caplog)
    for secret in secrets():
        assert secret not in shown


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(f"Bearer {KEY}\r\n", id="without a colon"),
        pytest.param(f"X-Echo: a\r\n{KEY}\r\n", id="after another"),
        pytest.param(f" {KEY}\r\n", id="continued"),
        pytest.param(f"X {KEY}: a\r\n", id="with a blank in its name"),
    ],
)
@pytest.mark.parametrize("status", [200, 401])
def test_a_key_in_a_header_line_is_not_logged(
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    status: int,
    line: str,
) -> None:
    """urllib3 would log it as a defect, at WARNING."""
    caplog.set_level(logging.DEBUG)

    def script(peer: Peer) -> None:
        peer.read()
        peer.send(page(status, b"{}", more=line))

    shown = texts_of(client_with_key(monkeypatch, serve(script), KEY), caplog)
    assert KEY not in shown
    assert "urllib3" not in [record.name.split(".")[0] for record in warnings_in(caplog)]


def warnings_in(caplog: pytest.LogCaptureFixture) -> List[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("place", ["status line", "redirect", "header", "model"])
def test_a_key_elsewhere_in_a_reply(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    """Wherever a server puts it."""
    caplog.set_level(logging.DEBUG)
    fields = {"error": {"message": "No", "code": KEY if place == "model" else "x"}, "model": KEY}
    body = json.dumps(fields).encode()
    reply = {
        "status line": page(401, b"{}").replace(b"Some Words", KEY.encode()),
        "redirect": page(302, b"", more=f"Location: https://{KEY}.example/{KEY}\r\n"),
        "header": page(429, b"{}", more=f"Retry-After: {KEY}\r\n"),
        "model": page(400, body),
    }[place]
    shown = texts_of(client_with_key(monkeypatch, serve(replies(reply)), KEY), caplog)
    assert KEY[2:12] not in shown
    assert KEY[12:] not in shown


def test_an_old_key_stays_hidden(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After api_keys was changed, a server may still tell of the one before."""
    body = json.dumps({"error": {"message": f"{KEY} was replaced"}}).encode()
    server = serve(replies(page(400, body)))
    llm = client_with_key(monkeypatch, server, KEY)
    texts_of(llm, caplog)
    llm.api_keys["one"] = "k-zyxwvutsrqponmlkjihgf"
    shown = texts_of(llm, caplog)
    assert "Bearer k-zyxwvutsrqponmlkjihgf" in server.requests[-1].head
    assert KEY not in shown
    assert "k-zyxwvutsrqponmlkjihgf" not in shown


def test_a_key_reaches_its_own_provider_only(
    bare: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several providers each gets its own, and a proxy on loopback gets none."""
    proxy = serve(says("Rome."))
    use_proxy(monkeypatch, f"http://127.0.0.1:{proxy.port}")
    with Emulator() as asked:
        for name, value in asked.environment().items():
            monkeypatch.setenv(name, value)
        llm = FallbackLLM(ONCE)
        for provider in llm.fallback_order:
            assert llm.complete("Where?", provider=provider).provider == provider
        for request in asked.asked:
            key = llm.api_keys[request.provider]
            assert request.headers["authorization"] == f"Bearer {key}"
    assert proxy.connections == 0
