"""Requests, and replies read from bytes: tables of cases."""

from __future__ import annotations

import json
import math
from typing import Any, Iterable

import fakes
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fallback_llm import (
    Failure,
    Provider,
    Reply,
    Turn,
    Verdict,
    conversation,
    figures,
    is_blank,
    one_line,
    request_body,
)

DEFAULTS: dict[str, Any] = {"oss": {"effort": "low", "top_p": 1}, "oss-2": {"effort": "none"}}
ROW = Provider("p", "https://p.test", None, ("m",), defaults=DEFAULTS)
quickly = settings(deadline=None, database=None, derandomize=True, max_examples=150)

# --- Requests -----------------------------------------------------------------------------------


def sent(model: str, **fields: Any) -> Any:
    return json.loads(request_body(fields, Turn(ROW, model, "1/1")).decode())


def test_request_body() -> None:
    """The row's defaults for this model, the caller's parameters over them; lone surrogates are
    replaced.
    """
    assert sent("m", messages=[], top_p=0) == {"model": "m", "messages": [], "top_p": 0}
    assert sent("an-oss-1") == {"model": "an-oss-1", "effort": "low", "top_p": 1}
    assert sent("oss-2", top_p=0.5) == {"model": "oss-2", "effort": "none", "top_p": 0.5}
    assert DEFAULTS["oss"] == {"effort": "low", "top_p": 1}
    texts = ["é😀\u2028\0\n", "\ud83d\ude00", "a\ud83d", "\ude00b"]
    assert sent("m", said=texts)["said"] == ["é😀\u2028\0\n", "😀", "a\ufffd", "\ufffdb"]
    assert "é".encode() in request_body({"said": "é"}, Turn(ROW, "m", ""))


def test_what_json_cannot_carry_is_refused() -> None:
    """Before anything is sent."""
    endless: list[Any] = []
    endless.append(endless)
    for wrong in (math.nan, math.inf, {1, 2}, b"x", endless):
        with pytest.raises(ValueError, match=r"^the question cannot be sent as JSON: "):
            request_body({"x": wrong}, Turn(ROW, "m", ""))


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


BE, HI, YES, MORE = (
    said("system", "s"),
    said("user", "hi"),
    said("assistant", "y"),
    said("user", "q"),
)
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
    for asked, messages in CONVERSATIONS:
        assert conversation(*asked) == messages
    for asked in NO_CONVERSATIONS:
        problem = r"^(the question is empty$|(the question|the system|messages) must be )"
        with pytest.raises(ValueError, match=problem):
            conversation(*asked)


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


def reply_of(status: int = 200, **headers: str) -> Reply:
    """A reply whose body is to come."""
    reply = Reply(lambda: 0.0, 60.0, math.inf, 1.8e9)
    reply.status = status
    reply.headers = {name.replace("_", "-"): headers[name] for name in headers}
    return reply


def read(chunks: Iterable[bytes], status: int = 200, live: bool = False, **headers: str) -> Any:
    """(the text, the reply) of an answer, or the Failure."""
    reply, texts = reply_of(status, **headers), []  # type: Reply, list[str]
    try:
        texts += reply.read(chunks)
        failure = reply.failure(live)
    except Failure as raised:
        failure = raised
    assert "".join(texts) == "".join(reply.text)
    return failure or ("".join(texts), reply)


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
            text, reply = read(chunks, live=live)
            assert text == "Hello"
            assert reply.finish_reason == ("" if b'"stop"' not in data else "stop")


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


def test_texts_come_as_they_are_said() -> None:
    """Each event gives its text at once; what may become <think> is held back."""
    events = (event(says(text)) for text in (" ", "<th", "e", "", "n"))
    assert [*reply_of().read(events)] == ["", "", " <the", "", "n"]


def test_usage() -> None:
    """The last one said, its numbers only."""
    junk = {"d": "x", "e": [1], "f": None, "g": math.inf, "h": math.nan, "a key": 1}
    spent: dict[str, Any] = {"usage": {"a": 1, "b": {"c": 2.5, **junk}, **junk}}
    for data in (
        HELLO[: -len(DONE)] + event(choices=[], **spent) + DONE,
        event(says("Hello", finish_reason="stop"), **spent) + event({}, usage=None),
        event(says("Hello", finish_reason="stop"), x_groq=spent),
    ):
        assert read([data])[1].usage == figures(spent["usage"]) == {"a": 1, "b": {"c": 2.5}}
    assert read([plain("Hello")])[1].usage == USAGE["usage"]


LIMIT = {"message": "Slow.", "code": 429}
CUT, EMPTY, TEXT = "the answer was cut: it has no end", "the answer is empty", event(says("Hel"))
NOTHING, THOUGHT = "the reply holds no answer", "only reasoning came, no answer"
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
    "a number": (b"data: 5\n\n" + HELLO, "FAULT", "no answer in the reply: "),
    "not UTF-8": (stream(says("xyz")).replace(b"y", b"\xff"), "FAULT", "the answer is not UTF-8"),
    "error": (TEXT + event(error=LIMIT), "RATE_LIMITED", "error 429 inside the reply: Slow."),
    "error beside choices": (event(says(""), error=LIMIT), "RATE_LIMITED", "error 429 inside"),
    "error in the choice": (event({**END, "error": LIMIT}), "RATE_LIMITED", "error 429 inside"),
    "error with its status": (event(error={"a": 1}, status_code=401), "DENIED", "error 401 inside"),
    "error of x_groq": (event(x_groq={"error": "boom"}), "FAULT", "error: boom"),
    "error event": (b"event: error\n" + event(error=LIMIT), "RATE_LIMITED", "error 429 inside "),
    "error event, flat": (b"event:error\n" + event(**LIMIT), "RATE_LIMITED", "error 429 inside "),
    "error event, text": (b"event: error\ndata: boom\n\n", "FAULT", "error: boom"),
    "error at the end": (HELLO[:-14] + event(error=LIMIT), "RATE_LIMITED", "error 429 inside the"),
    "finish_reason error": (
        TEXT + event({"finish_reason": "error", "native_finish_reason": "MALFORMED"}),
        "FAULT",
        "error: MALFORMED",
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
        assert (failure.verdict.name, failure.wide) == (verdict, verdict == "DENIED")
        assert failure.reason.startswith(reason)


def test_live_skips_what_is_broken() -> None:
    """What was shown cannot be taken back; a cut is still a cut, and no text no answer."""
    broken = event(says("Hel")) + b"data: {oops}\n\n"
    assert read([broken + event(says("lo")) + event(END)], live=True)[0] == "Hello"
    assert read([broken], live=True).reason == CUT
    assert read([b"data: {oops}\n\n" + event(END)], live=True).reason.startswith("no answer in")


def test_a_refused_request() -> None:
    """By its status, its headers and its body, of whatever form."""
    body = json.dumps({"error": {"message": "Slow.", "code": "x"}}).encode()
    for data in (body, b"\n" + body, b"\xef\xbb\xbf" + body, b"[" + body + b"]"):
        failure = read([data[:9], data[9:]], 429, retry_after="7")
        assert (failure.verdict, failure.hint) == (Verdict.RATE_LIMITED, 7.0)
        assert failure.reason == "429 Client Error: Too Many Requests: Slow."
    for data in (b"", HELLO, plain("Hello"), b"null", b"[]", b"\xff"):
        assert read([data], 401).verdict is Verdict.DENIED
        assert (read([data], 300).verdict, read([data], 399).wide) == (Verdict.FAULT, True)
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
    "password in a URL": ("see http://me:secret@h.test/a@b", "see http://[key]@h.test/a@b"),
    "ids": ("in org_01jabc for user_9Xy, user", "in org_[id] for user_[id], user"),
    "300": ("a" * 300, "a" * 300),
    "301": ("a" * 301, "a" * 299 + "…"),
}


@pytest.mark.parametrize(("text", "line"), LINES.values(), ids=list(LINES))
def test_one_line(text: str, line: str) -> None:
    """Safe to show, and short."""
    assert one_line(text) == line
    assert one_line(text, [None, "", "xyz", "no"]) == line


KEYS = st.text("abcXYZ019-_.~+/=$^*(", min_size=4, max_size=40)
SPELLINGS = st.sampled_from([str, str.upper, str.lower, str.title, str.swapcase])


@quickly
@given(KEYS, SPELLINGS, st.text(max_size=9), st.text(max_size=9), st.integers(0, 300))
def test_a_key_of_any_spelling_never_survives(
    key: str, spell: Any, before: str, after: str, pad: int
) -> None:
    """Nor a part of it, where the line is cut."""
    line = one_line("#" * pad + before + spell(key) + after, ["other", key])
    assert key.lower() not in line.lower()
    assert len(line) <= 300


def test_chat_models() -> None:
    """Those that answer text with text; only free ones, where only free ones are wanted."""
    listed: list[Any] = [
        {"id": "a"},
        {"id": "b", "active": True, "output_modalities": ["text"], "context_window": 4097},
        {"id": "c", "architecture": {"output_modalities": ["text"]}, "pricing": {"prompt": "0"}},
        {"id": "d", "pricing": {"prompt": "0", "completion": "0.1"}},
        {"id": "e", "pricing": {"prompt": "-1"}},
        *({"id": f"x-{kind}-1"} for kind in ("whisper", "tts", "guard", "embed", "rerank")),
        *({"id": name} for name in ("", "a b", "a\n", "x" * 201, "a?")),
        {"id": "f", "active": False},
        {"id": "g", "context_window": 4096},
        {"id": "h", "context_length": 4096},
        {"id": "i", "output_modalities": ["audio"]},
        {"id": "j", "architecture": {"output_modalities": ["text", "image"]}},
    ]

    def served(body: Any, free_only: bool) -> list[str]:
        rows = [fakes.row("p", "m", free_only=free_only)]
        world = fakes.World({"p/models": [fakes.Reply(200, body)]}, providers=rows)
        return world.llm.served(world.llm.rows()[0])

    assert served({"data": listed}, free_only=False) == ["a", "b", "c", "d", "e"]
    assert served({"data": listed}, free_only=True) == ["c"]
    nothings: list[Any] = [None, "", [], {}, {"data": None}, {"data": []}, {"data": [{"id": "?"}]}]
    for nothing in nothings:
        assert served(nothing, free_only=False) == []
