#!/usr/bin/env python3
# /// script
# requires-python = ">=3.7"
# dependencies = ["requests", "python-dotenv"]
# ///
"""Ask a language model, and get an answer although providers fail.

    python fallback_llm.py "What is the capital of France?"

The walk goes over candidates, (provider, model) pairs in a line, until one gives a whole answer:

    cerebras m1 ─┬─ a whole answer ─────────────► done
                 ├─ 429, a short pause ─────────► wait, ask m1 again
                 ├─ 429, a long pause ────────┐
                 ├─ 5xx, silent, empty, cut … ┴─► m1 to the end of the line; ask the next
                 ├─ 400, 401, 404 … ────────────► m1 (401: all of cerebras) out; ask the next
                 └─ against the rules ──────────► stop, the question is refused
    cerebras m2, groq m1 … openrouter m4           nobody left: the question has failed

From top to bottom: vocabulary, errors, providers, decisions (pure), wire format (pure), memory,
HTTP, `FallbackLLM` with the walk, the command line. All times are seconds.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import enum
import json
import logging
import math
import os
import re
import sys
import threading
import time

TYPE_CHECKING = False  # typing itself is not imported: that takes a tenth of the start-up
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, Generator, Iterable, Iterator, List, Mapping, Tuple

    import requests

    Json = Dict[str, Any]
    Event = Tuple[bytes, bytes]  # type, data
    Ruling = Tuple["Verdict", bool]  # and whether it holds for the whole provider

__all__ = [
    "PROVIDERS",
    "AllProvidersFailed",
    "Answer",
    "AnswerRefused",
    "Attempt",
    "FallbackLLM",
    "FallbackLLMError",
    "NoProviderError",
    "Provider",
    "ProviderHealth",
    "ProviderStatus",
    "RetryConfig",
    "StreamInterrupted",
    "Verdict",
]
__version__ = "1.0.0"

CONNECT_TIMEOUT = 5.0
ERROR_BODY_TIME = 2.0  # what a server says about its failure is not worth a longer wait
GRACE = 1.0  # after a finish_reason: how long usage and [DONE] are waited for
MAX_ERROR_BODY = 64 * 1024
MAX_BODY = 32 * 1024 * 1024  # bytes; a longer reply is a fault
MAX_HINT = 32 * 86400.0  # a longer "come back in" is junk
POOL_WIDTH = 1000  # connections kept per host; the default of 10 makes more threads reconnect

logger = logging.getLogger("fallback_llm")
logger.addHandler(logging.NullHandler())


# --- 1. Vocabulary ------------------------------------------------------------------------------

NUMBERS = {  # name: type, lowest, highest, what is allowed in words
    "max_tokens": (int, 1, 1000000, "a whole number >= 1, at most 1000000"),
    "max_attempts": (int, 1, 1000, "a whole number >= 1, at most 1000"),
    "workers": (int, 1, 1000, "a whole number >= 1, at most 1000"),
    "base_delay": (float, 0, 1e9, "a finite number of seconds >= 0"),
    "max_delay": (float, 0, 1e9, "a finite number of seconds >= 0"),
    "exponential_base": (float, 1, 1e9, "a finite number >= 1"),
    "timeout": (float, 1e-6, 1e9, "a finite number of seconds > 0"),
    "silence": (float, 1e-6, 1e9, "a finite number of seconds > 0"),
    "temperature": (float, 0, 2, "a number from 0 to 2"),
}


def checked(name: str, value: Any) -> Any:
    """The value, when it is what `NUMBERS` allows for this name; else ValueError."""
    kind, lowest, highest, allowed = NUMBERS[name]
    is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
    if not is_number or not lowest <= value <= highest:  # nan is in no range
        raise ValueError(f"{name} must be {allowed}, not {value!r:.60}")
    return value


@dataclasses.dataclass
class RetryConfig:
    """How often a model is asked, and how many seconds are waited in between.

    After the n-th failure: min(max_delay, base_delay * exponential_base ** (n - 1)), at defaults
    2, 4, 8, 16; with jitter 80 to 100 % of that; never less than the server asks for. No single
    wait is longer than max_delay. eager: ask somebody else instead of waiting out a rate limit.
    ValueError, with the field's name, for what cannot be meant.
    """

    max_attempts: int = 5  # of one model in one question, the first included
    base_delay: float = 2.0
    max_delay: float = 60.0
    exponential_base: float = 2.0
    jitter: bool = True
    eager: bool = False

    def __post_init__(self) -> None:
        for name in ("max_attempts", "base_delay", "max_delay", "exponential_base"):
            checked(name, getattr(self, name))
        if self.max_delay < self.base_delay:
            below = f"not {self.max_delay!r} with {self.base_delay!r}"
            raise ValueError(f"max_delay must be >= base_delay, {below}")


class ProviderStatus(enum.Enum):
    HEALTHY = "healthy"
    RATE_LIMITED = "rate_limited"
    FAILED = "failed"
    UNAVAILABLE = "unavailable"  # no key, or it was refused


@dataclasses.dataclass
class ProviderHealth:
    """What is known of a provider. Times are epoch seconds, 0.0 is never."""

    status: ProviderStatus = ProviderStatus.HEALTHY
    last_success: float = 0.0
    last_failure: float = 0.0
    consecutive_failures: int = 0
    rate_limit_reset_time: float = 0.0


class Verdict(enum.Enum):
    """What a failure means: its word; is the candidate asked again in this question; for how many
    seconds do later questions ask it last (0: a growing backoff, None: they know nothing of it).
    """

    RATE_LIMITED = ("rate_limited", True, 0.0)
    FAULT = ("fault", True, 0.0)
    UNSUITABLE = ("unsuitable", False, None)  # this model cannot serve this request
    GONE = ("gone", False, 600.0)  # the provider says that the model is no more
    DENIED = ("denied", False, 600.0)  # key, credit or account; always the whole provider
    REFUSED = ("refused", False, None)  # the question itself: the walk stops

    def __init__(self, word: str, again: bool, asked_last: float | None) -> None:
        self.word, self.again, self.asked_last = word, again, asked_last


@dataclasses.dataclass(eq=False)
class Failure(Exception):
    """Why an attempt gave no answer. Raised where it is seen, caught in the walk, nowhere else."""

    verdict: Verdict
    reason: str
    wide: bool = False  # holds for all models of the provider
    hint: float | None = None  # seconds after which the server wants to be asked again
    blameless: bool = False  # the caller's own time limit: says nothing about the provider


@dataclasses.dataclass(frozen=True)
class Provider:
    """One row of `PROVIDERS`: an endpoint that speaks the chat completions API."""

    name: str
    base_url: str  # with the version's path; https, or http to this machine
    key_env: str | None  # the variable that holds the key; None: needs no key (a local server)
    models: tuple[str, ...]  # in the order they are asked
    silence: float = 60.0  # seconds without progress that end an attempt
    key_url: str = ""  # where to get a key
    key_path: str = "/models"  # GET of this tells whether a key is accepted
    free_only: bool = False  # models that are discovered must cost nothing
    defaults: Mapping[str, Json] = dataclasses.field(default_factory=dict, hash=False)
    # defaults: parameters for the models that have this word in their id

    def __post_init__(self) -> None:
        checked("silence", self.silence)
        if isinstance(self.models, str):
            raise ValueError(f"models must be several ids, not one string: {self.models!r}")
        object.__setattr__(self, "models", tuple(self.models))

    def variable(self, what: str) -> str:
        """The name of an environment variable of this provider, such as GROQ_MODELS."""
        return re.sub(r"\W", "_", self.name).upper() + "_" + what


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One HTTP exchange in the trail of a question."""

    provider: str
    model: str
    number: int  # of this model's attempts in this question, from 1
    status: int | None  # of HTTP; None if no reply came
    verdict: Verdict | None  # None: this is the answer
    reason: str
    waited: float  # seconds slept before it
    elapsed: float  # seconds it took


@dataclasses.dataclass(frozen=True)
class Answer:
    """A whole, non-empty answer, and how it came about."""

    text: str
    provider: str
    model: str
    finish_reason: str | None
    usage: Json
    attempts: tuple[Attempt, ...]  # the trail; the answer's own attempt is the last
    elapsed: float


@dataclasses.dataclass
class Turn:
    """A candidate's place in the line of one question."""

    row: Provider
    model: str
    label: str  # "1/2": its place among the provider's models
    attempts: int = 0
    ready_at: float = 0.0  # not asked before
    patience: float = 0.0  # how long the walk waits for it although others are ready


# --- 2. Errors ----------------------------------------------------------------------------------
#
# FallbackLLMError
#  ├─ NoProviderError      none of the chosen providers has a key; nothing was sent
#  ├─ AllProvidersFailed   nobody is left in the line, or the time is up
#  ├─ AnswerRefused        a provider refuses the question itself
#  └─ StreamInterrupted    a stream broke after its first text
# Mistakes of the caller are ValueError: nothing was sent.


class FallbackLLMError(Exception):
    """Base of this module's errors. attempts: the trail of the question."""

    attempts: tuple[Attempt, ...] = ()

    def __init__(self, message: str = "", **evidence: Any) -> None:
        super().__init__(message)
        self.__dict__.update(evidence)  # survives pickling


class NoProviderError(FallbackLLMError):
    """providers: the names of those that were chosen."""

    providers: tuple[str, ...] = ()


class AllProvidersFailed(FallbackLLMError):
    """retry_after: seconds until the first server wants to be asked again; None: not known."""

    retry_after: float | None = None


class AnswerRefused(FallbackLLMError):
    """reason: the provider's own."""

    reason: str = ""


class StreamInterrupted(FallbackLLMError):
    """partial: the text that came, from this provider and model."""

    partial: str = ""
    provider: str = ""
    model: str = ""


# --- 3. Providers -------------------------------------------------------------------------------
# Ids as of October 2026; when all of a row are gone, the provider's list is asked for. gpt-oss
# thinks before it answers: without a low effort, a small max_tokens goes into thinking alone.

PROVIDERS = (
    Provider(
        name="cerebras",
        base_url="https://api.cerebras.ai/v1",
        key_env="CEREBRAS_API_KEY",
        models=("gpt-oss-120b", "qwen-3.8-27b"),
        silence=10.0,
        key_url="https://cloud.cerebras.ai",
        defaults={"gpt-oss": {"reasoning_effort": "low"}, "qwen-3.8": {"reasoning_effort": "none"}},
    ),
    Provider(
        name="groq",
        base_url="https://api.groq.com/openai/v1",
        key_env="GROQ_API_KEY",
        models=("openai/gpt-oss-120b", "openai/gpt-oss-20b", "qwen/qwen3.8-27b"),
        silence=10.0,
        key_url="https://console.groq.com/keys",
        defaults={"gpt-oss": {"reasoning_effort": "low"}},
    ),
    Provider(
        name="openrouter",
        base_url="https://openrouter.ai/api/v1",
        key_env="OPENROUTER_API_KEY",
        models=(
            "nvidia/nemotron-3-super-120b-a12b:free",
            "qwen/qwen3.8-27b:free",
            "google/gemma-4-31b-it:free",
            "openrouter/free",  # a router over all that is free
        ),
        silence=30.0,
        key_url="https://openrouter.ai/settings/keys",
        key_path="/key",  # its models list takes any key
        free_only=True,
    ),
)


# --- 4. Decisions: what a reply means, how long to wait, who is next. Pure ----------------------

# Verdict, whether it holds for the whole provider, pattern; the first row that fits decides.
# CODES must fit whole. rate_limit_exceeded, invalid_request_error, tokens and requests are not in
# it: they stand on passing and on permanent failures alike.
CODES = (
    (Verdict.GONE, False, r"model_(not_found|archived|decommissioned|deprecated)(_error)?"),
    (Verdict.GONE, False, r"no_endpoints|model_unavailable_upstream|free_variant_ended"),
    (Verdict.DENIED, True, r"(invalid|wrong)_api_key|payment_required(_error)?|insufficient_quota"),
    (Verdict.DENIED, True, r"organization_\w+|authentication(_error)?|permission_denied"),
    (Verdict.DENIED, True, r"openrouter_(credits|key_limit)|region_restricted|account_\w+"),
    (Verdict.REFUSED, False, r"content_(policy_violation|filter)|refusal|\w*moderation\w*"),
    (Verdict.RATE_LIMITED, True, r"\w*in_flight_budget\w*|openrouter_free_tier\w*"),
    (Verdict.RATE_LIMITED, False, r"(token|request)_quota_exceeded|capacity_exhausted"),
    (Verdict.FAULT, False, r"queue_exceeded|json_validate_failed|tool_use_failed|timeout"),
    (
        Verdict.FAULT,
        False,
        r"(internal_)?server_error|server|(provider_|engine_)?overloaded(_error)?",
    ),
    (Verdict.FAULT, False, r"(provider_|temporarily_|service_)unavailable"),
    (Verdict.UNSUITABLE, False, r"context_length_exceeded|(max_tokens|token_limit)_exceeded"),
    (Verdict.UNSUITABLE, False, r"string_too_long|(payload|request)_too_large|wrong_\w+"),
    (Verdict.UNSUITABLE, False, r"(privacy_)restricted|constraint_filtered|unsupported_\w+"),
)
# WORDS are searched in the message: narrow ones, and what is permanent before what passes.
WORDS = (
    (Verdict.UNSUITABLE, False, r"request too large|\bdata policy\b|reduce the length of"),
    (
        Verdict.UNSUITABLE,
        False,
        r"(maximum|exceeds?).{0,40} context|context (length|window).*exceed",
    ),
    (Verdict.RATE_LIMITED, True, r"\bfree-models-per-"),
    (Verdict.FAULT, True, r"check your network settings"),
    (
        Verdict.DENIED,
        True,
        r"insufficient (quota|credit|balance|funds)|exceeded your current quota",
    ),
    (Verdict.DENIED, True, r"\boverdue\b|\bkey limit exceeded"),
    (Verdict.GONE, False, r"is not a valid model id|no endpoints found for"),
    (Verdict.GONE, False, r"\bmodels?\b.{0,120}\b(does not exist|not found|no longer|retired)"),
    (Verdict.GONE, False, r"\bmodels?\b.{0,120}\b(archived|decommissioned|deprecated)\b"),
    (Verdict.REFUSED, False, r"content (management|safety) policy|request blocked: |moderation"),
)
STATUSES = {
    429: Verdict.RATE_LIMITED,
    401: Verdict.DENIED,
    402: Verdict.DENIED,
    403: Verdict.DENIED,
}
PASSING = (408, 409, 424, 425, 498, 499)  # and 5xx


def judge(status: int, headers: Mapping[str, str], body: Any, now: float) -> Failure:
    """What a reply that is no answer means: codes first, then words, then the status.

    status: of HTTP; below 300 for an error inside a reply. headers: names in lower case. body:
    parsed JSON or text. now: epoch seconds. Codes and shapes: recorded replies and documents of
    the three providers, 2025 to October 2026.
    """
    error = Evidence(body)
    code = status if status >= 300 else error.status
    verdict, wide = error.ruling() or by_status(code, error.said)
    if error.upstream is not None:  # a router's supplier: its word counts for the model alone
        passed_on = error.upstream.ruling() or (verdict, wide)
        if passed_on[0] in (Verdict.UNSUITABLE, Verdict.GONE, Verdict.REFUSED):
            verdict = passed_on[0]
        wide = False
        if verdict is Verdict.DENIED:
            verdict = Verdict.FAULT
    if verdict is Verdict.RATE_LIMITED and headers.get("x-should-retry") == "false":
        verdict = Verdict.FAULT
    hint = hint_in(headers, error, now) if verdict.again else None
    long = r"(?i)\bper[ -](hour|day|week|month)|\b(hourly|daily|monthly)\b"
    if hint is None and verdict is Verdict.RATE_LIMITED and re.search(long, error.message):
        hint = 3600.0
    return Failure(verdict, told(status, code, error), wide, hint)


def by_status(status: int | None, said: str) -> Ruling:
    """The ruling on a failure that only its status tells of (None: an error that has none)."""
    if status is None and re.search(r"(?i)\brate.?limit|too.many.requests", said):
        return Verdict.RATE_LIMITED, False
    if status is None or status < 300 or status >= 500 or status in PASSING:
        return Verdict.FAULT, False
    if status < 400:
        return Verdict.FAULT, True  # a redirect: not followed
    verdict = STATUSES.get(status, Verdict.UNSUITABLE)
    return verdict, verdict is Verdict.DENIED


def told(status: int, code: int | None, error: Evidence) -> str:
    """The line that tells of a failure, in requests' words and the provider's."""
    from http.client import responses

    if status < 300:
        return f"error {code} inside the reply: {error.said}" if code else f"error: {error.said}"
    kind = "Server" if status >= 500 else "Client" if status >= 400 else "Redirect"
    line = f"{status} {kind} Error: {responses.get(status, 'Unknown')}"
    return f"{line}: {error.said}" if error.said else line


class Evidence:
    """What an error says, whatever its shape: flat, nested, in a list, plain text, nothing."""

    def __init__(self, body: Any) -> None:
        whole = dig(body, 0) if isinstance(body, list) else body
        error = dig(whole, "error") or dig(whole, "errors", 0) or whole
        error = dig(error, 0) if isinstance(error, list) else error
        message = error if isinstance(error, str) else dig(error, "message") or dig(error, "detail")
        self.metadata, self.availability = dig(error, "metadata"), dig(error, "availability")
        self.message = message if isinstance(message, str) else json.dumps(message or "").strip('"')
        codes = [dig(self.metadata, "limit_source"), dig(self.availability, "code")]
        codes += [dig(error, "code"), dig(error, "error_type"), dig(self.metadata, "error_type")]
        self.codes = [code for code in [*codes, dig(error, "type")] if isinstance(code, str)]
        if any(dig(self.metadata, name) for name in ("reasons", "flagged_input", "patterns")):
            self.codes.append("moderation")
        inner = [dig(error, "status_code"), dig(whole, "status_code"), dig(error, "code")]
        statuses = [number(value) for value in [*inner, dig(error, "http_status")]]
        self.status = next((int(s) for s in statuses if s is not None and 400 <= s <= 599), None)
        self.upstream: Evidence | None = None
        if self.message == "Provider returned error":
            self.upstream = Evidence(parsed(dig(self.metadata, "raw") or ""))

    def ruling(self) -> Ruling | None:
        """The first code, else the first words, that are known."""
        for code in self.codes:
            for verdict, wide, pattern in CODES:
                if re.fullmatch(pattern, code, re.IGNORECASE):
                    return verdict, wide
        for verdict, wide, pattern in WORDS:
            if re.search(pattern, self.message, re.IGNORECASE):
                return verdict, wide
        return None

    @property
    def said(self) -> str:
        """The error's own words, of a web page the title."""
        if re.match(r"(?i)\s*<(!doctype|html|head)", self.message):
            title = re.search(r"(?is)<title[^>]*>(.*?)</title>", self.message)
            return "HTML page: " + (title.group(1).strip() if title else "without a title")
        upstream = ": " + self.upstream.said if self.upstream and self.upstream.said else ""
        return (self.message or " ".join(self.codes)) + upstream


def dig(value: Any, *path: str | int) -> Any:
    """What lies at the path inside parsed JSON; None where there is nothing."""
    for step in path:
        try:
            value = value[step]
        except (TypeError, KeyError, IndexError):
            return None
    return value


def number(value: Any) -> float | None:
    """The value as a finite number; None for anything else."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def parsed(body: str | bytes) -> Any:
    """The body as JSON, else as text; never an error."""
    text = body if isinstance(body, str) else body.decode("utf-8", "replace")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def hint_in(headers: Mapping[str, str], error: Evidence, now: float) -> float | None:
    """Seconds after which the server wants to be asked again: the first hint that is valid."""
    hints = _hints(headers, error, now)
    return next((hint for hint in hints if hint is not None and 0 <= hint <= MAX_HINT), None)


def _hints(headers: Mapping[str, str], error: Evidence, now: float) -> Iterator[float | None]:
    milliseconds = number(headers.get("retry-after-ms"))
    yield None if milliseconds is None else milliseconds / 1000
    yield retry_after(headers.get("retry-after"), headers.get("date"), now)
    yield number(dig(error.metadata, "retry_after_seconds"))
    yield number(dig(error.availability, "retry_after"))
    echo = dig(error.metadata, "headers")
    echo = {name.lower(): echo[name] for name in echo} if isinstance(echo, dict) else {}
    yield retry_after(echo.get("retry-after"), headers.get("date"), now)
    yield duration(error.message)
    for reset in (echo.get("x-ratelimit-reset"), headers.get("x-ratelimit-reset")):
        instant = number(reset)
        if instant is not None:
            yield (instant / 1000 if instant > 1e11 else instant) - now


def retry_after(value: Any, date: str | None, now: float) -> float | None:
    """Seconds in a Retry-After: a number, or a date, which counts from the reply's own Date."""
    seconds = number(value)
    if seconds is not None or not isinstance(value, str):
        return seconds
    from email.utils import mktime_tz, parsedate_tz

    try:
        then, sent = parsedate_tz(value), parsedate_tz(date or "")
        return then and mktime_tz(then) - (mktime_tz(sent) if sent else now)
    except (TypeError, ValueError, OverflowError, IndexError):
        return None


UNITS = {"ms": 0.001, "milli": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
PART = r"(\d+(?:\.\d+)?) ?(ms|milli|[smhd]|(?![a-z]))[a-z]*"


def duration(message: str) -> float | None:
    """Seconds in "try again in 1m26.4s", "in 850ms", "retry after 40 seconds"."""
    told = re.search(rf"(?i)\b(?:again|retry) (?:in|after) ((?:{PART},? ?(?:and )?)+)", message)
    parts = re.findall("(?i)" + PART, told.group(1)) if told else []
    return sum(float(count) * UNITS[unit.lower()] for count, unit in parts) if parts else None


def backoff(config: RetryConfig, failures: int) -> float:
    """Seconds to wait after this many failures, jitter left out."""
    try:
        return min(config.max_delay, config.base_delay * config.exponential_base ** (failures - 1))
    except OverflowError:
        return config.max_delay


def next_turn(line: list[Turn], now: float, limit: float) -> tuple[Turn, float] | None:
    """Who is asked next, and the wait before: the first in line whose wait is within its patience,
    else the one that is ready soonest. None if no wait is within the limit.
    """
    waits = [(max(0.0, turn.ready_at - now), turn) for turn in line]
    for wait, turn in waits:
        if wait <= min(turn.patience, limit):
            return turn, wait
    soonest, turn = min(waits, key=lambda pair: pair[0]) if waits else (math.inf, None)
    return (turn, soonest) if turn and soonest <= limit else None


def line_after(
    line: list[Turn], asked: Turn, failure: Failure, config: RetryConfig, now: float, chance: float
) -> list[Turn]:
    """The line after a failure: whom it reaches is out, or stays in its place when the wait is
    within its patience, or goes to the end. chance: 0 to 1, for the jitter.
    """
    stay, last = [], []
    for turn in line:
        if turn is not asked and not (failure.wide and turn.row.name == asked.row.name):
            stay.append(turn)
            continue
        attempts = turn.attempts + 1
        if not failure.verdict.again or attempts >= config.max_attempts:
            continue
        wait = backoff(config, attempts) * (0.8 + 0.2 * chance if config.jitter else 1.0)
        wait = max(wait, failure.hint or 0.0)
        patience = 0.0
        if failure.verdict is Verdict.RATE_LIMITED and not config.eager:
            patience = sum(backoff(config, n) for n in range(attempts, config.max_attempts))
        place, patience = (stay, patience) if wait <= patience else (last, 0.0)
        turn = dataclasses.replace(turn, attempts=attempts, ready_at=now + wait, patience=patience)
        place.append(turn)
    return stay + last


# --- 5. Wire format: requests, answers in one piece, event streams. Pure ------------------------


class Question:
    """A question that was checked: what to send, whom to ask, and how long it may take."""

    def __init__(self, fields: Json, line: list[Turn], model: str | None, timeout: float | None):
        self.fields, self.line, self.model, self.timeout = fields, line, model, timeout
        try:
            self._json = json.dumps(fields, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"the question cannot be sent as JSON: {error}") from None

    def body(self, turn: Turn) -> bytes:
        """The request for this candidate, with the defaults of its row."""
        head = {"model": turn.model}
        for word, parameters in turn.row.defaults.items():
            if word in turn.model:
                head.update((k, v) for k, v in parameters.items() if k not in self.fields)
        text = json.dumps(head, ensure_ascii=False)[:-1] + ", " + self._json[1:]
        try:
            return text.encode()
        except UnicodeEncodeError:  # a lone surrogate, which Cerebras refuses (2026-09)
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def conversation(question: Any, system: Any, messages: Any) -> list[Json]:
    """The messages to send: system, those so far, the question. ValueError if there is nothing."""
    for name, text in (("question", question), ("system", system)):
        if text is not None and not isinstance(text, str):
            raise ValueError(f"the {name} must be text, not {text!r:.60}")
    said = list(messages) if isinstance(messages, (list, tuple)) else []
    if messages is not None and not (said and all(isinstance(dig(m, "role"), str) for m in said)):
        raise ValueError(f"messages must be a list of dicts with a role, not {messages!r:.60}")
    if (question is not None or not said) and is_blank(question or ""):
        raise ValueError("the question is empty")
    said = [{"role": "system", "content": system}, *said] if system else said
    return said if question is None else [*said, {"role": "user", "content": question}]


def is_blank(text: str) -> bool:
    """Whether nothing of it can be seen: white space, zero-width and control characters."""
    return not any(char.isprintable() and not char.isspace() for char in text)


class EventReader:
    """Cuts bytes into events as the standard of server-sent events says, or keeps them as one
    plain body. Which of the two it is, the first line that is not a comment tells.
    """

    def __init__(self) -> None:
        self.plain: bool | None = None  # None: not known yet
        self._body: list[bytes] = []  # the plain body
        self._partial: list[bytes] = []  # a line whose end has not come
        self._after_cr = False  # a line feed now is the second half of a line end
        self._is_first = True  # a byte order mark may come
        self._kind, self._data = b"", []  # type: bytes, list[bytes]

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that these bytes complete."""
        if self.plain:
            self._body.append(chunk)
            return []
        if self._after_cr and chunk[:1] == b"\n":
            chunk = chunk[1:]
        if not chunk:
            return []
        self._after_cr = chunk[-1:] == b"\r"
        lines = chunk.splitlines()
        rest = [] if chunk[-1] in b"\r\n" else [lines.pop()]
        if not lines:
            self._partial += rest
            return []
        lines[0] = b"".join([*self._partial, lines[0]])
        self._partial = rest
        return self._events(lines)

    def end(self) -> list[Event]:
        """What is complete now that no more bytes will come."""
        line, self._partial = b"".join(self._partial), []
        events = [] if self.plain else self._events([line, b""])
        return [(b"", b"".join(self._body))] if self.plain else events

    def _events(self, lines: list[bytes]) -> list[Event]:
        if self._is_first and lines[0].startswith(codecs.BOM_UTF8):
            lines[0] = lines[0][3:]
        self._is_first = False
        events = []
        for place, line in enumerate(lines):
            if line[:5] == b"data:":
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
                self.plain = False
            elif not line:
                if any(self._data):
                    events.append((self._kind, b"\n".join(self._data)))
                self._kind, self._data = b"", []
            elif line[:6] == b"event:":
                self._kind, self.plain = line[6:].strip(), False
            elif self.plain is None and not re.match(rb"\s*$|:|(data|event|id|retry)(:|$)", line):
                self.plain = True
                self._body = [b"\n".join([*lines[place:], *self._partial])]
                break
        return events


class Reading:
    """What a reply has said so far, as events or as one whole body."""

    def __init__(self, now: float) -> None:
        self.status: int | None = None
        self.headers: Mapping[str, str] = {}  # names in lower case
        self.parts: list[str] = []
        self.finish_reason = ""
        self.usage: Json = {}
        self.ended = False  # [DONE] was said
        self.broken = ""  # what could not be read
        self.refusal = ""
        self.thought = False
        self._opening: str | None = ""  # text held back: it is, or may become, <think>
        self._now = now

    def begin(self, reply: Any) -> None:
        self.status = reply.status_code
        self.headers = {name.lower(): value for name, value in reply.headers.items()}

    def judge(self, body: Any) -> Failure:
        return judge(self.status or 0, self.headers, body, self._now)

    def texts(self, events: Iterable[Event]) -> Iterator[str]:
        """The text that events, or a whole body, add; what comes after [DONE] adds none."""
        for kind, data in events:
            text = "" if self.ended else self.take(kind, data)
            if text:
                yield text

    def take(self, kind: bytes, data: bytes) -> str:
        """The text of one event. Raises the Failure that it tells of."""
        if data.strip() == b"[DONE]":
            self.ended = True
            return ""
        try:
            said = parsed(data.decode())
        except UnicodeDecodeError:
            raise Failure(Verdict.FAULT, "the answer is not UTF-8") from None
        choice = dig(said, "choices", 0) or {}
        reason = dig(choice, "finish_reason")
        error = dig(said, "error") or dig(choice, "error") or dig(said, "x_groq", "error")
        if error or kind == b"error" or reason == "error":
            error = error or (said if kind == b"error" else dig(choice, "native_finish_reason"))
            raise self.judge({"error": error, "status_code": dig(said, "status_code")})
        if not isinstance(said, dict):
            self.broken = self.broken or "no answer in the reply: " + Evidence(said).said
            return ""
        if isinstance(reason, str):
            self.finish_reason = reason or self.finish_reason
        usage = said.get("usage") or dig(said, "x_groq", "usage")
        self.usage = figures(usage) if isinstance(usage, dict) else self.usage
        return self._said(dig(choice, "delta") or dig(choice, "message"))

    def _said(self, message: Any) -> str:
        """The text in a message or delta; thinking and refusals are noted."""
        text, refusal = dig(message, "content"), dig(message, "refusal")
        if isinstance(text, list):
            text = "".join(part for part in (dig(part, "text") for part in text) if part)
        if isinstance(refusal, str):
            self.refusal += refusal
        if not isinstance(text, str) or not text:
            thinking = dig(message, "reasoning") or dig(message, "reasoning_content")
            self.thought = self.thought or bool(thinking)
            return ""
        if self._opening is not None:
            text = self._past_thinking(self._opening + text)
        if text:
            self.parts.append(text)
        return text

    def _past_thinking(self, held: str) -> str:
        """The text after <think>…</think>; "" as long as it may still begin with that."""
        before, bare = "", held.lstrip()
        while bare.startswith("<think>"):
            self.thought = True
            inside, closed, rest = bare[7:].partition("</think>")
            if not closed:
                self._opening = "<think>" + inside[-7:]  # the tag may end in the next piece
                return ""
            before, bare = "<think></think>", rest.lstrip()
            held = bare
        if "<think>".startswith(bare):
            self._opening = before + held
            return ""
        self._opening = None
        return held

    def rest(self, plain: bool) -> str:
        """Text that was still held back when the reply ended. A plain body is an end in itself."""
        self.ended = self.ended or plain
        held, self._opening = self._opening or "", None
        if is_blank(held) or held.startswith("<think>"):
            return ""
        self.parts.append(held)
        return held

    def failure(self, live: bool) -> Failure | None:
        """Why this is no whole answer; None if it is one. Live, what was broken is left out."""
        if self.finish_reason == "content_filter" or (self.refusal and not self.parts):
            reason = self.refusal or "the answer was stopped by a content filter"
            return Failure(Verdict.REFUSED, reason)
        if self.broken and not (live and self.parts):
            return Failure(Verdict.FAULT, self.broken)
        if not self.ended and not self.finish_reason:
            cut = "the answer was cut: it has no end" if self.parts else "the reply holds no answer"
            return Failure(Verdict.FAULT, cut)
        if not is_blank("".join(self.parts)):
            return None
        if self.finish_reason == "length":
            reason = "max_tokens was used up before the answer began: raise max_tokens"
            return Failure(Verdict.UNSUITABLE, reason)
        return Failure(
            Verdict.FAULT, "only reasoning came" if self.thought else "the answer is empty"
        )


def figures(usage: Json) -> Json:
    """The numbers of a usage report, nested ones too; texts in it are left out."""
    kept = {name: value for name, value in usage.items() if isinstance(value, (int, float, dict))}
    return {k: figures(v) if isinstance(v, dict) else v for k, v in kept.items()}


SECRETS = r"(?i)\b(csk-|gsk_|sk-)[\w-]{8,}|(?<=bearer )[\w.~+/=-]{8,}|(?<=://)[^/@\s]+(?=@)"


def one_line(text: str, keys: Iterable[str | None] = (), limit: int = 300) -> str:
    """A server's text as one line that is safe to show: no control characters, keys or ids."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    for key in keys:
        if key and len(key) >= 4:
            line = re.sub(re.escape(key), "[key]", line, flags=re.IGNORECASE)
    line = re.sub(SECRETS, "[key]", line)
    line = re.sub(r"\b(org|user)_\w+", r"\1_[id]", line)
    return line if len(line) <= limit else line[: limit - 1] + "…"


# --- 6. Memory: what outlives a question --------------------------------------------------------


@dataclasses.dataclass
class Mark:
    """Failures of a provider, or of one of its models, since its last success."""

    verdict: Verdict
    failures: int = 0
    failed_at: float = -math.inf
    ready_at: float = 0.0  # the server's word: nobody asks before
    later_until: float = 0.0  # our own guess: asked last until then
    probed_until: float = 0.0  # the lease of somebody who is trying
    reset: float = 0.0  # epoch; when it may be healthy again


class Memory:
    """Marks by (provider, model); the model "" stands for all of a provider's. Not locked."""

    def __init__(self) -> None:
        self._marks: dict[tuple[str, str], Mark] = {}
        self._seen: dict[str, ProviderHealth] = {}  # the facts; the status is derived

    def of(self, turn: Turn) -> list[Mark]:
        keys = ((turn.row.name, ""), (turn.row.name, turn.model))
        return [self._marks[key] for key in keys if key in self._marks]

    def arrange(self, line: list[Turn], now: float) -> list[Turn]:
        """The line with the servers' pauses in it; of the untried, those on trial are last."""
        if not self._marks:
            return line
        first, last = [], []
        for turn in line:
            marks = self.of(turn)
            pause = max([turn.ready_at, *(mark.ready_at for mark in marks)])
            trial = any(now < max(mark.later_until, mark.probed_until) for mark in marks)
            place = last if trial and not turn.attempts else first
            place.append(dataclasses.replace(turn, ready_at=pause))
        return first + last

    def lease(self, turn: Turn, until: float) -> None:
        """Keeps others away, until then, from a candidate that failed and is tried again."""
        for mark in self.of(turn):
            mark.probed_until = until

    def succeeded(self, turn: Turn, since: float, epoch: float) -> None:
        """Forgives what failed before `since`, when the attempt began."""
        seen = self._seen.setdefault(turn.row.name, ProviderHealth())
        seen.last_success, seen.consecutive_failures = epoch, 0
        for model in ("", turn.model):
            mark = self._marks.get((turn.row.name, model))
            if mark is not None and mark.failed_at <= since:
                del self._marks[turn.row.name, model]

    def failed(
        self,
        turn: Turn,
        failure: Failure,
        config: RetryConfig,
        since: float,
        now: float,
        epoch: float,
    ) -> None:
        """Attempts that were under way together (`since`: their begin) count as one failure."""
        for mark in self.of(turn):
            mark.probed_until = 0.0
        pause = failure.verdict.asked_last
        if pause is None or failure.blameless:
            return
        key = (turn.row.name, "" if failure.wide else turn.model)
        mark = self._marks.setdefault(key, Mark(failure.verdict))
        seen = self._seen.setdefault(turn.row.name, ProviderHealth())
        if since >= mark.failed_at:
            mark.failures += 1
            seen.consecutive_failures += 1
        pause = pause or backoff(config, mark.failures)
        mark.verdict, mark.failed_at, mark.later_until = failure.verdict, now, now + pause
        if failure.hint is not None:
            mark.ready_at, pause = max(mark.ready_at, now + failure.hint), failure.hint
        seen.last_failure, mark.reset = epoch, epoch + pause

    def are_gone(self, provider: str, models: Iterable[str]) -> bool:
        marks = [self._marks.get((provider, model)) for model in models]
        return all(mark is not None and mark.verdict is Verdict.GONE for mark in marks)

    def pause(self, line: list[Turn], now: float) -> float | None:
        """Seconds until the first of them may be asked again, by the servers' word."""
        ends = [mark.ready_at for turn in line for mark in self.of(turn) if mark.ready_at > now]
        return min(ends) - now if ends else None

    def health(self, provider: str, has_key: bool, epoch: float) -> ProviderHealth:
        """What is known of the provider now, by its latest failure since its last success."""
        health = dataclasses.replace(self._seen.get(provider, ProviderHealth()))
        marks = [mark for (name, _), mark in self._marks.items() if name == provider]
        latest = max(marks, key=lambda mark: mark.failed_at, default=None)
        verdict = latest.verdict if latest and health.consecutive_failures else None
        if verdict is Verdict.RATE_LIMITED:
            health.rate_limit_reset_time = max(mark.reset for mark in marks)
            limited = epoch < health.rate_limit_reset_time
            health.status = ProviderStatus.RATE_LIMITED if limited else ProviderStatus.HEALTHY
        elif verdict is not None:
            health.status = ProviderStatus.FAILED
        if not has_key or verdict is Verdict.DENIED:
            health.status = ProviderStatus.UNAVAILABLE
        return health


# --- 7. HTTP ------------------------------------------------------------------------------------


class Limits:
    """How long an exchange may go on: to the question's deadline, and not through a silence."""

    def __init__(self, clock: Callable[[], float], silence: float, deadline: float) -> None:
        self._clock, self._silence, self.deadline = clock, silence, deadline
        self.finished = False  # the answer is whole; whatever breaks now does not matter
        self.progress()

    def progress(self) -> None:
        self._until = self._until if self.finished else self._clock() + self._silence

    def finish(self, grace: float) -> None:
        self._until, self.finished = self._clock() + grace, True

    def left(self) -> float:
        """Seconds that the next read may take. Raises a Failure when there are none, unless the
        answer is whole.
        """
        left = min(self._until, self.deadline) - self._clock()
        if left <= 0 and not self.finished:
            raise self.failure()
        return left

    def failure(self) -> Failure:
        if self._clock() >= self.deadline - 0.01:  # a socket may time out a little early
            return Failure(Verdict.FAULT, "the question's time limit is up", blameless=True)
        return Failure(Verdict.FAULT, f"silent for {self._silence:g} s", wide=True)


class Transport:
    """The one place that talks HTTP. One request is one exchange: nothing is sent again, no
    redirect is followed.
    """

    def __init__(self, session: requests.Session | None) -> None:
        self._session = session
        self._templates: dict[Any, Any] = {}
        self._lock = threading.Lock()

    def send(self, url: str, key: str | None, body: bytes | None, limits: Limits) -> Any:
        """The reply, a requests.Response whose body is unread. A body is posted, None is a GET.

        Through the session's adapters, not `Session.send`: that looks up proxies, netrc and cookies
        at every call (half the time of a warm one), and reads all of a redirect's body.
        """
        import requests
        from urllib3.exceptions import HTTPError

        template, settings, adapter = self._template(url, key, body is None)
        request = template.copy()
        if body is not None:
            request.body = body
            request.headers["Content-Length"] = str(len(body))
        left = limits.left()
        timeout = (min(CONNECT_TIMEOUT, left), left)
        try:
            return adapter.send(request, stream=True, timeout=timeout, **settings)
        except requests.ReadTimeout:
            raise limits.failure() from None
        except (OSError, HTTPError) as error:
            late = limits.failure()
            failure = Failure(Verdict.FAULT, str(error) or type(error).__name__, wide=True)
            raise (late if late.blameless else failure) from None

    def _template(self, url: str, key: str | None, is_get: bool) -> Any:
        """The request without its body, what the environment says of proxies and certificates, and
        the adapter: made once.
        """
        with self._lock:
            if (url, key, is_get) not in self._templates:
                self._templates[url, key, is_get] = self._new_template(url, key, is_get)
            return self._templates[url, key, is_get]

    def _new_template(self, url: str, key: str | None, is_get: bool) -> Any:
        import requests
        from requests.adapters import HTTPAdapter

        def bearer(request: requests.PreparedRequest) -> requests.PreparedRequest:
            if key:
                request.headers["Authorization"] = "Bearer " + key
            return request

        if self._session is None:
            self._session = requests.Session()
            for scheme in ("https://", "http://"):
                self._session.mount(scheme, HTTPAdapter(pool_maxsize=POOL_WIDTH, max_retries=0))
        headers = {
            "User-Agent": "fallback_llm/" + __version__,  # those of libraries get a 403 (2026-09)
            "Accept": "text/event-stream, application/json",
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
        }
        method = "GET" if is_get else "POST"
        # auth is a callable, because an entry in ~/.netrc would replace a header
        request = requests.Request(method, url, headers=headers, auth=bearer).prepare()
        settings = self._session.merge_environment_settings(url, {}, True, None, None)
        del settings["stream"]
        return request, settings, self._session.get_adapter(url)

    def chunks(self, reply: Any, limits: Limits, most: int = MAX_BODY) -> Iterator[bytes]:
        """The body as it comes, decompressed. Raises a Failure when it is cut, slow or endless."""
        import socket
        import zlib
        from http.client import HTTPException

        from urllib3.exceptions import HTTPError

        packed = reply.headers.get("content-encoding", "") in ("gzip", "x-gzip", "deflate")
        unpack = zlib.decompressobj(47) if packed else None  # 47: either of them
        size = 0
        try:
            for chunk in self._reads(reply, limits):
                data = unpack.decompress(chunk, most + 1) if unpack else chunk
                size += len(data)
                if size > most:
                    raise Failure(Verdict.FAULT, f"the reply is longer than {most} bytes")
                yield data
            if unpack and not unpack.eof:
                raise Failure(Verdict.FAULT, "the answer was cut: half of a compressed body")
        except socket.timeout:
            if not limits.finished:
                raise limits.failure() from None
        except (OSError, HTTPException, HTTPError, zlib.error) as error:
            if not limits.finished:
                reason = f"the connection broke: {error or type(error).__name__}"
                raise Failure(Verdict.FAULT, reason) from None

    @staticmethod
    def _reads(reply: Any, limits: Limits) -> Iterator[bytes]:
        """What each read of the socket gives. Below urllib3, whose reads wait for a full block and
        keep the time limit that they began with.
        """
        source = getattr(reply.raw, "_fp", None)
        if not hasattr(source, "read1"):  # not urllib3's: a server in a test
            for chunk in reply.iter_content(65536):
                limits.left()
                yield chunk
            return
        sock = getattr(getattr(getattr(source, "fp", None), "raw", None), "_sock", None)
        while True:
            left = limits.left()
            if left <= 0:
                return
            if sock is not None:
                sock.settimeout(left)
            chunk = source.read1(65536)
            if not chunk:
                break
            yield chunk
        if getattr(source, "length", None):
            raise Failure(Verdict.FAULT, "the answer was cut: shorter than its Content-Length")
        source.close()
        reply.raw.release_conn()

    def whole(self, reply: Any, limits: Limits, most: int = MAX_BODY) -> bytes:
        """The body, or as much of it as comes in time."""
        parts = []
        with contextlib.suppress(Failure):
            for chunk in self.chunks(reply, limits, most):
                parts.append(chunk)
        return b"".join(parts)


# --- 8. FallbackLLM -----------------------------------------------------------------------------

PLACEHOLDER = r"(?i)your[_-].*|.*[_-]here|<.*>|change.?me|x{3,}|\.{3,}|none|null|todo|replace.?me"


class Environment:
    """Keys, base URLs and model lists from the environment, ./.env and the .env beside this file.

    Of a .env only keys and model lists are taken, and nothing is written to os.environ.
    """

    def __init__(self) -> None:
        here = os.path.dirname(os.path.abspath(globals().get("__file__", ".env")))
        paths = dict.fromkeys(os.path.abspath(p) for p in (".env", os.path.join(here, ".env")))
        self.placeholders: set[str] = set()
        self._sources = [os.environ, *(_dotenv(path) for path in paths if os.path.isfile(path))]

    def value(self, name: str) -> str | None:
        """The first value that is one: not empty, not a placeholder."""
        for source in self._sources:
            value = clean(source.get(name))
            if value and not re.fullmatch(PLACEHOLDER, value):
                return value
            self.placeholders |= {name} if value else set()
        return None

    def models(self, row: Provider) -> list[str]:
        listed = (self.value(row.variable("MODELS")) or "").split(",")
        return [model.strip() for model in listed if model.strip()] or list(row.models)

    def base_url(self, row: Provider) -> str:
        """The URL to put paths behind. A URL without a path gets the one of the row."""
        url = (clean(os.environ.get(row.variable("BASE_URL"))) or row.base_url).rstrip("/")
        path = row.base_url.split("://", 1)[-1].partition("/")[2]
        return url if "/" in url.split("://", 1)[-1] or not path else f"{url}/{path}".rstrip("/")


def _dotenv(path: str) -> Mapping[str, str | None]:
    """The variables in a .env file; a file that cannot be read is told in one warning."""
    import io

    try:
        from dotenv import dotenv_values

        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        if "\0" in text:
            raise ValueError("NUL")
        return dotenv_values(stream=io.StringIO(text), interpolate=False)
    except ImportError:
        logger.warning("⚠️  %s is not read: pip install python-dotenv", path)
    except (OSError, ValueError):
        logger.warning("⚠️  %s cannot be read: save it as UTF-8", path)
    return {}


def clean(value: str | None) -> str:
    """A value without the quotes and white space that come along when it is pasted."""
    return (value or "").strip(" \t\r\n\"'")


def check_url(name: str, url: str) -> None:
    """ValueError unless it is https, or http to this machine."""
    host = re.match(r"(?i)(https?)://(\[[0-9a-f:.]+\]|[\w.-]+)(:\d{1,5})?(/[^\s?#]*)?$", url)
    local = host and re.match(r"(?i)(localhost|127(\.\d+){3}|\[::1\])$", host.group(2))
    if not host or (host.group(1).lower() == "http" and not local):
        shown = one_line(url)
        raise ValueError(f"{name} must be https://, or http:// to this machine, not {shown!r}")


def _random() -> float:
    import random

    return random.random()  # noqa: S311 - jitter is no secret


class FallbackLLM:
    """Asks candidates until one answers. Safe to share between threads; pickles.

    providers: rows as in `PROVIDERS`. api_keys: by provider; they win over the environment and
    .env files. timeout: limit of a whole question. silence: overrides every row's. clock,
    wall_clock, sleep, chance, session: for tests. ValueError for what cannot be meant; a missing
    key is no error here. fallback_order, api_keys and models may be changed at any time.
    """

    def __init__(
        self,
        retry_config: RetryConfig | None = None,
        *,
        providers: Iterable[Provider] = PROVIDERS,
        api_keys: Mapping[str, str | None] | None = None,
        timeout: float | None = None,
        silence: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        sleep: Callable[[float], object] = time.sleep,
        chance: Callable[[], float] = _random,
        session: requests.Session | None = None,
    ) -> None:
        self._settings = {k: v for k, v in locals().items() if k not in ("self", "session")}
        self._settings["providers"] = rows = tuple(providers)
        self.retry_config = RetryConfig() if retry_config is None else retry_config
        self.timeout = timeout if timeout is None else checked("timeout", timeout)
        self._silence = silence if silence is None else checked("silence", silence)
        self._clock, self._wall_clock, self._sleep, self._chance = clock, wall_clock, sleep, chance
        environment = Environment()
        self._rows = {row.name: row for row in rows}
        self.fallback_order = list(self._rows)
        self.models = {row.name: environment.models(row) for row in rows}
        self._urls = {row.name: environment.base_url(row) for row in rows}
        self._placeholders = environment.placeholders
        self._found = {row.name: row.key_env and environment.value(row.key_env) for row in rows}
        self.api_keys: dict[str, str | None] = {**self._found, **(api_keys or {})}
        for name in self.api_keys:
            self._row(name)
        self._transport = Transport(session)
        self._memory = Memory()
        self._discovered: set[str] = set()
        self._lock = threading.Lock()
        self.reset_stats()

    def __getstate__(self) -> Json:
        """The settings, and of the keys only those that were given to the object."""
        keys = {k: v for k, v in self.api_keys.items() if v != self._found.get(k)}
        keys = {**(self._settings["api_keys"] or {}), **keys}
        state = {
            "settings": {**self._settings, "api_keys": keys, "retry_config": self.retry_config}
        }
        return {**state, "fallback_order": self.fallback_order, "models": self.models}

    def __setstate__(self, state: Json) -> None:
        self.__init__(**state.pop("settings"))  # type: ignore[misc]
        self.__dict__.update(state)

    # Asking

    def ask(self, question: str, max_tokens: int = 500, provider: Any = None, **more: Any) -> str:
        """The text of the answer; "" when every model failed or the question was refused.

        Arguments and other errors as in `complete`.
        """
        try:
            return self.complete(question, max_tokens, provider, **more).text
        except (AllProvidersFailed, AnswerRefused) as error:
            logger.error("❌ %s", error)
            return ""

    def complete(
        self, question: str | None = None, max_tokens: int = 500, provider: Any = None, **more: Any
    ) -> Answer:
        """The answer and how it came about.

        provider: a name or several ("groq,openrouter" or a list), asked in this order. more: model
        ("[provider:]model"), system, messages (a conversation, continued by the question), timeout
        (seconds), temperature, and any other parameter of the chat completions API.
        ValueError and NoProviderError (nothing was sent), AllProvidersFailed, AnswerRefused.
        """
        walk = self._walk(self._question(question, max_tokens, provider, **more), live=False)
        try:
            while True:
                next(walk)
        except StopIteration as end:
            answer: Answer = end.value
            return answer

    def stream(
        self, question: str | None = None, max_tokens: int = 500, provider: Any = None, **more: Any
    ) -> Generator[str, None, Answer]:
        """The text, piece by piece as it comes. Arguments and errors as in `complete`.

        Before the first piece it falls over as `ask` does; a break after it is StreamInterrupted.
        Closing the iterator closes the connection.
        """
        return self._walk(self._question(question, max_tokens, provider, **more), live=True)

    def ask_many(
        self, questions: Iterable[Any], max_workers: int = 8, **more: Any
    ) -> Iterator[Answer | FallbackLLMError]:
        """For each question an Answer, or the error in its place; in their order, lazily.

        questions: strings, or dicts of `complete`'s arguments, read only as far as needed. more:
        arguments for all of them. ValueError where a question cannot be meant.
        """
        from collections import deque
        from concurrent.futures import ThreadPoolExecutor

        def one(question: Any) -> Answer | FallbackLLMError:
            asked = question if isinstance(question, dict) else {"question": question}
            try:
                return self.complete(**{**more, **asked})
            except FallbackLLMError as error:
                return error

        futures: Any = deque()
        with ThreadPoolExecutor(checked("workers", max_workers)) as pool:
            try:
                for question in questions:
                    futures.append(pool.submit(one, question))
                    if len(futures) > 4 * max_workers:  # a slow answer does not stop the others
                        yield futures.popleft().result()
                while futures:
                    yield futures.popleft().result()
            finally:
                for future in futures:
                    future.cancel()

    # The walk

    def _walk(self, question: Question, live: bool) -> Generator[str, None, Answer]:
        """Asks whoever is next until one answers; text comes out as it comes in, if live."""
        started, shown, answered = self._clock(), "", False
        deadline = math.inf if question.timeout is None else started + question.timeout
        line, last, trail = question.line, None, []  # type: list[Turn], Turn | None, list[Attempt]
        try:
            while True:
                line, turn, wait = self._choose(line, deadline)
                if turn is None:
                    raise self._all_failed(question, trail)
                tell_next(last, turn, wait)
                if wait:
                    self._sleep(wait)
                begun = self._clock()
                reading, failure = yield from self._attempt(turn, question, deadline, live)
                trail.append(attempt(turn, reading, failure, wait, self._clock() - begun))
                shown = "".join(reading.parts) if live or failure is None else ""
                self._remember(turn, failure, begun)
                if failure is None:
                    answered = True
                    return answer(turn, reading, shown, trail, self._clock() - started)
                stop_if_final(turn, failure, shown, trail)
                line = line_after(
                    line, turn, failure, self.retry_config, self._clock(), self._chance()
                )
                line += self._served_instead(turn, failure, question, deadline)
                last = turn
        except GeneratorExit:  # the caller has read enough
            answered = True
            raise
        finally:
            self._tally(trail, answered)

    def _choose(self, line: list[Turn], deadline: float) -> tuple[list[Turn], Turn | None, float]:
        """(the line as it is now, who is asked next, the wait before), by what all threads know."""
        with self._lock:
            now = self._clock()
            line = self._memory.arrange(line, now)
            limit = min(self.retry_config.max_delay, deadline - now)
            chosen = next_turn(line, now, limit) if now < deadline else None
            if chosen is None:
                return line, None, 0.0
            turn, wait = chosen
            self._memory.lease(turn, now + wait + self._silence_of(turn.row) + CONNECT_TIMEOUT)
            return line, turn, wait

    def _attempt(
        self, turn: Turn, question: Question, deadline: float, live: bool
    ) -> Generator[str, None, tuple[Reading, Failure | None]]:
        """One exchange: what was read, and why it is no answer (None: it is one)."""
        reading = Reading(self._wall_clock())
        limits = Limits(self._clock, self._silence_of(turn.row), deadline)
        try:
            yield from self._read(turn, question.body(turn), limits, reading, live)
            failure = reading.failure(live)
        except Failure as caught:
            failure = caught
        if failure is not None:
            failure.reason = one_line(failure.reason, self.api_keys.values())
        return reading, failure

    def _read(
        self, turn: Turn, body: bytes, limits: Limits, reading: Reading, live: bool
    ) -> Iterator[str]:
        """Sends the request and reads the reply; yields its text, if live."""
        reply, reader = self._send(turn.row, "/chat/completions", body, limits), EventReader()
        try:
            reading.begin(reply)
            if not 200 <= reply.status_code < 300:
                short = Limits(self._clock, ERROR_BODY_TIME, limits.deadline)
                raise reading.judge(parsed(self._transport.whole(reply, short, MAX_ERROR_BODY)))
            for chunk in self._transport.chunks(reply, limits):
                events = reader.feed(chunk)
                if events:
                    limits.progress()
                for text in reading.texts(events):
                    if live:
                        yield text
                        limits.progress()  # the time that the caller took is not the server's
                if reading.finish_reason or reading.ended:
                    limits.finish(0.1 if reading.ended else GRACE)
            texts = [*reading.texts(reader.end()), reading.rest(bool(reader.plain))]
            if live:
                yield from filter(None, texts)
        finally:
            reply.close()

    def _send(self, row: Provider, path: str, body: bytes | None, limits: Limits) -> Any:
        return self._transport.send(self._urls[row.name] + path, self._key(row), body, limits)

    def _silence_of(self, row: Provider) -> float:
        return row.silence if self._silence is None else self._silence

    def _remember(self, turn: Turn, failure: Failure | None, begun: float) -> None:
        """Puts the result into the memory, and tells of it."""
        with self._lock:
            if failure is None:
                self._memory.succeeded(turn, begun, self._wall_clock())
            else:
                config, now = self.retry_config, self._clock()
                self._memory.failed(turn, failure, config, begun, now, self._wall_clock())
        tell_result(turn, failure, self.retry_config)

    def _all_failed(self, question: Question, trail: list[Attempt]) -> AllProvidersFailed:
        with self._lock:
            pause = self._memory.pause(question.line, self._clock())
        reasons = {attempt.provider: attempt.reason for attempt in trail}
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        come_back = "" if pause is None else f" (come back in {math.ceil(pause)} s)"
        message = f"All providers and models failed{come_back}" + (why and f": {why}")
        return AllProvidersFailed(message, attempts=tuple(trail), retry_after=pause)

    # Models that are served in place of those that are gone

    def _served_instead(
        self, turn: Turn, failure: Failure, question: Question, deadline: float
    ) -> list[Turn]:
        """Turns for models that the provider does serve, when all its listed ones are gone."""
        row, name = turn.row, turn.row.name
        if failure.verdict is not Verdict.GONE or question.model:
            return []
        with self._lock:
            gone = list(self.models[name])
            if name in self._discovered or not self._memory.are_gone(name, gone):
                return []
            self._discovered.add(name)
        listed = self._get(row, "/models", deadline)[1]
        served = [model for model in chat_models(listed, row.free_only) if model not in gone][:5]
        served = [model for model in served if one_line(model, self.api_keys.values()) == model]
        if not served:
            return []
        self.models[name] = served
        logger.warning(
            "🔎 %s serves none of: %s; using instead: %s (to choose: set %s, comma-separated)",
            *(name, ", ".join(gone), ", ".join(served), row.variable("MODELS")),
        )
        return turns(row, served)

    def _get(self, row: Provider, path: str, deadline: float = math.inf) -> tuple[int | None, Any]:
        """(HTTP status, JSON) of a GET; (None, the Failure) when no reply came."""
        deadline = min(deadline, self._clock() + 2 * CONNECT_TIMEOUT)
        limits = Limits(self._clock, self._silence_of(row), deadline)
        try:
            reply = self._send(row, path, None, limits)
        except Failure as failure:
            failure.reason = one_line(failure.reason, self.api_keys.values())
            return None, failure
        try:
            return reply.status_code, parsed(self._transport.whole(reply, limits, MAX_BODY))
        finally:
            reply.close()

    # Statistics and health

    def _tally(self, trail: list[Attempt], answered: bool) -> None:
        """Counts one question, from its trail."""
        switches = sum(a.provider != b.provider for a, b in zip(trail, trail[1:]))
        limited = sum(attempt.status == 429 for attempt in trail)
        with self._lock:
            counts = (1, answered, not answered, limited, switches)
            self._stats = {name: old + new for (name, old), new in zip(self._stats.items(), counts)}

    def get_stats(self) -> dict[str, int]:
        """Counts since the last reset. A request is a question; rate_limited counts 429 replies."""
        with self._lock:
            return dict(self._stats)

    def reset_stats(self) -> None:
        names = "total_requests successful_requests failed_requests rate_limited_requests"
        self._stats = dict.fromkeys([*names.split(), "provider_switches"], 0)

    @property
    def provider_health(self) -> dict[str, ProviderHealth]:
        """What is known of each provider now, derived from the memory."""
        with self._lock:
            now, health = self._wall_clock(), self._memory.health
            return {n: health(n, self._has_key(row), now) for n, row in self._rows.items()}

    # What the command line asks for besides

    def rows(self, provider: Any = None) -> list[Provider]:
        """The rows of these providers (None: of all), in the order they are asked."""
        names = self.fallback_order if provider is None else provider
        names = names.split(",") if isinstance(names, str) else list(names)
        return list(dict.fromkeys(self._row(name) for name in names))

    def key_problem(self, row: Provider) -> str:
        """Why there is no key to use for this row; "" if there is, or none is needed."""
        if self._has_key(row):
            return ""
        if clean(self.api_keys.get(row.name)):
            return "contains a character that cannot be in a key"
        return "holds a placeholder" if row.key_env in self._placeholders else "is not set"

    def checked(self, arguments: Json) -> Question:
        """What `complete` would send for these arguments; raises what it would before sending."""
        return self._question(
            **{"question": None, "max_tokens": 500, "provider": None, **arguments}
        )

    def check(self, row: Provider) -> Json:
        """Whether the key is accepted and which listed models are served; costs no tokens."""
        started, listed = self._clock(), self.models[row.name]
        report: Json = {"provider": row.name, "key": "missing", "seconds": 0.0}
        report.update(served=[], not_served=[], reason=self.key_problem(row))
        if report["reason"]:
            return report
        status, body = self._get(row, row.key_path)
        if status == 200 and row.key_path != "/models":
            body = self._get(row, "/models")[1]
        if status == 200:
            ids = [dig(model, "id") for model in dig(body, "data") or []]
            report.update(key="accepted", served=[m for m in listed if m in ids])
            report["not_served"] = [m for m in listed if m not in ids]
        else:
            reason = body.reason if status is None else told(status, status, Evidence(body))
            report["reason"] = one_line(reason, self.api_keys.values())
            report["key"] = "refused" if status in (401, 402, 403) else "not checked"
        report["seconds"] = round(self._clock() - started, 3)
        return report

    def served(self, row: Provider) -> list[str]:
        """The chat models that a provider serves; the listed ones where it cannot be asked."""
        found = chat_models(self._get(row, "/models")[1], False) if self._has_key(row) else []
        return found or self.models[row.name]

    # What the caller asks for

    def _question(self, question: Any, max_tokens: Any, provider: Any, **fields: Any) -> Question:
        """The question, checked: ValueError for what cannot be meant, NoProviderError."""
        for name in ("tools", "stream", "n"):
            if name in fields:
                raise ValueError(f"{name} is not supported")
        model, timeout = fields.pop("model", None), fields.pop("timeout", None)
        system, messages = fields.pop("system", None), fields.pop("messages", None)
        if "max_completion_tokens" not in fields:
            fields["max_tokens"] = checked("max_tokens", max_tokens)
        if fields.get("temperature", 0) is not None:
            checked("temperature", fields.get("temperature", 0))
        timeout = self.timeout if timeout is None else checked("timeout", timeout)
        fields.update(messages=conversation(question, system, messages), stream=True)
        line, model = self._line(provider, model)
        return Question({k: v for k, v in fields.items() if v is not None}, line, model, timeout)

    def _line(self, provider: Any, model: Any) -> tuple[list[Turn], str | None]:
        """The candidates in the order they are asked, and the model if one was chosen."""
        if model is not None and (not isinstance(model, str) or is_blank(model)):
            raise ValueError(f"model must be a model's id, not {model!r:.60}")
        rows = self.rows(provider)
        prefix, colon, rest = (model or "").partition(":")
        if colon and prefix.strip().lower() in self._rows:
            row, model = self._row(prefix), rest.strip()
            if provider is not None and row not in rows:
                raise ValueError(f"model {prefix}:{model} is not of the provider {provider!r}")
            rows = [row]
        elif model:
            rows = [row for row in rows if model in self.models[row.name]] or rows
        keyed = [row for row in rows if self._has_key(row)]
        if not keyed:
            variables = ", ".join(row.key_env or "" for row in rows)
            names = tuple(row.name for row in rows)
            raise NoProviderError(f"no API key: set {variables}", providers=names)
        for row in keyed:
            check_url(row.variable("BASE_URL"), self._urls[row.name])
        lists = [(row, [model] if model else self.models[row.name]) for row in keyed]
        return [turn for row, models in lists for turn in turns(row, models)], model

    def _row(self, name: Any) -> Provider:
        """The row of this name; ValueError if there is none."""
        row = self._rows.get(name.strip().lower()) if isinstance(name, str) else None
        if row is None:
            known = ", ".join(self._rows)
            raise ValueError(f"provider must be one or more of {known}, not {name!r:.60}")
        return row

    def _key(self, row: Provider) -> str | None:
        key = clean(self.api_keys.get(row.name))
        return key if key and re.fullmatch(r"[!-~]+", key) else None

    def _has_key(self, row: Provider) -> bool:
        return row.key_env is None or self._key(row) is not None


def turns(row: Provider, models: Iterable[str]) -> list[Turn]:
    listed = list(models)
    return [Turn(row, model, f"{n}/{len(listed)}") for n, model in enumerate(listed, 1)]


def attempt(
    turn: Turn, reading: Reading, failure: Failure | None, waited: float, elapsed: float
) -> Attempt:
    verdict, reason = (failure.verdict, failure.reason) if failure else (None, "")
    names = (turn.row.name, turn.model, turn.attempts + 1)
    return Attempt(*names, reading.status, verdict, reason, waited, elapsed)


def answer(turn: Turn, reading: Reading, text: str, trail: list[Attempt], elapsed: float) -> Answer:
    reason = one_line(reading.finish_reason) or None
    names = (turn.row.name, turn.model)
    return Answer(text, *names, reason, reading.usage, tuple(trail), elapsed)


def stop_if_final(turn: Turn, failure: Failure, shown: str, trail: list[Attempt]) -> None:
    """Raises what no other candidate can mend."""
    if shown:
        message = f"{turn.row.name} {turn.model} broke off: {failure.reason}"
        where = {"provider": turn.row.name, "model": turn.model}
        raise StreamInterrupted(message, attempts=tuple(trail), partial=shown, **where)
    if failure.verdict is Verdict.REFUSED:
        message = f"{turn.row.name} refused the question: {failure.reason}"
        raise AnswerRefused(message, attempts=tuple(trail), reason=failure.reason)


def chat_models(listed: Any, free_only: bool) -> list[str]:
    """Ids of the models in a provider's list that answer text with text."""
    models = dig(listed, "data")
    models = models if isinstance(models, list) else []
    return [model["id"] for model in models if _is_chat(model, free_only)]


def _is_chat(model: Any, free_only: bool) -> bool:
    """By what its entry says (fields of Groq 2026-09, OpenRouter 2026-10), else by its name."""
    name, prices = dig(model, "id"), dig(model, "pricing")
    kinds = dig(model, "output_modalities") or dig(model, "architecture", "output_modalities")
    if not isinstance(name, str) or not re.fullmatch(r"[\w./:@~+-]{1,200}", name):
        return False
    if re.search(r"(?i)whisper|tts|speech|audio|guard|embed|rerank|moderation|ocr|image", name):
        return False
    if dig(model, "active") is False or (kinds and kinds != ["text"]):
        return False
    context = number(dig(model, "context_window") or dig(model, "context_length"))
    if context is not None and context <= 4096:
        return False
    return not free_only or (
        isinstance(prices, dict) and all(number(price) == 0 for price in prices.values())
    )


# The documented lines.


def tell_next(last: Turn | None, turn: Turn, wait: float) -> None:
    """Tells who is asked next."""
    same = last is not None and (last.row, last.model) == (turn.row, turn.model)
    if last is not None and not same:
        logger.info("🔄 %s %s failed, trying next model...", last.row.name, last.model)
    if wait:
        logger.info("⏳ Waiting %.2fs before retry...", wait)
    if last is None or last.row != turn.row:
        logger.info("🔄 Trying provider: %s", turn.row.name)
    if not same:
        logger.info("🎯 Trying %s model %s: %s", turn.row.name, turn.label, turn.model)


def tell_result(turn: Turn, failure: Failure | None, config: RetryConfig) -> None:
    """Tells how an attempt ended."""
    name, model, count = turn.row.name, turn.model, turn.attempts + 1
    if failure is None:
        logger.info("✅ Success with %s %s on attempt %d", name, model, count)
        return
    logger.warning("❌ Error in %s API request: %s", name, failure.reason)
    if failure.verdict.again and count >= config.max_attempts:
        logger.info("🔄 %s %s exhausted all %d retry attempts", name, model, count)


# --- 9. Command line ----------------------------------------------------------------------------

HELP = """\
usage: fallback_llm.py [options] [question ...]

Asks a language model; when a provider fails, the next one answers.
Only the answer goes to stdout. Order: Cerebras, Groq, OpenRouter.

  -                      read the question from stdin (a pipe is read anyway and
                         put before the question); after -- all is question
  -f, --file PATH        put the text of a file before the question
  -s, --system TEXT      how to answer, such as "in French, in one sentence"
  --provider NAMES       only these, in this order: groq,openrouter
  -m, --model MODEL      only this model; PROVIDER:MODEL names its provider
  --max-tokens N         longest answer, thinking included (default: 500)
  --temperature T        from 0 to 2 (default: the model's own)
  --timeout SECONDS      limit for the whole question, waits included
  --max-attempts N       requests to one model, at most (default: 5)
  --base-delay SECONDS   first wait, doubled each time (default: 2.0)
  --max-delay SECONDS    longest single wait (default: 60.0)
  --disable-jitter       wait exactly as long, not 80 to 100 percent of it
  --eager                ask somebody else instead of waiting for a rate limit
  --stream               print the answer as it is written
  --json                 print one JSON object, also when all fail
  -q, --quiet            nothing on stderr but errors
  -v, --verbose          more on stderr
  --stats                usage statistics on stderr
  --no-stdin             do not read a pipe
  --check                tell which keys and models work; costs no tokens
  --list-models          print PROVIDER<tab>MODEL
  --batch FILE           ask a file of questions (- is stdin): one a line, or
                         JSONL with question, id, system, model ...
  -o, --output FILE      where the batch's answers go, as JSONL; the command again
                         asks only what has no answer yet
  --workers N            questions of a batch in flight (default: 8)
  -V, --version          print the version
  -h, --help             print this help

examples:
  python fallback_llm.py "What is the capital of France?"
  cat error.log | python fallback_llm.py "explain this" --provider groq --stats
  python fallback_llm.py --batch questions.txt -o answers.jsonl --workers 16

environment, or a .env file here or beside the program:
  CEREBRAS_API_KEY, GROQ_API_KEY, OPENROUTER_API_KEY   one is enough
  GROQ_MODELS=a,b (CEREBRAS_, OPENROUTER_)             models to ask instead
  GROQ_BASE_URL (not from .env)                        another address

exit: 0 answered, 1 no answer, 2 wrong usage (nothing sent), 130 interrupted,
141 reader gone. https://github.com/example/fallback-llm
"""
OPTIONS = re.findall(r"^  (?:(-\w), )?(--[\w-]+)(?: ([A-Z]+))?(?:  |$)", HELP, re.MULTILINE)
CONTROLS = {code: None for code in [*range(32), *range(127, 160)] if code not in (9, 10)}


class Usage(Exception):
    """Wrong usage: one line, exit code 2."""


def main(argv: list[str] | None = None) -> int:
    """Runs the program. The exit code; Ctrl-C and a reader that has gone end the process."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        return run(parse(sys.argv[1:] if argv is None else argv))
    except Usage as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        import signal

        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell loop stops only for the signal
        say("\nInterrupted.")
        os.kill(os.getpid(), signal.SIGINT)
        return 130
    except BrokenPipeError:
        drop_stdout()
        return 141
    except ImportError as error:
        say(f"missing package: {error.name} - run: pip install requests python-dotenv")
    except OSError as error:
        drop_stdout()
        say(f"error: cannot write: {error.strerror or error}")
    return 1


def parse(argv: list[str]) -> Any:
    """The options, from the lines of `HELP`; numbers are checked."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            raise Usage(explained(message))

    parser = Parser(prog="fallback_llm.py", add_help=False, allow_abbrev=False)
    parser.add_argument("question", nargs="*")
    for short, name, value in OPTIONS:
        action = "store" if value else "store_true"
        parser.add_argument(*filter(None, (short, name)), action=action)
    # an intermixed parse takes flags anywhere, but does not know "--"
    read = parser.parse_args if "--" in argv else parser.parse_intermixed_args
    args = read(argv)
    if args.quiet and args.verbose:
        raise Usage("--quiet: not allowed with --verbose")
    for name, (kind, *_) in NUMBERS.items():
        text = getattr(args, name, None)
        if text is not None:
            setattr(args, name, numeric(name, kind, text))
    return args


def numeric(name: str, kind: type, text: str) -> Any:
    """The number in an option's text."""
    try:
        value = kind(text)
    except ValueError:
        value = text
    try:
        return checked(name, value)
    except ValueError as error:
        raise Usage(flagged(str(error))) from None


def flagged(message: str) -> str:
    """A message of the module in the words of the command line."""
    return re.sub(r"\b(max_\w+|base_delay|timeout|temperature|workers)\b", _flag, message)


def _flag(name: Any) -> str:
    return "--" + name.group().replace("_", "-")


def explained(message: str) -> str:
    """An error of argparse, with what may have been meant."""
    wrong = re.search(r"unrecognized arguments: .*?(-\S+)", message)
    if not wrong:
        return message
    from difflib import get_close_matches

    near = get_close_matches(wrong.group(1), [name for _, name, _ in OPTIONS], 1, 0.5)
    meant = f"; did you mean {near[0]}?" if near else ""
    return f"unknown option {wrong.group(1)}{meant} (a question that begins with - goes after --)"


class StderrHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def say(line: str) -> None:
    """A line on stderr, without control characters; lost where there is no stderr."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(line.translate(CONTROLS) + "\n")
        sys.stderr.flush()


def put(text: str) -> None:
    """Writes to stdout, in pieces: one big write may not notice that the reader has gone."""
    for start in range(0, len(text), 4096):
        sys.stdout.write(text[start : start + 4096])
        sys.stdout.flush()


def drop_stdout() -> None:
    """Lets what stdout still holds go nowhere, so that the interpreter's end does not complain."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def to_json(value: Any) -> str:
    """One line of JSON; what a terminal or an encoder could stumble over is escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(
        "[\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda c: f"\\u{ord(c.group()):04x}", text
    )


def run(args: Any) -> int:
    """Does what the options say. The exit code."""
    if args.help or args.version:
        put(HELP if args.help else f"fallback_llm {__version__}\n")
        return 0
    if sys.stdout is None:
        say("error: stdout is closed: there is no place for the answer")
        return 1
    handler = StderrHandler()
    logger.addHandler(handler)
    logger.setLevel(logging.CRITICAL if args.quiet else logging.INFO)
    try:
        return serve(args)
    except ValueError as error:
        raise Usage(flagged(str(error))) from None
    finally:
        logger.removeHandler(handler)


def serve(args: Any) -> int:
    if args.verbose:
        say("🚀 Initializing Fallback LLM System...")
    given = {
        field.name: getattr(args, field.name, None) for field in dataclasses.fields(RetryConfig)
    }
    given["jitter"] = not args.disable_jitter
    config = RetryConfig(**{name: value for name, value in given.items() if value is not None})
    llm = FallbackLLM(config, timeout=args.timeout)
    for row in llm.rows(args.provider):
        problem = llm.key_problem(row)
        if args.verbose or "character" in problem:
            say(f"⚠️  {row.key_env} {problem}" if problem else f"🔑 {row.key_env} is set")
    if args.check or args.list_models:
        return (check if args.check else list_models)(llm, args)
    names = ("provider", "model", "system", "temperature", "max_tokens")
    common = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    result = Batch(llm, args, common).run() if args.batch else respond(llm, args, common)
    return result


def respond(llm: FallbackLLM, args: Any, common: Json) -> int:
    """Asks one question and prints the answer."""
    question = question_of(args)
    if args.verbose:
        available = [row.name for row in llm.rows(args.provider) if not llm.key_problem(row)]
        say(f"✅ Available providers: {', '.join(available)}")
        say(f"❓ Question: {question}\n🤔 Thinking...")
    started = time.monotonic()
    try:
        if args.stream and not args.json:
            result: Any = show_stream(llm.stream(question, **common), args.quiet)
        else:
            result = llm.complete(question, **common)
            show(result, args)
    except FallbackLLMError as error:
        result = error
        if args.json:
            put(to_json(record(error, time.monotonic() - started)) + "\n")
        explain(llm, args, error)
    if isinstance(result, Answer) and not args.quiet:
        if result.finish_reason == "length":
            say(f"✂️  answer cut at --max-tokens {common.get('max_tokens', 500)}")
        say(f"\n⏱️  Response time: {result.elapsed:.2f}s")
    if args.stats:
        show_stats(llm)
    return 0 if isinstance(result, Answer) else 1


def show_stats(llm: FallbackLLM) -> None:
    say("\n📊 Usage Statistics:")
    for name, count in llm.get_stats().items():
        say(f"   {name}: {count}")


def show(answer: Answer, args: Any) -> None:
    if args.json:
        put(to_json(record(answer, answer.elapsed)) + "\n")
        return
    if not args.quiet:
        say("\n💡 Response:")
    put(re.sub(r"\A\s*\n", "", answer.text.translate(CONTROLS)).rstrip("\n") + "\n")


def show_stream(pieces: Generator[str, None, Answer], quiet: bool) -> Answer:
    """Prints the pieces as they come: no blank lines before, one line end after."""
    held, begun = "", False
    try:
        while True:
            text = held + next(pieces).translate(CONTROLS)
            if not begun and text.strip():
                text, begun = re.sub(r"\A\s*\n", "", text), True
                if not quiet:
                    say("\n💡 Response:")
            shown = text.rstrip("\n") if begun else ""
            held = text[len(shown) :]
            put(shown)
    except StopIteration as end:
        answer: Answer = end.value
        return answer
    finally:
        if begun:
            put("\n")


def record(result: Any, elapsed: float) -> Json:
    """An Answer, or an error in its place, as JSON."""
    failed = isinstance(result, FallbackLLMError)
    trail = [dataclasses.asdict(attempt) for attempt in result.attempts]
    for step in trail:
        step["verdict"] = step["verdict"].word if step["verdict"] else None
    return {
        "answer": None if failed else result.text,
        "error": str(result) if failed else None,
        "retry_after": getattr(result, "retry_after", None),
        "provider": getattr(result, "provider", None),
        "model": getattr(result, "model", None),
        "finish_reason": getattr(result, "finish_reason", None),
        "usage": getattr(result, "usage", None),
        "attempts": trail,
        "elapsed_seconds": round(elapsed, 3),
    }


ADVICE = {  # what to do next, by the verdict of a provider's last attempt
    Verdict.RATE_LIMITED: "wait for the limit to end",
    Verdict.FAULT: "try again later",
    Verdict.UNSUITABLE: "choose another model with -m, or change the question or --max-tokens",
    Verdict.GONE: "choose another model with -m, or set {models}",
    Verdict.DENIED: "check {key} and your account: {url}",
    Verdict.REFUSED: "change the question",
}


def explain(llm: FallbackLLM, args: Any, error: FallbackLLMError) -> None:
    """Tells of a failure in at most ten lines: a line for each provider, then the sum."""
    if isinstance(error, NoProviderError):
        return explain_keys(llm, args)
    if not isinstance(error, AllProvidersFailed) or args.quiet:
        return say(f"❌ {error}")
    last = {attempt.provider: attempt for attempt in error.attempts}
    for row in llm.rows(args.provider):
        problem, attempt = llm.key_problem(row), last.get(row.name)
        if problem:
            say(f"   {row.name}: {row.key_env} {problem} → get a key: {row.key_url}")
        elif attempt and attempt.verdict:
            words = {"key": row.key_env, "url": row.key_url, "models": row.variable("MODELS")}
            advice = ADVICE[attempt.verdict].format(**words)
            say(f"   {row.name} {attempt.model}: {attempt.reason} → {advice}")
    if error.retry_after is not None:
        say(f"   the first limit ends in {math.ceil(error.retry_after)} s")
    return say("❌ All providers and models failed")


def explain_keys(llm: FallbackLLM, args: Any) -> None:
    """Tells which keys are missing, and where to get them."""
    rows = [row for row in llm.rows(args.provider) if row.key_env]
    say("❌ No API keys found! Please set environment variables:")
    say("   " + ", ".join(str(row.key_env) for row in rows))
    for row in rows:
        say(f"   {row.key_env} {llm.key_problem(row)}; get one, free: {row.key_url}")
    say(f"   one is enough: export {rows[-1].key_env}=...   (or put it into a file .env)")


def check(llm: FallbackLLM, args: Any) -> int:
    """Prints which keys are accepted and which models are served. 0 if somebody can answer."""
    reports = [llm.check(row) for row in llm.rows(args.provider)]
    if args.json:
        put(to_json(reports) + "\n")
    else:
        for report in reports:
            served, missing = ", ".join(report["served"]), ", ".join(report["not_served"])
            line = f"{report['provider']}: key {report['key']} ({report['seconds']:.2f}s)"
            line += f"; served: {served}" * bool(served) + f"; not served: {missing}" * bool(
                missing
            )
            put(
                (line + f"; {report['reason']}" * bool(report["reason"])).translate(CONTROLS) + "\n"
            )
    return 0 if any(report["served"] for report in reports) else 1


def list_models(llm: FallbackLLM, args: Any) -> int:
    """Prints the models that each provider serves, or, where it cannot be asked, the listed."""
    pairs = [(row.name, model) for row in llm.rows(args.provider) for model in llm.served(row)]
    if args.json:
        put(to_json([{"provider": name, "model": model} for name, model in pairs]) + "\n")
    else:
        put("".join(f"{name}\t{model}\n" for name, model in pairs))
    return 0


# Where questions come from.


def question_of(args: Any) -> str:
    """The question: the text of a file, then of a pipe, then the words. Else Usage."""
    words, parts = list(args.question), []
    dash = words[:1] == ["-"] or args.file == "-"
    words = words[1:] if words[:1] == ["-"] else words
    if args.file and args.file != "-":
        with named("--file", args.file), open(args.file, "rb") as file:
            parts.append(decoded(file.read()))
    piped = sys.stdin is not None and not sys.stdin.closed and not sys.stdin.isatty()
    if dash or (piped and not args.no_stdin):
        parts.append(decoded(stdin_bytes()))
    question = "\n\n".join(filter(None, (part.strip("\r\n") for part in [*parts, " ".join(words)])))
    if not is_blank(question):
        return question
    if words or args.file or args.no_stdin:
        raise Usage("the question is empty")
    if dash or piped:
        raise Usage("no question: stdin was empty")
    first = HELP.split("\n", 1)[0]
    examples = re.findall(r"^  (python .*)", HELP, re.MULTILINE)
    raise Usage("no question\n" + "\n  ".join([first, *examples[:2]]))


def stdin_bytes() -> bytes:
    """All of stdin; after two silent seconds it is told that it is waited for."""
    if sys.stdin is None:
        return b""
    waiting = "waiting for piped input; use --no-stdin (or </dev/null) to skip"
    timer = threading.Timer(2.0, say, [waiting])
    timer.daemon = True
    timer.start()
    try:
        sys.stdin.buffer.peek(1)  # type: ignore[attr-defined]
    finally:
        timer.cancel()
    return sys.stdin.buffer.read()


def decoded(data: bytes) -> str:
    """The text, whatever its byte order mark; what is not UTF-8 in it is replaced."""
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if utf16 else "utf-8-sig", "replace").replace("\0", "")


class Batch:
    """Many questions from a file; each result is one line of JSON, written as it comes.

    The input is read twice: to check every line before anything is sent, and to ask. What the
    output has an answer for is not asked again.
    """

    def __init__(self, llm: FallbackLLM, args: Any, common: Json) -> None:
        self.llm, self.args, self.common = llm, args, common
        self.lock = threading.Lock()
        self.before: dict[Any, int] = {}  # id -> hash of the question that an earlier run answered
        self.answered: dict[str, int] = {}  # in this run, by provider
        self.total = self.failed = 0
        self.error: BaseException | None = None

    def run(self) -> int:
        if self.args.question or self.args.file:
            raise Usage(
                "--batch takes its questions from a file: leave out the question and --file"
            )
        with contextlib.ExitStack() as stack:
            source = self._input(stack)
            write = self._output(stack) if self.args.output else put
            self.total = sum(1 for _ in self._questions(source))
            self._ask(self._questions(source), write)
        if self.args.stats:
            show_stats(self.llm)
        if self.failed or not self.args.quiet:
            answered = sum(self.answered.values())
            say(f"{answered} answered, {self.failed} failed, {len(self.before)} answered before")
        return 1 if self.failed else 0

    def _input(self, stack: contextlib.ExitStack) -> Any:
        """The input, as a file that can be read twice."""
        if self.args.batch != "-":
            with named("--batch", self.args.batch):
                return stack.enter_context(open(self.args.batch, "rb"))
        import shutil
        import tempfile

        spool = stack.enter_context(tempfile.TemporaryFile())
        shutil.copyfileobj(sys.stdin.buffer, spool)
        return spool

    def _output(self, stack: contextlib.ExitStack) -> Callable[[str], None]:
        """Locks the output and drops failed and torn lines from it. Returns what adds a line."""
        path = os.path.realpath(self.args.output)
        with named("--output", path):
            file = stack.enter_context(open(path, "ab+"))
            lock(file)
            if os.path.isfile(path):
                old, file = file, stack.enter_context(open(path + ".part", "wb"))
                lock(file)
                old.seek(0)
                for line in old:
                    said = parsed(line) if line.endswith(b"\n") else None
                    if dig(said, "answer") is not None and said.get("id") not in self.before:
                        self.before[said["id"]] = hash(said.get("question"))
                        file.write(line)
                file.flush()
                os.replace(path + ".part", path)

        def write(line: str) -> None:
            file.write(line.encode("utf-8", "replace"))
            file.flush()  # one write of the system for a line

        return write

    def _questions(self, source: Any) -> Iterator[tuple[Any, Json]]:
        """(id, arguments) of each line that has no answer yet. Usage, with its number, for a bad
        one.
        """
        source.seek(0)
        seen = set()
        for place, line in enumerate(source, 1):
            text = decoded(line).strip()
            if not text:
                continue
            try:
                fields = json.loads(text) if text[0] == "{" else {"question": text}
                name = fields.pop("id", place)
                if name in seen:
                    raise ValueError(f"id {name!r} is there twice")
                seen.add(name)
                fields = {**self.common, **fields}
                self.llm.checked(fields)
                question = hash(fields.get("question"))
                if self.before.get(name, question) != question:
                    raise ValueError(f"{self.args.output} answers another question under this id")
            except (ValueError, TypeError, RecursionError) as error:
                raise Usage(
                    f"--batch {self.args.batch}: line {place}: {flagged(str(error))}"
                ) from None
            if name not in self.before:
                yield name, fields

    def _ask(self, questions: Iterator[tuple[Any, Json]], write: Callable[[str], None]) -> None:
        """Keeps the workers busy and tells of the progress."""
        count = checked("workers", self.args.workers or 8)
        work = (questions, write)
        workers = [
            threading.Thread(target=self._work, args=work, daemon=True) for _ in range(count)
        ]
        for worker in workers:
            worker.start()
        try:
            show = Progress(self)
            for worker in workers:
                while worker.is_alive():
                    worker.join(0.2)
                    show.now()
            show.end()
        except KeyboardInterrupt:
            self.lock.acquire(timeout=0.3)  # nobody is in the middle of a line now
            raise
        if self.error is not None:
            raise self.error

    def _work(self, questions: Iterator[tuple[Any, Json]], write: Callable[[str], None]) -> None:
        try:
            while True:
                with self.lock:
                    item = None if self.error else next(questions, None)
                if item is None:
                    return
                self._one(*item, write)
        except BaseException as error:  # noqa: BLE001 - handed to the main thread, which raises it
            self.error = self.error or error

    def _one(self, name: Any, fields: Json, write: Callable[[str], None]) -> None:
        started = time.monotonic()
        try:
            result: Any = self.llm.complete(**fields)
        except FallbackLLMError as error:
            result = error
        found = record(result, time.monotonic() - started)
        line = to_json({"id": name, "question": fields.get("question"), **found}) + "\n"
        with self.lock:
            write(line)
            if isinstance(result, Answer):
                self.answered[result.provider] = self.answered.get(result.provider, 0) + 1
            else:
                self.failed += 1


class Progress:
    """One line, redrawn on a terminal; elsewhere a new one every ten seconds."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._started = self._told = time.monotonic()
        self._redraw = sys.stderr is not None and sys.stderr.isatty()

    def now(self) -> None:
        now = time.monotonic()
        if self._batch.args.quiet or now - self._told < (0.5 if self._redraw else 10):
            return
        self._told = now
        answered = sorted(self._batch.answered.items(), key=lambda pair: -pair[1])
        done = sum(self._batch.answered.values()) + self._batch.failed
        rate = done / (now - self._started)
        left = f"{(self._batch.total - done) / rate:.0f} s left" if rate else "no answer yet"
        by = ", ".join(f"{name} {count}" for name, count in answered)
        line = f"{done}/{self._batch.total} done, {self._batch.failed} failed, {rate:.1f}/s, {left}"
        line += f"; {by}" * bool(by)
        if self._redraw:
            sys.stderr.write("\r" + line[:79].ljust(79))
            sys.stderr.flush()
        else:
            say(line)

    def end(self) -> None:
        if self._redraw and not self._batch.args.quiet:
            sys.stderr.write("\r" + " " * 79 + "\r")


@contextlib.contextmanager
def named(flag: str, path: str) -> Iterator[None]:
    """Makes an OSError wrong usage of the flag."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise Usage(f"{flag} {path}: {getattr(error, 'strerror', None) or error}") from None


def lock(file: Any) -> None:
    """Refuses a file that another run has locked. Goes with the file."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError("another run is writing to it") from None


if __name__ == "__main__":
    sys.exit(main())
