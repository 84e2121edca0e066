"""Requests, and replies read from bytes: tables of cases."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
import signal
from http.client import BadStatusLine
from typing import Any, Iterable, Iterator
from urllib.parse import quote, quote_plus

import fakes
import pytest
import requests
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fallback_llm import (
    MAX_EVENT,
    AllProvidersFailed,
    Draft,
    ErrorInside,
    Event,
    Failure,
    Phase,
    Provider,
    Question,
    Reach,
    ThinkingFilter,
    TimeLimit,
    Transport,
    Verdict,
    events_in,
    is_blank,
    is_chat_model,
    judge,
    lines_in,
    safe_line,
    usage_figures,
)

NOW = 1.8e9  # seconds since the epoch
DEFAULTS: dict[str, Any] = {"oss": {"effort": "low", "top_p": 1}, "oss-2": {"effort": "none"}}
ROW = Provider("p", "https://p.test", None, ("m",), defaults=DEFAULTS)
quickly = settings(deadline=None, database=None, derandomize=True, max_examples=150)

# --- Requests -----------------------------------------------------------------------------------


def sent(model: str, **parameters: Any) -> Any:
    """The fields of a request that are not in every one."""
    question = Question("q", parameters=parameters)
    fields = json.loads(question.body(model, ROW.parameters_for(model)).decode())
    assert fields.pop("messages") == [{"role": "user", "content": "q"}]
    assert fields.pop("stream") is True
    fields.pop("stream_options", None)
    return fields


def test_the_body_of_a_request() -> None:
    """The row's defaults for this model, the caller's parameters over them."""
    assert sent("m", top_p=0) == {"model": "m", "max_tokens": 500, "top_p": 0}
    low = {"effort": "low", "top_p": 1}
    assert sent("an-oss-1") == {"model": "an-oss-1", "max_tokens": 500, **low}
    none = {"effort": "none", "top_p": 0.5}
    assert sent("oss-2", top_p=0.5) == {"model": "oss-2", "max_tokens": 500, **none}
    assert DEFAULTS["oss"] == {"effort": "low", "top_p": 1}


def test_a_parameter_that_is_none_is_not_given() -> None:
    """The row's own stays."""
    assert sent("an-oss-1", top_p=None, seed=None) == sent("an-oss-1")


def test_max_completion_tokens_takes_the_place_of_max_tokens() -> None:
    """Servers refuse both together."""
    assert sent("m", max_completion_tokens=9) == {"model": "m", "max_completion_tokens": 9}
    assert sent("m", max_completion_tokens=None) == {"model": "m", "max_tokens": 500}


def test_extra_body_wins_over_all() -> None:
    """It is what a provider has of its own."""
    question = Question("q", extra_body={"top_k": 5, "max_tokens": 7}, parameters={"top_p": 0})
    fields = json.loads(question.body("m", {"top_k": 1}).decode())
    assert (fields["top_k"], fields["max_tokens"], fields["top_p"]) == (5, 7, 0)


def test_lone_surrogates_are_replaced() -> None:
    """No file can hold them, and servers refuse them."""
    texts = ["é😀\u2028\0\n", "\ud83d\ude00", "a\ud83d", "\ude00b"]
    assert sent("m", stop=texts)["stop"] == ["é😀\u2028\0\n", "😀", "a\ufffd", "\ufffdb"]
    assert "é".encode() in Question("é").body("m", {})


def test_usage_is_asked_for() -> None:
    """Most servers report it in a stream only to those who ask."""
    world = fakes.World()
    world.llm.ask("Where?")
    body = world.server.asked[0].body
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}


def test_usage_is_not_asked_for_where_it_is_not_wanted() -> None:
    """By the caller, or by a server that refuses the question for it."""
    for body in (
        Question("q").body("m", {}, with_options=False),
        Question("q", parameters={"stream_options": None}).body("m", {}),
    ):
        assert "stream_options" not in json.loads(body.decode())
    options = {"include_usage": False}
    body = Question("q", parameters={"stream_options": options}).body("m", {})
    assert json.loads(body.decode())["stream_options"] == options


def test_what_json_cannot_carry_is_refused() -> None:
    """Before anything is sent."""
    endless: list[Any] = []
    endless.append(endless)
    for wrong in (math.nan, math.inf, {1, 2}, b"x", endless):
        with pytest.raises(ValueError, match=r"^the question cannot be sent as JSON: "):
            Question("q", parameters={"stop": wrong}).validate()
        with pytest.raises(ValueError, match=r"^the question cannot be sent as JSON: "):
            Question("q", extra_body={"x": wrong}).validate()


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


BE = said("system", "s")
HI = said("user", "hi")
YES = said("assistant", "y")
MORE = said("user", "q")
CONVERSATIONS: list[Any] = [  # question, system, messages; what is sent
    (("q", None, None), [MORE]),
    (("q", "s", None), [BE, MORE]),
    (("q", "", None), [MORE]),
    ((None, None, [HI, YES]), [HI, YES]),
    (("q", None, (HI, YES)), [HI, YES, MORE]),
    (("q", "s", [HI, YES]), [BE, HI, YES, MORE]),
]
WRONG: list[Any] = [[], "hi", HI, [HI, "x"], [HI, {}], [{"role": 1}]]
NO_CONVERSATIONS: list[Any] = [
    *((question, None, None) for question in (None, "", " \n\u200b\t\u3000", 5, b"q")),
    *(("q", None, wrong) for wrong in WRONG),
    ("q", 5, None),
    (" ", None, [HI]),
]


def test_conversation() -> None:
    """The system first, the question last; what cannot be meant is named."""
    for (question, system, messages), conversation in CONVERSATIONS:
        asked = Question(question, system=system, messages=messages)
        asked.validate()
        assert json.loads(asked.body("m", {}).decode())["messages"] == conversation
    for question, system, messages in NO_CONVERSATIONS:
        problem = r"^(the question is empty$|(the question|the system|messages) must be )"
        with pytest.raises(ValueError, match=problem):
            Question(question, system=system, messages=messages).validate()


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "a name that belongs to the client": ({"api_key": "x"}, "FallbackLLM(api_keys={...})"),
    "another one": ({"idle_timeout": 5}, "FallbackLLM(idle_timeout=...)"),
    "one of the retries": ({"max_attempts": 5}, "RetryConfig(max_attempts=...)"),
    "a name that is nearly one": ({"temprature": 1}, "did you mean 'temperature'?"),
    "a name of nobody": ({"foo": 1}, "extra_body"),
    "tools": ({"tools": []}, "tools is not supported"),
    "stream": ({"stream": True}, "stream is not supported"),
    "n": ({"n": 2}, "n is not supported"),
    "n, in extra_body": ({"extra_body": {"n": 2}}, "n is not supported"),
    "accept": ({"accept": 5}, "accept must be a function"),
    "extra_body": ({"extra_body": 5}, "extra_body must be a dict"),
    "max_tokens": ({"max_tokens": 0}, "max_tokens must be"),
    "timeout": ({"timeout": 0}, "timeout must be"),
    "temperature": ({"temperature": 3}, "temperature must be"),
}


@pytest.mark.parametrize(("arguments", "words"), MISTAKES.values(), ids=list(MISTAKES))
def test_an_argument_that_is_wrong_is_named(arguments: Any, words: str) -> None:
    """With where it belongs, or what is nearest."""
    with pytest.raises(ValueError, match=re.escape(words)):
        Question("q").updated(arguments)


def test_a_question_can_be_changed() -> None:
    """As each line of a batch does with what is common to all; None is not given."""
    common = Question(max_tokens=9, system="s", parameters={"top_p": 0.5, "seed": 1})
    asked = common.updated({"question": "q", "max_tokens": None, "seed": 2, "system": None})
    assert asked == Question("q", max_tokens=9, parameters={"top_p": 0.5, "seed": 2})
    assert common.parameters == {"top_p": 0.5, "seed": 1}
    assert common.updated({"question": "q", "max_tokens": 7.0}).max_tokens == 7


def test_is_blank() -> None:
    """White space, zero-width and control characters are nothing."""
    assert all(is_blank(text) for text in ("", " \n\t", "\u200b\ufeff\u2060", "\x00\x1b", "\xa0"))
    assert not any(is_blank(text) for text in (".", " a", "\u200b0", "😀", "…"))


# --- Replies ------------------------------------------------------------------------------------

START = {"delta": {"role": "assistant"}}  # Cerebras leaves finish_reason out
END: dict[str, Any] = {"delta": {}, "finish_reason": "stop"}
USAGE = {"usage": {"total_tokens": 7}}
DONE = b"data: [DONE]\n\n"


def says(text: Any, **more: Any) -> dict[str, Any]:
    return {"delta": {"content": text}, **more}


def event(choice: Any = None, **more: Any) -> bytes:
    """One event; a choice may be left out."""
    data = more if choice is None else {"choices": [choice], **more}
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def stream(*choices: Any) -> bytes:
    """Events, the end, the mark of the end."""
    return b"".join(event(choice) for choice in [START, *choices, END]) + DONE


def plain(content: Any, **more: Any) -> bytes:
    """An answer in one piece."""
    choice = {"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    return json.dumps({"choices": [{**choice, **more}], **USAGE}).encode()


def read(chunks: Iterable[bytes], status: int = 200, live: bool = False, **headers: str) -> Any:
    """(the text, the draft) of an answer, or the Failure."""
    named = {name.replace("_", "-"): headers[name] for name in headers}
    clock = fakes.FakeClock()
    server = fakes.FakeServer(clock, {"m": [fakes.Reply(status, tuple(chunks), named)]})
    session = requests.Session()
    session.mount("https://", server)
    transport = Transport(clock.time, lambda: NOW, session)
    limit = TimeLimit(clock.time, math.inf, 60.0)
    draft = Draft("m", live)
    texts: list[str] = []
    try:
        for text in transport.converse(ROW, "", b'{"model": "m"}', draft, limit):
            texts.append(text)
    except Failure as failure:
        return failure
    assert not live or "".join(texts) == draft.text
    return (draft.text, draft)


HELLO = stream(says("Hel"), says("lo"))
CR = b'data: {"choices":[{"delta":{"content":"Hello"},"finish_reason":"stop"}]}\r\r'
SPLIT = b'data:{"choices":[{"delta":\ndata: {"content":"Hello"},"finish_reason":"stop"}]}\n\n'
NOISE = b": PROCESSING\n\n:\n\nid: 7\nretry: 9\ndata:\n\ndata: \ndata\n\nevent: ping\n\n"
STREAMS = {
    "[DONE] is torn": HELLO[:-6],
    "the usage is torn": HELLO[: -len(DONE)] + b'data: {"usage":{"tot',
    "as it is": HELLO,
    "CR LF": HELLO.replace(b"\n", b"\r\n"),
    "CR alone": HELLO.replace(b"\n", b"\r"),
    "CR at the very end": CR,
    "a field without a colon": b"data\n\n" + HELLO,
    "no space after data:": HELLO.replace(b"data: ", b"data:"),
    "several data lines": SPLIT,
    "byte order mark": b"\xef\xbb\xbf" + HELLO,
    "comments, ids, empty data": NOISE + HELLO.replace(b"\n\n", b"\n\n" + NOISE),
    "named events": HELLO.replace(b"data: {", b"event: message\ndata: {"),
    "the last event without its blank line": stream(says("Hello"))[: -len(DONE) - 2],
    "nor a line end, at [DONE]": HELLO[:-2],
    "no [DONE] after a finish_reason": HELLO[: -len(DONE)],
    "[DONE] and no finish_reason": event(says("Hello")) + DONE,
    "[DONE] ends it": HELLO + event(says(" world")) + event(error="late"),
    "a later null": event(says("Hello", finish_reason="stop")) + event({"finish_reason": None}),
    "a later empty one": event(says("Hello", finish_reason="stop")) + event({"finish_reason": ""}),
    "choices may be empty": event(says("Hello")) + event(choices=[]) + event(END) + event(x=1),
    "delta or content may be null": stream({"delta": None}, says(None), says("Hello"), {}),
    "parts": stream(says([{"type": "text", "text": "Hel"}, {"text": "lo"}, {"image": 1}, 5])),
    "messages as events": event({"message": {"content": "Hello"}, "finish_reason": "stop"}),
    "refusal beside text": stream({"delta": {"refusal": "x", "content": "Hello"}}),
    "reasoning beside text": stream({"delta": {"reasoning": "hm"}}, says("Hello")),
    "think first": stream(says("<think>hm</think>"), says("\n\nHello")),
    "think in one": stream(says(" <think>hm</think> Hello")),
    "empty think": stream(says("<think></think>Hello")),
    "plain": plain("Hello"),
    "plain, padded": b"\n \r\n  " + plain("Hello") + b"\n",
    "plain, pretty": json.dumps(json.loads(plain("Hello").decode()), indent=1).encode(),
    "plain after comments": b": PROCESSING\n\n: PROCESSING\n\n" + plain("Hello"),
    "plain after a byte order mark": b"\xef\xbb\xbf" + plain("Hello"),
    "plain, parts": plain([{"type": "text", "text": "Hello"}]),
    "plain, think": plain("<think>hm</think>Hello"),
}


@pytest.mark.parametrize("data", STREAMS.values(), ids=list(STREAMS))
def test_an_answer_in_every_form(data: bytes) -> None:
    """Whole, byte by byte, and live."""
    for chunks in ([data], [data[i : i + 1] for i in range(len(data))]):
        for live in (False, True):
            text, draft = read(chunks, live=live)
            assert text == "Hello"
            assert draft.finish_reason == ("stop" if b'"stop"' in data else "")


@quickly
@given(st.sampled_from(sorted(STREAMS)), st.lists(st.integers(0, 400)), st.booleans())
def test_any_cutting_of_the_bytes_gives_the_same_text(name: str, at: Any, live: bool) -> None:
    """A code point, a CR LF, a tag may be cut in two."""
    data = STREAMS[name].replace(b"Hel", "Hé😀".encode()).replace(b"hm", "hé".encode())
    places = sorted({0, *at, len(data)})
    assert read([data[i:j] for i, j in zip(places, places[1:])], live=live)[0] == "Hé😀lo"


@quickly
@given(st.text("<think>/ a", max_size=30), st.lists(st.integers(1, 30)))
@example(" <thi", [3])
@example("<think>a</think", [])
def test_thinking_is_left_out_however_it_is_cut(text: str, at: list[int]) -> None:
    """What begins with <think> is no answer, up to </think>."""
    places = sorted({0, *at, len(text)})
    found = read([stream(*(says(text[i:j]) for i, j in zip(places, places[1:])))])
    thinks = text.lstrip().startswith("<think>")
    expected = text.partition("</think>")[2].lstrip() if thinks else text
    if expected.strip():
        assert found[0] == expected
    else:
        why = "only reasoning came, no answer" if thinks else "the answer is empty"
        assert (found.verdict, found.reason) == (Verdict.FAULT, why)


def take(draft: Draft, *choices: Any) -> list[Any]:
    """What can be shown after each event; None if it is no progress."""
    return [draft.take(Event(json.dumps({"choices": [choice]}))) for choice in choices]


def test_texts_come_as_they_are_said() -> None:
    """Each event gives its text at once; what may become <think> is held back."""
    pieces = [says(text) for text in (" ", "<th", "e", "", "n")]
    assert take(Draft("m", True), *pieces) == [None, "", " <the", None, "n"]
    thinking = ThinkingFilter()
    assert [thinking.feed(text) for text in ("<th", "ink>a</th", "ink>", "\n", "b")][-1] == "b"
    assert thinking.has_thought


def test_a_live_stream_shows_nothing_before_the_first_visible_character() -> None:
    """Or an empty answer would have been shown, and nobody else could be asked."""
    draft = Draft("m", True)
    assert take(draft, says(" \n"), says("\u200b"), says("\u2060")) == [None, None, None]
    assert take(draft, says("Hi")) == [" \n\u200b\u2060Hi"]


def test_usage() -> None:
    """The last one said, its numbers only."""
    junk = {"d": "x", "e": [1], "f": None, "g": math.inf, "h": math.nan, "a key": 1}
    spent: dict[str, Any] = {"usage": {"a": 1, "b": {"c": 2.5, **junk}, **junk}}
    for data in (
        HELLO[: -len(DONE)] + event(choices=[], **spent) + DONE,
        event(says("Hello", finish_reason="stop"), **spent) + event({}, usage=None),
        event(says("Hello", finish_reason="stop"), x_groq=spent),
    ):
        assert read([data])[1].usage == {"a": 1, "b": {"c": 2.5}}
    assert usage_figures(spent["usage"]) == {"a": 1, "b": {"c": 2.5}}
    for nothing in (None, "", 7, [], [{"a": 1}]):
        assert usage_figures(nothing) == {}
    assert read([plain("Hello")])[1].usage == USAGE["usage"]


LIMIT = {"message": "Slow.", "code": 429}
TEXT = event(says("Hel"))
CUT = "the answer was cut: it has no end"
EMPTY = "the answer is empty"
NOTHING = "the reply holds no answer"
THOUGHT = "only reasoning came, no answer"
REFUSAL = {"delta": {"refusal": "I will not."}}
ERRORS = {  # data, verdict, the reason's beginning
    "flat, inside": (event(message="Slow.", code="token_quota_exceeded"), "RATE_LIMITED", ""),
    "flat, plain": (b'{"message":"Slow.","code":"token_quota_exceeded"}', "RATE_LIMITED", ""),
    "a list, plain": (b'[{"error":{"message":"Slow.","code":429}}]', "RATE_LIMITED", ""),
    "cut": (event(START) + TEXT, "FAULT", CUT),
    "cut in an event": (TEXT + b'data: {"choices":[{"del', "FAULT", ""),
    "nothing": (b"", "FAULT", NOTHING),
    "only comments": (NOISE, "FAULT", NOTHING),
    "only [DONE]": (DONE, "FAULT", EMPTY),
    "no text": (stream(), "FAULT", EMPTY),
    "white space": (stream(says(" \n"), says("\u200b")), "FAULT", EMPTY),
    "only reasoning": (stream({"delta": {"reasoning": "hm"}}), "FAULT", THOUGHT),
    "its other name": (stream({"delta": {"reasoning_content": "hm"}}), "FAULT", THOUGHT),
    "only think": (stream(says("<think>hm</think>\n")), "FAULT", THOUGHT),
    "think without end": (stream(says("<think>Hello")), "FAULT", THOUGHT),
    "length": (event({"finish_reason": "length"}), "UNSUITABLE", "max_tokens was used up before"),
    "content_filter": (TEXT + event({"finish_reason": "content_filter"}), "REFUSED", "a content "),
    "refusal": (stream(REFUSAL), "REFUSED", "I will not."),
    "malformed": (event(says("x")) + b"data: {oops}\n\n" + HELLO, "FAULT", "no answer in the re"),
    "a number": (b"data: 5\n\n" + HELLO, "FAULT", "no answer in the reply:"),
    "not UTF-8": (stream(says("xyz")).replace(b"y", b"\xff"), "FAULT", "the answer is not UTF-8"),
    "error": (TEXT + event(error=LIMIT), "RATE_LIMITED", "error 429 inside the reply: Slow."),
    "error beside choices": (event(says(""), error=LIMIT), "RATE_LIMITED", "error 429 inside"),
    "error in the choice": (event({**END, "error": LIMIT}), "RATE_LIMITED", "error 429 inside"),
    "error with its status": (event(error={"a": 1}, status_code=401), "DENIED", "error 401 inside"),
    "error of x_groq": (event(x_groq={"error": "boom"}), "FAULT", "error inside the reply: boom"),
    "error event": (b"event: error\n" + event(error=LIMIT), "RATE_LIMITED", "error 429 inside "),
    "error event, flat": (b"event:error\n" + event(**LIMIT), "RATE_LIMITED", "error 429 inside "),
    "error event, text": (b"event: error\ndata: boom\n\n", "FAULT", "error inside the reply: boom"),
    "error at the end": (HELLO[:-14] + event(error=LIMIT), "RATE_LIMITED", "error 429 inside the"),
    "finish_reason error": (
        TEXT + event({"finish_reason": "error", "native_finish_reason": "MALFORMED"}),
        "FAULT",
        "error inside the reply: MALFORMED",
    ),
    "plain error": (json.dumps({"error": LIMIT}).encode(), "RATE_LIMITED", "error 429 inside the"),
    "plain error of a choice": (plain("Hel", error=LIMIT), "RATE_LIMITED", "error 429 inside the"),
    "plain, no text": (plain(None), "FAULT", EMPTY),
    "plain, refusal": (plain(None, message={"refusal": "I will not."}), "REFUSED", "I will not."),
    "plain, content_filter": (plain("Hel", finish_reason="content_filter"), "REFUSED", "a content"),
    "plain, cut": (plain("Hello")[:-9], "FAULT", "no answer in the reply: "),
    "plain, length": (plain("", finish_reason="length"), "UNSUITABLE", "max_tokens was used up"),
    "plain, no choices": (b'{"choices": []}', "FAULT", EMPTY),
    "a list": (b"[1]", "FAULT", "no answer in the reply"),
    "null": (b"null", "FAULT", "no answer in the reply"),
    "page": (b"<html><title>Hi</title>\n", "FAULT", "no answer in the reply: HTML page: Hi"),
    "text": (b"upstream gone", "FAULT", "no answer in the reply: upstream gone"),
    "latin-1": ("[1, 'é']".encode("latin-1"), "FAULT", "the answer is not UTF-8"),
    "deep": (b"[" * 100000, "FAULT", "no answer in the reply: "),
}


@pytest.mark.parametrize(("data", "verdict", "reason"), ERRORS.values(), ids=list(ERRORS))
def test_what_is_no_whole_answer(data: bytes, verdict: str, reason: str) -> None:
    """Whole, and byte by byte."""
    for chunks in ([data], [bytes([byte]) for byte in data[:2000]] + [data[2000:]]):
        failure = read(chunks)
        reach = Reach.ACCOUNT if verdict == "DENIED" else Reach.MODEL
        assert (failure.verdict.name, failure.reach) == (verdict, reach)
        assert failure.reason.startswith(reason)


OOPS = b"data: {oops}\n\n"


@pytest.mark.parametrize("broken", [OOPS, b"data: 7\n\n", b"data: [1, 2]\n\n", b'data: "x"\n\n'])
def test_live_too_a_broken_event_is_a_failure(broken: bytes) -> None:
    """It may have held a word: an answer with a hole would pass for a whole one."""
    failure = read([TEXT + broken + event(says("lo")) + event(END) + DONE], live=True)
    assert (failure.verdict, failure.reach) == (Verdict.FAULT, Reach.MODEL)
    assert failure.reason.startswith("no answer in the reply")


def test_a_broken_event_after_the_end_does_no_harm() -> None:
    """Only usage and the like are expected then."""
    for live in (False, True):
        data = event(says("Hello")) + event(END) + OOPS + event(**USAGE) + DONE
        text, draft = read([data], live=live)
        assert (text, draft.usage) == ("Hello", USAGE["usage"])


@pytest.mark.parametrize("before", [b"", event(START), event(says(" \n")), event(says("<think>x"))])
def test_live_too_a_broken_event_before_the_first_text_is_a_fault(before: bytes) -> None:
    """Nothing was shown yet, so somebody else can still give a whole answer."""
    failure = read([before + OOPS + HELLO], live=True)
    assert failure.reason == "no answer in the reply: {oops}"


def test_a_buffered_answer_that_can_no_longer_become_one_is_not_read_to_its_end() -> None:
    """Another model is asked at once, rather than after the seconds that the rest takes."""
    world = fakes.World({"a": [fakes.Reply(body=(TEXT, OOPS, 8.0, HELLO))]})
    assert world.llm.complete("Where?").text == "B"
    assert world.clock.now == 0


PROGRESS: dict[str, tuple[Any, bool]] = {
    "text": ({"choices": [says("a")]}, True),
    "reasoning": ({"choices": [{"delta": {"reasoning": "hm"}}]}, True),
    "its other name": ({"choices": [{"delta": {"reasoning_content": "hm"}}]}, True),
    "a finish_reason": ({"choices": [END]}, True),
    "nothing": ({}, False),
    "no choices": ({"choices": []}, False),
    "a role": ({"choices": [START]}, False),
    "an empty text": ({"choices": [says("")]}, False),
    "white space": ({"choices": [says(" \n\u200b")]}, False),
    "blank reasoning": ({"choices": [{"delta": {"reasoning": " "}}]}, False),
    "usage": ({"choices": [], "usage": {"total_tokens": 7}}, False),
    "other fields": ({"id": "7", "object": "heartbeat", "n": 1}, False),
}


@pytest.mark.parametrize(("said", "expected"), PROGRESS.values(), ids=list(PROGRESS))
def test_what_is_progress(said: Any, expected: bool) -> None:
    """Only what brings the answer nearer: heartbeats could go on for ever."""
    draft = Draft("m", False)
    assert (draft.take(Event(json.dumps(said))) is not None) == expected
    assert draft.take(Event("{}", "ping")) is None


def test_white_space_is_given_out_and_is_no_progress() -> None:
    """Inside an answer it belongs to the text; a reply of nothing else is a silent one."""
    draft = Draft("m", True)
    assert take(draft, says("a"), says(" \n"), says("b")) == ["a", " \n", "b"]
    pieces = [TEXT, *[2.0, event(says(" "))] * 50, event(END)]
    world = fakes.World({"a": [fakes.Reply(body=tuple(pieces))]}, idle_timeout=10.0)
    assert world.llm.complete("Where?").attempts[0].reason == "silent for 10 s"


def test_a_finish_reason_is_progress_once() -> None:
    """Some gateways repeat it for ever, or say it with every text; a text is progress again."""
    draft = Draft("m", False)
    assert take(draft, says("a", finish_reason="stop")) == ["a"]
    assert draft.phase is Phase.READING
    assert take(draft, END) == [None]
    assert take(draft, says("b", finish_reason="stop")) == ["b"]
    assert draft.phase is Phase.READING
    assert draft.text == "ab"


def test_after_the_end_only_usage_is_expected() -> None:
    """A finish_reason without text settles the answer, until a text comes all the same."""
    draft = Draft("m", False)
    phases = []
    for choice in (says("a"), END, says("b")):
        take(draft, choice)
        phases.append(draft.phase)
    draft.take(Event("[DONE]"))
    assert [*phases, draft.phase] == [
        *[Phase.READING, Phase.SETTLED, Phase.READING],
        Phase.ENDED,
    ]


def test_an_end_before_any_text_ends_nothing() -> None:
    """A first chunk may say "stop" already, and others come."""
    draft = Draft("m", False)
    take(draft, {**START, "finish_reason": "stop"})
    assert draft.phase is Phase.READING
    slow = (event({**START, "finish_reason": "stop"}), 3.0, event(says("Hello")), 3.0, event(END))
    world = fakes.World({"a": [fakes.Reply(body=slow)]})
    assert world.llm.complete("Where?").text == "Hello"


GOOD = "stop STOP end_turn eos complete COMPLETED stop_sequence tool_calls function_call done"
BAD_ENDS = {
    "UNSUITABLE": "length LENGTH max_tokens MAX_TOKENS model_length max_output_tokens"
    " model_context_window_exceeded",
    "REFUSED": "content_filter CONTENT_FILTER sensitive safety SAFETY refusal",
    "FAULT": "abort error_x network_error insufficient_system_resource unknown other null_",
}


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("reason", GOOD.split())
def test_the_ends_of_a_whole_answer(reason: str, live: bool) -> None:
    """Under all their names, in any case; without text they are none."""
    text, draft = read([TEXT + event({"finish_reason": reason}) + DONE], live=live)
    assert (text, draft.finish_reason) == ("Hel", reason)
    assert read([event({"finish_reason": reason}) + DONE]).reason == EMPTY


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize(
    ("verdict", "reason"), [(v, reason) for v in BAD_ENDS for reason in BAD_ENDS[v].split()]
)
def test_ends_that_are_none(verdict: str, reason: str, live: bool) -> None:
    """Words that nobody knows are not good news; after some text a cut is an answer, and told."""
    end = event({"finish_reason": reason}) + DONE
    assert read([end], live=live).verdict.name == verdict
    assert read([plain("", finish_reason=reason)], live=live).verdict.name == verdict
    found = read([TEXT + end], live=live)
    if verdict == "UNSUITABLE":
        assert (found[0], found[1].finish_reason) == ("Hel", reason)
    else:
        assert found.verdict.name == verdict


WHOLES = {  # texts that are said again
    "a last chunk with the whole message": [
        *[event(says("Hel")), event(says("lo"))],
        event({"message": {"content": "Hello"}, "finish_reason": "stop"}),
    ],
    "all so far in each": [
        event({"message": {"content": text}}) for text in ("H", "Hel", "Hel", "Hello")
    ],
    "a delta and a message beside it": [
        event({"delta": {"content": "Hel"}, "message": {"content": "Hel"}}),
        event({"delta": {"content": "lo"}, "message": {"content": "Hello"}}),
    ],
    "another choice": [
        event({"index": 1, "delta": {"content": "Ciao"}}),
        event(choices=[{"index": 1, **says("x")}, {"index": 0, **says("Hello")}]),
        event({"index": 1, "delta": {}, "finish_reason": "length"}),
    ],
    "thoughts in the message": [
        event(says("<think>hm</think>Hel")),
        event({"message": {"content": "<think>hm</think>Hello"}}),
    ],
}


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("events", WHOLES.values(), ids=list(WHOLES))
def test_a_text_that_is_said_again_is_not_doubled(events: list[bytes], live: bool) -> None:
    """A message is the whole so far; a choice with another index is not ours."""
    assert read([*events, event(END), DONE], live=live)[0] == "Hello"


def test_a_delta_is_never_taken_for_the_whole() -> None:
    """However much it looks like it."""
    texts = ["1", "10", "101", "101"]
    assert read([stream(*map(says, texts))])[0] == "110101101"


def test_a_whole_that_is_another_text() -> None:
    """It takes the place of what was said; live that cannot be taken back."""
    data = event(says("Hullo")) + event({"message": {"content": "Hello"}}) + event(END) + DONE
    assert read([data])[0] == "Hello"
    assert read([data], live=True).reason.startswith("the server changed what it had said")


@pytest.mark.parametrize("live", [False, True])
def test_halves_of_a_character(live: bool) -> None:
    """In two events they are one character; a lone one is replaced."""
    assert read([stream(says("a\ud83d"), says("\ude00b"))], live=live)[0] == "a😀b"
    assert read([stream(says("a\ud83d"), says("b"))], live=live)[0] == "a\ufffdb"
    assert read([stream(says("a"), says("\ude00b"))], live=live)[0] == "a\ufffdb"
    assert read([stream(says("a\ud83d"))], live=live)[0] == "a\ufffd"


THOUGHTS: list[Any] = [
    *({name: "hm"} for name in ("reasoning", "reasoning_content", "thinking", "reasoning_text")),
    {"reasoning_details": [{"type": "reasoning.text", "text": "hm"}]},
    {"content": [{"type": "thinking", "thinking": "hm"}]},
    {"content": [{"type": "reasoning", "text": "hm"}]},
]


@pytest.mark.parametrize("thought", THOUGHTS, ids=str)
def test_thinking_under_its_other_names(thought: Any) -> None:
    """It is progress, and never text."""
    draft = Draft("m", False)
    assert take(draft, {"delta": thought}) == [""]
    assert read([stream({"delta": thought})]).reason == THOUGHT
    assert read([stream({"delta": thought}, says("Hello"))])[0] == "Hello"
    assert read([plain(None, message=thought)]).reason == THOUGHT


def test_a_thought_whose_beginning_is_missing() -> None:
    """What stood before its end is not the answer; live that is known too late."""
    assert read([stream(says("I wonder"), says(".</think>\n"), says("Hello"))])[0] == "Hello"
    assert read([stream(says("I wonder.</think>\n"))]).reason == THOUGHT
    assert read([stream(says("I wonder.</think>Hello"))], live=True)[0] == "I wonder.</think>Hello"
    assert read([stream(says("<think>hm</think>Say </think>."))])[0] == "Say </think>."
    tag = "To end a thought, <think> needs </think>."
    assert read([stream(says(tag))])[0] == tag


ELSEWHERE: dict[str, tuple[Any, str]] = {  # an error in other fields of a 200
    "error_message": ({"error_message": "boom"}, "boom"),
    "error_type": ({"error_type": "server_error"}, "server_error"),
    "detail": ({"detail": "boom"}, "boom"),
    "a message beside no choices": ({"message": "boom"}, "boom"),
}


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize(("fields", "words"), ELSEWHERE.values(), ids=list(ELSEWHERE))
def test_an_error_in_other_fields(fields: Any, words: str, live: bool) -> None:
    """It is told, rather than an empty answer."""
    for data in (event(**fields), json.dumps(fields).encode(), TEXT + event(**fields)):
        failure = read([data], live=live)
        assert failure.verdict is Verdict.FAULT
        assert words in failure.reason


EMPTY_ERRORS: list[Any] = [None, "", {}, {"message": "", "code": None}, [], [{}], {"a": {"b": ""}}]


@pytest.mark.parametrize("error", EMPTY_ERRORS, ids=str)
def test_an_empty_error_is_none(error: Any) -> None:
    """Some servers send the field with each event."""
    data = b"".join(event(says(text), error=error) for text in ("Hel", "lo"))
    assert read([data + event(END, error=error) + DONE])[0] == "Hello"
    body = json.loads(plain("Hello").decode())
    assert read([json.dumps({**body, "error": error}).encode()])[0] == "Hello"


JUDGE_MODEL = "maker/content-safety-9b:free"
MODERATED: dict[str, tuple[str, str, bool]] = {  # asked, who answered, whether it is an answer
    "a router chose one": ("router/any", JUDGE_MODEL, False),
    "another family": ("router/any", "llama-guard-4-12b", False),
    "in capitals": ("router/any", "Maker/Text-Moderation", False),
    "a model that chats": ("router/any", "maker/chat-9b:free", True),
    "the model itself": (JUDGE_MODEL, JUDGE_MODEL, True),
    "its full name": ("llama-guard-4", "meta/llama-guard-4-12b", True),
}


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize(("asked", "model", "answers"), MODERATED.values(), ids=list(MODERATED))
def test_a_moderation_model_gives_no_answer(
    asked: str, model: str, answers: bool, live: bool
) -> None:
    """Its text is a verdict on the question; before it is shown, another model is asked."""
    said = json.dumps({"model": model, "choices": [says("Harmless.", finish_reason="stop")]})
    draft = Draft(asked, live)
    if answers:
        assert draft.take(Event(said)) == "Harmless."
        draft.end()
    else:
        with pytest.raises(Failure) as caught:
            draft.take(Event(said))
        assert caught.value.verdict is Verdict.FAULT
        assert model in caught.value.reason
        assert draft.text == ""


SUPPLIER: dict[str, tuple[bytes, str]] = {
    "comments, then only an error": (
        b": WAIT\n\n: WAIT\n\n"
        + event(choices=[], error={"code": 502, "message": "Nobody is there"}),
        "FAULT",
    ),
    "an error between texts": (
        TEXT + event(choices=[], error={"code": 502, "message": "JSON was broken"}),
        "FAULT",
    ),
    "the same as a limit": (
        TEXT
        + event(
            choices=[],
            error={
                "code": 429,
                "message": "JSON was broken",
                "metadata": {"error_type": "rate_limit_exceeded"},
            },
        ),
        "RATE_LIMITED",
    ),
    "no stream at all": (
        json.dumps(
            {
                "error": {
                    "code": 503,
                    "message": "Too many guests",
                    "metadata": {"error_type": "provider_overloaded"},
                }
            }
        ).encode(),
        "FAULT",
    ),
    "thinking used up the cap": (
        event({"delta": {"reasoning": "hm"}})
        + event({"delta": {"content": ""}, "finish_reason": "length"})
        + DONE,
        "UNSUITABLE",
    ),
}


@pytest.mark.parametrize(("data", "verdict"), SUPPLIER.values(), ids=list(SUPPLIER))
def test_a_suppliers_trouble_inside_a_200(data: bytes, verdict: str) -> None:
    """It is about this model, so the same provider's others may answer."""
    for live in (False, True):
        failure = read([data], live=live)
        assert (failure.verdict.name, failure.reach) == (verdict, Reach.MODEL)


def test_a_refused_request() -> None:
    """By its status, its headers and its body, of whatever form."""
    body = json.dumps({"error": {"message": "Slow.", "code": "x"}}).encode()
    for data in (body, b"\n" + body, b"\xef\xbb\xbf" + body, b"[" + body + b"]"):
        failure = read([data[:9], data[9:]], 429, retry_after="7")
        assert (failure.verdict, failure.hint) == (Verdict.RATE_LIMITED, 7.0)
        assert failure.reason == "429 Client Error: Too Many Requests: Slow."
    for data in (b"", HELLO, plain("Hello"), b"null", b"[]", b"\xff"):
        assert read([data], 401).verdict is Verdict.DENIED
        assert read([data], 300).verdict is Verdict.FAULT
        assert read([data], 399).reach is Reach.PROVIDER
        assert read([data], 199).verdict is Verdict.FAULT


NAMES = "error errors message code type status_code metadata availability headers choices delta"
NAMES += " content finish_reason native_finish_reason usage x_groq refusal reasoning text data raw"
WORDS = ["Provider returned error", "error", "429", "content_filter", "length", "try again in 5m"]
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS)
JSON = st.recursive(
    LEAVES | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(NAMES.split()), inner, max_size=6)
    ),
    max_leaves=12,
)
BYTES = st.one_of(
    st.binary(max_size=60),
    JSON.map(lambda value: json.dumps(value).encode()),
    JSON.map(lambda raw: event(error={"message": WORDS[0], "metadata": {"raw": raw}})[6:]),
    st.lists(JSON.map(lambda value: event(choices=value) if value else DONE)).map(b"".join),
    st.lists(JSON.map(lambda value: b"data: %s\n\n" % json.dumps(value).encode())).map(b"".join),
)
HEADERS = st.dictionaries(
    st.sampled_from(["retry_after", "retry_after_ms", "x_ratelimit_reset", "date"]),
    st.text(max_size=9) | st.integers().map(str) | st.sampled_from(["nan", "1 Jan 0000 00:00"]),
)


@quickly
@given(
    BYTES, st.sampled_from([200, 200, 200, 204, 302, 400, 429, 500, 599]), HEADERS, st.booleans()
)
def test_any_bytes_give_an_answer_or_a_failure(
    data: bytes, status: int, headers: Any, live: bool
) -> None:
    """Never another exception."""
    found = read([data[:7], data[7:]], status, live, **headers)
    if isinstance(found, Failure):
        assert found.hint is None or 0 <= found.hint <= 32 * 86400
    else:
        assert found[0].strip()
        assert status < 300


# --- What is shown ------------------------------------------------------------------------------

LINES = {
    "white space": (" a \r\n\tb\u2028c\x1b[31m\x00d ", "a b c [31m d"),
    "keys of all three": ("a csk-12345678 gsk_12345678 sk-or-v1-12345678b", "a [key] [key] [key]"),
    "what is no key": (
        "risk-averse gsk_1234567 task sk-short",
        "risk-averse gsk_1234567 task sk-short",
    ),
    "bearer": ("Authorization: Bearer a.b/c+d=~1", "Authorization: Bearer [key]"),
    "password in a URL": ("see http://me:secret@h.test/a@b", "see http://[key]@b"),
    "ids": ("in org_01jabc for user_9Xy12a, user", "in org_[id] for user_[id], user"),
    "ids of others": ("org-01jabc7, proj_9Xy12a", "org_[id], proj_[id]"),
    "words like ids": ("the org-wide user_id of proj_a", "the org-wide user_id of proj_a"),
    "300": ("a" * 300, "a" * 300),
    "301": ("a" * 301, "a" * 299 + "…"),
}


@pytest.mark.parametrize(("text", "line"), LINES.values(), ids=list(LINES))
def test_a_line_that_is_shown(text: str, line: str) -> None:
    """Safe to show, and short; what is too short for a key is not masked."""
    assert safe_line(text, []) == line
    assert safe_line(text, ["", " ", "xyz", "no"]) == line


KEYS = st.text("abcXYZ019-_.~+/=$^*(", min_size=4, max_size=40)
SPELLINGS = st.sampled_from([str, str.upper, str.lower, str.title, str.swapcase])


@quickly
@given(KEYS, SPELLINGS, st.text(max_size=9), st.text(max_size=9), st.integers(0, 300))
def test_a_key_of_any_spelling_never_survives(
    key: str, spell: Any, before: str, after: str, pad: int
) -> None:
    """Nor a part of it, where the line is cut."""
    line = safe_line("#" * pad + before + spell(key) + after, ["other", key])
    assert key.lower() not in line.lower()
    assert len(line) <= 300


KEY = "Zq81mN~nb-77TtL~~w02_xxP~d9Rk3"
OLD_KEY = "former-Yh55vB1qqWe8"


def leaks(line: str, secret: str) -> list[str]:
    """The parts of a secret, six characters long, that a line still shows."""
    shown = "".join(char for char in line if char.isprintable() and not char.isspace())
    parts = [secret[i : i + 6] for i in range(len(secret) - 5)]
    return [part for part in parts if part in shown]


def redacted(text: str) -> str:
    return safe_line(text, [OLD_KEY, KEY])


GAPS = ["\n", "\r\n", " ", "\t ", "\u200b", "\u200d", "\ufeff", "\u00ad", "\u2028", "\xa0", "\0"]


@pytest.mark.parametrize("gap", GAPS, ids=ascii)
def test_a_key_that_is_broken_up_is_masked(gap: str) -> None:
    """By line breaks, blanks, invisible characters: once, or after each character."""
    for text in (KEY[:9] + gap + KEY[9:], gap.join(KEY), KEY[:5] + gap * 4 + KEY[5:]):
        line = redacted(f"The key {text} is wrong")
        assert line == "The key [key] is wrong"


@pytest.mark.parametrize("encode", [quote, quote_plus, lambda key: quote(key, safe="")])
@pytest.mark.parametrize("spell", [str, str.upper, str.lower])
def test_a_key_in_a_url_is_masked(encode: Any, spell: Any) -> None:
    """With its odd characters encoded."""
    key = "Zq81/mN=nb+77TtL/w02_xxP"
    line = safe_line(f"GET /v1/chat?key={spell(encode(key))}&x=1 failed", [key])
    assert line == "GET /v1/chat?key=[key]&x=1 failed"


@pytest.mark.parametrize("pad", range(3960, 4010))
def test_a_key_at_the_limit_of_what_is_looked_at_is_not_cut_in_two(pad: int) -> None:
    """Nothing would recognize half of it; what is not shown takes no room in the line."""
    padding = "\u200b" * pad
    assert leaks(redacted(f"{padding} {KEY} is wrong"), KEY) == []
    assert leaks(redacted(f"{padding}{KEY} is wrong"), KEY) == []
    failure = judge(400, {}, {"error": {"message": f"{padding} {KEY} is wrong"}}, NOW)
    assert leaks(redacted(failure.reason), KEY) == []


CUTS = {
    "a title": "<html><title>SIZE KEY</title></html>",
    "a heading": "<html><h1>SIZE KEY</h1></html>",
    "first words": "<html><p>SIZE KEY</p></html>",
    "a code": '{"error": {"code": "SIZE-KEY"}}',
    "a type": '{"error": {"type": "SIZE-KEY", "message": ""}}',
    "a message": '{"error": {"message": "SIZE KEY"}}',
}


@pytest.mark.parametrize("form", CUTS.values(), ids=list(CUTS))
def test_no_part_of_a_reply_is_cut_inside_a_key(form: Any) -> None:
    """Wherever a text is shortened before it is shown, at whatever length."""
    for size in range(60, 301, 7):
        text = form.replace("SIZE", "x" * size).replace("KEY", KEY)
        reason = judge(400, {}, text, NOW).reason
        assert leaks(redacted(reason).lower(), KEY.lower()) == [], size


def test_old_keys_stay_masked() -> None:
    """A server may still echo the one that was used before; a long one hides a short one in it."""
    assert redacted(f"{OLD_KEY} was better than {KEY}") == "[key] was better than [key]"
    line = safe_line(f"a {KEY} b {KEY[:8]} c", [KEY[:8], KEY])
    assert line == "a [key] b [key] c"


def test_chat_models() -> None:
    """Those that answer text with text; only free ones, where only free ones are wanted."""
    listed: list[Any] = [
        {"id": "a"},
        {"id": "b", "active": True, "output_modalities": ["text"], "context_window": 4097},
        {"id": "c", "architecture": {"output_modalities": ["text"]}, "pricing": {"prompt": "0"}},
        {"id": "d", "pricing": {"prompt": "0", "completion": "0.1"}},
        {"id": "e", "pricing": {"prompt": "-1"}},
        *({"id": f"x-{kind}-1"} for kind in ("whisper", "tts", "guard", "embed", "rerank")),
        *({"id": f"x-{kind}-1:free"} for kind in ("content-safety", "moderation", "shield")),
        *({"id": name} for name in ("", "a b", "a\n", "x" * 201, "a?")),
        {"id": "f", "active": False},
        {"id": "g", "context_window": 4096},
        {"id": "h", "context_length": 4096},
        {"id": "i", "output_modalities": ["audio"]},
        {"id": "j", "architecture": {"output_modalities": ["text", "image"]}},
        *(None, 7, "a", [], {}, {"id": None}),
    ]
    chosen = [entry["id"] for entry in listed if is_chat_model(entry, free_only=False)]
    assert chosen == ["a", "b", "c", "d", "e"]
    assert [entry["id"] for entry in listed if is_chat_model(entry, free_only=True)] == ["c"]


GONE = {"error": {"code": "model_not_found"}}
NO_LISTS: list[Any] = [None, "", [], {}, {"data": None}, {"data": []}, {"data": [{"id": "?"}]}]


@pytest.mark.parametrize("listing", NO_LISTS, ids=str)
def test_a_models_list_that_holds_none(listing: Any) -> None:
    """It helps nobody, and breaks nothing."""
    script = {"m": [fakes.Reply(404, GONE)], "p/models": [fakes.Reply(200, listing)]}
    world = fakes.World(script, providers=[fakes.row("p", "m")])
    with pytest.raises(AllProvidersFailed):
        world.llm.complete("Where?")
    assert world.asked == "mp/models"


# --- Texts of megabytes -------------------------------------------------------------------------

CPU_SECONDS = 10  # far more than is needed; quadratic work takes longer, were it only to copy
MILLION = 1000000


def huge(text: str) -> str:
    """The text again and again, a million characters long."""
    return text * (MILLION // len(text))


@pytest.fixture
def bounded() -> Iterator[None]:
    """Ends a test that computes for too long; a machine that is busy otherwise does not count."""

    def stop(*_: object) -> None:
        raise AssertionError(f"more than {CPU_SECONDS} s of computing")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


PAGES = {
    "an endless title": "<html><title>" + "x" * 100000 + "</title>",
    "a title of blanks": "<html><title>" + huge(" "),
    "titles": "<html>" + huge("<title>"),
    "headings": "<html>" + huge("<h1>"),
    "styles": "<html>" + huge("<style>"),
    "scripts": "<html>" + huge("<script "),
    "brackets": "<html>" + huge("<"),
    "blanks before the page": huge(" ") + "<html><title>x</title>",
    "XML": "<?xml " + huge(" "),
    "blanks": huge(" "),
    "line breaks": huge("\r\n"),
    "zero-width characters": huge("\u200b"),
    "one word": huge("x"),
    "half of a JSON": huge('{"error":'),
}


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("page", PAGES.values(), ids=list(PAGES))
def test_a_huge_page_is_judged(page: str) -> None:
    """By its status, with a reason that can be shown."""
    for status, verdict in ((503, Verdict.FAULT), (404, Verdict.UNSUITABLE)):
        failure = judge(status, {}, page, NOW)
        assert failure.verdict is verdict
        assert redacted(failure.reason).startswith(f"{status} ")
    assert read([page.encode()]).verdict is Verdict.FAULT


WORDS_OF_PATTERNS = ["model", "models", "account", "api key", "payment", "card", "ip", "prompt"]
WORDS_OF_PATTERNS += ["content", "maximum", "exceed", "context length", "request too", "per"]
WORDS_OF_PATTERNS += ["try again in", "wait for", "retry after 1h", "resets in 1.1", "1m", "violat"]
WORDS_OF_PATTERNS += ["rate", "too many", "key", "organization", "<think>", "sk-", "Bearer", "://"]


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("word", WORDS_OF_PATTERNS)
def test_a_pattern_that_begins_again_and_again(word: str) -> None:
    """It never becomes a match, and costs no more than reading the text."""
    for text in (huge(word), huge(word + " "), word + huge(" ")):
        for status in (200, 403, 429):
            failure = judge(status, {}, {"error": {"message": text, "type": text}}, NOW)
            assert failure.verdict is not Verdict.REFUSED
            assert failure.hint is None or failure.hint <= 3600
        assert len(redacted(text)) <= 300


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize(
    "code", ["a", "_failed_", "moderation", "model_", "account_limi", "_too_large_", "*", "[a"]
)
def test_a_code_of_megabytes(code: str) -> None:
    """Only its beginning is looked at; what the message says is shown all the same."""
    for name in ("code", "type", "error_type", "limit_source"):
        failure = judge(500, {}, {"error": {name: huge(code), "message": "Hm"}}, NOW)
        assert failure.reason.endswith(": Hm")


HEADER_NAMES = ["retry-after", "retry-after-ms", "date", "x-ratelimit-reset", "location"]


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("value", ["9", "Fri, ", " ", "-", "1 Jan ", "https://", "e9", "_1"])
def test_a_header_of_megabytes(value: str) -> None:
    """It is no hint."""
    headers = dict.fromkeys(HEADER_NAMES, huge(value))
    assert judge(429, headers, "", NOW).hint is None
    assert judge(301, headers, "", NOW).reach is Reach.PROVIDER


@pytest.mark.usefixtures("bounded")
def test_thousands_of_messages_in_one_error() -> None:
    """One beside the other, or one inside the other: the first ones tell enough."""
    messages = [{"message": f"No {number}"} for number in range(6000)]
    for body in (messages, {"errors": messages}, {"error": {"errors": messages}}):
        reason = judge(500, {}, body, NOW).reason
        assert reason.startswith("500 Server Error: Internal Server Error: No 0: No 1: No 2")
        assert len(reason) < 1000

    details = {str(number): {"message": "x" * 1000} for number in range(6000)}
    for name in ("message", "detail", "error"):
        assert judge(500, {}, {name: details}, NOW).verdict is Verdict.FAULT

    quoted = json.dumps({"message": "the last"})
    for _ in range(9):
        metadata = {"raw": quoted}
        quoted = json.dumps({"message": "Provider returned error", "metadata": metadata})
    reason = judge(500, {}, json.loads(quoted), NOW).reason
    assert reason.endswith("Provider returned error: the last")


NESTINGS = {
    "lists": ("[", "]"),
    "errors": ('{"error":', "}"),
    "messages": ('{"message":', "}"),
    "messages in lists": ('{"message":[', "]}"),
    "choices": ('{"choices":[', "]}"),
}


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize(("opening", "closing"), NESTINGS.values(), ids=list(NESTINGS))
def test_a_deep_reply(opening: str, closing: str) -> None:
    """However deep it is, up to where Python gives up and beyond, it is just a bad reply."""
    for depth in [*range(940, 1001, 5), 5000, 100000]:
        body = (opening * depth + '"x"' + closing * depth).encode()
        assert read([body], 500).verdict is Verdict.FAULT
        assert read([body]).verdict is Verdict.FAULT
        assert read([b"data: " + body + b"\n\n"]).verdict is Verdict.FAULT


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("depth", [300, 900, 985, 990, 995, 1000, 100000])
@pytest.mark.parametrize(("opening", "closing"), NESTINGS.values(), ids=list(NESTINGS))
def test_a_deep_error_sends_the_question_on(opening: str, closing: str, depth: int) -> None:
    """Nothing but our own errors comes out of complete(), whatever the server nests."""
    body = opening * depth + '"x"' + closing * depth
    world = fakes.World({"a": [fakes.Reply(400, body)]})
    assert world.llm.complete("Where?").text == "B"


def chatter(text: str, times: int) -> Iterator[bytes]:
    """Many events with the same text, in chunks of about 64 KB, as a socket gives them."""
    one = event(says(text))
    a_chunk = max(1, 65536 // len(one))
    for done in range(0, times, a_chunk):
        yield one * min(a_chunk, times - done)


@pytest.mark.usefixtures("bounded")
def test_thinking_without_end() -> None:
    """Megabytes of thoughts: none of them is kept, and the answer after them is found."""
    thought = "I wonder whether </thin" + " or not" * 40
    thoughts = chatter(thought, MAX_EVENT * 3 // 4 // len(thought))
    end = event(says("</think>Hello")) + event(END)
    draft = Draft("m", False)
    for found in events_in(lines_in([event(says("<think>")), *thoughts, end])):
        draft.take(found)
    draft.end()
    assert draft.text == "Hello"


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("text", [" ", "\n" * 20, "\u200b" * 20])
def test_white_space_without_end(text: str) -> None:
    """100,000 events of nothing to see are no answer, and no hindrance to one that follows."""
    blanks = list(chatter(text, 100000))
    whole, draft = read([*blanks, HELLO], live=True)
    assert whole == text * 100000 + "Hello"
    assert draft.texts[0].endswith("Hel")
    assert read([*blanks, event(END)], live=True).reason == EMPTY


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("words", ["I will not. " * 80, "No" * 500], ids=["words", "no blanks"])
def test_a_refusal_of_megabytes(words: str) -> None:
    """Its beginning is the reason; one that is longer than any model's is given up."""
    draft = Draft("m", False)
    piece = {"delta": {"refusal": words}}
    take(draft, *itertools.repeat(piece, MAX_EVENT * 3 // 4 // len(words)))
    draft.take(Event("[DONE]"))
    with pytest.raises(Failure) as caught:
        draft.end()
    assert caught.value.verdict is Verdict.REFUSED
    assert redacted(caught.value.reason).startswith(words[:10])

    with pytest.raises(Failure) as caught:
        take(Draft("m", False), *itertools.repeat(piece, 2 + MAX_EVENT // len(words)))
    assert caught.value.verdict is Verdict.FAULT


TRICKLES = {
    "line breaks": (b"\n", 200000),
    "carriage returns": (b"\r", 200000),
    "comments": (b": wait\n\n", 200000),
    "fields": (b"id: 7\n", 200000),
    "empty data": (b"data:\n\n", 200000),
    "data without a blank line": (b"data: x\n", 200000),
    "one endless line": (b"x" * 64, 200000),
    "bytes that are not UTF-8": (b"\xff", 200000),
}


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize(("drop", "times"), TRICKLES.values(), ids=list(TRICKLES))
def test_a_reply_that_trickles(drop: bytes, times: int) -> None:
    """Every read brings a little; nothing of what came before is read again."""
    draft = Draft("m", False)
    with contextlib.suppress(Failure, ErrorInside):
        events = list(events_in(lines_in(itertools.repeat(drop, times))))
        assert len(events) == 1
        assert draft.take(events[0]) is None
    assert draft.text == ""


LONG = b"x" * 65536
ENDLESS = {
    "a line": itertools.repeat(LONG),
    "a text of many lines": itertools.repeat(LONG + b"\n"),
    "an event": itertools.repeat(b"data: " + LONG + b"\n"),
    "an event after others": itertools.chain([HELLO], itertools.repeat(b"data: " + LONG + b"\n")),
}


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("pieces", ENDLESS.values(), ids=list(ENDLESS))
def test_a_reply_without_end_is_given_up(pieces: Iterator[bytes]) -> None:
    """When it is longer than anything that a model says."""
    size = 0

    def counted() -> Iterator[bytes]:
        nonlocal size
        for piece in pieces:
            size += len(piece)
            yield piece

    with pytest.raises(Failure) as caught:
        list(events_in(lines_in(counted())))
    assert caught.value.verdict is Verdict.FAULT
    assert size < MAX_EVENT + 10 * len(LONG)


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("name", ["content", "reasoning", "thinking"])
def test_an_answer_without_end_is_given_up(name: str) -> None:
    """Text or thoughts."""
    choice = {"delta": {name: "x" * 65536}}
    endless = itertools.repeat(event(choice))
    assert read(itertools.islice(endless, 1 + MAX_EVENT // 65536)).verdict is Verdict.FAULT
    draft = Draft("m", False)
    with pytest.raises(Failure):
        take(draft, *itertools.repeat(choice, 1 + MAX_EVENT // 65536))


LINES_OF_BODIES: dict[str, tuple[list[bytes], list[str]]] = {
    "line feeds": ([b"a\nb\n"], ["a", "b", ""]),
    "carriage returns": ([b"a\rb\r"], ["a", "b"]),
    "both": ([b"a\r\nb\r\n"], ["a", "b", ""]),
    "both, cut in two": ([b"a\r", b"\nb"], ["a", "b"]),
    "no end": ([b"a"], ["a"]),
    "nothing": ([], [""]),
    "a character cut in two": (["é".encode()[:1], "é\n".encode()[1:]], ["é", ""]),
    "a byte order mark": ([b"\xef\xbb\xbfa\nb"], ["a", "b"]),
}


@pytest.mark.parametrize(("pieces", "lines"), LINES_OF_BODIES.values(), ids=list(LINES_OF_BODIES))
def test_lines_of_a_body(pieces: list[bytes], lines: list[str]) -> None:
    """However they end, and however their bytes come."""
    assert list(lines_in(pieces)) == lines
    single = [bytes([byte]) for piece in pieces for byte in piece]
    assert [line for line in lines_in(single) if line] == [line for line in lines if line]


def test_events_of_lines() -> None:
    """Each with its kind; a body without any is one, and a plain one."""
    lines = ["event: a", "data: 1", "data: 2", "", "data: 3", "", ": hm", "", "data:", "", "data:4"]
    events = [Event("1\n 2", "a"), Event("3"), Event("4")]
    assert [(e.data.replace(" ", ""), e.kind) for e in events_in(lines)] == [
        (e.data.replace(" ", ""), e.kind) for e in events
    ]
    assert not any(e.is_plain for e in events_in(lines))
    assert list(events_in(["", '{"a":', "1}", ""])) == [Event('{"a":\n1}', is_plain=True)]
    assert list(events_in([])) == [Event("", is_plain=True)]


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("text", ["x" * 65536, " " * 65536, "Retry-After: " * 5000, "://" * 20000])
def test_a_status_line_of_64_kilobytes(text: str) -> None:
    """An exception may quote all of it; what is shown is short."""
    for error in (
        BadStatusLine(text),
        requests.ConnectionError(f"('Connection aborted.', BadStatusLine({text!r}))"),
        requests.ConnectionError(BadStatusLine(text)),
        requests.exceptions.InvalidHeader(text),
        OSError(text),
    ):
        world = fakes.World({"a": [fakes.Reply(error=error)]}, max_attempts=1)
        answer = world.llm.complete("Where?")
        attempt = answer.attempts[0]
        assert attempt.verdict is Verdict.FAULT
        assert 0 < len(attempt.reason) <= 300
