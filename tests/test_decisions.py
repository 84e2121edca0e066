"""What a reply means, how long to wait, who is next: tables of cases."""

from __future__ import annotations

import math
from typing import Any, Mapping

import pytest

from fallback_llm import (
    MAX_HINT,
    PROVIDERS,
    Failure,
    Provider,
    RetryConfig,
    Turn,
    Verdict,
    backoff,
    checked,
    judge,
    line_after,
    next_turn,
)

NOW = 1_800_000_000.0  # Fri, 15 Jan 2027 08:00:00 GMT
LIMITED, ACCOUNT_LIMITED = (Verdict.RATE_LIMITED, False), (Verdict.RATE_LIMITED, True)
FAULT, DOWN, DENIED = (Verdict.FAULT, False), (Verdict.FAULT, True), (Verdict.DENIED, True)
UNSUITABLE, GONE, REFUSED = (
    (v, False) for v in (Verdict.UNSUITABLE, Verdict.GONE, Verdict.REFUSED)
)


def flat(code: Any = None, message: Any = "", type: str = "x_error", **more: Any) -> Any:
    """An error as Cerebras writes it."""
    return {"message": message, "type": type, "param": "quota", "code": code, **more}


def nested(code: Any = None, message: Any = "", **more: Any) -> Any:
    """An error as Groq and OpenRouter write it."""
    return {"error": {"message": message, "code": code, **more}}


def meta(**metadata: Any) -> Any:
    return nested(429, "m", metadata=metadata)


def routed(raw: Any) -> Any:
    """What OpenRouter makes of a supplier's error."""
    return nested(0, "Provider returned error", metadata={"raw": raw, "provider_name": "Supplier"})


def judged(status: int, body: Any = "", **headers: str) -> Failure:
    return judge(status, {k.replace("_", "-"): headers[k] for k in headers}, body, NOW)


def ruling(status: int, body: Any = "", **headers: str) -> Any:
    failure = judged(status, body, **headers)
    return failure.verdict, failure.wide


def rows(table: Mapping[Any, Any]) -> Any:
    """The cases of a table from an outcome to all that has it."""
    return [(case, outcome) for outcome, cases in table.items() for case in cases]


# --- What a reply means -------------------------------------------------------------------------

STATUSES = {
    LIMITED: [429],
    FAULT: [408, 409, 424, 425, 498, 499, 500, 502, 503, 504, 520, 524, 529, 599],
    DOWN: [300, 302, 307, 308, 399],
    UNSUITABLE: [400, 404, 405, 413, 415, 422, 426, 431, 451, 497],
    DENIED: [401, 402, 403],
}


@pytest.mark.parametrize(("status", "expected"), rows(STATUSES))
def test_without_words_the_status_decides(status: int, expected: Any) -> None:
    """Whatever shape the nothing has; codes that say several things say nothing."""
    page = "<!DOCTYPE html><html><head><title>Sorry</title></head></html>"
    bodies: list[Any] = ["", "oops", page, None, 7, True, [], {}, [{}], {"error": None}, nested()]
    for code in ("rate_limit_exceeded", "invalid_request_error", "tokens", "requests"):
        bodies += [nested(code, "Something.", type=code), {"error": {"error_type": code}}]
    assert [ruling(status, body) for body in bodies] == [expected] * len(bodies)


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
    ("code", "expected"), rows({outcome: codes.split() for outcome, codes in CODES.items()})
)
def test_a_code_that_says_one_thing_decides(code: str, expected: Any) -> None:
    """Wherever it stands, against any status; not when it is a part of another word."""
    status = 418 if expected is FAULT else 500
    error, by_type = {"code": code}, {"error_type": code, "http_status": 500}
    places: list[Any] = [flat(code), flat(type=code), nested(code), nested(type=code)]
    places += [[nested(code)], {"errors": [error]}, {"error": [error]}, {"error": by_type}]
    places += [nested(500, availability=error), meta(error_type=code), meta(limit_source=code)]
    assert [ruling(status, body) for body in places] == [expected] * len(places)
    assert ruling(418, nested(f"no-{code}")) == ruling(418, nested(f"{code}-no")) == UNSUITABLE


WORDS = {
    UNSUITABLE: """Request too large for `m`: reduce it, or you reach the rate limit
        Nobody matches your data policy (m)
        Please reduce the length of the prompt
        This model's maximum context is 8192
        9000 tokens exceed the 8192 of the context
        The prompt exceeds our context
        The context length of m was exceeded
        the context window is exceeded""",
    ACCOUNT_LIMITED: """Too many: free-models-per-min
        Too many: free-models-per-day-stealth.""",
    DOWN: "No. Check your network settings.",
    DENIED: """Insufficient quota left
        insufficient credits
        Insufficient balance
        insufficient funds
        You have exceeded your current quota.
        A payment is overdue
        Key limit exceeded (monthly)""",
    GONE: """a/b is not a valid model ID
        No endpoints found for a/b. All were filtered.
        The model `a` does not exist, or is not yours
        Model a was not found
        the models a and b are no longer served
        Model a: retired last week
        Model a is archived
        model a has been decommissioned
        Model a: deprecated""",
    REFUSED: """Stopped by the content management policy
        against our content safety policy
        Request blocked: an injection
        Flagged by moderation""",
}


@pytest.mark.parametrize(
    ("message", "expected"), rows({outcome: text.split("\n") for outcome, text in WORDS.items()})
)
def test_narrow_words_of_the_message_decide(message: str, expected: Any) -> None:
    """In every shape, against a status, and against a code that decides nothing."""
    zod = {"success": False, "error": {"name": "ZodError", "message": message}}
    bodies: list[Any] = [message, {"error": message}, {"detail": [{"msg": message}]}, zod]
    bodies += [flat("rate_limit_exceeded", message.upper()), nested(429, message)]
    assert [ruling(429, body) for body in bodies] == [expected] * len(bodies)
    assert ruling(410, message) == expected


LIMIT = "Limit of 9 tokens per day, 8 used. Upgrade in your billing settings to get more credits."
IN_FLIGHT = {"metadata": {"limit_source": "openrouter_in_flight_budget"}}
# fmt: off
CASES = {
    "supplier: with a full stop": (
        404,
        nested(0, "Provider returned error.", metadata={"raw": '{"code":"model_archived"}'}),
        GONE,
    ),
    "a parameter is deprecated": (
        400, nested(None, "For this model the parameter `x` is deprecated"), UNSUITABLE
    ),
    "a flagged account": (403, nested(403, "Your account has been flagged"), DENIED),
    "an error as a word beside a message": (
        400, {"error": "insufficient_quota", "message": "No."}, DENIED
    ),
    "inside: a limit's code": (200, nested("rate_limit_exceeded", "Slow down."), LIMITED),
    "inside: a limit's type": (
        200, nested(None, "Slow down.", type="too_many_requests_error"), LIMITED
    ),
    "billing and credits alone say nothing": (429, nested("x", LIMIT), LIMITED),
    "a code is heard before words": (400, nested("model_not_found", "Request too large"), GONE),
    "a limit's source before a code": (402, nested("account_x", "m", **IN_FLIGHT), ACCOUNT_LIMITED),
    "a limit's source unknown to us": (429, meta(limit_source="upstream_pool"), LIMITED),
    "an empty code": (500, flat("", "Bad luck, try again.", id=""), FAULT),
    "codes of odd types": (400, nested(["model_not_found"], "x", type=3), UNSUITABLE),
    "a moderation's reasons": (403, meta(reasons=["violence"]), REFUSED),
    "a moderation's input": (403, meta(flagged_input="bad"), REFUSED),
    "a guardrail's patterns": (403, meta(patterns=["bad"]), REFUSED),
    "no reasons, so no moderation": (403, meta(reasons=[]), DENIED),
    "a bare 404 is not the model's end": (404, nested(404, "Not Found"), UNSUITABLE),
    "the word model alone": (400, nested(400, "Give the model a prompt"), UNSUITABLE),
    "the text of a gate": (403, "error code: 1020", DENIED),
    "429 as a page": (429, "<html><title>Slow down</title></html>", LIMITED),
    "supplier: its limit": (429, routed("m:free is short of capacity."), LIMITED),
    "supplier: model gone, nested": (400, routed('{"error":{"code":"model_archived"}}'), GONE),
    "supplier: model gone, in a list": (502, routed('[{"error":{"code":"model_archived"}}]'), GONE),
    "supplier: unsuitable, flat": (502, routed('{"code":"string_too_long"}'), UNSUITABLE),
    "supplier: refuses the question": (403, routed('{"code":"content_filter"}'), REFUSED),
    "supplier: its key, not ours": (401, routed('{"code":"invalid_api_key"}'), FAULT),
    "supplier: its bill as 429": (429, routed('{"code":"insufficient_quota"}'), LIMITED),
    "supplier: its network": (502, routed("Check your network settings"), FAULT),
    "supplier: says nothing": (502, routed(""), FAULT),
    "supplier: no metadata": (403, nested(403, "Provider returned error"), FAULT),
    "raw is heard only of a supplier": (502, meta(raw='{"code":"model_archived"}'), FAULT),
    "inside: a status": (200, nested(429, "m"), LIMITED),
    "inside: a status as text": (200, nested("402", "m"), DENIED),
    "inside: a code": (200, nested("model_not_found", "m"), GONE),
    "inside: status_code beside it": (200, {"status_code": 401, "error": {"code": ""}}, DENIED),
    "inside: status_code in it": (200, nested("x", "m", status_code=400), UNSUITABLE),
    "inside: http_status": (200, nested(None, "m", http_status=404), UNSUITABLE),
    "inside: the lowest status": (200, nested(400, "m"), UNSUITABLE),
    "inside: lower": (200, nested(399, "m"), FAULT),
    "inside: the highest status": (200, nested(599, "m"), FAULT),
    "inside: true is no status": (200, nested(True, "m"), FAULT),
    "inside: words of a limit": (200, nested("x", "Rate-limit reached"), LIMITED),
    "inside: other words of it": (200, nested("x", "too many requests"), LIMITED),
    "inside: the code's words of it": (200, nested("rate_limit"), LIMITED),
    "a moderation that is down": (500, nested(500, "No text is flagged by us now"), FAULT),
    "the inner code before the outer": (
        500, {"code": "server_error", "error": {"code": "model_archived"}}, GONE
    ),
    "inside: nothing known": (200, nested("x", "Generation broke off"), FAULT),
    "inside: just a word": (200, {"error": "boom"}, FAULT),
    "from 300 its own status wins": (300, nested(429, "m"), DOWN),
}
# fmt: on


@pytest.mark.parametrize(("status", "body", "expected"), CASES.values(), ids=list(CASES))
def test_the_verdict_and_its_reach(status: int, body: Any, expected: Any) -> None:
    """One failure of each shape."""
    assert ruling(status, body) == expected


def test_x_should_retry_false_makes_a_limit_a_fault() -> None:
    """Only a limit, and only "false"."""
    assert ruling(429, flat("request_quota_exceeded"), x_should_retry="false") == FAULT
    assert ruling(429, flat("request_quota_exceeded"), x_should_retry="true") == LIMITED
    assert ruling(404, flat("model_not_found"), x_should_retry="false") == GONE


SERVER = "500 Server Error: Internal Server Error"
# fmt: off
REASONS = {
    "client": (429, nested("x", "Slow."), "429 Client Error: Too Many Requests: Slow."),
    "the lowest client": (400, "", "400 Client Error: Bad Request"),
    "server": (500, "", SERVER),
    "redirect": (300, "", "300 Redirect Error: Multiple Choices"),
    "a status without a name": (529, "", "529 Server Error: Unknown"),
    "page": (500, "\n<!doctype html><title> A\n</title>", SERVER + ": HTML page: A"),
    "untitled page": (404, "<HEAD>", "404 Client Error: Not Found: HTML page: "),
    "codes instead of words": (400, flat("a"), "400 Client Error: Bad Request: a x_error"),
    "words that are data": (400, nested(1, {"a": 1}), '400 Client Error: Bad Request: {"a": 1}'),
    "inside, with a status": (200, nested(502, "Off."), "error 502 inside the reply: Off."),
    "inside, the last": (200, nested(599, "Off."), "error 599 inside the reply: Off."),
    "inside, without": (200, nested(600, "Off."), "error: Off."),
    "a supplier's words": (0, routed('{"message": "a"}'), "error: Provider returned error: a"),
}
# fmt: on


@pytest.mark.parametrize(("status", "body", "expected"), REASONS.values(), ids=list(REASONS))
def test_the_reason_is_requests_wording_and_the_providers(
    status: int, body: Any, expected: str
) -> None:
    """As the documented lines show it."""
    assert judged(status, body).reason == expected


# --- How long to wait ---------------------------------------------------------------------------

AT, RESET, IN_MS = "Fri, 15 Jan 2027 08:00:{} GMT", str(NOW + 9), str(int(NOW + 9) * 1000)
ALL = {"retry_after_ms": "1500", "retry_after": "2", "x_ratelimit_reset": RESET, "date": AT}
ECHO = {"headers": {"ReTRY-After": "6", "X-RateLimit-Reset": NOW + 8}}
WAIT = {"availability": {"retry_after": 5}}
AGAIN = "Please try again in 7s."
# fmt: off
HINTS: dict[str, tuple[dict[str, str], Any, float | None]] = {
    "text of a supplier": ({}, routed('{"error":{"message":"try again in 6.5s"}}'), 6.5),
    "a supplier's day": ({}, routed('{"message":"9 per day"}'), 3600),
    "an hour of the clock is no hint": ({}, "Daily limit. Try again after 00:00 UTC", 3600),
    "retry-after-ms first": (ALL, meta(retry_after_seconds=4), 1.5),
    "2 Retry-After": ({**ALL, "retry_after_ms": "x"}, meta(retry_after_seconds=4), 2),
    "3 metadata": ({}, nested(1, AGAIN, metadata={**ECHO, "retry_after_seconds": 4}, **WAIT), 4),
    "4 availability": ({}, nested(1, AGAIN, metadata=ECHO, **WAIT), 5),
    "error.retry_after": ({}, nested(1, AGAIN, retry_after=5.5, metadata=ECHO), 5.5),
    "5 echoed Retry-After": ({}, nested(1, AGAIN, metadata=ECHO), 6),
    "6 text": ({"x_ratelimit_reset": RESET}, nested(1, AGAIN, metadata={"headers": "x"}), 7),
    "7 echo": ({"x_ratelimit_reset": RESET}, meta(headers={"X-RATELIMIT-RESET": NOW + 8}), 8),
    "8 reset": ({"x_ratelimit_reset": RESET}, "", 9),
    "reset in milliseconds": ({"x_ratelimit_reset": IN_MS}, "", 9),
    "reset is past": ({"x_ratelimit_reset": str(NOW - 9)}, "", None),
    "none": ({}, "", None),
    "zero is a hint": ({"retry_after": "0"}, AGAIN, 0),
    "nan": ({"retry_after": "nan"}, AGAIN, 7),
    "inf": ({"retry_after": "inf"}, AGAIN, 7),
    "negative": ({"retry_after": "-1"}, AGAIN, 7),
    "junk": ({"retry_after": "soon"}, AGAIN, 7),
    "all junk": ({"retry_after": "soon", "retry_after_ms": "", "x_ratelimit_reset": "x"}, "", None),
    "huge": ({"retry_after": "9" * 400}, meta(retry_after_seconds=10**400), None),
    "odd types": ({}, meta(retry_after_seconds=True, headers={"Retry-After": [7]}), None),
    "32 days": ({"retry_after": str(MAX_HINT)}, "", MAX_HINT),
    "over 32 days": ({"retry_after": str(MAX_HINT + 1)}, AGAIN, 7),
    "a date": ({"retry_after": AT.format("44")}, "", 44),
    "a date by its clock": ({"retry_after": AT.format(44), "date": AT.format("04")}, "", 40),
    "a date, and no real Date": ({"retry_after": AT.format(44), "date": "now"}, "", 44),
    "a date that is past": ({"retry_after": AT.format("00"), "date": AT.format("01")}, AGAIN, 7),
    "no such date": ({"retry_after": "Fri, 99 Jan 2027 99:00:00 GMT"}, AGAIN, 7),
    "per minute is no hint": ({}, flat("token_quota_exceeded", "Tokens per minute"), None),
    "a hint wins over per day": ({}, nested(1, "9 per day (RPD). Try again in 1m31.2s."), 91.2),
}
# fmt: on


@pytest.mark.parametrize(("headers", "body", "expected"), HINTS.values(), ids=list(HINTS))
def test_the_first_valid_hint_counts(headers: Any, body: Any, expected: Any) -> None:
    """From the most exact to the least."""
    assert judged(429, body, **headers).hint == (expected and pytest.approx(expected))


LONG = "per hour|Per-Day|per week|per month|your hourly limit|a DAILY limit|the monthly limit"


def test_a_long_limit_without_a_hint_lasts_an_hour() -> None:
    """Not a fault or an account's error with the same words."""
    assert [judged(429, flat(None, text)).hint for text in LONG.split("|")] == [3600.0] * 7
    assert judged(429, "hyperdaily, super hour").hint is None
    assert judged(503, "9 per day").hint is None
    assert judged(503, "9 per day", retry_after="9").hint == 9.0
    assert judged(503, "", x_ratelimit_reset=RESET).hint is None  # a quota's, which is not to blame
    assert judged(402, "9 per day", retry_after="9").hint is None  # not asked again anyway


DURATIONS = {
    4.1875: ["try again in 4.1875s. Or pay."],
    0.48: ["try again in 480ms", "try again in 480 milliseconds"],
    91.2: ["Please Try Again In 1M31.2S.", "retry in 91.2"],
    2490: ["try again in 41m30s", "try again in 41 minutes and 30 seconds"],
    172800: ["retry in 2 days"],
    3720: ["try again in 1h2m0s", "try again in 1h 2m", "try again in 1 hour, 2 minutes"],
    40: ["Retry after 40 seconds.", "retry after 40", "wait for 40s", "try again in about 40 s"],
    math.nan: [
        *["", "in 5s", "try again soon", "retry after in-flight requests", "retry in 1 month"],
        *["try again in 850us", "try again in 2 weeks", "again after 2026-11-23"],
    ],
}


@pytest.mark.parametrize(("message", "seconds"), rows(DURATIONS))
def test_seconds_said_in_a_text(message: str, seconds: float) -> None:
    """As Groq and OpenRouter say them, and their neighbours."""
    hint = judged(429, message).hint
    assert (math.nan if hint is None else hint) == pytest.approx(seconds, nan_ok=True)


def test_backoff() -> None:
    """Grows, and is capped; also where a float overflows."""
    assert [backoff(RetryConfig(), n) for n in range(1, 8)] == [2, 4, 8, 16, 32, 60, 60]
    assert [backoff(RetryConfig(exponential_base=1), n) for n in range(1, 4)] == [2, 2, 2]
    slow = RetryConfig(base_delay=0.5, exponential_base=3)
    assert [backoff(slow, n) for n in range(1, 4)] == [0.5, 1.5, 4.5]
    assert backoff(RetryConfig(base_delay=0), 1) == 0
    assert backoff(RetryConfig(exponential_base=1e9), 1000) == 60.0


# --- Who is next --------------------------------------------------------------------------------

A, B = (Provider(name, f"https://{name}.test", "KEY", ("1", "2")) for name in "ab")


def turn(
    name: str, wait: float = -100, patience: float = 0.0, attempts: int = 0, place: int = 0
) -> Turn:
    """The turn of a model such as "a1", at 100 seconds."""
    return Turn(A if name[0] == "a" else B, name[1], name, attempts, 100 + wait, patience, place)


LINES = {
    "nobody": ([], 60, None),
    "the first": ([turn("a1"), turn("b1")], 60, ("a1", 0)),
    "ready is ready": ([turn("a1", -5), turn("b1", -9)], 60, ("a1", 0)),
    "who is ready passes": ([turn("a1", 5), turn("b1", 0)], 60, ("b1", 0)),
    "within its patience": ([turn("a1", 5, 5), turn("b1", 0)], 60, ("a1", 5)),
    "beyond it": ([turn("a1", 5.1, 5), turn("b1", 0)], 60, ("b1", 0)),
    "a new turn has no patience": ([Turn(A, "1", "a1", 0, 100.5), turn("b1", 0)], 60, ("b1", 0)),
    "the soonest": ([turn("a1", 9), turn("b1", 3), turn("b2", 4)], 60, ("b1", 3)),
    "the first of two": ([turn("a1", 3), turn("b1", 3)], 60, ("a1", 3)),
    "patience before the soonest": ([turn("a1", 5, 9), turn("b1", 3)], 60, ("a1", 5)),
    "patience, in the limit": ([turn("a1", 5, 9), turn("b1", 3)], 4, ("b1", 3)),
    "patience, at the limit": ([turn("a1", 5, 5), turn("b1", 3)], 5, ("a1", 5)),
    "the soonest, at the limit": ([turn("a1", 5)], 5, ("a1", 5)),
    "beyond the limit": ([turn("a1", 5)], 4.9, None),
    "no time left": ([turn("a1")], -1, None),
}


@pytest.mark.parametrize(("line", "limit", "expected"), LINES.values(), ids=list(LINES))
def test_next_turn(line: list[Turn], limit: float, expected: Any) -> None:
    """The first whose wait is within its patience, else the soonest; within the limit."""
    found, wait = next_turn([(turn, max(0.0, turn.ready_at - 100)) for turn in line], limit)
    assert (found and (found.label, wait)) == expected


PLAIN, JITTER, TWICE = RetryConfig(jitter=False), RetryConfig(), RetryConfig(2, jitter=False)
EAGER, SHORT = RetryConfig(jitter=False, eager=True), RetryConfig(base_delay=0.5, jitter=False)
FIRST, OUT, LAST, NONE = "a1 a2 b1", "a2 b1", "a2 b1 a1", (0, 0)
MOVES = {  # attempts before, ruling, hint, config, chance; the line, wait and patience of who moved
    "a short pause keeps its place": (0, LIMITED, None, PLAIN, 0, FIRST, (2, 30)),
    "so does the second": (1, LIMITED, None, PLAIN, 0, FIRST, (4, 28)),
    "and the last": (3, LIMITED, None, PLAIN, 0, FIRST, (16, 16)),
    "after the last attempt it is out": (4, LIMITED, None, PLAIN, 0, OUT, NONE),
    "the last of two": (1, LIMITED, None, TWICE, 0, OUT, NONE),
    "a hint within the patience": (0, LIMITED, 30.0, PLAIN, 0, FIRST, (30, 30)),
    "a hint beyond it": (0, LIMITED, 30.1, PLAIN, 0, LAST, (30.1, 0)),
    "no wait below the backoff": (0, LIMITED, 1.0, PLAIN, 0, FIRST, (2, 30)),
    "eager waits for nobody": (0, LIMITED, None, EAGER, 0, LAST, (2, 0)),
    "a pause below a second": (0, LIMITED, None, SHORT, 0, FIRST, (0.5, 7.5)),
    "a fault that short": (0, FAULT, None, SHORT, 0, LAST, (0.5, 0)),
    "a fault goes to the end": (0, FAULT, None, PLAIN, 0, LAST, (2, 0)),
    "with its hint": (0, FAULT, 9.0, PLAIN, 0, LAST, (9, 0)),
    "a fault again": (2, FAULT, None, PLAIN, 0, LAST, (8, 0)),
    "a fault after the last attempt": (4, FAULT, None, PLAIN, 0, OUT, NONE),
    "unsuitable is out": (0, UNSUITABLE, None, PLAIN, 0, OUT, NONE),
    "gone is out": (0, GONE, None, PLAIN, 0, OUT, NONE),
    "refused is out": (0, REFUSED, None, PLAIN, 0, OUT, NONE),
    "denied takes all models": (0, DENIED, None, PLAIN, 0, "b1", NONE),
    "a provider's fault moves all": (0, DOWN, None, PLAIN, 0, "b1 a1 a2", (2, 0)),
    "a provider's limit holds for all": (0, ACCOUNT_LIMITED, None, PLAIN, 0, FIRST, (2, 30)),
    "and moves all when it is long": (0, ACCOUNT_LIMITED, 99.0, PLAIN, 0, "b1 a1 a2", (99, 0)),
    "jitter takes a fifth at most": (0, LIMITED, None, JITTER, 0, FIRST, (1.6, 30)),
    "or half of it": (0, LIMITED, None, JITTER, 0.5, FIRST, (1.8, 30)),
    "or nothing": (0, LIMITED, None, JITTER, 1, FIRST, (2, 30)),
    "but nothing from a hint": (0, LIMITED, 2.0, JITTER, 0, FIRST, (2, 30)),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=list(MOVES))
def test_line_after(move: Any) -> None:
    """Who is out, who keeps the place, who goes to the end; and how long each is not asked."""
    attempts, (verdict, wide), hint, config, chance, order, (wait, patience) = move
    line = [turn("a1", attempts=attempts), turn("a2"), turn("b1", -93, 3, place=6)]
    before = [each._asdict() for each in line]
    expected = {each["label"]: dict(each) for each in before}
    reached = ("a1", "a2") if wide else ("a1",)
    for label in reached:
        expected[label].update(ready_at=pytest.approx(100 + wait), patience=patience)
        expected[label]["attempts"] += 1
        expected[label]["place"] = 0 if order == FIRST else 7
    after = line_after(line, line[0], Failure(verdict, "", wide, hint), config, 100.0, chance)
    ordered = sorted(after, key=lambda each: (each.place, each.label))
    assert [each._asdict() for each in ordered] == [expected[label] for label in order.split()]
    assert [each._asdict() for each in line] == before


# --- What is refused at birth -------------------------------------------------------------------

NAN, INF = math.nan, math.inf
NUMBERS: dict[str, tuple[float, float, list[Any]]] = {
    "max_attempts": (1, 1000, [0, 1001, 2.0, "5", True, None, NAN]),
    "max_tokens": (1, 1000000, [0, 1000001, 1.5, True]),
    "workers": (1, 1000, [0, 1001, 8.0]),
    "base_delay": (0, 1e9, [-0.1, 1.1e9, NAN, INF, -INF, "2", None, True, False, [2], 2j]),
    "max_delay": (0, 1e9, [-0.1, 1.1e9, NAN, INF, "2", None, True]),
    "exponential_base": (1, 1e9, [0.9, 1.1e9, NAN, INF, "2", None, True]),
    "timeout": (1e-6, 1e9, [0, -1, 1.1e9, NAN, INF, "9", True]),
    "silence": (1e-6, 1e9, [0, -1, 1.1e9, NAN, INF, None]),
    "temperature": (0, 2, [-0.1, 2.1, NAN, "1", True]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_cannot_be_meant(name: str) -> None:
    """The lowest and the highest are allowed; everything else is refused with its name."""
    lowest, highest, nonsense = NUMBERS[name]
    assert (checked(name, lowest), checked(name, highest)) == (lowest, highest)
    config: dict[str, Any] = {"base_delay": 0, "max_delay": 1e9}
    for value in nonsense:
        with pytest.raises(ValueError, match=f"^{name} must be a.* not "):
            checked(name, value)
        if name in vars(RetryConfig()):
            with pytest.raises(ValueError, match=f"^{name} must be a.* not "):
                RetryConfig(**{**config, name: value})


def test_retry_config() -> None:
    """The defaults are the documented ones, and the delays agree with each other."""
    assert RetryConfig() == RetryConfig(5, 2.0, 60.0, 2.0, True, False)
    assert RetryConfig(base_delay=60.0).max_delay == 60.0
    with pytest.raises(ValueError, match=r"^max_delay must be >= base_delay, not 1 with 2\.0$"):
        RetryConfig(max_delay=1)


def test_verdicts() -> None:
    """Who is asked again in the question, and how long later questions ask it last."""
    assert all(verdict.advice for verdict in Verdict)
    assert {verdict.word: (verdict.again, verdict.asked_last) for verdict in Verdict} == {
        "rate_limited": (True, 0.0),
        "fault": (True, 0.0),
        "unsuitable": (False, None),
        "gone": (False, 600.0),
        "denied": (False, 600.0),
        "refused": (False, None),
    }


def test_a_providers_row() -> None:
    """It names its variables, can be a key, and refuses what it cannot mean."""
    assert len({hash(row) for row in PROVIDERS}) == 3
    row = Provider("my-own.ai", "https://x.test", None, ["m"])  # type: ignore[arg-type]
    assert (row.models, row.silence, row.free_only, row.key_path) == (("m",), 60, False, "/models")
    assert row.variable("MODELS") == "MY_OWN_AI_MODELS"
    with pytest.raises(ValueError, match=r"^a row has .* several models: Provider\(name='a', "):
        Provider("a", "https://x.test", None, "m")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^silence must be a finite number"):
        Provider("a", "https://x.test", None, ("m",), silence=0)
