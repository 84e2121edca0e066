"""What a reply means, how long to wait, who is next: tables of cases."""

from __future__ import annotations

import math
from typing import Any, Dict, Mapping, Tuple

import pytest

from fallback_llm import (
    MAX_HINT,
    Failure,
    Provider,
    RetryConfig,
    Turn,
    Verdict,
    backoff,
    by_status,
    checked,
    duration,
    judge,
    line_after,
    next_turn,
    retry_after,
)

Ruling = Tuple[Verdict, bool]
NOW = 1_800_000_000.0  # Fri, 15 Jan 2027 08:00:00 GMT
LIMITED, ACCOUNT_LIMITED = (Verdict.RATE_LIMITED, False), (Verdict.RATE_LIMITED, True)
FAULT, DOWN = (Verdict.FAULT, False), (Verdict.FAULT, True)
UNSUITABLE, GONE, REFUSED = (
    (v, False) for v in (Verdict.UNSUITABLE, Verdict.GONE, Verdict.REFUSED)
)
DENIED = (Verdict.DENIED, True)


def flat(code: Any = None, message: str = "", **more: Any) -> Dict[str, Any]:
    """An error as Cerebras writes it."""
    return {"message": message, "type": "some_error", "param": "quota", "code": code, **more}


def nested(code: Any = None, message: str = "", **more: Any) -> Dict[str, Any]:
    """An error as Groq and OpenRouter write it."""
    return {"error": {"message": message, "code": code, **more}}


def routed(code: int, raw: str, **metadata: Any) -> Dict[str, Any]:
    """What OpenRouter makes of a supplier's error."""
    metadata.update(raw=raw, provider_name="Supplier")
    return nested(code, "Provider returned error", metadata=metadata)


def judged(status: int, body: Any = "", headers: Mapping[str, str] = {}) -> Failure:
    return judge(status, headers, body, NOW)


def ruling(status: int, body: Any = "", headers: Mapping[str, str] = {}) -> Ruling:
    failure = judged(status, body, headers)
    return failure.verdict, failure.wide


# --- What a reply means -------------------------------------------------------------------------

STATUSES = {
    LIMITED: [429],
    FAULT: [408, 409, 424, 425, 498, 499, 500, 502, 503, 504, 520, 524, 529, 599],
    DOWN: [300, 302, 307, 308, 399],
    UNSUITABLE: [400, 404, 405, 413, 415, 422, 426, 431, 451, 497],
    DENIED: [401, 402, 403],
}


@pytest.mark.parametrize(
    ("status", "expected"), [(status, to) for to, found in STATUSES.items() for status in found]
)
def test_without_words_the_status_decides(status: int, expected: Ruling) -> None:
    """Whatever shape the nothing has."""
    page = "<!DOCTYPE html><html><head><title>Sorry</title></head></html>"
    for body in ("", "oops", page, None, 7, True, [], {}, [{}], {"error": None}, {"error": {}}):
        assert ruling(status, body) == expected, body
    for code in ("rate_limit_exceeded", "invalid_request_error", "tokens", "requests"):
        assert ruling(status, nested(code, "Something.", type=code)) == expected, code


CODES = {
    GONE: "model_not_found model_archived model_archived_error model_decommissioned no_endpoints"
    " model_deprecated model_unavailable_upstream free_variant_ended MODEL_NOT_FOUND",
    DENIED: "invalid_api_key wrong_api_key payment_required payment_required_error authentication"
    " insufficient_quota organization_restricted organization_delinquent authentication_error"
    " permission_denied openrouter_credits openrouter_key_limit region_restricted account_closed",
    REFUSED: "content_policy_violation content_filter refusal moderation input_moderation_failed",
    ACCOUNT_LIMITED: "openrouter_in_flight_budget openrouter_free_tier_daily"
    " openrouter_free_tier_per_minute",
    LIMITED: "token_quota_exceeded request_quota_exceeded capacity_exhausted",
    FAULT: "queue_exceeded json_validate_failed tool_use_failed timeout server_error server"
    " internal_server_error overloaded provider_overloaded provider_unavailable"
    " temporarily_unavailable",
    UNSUITABLE: "context_length_exceeded max_tokens_exceeded token_limit_exceeded string_too_long"
    " payload_too_large request_too_large wrong_api_format wrong_endpoint privacy_restricted"
    " constraint_filtered unsupported_parameter",
}


@pytest.mark.parametrize(
    ("code", "expected"), [(code, to) for to, found in CODES.items() for code in found.split()]
)
def test_a_code_that_says_one_thing_decides(code: str, expected: Ruling) -> None:
    """Wherever it stands, against any status."""
    status = 418 if expected is FAULT else 500
    places = [
        flat(code),
        {"message": "x", "type": code},
        nested(code),
        [nested(code)],
        {"errors": [{"code": code}]},
        nested(type=code),
        {"error": {"error_type": code, "http_status": 500}},
        nested(500, availability={"code": code}),
        nested(500, metadata={"error_type": code}),
        nested(500, metadata={"limit_source": code}),
    ]
    assert [ruling(status, body) for body in places] == [expected] * len(places)
    assert ruling(418, nested(f"no-{code}")) == ruling(418, nested(f"{code}-no")) == UNSUITABLE


WORDS = {
    UNSUITABLE: [
        "Request too large for `m`: reduce it, or you reach the rate limit",
        "Nobody matches your data policy (m)",
        "Please reduce the length of the prompt",
        "This model's maximum context is 8192",
        "9000 tokens exceed the 8192 of the context",
        "The prompt exceeds our context",
        "The context length of m was exceeded",
        "the context window is exceeded",
    ],
    ACCOUNT_LIMITED: ["Too many: free-models-per-min", "Too many: free-models-per-day-stealth."],
    DOWN: ["No. Check your network settings."],
    DENIED: [
        "Insufficient quota left",
        "insufficient credits",
        "Insufficient balance",
        "insufficient funds",
        "You have exceeded your current quota.",
        "A payment is overdue",
        "Key limit exceeded (monthly)",
    ],
    GONE: [
        "a/b is not a valid model ID",
        "No endpoints found for a/b. All were filtered.",
        "The model `a` does not exist, or is not yours",
        "Model a was not found",
        "the models a and b are no longer served",
        "Model a: retired last week",
        "Model a is archived",
        "model a has been decommissioned",
        "Model a: deprecated",
    ],
    REFUSED: [
        "Stopped by the content management policy",
        "against our content safety policy",
        "Request blocked: an injection",
        "Flagged by moderation",
    ],
}


@pytest.mark.parametrize(
    ("message", "expected"), [(text, to) for to, found in WORDS.items() for text in found]
)
def test_narrow_words_of_the_message_decide(message: str, expected: Ruling) -> None:
    """In every shape, against a status and against a code that decides nothing."""
    bodies = [
        message,
        flat("rate_limit_exceeded", message.upper()),
        nested("invalid_request_error", message),
        nested(429, message),
        {"error": message},
        {"detail": message},
        {"detail": [{"msg": message}]},
        {"success": False, "error": {"name": "ZodError", "message": message}},
    ]
    assert [ruling(418, body) for body in bodies if expected != UNSUITABLE] == (
        [expected] * 8 if expected != UNSUITABLE else []
    )
    assert [ruling(429, body) for body in bodies] == [expected] * 8


LIMIT = "Limit of 9 tokens per day, 8 used. Upgrade in your billing settings to get more credits."
RAW = "m:free is short of capacity. Add your own key."

CASES = {
    "billing and credits alone say nothing": (429, nested("x", LIMIT), LIMITED),
    "a code is heard before words": (400, nested("model_not_found", "Request too large"), GONE),
    "the limit's source before the code": (
        402,
        nested("insufficient_quota", "x", metadata={"limit_source": "openrouter_in_flight_budget"}),
        ACCOUNT_LIMITED,
    ),
    "an unknown limit's source": (
        429,
        nested(429, "x", metadata={"limit_source": "upstream_provider_shared_pool"}),
        LIMITED,
    ),
    "an empty code": (500, flat("", "Bad luck, try again.", id=""), FAULT),
    "codes of odd types": (400, nested(["model_not_found"], "x", type=3), UNSUITABLE),
    "reasons of a moderation": (403, nested(403, "m", metadata={"reasons": ["violence"]}), REFUSED),
    "flagged input": (403, nested(403, "m", metadata={"flagged_input": "bad"}), REFUSED),
    "patterns of a guardrail": (403, nested(403, "m", metadata={"patterns": ["bad"]}), REFUSED),
    "no reasons, so no moderation": (403, nested(403, "m", metadata={"reasons": []}), DENIED),
    "a bare 404 is not the model's end": (404, nested(404, "Not Found"), UNSUITABLE),
    "words on models alone": (400, nested(400, "Give the model a prompt"), UNSUITABLE),
    "text of Cloudflare": (403, "error code: 1010", DENIED),
    "429 as a page": (429, "<html><title>Slow down</title></html>", LIMITED),
    "supplier: its limit": (429, routed(429, RAW), LIMITED),
    "supplier: model gone, nested": (400, routed(400, '{"error":{"code":"model_archived"}}'), GONE),
    "supplier: too long, flat": (400, routed(400, '{"code":"string_too_long"}'), UNSUITABLE),
    "supplier: unsuitable as 502": (502, routed(502, '{"code":"string_too_long"}'), UNSUITABLE),
    "supplier: in a list": (502, routed(502, '[{"error":{"code":"model_archived"}}]'), GONE),
    "supplier: refuses the question": (403, routed(403, '{"code":"content_filter"}'), REFUSED),
    "supplier: its key, not ours": (401, routed(401, '{"code":"invalid_api_key"}'), FAULT),
    "supplier: its bill as 429": (429, routed(429, '{"code":"insufficient_quota"}'), LIMITED),
    "supplier: its network": (502, routed(502, "Check your network settings"), FAULT),
    "supplier: says nothing": (502, routed(502, ""), FAULT),
    "supplier: no metadata": (403, nested(403, "Provider returned error"), FAULT),
    "only the router's own words pass it on": (502, nested(502, "x", metadata={"raw": RAW}), FAULT),
    "inside: int code": (200, nested(429, "m"), LIMITED),
    "inside: code as text": (200, nested("402", "m"), DENIED),
    "inside: a string's code": (200, nested("model_not_found", "m"), GONE),
    "inside: status_code beside it": (200, {"status_code": 401, "error": {"code": ""}}, DENIED),
    "inside: status_code in it": (200, nested("x", "m", status_code=400), UNSUITABLE),
    "inside: http_status": (200, {"error": {"message": "m", "http_status": 404}}, UNSUITABLE),
    "inside: the lowest status": (200, nested(400, "m"), UNSUITABLE),
    "inside: no status at all": (200, nested(399, "m"), FAULT),
    "inside: nor this": (200, nested(600, "m"), FAULT),
    "inside: the highest": (200, nested(599, "m"), FAULT),
    "inside: true is no status": (200, nested(True, "m"), FAULT),
    "inside: words of a limit": (200, nested("x", "Rate-limit reached"), LIMITED),
    "inside: other words of it": (200, nested("x", "too many requests"), LIMITED),
    "inside: only the code tells": (200, {"error": {"code": "rate_limit"}}, LIMITED),
    "inside: nothing known": (200, nested("x", "Generation broke off"), FAULT),
    "inside: just a word": (200, {"error": "boom"}, FAULT),
    "outside, its status wins": (500, nested(429, "m"), FAULT),
    "300 is already outside": (300, nested(429, "m"), DOWN),
}


@pytest.mark.parametrize(("status", "body", "expected"), CASES.values(), ids=list(CASES))
def test_the_verdict_and_its_reach(status: int, body: Any, expected: Ruling) -> None:
    """One failure of each shape."""
    assert ruling(status, body) == expected


def test_x_should_retry_false_makes_a_limit_a_fault() -> None:
    """Only a limit, and only "false"."""
    no, yes = {"x-should-retry": "false"}, {"x-should-retry": "true"}
    assert ruling(429, flat("request_quota_exceeded"), no) == FAULT
    assert ruling(429, flat("request_quota_exceeded"), yes) == LIMITED
    assert ruling(404, flat("model_not_found"), no) == GONE


REASONS = {
    "client": (429, nested("x", "Slow."), "429 Client Error: Too Many Requests: Slow."),
    "the lowest client": (400, "", "400 Client Error: Bad Request"),
    "server": (500, "", "500 Server Error: Internal Server Error"),
    "redirect": (302, "", "302 Redirect Error: Found"),
    "a status without a name": (529, "", "529 Server Error: Unknown"),
    "page": (502, "\n<html><title> Bad\n</title>", "502 Server Error: Bad Gateway: HTML page: Bad"),
    "untitled page": (404, "<HTML>", "404 Client Error: Not Found: HTML page: without a title"),
    "codes instead of words": (400, flat("a"), "400 Client Error: Bad Request: a some_error"),
    "words that are data": (400, nested(1, {"a": 1}), '400 Client Error: Bad Request: {"a": 1}'),  # type: ignore[arg-type]
    "inside, with a status": (200, nested(502, "Gone."), "error 502 inside the reply: Gone."),
    "inside, without": (200, nested("x", "Gone."), "error: Gone."),
    "a supplier's words": (
        429,
        routed(429, '{"message": "Slow."}'),
        "429 Client Error: Too Many Requests: Provider returned error: Slow.",
    ),
}


@pytest.mark.parametrize(("status", "body", "expected"), REASONS.values(), ids=list(REASONS))
def test_the_reason_is_requests_wording_and_the_providers(
    status: int, body: Any, expected: str
) -> None:
    """As the documented lines show it."""
    assert judged(status, body).reason == expected


def test_by_status_alone() -> None:
    """An error inside a reply that has no status is a fault, unless it speaks of a limit."""
    assert by_status(None, "") == by_status(399 - 100, "") == by_status(500, "") == FAULT
    assert by_status(None, "RATE LIMIT") == by_status(429, "") == LIMITED
    assert by_status(400, "rate limit") == UNSUITABLE


# --- How long to wait ---------------------------------------------------------------------------

AT = "Fri, 15 Jan 2027 08:00:{} GMT"
ECHO = nested(429, metadata={"headers": {"Retry-After": "x", "X-RateLimit-Reset": str(NOW + 8)}})
ALL = {
    "retry-after-ms": "1500",
    "retry-after": "2",
    "date": AT.format("00"),
    "x-ratelimit-reset": str(NOW + 9),
}
BODY = nested(
    429,
    "Please try again in 7s.",
    metadata={"headers": {"ReTRY-After": "6"}, "retry_after_seconds": 4},
    availability={"retry_after": 5},
)


def without(body: Mapping[str, Any], *names: str) -> Any:
    """A copy of an error in which these are missing or junk."""
    error = dict(body["error"])
    for name in names:
        if name in error:
            error[name] = "" if name == "message" else {}
        else:
            error["metadata"] = {**error["metadata"], name: "junk"}
    return {"error": error}


HINTS: Dict[str, Tuple[Mapping[str, str], Any, Any]] = {
    "1 retry-after-ms": (ALL, BODY, 1.5),
    "2 Retry-After": ({**ALL, "retry-after-ms": "x"}, BODY, 2.0),
    "3 seconds in the metadata": ({}, BODY, 4.0),
    "4 availability": ({}, without(BODY, "retry_after_seconds"), 5.0),
    "5 echoed header": ({}, without(BODY, "retry_after_seconds", "availability"), 6.0),
    "6 text": ({}, nested(429, "try again in 7s", metadata={"headers": "x"}), 7.0),
    "7 echoed reset": ({"x-ratelimit-reset": str(NOW + 9)}, ECHO, 8.0),
    "8 reset": ({"x-ratelimit-reset": str(NOW + 9)}, "", 9.0),
    "reset in milliseconds": ({"x-ratelimit-reset": str(int((NOW + 9) * 1000))}, "", 9.0),
    "reset is past": ({"x-ratelimit-reset": str(NOW - 9)}, "", None),
    "none": ({}, "", None),
    "zero is a hint": ({"retry-after": "0"}, "", 0.0),
    "nan": ({"retry-after": "nan"}, "", None),
    "inf": ({"retry-after": "inf"}, "", None),
    "negative": ({"retry-after": "-1"}, "", None),
    "junk": ({"retry-after": "soon"}, "", None),
    "huge": ({"retry-after": "9" * 400}, nested(429, "x", metadata={"retry_after_seconds": 10**400}), None),
    "bool": ({}, nested(429, "x", metadata={"retry_after_seconds": True}), None),
    "32 days": ({"retry-after": str(MAX_HINT)}, "", MAX_HINT),
    "over 32 days": ({"retry-after": str(MAX_HINT + 1)}, "", None),
    "over 32 days, then a good one": ({"retry-after": "99999999"}, "Retry in 5", 5.0),
    "a date": ({"retry-after": AT.format("44")}, "", 44.0),
    "a date by the server's clock": ({"retry-after": AT.format("44"), "date": AT.format("04")}, "", 40.0),
    "a date, and no real Date": ({"retry-after": AT.format("44"), "date": "now"}, "", 44.0),
    "a date that is past": ({"retry-after": AT.format("00"), "date": AT.format("01")}, "", None),
    "no such date": ({"retry-after": "Fri, 99 Jan 2027 99:00:00 GMT"}, "", None),
    "per hour": ({}, flat("token_quota_exceeded", "Tokens per hour: too many"), 3600.0),
    "per day": ({}, "Requests Per-Day reached", 3600.0),
    "per week": ({}, "9 per week", 3600.0),
    "per month": ({}, "9 per month", 3600.0),
    "hourly": ({}, "Your hourly limit", 3600.0),
    "daily": ({}, "Your DAILY limit", 3600.0),
    "monthly": ({}, "Your monthly limit", 3600.0),
    "per minute is no hint": ({}, flat("token_quota_exceeded", "Tokens per minute"), None),
    "per day, with a hint": ({}, nested("x", "9 per day (RPD). Try again in 1m26.4s."), 86.4),
    "hyperdaily": ({}, "hyperdaily", None),
}  # fmt: skip


@pytest.mark.parametrize(("headers", "body", "expected"), HINTS.values(), ids=list(HINTS))
def test_the_first_valid_hint_counts(headers: Mapping[str, str], body: Any, expected: Any) -> None:
    """From the most exact to the least."""
    assert judged(429, body, headers).hint == (
        pytest.approx(expected) if expected is not None else None
    )


def test_only_a_limit_lasts_an_hour_without_a_hint() -> None:
    """A fault or an error of the account with the same words has no hint; a real hint it has."""
    assert judged(503, "9 per day").hint is None
    assert judged(402, "9 per day").hint is None
    assert judged(503, "x", {"retry-after": "9"}).hint == 9.0


DURATIONS = {
    "try again in 6.3525s. Need more?": 6.3525,
    "try again in 480ms": 0.48,
    "try again in 250 milliseconds": 0.25,
    "Try Again In 1M26.4S": 86.4,
    "try again in 41m30s": 2490.0,
    "try again in 1h2m3s": 3723.0,
    "try again in 1h 2m": 3720.0,
    "try again in 2 minutes and 5 seconds": 125.0,
    "try again in 1 hour, 5 minutes": 3900.0,
    "retry in 2 days": 172800.0,
    "Retry after 40 seconds.": 40.0,
    "retry after 40": 40.0,
}
NO_DURATIONS = [
    "",
    "in 5s",
    "try again soon",
    "retry after in-flight requests settle",
    "retry in xs",
]


@pytest.mark.parametrize(("message", "seconds"), DURATIONS.items())
def test_seconds_said_in_a_text(message: str, seconds: float) -> None:
    """As Groq and OpenRouter say them, and their neighbours."""
    assert duration(message) == pytest.approx(seconds)
    assert all(math.isnan(duration(text)) for text in NO_DURATIONS)


def test_retry_after_of_no_text() -> None:
    """A number is a number; nothing is nothing."""
    assert (retry_after(7, None, NOW), retry_after("7.5", None, NOW)) == (7.0, 7.5)
    assert math.isnan(retry_after(None, None, NOW)) and math.isnan(retry_after([7], None, NOW))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(RetryConfig(), [2, 4, 8, 16, 32, 60, 60], id="defaults, capped"),
        pytest.param(RetryConfig(exponential_base=1), [2, 2, 2], id="always the same"),
        pytest.param(RetryConfig(base_delay=0.5, exponential_base=3), [0.5, 1.5, 4.5], id="by 3"),
        pytest.param(RetryConfig(base_delay=0), [0, 0], id="none"),
        pytest.param(RetryConfig(base_delay=60), [60, 60], id="at the cap"),
    ],
)
def test_backoff(config: RetryConfig, expected: "list[float]") -> None:
    """Grows, and is capped; also where a float overflows."""
    assert [backoff(config, n) for n in range(1, len(expected) + 1)] == expected
    assert backoff(RetryConfig(exponential_base=1e9), 1000) == 60.0


# --- Who is next --------------------------------------------------------------------------------

A, B = (Provider(name, f"https://{name}.test", "KEY", ("1", "2")) for name in "ab")


def turn(name: str, **more: Any) -> Turn:
    """The turn of a model such as "a1"."""
    return Turn(A if name[0] == "a" else B, name[1], name, **more)


def wait(name: str, seconds: float, patience: float = 0.0) -> Turn:
    return turn(name, ready_at=100 + seconds, patience=patience)


@pytest.mark.parametrize(
    ("line", "limit", "expected"),
    [
        pytest.param([], 60, None, id="nobody"),
        pytest.param([turn("a1"), turn("b1")], 60, ("a1", 0), id="the first"),
        pytest.param([wait("a1", -5)], 60, ("a1", 0), id="was ready long ago"),
        pytest.param([wait("a1", 5), wait("b1", 0)], 60, ("b1", 0), id="who is ready passes"),
        pytest.param([wait("a1", 5, 5), wait("b1", 0)], 60, ("a1", 5), id="within its patience"),
        pytest.param([wait("a1", 5.1, 5), wait("b1", 0)], 60, ("b1", 0), id="beyond it"),
        pytest.param([wait("a1", 9), wait("b1", 3), wait("b2", 4)], 60, ("b1", 3), id="soonest"),
        pytest.param([wait("a1", 3), wait("b1", 3)], 60, ("a1", 3), id="soonest, of two the first"),
        pytest.param(
            [wait("a1", 5, 9), wait("b1", 3)], 60, ("a1", 5), id="patience before soonest"
        ),
        pytest.param([wait("a1", 5, 9), wait("b1", 3)], 4, ("b1", 3), id="patience in the limit"),
        pytest.param([wait("a1", 5, 5)], 5, ("a1", 5), id="just within the limit"),
        pytest.param([wait("a1", 5)], 5, ("a1", 5), id="the soonest just within it"),
        pytest.param([wait("a1", 5)], 4.9, None, id="beyond the limit"),
        pytest.param([turn("a1")], -1, None, id="no time left"),
    ],
)
def test_next_turn(line: "list[Turn]", limit: float, expected: Any) -> None:
    """The first whose wait is within its patience, else the soonest; within the limit."""
    found = next_turn(line, 100.0, limit)
    assert (found and (found[0].label, found[1])) == expected


PLAIN, JITTER = RetryConfig(jitter=False), RetryConfig()
EAGER, TWICE = RetryConfig(jitter=False, eager=True), RetryConfig(2, jitter=False)
FIRST, OUT, SECOND, NONE = "a1 a2 b1", "a2 b1", "a2 b1 a1", (0, 0)

MOVES = {
    # id: attempts before, verdict, wide, hint, config, chance, order, wait and patience of the last asked
    "a short pause keeps its place": (0, LIMITED, None, PLAIN, 0, FIRST, (2, 30)),
    "so does the second": (1, LIMITED, None, PLAIN, 0, FIRST, (4, 28)),
    "and the last": (3, LIMITED, None, PLAIN, 0, FIRST, (16, 16)),
    "after the last attempt it is out": (4, LIMITED, None, PLAIN, 0, OUT, NONE),
    "out, of two": (1, LIMITED, None, TWICE, 0, OUT, NONE),
    "a hint within the patience": (0, LIMITED, 30.0, PLAIN, 0, FIRST, (30, 30)),
    "a hint beyond it": (0, LIMITED, 30.1, PLAIN, 0, SECOND, (30.1, 0)),
    "a hint of nothing": (0, LIMITED, 0.0, PLAIN, 0, FIRST, (2, 30)),
    "no wait below the backoff": (0, LIMITED, 1.0, PLAIN, 0, FIRST, (2, 30)),
    "eager waits for nobody": (0, LIMITED, None, EAGER, 0, SECOND, (2, 0)),
    "a fault goes to the end": (0, FAULT, None, PLAIN, 0, SECOND, (2, 0)),
    "with its hint": (0, FAULT, 9.0, PLAIN, 0, SECOND, (9, 0)),
    "a fault again": (2, FAULT, None, PLAIN, 0, SECOND, (8, 0)),
    "a fault after the last attempt": (4, FAULT, None, PLAIN, 0, OUT, NONE),
    "unsuitable is out": (0, UNSUITABLE, None, PLAIN, 0, OUT, NONE),
    "gone is out": (0, GONE, None, PLAIN, 0, OUT, NONE),
    "refused is out": (0, REFUSED, None, PLAIN, 0, OUT, NONE),
    "denied takes all models": (0, DENIED, None, PLAIN, 0, "b1", NONE),
    "a provider's fault moves all": (0, DOWN, None, PLAIN, 0, "b1 a1 a2", (2, 0)),
    "a provider's limit holds for all": (0, ACCOUNT_LIMITED, None, PLAIN, 0, FIRST, (2, 30)),
    "and moves all when it is long": (0, ACCOUNT_LIMITED, 99.0, PLAIN, 0, "b1 a1 a2", (99, 0)),
    "jitter takes a fifth at most": (0, LIMITED, None, JITTER, 0, FIRST, (1.6, 30)),
    "half of it": (0, LIMITED, None, JITTER, 0.5, FIRST, (1.8, 30)),
    "nothing": (0, LIMITED, None, JITTER, 1, FIRST, (2, 30)),
    "but never from a hint": (0, LIMITED, 2.0, JITTER, 0, FIRST, (2, 30)),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=list(MOVES))
def test_line_after(move: Any) -> None:
    """Who is out, who keeps the place, who goes to the end; and how long each is not asked."""
    attempts, (verdict, wide), hint, config, chance, order, (wait, patience) = move
    line = [turn("a1", attempts=attempts), turn("a2"), turn("b1", ready_at=7.0, patience=3.0)]
    before = [dict(vars(each)) for each in line]
    expected = {each["label"]: each for each in map(dict, before)}
    for label in ("a1", "a2") if wide else ("a1",):
        expected[label].update(ready_at=pytest.approx(100 + wait), patience=patience)
        expected[label]["attempts"] += 1
    after = line_after(line, line[0], Failure(verdict, "", wide, hint), config, 100.0, chance)
    assert [vars(each) for each in after] == [expected[label] for label in order.split()]
    assert [vars(each) for each in line] == before


# --- What is refused at birth -------------------------------------------------------------------

DELAYS = [("base_delay", 0), ("max_delay", 0), ("exponential_base", 1)]
NONSENSE: "list[Any]" = [math.nan, math.inf, -math.inf, -1, 1e10, "2", None, True, False, [2], 2j]


@pytest.mark.parametrize(("name", "lowest"), DELAYS)
def test_retry_config_refuses_what_is_no_delay(name: str, lowest: float) -> None:
    """With the field's name; the limits themselves are allowed."""
    for value in [*NONSENSE, lowest - 0.001]:
        with pytest.raises(ValueError, match=f"^{name} must be .*, not "):
            RetryConfig(**{"base_delay": 0, name: value})
    for value in (lowest, 1e9):
        assert RetryConfig(**{"base_delay": 0, "max_delay": 1e9, name: value})


NUMBERS = {
    "max_attempts": (1, 1000, [0, 1001, 2.0, "5", True, None, math.nan]),
    "max_tokens": (1, 1000000, [0, 1000001, 1.5, True]),
    "workers": (1, 1000, [0, 1001, 8.0]),
    "timeout": (1e-6, 1e9, [0, -1, math.nan, math.inf, "9", True]),
    "silence": (1e-6, 1e9, [0, -1, math.nan, math.inf, None]),
    "temperature": (0, 2, [-0.1, 2.1, math.nan, "1", True]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name: str) -> None:
    """The lowest and the highest are allowed, and given back as they are."""
    lowest, highest, nonsense = NUMBERS[name]
    assert (checked(name, lowest), checked(name, highest)) == (lowest, highest)
    for value in nonsense:
        with pytest.raises(ValueError, match=f"^{name} must be a.* not "):
            checked(name, value)


def test_retry_config() -> None:
    """The defaults are the documented ones, and agree with each other."""
    assert RetryConfig() == RetryConfig(5, 2.0, 60.0, 2.0, True, False)
    assert RetryConfig(base_delay=60.0).max_delay == 60.0
    with pytest.raises(ValueError, match="max_delay must be >= base_delay, not 1 with 2.0"):
        RetryConfig(max_delay=1)
    with pytest.raises(ValueError, match="max_attempts must be a whole number"):
        RetryConfig(0)


def test_verdicts() -> None:
    """The table of DESIGN: who is asked again now, and for how long last by later questions."""
    table = {verdict.word: (verdict.again, verdict.asked_last) for verdict in Verdict}
    assert table == {
        "rate_limited": (True, 0.0),
        "fault": (True, 0.0),
        "unsuitable": (False, None),
        "gone": (False, 600.0),
        "denied": (False, 600.0),
        "refused": (False, None),
    }


def test_providers_are_rows() -> None:
    """A row refuses what it cannot mean, and names its variables."""
    row = Provider("my-own.ai", "https://x.test", None, ["m"])  # type: ignore[arg-type]
    assert (row.models, row.silence, row.free_only, row.key_path) == (
        ("m",),
        60.0,
        False,
        "/models",
    )
    assert row.variable("MODELS") == "MY_OWN_AI_MODELS"
    for wrong in ({"models": "m"}, {"silence": 0}):
        with pytest.raises(ValueError, match="^(models|silence) must be "):
            Provider(**{"name": "a", "base_url": "", "key_env": None, "models": (), **wrong})  # type: ignore[arg-type]
