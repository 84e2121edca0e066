"""Thousands of synthetic errors, and how the program judged them before its rules were one table.

The rulings of then are in judged_before.txt, which was made once, from the last program that had
lists of codes and phrases (commit 3590e1e):

    git show 3590e1e:fallback_llm.py > old_fallback_llm.py
    python tests/errors_before.py old_fallback_llm.py > tests/judged_before.txt

Each of its lines has the name of a group, a letter for each error of it, and what the server asked
to wait where it said so. The letters are those of the verdicts, large if more than the model is
concerned.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

DATA = Path(__file__).with_name("judged_before.txt")
NOW = 1_800_000_000.0
STATUSES = [200, 302, 400, 401, 402, 403, 404, 405, 407, 408, 409, 410, 413, 422, 424]
STATUSES += [429, 451, 498, 500, 502, 503, 529]
TELLING_STATUSES = [200, 400, 403, 404, 429, 503]
LETTERS = {
    "rate_limited": "l",
    "fault": "f",
    "unsuitable": "u",
    "gone": "g",
    "denied": "d",
    "refused": "r",
}

CODES = """
    content_policy_violation content_filter refusal input_moderation_failed moderation_blocked
    openrouter_in_flight_budget openrouter_free_tier_daily token_quota_exceeded
    request_quota_exceeded capacity_exhausted queue_exceeded invalid_api_key wrong_api_key
    authentication authentication_error payment_required payment_required_error insufficient_quota
    organization_restricted organization_delinquent spend_limit_reached blocked_api_access
    openrouter_credits openrouter_key_limit region_restricted unsupported_country_region
    account_rate_limit account_closed model_archived_error model_overloaded
    model_is_overloaded model_load_timeout model_runtime_error model_not_found model_archived
    model_decommissioned model_deprecated model_permission_blocked_project no_endpoints
    free_variant_ended context_length_exceeded max_tokens_exceeded token_limit_exceeded
    string_too_long payload_too_large request_too_large privacy_restricted constraint_filtered
    unprocessable invalid_request invalid_prompt unsupported_parameter unsupported_value
    unsupported_media wrong_api_format wrong_endpoint wrong_method server server_error
    internal_server_error timeout overloaded provider_overloaded unavailable provider_unavailable
    temporarily_unavailable json_validate_failed tool_use_failed output_parse_failed
    rate_limit_exceeded invalid_request_error tokens requests permission_denied not_found
    too_many_requests provider_error image_too_big made_up_code quota_reset upstream_pool
    precondition_failed model modelling unmapped insufficient_funds invalid_json
"""

MESSAGES = [
    # Words that the lists of then had, in sentences.
    *["Request too large for m: please shorten it", "Nobody fits your data policy (m)"],
    *["Your data-policy leaves nobody", "Blocked by a guardrail restriction of yours"],
    *["Please reduce the length of the messages", "The input is too long for m"],
    *["The maximum of m is a context of 8192 tokens", "9000 tokens exceed the context of m"],
    *["The context length of m was exceeded", "The context window would be exceeded"],
    *["Too many: free-models-per-day", "No access. Check your network settings."],
    *["Insufficient quota", "Insufficient credits: add some", "Insufficient balance for m"],
    *["Insufficient funds", "You exceeded your current quota", "An invoice is overdue"],
    *["Key limit exceeded (monthly)", "Your credit balance is too low", "Blocked API access"],
    *["a/b is not a valid model ID", "No endpoints found for a/b"],
    *["The model m does not exist", "Model m not found", "The model m could not be found"],
    *["The models m and n are no longer served", "Model m was retired", "Model m is archived"],
    *["The model m has been decommissioned", "Model m: deprecated", "model m is discontinued"],
    *["The model m is unavailable for free", "For the model m the parameter x is deprecated"],
    *["The tool of this model was not found", "A field of the model m is deprecated"],
    # An account and what happened to it, in both orders.
    *["Your account was suspended", "We suspended your account", "The organization is restricted"],
    *["Restricted is this organisation", "This API key was disabled", "We disabled the API key"],
    *["The key was deactivated", "The payment method was flagged", "Flagged: the card of yours"],
    *["IP 192.0.2.7 was banned", "Banned is the IP, for now", "This address is blocked"],
    *["The token was terminated", "Terminated workspace", "The workspace violates our terms"],
    *["The organization was blocked for a minute: too many requests"],
    # What was asked.
    *["The prompt was flagged as hateful", "Flagged: the prompt", "Your input was blocked by us"],
    *["This content violates our rules", "The text violates the content rules"],
    *["Such a question is not allowed by our rules", "The query was flagged"],
    *["Stopped by the content management policy", "Against our content policy"],
    *["The content safety policy was triggered", "The safety system rejected it"],
    *["A content filter stopped it", "Request blocked: an injection", "Refused by moderation"],
    *["Our content usage policy prohibits it", "Filtered due to the safety policy"],
    *["The content filter is out of order", "The moderation is down", "See our content policy"],
    *["Your prompt is flagged, and your account", "The message of the model was flagged"],
    # Words that a 403 was looked at for.
    *["The key has no rights", "All credit is spent", "Look at your billing page"],
    *["A payment is missing", "The balance is empty", "No credentials were found"],
    *["Your account waits", "Your organization waits", "No subscription covers m"],
    *["Please authenticate", "The account has no access to the model m"],
    *["The model m is not enabled for the project", "A violation of the terms of service"],
    *["Our usage policy forbids it", "That is prohibited", "The models here are for partners"],
    *["Access to this model violates the terms of service", "The model key is unknown"],
    # Words of limits, and waits.
    *["Rate limit reached for m", "Too many requests", "rate-limited upstream", "Slow down"],
    *["9 requests per day", "The daily limit is reached", "Tokens per minute", "Limit per hour"],
    *["Please try again in 7s", "Please try again in 1m26.4s", "Retry after 40 seconds"],
    *["Wait for 3 minutes", "It resets in 2 hours", "Limit per day. Try again in 9 minutes"],
    *["Limit of 9 tokens per day. Upgrade in your billing settings to get more credits."],
    # Words of a 404, and of anything else; words never seen.
    *["Not Found", "m:free has become a paid model", "A guardrail of yours leaves nobody"],
    *["None of the allowed providers is left", "Nobody knows the parameter x", "privacy first"],
    *["Something broke", "Internal error", "Try later", "The server is overloaded", "Bad input"],
    *["max_tokens must be below 16384", "'messages' is missing", "JSON could not be read"],
    *["The engine m is asleep", "Kein Modell gefunden", "The weather is bad", "model", "m"],
    *["Upstream request failed", "Bad gateway", "No healthy upstream", "temporarily unavailable"],
]

SHAPES = [
    *["flat", "nested", "listed", "text of a field", "detail", "details", "zod", "text"],
    *["page", "relayed text", "relayed JSON", "relayed without words", "available", "inside"],
]


class Error(NamedTuple):
    """An error as a server sends it."""

    status: int
    body: Any
    headers: Mapping[str, str] = {}


def shaped(shape: str, status: int, code: str, message: str) -> Any:
    """The body of an error in one of the shapes."""
    said: Dict[str, Any] = {"message": message, "code": code}
    relay: Dict[str, Any] = {"code": status, "message": "Provider returned error"}
    bodies: Dict[str, Any] = {
        "flat": {**said, "type": code, "param": None},
        "nested": {"error": said},
        "listed": [{"error": said}],
        "text of a field": {"error": message, "code": code},
        "detail": {"detail": message, "type": code},
        "details": {"detail": [{"msg": message}], "error_type": code},
        "zod": {"success": False, "error": {"name": "ZodError", **said}},
        "text": message,
        "page": f"<html><head><title>{message}</title></head><body>{code}</body></html>",
        "relayed text": {"error": {**relay, "metadata": {"raw": message}}},
        "relayed JSON": {"error": {**relay, "metadata": {"raw": json.dumps({"error": said})}}},
        "relayed without words": {"error": {**relay, "metadata": {"raw": "", "error_type": code}}},
        "available": {"error": {"message": message, "availability": {"code": code}}},
        "inside": {"error": said, "status_code": status},
    }
    return bodies[shape]


HEADERS: Mapping[str, Mapping[str, str]] = {
    "no header": {},
    "Retry-After": {"retry-after": "7"},
    "Retry-After as a date": {"retry-after": "Fri, 15 Jan 2027 08:00:44 GMT"},
    "Retry-After of nothing": {"retry-after": "0"},
    "Retry-After as junk": {"retry-after": "soon"},
    "Retry-After of years": {"retry-after": "99999999"},
    "retry-after-ms": {"retry-after-ms": "1500", "retry-after": "2"},
    "should not retry": {"x-should-retry": "false"},
    "should not retry, but wait": {"x-should-retry": "false", "retry-after": "7"},
    "reset": {"x-ratelimit-reset": "1800000009"},
    "reset in milliseconds": {"x-ratelimit-reset": "1800000009000"},
    "reset that is past": {"x-ratelimit-reset": "1799999999"},
}


ODD_BODIES: Dict[str, Any] = {
    "no body": "",
    "an empty object": {},
    "an empty list": [],
    "an empty error": {"error": {"code": "", "message": ""}},
    "a number": 7,
    "null": None,
    "a moderation": {"error": {"code": 403, "metadata": {"reasons": ["hate"]}}},
    "a moderation without reasons": {"error": {"code": 403, "metadata": {"reasons": []}}},
    "patterns of a guardrail": {"error": {"message": "No", "metadata": {"patterns": ["x"]}}},
    "a routing step": {"error": {"metadata": {"failed_routing_step": "Data policy"}}},
    "another routing step": {"error": {"metadata": {"failed_routing_step": "capacity"}}},
    "a source of a limit": {"error": {"metadata": {"limit_source": "openrouter_key_limit"}}},
    "the account's own pool": {"error": {"metadata": {"limit_source": "made_up_pool"}}},
    "a code in an odd place": {"code": "server_error", "error": {"code": "model_archived"}},
    "a list of errors": {"errors": [{"message": "Slow."}, {"code": "model_not_found"}]},
    "only a type": {"error": {"error_type": "provider_overloaded"}},
    "waits in fields": {"error": {"retry_after": 5, "metadata": {"retry_after_seconds": 4}}},
    "waits in echoed headers": {"error": {"metadata": {"headers": {"Retry-After": "6"}}}},
    "a reset in echoed headers": {
        "error": {"metadata": {"headers": {"X-RateLimit-Reset": "1800000008000"}}}
    },
}


def errors() -> Dict[str, Dict[str, Error]]:
    """The errors, by group and name; the same ones in each run."""
    found: Dict[str, Dict[str, Error]] = {}
    for code in CODES.split():
        found[f"code {code}"] = {
            **at_statuses(code, "Hm.", STATUSES),
            **in_shapes(code, "Hm.", [400, 429, 500]),
        }
    for message in MESSAGES:
        found[f"says {message}"] = {
            **at_statuses("", message, STATUSES),
            **in_shapes("", message, [403, 404, 429]),
        }
    for number, (code, message) in enumerate(itertools.product(CODES.split(), MESSAGES)):
        if number % 37 == 0:  # some of both together
            found[f"code {code} says {message}"] = at_statuses(code, message, TELLING_STATUSES)
    for name, headers in HEADERS.items():
        found[f"header: {name}"] = with_headers(headers)
    for name, body in ODD_BODIES.items():
        found[f"body: {name}"] = {str(status): Error(status, body) for status in STATUSES}
    return found


def at_statuses(code: str, message: str, statuses: Sequence[int]) -> Dict[str, Error]:
    """One error with each status, of which 200 stands for none."""
    return {str(status): Error(status, shaped("nested", 0, code, message)) for status in statuses}


def in_shapes(code: str, message: str, statuses: Sequence[int]) -> Dict[str, Error]:
    """One error in all shapes, with each of these statuses."""
    found = {}
    for shape, status in itertools.product(SHAPES, statuses):
        sent = 200 if shape == "inside" else status
        found[f"{status} {shape}"] = Error(sent, shaped(shape, status, code, message))
    return found


def with_headers(headers: Mapping[str, str]) -> Dict[str, Error]:
    """Errors with the same headers, some with words that tell of a wait too."""
    messages = ["Hm.", "Try again in 5s", "Insufficient credits", "Limit per day"]
    found = {}
    for message, status in itertools.product(messages, [200, 400, 402, 403, 408, 429, 503]):
        found[f"{status} {message}"] = Error(status, shaped("nested", 0, "", message), headers)
    return found


def letter_of(verdict: str, is_wide: bool) -> str:
    """A ruling as one letter."""
    letter = LETTERS[verdict]
    return letter.upper() if is_wide else letter


def wait_of(hint: Optional[float]) -> str:
    """The seconds that a server asks to wait, "" if it does not."""
    return "" if hint is None else f"{hint:.6g}"


def judged_before() -> Dict[str, Tuple[str, Dict[int, str]]]:
    """The rulings of then, by group: the letters, and the waits by place."""
    judged = {}
    for line in DATA.read_text(encoding="utf-8").splitlines():
        name, letters, *waits = line.split("\t")
        by_place = {}
        for wait in waits:
            seconds, _, places = wait.partition(": ")
            by_place.update({int(place): seconds for place in places.split()})
        judged[name] = (letters, by_place)
    return judged


def judge_with(path: str) -> Iterator[str]:
    """The lines of the data, as the program of then at this path judges."""
    spec = importlib.util.spec_from_file_location("program", path)
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    sys.modules["program"] = program
    spec.loader.exec_module(program)
    for name, group in errors().items():
        letters = ""
        waits: Dict[str, List[str]] = {}
        for place, error in enumerate(group.values()):
            failure = program.judge(error.status, error.headers, error.body, NOW)
            letters += letter_of(failure.verdict.value, failure.reaches_provider)
            if failure.hint is not None:
                waits.setdefault(wait_of(failure.hint), []).append(str(place))
        told = [f"{seconds}: {' '.join(places)}" for seconds, places in waits.items()]
        yield "\t".join([name, letters, *told])


if __name__ == "__main__":
    for line in judge_with(sys.argv[1]):
        print(line)
