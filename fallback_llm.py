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

import sys

__version__ = "1.0.0"
HELP = """\
usage: fallback_llm.py [options] [question ...]

Asks a language model; when a provider fails, the next one answers: Cerebras,
Groq, OpenRouter. Only the answer goes to stdout.

  -                      read the question from stdin (what is piped in is put
                         before the question anyway); -- ends the options
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
  -o, --output FILE      where the batch's answers go, as JSONL; the same again
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

VERSION = f"fallback_llm {__version__}\n"
QUICK = {"-h": HELP, "--help": HELP, "-V": VERSION, "--version": VERSION}
if __name__ == "__main__" and len(sys.argv) == 2 and sys.argv[1] in QUICK:
    try:  # noqa: SIM105 - before the imports: it takes half the time
        sys.exit(print(QUICK[sys.argv[1]], end="", flush=True))
    except OSError:
        pass  # main() says what is wrong

import codecs
import contextlib
import dataclasses
import enum
import json
import logging
import math
import os
import re
import signal
import threading
import time

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main(), Ctrl-C needs no traceback

TYPE_CHECKING = False  # typing itself is not imported: that takes a tenth of the start-up
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, Generator, Iterable, Iterator, Mapping, Tuple

    import requests

    Json = Dict[str, Any]
    Ruling = Tuple["Verdict", bool]  # and whether it holds for the whole provider

# fmt: off
__all__ = [
    "PROVIDERS", "AllProvidersFailed", "Answer", "AnswerRefused", "Attempt", "FallbackLLM",
    "FallbackLLMError", "NoProviderError", "Provider", "ProviderHealth", "ProviderStatus",
    "RetryConfig", "StreamInterrupted", "Verdict",
]
# fmt: on

CONNECT_TIMEOUT = 5.0
ERROR_BODY_TIME = 2.0  # what a server says about its failure is not worth a longer wait
GRACE = 1.0  # after a finish_reason: how long usage and [DONE] are waited for
MAX_BODY = 32 * 1024 * 1024  # bytes; a longer reply is a fault
MAX_HINT = 32 * 86400.0  # a longer "come back in" is junk
POOL_WIDTH = 128  # connections kept per host; 1000 take 1 ms to set up, 10 make threads reconnect

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
            low = f"{self.max_delay!r} with {self.base_delay!r}"
            raise ValueError(f"max_delay must be >= base_delay, not {low}")


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


@dataclasses.dataclass(eq=False, repr=False)
class Failure(Exception):
    """Why an attempt gave no answer. Raised where it is seen, caught in the walk."""

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
    # parameters for the models that have this word in their id
    defaults: Mapping[str, Json] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        checked("silence", self.silence)
        if not re.fullmatch(r"[a-z0-9_.-]+", self.name):
            raise ValueError(f"a provider's name must be in lower case, not {self.name!r}")
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


@dataclasses.dataclass(eq=False, repr=False)
class Turn:
    """A candidate's place in the line of one question."""

    row: Provider
    model: str
    label: str  # "1/2": its place among the provider's models
    attempts: int = 0
    ready_at: float = 0.0  # not asked before
    patience: float = 0.0  # how long the walk waits for it although others are ready


@dataclasses.dataclass(eq=False, repr=False)
class Question:
    """A question that was checked."""

    fields: Json  # the request without the model
    line: list[Turn]
    timeout: float
    is_chosen: bool  # the model, by the caller


# --- 2. Errors ----------------------------------------------------------------------------------
# FallbackLLMError ── NoProviderError, AllProvidersFailed, AnswerRefused, StreamInterrupted.
# Mistakes of the caller are ValueError, and nothing was sent.


class FallbackLLMError(Exception):
    """Base of this module's errors; the evidence is in its attributes."""

    attempts: tuple[Attempt, ...] = ()  # the trail of the question
    retry_after: float | None = None  # AllProvidersFailed: seconds, if a server said when to come
    reason = ""  # AnswerRefused: the provider's own
    partial = provider = model = ""  # StreamInterrupted: the text so far, and whose it is
    providers: tuple[str, ...] = ()  # NoProviderError: the names of those that were chosen

    def __init__(self, message: str = "", **evidence: Any) -> None:
        super().__init__(message)
        self.__dict__.update(evidence)  # survives pickling


class NoProviderError(FallbackLLMError):
    """None of the chosen providers has a key. Nothing was sent."""


class AllProvidersFailed(FallbackLLMError):
    """Nobody is left in the line, or the time is up."""


class AnswerRefused(FallbackLLMError):
    """A provider refuses the question itself."""


class StreamInterrupted(FallbackLLMError):
    """A stream broke after its first text."""


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
    (
        Verdict.DENIED,
        True,
        r"openrouter_(credits|key_limit)|region_restricted|unsupported_country\w*",
    ),
    (Verdict.DENIED, True, r"account_(closed|suspended|deactivated|disabled|restricted|inactive)"),
    (Verdict.REFUSED, False, r"content_(policy_violation|filter)|refusal|\w*moderation\w*"),
    (Verdict.RATE_LIMITED, True, r"\w*in_flight_budget\w*|openrouter_free_tier\w*"),
    (Verdict.RATE_LIMITED, False, r"(token|request)_quota_exceeded|capacity_exhausted"),
    (Verdict.FAULT, False, r"queue_exceeded|json_validate_failed|tool_use_failed|timeout"),
    (Verdict.FAULT, False, r"(internal_)?server_error|server|(\w+_)?(overloaded|unavailable)"),
    (Verdict.UNSUITABLE, False, r"context_length_exceeded|(max_tokens|token_limit)_exceeded"),
    (Verdict.UNSUITABLE, False, r"string_too_long|(payload|request)_too_large|wrong_\w+"),
    (Verdict.UNSUITABLE, False, r"privacy_restricted|constraint_filtered|unsupported_\w+"),
    (Verdict.UNSUITABLE, False, r"invalid_request|invalid_prompt|unprocessable"),
)
OF_A_MODEL = r"^(?!.*\b(parameter|tools?|property|field)\b).*\bmodels?\b.{0,120}\b"
# WORDS are searched in the message: narrow ones, and what is permanent before what passes.
WORDS = (
    (Verdict.UNSUITABLE, False, r"request too large|\bdata policy\b|reduce the length of"),
    (Verdict.UNSUITABLE, False, r"(maximum|exceeds?) .{0,40}context"),
    (Verdict.UNSUITABLE, False, r"context (length|window).{0,80}exceed"),
    (Verdict.RATE_LIMITED, True, r"\bfree-models-per-"),
    (Verdict.FAULT, True, r"check your network settings"),
    (Verdict.DENIED, True, r"insufficient (quota|credit|balance|fund)|exceeded your current quota"),
    (Verdict.DENIED, True, r"\boverdue\b|\bkey limit exceeded|credit balance is too low"),
    (
        Verdict.DENIED,
        True,
        r"(organization|account) (has been |is )?(restricted|suspended|flagged)",
    ),
    (Verdict.GONE, False, r"is not a valid model id|no endpoints found for"),
    (Verdict.GONE, False, OF_A_MODEL + r"(does not exist|not (be )?found|no longer|retired)"),
    (Verdict.GONE, False, OF_A_MODEL + r"(archived|decommissioned|deprecated|discontinued)\b"),
    (
        Verdict.REFUSED,
        False,
        r"content (\w+ )?polic(y|ies)|safety (system|filter)|request blocked: ",
    ),
    (
        Verdict.REFUSED,
        False,
        r"(input|prompt|content|message|text) (was|is|were|has been) flagged|flagged (by|for)",
    ),
)
DENIED = (401, 402, 403)
PASSING = (408, 409, 424, 425, 498, 499)  # and 5xx
LONG = r"(?i)\bper[ -](hour|day|week|month)|\b(hourly|daily|monthly)\b"


def judge(status: int, headers: Mapping[str, str], body: Any, now: float) -> Failure:
    """What a reply that is no answer means: codes first, then words, then the status.

    status: of HTTP; below 300 for an error inside a reply. headers: names in lower case. body:
    parsed JSON or text. now: epoch seconds. Codes and shapes: recorded replies and documents of
    the three providers, 2025 to October 2026.
    """
    error = Evidence(body)
    text = " ".join([error.said, *error.codes])
    code = status if status >= 300 else error.status
    verdict, wide = error.ruling(code) or by_status(code, text)
    if error.upstream is not None:  # a router's supplier: its word counts for the model alone
        passed_on = (error.upstream.ruling(code) or (verdict,))[0]
        if passed_on in (Verdict.UNSUITABLE, Verdict.GONE, Verdict.REFUSED):
            verdict = passed_on
        verdict, wide = Verdict.FAULT if verdict is Verdict.DENIED else verdict, False
    if verdict is Verdict.RATE_LIMITED and headers.get("x-should-retry") == "false":
        verdict = Verdict.FAULT
    resets = verdict is Verdict.RATE_LIMITED  # a quota's reset says nothing about other failures
    hints = hints_in(headers, error, now, resets)
    hint = next((h for h in hints if 0 <= h <= MAX_HINT), None) if verdict.again else None
    if hint is None and resets and re.search(LONG, text) and not re.search(r"(?i)per.min", text):
        hint = 3600.0
    return Failure(verdict, told(status, code, error), wide, hint)


def by_status(status: int | None, said: str) -> Ruling:
    """The ruling on a failure that only its status tells of (None: an error that has none)."""
    if status == 429 or (status is None and re.search(r"(?i)rate.?limit|too.many.requests", said)):
        return Verdict.RATE_LIMITED, False
    if status is None or status < 400 or status >= 500 or status in PASSING:
        return Verdict.FAULT, status is not None and 300 <= status < 400  # a redirect
    return (Verdict.DENIED, True) if status in DENIED else (Verdict.UNSUITABLE, False)


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
        if isinstance(error, str) and isinstance(dig(whole, "message"), str):
            error = {"code": error, "message": dig(whole, "message")}
        message = error if isinstance(error, str) else dig(error, "message") or dig(error, "detail")
        self.message = message_of(message)
        self.metadata, self.availability = dig(error, "metadata"), dig(error, "availability")
        self.retry_after = dig(error, "retry_after")
        codes = [dig(self.metadata, "limit_source"), dig(self.availability, "code")]
        codes += [dig(error, "code"), dig(error, "error_type"), dig(self.metadata, "error_type")]
        self.codes = [code for code in [*codes, dig(error, "type")] if isinstance(code, str)]
        if any(dig(self.metadata, name) for name in ("reasons", "flagged_input", "patterns")):
            self.codes.append("moderation")
        inner = [dig(error, "status_code"), dig(whole, "status_code"), dig(error, "code")]
        statuses = [number(value) for value in [*inner, dig(error, "http_status")]]
        self.status = next((int(status) for status in statuses if 400 <= status <= 599), None)
        self.upstream: Evidence | None = None
        if self.message.startswith("Provider returned error"):
            raw = dig(self.metadata, "raw")
            self.upstream = Evidence(parsed(raw) if isinstance(raw, str) else raw)

    def ruling(self, status: int | None) -> Ruling | None:
        """By the first code, else the first words, that are known."""
        for code in self.codes:
            for verdict, wide, pattern in CODES:
                if re.fullmatch(pattern, code, re.IGNORECASE):
                    return verdict, wide
        for verdict, wide, pattern in WORDS:
            down = verdict is Verdict.REFUSED and (status or 0) >= 500  # the moderation, that is
            if re.search(pattern, self.message, re.IGNORECASE) and not down:
                return verdict, wide
        return None

    @property
    def said(self) -> str:
        """The error's own words, else its codes."""
        upstream = ": " + self.upstream.said if self.upstream and self.upstream.said else ""
        return (self.message or " ".join(self.codes)) + upstream


def message_of(message: Any) -> str:
    """A message as text that is not too long to be searched; of a web page the title."""
    text = message if isinstance(message, str) else json.dumps(message) if message else ""
    if re.match(r"(?i)\s*<(!doctype|html|head)", text):
        title = re.search(r"(?is)<title[^>]{0,200}>(.{0,200}?)</title>", text[:4000])
        return "HTML page: " + (title.group(1).strip() if title else "without a title")
    return text[:4000]


def dig(value: Any, *path: str | int) -> Any:
    """What lies at the path, names and zeros, inside parsed JSON; None where there is nothing."""
    for step in path:
        if isinstance(value, dict):
            value = value.get(step)
        else:
            value = value[0] if step == 0 and value and isinstance(value, list) else None
    return value


def number(value: Any) -> float:
    """The value as a finite number; nan for anything else."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return found if math.isfinite(found) else math.nan


def parsed(body: str | bytes) -> Any:
    """The body as JSON, else as text; never an error."""
    text = body if isinstance(body, str) else body.decode("utf-8-sig", "replace")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def hints_in(
    headers: Mapping[str, str], error: Evidence, now: float, resets: bool = True
) -> Iterator[float]:
    """Seconds after which the server wants to be asked again, the best source first. nan: none."""
    date, echo = headers.get("date"), dig(error.metadata, "headers")
    echo = {name.lower(): echo[name] for name in echo} if isinstance(echo, dict) else {}
    yield number(headers.get("retry-after-ms")) / 1000
    yield retry_after(headers.get("retry-after"), date, now)
    yield number(dig(error.metadata, "retry_after_seconds"))
    yield number(dig(error.availability, "retry_after"))
    yield number(error.retry_after)
    yield retry_after(echo.get("retry-after"), date, now)
    yield duration(error.message)
    yield duration(error.upstream.message if error.upstream else "")
    for place in (echo, headers) if resets else ():
        instant = number(place.get("x-ratelimit-reset"))
        yield (instant / 1000 if instant > 1e11 else instant) - now


def retry_after(value: Any, date: str | None, now: float) -> float:
    """Seconds in a Retry-After: a number, or a date, which counts from the reply's own Date."""
    from email.utils import mktime_tz, parsedate_tz

    seconds = number(value)
    if math.isnan(seconds) and isinstance(value, str):
        with contextlib.suppress(TypeError, ValueError, OverflowError, IndexError):
            then: Any = parsedate_tz(value)
            sent = parsedate_tz(date or "")
            return mktime_tz(then) - (mktime_tz(sent) if sent else now)
    return seconds


UNITS = {"ms": 0.001, "milli": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
PART = (
    r"(\d+(?:\.\d+)?)(?: ?(ms|milli|[shd]|m(?!o))[a-z]*"
    r"|(?![\w:-]|[.,]\d| (?:week|month|year)))"  # a bare number, of seconds
)


def duration(message: str) -> float:
    """Seconds in "try again in 1m26.4s", "in 850ms", "retry after 40 seconds"."""
    before = r"(?i)\b(?:(?:again|retry|resets?) (?:in|after)|wait(?: for)?) (?:about )?"
    said = re.search(before + rf"((?:{PART},? ?(?:and )?)+)", message)
    parts = re.findall("(?i)" + PART, said.group(1)) if said else []
    return sum(float(count) * UNITS[unit.lower()] for count, unit in parts) if parts else math.nan


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
    soonest = min(waits, key=lambda pair: pair[0], default=None)
    return (soonest[1], soonest[0]) if soonest and soonest[0] <= limit else None


def line_after(
    line: list[Turn], asked: Turn, failure: Failure, config: RetryConfig, now: float, chance: float
) -> list[Turn]:
    """The line after a failure: whom it reaches is out, or stays in its place when the wait is
    within its patience, or goes to the end. chance: 0 to 1, for the jitter.
    """
    stay, last = [], []  # type: list[Turn], list[Turn]
    for turn in line:
        if turn is not asked and not (failure.wide and turn.row.name == asked.row.name):
            stay.append(turn)
            continue
        attempts = turn.attempts + 1
        if not failure.verdict.again or attempts >= config.max_attempts:
            continue
        wait = backoff(config, attempts) * (0.8 + 0.2 * chance if config.jitter else 1.0)
        wait = max(wait, failure.hint or 0.0)
        # as long as all the waits that are left for it: a longer one gains nothing
        patience = sum(backoff(config, n) for n in range(attempts, config.max_attempts))
        waits = wait <= patience and failure.verdict is Verdict.RATE_LIMITED and not config.eager
        place, patience = (stay, patience) if waits else (last, 0.0)
        turn = Turn(turn.row, turn.model, turn.label, attempts, now + wait, patience)
        place.append(turn)
    return stay + last


# --- 5. Wire format: requests, answers in one piece, event streams. Pure ------------------------


def request_body(fields: Json, turn: Turn) -> bytes:
    """The request for this candidate, with the defaults of its row. ValueError if JSON cannot carry
    it. Lone surrogates are replaced: Cerebras refuses them (2026-09).
    """
    body = {"model": turn.model}
    for word, parameters in turn.row.defaults.items():
        body.update(parameters if word in turn.model else {})
    try:
        text = json.dumps({**body, **fields}, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the question cannot be sent as JSON: {error}") from None
    try:
        return text.encode()
    except UnicodeEncodeError:
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


class Reading:
    """What a reply has said so far: an event stream by the standard of server-sent events, or one
    plain body; the first line that is not a comment tells which. Bytes may be cut anywhere.
    """

    def __init__(self, now: float) -> None:
        self.status: int | None = None
        self.headers: Mapping[str, str] = {}  # names in lower case
        self.is_refused = False  # the body tells of a failure
        self.text: list[str] = []
        self.finish_reason = ""
        self.usage: Json = {}
        self.ended = False  # [DONE] was said, or a plain body is complete
        self._now = now
        self._rest = bytearray()  # a line whose end has not come, or the plain body
        self._is_plain: bool | None = None  # None: not known yet
        self._is_first = True  # a byte order mark may come
        self._kind, self._data = b"", []  # type: bytes, list[bytes]
        self._broken = self._refusal = ""  # what could not be read; why there is no answer
        self._thought = False
        self._opening: str | None = ""  # text held back: it is, or may become, <think>

    def judge(self, body: Any) -> Failure:
        return judge(self.status or 0, self.headers, body, self._now)

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        self.headers = {name.lower(): value for name, value in headers.items()}
        self.is_refused = not 200 <= status < 300
        self._is_plain = True if self.is_refused else None

    def feed(self, chunk: bytes) -> Iterator[str]:
        """The text of each event that these bytes complete, "" if it has none. Raises the Failure
        that an event tells of.
        """
        end = max(chunk.rfind(b"\n"), chunk.rfind(b"\r", 0, -1)) + 1  # CR LF may be cut in two
        if self._is_plain or not end:
            self._rest += chunk
            return
        lines = (bytes(self._rest) + chunk[:end]).splitlines()
        self._rest = bytearray(chunk[end:])
        yield from self._events(lines)

    def end(self) -> Iterator[str]:
        """The same for what is complete now that no more bytes will come."""
        if not self._is_plain:
            lines, self._rest = bytes(self._rest).splitlines(), bytearray()
            broken, is_whole = self._broken, bool(self.finish_reason)
            yield from self._events([*lines, b""])
            self._broken = broken if is_whole else self._broken  # half an event after the end
        if self._is_plain:
            yield self._past_thinking(self._take(b"", bytes(self._rest)))
            self.ended = True
        if self._opening and not is_blank(self._opening) and "<think>" not in self._opening:
            self.text.append(self._opening)
            yield self._opening

    def _events(self, lines: list[bytes]) -> Iterator[str]:
        if self._is_first and lines[0].startswith(codecs.BOM_UTF8):
            lines[0] = lines[0][3:]
        self._is_first = False
        for place, line in enumerate(lines):
            if line[:5] == b"data:":
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
                self._is_plain = False
            elif line[:6] == b"event:":
                self._kind, self._is_plain = line[6:].strip(), False
            elif not line:
                kind, data, self._kind, self._data = self._kind, self._data, b"", []
                if any(data) and not self.ended:
                    yield self._past_thinking(self._take(kind, b"\n".join(data)))
            elif self._is_plain is None and not re.match(rb"\s*$|:|(data|id|retry)(:|$)", line):
                self._is_plain = True
                self._rest[:0] = b"\n".join(lines[place:]) + b"\n"
                return

    def _take(self, kind: bytes, data: bytes) -> str:
        """The text in an event or a plain body; what else it says is noted."""
        if kind == b"ping":
            return ""
        if data.strip() in (b"[DONE]", b'"[DONE]"'):
            self.ended = True
            return ""
        if self.is_refused:
            raise self.judge(parsed(data))
        try:
            said = parsed(data.decode())
        except UnicodeDecodeError:
            raise Failure(Verdict.FAULT, "the answer is not UTF-8") from None
        choice, meta = dig(said, "choices", 0), dig(said, "x_groq")
        reason = dig(choice, "finish_reason")
        error = dig(said, "error") or dig(choice, "error") or dig(meta, "error")
        error = other_error(said) if choice is None and not error else error
        if error or kind == b"error" or reason == "error":
            native = dig(choice, "native_finish_reason") or "finish_reason error"
            error = error or (native if reason == "error" else said)
            raise self.judge({"error": error, "status_code": dig(said, "status_code")})
        if not isinstance(said, dict):
            self._broken = self._broken or "no answer in the reply: " + Evidence(said).said
        if isinstance(reason, str):
            self.finish_reason = reason or self.finish_reason
        usage = dig(said, "usage") or dig(meta, "usage")
        self.usage = figures(usage) if isinstance(usage, dict) else self.usage
        message = dig(choice, "delta") or dig(choice, "message")
        self._refusal += text_of(dig(message, "refusal"))
        thinking = dig(message, "reasoning") or dig(message, "reasoning_content")
        self._thought = self._thought or bool(thinking)
        return text_of(dig(message, "content"))

    def _past_thinking(self, text: str) -> str:
        """The text without <think>…</think>; "" as long as it may still begin with that."""
        if self._opening is not None:
            self._opening += text
            text = self._opening.lstrip()
            if text.startswith("<think>"):
                inside, closed, rest = text[7:].partition("</think>")
                self._thought, text = True, rest.lstrip()
                if not closed:
                    self._opening = "<think>" + inside[-7:]  # the tag may end in the next piece
            else:
                text = "" if "<think>".startswith(text) else self._opening
            self._opening = None if text else self._opening
        if text:
            self.text.append(text)
        return text

    def failure(self, live: bool) -> Failure | None:
        """Why this is no whole answer; None if it is one. Live, what was broken is skipped."""
        if self.finish_reason == "content_filter" or (self._refusal and not self.text):
            reason = self._refusal or "a content filter stopped the answer"
            return Failure(Verdict.REFUSED, reason)
        if self._broken and not (live and self.text):
            return Failure(Verdict.FAULT, self._broken)
        if not self.ended and not self.finish_reason:
            cut = "the answer was cut: it has no end" if self.text else "the reply holds no answer"
            return Failure(Verdict.FAULT, cut)
        if not is_blank("".join(self.text)):
            return None
        if self.finish_reason == "length":
            reason = "max_tokens was used up before the answer began: raise max_tokens"
            return Failure(Verdict.UNSUITABLE, reason)
        empty = "only reasoning came, no answer" if self._thought else "the answer is empty"
        return Failure(Verdict.FAULT, empty)


def other_error(said: Any) -> Any:
    """An error in a reply that has neither choices nor `error`: several, in a list, flat."""
    flat = said if isinstance(dig(said, "message"), str) else None
    return dig(said, "errors", 0) or dig(said, 0, "error") or flat


def text_of(content: Any) -> str:
    """The text of a message's content: a string, or a list of parts."""
    parts = [dig(part, "text") for part in content] if isinstance(content, list) else [content]
    return "".join(part for part in parts if isinstance(part, str))


def figures(usage: Json) -> Json:
    """The numbers of a usage report, two levels deep; whatever else is in it is left out."""
    inner = {k: dict(filter(is_figure, v.items())) for k, v in usage.items() if isinstance(v, dict)}
    return {k: inner.get(k, v) for k, v in usage.items() if is_figure((k, 0 if k in inner else v))}


def is_figure(item: tuple[str, Any]) -> bool:
    name, value = item
    is_number = isinstance(value, (int, float)) and -1e300 < value < 1e300
    return is_number and bool(re.fullmatch("[a-z_]{1,64}", name))


SECRETS = r"(?i)\b(csk-|gsk_|sk-)[\w-]{8,}|(?<=bearer )[\w.~+/=-]{8,}|(?<=://)[^/@\s]+(?=@)"


def clean(value: str | None) -> str:
    """A value without the quotes and white space that come along when it is pasted."""
    return (value or "").strip(" \t\r\n\"'")


def one_line(text: str, keys: Iterable[str | None] = (), limit: int = 300) -> str:
    """A server's text as one line that is safe to show: no control characters, keys or ids."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    for key in sorted(map(clean, keys), key=len, reverse=True):
        if len(key) >= 4:
            line = re.sub(re.escape(key), "[key]", line, flags=re.IGNORECASE)
    line = re.sub(SECRETS, "[key]", line)
    line = re.sub(r"\b(org|user)_\w+", r"\1_[id]", line)
    return line if len(line) <= limit else line[: limit - 1] + "…"


# --- 6. Memory: what outlives a question --------------------------------------------------------


@dataclasses.dataclass(eq=False, repr=False)
class Mark:
    """Failures of a provider, or of one of its models, since its last success."""

    verdict: Verdict
    failures: int = 0
    failed_at: float = -math.inf
    ready_at: float = -math.inf  # the server's word: nobody asks before
    later_until: float = -math.inf  # our own guess: asked last until then
    probed_until: float = -math.inf  # the lease of somebody who is trying: the others ask it last


class Memory:
    """Marks by (provider, model); the model "" stands for all of a provider's. Not locked."""

    def __init__(self) -> None:
        self._marks: dict[tuple[str, str], Mark] = {}
        self._seen: dict[str, ProviderHealth] = {}  # the facts; the status is derived

    def keys(self, turn: Turn) -> list[tuple[str, str]]:
        """The keys of the marks that there are for this candidate."""
        keys = ((turn.row.name, ""), (turn.row.name, turn.model))
        return [key for key in keys if key in self._marks]

    def of(self, turn: Turn) -> list[Mark]:
        return [self._marks[key] for key in self.keys(turn)]

    def arrange(self, line: list[Turn], now: float) -> list[Turn]:
        """The line with the servers' pauses in it; of the untried, those to be asked later last."""
        if not self._marks:
            return line
        first, last = [], []  # type: list[Turn], list[Turn]
        for turn in line:
            marks = self.of(turn)
            pause = max([turn.ready_at, *(mark.ready_at for mark in marks)])
            later = any(now < max(mark.later_until, mark.probed_until) for mark in marks)
            (last if later and not turn.attempts else first).append(
                dataclasses.replace(turn, ready_at=pause)
            )
        return first + last

    def lease(self, turn: Turn, until: float) -> None:
        """Keeps others from a candidate that failed, while one tries it, until then at most."""
        for mark in self.of(turn):
            mark.probed_until = until

    def record(
        self,
        turn: Turn,
        failure: Failure | None,
        config: RetryConfig,
        since: float,
        now: float,
        epoch: float,
    ) -> None:
        """How an attempt that began at `since` has ended. A success forgives what failed before it
        began; failures that were under way together count as one.
        """
        self.lease(turn, now)
        seen = self._seen.setdefault(turn.row.name, ProviderHealth())
        if failure is None:
            seen.last_success, seen.consecutive_failures = epoch, 0
            for key in self.keys(turn):
                if self._marks[key].failed_at <= since:
                    del self._marks[key]
        elif failure.verdict.asked_last is not None and not failure.blameless:
            key = (turn.row.name, "" if failure.wide else turn.model)
            mark = self._marks.setdefault(key, Mark(failure.verdict))
            counts = since >= mark.failed_at
            mark.failures += counts
            seen.consecutive_failures += counts
            pause = failure.verdict.asked_last or backoff(config, mark.failures)
            mark.verdict, mark.failed_at, mark.later_until = failure.verdict, now, now + pause
            mark.ready_at = max(mark.ready_at, now + (failure.hint or 0.0))
            seen.last_failure = epoch

    def pause(self, line: list[Turn], now: float) -> float | None:
        """Seconds until the first of them may be asked again, by the servers' word."""
        ends = [max((mark.ready_at for mark in self.of(turn)), default=now) for turn in line]
        return min((end - now for end in ends if end > now), default=None)

    def health(self, provider: str, has_key: bool, now: float, epoch: float) -> ProviderHealth:
        """What is known of the provider now, by its latest failure since its last success."""
        health = dataclasses.replace(self._seen.get(provider, ProviderHealth()))
        marks = [mark for (name, _), mark in self._marks.items() if name == provider]
        mark = max(marks, key=lambda mark: mark.failed_at, default=None)
        if not has_key or (mark and mark.verdict is Verdict.DENIED):
            health.status = ProviderStatus.UNAVAILABLE
        elif mark and health.consecutive_failures and mark.verdict is Verdict.RATE_LIMITED:
            left = max(mark.ready_at, mark.later_until) - now
            health.rate_limit_reset_time = epoch + left
            health.status = ProviderStatus.RATE_LIMITED if left > 0 else ProviderStatus.HEALTHY
        elif mark and health.consecutive_failures:
            health.status = ProviderStatus.FAILED
        return health


# --- 7. HTTP ------------------------------------------------------------------------------------


class Limits:
    """How long an exchange may go on: to the question's deadline, and not through a silence."""

    def __init__(self, clock: Callable[[], float], silence: float, deadline: float) -> None:
        self._clock, self._silence, self._deadline = clock, silence, deadline
        self.finished = False  # whatever breaks from now on does not matter
        self._until = clock() + silence

    def progress(self) -> None:
        """The server has said something."""
        if not self.finished:
            self._until = self._clock() + self._silence

    def finish(self, grace: float) -> None:
        """All that matters has come; the rest has so many seconds."""
        until = self._clock() + min(grace, self._silence)
        self._until = min(self._until, until) if self.finished else until
        self.finished = True

    def left(self) -> float:
        """Seconds that the next read may take; raises a Failure when nothing is left."""
        left = min(self._until, self._deadline) - self._clock()
        if left <= 0 and not self.finished:
            raise self.failure()
        return left

    def failure(self, reason: str = "", wide: bool = True) -> Failure:
        """That the question's time is up, or else this reason, or silence."""
        if self._clock() >= self._deadline - 0.01:  # a socket may time out a little early
            return Failure(Verdict.FAULT, "the question's time limit is up", blameless=True)
        return Failure(Verdict.FAULT, reason or f"silent for {self._silence:g} s", wide)


HEADERS = {
    "User-Agent": "fallback_llm/" + __version__,  # those of libraries get a 403 (2026-09)
    "Accept": "text/event-stream, application/json",
    "Accept-Encoding": "identity",
    "Content-Type": "application/json",
}


class Transport:
    """The one place that talks HTTP. One request is one exchange: nothing is sent again, no
    redirect is followed.
    """

    def __init__(self, session: requests.Session | None) -> None:
        self.session = session
        self._templates: dict[Any, Any] = {}
        self._lock = threading.Lock()

    @staticmethod
    def load() -> None:
        """Imports requests, which takes as long as some questions."""
        import requests  # noqa: F401

    def exchange(
        self, url: str, key: str | None, body: bytes | None, reading: Reading, limits: Limits
    ) -> Iterator[bytes]:
        """Posts the body (None: a GET), notes the reply's status and headers in `reading`, and
        yields its body as it comes, decompressed. Raises a Failure when none comes, or it is cut,
        silent or endless.
        """
        import zlib
        from http.client import HTTPException

        from requests import RequestException  # not before: it costs six times all the rest
        from urllib3.exceptions import HTTPError

        try:
            with contextlib.closing(self._send(url, key, body, limits)) as reply:
                reading.begin(reply.status_code, reply.headers)
                if reading.is_refused:
                    limits.finish(ERROR_BODY_TIME)
                packed = re.search("(?i)gzip|deflate", reading.headers.get("content-encoding", ""))
                unpack, size = zlib.decompressobj(47) if packed else None, 0  # 47: either of them
                for chunk in self._chunks(reply, limits):
                    data = unpack.decompress(chunk, MAX_BODY) if unpack else chunk
                    size += len(data)
                    if size >= MAX_BODY:
                        raise Failure(Verdict.FAULT, f"the reply is longer than {MAX_BODY} bytes")
                    yield data
                if unpack and not unpack.eof and not limits.finished:
                    raise Failure(Verdict.FAULT, "the answer was cut: half of a compressed body")
        except (
            OSError,
            ValueError,
            HTTPException,
            HTTPError,
            RequestException,
            zlib.error,
        ) as error:
            if not limits.finished:
                reason = (
                    re.sub(r"<\S+ object at 0x\w+>:? ?", "", str(error)) or type(error).__name__
                )
                silent = reading.status is not None and reason.endswith("timed out")
                wide = reading.status is None or silent
                raise limits.failure("" if silent else reason, wide) from None

    def _send(self, url: str, key: str | None, body: bytes | None, limits: Limits) -> Any:
        """The reply, a requests.Response whose body is unread. Through the session's adapters, not
        `Session.send`: that looks up proxies, netrc and cookies at every call (half the time of a
        warm one), and reads all of a redirect's body.
        """
        with self._lock:
            kind = (url, key, body is None)
            if kind not in self._templates:
                self._templates[kind] = self._template(*kind)
            adapter, template, settings = self._templates[kind]
        request = template.copy()
        if body is not None:
            request.body = body
            request.headers["Content-Length"] = str(len(body))
        timeout = (min(CONNECT_TIMEOUT, limits.left()), limits.left())
        return adapter.send(request, stream=True, timeout=timeout, **settings)

    def _template(self, url: str, key: str | None, is_get: bool) -> Any:
        """What all requests of a kind share: the adapter, the request without its body, what the
        environment says of proxies and certificates.
        """
        import requests
        from requests.adapters import HTTPAdapter

        if self.session is None:
            self.session = requests.Session()
            for scheme in ("https://", "http://"):
                self.session.mount(scheme, HTTPAdapter(pool_maxsize=POOL_WIDTH, max_retries=0))

        def bearer(request: requests.PreparedRequest) -> requests.PreparedRequest:
            request.headers.update({"Authorization": "Bearer " + key} if key else {})
            return request

        # auth is a callable, because an entry in ~/.netrc would replace a header
        request = requests.Request("GET" if is_get else "POST", url, HEADERS, auth=bearer).prepare()
        settings: Any = self.session.merge_environment_settings(url, {}, None, None, None)
        del settings["stream"]
        return self.session.get_adapter(url), request, settings

    @staticmethod
    def _chunks(reply: Any, limits: Limits) -> Iterator[bytes]:
        """What each read of the socket gives. Below urllib3, whose reads wait for a full block and
        keep the time limit that they began with.
        """
        source = getattr(reply.raw, "_fp", None)
        if source is None or not hasattr(source, "read1"):  # a server in a test
            for chunk in reply.iter_content(65536):
                limits.left()
                yield chunk
            return
        sock = getattr(getattr(getattr(source, "fp", None), "raw", None), "_sock", None)
        chunk = b" "
        while chunk and getattr(source, "fp", source) is not None:  # None: read to the end
            left = limits.left()
            if left <= 0:
                return
            if sock is not None:
                sock.settimeout(left)
            chunk = source.read1(65536)
            yield chunk
        if getattr(source, "length", None) and reply.status_code < 300:
            raise Failure(Verdict.FAULT, "the answer was cut: shorter than its Content-Length")
        source.close()
        reply.raw.release_conn()


# --- 8. FallbackLLM -----------------------------------------------------------------------------

PLACEHOLDER = (
    r"(?i)your[_ -].*|.*[_ -]here|<.*>|change.?me|replace.?me|x{3,}|.*\.{3}|todo|none|null"
)


def settings_of(names: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """(values by name, names that hold only a placeholder): from the environment, ./.env and the
    .env beside this file, in this order. Nothing else is taken from a .env, nothing is set.
    """
    here = os.path.dirname(os.path.abspath(globals().get("__file__", ".env")))
    paths = dict.fromkeys([os.path.abspath(".env"), os.path.join(here, ".env")])
    sources = [os.environ, *(_dotenv(path) for path in paths if os.path.isfile(path))]
    values, placeholders = {}, set()
    for name in names:
        found = list(filter(None, (clean(source.get(name)) for source in sources)))
        values[name] = next((v for v in found if not re.fullmatch(PLACEHOLDER, v)), "")
        placeholders |= {name} if found and not values[name] else set()
    return values, placeholders


def _dotenv(path: str) -> Mapping[str, str | None]:
    """The variables in a .env file; one warning if it cannot be read."""
    import io

    problem = "cannot be read: save it as UTF-8"
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        from dotenv import dotenv_values

        if "\0" not in text:
            return dotenv_values(stream=io.StringIO(text), interpolate=False)
    except ImportError:
        problem = "is not read: pip install python-dotenv"
    except (OSError, ValueError):
        pass
    logger.warning("⚠️  %s %s", path, problem)
    return {}


def base_url(row: Provider) -> str:
    """The URL to put paths behind: of the environment or the row, whose path it gets if it has
    none. ValueError unless it is https, or http to this machine.
    """
    name = row.variable("BASE_URL")
    url = (clean(os.environ.get(name)) or row.base_url).rstrip("/")
    host = r"(?i)(https://[\w.-]+|https?://(localhost|127(\.\d+){3}|\[::1\]))(:\d{1,5})?"
    if not re.fullmatch(host + r"(/[^\s?#@]*)?", url):
        allowed = "https://..., or http:// to this machine"
        shown = one_line(re.sub(r"//.*@|[?#].*", "//...", url))  # a key may be in it
        raise ValueError(f"{name} must be {allowed}, not {shown!r}")
    path = row.base_url.partition("://")[2].partition("/")[2]
    return f"{url}/{path}".rstrip("/") if re.fullmatch(host, url) else url


STATISTICS = (
    "total_requests",
    "successful_requests",
    "failed_requests",
    "rate_limited_requests",
    "provider_switches",
)


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
        providers, given = tuple(providers), dict(api_keys or {})
        self._settings = dict(locals())
        for name in ("self", "session", "given"):
            del self._settings[name]
        self.retry_config = RetryConfig() if retry_config is None else retry_config
        self.timeout = timeout if timeout is None else checked("timeout", timeout)
        self._clock, self._wall_clock, self._sleep, self._chance = clock, wall_clock, sleep, chance
        self._rows: dict[str, Provider] = {}
        for row in providers:
            quiet = row.silence if silence is None else silence
            self._rows[row.name] = dataclasses.replace(row, base_url=base_url(row), silence=quiet)
        lists = {row.name: row.variable("MODELS") for row in providers}
        names = [row.key_env for row in providers if row.key_env]
        found, self._placeholders = settings_of([*names, *lists.values()])
        self.models = {
            name: [model.strip() for model in found[variable].split(",") if model.strip()]
            or list(self._rows[name].models)
            for name, variable in lists.items()
        }
        self._found = {row.name: found.get(row.key_env or "") or None for row in providers}
        self.api_keys = {**self._found, **{self.rows([k])[0].name: given[k] for k in given}}
        self.fallback_order = list(self._rows)
        self._transport, self._memory = Transport(session), Memory()
        self._discovered: set[str] = set()  # providers that were asked what they serve
        self._lock, self._discovery = threading.Lock(), threading.Lock()
        self._stats = [0] * len(STATISTICS)

    def __getstate__(self) -> Json:
        """The settings; of the keys only those that this object was given."""
        changed = {k: v for k, v in self.api_keys.items() if v != self._found.get(k)}
        keys = {**(self._settings["api_keys"] or {}), **changed}
        settings = {**self._settings, "api_keys": keys, "retry_config": self.retry_config}
        return {"settings": settings, "fallback_order": self.fallback_order, "models": self.models}

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
        walk = self._walk(self.checked_question(question, max_tokens, provider, **more), live=False)
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
        return self._walk(self.checked_question(question, max_tokens, provider, **more), live=True)

    def ask_many(
        self, questions: Iterable[Any], max_workers: int = 8, **more: Any
    ) -> Iterator[Answer | FallbackLLMError]:
        """For each question an Answer, or the error in its place; in their order, lazily.

        questions: strings, or dicts of `complete`'s arguments, read only as far as needed. more:
        arguments for all of them. ValueError where a question cannot be meant.
        """
        from collections import deque
        from concurrent.futures import ThreadPoolExecutor

        pool, futures = ThreadPoolExecutor(checked("workers", max_workers)), deque()  # type: ignore
        try:
            for question in questions:
                asked = question if isinstance(question, dict) else {"question": question}
                futures.append(pool.submit(self.result, {**more, **asked}))
                if len(futures) > 4 * max_workers:  # a slow answer does not stop the others
                    yield futures.popleft().result()
            while futures:
                yield futures.popleft().result()
        finally:
            for future in futures:
                future.cancel()
            pool.shutdown()

    def result(self, arguments: Json) -> Answer | FallbackLLMError:
        """What `complete` returns or raises for these arguments."""
        try:
            return self.complete(**arguments)
        except FallbackLLMError as error:
            return error

    # The walk

    def _walk(self, question: Question, live: bool) -> Generator[str, None, Answer]:
        """Asks whoever is next until one answers; text comes out as it comes in, if live."""
        self._transport.load()  # the question's time does not begin before
        started, answered, slept = self._clock(), False, 0.0
        deadline = started + question.timeout
        line, last, trail = question.line, None, []  # type: list[Turn], Turn | None, list[Attempt]
        try:
            while True:
                line, turn, wait = self._choose(line, deadline)
                if turn is None:
                    raise self._all_failed(question.line, trail)
                tell_next(last, turn, wait)
                slept += wait
                if wait and self._is_held_after(wait, turn):
                    continue
                begun = self._clock()
                reading, failure = yield from self._attempt(turn, question, deadline, live)
                trail.append(self._recorded(turn, reading, failure, slept, begun))
                slept = 0.0
                if failure is None:
                    answered, elapsed = True, self._clock() - started
                    return answer_of(turn, reading, trail, elapsed)
                stop_if_final(turn, failure, reading.text if live else [], trail)
                now, chance = self._clock(), self._chance()
                line = line_after(line, turn, failure, self.retry_config, now, chance)
                line += self._served_instead(turn.row, line, question, trail, deadline)
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
            turn, wait = next_turn(line, now, limit) or (None, 0.0)
            if turn is None or now + wait >= deadline:
                return line, None, 0.0
            self._memory.lease(turn, now + wait + turn.row.silence + CONNECT_TIMEOUT)
            return line, turn, wait

    def _is_held_after(self, wait: float, turn: Turn) -> bool:
        """Sleeps. Whether another thread was meanwhile told to leave this candidate alone."""
        self._sleep(wait)
        with self._lock:
            pause = self._memory.pause([turn], self._clock())
        return pause is not None and pause > 0.01  # less is the clock's rounding

    def _attempt(
        self, turn: Turn, question: Question, deadline: float, live: bool
    ) -> Generator[str, None, tuple[Reading, Failure | None]]:
        """One exchange: what was read, and why it is no answer (None: it is one)."""
        reading = Reading(self._wall_clock())
        limits = Limits(self._clock, turn.row.silence, deadline)
        try:
            body = request_body(question.fields, turn)
            for chunk in self._exchange(turn.row, "/chat/completions", body, reading, limits):
                for text in reading.feed(chunk):
                    if live and text:
                        yield text
                    limits.progress()  # after the yield: the caller's time is not the server's
                if reading.finish_reason or reading.ended:
                    limits.finish(0.1 if reading.ended else GRACE)
            for text in reading.end():
                if live and text:
                    yield text
            return reading, reading.failure(live)
        except Failure as failure:
            return reading, failure

    def _exchange(
        self, row: Provider, path: str, body: bytes | None, reading: Reading, limits: Limits
    ) -> Iterator[bytes]:
        return self._transport.exchange(row.base_url + path, self._key(row), body, reading, limits)

    def _recorded(
        self, turn: Turn, reading: Reading, failure: Failure | None, wait: float, begun: float
    ) -> Attempt:
        """The attempt as it stands in the trail. Remembers it, and tells how it ended."""
        now, epoch = self._clock(), self._wall_clock()
        if reading.finish_reason not in ("stop", "length", ""):
            reading.finish_reason = self._shown(reading.finish_reason)
        if failure is not None:
            failure.reason = self._shown(failure.reason)
        with self._lock:
            self._memory.record(turn, failure, self.retry_config, begun, now, epoch)
        tell_result(turn, failure, self.retry_config)
        verdict, reason = (failure.verdict, failure.reason) if failure else (None, "")
        names = (turn.row.name, turn.model, turn.attempts + 1)
        return Attempt(*names, reading.status, verdict, reason, wait, now - begun)

    def _all_failed(self, line: list[Turn], trail: list[Attempt]) -> AllProvidersFailed:
        with self._lock:
            pause = self._memory.pause(line, self._clock())
        reasons = {attempt.provider: attempt.reason for attempt in trail}
        message = "All providers and models failed"
        message += "" if pause is None else f" (come back in {math.ceil(pause)} s)"
        message += "".join(f"; {name}: {reason}" for name, reason in reasons.items())
        return AllProvidersFailed(message, attempts=tuple(trail), retry_after=pause)

    # What providers serve

    def _served_instead(
        self,
        row: Provider,
        line: list[Turn],
        question: Question,
        trail: list[Attempt],
        until: float,
    ) -> list[Turn]:
        """Turns for models that the provider serves, once all its listed ones are gone."""
        tried = [attempt for attempt in trail if attempt.provider == row.name]
        gone = {attempt.model for attempt in tried if attempt.verdict is Verdict.GONE}
        listed = {turn.model for turn in question.line if turn.row is row}
        if question.is_chosen or not gone.issuperset(listed):
            return []
        with self._discovery:  # whoever comes meanwhile waits for what is found
            if row.name not in self._discovered and gone.issuperset(self.models[row.name]):
                self._discovered.add(row.name)
                served = [model for model in self.served(row, until) if model not in gone][:5]
                self.models[row.name] = served or self.models[row.name]
                if served:
                    words = (row.name, ", ".join(sorted(gone)), ", ".join(served))
                    end = f"to choose, set {row.variable('MODELS')}=a,b"
                    logger.warning("🔎 %s: gone: %s; used instead: %s; %s", *words, end)
        known = {attempt.model for attempt in tried} | {turn.model for turn in line}
        return [turn for turn in turns(row, self.models[row.name]) if turn.model not in known]

    def served(self, row: Provider, until: float = math.inf) -> list[str]:
        """The chat models in the provider's own list; none where it cannot be asked."""
        models = chat_models(self._get(row, "/models", until)[1], row.free_only)
        return [m for m in models if self._shown(m) == m]  # it may hold a key

    def check(self, row: Provider) -> Json:
        """Whether the key is accepted and which listed models are served; costs no tokens."""
        started, listed = self._clock(), self.models[row.name]
        wrong, body = self._get(row, row.key_path)
        if not wrong and row.key_path != "/models":
            wrong, body = self._get(row, "/models")
        ids = [dig(model, "id") for model in entries(body)]
        key = "refused" if re.match("40[123] ", wrong) else "not checked" if wrong else "accepted"
        return {
            "provider": row.name,
            "key": "missing" if self.key_problem(row) else key,
            "seconds": round(self._clock() - started, 3),
            "served": [model for model in listed if model in ids],
            "not_served": [model for model in listed if model not in ids and not wrong],
            "reason": wrong,
        }

    def _get(self, row: Provider, path: str, until: float = math.inf) -> tuple[str, Any]:
        """("", the JSON) of a GET, or (what was wrong, None)."""
        if self.key_problem(row):
            return f"{row.key_env} {self.key_problem(row)}", None
        reading = Reading(self._wall_clock())
        until = min(until, self._clock() + 2 * CONNECT_TIMEOUT)
        limits = Limits(self._clock, row.silence, until)
        try:
            body = parsed(b"".join(self._exchange(row, path, None, reading, limits)))
            if reading.status == 200 and isinstance(body, dict):
                return "", body
            failure = reading.judge(body)
        except Failure as caught:
            failure = caught
        return self._shown(failure.reason), None

    # Statistics and health

    def _tally(self, trail: list[Attempt], answered: bool) -> None:
        """Counts a question, by its trail."""
        switches = sum(a.provider != b.provider for a, b in zip(trail, trail[1:]))
        limited = sum(attempt.status == 429 for attempt in trail)
        counts = (1, int(answered), int(not answered), limited, switches)
        with self._lock:
            self._stats = [old + new for old, new in zip(self._stats, counts)]

    def get_stats(self) -> dict[str, int]:
        """Counts since the last reset. A request is a question; 429 replies are rate-limited."""
        with self._lock:
            return dict(zip(STATISTICS, self._stats))

    def reset_stats(self) -> None:
        with self._lock:
            self._stats = [0] * len(STATISTICS)

    @property
    def provider_health(self) -> dict[str, ProviderHealth]:
        """What is known of each provider now."""
        with self._lock:
            times, health = (self._clock(), self._wall_clock()), self._memory.health
            return {
                k: health(k, not self.key_problem(row), *times) for k, row in self._rows.items()
            }

    # What the caller asks for

    def checked_question(
        self, question: Any = None, max_tokens: Any = 500, provider: Any = None, **fields: Any
    ) -> Question:
        """The question, checked. ValueError for what cannot be meant; NoProviderError."""
        for name in {"tools", "stream", "n"}.intersection(fields):
            raise ValueError(f"{name} is not supported")
        model, timeout, more = fields.pop("model", None), fields.pop("timeout", None), bool(fields)
        said = conversation(question, fields.pop("system", None), fields.pop("messages", None))
        fields = {name: value for name, value in fields.items() if value is not None}
        if "max_completion_tokens" not in fields:
            fields["max_tokens"] = max_tokens
        for name in {"max_tokens", "temperature"}.intersection(fields):
            checked(name, fields[name])
        timeout = self.timeout if timeout is None else checked("timeout", timeout)
        line = self._line(provider, model)
        fields.update(messages=said, stream=True)
        if more:
            request_body(fields, line[0])  # ValueError for what JSON cannot carry
        return Question(fields, line, math.inf if timeout is None else timeout, model is not None)

    def _line(self, provider: Any, model: Any) -> list[Turn]:
        """The candidates, in the order they are asked."""
        rows = self.rows(provider)
        if model is not None and (not isinstance(model, str) or is_blank(model)):
            raise ValueError(f"model must be the id of a model, not {model!r:.60}")
        prefix, _, rest = (model or "").partition(":")
        if rest and prefix.strip().lower() in self._rows:
            model, named = rest.strip(), self.rows(prefix)
            if provider is not None and named[0] not in rows:
                raise ValueError(f"model {prefix}:{model} is not of provider {provider!r}")
            rows = named
        elif model:
            rows = [row for row in rows if model in self.models[row.name]] or rows
        keyed = [row for row in rows if not self.key_problem(row)]
        if not keyed:
            problems = "; ".join(f"{row.key_env} {self.key_problem(row)}" for row in rows)
            names = tuple(row.name for row in rows)
            raise NoProviderError(f"no API key: {problems}", providers=names)
        lists = [turns(row, [model] if model else self.models[row.name]) for row in keyed]
        if not any(lists):
            raise ValueError(
                f"models must name one: {', '.join(row.name for row in keyed)} has none"
            )
        return [turn for listed in lists for turn in listed]

    def rows(self, provider: Any = None) -> list[Provider]:
        """The rows of these providers (None: of all), in the order they are asked."""
        names = self.fallback_order if provider is None else provider
        split = names.split(",") if isinstance(names, str) else names
        several = isinstance(split, (list, tuple))
        rows = {str(name).strip().lower(): None for name in (split if several else [names])}
        if not rows or not rows.keys() <= self._rows.keys():
            known = ", ".join(self._rows)
            raise ValueError(f"provider must be one or more of {known}, not {names!r:.60}")
        return [self._rows[name] for name in rows]

    def _shown(self, text: str) -> str:
        """A server's text as it may be shown: a safe line without our keys."""
        return one_line(text, self.api_keys.values())

    def _key(self, row: Provider) -> str | None:
        return clean(self.api_keys.get(row.name)) or None

    def key_problem(self, row: Provider) -> str:
        """Why there is no key to use for this row; "" if there is one, or none is needed."""
        key = self._key(row)
        if key:
            usable = re.fullmatch(r"[!-~]+", key)
            return "" if usable else "contains a character that cannot be in a key"
        holds = "holds a placeholder" if row.key_env in self._placeholders else "is not set"
        return holds if row.key_env else ""

    def close(self) -> None:
        """Closes the connections that are kept alive."""
        if self._transport.session is not None:
            self._transport.session.close()


def turns(row: Provider, models: list[str]) -> list[Turn]:
    return [Turn(row, model, f"{place}/{len(models)}") for place, model in enumerate(models, 1)]


def answer_of(turn: Turn, reading: Reading, trail: list[Attempt], elapsed: float) -> Answer:
    text, reason = "".join(reading.text), reading.finish_reason or None
    names = (turn.row.name, turn.model)
    return Answer(text, *names, reason, reading.usage, tuple(trail), elapsed)


def stop_if_final(turn: Turn, failure: Failure, shown: list[str], trail: list[Attempt]) -> None:
    """Raises what no other candidate can mend: text was shown, or the question is refused."""
    name, attempts = {"provider": turn.row.name, "model": turn.model}, tuple(trail)
    if shown:
        message = f"{turn.row.name} {turn.model} broke off: {failure.reason}"
        raise StreamInterrupted(message, attempts=attempts, partial="".join(shown), **name)
    if failure.verdict is Verdict.REFUSED:
        message = f"{turn.row.name} refused the question: {failure.reason}"
        raise AnswerRefused(message, attempts=attempts, reason=failure.reason)


NO_CHAT = r"(?i)whisper|tts|speech|audio|guard|embed|rerank|moderation|image|ocr"


def chat_models(listed: Any, free_only: bool) -> list[str]:
    """Ids in a provider's list of models that answer text with text, by what each entry says
    (fields of Groq 2026-09, OpenRouter 2026-10) or else by its name.
    """
    models = [model for model in entries(listed) if _is_chat(model)]
    return [model["id"] for model in models if not free_only or _is_free(model)]


def entries(listed: Any) -> list[Any]:
    models = dig(listed, "data")
    return models if isinstance(models, list) else []


def _is_chat(model: Any) -> bool:
    name = dig(model, "id") if isinstance(dig(model, "id"), str) else ""
    kinds = dig(model, "output_modalities") or dig(model, "architecture", "output_modalities")
    small = number(dig(model, "context_window") or dig(model, "context_length")) <= 4096
    named = re.fullmatch(r"[\w./:@~+-]{1,200}", name) and not re.search(NO_CHAT, name)
    return (
        bool(named)
        and kinds in (None, ["text"])
        and not small
        and dig(model, "active") is not False
    )


def _is_free(model: Any) -> bool:
    prices = dig(model, "pricing")
    return isinstance(prices, dict) and {number(price) for price in prices.values()} == {0.0}


def tell_next(last: Turn | None, turn: Turn, wait: float) -> None:
    """The documented lines before an attempt."""
    same = last is not None and (last.row, last.model) == (turn.row, turn.model)
    if last is not None and not same:
        logger.info("🔄 %s %s failed, trying next model...", last.row.name, last.model)
    if wait:
        logger.info("⏳ Waiting %.2fs before retry...", wait)
    if last is None or last.row is not turn.row:
        logger.info("🔄 Trying provider: %s", turn.row.name)
    if not same:
        logger.info("🎯 Trying %s model %s: %s", turn.row.name, turn.label, turn.model)


def tell_result(turn: Turn, failure: Failure | None, config: RetryConfig) -> None:
    """The documented lines after an attempt."""
    name, count = (turn.row.name, turn.model), turn.attempts + 1
    if failure is None:
        logger.info("✅ Success with %s %s on attempt %d", *name, count)
        return
    logger.warning("❌ Error in %s API request: %s", turn.row.name, failure.reason)
    if failure.verdict is Verdict.DENIED and turn.row.key_env:
        logger.warning("🔑 Check %s and the account: %s", turn.row.key_env, turn.row.key_url)
    if failure.verdict.again and count >= config.max_attempts:
        logger.info("🔄 %s %s exhausted all %d retry attempts", *name, count)


# --- 9. Command line ----------------------------------------------------------------------------

OPTIONS = re.findall(r"^  (?:(-\w), )?(--[\w-]+)(?: ([A-Z]+))?(?:  |$)", HELP, re.MULTILINE)
CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])


class Usage(Exception):
    """Wrong usage: one line, exit code 2. Messages name parameters; they are shown as flags."""

    def __str__(self) -> str:
        names = r"max_tokens|max_attempts|base_delay|max_delay|timeout|temperature|workers"
        names = rf"^(provider|model)\b|(?<![\w./-])({names})\b(?!\.)"
        return re.sub(names, lambda m: "--" + m.group().replace("_", "-"), super().__str__())


def main(argv: list[str] | None = None) -> int:
    """Runs the program. The exit code; Ctrl-C ends the process by its signal."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        return run(parse(sys.argv[1:] if argv is None else argv))
    except (Usage, ValueError) as error:
        say(f"error: {error if isinstance(error, Usage) else Usage(error)}")
        return 2
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C kills at once
        say("\nInterrupted.")
        os.kill(os.getpid(), signal.SIGINT)  # an exit code would not stop a shell's loop
        return 130
    except ImportError as error:
        say(f"missing package: {error.name} - run: pip install requests python-dotenv")
    except OSError as error:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            # what stdout still holds goes nowhere, or the interpreter's end would complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 141
        say(f"error: {error.strerror or error}")
    return 1


def parse(argv: list[str]) -> Any:
    """The options, as the lines of `HELP` have them; numbers are checked."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            raise Usage(message + meant(message))

    parser = Parser(prog="fallback_llm.py", usage="", add_help=False, allow_abbrev=False)
    parser.add_argument("question", nargs="*")
    for short, name, value in OPTIONS:
        action = "store" if value else "store_true"
        parser.add_argument(*filter(None, (short, name)), action=action)
    words: list[str] = []
    for word in argv:  # a number may begin with a dash: --base-delay -inf
        flag = words[-1].replace("-", "_") if words and "--" not in words else ""
        if flag.startswith("__") and flag[2:] in NUMBERS:
            words[-1] += "=" + word
        else:
            words.append(word)
    # the intermixed parse takes flags anywhere, but does not know "--"
    args = (parser.parse_args if "--" in words else parser.parse_intermixed_args)(words)
    check_options(args)
    return args


def check_options(args: Any) -> None:
    """Makes numbers of texts. Usage for a wrong one, and for options that exclude each other."""
    for name in set(NUMBERS).intersection(vars(args)):
        text = getattr(args, name)
        try:
            setattr(args, name, text if text is None else checked(name, NUMBERS[name][0](text)))
        except ValueError:
            raise Usage(f"{name} must be {NUMBERS[name][3]}, not {text!r}") from None
    if args.quiet and args.verbose:
        raise Usage("--quiet: not allowed with --verbose")
    if args.batch is None and (args.output or args.workers):
        raise Usage("--output, --workers: only allowed with --batch")
    if args.question and (args.check or args.list_models):
        raise Usage(
            f"--check, --list-models: not allowed with a question: {args.question[0]!r:.60}"
        )


def meant(message: str) -> str:
    """What may have been meant by a flag that there is not."""
    unknown = re.search(r"unrecognized arguments:.*? (-\S+)", message)
    if not unknown:
        return ""
    from difflib import get_close_matches

    near = get_close_matches(unknown.group(1), [name for _, name, _ in OPTIONS], 1, 0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    return f" ({hint}a question that begins with - goes after --)"


class Stderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def say(line: str, end: str = "\n") -> None:
    """A line on stderr, without control characters; lost where there is no stderr."""
    try:
        if sys.stderr is not None:
            sys.stderr.write(line.translate(CONTROLS) + end)
            sys.stderr.flush()
    except (OSError, ValueError):  # full or closed
        sys.stderr = None


def put(text: str) -> None:
    """Writes to stdout, in pieces: one big write may not notice that the reader has gone."""
    for start in range(0, len(text), 4096):
        sys.stdout.write(text[start : start + 4096])
        sys.stdout.flush()


def to_json(value: Any) -> str:
    """A line of JSON; what terminals and encoders stumble over is escaped."""
    text = json.dumps(value, ensure_ascii=False) + "\n"
    return re.sub(
        "[\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda m: f"\\u{ord(m.group()):04x}", text
    )


def run(args: Any) -> int:
    """Does what the options say. The exit code."""
    if args.help or args.version:
        put(HELP if args.help else VERSION)
        return 0
    if sys.stdout is None:
        raise OSError("stdout is closed: there is no place for the answer")
    logger.addHandler(Stderr())
    logger.setLevel(logging.CRITICAL if args.quiet else logging.INFO)
    if args.verbose:
        say("🚀 Initializing Fallback LLM System...")
    given = {name: value for name, value in vars(args).items() if value is not None}
    config = {f.name: given[f.name] for f in dataclasses.fields(RetryConfig) if f.name in given}
    llm = FallbackLLM(RetryConfig(**config, jitter=not args.disable_jitter), timeout=args.timeout)
    with contextlib.closing(llm):
        for row in llm.rows(args.provider):
            if "character" in llm.key_problem(row) or (args.verbose and llm.key_problem(row)):
                say(f"⚠️  {row.key_env} {llm.key_problem(row)}")
        if args.check or args.list_models:
            return (print_check if args.check else print_models)(llm, args)
        names = ("provider", "model", "system", "temperature", "max_tokens")
        common = {name: given[name] for name in names if name in given}
        try:
            alone = args.batch is None
            return respond(llm, args, common) if alone else Batch(llm, args, common).run()
        except NoProviderError as error:
            explain(llm, args, error)
            return 1


def respond(llm: FallbackLLM, args: Any, common: Json) -> int:
    """Asks one question and prints the answer. 0 if there is one."""
    question, started = question_of(args), time.monotonic()
    if args.verbose:
        names = [row.name for row in llm.rows(args.provider) if not llm.key_problem(row)]
        say(f"✅ Available providers: {', '.join(names)}")
        say(f"❓ Question: {question}\n🤔 Thinking...")
    try:
        if args.stream and not args.json:
            result: Any = show(llm.stream(question, **common), args)
        else:
            result = llm.complete(question, **common)
            show(iter([] if args.json else [result.text]), args)
    except FallbackLLMError as error:
        result = error
    put(to_json(json_of(result, time.monotonic() - started)) if args.json else "")
    if isinstance(result, FallbackLLMError):
        explain(llm, args, result)
    elif not args.quiet:
        cut = result.finish_reason == "length"
        say(f"✂️  answer cut at --max-tokens {common.get('max_tokens', 500)}\n" * cut, end="")
        say(f"\n⏱️  Response time: {result.elapsed:.2f}s")
    if args.stats:
        show_stats(llm)
    return int(isinstance(result, FallbackLLMError))


def show(pieces: Iterator[str], args: Any) -> Any:
    """Prints the pieces as they come, no blank lines before and one line end after. What the
    iterator returns.
    """
    held, begun = "", False
    try:
        while True:
            held += next(pieces).translate(CONTROLS)
            if not begun and held.strip():
                held, begun = re.sub(r"\A\s*\n", "", held), True
                if not args.quiet:
                    say("\n💡 Response:")
            text = held.rstrip("\n") if begun else ""
            held = held[len(text) :]
            put(text)
    except StopIteration as end:
        return end.value
    finally:
        if begun:
            put("\n")


def show_stats(llm: FallbackLLM) -> None:
    counts = "".join(f"\n   {name}: {count}" for name, count in llm.get_stats().items())
    say("\n📊 Usage Statistics:" + counts)


def json_of(result: Any, elapsed: float) -> Json:
    """An Answer, or an error in its place, as JSON."""
    failed = isinstance(result, FallbackLLMError)
    trail = [dataclasses.asdict(attempt) for attempt in result.attempts]
    for step in trail:
        step["verdict"] = step["verdict"] and step["verdict"].word
        step.update({name: round(step[name], 3) for name in ("waited", "elapsed")})
    names = ("provider", "model", "finish_reason", "usage", "retry_after")
    found = {name: getattr(result, name, None) for name in names}
    return {
        "answer": None if failed else result.text,
        "error": str(result) if failed else None,
        **{name: None if value == "" else value for name, value in found.items()},
        "attempts": trail,
        "elapsed_seconds": round(elapsed, 3),
    }


ADVICE = {  # what to do next, by the verdict of a provider's last attempt
    Verdict.RATE_LIMITED: "wait for the limit to end",
    Verdict.FAULT: "try again later",
    Verdict.UNSUITABLE: "change the question or --max-tokens, or choose another model with -m",
    Verdict.GONE: "choose another model with -m, or set {models}",
    Verdict.DENIED: "check {key} and the account: {url}",
    Verdict.REFUSED: "change the question",
}


def explain(llm: FallbackLLM, args: Any, error: FallbackLLMError) -> None:
    """Tells of a failure in at most ten lines: one for each provider, then the sum."""
    rows, last = llm.rows(args.provider), {step.provider: step for step in error.attempts}
    if isinstance(error, NoProviderError):
        rows = llm.rows(error.providers)
        say("❌ No API keys found! Please set environment variables:")
        say("   " + ", ".join(str(row.key_env) for row in rows))
    elif args.quiet or not isinstance(error, AllProvidersFailed):
        return say(f"❌ {error}")
    for row in rows:
        problem, step = llm.key_problem(row), last.get(row.name)
        words = {"key": row.key_env, "url": row.key_url, "models": row.variable("MODELS")}
        if problem:
            say(f"   {row.name}: {row.key_env} {problem} → get a key: {row.key_url}")
        elif step and step.verdict:
            advice = ADVICE[step.verdict].format(**words)
            advice = "raise --timeout" if "time limit" in step.reason else advice
            say(f"   {row.name} {step.model}: {step.reason} → {advice}")
    if isinstance(error, NoProviderError):
        return say(f"   one is enough: export {rows[-1].key_env}=...   (or put it into .env)")
    if error.retry_after is not None:
        say(f"   the first limit ends in {math.ceil(error.retry_after)} s")
    return say("❌ All providers and models failed")


def print_check(llm: FallbackLLM, args: Any) -> int:
    """Prints which keys are accepted and which models are served. 0 if somebody can answer."""
    reports = [llm.check(row) for row in llm.rows(args.provider)]
    for report in reports if not args.json else ():
        line = "{provider}: key {key} ({seconds:.2f}s)".format(**report)
        for what in ("served", "not_served"):
            line += f"; {what.replace('_', ' ')}: {', '.join(report[what])}" if report[what] else ""
        put((line + f"; {report['reason']}" * bool(report["reason"])).translate(CONTROLS) + "\n")
    put(to_json(reports) if args.json else "")
    return int(not any(report["served"] for report in reports))


def print_models(llm: FallbackLLM, args: Any) -> int:
    """Prints the models that each provider serves, or where it cannot be asked, the listed."""
    pairs = []
    for row in llm.rows(args.provider):
        served = llm.served(row)
        if not served and not args.quiet:
            say(f"⚠️  {row.name} does not tell what it serves: these are the listed models")
        pairs += [(row.name, model) for model in served or llm.models[row.name]]
    if args.json:
        put(to_json([{"provider": name, "model": model} for name, model in pairs]))
    else:
        put("".join(f"{name}\t{model}\n" for name, model in pairs))
    return 0


def question_of(args: Any) -> str:
    """The text of a file, then of a pipe, then the words. Usage if there is nothing."""
    dash = args.question[:1] == ["-"]
    words, parts = " ".join(args.question[dash:]), []
    if args.file and args.file != "-":
        with opened("--file", args.file, "rb") as file:
            parts.append(decoded(file.read()))
    piped = sys.stdin is not None and not sys.stdin.isatty() and not args.no_stdin
    if dash or piped or args.file == "-":
        parts.append(decoded(stdin_bytes()))
    question = "\n\n".join(filter(None, (part.strip("\r\n") for part in [*parts, words])))
    if not is_blank(question):
        return question
    if args.question[dash:] or args.file or args.no_stdin:
        raise Usage("the question is empty")
    if dash or piped:
        raise Usage("no question: stdin was empty")
    examples = re.findall(r"^  (python .*)", HELP, re.MULTILINE)
    raise Usage("no question\n" + HELP.split("\n")[0] + "".join(f"\n  {line}" for line in examples))


def stdin_bytes() -> bytes:
    """All of stdin; after two silent seconds it is told that it is waited for."""
    stdin: Any = getattr(sys.stdin, "buffer", None)
    if stdin is None:
        return b""
    waiting = "waiting for piped input; use --no-stdin (or </dev/null) to skip"
    timer = threading.Timer(2.0, say, [waiting])
    timer.daemon = True
    timer.start()
    try:
        stdin.peek(1)
    finally:
        timer.cancel()
    found: bytes = stdin.read()
    return found


def decoded(data: bytes) -> str:
    """The text, whatever its byte order mark; what is not UTF-8 in it is replaced."""
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if utf16 else "utf-8-sig", "replace").replace("\0", "")


class Batch:
    """Questions from a file; each result is a line of JSON, written as it comes. The input is read
    twice: to check every line before anything is sent, and to ask. What the output has an answer
    for is not asked again.
    """

    def __init__(self, llm: FallbackLLM, args: Any, common: Json) -> None:
        self.llm, self.args, self.common = llm, args, common
        self.before: dict[Any, int] = {}  # answered by an earlier run: id -> hash of the question
        self.answered: dict[str, int] = {}  # by provider
        self.failed = self.total = 0
        self.write: Callable[[str], object] = put
        self.lock = threading.Lock()
        self.started = self.told = time.monotonic()
        self.redraws = sys.stderr is not None and sys.stderr.isatty()

    def run(self) -> int:
        """Asks what has no answer yet. 0 if now all have one."""
        if self.args.question or self.args.file:
            raise Usage("--batch takes its questions from its file: leave out question and --file")
        if not self.args.verbose:
            logger.setLevel(logging.CRITICAL)
        with contextlib.ExitStack() as stack:
            source = self.open_input(stack)
            if self.args.output:
                self.write = self.open_output(stack)
            self.total = sum(1 for _ in self.questions(source))
            self.ask(self.questions(source))
        if self.args.stats:
            show_stats(self.llm)
        if self.failed or not self.args.quiet:
            answered = sum(self.answered.values())
            line = f"{answered} answered, {self.failed} failed, {len(self.before)} answered before"
            say(line.ljust(79) if self.redraws else line)  # over the progress
        return int(self.failed > 0)

    def open_input(self, stack: contextlib.ExitStack) -> Any:
        """The input, as a file that can be read twice."""
        if self.args.batch != "-":
            return stack.enter_context(opened("--batch", self.args.batch, "rb"))
        import shutil
        import tempfile

        spool = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
        shutil.copyfileobj(sys.stdin.buffer, spool)
        return spool

    def open_output(self, stack: contextlib.ExitStack) -> Callable[[str], object]:
        """What adds a line. The file is ours alone; its failed and torn lines are dropped."""
        import shutil

        path = os.path.realpath(self.args.output)
        if path == os.path.realpath(self.args.batch):
            raise Usage(f"--output {path}: these are the questions")
        file = stack.enter_context(opened("--output", path, "ab+"))
        if os.path.isfile(path):
            part = f"{path}.{os.getpid()}.part"
            old, file = file, stack.enter_context(opened("--output", part, "xb"))
            stack.callback(lambda: os.path.exists(part) and os.unlink(part))  # type: ignore
            shutil.copymode(path, part)
            old.seek(0)
            for line in old:
                if line[:7] != b'{"id": '[: len(line)]:
                    raise Usage(f"--output {path}: not a file of answers, left as it is")
                said = parsed(line) if line.endswith(b"\n") else None
                name = dig(said, "id")
                is_done = isinstance(name, (str, int)) and dig(said, "answer") is not None
                if is_done and name not in self.before:
                    self.before[name] = hash_of(said or {})
                    file.write(line)
            file.flush()
            os.replace(part, path)
        # flushed, a line is one write of the system
        return lambda line: (file.write(line.encode()), file.flush())

    def questions(self, source: Any) -> Iterator[tuple[Any, Json]]:
        """(id, arguments) of each line that has no answer yet. Usage names a line that is wrong."""
        source.seek(0)
        seen = set()
        for place, line in enumerate(source, 1):
            text = decoded(line).strip()
            if not text:
                continue
            try:
                if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise ValueError("save the file as UTF-8")
                fields = json.loads(text) if text[0] == "{" else {"question": text}
                name = fields.pop("id", place)
                if not isinstance(name, (str, int)) or isinstance(name, bool) or name in seen:
                    raise ValueError(f"id must be a text or number of its own, not {name!r:.60}")
                seen.add(name)
                fields = {**self.common, **fields}
                self.llm.checked_question(**fields)
                if self.before.get(name, hash_of(fields)) != hash_of(fields):
                    raise ValueError(f"the output answers another question under id {name!r}")
            except (ValueError, TypeError, RecursionError) as error:
                raise Usage(f"--batch {self.args.batch}: line {place}: {error}") from None
            if name not in self.before:
                yield name, fields

    def ask(self, questions: Iterator[tuple[Any, Json]]) -> None:
        """Keeps the workers busy."""
        from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

        workers, futures, more = self.args.workers or 8, set(), True  # type: int, set[Any], bool
        pool = ThreadPoolExecutor(workers)
        try:
            while more or futures:
                while more and len(futures) < workers:
                    item = next(questions, None)
                    more = item is not None
                    futures |= {pool.submit(self.one, *item)} if item else set()
                done, futures = wait(futures, 0.5, FIRST_COMPLETED)
                for future in done:
                    future.result()  # raises what the worker met, such as a full disk
                self.tell()
        except KeyboardInterrupt:
            self.lock.acquire(timeout=0.3)  # nobody is in the middle of a line now
            raise

    def one(self, name: Any, fields: Json) -> None:
        """Asks a question and writes its line."""
        started = time.monotonic()
        found = json_of(self.llm.result(fields), time.monotonic() - started)
        with self.lock:
            said = {"messages": fields["messages"]} if "messages" in fields else {}
            said["question"] = fields.get("question")
            self.write(to_json({"id": name, **said, **found}))
            if found["error"] is None:
                self.answered[found["provider"]] = self.answered.get(found["provider"], 0) + 1
            else:
                self.failed += 1

    def tell(self) -> None:
        """The progress: one line, redrawn on a terminal, elsewhere a new one now and then."""
        now = time.monotonic()
        if self.args.quiet or now - self.told < (0.5 if self.redraws else 10):
            return
        self.told, done = now, sum(self.answered.values()) + self.failed
        rate = done / (now - self.started)
        left = f"{(self.total - done) / rate:.0f} s left" if rate else "no answer yet"
        line = f"{done}/{self.total} done, {self.failed} failed, {rate:.1f}/s, {left}"
        line += "".join(f"; {name} {count}" for name, count in sorted(self.answered.items()))
        say(line[:79].ljust(79) if self.redraws else line, end="\r" if self.redraws else "\n")


def hash_of(fields: Json) -> int:
    """What tells one question of a batch from another."""
    return hash(json.dumps([fields.get("question"), fields.get("messages")]))


def opened(flag: str, path: str, mode: str) -> Any:
    """The file; Usage if it cannot be opened. To write, it must be ours alone."""
    try:
        file = open(path, mode)  # noqa: SIM115 - whoever called closes it
    except (OSError, ValueError) as error:
        raise Usage(f"{flag} {path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        import fcntl

        if mode != "rb":
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        pass
    except OSError:
        file.close()
        raise Usage(f"{flag} {path}: another run is writing to it") from None
    return file


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
