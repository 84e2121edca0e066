#!/usr/bin/env python3
# /// script
# requires-python = ">=3.7"
# dependencies = ["requests", "python-dotenv"]
# ///
"""Ask a language model, and get an answer although providers fail.

The walk goes over candidates, (provider, model) pairs in a line, until one gives a whole answer:

    cerebras m1 ─┬─ a whole answer ─────────────► done
                 ├─ 429, a short pause ─────────► wait, ask m1 again
                 ├─ 429, a long pause ────────┐
                 ├─ 5xx, empty, cut, silent … ┴─► m1 (silent: all models) to the end; ask the next
                 ├─ 400, 401, 404 … ────────────► m1 (401: all of cerebras) out; ask the next
                 └─ against the rules ──────────► stop, the question is refused
    cerebras m2, groq m1 … openrouter m4           nobody left: the question has failed

From top to bottom: vocabulary, errors, `PROVIDERS` (a row each), decisions (`judge`: what a reply
means), wire format, `FallbackLLM` (`_walk` alone sleeps), command line. All times are seconds."""

from __future__ import annotations

import contextlib
import sys

__version__ = "1.0.0"
HELP = """\
usage: fallback_llm.py [options] [--] [question ...]

Asks a language model; if one fails, another. Only the answer goes to stdout.

  -                      the question is on stdin (a pipe is read anyway)
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
  --batch FILE           ask each line: a text, or JSON with question, id ...
  -o, --output FILE      for a batch's answers; run again, it asks only the rest
  --workers N            questions of a batch in flight (default: 8)
  -V, --version          print the version
  -h, --help             print this help

examples:
  python fallback_llm.py "What is the capital of France?"
  cat error.log | python fallback_llm.py "explain this" --provider groq --stats
  python fallback_llm.py --batch questions.txt -o answers.jsonl --workers 16

One of CEREBRAS_API_KEY, GROQ_API_KEY, OPENROUTER_API_KEY is needed, in the
environment or in a .env file here or beside the program. GROQ_MODELS=a,b are
models to ask instead; GROQ_BASE_URL (not from .env) is another address.
exit: 0 answered, 1 no answer, 2 wrong usage (nothing sent), 130 interrupted,
141 reader gone. https://github.com/example/fallback-llm
"""
VERSION = f"fallback_llm {__version__}\n"
if __name__ == "__main__" and sys.argv[1:] in (["-h"], ["--help"], ["-V"], ["--version"]):
    with contextlib.suppress(OSError):  # before the imports: it takes half the time
        sys.exit(print(HELP if "h" in sys.argv[1] else VERSION, end="", flush=True))

import codecs
import collections
import dataclasses
import enum
import functools
import io
import itertools
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
    from typing import Any, Callable, Dict, Generator, Iterable, Iterator, Mapping

    Json = Dict[str, Any]
    Clock = Callable[[], float]

__all__ = ["PROVIDERS", "AllProvidersFailed", "Answer", "AnswerRefused", "Attempt", "FallbackLLM"]
__all__ += ["FallbackLLMError", "NoProviderError", "Provider", "ProviderHealth", "ProviderStatus"]
__all__ += ["RetryConfig", "StreamInterrupted", "Verdict"]

CONNECT_TIMEOUT = 5.0
GRACE = 1.0  # how long is waited for what matters little: an error's words, usage, [DONE]
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


def require(holds: object, problem: str) -> None:  # ValueError, with this problem, unless it holds
    if not holds:
        raise ValueError(problem)


def checked(name: str, value: Any) -> Any:  # what `NUMBERS` allows for this name; else ValueError
    kind, lowest, highest, allowed = NUMBERS[name]
    is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
    in_range = is_number and lowest <= value <= highest  # nan is in none
    require(in_range, f"{name} must be {allowed}, not {value!r:.60}")
    return value


@dataclasses.dataclass
class RetryConfig:
    """How often a model is asked, and the seconds in between: after the n-th failure min(max_delay,
    base_delay * exponential_base ** (n - 1)), at least a server's hint. ValueError: nonsense."""

    max_attempts: int = 5  # of one model in one question, the first included
    base_delay: float = 2.0
    max_delay: float = 60.0  # no wait is longer
    exponential_base: float = 2.0
    jitter: bool = True  # 80 to 100 % of that, by chance
    eager: bool = False  # ask somebody else instead of waiting out a rate limit

    def __post_init__(self) -> None:
        for name in ("max_attempts", "base_delay", "max_delay", "exponential_base"):
            checked(name, getattr(self, name))
        low = f"{self.max_delay!r} with {self.base_delay!r}"
        require(self.max_delay >= self.base_delay, f"max_delay must be >= base_delay, not {low}")


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
    # a word; asked again in this question?; seconds asked last (0: backoff, None: not); what to do
    RATE_LIMITED = ("rate_limited", True, 0.0, "wait for the limit to end")
    FAULT = ("fault", True, 0.0, "try again later")
    UNSUITABLE = ("unsuitable", False, None, "change the question, --max-tokens or the model (-m)")
    GONE = ("gone", False, 600.0, "choose another model with -m, or set {models}")
    DENIED = ("denied", False, 600.0, "check {key} and the account: {url}")
    REFUSED = ("refused", False, None, "change the question")  # the walk stops

    def __init__(self, word: str, again: bool, asked_last: float | None, advice: str) -> None:
        self.word, self.again, self.asked_last, self.advice = word, again, asked_last, advice


@dataclasses.dataclass(eq=False, repr=False)
class Failure(Exception):  # why an attempt gave no answer; caught in the walk
    verdict: Verdict
    reason: str
    wide: bool = False  # holds for all models of the provider
    hint: float | None = None  # seconds after which the server wants to be asked again
    blameless: bool = False  # the caller's own time limit: says nothing about the provider


@dataclasses.dataclass(frozen=True)
class Provider:
    """One row of `PROVIDERS`: an endpoint that speaks the chat completions API."""

    name: str  # in lower case
    base_url: str  # with the version's path; https, or http to this machine
    key_env: str | None  # the variable that holds the key; None: needs no key (a local server)
    models: tuple[str, ...]  # in the order they are asked
    silence: float = 60.0  # seconds without progress that end an attempt
    key_url: str = ""  # where to get a key
    key_path: str = "/models"  # GET of this tells whether a key is accepted
    free_only: bool = False  # models that are discovered must cost nothing
    defaults: Json = dataclasses.field(default_factory=dict, hash=False)  # by a word of the id

    def __post_init__(self) -> None:
        checked("silence", self.silence)
        is_row = re.fullmatch(r"[a-z0-9_.-]+", self.name) and not isinstance(self.models, str)
        require(is_row, f"a row has a name in lower case and several models: {self!r:.90}")
        object.__setattr__(self, "models", tuple(self.models))

    def variable(self, what: str) -> str:  # of the environment, such as GROQ_MODELS
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


# A candidate in a line, which is in the order of places. patience: how long others wait for it
Turn = collections.namedtuple(
    "Turn", "row model label attempts ready_at patience place", defaults=(0, 0.0, 0.0, 0)
)
Question = collections.namedtuple("Question", "fields line timeout is_chosen")  # the last: a model


@dataclasses.dataclass(eq=False)
class Mark:  # failures of a provider, or of one of its models, since its last success
    verdict: Verdict = Verdict.FAULT
    failures: int = 0
    failed_at: float = -math.inf
    ready_at: float = -math.inf  # the server's word: nobody asks before
    later_until: float = -math.inf  # our own guess: asked last until then
    probed_until: float = -math.inf  # the lease of somebody who is trying: the others ask it last


# --- 2. Errors: mistakes of the caller are ValueError, and nothing was sent ---------------------
# FallbackLLMError ── NoProviderError, AllProvidersFailed, AnswerRefused, StreamInterrupted


class FallbackLLMError(Exception):
    """Base of this module's errors; the evidence is in its attributes."""

    attempts: tuple[Attempt, ...] = ()  # the trail of the question
    retry_after: float | None = None  # AllProvidersFailed: seconds, if a server said when to come
    reason = ""  # AnswerRefused: the provider's own
    partial = provider = model = ""  # StreamInterrupted: the text so far, and whose it is

    def __init__(self, message: str = "", **evidence: Any) -> None:
        super().__init__(message)
        vars(self).update(evidence)  # survives pickling


class NoProviderError(FallbackLLMError):
    """None of the chosen providers has a key. Nothing was sent."""


class AllProvidersFailed(FallbackLLMError):
    """Nobody is left in the line, or the time is up."""


class AnswerRefused(FallbackLLMError):
    """A provider refuses the question itself."""


class StreamInterrupted(FallbackLLMError):
    """A stream broke after its first text."""


# --- 3. Providers: ids as of October 2026. When all of a row are gone, its list is asked for ----
BRIEF = {"gpt-oss": {"reasoning_effort": "low"}}  # or a small max_tokens goes into thinking alone
PROVIDERS = (
    Provider("cerebras", "https://api.cerebras.ai/v1", "CEREBRAS_API_KEY",
             ("gpt-oss-120b", "qwen-3.8-27b"), silence=10.0, key_url="https://cloud.cerebras.ai",
             defaults={**BRIEF, "qwen-3.8": {"reasoning_effort": "none"}}),
    Provider("groq", "https://api.groq.com/openai/v1", "GROQ_API_KEY",
             ("openai/gpt-oss-120b", "openai/gpt-oss-20b", "qwen/qwen3.8-27b"),
             silence=10.0, key_url="https://console.groq.com/keys", defaults=BRIEF),
    Provider("openrouter", "https://openrouter.ai/api/v1", "OPENROUTER_API_KEY",
             ("nvidia/nemotron-3-super-120b-a12b:free", "qwen/qwen3.8-27b:free",
              "google/gemma-4-31b-it:free", "openrouter/free"),  # a router over all
             silence=30.0, key_url="https://openrouter.ai/settings/keys",
             key_path="/key", free_only=True),  # its models list takes any key
)  # fmt: skip


# --- 4. Decisions: what a reply means, how long to wait, who is next. Pure ----------------------
# A ruling is a verdict, and whether it holds for the whole provider.
LIMITED, FAULT, UNSUITABLE, GONE, DENIED, REFUSED = ((v, v is Verdict.DENIED) for v in Verdict)
ACCOUNT, DOWN = (Verdict.RATE_LIMITED, True), (Verdict.FAULT, True)
CODES = {  # must fit whole; rate_limit_exceeded, tokens, requests, … say nothing
    GONE: r"model_(not_found|archived|decommissioned|deprecated|unavailable_upstream)(_error)?|"
    r"no_endpoints|free_variant_ended",
    DENIED: r"(invalid|wrong)_api_key|(payment_required|authentication)(_error)?|region_restricted|"
    r"insufficient_quota|organization_\w+|permission_denied|unsupported_country\w*|"
    r"account_(?!\w*limit)\w+|openrouter_(credits|key_limit)",
    REFUSED: r"content_(policy_violation|filter)|refusal|\w*moderation\w*",
    ACCOUNT: r"\w*in_flight_budget\w*|openrouter_free_tier\w*",
    LIMITED: r"(token|request)_quota_exceeded|capacity_exhausted",
    FAULT: r"queue_exceeded|(json_validate|tool_use)_failed|timeout|(internal_)?server_error|"
    r"server|(\w+_)?(overloaded|unavailable)",
    UNSUITABLE: r"(context_length|max_tokens|token_limit)_exceeded|\w+_too_(long|large)|"
    r"privacy_restricted|constraint_filtered|unprocessable|invalid_(request|prompt)|"
    r"(unsupported|wrong)_\w+",
}
WORDS = {  # searched in the message: narrow, what is permanent first; then what passes
    UNSUITABLE: r"request too large|\bdata policy\b|reduce the length of|"
    r"(maximum|exceeds?) .{0,40}context|context (length|window).{0,80}exceed",
    ACCOUNT: r"\bfree-models-per-",
    DOWN: r"check your network settings",
    DENIED: r"insufficient (quota|credit|balance|fund)|exceeded your current quota|\boverdue\b|"
    r"(organization|account) (has been |is )?(restricted|suspended|flagged)|"
    r"\bkey limit exceeded|credit balance is too low",
    GONE: r"is not a valid model id|no endpoints found for|"
    r"^(?!.*\b(parameter|tools?|property|field)\b).*\bmodels?\b.{0,120}\b(does not exist|"
    r"not (be )?found|no longer|retired|archived|decommissioned|deprecated|discontinued)",
    REFUSED: r"content (\w+ )?polic(y|ies)|safety (system|filter)|request blocked: |flagged by|"
    r"flagged for|(input|prompt|content|message|text) (was|is|were|has been) flagged",
}
STATUSES = dict.fromkeys((408, 409, 424, 425, 498, 499), FAULT)  # 3, 4: the others; else FAULT
STATUSES.update({401: DENIED, 402: DENIED, 403: DENIED, 429: LIMITED, 3: DOWN, 4: UNSUITABLE})
RELAYED = "Provider returned error"  # what a router says of its supplier's error
OPENED = ("error", "errors", "metadata", "availability", "headers")  # what holds more of an error
LONG = r"(?is)^(?!.*per.min).*(\bper[ -](hour|day|week|month)|\b(hourly|daily|monthly)\b)"
PAGE = r"(?is)^\s*<(?:!doctype|html|head).*?(?:<title[^>]{0,200}>\s*(.{0,200}?)\s*</title>.*|$)"
UNITS = {"ms": 0.001, "milli": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
PART = r"(\d+(?:\.\d+)?)(?: ?(ms|milli|[shd]|m(?!o))[a-z]*|(?![\w:-]|[.,]\d| (?:week|month|year)))"
AGAIN = r"\b(?:(?:again|retry|resets?) (?:in|after)|wait(?: for)?) (?:about )?"


def judge(status: int, headers: Mapping[str, str], body: Any, now: float) -> Failure:
    """What a reply that is no answer means: by codes, else words, else its status. now: epoch."""
    from http.client import responses

    fields, message, codes = evidence(body)
    told = map(number, fields["status_code"] + fields["code"] + fields["http_status"])
    code = status if status >= 300 else next((int(n) for n in told if 400 <= n <= 599), 0)
    is_limit = not code and re.search("(?i)rate.?limit|too.many.requests", f"{message} {codes}")
    by_status = LIMITED if is_limit else STATUSES.get(code) or STATUSES.get(code // 100, FAULT)
    found = [r for c in codes for r, known in CODES.items() if re.fullmatch(known, c, re.I)]
    words = [r for r, known in WORDS.items() if re.search(known, message, re.I)]
    found += [r for r in words if r != REFUSED or code < 500]  # 5xx: the moderation is down
    verdict, wide = [*found, by_status][0]
    if message.startswith(RELAYED) and (verdict, wide) not in (UNSUITABLE, GONE, REFUSED):
        verdict, wide = Verdict.FAULT if by_status is DENIED else by_status[0], False  # not our key
    if verdict is Verdict.RATE_LIMITED and headers.get("x-should-retry") == "false":
        verdict = Verdict.FAULT  # congestion: others are asked before it, not waited for
    hint = hinted(fields, message, headers, now, verdict) if verdict.again else None
    kind = {3: "Redirect", 4: "Client"}.get(code // 100, "Server")
    reason = f"{code} {kind} Error: {responses.get(code, 'Unknown')}"
    if status < 300:
        reason = f"error {code} inside the reply" if code else "error"
    said = message or " ".join(codes)
    return Failure(verdict, f"{reason}: {said}" if said else reason, wide, hint)


def evidence(body: Any) -> tuple[dict[str, list[Any]], str, list[str]]:
    """The fields (the outermost first), the message and the codes of an error of any shape."""
    fields, parts = collections.defaultdict(list), [body]  # type: dict[str, list[Any]], list[Any]
    for part in map(parsed, parts):  # it grows; a router quotes its supplier's error as text
        part = part[0] if part and isinstance(part, list) else part
        part = {"message": part} if isinstance(part, str) else part
        for name, value in part.items() if isinstance(part, dict) else ():
            opens = name in OPENED and isinstance(value, (dict, list))
            is_raw = name == "raw" and str(*fields["message"][:1]).startswith(RELAYED)
            (parts if opens or is_raw else fields[name.lower()]).append(value)
    said = filter(None, fields["message"] or fields["error"] or fields["detail"])
    texts = (text if isinstance(text, str) else json.dumps(text) for text in said)
    message = ": ".join({re.sub(PAGE, r"HTML page: \1", text[:4000]): 0 for text in texts})
    names = ("limit_source", "code", "error", "error_type", "type")
    codes = [c for name in names for c in reversed(fields[name]) if isinstance(c, str)]
    is_moderated = any(fields["reasons"] + fields["flagged_input"] + fields["patterns"])
    return fields, message, codes + ["moderation"] * is_moderated


def hinted(fields: Any, message: str, headers: Any, now: float, verdict: Any) -> float | None:
    """Seconds after which the server wants to be asked again: the best source that is valid."""
    is_limit = verdict is Verdict.RATE_LIMITED  # a quota's reset says nothing of other failures
    there, found = number(headers.get("date"), True), [number(headers.get("retry-after-ms")) / 1000]
    names = ("retry_after_seconds", "retry_after", "retry-after")
    values = [value for name in names for value in reversed(fields[name])]
    for value in [headers.get("retry-after"), *values]:  # a date counts by the server's clock
        found += [number(value), number(value, True) - (now if math.isnan(there) else there)]
    for said in re.findall(f"{AGAIN}((?:{PART},? ?(?:and )?)+)", message, re.I):
        parts = re.findall(PART, said[0], re.I)
        found.append(sum(float(count) * UNITS[unit.lower()] for count, unit in parts))
    resets = [*fields["x-ratelimit-reset"], headers.get("x-ratelimit-reset")] * is_limit
    found += [at / (1000 if at > 1e11 else 1) - now for at in map(number, resets)]
    found += [3600.0] * bool(is_limit and re.match(LONG, message))
    return next((seconds for seconds in found if 0 <= seconds <= MAX_HINT), None)


def number(value: Any, is_date: bool = False) -> float:  # or nan; a date in epoch seconds
    from email.utils import mktime_tz, parsedate_tz

    with contextlib.suppress(TypeError, ValueError, OverflowError, IndexError, AttributeError):
        if not isinstance(value, bool):
            return float(mktime_tz(parsedate_tz(value)) if is_date else value)
    return math.nan


def dig(value: Any, *path: str | int) -> Any:  # what is at this path of names and zeros, or None
    for step in path:
        first = value[0] if step == 0 and value and isinstance(value, list) else None
        value = value.get(step) if isinstance(value, dict) else first
    return value


def parsed(body: Any) -> Any:  # text or bytes as JSON, else as text; never an error
    try:
        return json.loads(body)
    except (ValueError, TypeError, RecursionError):
        return body.decode("utf-8-sig", "replace") if isinstance(body, bytes) else body


def backoff(config: RetryConfig, failures: int) -> float:  # seconds, without jitter
    growth = config.exponential_base ** (min(failures, 30) - 1)  # later a float would overflow
    return min(config.max_delay, config.base_delay * growth)


def next_turn(waits: list[tuple[Turn, float]], limit: float) -> tuple[Turn | None, float]:
    """Who is asked next, and the wait before: the first within its patience, else the soonest."""
    patient = ((turn, wait) for turn, wait in waits if wait <= min(turn.patience, limit))
    turn, wait = next(patient, min(waits, key=lambda pair: pair[1], default=(None, math.inf)))
    return (turn, wait) if wait <= limit else (None, 0.0)


def line_after(
    line: list[Turn], asked: Turn, failure: Failure, config: RetryConfig, now: float, chance: float
) -> list[Turn]:
    """The line after a failure: whom it reaches is out, keeps its place or gets the last."""
    after, end = [], 1 + max(turn.place for turn in line)
    for turn in line:
        tries = turn.attempts + 1
        if turn is not asked and not (failure.wide and turn.row is asked.row):
            after.append(turn)
        elif failure.verdict.again and tries < config.max_attempts:
            waits = [backoff(config, n) for n in range(tries, config.max_attempts)]
            pause = waits[0] * (0.8 + 0.2 * chance if config.jitter else 1.0)
            wait, limited = max(pause, failure.hint or 0.0), failure.verdict is Verdict.RATE_LIMITED
            stays = limited and not config.eager and wait <= sum(waits)  # all that are left
            place, patience = (turn.place, sum(waits)) if stays else (end, 0.0)
            after.append(Turn(*turn[:3], tries, now + wait, patience, place))
    return after


# --- 5. Wire format: requests, answers in one piece, event streams. Pure ------------------------
def request_body(fields: Json, turn: Turn) -> bytes:  # Cerebras refuses lone surrogates (2026-09)
    rows = [row for word, row in turn.row.defaults.items() if word in turn.model]
    body = dict(collections.ChainMap(fields, *rows[::-1], {"model": turn.model}))
    try:
        text = json.dumps(body, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the question cannot be sent as JSON: {error}") from None
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def conversation(question: Any, system: Any, messages: Any) -> list[Json]:  # what is to be sent
    for name, text in (("question", question), ("system", system)):
        require(text is None or isinstance(text, str), f"the {name} must be text, not {text!r:.60}")
    said = list(messages) if isinstance(messages, (list, tuple)) else []
    is_right = messages is None or (said and all(isinstance(dig(m, "role"), str) for m in said))
    require(is_right, f"messages must be a list of dicts with a role, not {messages!r:.60}")
    require(said if question is None else not is_blank(question), "the question is empty")
    first, last = {"role": "system", "content": system}, {"role": "user", "content": question}
    return [first] * bool(system) + said + [last] * (question is not None)


def is_blank(text: str) -> bool:  # nothing of it can be seen
    return not any(char.isprintable() and not char.isspace() for char in text)


def events_in(chunks: Iterable[bytes]) -> Iterator[tuple[str | None, str]]:
    """(kind, data) of each server-sent event, once complete; if there is none, the plain body."""
    utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    lines, rest, plain, is_stream = io.IncrementalNewlineDecoder(utf8, True), "", [], False
    for text in map(lines.decode, itertools.chain(chunks, [b"\n\n"])):  # the last may lack its end
        rest += text if rest else text.lstrip("\ufeff")  # a byte order mark
        *blocks, rest = rest.split("\n\n") if "\n\n" in rest[-len(text) - 1 :] else [rest]
        for block in blocks:
            fields = [line.partition(":") for line in block.split("\n")]
            data = "\n".join([value for name, _, value in fields if name == "data"]).strip()
            if data:
                is_stream = True
                yield "".join([value.strip() for name, _, value in fields if name == "event"]), data
            elif not is_stream:
                plain.append(re.sub("(?m)^(:|(data|event|id|retry)(:|$)).*", "", block))
    if not is_stream:
        yield None, "\n".join(plain).strip()


class Reply:  # one exchange as it goes: how long it may, what came, what that means
    def __init__(self, clock: Clock, silence: float, deadline: float, epoch: float) -> None:
        self._clock, self._silence, self._deadline, self.epoch = clock, silence, deadline, epoch
        self._until, self.is_over = clock() + silence, False  # over: all that matters has come
        self.status, self.headers = 0, {}  # type: int, Mapping[str, str]
        self.text, self.usage = [], {}  # type: list[str], Json
        self._ended = self._thought = False  # [DONE] was said, or a plain body is complete
        self.finish_reason = self._broken = self._refusal = ""

    def left(self) -> float:  # seconds that the next read may take; raises when none are
        left = min(self._until, self._deadline) - self._clock()
        if left <= 0 and not self.is_over:
            raise self.broken(f"silent for {self._silence:g} s", True)
        return left

    def broken(self, reason: str, wide: bool) -> Failure:  # for this reason, or as time is up
        if self._clock() >= self._deadline - 0.01:  # a socket may time out a little early
            return Failure(Verdict.FAULT, "the question's time limit is up", blameless=True)
        return Failure(Verdict.FAULT, reason, wide)

    def heard(self, is_over: bool) -> None:  # begins the silence anew, or the grace at the end
        if not self.is_over:
            self.is_over = is_over
            self._until = self._clock() + (min(self._silence, GRACE) if is_over else self._silence)

    def read(self, chunks: Iterable[bytes]) -> Iterator[str]:  # the text of each event, if any
        held = ""  # the beginning, which may be <think>…</think>, cut anywhere
        for kind, data in events_in(chunks):
            said = parsed(data)
            if not 200 <= self.status < 300:
                raise judge(self.status, self.headers, said, self.epoch)
            self._ended = self._ended or said == "[DONE]"
            text = "" if self._ended or kind == "ping" or not data else self._take(kind, data, said)
            if text and not self.text:
                held += text
                may_think = "<think>".startswith(held.lstrip()[:7])
                text = held.partition("</think>")[2].lstrip() if may_think else held
            self.text += [text] if text else []
            yield text
            self.heard(bool(self.finish_reason or self._ended))  # not the caller's time
        self._thought |= "<think>" in held
        if held.strip() and not self.text and "<think>" not in held:
            self.text.append(held)
            yield held

    def _take(self, kind: str | None, data: str, said: Any) -> str:  # its text; notes the rest
        if not data.isascii() and re.search(r"[\udc80-\udcff]", data):
            raise Failure(Verdict.FAULT, "the answer is not UTF-8")
        self._ended, choice = kind is None, dig(said, "choices", 0)
        top, choice = [part if isinstance(part, dict) else {} for part in (said, choice)]
        parts = top.get("x_groq"), choice.get("delta") or choice.get("message")
        groq, message = [part if isinstance(part, dict) else {} for part in parts]
        error = top.get("error") or choice.get("error") or groq.get("error")
        reason, usage = choice.get("finish_reason"), top.get("usage") or groq.get("usage")
        flat = "" if choice else evidence(said)[1]
        if reason == "error":
            error = error or choice.get("native_finish_reason") or "finish_reason error"
        if error or kind == "error" or (flat and not isinstance(said, str)):
            body = {"error": error or said, "status_code": top.get("status_code")}
            raise judge(self.status, self.headers, body, self.epoch)
        if not isinstance(said, dict) and not self.finish_reason:
            self._broken = self._broken or f"no answer in the reply: {flat}"
        self.finish_reason = reason if reason and isinstance(reason, str) else self.finish_reason
        self.usage = (usage and figures(usage)) or self.usage
        self._thought |= bool(message.get("reasoning") or message.get("reasoning_content"))
        self._refusal += str(message.get("refusal") or "")
        content = message.get("content")
        texts = [dig(part, "text") for part in content] if isinstance(content, list) else [content]
        return "".join([text for text in texts if isinstance(text, str)])

    def failure(self, live: bool) -> Failure | None:  # live, what was broken is skipped
        text, end, fault = "".join(self.text), self.finish_reason, Verdict.FAULT
        if end == "content_filter" or (self._refusal and not text):
            return Failure(Verdict.REFUSED, self._refusal or "a content filter stopped the answer")
        if self._broken and not (live and text):
            return Failure(fault, self._broken)
        why = "only reasoning came, no answer" if self._thought else "the answer is empty"
        if not self._ended and not end:
            why = "the answer was cut: it has no end" if text else "the reply holds no answer"
        elif not is_blank(text):
            return None
        elif end == "length":
            why = "max_tokens was used up before the answer began: raise max_tokens"
        return Failure(Verdict.UNSUITABLE if end == "length" else fault, why)


def figures(usage: Any, kinds: Any = (int, float, dict)) -> Json:  # the numbers in a usage report
    items = usage.items() if isinstance(usage, dict) else ()
    known = {k: v for k, v in items if re.fullmatch("[a-z_]{1,64}", k) and isinstance(v, kinds)}
    found = {k: figures(v, (int, float)) if isinstance(v, dict) else v for k, v in known.items()}
    return {k: v for k, v in found.items() if isinstance(v, dict) or abs(v) < 1e300}


def clean(value: str | None) -> str:  # without what was pasted along with it
    return (value or "").strip(" \t\r\n\"'")


def one_line(text: str, keys: Iterable[str | None] = ()) -> str:  # safe to show: no keys, ids …
    known = r"(?i)\b(csk-|gsk_|sk-)[\w-]{8,}|(?<=bearer )[\w.~+/=-]{8,}|(?<=://)[^/@\s]+(?=@)"
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    for key in sorted(map(clean, keys), key=len, reverse=True):
        line = re.sub(re.escape(key), "[key]", line, flags=re.I) if len(key) >= 4 else line
    line = re.sub(r"\b(org|user)_\w+", r"\1_[id]", re.sub(known, "[key]", line))
    return line if len(line) <= 300 else line[:299] + "…"


# --- 6. FallbackLLM: settings, the walk, what providers serve, HTTP, health, questions ----------
DUMMY = r"(?i)your[_ -].*|.*[_ -]here|<.*>|(change|replace).?me|x{3,}|.*\.{3}|todo|none|null"
is_dummy = re.compile(DUMMY).fullmatch  # a placeholder for a key
CHAT = r"(?!.*(whisper|tts|speech|audio|guard|embed|rerank|moderation|image|ocr))[\w./:@~+-]{1,200}"


def settings_of(providers: Iterable[Provider]) -> dict[str, str]:  # keys and models; "" if unset
    beside = os.path.join(os.path.dirname(globals().get("__file__", "")), ".env")
    sources: list[Mapping[str, str | None]] = [os.environ]
    for path in dict.fromkeys(map(os.path.abspath, (".env", beside))):
        try:
            if os.path.isfile(path):
                from dotenv import dotenv_values

                sources.append(dotenv_values(path, encoding="utf-8-sig", interpolate=False))
                require("\0" not in "".join(filter(None, sources[-1].values())), "no text")
        except ImportError:
            logger.warning("⚠️  %s is not read: pip install python-dotenv", path)
        except (OSError, ValueError):
            logger.warning("⚠️  %s cannot be read: save it as UTF-8", path)
    names = [name for row in providers for name in (row.key_env or "", row.variable("MODELS"))]
    found = {name: filter(None, [clean(source.get(name)) for source in sources]) for name in names}
    return {name: min(found[name], key=lambda v: bool(is_dummy(v)), default="") for name in found}


def base_url(row: Provider) -> str:  # by the environment or the row; a key is safe with it
    name = row.variable("BASE_URL")
    url = (clean(os.environ.get(name)) or row.base_url).rstrip("/")
    host = r"(?i)(https://[\w.-]+|https?://(localhost|127(\.\d+){3}|\[::1\]))(:\d{1,5})?"
    shown = one_line(re.sub(r"//.*@|[?#].*", "//...", url))  # a key may be in it
    allowed = f"{name} must be https://..., or http:// to this machine, not {shown!r}"
    require(re.fullmatch(host + r"(/[^\s?#@]*)?", url), allowed)
    path = row.base_url.partition("://")[2].partition("/")[2]
    return f"{url}/{path}".rstrip("/") if re.fullmatch(host, url) else url


def chunks_of(raw: Any, reply: Reply, unpack: Any) -> Iterator[bytes]:
    """What each read of the socket gives; urllib3's wait for full blocks and keep their timeout."""
    source, size, chunk = getattr(raw, "_fp", raw), 0, b" "
    read = getattr(source, "read1", None) or source.read
    sock = getattr(getattr(getattr(source, "fp", None), "raw", None), "_sock", None)
    while chunk and getattr(source, "fp", source) is not None:  # None: read to the end
        left = reply.left()
        if left <= 0:
            return
        if sock is not None:
            sock.settimeout(left)
        chunk = read(65536)
        data = unpack.decompress(chunk, MAX_BODY) if unpack else chunk
        size += len(data)
        if size >= MAX_BODY:
            raise Failure(Verdict.FAULT, f"the reply is longer than {MAX_BODY} bytes")
        yield data
    is_half = unpack and not unpack.eof and not reply.is_over
    if (is_half or getattr(source, "length", None)) and reply.status < 300:
        raise Failure(Verdict.FAULT, "the answer was cut: half of its bytes")
    source.close()
    getattr(raw, "release_conn", source.close)()


class FallbackLLM:
    """Asks candidates until one answers; threads may share it, it pickles. providers: rows as in
    `PROVIDERS`. api_keys: by provider; they win over the environment and .env files. timeout: of a
    whole question. silence: of all rows. clock, wall_clock, sleep, chance, session: for tests.
    ValueError, but not for a missing key. fallback_order, api_keys, models: may be changed."""

    def __init__(
        self, retry_config: RetryConfig | None = None, *, providers: Iterable[Provider] = PROVIDERS,
        api_keys: Mapping[str, str | None] | None = None, timeout: float | None = None,
        silence: float | None = None, clock: Clock = time.monotonic, wall_clock: Clock = time.time,
        sleep: Callable[[float], object] = time.sleep, chance: Clock | None = None,
        session: Any = None,  # a requests.Session
    ) -> None:  # fmt: skip
        providers, api_keys = tuple(providers), dict(api_keys or {})
        self._given = {k: v for k, v in locals().items() if k not in ("self", "session")}
        import requests  # not with the module: it takes as long as some questions

        self.retry_config = RetryConfig() if retry_config is None else retry_config
        self.timeout = math.inf if timeout is None else checked("timeout", timeout)
        self._clock, self._wall_clock, self._sleep = clock, wall_clock, sleep
        self._chance = chance or (lambda: int.from_bytes(os.urandom(4), "big") / 2**32)
        self._rows, self.models, self.api_keys = {}, {}, {}  # type: Any, dict[str, list[str]], Any
        found = settings_of(providers)
        for row in providers:
            quiet = row.silence if silence is None else silence
            self._rows[row.name] = dataclasses.replace(row, base_url=base_url(row), silence=quiet)
            listed = re.split(r"\s*,\s*", found[row.variable("MODELS")])
            self.models[row.name] = [*filter(None, listed)] or [*row.models]
            self.api_keys[row.name] = found[row.key_env or ""] or None
        self._dummies = {n: None for n, k in self.api_keys.items() if k and is_dummy(k)}
        self.api_keys.update(self._dummies)
        self.api_keys.update((self.rows(name)[0].name, key) for name, key in api_keys.items())
        self.fallback_order, self._stats = list(self._rows), [0] * 5
        self._marks: dict[tuple[str, str], Mark] = {}  # the model "" is all of a provider's
        self._seen: dict[str, ProviderHealth] = {}  # the facts; the status is derived
        self._lock, self._discovery = threading.Lock(), threading.Lock()
        self._discovered, self._templates = set(), {}  # type: set[str], dict[Any, Any]
        self._requests, self._session = requests, session or requests.Session()  # type: Any, Any
        for adapter in self._session.adapters.values() if session is None else ():
            adapter.init_poolmanager(POOL_WIDTH, POOL_WIDTH)  # type: ignore[union-attr]

    def __reduce__(self) -> tuple[Any, ...]:  # of the keys, only those that the constructor got
        state = {n: vars(self)[n] for n in ("retry_config", "fallback_order", "models")}
        return functools.partial(type(self), **self._given), (), state

    def ask(self, question: str, max_tokens: int = 500, provider: Any = None, **more: Any) -> str:
        """The text of the answer; "" if all failed or it was refused. The rest as in `complete`."""
        try:
            return self.complete(question, max_tokens, provider, **more).text
        except (AllProvidersFailed, AnswerRefused) as error:
            logger.error("❌ %s", error)
            return ""

    def complete(
        self, question: str | None = None, max_tokens: int = 500, provider: Any = None, **more: Any
    ) -> Answer:
        """The answer and how it came about. provider: a name or several ("groq,openrouter" or a
        list), asked in this order. more: model ("[provider:]model"), system, messages (a
        conversation, continued by the question), timeout (seconds), any parameter of the API.
        ValueError, NoProviderError (nothing was sent), AllProvidersFailed, AnswerRefused."""
        walk = self._walk(self.checked_question(question, max_tokens, provider, **more), live=False)
        try:
            while True:
                next(walk)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]

    def stream(
        self, question: str | None = None, max_tokens: int = 500, provider: Any = None, **more: Any
    ) -> Generator[str, None, Answer]:
        """The text, piece by piece as it comes. Arguments and errors as in `complete`; a break
        after the first piece is StreamInterrupted. Closing the iterator closes the connection."""
        return self._walk(self.checked_question(question, max_tokens, provider, **more), live=True)

    def ask_many(
        self, questions: Iterable[Any], max_workers: int = 8, **more: Any
    ) -> Iterator[Any]:
        """For each question, a string or a dict of `complete`'s arguments, an Answer or the error
        in its place; in their order, lazily. more: for all of them. ValueError as in `complete`."""
        dicts = (asked if isinstance(asked, dict) else {"question": asked} for asked in questions)
        return pooled(self.result, ({**more, **asked} for asked in dicts), max_workers)

    def result(self, arguments: Json) -> Answer | FallbackLLMError:  # `complete`, not raising
        try:
            return self.complete(**arguments)
        except FallbackLLMError as error:
            return error

    def _walk(self, question: Question, live: bool) -> Generator[str, None, Answer]:
        """Asks whoever is next until one answers; text comes out as it comes in, if live."""
        started, answered, line, config = self._clock(), False, question.line, self.retry_config
        deadline, trail, slept = started + question.timeout, [], 0.0  # type: float, Any, float
        try:
            while True:
                turn, wait = self._next(line, deadline)
                if turn is None:
                    raise self._all_failed(question.line, trail)
                ready_at, slept = self._ready_at(turn), slept + wait
                if wait:
                    logger.info("⏳ Waiting %.2fs before retry...", wait)
                    self._sleep(wait)
                if self._ready_at(turn) > ready_at:  # another thread was told so meanwhile
                    continue
                begun, answered = self._clock(), live  # whoever closes a stream has read enough
                reply = Reply(self._clock, turn.row.silence, deadline, self._wall_clock())
                failure = yield from self._try(turn, reply, trail, question.fields, live)
                self._record(turn, failure, begun)
                who, text, answered = (turn.row.name, turn.model), "".join(reply.text), not failure
                verdict, reason = (failure.verdict, failure.reason) if failure else (None, "")
                facts = (*who, turn.attempts + 1, reply.status or None, verdict, reason, slept)
                trail.append(Attempt(*facts, self._clock() - begun))
                if failure is None:
                    finish, took = self._shown(reply.finish_reason) or None, self._clock() - started
                    return Answer(text, *who, finish, reply.usage, tuple(trail), took)
                ours = {"provider": who[0], "model": who[1], "attempts": tuple(trail)}
                if live and text:
                    broke = f"{' '.join(who)} broke off: {reason}"
                    raise StreamInterrupted(broke, partial=text, **ours)
                if verdict is Verdict.REFUSED:
                    text = f"{who[0]} refused the question: {reason}"
                    raise AnswerRefused(text, reason=reason, **ours)
                line = line_after(line, turn, failure, config, self._clock(), self._chance())
                line, slept = line + self._served_instead(question, trail, deadline), 0.0
        finally:
            switches = sum(a.provider != b.provider for a, b in zip(trail, trail[1:]))
            counts = (1, answered, not answered, sum(a.status == 429 for a in trail), switches)
            with self._lock:
                self._stats = list(map(sum, zip(self._stats, counts)))

    def _try(self, turn: Turn, reply: Reply, trail: Any, fields: Json, live: bool) -> Any:
        """One exchange, and the documented lines of it: why it is no answer; None: it is one."""
        row, last = turn.row, (trail[-1].provider, trail[-1].model) if trail else ("", "")
        names = (row.name, turn.model)
        if trail and last != names:
            logger.info("🔄 %s %s failed, trying next model...", *last)
        if last[0] != row.name:
            logger.info("🔄 Trying provider: %s", row.name)
        if last != names:
            logger.info("🎯 Trying %s model %s: %s", row.name, turn.label, turn.model)
        try:
            chunks = self._exchange(row, "/chat/completions", request_body(fields, turn), reply)
            yield from (text for text in reply.read(chunks) if live and text)
            failure = reply.failure(live)
        except Failure as caught:
            failure = caught
        if failure is None:
            logger.info("✅ Success with %s %s on attempt %d", *names, turn.attempts + 1)
            return None
        failure.reason = self._shown(failure.reason)
        logger.warning("❌ Error in %s API request: %s", row.name, failure.reason)
        if failure.verdict is Verdict.DENIED and row.key_env:
            logger.warning("🔑 Check %s and the account: %s", row.key_env, row.key_url)
        if failure.verdict.again and turn.attempts + 1 >= self.retry_config.max_attempts:
            logger.info("🔄 %s %s exhausted all %d retry attempts", *names, turn.attempts + 1)
        return failure

    def _all_failed(self, line: list[Turn], trail: list[Attempt]) -> AllProvidersFailed:  # and why
        text, now = "All providers and models failed", self._clock()
        pause = min((at - now for at in map(self._ready_at, line) if at > now), default=None)
        for last in {attempt.provider: attempt for attempt in trail if attempt.verdict}.values():
            row = self._rows[last.provider]
            names = {"key": row.key_env or "it", "models": row.variable("MODELS")}
            advice = getattr(last.verdict, "advice", "").format(url=row.key_url, **names)
            advice = "raise the timeout" if "time limit" in last.reason else advice
            text += f"\n   {row.name} {last.model}: {last.reason} → {advice}"
        text += f"\n   the first limit ends in {math.ceil(pause)} s" if pause else ""
        return AllProvidersFailed(text, attempts=tuple(trail), retry_after=pause)

    def _served_instead(self, question: Any, trail: list[Attempt], deadline: float) -> list[Turn]:
        """Turns for models that the provider serves, once all that were in the line are gone."""
        name = trail[-1].provider
        listed = {t.model for t in question.line if t.row.name == name}
        gone = {a.model for a in trail if a.provider == name and a.verdict is Verdict.GONE}
        if question.is_chosen or listed - gone:
            return []
        with self._discovery:  # whoever comes meanwhile waits for what is found
            is_first = name not in self._discovered and gone.issuperset(self.models[name])
            self._discovered.update([name] * is_first)
            found = self.served(self._rows[name], deadline) if is_first else []
            found = [model for model in found if model not in gone][:5]
            if found:
                told = "🔎 %s: gone: %s; used instead: %s; to choose, set %s=a,b"
                setting, self.models[name] = self._rows[name].variable("MODELS"), found
                logger.warning(told, name, ", ".join(sorted(gone)), ", ".join(found), setting)
        new = [turn for turn in self._line(name, None) if turn.model not in listed]
        question.line.extend(new)
        return new

    def served(self, row: Provider, deadline: float = math.inf) -> list[str]:
        """The models in the provider's own list that answer text with text, by what each entry says
        (fields of Groq 2026-09, OpenRouter 2026-10) or else by its name; none if it has no list."""
        models, listed = [], None  # type: list[str], Any
        with contextlib.suppress(Failure):
            listed = self._get(row, "/models", deadline).get("data")
        for entry in listed if isinstance(listed, list) else ():
            name, prices, kinds = dig(entry, "id"), dig(entry, "pricing"), "output_modalities"
            writes = dig(entry, kinds) or dig(entry, "architecture", kinds)
            size = number(dig(entry, "context_window") or dig(entry, "context_length"))
            is_free = isinstance(prices, dict) and set(map(number, prices.values())) == {0.0}
            is_chat = writes in (None, ["text"]) and not size <= 4096
            is_on = dig(entry, "active") is not False and (is_free or not row.free_only)
            if is_chat and is_on and isinstance(name, str) and re.fullmatch(CHAT, name, re.I):
                models += [name] * (self._shown(name) == name)
        return models

    def check(self, row: Provider) -> Json:
        """Whether the key is accepted and which listed models are served; costs no tokens."""
        started, key, reason, found = self._clock(), "accepted", "", ""
        try:
            for path in dict.fromkeys((row.key_path, "/models")):
                found = json.dumps(self._get(row, path))
        except Failure as failure:
            refused = "missing" if self.key_problem(row) else "refused"
            key = refused if failure.verdict is Verdict.DENIED else "not checked"
            reason = self._shown(failure.reason)
        report = {"provider": row.name, "key": key, "seconds": round(self._clock() - started, 3)}
        listed = [] if reason else self.models[row.name]
        served = [model for model in listed if f'"id": {json.dumps(model)}' in found]
        gone = [model for model in listed if model not in served]
        return {**report, "served": served, "not_served": gone, "reason": reason}

    def _get(self, row: Provider, path: str, deadline: float = math.inf) -> Json:  # or a Failure
        if self.key_problem(row):
            raise Failure(Verdict.DENIED, self.key_problem(row))
        until = min(deadline, self._clock() + 2 * CONNECT_TIMEOUT)
        reply = Reply(self._clock, row.silence, until, self._wall_clock())
        body = parsed(b"".join(self._exchange(row, path, None, reply)))
        if reply.status != 200 or not isinstance(body, dict):
            raise judge(reply.status, reply.headers, body, reply.epoch)
        return body

    def _exchange(self, row: Provider, path: str, body: Any, reply: Reply) -> Iterator[bytes]:
        """Posts the body (None: a GET), yields what comes, noted in the reply. Raises a Failure."""
        import zlib
        from http.client import HTTPException

        HTTPError = self._requests.exceptions.BaseHTTPError  # urllib3's
        try:
            with contextlib.closing(self._send(row, path, body, reply)) as response:
                reply.status = response.status_code
                reply.headers = {name.lower(): text for name, text in response.headers.items()}
                if not 200 <= reply.status < 300:
                    reply.heard(is_over=True)
                packed = re.search("(?i)gzip|deflate", reply.headers.get("content-encoding", ""))
                unpack = zlib.decompressobj(47) if packed else None  # 47: either
                yield from chunks_of(response.raw, reply, unpack)
        except (OSError, ValueError, HTTPException, HTTPError, zlib.error) as error:
            if not reply.is_over:
                reason = re.sub(r"<\S+ object at 0x\w+>:? ?", "", str(error)) or repr(error)
                wide = not reply.status or reason.endswith("timed out")
                raise reply.broken(reason, wide) from None

    def _send(self, row: Provider, path: str, body: Any, reply: Reply) -> Any:
        """The response, unread. session.send() would obey netrc, keep cookies, read redirects."""
        url, key = row.base_url + path, clean(self.api_keys.get(row.name))
        if (url, key, body is None) not in self._templates:
            headers = {"Authorization": "Bearer " + key} if key else {}
            headers["User-Agent"] = f"fallback_llm/{__version__}"  # libraries' get a 403 (2026-09)
            headers.update({"Accept-Encoding": "identity", "Content-Type": "application/json"})
            headers["Accept"] = "text/event-stream, application/json"
            made = self._requests.Request("GET" if body is None else "POST", url, headers).prepare()
            env = self._session.merge_environment_settings(url, {}, True, None, None)
            self._templates[url, key, body is None] = made, env  # its proxies and certificates
        template, settings = self._templates[url, key, body is None]
        request, left = template.copy(), reply.left()
        request.prepare_body(body, None)
        timeout = (min(CONNECT_TIMEOUT, left), left)
        return self._session.get_adapter(url).send(request, timeout=timeout, **settings)

    def get_stats(self) -> dict[str, int]:
        """Counts since the last reset. A request is a question; 429 replies are rate-limited."""
        names = "total_requests successful_requests failed_requests rate_limited_requests"
        return dict(zip([*names.split(), "provider_switches"], self._stats))

    def reset_stats(self) -> None:
        with self._lock:  # or a question that ends just now would bring the old ones back
            self._stats = [0] * 5

    def _marks_of(self, turn: Turn) -> list[Mark]:
        keys = ((turn.row.name, ""), (turn.row.name, turn.model))
        return [mark for mark in map(self._marks.get, keys) if mark]

    def _ready_at(self, turn: Turn) -> Any:
        return max([turn.ready_at, *(mark.ready_at for mark in self._marks_of(turn))])

    def _next(self, line: list[Turn], deadline: float) -> tuple[Turn | None, float]:
        """Who is asked next (last: who failed lately, or is tried), and the wait; with a lease."""
        with self._lock:
            now, ranked = self._clock(), []  # type: float, list[Any]
            for turn in line:
                untils = [max(m.later_until, m.probed_until) for m in self._marks_of(turn)]
                is_later = now < max(untils, default=now) and not turn.attempts
                wait = max(0.0, round(self._ready_at(turn) - now, 6))  # less is rounding
                ranked.append(((turn.place, is_later), (turn, wait)))
            waits = [pair for _, pair in sorted(ranked, key=lambda each: each[0])]
            chosen, wait = next_turn(waits, min(self.retry_config.max_delay, deadline - now))
            if chosen is None or now + wait >= deadline:
                return None, 0.0
            for mark in self._marks_of(chosen):
                mark.probed_until = now + wait + chosen.row.silence + CONNECT_TIMEOUT
            return chosen, wait

    def _record(self, turn: Turn, failure: Failure | None, begun: float) -> None:
        with self._lock:
            now, name, marks = self._clock(), turn.row.name, self._marks_of(turn)
            seen = self._seen.setdefault(name, ProviderHealth())
            for mark in marks:
                mark.probed_until = now
            if failure is None:
                seen.last_success, seen.consecutive_failures = self._wall_clock(), 0
                old = [mark for mark in marks if mark.failed_at <= begun]
                self._marks = {key: m for key, m in self._marks.items() if m not in old}
            elif failure.verdict.asked_last is not None and not failure.blameless:
                mark = self._marks.setdefault((name, "" if failure.wide else turn.model), Mark())
                counts, seen.last_failure = begun >= mark.failed_at, self._wall_clock()
                mark.failures += counts  # those that were under way together are one
                seen.consecutive_failures += counts
                pause = failure.verdict.asked_last or backoff(self.retry_config, mark.failures)
                mark.verdict, mark.failed_at, mark.later_until = failure.verdict, now, now + pause
                mark.ready_at = max(mark.ready_at, now + (failure.hint or 0.0))

    @property
    def provider_health(self) -> dict[str, ProviderHealth]:
        """What is known of each provider now, by its latest failure since its last success."""
        found, status, now = {}, ProviderStatus, self._clock()
        for name, row in self._rows.items():
            with self._lock:
                found[name] = seen = dataclasses.replace(self._seen.get(name, ProviderHealth()))
                marks = [mark for (owner, _), mark in self._marks.items() if owner == name]
            mark = max(marks, key=lambda mark: mark.failed_at, default=Mark())
            left, failed = max(mark.ready_at, mark.later_until) - now, seen.consecutive_failures > 0
            if self.key_problem(row) or mark.verdict is Verdict.DENIED:
                seen.status = status.UNAVAILABLE
            elif failed and mark.verdict is Verdict.RATE_LIMITED:
                seen.rate_limit_reset_time = self._wall_clock() + left
                seen.status = status.RATE_LIMITED if left > 0 else status.HEALTHY
            elif failed:
                seen.status = status.FAILED
        return found

    def checked_question(
        self, question: Any = None, max_tokens: Any = 500, provider: Any = None, **fields: Any
    ) -> Question:
        """The question, checked. ValueError for what cannot be meant; NoProviderError."""
        require(not {"tools", "stream", "n"} & set(fields), "tools, stream and n are not supported")
        model, timeout, more = fields.pop("model", None), fields.pop("timeout", None), bool(fields)
        said = conversation(question, fields.pop("system", None), fields.pop("messages", None))
        limit = {"max_tokens": max_tokens} if fields.get("max_completion_tokens") is None else {}
        fields = {name: value for name, value in fields.items() if value is not None}
        fields.update(limit, messages=said, stream=True)
        for name in {"max_tokens", "temperature"}.intersection(fields):
            checked(name, fields[name])
        timeout = self.timeout if timeout is None else checked("timeout", timeout)
        line = self._line(provider, model)
        if more:
            request_body(fields, line[0])  # ValueError for what JSON cannot carry
        return Question(fields, line, timeout, model is not None)

    def _line(self, provider: Any, model: Any) -> list[Turn]:  # the candidates, in their order
        rows, line = self.rows(provider), []
        is_id = model is None or (isinstance(model, str) and not is_blank(model))
        require(is_id, f"model must be the id of a model, not {model!r:.60}")
        prefix, _, rest = (model or "").partition(":")
        if rest and prefix.strip().lower() in self._rows:
            is_of = provider is None or self.rows(prefix)[0] in rows
            require(is_of, f"model {model} is not of provider {provider!r}")
            rows, model = self.rows(prefix), rest.strip()
        elif model:
            rows = [row for row in rows if model in self.models[row.name]] or rows
        keyed = [row for row in rows if not self.key_problem(row)]
        if not keyed:
            text = "No API keys found! Please set environment variables:\n   "
            text += ", ".join(str(row.key_env) for row in rows)
            text += "".join(f"\n   {row.name}: {self.key_problem(row)}" for row in rows)
            one = f"export {rows[-1].key_env}=...   (or put it into .env)"
            raise NoProviderError(f"{text}\n   one is enough: {one}")
        for row in keyed:
            models = [model] if model else self.models[row.name]
            line += [Turn(row, m, f"{place}/{len(models)}") for place, m in enumerate(models, 1)]
        require(line, f"models must name one: {', '.join(row.name for row in keyed)} has none")
        return line

    def rows(self, provider: Any = None) -> list[Provider]:  # None: all; in their order
        names = self.fallback_order if provider is None else provider
        text = ",".join(map(str, names)) if isinstance(names, (list, tuple)) else str(names)
        rows, known = [name.strip().lower() for name in text.split(",")], ", ".join(self._rows)
        wanted = f"provider must be one or more of {known}, not {provider!r:.60}"
        require(self._rows.keys() >= set(rows), wanted)
        return [self._rows[name] for name in dict.fromkeys(rows)]

    def key_problem(self, row: Provider) -> str:  # why it cannot be asked; "" if it can
        key = clean(self.api_keys.get(row.name))
        odd = "" if re.fullmatch("[!-~]*", key) else "contains a character that cannot be in a key"
        none = "holds a placeholder" if row.name in self._dummies else "is not set"
        problem = odd if key or not row.key_env else none
        return problem and f"{row.key_env} {problem} → get a key: {row.key_url}"

    def _shown(self, text: str) -> str:
        return text if text in ("stop", "length") else one_line(text, self.api_keys.values())

    def close(self) -> None:  # closes the connections that are kept alive
        self._session.close()


def pooled(function: Any, arguments: Iterable[Any], workers: int, ahead: int = 4) -> Iterator[Any]:
    """The results, in the order of the arguments, which are read only as far as needed."""
    from concurrent.futures import ThreadPoolExecutor

    pool, futures = ThreadPoolExecutor(checked("workers", workers)), []  # type: Any, list[Any]
    submitted = (pool.submit(function, argument) for argument in arguments)
    try:
        futures.extend(itertools.islice(submitted, ahead * workers))
        while futures:  # so many are ahead: a slow one does not stop the others
            yield futures.pop(0).result()
            futures.extend(itertools.islice(submitted, 1))
    finally:
        for future in futures:
            future.cancel()
        pool.shutdown(wait=False)


# --- 7. Command line ----------------------------------------------------------------------------
OPTIONS = re.findall(r"^  (?:(-\w), )?(--[\w-]+)(?: ([A-Z]+))?(?:  |$)", HELP, re.MULTILINE)
CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])


def main(argv: list[str] | None = None) -> int:
    """Runs the program. The exit code; Ctrl-C ends the process by its signal."""
    for stream in (sys.stdout, sys.stderr):
        getattr(stream, "reconfigure", dict)(errors="replace")
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        if args.help or args.version:
            put(HELP if args.help else VERSION)
            return 0
        return Program(args).run()
    except ValueError as error:  # its parameters are flags here
        names = r"^(provider|model)\b|\b(max|base)_delay\b"
        say("error: " + re.sub(names, lambda m: "--" + m.group().replace("_", "-"), str(error)))
        return 2
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C kills at once
        say("\nInterrupted.")
        os.kill(os.getpid(), signal.SIGINT)  # an exit code would not stop a shell's loop
        return 130
    except ImportError as error:
        say(f"missing package: {error.name} - run: pip install requests python-dotenv")
    except OSError as error:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # what is held is lost
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 141
        say(f"error: {error.strerror or error}")
    return 1


def parse(argv: list[str]) -> Any:  # the options as the lines of `HELP` have them; ValueError
    import argparse
    from difflib import get_close_matches

    def refuse(message: str) -> Any:
        for flag in re.findall(r"unrecognized arguments:.*? (-\S+)", message):
            near = [f"did you mean {name}? " for name in get_close_matches(flag, flags, 1, 0.5)]
            message += f" ({''.join(near)}a question that begins with - goes after --)"
        raise ValueError(message)

    flags = [name for _, name, _ in OPTIONS]
    parser: Any = argparse.ArgumentParser(usage="", add_help=False, allow_abbrev=False)
    parser._negative_number_matcher = re.compile(r"-(\d+|\d*\.\d+|inf|nan)$")  # --base-delay -inf
    parser.error = refuse
    parser.add_argument("question", nargs="*")
    for *names, value in OPTIONS:
        parser.add_argument(*filter(None, names), action="store" if value else "store_true")
    # the intermixed parse takes flags anywhere, but does not know "--"
    args = (parser.parse_args if "--" in argv else parser.parse_intermixed_args)(argv)
    for name, (kind, _, _, allowed) in NUMBERS.items():
        text, flag = getattr(args, name, None), "--" + name.replace("_", "-")
        try:
            setattr(args, name, None if text is None else checked(name, kind(text)))
        except ValueError:
            raise ValueError(f"{flag} must be {allowed}, not {text!r}") from None
    words = " ".join(args.question) or "--file" * bool(args.file)
    is_free = not words or not (args.check or args.list_models or args.batch)
    require(is_free, f"--check, --list-models, --batch: not allowed with {words!r:.60}")
    require(not (args.quiet and args.verbose), "--quiet: not allowed with --verbose")
    require(args.batch or not (args.output or args.workers), "--output, --workers: need --batch")
    return args


def say(line: str, end: str = "\n") -> None:  # a line on stderr, if there is one
    try:
        sys.stderr.write(line.translate(CONTROLS) + end)
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):  # full, closed or None
        sys.stderr = None


def put(text: str) -> None:  # in pieces: one big write may not notice that the reader has gone
    for start in range(0, len(text), 4096):
        print(text[start : start + 4096], end="", flush=True)


def opened(flag: str, path: str, mode: str) -> Any:  # to write, it must be ours alone
    try:
        file = open(0 if path == "-" else path, mode, closefd=path != "-")  # noqa: SIM115
        if mode != "rb":
            with contextlib.suppress(ImportError):  # Windows has none
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except OSError as error:
        taken = isinstance(error, BlockingIOError) and "another run is writing to it"
        raise ValueError(f"{flag} {path}: {taken or error.strerror or error}") from None


def question_of(args: Any) -> str:  # the text of a file, then of a pipe, then the words
    dash, stdin, parts = args.question[:1] == ["-"], sys.stdin, []
    is_read = stdin is not None and (dash or not (stdin.isatty() or args.no_stdin))
    waiting = "waiting for piped input; use --no-stdin (or </dev/null) to skip"
    timer = threading.Timer(2.0, say, [waiting])  # seconds
    timer.daemon = True
    timer.start()
    for path in dict.fromkeys([args.file] * bool(args.file) + ["-"] * is_read):
        with opened("--file", path, "rb") as file:
            data = file.read()
        utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        parts.append(data.decode("utf-16" if utf16 else "utf-8-sig", "replace").replace("\0", ""))
    timer.cancel()
    words, usage = args.question[dash:], "\n".join(re.findall("(?m)^usage.*|^  python .*", HELP))
    question = "\n\n".join(filter(None, (text.strip("\r\n") for text in [*parts, " ".join(words)])))
    is_given = words or args.file or args.no_stdin or not is_blank(question)
    require(is_given, "no question" + (": stdin was empty" if parts else "\n" + usage))
    return question


def to_json(result: Any, **said: Any) -> str:  # a line: what was said, and what came of it
    error = str(result) if isinstance(result, FallbackLLMError) else None
    said.update(answer=getattr(result, "text", None), error=error)
    for name in ("provider", "model", "finish_reason", "usage", "retry_after"):
        said[name] = getattr(result, name, None) or None
    said["attempts"] = trail = [dict(vars(attempt)) for attempt in result.attempts]
    for step in trail:
        step.update(waited=round(step["waited"], 3), elapsed=round(step["elapsed"], 3))
    said["elapsed_seconds"] = round(sum(step["waited"] + step["elapsed"] for step in trail), 3)
    line = json.dumps(said, ensure_ascii=False, default=lambda verdict: verdict.word)
    odd = "[\x7f-\x9f\u2028\u2029\ud800-\udfff]"  # terminals and encoders stumble over these
    return re.sub(odd, lambda m: f"\\u{ord(m.group()):04x}", line) + "\n"


class Program:  # one run of the command line
    def __init__(self, args: Any) -> None:
        if sys.stdout is None:
            raise OSError("stdout is closed: there is no place for the answer")
        silent = args.quiet or (args.batch and not args.verbose)
        logger.setLevel("CRITICAL" if silent else "DEBUG" if args.verbose else "INFO")
        logger.addFilter(lambda record: say(record.getMessage()))  # type: ignore # and no handler
        logger.debug("🚀 Initializing Fallback LLM System...")
        given = {name: value for name, value in vars(args).items() if value is not None}
        config = {name: given[name] for name in vars(RetryConfig()) if name in given}
        retry = RetryConfig(**config, jitter=not args.disable_jitter)
        self.args, self.llm = args, FallbackLLM(retry, timeout=args.timeout)
        names = ("provider", "model", "system", "temperature", "max_tokens")
        self.common = {name: given[name] for name in names if name in given}
        self.rows = self.llm.rows(args.provider)
        for problem in filter(None, map(self.llm.key_problem, self.rows)):
            logger.debug("⚠️  %s", problem)

    def run(self) -> int:
        args, act = self.args, self.respond if self.args.batch is None else self.batch
        act = self.survey if args.check or args.list_models else act
        with contextlib.closing(self.llm):
            try:
                code = act()
            except FallbackLLMError as error:  # the first of its lines is the sum of the others
                code, (first, *lines) = 1, f"❌ {error}".split("\n")
                lines = [first, *lines] if isinstance(error, NoProviderError) else [*lines, first]
                say(" ".join(f"❌ {error}".split()) if args.quiet else "\n".join(lines))
            if args.stats:
                stats = self.llm.get_stats().items()
                say("\n📊 Usage Statistics:" + "".join(f"\n   {name}: {n}" for name, n in stats))
        return code

    def respond(self) -> int:  # asks one question, prints the answer; 0 if there is one
        question, args = question_of(self.args), self.args
        names = ", ".join(row.name for row in self.rows if not self.llm.key_problem(row))
        logger.debug("✅ Available providers: %s\n❓ Question: %s\n🤔 Thinking...", names, question)
        asked, is_live = {"question": question, **self.common}, args.stream and not args.json
        result: Any = self.show(self.llm.stream(**asked)) if is_live else self.llm.result(asked)
        put(to_json(result) if args.json else "")
        if isinstance(result, FallbackLLMError):
            raise result
        self.show(iter([] if is_live or args.json else [result.text]))
        if result.finish_reason == "length":
            logger.info("✂️  answer cut at --max-tokens %d", args.max_tokens or 500)
        logger.info("\n⏱️  Response time: %.2fs", result.elapsed)
        return 0

    def show(self, pieces: Iterator[str]) -> Any:  # less the blank lines around; what it returns
        held, begun = "", False
        try:
            while True:
                held += next(pieces).translate(CONTROLS)
                if not begun and held.strip():
                    held, begun = re.sub(r"\A\s*\n", "", held), True
                    logger.info("\n💡 Response:")
                text = held.rstrip("\n") if begun else ""
                held = held[len(text) :]
                put(text)
        except StopIteration as end:
            return end.value
        finally:
            put("\n" * begun)

    def survey(self) -> int:  # prints which keys and models work, or all models
        llm, found, layout = self.llm, [], "{provider}\t{model}\n"  # type: Any, list[Json], str
        for row in self.rows if self.args.list_models else ():
            models = llm.served(row) or llm.models[row.name]
            found += [{"provider": row.name, "model": model} for model in models]
        if self.args.check:
            found = [llm.check(row) for row in self.rows]
            layout = "{provider}: key {key} ({seconds:.2f}s); served: {served}; "
            layout += "not served: {not_served}; {reason}\n"
        for one in found if not self.args.json else ():
            told = {k: ", ".join(v) or "-" if isinstance(v, list) else v for k, v in one.items()}
            put(layout.format(**told).translate(CONTROLS))
        put(json.dumps(found) + "\n" if self.args.json else "")
        return int(self.args.check and not any(report["served"] for report in found))

    def batch(self) -> int:  # asks what has no answer yet; 0 if now all have one
        self.before: dict[Any, int] = {}  # answered by an earlier run: id -> hash of the question
        self.counts: dict[str, int] = collections.Counter()  # by provider, and "failed"
        self.started, self.told, self.stopped = time.monotonic(), 0.0, False
        self.lock, args, redraws = threading.Lock(), self.args, sys.stderr and sys.stderr.isatty()
        self.line, self.end, self.pause = ("{:79.79}", "\r", 0.5) if redraws else ("{}", "\n", 10.0)
        with contextlib.ExitStack() as stack:
            source = stack.enter_context(opened("--batch", args.batch, "rb"))
            source = source if source.seekable() else io.BytesIO(source.read())
            self.write = self.opened_output(stack) if args.output else put
            self.total = sum(1 for _ in self.questions(source))
            collections.deque(pooled(self.one, self.questions(source), args.workers or 8, 100), 0)
        failed, done = self.counts["failed"], sum(self.counts.values())
        line = f"{done - failed} answered, {failed} failed, {len(self.before)} answered before"
        say((self.line.format(line) + "\n") * (failed > 0 or not args.quiet), end="")
        return int(failed > 0)

    def opened_output(self, stack: contextlib.ExitStack) -> Any:  # what adds a line to it
        path, source = os.path.realpath(self.args.output), os.path.realpath(self.args.batch)
        require(path != source, f"--output {path}: these are the questions")
        old = stack.enter_context(opened("--output", path, "ab+"))
        old.seek(0)
        is_ours = os.path.isfile(path) and all(b'{"id": '.startswith(line[:7]) for line in old)
        require(is_ours, f"--output {path}: not a file of answers, left as it is")
        file = stack.enter_context(opened("--output", path + ".part", "wb"))
        os.chmod(file.name, os.stat(path).st_mode & 0o777)
        old.seek(0)
        for line in old:
            said = parsed(line[:-1])  # what was torn is no JSON
            name, answer = dig(said, "id"), dig(said, "answer")
            if answer is not None and type(name) in (str, int) and name not in self.before:
                self.before[name] = hash(str(dig(said, "question")))
                file.write(line)
        file.flush()
        os.replace(file.name, path)
        return lambda line: (file.write(line.encode()), file.flush())  # one call of the system

    def questions(self, source: Any) -> Iterator[tuple[Any, Json]]:  # those without an answer yet
        source.seek(0)
        seen = set()
        for place, line in filter(lambda pair: pair[1].strip(), enumerate(source, 1)):
            text = line.decode("utf-8-sig", "replace").strip()
            try:
                require(b"\0" not in line, "save the file as UTF-8")
                fields = json.loads(text) if text[:1] == "{" else {"question": text}
                name, asked = fields.pop("id", place), hash(str(fields.get("question")))
                fields = {**self.common, **fields}
                is_own = type(name) in (str, int) and name not in seen
                is_own = is_own and self.before.get(name, asked) == asked
                require(is_own, f"id must be a text or number of this question, not {name!r:.60}")
                seen.add(name)
                self.llm.checked_question(**fields)
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(f"--batch {self.args.batch}: line {place}: {error}") from None
            if name not in self.before:
                yield name, fields

    def one(self, question: tuple[Any, Json]) -> None:  # asks it and writes its line
        name, fields = question
        with self.lock:
            if self.stopped:
                return
        result: Any = self.llm.result(fields)
        said = {key: fields[key] for key in ("messages", "question") if key in fields}
        with self.lock:
            self.stopped = True  # if the next line fails, nobody shall pay for more
            self.write(to_json(result, id=name, **said))
            self.stopped = False
            self.counts["failed" if isinstance(result, FallbackLLMError) else result.provider] += 1
            passed, done = time.monotonic() - self.started, sum(self.counts.values())
            if self.args.quiet or passed - self.told < self.pause:
                return
            self.told, rate, left = passed, done / passed, (self.total - done) / done * passed
            line = f"{done}/{self.total} done, {self.counts['failed']} failed, {rate:.1f}/s, "
            whose = "".join(f"; {k} {n}" for k, n in sorted(self.counts.items()) if k != "failed")
            say(self.line.format(f"{line}{left:.0f} s left{whose}"), self.end)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
