#!/usr/bin/env python3
# /// script
# requires-python = ">=3.7"
# dependencies = ["requests", "python-dotenv"]
# ///
"""Ask a language model, and get an answer even when providers fail.

Each question works its way along a queue of candidates, which are models of providers, until one
of them gives a complete, non-empty answer:

    cerebras m1 ─┬─ a whole answer ──────────► done
                 ├─ 429, short wait ─────────► wait, then ask m1 again
                 ├─ 429, long wait ────────┐
                 ├─ 5xx, empty, cut, silent ┴► m1 goes to the end of the line; ask the next one
                 ├─ 400, 402, 404 … ─────────► m1 is out; ask the next one
                 ├─ 401 … ───────────────────► this key of cerebras is out; ask the next one
                 └─ content refused ─────────► stop: no other model is asked
    cerebras m2, groq m1 … openrouter m4       nobody left: the question has failed

The file reads from top to bottom; each section uses only the sections above it:

    1  settings             RetryConfig, Provider, PROVIDERS, where keys and lists come from
    2  results and errors   Answer, Attempt, Verdict, ProviderHealth, the exceptions
    3  judging              RULES: what a reply means, and how long a server asks us to wait
    4  wire format          questions, server-sent events, the answer being put together
    5  Transport            one HTTP exchange within its time limits
    6  Health               what is known of models and accounts across questions; pacing
    7  Roster, Queue        who can be asked, who is next, and how long to wait
    8  FallbackLLM          the public methods, the walk, and what is told of it
    9  Batch                many questions from a file to a file
    10 command line         options, output, one function per command

All times are in seconds.
"""

from __future__ import annotations

import argparse
import codecs
import collections
import contextlib
import contextvars
import dataclasses
import datetime
import enum
import functools
import inspect
import io
import itertools
import json
import logging
import math
import os
import queue
import random
import re
import signal
import socket
import sys
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
    Generic,
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
from urllib.parse import quote, urlsplit

if TYPE_CHECKING:
    import requests  # imported late when the program runs: it takes longer than all the rest

__version__ = "2.1.0"
__all__ = [
    "PROVIDERS",
    "Account",
    "AllProvidersFailed",
    "Answer",
    "AnswerRefused",
    "Attempt",
    "CheckReport",
    "FallbackLLM",
    "FallbackLLMError",
    "ModelList",
    "NoProviderError",
    "Provider",
    "ProviderHealth",
    "ProviderStatus",
    "RetryConfig",
    "Stream",
    "StreamInterrupted",
    "Verdict",
]

Json = Dict[str, Any]
Clock = Callable[[], float]

logger = logging.getLogger("fallback_llm")


def __dir__() -> List[str]:
    """What tab completion shows: the public names."""
    return [*__all__, "__doc__", "__version__", "main"]


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
KEY_PREFIX = re.compile(r"(?i)\b(csk-|gsk_|sk-|xai-|hf_|aiza)[\w-]{8,}")  # of well-known keys


def quoted(value: object, most: int = 20) -> str:
    """The value for a message. What may be a key, such as a long text, is only described."""
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if not isinstance(value, str):
        return f"a value of type {type(value).__name__}"
    if len(value) > most or KEY_PREFIX.search(value):
        return f"a text of {len(value)} characters"
    return repr(value)


def check_number(name: str, value: object) -> float:
    """The value as a number. Raises ValueError, naming the parameter, if it breaks its rule."""
    rule = NUMBER_RULES[name]
    if rule.kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # 100.0, as pandas writes a column with gaps
    is_number = isinstance(value, (int, rule.kind)) and not isinstance(value, bool)

    # NaN is in no range.
    if not is_number or not rule.lowest <= cast(float, value) <= rule.highest:
        raise ValueError(f"{name} must be {rule.allowed}, not {quoted(value)}")
    return cast(float, value)


def nearest(word: str, known: Iterable[str], likeness: float = 0.7) -> str:
    """The known word that a misspelt one is like, "" if none is."""
    import difflib

    near = difflib.get_close_matches(word, list(known), 1, likeness)
    return near[0] if near else ""


def number_of(value: float) -> str:
    """The number as a person would write it: 2 rather than 2.0."""
    return f"{value:.10g}"


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
        self.max_attempts = int(check_number("max_attempts", self.max_attempts))
        self.validate()

    def validate(self) -> None:
        """Raise ValueError for a field that is invalid, also if it was changed since."""
        for name in ("max_attempts", "base_delay", "max_delay", "exponential_base"):
            check_number(name, getattr(self, name))
        for name in ("jitter", "wait_on_rate_limit"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, not {quoted(getattr(self, name))}")
        if self.max_delay < self.base_delay:
            low, high = number_of(self.max_delay), number_of(self.base_delay)
            raise ValueError(f"max_delay ({low}) is below base_delay ({high})")

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
    key_note: str = ""  # why to begin with this provider
    key_path: str = "/models"  # a GET of this path shows whether a key is accepted
    free_only: bool = False  # models found in the provider's list must be free of charge
    defaults: Dict[str, Json] = dataclasses.field(default_factory=dict, hash=False)
    # defaults: parameters for models whose id contains the word

    def __post_init__(self) -> None:
        check_number("idle_timeout", self.idle_timeout)
        if not isinstance(self.name, str) or not re.fullmatch(r"[a-z0-9_.-]+", self.name):
            raise ValueError(f"a provider's name must be in lower case, not {quoted(self.name)}")
        if not isinstance(self.base_url, str):
            raise ValueError(f"base_url of {self.name} must be a text, not {quoted(self.base_url)}")
        is_name = isinstance(self.key_env, str) and re.fullmatch("[A-Z_][A-Z0-9_]*", self.key_env)
        if self.key_env is not None and not is_name:
            # What stands there may be the key itself.
            example = self.variable("API_KEY")
            raise ValueError(
                f"key_env of {self.name} must be the name of an environment variable, "
                f"such as {example}, or None; a key goes into api_keys or into that variable"
            )
        check_models(f"models of {self.name}", self.models)
        is_table = isinstance(self.defaults, dict)
        if not is_table or not all(isinstance(more, dict) for more in self.defaults.values()):
            raise ValueError(f"defaults of {self.name} must be a dict of dicts")
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


def check_models(name: str, models: object) -> None:
    """Raise ValueError unless these are the ids of models, in a list or a tuple."""
    is_list = isinstance(models, (list, tuple))
    if not is_list or not all(isinstance(m, str) and m.strip() for m in cast(List[str], models)):
        raise ValueError(
            f"{name} must be a list of model ids, such as ['m1'], not {quoted(models)}"
        )


# Models that think before they answer can spend a small max_tokens on thinking alone, so they
# are asked to think little or not at all. gpt-oss accepts "low" and rejects "none" (2026-10);
# qwen3.8 accepts "none" on Groq, and OpenRouter switches reasoning off for every model (2026-10).
# Free nemotron otherwise writes its thoughts into the answer (2026-09).
THINK_LITTLE: Json = {"reasoning_effort": "low"}
THINK_NOT: Json = {"reasoning_effort": "none"}
REASONING_OFF: Json = {"reasoning": {"enabled": False}}

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
        key_note="free, no credit card",
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
        defaults={"qwen3.8": REASONING_OFF, "nemotron": REASONING_OFF},
    ),
)

MAX_ENV_FILE = 65536  # bytes; python-dotenv needs minutes for a larger file of blanks


def stripped(value: Optional[str]) -> str:
    """The value without any whitespace or quotation marks pasted around it."""
    return (value or "").strip(" \t\r\n\"'")


def only_placeholders(value: str) -> bool:
    """Whether none of these keys, which may be several as "a,b", is a real one."""
    return all(is_placeholder(stripped(part)) for part in value.split(","))


def is_placeholder(value: str) -> bool:
    """Whether this is placeholder text rather than a key, such as your_api_key_here."""
    text = value.lower()
    if text in ("todo", "none", "null"):
        return True
    if re.match(r"your[_ -]|<.*>$|(change|replace).?me$", text):
        return True
    if re.search(r"[_ -]here$|\.\.\.$", text):
        return True

    # gsk_xxxxxxxx: nothing but x after the prefix
    last_part = re.split(r"[-_]", text)[-1]
    return len(last_part) >= 3 and not last_part.strip("x")


@functools.lru_cache(maxsize=256)
def flaw_of(key: str) -> str:
    """What is wrong with a key, "" if it can be sent."""
    if not key:
        return "is not set"
    if is_placeholder(key):
        return "holds a placeholder"
    if "$" in key:
        return "contains a reference (${...} or $), which is not expanded: write the key itself"
    if "#" in key:
        return "contains a #: put a comment on a line of its own"
    if not re.fullmatch("[!-~]+", key):
        return "contains a character that cannot be in a key"
    return ""


def decoded(data: bytes) -> str:
    """The text in these bytes: UTF-8, or UTF-16 or UTF-32 with a mark or with every other byte 0.

    Other bytes are taken for Windows-1252, which they probably are. Raises ValueError for binary
    data.
    """
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return data.decode("utf-32")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")

    start = data[:1000]
    zeros_even, zeros_odd = start[0::2].count(0), start[1::2].count(0)
    half = len(start) // 2
    if len(data) % 2 == 0 and half >= 1 and max(zeros_even, zeros_odd) > 0.7 * half:
        return data.decode("utf-16-be" if zeros_even > zeros_odd else "utf-16-le")
    if 0 in data:
        raise ValueError("this is a binary file, not text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


class Settings:
    """The keys and model lists that the environment and the .env files hold.

    A name is looked up in the environment, then in .env in the current folder, then in .env beside
    this file, then in fallback_llm/.env in the user's configuration folder. Empty values count as
    unset, and a placeholder is used only if nothing else is found. Nothing else is taken from a
    .env file, and nothing is written to the environment.
    """

    def __init__(self) -> None:
        self.problems: List[str] = []  # .env files that could not be used, and why
        self._sources: Dict[str, Mapping[str, Optional[str]]] = {"the environment": os.environ}
        for path in env_files():
            if os.path.isfile(path):
                self._sources[path] = self._read(path)

    def find(self, name: str) -> Tuple[str, str]:
        """The value of the first source that has one, and the source; "" if none has."""
        placeholder = ("", "")
        for source, values in self._sources.items():
            value = stripped(values.get(name))
            if value and not only_placeholders(value):
                return value, source
            if value and not placeholder[0]:
                placeholder = (value, source)
        return placeholder

    def models(self, row: Provider) -> List[str]:
        """The models of a provider: those of its variable, or else of its row."""
        listed, _ = self.find(row.variable("MODELS"))
        return split_list(listed) or list(row.models)

    def _read(self, path: str) -> Dict[str, Optional[str]]:
        """The names and values of a .env file, {} if it cannot be read."""
        try:
            from dotenv import dotenv_values
        except ImportError:
            self._complain(f"{path} is not read: pip install python-dotenv")
            return {}

        try:
            with open(path, "rb") as file:
                data = file.read(MAX_ENV_FILE + 1)
            if len(data) > MAX_ENV_FILE:
                self._complain(f"{path} is not read: it is larger than {MAX_ENV_FILE} bytes")
                return {}
            # python-dotenv has trouble with long runs of blanks: they take it a second or more.
            text = re.sub(r"[ \t]{100,}", " ", data.decode("utf-8-sig"))
            text = re.sub(r"\n{100,}", "\n", text)
            if "\0" in text:
                raise ValueError("a NUL character")
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
        """Tell of names that look like ours but have no effect in a .env file."""
        prefixes = tuple(row.variable("") for row in PROVIDERS)
        for name in names:
            level = logging.NOTSET
            if name.endswith("_BASE_URL") or name == ORDER_VARIABLE:
                level = logging.WARNING  # questions would not go where the user wants
            elif name.startswith(prefixes) and not name.endswith(("_API_KEY", "_MODELS")):
                level = logging.DEBUG
            if level:
                line = "⚠️  %s: %s has no effect in a .env file; set it in the environment"
                logger.log(level, line, path, name)


ORDER_VARIABLE = "FALLBACK_LLM_PROVIDERS"  # the order of the providers where none is given


def split_list(text: str) -> List[str]:
    """The words of a list such as "a, b"."""
    return [word for word in re.split(r"[\s,\"']+", text) if word]


def env_files() -> List[str]:
    """The paths of the .env files to read, in order of precedence."""
    this_file = globals().get("__file__", "fallback_llm.py")
    folders = []
    with contextlib.suppress(OSError):  # the current folder may have been deleted
        folders.append(os.getcwd())
    with contextlib.suppress(OSError):
        folders.append(os.path.dirname(os.path.abspath(this_file)))
    home = os.path.expanduser("~")
    configuration = os.environ.get("XDG_CONFIG_HOME") or os.path.join(home, ".config")
    folders.append(os.path.join(configuration, "fallback_llm"))
    return list(dict.fromkeys(os.path.join(folder, ".env") for folder in folders))


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


def address_of(row: Provider) -> str:
    """The address of a provider: from the environment (GROQ_BASE_URL), or else from its row.

    An address without a path gets the path of the row. Raises ValueError if the address is invalid
    or if a key would be sent to it in clear text.
    """
    name = row.variable("BASE_URL")
    url = (stripped(os.environ.get(name)) or row.base_url).rstrip("/")
    address = re.fullmatch(r"(https?)://([\w.-]+|\[[0-9a-fA-F:]+\])(:\d{1,5})?(/[^\s?#@]*)?", url)
    if address is None or (is_clear_text(url) and row.key_env is not None):
        # A password or a key may be part of the address.
        shown = KEY_PREFIX.sub("...", re.sub(r"//.*@|[?#].*", "//...", url))
        shown = quoted(shown, 200 if "://" in shown else 20)
        allowed = "https://..., or http:// to this machine or for a provider without a key"
        raise ValueError(f"{name} must be {allowed}, not {shown}")

    if address.group(4) is None:
        url += urlsplit(row.base_url).path.rstrip("/")
    return url


def rows_from_environment(settings: Settings) -> List[Provider]:
    """The rows that NAME_BASE_URL and NAME_MODELS make, with NAME_API_KEY if there is one.

    An address is never taken from a .env file: a folder must not redirect questions.
    """
    names_of_rows = [row.name for row in PROVIDERS]
    rows = []
    for variable in sorted(os.environ):
        named = re.fullmatch("([A-Z][A-Z0-9_]*)_BASE_URL", variable)
        url = stripped(os.environ[variable])
        if named is None or not url or named.group(1).lower() in names_of_rows:
            continue
        prefix = named.group(1)
        models = split_list(settings.find(prefix + "_MODELS")[0])
        has_key = bool(settings.find(prefix + "_API_KEY")[0])
        key_env = prefix + "_API_KEY" if has_key else None
        if models:
            rows.append(Provider(prefix.lower(), url, key_env, tuple(models)))
    return rows


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
    key: int = 1  # which of the provider's keys was used, counted from 1
    request_id: str = ""  # as the provider calls it

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
    usage: Json = dataclasses.field(default_factory=dict, hash=False)
    attempts: Tuple[Attempt, ...] = ()  # the trail; the answer's own attempt is the last
    elapsed: float = 0.0  # seconds of the whole question

    def __str__(self) -> str:
        return self.text

    def __format__(self, spec: str) -> str:
        return format(self.text, spec)

    def _repr_markdown_(self) -> str:
        """How a notebook shows it."""
        return self.text

    def to_dict(self) -> Json:
        """The answer as plain JSON, with the trail."""
        fields = dict(vars(self))
        fields["attempts"] = [attempt.to_dict() for attempt in self.attempts]
        fields["elapsed"] = round(self.elapsed, 3)
        return fields


@dataclasses.dataclass(frozen=True)
class Account:
    """One key of a provider, which is never shown; a provider without a key has one, too."""

    provider: str
    number: int  # among the keys of the provider, from 1
    label: str  # "groq", or "groq (key 2)" if there are several keys
    problem: str  # why it cannot be asked, "" if it can
    source: str  # where the key comes from: "the environment", "api_keys" or a .env file


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """What a check of one account has found."""

    label: str  # of the account
    key: str = "accepted"  # or "refused", "missing", "not checked"
    seconds: float = 0.0
    served: List[str] = dataclasses.field(default_factory=list)  # of the models that are asked
    not_served: List[str] = dataclasses.field(default_factory=list)
    reason: str = ""  # why the key is not accepted, or was not checked

    def to_dict(self) -> Json:
        """The report as plain JSON."""
        fields = dict(vars(self))
        return {"provider": fields.pop("label"), **fields}


@dataclasses.dataclass(frozen=True)
class ModelList:
    """The models of a provider."""

    provider: str
    models: List[str]  # those that are asked come first
    asked: List[str]  # in their order
    problem: str  # why these are only the ones that we ask, "" if the provider's own list is there


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
    counts: bool  # against the model, in later questions
    asked_last_for: float  # seconds for which later questions ask it last; 0: the backoff
    advice: str
    holds_for_all_keys: bool = False  # with another key the model would say the same


VERDICT_RULES = {
    Verdict.RATE_LIMITED: VerdictRule(True, True, 0.0, "wait for the limit to end, or add a key"),
    Verdict.FAULT: VerdictRule(True, True, 0.0, "try again later"),
    Verdict.UNSUITABLE: VerdictRule(
        False, False, 0.0, "change the question, max_tokens or model=", True
    ),
    Verdict.GONE: VerdictRule(
        False, True, 600.0, "choose another one with model= (see list_models), or set {models}"
    ),
    Verdict.DENIED: VerdictRule(False, True, 600.0, "check {key} and the account: {url}"),
    Verdict.REFUSED: VerdictRule(False, False, 0.0, "change the question"),
    Verdict.REJECTED: VerdictRule(
        False, False, 0.0, "ask for the expected form in the question", True
    ),
}


class Reach(enum.Enum):
    """Whom a failure concerns."""

    MODEL = "model"
    ACCOUNT = "account"  # all models that are asked with this key
    PROVIDER = "provider"  # its host, with all keys


class Cause(enum.Enum):
    """How an exchange ended without an answer."""

    REPLY = "reply"  # by what the server said
    SILENCE = "silence"  # the provider's other models are asked after the other providers
    TIME_LIMIT = "time limit"  # the caller's: it says nothing of the provider
    TIME_SHARE = "time share"  # the caller's, of which others were to have a part
    UNREACHABLE = "unreachable"  # no connection was made
    STALE = "stale"  # the server had closed a connection that was kept alive
    OPTIONS = "options"  # the server refuses stream_options: it is asked without them


@dataclasses.dataclass(eq=False, repr=False)
class Failure(Exception):
    """Why an attempt gave no answer. It is raised and caught inside this file."""

    verdict: Verdict
    reason: str
    reach: Reach = Reach.MODEL
    cause: Cause = Cause.REPLY
    hint: Optional[float] = None  # seconds after which the server wants to be asked again
    advice: str = ""  # what to do, where the verdict's own advice does not fit
    summary: str = ""  # the reason in a few words, for the end of a question that failed
    is_free: bool = False  # it costs no attempt: the quota of a crowd answers others

    @property
    def rule(self) -> VerdictRule:
        """What follows from the verdict."""
        return VERDICT_RULES[self.verdict]


class Ruling(NamedTuple):
    """What an error means, whom it concerns, and what to do where the verdict does not say it."""

    verdict: Verdict
    reach: Reach = Reach.MODEL
    advice: str = ""


LIMITED = Ruling(Verdict.RATE_LIMITED)
ACCOUNT_LIMITED = Ruling(Verdict.RATE_LIMITED, Reach.ACCOUNT)
FAULT = Ruling(Verdict.FAULT)
DOWN = Ruling(Verdict.FAULT, Reach.PROVIDER)
UNSUITABLE = Ruling(Verdict.UNSUITABLE)
GONE = Ruling(Verdict.GONE)
DENIED = Ruling(Verdict.DENIED, Reach.ACCOUNT)
UNPAID = Ruling(Verdict.DENIED)
UNPAID_TOKENS = Ruling(Verdict.DENIED, advice="lower max_tokens, shorten the question, or pay")
REFUSED = Ruling(Verdict.REFUSED)
REDIRECTED = Ruling(
    Verdict.FAULT, Reach.PROVIDER, "check {base_url}: the server redirects to {location}"
)
WEB_PAGE = Ruling(Verdict.UNSUITABLE, advice="check {base_url}: a web page answered, not an API")
NO_API = Ruling(Verdict.UNSUITABLE, advice="check {base_url}: no API answered")
GONE_OR_WRONG_URL = Ruling(Verdict.GONE, advice="choose another model=, or check {base_url}")
WRONG_URL = Ruling(
    Verdict.UNSUITABLE, Reach.PROVIDER, "check {base_url}: the server does not know this path"
)
PROXY_LOGIN = Ruling(
    Verdict.UNSUITABLE, Reach.PROVIDER, "check the user and password in HTTPS_PROXY"
)


# An error is judged as a small text, of which each line says one thing:
#
#     status 404 json            the HTTP status, or that of an error inside a 200 (0: none is said)
#     relayed                    a router reports an error of its supplier
#     wait                       the server says when to come back
#     code model_not_found       one line for each code or type, in lower case
#     says the model ...         the message, in lower case
#
# The functions below make patterns for such texts.


def of_status(codes: str) -> str:
    """A pattern for one of these statuses, such as "408 5..", of any body."""
    return rf"^status (?:{'|'.join(codes.split())}) "


def has_code(names: str) -> str:
    """A pattern for one of these codes; * stands for anything."""
    alternatives = "|".join(re.escape(name).replace(r"\*", r"\S*") for name in names.split())
    return rf"^code (?:{alternatives})$"


def says(words: str) -> str:
    """A pattern for words of the message."""
    return rf"^says .*?(?:{words})"


def close_to(some: str, others: str) -> str:
    """A pattern for one of each, with a short gap between them, in either order."""
    return rf"\b(?:(?:{some}).{{0,80}}?(?:{others})|(?:{others}).{{0,80}}?\b(?:{some}))"


def every(*patterns: str) -> str:
    """A pattern for a text in which each of these is found."""
    return r"\A" + "".join(rf"(?=[\s\S]*?(?:{pattern}))" for pattern in patterns)


GAP = ".{0,120}?"
QUOTA = (
    r"insufficient (?:quota|credit|balance|fund)|exceeded your current quota|overdue|"
    r"key limit exceeded|credit balance is too low|blocked api access"
)
DENIED_CODES = has_code(
    "invalid_api_key wrong_api_key authentication* insufficient_quota organization_* account_* "
    "spend_limit_reached blocked_api_access openrouter_credits openrouter_key_limit "
    "payment_required* region_restricted unsupported_country*"
)
ACCOUNT = says(
    close_to(
        "account|organi[sz]ation|api key|key |payment|card |ip |ip, |address|token |workspace",
        "restricted|suspended|flagged|deactivated|banned|disabled|blocked|terminated|violat",
    )
)
MODEL_ENDED = (
    r"\bmodels? .{0,80}?(?:does not exist|not found|not be found|no longer|retired|archived|"
    r"decommissioned|deprecated|discontinued|unavailable for free)"
)
# A refusal is about what was asked: the input was flagged, or a policy is named with what was done.
INPUT_FLAGGED = (
    r"\b(?:input|prompt|content|message|text|question|query) .{0,80}?"
    r"(?:flagged|blocked by|violates our|violates the content|not allowed by our)"
)
POLICY = (
    r"content (?:usage |management |safety )?polic|moderation|safety (?:polic|system|filter)|"
    r"content filter|request blocked: "
)
REFUSING = (
    "violat|against|block|flagged|stopped|trigger|refus|reject|not allowed|filtered|due to|prohibit"
)
OUR_NETWORK = "check your network settings"
OUR_KEY = r"\b(?:api.?keys?|keys?|credits?|billing|payments?|balance|credentials?)\b"
OUR_ACCOUNT = r"\b(?:accounts?|organi[sz]ations?|subscription|authenticat\w{0,6})\b"
BROKEN_RULES = r"\bviolat|terms of service|usage polic|prohibited"
NO_SUCH_PATH = (
    r"unknown (?:request )?(?:url|path|endpoint)|invalid url|check the url|"
    r"route not found|no route|cannot post"
)
SOMETHING_ELSE = r"data[ -]policy|guardrail|parameter|allowed providers|privacy"

# What an error means: the first pattern that is found decides. The codes rate_limit_exceeded,
# invalid_request_error, tokens and requests are in no pattern: the providers put them on both
# temporary and permanent failures.
RULES: Sequence[Tuple[Ruling, str]] = (
    # Codes and words that say one thing only, whatever the status.
    (REFUSED, has_code("content_policy_violation content_filter refusal *moderation*")),
    (UNSUITABLE, has_code("context_length_exceeded max_tokens_exceeded token_limit_exceeded")),
    (UNSUITABLE, has_code("*_too_long *_too_large privacy_restricted constraint_filtered")),
    (UNSUITABLE, has_code("unprocessable invalid_request invalid_prompt account_*limit*")),
    (GONE, has_code("model_archived_error")),
    (FAULT, has_code("model_*overloaded model_*timeout model_*error")),
    (GONE, has_code("model_* no_endpoints free_variant_ended")),
    (UNSUITABLE, says("request too large|reduce the length of|input is too long")),
    (UNSUITABLE, says(f"maximum{GAP}context|exceed{GAP}context|context length{GAP}exceed")),
    (UNSUITABLE, says(f"context window{GAP}exceed|data[ -]policy|guardrail restriction")),
    (UNSUITABLE, says("no endpoints (?:found|available) that (?:support|can)")),
    (UNSUITABLE, rf"^step .*?(?:{SOMETHING_ELSE})"),
    (FAULT, every(of_status("404"), says("no endpoints available"))),
    (GONE, says("is not a valid model id|no endpoints found for")),
    # A supplier's trouble with its own key, account or network is not ours.
    (LIMITED, every("^relayed$", of_status("429"))),
    (FAULT, every("^relayed$", of_status("0 401 402 404 408 5.."))),
    (FAULT, every("^relayed$", f"{DENIED_CODES}|{says(QUOTA)}|{ACCOUNT}|{says(OUR_NETWORK)}")),
    (FAULT, every("^relayed$", of_status("403"), f"{OUR_KEY}|{OUR_ACCOUNT}")),
    # Quotas: a wait that the server asks for outranks words about a quota.
    (ACCOUNT_LIMITED, has_code("*in_flight_budget* openrouter_free_tier*")),
    (ACCOUNT_LIMITED, says("free-models-per-")),
    (
        LIMITED,
        every("^wait$", of_status("0 429"), f"{has_code('insufficient_quota')}|{says(QUOTA)}"),
    ),
    # Free models of the same key may answer (OpenRouter, 2026-10).
    (UNPAID_TOKENS, every(of_status("402"), has_code("openrouter_credits"), says("tokens"))),
    (UNPAID, every(of_status("402"), has_code("openrouter_credits"))),
    (DENIED, DENIED_CODES),
    (UNSUITABLE, has_code("unsupported_* wrong_*")),
    # Congestion rather than our quota: others are asked before it (Cerebras, 2026-10).
    (FAULT, has_code("queue_exceeded")),
    (FAULT, every("^no retry$", of_status("429"), has_code("*_quota_exceeded"))),
    (LIMITED, has_code("token_quota_exceeded request_quota_exceeded capacity_exhausted")),
    (UNPAID_TOKENS, every(of_status("402"), says("tokens"))),
    (UNPAID, of_status("402")),
    (DENIED, says(r"api.?key (?:is )?(?:not valid|invalid)|(?:invalid|incorrect) api.?key")),
    (DOWN, says(OUR_NETWORK)),
    (DENIED, says(QUOTA)),
    # What breaks, and what is limited, is not about the question.
    (GONE, rf"^says (?!.*?(?:parameter|tool|property|field)).*?(?:{MODEL_ENDED})"),
    (FAULT, every("^no retry$", of_status("429"))),
    (LIMITED, of_status("429")),
    (FAULT, of_status("408 409 424 425 498 499 5..")),  # 498: Groq's flex tier is full (2026-08)
    # Words about the account, and about what was asked.
    (DENIED, ACCOUNT),
    (REFUSED, every(of_status("0 400 403 422"), says(INPUT_FLAGGED))),
    (REFUSED, every(of_status("0 400 403 422"), says(POLICY), says(REFUSING))),
    (DENIED, of_status("401")),
    # A JSON 403 means that this model is not for us, unless it names the key, the credit or the
    # account, or says that the request breaks rules.
    (DENIED, "^status 403 (?:text|page)"),
    (DENIED, every(of_status("403"), OUR_KEY)),
    (UNSUITABLE, every(of_status("403"), r"\bmodels?\b", BROKEN_RULES)),
    (GONE, every(of_status("403"), r"\bmodels?\b")),
    (DENIED, every(of_status("403"), OUR_ACCOUNT)),
    (UNSUITABLE, every(of_status("403"), BROKEN_RULES)),
    (GONE, of_status("403")),
    # A JSON 404 means that the model is gone, unless it names something else.
    (WEB_PAGE, "^status (?:400|404|405) page"),
    (WRONG_URL, every(of_status("404"), has_code("unknown_url"))),
    (WRONG_URL, every(of_status("404"), says(NO_SUCH_PATH))),
    (NO_API, "^status 404 text"),
    (NO_API, of_status("405")),
    (GONE_OR_WRONG_URL, every(of_status("404"), "^says not found$")),
    (UNSUITABLE, every(of_status("404"), says(SOMETHING_ELSE))),
    (GONE, of_status("404")),
    # Inside a 200 that carries no status, words can still tell a limit.
    (LIMITED, every(of_status("0"), r"rate.?limit|too.many.requests")),
    # Codes that say only that something broke, such as json_validate_failed for a model's output.
    (UNSUITABLE, of_status("413")),
    (FAULT, has_code("server server_error internal_server_error timeout overloaded *_overloaded")),
    (FAULT, has_code("unavailable *_unavailable *_failed")),
    (PROXY_LOGIN, of_status("407")),
    (REDIRECTED, of_status("3..")),
    # When in doubt, blame only this model: asking the provider's next model costs a moment,
    # whereas leaving the provider costs all of its models.
    (UNSUITABLE, of_status("4..")),
    (FAULT, ""),
)

MAX_MESSAGE = 20000  # characters of a server's message that are kept
MAX_TEXT = 4000  # characters of it that are judged
MAX_PARTS = 100  # objects of an error that are looked at
MAX_HINT = 32 * 86400.0  # a longer "come back in" is junk
RELAYED = "provider returned error"  # what a router says of its supplier's error (OpenRouter)
NESTED_FIELDS = ("error", "errors", "metadata", "availability", "headers", "details", "base_resp")
CODE_FIELDS = ("limit_source", "code", "error_code", "error", "error_type", "type")
MESSAGE_FIELDS = ("message", "error_message", "error_msg", "msg", "status_msg", "error", "detail")


class ErrorReport(NamedTuple):
    """What an error says, wherever it says it."""

    message: str
    codes: List[str]
    fields: Dict[str, List[object]]  # all values by name in lower case, the outermost first


def judge(status: int, headers: Mapping[str, str], body: object, now: float) -> Failure:
    """What a reply that is no answer means.

    status: of HTTP, or 200 for an error inside a reply. headers: with names in lower case.
    body: JSON, or a text. now: seconds since the epoch.
    """
    report = read_error(body)
    inner = status if status >= 300 else inner_status(report)
    server_now = now_of(headers, now)
    wait = next(hints(waits(report, headers), server_now), None)

    ruling = ruling_for(error_text(inner, report, headers, body, wait))
    hint = None
    if VERDICT_RULES[ruling.verdict].asked_again:
        hint = wait
    if hint is None and ruling.verdict is Verdict.RATE_LIMITED:
        hint = max(hints(resets(report, headers), server_now), default=None)
        if hint is None:
            hint = long_period(report.message)
    location = host_of(headers.get("location", "")) or "another address"
    return Failure(
        ruling.verdict,
        reason_for(status, inner, report),
        ruling.reach,
        hint=hint,
        advice=ruling.advice.replace("{location}", location),
    )


def ruling_for(text: str) -> Ruling:
    """The ruling of the first pattern that is found in an error's text."""
    for ruling, pattern in RULES:
        if re.search(pattern, text, re.MULTILINE):
            return ruling
    raise AssertionError("the last pattern is found in every text")


def error_text(
    status: int,
    report: ErrorReport,
    headers: Mapping[str, str],
    body: object,
    wait: Optional[float],
) -> str:
    """The text of an error that the patterns of RULES are made for."""
    kind = "text"
    if isinstance(body, (dict, list)):
        kind = "json"
    elif isinstance(body, str) and body[:MAX_TEXT].lstrip().startswith("<"):
        kind = "page"
    lines = [f"status {status} {kind}"]

    if report.message.lower().startswith(RELAYED):
        lines.append("relayed")
    if wait:
        lines.append("wait")
    if headers.get("x-should-retry") == "false":
        lines.append("no retry")
    lines.extend(f"code {name}" for name in report.codes)
    for step in report.fields.get("failed_routing_step", ()):
        lines.append(f"step {one_line(str(step)[:MAX_TEXT])}".lower())
    lines.append(f"says {report.message[:MAX_TEXT].lower()}")
    return "\n".join(lines)


def read_error(body: object) -> ErrorReport:
    """Gather what an error of any shape says.

    Objects may be nested, and a router quotes its supplier's error as a string of JSON.
    """
    fields = flattened(body)
    codes = []
    for name in CODE_FIELDS:
        for value in reversed(fields.get(name, [])):  # the innermost knows best
            if isinstance(value, str) and len(value) <= 100:
                codes.append(one_line(value.lower()))
    for name in ("reasons", "flagged_input", "patterns"):
        if any(fields.get(name, [])):
            codes.append("moderation")
    return ErrorReport(message_of(fields), codes, fields)


def flattened(body: object) -> Dict[str, List[object]]:
    """All values of an error and of what is nested in it, by name in lower case."""
    fields: Dict[str, List[object]] = {}
    parts = collections.deque([body])
    looked_at = 0
    while parts and looked_at < MAX_PARTS:
        looked_at += 1
        part = parsed(parts.popleft())
        if isinstance(part, list):
            parts.extendleft(reversed(part[:MAX_PARTS]))
        elif isinstance(part, str):
            fields.setdefault("message", []).append(part)
        elif isinstance(part, dict):
            for name, value in part.items():
                is_nested = name in NESTED_FIELDS and isinstance(value, (dict, list))
                if is_nested or (name == "raw" and is_relayed(fields)):
                    parts.append(value)
                else:
                    fields.setdefault(name.lower(), []).append(value)
    return fields


def is_relayed(fields: Mapping[str, List[object]]) -> bool:
    """Whether the outermost message is a router's, about its supplier."""
    messages = fields.get("message", [""])
    return str(messages[0])[:100].lower().startswith(RELAYED)


def message_of(fields: Mapping[str, List[object]]) -> str:
    """The message of an error, in one line, each text once."""
    values: List[object] = []
    for name in MESSAGE_FIELDS:
        values = values or [value for value in fields.get(name, []) if value]
    texts: List[str] = []
    for value in values:
        if isinstance(value, str):
            text = value
        else:
            try:
                text = json.dumps(value, ensure_ascii=False).replace("\\n", " ")
            except (ValueError, RecursionError):
                continue
        text = one_line(page_summary(clipped(text)))
        if text and text not in texts:
            texts.append(text)
    return ": ".join(texts)


INVISIBLE = re.compile(
    r"[\s\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]+"
)


def clipped(text: str) -> str:
    """The beginning of a text that is very long, without half of a word: it may be a key."""
    if len(text) <= MAX_MESSAGE:
        return text
    return re.sub(r"\S{1,1000}\Z", "", text[:MAX_MESSAGE])


def one_line(text: str) -> str:
    """The text in one line, without invisible characters."""
    return INVISIBLE.sub(" ", text).strip()


def page_summary(text: str) -> str:
    """The title, heading or words of an HTML or XML page; any other text as it is."""
    start = text.lstrip("\ufeff \t\r\n")
    if not re.match("<[a-zA-Z!?]", start):
        return text
    for tag in ("title", "h1"):
        heading = re.search(rf"(?is)<{tag}[^<>]{{0,200}}>(.{{1,2000}}?)</{tag}", start)
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
    return one_line(re.sub("<[^<>]{0,200}>", " ", page))


def inner_status(report: ErrorReport) -> int:
    """The status that an error inside a 200 carries, 0 if there is none."""
    for name in ("status_code", "code", "http_status"):
        for value in report.fields.get(name, ()):
            number = to_number(value)
            if 400 <= number <= 599:
                return int(number)
    return 0


def reason_for(status: int, inner: int, report: ErrorReport) -> str:
    """One line: requests' own wording for the status, then what the provider says."""
    said = report.message or " ".join(report.codes)
    if status < 300:
        what = "error inside the reply"
        if inner:
            what = f"error {inner} inside the reply"
    else:
        try:
            phrase = HTTPStatus(status).phrase
        except ValueError:
            phrase = "Unknown"
        kind = {3: "Redirect", 4: "Client"}.get(status // 100, "Server")
        what = f"{status} {kind} Error: {phrase}"
    if said:
        return f"{what}: {said}"
    return what


def host_of(url: str) -> str:
    """The host of a URL, "" if it has none."""
    try:
        return urlsplit(url[:1000]).hostname or ""
    except ValueError:
        return ""


# When to come back. A server says it in headers, in fields of the error or in words; as a number
# of seconds, as a duration ("1m26.4s", "41 minutes and 30 seconds", "480ms") or as an instant.
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
ISO_DATE = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d)(:\d\d)?(\.\d{1,9})?(?:[Zz]|([+-]\d\d):?(\d\d))?"
)
WAIT_WORDS = re.compile(
    r"\b(?:(?:again|retry|resets?|available)[ -](?:in|after|at)|wait(?: for)?|until):? "
    r"(?:about |approximately |approx\. |around |another |at least |~ ?)?",
    re.IGNORECASE,
)
LONG_PERIOD = re.compile(r"\bper[ -](hour|day|week|month)|\b(hourly|daily|monthly)\b")
RESET_HEADER = re.compile(r"(x-)?rate-?limit-(.+-)?reset(-.+)?|.+-ratelimit-(.+-)?reset")
USED_UP = re.compile(r"(?:remaining|\br)=0\b.*?(?:reset|\bt)=(\d+)")  # of the header RateLimit
WAIT_FIELDS = (
    "retry_after_seconds",
    "retry_after",
    "retry-after",
    "retryafter",
    "retrydelay",
    "retry_delay",
)


def hints(values: Iterable[object], now: float) -> Iterator[float]:
    """The seconds of each value that says when to come back."""
    for value in values:
        seconds = seconds_until(value, now)
        if 0 <= seconds <= MAX_HINT:  # NaN is in no range
            yield seconds


def waits(report: ErrorReport, headers: Mapping[str, str]) -> Iterator[object]:
    """What may say how long to wait, from the most exact source to the least."""
    for value in (headers.get("retry-after-ms"), *report.fields.get("retry_after_ms", [])):
        yield to_number(value) / 1000
    yield headers.get("retry-after")
    for name in WAIT_FIELDS:
        yield from reversed(report.fields.get(name, []))
    for words in WAIT_WORDS.finditer(report.message[:MAX_TEXT]):
        rest = report.message[words.end() : words.end() + 100]
        date = ISO_DATE.match(rest)
        if date is None:
            yield leading_duration(re.sub("^an? ", "1 ", rest))[0]
        else:
            yield date.group()


def resets(report: ErrorReport, headers: Mapping[str, str]) -> Sequence[object]:
    """What may say when a rate limit ends: of what is used up, or else of what is not known."""
    said: Dict[str, object] = dict(headers)
    for name, values in report.fields.items():
        said.setdefault(name, values[-1])
    used_up: List[object] = USED_UP.findall(headers.get("ratelimit", ""))
    unknown = []
    for name, value in said.items():
        if RESET_HEADER.fullmatch(name):
            remaining = to_number(said.get(name.replace("reset", "remaining")))
            if name.endswith("-ms"):
                value = to_number(value) / 1000
            if remaining <= 0:
                used_up.append(value)
            elif math.isnan(remaining):
                unknown.append(value)
    return used_up or unknown


def long_period(message: str) -> Optional[float]:
    """An hour, for a limit per hour or longer that came without a hint."""
    words = message[:MAX_TEXT].lower()
    if "per min" in words or "per-min" in words or not LONG_PERIOD.search(words):
        return None
    return 3600.0


def now_of(headers: Mapping[str, str], now: float) -> float:
    """The server's time: instants are compared with it, as our own clock may be wrong."""
    instant = to_epoch(headers.get("date"))
    return now if math.isnan(instant) else instant


def seconds_until(value: object, now: float) -> float:
    """The seconds that a number, a duration or an instant asks for; NaN if it is none of them."""
    if isinstance(value, dict):
        value = value.get("seconds")  # as some write google.rpc.RetryInfo
    if isinstance(value, str):
        value = re.sub("^PT", "", value.strip(" \t\"'")[:100])  # PT30S is a duration of ISO 8601
    number = to_number(value)
    if number > 1e11:
        return number / 1000 - now  # milliseconds of the epoch (OpenRouter, 2026-10)
    if number > 1e9:
        return number - now
    if not math.isnan(number) or not isinstance(value, str):
        return number
    seconds, end = leading_duration(value)
    if value[end : end + 1] in ("", ","):  # a header that was sent twice arrives as "30, 30"
        return seconds
    return to_epoch(value) - now


def leading_duration(text: str) -> Tuple[float, int]:
    """The seconds of a duration at the beginning of a text, NaN if there is none; and its end."""
    total = 0.0
    end = 0
    position = 0
    part = DURATION_PART.match(text)
    if part is None:
        return math.nan, 0
    while part is not None and (part.group(2) or end == 0):  # only the first may lack its unit
        unit = (part.group(2) or "s").lower()
        total += float(part.group(1)) * UNIT_SECONDS[unit]
        end = part.end()
        position = end
        while text.startswith((",", " ", "and "), position):
            position += 4 if text.startswith("and ", position) else 1
        part = DURATION_PART.match(text, position)
    return total, end


def to_number(value: object) -> float:
    """The number that a header or a field holds, NaN if it holds none."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def to_epoch(value: object) -> float:
    """The seconds since the epoch of an HTTP or ISO date, NaN if it is none."""
    if not isinstance(value, str):
        return math.nan
    iso = ISO_DATE.match(value)
    try:
        if iso is not None:
            day, minute, second, fraction, hours, minutes = iso.groups()
            zone = f"{hours or '+00'}:{minutes or '00'}"
            instant = datetime.datetime.fromisoformat(f"{day}T{minute}{second or ':00'}{zone}")
            return instant.timestamp() + float(fraction or 0)
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


# --- 4. Wire format: questions, event streams, the answer being put together. Pure --------------


Names = Union[str, Iterable[str], None]  # of providers: "groq,openrouter", a list, or all
Accept = Callable[[str], object]

# The parameters of the chat completions API that are passed on, as the three providers know them.
API_PARAMETERS = (
    "frequency_penalty logit_bias logprobs max_completion_tokens metadata modalities models "
    "parallel_tool_calls prediction presence_penalty reasoning reasoning_effort response_format "
    "seed service_tier stop store stream_options temperature top_logprobs top_p user verbosity"
)
# Names that belong elsewhere, and where.
ELSEWHERE = {
    "api_key": "FallbackLLM(api_keys={...})",
    "api_keys": "FallbackLLM(api_keys={...})",
    "base_url": "a row: Provider(...), or the variable NAME_BASE_URL",
    "idle_timeout": "FallbackLLM(idle_timeout=...)",
    "retry_config": "FallbackLLM(retry_config)",
    "retries": "RetryConfig(max_attempts=...)",
    "max_retries": "RetryConfig(max_attempts=...)",
    "max_attempts": "RetryConfig(max_attempts=...)",
    "base_delay": "RetryConfig(base_delay=...)",
    "max_delay": "RetryConfig(max_delay=...)",
    "jitter": "RetryConfig(jitter=...)",
    "max_workers": "ask_many(..., max_workers=...)",
    "workers": "ask_many(..., max_workers=...)",
    "prompt": "question",
    "top_k": "extra_body={...}",
    "min_p": "extra_body={...}",
}
UNSUPPORTED = ("tools", "tool_choice", "functions", "function_call", "stream", "n")


@dataclasses.dataclass
class Question:
    """A question with the arguments of `complete`. `validate` checks all that needs no provider."""

    question: Optional[str] = None
    max_tokens: int = 500
    provider: Names = None
    model: Optional[str] = None
    system: Optional[str] = None
    messages: Optional[Sequence[Json]] = None
    timeout: Optional[float] = None  # None: the client's
    accept: Optional[Accept] = None
    extra_body: Optional[Json] = None
    parameters: Json = dataclasses.field(default_factory=dict)

    def updated(self, arguments: Json) -> Question:
        """A question with other arguments of `complete`, checked. Raises ValueError."""
        known: Json = {}
        parameters = dict(self.parameters)
        for name, value in arguments.items():
            if name not in ARGUMENTS:
                parameters[name] = value
            elif value is not None or name != "max_tokens":
                known[name] = value
        question = dataclasses.replace(self, **known, parameters=parameters)
        question.validate()
        return question

    def validate(self) -> None:
        """Raise ValueError for an argument that is wrong or unknown."""
        for name in self.parameters:
            check_parameter_name(name)
        if self.accept is not None:
            check_accept(self.accept)
        self.max_tokens = int(check_number("max_tokens", self.max_tokens))
        for name, value in (
            ("timeout", self.timeout),
            ("temperature", self.parameters.get("temperature")),
        ):
            if value is not None:
                check_number(name, value)
        if isinstance(self.provider, Iterator):
            self.provider = list(self.provider)
        check_extra_body(self.extra_body)
        conversation(self.question, self.system, self.messages)
        if self.parameters or self.messages or self.extra_body:
            self.body("", {})  # ValueError for what JSON cannot carry

    def body(self, model: str, defaults: Json, with_options: bool = True) -> bytes:
        """The body of a request for one model, of which `defaults` are the row's parameters.

        with_options: with `stream_options`, which some servers refuse.
        """
        fields = {"model": model, **defaults}
        for name, value in self.parameters.items():
            if value is not None:
                fields[name] = value
        if "max_completion_tokens" not in fields:
            fields["max_tokens"] = self.max_tokens
        fields["messages"] = conversation(self.question, self.system, self.messages)
        fields["stream"] = True
        # Other servers than the three send the usage of a stream only when they are asked to.
        if with_options and "stream_options" not in self.parameters:
            fields["stream_options"] = {"include_usage": True}
        fields.update(self.extra_body or {})
        try:
            text = json.dumps(fields, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"the question cannot be sent as JSON: {error}") from None
        return whole_characters(text).encode()


ARGUMENTS = [field.name for field in dataclasses.fields(Question) if field.name != "parameters"]
PARAMETERS = [*ARGUMENTS, *API_PARAMETERS.split()]


def check_parameter_name(name: object) -> None:
    """Raise ValueError unless this is a parameter of the API, and say where it belongs."""
    if not isinstance(name, str):
        raise ValueError(f"a parameter's name must be text, not {quoted(name)}")
    if name in PARAMETERS:
        return
    if name in UNSUPPORTED:
        raise ValueError(f"{name} is not supported")
    if name in ELSEWHERE:
        raise ValueError(f"{name} is not a parameter of a question; use {ELSEWHERE[name]}")

    meant = nearest(name, [*PARAMETERS, *ELSEWHERE], 0.75)
    if meant:
        raise ValueError(f"unknown parameter {quoted(name)}: did you mean {meant!r}?")
    raise ValueError(
        f"unknown parameter {quoted(name)}: what a provider has of its own goes into extra_body"
    )


def check_accept(accept: object) -> None:
    """Raise ValueError unless this can be called with the text of an answer."""
    if not callable(accept):
        raise ValueError(f"accept must be a function of the text, not {quoted(accept)}")
    if inspect.iscoroutinefunction(accept):
        raise ValueError("accept must be an ordinary function, not an async one")


def check_extra_body(fields: object) -> None:
    """Raise ValueError unless these can be more fields of a request."""
    if fields is None:
        return
    if not isinstance(fields, dict):
        raise ValueError(f"extra_body must be a dict, not {quoted(fields)}")
    for name in ("stream", "n", "model"):
        if name in fields:
            raise ValueError(f"{name} is not supported in extra_body")


def is_blank(text: str) -> bool:
    """Whether nothing of the text can be seen: white space, controls, zero-width characters."""
    return text == "" or INVISIBLE.fullmatch(text) is not None


def conversation(
    question: Optional[str], system: Optional[str], messages: Optional[Sequence[Json]]
) -> List[Json]:
    """The messages to send. Raises ValueError for empty or malformed input."""
    for name, text in (("question", question), ("system", system)):
        if text is not None and not isinstance(text, str):
            raise ValueError(f"the {name} must be text, not {quoted(text)}")
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
        raise ValueError(f"messages must be a list of dicts with a role, not {quoted(messages)}")


def whole_characters(text: str) -> str:
    """The text with pairs of surrogates joined, and single ones replaced.

    Cerebras refuses single ones (2026-09), and no file can hold them.
    """
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Event(NamedTuple):
    """One server-sent event, or a plain body as a whole."""

    data: str
    kind: str = ""  # what its "event:" line says
    is_plain: bool = False  # the body was no event stream


MAX_EVENT = 4 * 1024 * 1024  # bytes; no model says more


NEWLINE = re.compile(rb"\r\n|\n|\r(?=.)", re.DOTALL)  # after a last \r, \n may come


def lines_in(pieces: Iterable[bytes]) -> Iterator[str]:
    """The lines of a body whose bytes come in pieces. Raises Failure if they are not UTF-8."""
    rest: List[bytes] = []  # of a line that has no end yet
    size = 0
    for piece in pieces:
        rest.append(piece)
        size += len(piece)
        if b"\n" in piece or b"\r" in piece:
            data = b"".join(rest)
            *lines, last = NEWLINE.split(data) if b"\r" in data else data.split(b"\n")
            rest = [last]
            size = len(last)
            for line in lines:
                yield utf8_line(line)
        if size > MAX_EVENT:
            raise Failure(Verdict.FAULT, "the reply is longer than any answer")
    yield utf8_line(b"".join(rest))


def utf8_line(line: bytes) -> str:
    """The text of a line, without a byte order mark. Raises Failure if it is not UTF-8."""
    try:
        text = line.decode()
    except UnicodeDecodeError:
        raise Failure(Verdict.FAULT, "the answer is not UTF-8") from None
    return text.strip("\ufeff\r")


def events_in(lines: Iterable[str]) -> Iterator[Event]:  # noqa: C901 - seen whole, it is simple
    """The events of a body; a body without any is one plain event at its end. Raises Failure."""
    data: List[str] = []  # of the event that is being read
    kind = ""
    plain: Optional[List[str]] = []  # lines that are no fields of an event; None: it is a stream
    size = 0
    for line in itertools.chain(lines, [""]):
        size += len(line)
        if size > MAX_EVENT:
            raise Failure(Verdict.FAULT, "the reply is longer than any answer")
        if line:
            name, _, value = line.partition(":")
            if name == "data":
                data.append(value)
            elif name == "event":
                kind = value.strip()
            elif plain is not None and name not in ("", "id", "retry"):
                plain.append(line)
            continue

        text = "\n".join(data).strip()
        if text or kind == "error":
            yield Event(text, kind)
            plain = None
            size = 0
        data.clear()
        kind = ""
    if plain is not None:
        yield Event("\n".join(plain).strip(), is_plain=True)


class ThinkingFilter:
    """Removes <think>…</think> from the start of an answer, however the text is cut.

    It also holds back everything before the first visible character, so that a live stream
    shows nothing if the answer turns out to be empty.
    """

    def __init__(self) -> None:
        self.has_thought = False
        self._is_thinking = False
        self._is_through = False  # the answer has begun
        self._blanks: List[str] = []
        self._held = ""

    def feed(self, text: str) -> str:
        """What can be shown now of the text."""
        if self._is_through or not text:
            return text
        if self._is_thinking:
            return self._feed_thought(text)
        if not self._held and is_blank(text):
            self._blanks.append(text)
            return ""

        self._held += text
        blanks = INVISIBLE.match(self._held)
        start = self._held[blanks.end() :] if blanks else self._held
        if start.startswith("<think>"):
            self._held = ""
            self._blanks.clear()
            self._is_thinking = True
            self.has_thought = True
            return self._feed_thought(start[len("<think>") :])
        if "<think>".startswith(start):
            return ""
        return self._begin_answer()

    def end(self) -> str:
        """What is still held back when the answer has ended."""
        if self._is_through or self._is_thinking or not self._held:
            return ""
        return self._begin_answer()

    def _feed_thought(self, text: str) -> str:
        """Drop a piece of the thought; what follows its end is the answer."""
        self._held += text
        _, tag, after = self._held.partition("</think>")
        if not tag:
            self._held = self._held[1 - len("</think>") :]  # the tag may be cut
            return ""
        self._is_thinking = False
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

    def __init__(self, body: object) -> None:
        super().__init__()
        self.body = body


class Phase(enum.Enum):
    """How far a reply has come."""

    READING = "reading"
    SETTLED = "settled"  # the answer has ended: only usage and [DONE] are expected
    ENDED = "ended"


# What a finish_reason means, in lower case. Any other one means that the server broke off.
GOOD_ENDS = re.compile(
    "stop|end|end_turn|eos|eos_token|complete|completed|finished|stop_sequence|done|normal|"
    "tool|tool_call|tool_calls|tool_use|function_call"
)
CUT_ENDS = re.compile(
    "length|max_length|max_(output_|completion_)?tokens|token_limit|model_length|context_length|"
    "(model_)?context_window_exceeded"
)
REFUSED_ENDS = re.compile(
    "content_filter|content_filtered|sensitive|safety|refusal|moderation|blocklist|"
    "prohibited_content"
)
THOUGHT_FIELDS = (
    "reasoning",
    "reasoning_content",
    "reasoning_details",
    "reasoning_text",
    "thinking",
    "thinking_content",
    "thought",
    "thoughts",
)
ERROR_FIELDS = (
    "error",
    "errors",
    "error_message",
    "error_msg",
    "error_type",
    "error_code",
    "detail",
)
MODERATION_WORDS = {
    "guard",
    "safeguard",
    "guardian",
    "wildguard",
    "shield",
    "shieldgemma",
    "moderation",
}


@functools.lru_cache(maxsize=256)
def is_moderation_model(name: str) -> bool:
    """Whether a model judges texts rather than answering them."""
    words = re.split(r"[^a-z0-9]", name.lower())
    return not MODERATION_WORDS.isdisjoint(words) or "content-safety" in name.lower()


@functools.lru_cache(maxsize=64)
def end_word(finish_reason: str) -> str:
    """A finish_reason in the spelling of the lists above: maxTokens and MAX-TOKENS are one."""
    words = re.sub("(?<=[a-z])(?=[A-Z])", "_", finish_reason).lower().replace("-", "_")
    return re.sub("^(finish|stop)_reason_", "", words)


def is_cut(finish_reason: str) -> bool:
    """Whether this finish_reason says that the answer was too long."""
    return CUT_ENDS.fullmatch(end_word(finish_reason)) is not None


class Draft:
    """An answer being put together from the events of one reply.

    `take` returns the text of each event; `end` says why the result is not an answer, if it is
    not. A live draft is shown as it grows and cannot be taken back.
    """

    def __init__(self, model: str, is_live: bool) -> None:
        self.is_live = is_live
        self.phase = Phase.READING
        self.texts: List[str] = []
        self.usage: Json = {}
        self.finish_reason = ""
        self._model = model
        self._thinking = ThinkingFilter()
        self._raw: List[str] = []  # the texts so far, with the thoughts in them
        self._has_text = False  # that can be seen
        self._went_on = False  # there was more text after an end
        self._half = ""  # the first half of a character
        self._size = 0  # of the texts and thoughts, in characters
        self._has_reasoning = False
        self._refusals: List[str] = []
        # What Transport notes of the exchange:
        self.status: Optional[int] = None  # of HTTP, once it is there
        self.request_id = ""

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.texts)

    def take(self, event: Event) -> Optional[str]:
        """The text of an event that can be shown now; None if the event was no progress.

        Raises Failure when no answer can come of it any more, and ErrorInside.
        """
        if event.data == "[DONE]":
            self.phase = Phase.ENDED
            return None
        if event.kind == "ping":
            return None

        said = parsed(event.data)
        if isinstance(said, list) and len(said) == 1:
            said = said[0]
        if event.kind == "error":
            raise ErrorInside(said if isinstance(said, dict) else {"error": said})
        if not isinstance(said, dict):
            self._take_malformed(event, said)
            return None
        if event.is_plain:
            self.phase = Phase.ENDED
        try:
            return self._take_object(said)
        except RecursionError:
            raise Failure(Verdict.FAULT, "no answer in the reply: too deeply nested") from None

    def _take_malformed(self, event: Event, said: object) -> None:
        """An event that is no JSON object may have held a word of the answer."""
        is_empty_body = event.is_plain and not event.data
        if self.phase is not Phase.SETTLED and not is_empty_body:
            words = read_error(said).message
            raise Failure(Verdict.FAULT, f"no answer in the reply: {words}")

    def end(self) -> str:
        """The text that was held back until now. Raises Failure if this is no whole answer."""
        was_shown = bool(self.texts)
        shown = self._show("", is_last=True)
        if not self.is_live:
            # A thought whose beginning is missing: what stood before its end is not the answer.
            before, tag, after = self.text.partition("</think>")
            if tag and "<think>" not in before and not self._thinking.has_thought:
                self._has_reasoning = True
                self.texts = [after.lstrip()]
        failure = self._failure()
        if failure is None:
            return shown
        if not was_shown:
            self.texts.clear()  # nothing was given out
        raise failure

    def _failure(self) -> Optional[Failure]:
        """Why this is no whole answer; None: it is one."""
        is_empty = is_blank(self.text)
        reason = end_word(self.finish_reason)
        refusal = "".join(self._refusals)
        if REFUSED_ENDS.fullmatch(reason) or (refusal and is_empty):
            return Failure(Verdict.REFUSED, refusal or "a content filter stopped the answer")
        if self.phase is Phase.READING and not self.has_end:
            what = "the reply holds no answer"
            if self._has_text:
                what = "the answer was cut: it has no end"
            return Failure(Verdict.FAULT, what)
        if reason and not is_cut(reason) and not GOOD_ENDS.fullmatch(reason):
            what = f"the server broke off: finish_reason {self.finish_reason}"
            return Failure(Verdict.FAULT, what)
        if not is_empty:
            return None

        if is_cut(reason):
            reason = "max_tokens was used up before the answer began"
            return Failure(Verdict.UNSUITABLE, reason, advice="raise max_tokens")
        if self._has_reasoning or self._thinking.has_thought:
            return Failure(Verdict.FAULT, "only reasoning came, no answer")
        return Failure(Verdict.FAULT, "the answer is empty")

    def _take_object(self, said: Json) -> Optional[str]:
        """The text of an event's JSON object; notes what else it says."""
        choice = our_choice(said)
        delta = as_object(choice.get("delta"))
        message = as_object(choice.get("message"))
        groq = as_object(said.get("x_groq"))
        self._raise_error_inside(said, choice, [delta, message, groq])
        self._check_model(said.get("model"))

        usage = said.get("usage") or groq.get("usage")
        if usage:
            self.usage = usage_figures(usage) or self.usage
        is_progress = self._take_thoughts([delta, message])
        text = text_of(delta.get("content"))
        if not text:
            text = self._news_in(text_of(message.get("content")))
        if text:
            self._raw.append(text)
            self._size += len(text)
        if self._size > MAX_EVENT:
            raise Failure(Verdict.FAULT, "the answer is longer than any model's")
        if not is_blank(text):
            is_progress = True
            self._has_text = True
            self._go_on()

        finish_reason = choice.get("finish_reason")
        if finish_reason:
            is_progress = is_progress or not self.finish_reason
            self._finish(str(finish_reason), has_text=bool(text))
        shown = self._show(text)
        return shown if is_progress or shown else None

    def _go_on(self) -> None:
        """There is more text: what was said to be the end before was none."""
        if self.finish_reason:
            self.finish_reason = ""
            self._went_on = True
        if self.phase is Phase.SETTLED:
            self.phase = Phase.READING

    @property
    def has_end(self) -> bool:
        """Whether an end was said that can be believed if nothing more comes."""
        return bool(self.finish_reason) and not self._went_on

    def _finish(self, finish_reason: str, has_text: bool) -> None:
        """Note how the answer ended.

        Some gateways say "stop" in every chunk, or in the first: it is the end only when it comes
        alone and after some text.
        """
        self.finish_reason = finish_reason
        if not has_text and self._has_text and self.phase is Phase.READING:
            self.phase = Phase.SETTLED

    def _news_in(self, whole: str) -> str:
        """What a whole text adds to the one so far. Raises Failure if it is another text."""
        if not whole:
            return ""
        so_far = "".join(self._raw)
        if self._half:  # a whole character may stand in its place now
            so_far = so_far[:-1]
            self._half = ""
        if whole.rstrip() == so_far.rstrip():
            return ""
        for known in (so_far, self.text):  # with the thoughts, or without them
            if whole.startswith(known) and (known or not so_far):
                self._raw = [known]
                return whole[len(known) :]
        if self.is_live and self.texts:
            raise Failure(Verdict.FAULT, "the server changed what it had said before")
        self._raw.clear()
        self.texts.clear()
        self._thinking = ThinkingFilter()
        return whole

    def _show(self, text: str, is_last: bool = False) -> str:
        """What can be shown of the text now: in whole characters, and without thoughts."""
        text = self._half + text
        self._half = ""
        if "\ud800" <= text[-1:] <= "\udbff" and not is_last:
            self._half = text[-1]
            text = text[:-1]
        shown = self._thinking.feed(whole_characters(text))
        if is_last:
            shown += self._thinking.end()
        if shown:
            self.texts.append(shown)
        return shown

    def _take_thoughts(self, messages: Sequence[Json]) -> bool:
        """Whether these hold reasoning, under any of its names; notes words of refusal."""
        found = False
        for message in messages:
            for name, thought in message.items():
                if name in THOUGHT_FIELDS and not is_empty(thought):
                    found = True
                    self._size += len(thought) if isinstance(thought, str) else 0
            if has_thought(message.get("content")):
                found = True
            if isinstance(message.get("refusal"), str):
                self._refusals.append(message["refusal"])
                self._size += len(message["refusal"])
        self._has_reasoning = self._has_reasoning or found
        return found

    def _raise_error_inside(self, said: Json, choice: Json, parts: Sequence[Json]) -> None:
        """Raise ErrorInside if the event carries an error, wherever it is."""
        for place in (said, choice, *parts):
            found = {}
            for name in ERROR_FIELDS:
                if name in place and not is_empty(place[name]):
                    found[name] = place[name]
            if found:
                raise ErrorInside({"status_code": said.get("status_code"), **found})
        finish_reason = choice.get("finish_reason")
        if finish_reason and str(finish_reason).lower() == "error":
            raise ErrorInside(
                {"error": choice.get("native_finish_reason") or "finish_reason error"}
            )
        is_over = self.phase is Phase.SETTLED
        if not said.get("choices") and not is_over and read_error(said).message:
            raise ErrorInside(said)  # Cerebras puts an error's fields at the top level (2026-10)

    def _check_model(self, model: object) -> None:
        """A router may let a moderation model answer (openrouter/free, 2026-10)."""
        if not isinstance(model, str) or is_moderation_model(self._model):
            return
        if is_moderation_model(model[:200]):
            raise Failure(Verdict.FAULT, f"a moderation model answered: {model}")


def our_choice(said: Json) -> Json:
    """The choice with the index 0, or without one; {} if there is none."""
    for choice in as_list(said.get("choices")):
        if isinstance(choice, dict) and choice.get("index") in (None, 0, "0"):
            return choice
    return {}


def as_object(value: object) -> Json:
    """The value if it is a JSON object, else {}."""
    if isinstance(value, dict):
        return value
    return {}


def as_list(value: object) -> List[Any]:
    """The value if it is a JSON array, else []."""
    if isinstance(value, list):
        return value
    return []


def is_empty(value: object) -> bool:
    """Whether a JSON value is empty all the way down: `"error": {}` is no error."""
    if isinstance(value, dict):
        return all(is_empty(part) for part in value.values())
    if isinstance(value, list):
        return all(is_empty(part) for part in value)
    return not value or value == "0" or (isinstance(value, str) and is_blank(value))


def is_thought(part: object) -> bool:
    """Whether a part of a message's content is reasoning rather than text."""
    kind = str(dig(part, "type")).lower()
    return (
        bool(dig(part, "thought")) or re.search("think|thought|reason|analysis", kind) is not None
    )


def has_thought(content: object) -> bool:
    """Whether a part of a message's content holds reasoning."""
    if isinstance(content, str):
        return False
    return any(
        is_thought(part) and not is_empty({**part, "type": ""}) for part in parts_of(content)
    )


def parts_of(content: object) -> List[Any]:
    """The parts of a message's content, which may be a list, one object, or nothing."""
    if isinstance(content, list):
        return content
    return [content] if content else []


def text_of(content: object) -> str:
    """The text of a message's content."""
    if isinstance(content, str):
        return content
    texts = []
    for part in parts_of(content):
        text = part if isinstance(part, str) else dig(part, "text")
        if isinstance(text, str) and not is_thought(part):
            texts.append(text)
    return "".join(texts)


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

CONNECT_TIMEOUT = 5.0  # for all addresses of a host together, and again for the TLS handshake
CHECK_TIMEOUT = 10.0  # for a models list and the like
USAGE_GRACE = 1.0  # after a finish_reason, for usage and [DONE]; for the words of an HTTP error
END_GRACE = 0.2  # after [DONE], for the end of the body: then the connection can be kept
SLOWEST_UPLOAD = 100000  # bytes a second; a question is given the time to arrive at this speed
MAX_BODY = 64 * 1024 * 1024  # bytes of a reply; MAX_EVENT bounds what can be in it
MAX_LIST = 2 * 1024 * 1024  # bytes of a models list (OpenRouter's has 530 KB, 2026-08)
MAX_ERROR_BODY = 256 * 1024  # bytes of an HTTP error that are read
MAX_LINE = 300  # characters of a reason that are shown,
MAX_SUMMARY = 150  # and of those at the end of a question that failed
POOL_WIDTH = 128  # connections kept per host; with urllib3's 10, threads would reconnect
READ_SIZE = 65536
REQUEST_IDS = ("x-request-id", "x-generation-id", "inference-id", "request-id")


class TimeLimit:
    """How long one exchange may take.

    It ends at its deadline, and before that when there has been no progress for the idle timeout.
    """

    def __init__(
        self, clock: Clock, deadline: float, idle_timeout: float, is_share: bool = False
    ) -> None:
        self.has_connected = False  # a connection was opened for this exchange
        self.is_reused = False  # an earlier exchange had opened it
        self._clock = clock
        self._deadline = deadline
        self._is_share = is_share  # the deadline leaves time for others
        self._allowed = deadline - clock()
        self._idle_timeout = idle_timeout
        self._idle_until = clock() + idle_timeout

    def left(self) -> float:
        """The seconds that the next operation may take, 0 when there are none."""
        return max(0.0, min(self._deadline, self._idle_until) - self._clock())

    def progress(self, grace: float = math.inf) -> None:
        """There was progress: allow the idle timeout anew, or a shorter grace period."""
        self._idle_until = self._clock() + min(grace, self._idle_timeout)

    def postpone(self, seconds: float) -> None:
        """Put off the idle timeout: this time is not the server's."""
        self._idle_until += seconds

    def extend(self, deadline: float) -> None:
        """Move the deadline: what is being shown cannot be taken back."""
        self._allowed += deadline - self._deadline
        self._deadline = deadline
        self._is_share = False

    def overrun(self) -> Optional[Failure]:
        """The failure of an exchange that has reached its deadline; None if it has not."""
        if self._clock() < self._deadline - 0.01:  # a socket may time out a little early
            return None
        seconds = f"{self._allowed:.3g} s"
        if self._is_share:
            reason = f"no answer within {seconds}, its share of the time limit"
            return Failure(
                Verdict.FAULT, reason, cause=Cause.TIME_SHARE, advice="raise the timeout"
            )
        reason = f"no answer within the time limit of {seconds}"
        return Failure(Verdict.FAULT, reason, cause=Cause.TIME_LIMIT, advice="raise the timeout")

    def failure(self, reason: str, cause: Cause = Cause.REPLY) -> Failure:
        """The failure of an exchange that broke off, for this reason or because time is up."""
        overrun = self.overrun()
        if overrun is not None:
            return overrun
        if self._clock() >= self._idle_until - 0.01:
            reason = f"silent for {number_of(self._idle_timeout)} s"
            return Failure(Verdict.FAULT, reason, cause=Cause.SILENCE)
        return Failure(Verdict.FAULT, reason, cause=cause)


def safe_line(text: str, secrets: Iterable[str]) -> str:
    """A server's text in one line of at most 300 characters, without keys and account ids.

    A secret is found before anything is cut: nothing would recognize half of one.
    """
    line = one_line(clipped(text))
    line = "".join(char if char.isprintable() else " " for char in line)
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= 4:
            line = secret_pattern(secret).sub("[key]", line)
    line = KEY_PREFIX.sub("[key]", line)
    line = re.sub(r"(?i)(bearer|basic) [\w.~+/=-]{8,}", r"\1 [key]", line)
    line = re.sub(r"(?<=://)\S{1,300}@", "[key]@", line)
    line = re.sub(r"\b(org|user|proj)[_-]\w{6,}", r"\1_[id]", line)
    if len(line) <= MAX_LINE:
        return line
    return line[: MAX_LINE - 1] + "…"


@functools.lru_cache(maxsize=256)
def secret_pattern(secret: str) -> Pattern[str]:
    """A pattern that finds a secret in any case, also URL-encoded, or broken by blanks."""
    gap = "[\\s\u00ad\u200b-\u200f\u2060\ufeff]{0,4}"
    spellings = []
    encoded = quote(secret, safe="")
    for spelling in {secret, quote(secret), encoded, quote(encoded)}:
        spellings.append(gap.join(re.escape(char) for char in spelling))
    return re.compile("|".join(spellings), re.IGNORECASE)


EXCHANGE = threading.local()  # its `limit` is the TimeLimit of the exchange that a thread begins


class Bounded:
    """A mixin for sockets: each operation obeys the time limit of the exchange that uses it.

    The timeouts of requests hold for one recv at a time, so a dripped header, a dripped chunk
    size or endless trailers would outlive any limit. All bytes pass through here instead.
    """

    limit: Optional[TimeLimit] = None

    def sendall(self, data: Any, *more: Any) -> None:
        """Send in pieces: each that is taken counts as progress of a slow upload."""
        limit: TimeLimit = EXCHANGE.limit
        limit.is_reused = not limit.has_connected
        self.limit = limit
        view = memoryview(data)
        for start in range(0, len(view), READ_SIZE):
            self._obey_limit()
            super().sendall(view[start : start + READ_SIZE], *more)  # type: ignore[misc]
            limit.progress()

    def recv_into(self, *arguments: Any) -> int:
        """Read what is there, within the time that is left."""
        self._obey_limit()
        return super().recv_into(*arguments)  # type: ignore[misc,no-any-return]

    def recv(self, *arguments: Any) -> bytes:
        """Read what is there, within the time that is left."""
        self._obey_limit()
        return super().recv(*arguments)  # type: ignore[misc,no-any-return]

    def _obey_limit(self) -> None:
        """Let the next operation take the time that is left."""
        if self.limit is not None:
            left = self.limit.left()
            if left <= 0:
                raise socket.timeout("timed out")
            cast(socket.socket, self).settimeout(left)


class BoundedSocket(Bounded, socket.socket):
    """A plain connection; `bounded_session` makes the same of ssl.SSLSocket."""


def connected(host: str, port: int, options: Iterable[Tuple[int, int, int]]) -> socket.socket:
    """A connection to the first address that answers. Raises OSError, also for unknown names.

    urllib3 gives each address the whole timeout, so four dead ones take four times as long. Here
    they share it, and the name server has a time of its own.
    """
    limit = EXCHANGE.limit
    limit.has_connected = True
    started = time.monotonic()
    addresses = addresses_of(host, port, limit.left())
    limit.postpone(time.monotonic() - started)

    until = time.monotonic() + min(CONNECT_TIMEOUT, limit.left())
    problem = OSError(f"{host} has no address")
    for number, (family, kind, protocol, _, address) in enumerate(addresses):
        share = (until - time.monotonic()) / (len(addresses) - number)
        sock = BoundedSocket(family, kind, protocol)
        try:
            for option in options:
                sock.setsockopt(*option)
            sock.settimeout(max(0.001, share))
            sock.connect(address)
            sock.settimeout(max(0.001, min(CONNECT_TIMEOUT, limit.left())))  # for the handshake
            return sock
        except OSError as error:
            sock.close()
            problem = error
    raise problem


def addresses_of(host: str, port: int, seconds: float) -> List[Any]:
    """The addresses of a host. Raises OSError if they are not known within the time.

    The name is looked up in a thread, as nothing else can end a look-up.
    """
    found: queue.SimpleQueue[object] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            found.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except OSError as error:
            found.put(error)
        except UnicodeError:
            found.put(socket.gaierror(f"{host} is no name of a host"))

    try:
        threading.Thread(target=look_up, daemon=True).start()
    except RuntimeError:  # no more threads can be started
        look_up()
    try:
        result = found.get(timeout=max(0.001, seconds))
    except queue.Empty:
        raise socket.timeout("the name server did not answer in time") from None
    if isinstance(result, OSError):
        raise result
    return cast(List[Any], result)


class FreeConnections:
    """A pool's free connections, the last one first, without a lock.

    That of queue.LifoQueue could stay locked for ever when Ctrl-C or a signal handler comes in
    between.
    """

    def __init__(self, maxsize: int) -> None:
        self._maxsize = maxsize
        self._items: Deque[Any] = collections.deque()

    def put(self, item: Any, block: bool = True, timeout: Optional[float] = None) -> None:
        """Add a connection, or None for one that is still to be made; close it if it is full."""
        if len(self._items) < self._maxsize:
            self._items.append(item)
        elif item is not None:
            item.close()

    def get(self, block: bool = True, timeout: Optional[float] = None) -> Any:
        """Take one out. Raises queue.Empty."""
        try:
            return self._items.pop()
        except IndexError:
            raise queue.Empty from None

    def qsize(self) -> int:
        """How many there are."""
        return len(self._items)


def bounded_session() -> requests.Session:  # noqa: C901 - small classes, of packages imported late
    """A session that uses bounded sockets, plain and TLS, and skips interim replies.

    The classes override what http.client, ssl and urllib3 document, and `_new_conn`, which
    urllib3 1.21 to 2 have in common.
    """
    import requests  # noqa: I001 - the first, so that its name is told when it is missing
    import ssl
    from http.client import HTTPResponse
    from urllib3 import connectionpool
    from urllib3.connection import HTTPConnection, HTTPSConnection
    from urllib3.exceptions import ConnectTimeoutError, NewConnectionError
    from urllib3.util.ssl_ import create_urllib3_context

    class SecureSocket(Bounded, ssl.SSLSocket):
        pass

    class Response(HTTPResponse):
        def begin(self) -> None:
            super().begin()
            while 100 <= self.status < 200 and self.status != HTTPStatus.SWITCHING_PROTOCOLS:
                self.headers = cast(Any, None)  # such as 103, Early Hints: the reply is to come
                super().begin()
            # urllib3 would log a header line without a colon, and a key may be in it.
            self.msg.defects.clear()
            self.msg.set_payload([])

    class Connecting:
        response_class = Response

        def _new_conn(self) -> socket.socket:
            connection = cast(Any, self)
            try:
                host = connection.host.strip("[]")
                return connected(host, connection.port, connection.socket_options or ())
            except socket.timeout as error:
                raise ConnectTimeoutError(connection, f"timed out: {error}") from error
            except OSError as error:
                raise NewConnectionError(connection, f"cannot connect: {error}") from error

    class Connection(Connecting, HTTPConnection):  # type: ignore[misc,unused-ignore]
        pass

    class SecureConnection(Connecting, HTTPSConnection):  # type: ignore[misc,unused-ignore]
        pass

    # These two names show in error messages.
    class HTTPConnectionPool(connectionpool.HTTPConnectionPool):
        ConnectionCls = Connection
        QueueCls = FreeConnections  # type: ignore[assignment,unused-ignore]

    class HTTPSConnectionPool(connectionpool.HTTPSConnectionPool):
        ConnectionCls = SecureConnection
        QueueCls = FreeConnections  # type: ignore[assignment,unused-ignore]

    pools = {"http": HTTPConnectionPool, "https": HTTPSConnectionPool}
    tls = create_urllib3_context()
    tls.sslsocket_class = SecureSocket

    class Adapter(requests.adapters.HTTPAdapter):
        def init_poolmanager(self, *args: Any, **more: Any) -> None:
            super().init_poolmanager(*args, ssl_context=tls, **more)
            self.poolmanager.pool_classes_by_scheme = pools

        def proxy_manager_for(self, proxy: Any, **more: Any) -> Any:
            manager = super().proxy_manager_for(proxy, ssl_context=tls, **more)
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
        self.status = response.status_code
        self.headers = {name.lower(): value for name, value in response.headers.items()}
        self.is_success = 200 <= self.status < 300
        self._limit = limit
        self._raw: Any = response.raw
        self._is_complete = False  # read to the end: the connection can be used again

    def pieces(self, most: int = MAX_BODY) -> Iterator[bytes]:
        """The body, decompressed, in pieces as they come. Raises Failure."""
        from http.client import HTTPException

        from urllib3.exceptions import HTTPError

        encoding = self.headers.get("content-encoding", "").lower()
        pieces = self._sent_pieces()
        if "gzip" in encoding or "deflate" in encoding:
            pieces = unpacked(pieces)

        size = 0
        try:
            for piece in pieces:
                size += len(piece)
                if size > most:
                    raise Failure(Verdict.FAULT, f"the reply is longer than {most} bytes")
                if self._limit.left() <= 0:
                    raise socket.timeout("timed out")
                yield piece
        except (OSError, EOFError, ValueError, HTTPException, HTTPError, zlib.error):
            raise self._limit.failure("the answer was cut: its end did not come") from None

    def events(self, draft: Draft) -> Iterator[Event]:
        """The events until the draft has ended. Raises Failure if they break off before."""
        try:
            for event in events_in(lines_in(self.pieces())):
                if self._limit.left() <= 0:
                    raise self._limit.failure("no end came in time")
                yield event
                if draft.phase is Phase.ENDED:
                    break
        except Failure as failure:
            is_over = draft.phase is Phase.SETTLED  # only usage was still to come
            is_quiet = failure.cause is not Cause.REPLY
            if not is_over and not (is_quiet and draft.has_end):
                raise
        self._limit.progress(END_GRACE)
        self._read_rest()

    def error(self) -> Any:
        """The body of a reply that is no success, as JSON or text; as far as it comes."""
        self._limit.progress(USAGE_GRACE)
        data = b""
        with contextlib.suppress(Failure):  # the status says enough
            for piece in self.pieces(MAX_ERROR_BODY):
                data += piece
        text = data.decode("utf-8", "replace").encode()  # lines_in takes only UTF-8
        return parsed(next(events_in(lines_in([text]))).data)

    def close(self) -> None:
        """Give the connection back if the reply was whole and ordinary, else close it.

        The garbage collector may run this for a stream that nobody has read to its end, so it
        must not touch the pool's lock then.
        """
        is_ordinary = self.status == 200 or 400 <= self.status < 600
        if "content-length" in self.headers and "transfer-encoding" in self.headers:
            is_ordinary = False
        if self._is_complete and is_ordinary:
            self._raw.release_conn()
        else:
            self._raw.close()

    def _read_rest(self) -> None:
        """Read what follows the end of an answer, so that the connection can be kept."""
        with contextlib.suppress(Failure):
            for _ in self.pieces(READ_SIZE):
                pass

    def _sent_pieces(self) -> Iterator[bytes]:
        """The body as the server sends it. Raises EOFError if its end is missing."""
        # urllib3's own methods wait for a full block, so a slow stream would look like silence.
        # http.client's response below it has read1, which gives what is there.
        source = getattr(self._raw, "_fp", self._raw)
        while not self._is_complete:
            if self._limit.left() <= 0:
                raise socket.timeout("timed out")
            piece = source.read1(READ_SIZE)
            if piece:
                yield piece
                continue
            if getattr(source, "length", None):
                raise EOFError
            self._is_complete = True
            source.close()  # http.client waits for this before it uses the connection again


def unpacked(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The pieces of a compressed body, decompressed; it may have several members."""
    unpack = zlib.decompressobj(47)  # 47: gzip or deflate
    for piece in pieces:
        while piece:
            if unpack.eof:
                unpack = zlib.decompressobj(47)
            yield unpack.decompress(piece, READ_SIZE)
            piece = unpack.unconsumed_tail or unpack.unused_data
    if not unpack.eof:
        raise EOFError


class Transport:
    """HTTP exchanges, each within its time limit. Only this class and its helpers use requests.

    A key is sent only to its own provider, in the Authorization header, and redirects are not
    followed.
    """

    def __init__(
        self,
        clock: Clock,
        wall_clock: Clock,
        session: object = None,
        keys: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        self._clock = clock
        self._wall_clock = wall_clock
        self._keys = keys  # those of all providers
        self._given_session = cast("Optional[requests.Session]", session)
        self._passwords: Set[str] = set()  # of proxies
        self.renew()

    def renew(self) -> None:
        """Begin without connections, as each process must after a fork."""
        self._session = self._given_session or bounded_session()
        self._templates: Dict[Tuple[str, str, str], Tuple[requests.PreparedRequest, Json]] = {}

    def close(self) -> None:
        """Close the connections that are kept alive."""
        self._session.close()

    def converse(
        self, row: Provider, key: str, body: bytes, draft: Draft, limit: TimeLimit
    ) -> Generator[str, None, None]:
        """Send a question; the text of the draft comes out as it comes in. Raises Failure."""
        limit.postpone(len(body) / SLOWEST_UPLOAD)
        with self._safe_failures(key):
            reply = self._open("POST", row, "/chat/completions", key, body, limit)
            with contextlib.closing(reply):
                draft.status = reply.status
                draft.request_id = self._request_id(reply, key)
                if not reply.is_success:
                    raise self._judged(reply, reply.error(), key)
                for event in reply.events(draft):
                    text = self._take(event, draft, reply, key)
                    # An empty text is progress, such as a thought; white space alone is none.
                    if text is not None and (text == "" or not is_blank(text)):
                        settled = draft.phase is Phase.SETTLED
                        limit.progress(USAGE_GRACE if settled else math.inf)
                    if text:
                        given = self._clock()
                        yield text
                        limit.postpone(self._clock() - given)  # the caller's own time
                yield draft.end()

    def get(self, row: Provider, path: str, key: str, deadline: float) -> Json:
        """The JSON object that a GET of the path gives. Raises Failure."""
        limit = TimeLimit(self._clock, min(deadline, self._clock() + CHECK_TIMEOUT), CHECK_TIMEOUT)
        with self._safe_failures(key):
            reply = self._open("GET", row, path, key, None, limit)
            with contextlib.closing(reply):
                if reply.status != 200:
                    raise self._judged(reply, reply.error(), key)
                body = parsed(b"".join(reply.pieces(MAX_LIST)))
                if isinstance(body, list):
                    body = {"data": body}  # a bare list
                if not isinstance(body, dict):
                    raise self._judged(reply, body, key)
                return body

    def safe(self, text: str, key: str) -> str:
        """A server's text, safe to show: in one line, without keys and account ids."""
        used_lately = {name[2] for name in list(self._templates)}
        return safe_line(text, {key, *used_lately, *self._keys(), *self._passwords})

    @contextlib.contextmanager
    def _safe_failures(self, key: str) -> Iterator[None]:
        """Let no failure out before its texts are safe to show."""
        try:
            yield
        except Failure as failure:
            failure.reason = self.safe(failure.reason, key)
            failure.summary = self.safe(failure.summary, key)
            failure.advice = self.safe(failure.advice, key)
            raise

    def _judged(self, reply: Reply, body: object, key: str) -> Failure:
        """What a reply without an answer means."""
        headers = dict(reply.headers)
        headers["location"] = self.safe(headers.get("location", ""), key)  # a host of it is shown
        failure = judge(reply.status, headers, body, self._wall_clock())
        if failure.verdict is Verdict.UNSUITABLE and "stream_options" in str(body):
            failure.cause = Cause.OPTIONS
        return failure

    def _take(self, event: Event, draft: Draft, reply: Reply, key: str) -> Optional[str]:
        """The text of an event, None if it is no progress. Raises Failure for an error."""
        try:
            return draft.take(event)
        except ErrorInside as error:
            raise self._judged(reply, error.body, key) from None

    def _request_id(self, reply: Reply, key: str) -> str:
        """What the provider calls this request, "" if it does not say."""
        for name in REQUEST_IDS:
            value = reply.headers.get(name, "")
            if re.fullmatch(r"[\w.:-]{1,100}", value) and self.safe(value, key) == value:
                return value
        return ""

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
        before = getattr(EXCHANGE, "limit", None)
        EXCHANGE.limit = limit
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
            failure = network_failure(error, row, limit)
        finally:
            EXCHANGE.limit = before  # a log handler of urllib3 may ask a question in between
        if failure.cause is Cause.STALE and self._given_session is None:
            cast(Any, adapter).forget_connections()  # the others are as old
        raise failure

    def _template(self, method: str, url: str, key: str) -> Tuple[requests.PreparedRequest, Json]:
        """A request without a body, and the settings of the environment: proxy, certificates."""
        import requests

        name = (method, url, key)
        known = self._templates.get(name)
        if known is not None:
            return known

        headers = {
            # The default agents of libraries are turned away with a 403 (2026-09).
            "User-Agent": f"fallback_llm/{__version__}",
            "Accept": "text/event-stream, application/json",
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
        }
        if key:
            headers["Authorization"] = "Bearer " + key
        request = requests.Request(method, url, headers).prepare()
        merged = self._session.merge_environment_settings(url, {}, True, None, None)
        settings: Json = dict(merged)
        settings["proxies"] = self._proxies(url, settings["proxies"])
        if len(self._templates) >= POOL_WIDTH:
            self._templates.clear()  # keys that change all the time must not pile up
        self._templates[name] = (request, settings)
        return request, settings

    def _proxies(self, url: str, proxies: Mapping[str, str]) -> Dict[str, str]:
        """The proxies to use. Raises Failure if the one for this URL has no valid address.

        This machine is never asked through a proxy, to which the key would go in clear text.
        """
        from requests.utils import select_proxy

        if is_loopback(url):
            return {}
        for proxy in proxies.values():
            user_and_password = str(proxy).rpartition("@")[0].rpartition("://")[2]
            self._passwords.update({user_and_password, user_and_password.partition(":")[2]})

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
                Reach.PROVIDER,
                Cause.UNREACHABLE,
                advice="check HTTPS_PROXY: special characters in a password must be %-encoded",
            )
        return dict(proxies)


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


def network_failure(error: Exception, row: Provider, limit: TimeLimit) -> Failure:
    """What it means that a request got no reply: the server, its address or our own network."""
    from http.client import HTTPException

    from requests.exceptions import ConnectTimeout, ProxyError, ReadTimeout, SSLError
    from urllib3.exceptions import InvalidHeader

    causes = causes_of(error)
    closed = (ConnectionResetError, BrokenPipeError, ConnectionAbortedError)
    if not isinstance(error, (ConnectTimeout, SSLError, ProxyError)):
        if any(isinstance(cause, closed) for cause in causes):
            cause = Cause.STALE if limit.is_reused else Cause.REPLY
            return limit.failure("the connection was closed without a reply", cause)
        if any(isinstance(cause, InvalidHeader) for cause in causes):
            return limit.failure("the reply is not HTTP: it has two different lengths")
        if any(isinstance(cause, HTTPException) for cause in causes):
            return limit.failure("the reply is not HTTP")
        if isinstance(error, ReadTimeout) or "Read timed out" in str(error)[:1000]:
            return limit.failure("no reply came in time")

    # Only the beginning is looked at: a server can put a long line into an exception.
    words = str(error)[:1000].partition(" (Caused by")[0]
    what, advice = unreachable_because(causes, urlsplit(row.base_url).netloc)
    if "refused" in what and (is_loopback(row.base_url) or row.key_env is None):
        advice = "is the server running?"
    failure = Failure(
        Verdict.FAULT,
        f"{words}; {what}" if words else what,
        Reach.PROVIDER,
        Cause.UNREACHABLE,
        summary=what,
        advice=advice,
    )
    return limit.overrun() or failure


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


# --- 6. Health: what is known of models and accounts across questions ---------------------------


class Candidate(NamedTuple):
    """A model of a provider, and the account to ask it with."""

    row: Provider
    model: str
    position: str  # its place among the models of its provider, such as 2/3
    account: Account
    key: str  # "": the provider needs none

    @property
    def label(self) -> str:
        """The name of its account: "groq", or "groq (key 2)"."""
        return self.account.label

    def __repr__(self) -> str:
        return f"<{self.label} {self.model}>"


MAX_GUESS = 20.0  # seconds for which a fault puts a model last: it may recover at any time
SHORT_SHARES = 2  # times that a model did not answer within its share of the time, to learn it
MOST_LANES = 1000  # those that say nothing are forgotten then: keys may change all the time
LIST_PAUSE = 600.0  # seconds until a models list is fetched again


# Pacing. What each constant is worth was measured by changing it, in simulated time.
OPENING = 32  # requests under way while nothing is known; with 8, no limit: 97 % instead of 100
HOLD = 0.05  # seconds after which a question that meets a full lane looks again
FEW = 5  # a sample of fewer is filled up from the one before (with 2, tokens: 66 % instead of 89)
TRUST = 2.0  # answers before a gap is shortened (with 4, one in ten by chance: 47 % instead of 68)
MOST_TRUST = 40.0  # the same once it was right (with 20, buckets: 1 refused more per 100)
LONG_PAUSE = 20.0  # seconds (without it windows: 46 refused per 100 instead of 5)
FREE_REFUSALS = 15  # of one model in a question (without them, tokens: 9 of 200 questions lost)
LONG_HINT = 120.0  # seconds; a longer hint is about an hour or a day, not about the pace


class Lane:
    """What is known of a model, an account or a provider: its failures, its pauses, its pace.

    Pacing is for a crowd of questions. Between two moments at which a quota ran out, the server
    granted exactly what its rate allows. So the gap between requests is that time divided by what
    was granted, and a pause that the server asked for is worth slots: they may be used at once
    when it ends. Whether pace is what the server limits at all shows when the lane speeds up: a
    quota refuses it within a few answers, and is then trusted longer; anything else lets it go on.
    """

    def __init__(self) -> None:
        self.verdict = Verdict.FAULT  # of the latest failure
        self.failures = 0  # since the last success
        self.failed_at = -math.inf
        self.ready_at = -math.inf  # the server's word: nobody asks before
        self.later_until = -math.inf  # our own guess: it is asked last until then
        self.leased_until = -math.inf  # somebody is trying it: the others ask it last until then
        self.short_shares = 0  # attempts that did not answer within their share of the time
        self.searching_until = -math.inf  # somebody is fetching the provider's models list
        self.search_again_at = -math.inf
        self.last_success = 0.0  # of an account, in seconds since the epoch
        self.last_failure = 0.0
        self.failures_in_a_row = 0  # of all models of an account
        self.forget_pace()

    def forgive(self) -> None:
        """There was a success: forget the failures."""
        self.failures = 0
        self.failed_at = -math.inf
        self.ready_at = -math.inf
        self.later_until = -math.inf
        self.leased_until = -math.inf

    def is_idle(self, now: float) -> bool:
        """Whether nobody is in the lane, and nobody has to wait for it."""
        return self._under_way == 0 and now > max(self.ready_at, self.later_until)

    def forget_pace(self) -> None:
        """Begin as if nobody had been asked."""
        self._refused_at = -math.inf  # the last refusal that counted
        self._opens_at = -math.inf  # the end of the pause after it
        self._pause = 0.0  # its length
        self._pauses = 0  # in a row, without any answer
        self._width = float(OPENING)  # requests that may be under way while the gap is 0
        self._under_way = 0
        self._gap = 0.0  # seconds between two requests; 0: nothing is measured
        self._slot_at = -math.inf  # the next request
        self._measured_from = math.nan  # when a quota began again; nan: nobody was refused yet
        self._sent = 0  # requests since then, without those that were refused
        self._span = 0.0  # of the last measurement: seconds,
        self._spent = 0  # requests in them,
        self._measured = 0.0  # what it gave, without what answers made of it
        self._before = 0.0  # and what the measurement before it had given
        self._trust = TRUST  # answers before the gap is shortened
        self._answers = 0  # since the gap was shortened in vain
        self._faster_at = -math.inf  # when the gap was shortened last
        self._answered_at = -math.inf

    def be_careful(self) -> None:
        """Another lane of the provider met a limit: this one may have one too."""
        self._width = min(self._width, 2.0)

    def hold(self, now: float) -> float:
        """Seconds after which to look again; 0.0: a request can be sent now."""
        wait = max(self._opens_at, self._slot_at) - now
        if self._gap == 0 and self._under_way >= self._width:
            wait = max(wait, HOLD)
        if wait < 1e-6:  # a clock's rounding
            return 0.0
        return wait

    def take(self, now: float) -> None:
        """A request is sent."""
        self._under_way += 1
        self._sent += 1
        # What the pause kept back can be used now; what nobody wanted is lost.
        self._slot_at = max(self._slot_at, now - self._pause) + self._gap

    def ended(self) -> None:
        """It is not under way any more, whatever came of it."""
        self._under_way = max(0, self._under_way - 1)

    def granted(self, begun: float, now: float) -> None:
        """A request that began at `begun` is being answered, and takes up no room any more."""
        self.ended()
        self._answered_at = now
        self._pauses = 0
        self._answers += 1
        is_late = begun <= self._refused_at
        if not is_late:
            self._width += 1
        if self._answers <= self._trust or begun <= self._faster_at:
            return  # those under way together count once
        if is_late and self._pause > LONG_PAUSE:
            return  # after a long pause they would only make the crowd larger
        self._faster_at = now
        self._gap /= 2

    def limited(
        self, begun: float, now: float, hint: Optional[float], backoff: Callable[[int], float]
    ) -> None:
        """A request of a crowd, begun at `begun`, met the rate limit."""
        if begun <= self._refused_at:  # with those that counted, which counted it as granted
            if self._spent > 1:
                self._spent -= 1
                self._measure()
            return

        self._refused_at = now
        self._sent -= 1
        self._pauses += 1
        if hint is None:
            self._pause = min(LONG_PAUSE, backoff(self._pauses))
        else:
            self._pause = hint
        self._opens_at = now + self._pause
        begins_again = now + (hint or 0.0)
        if math.isnan(self._measured_from):  # what was granted so far was saved up, and is no rate
            self._width = 1.0
            self._answers = 0
            self._quota_begins(begins_again)
        else:
            self._adjust_trust()
            if self._sent > 0:
                # Who asks inside a pause, as time limits make one do, may be told a shorter one.
                self._span = max(0.0, begins_again - self._measured_from)
                self._spent = self._sent
                self._before = self._measured
                self._measure()
                self._quota_begins(begins_again)
        self._slot_at = now + self._gap

    def is_alive(self, now: float, longest: float) -> bool:
        """Whether it met a limit, and answered somebody since `longest` seconds ago."""
        return not math.isnan(self._measured_from) and now - self._answered_at <= longest

    def _quota_begins(self, at: float) -> None:
        """The quota begins again at this time."""
        self._measured_from = at
        self._sent = 0

    def _adjust_trust(self) -> None:
        """Trust the gap longer if shortening it was punished at once, else start again."""
        extra = self._answers - self._trust
        if extra > 0:
            self._answers = 0
        if self._gap > 0 and 0 < extra <= FEW:
            self._trust = min(MOST_TRUST, 2 * self._trust)
        elif self._sent > 0:
            self._trust = TRUST

    def _measure(self) -> None:
        """The gap that the last measurement gives."""
        missing = 0
        if self._before:
            missing = max(0, FEW - self._spent)
        self._measured = (self._span + missing * self._before) / (self._spent + missing)
        self._gap = self._measured


class Lanes(NamedTuple):
    """The lanes of a candidate."""

    model: Lane
    account: Lane
    provider: Lane  # its host, with all keys

    def of(self, reach: Reach) -> Lane:
        """The lane that a failure with this reach is about."""
        lane: Lane = getattr(self, reach.value)
        return lane


@dataclasses.dataclass(eq=False)
class Turn:
    """A candidate in the line of one question."""

    candidate: Candidate
    lanes: Lanes
    attempts: int = 0  # used, also by failures that reached the whole provider
    requests: int = 0  # sent
    ready_at: float = -math.inf  # the question does not ask it before
    patience: float = 0.0  # how long the question waits for it although others are ready
    round: int = 0  # how often it was asked and lost its place; lower rounds come before
    place: int = 0  # within the round
    had_second: bool = False  # it was asked again at once: the first time was our own fault
    free: int = 0  # refusals that cost no attempt
    # As it stood when the question last looked at it:
    wait: float = 0.0  # seconds until it can be asked
    hold: float = 0.0  # seconds until it looks again, for our own pacing
    is_opening: bool = False  # held only since many are under way, and no limit is known
    is_later: bool = False  # it failed lately, or somebody is trying it just now
    has_slot: bool = False  # it is being asked
    is_granted: bool = False  # and is being answered
    begun: float = 0.0  # when it was asked

    @property
    def delay(self) -> float:
        """The seconds until it is asked, or the question looks again."""
        return max(self.wait, self.hold)

    @property
    def paced_lanes(self) -> List[Lane]:
        """The lanes of its model and its account; a host as a whole has no pace."""
        return [self.lanes.model, self.lanes.account]


LaneKey = Tuple[str, str, str]  # the provider, the key and the model; "" stands for all of them


class Health:
    """What is known of models, accounts and providers across questions.

    Only its methods take the lock. The garbage collector and signal handlers may run in a thread
    that has it: so a thread may take it twice, and what ends a question is only noted (`_news`)
    until somebody has the lock.
    """

    def __init__(self, clock: Clock, wall_clock: Clock) -> None:
        self._clock = clock
        self._wall_clock = wall_clock
        self._lanes: Dict[LaneKey, Lane] = {}
        self._careful: Set[Tuple[str, str]] = set()  # providers and keys that met a limit
        self._counts: Dict[str, int] = dict.fromkeys(STATISTICS, 0)
        self.renew()

    def renew(self) -> None:
        """Begin with a free lock and nothing under way, as each process must after a fork."""
        self._lock = threading.RLock()
        self._news: Deque[Callable[[], object]] = collections.deque()
        self._is_catching_up = False
        self._open = 0  # questions that are being asked, or wait
        for lane in self._lanes.values():
            lane.forget_pace()

    def choose(
        self, line: Sequence[Turn], pick: Callable[[float], Optional[Turn]]
    ) -> Optional[Turn]:
        """Whom `pick` chooses after a look at all turns; it has a slot if it need not wait."""
        with self._lock:
            now = self._catch_up()  # two threads that look at once would take the same slot
            for turn in line:
                self._look(turn, now)
            chosen = pick(now)
            if chosen is not None and chosen.delay <= 0:
                self._take(chosen, now)
            return chosen

    def _look(self, turn: Turn, now: float) -> None:
        """When may this one be asked?

        Not before the question's own backoff and the servers' word; nor, for a while, before our
        own pacing. Whoever failed lately, or is being tried by somebody, is asked last.
        """
        ready_at = max(turn.ready_at, *[lane.ready_at for lane in turn.lanes])
        turn.wait = max(0.0, round(ready_at - now, 6))  # less is a clock's rounding
        turn.hold = 0.0
        if self._open > 1 and turn.wait == 0:
            turn.hold = max(lane.hold(now) for lane in turn.paced_lanes)
        is_careful = (turn.candidate.row.name, turn.candidate.key) in self._careful
        turn.is_opening = 0 < turn.hold <= HOLD and not is_careful
        is_later = any(now < max(lane.later_until, lane.leased_until) for lane in turn.lanes)
        turn.is_later = is_later and turn.attempts == 0

    def _take(self, turn: Turn, now: float) -> None:
        """The candidate is asked now."""
        turn.has_slot = True
        turn.is_granted = False
        turn.begun = now
        for lane in turn.paced_lanes:
            lane.take(now)
        for lane in turn.lanes:
            if lane.failures:
                lane.leased_until = now + turn.candidate.row.idle_timeout + CONNECT_TIMEOUT

    def give_back(self, line: Iterable[Turn]) -> None:
        """No turn of this line is being asked any more, whatever came of it."""
        for turn in line:
            if turn.has_slot:
                self._news.append(functools.partial(self._request_ends, turn))
                turn.has_slot = False

    def granted(self, turn: Turn) -> None:
        """A request was not refused: its answer begins, or it failed for another reason."""
        with self._lock:
            now = self._catch_up()
            for lane in turn.paced_lanes:
                lane.granted(turn.begun, now)
            turn.is_granted = True

    def answered(self, turn: Turn) -> None:
        """Note that a request was answered, or enough of it for the caller."""
        forgive = functools.partial(self._forgive, turn, self._wall_clock())
        self._news.append(forgive)

    def failed(self, turn: Turn, failure: Failure, config: RetryConfig) -> None:
        """A request failed; notes whether that costs an attempt."""
        with self._lock:
            now = self._catch_up()
            lane = turn.lanes.of(failure.reach)
            if failure.cause is Cause.TIME_SHARE:
                lane.short_shares += 1
            is_learned = lane.short_shares >= SHORT_SHARES
            if failure.cause in (Cause.STALE, Cause.TIME_LIMIT) or not failure.rule.counts:
                return
            if failure.cause is Cause.TIME_SHARE and not is_learned:
                return  # the time was short, which says little of the model
            is_limit = failure.verdict is Verdict.RATE_LIMITED
            if is_limit and self._open > 1 and (failure.hint or 0.0) <= LONG_HINT:
                lane.limited(turn.begun, now, failure.hint, config.backoff)
                self._be_careful(turn.candidate, lane)

            account = turn.lanes.account
            account.last_failure = self._wall_clock()
            if turn.begun >= lane.failed_at:  # those that were under way together count once
                lane.failures += 1
                account.failures_in_a_row += 1
            guess = failure.rule.asked_last_for or min(MAX_GUESS, config.backoff(lane.failures))
            lane.verdict = failure.verdict
            lane.failed_at = now
            lane.later_until = now + guess
            lane.ready_at = max(lane.ready_at, now + (failure.hint or 0.0))
            failure.is_free = is_limit and lane.is_alive(now, config.max_delay)

    def _be_careful(self, candidate: Candidate, limited: Lane) -> None:
        """The other models of an account may have a limit, too."""
        account = (candidate.row.name, candidate.key)
        if account not in self._careful:
            self._careful.add(account)
            for key, lane in self._lanes.items():
                if key[:2] == account and lane is not limited:
                    lane.be_careful()

    def turns(self, candidates: Iterable[Candidate]) -> List[Turn]:
        """The turns of a new question, each with the lanes that it is in."""
        turns = []
        with self._lock:
            self._catch_up()
            for candidate in candidates:
                name, key = candidate.row.name, candidate.key
                lanes = Lanes(
                    model=self._lane(name, key, candidate.model),
                    account=self._lane(name, key, ""),
                    provider=self._lane(name, "", ""),
                )
                turns.append(Turn(candidate, lanes))
        return turns

    def wait_for_server(self, candidate: Candidate) -> float:
        """Seconds until the server wants to be asked again, 0 if it did not say."""
        (turn,) = self.turns([candidate])
        return max(0.0, max(lane.ready_at for lane in turn.lanes) - self._clock())

    def of_account(self, name: str, key: str, has_key: bool) -> ProviderHealth:
        """What is known of a provider's account, by its latest failure since its last success."""
        with self._lock:
            now = self._catch_up()
            known = self._lanes.get((name, key, ""), Lane())
            host = self._lanes.get((name, "", ""), Lane())
            lanes = [lane for lane in self._lanes_of(name, key) if lane.failures]
        latest = max(lanes, key=lambda lane: lane.failed_at, default=Lane())
        left = max(latest.ready_at, latest.later_until) - now
        health = ProviderHealth(
            last_success=known.last_success,
            last_failure=known.last_failure,
            consecutive_failures=known.failures_in_a_row,
        )
        is_denied = latest.verdict is Verdict.DENIED and known.failures_in_a_row > 0
        if not has_key or is_denied:
            health.status = ProviderStatus.UNAVAILABLE
        elif known.failures_in_a_row == 0 and not host.failures:
            pass  # it is healthy
        elif latest.verdict is Verdict.RATE_LIMITED:
            health.rate_limit_reset_time = self._wall_clock() + left
            if left > 0:
                health.status = ProviderStatus.RATE_LIMITED
        else:
            health.status = ProviderStatus.FAILED
        return health

    def search(self, name: str) -> Optional[float]:
        """Whether to fetch a provider's models list.

        0: fetch it now; more: another question is fetching it, look again after so many seconds;
        None: it was fetched, or could not be had, a short time ago.
        """
        with self._lock:
            now = self._catch_up()
            lane = self._lane(name, "", "")
            if now < lane.searching_until:
                return HOLD
            if now < lane.search_again_at:
                return None
            lane.searching_until = now + CHECK_TIMEOUT + CONNECT_TIMEOUT
            return 0.0

    def searched(self, name: str, is_known: bool) -> None:
        """A provider's models list is known, or it could not be had."""
        with self._lock:
            now = self._catch_up()
            lane = self._lane(name, "", "")
            lane.searching_until = now
            lane.search_again_at = now + (LIST_PAUSE if is_known else MAX_GUESS)

    def question_begins(self) -> None:
        """A question begins."""
        with self._lock:
            self._catch_up()
            self._open += 1

    def question_ends(self, trail: Sequence[Attempt], is_answered: bool) -> None:
        """Note that a question has ended; it counts in the statistics."""
        self._news.append(functools.partial(self._add, tuple(trail), is_answered))

    def counts(self) -> Dict[str, int]:
        """The statistics, by name."""
        with self._lock:
            self._catch_up()
            return dict(self._counts)

    def reset_counts(self) -> None:
        """Set all statistics to zero."""
        with self._lock:
            self._catch_up()
            self._counts = dict.fromkeys(STATISTICS, 0)

    def _catch_up(self) -> float:
        """Handle the news; returns the time. Whoever calls this has the lock."""
        if not self._is_catching_up:  # a signal handler may have come in between
            self._is_catching_up = True
            try:
                while self._news:
                    self._news[0]()
                    self._news.popleft()
            finally:
                self._is_catching_up = False
        return self._clock()

    def _lane(self, name: str, key: str, model: str) -> Lane:
        """The lane of a model, or of all models, keys or both, which "" stands for."""
        lane = self._lanes.get((name, key, model))
        if lane is None:
            if len(self._lanes) >= MOST_LANES:
                self._forget_idle_lanes()
            lane = self._lanes[name, key, model] = Lane()
            if (name, key) in self._careful:
                lane.be_careful()
        return lane

    def _lanes_of(self, name: str, key: str) -> List[Lane]:
        """All lanes of an account and of its provider as a whole."""
        lanes = []
        for (owner, account, _), lane in list(self._lanes.items()):
            if owner == name and account in ("", key):
                lanes.append(lane)
        return lanes

    def _forget_idle_lanes(self) -> None:
        """Forget lanes that nobody is in, and that nobody has to wait for."""
        now = self._clock()
        for key, lane in list(self._lanes.items()):
            if lane.is_idle(now):
                del self._lanes[key]
        self._careful &= {key[:2] for key in self._lanes}

    def _request_ends(self, turn: Turn) -> None:
        """A request is not under way any more, and nobody is trying the candidate."""
        now = self._clock()
        for lane in turn.lanes:
            lane.leased_until = min(lane.leased_until, now)
        if not turn.is_granted:
            for lane in turn.paced_lanes:
                lane.ended()

    def _forgive(self, turn: Turn, at: float) -> None:
        """Forget the failures before the request that succeeded, not those since then."""
        for lane in turn.lanes:
            lane.short_shares = 0
            if lane.failed_at <= turn.begun:
                lane.forgive()
        account = turn.lanes.account
        account.last_success = at
        lanes = self._lanes_of(turn.candidate.row.name, turn.candidate.key)
        if all(lane.failed_at <= turn.begun for lane in lanes):
            account.failures_in_a_row = 0

    def _add(self, trail: Sequence[Attempt], is_answered: bool) -> None:
        """Add a question to the statistics."""
        self._open = max(0, self._open - 1)
        self._counts["total_requests"] += 1
        self._counts["successful_requests" if is_answered else "failed_requests"] += 1
        for attempt in trail:
            if attempt.status == 429:
                self._counts["rate_limited_requests"] += 1
        for before, after in zip(trail, trail[1:]):
            if before.provider != after.provider:
                self._counts["provider_switches"] += 1


STATISTICS = (
    "total_requests",
    "successful_requests",
    "failed_requests",
    "rate_limited_requests",
    "provider_switches",
)


# --- 7. Roster and Queue: who can be asked, who is next, and how long to wait -------------------


class Roster:
    """Who can be asked, and how: what the attributes of a client say.

    `change` sets them; lists and dicts may also be changed in place, so they are checked again
    when they are used.
    """

    retry_config: RetryConfig
    timeout: Optional[float]
    idle_timeout: Optional[float]

    def __init__(
        self, providers: Optional[Sequence[Provider]], api_keys: Mapping[str, Optional[str]]
    ) -> None:
        settings = Settings()
        self.all_rows: Dict[str, Provider] = {}
        self.models: Dict[str, List[str]] = {}
        self.api_keys: Dict[str, Optional[str]] = {}
        self.given_keys = dict(api_keys)  # to the constructor
        self._problems = settings.problems
        self._found: Dict[str, Tuple[str, str]] = {}  # keys, and where they were found
        self._flaws: Dict[str, str] = {}  # of rows of the environment; they matter when asked

        for row in PROVIDERS if providers is None else providers:
            if not isinstance(row, Provider):
                raise ValueError(f"providers must be rows (Provider), not {quoted(row)}")
            self._add(dataclasses.replace(row, base_url=address_of(row)), settings)
        self.fallback_order = list(self.all_rows)
        if providers is None:
            self._add_rows_of_environment(settings)

        for name, given in self.given_keys.items():
            (row,) = self.rows([name], "api_keys")
            self.api_keys[row.name] = given
            self.check_keys(self.api_keys)
            if given and is_clear_text(row.base_url):
                name = row.variable("BASE_URL")
                raise ValueError(f"{name} must be https://... for a provider with a key")

    def _add(self, row: Provider, settings: Settings) -> None:
        """Add a row, with its key and models."""
        self.all_rows[row.name] = row
        self.models[row.name] = settings.models(row)
        key, source = settings.find(row.key_env) if row.key_env else ("", "")
        self._found[row.name] = (key, source)
        is_set = bool(key) and not only_placeholders(key)
        self.api_keys[row.name] = key if is_set else None
        for account, _ in self.accounts_of(row):
            if is_set and account.problem:
                logger.warning("⚠️  %s", account.problem)

    def _add_rows_of_environment(self, settings: Settings) -> None:
        """Add the rows that variables make, and take the order from a variable, too."""
        for row in rows_from_environment(settings):
            try:
                row = dataclasses.replace(row, base_url=address_of(row))
            except ValueError as error:
                self._flaws[row.name] = str(error)
            self._add(row, settings)
        order = split_list(os.environ.get(ORDER_VARIABLE, ""))
        self.fallback_order = list(self.all_rows)
        if order:
            self.fallback_order = [row.name for row in self.rows(order, ORDER_VARIABLE)]

    def change(self, name: str, value: object) -> None:
        """Set an attribute. Raises ValueError, with its name, for a value that cannot be right."""
        if name == "retry_config" and not isinstance(value, RetryConfig):
            raise ValueError(f"retry_config must be a RetryConfig, not {quoted(value)}")
        if name in ("timeout", "idle_timeout") and value is not None:
            check_number(name, value)
        if name == "fallback_order":
            if not isinstance(value, (list, tuple)):
                raise ValueError(f"fallback_order must be a list, not {quoted(value)}")
            self.rows(value, name)
        if name == "api_keys":
            self.check_keys(value)
        if name == "models":
            self.check_models(value)
        setattr(self, name, value)

    def rows(self, names: Names = None, what: str = "provider") -> List[Provider]:
        """The rows of these providers, None for all, in their order. Raises ValueError."""
        wanted: Any = names
        if names is None:
            wanted = self.fallback_order
            what = "fallback_order"
        if isinstance(wanted, str):
            wanted = wanted.split(",")
        if not isinstance(wanted, Iterable):
            wanted = [wanted]
        found = [name.strip().lower() if isinstance(name, str) else name for name in wanted]
        for name in found:
            self._check_name(name, what)
        if not found:
            self._check_name("", what)
        return [self.all_rows[name] for name in dict.fromkeys(found)]

    def _check_name(self, name: object, what: str) -> None:
        """Raise ValueError unless this is the name of a provider."""
        if not isinstance(name, str) or name not in self.all_rows:
            known = ", ".join(self.all_rows)
            raise ValueError(f"{what} must be one or more of {known}, not {quoted(name)}")

    def check_keys(self, keys: object) -> None:
        """Raise ValueError unless these can be the keys of the providers."""
        if not isinstance(keys, dict):
            raise ValueError(f"api_keys must be a dict, not {type(keys).__name__}")
        for name, text in list(keys.items()):
            self._check_name(name, "api_keys")
            if text is not None and not isinstance(text, str):
                raise ValueError(f"api_keys[{name!r}] must be text, not {type(text).__name__}")

    def check_models(self, models: object) -> None:
        """Raise ValueError unless these can be the models of the providers."""
        if not isinstance(models, dict):
            raise ValueError(f"models must be a dict, not {quoted(models)}")
        for name, ids in list(models.items()):
            self._check_name(name, "models")
            check_models(f"models[{name!r}]", ids)

    def models_of(self, row: Provider) -> List[str]:
        """The models of a provider."""
        return self.models.get(row.name, [])

    def accounts_of(self, row: Provider) -> List[Tuple[Account, str]]:
        """The accounts of a provider, each with its key. Raises ValueError."""
        self.check_keys(self.api_keys)
        text = self.api_keys.get(row.name) or ""
        source = "api_keys"
        if self._found[row.name][0] == text:
            source = self._found[row.name][1]
        parts = [stripped(part) for part in text.split(",")]
        keys = list(dict.fromkeys(key for key in parts if key)) or [""]
        accounts = []
        for number, key in enumerate(keys, 1):
            label = row.name
            if len(keys) > 1:
                label = f"{row.name} (key {number})"
            account = Account(row.name, number, label, self._problem(row, key), source)
            accounts.append((account, key))
        return accounts

    def accounts(self, names: Names = None) -> List[Account]:
        """The accounts of these providers, in the order in which they are asked."""
        accounts: List[Account] = []
        for row in self.rows(names):
            accounts.extend(account for account, _ in self.accounts_of(row))
        return accounts

    def all_keys(self) -> List[str]:
        """The keys of all providers."""
        keys: List[str] = []
        for row in self.all_rows.values():
            keys.extend(key for _, key in self.accounts_of(row))
        return keys

    def _problem(self, row: Provider, key: str) -> str:
        """Why a provider cannot be asked with this key, "" if it can."""
        if row.name in self._flaws:
            return self._flaws[row.name]
        if not key and row.key_env is None:
            return ""
        name = row.key_env or f"the key of {row.name}"
        if key and is_clear_text(row.base_url):
            return f"{name} would go to {host_of(row.base_url)} in clear text (http://)"
        flaw = flaw_of(key)
        if not key and self._found[row.name][0]:
            flaw = "holds a placeholder"
        if flaw and row.key_url:
            flaw += f" → get a key: {row.key_url}"
        return f"{name} {flaw}" if flaw else ""

    def _without_keys(self, rows: Sequence[Provider]) -> str:
        """The message that none of these rows can be asked, with what to do."""
        names = [row.name for row in rows]
        problems = [f"   {account.label}: {account.problem}" for account in self.accounts(names)]
        others = [a.label for a in self.accounts(list(self.all_rows)) if not a.problem]
        if others:
            advice = f"   {', '.join(others)} could answer → try without provider"
            return "\n".join([f"No usable key for {', '.join(names)}", *problems, advice])

        lines = ["No API keys found! Please set environment variables:"]
        lines.append("   " + ", ".join(row.key_env or row.name for row in rows))
        lines.extend(problems)
        unfinished = [row for row in rows if self._found[row.name][0]]
        best = min(rows, key=lambda row: (row not in unfinished, not row.key_note))
        if best.key_env:
            note = f" ({best.name}: {best.key_note})" if best.key_note else ""
            lines.append(
                f"   One is enough{note}: export {best.key_env}=...   (or put it into .env)"
            )
        lines.extend(f"   {problem}" for problem in self._problems)
        return "\n".join(lines)

    def candidates(self, names: Names = None, model: Optional[str] = None) -> List[Candidate]:
        """Whom to ask, in this order. A model may be "provider:model".

        Raises ValueError, and NoProviderError if none of these providers can be asked.
        """
        self.check_models(self.models)
        if model is not None:
            names, model = self._model_of(names, model)
        rows = self.rows(names)
        if model is not None:
            listing = [row for row in rows if model in self.models_of(row)]
            rows = [row for row in listing if self.candidates_of(row, [model])] or rows

        candidates: List[Candidate] = []
        for row in rows:
            models = self.models_of(row) if model is None else [model]
            candidates.extend(self.candidates_of(row, models))
        if not candidates and any(not account.problem for account in self.accounts(names)):
            names_of_rows = ", ".join(row.name for row in rows)
            raise ValueError(f"models must name one: {names_of_rows} has none")
        if not candidates:
            raise NoProviderError(self._without_keys(rows))
        return candidates

    def candidates_of(self, row: Provider, models: Sequence[str]) -> List[Candidate]:
        """These models of a provider, each with all keys before the next one."""
        accounts = [(account, key) for account, key in self.accounts_of(row) if not account.problem]
        candidates = []
        for place, model in enumerate(models, 1):
            position = f"{place}/{len(models)}"
            for account, key in accounts:
                candidates.append(Candidate(row, model, position, account, key))
        return candidates

    def _model_of(self, names: Names, model: str) -> Tuple[Names, str]:
        """The providers to ask for a model, which may be "provider:model", and its id."""
        if not isinstance(model, str) or is_blank(model) or KEY_PREFIX.search(model):
            raise ValueError(f"model must be the id of a model, not {quoted(model, 60)}")
        prefix, colon, rest = model.partition(":")
        prefix = prefix.strip().lower()
        is_listed = any(model in ids for ids in list(self.models.values()))
        if colon and prefix in self.all_rows:
            if names is not None and self.all_rows[prefix] not in self.rows(names):
                raise ValueError(f"model {quoted(model, 60)} is not of the chosen provider")
            names = prefix
            model = rest.strip()
        elif colon and names is None and not is_listed:
            near = nearest(prefix, list(self.all_rows))
            if near:
                raise ValueError(f"model {quoted(model, 60)}: did you mean {near}:{rest}?")
        if not model or "," in model:
            allowed = "the id of one model, such as groq:openai/gpt-oss-20b"
            raise ValueError(f"model must be {allowed}, not {quoted(prefix + ':' + model, 60)}")
        return names, model

    def nearest_model(self, candidate: Candidate) -> str:
        """What may have been meant by a model that is gone, "" if nothing is like it."""
        provider, slash, rest = candidate.model.partition("/")
        if slash and rest in self.models.get(provider, ()):
            return f"{provider}:{rest}"
        listed = self.models_of(candidate.row)
        if candidate.model in listed:
            return ""
        return nearest(candidate.model, listed)


LONGEST_HOLD = 5.0  # seconds
LOOK_LATER = 0.01  # seconds for each refusal: others probe first
MIN_SHARE = 0.1  # seconds; an attempt that gets less is not worth a request


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
        self._half_time = (clock() + deadline) / 2  # our own pacing holds nobody longer
        self._line = health.turns(candidates)
        self._health = health
        self._config = config
        self._clock = clock
        self._chance = chance
        self._anybody_reached = False

    @contextlib.contextmanager
    def next(self) -> Iterator[Optional[Turn]]:
        """Whose turn it is, to be asked or, if it has a delay, waited for; None: nobody is left.

        Whoever is asked has a slot, which is given back at the end of the `with`, whatever happens.
        """
        line = list(self._line)
        try:
            yield self._health.choose(line, self._pick)
        finally:
            self._health.give_back(line)

    def deadline_for(self, asked: Turn) -> float:
        """The end of an attempt: half of the time that is left, if others will be ready in it."""
        now = self._clock()
        time_left = self.deadline - now
        share = time_left / 2
        if math.isinf(share) or share < MIN_SHARE:
            return self.deadline
        for turn in self._available():
            if turn is not asked and turn.wait < time_left - MIN_SHARE:
                return now + share
        return self.deadline

    def failed(self, asked: Turn, failure: Failure) -> None:
        """Drop the turns that a failure affects, move them to the end, or leave them in place."""
        now = self._clock()
        if failure.cause is not Cause.UNREACHABLE:
            self._anybody_reached = True
        if failure.cause in (Cause.STALE, Cause.OPTIONS) and not asked.had_second:
            asked.had_second = True
            if failure.cause is Cause.STALE:
                asked.attempts += 1
            return

        end = 1 + max(turn.place for turn in self._line)
        jitter = 0.8 + 0.2 * self._chance() if self._config.jitter else 1.0
        reached = asked.lanes.of(failure.reach)
        twins = twins_of(asked, self._line) if failure.rule.holds_for_all_keys else [asked]
        for turn in list(self._line):
            is_sibling = turn.candidate.row is asked.candidate.row
            if failure.cause is Cause.SILENCE and is_sibling:
                turn.place = end
            if turn in twins or reached in turn.lanes:
                self._punish(turn, failure, jitter, now, end)
        if asked.place == end:
            asked.place = end + 1  # behind its siblings

    def add(self, candidates: Iterable[Candidate]) -> bool:
        """Put new candidates into the line; whether there are any."""
        turns = self._health.turns(candidates)
        self._line[:0] = turns
        return bool(turns)

    def _punish(self, turn: Turn, failure: Failure, jitter: float, now: float, end: int) -> None:
        """Put a turn out of the line, or at its end, or let it wait where it is."""
        if not failure.rule.asked_again:
            self._line.remove(turn)
            return
        if failure.is_free and turn.free < FREE_REFUSALS:
            turn.free += 1
        else:
            turn.attempts += 1

        due = self._config.backoff(max(1, turn.attempts))
        wait = max(due * jitter, failure.hint or 0.0)
        turn.ready_at = now + wait
        is_limit = failure.verdict is Verdict.RATE_LIMITED and self._config.wait_on_rate_limit
        if is_limit and wait <= due:
            turn.patience = due
        else:
            turn.patience = 0.0
            turn.round = turn.attempts
            turn.place = end

    def _available(self) -> List[Turn]:
        """Those who have attempts left, in the order of the line."""
        most = self._config.max_attempts
        if not self._anybody_reached:
            most = min(most, 2)  # our own network is down: one more round, then stop
        turns = [turn for turn in self._line if turn.attempts < most]
        turns.sort(key=lambda turn: (turn.round, turn.place, turn.is_later))
        return turns

    def _pick(self, now: float) -> Optional[Turn]:
        """The first who is worth the wait, or else who is ready soonest; None: not in time."""
        time_left = self.deadline - now
        longest = min(self._config.max_delay, time_left - 0.001)
        turns = self._available()
        if time_left <= 0 or not turns:
            return None

        for turn in turns:
            self._apply_pacing(turn, now)
        chosen = min(turns, key=lambda turn: turn.delay)
        for turn in turns:
            patience = min(turn.patience, time_left / 2)
            if turn.is_opening:
                patience = max(patience, turn.hold)
            if turn.delay <= min(patience, longest):
                chosen = turn
                break
        # The same model with another key may be ready sooner.
        chosen = min(twins_of(chosen, turns), key=lambda turn: turn.delay)
        if chosen.wait > longest:
            return None
        return chosen

    def _apply_pacing(self, turn: Turn, now: float) -> None:
        """When a turn that our pacing holds looks again; 0: our pacing would be in the way."""
        if turn.hold > 0:
            # Whoever was refused does not go first.
            later = LOOK_LATER * (turn.attempts + turn.free)
            turn.hold = min(turn.hold, LONGEST_HOLD) + later
        if now + turn.hold > self._half_time:
            turn.hold = 0.0


def twins_of(turn: Turn, line: Sequence[Turn]) -> List[Turn]:
    """The turns of the same model, one for each key."""
    row, model = turn.candidate.row, turn.candidate.model
    return [t for t in line if t.candidate.row is row and t.candidate.model == model]


# --- 8. FallbackLLM: the public methods and the walk --------------------------------------------

ANSWER_CUT = "✂️  answer cut at max_tokens"
Item = TypeVar("Item")
Result = TypeVar("Result")
Value = TypeVar("Value")
Outcome = Union[Answer, FallbackLLMError, ValueError]  # of one question among many
# A models list also holds models that do not chat.
NOT_CHAT = re.compile("whisper|tts|speech|audio|embed|rerank|image|ocr")
MOST_REPLACEMENTS = 5  # models of a provider's list that take the place of those that are gone


class Trail:
    """What has happened to one question so far: noted, and told in the documented log lines.

    Each line is logged only once, and each error once per model, unless it is a retry.
    """

    def __init__(self, config: RetryConfig, cancelled: threading.Event, clock: Clock) -> None:
        self.attempts: List[Attempt] = []
        self.failures: Dict[str, Tuple[Candidate, Failure]] = {}  # the last of each account
        self.draft = Draft("", is_live=False)  # of the current attempt
        self._config = config
        self._cancelled = cancelled  # nobody listens any more
        self._started = clock()
        self._clock = clock
        self._waited = 0.0  # since the last attempt
        self._told: Set[Tuple[str, str]] = set()
        self._last: Optional[Candidate] = None  # of those that failed
        self._provider = ""

    @property
    def is_shown(self) -> bool:
        """Whether text of the current attempt has been given out, which cannot be taken back."""
        return self.draft.is_live and bool(self.draft.texts)

    def waiting(self, turn: Turn) -> None:
        """A question waits for this turn."""
        self._waited += turn.delay
        if turn.wait < turn.delay:
            return  # our own pacing
        if turn.attempts or turn.requests:
            self._tell(f"⏳ Waiting {turn.wait:.2f}s before retry...", again=True)
        else:
            label = turn.candidate.label
            self._tell(f"⏳ Waiting {turn.wait:.2f}s: {label} is rate-limited", again=True)

    def asking(self, turn: Turn, draft: Draft) -> None:
        """A candidate is asked now."""
        self.draft = draft
        turn.requests += 1
        candidate = turn.candidate
        if self._last is not None and self._last != candidate:
            self._tell(f"🔄 {self._last.label} {self._last.model} failed, trying next model...")
        if candidate.row.name != self._provider:
            self._tell(f"🔄 Trying provider: {candidate.row.name}")
        if candidate != self._last:
            where = f"{candidate.label} model {candidate.position}"
            self._tell(f"🎯 Trying {where}: {candidate.model}")
        self._provider = candidate.row.name

    def answered(self, turn: Turn) -> Answer:
        """The current attempt gave the answer."""
        candidate = turn.candidate
        attempt = self._note(turn, None)
        line = f"✅ Success with {candidate.label} {candidate.model} on attempt {attempt.number}"
        self._tell(line, attempt=attempt)
        if is_cut(self.draft.finish_reason):
            self._tell(ANSWER_CUT, logging.WARNING)
        return Answer(
            text=self.draft.text,
            provider=candidate.row.name,
            model=candidate.model,
            finish_reason=self.draft.finish_reason or None,
            usage=self.draft.usage,
            attempts=tuple(self.attempts),
            elapsed=self._clock() - self._started,
        )

    def failed(self, turn: Turn, failure: Failure) -> None:
        """The current attempt failed."""
        candidate = turn.candidate
        attempt = self._note(turn, failure)
        self.failures[candidate.label] = (candidate, failure)
        is_final = self.is_shown or failure.verdict is Verdict.REFUSED
        if not is_final:  # else an exception tells it
            line = f"❌ Error in {candidate.label} API request: {failure.reason}"
            model = candidate.model
            if failure.cause is Cause.UNREACHABLE:
                model = ""
            is_retry = candidate == self._last
            self._tell(line, logging.WARNING, model, again=is_retry, attempt=attempt)
        self._last = candidate
        if failure.verdict is Verdict.DENIED and candidate.row.key_env:
            line = f"🔑 Check {candidate.row.key_env} and the account: {candidate.row.key_url}"
            self._tell(line.rstrip(": "), logging.WARNING)
        used = turn.attempts + 1
        is_over = failure.rule.asked_again and used >= self._config.max_attempts
        if is_over and used > 1 and not failure.is_free and not self.is_shown:
            line = f"🔄 {candidate.label} {candidate.model} exhausted all {used} retry attempts"
            self._tell(line)

    def _note(self, turn: Turn, failure: Optional[Failure]) -> Attempt:
        """Add an attempt that has ended to the trail."""
        draft = self.draft
        attempt = Attempt(
            provider=turn.candidate.row.name,
            model=turn.candidate.model,
            number=turn.requests,
            status=draft.status,
            verdict=failure.verdict if failure else None,
            reason=failure.reason if failure else "",
            waited=self._waited,
            elapsed=self._clock() - turn.begun,
            key=turn.candidate.account.number,
            request_id=draft.request_id,
        )
        self.attempts.append(attempt)
        self._waited = 0.0
        if logger.isEnabledFor(logging.DEBUG):
            self._tell(details_of(attempt, failure, draft.usage), logging.DEBUG, again=True)
        return attempt

    def was_asked(self, candidate: Candidate) -> bool:
        """Whether a candidate was asked, or a failure of its account stands for it."""
        known = self.failures.get(candidate.label)
        if known is not None and known[1].reach is not Reach.MODEL:
            return True
        name, model = candidate.row.name, candidate.model
        return any(a.provider == name and a.model == model for a in self.attempts)

    def gone_models(self, provider: str) -> Set[str]:
        """The models of a provider that turned out to be gone."""
        gone = set()
        for attempt in self.attempts:
            if attempt.provider == provider and attempt.verdict is Verdict.GONE:
                gone.add(attempt.model)
        return gone

    def _tell(
        self,
        line: str,
        level: int = logging.INFO,
        model: str = "",
        again: bool = False,
        attempt: Optional[Attempt] = None,
    ) -> None:
        """Log a line, unless it was told before or nobody listens any more."""
        if self._cancelled.is_set():
            return
        if again or (model, line) not in self._told:
            self._told.add((model, line))
            logger.log(level, "%s", line, extra={"attempt": attempt})


def details_of(attempt: Attempt, failure: Optional[Failure], usage: Json) -> str:
    """What else is known of an attempt, in one line."""
    details = [f"{attempt.elapsed:.2f} s"]
    if attempt.status is not None:
        details.insert(0, f"HTTP {attempt.status}")
    if failure is not None:
        details.append(failure.verdict.value)
    if failure is not None and failure.hint is not None:
        details.append(f"the server asks to wait {failure.hint:.3g} s")
    if attempt.request_id:
        details.append(f"request id {attempt.request_id}")
    for name in ("prompt_tokens", "completion_tokens"):
        if name in usage:
            details.append(f"{usage[name]} {name.replace('_', ' ')}")
    return "   " + ", ".join(details)


def duration_words(seconds: float) -> str:
    """A duration as a person would say it."""
    seconds = math.ceil(seconds)
    for length, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        count = round(seconds / length)
        if count > 1 or (unit == "hour" and seconds >= 3600):
            return f"{count} {unit}{'' if count == 1 else 's'}"
    return f"{seconds} s"


class Workers(Generic[Item, Result]):
    """Threads that call a function. They are daemons: nobody has to wait for them at the end."""

    def __init__(self, function: Callable[[Item], Result], most: int) -> None:
        self._function = function
        self._most = most
        self._threads: List[threading.Thread] = []
        self._todo: queue.SimpleQueue[Optional[Tuple[int, Item]]] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Tuple[int, Union[Result, Raised]]] = queue.SimpleQueue()

    def submit(self, number: int, item: Item) -> None:
        """Have the function called for the item."""
        self._todo.put((number, item))
        if len(self._threads) < self._most:
            thread = threading.Thread(target=self._work, daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no more threads can be started: those that run must do
                self._most = max(1, len(self._threads))
            else:
                self._threads.append(thread)

    def next_result(self) -> Tuple[int, Result]:
        """The number and the result of a call that has ended; its exception is raised."""
        if not self._threads:
            self._todo.put(None)
            self._work()
        number, result = self._done.get()
        if isinstance(result, Raised):
            raise result.error
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
        for task in iter(self._todo.get, None):
            number, item = task
            try:
                self._done.put((number, self._function(item)))
            except BaseException as error:  # noqa: BLE001 - next_result raises it
                self._done.put((number, Raised(error)))


class Raised(NamedTuple):
    """What a call of a function has raised."""

    error: BaseException


def work_through(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int
) -> Iterator[Result]:
    """The results of the function, in the order of the items, from so many threads.

    The items are read only as far as needed: `ahead` for each worker. An exception raised by the
    function is re-raised immediately; one raised by the items, after the results so far.
    """
    pool = Workers(function, workers)
    numbered: Iterator[Tuple[int, Item]] = enumerate(items)
    results: Dict[int, Result] = {}
    problem: Optional[Exception] = None  # of the items
    submitted = 0
    given = 0
    try:
        while True:
            try:
                room = given + ahead * workers - submitted
                for number, item in itertools.islice(numbered, room):
                    pool.submit(number, item)
                    submitted += 1
            except Exception as error:  # noqa: BLE001 - it is raised after the results
                problem = error
                numbered = iter(())
            if given == submitted and problem is not None:
                raise problem
            if given == submitted:
                return
            while given not in results:
                number, result = pool.next_result()
                results[number] = result
            yield results.pop(given)
            given += 1
    finally:
        pool.stop()


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
class Shared:
    """What the questions of one client share."""

    roster: Roster
    health: Health
    transport: Transport
    clock: Clock
    sleep: Callable[[float], object]
    chance: Clock
    without_options: Set[str] = dataclasses.field(default_factory=set)
    # without_options: the providers that refuse stream_options

    def renew(self) -> None:
        """Begin with connections and locks of its own, as each process must after a fork."""
        self.transport.renew()
        self.health.renew()

    def deadline_of_check(self, timeout: Optional[float]) -> float:
        """The end of a check that may take so long. Raises ValueError."""
        seconds = CHECK_TIMEOUT if timeout is None else check_number("timeout", timeout)
        return self.clock() + seconds

    def served(self, row: Provider, key: str, deadline: float) -> List[Json]:
        """The entries of a provider's own models list. Raises Failure if it cannot be had."""
        body = self.transport.get(row, "/models", key, deadline)
        found: Dict[str, Json] = {}
        for entry in as_list(body.get("data")):
            name = dig(entry, "id")
            if isinstance(name, str) and self.transport.safe(name, key) == name:
                found.setdefault(name, entry)
        return list(found.values())

    def check(self, row: Provider, account: Account, key: str, deadline: float) -> CheckReport:
        """Whether a key is accepted, and which of the listed models are served."""
        if account.problem:
            return CheckReport(account.label, "missing", reason=account.problem)
        started = self.clock()
        try:
            if row.key_path != "/models":
                self.transport.get(row, row.key_path, key, deadline)
            served = [entry["id"] for entry in self.served(row, key, deadline)]
            models = self.roster.models_of(row)
            report = CheckReport(
                account.label,
                served=[model for model in models if model in served],
                not_served=[model for model in models if model not in served],
            )
        except Failure as failure:
            state = "refused" if failure.verdict is Verdict.DENIED else "not checked"
            report = CheckReport(account.label, state, reason=failure.summary or failure.reason)
        return dataclasses.replace(report, seconds=round(self.clock() - started, 3))

    def model_list(self, row: Provider, deadline: float) -> ModelList:
        """The models of a provider: those that are asked, and then what else it serves."""
        account, key = self.roster.accounts_of(row)[0]
        asked = list(self.roster.models_of(row))
        served: List[str] = []
        problem = "no key" if account.problem else ""
        try:
            if not problem:
                entries = self.served(row, key, deadline)
                served = [e["id"] for e in entries if is_chat_model(e, row.free_only)]
                kind = "free model" if row.free_only else "chat model"
                problem = "" if served else f"no {kind} in its own list"
        except Failure as failure:
            problem = failure.summary or failure.reason
            if failure.cause in (Cause.SILENCE, Cause.TIME_LIMIT):
                problem = f"no reply within {number_of(CHECK_TIMEOUT)} s"
        models = [model for model in asked if model in served or not served]
        models.extend(model for model in served if model not in asked)
        return ModelList(row.name, models, asked, problem)


FORKED: weakref.WeakSet[Shared] = weakref.WeakSet()  # renewed in each new process


def renew_all() -> None:
    """Give all clients of this process connections and locks of their own.

    Two processes that read from one socket would get each other's answers.
    """
    for shared in FORKED:
        shared.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=renew_all)


class Walk:
    """One question's walk over its candidates."""

    def __init__(
        self,
        question: Question,
        candidates: List[Candidate],
        shared: Shared,
        cancelled: threading.Event,
        is_live: bool = False,
    ) -> None:
        roster = shared.roster
        timeout = roster.timeout if question.timeout is None else question.timeout
        self._question = question
        self._candidates = candidates
        self._shared = shared
        self._config = roster.retry_config
        self._timeout = math.inf if timeout is None else timeout
        self._cancelled = cancelled
        self._is_live = is_live

    def run(self) -> Generator[str, None, Answer]:
        """Ask whoever is next until one answers; live text comes out as it comes in."""
        self._trail = Trail(self._config, self._cancelled, self._shared.clock)
        is_answered = False
        try:
            self._begin()
            while True:
                with self._queue.next() as turn:
                    if self._cancelled.is_set():
                        raise self._all_failed()
                    if turn is None:
                        self._find_more_or_fail()
                    elif turn.delay > 0:
                        # After the wait the question looks again at all of them.
                        self._trail.waiting(turn)
                        self._shared.sleep(turn.delay)
                    else:
                        failure = yield from self._attempt(turn)
                        if failure is None:
                            is_answered = True
                            return self._trail.answered(turn)
                        self._trail.failed(turn, failure)
                        self._raise_if_final(turn, failure)
                        self._queue.failed(turn, failure)
        except GeneratorExit:
            is_answered = self._trail.is_shown  # whoever closes a stream has read enough
            raise
        finally:
            self._shared.health.question_ends(self._trail.attempts, is_answered)

    def _begin(self) -> None:
        """Start the clock of the question: a stream may be read long after it was made."""
        shared = self._shared
        shared.health.question_begins()
        self._deadline = shared.clock() + self._timeout
        self._queue = Queue(
            self._candidates,
            self._deadline,
            shared.health,
            self._config,
            shared.clock,
            shared.chance,
        )

    def _attempt(self, turn: Turn) -> Generator[str, None, Optional[Failure]]:
        """One exchange, and what is learned from it: why it gave no answer, None if it did."""
        health = self._shared.health
        draft = Draft(turn.candidate.model, self._is_live)
        self._trail.asking(turn, draft)
        failure: Optional[Failure] = None
        try:
            with contextlib.closing(self._conversation(turn, draft)) as pieces:
                for piece in pieces:
                    if piece and not turn.is_granted:
                        health.granted(turn)
                    if piece and self._is_live:
                        yield piece
            failure = self._rejection(turn, draft.text)
        except Failure as caught:
            failure = caught
        except GeneratorExit:
            if draft.texts:
                health.answered(turn)
            raise

        is_limit = failure is not None and failure.verdict is Verdict.RATE_LIMITED
        if not turn.is_granted and draft.status is not None and not is_limit:
            health.granted(turn)  # no quota has refused it
        self._learn(turn, failure)
        return failure

    def _rejection(self, turn: Turn, text: str) -> Optional[Failure]:
        """The failure of an answer that the caller does not accept."""
        accept = self._question.accept
        if accept is None:
            return None
        try:
            if accept(text):
                return None
            reason = "the answer was not accepted"
        except (ValueError, LookupError, TypeError, StopIteration) as error:
            # As json.loads(text)["x"] raises them; what they say may hold anything.
            reason = f"the answer was not accepted: {error}"
        reason = self._shared.transport.safe(reason, turn.candidate.key)
        return Failure(Verdict.REJECTED, reason)

    def _learn(self, turn: Turn, failure: Optional[Failure]) -> None:
        """Remember for later questions how an attempt ended."""
        if failure is None or failure.verdict is Verdict.REJECTED:
            self._shared.health.answered(turn)
            return
        self._shared.health.failed(turn, failure, self._config)
        if failure.cause is Cause.OPTIONS:
            self._shared.without_options.add(turn.candidate.row.name)

    def _conversation(self, turn: Turn, draft: Draft) -> Generator[str, None, None]:
        """The text of an answer as it comes. Raises Failure."""
        candidate = turn.candidate
        deadline = self._queue.deadline_for(turn)
        idle_timeout = self._shared.roster.idle_timeout or candidate.row.idle_timeout
        is_share = deadline < self._deadline
        limit = TimeLimit(self._shared.clock, deadline, idle_timeout, is_share)
        with_options = candidate.row.name not in self._shared.without_options
        defaults = candidate.row.parameters_for(candidate.model)
        body = self._question.body(candidate.model, defaults, with_options)
        pieces = self._shared.transport.converse(candidate.row, candidate.key, body, draft, limit)
        with contextlib.closing(pieces):
            for piece in pieces:
                if piece and self._is_live:
                    limit.extend(self._deadline)  # it cannot be taken back
                yield piece

    def _raise_if_final(self, turn: Turn, failure: Failure) -> None:
        """Raise the error of a failure that ends the question, whoever else might answer."""
        name, model = turn.candidate.row.name, turn.candidate.model
        attempts = self._trail.attempts
        if self._trail.is_shown:
            raise StreamInterrupted(
                f"{turn.candidate.label} {model} broke off: {failure.reason}",
                attempts,
                partial=self._trail.draft.text,
                provider=name,
                model=model,
            )
        if failure.verdict is Verdict.REFUSED:
            message = f"{turn.candidate.label} refused the question: {failure.reason}"
            raise AnswerRefused(message, attempts, reason=failure.reason)

    def _find_more_or_fail(self) -> None:
        """Fetch the models lists of providers whose models are all gone, for others to ask.

        Raises AllProvidersFailed if there are none.
        """
        rows = dict.fromkeys(candidate.row for candidate in self._candidates)
        for row in rows:
            asked = {c.model for c in self._candidates if c.row is row}
            gone = self._trail.gone_models(row.name)
            if self._question.model is not None or not gone or asked - gone:
                continue
            self._search(row, gone)
            models = self._shared.roster.models_of(row)
            found = self._shared.roster.candidates_of(row, models)
            new = [candidate for candidate in found if candidate.model not in asked]
            self._candidates.extend(new)
            if self._queue.add(new):
                return
        raise self._all_failed()

    def _search(self, row: Provider, gone: Set[str]) -> None:
        """Have the models that a provider serves take the place of those that are gone.

        One question fetches the list; those that need it meanwhile wait for it.
        """
        health = self._shared.health
        models = self._shared.roster.models
        while gone.issuperset(models.get(row.name, ())) and not self._cancelled.is_set():
            wait = health.search(row.name)
            now = self._shared.clock()
            if wait is None or now + wait >= self._deadline:
                return
            if wait > 0:
                self._shared.sleep(wait)
                continue

            served = None
            with contextlib.suppress(Failure):
                for account, key in self._shared.roster.accounts_of(row):
                    if not account.problem:
                        served = self._shared.served(row, key, (now + self._deadline) / 2)
                        break
            chatting = [e["id"] for e in served or () if is_chat_model(e, row.free_only)]
            found = [model for model in chatting if model not in gone][:MOST_REPLACEMENTS]
            if found:
                models[row.name] = found
                line = "🔎 %s: gone: %s; used instead: %s; to choose, set %s=a,b"
                gone_ids, found_ids = ", ".join(sorted(gone)), ", ".join(found)
                variable = row.variable("MODELS")
                logger.warning(line, row.name, gone_ids, found_ids, variable)
            health.searched(row.name, is_known=served is not None)

    def _all_failed(self) -> AllProvidersFailed:
        """The error of a question that nobody answered, with what to do."""
        trail = self._trail
        waits = [self._shared.health.wait_for_server(candidate) for candidate in self._candidates]
        retry_after = min([wait for wait in waits if wait > 0], default=None)
        lines = [self._headline()]
        for label, (candidate, failure) in list(trail.failures.items())[:6]:
            reason = failure.summary or failure.reason
            if len(reason) > MAX_SUMMARY:
                reason = reason[: MAX_SUMMARY - 1].rstrip() + "…"
            advice = self._advice(candidate, failure)
            lines.append(f"   {label} {candidate.model}: {reason} → {advice}")
        if retry_after is not None:
            lines.append(f"   The first rate limit ends in {duration_words(retry_after)}.")
        return AllProvidersFailed("\n".join(lines), trail.attempts, retry_after)

    def _headline(self) -> str:
        """In one sentence, what was asked, what was not, and who else could answer."""
        trail = self._trail
        accounts = self._shared.roster.accounts()
        rejected = {(a.provider, a.model) for a in trail.attempts if a.verdict is Verdict.REJECTED}
        if rejected:
            return f"{count_of(len(rejected), 'model')} answered; none was accepted"
        unasked = [c for c in self._candidates if not trail.was_asked(c)]
        chosen = {candidate.row.name for candidate in self._candidates}
        others = [a.label for a in accounts if not a.problem and a.provider not in chosen]
        is_late = self._shared.clock() >= self._deadline - 0.01
        if not unasked and not others and not is_late:
            return "All providers and models failed"

        line = "No answer"
        if is_late:
            line = f"No answer within the time limit of {number_of(self._timeout)} s"
        parts = [
            self._why_unasked(label, unasked) for label in dict.fromkeys(c.label for c in unasked)
        ]
        if others:
            limit = "provider" if self._question.model is None else "model"
            parts.append(f"without {limit}, {' or '.join(others)} could answer")
        if parts:
            line += ": " + "; ".join(parts)
        return line

    def _why_unasked(self, label: str, unasked: Sequence[Candidate]) -> str:
        """Why models of an account were not asked."""
        candidates = [candidate for candidate in unasked if candidate.label == label]
        pause = min(self._shared.health.wait_for_server(candidate) for candidate in candidates)
        if pause > 0:
            return f"{label} is rate-limited for {duration_words(pause)} more"
        return f"{count_of(len(candidates), 'model')} of {label} not asked"

    def _advice(self, candidate: Candidate, failure: Failure) -> str:
        """What to do about a failure."""
        row = candidate.row
        advice = failure.advice or failure.rule.advice
        near = self._shared.roster.nearest_model(candidate)
        if failure.verdict is Verdict.GONE and near:
            advice = f"did you mean {near}? see list_models"
        words = {
            "{key}": row.key_env or "the key",
            "{models}": row.variable("MODELS"),
            "{base_url}": row.variable("BASE_URL"),
            "{url}": row.key_url,
        }
        for mark, word in words.items():
            advice = advice.replace(mark, word)
        return advice.rstrip(": ")


def count_of(count: int, noun: str) -> str:
    """Such as "1 model" or "3 models"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


class Setting(Generic[Value]):
    """An attribute of a client that refuses a wrong value at once, with ValueError."""

    def __init__(self, words: str) -> None:
        self.__doc__ = words

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, client: Optional[FallbackLLM], owner: Optional[type] = None) -> Value:
        if client is None:
            return cast(Value, self)
        return cast(Value, getattr(client._roster, self._name))

    def __set__(self, client: FallbackLLM, value: Value) -> None:
        client._roster.change(self._name, value)


class Stream(Iterator[str]):
    """The text of an answer, piece by piece as it comes.

    When it has ended, `answer` is the Answer. Closing it early ends the request.
    """

    def __init__(self, pieces: Generator[str, None, Answer]) -> None:
        self.answer: Optional[Answer] = None  # once all pieces were read
        self._pieces = pieces
        self._is_closed = False

    def __next__(self) -> str:
        if self._is_closed:
            self._pieces.close()
        try:
            return next(self._pieces)
        except StopIteration as end:
            if end.value is not None:
                self.answer = end.value
            raise StopIteration(self.answer) from None

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the request, if it is still under way."""
        self._is_closed = True
        with contextlib.suppress(ValueError):  # another thread is reading: it closes at its next
            self._pieces.close()


class FallbackLLM:
    """Asks language models, one after the other, until one of them answers.

        llm = FallbackLLM()
        print(llm.ask("What is the capital of France?"))

    Threads may share an object. It works as a context manager, and it can be pickled. Its
    attributes may be changed at any time; a wrong value raises ValueError, at once or, in a list
    or dict that is changed, at the next question.
    """

    __slots__ = (
        "__weakref__",
        "_roster",
        "_settings",
        "_shared",
    )  # a misspelt attribute is refused

    retry_config = Setting[RetryConfig]("How often a model is asked, and how long to wait.")
    timeout = Setting[Optional[float]]("The time limit of a whole question; None: there is none.")
    idle_timeout = Setting[Optional[float]]("Seconds without progress; None: those of each row.")
    fallback_order = Setting[List[str]]("The names of the providers, in the order of asking.")
    api_keys = Setting[Dict[str, Optional[str]]]("The key of each provider, or several as 'a,b'.")
    models = Setting[Dict[str, List[str]]]("The models of each provider, in the order of asking.")

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
        if api_keys is not None and not isinstance(api_keys, Mapping):
            raise ValueError(f"api_keys must be a dict, not {type(api_keys).__name__}")
        rows = None if providers is None else tuple(providers)
        self._settings: Json = {
            "providers": rows,
            "clock": clock,
            "wall_clock": wall_clock,
            "sleep": sleep,
            "chance": chance,
        }
        self._roster = Roster(rows, api_keys or {})
        self.retry_config = RetryConfig() if retry_config is None else retry_config
        self.timeout = timeout
        self.idle_timeout = idle_timeout
        self._shared = Shared(
            roster=self._roster,
            health=Health(clock, wall_clock),
            transport=Transport(clock, wall_clock, session, self._roster.all_keys),
            clock=clock,
            sleep=sleep,
            chance=random.random if chance is None else chance,
        )
        FORKED.add(self._shared)

    def __repr__(self) -> str:
        return f"<FallbackLLM {', '.join(self.fallback_order)}>"

    def __enter__(self) -> FallbackLLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> Tuple[Any, ...]:
        """For pickle and copy: the settings, and the keys that were given."""
        arguments = {
            **self._settings,
            "timeout": self.timeout,
            "idle_timeout": self.idle_timeout,
            "api_keys": self._roster.given_keys,
        }
        make = functools.partial(type(self), self.retry_config, **arguments)
        return make, (), {"fallback_order": self.fallback_order, "models": self.models}

    def __setstate__(self, state: Json) -> None:
        self.fallback_order = list(state["fallback_order"])
        self.models = {name: list(ids) for name, ids in state["models"].items()}

    def close(self) -> None:
        """Close the connections that are kept alive."""
        self._shared.transport.close()

    @property
    def provider_health(self) -> Dict[str, ProviderHealth]:
        """What is known of each provider now, and of each key where a provider has several."""
        health: Dict[str, ProviderHealth] = {}
        states = list(ProviderStatus)
        for row in self._roster.all_rows.values():
            for account, key in self._roster.accounts_of(row):
                known = self._shared.health.of_account(row.name, key, not account.problem)
                health[account.label] = known
                best = health.setdefault(row.name, known)  # the provider is as well as its best key
                if states.index(known.status) < states.index(best.status):
                    health[row.name] = known
        return health

    def accounts(self, provider: Names = None) -> List[Account]:
        """The keys of these providers, in the order in which they are asked. Raises ValueError."""
        return self._roster.accounts(provider)

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
        extra_body: Optional[Json] = None,
        **parameters: Any,
    ) -> str:
        """The text of the answer; "" if all models failed or the question was refused.

        The reason for a failure is logged as an error. Arguments and other errors: see `complete`.
        """
        asked = Question(
            question, max_tokens, provider, model, system, messages, timeout, accept, extra_body
        )
        try:
            return self._complete(asked.updated(parameters)).text
        except (AllProvidersFailed, AnswerRefused) as error:
            headline = str(error).split("\n")[0]  # each reason was told when it was met
            logger.error("❌ %s", headline)
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
        extra_body: Optional[Json] = None,
        **parameters: Any,
    ) -> Answer:
        """The answer and how it came about.

        provider: a name or several ("groq,openrouter" or a list), asked in this order. model: the
        only model to ask, also as "provider:model". system: the system prompt. messages: a
        conversation, which the question continues. timeout: seconds for the whole question.
        accept: a function of the text; if it returns something false or raises ValueError,
        LookupError or TypeError, the next model is asked. parameters: those of the chat
        completions API, such as temperature. extra_body: what else the request shall hold.
        Raises ValueError and NoProviderError (nothing was sent), AllProvidersFailed and
        AnswerRefused.
        """
        asked = Question(
            question, max_tokens, provider, model, system, messages, timeout, accept, extra_body
        )
        return self._complete(asked.updated(parameters))

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
        extra_body: Optional[Json] = None,
        **parameters: Any,
    ) -> Stream:
        """The text, piece by piece as it comes; at its end, the stream's `answer` is the Answer.

        Arguments and errors are those of `complete`. Nothing is sent before the first piece is
        asked for. Text already yielded cannot be taken back, so a failure after the first piece
        raises StreamInterrupted, and there is no `accept`.
        """
        if "accept" in parameters:
            raise ValueError("accept is not for stream(): its text cannot be taken back")
        asked = Question(
            question, max_tokens, provider, model, system, messages, timeout, None, extra_body
        )
        walk = self._walk(asked.updated(parameters), threading.Event(), is_live=True)
        return Stream(walk.run())

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
        extra_body: Optional[Json] = None,
        **parameters: Any,
    ) -> Iterator[Outcome]:
        """Lazily yield an Answer, or the error in its place, for each question, in order.

        questions: texts, or dicts of arguments of `complete`, which win over those given here.
        Nothing is asked before the first answer is asked for. Raises ValueError.
        """
        workers = int(check_number("max_workers", max_workers))
        if isinstance(questions, (str, bytes, Mapping)) or not isinstance(questions, Iterable):
            raise ValueError(f"questions must be several, in a list, not {quoted(questions)}")
        asked = Question(
            "?", max_tokens, provider, model, system, messages, timeout, accept, extra_body
        )
        common = dataclasses.replace(asked.updated(parameters), question=None)
        with contextlib.suppress(NoProviderError):
            self._roster.candidates(common.provider, common.model)
        return self._answers(questions, workers, common)

    def validate(self, **arguments: Any) -> None:
        """Raise the ValueError or NoProviderError that `complete` would raise. Sends nothing."""
        question = Question().updated(arguments)
        self._roster.candidates(question.provider, question.model)

    def check(
        self, provider: Names = None, timeout: Optional[float] = None
    ) -> Iterator[CheckReport]:
        """Check keys and models, of all accounts at the same time; it costs no tokens.

        Yields each report as it is known. timeout: seconds for all of them together.
        """
        deadline = self._shared.deadline_of_check(timeout)
        todo: List[Callable[[], CheckReport]] = []
        for row in self._roster.rows(provider):
            for account, key in self._roster.accounts_of(row):
                todo.append(functools.partial(self._shared.check, row, account, key, deadline))
        pool: Workers[Callable[[], CheckReport], CheckReport]
        pool = Workers(lambda check: check(), len(todo))
        for number, check in enumerate(todo):
            pool.submit(number, check)
        try:
            for _ in todo:
                yield pool.next_result()[1]
        finally:
            pool.stop()

    def list_models(
        self, provider: Names = None, timeout: Optional[float] = None
    ) -> List[ModelList]:
        """The models that these providers serve: those that are asked first, in their order."""
        deadline = self._shared.deadline_of_check(timeout)
        return [self._shared.model_list(row, deadline) for row in self._roster.rows(provider)]

    def get_stats(self) -> Dict[str, int]:
        """Counts since the last reset. A request is a question; a 429 reply is rate-limited."""
        return self._shared.health.counts()

    def reset_stats(self) -> None:
        """Set all counts to zero."""
        self._shared.health.reset_counts()

    def _walk(self, question: Question, cancelled: threading.Event, is_live: bool = False) -> Walk:
        """The walk of a checked question. Raises ValueError, and NoProviderError."""
        self.retry_config.validate()
        candidates = self._roster.candidates(question.provider, question.model)
        return Walk(question, candidates, self._shared, cancelled, is_live)

    def _complete(self, question: Question, cancelled: Optional[threading.Event] = None) -> Answer:
        """The answer to a checked question."""
        walk = self._walk(question, cancelled or threading.Event()).run()
        try:
            while True:
                next(walk)
        except StopIteration as end:
            return cast(Answer, end.value)

    def _answers(
        self, questions: Iterable[Union[str, Json]], workers: int, common: Question
    ) -> Iterator[Outcome]:
        """The results of `ask_many`."""
        cancelled = threading.Event()

        def answer(asked: Union[str, Json]) -> Outcome:
            arguments = asked if isinstance(asked, dict) else {"question": asked}
            try:
                return self._complete(common.updated(arguments), cancelled)
            except (FallbackLLMError, ValueError) as error:
                return error

        try:
            yield from work_through(answer, questions, workers, ahead=4)
        finally:
            cancelled.set()  # those that are under way do not go on


# --- 9. Batch: many questions from a file to a file ---------------------------------------------

BATCH_AHEAD = 100  # questions that each worker may be ahead of a slow one
COMMON_REASONS = 3  # reasons of failed questions that are told at the end
MOST_BAD_LINES = 10  # that are told of
RECORD_START = b'{"id":'
AROUND_A_LINE = b"\xef\xbb\xbf\0 \t\r\n"  # a byte order mark; NULs, which a crash may leave
FENCE = re.compile("^[ \t]*```.*$", re.MULTILINE)
QUESTION_ID: contextvars.ContextVar[str] = contextvars.ContextVar("QUESTION_ID", default="")
# Not taken for columns of a data set: the library says why they are no arguments.
NEVER_COLUMNS = ("stream", "n", "tools", "api_key", "max_attempts", "idle_timeout")

LineId = Union[str, int]


class Line(NamedTuple):
    """A question of a batch."""

    number: int  # in the file
    id: LineId
    arguments: Json  # of `complete`
    heading: Json  # of its record: id, question or messages, fields, line_digest


@dataclasses.dataclass
class Batch:
    """Asks the questions of a file that have no answer yet, and writes each answer as it comes."""

    llm: FallbackLLM
    questions: str  # a path; "-" is stdin
    output: Optional[str]  # a path; None: the answers go to `put`
    arguments: Json  # of `complete`, for lines that do not give their own
    workers: int
    put: Callable[[Json], None]
    tell: Callable[[str], None]  # takes a line of progress
    pause: float  # seconds between two of these lines

    def __post_init__(self) -> None:
        self._expects_json = "accept" in self.arguments
        flags = {**self.arguments, "expect_json": self._expects_json}
        flags.pop("accept", None)
        self._flags_digest = digest_of(flags)
        self._is_over = False  # nobody takes what is still under way
        self._lock = threading.Lock()  # of all that follows
        self._counts: Dict[str, int] = collections.Counter()  # answers by provider
        self._reasons: Dict[str, int] = collections.Counter()  # of failed questions
        self._before = 0  # answers of earlier runs
        self._total = 0
        self._started = time.monotonic()
        self._told_at = self._started

    def run(self) -> int:
        """Ask them all; 0 if now all have an answer."""
        lines = self._checked_lines()
        try:
            if self.output is None:
                self._ask_all(lines)
            else:
                with contextlib.closing(Output(self.output, self.questions)) as output:
                    self.put = output.write
                    left = self._unanswered(lines, output)
                    output.tidy()
                    self._ask_all(left)
                    output.keep_place()
        except OSError as error:
            raise OSError(error.errno, f"{reason_of(error)}; {self._written()}") from None
        except KeyboardInterrupt:
            self._is_over = True
            logger.error("\n%s.", self._written())
            raise
        return self._tell_end()

    def _checked_lines(self) -> List[Line]:
        """The questions, read once and checked. Raises ValueError that tells of all bad lines."""
        text = read_text("--batch", self.questions)
        self.llm.validate(**{**self.arguments, "question": "is all else right?"})
        lines: Dict[LineId, Line] = {}
        problems = []
        # Not splitlines(): it would also split at characters that JSON may hold.
        for number, words in enumerate(text.split("\n"), 1):
            if not words.strip():
                continue
            try:
                line = read_line(number, words.strip())
                if line.id in lines:
                    raise ValueError(f"duplicate id {quoted(line.id)}")
                lines[line.id] = line
                self.llm.validate(**{**self.arguments, **line.arguments})
            except (ValueError, TypeError, RecursionError, NoProviderError) as error:
                problems.append(f"line {number}: {error}")
        raise_problems(f"--batch {self.questions}", problems)
        if not lines:
            logger.warning("⚠️  %s holds no question", self.questions)
        return list(lines.values())

    def _unanswered(self, lines: Sequence[Line], output: Output) -> List[Line]:
        """The lines that the output has no answer to. Raises ValueError if a line was changed."""
        digests: Dict[LineId, Optional[str]] = {}
        others = 0
        for _, record in output.answers():
            digests[record["id"]] = record.get("line_digest")
            if record.get("flags_digest", self._flags_digest) != self._flags_digest:
                others += 1
        self._before = len(digests)

        problems = []
        left = []
        for line in lines:
            if line.id not in digests:
                left.append(line)
            elif digests[line.id] not in (None, line.heading["line_digest"]):
                problems.append(
                    f"line {line.number}: it differs from the question answered as id {line.id} "
                    f"in {output.path}; use another -o, or give ids"
                )
        raise_problems(f"--batch {self.questions}", problems)

        if others:
            logger.warning(
                "⚠️  %s in %s were given with other flags (such as -m or -s) and are kept; "
                "use another -o to ask again",
                count_of(others, "answer"),
                output.path,
            )
        return left

    def _ask_all(self, lines: Sequence[Line]) -> None:
        """Ask these questions."""
        self._total = len(lines)
        for _ in work_through(self._ask, lines, self.workers, BATCH_AHEAD):
            pass

    def _ask(self, line: Line) -> None:
        """Ask a question and write its line. Runs in many threads."""
        if self._is_over:
            return
        QUESTION_ID.set(str(line.id))
        result: Union[Answer, Exception]
        try:
            result = self.llm.complete(**{**self.arguments, **line.arguments})
        except (FallbackLLMError, ValueError) as error:
            result = error
        QUESTION_ID.set("")
        heading = {**line.heading, "flags_digest": self._flags_digest}
        record = report_of(result, self._expects_json, heading)

        with self._lock:
            if self._is_over:
                return
            try:
                self.put(record)
            except BaseException:
                self._is_over = True  # do not pay for answers that cannot be saved
                raise
            if isinstance(result, Answer):
                self._counts[result.provider] += 1
            else:
                self._reasons[short_reason(result)] += 1
            self._tell_progress()

    def _tell_progress(self) -> None:
        """Done, failed, speed, time left, who answers, who is rate-limited."""
        now = time.monotonic()
        if now - self._told_at < self.pause:
            return
        self._told_at = now

        passed = now - self._started
        failed = sum(self._reasons.values())
        done = failed + sum(self._counts.values())
        left = duration_words((self._total - done) / done * passed)
        speed = f"{done / passed:.1f}/s"
        parts = [f"{done}/{self._total} done, {failed} failed, {speed}, {left} left"]
        for name, count in sorted(self._counts.items()):
            parts.append(f"{name} {count}")
        for name, health in self.llm.provider_health.items():
            if health.status is ProviderStatus.RATE_LIMITED:
                seconds = max(0.0, health.rate_limit_reset_time - time.time())
                parts.append(f"{name} rate-limited for {duration_words(seconds)}")
        self.tell("; ".join(parts))

    def _tell_end(self) -> int:
        """Tell the totals; returns the exit code."""
        failed = sum(self._reasons.values())
        words = f"{sum(self._counts.values())} answered, {failed} failed"
        if self._before:
            words += f", {self._before} answered before"
        if not failed:
            logger.info(words)
            return 0

        reasons = sorted(self._reasons.items(), key=lambda pair: -pair[1])
        told = [f"{count} x {reason}" for reason, count in reasons[:COMMON_REASONS]]
        if self.output is not None:
            told.append("Run the same command again to ask the failed ones again.")
        logger.error("\n   ".join([words, *told]))
        return 1

    def _written(self) -> str:
        """How many answers there are, and how to get the others."""
        count = count_of(self._before + sum(self._counts.values()), "answer")
        if self.output is None:
            return f"{count} written to stdout"
        return f"{count} written to {self.output}; run the same command again to resume"


class Output:
    """The file of a batch's answers: a line of JSON for each id, written by one run at a time.

    That it is removed or replaced meanwhile is noticed at the next write.
    """

    def __init__(self, path: str, questions: str) -> None:
        self.path = path
        if os.path.realpath(questions) == os.path.realpath(path):
            raise self._refusal("these are the questions")
        if os.path.exists(path) and not os.path.isfile(path):
            raise self._refusal("not a regular file; leave -o out to write to stdout")
        try:
            self._file = self._opened()
        except OSError as error:
            raise self._refusal(reason_of(error)) from None
        if self._lock_problem is not None:  # some network drives have no locks
            reason = reason_of(self._lock_problem)
            logger.warning("⚠️  %s cannot be locked (%s): do not start a second run", path, reason)
        self._size = os.fstat(self._file.fileno()).st_size  # at least, if nobody else writes

    def close(self) -> None:
        """Release the file for other runs."""
        with contextlib.suppress(OSError):  # what could not be written was told
            self._file.close()

    def answers(self) -> Iterator[Tuple[bytes, Json]]:
        """The lines that hold an answer, as they should be; the first for each id."""
        seen: Set[LineId] = set()
        self._file.seek(0)
        for data in self._file:
            line = data.strip(AROUND_A_LINE)
            if not line.startswith(RECORD_START) and not RECORD_START.startswith(line):
                raise self._refusal("not a file of answers, left as it is")
            record = parsed(line)  # what was torn is no JSON
            if not isinstance(record, dict) or "answer" not in record:
                continue
            is_new = isinstance(record["id"], (str, int)) and record["id"] not in seen
            if is_new and record.get("error") is None:
                seen.add(record["id"])
                yield line + b"\n", record

    def tidy(self) -> None:
        """Take out failed, torn and repeated lines; an output without any is left as it is."""
        size = sum(len(line) for line, _ in self.answers())
        if size == self._size:
            return

        import tempfile

        path = os.path.realpath(self.path)
        descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".answers-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.writelines(line for line, _ in self.answers())
            with contextlib.suppress(OSError):  # some network drives have no modes
                os.chmod(temporary, os.stat(path).st_mode & 0o777)
            self._file.close()  # Windows replaces no open file
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        self._file = self._opened()
        self._size = size

    def write(self, record: Json) -> None:
        """Add a record. Raises OSError."""
        data = json_line(record).encode()
        self.keep_place()
        self._file.write(data)
        self._file.flush()
        self._size += len(data)

    def keep_place(self) -> None:
        """See to it that all that was written is in the file of this name. Raises OSError."""
        here = os.fstat(self._file.fileno())
        if not os.path.exists(self.path):
            self._write_again()
        elif not os.path.samestat(here, os.stat(self.path)):
            raise OSError(f"{self.path} was replaced by another file, which may lack answers")
        elif here.st_size < self._size:
            raise OSError(f"{self.path} was cut by another program: answers are lost")

    def _write_again(self) -> None:
        """Make the file anew, with all that was in it: a removed file can be read while open."""
        words = f"{self.path} was removed during the batch, and"
        try:
            with self._file as removed:
                self._file = self._opened()
                removed.seek(0)
                self._file.writelines(removed)
                self._file.flush()
        except (OSError, ValueError) as error:
            raise OSError(f"{words} cannot be written again: {reason_of(error)}") from None
        logger.warning("⚠️  %s is written again", words)

    def _opened(self) -> IO[bytes]:
        """The file, locked, to be read and added to. Raises ValueError if another run has it."""
        file = open(self.path, "ab+")  # noqa: SIM115 - close() closes it
        problem = lock(file)
        here = os.fstat(file.fileno())
        if isinstance(problem, BlockingIOError) or not os.path.samestat(here, os.stat(self.path)):
            file.close()
            raise self._refusal("another run is writing to it")
        self._lock_problem = problem
        return file

    def _refusal(self, reason: str) -> ValueError:
        """The error of an output that cannot be used."""
        return ValueError(f"--output {self.path or repr(self.path)}: {reason}")


def lock(file: IO[bytes]) -> Optional[OSError]:
    """Lock a file for this process; returns the error that prevents it, if any."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows has none
        return None
    except OSError as error:
        return error
    return None


def reason_of(error: Exception) -> str:
    """Why a file cannot be used."""
    return getattr(error, "strerror", None) or str(error)


def raise_problems(what: str, problems: Sequence[str]) -> None:
    """Raise ValueError if there are any, with the first ones."""
    if len(problems) == 1:
        raise ValueError(f"{what}: {problems[0]}")
    if problems:
        told = [f"{what}: {len(problems)} bad lines", *problems[:MOST_BAD_LINES]]
        if len(problems) > MOST_BAD_LINES:
            told.append(f"and {len(problems) - MOST_BAD_LINES} more")
        raise ValueError("\n   ".join(told))


def read_text(flag: str, path: str) -> str:
    """The text of a file; of stdin for "-", without NULs. Raises ValueError."""
    is_stdin = path == "-"
    try:
        with open(0 if is_stdin else path, "rb", closefd=not is_stdin) as file:
            data = file.read()
        try:
            return decoded(data)
        except ValueError:
            if not is_stdin:
                raise
            return decoded(data.replace(b"\0", b""))
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag} {path or repr(path)}: {reason_of(error)}") from None


def read_line(number: int, text: str) -> Line:
    """A line of a batch: a text, a JSON string or a JSON object. Raises ValueError."""
    said = said_in(text)
    line_id = said.pop("id", None)
    columns = said
    if "custom_id" in said and isinstance(said.get("body"), dict):  # OpenAI's batch form
        line_id = said["custom_id"]
        columns = said["body"]

    heading: Json = {"id": id_of(line_id, number)}
    arguments = {name: value for name, value in columns.items() if value is not None}
    for name in ("question", "messages"):
        if name in arguments:
            heading[name] = arguments[name]
    if len(heading) == 1:
        names = ", ".join(repr(name) for name in arguments) or "no other field"
        raise ValueError(f'a "question" or "messages" is missing (there is {names})')
    others = [name for name in arguments if not is_argument(name, arguments)]
    if others:
        heading["fields"] = {name: arguments.pop(name) for name in others}
    heading["line_digest"] = digest_of(columns)
    return Line(number, heading["id"], arguments, heading)


def said_in(text: str) -> Json:
    """What a line says, as an object. Raises ValueError."""
    if text.startswith("{"):
        said: Json = json.loads(text, parse_constant=lambda name: None)  # NaN is for gaps
        return said
    if text.startswith('"'):
        return {"question": parsed(text)}
    return {"question": text}


def id_of(value: object, number: int) -> LineId:
    """The id that a line gives, or else its number. Raises ValueError."""
    if value is None:
        return number
    if isinstance(value, float) and value.is_integer():
        return int(value)  # 3.0, as pandas writes a column with gaps
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        return value
    raise ValueError(f"id must be a text or a whole number, not {quoted(value)}")


def is_argument(name: str, given: Json) -> bool:
    """Whether a column is one of `complete`'s arguments, or may be a misspelt one."""
    if name in PARAMETERS or name in NEVER_COLUMNS:
        return True
    near = nearest(name, [*ARGUMENTS, "temperature"], 0.8)
    if near and near not in given:
        raise ValueError(f"unknown field {name!r}: did you mean {near!r}?")
    return False


def digest_of(fields: Json) -> str:
    """A short text that differs for different fields."""
    import hashlib

    text = json.dumps(fields, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def short_reason(error: Exception) -> str:
    """Why a question failed, without what differs from question to question."""
    attempts = getattr(error, "attempts", ())
    if attempts:
        last = attempts[-1]
        return f"{last.provider}: {last.reason[:100]}"
    return str(error).split("\n")[0][:100]


def report_of(result: Union[Answer, Exception], expects_json: bool, heading: Json) -> Json:
    """What a batch and --json tell of a question."""
    report: Json = {**heading, "answer": None, "error": None}
    if not isinstance(result, Answer):
        report["error"] = str(result)
    elif expects_json:
        report["answer"] = json_inside(result.text)
    else:
        report["answer"] = result.text
    for name in ("provider", "model", "finish_reason", "usage", "retry_after"):
        report[name] = getattr(result, name, None) or None

    attempts: Sequence[Attempt] = getattr(result, "attempts", ())
    report["attempts"] = [attempt.to_dict() for attempt in attempts]
    elapsed = sum(attempt.waited + attempt.elapsed for attempt in attempts)
    report["elapsed_seconds"] = round(elapsed, 3)
    return report


def json_line(value: object) -> str:
    """The value as a line of JSON that neither a terminal nor an encoder stumbles over."""
    line = json.dumps(value, ensure_ascii=False)
    odd = "[\x7f-\x9f\u2028\u2029\ud800-\udfff]"
    return re.sub(odd, lambda match: f"\\u{ord(match.group()):04x}", line) + "\n"


def without_fence(text: str) -> str:
    """What stands in the only Markdown fence of a text; all of it if there are none or several."""
    parts = FENCE.split(text)
    if len(parts) == 3:
        return parts[1].strip()
    return text


def json_inside(text: str) -> Any:
    """The JSON value of an answer, or of the only fence in it. Raises ValueError."""
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


# --- 10. Command line ---------------------------------------------------------------------------

# What a terminal would obey: control characters, but not tab and newline.
CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])
PLAIN_WORDS = (("❌ Error", "Error"), ("❌ ", "Error: "), ("⚠️  ", "Warning: "), ("→", "->"))
EMOJI = re.compile("[🚀✅❓🤔⏳🔄🎯💡⏱📊🔑🔎✂]\ufe0f? +")
PUT_SIZE = 4096  # characters; one big write to a pipe may not notice that its reader has gone
ERASE = "\r\x1b[J"  # the line, and what of it a narrower terminal has wrapped
PATIENCE = 2.0  # seconds until somebody is told that a pipe is waited for
PROGRESS_PAUSE = 10.0  # seconds between two lines of progress outside a terminal
REDRAW_PAUSE = 0.25  # seconds between two of a terminal
WIDEST = 80  # columns of the help and of tables, at most
OPTIONS_VARIABLE = "FALLBACK_LLM_OPTS"
# The names of parameters in messages; some are plain words unless a message begins with them.
PARAMETER_NAMES = re.compile(
    r"(?<![-\w])(max_tokens|max_attempts|(idle_)?timeout|(max|base)_delay|list_models)\b"
    r"|(^|(?<=without ))(provider|model|system|temperature)\b|\bmodel="
)
SILENCE = logging.NullHandler()  # for questions of a batch that go on when it has ended
# Of a message: its first line, and the advice at the end of others; the rest may be a server's.
OUR_WORDS = re.compile(r"\A.*| → [^→\n]*$", re.MULTILINE)
ENDINGS = """\
keys: CEREBRAS_API_KEY, GROQ_API_KEY or OPENROUTER_API_KEY; one is enough. They \
are read from the environment and from .env files: in the current folder, beside \
this file and in ~/.config/fallback_llm.
GROQ_MODELS=a,b replaces a model list, GROQ_BASE_URL (not in .env) an address. \
FALLBACK_LLM_OPTS="-q --provider groq" sets options for every run.
Control characters, which a terminal would obey, are removed from answers; \
--json keeps them, escaped.
In a shell loop that reads lines, use --no-stdin or, better, --batch.
exit codes: 0 answered (--check: a provider can answer), 1 no answer, 2 wrong \
usage (nothing sent), 130 interrupted, 141 broken pipe
https://github.com/example/fallback-llm"""


class Console(logging.Handler):
    """stdout for the answer, stderr for everything else, such as what the module logs.

    Nothing breaks over an encoding, or over a stderr that is closed or full.
    """

    def __init__(self) -> None:
        super().__init__()
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        is_dumb = os.environ.get("TERM") == "dumb"
        can_erase = os.name != "nt" or "WT_SESSION" in os.environ  # not in an old console
        self.can_redraw = is_terminal(sys.stderr) and can_erase and not is_dumb
        has_no_emoji = not can_encode(sys.stderr, "🔄")
        self._is_plain = is_dumb or has_no_emoji or bool(os.environ.get("NO_COLOR"))
        self._is_shared = is_terminal(sys.stderr) and is_terminal(sys.stdout)
        self._has_open_line = False  # the answer's last line has no newline yet
        self._is_drawn = False  # the last line of the terminal is to be replaced
        self._lowest = logging.CRITICAL  # level that is shown
        self._max_tokens = 0

    def obey(self, args: argparse.Namespace) -> None:
        """Show what the flags want to see."""
        self._max_tokens = args.max_tokens
        self._lowest = logging.INFO
        if args.quiet:
            self._lowest = logging.ERROR
            self.can_redraw = False
        if args.verbose:
            self._lowest = logging.DEBUG

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record if it is important enough; of a batch's question only with --verbose."""
        message = record.getMessage()
        level = record.levelno
        if message == ANSWER_CUT:
            message = message.replace("max_tokens", f"--max-tokens {self._max_tokens}")
            level = logging.ERROR  # half an answer is told with --quiet, too
        question_id = QUESTION_ID.get()
        if question_id:
            message = "\n".join(f"[{question_id}] {line}" for line in message.split("\n"))
            level = logging.DEBUG
        if level >= self._lowest:
            self.say(message)

    def say(self, text: str) -> None:
        """Write a message to stderr, if there is one."""
        if self._has_open_line and self._is_shared:
            self.put("\n")
        if self._is_plain:
            for sign, words in PLAIN_WORDS:
                text = text.replace(sign, words)
            text = EMOJI.sub("", text)
        self._write(text.translate(CONTROLS) + "\n")

    def redraw(self, text: str) -> None:
        """Replace the last line of a terminal, for as long as the next message."""
        if not self.can_redraw:
            return
        width = os.get_terminal_size(sys.stderr.fileno()).columns or WIDEST
        self._write(text.translate(CONTROLS)[: width - 1] + "\r")
        self._is_drawn = True

    def _write(self, text: str) -> None:
        """Write to stderr, in place of what is drawn; give it up if that fails."""
        if self._is_drawn:
            text = ERASE + text
        self._is_drawn = False
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except (OSError, ValueError, AttributeError):  # it is full, closed or None
            sys.stderr = cast(Any, None)
            self.can_redraw = False

    def put(self, text: str) -> None:
        """Write a piece of the answer to stdout."""
        text = text.translate(CONTROLS)
        if self._is_drawn and self._is_shared:
            self._write("")
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
        if self.can_redraw and seconds > 1:
            for left in range(math.ceil(seconds), 0, -1):
                self.redraw(f"   {left} s left")
                time.sleep(max(0.0, min(1.0, until - time.monotonic())))
            self.redraw("")
        else:
            time.sleep(seconds)


def is_terminal(stream: Optional[IO[str]]) -> bool:
    """Whether the stream is there and leads to a terminal."""
    try:
        return stream is not None and os.isatty(stream.fileno())
    except (OSError, ValueError):  # it is closed, or no file
        return False


def text_width() -> int:
    """The columns that help and tables have."""
    import shutil

    return min(WIDEST, max(60, shutil.get_terminal_size().columns))


def can_encode(stream: Optional[IO[str]], text: str) -> bool:
    """Whether the stream's encoding has all characters of the text."""
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """One line per option: "-f, --file PATH". Only Python 3.13 does so by itself."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:  # each line is a paragraph
        import textwrap

        return "\n".join(textwrap.fill(line, width) for line in text.splitlines())

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = ", ".join(action.option_strings)
        if action.metavar:
            return f"{names} {action.metavar}"
        return names


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ValueError, with a suggestion, instead of exiting."""

    color: bool  # since Python 3.14

    def exit(self, status: int = 0, message: Optional[str] = None) -> NoReturn:
        """End after --help or --version; a stdout that is full is noticed here."""
        sys.stdout.flush()
        super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        """Say how to write a question that looks like a flag."""
        if message.startswith("unrecognized arguments:"):
            message += " (put -- before a question that starts with -)"
        raise ValueError(message)

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """The options that the words give. Raises ValueError."""
        for word in itertools.takewhile(lambda word: word != "--", words):
            name = word.partition("=")[0]
            near = ""
            if re.fullmatch("--?[a-z][a-z-]{2,}", name):
                near = self.nearest_flag(name)
            if near not in ("", name):  # argparse would read -model as -m odel
                raise ValueError(f"unknown flag {name} (did you mean {near}?)")
        # The intermixed parse takes flags anywhere, but it does not know "--".
        parse = self.parse_args if "--" in words else self.parse_intermixed_args
        args = parse(words)
        for name in NUMBER_RULES:
            text = getattr(args, name, None)
            if text is not None:
                setattr(args, name, read_number(name, text))
        check_together(args)
        return args

    def nearest_flag(self, name: str) -> str:
        """The flag that a name is, begins or is like, "" if there is none."""
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        meant = "--" + name.lstrip("-")
        longer = [flag for flag in flags if flag.startswith(meant)]
        return longer[0] if longer else nearest(meant, flags, 0.75)


def make_parser(prog: str) -> Parser:
    """The options, with their help."""
    run = prog if prog == "fallback-llm" else f"python {prog}"
    usage = f"{prog} [options] [--] [question ...]"
    short_examples = f"""\
  {run} "What is the capital of France?"
  cat error.log | {run} "explain this"
"""
    examples = f"examples:\n{short_examples}  {run} --batch questions.txt -o out.jsonl\n"
    parser = Parser(
        prog=prog,
        usage=usage,
        description="Ask a language model; if it fails, the next one answers.\n"
        "Only the answer goes to stdout.",
        epilog=f"{examples}\n{ENDINGS}",
        formatter_class=functools.partial(HelpFormatter, max_help_position=26, width=text_width()),
        add_help=False,
        allow_abbrev=False,
    )
    parser.color = False  # Python 3.14 would give the help colours
    parser.set_defaults(usage=f"usage: {usage}\n{short_examples.rstrip()}")
    parser.add_argument("question", nargs="*", help=argparse.SUPPRESS)
    group = parser.add_argument_group("options (a lone - reads the question from stdin)")
    loudness = group.add_mutually_exclusive_group()
    mode = group.add_mutually_exclusive_group()
    add = group.add_argument

    def switch(group: argparse._ActionsContainer, help: str, *names: str) -> None:
        group.add_argument(*names, action="store_true", help=help)

    text = "prepend a file's contents (repeatable)"
    add("-f", "--file", metavar="PATH", action="append", help=text)
    add("-s", "--system", metavar="TEXT", help="system prompt")
    add("--provider", metavar="NAMES", help="providers to use, in order: groq,openrouter")
    add("-m", "--model", metavar="MODEL", help="use only this model; also PROVIDER:MODEL")
    text = "maximum answer length, with reasoning (default: 500)"
    add("--max-tokens", metavar="N", default=500, help=text)
    add("--temperature", metavar="T", help="from 0 to 2 (default: the model's own)")
    add("--timeout", metavar="SECONDS", help="time limit for the whole question")
    add("--idle-timeout", metavar="SECONDS", help="give up on a model after this much silence")
    add("--max-attempts", metavar="N", default=5, help="maximum requests to one model (default: 5)")
    add("--base-delay", metavar="SECONDS", help="first wait, doubled each time (default: 2.0)")
    add("--max-delay", metavar="SECONDS", help="longest single wait (default: 60.0)")
    switch(group, "do not shorten waits by up to a fifth at random", "--disable-jitter")
    switch(group, "on a rate limit, try another model at once", "--no-wait")
    switch(mode, "print the answer as it is written", "--stream")
    switch(group, "print one JSON object, also on failure", "--json")
    switch(group, "accept only an answer that is JSON", "--expect-json")
    switch(loudness, "only errors on stderr", "-q", "--quiet")
    switch(loudness, "more on stderr", "-v", "--verbose")
    switch(group, "usage statistics on stderr", "--stats")
    switch(group, "do not read from a pipe", "--no-stdin")
    switch(mode, "check keys and models; costs no tokens", "--check")
    switch(mode, "print PROVIDER<tab>MODEL", "--list-models")
    text = "ask each line: text, or JSON with question, id ..."
    mode.add_argument("--batch", metavar="FILE", help=text)
    add("-o", "--output", metavar="FILE", help="answers of a batch; run again to resume")
    add("--workers", metavar="N", help="concurrent requests of a batch (default: 8)")
    version = f"fallback_llm {__version__}"
    add("-V", "--version", action="version", version=version, help="print the version")
    add("-h", "--help", action="help", help="print this help")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of FALLBACK_LLM_OPTS, then those given. Raises ValueError."""
    import shlex

    name = re.search(r"[\w.-]*fallback[\w.-]*$", "".join(sys.argv[:1]))
    parser = make_parser(name.group() if name else "fallback_llm.py")  # python - < fallback_llm.py
    try:
        words = shlex.split(os.environ.get(OPTIONS_VARIABLE, ""))
        args = parser.read([*words, *argv])
    except ValueError as error:
        parser.read(argv)  # it may be wrong by itself
        raise ValueError(f"{OPTIONS_VARIABLE}: {error}") from None
    return args


def check_together(args: argparse.Namespace) -> None:
    """Raise ValueError for options that do not go together, which argparse does not know."""
    for name in ("check", "list_models", "batch"):
        if getattr(args, name) and (args.question or args.file):
            raise ValueError(f"{flag_of(name)} takes no question")
    for name in ("output", "workers"):
        if getattr(args, name) is not None and args.batch is None:
            raise ValueError(f"{flag_of(name)} needs --batch")
    if args.stream and (args.json or args.expect_json):
        raise ValueError(
            "--stream is not allowed with --json or --expect-json: they need all of it"
        )


def read_number(name: str, text: str) -> float:
    """The number that is given for an option. Raises ValueError."""
    rule = NUMBER_RULES[name]
    try:
        number: float = rule.kind(text)
        return check_number(name, number)
    except ValueError:
        message = f"{flag_of(name)} must be {rule.allowed}, not {quoted(text)}"
        raise ValueError(message) from None


def given(args: argparse.Namespace, *names: str) -> Json:
    """Those of the options that were given."""
    options = {name: getattr(args, name) for name in names}
    return {name: value for name, value in options.items() if value is not None}


def make_client(args: argparse.Namespace, console: Console) -> FallbackLLM:
    """The client that the options describe."""
    delays = given(args, "base_delay", "max_delay")
    longest = delays.get("max_delay", math.inf)
    first = delays.setdefault("base_delay", min(RetryConfig.base_delay, longest))
    delays.setdefault("max_delay", max(RetryConfig.max_delay, first))
    config = RetryConfig(
        args.max_attempts,
        jitter=not args.disable_jitter,
        wait_on_rate_limit=not args.no_wait,
        **delays,
    )
    sleep = console.sleep if args.batch is None else time.sleep
    return FallbackLLM(config, timeout=args.timeout, idle_timeout=args.idle_timeout, sleep=sleep)


def common_arguments(args: argparse.Namespace) -> Json:
    """The arguments of `complete` that the options give."""
    arguments = given(args, "max_tokens", "provider", "model", "system", "temperature")
    if args.expect_json:
        arguments["accept"] = is_json
    return arguments


def question_of(args: argparse.Namespace, console: Console) -> str:
    """The question: the files, then the pipe, then the words. Raises ValueError."""
    words = [word for word in args.question if word != "-"]
    files = args.file or []
    paths = list(files)
    has_pipe = not args.no_stdin and not is_terminal(sys.stdin)
    if sys.stdin is not None and "-" not in paths and ("-" in args.question or has_pipe):
        paths.append("-")
    is_needed = not words and not set(files) - {"-"}

    parts = []
    for path in paths:
        if path == "-":
            text = read_stdin(console, args.timeout, is_needed)
        else:
            text = read_text("--file", path)
        if len(files) > 1 and not is_blank(text):
            text = f"--- {path} ---\n{text}"
        parts.append(text)
    parts.append(" ".join(words))
    question = "\n\n".join(part.strip("\r\n") for part in parts if part.strip("\r\n"))
    if is_blank(question) and not (words or files):
        if paths:
            raise ValueError("no question given (stdin was empty)")
        raise ValueError(f"no question given\n{args.usage}")
    return question


def read_stdin(console: Console, timeout: Optional[float], is_needed: bool) -> str:
    """The text from stdin; "" if it does not end in time and is not needed. Raises ValueError."""
    reader = StdinReader(daemon=True)  # nobody can stop it
    reader.start()
    limit = min(timeout or math.inf, threading.TIMEOUT_MAX)
    if is_terminal(sys.stdin):
        explain_terminal(console)
        reader.join()
    reader.join(min(limit, PATIENCE))
    if limit > PATIENCE and reader.is_alive():
        console.say("waiting for piped input; use --no-stdin (or </dev/null) to skip")
        reader.join(limit - PATIENCE)
    if reader.error is not None:
        raise reader.error
    if reader.is_alive():
        reason = f"stdin did not end within {number_of(limit)} s"
        if is_needed:
            raise ValueError(f"no question given ({reason})")
        logger.warning("⚠️  %s: asked without it", reason)
    return reader.text


def explain_terminal(console: Console) -> None:
    """Say how to end what is typed."""
    keys = "Ctrl-D ends"
    if os.name == "nt":
        keys = "Ctrl-Z and Enter end"
    console.say(f"reading from the terminal; {keys} the text")


class StdinReader(threading.Thread):
    """Reads all of stdin."""

    text = ""
    error: Optional[ValueError] = None

    def run(self) -> None:
        """Set `text` or `error`."""
        try:
            self.text = read_text("stdin", "-")
        except ValueError as error:
            self.error = error


def respond(llm: FallbackLLM, args: argparse.Namespace, console: Console) -> int:
    """Ask one question and print the answer."""
    question = question_of(args, console)
    available = {}
    for account in llm.accounts(args.provider):
        if account.problem:
            logger.debug("⚠️  %s", account.problem)
        else:
            available[account.provider] = True
    logger.debug("✅ Available providers: %s", ", ".join(available))
    logger.debug("❓ Question: %s", question)
    logger.debug("🤔 Thinking...")

    arguments = dict(common_arguments(args), question=question)
    if args.stream:
        stream = llm.stream(**arguments)
        put_text(console, stream)
        answer = cast(Answer, stream.answer)
    else:
        try:
            answer = llm.complete(**arguments)
        except FallbackLLMError as error:
            if args.json:
                console.put_json(report_of(error, args.expect_json, {}))
            raise
        if args.json:
            console.put_json(report_of(answer, args.expect_json, {}))
            return 0
        put_text(console, [without_fence(answer.text) if args.expect_json else answer.text])
    logger.info("\n⏱️  Response time: %.2fs", answer.elapsed)
    return 0


def put_text(console: Console, pieces: Iterable[str]) -> None:
    """Print an answer without surrounding blank lines and terminal control characters."""
    held = ""  # what may turn out to be a blank line at the beginning or at the end
    has_begun = False
    try:
        for piece in pieces:
            held += piece.translate(CONTROLS)
            if not has_begun and held.strip():
                has_begun = True
                held = re.sub(r"\A\s*\n", "", held)
                logger.info("\n💡 Response:")
            if has_begun:
                shown = held.rstrip("\n")
                held = held[len(shown) :]
                console.put(shown)
    finally:
        console.end_line()


def check(llm: FallbackLLM, args: argparse.Namespace, console: Console) -> int:
    """Print which keys and models work; 0 if a provider can answer."""
    labels = [account.label for account in llm.accounts(args.provider)]
    waiting = list(labels)
    reports = []
    found = llm.check(args.provider, args.timeout)
    while waiting:
        console.redraw(f"waiting for {', '.join(waiting)}")
        report = next(found)
        waiting.remove(report.label)
        reports.append(report)
    console.redraw("")

    reports.sort(key=lambda report: labels.index(report.label))
    if args.json:
        console.put_json([report.to_dict() for report in reports])
    else:
        console.put(check_table(reports))
    if any(report.served for report in reports):
        return 0
    return 1


def check_table(reports: Sequence[CheckReport]) -> str:
    """The reports with their columns below each other."""
    import textwrap

    width = max(len(report.label) for report in reports)
    lines = [f"{'PROVIDER':{width}}  {'KEY':11}  SECONDS  MODELS"]
    for report in reports:
        notes = []
        if report.served:
            notes.append("served: " + ", ".join(report.served))
        if report.not_served:
            notes.append("not served: " + ", ".join(report.not_served))
        if report.reason:
            notes.append(report.reason)
        start = f"{report.label:{width}}  {report.key:11}  {report.seconds:<7.2f}  "
        wrapper = textwrap.TextWrapper(
            text_width(), start, " " * len(start), break_on_hyphens=False
        )
        lines.append(wrapper.fill("; ".join(notes) or "-"))
    return "\n".join([*lines, ""])


def list_models(llm: FallbackLLM, args: argparse.Namespace, console: Console) -> int:
    """Print the models of each provider: those that are asked, in their order, then the others."""
    found: List[Json] = []
    for listing in llm.list_models(args.provider, args.timeout):
        name = listing.provider
        if listing.problem:
            logger.warning("⚠️  %s: %s; these are the models we ask", name, listing.problem)
        for model in listing.models:
            found.append({"provider": name, "model": model, "asked": model in listing.asked})
    if args.json:
        console.put_json(found)
    else:
        for entry in found:
            console.put(f"{entry['provider']}\t{entry['model']}\n")
    return 0


def make_batch(llm: FallbackLLM, args: argparse.Namespace, console: Console) -> Batch:
    """The batch that the options describe."""
    if args.batch == "-" and is_terminal(sys.stdin):
        explain_terminal(console)
    tell = console.say
    pause = PROGRESS_PAUSE
    if console.can_redraw:
        tell = console.redraw
        pause = REDRAW_PAUSE
    if args.quiet:
        pause = math.inf
    return Batch(
        llm,
        questions=args.batch,
        output=None if args.output == "-" else args.output,
        arguments=common_arguments(args),
        workers=args.workers or 8,
        put=console.put_json,
        tell=tell,
        pause=pause,
    )


def run_command(args: argparse.Namespace, console: Console) -> int:
    """Do what the options say; returns the exit code."""
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
                code = make_batch(llm, args, console).run()
            else:
                code = respond(llm, args, console)
        except FallbackLLMError as error:
            console.say(f"❌ {in_shell_words(error)}")
            code = 1
        if args.stats:
            counts = [f"   {name}: {count}" for name, count in llm.get_stats().items()]
            console.say("\n".join(["\n📊 Usage Statistics:", *counts]))
    return code


def in_shell_words(error: Exception) -> str:
    """The message of an error with flags in place of parameters, but not in what servers said."""
    text = str(error)
    if isinstance(error, (AnswerRefused, StreamInterrupted)) or text.startswith("--"):
        return text
    return OUR_WORDS.sub(lambda match: with_flags(match.group()), text)


def with_flags(text: str) -> str:
    """The text with flags in place of parameters."""
    return PARAMETER_NAMES.sub(lambda match: flag_of(match.group()), text)


def flag_of(name: str) -> str:
    """The flag that sets a parameter."""
    if name.startswith("model"):
        return "-m"
    return "--" + name.replace("_", "-")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the program. Returns the exit code; Ctrl-C ends the process by its signal."""
    console = Console()
    logger.setLevel(logging.DEBUG)
    logger.addHandler(console)
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        console.obey(args)
        return run_command(args, console)
    except ValueError as error:
        console.say(f"error: {in_shell_words(error)}")
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
        with contextlib.suppress(OSError, ValueError, AttributeError):
            # What stdout still holds would make Python complain at its exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 141
        console.say(f"error: {reason_of(error)}")
        return 1
    finally:
        logger.addHandler(SILENCE)
        logger.removeHandler(console)


if __name__ == "__main__":
    sys.exit(main())
