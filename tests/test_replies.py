"""What replies mean: verdicts, wait hints, failures inside a 200, streams, shown reasons."""

from __future__ import annotations

import contextlib
import json
import re
import string
from email.utils import formatdate
from typing import Any

import pytest
import requests
from fakes import DONE, EPOCH, ROWS, Reply, World, event, limited, row, says
from hypothesis import given
from hypothesis import settings as rules
from hypothesis import strategies as some

from fallback_llm import AnswerRefused, FallbackLLMError, StreamInterrupted

pytestmark = pytest.mark.usefixtures("bare")

MODEL, PROVIDER, QUESTION = "b", "c", ""  # how far a failure of a reaches: who is asked next


def judged(reply: Reply) -> tuple[str, str]:
    """The verdict on a's only reply, and how far it reaches."""
    world = World({"a": [reply]}, max_attempts=1)
    try:
        first = world.llm.complete("Where?").attempts[0]
    except AnswerRefused as error:
        first = error.attempts[0]
    return first.verdict.name if first.verdict else "an answer", world.asked[1:]


def flat(message: str, code: str = "", **more: Any) -> Any:
    """An error as Cerebras says it."""
    return {"message": message, "type": "invalid_request_error", "param": "", "code": code, **more}


def nested(message: str, code: Any = None, **more: Any) -> Any:
    """An error as Groq says it (a code is a word or absent), or OpenRouter (it is the status)."""
    return {"error": {"message": message, **({} if code is None else {"code": code}), **more}}


def routed(message: str, code: int, **metadata: Any) -> Any:
    """An error as OpenRouter says it, with metadata."""
    return {**nested(message, code, metadata=metadata), "user_id": "user_12345678"}


RAW = '{"error":{"message":"bad schema","code":"context_length_exceeded"}}'
LOST = '{"error":{"message":"Never heard of it","code":"model_not_found"}}'
FULL = nested("Full", http_status=429, availability={"code": "capacity_exhausted"})
MINUTE = routed("Over", 429, limit_source="openrouter_free_tier_per_minute")
DAY = routed("Over: free-models-per-day", 429, limit_source="openrouter_free_tier_daily")
UPSTREAM = {"limit_source": "upstream_provider_shared_pool", "provider_name": "Somebody"}
LARGE = nested("Request too large for `m`: tokens per minute (TPM)", "rate_limit_exceeded")
REACHED = "Rate limit reached for model `m` on tokens per minute. Upgrade at the billing settings"
VERDICTS: dict[str, list[tuple[str, int, Any]]] = {
    f"UNSUITABLE {MODEL}": [
        ("the context is too short, flat", 400, flat("Too long", "context_length_exceeded")),
        ("a wrong parameter, flat", 400, flat("'top_k' is unknown here", "wrong_api_format")),
        ("a wrong parameter, nested", 400, nested("`reasoning_effort` must be low or high")),
        ("a wrong parameter, 422", 422, flat("Not this way")),
        ("an error type without a code", 400, nested("No", error_type="context_length_exceeded")),
        ("a validation error", 400, {"success": False, "error": {"name": "ZodError"}}),
        ("an upstream's words, stringified", 400, routed("Provider returned error", 400, raw=RAW)),
        ("a request too large, 413", 413, LARGE),
        ("a request too large, sent as 429", 429, LARGE),
        ("a 404 without JSON", 404, "No such path"),
        ("a code that decides nothing", 400, nested("Hm", "rate_limit_exceeded", type="requests")),
        ("a policy on data", 404, nested("No", availability={"code": "privacy_restricted"})),
        ("a policy on data, in words", 404, routed("None matches your data policy", 404)),
        ("parameters that nobody knows", 404, routed("Nobody knows these parameters", 404)),
        ("allowed providers", 404, routed("None of the allowed providers has m", 404)),
        ("terms of a supplier", 403, routed("Against the terms of service of S", 403)),
        ("a teapot", 418, ""),
        ("a JSON list", 400, [nested("Not so")]),
        ("null", 400, None),
    ],
    f"GONE {MODEL}": [
        ("a model that is not found, flat", 404, flat("Never heard of it", "model_not_found")),
        ("an archived model", 404, flat("It rests", "model_archived", type="model_archived_error")),
        ("a decommissioned model, 400", 400, nested("It rests", "model_decommissioned")),
        ("a model that is not found, nested", 404, nested("Unknown", "model_not_found")),
        ("a model ID that is not valid", 400, routed("m/x:free is not a valid model ID", 400)),
        ("a model without endpoints", 404, nested("No endpoints found for m/x.", 404)),
        ("a model that is gone upstream", 404, routed("Provider returned error", 404, raw=LOST)),
        ("any other 404 in JSON", 404, flat("The gratis weeks are over")),
        ("any other 403 in JSON", 403, routed("m is for coding tools only", 403)),
        ("a model switched off", 403, nested("Ask an admin", "model_permission_blocked_team")),
    ],
    f"DENIED {MODEL}": [  # free models of the same key may answer
        ("no money, no code", 402, nested("Pay first", 402)),
        ("no credits", 402, routed("Pay first", 402, limit_source="openrouter_credits")),
    ],
    f"DENIED {PROVIDER}": [
        ("a wrong key, flat", 401, flat("Who are you?", "wrong_api_key")),
        ("a wrong key, nested", 401, nested("Who are you?", "invalid_api_key")),
        ("a wrong key, no code", 401, nested("No such user", 401)),
        ("no money, flat", 402, flat("Pay first", "payment_required")),
        ("a spending limit, sent as 400", 400, nested("Enough spent", "spend_limit_reached")),
        ("a flagged key", 403, nested("API key flagged: see our content policy")),
        ("a flagged card", 400, nested("Payment method flagged")),
        ("a flagged address", 403, nested("The IP 192.0.2.7 was flagged by our filter")),
        ("a key at its end", 403, nested("Key limit exceeded (total limit)", 403)),
        ("a web firewall", 403, "error code: 1010"),
        ("a restricted account, sent as 400", 400, nested("Write us", "organization_restricted")),
        ("an unpaid account, sent as 400", 400, nested("Pay first", "organization_delinquent")),
        ("no quota, sent as 429", 429, nested("No more", "insufficient_quota")),
        ("no quota in words", 429, nested("You exceeded your current quota, see your plan")),
        ("an unpaid account in words", 400, nested("A payment is overdue")),
    ],
    f"RATE_LIMITED {MODEL}": [
        ("a quota, flat", 429, flat("Tokens per minute used up", "token_quota_exceeded")),
        ("a limit that mentions billing", 429, nested(REACHED, "rate_limit_exceeded")),
        ("an upstream's limit", 429, routed("Provider returned error", 429, **UPSTREAM)),
        ("a limit without a source", 429, routed("Provider returned error", 429, raw="Slow down")),
        ("capacity", 429, FULL),
        ("a 429 without a body", 429, b""),
        ("a 429 of the type of a 500", 429, nested("Slow down", type="server_error")),
        ("a limit that mentions a policy", 429, nested("Slow down: see our content policy")),
    ],
    f"RATE_LIMITED {PROVIDER}": [
        ("free tier, per day", 429, DAY),
        ("free tier, per minute", 429, MINUTE),
        ("free tier, in words only", 429, nested("Rate limit exceeded: free-models-per-min", 429)),
    ],
    f"FAULT {MODEL}": [
        *[(f"{status}", status, nested("Not now")) for status in (408, 409, 424, 425, 498)],
        *[(f"{status}", status, flat("Not now")) for status in (500, 502, 503, 504, 520, 529)],
        ("a queue, sent as 429", 429, flat("Busy", "queue_exceeded", type="too_many_requests")),
        ("a model over capacity", 503, nested("m is over capacity", type="internal_server_error")),
        ("a failed generation, sent as 400", 400, nested("No JSON", "json_validate_failed")),
        ("an output that failed, sent as 400", 400, nested("Unreadable", "output_parse_failed")),
        ("a tool call that failed, sent as 400", 400, nested("Wrong call", "tool_use_failed")),
        ("a 500 with the type of a 400", 500, flat("Not now")),
        ("a web page", 502, "<!DOCTYPE html><title>Bad gateway</title>"),
        ("no body", 503, b""),
        ("bytes", 500, b"\xff\xfe\x00\x80"),
        ("a deep body", 500, "[" * 100000),
        ("an upstream that hung up", 502, routed("Provider returned error", 502, raw="reset")),
    ],
    f"FAULT {PROVIDER}": [
        ("a network that is not welcome", 403, nested("No. Please check your network settings.")),
        *[(f"redirect {status}", status, b"") for status in (301, 302, 307, 308)],
    ],
    f"REFUSED {QUESTION}": [
        ("moderation", 403, routed("Flagged", 403, reasons=["violence"], flagged_input="a word")),
        ("a flagged prompt", 400, nested("Your prompt was flagged as hateful")),
        ("a content policy", 400, nested("Not that", error_type="content_policy_violation")),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("expected", "reply"),
    [
        pytest.param(tuple(expected.split(" ")), Reply(status, body), id=name)
        for expected, rows in VERDICTS.items()
        for name, status, body in rows
    ],
)
def test_the_verdict_on_an_error(expected: Any, reply: Reply) -> None:
    """Body and status -> verdict, and who is asked next."""
    assert judged(reply) == expected


@pytest.mark.parametrize(
    "error",
    [
        requests.ConnectionError("no route"),
        requests.ConnectTimeout("slow"),
        requests.exceptions.SSLError("certificate"),
        requests.exceptions.ProxyError("no"),
        OSError("reset"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_reply_is_the_providers_fault(error: Exception) -> None:
    assert judged(Reply(error=error)) == ("FAULT", PROVIDER)


def test_a_limit_that_is_not_to_be_retried_is_a_fault() -> None:
    """x-should-retry: false decides."""
    assert judged(Reply(429, flat("Busy"), {"X-Should-Retry": "false"})) == ("FAULT", MODEL)


# --- How long a server wants to be left alone ---------------------------------------------------


def at(seconds: float) -> str:
    """The HTTP date so many seconds from now."""
    return formatdate(EPOCH + seconds, usegmt=True)


def reset(seconds: float, scale: int = 1) -> dict[str, str]:
    return {"X-RateLimit-Reset": str(int((EPOCH + seconds) * scale))}


def hinting(
    name: str, seconds: Any, headers: Any = None, body: Any = b"", status: int = 429
) -> Any:
    return pytest.param(seconds, Reply(status, body, headers or {}), id=name)


JUNK = ("soon", "nan", "inf", "", "-7", "1e999", at(-9))
NONE = 1.0  # our own backoff
HINTS = [
    hinting("seconds", 7, {"retry-after": "7"}),
    hinting("a fraction", 7.5, {"Retry-After": " 7.5 "}),
    hinting("milliseconds", 7.25, {"retry-after-ms": "7250"}),
    hinting("milliseconds before seconds", 7.25, {"retry-after-ms": "7250", "retry-after": "9"}),
    hinting("a date", 20, {"Retry-After": at(20)}),
    hinting("a date, by the server's own", 20, {"Retry-After": at(3620), "Date": at(3600)}),
    hinting("text, Go's minutes", 86.4, body=nested("Please try again in 1m26.4s. Need more?")),
    hinting("text, Go's hours", 3723.5, body=nested("Please try again in 1h2m3.5s.")),
    hinting("text, seconds", 6.3525, body=nested("Please try again in 6.3525s.")),
    hinting("text, milliseconds", 2.85, body=flat("Please try again in 2850ms.")),
    hinting("text, words", 40, body=nested("All are busy. Retry after 40 seconds.", 429)),
    hinting("header before text", 7, {"retry-after": "7"}, nested("Please try again in 6.3s.")),
    hinting("a field", 30, body=routed("Slow", 429, retry_after_seconds=30)),
    hinting("availability", 40, body=nested("Full", availability={"retry_after": 40})),
    hinting("field before text", 30, body=routed("try again in 9s", 429, retry_after_seconds=30)),
    hinting("reset in ms", 50, reset(50, 1000)),
    hinting("reset in seconds", 50, reset(50)),
    hinting("reset in ms in the body", 50, body=routed("Over", 429, headers=reset(50, 1000))),
    hinting("reset in seconds in the body", 50, body=routed("Over", 429, headers=reset(50))),
    hinting("text before reset", 9, reset(50), nested("try again in 9s")),
    hinting("a fault may hint too", 7, {"retry-after": "7"}, status=503),
    hinting("32 days", 32 * 86400, {"retry-after": str(32 * 86400)}),
    hinting("more is junk", NONE, {"retry-after": str(32 * 86400 + 1)}),
    hinting("zero is a hint", NONE, {"retry-after": "0"}, nested("Please try again in 9s")),
    *[hinting(f"junk: {junk!r}", NONE, {"retry-after": junk}) for junk in JUNK],
    hinting("a reset that is past", NONE, reset(-9, 1000)),
    hinting("the next valid one", 9, {"retry-after": "nan"}, nested("Please try again in 9s")),
    hinting("per day counts as an hour", 3600, body=flat("Tokens per day used up")),
    hinting("per hour counts as an hour", 3600, body=flat("Requests per hour used up")),
    hinting("a hint before per day", 214, {"retry-after": "214"}, nested("tokens per day (TPD)")),
    hinting("per minute is no hint", NONE, body=flat("Tokens per minute used up")),
    hinting("free tier per day", 3600, body=routed("free-models-per-day", 429)),
    hinting("a field that is no number", NONE, body=routed("Over", 429, retry_after_seconds=[])),
    hinting("headers that are none", NONE, body=routed("Over", 429, headers=7)),
]  # fmt: skip


@pytest.mark.parametrize(("seconds", "reply"), HINTS)
def test_a_wait_hint(seconds: float, reply: Reply) -> None:
    """Headers and body -> the seconds that are slept before the model is asked again."""
    alone: Any = {"providers": [row("one", "a")]}
    world = World({"a": [reply, says("A")]}, base_delay=NONE, max_delay=1e8, **alone)
    assert world.llm.complete("Where?").text == "A"
    assert world.slept == [pytest.approx(seconds)]


# --- Inside a 200 -------------------------------------------------------------------------------

IN_STREAM = (
    b'data: {"status_code":500,"error":{"message":"Hm","type":"server_error","code":""}}\n\n'
)
TOOL = (
    b'event: error\ndata: {"error":{"message":"Hm","code":"tool_use_failed","status_code":400}}\n\n'
)
CHOICE: Any = says("Par", "error").body
CHOICE["choices"][0]["error"] = {"code": 502, "message": "Hm"}
CUT = (event("Par"), ConnectionResetError("cut"))
INSIDE: dict[str, list[tuple[str, Any]]] = {
    f"FAULT {MODEL}": [
        ("nothing", b""),
        ("white space", b"\n \n\t\n"),
        ("comments only", b": wait\n\n: wait\n\n"),
        ("a web page", "<html><title>Hello</title></html>"),
        ("half a JSON body", b'{"choices": [{"message": {"content": "Par'),
        *[(f"the JSON {body}", body) for body in ("null", "[]", "{}", "7", '"Paris."', "true")],
        *[(f"no choice in {body}", body) for body in ('{"choices": []}', '{"choices": 7}')],
        ("no text", says(None).body),
        ("an empty text", says("").body),
        ("white space as text", says(" \n\t").body),
        ("only reasoning", says("", reasoning="Let me see").body),
        ("only thinking", says("<think>Let me see</think>\n").body),
        ("thinking without an end", says("<think>Let me see").body),
        ("a top-level error", nested("Provider returned error", 502)),
        ("an error without a code", nested("Hm")),
        ("an error of one word", {"error": "Hm"}),
        ("a choice's error", CHOICE),
        ("finish_reason error, no object", says("Par", "error").body),
        ("finish_reason error in a stream", event("", "error", native="MALFORMED") + DONE),
        ("an error as first and only event", IN_STREAM),
        ("an error after text", event("Par") + IN_STREAM),
        ("an event of the type error, no [DONE]", event("Par") + TOOL),
        ("an error of Groq's own", event("Par", x_groq={"error": "Hm"}) + DONE),
        ("an error after a finish_reason", event("Par", "length") + event(error={"message": "Hm"})),
        ("a stream without an end", event("Par")),
        ("a stream that the connection cut", CUT),
        ("a malformed event", event("Par") + b"data: {oops\n\n" + event("is", "stop") + DONE),
        ("not UTF-8 in a stream", event("Par") + b'data: {"x": "\xff"}\n\n' + event("is", "stop")),
        ("not UTF-8 in a body", json.dumps(says("?").body).encode().replace(b"?", b"\xff")),
        ("only a role", event("", "stop") + DONE),
        ("only [DONE]", DONE),
    ],
    f"UNSUITABLE {MODEL}": [
        ("max_tokens used up by thinking", says("", "length", reasoning="Let me see").body),
        ("the same in a stream", event(None) + event(None, "length") + DONE),
        ("an inner context length", event(error={"code": "context_length_exceeded"})),
    ],
    f"RATE_LIMITED {MODEL}": [
        ("an inner 429", event("", "error", error={"code": 429, "message": "Slow down"})),
        ("an inner 429 in a body", nested("Slow down", 429)),
    ],
    f"DENIED {PROVIDER}": [("an inner 401", nested("Who are you?", 401))],
    f"REFUSED {QUESTION}": [
        ("a content filter", says("", "content_filter").body),
        ("a content filter in a stream", event("", "content_filter") + DONE),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("expected", "body"),
    [
        pytest.param(tuple(expected.split(" ")), body, id=name)
        for expected, rows in INSIDE.items()
        for name, body in rows
    ],
)
def test_a_failure_inside_a_200(expected: Any, body: Any) -> None:
    """Body -> verdict, and who is asked next; a stream that shows no text goes there too."""
    assert judged(Reply(200, body)) == expected


def test_what_ate_the_answer_is_named() -> None:
    """The reason for an answer of nothing but thinking names max_tokens."""
    answer = World({"a": [says("", "length", reasoning="Hm")]}).llm.complete("Where?")
    assert "max_tokens" in answer.attempts[0].reason


def test_a_refusal_gives_the_providers_reason() -> None:
    refusal = Reply(403, routed("This talks of swords", 403, reasons=["violence"]))
    with pytest.raises(AnswerRefused) as caught:
        World({"a": [refusal]}).llm.complete("Where?")
    assert "This talks of swords" in caught.value.reason
    assert len(caught.value.attempts) == 1


# --- Answers ------------------------------------------------------------------------------------

STREAM = event("Par") + b": keep-alive\n\n" + event("is.") + event(None, "stop") + DONE
SPLIT = (
    b'data: {"choices":[{"delta":{"content":"Paris."},\r\ndata:"finish_reason":"stop"}]}\r\n\r\n'
)
USAGE = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
PLAIN = json.dumps(says("Paris.").body).encode()
THINKING = event("<thi") + event("nk>Hm") + event("</thi") + event("nk>Paris.")
READINGS = [
    ("an event stream", STREAM),
    ("with CRLF", STREAM.replace(b"\n", b"\r\n")),
    ("with a lone CR", STREAM.replace(b"\n", b"\r")),
    ("with a byte order mark", b"\xef\xbb\xbf" + STREAM),
    ("without a space after data:", STREAM.replace(b"data: ", b"data:")),
    ("with other fields", STREAM.replace(b"data:", b"id: 7\nretry: 9\nevent: message\ndata:")),
    ("with empty data", b"data:\n\ndata: \n\n" + STREAM),
    ("with data of several lines", SPLIT + DONE),
    ("without [DONE]", STREAM.replace(DONE, b"")),
    ("without a finish_reason", event("Paris.") + DONE),
    ("without the last blank line", STREAM.replace(DONE, b"data: [DONE]")),
    ("without the last blank line and [DONE]", event("Paris.", "stop").rstrip()),
    ("without the key finish_reason", STREAM.replace(b', "finish_reason": null', b"")),
    ("with reasoning apart", event(None, x_groq={"id": "7"}) + STREAM),
    ("with thinking at its start", THINKING + event(None, "stop")),
    ("with something after [DONE]", STREAM + event("No.")),
    ("with a later null finish_reason", event("Paris.", "stop") + event("", None) + DONE),
    ("with usage in an event of its own", event("Paris.", "stop") + b'data: {"choices":[]}\n\n'),
    ("plain JSON", PLAIN),
    ("plain JSON after blank lines", b"\n   \n\n" + PLAIN),
    ("plain JSON after comments", b": wait\n\n: wait\n\n" + PLAIN),
    ("plain JSON on many lines", json.dumps(says("Paris.").body, indent=2)),
    ("plain JSON with thinking", says("<think>Hm\n</think>Paris.").body),
    ("byte by byte", tuple(bytes([byte]) for byte in STREAM)),
]


@pytest.mark.parametrize("body", [b for _, b in READINGS], ids=[name for name, _ in READINGS])
def test_an_answer(body: Any) -> None:
    """Whatever its form, told apart by what comes; buffered and streamed."""
    world = World({"a": [Reply(body=body)]})
    assert world.llm.complete("Where?").text == "Paris."
    assert "".join(World({"a": [Reply(body=body)]}).llm.stream("Where?")) == "Paris."


def test_what_stands_beside_the_text() -> None:
    """The last finish_reason that is one, and the usage, wherever it comes."""
    cases: list[Any] = [[], [{"delta": {}, "finish_reason": None}]]
    for choices in cases:
        usage = f"data: {json.dumps({'choices': choices, 'usage': USAGE})}\n\n".encode()
        answer = World({"a": [Reply(body=event("So", "length") + usage)]}).llm.complete("Where?")
        assert (answer.text, answer.finish_reason, answer.usage) == ("So", "length", USAGE)


@pytest.mark.parametrize("text", ["<thinner", "<", "a <think>b</think>", " x\n", "\u2028\x85\x0bz"])
def test_answers_are_not_rewritten(text: str) -> None:
    """Only thinking at the start is left out."""
    for body in (says(text).body, event(text[:1]) + event(text[1:], "stop")):
        assert World({"a": [Reply(body=body)]}).llm.ask("Where?") == text


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param((), id="no end"),
        pytest.param((IN_STREAM,), id="an error"),
        pytest.param((TOOL,), id="an error event"),
        pytest.param((event("", "error"),), id="finish_reason error"),
        pytest.param((b"data: {oops\n\n", event("is.", "stop"), DONE), id="a malformed event"),
        pytest.param((event("?").replace(b"?", b"\xff"),), id="not UTF-8"),
        pytest.param((ConnectionResetError("cut"),), id="cut"),
    ],
)
def test_a_stream_that_breaks(rest: Any) -> None:
    """After its first text: StreamInterrupted, with what came and from whom. Before: the next."""
    world = World({"a": [Reply(body=(event("Once"), event(" upon"), *rest))]})
    shown: list[str] = []
    with pytest.raises(StreamInterrupted) as caught:
        shown.extend(world.llm.stream("Where?"))
    error = caught.value
    assert (shown, error.partial) == (["Once", " upon"], "Once upon")
    assert (error.provider, error.model, len(error.attempts), world.asked) == ("one", "a", 1, "a")
    assert world.llm.get_stats()["failed_requests"] == 1
    world = World({"a": [Reply(body=(event(""), *rest))]})
    assert ("".join(world.llm.stream("Where?")), world.asked) == ("B", "ab")


def test_a_filter_in_the_middle_of_a_stream() -> None:
    """Half an answer never ends like a whole one."""
    body = event("Once") + event(" upon") + event("", "content_filter") + DONE
    pieces = World({"a": [Reply(body=body)]}).llm.stream("Where?")
    assert next(pieces) == "Once"
    with pytest.raises(FallbackLLMError):
        list(pieces)


# --- Reasons that are shown ---------------------------------------------------------------------

NASTY = "Hm\r\n\x1b[31m\x00 \x9b in org_01abcdefgh by user_2abcdefgh " + "and so on " * 99


@pytest.mark.parametrize(
    "body", [flat(NASTY), nested(NASTY), NASTY, {"error": NASTY}, [NASTY]], ids=lambda _: "nasty"
)
@pytest.mark.parametrize("status", [400, 429, 500])
def test_a_reason_is_one_short_clean_line(status: int, body: Any) -> None:
    """At most 300 characters, no control characters, no ids of accounts, but their own words."""
    for reply in (Reply(status, body), Reply(200, nested(NASTY))):
        reason = World({"a": [reply]}, max_attempts=1).llm.complete("Where?").attempts[0].reason
        assert "Hm" in reason
        assert len(reason) <= 300
        assert reason.isprintable()
        assert not re.search("01abcdefgh|2abcdefgh", reason)


@pytest.mark.parametrize("body", [b"", "<html></html>", None, []])
def test_a_reply_without_words_has_a_reason(body: Any) -> None:
    reason = World({"a": [Reply(502, body)]}).llm.complete("Where?").attempts[0].reason
    assert "502" in reason


# --- Anything that a server may do --------------------------------------------------------------

LETTERS = some.text(some.characters(blacklist_categories=["Cs"]), max_size=9)
CUTS = some.lists(some.integers(0, 2000), max_size=30)
BREAKS = some.sampled_from([b"\n", b"\r\n", b"\r"])
FREE = rules(deadline=None, database=None, derandomize=True)


def cut(body: bytes, cuts: list[int]) -> tuple[bytes, ...]:
    """The body in pieces."""
    places = sorted({place % (len(body) + 1) for place in cuts} | {0, len(body)})
    return tuple(body[start:end] for start, end in zip(places, places[1:]))


@FREE
@given(some.lists(LETTERS, min_size=1), CUTS, BREAKS, some.booleans())
def test_any_cutting_gives_the_same_text(texts: Any, cuts: Any, newline: Any, ascii_: Any) -> None:
    """Events split at any byte, inside a character too, with any line end."""
    events = [{"choices": [{"delta": {"content": text}}]} for text in ["So: ", *texts]]
    lines = [json.dumps(said, ensure_ascii=ascii_).encode() for said in events]
    body = b"".join(b"data: " + line + newline + newline for line in [*lines, b"[DONE]"])
    world = World({"a": [Reply(body=cut(body, cuts))]})
    assert world.llm.complete("Where?").text == "So: " + "".join(texts)


WORDS = ["error", "choices", "delta", "message", "content", "finish_reason", "code", "metadata"]
WORDS += ["raw", "headers", "usage", "status_code", "availability", "limit_source", "x_groq"]
WORDS += ["retry_after_seconds", "X-RateLimit-Reset", "reasoning", "detail", "stop", "length"]
ATOMS = some.one_of(some.none(), some.booleans(), some.integers(), some.floats(), LETTERS)
VALUES = some.recursive(
    some.one_of(ATOMS, some.sampled_from(WORDS)),
    lambda inner: some.one_of(
        some.lists(inner, max_size=3), some.dictionaries(some.sampled_from(WORDS), inner)
    ),
    max_leaves=20,
)
JSONS = VALUES.map(lambda value: json.dumps(value).encode())
SPOILT = some.tuples(some.binary(max_size=9), some.integers(0, 400)).map(
    lambda pair: STREAM[: pair[1]] + pair[0] + STREAM[pair[1] + len(pair[0]) :]
)
EVENTS = JSONS.map(lambda line: b"data: " + line + b"\n\n" + event("x", "stop"))
GARBAGE = some.one_of(some.binary(), JSONS, EVENTS, SPOILT)
VISIBLE = some.text(string.printable.replace("\r", "").replace("\n", ""), max_size=30)
NAMES = ["retry-after", "retry-after-ms", "date", "x-ratelimit-reset", "content-type"]
HEADERS = some.dictionaries(some.sampled_from(NAMES), VISIBLE)


@FREE
@given(GARBAGE, CUTS, HEADERS, some.sampled_from([200, 204, 302, 400, 404, 429, 500, 503]))
def test_any_garbage_is_an_answer_or_an_error_of_ours(
    body: bytes, cuts: Any, headers: Any, status: int
) -> None:
    """Never another exception, and never a reason that cannot be shown."""
    script = {"a": [Reply(status, cut(body, cuts), headers)], "b": [limited()]}
    with contextlib.suppress(FallbackLLMError):
        "".join(World(script, max_attempts=2, providers=ROWS[:1]).llm.stream("Where?"))
    try:
        result: Any = World(script, max_attempts=2, providers=ROWS[:1]).llm.complete("Where?")
    except FallbackLLMError as error:
        result = error
    reasons = [attempt.reason for attempt in result.attempts]
    assert all(len(reason) <= 300 and reason.isprintable() for reason in reasons)


KEYS = some.text(string.ascii_letters + string.digits + "-_.", min_size=8, max_size=60)
ECHOES = some.sampled_from(["{}", "x{}y", "{0} {0}", "Bearer {}"])


@FREE
@given(KEYS, some.sampled_from([200, 400, 401, 429, 500]), ECHOES)
def test_a_key_is_never_shown(key: str, status: int, echo: str) -> None:
    """Not in reasons, errors, the trail and representations, when the server echoes it."""
    key = "k7" + key
    settings: Any = {"providers": [row("one", "a", key_env="ONE_KEY")], "api_keys": {"one": key}}
    reply = Reply(status, nested("Not with " + echo.format(key)))
    world = World({"a": [reply]}, max_attempts=1, **settings)
    with pytest.raises(FallbackLLMError) as caught:
        world.llm.complete("Where?")
    error = caught.value
    assert "Not with" in error.attempts[0].reason
    assert key not in f"{error} {error!r} {error.attempts} {error.__dict__} {world.llm!r}"


def test_a_key_is_never_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Nor is a key of somebody else, which shows by its form."""
    caplog.set_level(0)
    strange = "gsk_" + "abcdefgh" * 5
    settings: Any = {"providers": [row("one", "a", key_env="ONE_KEY")]}
    refusal = Reply(401, nested(f"No: k-12345678, {strange}"))
    world = World({"a": [refusal]}, api_keys={"one": "k-12345678"}, **settings)
    assert world.llm.ask("Where?") == ""
    assert "No: " in caplog.text
    assert "k-12345678" not in caplog.text
    assert strange not in caplog.text
