"""What a reply means, how long to wait, who is next: tables of cases."""

from __future__ import annotations

import math
from typing import Any, Mapping, Sequence

import pytest

from fallback_llm import (
    MAX_HINT,
    PROVIDERS,
    VERDICT_RULES,
    Account,
    Candidate,
    Cause,
    Failure,
    Health,
    Provider,
    Queue,
    Reach,
    RetryConfig,
    Turn,
    Verdict,
    check_number,
    judge,
)

NOW = 1_800_000_000.0  # Fri, 15 Jan 2027 08:00:00 GMT
LIMITED = (Verdict.RATE_LIMITED, Reach.MODEL)
ACCOUNT_LIMITED = (Verdict.RATE_LIMITED, Reach.ACCOUNT)
FAULT = (Verdict.FAULT, Reach.MODEL)
DOWN = (Verdict.FAULT, Reach.PROVIDER)
UNSUITABLE = (Verdict.UNSUITABLE, Reach.MODEL)
GONE = (Verdict.GONE, Reach.MODEL)
DENIED = (Verdict.DENIED, Reach.ACCOUNT)
UNPAID = (Verdict.DENIED, Reach.MODEL)
REFUSED = (Verdict.REFUSED, Reach.MODEL)
REJECTED = (Verdict.REJECTED, Reach.MODEL)
NO_SUCH_PATH = (Verdict.UNSUITABLE, Reach.PROVIDER)


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
    return failure.verdict, failure.reach


def lines(text: str) -> list[str]:
    """The lines of a table of messages."""
    return [line.strip() for line in text.split("\n")]


def rows(table: Mapping[Any, Any]) -> Any:
    """The cases of a table from an outcome to all that has it."""
    return [(case, outcome) for outcome, cases in table.items() for case in cases]


# --- What a reply means -------------------------------------------------------------------------

STATUSES = {
    LIMITED: [429],
    FAULT: [408, 409, 424, 425, 498, 499, 500, 502, 503, 504, 520, 524, 529, 599],
    DOWN: [300, 302, 307, 308, 399],
    UNSUITABLE: [400, 405, 413, 415, 422, 426, 431, 451, 497],
    DENIED: [401],
    UNPAID: [402],
}
PAGE = "<!DOCTYPE html><html><head><title>Sorry</title></head></html>"
NO_JSON: list[Any] = ["", "oops", PAGE, "error code: 1020"]
NO_WORDS: list[Any] = [[], {}, [{}], {"error": None}, nested()]
for vague in ("rate_limit_exceeded", "invalid_request_error", "tokens", "requests"):
    NO_WORDS.append(nested(vague, "Something.", type=vague))
    NO_WORDS.append({"error": {"error_type": vague}})


@pytest.mark.parametrize(("status", "expected"), rows(STATUSES))
def test_without_words_the_status_decides(status: int, expected: Any) -> None:
    """Whatever shape the nothing has; codes that say several things say nothing."""
    bodies = [*NO_JSON, None, 7, True, *NO_WORDS]
    assert [ruling(status, body) for body in bodies] == [expected] * len(bodies)


@pytest.mark.parametrize(("status", "no_json"), [(403, DENIED), (404, UNSUITABLE)])
def test_a_403_or_404_in_json_is_about_the_model(status: int, no_json: Any) -> None:
    """A page or a text comes from a gate in front of the API, or from a wrong address."""
    assert [ruling(status, body) for body in NO_WORDS] == [GONE] * len(NO_WORDS)
    assert [ruling(status, body) for body in NO_JSON] == [no_json] * len(NO_JSON)


CODES = {
    GONE: "model_not_found model_archived model_archived_error model_decommissioned no_endpoints"
    " model_deprecated model_unavailable_upstream free_variant_ended MODEL_NOT_FOUND"
    " model_permission_blocked_project model_permission_blocked_org",
    DENIED: "invalid_api_key wrong_api_key payment_required payment_required_error authentication"
    " insufficient_quota organization_restricted organization_delinquent authentication_error"
    " openrouter_credits openrouter_key_limit region_restricted account_closed"
    " spend_limit_reached blocked_api_access",
    REFUSED: "content_policy_violation content_filter refusal moderation input_moderation_failed",
    ACCOUNT_LIMITED: "openrouter_in_flight_budget openrouter_free_tier_daily"
    " openrouter_free_tier_per_minute",
    LIMITED: "token_quota_exceeded request_quota_exceeded capacity_exhausted",
    FAULT: "queue_exceeded json_validate_failed tool_use_failed output_parse_failed"
    " schema_check_failed model_overloaded timeout server_error server"
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
    """Wherever it stands, against any status."""
    status = 418 if expected is FAULT else 500
    error = {"code": code}
    by_type = {"error_type": code, "http_status": 500}
    places: list[Any] = [flat(code), flat(type=code), nested(code), nested(type=code)]
    places += [[nested(code)], {"errors": [error]}, {"error": [error]}, {"error": by_type}]
    places += [nested(500, availability=error), meta(error_type=code), meta(limit_source=code)]
    assert [ruling(status, body) for body in places] == [expected] * len(places)


@pytest.mark.parametrize(
    "code", ["queue_exceeded", "insufficient_quota", "content_filter", "no_endpoints", "server"]
)
def test_a_code_inside_another_word_decides_nothing(code: str) -> None:
    """no-content_filter is another code than content_filter."""
    assert ruling(418, nested(f"no-{code}")) == UNSUITABLE
    assert ruling(418, nested(f"{code}-no")) == UNSUITABLE


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
}


@pytest.mark.parametrize(
    ("message", "expected"), rows({outcome: lines(text) for outcome, text in WORDS.items()})
)
def test_narrow_words_of_the_message_decide(message: str, expected: Any) -> None:
    """In every shape, against a status, and against a code that decides nothing."""
    zod = {"success": False, "error": {"name": "ZodError", "message": message}}
    bodies: list[Any] = [message, {"error": message}, {"detail": [{"msg": message}]}, zod]
    bodies += [flat("rate_limit_exceeded", message.upper()), nested(429, message)]
    assert [ruling(429, body) for body in bodies] == [expected] * len(bodies)
    assert ruling(410, message) == expected


# What was asked breaks the rules: nobody else is asked.
REFUSALS = lines("""Stopped by the content management policy
    against our content safety policy
    Request blocked: an injection
    Flagged by moderation
    Your prompt was flagged as hateful
    The input was flagged by a classifier
    This message violates our rules
    Such text is not allowed by our guidelines
    The content was blocked by a filter""")


@pytest.mark.parametrize("message", REFUSALS)
def test_words_about_what_was_asked_refuse_it(message: str) -> None:
    """Only with a status that fits: a 429 or a 5xx says that the same question may pass later."""
    for status in (200, 400, 403, 422):
        assert ruling(status, nested(None, message)) == REFUSED
    assert ruling(429, nested(None, message)) == LIMITED
    for status in (408, 498, 500, 502, 503):
        assert ruling(status, nested(None, message)) == FAULT
    assert ruling(200, nested(503, message)) == FAULT
    assert ruling(401, nested(None, message)) == DENIED


# Somebody else, or something else, was flagged: the next provider may well answer.
NOT_THE_QUESTION = lines("""API key was flagged by our abuse detection
    Your API key was flagged under the content policy
    Your key was flagged under the content policy
    Payment method flagged
    Your payment method was flagged: see our content policy
    The credit card was flagged
    Your account was flagged for the content of earlier messages
    We flagged your account under the content policy
    Your organization was flagged for prompts that violate the content policy
    Your organisation has been suspended: it violates our content policy
    IP 192.0.2.7 was flagged
    Your IP address was flagged under the content policy
    The address 192.0.2.7 was flagged under the content policy""")


@pytest.mark.parametrize("status", [400, 403, 422])
@pytest.mark.parametrize("message", NOT_THE_QUESTION)
def test_a_flagged_key_account_card_or_address_refuses_no_question(
    message: str, status: int
) -> None:
    """It is the provider's trouble with us, and ends the question nowhere else."""
    assert ruling(status, nested(None, message)) == DENIED


def test_a_policy_that_is_only_mentioned_refuses_no_question() -> None:
    """A limit, or a filter that is out of order, is no judgement on what was asked."""
    assert ruling(429, nested(None, "Slow down, as our content policy says")) == LIMITED
    assert ruling(503, nested(None, "The content filter is out of order")) == FAULT
    assert ruling(200, nested(None, "The safety system is out of order")) == FAULT
    assert ruling(404, nested(None, "Our content policy has moved")) == GONE
    assert ruling(400, nested(None, "The parameter content_filter is unknown")) == UNSUITABLE


GENERAL_403 = {
    GONE: """Forbidden
        Access to this model is not enabled for you
        Only listed robots may talk to m:free
        The model m is switched off for the project
        m is being tested by chosen partners
        The keyboard layout m is locked""",
    DENIED: """The key was revoked last week
        This API key has no rights left
        Your account awaits a confirmation of its e-mail
        The organization is on hold
        The organisation is on hold
        All credit is spent""",
    UNSUITABLE: """This violates the terms of the supplier
        Against the Terms of Service of whoever serves it
        See our usage policy for what may not be sent
        Such requests are prohibited""",
}


@pytest.mark.parametrize(
    ("message", "expected"),
    rows({outcome: lines(text) for outcome, text in GENERAL_403.items()}),
)
def test_a_403_in_words_never_seen_before(message: str, expected: Any) -> None:
    """It is about one model, unless it names the key, the account, the credit or broken rules."""
    shapes = [nested(403, message), flat("x", message), {"error": message}, {"detail": message}]
    assert [ruling(403, body) for body in shapes] == [expected] * len(shapes)
    assert ruling(200, nested(403, message)) == expected


GENERAL_404 = {
    GONE: """Not Found
        Nobody serves m any longer
        m:free has become a paid model
        The free weeks of m are over
        Say n instead of m
        What you ask for has left us""",
    UNSUITABLE: """Nobody matches your data policy
        Your Data Policy leaves nobody for m
        A guardrail of yours leaves nobody
        Nobody here knows the requested parameters
        Of the allowed providers none is left""",
}


@pytest.mark.parametrize(
    ("message", "expected"),
    rows({outcome: lines(text) for outcome, text in GENERAL_404.items()}),
)
def test_a_404_in_words_never_seen_before(message: str, expected: Any) -> None:
    """The model is gone, unless something else is named that can be changed."""
    shapes = [nested(404, message), flat("x", message), {"error": message}, {"detail": message}]
    assert [ruling(404, body) for body in shapes] == [expected] * len(shapes)
    assert ruling(200, nested(404, message)) == expected
    assert ruling(404, message) == UNSUITABLE


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
    "a 429 with the type of a 500": (429, nested(None, "Slow down.", type="server_error"), LIMITED),
    "a 429 with the code of a 500": (429, nested("overloaded", "Slow down."), LIMITED),
    "a 429 that blocks an account for a while": (
        429, nested(None, "The organization is blocked for a minute: too many requests"), LIMITED
    ),
    "a spending limit, sent as 400": (400, nested("spend_limit_reached", "Enough."), DENIED),
    "a spending limit, sent as 429": (429, nested("spend_limit_reached", "Enough."), DENIED),
    "unreadable output, sent as 400": (400, nested("output_parse_failed", "No JSON."), FAULT),
    "any other _failed, sent as 400": (400, nested("poem_check_failed", "No rhyme."), FAULT),
    "a model switched off for a project": (
        403, nested("model_permission_blocked_team", "Ask your admin.", type="x"), GONE
    ),
    "a model for certain programs": (403, nested(403, "m:free is for coding tools only"), GONE),
    "a supplier's terms": (403, nested(403, "A violation of the supplier's terms"), UNSUITABLE),
    "a permission without a model": (403, nested("permission_denied", "You may not."), GONE),
    "not free any more": (404, nested(404, "m is unavailable for free; say n"), GONE),
    "in flight, with a hint": (402, nested(402, "m", **IN_FLIGHT), ACCOUNT_LIMITED),
    "more output than a minute allows": (
        400, nested(None, "Request too large for m on output tokens per minute"), UNSUITABLE
    ),
    "inside: a supplier is overloaded": (
        200, nested(503, "Nobody is free.", metadata={"error_type": "provider_overloaded"}), FAULT
    ),
    "inside: a limit by its type": (
        200, nested(429, "Slow.", metadata={"error_type": "rate_limit_exceeded"}), LIMITED
    ),
    "a moderation's reasons": (403, meta(reasons=["violence"]), REFUSED),
    "a moderation's input": (403, meta(flagged_input="bad"), REFUSED),
    "a guardrail's patterns": (403, meta(patterns=["bad"]), REFUSED),
    "no reasons, so no moderation": (403, meta(reasons=[]), GONE),
    "a bare 404": (404, nested(404, "Not Found"), GONE),
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
    "supplier: no metadata": (502, nested(502, "Provider returned error"), FAULT),
    "supplier: a model it does not have": (403, nested(403, "Provider returned error"), GONE),
    "raw is heard only of a supplier": (502, meta(raw='{"code":"model_archived"}'), FAULT),
    "inside: a status": (200, nested(429, "m"), LIMITED),
    "inside: a status as text": (200, nested("401", "m"), DENIED),
    "inside: the status of a bill": (200, nested("402", "m"), UNPAID),
    "inside: a code": (200, nested("model_not_found", "m"), GONE),
    "inside: status_code beside it": (200, {"status_code": 401, "error": {"code": ""}}, DENIED),
    "inside: status_code in it": (200, nested("x", "m", status_code=400), UNSUITABLE),
    "inside: http_status": (200, nested(None, "m", http_status=422), UNSUITABLE),
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
    "a quota with a time is a limit": (
        429, nested(429, "You exceeded your current quota. Please retry in 1.5s."), LIMITED
    ),
    "inside: a quota with a time": (
        200, nested("insufficient_quota", "Please retry in 1.5s."), LIMITED
    ),
    "a quota without a time": (429, nested(429, "You exceeded your current quota"), DENIED),
    "a time does not pay a bill": (402, nested("x", "Add credits. Try again in 5s"), UNPAID),
    "a bill without a card": (402, flat("payment_required", "Add a card."), DENIED),
    "a key of which all is spent": (402, meta(limit_source="openrouter_key_limit"), DENIED),
    "no credit for this model": (402, meta(limit_source="openrouter_credits"), UNPAID),
    "a key that is not valid, sent as 400": (400, nested(400, "API key not valid."), DENIED),
    "an invalid key, sent as 400": (400, nested(None, "Invalid API key: x"), DENIED),
    "an incorrect key, sent as 404": (404, nested(None, "Incorrect API key"), DENIED),
    "too dear a question": (402, nested(402, "Prompt tokens limit exceeded: 9 > 5"), UNPAID),
    "supplier: its 404": (404, routed(""), FAULT),
    "supplier: its 404, with its words": (404, routed("The model m does not exist"), FAULT),
    "supplier: its 404 inside": (200, nested(404, "Provider returned error"), FAULT),
    "supplier: its account, by its code": (403, routed('{"code":"account_closed"}'), FAULT),
    "supplier: its account, in words": (403, routed("Your account was suspended"), FAULT),
    "supplier: its credit": (403, routed("All credit is spent"), FAULT),
    "supplier: its network, with a 403": (403, routed("Check your network settings"), FAULT),
    "nobody can do what is asked": (
        404, nested(404, "No endpoints found that support image input"), UNSUITABLE
    ),
    "nobody is there for a moment": (404, nested(404, "No endpoints available"), FAULT),
    "nobody is there for good": (404, nested(404, "No endpoints found for m."), GONE),
    "no such path, by its code": (404, nested("unknown_url", "m"), NO_SUCH_PATH),
    "no such path, in words": (404, nested(None, "Unknown request URL: POST /x"), NO_SUCH_PATH),
    "no such path, in others": (404, nested(None, "Invalid URL (POST /v1/v1/x)"), NO_SUCH_PATH),
    "no such path, as Express says it": (404, nested(None, "Cannot POST /x"), NO_SUCH_PATH),
    "no such path, as others say it": (404, {"detail": "Route not found"}, NO_SUCH_PATH),
    "the door of a proxy": (407, "", (Verdict.UNSUITABLE, Reach.PROVIDER)),
    "every error of a list": (
        500, {"errors": [{"message": "No."}, {"code": "model_not_found"}]}, GONE
    ),
    "a sentence is no code": (429, {"error": "Refused by moderation"}, LIMITED),
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


ADVICES = {
    "redirect": (302, "", "check {base_url}: the server redirects to new.test"),
    "a web page": (404, PAGE, "check {base_url}: a web page answered, not an API"),
    "a text": (404, "no such page", "check {base_url}: no API answered"),
    "a method": (405, "", "check {base_url}: no API answered"),
    "a path": (
        404, nested("unknown_url"), "check {base_url}: the server does not know this path"
    ),
    "nothing that tells": (
        404, {"detail": "Not Found"}, "or check {base_url}"
    ),
    "a proxy": (407, "", "check the user and password in HTTPS_PROXY"),
    "too dear": (
        402, nested(402, "Fewer max_tokens"), "max_tokens"
    ),
    "too dear, by its source": (
        402, nested(402, "9 tokens", metadata={"limit_source": "openrouter_credits"}), "max_tokens"
    ),
    "unpaid": (402, "", ""),
    "a limit": (429, "", ""),
    "a model": (404, nested("model_not_found"), ""),
    "a page of a gate": (503, PAGE, ""),
}  # fmt: skip


@pytest.mark.parametrize(("status", "body", "advice"), ADVICES.values(), ids=list(ADVICES))
def test_advice_where_the_verdict_has_none_that_fits(status: int, body: Any, advice: str) -> None:
    """Names in braces are those of the provider's variables."""
    found = judged(status, body, location="https://new.test/v2?key=x").advice
    assert advice in found
    assert bool(advice) == bool(found)


def test_advice_for_a_redirect_that_does_not_say_where_to() -> None:
    assert judged(301).advice == "check {base_url}: the server redirects to another address"
    assert "another address" in judged(301, location="https://[").advice


SERVER = "500 Server Error: Internal Server Error"
# fmt: off
REASONS = {
    "client": (429, nested("x", "Slow."), "429 Client Error: Too Many Requests: Slow."),
    "the lowest client": (400, "", "400 Client Error: Bad Request"),
    "server": (500, "", SERVER),
    "redirect": (300, "", "300 Redirect Error: Multiple Choices"),
    "a status without a name": (529, "", "529 Server Error: Unknown"),
    "page": (500, "\n<!doctype html><title> A\n</title>", SERVER + ": HTML page: A"),
    "a page without words": (
        404, "<HEAD>", "404 Client Error: Not Found: an HTML page without words"
    ),
    "a page with a heading": (
        500, "<html><h1>A <b>bad</b>\nday", SERVER + ": HTML page: A bad day"
    ),
    "an empty title": (500, "<html><title></title><h1>A</h1>", SERVER + ": HTML page: A"),
    "first words": (
        500, "<body><style>p {}</style><p>One </p>two</body>", SERVER + ": HTML page: One two"
    ),
    "XML": (500, "<?xml version='1.0'?>\n<html><title>A</title>", SERVER + ": HTML page: A"),
    "XML that is no page": (
        500, "<?xml version='1.0'?><Error><Code>A</Code></Error>", SERVER + ": HTML page: A"
    ),
    "a page that a router quotes": (
        500, routed(PAGE), SERVER + ": Provider returned error: HTML page: Sorry"
    ),
    "codes instead of words": (400, flat("a"), "400 Client Error: Bad Request: a x_error"),
    "words that are data": (400, nested(1, {"a": 1}), '400 Client Error: Bad Request: {"a": 1}'),
    "inside, with a status": (200, nested(502, "Off."), "error 502 inside the reply: Off."),
    "inside, the last": (200, nested(599, "Off."), "error 599 inside the reply: Off."),
    "inside, without": (200, nested(600, "Off."), "error inside the reply: Off."),
    "a supplier's words": (
        0, routed('{"message": "a"}'), "error inside the reply: Provider returned error: a"
    ),
}
# fmt: on


@pytest.mark.parametrize(("status", "body", "expected"), REASONS.values(), ids=list(REASONS))
def test_the_reason_is_requests_wording_and_the_providers(
    status: int, body: Any, expected: str
) -> None:
    """As the documented lines show it."""
    assert judged(status, body).reason == expected


# --- How long to wait ---------------------------------------------------------------------------

AT = "Fri, 15 Jan 2027 08:00:{} GMT"
RESET = str(NOW + 9)
IN_MS = str(int(NOW + 9) * 1000)
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
    "7 reset": ({"x_ratelimit_reset": RESET}, meta(headers={"X-RATELIMIT-RESET": NOW + 8}), 9),
    "8 echoed reset": ({}, meta(headers={"X-RATELIMIT-RESET": NOW + 8}), 8),
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
    "a hint of what is in flight": ({"retry_after": "120"}, nested(402, "m", **IN_FLIGHT), 120),
    "a hint wins over per day": ({}, nested(1, "9 per day (RPD). Try again in 1m31.2s."), 91.2),
    "a duration": ({"retry_after": "1m30s"}, AGAIN, 90),
    "sent twice": ({"retry_after": "30, 30"}, AGAIN, 30),
    "a date sent twice": ({"retry_after": f"{AT.format('44')}, {AT.format('44')}"}, AGAIN, 44),
    "an ISO date": ({"retry_after": "2027-01-15T08:00:30Z"}, AGAIN, 30),
    "an ISO date of elsewhere": ({"retry_after": "2027-01-15T09:00:30.5+01:00"}, AGAIN, 30.5),
    "an ISO date by its clock": (
        {"retry_after": "2027-01-15T08:00:30Z", "date": AT.format("04")}, AGAIN, 26
    ),
    "an instant": ({"retry_after": RESET}, AGAIN, 9),
    "an instant by its clock": ({"x_ratelimit_reset": RESET, "date": AT.format("04")}, "", 5),
    "an ISO date in words": ({}, "Try again at 2027-01-15T08:00:50Z.", 50),
    "RetryInfo": ({}, nested(429, "m", details=[{"@type": "x"}, {"retryDelay": "1.5s"}]), 1.5),
    "reset of requests": ({"x_ratelimit_reset_requests": "30s"}, "", 30),
    "reset, not of requests in words": ({"ratelimit_reset": "12"}, "", 12),
    "a maker's own name": ({"maker_ratelimit_requests_reset": "2027-01-15T08:01:00Z"}, "", 60),
    "the later of two resets": (
        {"x_ratelimit_reset_requests": "1m26.4s", "x_ratelimit_reset_tokens": "480ms"}, "", 86.4
    ),
    "only of what is used up": (
        {
            "x_ratelimit_reset_requests": "9s",
            "x_ratelimit_remaining_requests": "0",
            "x_ratelimit_reset_tokens": "90s",
            "x_ratelimit_remaining_tokens": "5",
        },
        "",
        9,
    ),
    "nothing is used up": (
        {"x_ratelimit_reset_tokens": "90s", "x_ratelimit_remaining_tokens": "5"}, "", None
    ),
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
    20: ["Retry in approximately 20 seconds", "available in at least 20 s", "resets in ~20s"],
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
    assert [RetryConfig().backoff(n) for n in range(1, 8)] == [2, 4, 8, 16, 32, 60, 60]
    assert [RetryConfig(exponential_base=1).backoff(n) for n in range(1, 4)] == [2, 2, 2]
    slow = RetryConfig(base_delay=0.5, exponential_base=3)
    assert [slow.backoff(n) for n in range(1, 4)] == [0.5, 1.5, 4.5]
    assert RetryConfig(base_delay=0).backoff(1) == 0
    assert RetryConfig(exponential_base=1e9).backoff(1000) == 60.0


# --- Who is next --------------------------------------------------------------------------------

A = Provider("a", "https://a.test", "KEY", ("1", "2"))
B = Provider("b", "https://b.test", "KEY", ("1", "2"))


def candidate(name: str) -> Candidate:
    """The candidate of a name such as "a1", or "a1x" if it is asked with the key x."""
    row = A if name[0] == "a" else B
    account = Account(row.name, 1, row.name, "", "")
    return Candidate(row, name[:2], "1/1", account, name[2:])


def name_of(turn: Turn) -> str:
    return turn.candidate.model + turn.candidate.key


class Line:
    """A queue of a1, a2 and b1 at 100 seconds, in a time that stands still."""

    def __init__(
        self,
        config: RetryConfig,
        chance: float = 0.0,
        time_left: float = math.inf,
        names: Sequence[str] = ("a1", "a2", "b1"),
    ) -> None:
        self.now = 100.0
        self._health = Health(self.clock, self.clock)
        self.queue = Queue(
            [candidate(name) for name in names],
            self.now + time_left,
            self._health,
            config,
            self.clock,
            lambda: chance,
        )

    def clock(self) -> float:
        return self.now

    def rest(self, name: str, seconds: float) -> None:
        """Another question is told to wait for a candidate; it is not asked last for that."""
        limit = Failure(Verdict.RATE_LIMITED, "", hint=seconds)
        (turn,) = self._health.turns([candidate(name)])
        self._health.failed(turn, limit, RetryConfig(base_delay=0))

    def fail(self, failure: Failure) -> str:
        """Whoever is next fails, after its wait. Returns its name."""
        while True:
            with self.queue.next() as turn:
                assert turn is not None
                if turn.wait == 0:
                    self.queue.failed(turn, failure)
                    return name_of(turn)
                self.now += turn.wait

    def first(self) -> Any:
        """Who is next, and after which wait; None if nobody is."""
        with self.queue.next() as turn:
            return turn and (name_of(turn), turn.wait)

    def order(self) -> list[Any]:
        """Who would be asked, one after the other, and after which waits, if nobody answered.

        Each one is taken out in its turn, while no time passes.
        """
        found: list[Any] = []
        while True:
            with self.queue.next() as turn:
                if turn is None:
                    return found
                found.append((name_of(turn), turn.wait))
                self.queue.failed(turn, Failure(Verdict.GONE, ""))


# Who stands in line, the seconds until each can be asked, and the patience of the first one; the
# longest wait, who is next.
LINES: dict[str, tuple[dict[str, float], float, float, Any]] = {
    "the first": ({"a1": 0, "b1": 0}, 0, 60, ("a1", 0)),
    "who is ready passes": ({"a1": 5, "b1": 0}, 0, 60, ("b1", 0)),
    "within its patience": ({"a1": 5, "b1": 0}, 5, 60, ("a1", 5)),
    "beyond it": ({"a1": 5.1, "b1": 0}, 5, 60, ("b1", 0)),
    "without patience": ({"a1": 0.5, "b1": 0}, 0, 60, ("b1", 0)),
    "the soonest": ({"a1": 9, "b1": 3, "b2": 4}, 0, 60, ("b1", 3)),
    "the first of two": ({"a1": 3, "b1": 3}, 0, 60, ("a1", 3)),
    "patience before the soonest": ({"a1": 5, "b1": 3}, 9, 60, ("a1", 5)),
    "patience, at the limit": ({"a1": 5, "b1": 3}, 5, 5, ("a1", 5)),
    "the soonest, at the limit": ({"a1": 5}, 0, 5, ("a1", 5)),
    "beyond the limit": ({"a1": 5}, 0, 4.9, None),
}


@pytest.mark.parametrize(
    ("waits", "patience", "limit", "expected"), LINES.values(), ids=list(LINES)
)
def test_first_choice(
    waits: dict[str, float], patience: float, limit: float, expected: Any
) -> None:
    """The first whose wait is within its patience, else the soonest; within the limit."""
    config = RetryConfig(base_delay=patience, max_delay=limit, jitter=False)
    line = Line(config, names=list(waits))
    if patience:
        line.fail(Failure(Verdict.RATE_LIMITED, ""))  # it is waited for as long as its backoff
        line.now += max(0.0, patience - waits["a1"])
    for name, wait in waits.items():
        line.rest(name, wait)
    assert line.first() == expected


# Seconds until a1, which is worth 9, and b1 can be asked; the time that is left, who is next.
ENDINGS: dict[str, tuple[float, float, float, Any]] = {
    "patience for half of the time": (5, 3, 10, ("a1", 5)),
    "and no longer": (5, 3, 9.9, ("b1", 3)),
    "before the end": (5, 3, 3.01, ("b1", 3)),
    "not at the end": (5, 3, 3, None),
    "no time left": (0, 0, -1, None),
}


@pytest.mark.parametrize(("a1", "b1", "time_left", "expected"), ENDINGS.values(), ids=list(ENDINGS))
def test_first_choice_before_the_time_is_up(
    a1: float, b1: float, time_left: float, expected: Any
) -> None:
    """The others need some of it, too; a wait up to its end would leave none for an answer."""
    line = Line(
        RetryConfig(base_delay=9, jitter=False), time_left=9 - a1 + time_left, names=["a1", "b1"]
    )
    if a1:
        line.fail(Failure(Verdict.RATE_LIMITED, ""))
        line.now += 9 - a1
    else:
        line.now += 9
    line.rest("b1", b1)
    assert line.first() == expected


def test_nobody_is_left_of_nobody() -> None:
    assert Line(RetryConfig(), names=[]).first() is None


PLAIN = RetryConfig(jitter=False, max_delay=100.0)
JITTER = RetryConfig(max_delay=100.0)
TWICE = RetryConfig(2, jitter=False)
NO_WAIT = RetryConfig(jitter=False, wait_on_rate_limit=False)
SHORT = RetryConfig(base_delay=0.5, jitter=False)
A2 = ("a2", 0)
B1 = ("b1", 0)


def a1(wait: float) -> Any:
    return ("a1", wait)


def a2(wait: float) -> Any:
    return ("a2", wait)


# Attempts of a1 before, how it fails, the server's hint, settings, chance; who comes next.
MOVES: dict[str, Any] = {
    "a short pause keeps its place": (0, LIMITED, None, PLAIN, 0, [a1(2), A2, B1]),
    "so does the second": (1, LIMITED, None, PLAIN, 0, [a1(4), A2, B1]),
    "and the third": (2, LIMITED, None, PLAIN, 0, [a1(8), A2, B1]),
    "and the last": (3, LIMITED, None, PLAIN, 0, [a1(16), A2, B1]),
    "after the last attempt it is out": (4, LIMITED, None, PLAIN, 0, [A2, B1]),
    "the last of two": (1, LIMITED, None, TWICE, 0, [A2, B1]),
    "a hint of the backoff that is due": (0, LIMITED, 2.0, PLAIN, 0, [a1(2), A2, B1]),
    "a hint beyond it": (0, LIMITED, 2.1, PLAIN, 0, [A2, B1, a1(2.1)]),
    "a hint of the second backoff": (1, LIMITED, 4.0, PLAIN, 0, [a1(4), A2, B1]),
    "a hint beyond the second": (1, LIMITED, 4.1, PLAIN, 0, [A2, B1, a1(4.1)]),
    "no wait below the backoff": (0, LIMITED, 1.0, PLAIN, 0, [a1(2), A2, B1]),
    "--no-wait waits for nobody": (0, LIMITED, None, NO_WAIT, 0, [A2, B1, a1(2)]),
    "a pause below a second": (0, LIMITED, None, SHORT, 0, [a1(0.5), A2, B1]),
    "a fault that short": (0, FAULT, None, SHORT, 0, [A2, B1, a1(0.5)]),
    "a fault goes to the end": (0, FAULT, None, PLAIN, 0, [A2, B1, a1(2)]),
    "with its hint": (0, FAULT, 9.0, PLAIN, 0, [A2, B1, a1(9)]),
    "a fault again": (2, FAULT, None, PLAIN, 0, [A2, B1, a1(8)]),
    "a fault after the last attempt": (4, FAULT, None, PLAIN, 0, [A2, B1]),
    "what was not accepted is out": (0, REJECTED, None, PLAIN, 0, [A2, B1]),
    "unsuitable is out": (0, UNSUITABLE, None, PLAIN, 0, [A2, B1]),
    "gone is out": (0, GONE, None, PLAIN, 0, [A2, B1]),
    "refused is out": (0, REFUSED, None, PLAIN, 0, [A2, B1]),
    "denied takes all models": (0, DENIED, None, PLAIN, 0, [B1]),
    "unpaid is out": (0, UNPAID, None, PLAIN, 0, [A2, B1]),
    "a provider's fault moves all, itself the last": (0, DOWN, None, PLAIN, 0, [B1, a2(2), a1(2)]),
    "an account's limit holds for all": (
        0, ACCOUNT_LIMITED, None, PLAIN, 0, [a1(2), a2(2), B1]
    ),
    "and moves all when it is long": (
        0, ACCOUNT_LIMITED, 99.0, PLAIN, 0, [B1, a2(99), a1(99)]
    ),
    "jitter takes a fifth at most": (0, LIMITED, None, JITTER, 0, [a1(1.6), A2, B1]),
    "or half of it": (0, LIMITED, None, JITTER, 0.5, [a1(1.8), A2, B1]),
    "or nothing": (0, LIMITED, None, JITTER, 1, [a1(2), A2, B1]),
    "but nothing from a hint": (0, LIMITED, 2.0, JITTER, 0, [a1(2), A2, B1]),
}  # fmt: skip


@pytest.mark.parametrize("move", MOVES.values(), ids=list(MOVES))
def test_who_comes_after_a_failure(move: Any) -> None:
    """Who is out, who keeps the place, who goes to the end; and how long each is not asked."""
    attempts, (verdict, reach), hint, config, chance, expected = move
    line = Line(config, chance)
    for _ in range(attempts):
        assert line.fail(Failure(Verdict.RATE_LIMITED, "")) == "a1"
    assert line.fail(Failure(verdict, "", reach, hint=hint)) == "a1"
    assert line.order() == expected


# Seconds of the question that are left, the server's hint; who comes next.
LIMITS: dict[str, Any] = {
    "half of the time is enough": (4.0, None, [a1(2), A2, B1]),
    "half of the time is too little": (3.9, None, [A2, B1, a1(2)]),
    "nor does a hint change that": (3.9, 2.0, [A2, B1, a1(2)]),
    "nobody waits until the time is up": (2.0, None, [A2, B1]),
}


@pytest.mark.parametrize(("time_left", "hint", "expected"), LIMITS.values(), ids=list(LIMITS))
def test_the_next_one_needs_time_too(time_left: float, hint: Any, expected: Any) -> None:
    """No more than half of what is left of a time limit is spent on waiting for one model."""
    line = Line(PLAIN, time_left=time_left)
    line.fail(Failure(Verdict.RATE_LIMITED, "", hint=hint))
    assert line.order() == expected


def test_silence_sends_the_siblings_behind_the_other_providers() -> None:
    """They are ready, but whoever serves them is suspect; the silent one comes last of all."""
    line = Line(PLAIN)
    line.fail(Failure(Verdict.FAULT, "", cause=Cause.SILENCE))
    assert line.order() == [B1, A2, a1(2)]


def test_everybody_has_a_turn_before_anybody_has_two() -> None:
    """A silent model does not starve its healthy sibling."""
    line = Line(PLAIN)
    silence = Failure(Verdict.FAULT, "", cause=Cause.SILENCE)
    assert [line.fail(silence) for _ in range(3)] == ["a1", "b1", "a2"]


def test_a_connection_that_was_closed_meanwhile_is_opened_again_at_once() -> None:
    """Once: it is an attempt of its own, and the second one is a fault like any other."""
    line = Line(PLAIN)
    stale = Failure(Verdict.FAULT, "", cause=Cause.STALE)
    assert line.fail(stale) == "a1"
    assert line.fail(stale) == "a1"
    assert line.order() == [A2, B1, a1(4)]


def test_a_question_without_refused_options_is_asked_at_once() -> None:
    """Once: whoever refuses them for ever is unsuitable like any other."""
    line = Line(PLAIN)
    options = Failure(Verdict.UNSUITABLE, "", cause=Cause.OPTIONS)
    assert line.fail(options) == "a1"
    assert line.fail(options) == "a1"
    assert line.order() == [A2, B1]


def test_without_any_network_there_is_one_more_round() -> None:
    """When nobody could be reached at all, it is our own network that is down."""
    line = Line(PLAIN)
    unreachable = Failure(Verdict.FAULT, "", cause=Cause.UNREACHABLE)
    asked = [line.fail(unreachable) for _ in range(6)]
    assert sorted(asked[:3]) == sorted(asked[3:]) == ["a1", "a2", "b1"]
    assert line.order() == []


KEYS: dict[str, Any] = {  # how the first key fails, the server's hint; who comes next
    "a limit": (LIMITED, None, ["a1y 0", "a1x 2", "a2x 0", "a2y 0"]),
    "a long limit": (LIMITED, 9, ["a1y 0", "a2x 0", "a2y 0", "a1x 9"]),
    "a limit of the account": (ACCOUNT_LIMITED, 9, ["a1y 0", "a2y 0", "a2x 9", "a1x 9"]),
    "a key that is refused": (DENIED, None, ["a1y 0", "a2y 0"]),
    "a fault": (FAULT, None, ["a1y 0", "a2x 0", "a2y 0", "a1x 2"]),
    "no connection": (DOWN, None, ["a1y 2", "a2x 2", "a2y 2", "a1x 2"]),
    "a model that this key may not ask": (GONE, None, ["a1y 0", "a2x 0", "a2y 0"]),
    "a question that does not suit it": (UNSUITABLE, None, ["a2x 0", "a2y 0"]),
    "an answer that was not accepted": (REJECTED, None, ["a2x 0", "a2y 0"]),
}


@pytest.mark.parametrize(("ruling", "hint", "expected"), KEYS.values(), ids=list(KEYS))
def test_who_comes_after_a_failure_with_one_of_two_keys(
    ruling: Any, hint: Any, expected: list[str]
) -> None:
    """What is said of a key leaves the other one; what is said of the model holds for both."""
    line = Line(PLAIN, names=["a1x", "a1y", "a2x", "a2y"])
    assert line.fail(Failure(ruling[0], "", ruling[1], hint=hint)) == "a1x"
    assert [f"{name} {wait:g}" for name, wait in line.order()] == expected


def test_with_two_keys_the_one_that_is_ready_first_is_asked() -> None:
    """Nobody waits for a key while the other one may be used."""
    line = Line(PLAIN, names=["a1x", "a1y"])
    line.rest("a1x", 9)
    line.rest("a1y", 3)
    assert line.first() == ("a1y", 3)


SHARES: dict[str, tuple[float, float, bool]] = {  # the time that is left, until b1 is ready
    "another one is ready": (10, 0, True),
    "another one will be ready in time": (10, 9.8, True),
    "another one will be too late": (10, 9.95, False),
    "too little to be shared": (0.19, 0, False),
    "just enough": (0.21, 0, True),
}


@pytest.mark.parametrize(("time_left", "wait", "shares"), SHARES.values(), ids=list(SHARES))
def test_an_attempt_leaves_half_of_the_time(time_left: float, wait: float, shares: bool) -> None:
    """For whoever can be asked in the other half."""
    line = Line(PLAIN, time_left=time_left, names=["a1", "b1"])
    line.rest("b1", wait)
    with line.queue.next() as turn:
        assert turn is not None
        ends_in = line.queue.deadline_for(turn) - line.now
    assert ends_in == pytest.approx(time_left / 2 if shares else time_left)


def test_the_last_one_has_all_the_time() -> None:
    """As has everybody where there is no limit."""
    for line in (Line(PLAIN, time_left=10, names=["a1"]), Line(PLAIN)):
        with line.queue.next() as turn:
            assert turn is not None
            assert line.queue.deadline_for(turn) == line.queue.deadline


def test_who_is_added_comes_first() -> None:
    """Models of a provider's own list are asked when all others have failed."""
    line = Line(PLAIN)
    assert not line.queue.add([])
    assert line.queue.add([candidate("b3"), candidate("b4")])
    assert line.order() == [("b3", 0), ("b4", 0), ("a1", 0), A2, B1]


# --- What is refused at birth -------------------------------------------------------------------

NAN = math.nan
INF = math.inf
NUMBERS: dict[str, tuple[float, float, list[Any]]] = {
    "max_attempts": (1, 1000, [0, 1001, 2.5, "5", True, None, NAN]),
    "max_tokens": (1, 1000000, [0, 1000001, 1.5, True]),
    "max_workers": (1, 1000, [0, 1001, 8.5]),
    "workers": (1, 1000, [0, 1001, 8.5]),
    "base_delay": (0, 1e9, [-0.1, 1.1e9, NAN, INF, -INF, "2", None, True, False, [2], 2j]),
    "max_delay": (0, 1e9, [-0.1, 1.1e9, NAN, INF, "2", None, True]),
    "exponential_base": (1, 1e9, [0.9, 1.1e9, NAN, INF, "2", None, True]),
    "timeout": (1e-6, 1e9, [0, -1, 1.1e9, NAN, INF, "9", True]),
    "idle_timeout": (1e-6, 1e9, [0, -1, 1.1e9, NAN, INF, None]),
    "temperature": (0, 2, [-0.1, 2.1, NAN, "1", True]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_cannot_be_meant(name: str) -> None:
    """The lowest and the highest are allowed; everything else is refused with its name."""
    lowest, highest, nonsense = NUMBERS[name]
    check_number(name, lowest)
    check_number(name, highest)
    config: dict[str, Any] = {"base_delay": 0, "max_delay": 1e9}
    for value in nonsense:
        with pytest.raises(ValueError, match=f"^{name} must be a.* not "):
            check_number(name, value)
        if name in vars(RetryConfig()):
            with pytest.raises(ValueError, match=f"^{name} must be a.* not "):
                RetryConfig(**{**config, name: value})


def test_a_whole_number_may_be_a_float() -> None:
    """As pandas writes a column with gaps: 100.0 is 100."""
    assert repr(check_number("max_tokens", 100.0)) == "100"
    assert repr(RetryConfig(max_attempts=2.0).max_attempts) == "2"  # type: ignore[arg-type]


def test_retry_config() -> None:
    """The defaults are the documented ones, and the delays agree with each other."""
    assert RetryConfig() == RetryConfig(5, 2.0, 60.0, 2.0, True, True)
    assert RetryConfig(base_delay=60.0).max_delay == 60.0
    with pytest.raises(ValueError, match=r"^max_delay \(1\) is below base_delay \(2\)$"):
        RetryConfig(max_delay=1)


def test_verdicts() -> None:
    """Who is asked again in the question, what counts later, and how long it is asked last."""
    assert all(rule.advice for rule in VERDICT_RULES.values())
    rules = {}
    for verdict, rule in VERDICT_RULES.items():
        rules[verdict.value] = (rule.asked_again, rule.counts, rule.asked_last_for)
    assert rules == {
        "rate_limited": (True, True, 0.0),
        "fault": (True, True, 0.0),
        "unsuitable": (False, False, 0.0),
        "gone": (False, True, 600.0),
        "denied": (False, True, 600.0),
        "refused": (False, False, 0.0),
        "rejected": (False, False, 0.0),
    }


def test_a_providers_row() -> None:
    """It names its variables, can be a key, and refuses what it cannot mean."""
    assert len({hash(row) for row in PROVIDERS}) == 3
    row = Provider("my-own.ai", "https://x.test", None, ["m"])  # type: ignore[arg-type]
    assert row.models == ("m",)
    assert row.idle_timeout == 60
    assert not row.free_only
    assert row.key_path == "/models"
    assert row.variable("MODELS") == "MY_OWN_AI_MODELS"
    with pytest.raises(ValueError, match=r"^models of a must be a list of .*, not 'm'$"):
        Provider("a", "https://x.test", None, "m")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^a provider's name must be in lower case, not 'A'$"):
        Provider("A", "https://x.test", None, ("m",))
    with pytest.raises(ValueError, match=r"^idle_timeout must be a finite number"):
        Provider("a", "https://x.test", None, ("m",), idle_timeout=0)
