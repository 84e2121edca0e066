#!/usr/bin/env python3
# /// script
# requires-python = ">=3.7"
# dependencies = ["requests", "python-dotenv"]
# ///
"""Ask a language model, and get an answer even when providers fail.

Each question works its way along a queue of candidates, which are (provider, model) pairs,
until one of them gives a complete, non-empty answer:

    cerebras m1 ─┬─ a whole answer ──────────► done
                 ├─ 429, short wait ─────────► wait, then ask m1 again
                 ├─ 429, long wait ────────┐
                 ├─ 5xx, empty, cut, silent ┴► m1 goes to the end of the line; ask the next one
                 ├─ 400, 404 … ──────────────► m1 is out; ask the next one
                 ├─ 401, 402 … ──────────────► all of cerebras is out; ask the next one
                 └─ content refused ─────────► stop: no other model is asked
    cerebras m2, groq m1 … openrouter m4       nobody left: the question has failed

The file reads from top to bottom; each section uses only the sections above it:

    1  settings             RetryConfig, Provider, PROVIDERS, where keys and lists come from
    2  results and errors   Answer, Attempt, Verdict, ProviderHealth, the exceptions
    3  judging              what a reply means, and how long a server asks us to wait
    4  wire format          request bodies, server-sent events, the answer being put together
    5  Transport            one HTTP exchange within its time limits
    6  Health               what is known of providers and models across questions
    7  Queue                one question's candidates: which is next, and how long to wait
    8  FallbackLLM          the public methods and the walk
    9  command line         options, output, one function per command
    10 Batch                many questions from a file to a file

All times are in seconds.
"""

from __future__ import annotations

import argparse
import base64
import codecs
import collections
import contextlib
import dataclasses
import difflib
import enum
import fnmatch
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import queue
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import weakref
import zlib
from email.utils import mktime_tz, parsedate_tz
from http import HTTPStatus
from typing import (
    IO,
    TYPE_CHECKING,
    Any,
    Callable,
    Deque,
    Dict,
    Generator,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    NoReturn,
    Optional,
    Pattern,
    Sequence,
    Set,
    Tuple,
    TypeVar,
    Union,
    cast,
)
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import requests  # imported late when the program runs: it takes longer than all the rest

__version__ = "2.0.0"
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

Json = Dict[str, Any]
Clock = Callable[[], float]

logger = logging.getLogger("fallback_llm")


# --- 1. Settings --------------------------------------------------------------------------------


class NumberRule(NamedTuple):
    """What a number may be."""

    kind: type
    lowest: float
    highest: float
    allowed: str  # the same in words


COUNT_RULE = NumberRule(int, 1, 1000, "a whole number from 1 to 1000")
DELAY_RULE = NumberRule(float, 0, 1e9, "a finite number of seconds >= 0")
LIMIT_RULE = NumberRule(float, 1e-6, 1e9, "a finite number of seconds > 0")
NUMBER_RULES = {
    "max_tokens": NumberRule(int, 1, 1000000, "a whole number >= 1, at most 1000000"),
    "max_attempts": COUNT_RULE,
    "max_workers": COUNT_RULE,
    "workers": COUNT_RULE,
    "base_delay": DELAY_RULE,
    "max_delay": DELAY_RULE,
    "exponential_base": NumberRule(float, 1, 1e9, "a finite number >= 1"),
    "timeout": LIMIT_RULE,
    "idle_timeout": LIMIT_RULE,
    "temperature": NumberRule(float, 0, 2, "a number from 0 to 2"),
}


def check_number(name: str, value: object) -> None:
    """Raise ValueError, naming the parameter and its limits, if the value breaks its rule."""
    rule = NUMBER_RULES[name]
    is_number = isinstance(value, (int, rule.kind)) and not isinstance(value, bool)

    # NaN is in no range.
    if not is_number or not rule.lowest <= cast(float, value) <= rule.highest:
        raise ValueError(f"{name} must be {rule.allowed}, not {value!r:.60}")


def number_of(value: float) -> str:
    """The number as a person would write it: 2 rather than 2.0."""
    return f"{value:g}"


@dataclasses.dataclass
class RetryConfig:
    """How many times a model is asked, and how long to wait in between.

    After the n-th failure the wait is min(max_delay, base_delay * exponential_base ** (n - 1)),
    or as long as the server asks for, if that is longer. Raises ValueError for invalid values.
    """

    max_attempts: int = 5  # requests to one model in one question, the first included
    base_delay: float = 2.0
    max_delay: float = 60.0  # no single wait is longer
    exponential_base: float = 2.0
    jitter: bool = True  # wait 80 to 100 % of that, at random
    wait_on_rate_limit: bool = True  # False: try another model instead of waiting

    def __post_init__(self) -> None:
        for name in ("max_attempts", "base_delay", "max_delay", "exponential_base"):
            check_number(name, getattr(self, name))
        if self.max_delay < self.base_delay:
            delays = number_of(self.max_delay), number_of(self.base_delay)
            raise ValueError("max_delay ({}) is below base_delay ({})".format(*delays))

    def backoff(self, failures: int) -> float:
        """Seconds to wait after this many failures, before jitter."""
        # The growth is cut at 30 failures, long before a float would overflow.
        growth = self.exponential_base ** (min(failures, 30) - 1)
        return min(self.max_delay, self.base_delay * growth)


@dataclasses.dataclass(frozen=True)
class Provider:
    """One row of PROVIDERS: an endpoint that speaks the chat completions API.

    Raises ValueError for an invalid row.
    """

    name: str  # in lower case
    base_url: str  # with the version's path; http:// only to this machine or without a key
    key_env: Optional[str]  # the variable that holds the key; None: no key is needed
    models: Tuple[str, ...]  # in the order in which they are asked
    idle_timeout: float = 60.0  # seconds without progress that end an attempt
    key_url: str = ""  # where to get a key
    key_path: str = "/models"  # a GET of this path shows whether a key is accepted
    free_only: bool = False  # models found in the provider's list must be free of charge
    defaults: Dict[str, Json] = dataclasses.field(default_factory=dict, hash=False)
    # defaults: parameters for models whose id contains the word

    def __post_init__(self) -> None:
        check_number("idle_timeout", self.idle_timeout)
        if not isinstance(self.name, str) or not re.fullmatch(r"[a-z0-9_.-]+", self.name):
            raise ValueError(f"a provider's name must be in lower case, not {self.name!r:.60}")
        if isinstance(self.models, str):
            raise ValueError(f"models of {self.name} must be several, such as ({self.models!r},)")
        object.__setattr__(self, "models", tuple(self.models))

    def variable(self, suffix: str) -> str:
        """The name of an environment variable of this provider, such as GROQ_MODELS."""
        return re.sub(r"\W", "_", self.name).upper() + "_" + suffix

    def parameters_for(self, model: str) -> Json:
        """The default parameters of a request to this model."""
        parameters: Json = {}
        for word, defaults in self.defaults.items():
            if word in model:
                parameters.update(defaults)
        return parameters


# Models that think before they answer can spend a small max_tokens on thinking alone, so they
# are asked to think little or not at all. gpt-oss accepts "low" and rejects "none" (2026-10);
# qwen3.8 accepts "none" on Groq, and OpenRouter switches reasoning off for every model (2026-10).
THINK_LITTLE: Json = {"reasoning_effort": "low"}
THINK_NOT: Json = {"reasoning_effort": "none"}

# Model ids as of October 2026. If all of a row's models are gone, the provider's list is fetched.
PROVIDERS: Tuple[Provider, ...] = (
    Provider(
        name="cerebras",
        base_url="https://api.cerebras.ai/v1",
        key_env="CEREBRAS_API_KEY",
        models=("gpt-oss-120b", "qwen-3.8-27b"),
        idle_timeout=10.0,
        key_url="https://cloud.cerebras.ai",
        defaults={"gpt-oss": THINK_LITTLE, "qwen-3.8": THINK_NOT},
    ),
    Provider(
        name="groq",
        base_url="https://api.groq.com/openai/v1",
        key_env="GROQ_API_KEY",
        models=("openai/gpt-oss-120b", "openai/gpt-oss-20b", "qwen/qwen3.8-27b"),
        idle_timeout=10.0,
        key_url="https://console.groq.com/keys",
        defaults={"gpt-oss": THINK_LITTLE, "qwen3.8": THINK_NOT},
    ),
    Provider(
        name="openrouter",
        base_url="https://openrouter.ai/api/v1",
        key_env="OPENROUTER_API_KEY",
        models=(
            "nvidia/nemotron-3-super-120b-a12b:free",
            "qwen/qwen3.8-27b:free",
            "google/gemma-4-31b-it:free",
            "openrouter/free",  # routes to any free model
        ),
        idle_timeout=30.0,
        key_url="https://openrouter.ai/settings/keys",
        key_path="/key",  # its models list accepts any key
        free_only=True,
        defaults={"qwen3.8": {"reasoning": {"enabled": False}}},
    ),
)

MAX_ENV_FILE = 65536  # characters; python-dotenv needs minutes for a larger file of blanks


def stripped(value: Optional[str]) -> str:
    """The value without any whitespace or quotation marks pasted around it."""
    return (value or "").strip(" \t\r\n\"'")


def is_placeholder(value: str) -> bool:
    """Whether this is placeholder text rather than a key, such as your_api_key_here."""
    text = value.lower()
    if text in ("todo", "none", "null", "changeme", "change-me", "change_me", "replaceme"):
        return True
    if re.match(r"your[_ -]|<.*>$|(change|replace).?me$", text):
        return True
    if re.search(r"[_ -]here$|\.\.\.$", text):
        return True

    # gsk_xxxxxxxx: nothing but x after the prefix
    last_part = re.split(r"[-_]", text)[-1]
    return len(last_part) >= 3 and not last_part.strip("x")


class Settings:
    """The keys and model lists that the environment and the .env files hold.

    A name is looked up in the environment, then in .env in the current folder, then in .env beside
    this file, then in fallback_llm/.env in the user's configuration folder. Empty values count as
    unset, and a placeholder is used only if nothing else is found. Nothing else is taken from a
    .env file, and nothing is written to the environment.
    """

    def __init__(self) -> None:
        self.problems: List[str] = []  # .env files that could not be used, and why
        self._sources: List[Mapping[str, Optional[str]]] = [os.environ]
        for path in env_files():
            if os.path.isfile(path):
                self._sources.append(self._read(path))

    def value(self, name: str) -> str:
        """The value of the first source that has one, "" if none has."""
        values = [stripped(source.get(name)) for source in self._sources]
        values = [value for value in values if value]
        for value in values:
            if not is_placeholder(value):
                return value
        if values:
            return values[0]
        return ""

    def _read(self, path: str) -> Dict[str, Optional[str]]:
        """The names and values of a .env file, {} if it cannot be read."""
        try:
            from dotenv import dotenv_values
        except ImportError:
            self._complain(f"{path} is not read: pip install python-dotenv")
            return {}

        try:
            with open(path, encoding="utf-8-sig") as file:
                text = file.read(MAX_ENV_FILE + 1)
            if len(text) > MAX_ENV_FILE:
                size = f"{MAX_ENV_FILE} characters"
                self._complain(f"{path} is not read: it is larger than {size}")
                return {}
            if "\0" in text:
                raise ValueError("a NUL character")
            # A long run of blanks would keep python-dotenv busy for a second or more.
            text = re.sub(r"[ \t]{100,}", " ", text)
            text = re.sub(r"\n{100,}", "\n", text)
            with silent_dotenv() as bad_lines:
                values = dotenv_values(stream=io.StringIO(text), interpolate=False)
        except OSError as error:
            self._complain(f"{path} cannot be read: {error.strerror or error}")
            return {}
        except ValueError:
            self._complain(f"{path} cannot be read: save it as UTF-8")
            return {}

        if bad_lines:
            numbers = ", ".join(map(str, bad_lines))
            self._complain(f"{path}: not NAME=value and skipped: line {numbers}")
        self._tell_ignored_names(path, values)
        return dict(values)

    def _complain(self, problem: str) -> None:
        """Keep a problem for the message about missing keys, and log it."""
        self.problems.append(problem)
        logger.warning("⚠️  %s", problem)

    def _tell_ignored_names(self, path: str, names: Iterable[str]) -> None:
        """Tell, with --verbose, of names that look like ours but have no effect."""
        prefixes = tuple(row.variable("") for row in PROVIDERS)
        for name in names:
            if name.startswith(prefixes) and not name.endswith(("_API_KEY", "_MODELS")):
                logger.debug("⚠️  %s: %s has no effect in a .env file", path, name)


def env_files() -> List[str]:
    """The paths of the .env files to read, in order of precedence."""
    beside_this_file = os.path.dirname(globals().get("__file__", ""))
    home = os.path.expanduser("~")
    configuration = os.environ.get("XDG_CONFIG_HOME") or os.path.join(home, ".config")
    folders = ["", beside_this_file, os.path.join(configuration, "fallback_llm")]
    paths = [os.path.abspath(os.path.join(folder, ".env")) for folder in folders]
    return list(dict.fromkeys(paths))


@contextlib.contextmanager
def silent_dotenv() -> Iterator[List[int]]:
    """Collect the numbers of malformed lines, which python-dotenv would log without a path."""
    bad_lines: List[int] = []

    def note(record: logging.LogRecord) -> bool:
        bad_lines.extend(int(number) for number in re.findall(r"line (\d+)", record.getMessage()))
        return False

    dotenv_logger = logging.getLogger("dotenv.main")
    dotenv_logger.addFilter(note)  # type: ignore[arg-type,unused-ignore]
    try:
        yield bad_lines
    finally:
        dotenv_logger.removeFilter(note)  # type: ignore[arg-type,unused-ignore]


def is_loopback(url: str) -> bool:
    """Whether the URL leads to this machine."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or bool(re.fullmatch(r"127(\.\d{1,3}){3}", host))


def is_clear_text(url: str) -> bool:
    """Whether a key would travel over the network in clear text."""
    return url.startswith("http://") and not is_loopback(url)


def base_url(row: Provider) -> str:
    """The address of a provider: from the environment (GROQ_BASE_URL), or else from its row.

    An address without a path gets the path of the row. Raises ValueError if the address is invalid
    or if a key would be sent to it in clear text.
    """
    name = row.variable("BASE_URL")
    url = (stripped(os.environ.get(name)) or row.base_url).rstrip("/")
    address = re.fullmatch(r"(https?)://([\w.-]+|\[[0-9a-fA-F:]+\])(:\d{1,5})?(/[^\s?#@]*)?", url)
    if address is None or (is_clear_text(url) and row.key_env is not None):
        # A password or a key may be part of the address.
        shown = re.sub(r"//.*@|[?#].*", "//...", url)[:200]
        allowed = "https://..., or http:// to this machine or for a provider without a key"
        raise ValueError(f"{name} must be {allowed}, not {shown!r}")

    if address.group(4) is None:
        url += urlsplit(row.base_url).path.rstrip("/")
    return url


# --- 2. Results and errors ----------------------------------------------------------------------


class ProviderStatus(enum.Enum):
    """What can be expected of a provider."""

    HEALTHY = "healthy"
    RATE_LIMITED = "rate_limited"
    FAILED = "failed"
    UNAVAILABLE = "unavailable"  # it has no key, or the key was refused


@dataclasses.dataclass
class ProviderHealth:
    """What is known of a provider. Times are seconds since the epoch; 0.0 means never."""

    status: ProviderStatus = ProviderStatus.HEALTHY
    last_success: float = 0.0
    last_failure: float = 0.0
    consecutive_failures: int = 0
    rate_limit_reset_time: float = 0.0


class Verdict(enum.Enum):
    """What the failure of an attempt means; VERDICT_RULES says what follows from it."""

    RATE_LIMITED = "rate_limited"
    FAULT = "fault"
    UNSUITABLE = "unsuitable"
    GONE = "gone"
    DENIED = "denied"
    REFUSED = "refused"
    REJECTED = "rejected"


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One HTTP exchange in the trail of a question."""

    provider: str
    model: str
    number: int = 1  # of this model's attempts in this question
    status: Optional[int] = None  # the HTTP status; None if no reply came
    verdict: Optional[Verdict] = None  # None: this attempt gave the answer
    reason: str = ""
    waited: float = 0.0  # seconds slept before it
    elapsed: float = 0.0  # seconds it took

    def to_dict(self) -> Json:
        """The attempt as plain JSON."""
        fields = dict(vars(self))
        fields["verdict"] = None if self.verdict is None else self.verdict.value
        fields["waited"] = round(self.waited, 3)
        fields["elapsed"] = round(self.elapsed, 3)
        return fields


@dataclasses.dataclass(frozen=True)
class Answer:
    """A whole, non-empty answer, and how it came about. str(answer) is its text."""

    text: str
    provider: str = ""
    model: str = ""
    finish_reason: Optional[str] = None
    usage: Json = dataclasses.field(default_factory=dict)
    attempts: Tuple[Attempt, ...] = ()  # the trail; the answer's own attempt is the last
    elapsed: float = 0.0  # seconds of the whole question
    skipped_events: int = 0  # malformed events that a live stream had to leave out

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> Json:
        """The answer as plain JSON, with the trail."""
        fields = dict(vars(self))
        fields["attempts"] = [attempt.to_dict() for attempt in self.attempts]
        fields["elapsed"] = round(self.elapsed, 3)
        return fields


# FallbackLLMError
#  ├── NoProviderError      none of the chosen providers has a key; nothing was sent
#  ├── AllProvidersFailed   nobody is left in the line, or the time is up
#  ├── AnswerRefused        a provider refuses the question itself
#  └── StreamInterrupted    a stream broke after its first text
# A mistake by the caller raises ValueError; nothing has been sent in that case either.


class FallbackLLMError(Exception):
    """The base of this module's errors."""

    def __init__(self, message: str = "", attempts: Iterable[Attempt] = ()) -> None:
        super().__init__(message)
        self.attempts = tuple(attempts)  # the trail of the question


class NoProviderError(FallbackLLMError):
    """None of the chosen providers has a key. Nothing was sent."""


class AllProvidersFailed(FallbackLLMError):
    """Nobody is left to ask, or the time is up."""

    def __init__(
        self,
        message: str = "",
        attempts: Iterable[Attempt] = (),
        retry_after: Optional[float] = None,
    ) -> None:
        super().__init__(message, attempts)
        self.retry_after = retry_after  # seconds until the first rate limit ends, if known


class AnswerRefused(FallbackLLMError):
    """A provider refused the question itself, so no other one was asked."""

    def __init__(
        self, message: str = "", attempts: Iterable[Attempt] = (), reason: str = ""
    ) -> None:
        super().__init__(message, attempts)
        self.reason = reason  # the provider's own


class StreamInterrupted(FallbackLLMError):
    """A live stream broke after its first text, which cannot be taken back."""

    def __init__(
        self,
        message: str = "",
        attempts: Iterable[Attempt] = (),
        partial: str = "",
        provider: str = "",
        model: str = "",
    ) -> None:
        super().__init__(message, attempts)
        self.partial = partial  # the text so far
        self.provider = provider
        self.model = model


# --- 3. Judging: what a reply means. Pure -------------------------------------------------------


class VerdictRule(NamedTuple):
    """What follows from a verdict."""

    asked_again: bool  # in this question
    counts: bool  # against the provider, in later questions
    asked_last_for: float  # seconds for which later questions ask it last; 0: the backoff
    advice: str


VERDICT_RULES = {
    Verdict.RATE_LIMITED: VerdictRule(True, True, 0.0, "wait for the limit to end, or add a key"),
    Verdict.FAULT: VerdictRule(True, True, 0.0, "try again later"),
    Verdict.UNSUITABLE: VerdictRule(
        False, False, 0.0, "change the question, --max-tokens or the model (-m)"
    ),
    Verdict.GONE: VerdictRule(
        False, True, 600.0, "choose another model with -m (see --list-models), or set {models}"
    ),
    Verdict.DENIED: VerdictRule(False, True, 600.0, "check {key} and the account: {url}"),
    Verdict.REFUSED: VerdictRule(False, False, 0.0, "change the question"),
    Verdict.REJECTED: VerdictRule(True, False, 0.0, "ask for the expected form in the question"),
}


@dataclasses.dataclass(eq=False, repr=False)
class Failure(Exception):
    """Why an attempt gave no answer. It is raised and caught inside this file."""

    verdict: Verdict
    reason: str
    reaches_provider: bool = False  # it holds for all models of the provider
    delays_siblings: bool = False  # the provider's other models are asked after other providers
    hint: Optional[float] = None  # seconds after which the server wants to be asked again
    advice: str = ""  # what to do, where the verdict's own advice does not fit
    summary: str = ""  # the reason in a few words, for the end of a question that failed
    is_blameless: bool = False  # the caller's own time limit: it says nothing of the provider
    is_unreachable: bool = False  # no connection was made
    is_stale: bool = False  # a connection that was kept alive had been closed by the server

    @property
    def rule(self) -> VerdictRule:
        """What follows from the verdict."""
        return VERDICT_RULES[self.verdict]


class Ruling(NamedTuple):
    """A verdict, and whether it reaches all models of the provider."""

    verdict: Verdict
    reaches_provider: bool = False


LIMITED = Ruling(Verdict.RATE_LIMITED)
ACCOUNT_LIMITED = Ruling(Verdict.RATE_LIMITED, reaches_provider=True)
FAULT = Ruling(Verdict.FAULT)
DOWN = Ruling(Verdict.FAULT, reaches_provider=True)
UNSUITABLE = Ruling(Verdict.UNSUITABLE)
GONE = Ruling(Verdict.GONE)
DENIED = Ruling(Verdict.DENIED, reaches_provider=True)
REFUSED = Ruling(Verdict.REFUSED)

# Unambiguous error codes; * matches anything, and the first line that matches decides.
# rate_limit_exceeded, invalid_request_error, tokens and requests are on no line: the providers
# put them on both temporary and permanent failures.
CODES: Sequence[Tuple[Ruling, str]] = (
    (REFUSED, "content_policy_violation content_filter refusal *moderation*"),
    (ACCOUNT_LIMITED, "*in_flight_budget* openrouter_free_tier*"),
    (LIMITED, "token_quota_exceeded request_quota_exceeded capacity_exhausted"),
    (FAULT, "queue_exceeded"),  # Cerebras: congestion, not our quota (2026-10)
    (DENIED, "invalid_api_key wrong_api_key authentication* payment_required*"),
    (DENIED, "insufficient_quota organization_* spend_limit_reached blocked_api_access"),
    (DENIED, "openrouter_credits openrouter_key_limit region_restricted unsupported_country*"),
    (UNSUITABLE, "account_*limit*"),
    (DENIED, "account_*"),
    (GONE, "model_archived_error"),
    (FAULT, "model_*overloaded model_*timeout model_*error"),
    (GONE, "model_*"),
    (GONE, "no_endpoints free_variant_ended"),
    (UNSUITABLE, "context_length_exceeded max_tokens_exceeded token_limit_exceeded"),
    (UNSUITABLE, "*_too_long *_too_large privacy_restricted constraint_filtered"),
    (UNSUITABLE, "unprocessable invalid_request invalid_prompt unsupported_* wrong_*"),
)

# Codes that say only that something broke, such as json_validate_failed for a model's output. A
# more specific status overrides them: a 429 with the type server_error is a rate limit.
BROKEN_CODES = "server server_error internal_server_error timeout overloaded *_overloaded"
BROKEN_CODES += " unavailable *_unavailable *_failed"

# Specific phrases in the message; … stands for up to 120 other characters. The first line that
# matches decides. Permanent conditions come before temporary ones.
PHRASES: Sequence[Tuple[Ruling, Sequence[str]]] = (
    (
        UNSUITABLE,
        [
            "request too large",
            "data policy",
            "data-policy",
            "guardrail restriction",
            "reduce the length of",
            "input is too long",
            "maximum … context",
            "exceed … context",
            "context length … exceed",
            "context window … exceed",
        ],
    ),
    (ACCOUNT_LIMITED, ["free-models-per-"]),
    (DOWN, ["check your network settings"]),
    (
        DENIED,
        [
            "insufficient quota",
            "insufficient credit",
            "insufficient balance",
            "insufficient fund",
            "exceeded your current quota",
            "overdue",
            "key limit exceeded",
            "credit balance is too low",
            "blocked api access",
        ],
    ),
    (GONE, ["is not a valid model id", "no endpoints found for"]),
)

# An unavailable model: one of the nouns, followed by one of the endings.
MODEL_NOUNS = ["model ", "models "]
MODEL_ENDS = ["does not exist", "not found", "not be found", "no longer", "retired", "archived"]
MODEL_ENDS += ["decommissioned", "deprecated", "discontinued", "unavailable for free"]
NOT_THE_MODEL = ["parameter", "tool", "property", "field"]

# An account, key, card or address that was blocked: one of each, in either order.
ACCOUNT_NOUNS = ["account", "organization", "organisation", "api key", "payment method"]
ACCOUNT_NOUNS += ["key ", "payment", "card ", "ip ", "ip, ", "address", "token ", "workspace"]
ACCOUNT_ENDS = ["restricted", "suspended", "flagged", "deactivated", "banned", "disabled"]
ACCOUNT_ENDS += ["blocked", "terminated", "violat"]

# A refusal concerns the input: one of the nouns is followed by one of the endings, or a policy
# is named along with what was done. Messages about an account were sorted out before.
INPUT_NOUNS = ["input ", "prompt ", "content ", "message ", "text ", "question ", "query "]
INPUT_ENDS = ["flagged", "blocked by", "violates our", "violates the content", "not allowed by our"]
POLICIES = ["content polic", "content management polic", "content safety polic", "moderation"]
POLICIES += ["content usage polic", "safety polic", "safety system", "safety filter"]
POLICIES += ["content filter", "request blocked: "]
REFUSING = ["violat", "against", "block", "flagged", "stopped", "trigger", "refus", "reject"]
REFUSING += ["not allowed", "filtered", "due to", "prohibit"]
REFUSAL_STATUSES = (0, 400, 403, 422)  # 0: inside a reply with the status 200

# A JSON 404 means that the model is gone, unless it names one of these.
NOT_GONE_404 = ["data policy", "guardrail", "parameter", "allowed providers", "privacy"]
# A JSON 403 means that this model is not for us, unless it names the key or the credit, or the
# account and no model (then the whole provider is out), or says that the request breaks rules.
KEY_WORDS = re.compile(r"\b(api.?keys?|keys?|credits?|billing|payments?|balance|credentials?)\b")
ACCOUNT_WORDS = re.compile(r"\b(accounts?|organi[sz]ations?|subscription|authenticat\w{0,6})\b")
BROKEN_RULES = re.compile(r"\bviolat|terms of service|usage polic|prohibited")

STATUSES = {
    400: UNSUITABLE,
    401: DENIED,
    402: DENIED,
    408: FAULT,
    409: FAULT,
    424: FAULT,
    425: FAULT,
    429: LIMITED,
    498: FAULT,  # Groq: its flex tier is at capacity (2026-08)
    499: FAULT,
}
TELLING_STATUSES = (401, 402, 403, 404, 413, 429)  # they say more than that something broke

RELAYED = "provider returned error"  # what a router says of its supplier's error (OpenRouter)
MAX_TEXT = 4000  # characters of a server's message that are looked at
MAX_PARTS = 100  # objects of an error that are looked at
MAX_HINT = 32 * 86400.0  # a longer "come back in" is junk
NESTED_FIELDS = ("error", "errors", "metadata", "availability", "headers")
CODE_FIELDS = ("limit_source", "code", "error", "error_type", "type")


class ErrorReport(NamedTuple):
    """What an error says, wherever it says it."""

    message: str
    codes: List[str]
    fields: Dict[str, List[Any]]  # all values by name, the outermost first


def judge(status: int, headers: Mapping[str, str], body: object, now: float) -> Failure:
    """What a reply that is no answer means.

    status: of HTTP, or 200 for an error inside a reply. headers: with names in lower case.
    body: JSON, or a text. now: seconds since the epoch. Codes decide first, then narrow words of
    the message, then the status.
    """
    report = read_error(body)
    code = status
    if status < 300:
        code = inner_status(report)

    ruling = ruling_for(code, report, is_json=isinstance(body, (dict, list)))
    verdict, reaches_provider = ruling

    # A supplier's trouble with its own key or account is not ours.
    if report.message.lower().startswith(RELAYED):
        reaches_provider = False
        if ruling in (DENIED, DOWN, FAULT, LIMITED, ACCOUNT_LIMITED):
            verdict = Verdict.RATE_LIMITED if code == 429 else Verdict.FAULT

    # Congestion rather than our quota: others are asked before it (Cerebras, 2026-10).
    if verdict is Verdict.RATE_LIMITED and headers.get("x-should-retry") == "false":
        verdict = Verdict.FAULT

    failure = Failure(verdict, reason_for(status, code, report), reaches_provider)
    if failure.rule.asked_again:
        failure.hint = hint_of(report, headers, now, verdict is Verdict.RATE_LIMITED)
    failure.advice = advice_for(status, headers, body)
    return failure


def read_error(body: object) -> ErrorReport:
    """Gather what an error of any shape says.

    Objects may be nested, and a router quotes its supplier's error as a string of JSON.
    """
    fields: Dict[str, List[Any]] = collections.defaultdict(list)
    parts = collections.deque([body])
    looked_at = 0
    while parts and looked_at < MAX_PARTS:
        looked_at += 1
        for name, value in fields_of(parts.popleft()).items():
            is_nested = name in NESTED_FIELDS and isinstance(value, (dict, list))
            if is_nested or (name == "raw" and is_relayed(fields)):
                parts.append(value)
            else:
                fields[name.lower()].append(value)

    codes = []
    for name in CODE_FIELDS:
        for value in reversed(fields[name]):  # the innermost knows best
            if isinstance(value, str) and len(value) <= 100:
                codes.append(value.lower())
    if any(fields["reasons"] + fields["flagged_input"] + fields["patterns"]):
        codes.append("moderation")
    return ErrorReport(message_of(fields), codes, fields)


def fields_of(part: object) -> Json:
    """The fields of a part of an error, which may be JSON in a text, in a list, or words."""
    part = parsed(part)
    if isinstance(part, list):
        part = part[0] if part else None
    if isinstance(part, str):
        return {"message": part}
    if isinstance(part, dict):
        return part
    return {}


def is_relayed(fields: Mapping[str, List[Any]]) -> bool:
    """Whether the outermost message is a router's, about its supplier."""
    messages = fields["message"]
    return bool(messages) and str(messages[0])[:100].lower().startswith(RELAYED)


def message_of(fields: Mapping[str, List[Any]]) -> str:
    """The message of an error, in one line, each text once."""
    texts = []
    for value in fields["message"] or fields["error"] or fields["detail"]:
        text = value
        if not isinstance(value, str):
            try:
                text = json.dumps(value) if value else ""
            except (ValueError, RecursionError):
                text = ""
        text = shortened(page_summary(text))
        if text and text not in texts:
            texts.append(text)
    return ": ".join(texts)


INVISIBLE = re.compile("[\\s\x00-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u2060\ufeff]+")
KEY_CHARACTERS = "".join(map(chr, range(33, 127)))


def shortened(text: str, limit: int = MAX_TEXT) -> str:
    """The text in one line, cut between two words.

    A cut inside a word could leave half of a key, which nothing would recognize any more.
    """
    line = INVISIBLE.sub(" ", text).strip()
    if len(line) > limit:
        line = (line[:limit].rstrip(KEY_CHARACTERS) or line[: limit // 2]) + "…"
    return line


def page_summary(text: str) -> str:
    """The title, heading or first words of an HTML or XML page; any other text as it is."""
    start = text[:MAX_TEXT].lstrip("\ufeff \t\r\n")
    if not re.match("<[a-zA-Z!?]", start):
        return text
    for tag in ("title", "h1"):
        heading = re.search(rf"(?is)<{tag}[^<>]{{0,200}}>(.{{1,500}}?)</{tag}", start)
        words = ""
        if heading is not None:
            words = without_tags(heading.group(1))
        if words:
            return f"HTML page: {words}"
    words = without_tags(re.sub("(?is)<(style|script).{0,2000}?</", "<", start))
    if words:
        return f"HTML page: {words}"
    return "an HTML page without words"


def without_tags(page: str) -> str:
    """The words of a page, without its tags."""
    return shortened(re.sub("<[^<>]{0,200}>", " ", page), 200)


def inner_status(report: ErrorReport) -> int:
    """The status that an error inside a 200 carries, 0 if there is none."""
    for name in ("status_code", "code", "http_status"):
        for value in report.fields[name]:
            number = to_number(value)
            if 400 <= number <= 599:
                return int(number)
    return 0


def ruling_for(code: int, report: ErrorReport, is_json: bool) -> Ruling:
    """The ruling of the codes, or else of the words, or else of the status."""
    for name in report.codes:
        for ruling, patterns in CODES:
            if fits(name, patterns):
                return ruling

    steps = " ".join(map(str, report.fields["failed_routing_step"])).lower()
    if any(word in steps for word in NOT_GONE_404):
        return UNSUITABLE
    words = ruling_by_words(code, report.message.lower())
    if words is not None:
        return words

    if code not in TELLING_STATUSES and any(fits(name, BROKEN_CODES) for name in report.codes):
        return FAULT
    return ruling_by_status(code, report, is_json)


def fits(name: str, patterns: str) -> bool:
    """Whether a code fits one of the patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.split())


def ruling_by_words(code: int, message: str) -> Optional[Ruling]:
    """The ruling of the message, which is in lower case; None if its words say nothing."""
    for ruling, phrases in PHRASES:
        if any(says(message, phrase) for phrase in phrases):
            return ruling

    is_account = says_pair(message, ACCOUNT_NOUNS, ACCOUNT_ENDS)
    if is_account or says_pair(message, ACCOUNT_ENDS, ACCOUNT_NOUNS):
        if code < 500 and code != 429:
            return DENIED
        return None
    is_about_model = not any(word in message for word in NOT_THE_MODEL)
    if is_about_model and says_pair(message, MODEL_NOUNS, MODEL_ENDS):
        return GONE
    if code in REFUSAL_STATUSES:
        names_policy = any(phrase in message for phrase in POLICIES)
        is_refusing = any(word in message for word in REFUSING)
        if says_pair(message, INPUT_NOUNS, INPUT_ENDS) or (names_policy and is_refusing):
            return REFUSED
    return None


def says(message: str, phrase: str) -> bool:
    """Whether the words of the phrase stand in the message, near each other where it has …"""
    return phrase_pattern(phrase).search(message) is not None


def says_pair(message: str, nouns: Sequence[str], ends: Sequence[str]) -> bool:
    """Whether one of the nouns is followed closely by one of the ends."""
    return pair_pattern(tuple(nouns), tuple(ends)).search(message) is not None


@functools.lru_cache(maxsize=None)
def phrase_pattern(phrase: str) -> Pattern[str]:
    """A compiled phrase, in which … has become a gap."""
    # The gap is bounded, so that searching a long message takes linear time.
    return re.compile(".{0,120}?".join(re.escape(part) for part in phrase.split(" … ")))


@functools.lru_cache(maxsize=None)
def pair_pattern(nouns: Tuple[str, ...], ends: Tuple[str, ...]) -> Pattern[str]:
    """A noun, a short gap, and an ending, compiled."""
    either_noun = "|".join(map(re.escape, nouns))
    either_end = "|".join(map(re.escape, ends))
    return re.compile(rf"\b(?:{either_noun}).{{0,80}}?(?:{either_end})")


def ruling_by_status(code: int, report: ErrorReport, is_json: bool) -> Ruling:
    """The ruling of the status, 0 for an error inside a 200 that carries none.

    When in doubt, blame only this model: asking the provider's next model costs a moment,
    whereas dropping the provider costs all of its models.
    """
    message = report.message.lower()
    words = " ".join([message, *report.codes])
    if code == 0 and re.search(r"rate.?limit|too.many.requests", words):
        return LIMITED
    if code == 403:
        return ruling_of_forbidden(words, is_json)
    if code == 404:
        if not is_json or any(word in message for word in NOT_GONE_404):
            return UNSUITABLE
        return GONE
    if code in STATUSES:
        return STATUSES[code]
    if 300 <= code < 400:
        return DOWN
    if 400 <= code < 500:
        return UNSUITABLE
    return FAULT


def ruling_of_forbidden(words: str, is_json: bool) -> Ruling:
    """The ruling of a 403: its words tell the account from the model and the question."""
    is_account = ACCOUNT_WORDS.search(words) and not re.search(r"\bmodels?\b", words)
    if not is_json or is_account or KEY_WORDS.search(words):
        return DENIED
    if BROKEN_RULES.search(words):
        return UNSUITABLE
    return GONE


def reason_for(status: int, code: int, report: ErrorReport) -> str:
    """One line: requests' own wording for the status, then what the provider says."""
    said = report.message or " ".join(report.codes)
    if status < 300:
        what = "error inside the reply"
        if code:
            what = f"error {code} inside the reply"
    else:
        try:
            phrase = HTTPStatus(code).phrase
        except ValueError:
            phrase = "Unknown"
        kind = {3: "Redirect", 4: "Client"}.get(code // 100, "Server")
        what = f"{code} {kind} Error: {phrase}"
    if said:
        return f"{what}: {said}"
    return what


def host_of(url: str) -> str:
    """The host of a URL, "" if it has none."""
    try:
        return urlsplit(url[:1000]).hostname or ""
    except ValueError:
        return ""


def advice_for(status: int, headers: Mapping[str, str], body: object) -> str:
    """What to do about a reply whose form points to a wrong address; "" for all others."""
    if 300 <= status < 400:
        host = host_of(headers.get("location", "")) or "another address"
        return f"check {{base_url}}: the server redirects to {host}"
    is_page = isinstance(body, str) and body[:MAX_TEXT].lstrip().startswith("<")
    if status in (400, 404, 405) and is_page:
        return "check {base_url}: a web page answered, not an API"
    if status == 407:
        return "check the user and password in HTTPS_PROXY"
    return ""


# Durations in a message: "6.35s", "1m26.4s", "41 minutes and 30 seconds", "480ms"
UNIT_SECONDS = {"ms": 0.001, "milli": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
DURATION_PART = re.compile(
    r"""
    (\d{1,12}(?:\.\d{1,12})?)           # a number
    (?:
        \ ?(ms|milli|[shd]|m(?!o))[a-z]{0,12}   # a unit, but no month
      | (?![\w:-]|[.,]\d|\ (?:week|month|year)) # or none, and no date
    )
    """,
    re.VERBOSE | re.IGNORECASE,
)
WAIT_WORDS = re.compile(
    r"\b(?:(?:again|retry|resets?) (?:in|after)|wait(?: for)?) (?:about )?", re.IGNORECASE
)
LONG_PERIOD = re.compile(r"\bper[ -](hour|day|week|month)|\b(hourly|daily|monthly)\b")


def hint_of(
    report: ErrorReport, headers: Mapping[str, str], now: float, is_limit: bool
) -> Optional[float]:
    """Seconds after which the server wants to be asked again: the first source that is valid.

    A quota's reset counts only for a rate limit. A limit "per hour" or longer that comes without
    a hint counts as an hour.
    """
    for seconds in possible_hints(report, headers, now, is_limit):
        if 0 <= seconds <= MAX_HINT:  # NaN is in no range
            return seconds

    message = report.message.lower()
    is_short = "per min" in message or "per-min" in message
    if is_limit and not is_short and LONG_PERIOD.search(message):
        return 3600.0
    return None


def possible_hints(
    report: ErrorReport, headers: Mapping[str, str], now: float, is_limit: bool
) -> Iterator[float]:
    """Every possible hint, from the most exact source to the least; NaN where there is none."""
    yield to_number(headers.get("retry-after-ms")) / 1000

    server_time = to_epoch(headers.get("date"))
    if math.isnan(server_time):
        server_time = now
    values = [headers.get("retry-after")]
    for name in ("retry_after_seconds", "retry_after", "retry-after"):
        values.extend(reversed(report.fields[name]))
    for value in values:
        yield to_number(value)
        yield to_epoch(value) - server_time

    yield duration_in(report.message)

    if is_limit:
        resets = [*report.fields["x-ratelimit-reset"], headers.get("x-ratelimit-reset")]
        for value in resets:
            instant = to_number(value)
            # OpenRouter sends milliseconds of the epoch (2026-10).
            yield (instant / 1000 if instant > 1e11 else instant) - now


def duration_in(message: str) -> float:
    """The seconds in words such as "try again in 1m26.4s"; NaN if there are none."""
    for words in WAIT_WORDS.finditer(message):
        total = 0.0
        position = words.end()
        part = DURATION_PART.match(message, position)
        if part is None:
            continue
        while part is not None:
            unit = (part.group(2) or "s").lower()
            total += float(part.group(1)) * UNIT_SECONDS[unit]
            position = part.end()
            while message.startswith((",", " ", "and "), position):
                position += 4 if message.startswith("and ", position) else 1
            part = DURATION_PART.match(message, position)
        return total
    return math.nan


def to_number(value: object) -> float:
    """The number that a header or a field holds, NaN if it holds none."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def to_epoch(value: object) -> float:
    """The seconds since the epoch of an HTTP date, NaN if it is none."""
    if not isinstance(value, str):
        return math.nan
    try:
        parts = parsedate_tz(value[:100])
        return math.nan if parts is None else float(mktime_tz(parts))
    except (ValueError, OverflowError, TypeError, IndexError):
        return math.nan


def parsed(body: object) -> Any:
    """Text or bytes as JSON, or else as text; anything else as it is. Never an error."""
    if not isinstance(body, (str, bytes)):
        return body
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        if isinstance(body, bytes):
            return body.decode("utf-8-sig", "replace")
        return body


def dig(value: object, *path: Union[str, int]) -> Any:
    """What stands at a path of names and indices in JSON, None if nothing does."""
    for step in path:
        if isinstance(step, str) and isinstance(value, dict):
            value = value.get(step)
        elif isinstance(step, int) and isinstance(value, list) and len(value) > step:
            value = value[step]
        else:
            return None
    return value


# --- 4. Wire format: requests, event streams, the answer being put together. Pure ---------------


def is_blank(text: str) -> bool:
    """Whether nothing of the text can be seen: white space, zero-width characters."""
    return not any(char.isprintable() and not char.isspace() for char in text)


def conversation(
    question: Optional[str], system: Optional[str], messages: Optional[Sequence[Json]]
) -> List[Json]:
    """The messages to send. Raises ValueError for empty or malformed input."""
    for name, text in (("question", question), ("system", system)):
        if text is not None and not isinstance(text, str):
            raise ValueError(f"the {name} must be text, not {text!r:.60}")
    if messages is not None:
        check_messages(messages)
    said = list(messages or [])
    if is_blank(question or "") and (question is not None or not said):
        raise ValueError("the question is empty")

    if system:
        said.insert(0, {"role": "system", "content": system})
    if question is not None:
        said.append({"role": "user", "content": question})
    return said


def check_messages(messages: object) -> None:
    """Raise ValueError unless this is a conversation."""
    is_list = isinstance(messages, (list, tuple)) and len(messages) > 0
    if not is_list or not all(isinstance(dig(m, "role"), str) for m in cast(List[Json], messages)):
        raise ValueError(f"messages must be a list of dicts with a role, not {messages!r:.60}")


def request_body(fields: Json, model: str, defaults: Json) -> bytes:
    """The body of a request for one model. Raises ValueError for what JSON cannot carry."""
    body = {"model": model, **defaults, **fields}
    try:
        text = json.dumps(body, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the question cannot be sent as JSON: {error}") from None

    # Cerebras refuses lone surrogates (2026-09): pairs are joined, single ones replaced.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


class Event(NamedTuple):
    """One server-sent event, or a plain body as a whole."""

    data: str
    kind: str = ""  # what its "event:" line says
    is_plain: bool = False  # the body was no event stream


class EventDecoder:
    """Turns the bytes of a body, cut anywhere, into events."""

    def __init__(self) -> None:
        utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
        self._is_stream = False
        self._is_started = False
        self._rest: List[str] = []  # the text after the last blank line
        self._plain: List[str] = []  # blocks that hold no event

    def feed(self, chunk: bytes) -> List[Event]:
        """The events that are complete now."""
        text = self._decoder.decode(chunk)
        if not self._is_started and text:
            self._is_started = True
            text = text.lstrip("\ufeff")

        ends_line = bool(self._rest) and self._rest[-1].endswith("\n") and text.startswith("\n")
        if "\n\n" not in text and not ends_line:
            if text:
                self._rest.append(text)
            return []
        blocks = "".join([*self._rest, text]).split("\n\n")
        self._rest = [blocks.pop()]
        return self._events_of(blocks)

    def end(self) -> List[Event]:
        """The last events of a body that has ended; the plain body, if there were none."""
        rest = "".join([*self._rest, self._decoder.decode(b"", final=True)])
        events = self._events_of(rest.split("\n\n"))
        if not self._is_stream:
            events.append(Event("\n".join(self._plain).strip(), is_plain=True))
        return events

    def _events_of(self, blocks: Iterable[str]) -> List[Event]:
        """The events of these blocks; blocks without one are kept as a plain body."""
        events = []
        for block in blocks:
            event = self._event_of(block)
            if event is not None:
                self._is_stream = True
                events.append(event)
            elif not self._is_stream:
                self._plain.append(without_fields(block))
        return events

    def _event_of(self, block: str) -> Optional[Event]:
        """The event in a block of lines, None if it has no data."""
        if block.startswith("data: ") and "\n" not in block:
            data = block[len("data: ") :].strip()  # nearly all events look like this
            if data:
                return Event(data)
            return None

        data_lines = []
        kind = ""
        for line in block.split("\n"):
            name, _, value = line.partition(":")
            if name == "data":
                data_lines.append(value)
            elif name == "event":
                kind = value.strip()
        data = "\n".join(data_lines).strip()
        if data:
            return Event(data, kind)
        return None


def events_in(chunks: Iterable[bytes]) -> Iterator[Event]:
    """The events of a body, as they are complete."""
    decoder = EventDecoder()
    for chunk in chunks:
        yield from decoder.feed(chunk)
    yield from decoder.end()


def without_fields(block: str) -> str:
    """The lines of a plain body that are neither comments nor fields of an event stream."""
    lines = []
    for line in block.split("\n"):
        name = line.partition(":")[0]
        if name not in ("", "data", "event", "id", "retry") or line == "":
            lines.append(line)
    return "\n".join(lines)


class ThinkingFilter:
    """Removes <think>…</think> from the start of an answer, however the text is cut.

    It also holds back everything before the first visible character, so that a live stream
    shows nothing if the answer turns out to be empty.
    """

    def __init__(self) -> None:
        self.is_thinking = False
        self.has_thought = False
        self._is_through = False  # the answer has begun
        self._blanks: List[str] = []
        self._held = ""

    def feed(self, text: str) -> str:
        """What can be shown now of the text."""
        if self._is_through or not text:
            return text
        if self.is_thinking:
            return self._feed_thought(text)
        if not self._held and is_blank(text):
            self._blanks.append(text)
            return ""

        self._held += text
        start = self._held.lstrip()
        if not self.has_thought and start.startswith("<think>"):
            self._held = ""
            self._blanks.clear()
            self.is_thinking = True
            self.has_thought = True
            return self._feed_thought(start[len("<think>") :])
        if not self.has_thought and "<think>".startswith(start):
            return ""
        return self._begin_answer()

    def end(self) -> str:
        """What is still held back when the answer has ended."""
        if self._is_through or self.is_thinking or not self._held:
            return ""
        return self._begin_answer()

    def _feed_thought(self, text: str) -> str:
        """Drop a piece of the thought; what follows its end is the answer."""
        self._held += text
        _, tag, after = self._held.partition("</think>")
        if not tag:
            self._held = self._held[1 - len("</think>") :]  # the tag may be cut
            return ""
        self.is_thinking = False
        self._held = ""
        return self.feed(after)

    def _begin_answer(self) -> str:
        """Let through what was held back, and everything from now on."""
        self._is_through = True
        text = "".join([*self._blanks, self._held])
        if self.has_thought:
            return text.lstrip()
        return text


class ErrorInside(Exception):
    """A reply with the status 200 carries an error."""

    def __init__(self, body: Json) -> None:
        super().__init__()
        self.body = body


NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of other bytes
MODERATION_WORDS = {"guard", "safeguard", "guardian", "wildguard", "shield", "shieldgemma"}
MODERATION_WORDS |= {"moderation"}


def is_moderation_model(name: str) -> bool:
    """Whether a model judges texts rather than answering them."""
    words = re.split(r"[^a-z0-9]", name.lower())
    return not MODERATION_WORDS.isdisjoint(words) or "content-safety" in name.lower()


class Draft:
    """An answer being put together from the events of one reply.

    `take` returns the text of each event. After the last one, `failure` says why the result is not
    an answer, if it is not. A live draft is shown as it grows and cannot be taken back.
    """

    def __init__(self, model: str, is_live: bool) -> None:
        self.is_live = is_live
        self.texts: List[str] = []
        self.usage: Json = {}
        self.finish_reason = ""
        self.skipped_events = 0
        self.is_done = False  # the end was said, or a plain body is complete
        self.is_progress = False  # the latest event held text, reasoning or a finish_reason
        self.is_settled = False  # nothing but usage and [DONE] is expected any more
        self.status: Optional[int] = None  # of HTTP, and its headers, once they are there
        self.headers: Mapping[str, str] = {}
        self.tokens = 0  # that the request may cost
        self._model = model
        self._thinking = ThinkingFilter()
        self._has_reasoning = False
        self._refusals: List[str] = []

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.texts)

    def take(self, event: Event) -> str:
        """The text of an event that can be shown now.

        Raises Failure when no answer can come of it any more, and ErrorInside.
        """
        self.is_progress = False
        if self.is_done or event.kind == "ping":
            return ""
        if event.data == "[DONE]":
            self.is_done = True
            return ""
        if not event.data.isascii() and NOT_UTF8.search(event.data):
            raise Failure(Verdict.FAULT, "the answer is not UTF-8")

        said = parsed(event.data)
        if isinstance(said, list) and len(said) == 1:
            said = said[0]
        if event.is_plain:
            self.is_done = bool(event.data)
        if event.kind == "error":
            raise ErrorInside(said if isinstance(said, dict) else {"error": said})
        if not isinstance(said, dict):
            self._take_malformed(event, said)
            return ""
        return self._take_object(said)

    def end(self) -> str:
        """The text that was held back until now, if the answer ends here."""
        text = self._thinking.end()
        if text:
            self.texts.append(text)
        return text

    def failure(self) -> Optional[Failure]:
        """Why this is no whole answer; None: it is one."""
        text = self.text
        if self.finish_reason == "content_filter":
            return Failure(Verdict.REFUSED, self._refusal or "a content filter stopped the answer")
        if self._refusals and is_blank(text):
            return Failure(Verdict.REFUSED, self._refusal)
        if not self.is_done and not self.finish_reason:
            what = "the reply holds no answer"
            if text:
                what = "the answer was cut: it has no end"
            return Failure(Verdict.FAULT, what)
        if not is_blank(text):
            return None

        if self.finish_reason == "length":
            reason = "max_tokens was used up before the answer began: raise max_tokens"
            return Failure(Verdict.UNSUITABLE, reason, advice="raise --max-tokens")
        if self._has_reasoning or self._thinking.has_thought:
            return Failure(Verdict.FAULT, "only reasoning came, no answer")
        return Failure(Verdict.FAULT, "the answer is empty")

    @property
    def _refusal(self) -> str:
        """The model's own words of refusal."""
        return shortened("".join(self._refusals))

    def _take_malformed(self, event: Event, said: object) -> None:
        """An event that is no JSON object may have held a word of the answer."""
        if self.is_settled:
            return  # nothing but usage was to come
        if self.is_live and self.texts and not event.is_plain:
            self.skipped_events += 1
            return
        if event.is_plain and not event.data:
            return
        words = read_error(said).message
        raise Failure(Verdict.FAULT, f"no answer in the reply: {words}")

    def _take_object(self, said: Json) -> str:
        """The text of an event's JSON object; notes what else it says."""
        choice = as_object(dig(said, "choices", 0))
        message = as_object(choice.get("delta") or choice.get("message"))
        groq = as_object(said.get("x_groq"))
        finish_reason = choice.get("finish_reason")
        self._raise_error_inside(said, choice, groq, finish_reason)
        self._check_model(said.get("model"))

        usage = said.get("usage") or groq.get("usage")
        if usage:
            self.usage = usage_figures(usage) or self.usage
        for name in ("reasoning", "reasoning_content"):
            thought = message.get(name)
            if isinstance(thought, str) and not is_blank(thought):
                self._has_reasoning = True
                self.is_progress = True
        if isinstance(message.get("refusal"), str):
            self._refusals.append(message["refusal"])

        text = text_of(message.get("content"))
        if text and not is_blank(text):
            self.is_progress = True
            # Some gateways say "stop" in every chunk: after such a one more text may come.
            self.is_settled = False
        if isinstance(finish_reason, str) and finish_reason:
            self._finish(finish_reason, has_text=bool(text))

        shown = self._thinking.feed(text)
        if shown:
            self.texts.append(shown)
        return shown

    def _finish(self, finish_reason: str, has_text: bool) -> None:
        """Note how the answer ended."""
        if not self.finish_reason:
            self.is_progress = True
            self.is_settled = not has_text
        self.finish_reason = finish_reason

    def _raise_error_inside(
        self, said: Json, choice: Json, groq: Json, finish_reason: object
    ) -> None:
        """Raise ErrorInside if the event carries an error, wherever it is."""
        error = said.get("error") or choice.get("error") or groq.get("error")
        if finish_reason == "error" and not error:
            error = choice.get("native_finish_reason") or "finish_reason error"
        if not error and not choice and read_error(said).message:
            error = said  # Cerebras puts an error's fields at the top level (2026-10)
        if error:
            raise ErrorInside({"error": error, "status_code": said.get("status_code")})

    def _check_model(self, model: object) -> None:
        """A router may let a moderation model answer (openrouter/free, 2026-10)."""
        if not isinstance(model, str) or is_moderation_model(self._model):
            return
        if is_moderation_model(model[:200]):
            raise Failure(Verdict.FAULT, f"a moderation model answered: {model[:100]}")


def as_object(value: object) -> Json:
    """The value if it is a JSON object, else {}."""
    if isinstance(value, dict):
        return value
    return {}


def text_of(content: object) -> str:
    """The text of a message's content, which may be a list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    texts = [dig(part, "text") for part in content]
    return "".join(text for text in texts if isinstance(text, str))


def usage_figures(usage: object) -> Json:
    """The numbers in a report of usage, with one level of details."""
    figures: Json = {}
    for name, value in as_object(usage).items():
        if not re.fullmatch("[a-z_]{1,64}", name):
            continue
        if isinstance(value, dict):
            details = {}
            for detail, number in value.items():
                if re.fullmatch("[a-z_]{1,64}", detail) and is_finite_number(number):
                    details[detail] = number
            figures[name] = details
        elif is_finite_number(value):
            figures[name] = value
    return figures


def is_finite_number(value: object) -> bool:
    """Whether the value is a number that JSON can carry."""
    return isinstance(value, (int, float)) and abs(value) < 1e300


# --- 5. Transport: one HTTP exchange within its time limits -------------------------------------

CONNECT_TIMEOUT = 5.0  # for all addresses of a host together
CHECK_TIMEOUT = 10.0  # for a models list and the like
USAGE_GRACE = 1.0  # after a finish_reason, for usage and [DONE]; for the words of an HTTP error
END_GRACE = 0.2  # after [DONE], for the end of the body: then the connection can be kept
SLOWEST_UPLOAD = 100000  # bytes a second; a question is given the time to arrive at this speed
MAX_BODY = 32 * 1024 * 1024  # bytes; a longer reply is a fault
POOL_WIDTH = 128  # connections kept per host; with urllib3's 10, threads would reconnect
MAX_ERROR_BODY = 256 * 1024  # bytes of an HTTP error that are read
READ_SIZE = 65536


class TimeLimit:
    """How long one exchange may take.

    It ends at its deadline, and before that when there has been no progress for the idle timeout.
    """

    def __init__(self, clock: Clock, deadline: float, idle_timeout: float) -> None:
        self.is_settled = False  # all that matters has come: running out of time is no failure
        self._is_finished = False
        self.has_connected = False  # a connection was opened for this exchange
        self.is_reused = False  # an earlier exchange had opened it
        self._clock = clock
        self._deadline = deadline
        self._allowed = deadline - clock()
        self._idle_timeout = idle_timeout
        self._idle_until = clock() + idle_timeout

    def left(self) -> float:
        """The seconds that the next operation may take, 0 when there are none."""
        return max(0.0, min(self._deadline, self._idle_until) - self._clock())

    def progress(self) -> None:
        """The answer has made progress: restart the idle timeout."""
        self._idle_until = self._clock() + self._idle_timeout

    def postpone(self, seconds: float) -> None:
        """Put off the idle timeout: this time is not the server's."""
        self._idle_until += seconds

    def settle(self, grace: float) -> None:
        """All that matters has come: give the rest of the body this time."""
        self.is_settled = True
        self._idle_until = self._clock() + min(grace, self._idle_timeout)

    def finish(self) -> None:
        """The end marker has come: allow the rest of the body one short grace period."""
        if not self._is_finished:
            self._is_finished = True
            self.settle(END_GRACE)

    def extend(self, deadline: float) -> None:
        """Move the deadline: what is being shown cannot be taken back."""
        self._deadline = deadline

    def failure(self, reason: str, **details: Any) -> Failure:
        """The failure of an exchange that broke off, for this reason or because time is up."""
        now = self._clock()
        if now >= self._deadline - 0.01:  # a socket may time out a little early
            return Failure(
                Verdict.FAULT,
                f"no answer within {self._allowed:.3g} s of the time limit",
                is_blameless=True,
                advice="raise the time limit (--timeout)",
            )
        if now >= self._idle_until - 0.01:
            reason = f"silent for {number_of(self._idle_timeout)} s"
            return Failure(Verdict.FAULT, reason, delays_siblings=True)
        return Failure(Verdict.FAULT, reason, **details)


class Redactor:
    """Makes texts safe to show: one line, without keys, passwords and account ids."""

    def __init__(self) -> None:
        self._secrets: Set[str] = set()
        self._patterns: List[Pattern[str]] = []

    def add(self, secret: Optional[str]) -> None:
        """Hide this secret from now on."""
        text = stripped(secret)
        if len(text) >= 4 and text not in self._secrets:
            self._secrets.add(text)
            # The longest come first, or a short one would leave half of a long one.
            longest_first = sorted(self._secrets, key=len, reverse=True)
            self._patterns = [secret_pattern(known) for known in longest_first]

    def line(self, text: str) -> str:
        """The text in one line of at most 300 characters, with secrets masked."""
        line = shortened(text)
        line = "".join(char if char.isprintable() else " " for char in line)
        for pattern in self._patterns:
            line = pattern.sub("[key]", line)

        line = re.sub(r"(?i)\b(csk-|gsk_|sk-)[\w-]{8,}", "[key]", line)
        line = re.sub(r"(?i)(?<=bearer )[\w.~+/=-]{8,}", "[key]", line)
        line = re.sub(r"(?<=://)\S{1,300}@", "[key]@", line)
        line = re.sub(r"\b(org|user)_\w+", r"\1_[id]", line)
        if len(line) <= 300:
            return line
        return line[:299] + "…"


def secret_pattern(secret: str) -> Pattern[str]:
    """Finds a secret in any case, broken by blanks or invisible characters, or in base64."""
    gap = "[\\s\u00ad\u200b-\u200f\u2060\ufeff]{0,4}"
    spellings = [gap.join(re.escape(char) for char in secret)]

    # The base64 of a secret inside a text depends on its offset: three spellings are possible.
    # The first and the last characters depend on the neighbours and are left out.
    data = secret.encode("utf-8", "replace")
    if len(data) >= 12:
        for offset in range(3):
            encoded = base64.b64encode(b"-" * offset + data).decode()
            middle = encoded[4 if offset else 0 : len(encoded) - 4]
            urlsafe = middle.replace("+", "-").replace("/", "_")
            for spelling in (middle, urlsafe):
                spellings.append(rf"[\w+/-]{{0,4}}{re.escape(spelling)}[\w+/=-]{{0,4}}")
    return re.compile("|".join(spellings), re.IGNORECASE)


class BoundedStream(io.RawIOBase):
    """The bytes of a socket, each recv within the time limit."""

    def __init__(self, sock: socket.socket, raw: io.RawIOBase, limit: TimeLimit) -> None:
        self._sock = sock
        self._raw = raw
        self._limit = limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> Optional[int]:
        """Read what is there, within the time that is left."""
        left = self._limit.left()
        if left <= 0:
            raise socket.timeout("timed out")
        self._sock.settimeout(left)
        return cast(Any, self._raw).readinto(buffer)  # type: ignore[no-any-return]

    def close(self) -> None:
        self._raw.close()
        super().close()


class BoundedResponse:
    """A mixin for http.client.HTTPResponse that puts a time limit on every read."""

    limits: threading.local

    def __init__(self, sock: socket.socket, *args: Any, **more: Any) -> None:
        super().__init__(sock, *args, **more)  # type: ignore[call-arg]
        raw = cast(Any, self).fp.detach()
        stream = BoundedStream(sock, raw, self.limits.current)
        cast(Any, self).fp = io.BufferedReader(stream, READ_SIZE)

    def begin(self) -> None:
        """Read the headers, and forget malformed ones."""
        super().begin()  # type: ignore[misc]
        # urllib3 would log a header line without a colon, and a key may be in it.
        headers = cast(Any, self).msg
        headers.defects.clear()
        headers.set_payload([])


class BoundedConnection:
    """A mixin for urllib3's connections that puts time limits on connecting and sending."""

    limits: threading.local

    def connect(self) -> None:
        """Note that this exchange opened the connection."""
        self.limits.current.has_connected = True
        super().connect()  # type: ignore[misc]

    def _new_conn(self) -> socket.socket:
        """Connect to the first address that answers.

        urllib3 gives each address the whole timeout, so four dead ones take four times as long.
        Here they share it.
        """
        from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

        connection = cast(Any, self)
        host = connection.host.strip("[]")
        until = time.monotonic() + min(CONNECT_TIMEOUT, self.limits.current.left())
        problem: Optional[Exception] = None
        try:
            addresses = socket.getaddrinfo(host, connection.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            addresses = []
            problem = error

        for number, (family, kind, protocol, _, address) in enumerate(addresses):
            share = (until - time.monotonic()) / (len(addresses) - number)
            sock: Optional[socket.socket] = None
            try:
                sock = socket.socket(family, kind, protocol)
                for option in connection.socket_options or ():
                    sock.setsockopt(*option)
                sock.settimeout(max(0.001, share))
                sock.connect(address)
                return sock
            except OSError as error:
                if sock is not None:
                    sock.close()
                problem = error

        if isinstance(problem, socket.timeout):
            raise ConnectTimeoutError(connection, "the connection timed out") from problem
        raise NewConnectionError(connection, f"cannot connect: {problem}") from problem

    def send(self, data: Any) -> None:
        """Send in pieces: each that is taken counts as progress of a slow upload."""
        limit = self.limits.current
        data = memoryview(data)
        for start in range(0, len(data), READ_SIZE):
            sock = cast(Any, self).sock
            if sock is not None:
                limit.is_reused = not limit.has_connected
                sock.settimeout(max(0.001, limit.left()))
            super().send(data[start : start + READ_SIZE])  # type: ignore[misc]
            limit.progress()


def bounded_session(current_limits: threading.local) -> requests.Session:
    """A session whose every socket operation obeys `current`, this thread's TimeLimit.

    The timeouts of requests hold for one recv at a time, so a dripped header, a dripped chunk
    size or endless trailers would outlive any limit. Here all bytes pass through one place, which
    checks the limit before each recv. The classes override attributes that http.client and
    urllib3 document, and `_new_conn`, which urllib3 1.21 to 2 have in common.
    """
    import requests  # noqa: I001 - the first, so that its name is told when it is missing
    from http.client import HTTPResponse
    from urllib3.connection import HTTPConnection, HTTPSConnection
    from urllib3 import connectionpool

    class Response(BoundedResponse, HTTPResponse):
        limits = current_limits

    class Connection(BoundedConnection, HTTPConnection):  # type: ignore[misc,unused-ignore]
        limits = current_limits
        response_class = Response

    class SecureConnection(BoundedConnection, HTTPSConnection):  # type: ignore[misc,unused-ignore]
        limits = current_limits
        response_class = Response

    # These two names show in error messages.
    class HTTPConnectionPool(connectionpool.HTTPConnectionPool):
        ConnectionCls = Connection

    class HTTPSConnectionPool(connectionpool.HTTPSConnectionPool):
        ConnectionCls = SecureConnection

    pools = {"http": HTTPConnectionPool, "https": HTTPSConnectionPool}

    class Adapter(requests.adapters.HTTPAdapter):
        def init_poolmanager(self, *args: Any, **more: Any) -> None:
            super().init_poolmanager(*args, **more)
            self.poolmanager.pool_classes_by_scheme = pools

        def proxy_manager_for(self, proxy: Any, **more: Any) -> Any:
            manager = super().proxy_manager_for(proxy, **more)
            if not str(proxy).lower().startswith("socks"):
                manager.pool_classes_by_scheme = pools
            return manager

        def forget_connections(self) -> None:
            """Drop the connections that are kept alive, not those in use."""
            self.poolmanager.clear()
            for manager in self.proxy_manager.values():
                manager.clear()

    session = requests.Session()
    for scheme in ("https://", "http://"):
        session.mount(scheme, Adapter(pool_connections=POOL_WIDTH, pool_maxsize=POOL_WIDTH))
    return session


class Reply:
    """The reply to one request, read as it comes."""

    def __init__(self, response: requests.Response, limit: TimeLimit) -> None:
        self.limit = limit
        self.status = response.status_code
        self.headers = {name.lower(): value for name, value in response.headers.items()}
        self.is_success = 200 <= self.status < 300
        self._raw: Any = response.raw
        self._is_complete = False  # read to the end: the connection can be used again

    def chunks(self) -> Iterator[bytes]:
        """The body, decompressed, in pieces as they come. Raises Failure."""
        from http.client import HTTPException

        from urllib3.exceptions import HTTPError

        encoding = self.headers.get("content-encoding", "").lower()
        pieces = self._pieces()
        if "gzip" in encoding or "deflate" in encoding:
            pieces = unpacked(pieces)

        size = 0
        most = MAX_ERROR_BODY
        if self.is_success:
            most = MAX_BODY
        try:
            for piece in pieces:
                size += len(piece)
                if size >= most and not self.is_success:
                    return  # the status says enough
                if size >= most:
                    raise Failure(Verdict.FAULT, f"the reply is longer than {most} bytes")
                yield piece
        except (OSError, EOFError, ValueError, HTTPException, HTTPError, zlib.error):
            if self.is_success and not self.limit.is_settled:
                raise self.limit.failure("the answer was cut: its end did not come") from None

    def close(self) -> None:
        """Give the connection back if the body was read to its end, else close it.

        The garbage collector may run this for a stream that nobody has read to its end, so it
        must not touch the pool's lock then.
        """
        if self._is_complete:
            self._raw.release_conn()
        else:
            self._raw.close()

    def _pieces(self) -> Iterator[bytes]:
        """The body as the server sent it. Raises EOFError if its end is missing."""
        # urllib3's own methods wait for a full block, so a slow stream would look like silence.
        # http.client's response below it has read1, which gives what is there.
        source = getattr(self._raw, "_fp", self._raw)
        while True:
            if self.limit.left() <= 0:
                raise socket.timeout("timed out")
            piece = source.read1(READ_SIZE)
            if not piece:
                break
            yield piece
        if getattr(source, "length", None):
            raise EOFError
        self._is_complete = True
        source.close()  # http.client waits for this before it uses the connection again


def unpacked(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The pieces of a compressed body, decompressed."""
    unpack = zlib.decompressobj(47)  # 47: gzip or deflate
    for piece in pieces:
        yield unpack.decompress(piece, MAX_BODY)
    if not unpack.eof:
        raise EOFError


class Transport:
    """HTTP exchanges, each within its time limit. Only this class and its helpers use requests.

    A key is sent only to its own provider, in the Authorization header, and redirects are not
    followed.
    """

    def __init__(self, clock: Clock, wall_clock: Clock, session: object = None) -> None:
        self.redactor = Redactor()
        self._clock = clock
        self._wall_clock = wall_clock
        self._given_session = cast("Optional[requests.Session]", session)
        self.renew()

    def renew(self) -> None:
        """Begin without connections, as each process must after a fork."""
        self._limits = threading.local()
        self._session = self._given_session or bounded_session(self._limits)
        self._templates: Dict[Tuple[str, str, str], Tuple[Any, Dict[str, Any]]] = {}

    def close(self) -> None:
        """Close the connections that are kept alive."""
        self._session.close()

    def converse(
        self, row: Provider, key: str, body: bytes, draft: Draft, limit: TimeLimit
    ) -> Generator[str, None, None]:
        """Send a question; the text of the draft comes out as it comes in. Raises Failure."""
        limit.postpone(len(body) / SLOWEST_UPLOAD)
        with contextlib.closing(
            self._open("POST", row, "/chat/completions", key, body, limit)
        ) as reply:
            draft.status = reply.status
            draft.headers = reply.headers
            if not reply.is_success:
                limit.settle(USAGE_GRACE)

            for event in events_in(reply.chunks()):
                text = self._take(event, draft, reply)
                note_progress(draft, limit)
                if text:
                    given = self._clock()
                    yield text
                    limit.postpone(self._clock() - given)  # the caller's own time
            yield draft.end()

    def get(self, row: Provider, path: str, key: str, deadline: float) -> Json:
        """The JSON object that a GET of the path gives. Raises Failure."""
        limit = TimeLimit(self._clock, min(deadline, self._clock() + CHECK_TIMEOUT), CHECK_TIMEOUT)
        with contextlib.closing(self._open("GET", row, path, key, None, limit)) as reply:
            body = parsed(b"".join(reply.chunks()))
            if reply.status != 200 or not isinstance(body, dict):
                raise judge(reply.status, reply.headers, body, self._wall_clock())
            return body

    def _take(self, event: Event, draft: Draft, reply: Reply) -> str:
        """The text of an event. Raises Failure for an error."""
        if not reply.is_success:
            body = parsed(event.data)
            raise judge(reply.status, reply.headers, body, self._wall_clock())
        try:
            return draft.take(event)
        except ErrorInside as error:
            now = self._wall_clock()
            raise judge(200, reply.headers, error.body, now) from None

    def _open(
        self,
        method: str,
        row: Provider,
        path: str,
        key: str,
        body: Optional[bytes],
        limit: TimeLimit,
    ) -> Reply:
        """Send a request; the reply is still to be read. Raises Failure."""
        from http.client import HTTPException

        from urllib3.exceptions import HTTPError

        url = row.base_url + path
        left = limit.left()
        if left <= 0:
            raise limit.failure("no time was left")
        self._limits.current = limit
        timeout = (min(CONNECT_TIMEOUT, left), left)
        adapter = None
        try:
            template, settings = self._template(method, url, key)
            request = template.copy()
            request.prepare_body(body, None)
            # session.send() would obey ~/.netrc, keep cookies and follow redirects.
            adapter = self._session.get_adapter(url)
            return Reply(adapter.send(request, timeout=timeout, **settings), limit)
        except (OSError, ValueError, HTTPException, HTTPError) as error:
            failure = network_failure(error, url, limit)
        if failure.is_stale and self._given_session is None:
            cast(Any, adapter).forget_connections()  # the others are as old
        raise failure

    def _template(self, method: str, url: str, key: str) -> Tuple[Any, Dict[str, Any]]:
        """A request without a body, and the settings of the environment: proxy, certificates."""
        import requests

        name = (method, url, key)
        if name not in self._templates:
            headers = {
                # The default agents of libraries are turned away with a 403 (2026-09).
                "User-Agent": f"fallback_llm/{__version__}",
                "Accept": "text/event-stream, application/json",
                "Accept-Encoding": "identity",
                "Content-Type": "application/json",
            }
            if key:
                headers["Authorization"] = "Bearer " + key
                self.redactor.add(key)
            request = requests.Request(method, url, headers).prepare()
            merged = self._session.merge_environment_settings(url, {}, True, None, None)
            settings: Dict[str, Any] = dict(merged)
            settings["proxies"] = self._proxies(url, settings["proxies"])
            self._templates[name] = (request, settings)
        return self._templates[name]

    def _proxies(self, url: str, proxies: Mapping[str, str]) -> Dict[str, str]:
        """The proxies to use. Raises Failure if the one for this URL has no valid address.

        This machine is never asked through a proxy, to which the key would go in clear text.
        """
        from requests.utils import select_proxy

        if is_loopback(url):
            return {}
        for proxy in proxies.values():
            user_and_password = str(proxy).rpartition("@")[0].rpartition("://")[2]
            self.redactor.add(user_and_password)
            self.redactor.add(user_and_password.partition(":")[2])

        proxy = select_proxy(url, dict(proxies)) or ""
        try:
            address = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
            is_valid = proxy == "" or (bool(address.hostname) and address.port != 0)
        except ValueError:  # a port that is no number: a password with / or # in it
            is_valid = False
        if not is_valid:
            raise Failure(
                Verdict.FAULT,
                "HTTPS_PROXY holds no valid address",
                reaches_provider=True,
                is_unreachable=True,
                advice="check HTTPS_PROXY: special characters in a password must be %-encoded",
            )
        return dict(proxies)


def note_progress(draft: Draft, limit: TimeLimit) -> None:
    """Tell the time limit what the latest event of a draft means."""
    if draft.is_done:
        limit.finish()
    elif draft.is_settled and draft.is_progress:
        limit.settle(USAGE_GRACE)
    elif draft.is_progress:
        limit.is_settled = False
        limit.progress()


def causes_of(error: BaseException) -> List[BaseException]:
    """The exceptions that are wrapped in an exception of requests, itself the first."""
    found: List[BaseException] = []
    waiting: Deque[object] = collections.deque([error])
    while waiting and len(found) < 20:
        problem = waiting.popleft()
        if isinstance(problem, BaseException) and problem not in found:
            found.append(problem)
            waiting.extend([problem.__cause__, getattr(problem, "reason", None), *problem.args])
            waiting.append(problem.__context__)
    return found


def network_failure(error: Exception, url: str, limit: TimeLimit) -> Failure:
    """What it means that a request got no reply: the server, its address or our own network."""
    from http.client import HTTPException

    from requests.exceptions import ConnectTimeout, ProxyError, ReadTimeout, SSLError

    causes = causes_of(error)
    closed = (ConnectionResetError, BrokenPipeError, ConnectionAbortedError)
    if not isinstance(error, (ConnectTimeout, SSLError, ProxyError)):
        if any(isinstance(cause, closed) for cause in causes):
            failure = limit.failure("the connection was closed without a reply")
            failure.is_stale = limit.is_reused
            return failure
        if any(isinstance(cause, HTTPException) for cause in causes):
            return limit.failure("the reply is not HTTP")
        if isinstance(error, ReadTimeout) or "Read timed out" in str(error)[:1000]:
            return limit.failure("no reply came in time")

    # Only the beginning is looked at: a server can put a long line into an exception.
    words = str(error)[:1000].partition(" (Caused by")[0]
    what, advice = unreachable_because(causes, urlsplit(url).hostname or url)
    return limit.failure(
        f"{words}; {what}" if words else what,
        reaches_provider=True,
        is_unreachable=True,
        summary=what,
        advice=advice,
    )


def unreachable_because(causes: Sequence[BaseException], host: str) -> Tuple[str, str]:
    """Why a host cannot be reached, and what to do, in words for people."""
    text = " ".join(str(cause)[:300] for cause in causes)
    tunnel = re.search(r"Tunnel connection failed: (\d{3})", text)
    if tunnel is not None and tunnel.group(1) == "407":
        return "the proxy wants a password (407)", "set user and password in HTTPS_PROXY"
    if tunnel is not None:
        return f"the proxy does not let us reach {host} ({tunnel.group(1)})", "check HTTPS_PROXY"
    if "CA certificate bundle" in text or "TLS CA" in text:
        return "the file with the CA certificates is missing", "check REQUESTS_CA_BUNDLE"
    if "SSL" in text or "TLS" in text or "certificate" in text:
        problem = re.search(r"certificate verify failed: ([\w -]{1,80})", text)
        detail = "the TLS handshake failed"
        if problem:
            detail = problem.group(1).strip()
        advice = "check the clock, REQUESTS_CA_BUNDLE and HTTPS_PROXY"
        return f"no secure connection to {host} ({detail})", advice

    via = "the proxy" if "connect to proxy" in text else host
    return f"cannot reach {via} ({connect_problem(causes)})", "check the network or HTTPS_PROXY"


def connect_problem(causes: Sequence[BaseException]) -> str:
    """Why no connection could be made."""
    kinds = (
        (socket.gaierror, "name resolution failed"),
        (socket.timeout, "the connection timed out"),
        (ConnectionRefusedError, "connection refused"),
    )
    for cause in causes:
        for kind, words in kinds:
            if isinstance(cause, kind):
                return words
    for cause in causes:
        if type(cause) is OSError and cause.strerror:
            return cause.strerror.lower()  # no route to host, network is unreachable
    return "no connection"


# --- 6. Health: what is known of providers and models across questions --------------------------


class Candidate(NamedTuple):
    """A model of a provider."""

    row: Provider
    model: str
    position: str = "1/1"  # its place among the models of its provider, such as 2/3


MAX_GUESS = 20.0  # seconds for which a fault puts a model last: it may recover at any time


@dataclasses.dataclass(eq=False)
class Mark:
    """The failures of a provider, or of one of its models, since its last success."""

    verdict: Verdict = Verdict.FAULT
    failures: int = 0
    failed_at: float = -math.inf
    ready_at: float = -math.inf  # the server's word: nobody asks before
    later_until: float = -math.inf  # our own guess: it is asked last until then
    probed_until: float = -math.inf  # somebody is trying it: the others ask it last until then


OPENING = 32  # requests under way to a model of which nothing is known; more with each answer
CAREFUL_OPENING = 2  # the same once a rate limit was met anywhere
HOLD = 0.05  # seconds after which a question that was held back looks again, at the soonest
ENOUGH = 3  # answers in a row, and several requests may be under way again
LATENCY_GUESS = 0.5  # seconds that a request takes, before the first answer
MARGIN = 1.05  # the measured gap is widened by this, so that the next refusal is far away
MAX_GROWTH = 10.0  # a gap grows at most by this factor at a time
EASING = 0.002  # an answer shortens the gap by this share ...
EASING_DOUBLES = 12  # ... which doubles after so many answers without a refusal
MIN_GAP = 0.001  # seconds
WIDEST = 4  # times the first backoff, or twice a hint: no gap is wider
MAX_PROBE_GAP = 20.0  # seconds between two probes of a model that refuses everything
MAX_PACED_HINT = 120.0  # seconds; a longer hint is about an hour or a day, not about the pace


class Pace:
    """How fast a model or an account can be asked without being refused.

    While no limit is known, a limited number of requests may be under way, and more with each
    answer. After a refusal, requests are spaced one gap apart. Between two points at which the
    quota ran out, the server granted exactly what its rate allows, so the gap is the time between
    them divided by the requests granted. Refusals of requests sent together count only once.
    """

    def __init__(self, is_account: bool) -> None:
        self.refused_at = -math.inf  # the last refusal that counted
        self._is_account = is_account  # it has slots when its limit is known, but no window
        self._gap = 0.0  # seconds between two requests; 0: no limit is known
        self._slot_at = -math.inf  # the next free slot
        self._is_careful = False
        self._window = float(OPENING)  # requests that may be under way while no limit is known
        self._under_way = 0  # slots that are taken, and of these
        self._sent = 0  # the requests that have no reply yet
        self._room = math.inf  # requests that the server has room for, as it said last
        self._latency = 0.0  # seconds that the last answer took
        self._measured_from = math.nan  # when the quota had ended before, or the first request
        self._granted = 0  # since then
        self._refusals = 0  # since the last answer
        self._span = 0.0  # of the last measurement: the time, the requests granted in it,
        self._spent = 0
        self._most = math.inf  # and the largest gap that it may give
        self._is_rough = False  # it was the first one, after a burst, and says little

    def slot_at(self, now: float) -> float:
        """When the next request can be sent."""
        if self._gap:
            return max(now, self._slot_at)
        if self.is_full():
            # There may be room for another request then.
            return now + (max(HOLD, self._latency / 2) if self._is_careful else HOLD)
        return now

    def is_full(self) -> bool:
        """Whether enough requests are under way for the little that is known."""
        if self._gap or self._is_account:
            return False
        return self._under_way >= self._window

    def be_careful(self) -> None:
        """A rate limit was met somewhere: this one may have one too."""
        self._is_careful = True
        self._window = min(self._window, CAREFUL_OPENING)

    def take(self, at: float) -> None:
        """A request will be sent at this time."""
        self._under_way += 1
        if math.isnan(self._measured_from):
            self._measured_from = at
        if self._gap:
            gap = self._gap
            if self._is_rough:  # one request at a time
                gap = max(gap, LATENCY_GUESS if self._latency == 0 else self._latency)
            self._slot_at = max(self._slot_at, at) + gap

    def begin(self) -> None:
        """A request is sent."""
        self._sent += 1

    def end(self, was_sent: bool) -> None:
        """A slot was given up, or its request has ended, whatever came of it."""
        self._under_way = max(0, self._under_way - 1)
        if was_sent:
            self._sent = max(0, self._sent - 1)

    def grant(self, begun: float, now: float, room: Optional[int]) -> bool:
        """A request was answered; whether the server has said that its quota is nearly used up.

        room: how many more requests it has room for, as far as it says so.
        """
        self._refusals = 0
        self._latency = now - begun
        if begun >= self.refused_at:
            self._granted += 1
        if self._granted >= ENOUGH:
            self._is_rough = False
        if self._gap:
            share = EASING * 2 ** min(self._granted / EASING_DOUBLES, 30)
            self._gap = max(MIN_GAP, self._gap * (1 - min(0.1, share)))
            return False

        # It doubles with each round of answers, or grows by one when it must be careful.
        self._window += 1 / self._window if self._is_careful else 1
        if room is None:
            return False
        is_falling = room < self._room < math.inf  # some servers always say the same
        self._room = room
        if self._is_account or not is_falling or room >= self._window:
            return False
        self._window = max(1, room)
        return True

    def refuse(
        self, now: float, begun: float, hint: Optional[float], backoff: Callable[[int], float]
    ) -> None:
        """A request of a crowd, begun at `begun`, met the rate limit."""
        if begun < self.refused_at:
            self._correct()
            return

        # What was sent before and has no reply yet will probably be answered.
        granted = self._granted + self._sent
        if self._gap == 0 and granted == 0:
            return  # nothing was granted, so there is nothing to measure

        self.refused_at = now
        self._refusals += 1
        if granted > 0:
            # Refusals that have nothing to do with the pace must not widen it for ever.
            widest = max(WIDEST * backoff(1), 2 * (hint or 0.0))
            self._measure(now + (hint or 0.0), granted, widest)
        pause = hint or 0.0
        if hint is None and self._refusals > 1:
            pause = min(MAX_PROBE_GAP, backoff(self._refusals - 1))
        self._slot_at = now + max(self._gap, pause)

    def _measure(self, begins_again: float, granted: int, widest: float) -> None:
        """Learn the gap at the end of a quota, which begins again when the hint ends."""
        self._span = begins_again - self._measured_from
        self._is_rough = self._gap == 0
        self._most = widest if self._is_rough else min(widest, MAX_GROWTH * self._gap)
        self._spent = granted
        self._set_gap()
        self._measured_from = begins_again
        self._granted = 0

    def _correct(self) -> None:
        """One of those that had no reply at the last measurement was refused as well."""
        if self._spent > 1:
            self._spent -= 1
            self._set_gap()

    def _set_gap(self) -> None:
        """The gap that the last measurement gives."""
        measured = MARGIN * self._span / self._spent
        self._gap = max(MIN_GAP, min(self._most, measured))


class Outlook(NamedTuple):
    """When a candidate can be asked, as far as earlier questions tell."""

    ready_at: float  # the server's word
    slot_at: float  # our own pacing
    is_full: bool  # enough requests are under way for the little that is known
    is_well: bool  # no rate limit was met anywhere
    is_later: bool  # it failed lately, or somebody is trying it just now


class Slot:
    """The right to ask a candidate at a certain time."""

    def __init__(self, candidate: Candidate, taken_at: float) -> None:
        self.candidate = candidate
        self.taken_at = taken_at
        self.is_begun = False  # its request was sent
        self.is_granted = False  # and is being answered


class Health:
    """What is known of providers and models across questions: cooldowns, probes, pacing.

    Hold `lock` from looking up a candidate until taking its slot. The garbage collector may close
    a stream while the current thread holds the lock, so `drop` does not acquire it: the next
    holder of the lock clears away what `drop` leaves behind.
    """

    def __init__(self, clock: Clock, wall_clock: Clock) -> None:
        self._clock = clock
        self._wall_clock = wall_clock
        self._marks: Dict[Tuple[str, str], Mark] = {}  # the model "" stands for the provider
        self._paces: Dict[Tuple[str, str], Pace] = {}
        self._seen: Dict[str, ProviderHealth] = {}  # facts; the status is derived from the marks
        self._limit_was_met = False
        self._open_slots = 0
        self._dropped: Deque[Tuple[Slot, Optional[float]]] = collections.deque()
        self.renew_lock()

    def renew_lock(self) -> None:
        """Begin with a free lock and nothing under way, as each process must after a fork."""
        self.lock = threading.Lock()
        self._paces.clear()
        self._dropped.clear()
        self._open_slots = 0

    def outlook(self, candidate: Candidate, now: float) -> Outlook:
        """When the candidate can be asked. The caller holds the lock."""
        self._clear_dropped()
        marks = self._marks_of(candidate)
        account, model = self._paces_of(candidate)
        return Outlook(
            ready_at=max([mark.ready_at for mark in marks], default=-math.inf),
            slot_at=max(account.slot_at(now), model.slot_at(now)),
            is_full=model.is_full(),
            is_well=not self._limit_was_met,
            is_later=any(now < max(mark.later_until, mark.probed_until) for mark in marks),
        )

    def take(self, candidate: Candidate, now: float, at: float) -> Slot:
        """The candidate will be asked at this time. The caller holds the lock."""
        for mark in self._marks_of(candidate):
            mark.probed_until = at + candidate.row.idle_timeout + CONNECT_TIMEOUT
        for pace in self._paces_of(candidate):
            pace.take(at)
        self._open_slots += 1
        return Slot(candidate, now)

    def begin(self, slot: Slot) -> bool:
        """Whether the request can be sent; if others were refused meanwhile, the slot is void."""
        with self.lock:
            now = self._clock() + 1e-6
            paces = self._paces_of(slot.candidate)
            is_void = any(pace.refused_at > slot.taken_at for pace in paces)
            if is_void or any(mark.ready_at > now for mark in self._marks_of(slot.candidate)):
                self._end(slot)
                return False
            slot.is_begun = True
            for pace in paces:
                pace.begin()
            return True

    def drop(self, slot: Slot, answered_since: Optional[float] = None) -> None:
        """A slot is given up, or its request is ended by the caller.

        answered_since: when the request began, if it had given some text by then.
        """
        self._dropped.append((slot, answered_since))

    def granted(self, slot: Slot, begun: float, room: Optional[int]) -> None:
        """The first text of an answer came to a request that began at `begun`."""
        with self.lock:
            slot.is_granted = True
            for pace in self._paces_of(slot.candidate):
                pace.end(was_sent=True)
                if pace.grant(begun, self._clock(), room):
                    self._meet_limit()

    def answered(self, slot: Slot, begun: float) -> None:
        """A request that began at `begun` was answered."""
        with self.lock:
            self._clear_dropped()
            self._end(slot)
            self._forgive(slot.candidate, begun)

    def failed(
        self, slot: Slot, begun: float, failure: Failure, backoff: Callable[[int], float]
    ) -> None:
        """A request that began at `begun` failed."""
        with self.lock:
            self._clear_dropped()
            self._end(slot)
            rule = failure.rule
            if failure.is_blameless or failure.is_stale or not rule.counts:
                return

            now = self._clock()
            candidate = slot.candidate
            scope = candidate.model
            if failure.reaches_provider:
                scope = ""
            is_short = (failure.hint or 0.0) <= MAX_PACED_HINT
            is_crowd = self._open_slots > 0  # a question that is alone keeps its plain backoff
            if failure.verdict is Verdict.RATE_LIMITED and is_short and is_crowd:
                self._meet_limit()
                pace = self._pace(candidate.row.name, scope)
                pace.refuse(now, begun, failure.hint, backoff)

            seen = self._seen.setdefault(candidate.row.name, ProviderHealth())
            seen.last_failure = self._wall_clock()
            mark = self._marks.setdefault((candidate.row.name, scope), Mark())
            if begun >= mark.failed_at:  # those that were under way together count once
                mark.failures += 1
                seen.consecutive_failures += 1
            guess = rule.asked_last_for or min(MAX_GUESS, backoff(mark.failures))
            mark.verdict = failure.verdict
            mark.failed_at = now
            mark.later_until = now + guess
            mark.ready_at = max(mark.ready_at, now + (failure.hint or 0.0))

    def wait_for_server(self, candidate: Candidate) -> float:
        """Seconds until the server wants to be asked again, 0 if it did not say."""
        with self.lock:
            ends = [mark.ready_at for mark in self._marks_of(candidate)]
        return max(0.0, max(ends, default=-math.inf) - self._clock())

    def of_provider(self, name: str, has_key: bool) -> ProviderHealth:
        """What is known of a provider now, by its latest failure since its last success."""
        with self.lock:
            self._clear_dropped()
            health = dataclasses.replace(self._seen.get(name, ProviderHealth()))
            marks = [mark for (owner, _), mark in self._marks.items() if owner == name]
        latest = max(marks, key=lambda mark: mark.failed_at, default=Mark())
        left = max(latest.ready_at, latest.later_until) - self._clock()

        if not has_key or latest.verdict is Verdict.DENIED:
            health.status = ProviderStatus.UNAVAILABLE
        elif health.consecutive_failures == 0:
            health.status = ProviderStatus.HEALTHY
        elif latest.verdict is Verdict.RATE_LIMITED:
            health.rate_limit_reset_time = self._wall_clock() + left
            is_over = left <= 0
            health.status = ProviderStatus.HEALTHY if is_over else ProviderStatus.RATE_LIMITED
        else:
            health.status = ProviderStatus.FAILED
        return health

    def _marks_of(self, candidate: Candidate) -> List[Mark]:
        """The marks of the candidate's provider and of the candidate itself."""
        return [self._marks[key] for key in keys_of(candidate) if key in self._marks]

    def _paces_of(self, candidate: Candidate) -> Tuple[Pace, Pace]:
        """The pace of the candidate's account, and its own."""
        name = candidate.row.name
        return self._pace(name, ""), self._pace(name, candidate.model)

    def _pace(self, name: str, model: str) -> Pace:
        """The pace of a model, "" for the account."""
        if (name, model) not in self._paces:
            pace = Pace(is_account=model == "")
            if self._limit_was_met:
                pace.be_careful()
            self._paces[name, model] = pace
        return self._paces[name, model]

    def _meet_limit(self) -> None:
        """From now on, start cautiously with every candidate whose limits are unknown."""
        if not self._limit_was_met:
            self._limit_was_met = True
            for pace in self._paces.values():
                pace.be_careful()

    def _end(self, slot: Slot) -> None:
        """Its request is not under way any more, and nobody is trying the candidate."""
        self._open_slots = max(0, self._open_slots - 1)
        now = self._clock()
        for mark in self._marks_of(slot.candidate):
            mark.probed_until = min(mark.probed_until, now)
        for pace in self._paces_of(slot.candidate):
            if not slot.is_granted:
                pace.end(slot.is_begun)

    def _forgive(self, candidate: Candidate, begun: float) -> None:
        """Forget the failures before a success that began at `begun`, not those since then."""
        for key in keys_of(candidate):
            mark = self._marks.get(key)
            if mark is not None and mark.failed_at <= begun:
                del self._marks[key]

        name = candidate.row.name
        seen = self._seen.setdefault(name, ProviderHealth())
        seen.last_success = self._wall_clock()
        newer = [key for key, mark in self._marks.items() if mark.failed_at > begun]
        if not any(owner == name for owner, _ in newer):
            seen.consecutive_failures = 0

    def _clear_dropped(self) -> None:
        """End the slots that were dropped; the caller holds the lock."""
        while self._dropped:
            slot, answered_since = self._dropped.popleft()
            self._end(slot)
            if answered_since is not None:
                self._forgive(slot.candidate, answered_since)


def keys_of(candidate: Candidate) -> Tuple[Tuple[str, str], Tuple[str, str]]:
    """The keys of what is known of a candidate's provider, and of itself."""
    return (candidate.row.name, ""), (candidate.row.name, candidate.model)


def room_in(headers: Mapping[str, str], tokens: int) -> Optional[int]:
    """How many more requests of this size a successful reply says there is room for.

    Cerebras sends what is left of requests and tokens per minute, hour and day. Groq sends the
    requests of the day and the tokens of the minute (2026-10). None: nothing is said.
    """
    rooms = []
    for name, value in headers.items():
        if not name.startswith("x-ratelimit-remaining-"):
            continue
        left = to_number(value)
        if not math.isfinite(left):
            continue
        if name.startswith("x-ratelimit-remaining-tokens"):
            left = left / max(1, tokens)
        rooms.append(int(left))
    return min(rooms, default=None)


# --- 7. Queue: who is next, and how long to wait ------------------------------------------------


MIN_SHARE = 0.1  # seconds; an attempt that gets less is not worth a request


@dataclasses.dataclass(eq=False)
class Turn:
    """A candidate in the line of one question."""

    candidate: Candidate
    attempts: int = 0  # used, also by failures that reached the whole provider
    requests: int = 0  # sent
    ready_at: float = -math.inf  # it is not asked before
    patience: float = 0.0  # how long the question waits for it although others are ready
    turns: int = 0  # it has had, and lost its place with; who has had fewer comes before
    place: int = 0  # among those who have had as many
    was_stale: bool = False  # it had a second attempt because a kept connection was closed


class Option(NamedTuple):
    """A turn as it stands at one moment."""

    turn: Turn
    wait: float  # seconds until it can be asked
    patience: float
    is_held: bool = False  # after the wait there is only another look


class Step(NamedTuple):
    """What a question does next: it waits, and then asks, or looks again if there is no slot."""

    turn: Turn
    wait: float
    slot: Optional[Slot]


def first_choice(options: Sequence[Option], limit: float) -> Optional[Option]:
    """Who is asked next: the first whose wait is within its patience, or else the soonest.

    None if no wait is within the limit.
    """
    for option in options:
        if option.wait <= min(option.patience, limit):
            return option
    soonest = min(options, key=lambda option: option.wait, default=None)
    if soonest is None or soonest.wait > limit:
        return None
    return soonest


class Queue:
    """The candidates of one question: who is next, and how long to wait.

    Ask the first candidate that is worth waiting for. One that fails goes to the end of the line
    unless it asked only for a short pause. If none is ready, wait for the one ready soonest.
    """

    def __init__(
        self,
        candidates: Iterable[Candidate],
        deadline: float,
        health: Health,
        config: RetryConfig,
        clock: Clock,
        chance: Clock,
    ) -> None:
        self.deadline = deadline
        self._line = [Turn(candidate) for candidate in candidates]
        self._health = health
        self._config = config
        self._clock = clock
        self._chance = chance
        self._anybody_reached = False

    def next(self) -> Optional[Step]:
        """Who is asked next, with a slot; None when nobody is left, or not in time."""
        with self._health.lock:  # two threads that look at once would take the same slot
            now = self._clock()
            time_left = self.deadline - now
            if time_left <= 0:
                return None
            options = self._options(now)
            choice = first_choice(options, min(self._config.max_delay, time_left))
            if choice is None or choice.wait > time_left - 0.001:
                return None
            slot = None
            if not choice.is_held:
                slot = self._health.take(choice.turn.candidate, now, now + choice.wait)
            return Step(choice.turn, choice.wait, slot)

    def deadline_for(self, turn: Turn) -> float:
        """The end of an attempt: half of the time that is left, while another one is ready."""
        now = self._clock()
        if math.isinf(self.deadline):
            return self.deadline
        with self._health.lock:
            others = [option for option in self._options(now) if option.turn is not turn]
        share = (self.deadline - now) / 2
        if share >= MIN_SHARE and any(option.wait == 0 for option in others):
            return now + share
        return self.deadline

    def failed(self, asked: Turn, failure: Failure) -> None:
        """Drop the turns that a failure affects, move them to the end, or leave them in place."""
        now = self._clock()
        if not failure.is_unreachable:
            self._anybody_reached = True
        if failure.is_stale and not asked.was_stale:
            asked.was_stale = True
            asked.attempts += 1
            return

        end = 1 + max(turn.place for turn in self._line)
        jitter = 0.8 + 0.2 * self._chance() if self._config.jitter else 1.0
        siblings = [turn for turn in self._line if turn.candidate.row is asked.candidate.row]
        for turn in siblings:
            if failure.delays_siblings:
                turn.place = end
            if turn is asked or failure.reaches_provider:
                self._punish(turn, failure, jitter, now, end)
        if asked.place == end:
            asked.place = end + 1  # behind its siblings

    def _punish(self, turn: Turn, failure: Failure, jitter: float, now: float, end: int) -> None:
        """Put a turn out of the line, or at its end, or let it wait where it is."""
        turn.attempts += 1
        if not failure.rule.asked_again:
            self._line.remove(turn)
            return

        due = self._config.backoff(turn.attempts)
        wait = max(due * jitter, failure.hint or 0.0)
        turn.ready_at = now + wait
        is_limit = failure.verdict is Verdict.RATE_LIMITED and self._config.wait_on_rate_limit
        if is_limit and wait <= due:
            turn.patience = due
        else:
            turn.patience = 0.0
            turn.turns = turn.attempts
            turn.place = end

    def add(self, candidates: Iterable[Candidate]) -> None:
        """Put new candidates at the front of the line."""
        self._line[:0] = [Turn(candidate) for candidate in candidates]

    def _options(self, now: float) -> List[Option]:
        """Those who have attempts left, in the order of the line; the caller holds the lock."""
        most = self._config.max_attempts
        if not self._anybody_reached:
            most = min(most, 2)  # our own network is down: one more round, then stop

        ranked = []
        for turn in self._line:
            if turn.attempts >= most:
                continue
            outlook = self._health.outlook(turn.candidate, now)
            is_later = outlook.is_later and turn.attempts == 0
            rank = (turn.turns, turn.place, is_later)
            ranked.append((rank, self._option(turn, outlook, now)))
        ranked.sort(key=lambda pair: pair[0])
        return [option for _, option in ranked]

    def _option(self, turn: Turn, outlook: Outlook, now: float) -> Option:
        """The turn as it stands now, with our own pacing."""
        # Less than a microsecond is a clock's rounding.
        wait = max(0.0, round(max(turn.ready_at, outlook.ready_at) - now, 6))
        patience = min(turn.patience, (self.deadline - now) / 2)

        slot_wait = round(outlook.slot_at - now, 6)
        if outlook.is_full and wait == 0:
            # While no limit is known anywhere, the next answer is worth a short wait.
            if outlook.is_well:
                patience = slot_wait
            return Option(turn, slot_wait, patience, is_held=True)
        # Our own pacing is no reason to give up: look again, and ask before it is too late.
        time_left = self.deadline - now
        longest = min(self._config.max_delay, time_left / 2)
        if slot_wait <= longest or slot_wait <= wait:
            return Option(turn, max(wait, slot_wait), patience)
        if wait <= longest and time_left > MIN_SHARE:
            return Option(turn, longest, patience, is_held=True)
        return Option(turn, wait, patience)


# --- 8. FallbackLLM: the public methods and the walk --------------------------------------------

ANSWER_CUT = "✂️  answer cut at max_tokens"
Names = Union[str, Iterable[str], None]  # of providers: "groq,openrouter", a list, or all
Accept = Callable[[str], object]
Item = TypeVar("Item")
Result = TypeVar("Result")

ARGUMENTS: Json = {  # of a question, with their defaults
    "question": None,
    "max_tokens": 500,
    "provider": None,
    "model": None,
    "system": None,
    "messages": None,
    "timeout": None,
    "accept": None,
}
API_PARAMETERS = ("models", "seed", "stop", "top_p", "user", "metadata", "modalities", "store")
UNSUPPORTED = ("tools", "stream", "n")
# A models list also holds models that do not chat.
NOT_CHAT = re.compile("whisper|tts|speech|audio|embed|rerank|image|ocr")
MOST_REPLACEMENTS = 5  # models of a provider's list that take the place of those that are gone


@dataclasses.dataclass(eq=False)
class Question:
    """A question, checked, with all that is sent for it."""

    fields: Json  # the body of the request, without the model
    candidates: List[Candidate]
    timeout: float  # infinite: none
    accept: Optional[Accept] = None
    has_chosen_model: bool = False
    cancelled: threading.Event = dataclasses.field(default_factory=threading.Event)


class Statistics:
    """Counts of questions.

    Adding never waits for a lock: the garbage collector may close a stream, and with it end a
    question, while this very thread holds the lock.
    """

    NAMES = (
        "total_requests",
        "successful_requests",
        "failed_requests",
        "rate_limited_requests",
        "provider_switches",
    )

    def __init__(self) -> None:
        self._totals = [0] * len(self.NAMES)
        self._new: Deque[Tuple[int, ...]] = collections.deque()
        self.renew_lock()

    def renew_lock(self) -> None:
        """Begin with a free lock, as each process must after a fork."""
        self._lock = threading.Lock()

    def add(self, trail: Sequence[Attempt], is_answered: bool) -> None:
        """Count a question that has ended."""
        answered = 1 if is_answered else 0
        limited = sum(1 for attempt in trail if attempt.status == 429)
        switches = 0
        for before, after in zip(trail, trail[1:]):
            if before.provider != after.provider:
                switches += 1
        self._new.append((1, answered, 1 - answered, limited, switches))

        if self._lock.acquire(blocking=False):
            try:
                self._fold()
            finally:
                self._lock.release()

    def totals(self) -> Dict[str, int]:
        """The counts, by name."""
        with self._lock:
            self._fold()
            return dict(zip(self.NAMES, self._totals))

    def reset(self) -> None:
        """Set all counts to zero."""
        with self._lock:
            self._fold()
            self._totals = [0] * len(self.NAMES)

    def _fold(self) -> None:
        """Add what is new to the totals; the caller holds the lock."""
        while self._new:
            counts = self._new.popleft()
            self._totals = [total + count for total, count in zip(self._totals, counts)]


class Roster:
    """The providers that can be asked: their rows, keys and models, in their order."""

    def __init__(
        self,
        providers: Iterable[Provider],
        api_keys: Mapping[str, Optional[str]],
        idle_timeout: Optional[float],
    ) -> None:
        settings = Settings()
        self.problems = settings.problems
        self.all_rows: Dict[str, Provider] = {}
        self.models: Dict[str, List[str]] = {}
        self.api_keys: Dict[str, Optional[str]] = {}
        self._placeholders: Set[str] = set()
        self._found_keys: Dict[str, Optional[str]] = {}  # as the environment has them

        for row in providers:
            if not isinstance(row, Provider):
                raise ValueError(f"providers must be rows (Provider), not {row!r:.60}")
            quiet = row.idle_timeout if idle_timeout is None else idle_timeout
            row = dataclasses.replace(row, base_url=base_url(row), idle_timeout=quiet)
            self.all_rows[row.name] = row
            listed = re.split(r"[\s,]+", settings.value(row.variable("MODELS")))
            self.models[row.name] = [name for name in listed if name] or list(row.models)
            key = ""
            if row.key_env:
                key = settings.value(row.key_env)
            if is_placeholder(key):
                self._placeholders.add(row.name)
                key = ""
            self._found_keys[row.name] = key or None
        self.fallback_order = list(self.all_rows)

        self.api_keys.update(self._found_keys)
        for name, given in api_keys.items():
            if given is not None and not isinstance(given, str):
                raise ValueError(f"api_keys[{name!r}] must be text, not {type(given).__name__}")
            row = self.rows(name)[0]
            self.api_keys[row.name] = given
            if self.key(row) and is_clear_text(row.base_url):
                name = row.variable("BASE_URL")
                raise ValueError(f"{name} must be https://... for a provider with a key")

    def given_keys(self) -> Dict[str, Optional[str]]:
        """The keys that do not come from the environment."""
        given = {}
        for name, key in self.api_keys.items():
            if key != self._found_keys.get(name):
                given[name] = key
        return given

    def key(self, row: Provider) -> str:
        """The key of a provider, "" if it has none."""
        return stripped(self.api_keys.get(row.name))

    def key_problem(self, row: Provider) -> str:
        """Why a provider cannot be asked, "" if it can."""
        key = self.key(row)
        if not key and row.key_env is None:
            return ""
        name = row.key_env or f"the key of {row.name}"
        if key and is_clear_text(row.base_url):
            return f"{name} would go to {row.base_url} in clear text"
        if key and re.fullmatch("[!-~]+", key):
            return ""
        if key:
            problem = "contains a character that cannot be in a key"
        elif row.name in self._placeholders:
            problem = "holds a placeholder"
        else:
            problem = "is not set"
        return (
            f"{name} {problem} → get a key: {row.key_url}" if row.key_url else f"{name} {problem}"
        )

    def rows(self, names: Names = None) -> List[Provider]:
        """The rows of these providers, None for all, in their order. Raises ValueError."""
        wanted = self.fallback_order if names is None else names
        if isinstance(wanted, str):
            wanted = wanted.split(",")
        try:
            found = [str(name).strip().lower() for name in wanted]
        except TypeError:
            found = []
        if not found or not all(name in self.all_rows for name in found):
            known = ", ".join(self.all_rows)
            raise ValueError(f"provider must be one or more of {known}, not {names!r:.60}")
        return [self.all_rows[name] for name in dict.fromkeys(found)]

    def usable_rows(self, names: Names = None) -> List[Provider]:
        """The rows that have a key, or need none. Raises NoProviderError if there is none."""
        rows = self.rows(names)
        usable = [row for row in rows if not self.key_problem(row)]
        if usable:
            return usable

        lines = ["No API keys found! Please set environment variables:"]
        lines.append("   " + ", ".join(row.key_env or row.name for row in rows))
        lines.extend(f"   {row.name}: {self.key_problem(row)}" for row in rows)
        variables = [row.key_env for row in rows if row.key_env]
        unfinished = [row.key_env for row in rows if row.name in self._placeholders]
        if variables:
            name = (unfinished or variables)[-1]
            lines.append(f"   One is enough: export {name}=...   (or put it into .env)")
        lines.extend(f"   {problem}" for problem in self.problems)
        raise NoProviderError("\n".join(lines))

    def candidates(self, names: Names, model: Optional[str]) -> List[Candidate]:
        """Whom to ask, in this order. A model may be "provider:model". Raises as `rows` does."""
        if model is not None and (not isinstance(model, str) or is_blank(model)):
            raise ValueError(f"model must be the id of a model, not {model!r:.60}")
        rows = self.usable_rows(names)
        if model is not None:
            prefix, _, rest = model.partition(":")
            if rest and prefix.strip().lower() in self.all_rows:
                if names is not None and self.rows(prefix)[0] not in self.rows(names):
                    raise ValueError(f"model {model} is not of provider {names!r}")
                rows = self.usable_rows(prefix)
                model = rest.strip()
            else:
                listing = [row for row in rows if model in self.models[row.name]]
                rows = listing or rows

        candidates = []
        for row in rows:
            models = self.models[row.name] if model is None else [model]
            for number, name in enumerate(models, 1):
                candidates.append(Candidate(row, name, f"{number}/{len(models)}"))
        if not candidates:
            names_of_rows = ", ".join(row.name for row in rows)
            raise ValueError(f"models must name one: {names_of_rows} has none")
        return candidates

    def nearest_model(self, candidate: Candidate) -> str:
        """The model of this provider whose id is most like the candidate's, "" if none is."""
        listed = self.models[candidate.row.name]
        near = difflib.get_close_matches(candidate.model, listed, 1, 0.7)
        if near and candidate.model not in listed:
            return near[0]
        return ""


class Trail:
    """What has happened to one question so far."""

    def __init__(self, clock: Clock) -> None:
        self.attempts: List[Attempt] = []
        self.failures: Dict[str, Tuple[Candidate, Failure]] = {}  # the last of each provider
        self.draft = Draft("", is_live=False)  # of the current attempt
        self.waited = 0.0  # since the last attempt
        self._started = clock()
        self._clock = clock

    @property
    def is_shown(self) -> bool:
        """Whether text of the current attempt has been given out, which cannot be taken back."""
        return self.draft.is_live and bool(self.draft.texts)

    def add(self, turn: Turn, failure: Optional[Failure], begun: float) -> None:
        """Note an attempt that has ended."""
        row, model, _ = turn.candidate
        attempt = Attempt(
            provider=row.name,
            model=model,
            number=turn.requests,
            status=self.draft.status,
            verdict=failure.verdict if failure else None,
            reason=failure.reason if failure else "",
            waited=self.waited,
            elapsed=self._clock() - begun,
        )
        self.attempts.append(attempt)
        self.waited = 0.0
        if failure is not None:
            self.failures[row.name] = (turn.candidate, failure)

    def answer(self) -> Answer:
        """The answer that the last attempt gave."""
        last = self.attempts[-1]
        return Answer(
            text=self.draft.text,
            provider=last.provider,
            model=last.model,
            finish_reason=self.draft.finish_reason or None,
            usage=self.draft.usage,
            attempts=tuple(self.attempts),
            elapsed=self._clock() - self._started,
            skipped_events=self.draft.skipped_events,
        )

    def was_asked(self, candidate: Candidate) -> bool:
        """Whether a candidate was asked, or a failure of its provider stands for it."""
        name, model = candidate.row.name, candidate.model
        if name in self.failures and self.failures[name][1].reaches_provider:
            return True
        return any(a.provider == name and a.model == model for a in self.attempts)

    def gone_models(self, provider: str) -> Set[str]:
        """The models of a provider that turned out to be gone."""
        gone = set()
        for attempt in self.attempts:
            if attempt.provider == provider and attempt.verdict is Verdict.GONE:
                gone.add(attempt.model)
        return gone


class Narrator:
    """Tells one question's walk through the logger, in the documented lines.

    Each line is logged only once, and each error once per model, unless it is a retry.
    """

    def __init__(self, config: RetryConfig, cancelled: threading.Event) -> None:
        self._config = config
        self._cancelled = cancelled  # nobody listens any more
        self._told: Set[Tuple[str, str]] = set()
        self._provider = ""
        self._last: Optional[Candidate] = None

    def asking(self, candidate: Candidate) -> None:
        """Tell who is asked now, and that another one failed before."""
        name = candidate.row.name
        if self._last is not None and self._last != candidate:
            last_name, last_model = self._last.row.name, self._last.model
            self._tell(f"🔄 {last_name} {last_model} failed, trying next model...")
        if name != self._provider:
            self._tell(f"🔄 Trying provider: {name}")
        if candidate != self._last:
            self._tell(f"🎯 Trying {name} model {candidate.position}: {candidate.model}")
        self._provider = name

    def waiting(self, step: Step) -> None:
        """Tell how long the question waits, and why."""
        name = step.turn.candidate.row.name
        if step.turn.attempts:
            self._tell(f"⏳ Waiting {step.wait:.2f}s before retry...", again=True)
        elif step.slot is not None:
            self._tell(f"⏳ Waiting {step.wait:.2f}s: {name} is rate-limited", again=True)

    def answered(self, candidate: Candidate, trail: Trail) -> None:
        """Tell of the answer, and of what is wrong with it."""
        name = candidate.row.name
        number = trail.attempts[-1].number
        self._tell(f"✅ Success with {name} {candidate.model} on attempt {number}")
        count = trail.draft.skipped_events
        if count:
            line = f"⚠️  malformed events in the stream, left out of the answer: {count}"
            self._tell(line, logging.WARNING)
        if trail.draft.finish_reason == "length":
            self._tell(ANSWER_CUT, logging.WARNING)

    def failed(self, turn: Turn, failure: Failure, is_shown: bool) -> None:
        """Tell why an attempt failed, and what to do about a key."""
        candidate = turn.candidate
        row = candidate.row
        if not is_shown:  # what broke off after its first text is told by StreamInterrupted
            line = f"❌ Error in {row.name} API request: {failure.reason}"
            model = candidate.model
            if failure.is_unreachable:
                model = ""
            is_retry = candidate == self._last
            self._tell(line, logging.WARNING, model, again=is_retry)
        self._last = candidate
        if failure.verdict is Verdict.DENIED and row.key_env:
            line = f"🔑 Check {row.key_env} and the account: {row.key_url}"
            self._tell(line.rstrip(": "), logging.WARNING)
        number = turn.requests
        if failure.rule.asked_again and number >= self._config.max_attempts:
            line = f"🔄 {row.name} {candidate.model} exhausted all {number} retry attempts"
            self._tell(line)

    def _tell(
        self, line: str, level: int = logging.INFO, model: str = "", again: bool = False
    ) -> None:
        """Log a line, unless it was told before or nobody listens any more."""
        if self._cancelled.is_set():
            return
        if again or (model, line) not in self._told:
            self._told.add((model, line))
            logger.log(level, "%s", line)


def duration_words(seconds: float) -> str:
    """A duration as a person would say it."""
    seconds = math.ceil(seconds)
    for length, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        count = round(seconds / length)
        if count > 1 or (unit == "hour" and seconds >= 3600):
            return f"{count} {unit}{'' if count == 1 else 's'}"
    return f"{seconds} s"


def models_by_provider(candidates: Iterable[Candidate]) -> str:
    """Such as "groq (3 models), openrouter (1 model)"."""
    counts = collections.Counter(candidate.row.name for candidate in candidates)
    parts = []
    for name, count in counts.items():
        parts.append(f"{name} ({count} model{'' if count == 1 else 's'})")
    return ", ".join(parts)


class Workers:
    """Threads that call a function. They are daemons: nobody has to wait for them at the end."""

    def __init__(self, function: Callable[[Any], Any], most: int) -> None:
        self._function = function
        self._most = most
        self._threads: List[threading.Thread] = []
        self._todo: queue.Queue[Any] = queue.Queue()
        self._done: queue.Queue[Any] = queue.Queue()

    def submit(self, number: int, item: object) -> None:
        """Have the function called for the item."""
        self._todo.put((number, item))
        if len(self._threads) < self._most:
            thread = threading.Thread(target=self._work, daemon=True)
            thread.start()
            self._threads.append(thread)

    def next_result(self) -> Tuple[int, Any]:
        """The number and the result of a call that has ended; its exception is raised."""
        number, result, error = self._done.get()
        if error is not None:
            raise error
        return number, result

    def stop(self) -> None:
        """Call the function for no more items."""
        while not self._todo.empty():
            with contextlib.suppress(queue.Empty):  # a thread was quicker
                self._todo.get_nowait()
        for _ in self._threads:
            self._todo.put(None)

    def _work(self) -> None:
        """Call the function for one item after the other, until there is a None."""
        for number, item in iter(self._todo.get, None):
            try:
                self._done.put((number, self._function(item), None))
            except BaseException as error:  # noqa: BLE001 - next_result raises it
                self._done.put((number, None, error))


def work_through(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int
) -> Iterator[Result]:
    """The results of the function, in the order of the items, from so many threads.

    The items are read only as far as needed: `ahead` for each worker. An exception raised by the
    function is re-raised immediately.
    """
    pool = Workers(function, workers)
    numbered = enumerate(items)
    results: Dict[int, Result] = {}
    submitted = 0
    given = 0
    try:
        while True:
            for number, item in itertools.islice(numbered, given + ahead * workers - submitted):
                pool.submit(number, item)
                submitted += 1
            if given == submitted:
                return
            while given not in results:
                number, result = pool.next_result()
                results[number] = result
            yield results.pop(given)
            given += 1
    finally:
        pool.stop()


def check_parameter_names(parameters: Json) -> None:
    """Raise ValueError for parameters that are not supported or look misspelt."""
    for name in parameters:
        if not isinstance(name, str):
            raise ValueError(f"a parameter's name must be text, not {name!r:.60}")
        if name in UNSUPPORTED:
            raise ValueError("tools, stream and n are not supported")
        if name in API_PARAMETERS:
            continue
        near = difflib.get_close_matches(name, [*ARGUMENTS, "temperature"], 1, 0.8)
        if near and near[0] != name:
            raise ValueError(f"unknown parameter {name!r}: did you mean {near[0]!r}?")


def rejection(accept: Optional[Accept], text: str) -> Optional[Failure]:
    """The failure of an answer that the caller does not accept."""
    if accept is None:
        return None
    try:
        if accept(text):
            return None
        reason = "the answer was not accepted"
    except ValueError as error:  # json.loads raises one
        reason = f"the answer was not accepted: {error}"
    return Failure(Verdict.REJECTED, reason)


def raise_if_final(failure: Failure, trail: Trail) -> None:
    """Raise the error of a failure that ends the question, whoever else might answer."""
    last = trail.attempts[-1]
    who = f"{last.provider} {last.model}"
    if trail.is_shown:
        raise StreamInterrupted(
            f"{who} broke off: {failure.reason}",
            trail.attempts,
            partial=trail.draft.text,
            provider=last.provider,
            model=last.model,
        )
    if failure.verdict is Verdict.REFUSED:
        message = f"{last.provider} refused the question: {failure.reason}"
        raise AnswerRefused(message, trail.attempts, reason=failure.reason)


def is_chat_model(entry: object, free_only: bool) -> bool:
    """Whether an entry of a models list is a model that answers text with text.

    It is judged by what the entry says (Groq 2026-09, OpenRouter 2026-10), or else by its name.
    """
    name = dig(entry, "id")
    if not isinstance(name, str) or not re.fullmatch(r"[\w./:@~+-]{1,200}", name):
        return False
    if NOT_CHAT.search(name.lower()) or is_moderation_model(name):
        return False
    if dig(entry, "active") is False:
        return False

    modalities = dig(entry, "output_modalities") or dig(entry, "architecture", "output_modalities")
    if modalities not in (None, ["text"]):
        return False
    context = to_number(dig(entry, "context_window") or dig(entry, "context_length"))
    if context <= 4096:
        return False

    if free_only:
        prices = as_object(dig(entry, "pricing")).values()
        return bool(prices) and all(to_number(price) == 0 for price in prices)
    return True


@dataclasses.dataclass(eq=False)
class Parts:
    """What the questions of one client share."""

    roster: Roster
    health: Health
    transport: Transport
    clock: Clock
    sleep: Callable[[float], object]
    chance: Clock
    statistics: Statistics = dataclasses.field(default_factory=Statistics)
    searched: Set[str] = dataclasses.field(default_factory=set)  # whose models list was asked for

    def renew(self) -> None:
        """Begin with connections and locks of its own, as each process must after a fork."""
        self.transport.renew()
        self.health.renew_lock()
        self.statistics.renew_lock()

    def shown(self, text: str) -> str:
        """A server's text, safe to show."""
        if text in ("", "stop", "length"):
            return text
        for key in self.roster.api_keys.values():
            self.transport.redactor.add(key)
        return self.transport.redactor.line(text)

    def served_models(self, row: Provider, deadline: float = math.inf) -> List[str]:
        """The chat models in a provider's own list; none if the list cannot be had."""
        try:
            listing = self.transport.get(row, "/models", self.roster.key(row), deadline)
        except Failure:
            return []
        entries = listing.get("data")
        if not isinstance(entries, list):
            return []
        models = []
        for entry in entries:
            name = dig(entry, "id")
            if is_chat_model(entry, row.free_only) and self.shown(name) == name:
                models.append(name)
        return models


FORKED: weakref.WeakSet[Parts] = weakref.WeakSet()  # renewed in each new process


def renew_after_fork(parts: Parts) -> None:
    """See to it that a forked process does not share connections and locks with its parent.

    Two processes that read from one socket would get each other's answers.
    """
    FORKED.add(parts)
    register_once()


@functools.lru_cache(maxsize=None)
def register_once() -> None:
    """Have `renew_all` called in each child process."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=renew_all)


def renew_all() -> None:
    """Give all clients of this process connections and locks of their own."""
    for parts in FORKED:
        parts.renew()


class Walk:
    """One question's walk over its candidates."""

    def __init__(
        self, question: Question, is_live: bool, parts: Parts, config: RetryConfig
    ) -> None:
        self._question = question
        self._is_live = is_live
        self._parts = parts
        self._config = config
        self._narrator = Narrator(config, question.cancelled)

    def _begin(self) -> None:
        """Start the clock of the question: a stream may be read long after it was made."""
        parts = self._parts
        self._trail = Trail(parts.clock)
        self._deadline = parts.clock() + self._question.timeout
        self._line = Queue(
            self._question.candidates,
            self._deadline,
            parts.health,
            self._config,
            parts.clock,
            parts.chance,
        )

    def run(self) -> Generator[str, None, Answer]:
        """Ask whoever is next until one answers; live text comes out as it comes in."""
        self._begin()
        is_answered = False
        try:
            while True:
                step = self._next_step()
                if step is None:
                    raise self._all_failed()
                slot = self._wait_for(step)
                if slot is None:
                    continue

                failure = yield from self._attempt(step.turn, slot)
                if failure is None:
                    is_answered = True
                    return self._trail.answer()

                raise_if_final(failure, self._trail)
                self._line.failed(step.turn, failure)
                self._line.add(self._replacements())
        except GeneratorExit:
            is_answered = self._trail.is_shown  # whoever closes a stream has read enough
            raise
        finally:
            self._parts.statistics.add(self._trail.attempts, is_answered)

    def _next_step(self) -> Optional[Step]:
        """What to do next; None when nobody is left, or the question was cancelled."""
        if self._question.cancelled.is_set():
            return None
        return self._line.next()

    def _wait_for(self, step: Step) -> Optional[Slot]:
        """Wait for a step. None if it has become void: others were refused meanwhile."""
        slot = step.slot
        try:
            if step.wait > 0:
                self._narrator.waiting(step)
                self._trail.waited += step.wait
                self._parts.sleep(step.wait)
        except BaseException:  # Ctrl-C
            if slot is not None:
                self._parts.health.drop(slot)
            raise
        if slot is None or not self._parts.health.begin(slot):
            return None
        return slot

    def _attempt(self, turn: Turn, slot: Slot) -> Generator[str, None, Optional[Failure]]:
        """One exchange, and what is learned from it: why it gave no answer, None if it did."""
        self._narrator.asking(slot.candidate)
        draft = Draft(slot.candidate.model, self._is_live)
        self._trail.draft = draft
        turn.requests += 1
        clock = self._parts.clock
        begun = clock()
        limit = TimeLimit(clock, self._line.deadline_for(turn), slot.candidate.row.idle_timeout)
        failure: Optional[Failure] = None
        try:
            with contextlib.closing(self._pieces(slot.candidate, draft, limit)) as pieces:
                for piece in pieces:
                    if piece and not slot.is_granted:
                        room = room_in(draft.headers, draft.tokens)
                        self._parts.health.granted(slot, begun, room)
                    if piece and self._is_live:
                        limit.extend(self._deadline)  # it cannot be taken back
                        yield piece
            failure = draft.failure() or rejection(self._question.accept, draft.text)
        except Failure as caught:
            failure = caught
        except GeneratorExit:
            self._parts.health.drop(slot, begun if draft.texts else None)
            raise
        except BaseException:  # Ctrl-C, or an exception of the caller's `accept`
            self._parts.health.drop(slot)
            raise

        self._learn(turn, slot, begun, failure)
        return failure

    def _pieces(
        self, candidate: Candidate, draft: Draft, limit: TimeLimit
    ) -> Generator[str, None, None]:
        """The text of an answer as it comes."""
        row, model, _ = candidate
        body = request_body(self._question.fields, model, row.parameters_for(model))
        fields = self._question.fields
        longest = to_number(fields.get("max_tokens", fields.get("max_completion_tokens")))
        draft.tokens = len(body) // 4 + (0 if math.isnan(longest) else int(longest))
        key = self._parts.roster.key(row)
        return self._parts.transport.converse(row, key, body, draft, limit)

    def _learn(self, turn: Turn, slot: Slot, begun: float, failure: Optional[Failure]) -> None:
        """Note and tell how an attempt ended."""
        draft = self._trail.draft
        draft.finish_reason = self._parts.shown(draft.finish_reason)
        if failure is None:
            self._parts.health.answered(slot, begun)
            self._trail.add(turn, None, begun)
            self._narrator.answered(slot.candidate, self._trail)
            return

        failure.reason = self._parts.shown(failure.reason)
        failure.summary = self._parts.shown(failure.summary)
        if not slot.is_granted and draft.status not in (None, 429):
            self._parts.health.granted(slot, begun, None)  # no quota has refused it
        self._parts.health.failed(slot, begun, failure, self._config.backoff)
        self._trail.add(turn, failure, begun)
        self._narrator.failed(turn, failure, is_shown=self._trail.is_shown)

    def _replacements(self) -> List[Candidate]:
        """Models that the provider asked last serves, once all that it was asked for are gone."""
        question = self._question
        roster = self._parts.roster
        name = self._trail.attempts[-1].provider
        gone = self._trail.gone_models(name)
        asked = {c.model for c in question.candidates if c.row.name == name}
        if question.has_chosen_model or not gone or asked - gone:
            return []

        row = roster.all_rows[name]
        if name not in self._parts.searched and gone.issuperset(roster.models[name]):
            # Other threads do not wait for the list: they go on to the next provider.
            self._parts.searched.add(name)
            served = self._parts.served_models(row, self._deadline)
            found = [model for model in served if model not in gone][:MOST_REPLACEMENTS]
            if found:
                roster.models[name] = found
                logger.warning(
                    "🔎 %s: gone: %s; used instead: %s; to choose, set %s=a,b",
                    name,
                    ", ".join(sorted(gone)),
                    ", ".join(found),
                    row.variable("MODELS"),
                )

        candidates = roster.candidates(name, None)
        new = [candidate for candidate in candidates if candidate.model not in asked]
        question.candidates.extend(new)
        return new

    def _all_failed(self) -> AllProvidersFailed:
        """The error of a question that nobody answered, with what to do."""
        trail = self._trail
        candidates = self._question.candidates
        waits = [self._parts.health.wait_for_server(candidate) for candidate in candidates]
        retry_after = min([wait for wait in waits if wait > 0], default=None)
        unasked = [candidate for candidate in candidates if not trail.was_asked(candidate)]
        lines = [self._headline(unasked)]

        for name, (candidate, failure) in list(trail.failures.items())[:6]:
            reason = failure.summary or failure.reason
            lines.append(
                f"   {name} {candidate.model}: {reason} → {self._advice(candidate, failure)}"
            )
        if retry_after is not None:
            lines.append(f"   The first rate limit ends in {duration_words(retry_after)}.")
        return AllProvidersFailed("\n".join(lines), trail.attempts, retry_after)

    def _headline(self, unasked: Sequence[Candidate]) -> str:
        """In one line, what was asked and what was not."""
        question = self._question
        roster = self._parts.roster
        asked = [c for c in question.candidates if c not in unasked]
        chosen = {candidate.row.name for candidate in question.candidates}
        usable = [row for row in roster.rows() if not roster.key_problem(row)]
        others = [row.name for row in usable if row.name not in chosen]
        if not unasked and not others:
            return "All providers and models failed"

        what = "No answer"
        if self._parts.clock() >= self._deadline - 0.01:
            what = "No answer within the time limit"
        parts = [f"{what}; asked: {models_by_provider(asked) or 'nobody'}"]
        if unasked:
            parts.append(f"not asked: {models_by_provider(unasked)}")
        if others:
            parts.append(f"not chosen: {', '.join(others)}")
        return "; ".join(parts)

    def _advice(self, candidate: Candidate, failure: Failure) -> str:
        """What to do about a failure."""
        row = candidate.row
        advice = failure.advice or failure.rule.advice
        near = self._parts.roster.nearest_model(candidate)
        if failure.verdict is Verdict.GONE and near:
            advice = f"did you mean {near}? --list-models shows all"
        words = {
            "{key}": row.key_env or "the key",
            "{models}": row.variable("MODELS"),
            "{base_url}": row.variable("BASE_URL"),
            "{url}": row.key_url,
        }
        for mark, word in words.items():
            advice = advice.replace(mark, word)
        return self._parts.shown(advice).rstrip(": ")


class FallbackLLM:
    """Asks language models, one after the other, until one of them answers.

        llm = FallbackLLM()
        print(llm.ask("What is the capital of France?"))

    Threads may share an object. It works as a context manager, it can be pickled, and
    `fallback_order`, `api_keys` and `models` may be changed at any time. `retry_config` says how
    often a model is asked.
    """

    def __init__(
        self,
        retry_config: Optional[RetryConfig] = None,
        *,
        providers: Optional[Iterable[Provider]] = None,
        api_keys: Optional[Mapping[str, Optional[str]]] = None,
        timeout: Optional[float] = None,
        idle_timeout: Optional[float] = None,
        clock: Clock = time.monotonic,
        wall_clock: Clock = time.time,
        sleep: Callable[[float], object] = time.sleep,
        chance: Optional[Clock] = None,
        session: object = None,
    ) -> None:
        """Make a client. A missing key is no error here.

        providers: rows as in PROVIDERS, which is the default. api_keys: by provider; they win
        over the environment and .env files. timeout: seconds for a whole question. idle_timeout:
        seconds without progress that end an attempt, for all rows. The others replace time,
        sleep, chance and the requests.Session in tests. Raises ValueError.
        """
        if retry_config is not None and not isinstance(retry_config, RetryConfig):
            raise ValueError(f"retry_config must be a RetryConfig, not {retry_config!r:.60}")
        if api_keys is not None and not isinstance(api_keys, Mapping):
            raise ValueError(f"api_keys must be a dict, not {type(api_keys).__name__}")
        for name, value in (("timeout", timeout), ("idle_timeout", idle_timeout)):
            if value is not None:
                check_number(name, value)

        self.retry_config = RetryConfig() if retry_config is None else retry_config
        rows = PROVIDERS if providers is None else tuple(providers)
        self._settings: Dict[str, Any] = {
            "providers": rows,
            "timeout": timeout,
            "idle_timeout": idle_timeout,
            "clock": clock,
            "wall_clock": wall_clock,
            "sleep": sleep,
            "chance": chance,
        }
        self._timeout = math.inf if timeout is None else timeout
        self._parts = Parts(
            roster=Roster(rows, api_keys or {}, idle_timeout),
            health=Health(clock, wall_clock),
            transport=Transport(clock, wall_clock, session),
            clock=clock,
            sleep=sleep,
            chance=random.random if chance is None else chance,
        )
        renew_after_fork(self._parts)

    def __repr__(self) -> str:
        parts = [f"{name}: {', '.join(self.models[name])}" for name in self.fallback_order]
        return f"<FallbackLLM {'; '.join(parts)}>"

    def __enter__(self) -> FallbackLLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> Tuple[Any, ...]:
        """For pickle and copy: the settings, and the keys that were given."""
        arguments = {**self._settings, "api_keys": self._parts.roster.given_keys()}
        make = functools.partial(type(self), self.retry_config, **arguments)
        return make, (), {"fallback_order": self.fallback_order, "models": self.models}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        self.fallback_order = list(state["fallback_order"])
        self.models.update(state["models"])

    def close(self) -> None:
        """Close the connections that are kept alive."""
        self._parts.transport.close()

    @property
    def fallback_order(self) -> List[str]:
        """The names of the providers, in the order in which they are asked."""
        return self._parts.roster.fallback_order

    @fallback_order.setter
    def fallback_order(self, names: List[str]) -> None:
        self._parts.roster.fallback_order = names

    @property
    def api_keys(self) -> Dict[str, Optional[str]]:
        """The key of each provider, None where it is not set."""
        return self._parts.roster.api_keys

    @api_keys.setter
    def api_keys(self, keys: Dict[str, Optional[str]]) -> None:
        self._parts.roster.api_keys = keys

    @property
    def models(self) -> Dict[str, List[str]]:
        """The models of each provider, in the order in which they are asked."""
        return self._parts.roster.models

    @models.setter
    def models(self, models: Dict[str, List[str]]) -> None:
        self._parts.roster.models = models

    @property
    def provider_health(self) -> Dict[str, ProviderHealth]:
        """What is known of each provider now."""
        health = {}
        for name, row in self._parts.roster.all_rows.items():
            has_key = not self._parts.roster.key_problem(row)
            health[name] = self._parts.health.of_provider(name, has_key)
        return health

    def ask(
        self,
        question: Optional[str] = None,
        max_tokens: int = 500,
        provider: Names = None,
        *,
        model: Optional[str] = None,
        system: Optional[str] = None,
        messages: Optional[Sequence[Json]] = None,
        timeout: Optional[float] = None,
        accept: Optional[Accept] = None,
        **parameters: Any,
    ) -> str:
        """The text of the answer; "" if all models failed or the question was refused.

        The reason for a failure is logged as an error. Arguments and other errors: see `complete`.
        """
        checked = self._question(
            question, max_tokens, provider, model, system, messages, timeout, accept, parameters
        )
        try:
            return self._complete(checked).text
        except (AllProvidersFailed, AnswerRefused) as error:
            logger.error("❌ %s", error)
            return ""

    def complete(
        self,
        question: Optional[str] = None,
        max_tokens: int = 500,
        provider: Names = None,
        *,
        model: Optional[str] = None,
        system: Optional[str] = None,
        messages: Optional[Sequence[Json]] = None,
        timeout: Optional[float] = None,
        accept: Optional[Accept] = None,
        **parameters: Any,
    ) -> Answer:
        """The answer and how it came about.

        provider: a name or several ("groq,openrouter" or a list), asked in this order. model: the
        only model to ask, also as "provider:model". system: the system prompt. messages: a
        conversation, which the question continues. timeout: seconds for the whole question.
        accept: a function of the text; if it returns something false or raises ValueError, the
        next model is asked. parameters: any others of the chat completions API, such as
        temperature. Raises ValueError and NoProviderError (nothing was sent), AllProvidersFailed
        and AnswerRefused.
        """
        checked = self._question(
            question, max_tokens, provider, model, system, messages, timeout, accept, parameters
        )
        return self._complete(checked)

    def stream(
        self,
        question: Optional[str] = None,
        max_tokens: int = 500,
        provider: Names = None,
        *,
        model: Optional[str] = None,
        system: Optional[str] = None,
        messages: Optional[Sequence[Json]] = None,
        timeout: Optional[float] = None,
        **parameters: Any,
    ) -> Generator[str, None, Answer]:
        """The text, piece by piece as it comes; the generator returns the Answer.

        Arguments and errors are those of `complete`. Text already yielded cannot be taken
        back, so a failure after the first piece raises StreamInterrupted, and there is no `accept`.
        """
        if "accept" in parameters:
            raise ValueError("accept is not for stream(): its text cannot be taken back")
        checked = self._question(
            question, max_tokens, provider, model, system, messages, timeout, None, parameters
        )
        return Walk(checked, True, self._parts, self.retry_config).run()

    def ask_many(
        self,
        questions: Iterable[Union[str, Json]],
        max_workers: int = 8,
        max_tokens: int = 500,
        provider: Names = None,
        *,
        model: Optional[str] = None,
        system: Optional[str] = None,
        messages: Optional[Sequence[Json]] = None,
        timeout: Optional[float] = None,
        accept: Optional[Accept] = None,
        **parameters: Any,
    ) -> Iterator[Union[Answer, FallbackLLMError, ValueError]]:
        """Lazily yield an Answer, or the error in its place, for each question, in order.

        questions: texts, or dicts of arguments of `complete`, which win over those given here.
        """
        check_number("max_workers", max_workers)
        if isinstance(questions, str):
            raise ValueError("questions must be several, such as [question]")
        if provider is not None and not isinstance(provider, str):
            provider = list(provider)
        common = dict(
            parameters,
            max_tokens=max_tokens,
            provider=provider,
            model=model,
            system=system,
            messages=messages,
            timeout=timeout,
            accept=accept,
        )
        with contextlib.suppress(NoProviderError):
            self._question_from({**common, "question": "is all else right?"})
        return self._answers(questions, max_workers, common)

    def get_stats(self) -> Dict[str, int]:
        """Counts since the last reset. A request is a question; a 429 reply is rate-limited."""
        return self._parts.statistics.totals()

    def reset_stats(self) -> None:
        """Set all counts to zero."""
        self._parts.statistics.reset()

    def _question(
        self,
        question: Optional[str],
        max_tokens: int,
        provider: Names,
        model: Optional[str],
        system: Optional[str],
        messages: Optional[Sequence[Json]],
        timeout: Optional[float],
        accept: Optional[Accept],
        parameters: Json,
    ) -> Question:
        """The question, checked. Raises ValueError, and NoProviderError."""
        check_parameter_names(parameters)
        if accept is not None and not callable(accept):
            raise ValueError(f"accept must be a function of the text, not {accept!r:.60}")
        fields = {name: value for name, value in parameters.items() if value is not None}
        if "max_completion_tokens" not in fields:
            check_number("max_tokens", max_tokens)
            fields["max_tokens"] = max_tokens
        if "temperature" in fields:
            check_number("temperature", fields["temperature"])
        if timeout is not None:
            check_number("timeout", timeout)

        fields["messages"] = conversation(question, system, messages)
        fields["stream"] = True
        # Other servers than the three send the usage of a stream only when they are asked to.
        fields.setdefault("stream_options", {"include_usage": True})
        if isinstance(provider, Iterator):
            provider = list(provider)
        candidates = self._parts.roster.candidates(provider, model)
        if parameters or messages:
            request_body(fields, "", {})  # ValueError for what JSON cannot carry
        limit = self._timeout if timeout is None else timeout
        return Question(fields, candidates, limit, accept, has_chosen_model=model is not None)

    def _question_from(self, arguments: Json) -> Question:
        """The question with these arguments of `complete`."""
        parameters = dict(arguments)
        known: Json = {}
        for name, default in ARGUMENTS.items():
            known[name] = parameters.pop(name, default)
        return self._question(parameters=parameters, **known)

    def _answers(
        self, questions: Iterable[Union[str, Json]], max_workers: int, common: Json
    ) -> Iterator[Union[Answer, FallbackLLMError, ValueError]]:
        """The results of `ask_many`."""
        cancelled = threading.Event()

        def answer(asked: Union[str, Json]) -> Union[Answer, FallbackLLMError, ValueError]:
            arguments = asked if isinstance(asked, dict) else {"question": asked}
            return self._result({**common, **arguments}, cancelled)

        try:
            yield from work_through(answer, questions, max_workers, ahead=4)
        finally:
            cancelled.set()  # those that are under way do not go on

    def _result(
        self, arguments: Json, cancelled: threading.Event
    ) -> Union[Answer, FallbackLLMError, ValueError]:
        """The answer to a question with these arguments, or its error."""
        try:
            question = self._question_from(arguments)
            question.cancelled = cancelled
            return self._complete(question)
        except (FallbackLLMError, ValueError) as error:
            return error

    def _complete(self, question: Question) -> Answer:
        """The answer to a checked question."""
        walk = Walk(question, False, self._parts, self.retry_config).run()
        try:
            while True:
                next(walk)
        except StopIteration as end:
            return cast(Answer, end.value)


# --- 9. Command line ----------------------------------------------------------------------------

# What a terminal would obey: control characters, but not tab and newline.
CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])
PLAIN_WORDS = (("❌ Error", "Error"), ("❌ ", "Error: "), ("⚠️  ", "Warning: "), ("→", "->"))
EMOJI = re.compile("[🚀✅❓🤔⏳🔄🎯💡⏱📊🔑🔎✂]\ufe0f? +")
PUT_SIZE = 4096  # characters; one big write to a pipe may not notice that its reader has gone
ENDINGS = """\
keys: CEREBRAS_API_KEY, GROQ_API_KEY or OPENROUTER_API_KEY; one is enough. They
are read from the environment and from .env files: in the current folder, beside
this file and in ~/.config/fallback_llm.
GROQ_MODELS=a,b replaces a model list, GROQ_BASE_URL (not in .env) an address.
In a shell loop that reads lines, use --no-stdin or, better, --batch.
exit codes: 0 answered (--check: a provider can answer), 1 no answer, 2 wrong
usage (nothing sent), 130 interrupted, 141 broken pipe
https://github.com/example/fallback-llm"""


class UsageError(ValueError):
    """The command line is wrong; nothing was sent."""


class Console:
    """stdout for the answer, stderr for everything else.

    Nothing breaks over an encoding, or over a stderr that is closed or full.
    """

    def __init__(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        self.has_terminal = is_terminal(sys.stderr)
        self._is_plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
        self._is_plain = self._is_plain or not can_encode(sys.stderr, "🔄")
        self._is_shared = self.has_terminal and is_terminal(sys.stdout)
        self._has_open_line = False  # the answer's last line has no newline yet
        self._drawn = 0  # columns of a line on the terminal that is to be replaced

    def say(self, text: str, end: str = "\n") -> None:
        """Write a message to stderr, if there is one."""
        if self._has_open_line and self._is_shared:
            self.put("\n")
        if self._drawn:
            self._write("\r" + " " * self._drawn + "\r")
            self._drawn = 0
        if self._is_plain:
            for sign, words in PLAIN_WORDS:
                text = text.replace(sign, words)
            text = EMOJI.sub("", text)
        self._write(text.translate(CONTROLS) + end)

    def _write(self, text: str) -> None:
        """Write to stderr; give it up if that fails."""
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except (OSError, ValueError, AttributeError):  # it is full, closed or None
            sys.stderr = cast(Any, None)
            self.has_terminal = False

    def redraw(self, text: str) -> None:
        """Replace the last line of the terminal, for as long as the next message."""
        try:
            width = os.get_terminal_size(sys.stderr.fileno()).columns - 1
        except (OSError, ValueError, AttributeError):
            width = 79
        self.say(text[:width], end="\r")
        self._drawn = len(text[:width])

    def put(self, text: str) -> None:
        """Write a piece of the answer to stdout."""
        for start in range(0, len(text), PUT_SIZE):
            sys.stdout.write(text[start : start + PUT_SIZE])
            sys.stdout.flush()
        if text:
            self._has_open_line = not text.endswith("\n")

    def end_line(self) -> None:
        """See to it that the answer ends with a newline."""
        if self._has_open_line:
            self.put("\n")

    def put_json(self, value: object) -> None:
        """Write one line of JSON to stdout, with escapes for what it cannot carry."""
        line = json_line(value)
        if not can_encode(sys.stdout, line):
            line = json.dumps(value) + "\n"
        self.put(line)

    def sleep(self, seconds: float) -> None:
        """Wait, and show on a terminal how long is left."""
        until = time.monotonic() + seconds
        if self.has_terminal and not self._is_plain and seconds >= 2:
            while until - time.monotonic() > 1:
                self.redraw(f"   {math.ceil(until - time.monotonic())} s left")
                time.sleep(1)
            self.redraw("")
        time.sleep(max(0.0, until - time.monotonic()))


def is_terminal(stream: Optional[IO[str]]) -> bool:
    """Whether the stream is there and leads to a terminal."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # it is closed
        return False


def can_encode(stream: Optional[IO[str]], text: str) -> bool:
    """Whether the stream's encoding has all characters of the text."""
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def json_line(value: object) -> str:
    """The value as a line of JSON that neither a terminal nor an encoder stumbles over."""
    line = json.dumps(value, ensure_ascii=False)
    odd = "[\x7f-\x9f\u2028\u2029\ud800-\udfff]"
    return re.sub(odd, lambda match: f"\\u{ord(match.group()):04x}", line) + "\n"


class ConsoleHandler(logging.Handler):
    """Shows what the module logs."""

    def __init__(self, console: Console, args: argparse.Namespace) -> None:
        super().__init__()
        self._console = console
        self._max_tokens = args.max_tokens
        is_silent = args.quiet or (args.batch is not None and not args.verbose)
        self._level = logging.ERROR if is_silent else logging.INFO
        if args.verbose:
            self._level = logging.DEBUG
        self._shows_cuts = args.batch is None

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record that is important enough for the flags."""
        message = record.getMessage()
        is_cut = message == ANSWER_CUT and self._shows_cuts
        if is_cut:
            message = message.replace("max_tokens", f"--max-tokens {self._max_tokens}")
        if is_cut or record.levelno >= self._level:
            self._console.say(message)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """One line per option: "-f, --file PATH". Only Python 3.13 does so by itself."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=81)  # argparse leaves one column free

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = ", ".join(action.option_strings)
        if action.metavar:
            return f"{names} {action.metavar}"
        return names


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UsageError, with a suggestion, instead of exiting."""

    def long_flags(self) -> List[str]:
        """All flags that begin with --."""
        names = [name for action in self._actions for name in action.option_strings]
        return [name for name in names if name.startswith("--")]

    def exit(self, status: int = 0, message: Optional[str] = None) -> NoReturn:
        """End after --help or --version; a stdout that is full is noticed here."""
        sys.stdout.flush()
        super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        """Suggest what may have been meant by an unknown flag."""
        if message.startswith("unrecognized arguments:"):
            for word in re.findall(r" (-[^\s=]+)", message):
                near = nearest_flag(word, self.long_flags())
                if near:
                    message += f" (did you mean {near}?)"
            message += " (put -- before a question that starts with -)"
        raise UsageError(message)


def nearest_flag(word: str, flags: Sequence[str]) -> str:
    """The flag that a misspelt one is like, "" if none is."""
    beginning = []
    if len(word) > 2:
        beginning = [flag for flag in flags if flag.startswith(word)]
    near = beginning or difflib.get_close_matches(word, flags, 1, 0.75)
    if near:
        return near[0]
    return ""


def number(name: str) -> Callable[[str], float]:
    """A function that reads the value of a flag."""
    rule = NUMBER_RULES[name]

    def read(text: str) -> float:
        try:
            value: float = rule.kind(text)
            check_number(name, value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {rule.allowed}, not {text!r}") from None
        return value

    return read


def make_parser(prog: str) -> Parser:
    """The options, with their help."""
    run = prog if prog == "fallback-llm" else f"python {prog}"
    examples = f"""\
examples:
  {run} "What is the capital of France?"
  cat error.log | {run} "explain this" --provider groq --stats
  {run} --batch questions.txt -o answers.jsonl --workers 16
"""
    parser = Parser(
        prog=prog,
        usage=f"{prog} [options] [--] [question ...]",
        description="Ask a language model; if it fails, the next one answers.\n"
        "Only the answer goes to stdout.",
        epilog=f"{examples}\n{ENDINGS}",
        formatter_class=HelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("question", nargs="*", help=argparse.SUPPRESS)
    group = parser.add_argument_group("options (a lone - reads the question from stdin)")
    add = group.add_argument

    def add_number(flag: str, metavar: str, text: str, default: Optional[int] = None) -> None:
        read = number(flag[2:].replace("-", "_"))
        add(flag, metavar=metavar, type=read, default=default, help=text)

    loudness = group.add_mutually_exclusive_group()
    add(
        "-f",
        "--file",
        metavar="PATH",
        action="append",
        help="prepend a file's contents (repeatable)",
    )
    add("-s", "--system", metavar="TEXT", help="system prompt")
    add("--provider", metavar="NAMES", help="providers to use, in order: groq,openrouter")
    add("-m", "--model", metavar="MODEL", help="use only this model; also PROVIDER:MODEL")
    add_number(
        "--max-tokens", "N", "maximum answer length, with reasoning (default: 500)", default=500
    )
    add_number("--temperature", "T", "from 0 to 2 (default: the model's own)")
    add_number("--timeout", "SECONDS", "time limit for the whole question")
    add_number("--idle-timeout", "SECONDS", "give up on a model after this much silence")
    add_number("--max-attempts", "N", "maximum requests to one model (default: 5)")
    add_number("--base-delay", "SECONDS", "first wait, doubled each time (default: 2.0)")
    add_number("--max-delay", "SECONDS", "longest single wait (default: 60.0)")
    add(
        "--disable-jitter",
        action="store_true",
        help="do not shorten waits by up to a fifth at random",
    )
    add("--no-wait", action="store_true", help="on a rate limit, try another model at once")
    add("--stream", action="store_true", help="print the answer as it is written")
    add("--json", action="store_true", help="print one JSON object, also on failure")
    add("--expect-json", action="store_true", help="accept only an answer that is JSON")
    loudness.add_argument("-q", "--quiet", action="store_true", help="only errors on stderr")
    loudness.add_argument("-v", "--verbose", action="store_true", help="more on stderr")
    add("--stats", action="store_true", help="usage statistics on stderr")
    add("--no-stdin", action="store_true", help="do not read from a pipe")
    add("--check", action="store_true", help="check keys and models; costs no tokens")
    add("--list-models", action="store_true", help="print PROVIDER<tab>MODEL")
    add("--batch", metavar="FILE", help="ask each line: text, or JSON with question, id ...")
    add("-o", "--output", metavar="FILE", help="answers of a batch; run again to resume")
    add_number("--workers", "N", "concurrent requests of a batch (default: 8)")
    add(
        "-V",
        "--version",
        action="version",
        version=f"fallback_llm {__version__}",
        help="print the version",
    )
    add("-h", "--help", action="help", help="print this help")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options. Raises UsageError."""
    prog = ""
    if sys.argv:
        prog = os.path.basename(sys.argv[0])
    if not re.fullmatch(r"[\w.-]*fallback[\w.-]*", prog):
        prog = "fallback_llm.py"  # python - < fallback_llm.py
    parser = make_parser(prog)
    words = joined_values(argv)
    refuse_single_dashes(words, parser)

    # The intermixed parse takes flags anywhere, but it does not know "--".
    read = parser.parse_args if "--" in words else parser.parse_intermixed_args
    args = read(words)
    args.usage = short_usage(parser)
    if args.output == "-":
        args.output = None  # stdout, as without it
    check_modes(args)
    check_values(args)
    return args


def check_modes(args: argparse.Namespace) -> None:
    """Raise UsageError if more than one thing is to be done."""
    modes = []
    for name in ("check", "list_models", "batch"):
        if getattr(args, name) not in (None, False):
            modes.append(f"--{name.replace('_', '-')}")
    if len(modes) > 1:
        raise UsageError(f"{modes[1]} is not allowed with {modes[0]}")
    if modes and (args.question or args.file):
        raise UsageError(f"{modes[0]} takes no question")


def check_values(args: argparse.Namespace) -> None:
    """Raise UsageError for values that do not go together."""
    is_batch = args.batch is not None
    for flag, value in (("--output", args.output), ("--workers", args.workers)):
        if value is not None and not is_batch:
            raise UsageError(f"{flag} needs --batch")
    if args.stream and args.expect_json:
        raise UsageError("--expect-json is not allowed with --stream: text cannot be taken back")
    both_delays = args.base_delay is not None and args.max_delay is not None
    if both_delays and args.max_delay < args.base_delay:
        low, high = number_of(args.max_delay), number_of(args.base_delay)
        raise UsageError(f"--max-delay ({low}) is below --base-delay ({high})")


def short_usage(parser: Parser) -> str:
    """The usage and two examples, for somebody who asked nothing."""
    examples = (parser.epilog or "").splitlines()[1:3]
    return "\n".join([parser.format_usage().strip(), *examples])


def joined_values(argv: Sequence[str]) -> List[str]:
    """The arguments, with "--base-delay -inf" joined: argparse would take -inf for a flag."""
    words: List[str] = []
    for word in argv:
        before = words[-1] if words else ""
        is_value = re.fullmatch(r"-(inf|nan|infinity)", word, re.IGNORECASE)
        if is_value and before.startswith("--") and before != "--" and "=" not in before:
            words[-1] = f"{before}={word}"
        else:
            words.append(word)
    return words


def refuse_single_dashes(words: Sequence[str], parser: Parser) -> None:
    """Refuse -model, which argparse would read as -m odel."""
    for word in words:
        if word == "--":
            return
        name = word.partition("=")[0]
        near = ""
        if re.fullmatch(r"-[a-z][a-z-]{2,}", name):
            near = nearest_flag("-" + name, parser.long_flags())
        if near:
            raise UsageError(f"unknown flag {name} (did you mean {near}?)")


def make_client(args: argparse.Namespace, console: Console) -> FallbackLLM:
    """The client that the options describe."""
    retry: Dict[str, Any] = {}
    for name in ("max_attempts", "base_delay", "max_delay"):
        if getattr(args, name) is not None:
            retry[name] = getattr(args, name)
    if args.max_delay is not None and args.base_delay is None:
        retry["base_delay"] = min(RetryConfig.base_delay, args.max_delay)
    if args.base_delay is not None and args.max_delay is None:
        retry["max_delay"] = max(RetryConfig.max_delay, args.base_delay)
    config = RetryConfig(
        jitter=not args.disable_jitter, wait_on_rate_limit=not args.no_wait, **retry
    )
    sleep = time.sleep if args.batch is not None or args.quiet else console.sleep
    return FallbackLLM(config, timeout=args.timeout, idle_timeout=args.idle_timeout, sleep=sleep)


def common_arguments(args: argparse.Namespace) -> Json:
    """The arguments of `complete` that the options give."""
    arguments: Json = {"max_tokens": args.max_tokens}
    for name in ("provider", "model", "system", "temperature"):
        if getattr(args, name) is not None:
            arguments[name] = getattr(args, name)
    return arguments


def question_of(args: argparse.Namespace, console: Console) -> str:
    """The question: the files, then the pipe, then the words. Raises UsageError."""
    words = [word for word in args.question if word != "-"]
    parts: List[str] = []
    paths = args.file or []
    for path in paths:
        text = read_question_file(path)
        parts.append(f"--- {path} ---\n{text}" if len(paths) > 1 else text)

    wants_stdin = "-" in args.question
    has_pipe = sys.stdin is not None and not is_terminal(sys.stdin) and not args.no_stdin
    is_read = "-" not in paths and sys.stdin is not None and (wants_stdin or has_pipe)
    if is_read:
        parts.append(read_stdin(console))

    parts.append(" ".join(words))
    question = "\n\n".join(part.strip("\r\n") for part in parts if part.strip("\r\n"))
    if is_blank(question) and not (args.question or paths):
        if is_read:
            raise UsageError("no question given (stdin was empty)")
        raise UsageError(f"no question given\n{args.usage}")
    if is_blank(question) and wants_stdin:
        raise UsageError("no question given (stdin was empty)")
    return question


def read_question_file(path: str) -> str:
    """The text of a file, "-" for stdin. Raises UsageError."""
    with opened("--file", path, "rb") as file:
        data = file.read()
    is_utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    if path != "-" and b"\0" in data and not is_utf16:
        raise UsageError(f"--file {path}: this is a binary file, not text")
    return decoded(data)


def read_stdin(console: Console) -> str:
    """The text from stdin; after two seconds without its end, tell the user."""
    hint = "waiting for piped input; use --no-stdin (or </dev/null) to skip"
    timer = threading.Timer(2.0, console.say, [hint])
    timer.daemon = True
    timer.start()
    try:
        with opened("stdin", "-", "rb") as file:
            return decoded(file.read())
    finally:
        timer.cancel()


def decoded(data: bytes) -> str:
    """Text from bytes in UTF-8, or in UTF-16 with a byte order mark."""
    is_utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    text = data.decode("utf-16" if is_utf16 else "utf-8-sig", "replace")
    return text.replace("\0", "")


def opened(flag: str, path: str, mode: str) -> IO[bytes]:
    """The file of a flag, "-" for stdin. Raises UsageError."""
    try:
        if path == "-":
            return open(0, mode, closefd=False)
        return open(path, mode)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{flag} {path}: {reason}") from None


def without_fence(text: str) -> str:
    """The text less a Markdown fence around it."""
    lines = text.strip().split("\n")
    if len(lines) > 2 and lines[0].startswith("```") and lines[-1].strip() == "```":
        return "\n".join(lines[1:-1])
    return text


def json_inside(text: str) -> Any:
    """The JSON value of an answer, less a Markdown fence around it. Raises ValueError."""
    value = json.loads(without_fence(text))
    json.dumps(value, allow_nan=False)  # NaN and 1e999 are no JSON
    return value


def is_json(text: str) -> bool:
    """Whether an answer is JSON; for `accept`."""
    try:
        json_inside(text)
    except RecursionError:
        return False
    return True


def report_of(
    result: Union[Answer, FallbackLLMError, ValueError], expects_json: bool, **first: Any
) -> Json:
    """What --json and a batch tell of a question."""
    report: Json = dict(first, answer=None, error=None)
    if isinstance(result, Answer):
        report["answer"] = json_inside(result.text) if expects_json else result.text
    else:
        report["error"] = str(result)
    for name in ("provider", "model", "finish_reason", "usage", "retry_after"):
        report[name] = getattr(result, name, None) or None

    trail = [attempt.to_dict() for attempt in getattr(result, "attempts", ())]
    report["attempts"] = trail
    elapsed = sum(attempt["waited"] + attempt["elapsed"] for attempt in trail)
    report["elapsed_seconds"] = round(elapsed, 3)
    return report


def respond(llm: FallbackLLM, args: argparse.Namespace, console: Console) -> int:
    """Ask one question and print the answer."""
    question = question_of(args, console)
    rows = llm._parts.roster.rows(args.provider)
    for row in rows:
        if llm._parts.roster.key_problem(row):
            logger.debug("⚠️  %s", llm._parts.roster.key_problem(row))
    available = [row.name for row in rows if not llm._parts.roster.key_problem(row)]
    logger.debug("✅ Available providers: %s", ", ".join(available))
    logger.debug("❓ Question: %s", question)
    logger.debug("🤔 Thinking...")

    arguments = dict(common_arguments(args), question=question)
    if args.expect_json:
        arguments["accept"] = is_json
    if args.json:
        return respond_in_json(llm, args, console, arguments)

    printer = AnswerPrinter(console)
    if args.stream:
        answer = printer.print_stream(llm.stream(**arguments))
    else:
        answer = llm.complete(**arguments)
        printer.feed(without_fence(answer.text) if args.expect_json else answer.text)
        printer.end()
    logger.info("\n⏱️  Response time: %.2fs", answer.elapsed)
    return 0


def respond_in_json(
    llm: FallbackLLM, args: argparse.Namespace, console: Console, arguments: Json
) -> int:
    """Ask one question and print a JSON object, whatever comes of it."""
    try:
        answer = llm.complete(**arguments)
    except FallbackLLMError as error:
        console.put_json(report_of(error, args.expect_json))
        raise
    console.put_json(report_of(answer, args.expect_json))
    return 0


class AnswerPrinter:
    """Prints an answer without surrounding blank lines and terminal control characters."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._held = ""  # what may turn out to be a blank line at the beginning or at the end
        self._has_begun = False

    def print_stream(self, pieces: Generator[str, None, Answer]) -> Answer:
        """Print the pieces as they come."""
        try:
            while True:
                self.feed(next(pieces))
        except StopIteration as end:
            return cast(Answer, end.value)
        finally:
            self.end()

    def feed(self, text: str) -> None:
        """Print a piece, but for newlines that may turn out to be the last ones."""
        self._held += text.translate(CONTROLS)
        if not self._has_begun:
            if not self._held.strip():
                return
            self._has_begun = True
            self._held = re.sub(r"\A\s*\n", "", self._held)
            logger.info("\n💡 Response:")
        shown = self._held.rstrip("\n")
        self._held = self._held[len(shown) :]
        self._console.put(shown)

    def end(self) -> None:
        """End the line of the answer."""
        if self._has_begun:
            self._console.end_line()


def check(llm: FallbackLLM, args: argparse.Namespace, console: Console) -> int:
    """Print which keys and models work; 0 if a provider can answer."""
    reports = [check_provider(llm, row) for row in llm._parts.roster.rows(args.provider)]
    if args.json:
        console.put_json(reports)
    else:
        table = [["PROVIDER", "KEY", "SECONDS", "MODELS"]]
        for report in reports:
            notes = []
            if report["served"]:
                notes.append("served: " + ", ".join(report["served"]))
            if report["not_served"]:
                notes.append("not served: " + ", ".join(report["not_served"]))
            if report["reason"]:
                notes.append(report["reason"])
            seconds = f"{report['seconds']:.2f}"
            table.append([report["provider"], report["key"], seconds, "; ".join(notes)])
        for line in columns(table):
            console.put(line.translate(CONTROLS) + "\n")
    if any(report["served"] for report in reports):
        return 0
    return 1


def check_provider(llm: FallbackLLM, row: Provider) -> Json:
    """Whether the key of a provider is accepted, and which of its listed models are served."""
    started = time.monotonic()
    key = llm._parts.roster.key(row)
    report: Json = {"provider": row.name, "key": "accepted", "seconds": 0.0}
    report.update(served=[], not_served=[], reason="")
    problem = llm._parts.roster.key_problem(row)
    if problem:
        return {**report, "key": "missing", "reason": problem}

    try:
        if row.key_path != "/models":
            llm._parts.transport.get(row, row.key_path, key, math.inf)
        listing = llm._parts.transport.get(row, "/models", key, math.inf)
    except Failure as failure:
        is_refused = failure.verdict is Verdict.DENIED
        report["key"] = "refused" if is_refused else "not checked"
        report["reason"] = llm._parts.shown(failure.summary or failure.reason)
    else:
        entries = listing.get("data")
        served = []
        if isinstance(entries, list):
            served = [dig(entry, "id") for entry in entries]
        for model in llm.models[row.name]:
            report["served" if model in served else "not_served"].append(model)
    report["seconds"] = round(time.monotonic() - started, 3)
    return report


def columns(table: Sequence[Sequence[str]]) -> List[str]:
    """The rows as lines with their columns below each other."""
    widths = [max(len(row[number]) for row in table) for number in range(len(table[0]) - 1)]
    lines = []
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return lines


def list_models(llm: FallbackLLM, args: argparse.Namespace, console: Console) -> int:
    """Print the models of each provider: those that are asked, in their order, then the others."""
    found: List[Json] = []
    for row in llm._parts.roster.rows(args.provider):
        served = []
        if not llm._parts.roster.key_problem(row):
            served = llm._parts.served_models(row)
        if not served:
            logger.warning(
                "⚠️  %s: its own list is not available; these are the ones we ask", row.name
            )
        asked = llm.models[row.name]
        models = [model for model in asked if model in served or not served]
        models.extend(model for model in served if model not in asked)
        for model in models:
            found.append({"provider": row.name, "model": model, "asked": model in asked})
    if args.json:
        console.put_json(found)
    else:
        for entry in found:
            line = f"{entry['provider']}\t{entry['model']}"
            console.put(line.translate(CONTROLS) + "\n")
    return 0


def say_statistics(llm: FallbackLLM, console: Console) -> None:
    """Write the five documented lines to stderr."""
    lines = ["\n📊 Usage Statistics:"]
    lines.extend(f"   {name}: {count}" for name, count in llm.get_stats().items())
    console.say("\n".join(lines))


def run_command(args: argparse.Namespace, console: Console) -> int:
    """Do what the options say; the exit code."""
    if sys.stdout is None:
        raise OSError("stdout is closed: there is no place for the answer")
    logger.debug("🚀 Initializing Fallback LLM System...")
    with make_client(args, console) as llm:
        try:
            if args.check:
                code = check(llm, args, console)
            elif args.list_models:
                code = list_models(llm, args, console)
            elif args.batch is not None:
                code = Batch(llm, args, console).run()
            else:
                code = respond(llm, args, console)
        except FallbackLLMError as error:
            console.say(f"❌ {error}")
            code = 1
        if args.stats:
            say_statistics(llm, console)
    return code


def with_flags(message: str) -> str:
    """A message about parameters, as one about flags."""
    pattern = r"^(provider|model|timeout)\b|\b(max|base)_delay\b|\b(max_tokens|idle_timeout)\b"
    return re.sub(pattern, lambda match: "--" + match.group().replace("_", "-"), message)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the program. Returns the exit code; Ctrl-C ends the process by its signal."""
    console = Console()
    handler: Optional[logging.Handler] = None
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        handler = ConsoleHandler(console, args)
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        return run_command(args, console)
    except ValueError as error:
        console.say(f"error: {with_flags(str(error))}")
        return 2
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C kills at once
        console.say("\nInterrupted.")
        os.kill(os.getpid(), signal.SIGINT)  # an exit code would not stop a shell's loop
        return 130
    except ImportError as error:
        console.say(f"missing package: {error.name} - run: pip install requests python-dotenv")
        return 1
    except OSError as error:
        discard_stdout()
        if isinstance(error, BrokenPipeError):
            return 141
        console.say(f"error: {error.strerror or error}")
        return 1
    finally:
        if handler is not None:
            logger.removeHandler(handler)


def discard_stdout() -> None:
    """Throw away what stdout still holds, or Python would complain at its exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --- 10. Batch: many questions from a file to a file --------------------------------------------

BATCH_AHEAD = 100  # questions that each worker may be ahead of a slow one
PROGRESS_PAUSE = 10.0  # seconds between two lines of progress outside a terminal
REDRAW_PAUSE = 0.5  # seconds between two of a terminal
COMMON_REASONS = 3  # reasons of failed questions that are told at the end


class Line(NamedTuple):
    """A question of a batch."""

    number: int  # of the line in the file
    id: Union[str, int]
    fields: Json  # what the line itself says, without the id
    digest: str  # identifies all of that


class Batch:
    """Asks the questions of a file that have no answer yet, and writes each answer as it comes.

    A finished output has one line of JSON for each id. A resumed one is first rewritten without
    its failed and torn lines.
    """

    def __init__(self, llm: FallbackLLM, args: argparse.Namespace, console: Console) -> None:
        self._llm = llm
        self._args = args
        self._console = console
        self._common = common_arguments(args)
        if args.expect_json:
            self._common["accept"] = is_json
        self._flags = digest_of(dict(common_arguments(args), expect_json=args.expect_json))
        self._output: Optional[IO[bytes]] = None
        self._answered: Dict[Union[str, int], Json] = {}  # by an earlier run, without the texts
        self._lock = threading.Lock()  # of all that follows
        self._counts: Dict[str, int] = collections.Counter()  # answers by provider
        self._reasons: Dict[str, int] = collections.Counter()  # of failed questions
        self._total = 0
        self._started = time.monotonic()
        self._told_at = self._started
        self._cancelled = threading.Event()

    def run(self) -> int:
        """Ask them all; 0 if now all have an answer."""
        path = self._args.batch
        with contextlib.ExitStack() as stack:
            source = stack.enter_context(opened("--batch", path, "rb"))
            if not source.seekable() or path == "-":
                # A shell may have read the first lines of stdin: it cannot be rewound.
                spool = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(source, spool)
                source = spool
            if self._args.output is not None:
                self._output = stack.enter_context(self._opened_output())
            self._total = sum(1 for _ in self._open_questions(source))
            if self._total == 0 and not self._answered and not self._args.quiet:
                self._console.say(f"⚠️  {path} holds no question")

            stack.callback(self._cancelled.set)  # whatever ends the batch ends its questions
            questions = self._open_questions(source)
            workers = self._args.workers or 8
            try:
                for _ in work_through(self._ask, questions, workers, BATCH_AHEAD):
                    pass
            except KeyboardInterrupt:
                self._tell_interruption()
                raise
        return self._tell_end()

    def _open_questions(self, source: IO[bytes]) -> Iterator[Line]:
        """The questions without an answer, each checked. Raises UsageError."""
        source.seek(0)
        seen: Set[Union[str, int]] = set()
        for number, data in enumerate(source, 1):
            if not data.strip():
                continue
            try:
                line = read_line(number, data)
                if line.id in seen:
                    raise ValueError(f"duplicate id {line.id!r}")
                seen.add(line.id)
                self._refuse_other_question(line)
                self._llm._question_from({**self._common, **line.fields})
            except (ValueError, TypeError, RecursionError) as error:
                raise UsageError(f"--batch {self._args.batch}: line {number}: {error}") from None
            if line.id not in self._answered:
                yield line

    def _refuse_other_question(self, line: Line) -> None:
        """Raise ValueError if the id was answered for another question."""
        before = self._answered.get(line.id)
        if before is None:
            return
        is_same = before["line_digest"] == line.digest
        if before["line_digest"] is None:  # the output of an older version
            texts = {name: line.fields.get(name) for name in ("question", "messages")}
            is_same = before["texts_digest"] == digest_of(texts)
        if not is_same:
            raise ValueError(
                f"it differs from the question answered as id {line.id} in {self._args.output}; "
                "use another -o, or give ids"
            )

    def _opened_output(self) -> IO[bytes]:
        """The output, with the answers of an earlier run, for more to be added."""
        flag = f"--output {self._args.output}"
        path = os.path.realpath(self._args.output)
        if self._args.output.endswith(("/", os.sep)):
            raise UsageError(f"{flag}: a folder, not a file")
        if os.path.exists(self._args.batch) and os.path.realpath(self._args.batch) == path:
            raise UsageError(f"{flag}: these are the questions")
        if os.path.exists(self._args.output) and not os.path.isfile(self._args.output):
            raise UsageError(f"{flag}: not a regular file; leave -o out to write to stdout")

        old = opened("--output", path, "ab+")
        try:
            lock_file(old, flag)
            if not os.path.samestat(os.fstat(old.fileno()), os.stat(path)):
                raise UsageError(f"{flag}: another run is writing to it")
            old.seek(0)
            if not all(line.startswith(b'{"id": ') or b'{"id": '.startswith(line) for line in old):
                raise UsageError(f"{flag}: not a file of answers, left as it is")
            return self._rewritten(old, path)
        finally:
            old.close()

    def _rewritten(self, old: IO[bytes], path: str) -> IO[bytes]:
        """A new file in place of the old one, with the answers of the old one."""
        other_flags = 0
        descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".answers-")
        file = os.fdopen(descriptor, "wb")
        try:
            lock_file(file, f"--output {self._args.output}")
            old.seek(0)
            for data in old:
                record = parsed(data)  # what was torn is no JSON
                answered_id = dig(record, "id")
                is_answer = isinstance(record, dict) and record.get("error") is None
                if (
                    not is_answer
                    or "answer" not in record
                    or not is_id(answered_id)
                    or answered_id in self._answered
                ):
                    continue
                texts = {name: record.get(name) for name in ("question", "messages")}
                self._answered[answered_id] = {
                    "line_digest": record.get("line_digest"),
                    "texts_digest": digest_of(texts),
                }
                if record.get("flags_digest") not in (None, self._flags):
                    other_flags += 1
                file.write(data if data.endswith(b"\n") else data + b"\n")
            file.flush()
            os.chmod(temporary, os.stat(path).st_mode & 0o777)
            os.replace(temporary, path)
        except BaseException:
            file.close()
            os.unlink(temporary)
            raise
        if other_flags and not self._args.quiet:
            self._console.say(
                f"⚠️  {other_flags} answers in {self._args.output} were given with other flags "
                "(such as -m or -s) and are kept; use another -o to ask again"
            )
        return file

    def _ask(self, line: Line) -> None:
        """Ask a question and write its line. Runs in many threads."""
        if self._cancelled.is_set():
            return
        result = self._llm._result({**self._common, **line.fields}, self._cancelled)
        texts = {
            name: line.fields[name] for name in ("question", "messages") if name in line.fields
        }
        digests = {"line_digest": line.digest, "flags_digest": self._flags}
        record = report_of(result, self._args.expect_json, id=line.id, **texts, **digests)

        with self._lock:
            if self._cancelled.is_set():
                return
            try:
                self._write(record)
            except BaseException:
                self._cancelled.set()  # do not pay for answers that cannot be saved
                raise
            if isinstance(result, Answer):
                self._counts[result.provider] += 1
            else:
                self._reasons[short_reason(result)] += 1
            self._tell_progress()

    def _write(self, record: Json) -> None:
        """Write a record to the output, or to stdout."""
        if self._output is None:
            self._console.put_json(record)
        else:
            try:
                self._output.write(json_line(record).encode())
                self._output.flush()
            except OSError as error:
                reason = f"{self._args.output}: {error.strerror}"
                raise OSError(error.errno, reason) from None

    def _tell_progress(self) -> None:
        """Done, failed, speed, time left, who answers, who is rate-limited."""
        now = time.monotonic()
        pause = PROGRESS_PAUSE
        if self._console.has_terminal:
            pause = REDRAW_PAUSE
        if self._args.quiet or now - self._told_at < pause:
            return
        self._told_at = now

        passed = now - self._started
        failed = sum(self._reasons.values())
        done = failed + sum(self._counts.values())
        left = (self._total - done) / done * passed
        parts = [f"{done}/{self._total} done, {failed} failed, {done / passed:.1f}/s"]
        parts[0] += f", {duration_words(left)} left"
        parts.append(", ".join(f"{name} {count}" for name, count in sorted(self._counts.items())))
        for name, health in self._llm.provider_health.items():
            if health.status is ProviderStatus.RATE_LIMITED:
                seconds = max(0.0, health.rate_limit_reset_time - time.time())
                parts.append(f"{name} rate-limited for {duration_words(seconds)}")
        text = "; ".join(part for part in parts if part)
        if self._console.has_terminal:
            self._console.redraw(text)
        else:
            self._console.say(text)

    def _tell_end(self) -> int:
        """The sum; the exit code."""
        failed = sum(self._reasons.values())
        answered = sum(self._counts.values())
        if failed or not self._args.quiet:
            before = ""
            if self._answered:
                before = f", {len(self._answered)} answered before"
            if self._console.has_terminal:
                self._console.redraw("")
            self._console.say(f"{answered} answered, {failed} failed{before}")
        reasons = sorted(self._reasons.items(), key=lambda pair: -pair[1])
        for reason, count in reasons[:COMMON_REASONS]:
            self._console.say(f"   {count} x {reason}")
        if failed and self._args.output is not None:
            self._console.say("   Run the same command again to ask the failed ones again.")
        if failed:
            return 1
        return 0

    def _tell_interruption(self) -> None:
        """Say how many answers are saved, and how to resume."""
        saved = sum(self._counts.values()) + len(self._answered)
        if self._args.output is not None:
            self._console.say(
                f"\n{saved} answers are saved in {self._args.output}; "
                "run the same command again to resume."
            )


def read_line(number: int, data: bytes) -> Line:
    """A line of a batch: a text, or a JSON object. Raises ValueError."""
    if b"\0" in data:
        raise ValueError("save the file as UTF-8")
    text = data.decode("utf-8-sig", "replace").strip()
    fields: Json = {"question": text}
    if text.startswith("{"):
        fields = json.loads(text)
    if "accept" in fields:
        raise ValueError("accept is not for a batch; use --expect-json")
    line_id = fields.pop("id", number)
    if not is_id(line_id):
        raise ValueError(f"id must be a text or a whole number, not {line_id!r:.60}")
    if "question" not in fields and "messages" not in fields:
        names = ", ".join(repr(name) for name in fields) or "no other field"
        raise ValueError(f'a "question" or "messages" is missing (there is {names})')
    return Line(number, line_id, fields, digest_of(fields))


def is_id(value: object) -> bool:
    """Whether the value can identify a question."""
    return isinstance(value, (str, int)) and not isinstance(value, bool)


def digest_of(fields: Json) -> str:
    """A short text that differs for different fields."""
    text = json.dumps(fields, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def short_reason(error: Union[FallbackLLMError, ValueError]) -> str:
    """Why a question failed, without what differs from question to question."""
    attempts = getattr(error, "attempts", ())
    if attempts:
        last = attempts[-1]
        return f"{last.provider}: {last.reason[:100]}"
    return str(error).split("\n")[0][:100]


def lock_file(file: IO[bytes], flag: str) -> None:
    """Take the file for this process alone. Raises UsageError if another run has it."""
    try:
        import fcntl
    except ImportError:  # Windows has none
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UsageError(f"{flag}: another run is writing to it") from None


if __name__ == "__main__":
    sys.exit(main())
