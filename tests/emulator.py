"""Cerebras, Groq and OpenRouter on one loopback port: paths, headers, streams, errors, faults.

    with Emulator() as emulator:
        emulator.plan("cerebras", rate_limited("cerebras", 60))
        emulator.plan("groq/openai/gpt-oss-120b", Reply(fault="stall"), Reply(text="Paris."))
        emulator.limit("openrouter", Quota(20))      # a minute, as a token bucket
        ...                                          # the program, with emulator.environment()
        models = [asked.model for asked in emulator.asked]

What is not planned is answered. `python tests/emulator.py` prints the environment that points a
program here, and a line for each request; see its --help. All times are seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import http.client
import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import socket
import struct
import sys
import textwrap
import threading
import time
from email.utils import formatdate
from typing import (
    Any,
    Callable,
    ClassVar,
    Dict,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    NoReturn,
    Sequence,
    Union,
)
from urllib.parse import urlsplit
from urllib.request import getproxies

Json = Dict[str, Any]
Headers = Dict[str, str]
Body = Union[Json, List[Any], str, bytes]

MODEL = "{model}"  # in the body of a reply: becomes the model that was asked
CHAT, MODELS, KEY = "POST /chat/completions", "GET /models", "GET /key"
CREATED = 1790000000
DONE = "data: [DONE]\n\n"
JSON_TYPE = "application/json"
REFUSED_AGENTS = ("Python-urllib", "python-requests")  # Cloudflare turns these away
ANSWER_IN_JSON = '{"capital": "Paris"}'  # to who asks for JSON
BEAT = 0.05  # the gap of faults that have one of their own


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the emulator does with one request: an answer in the provider's dialect, or a fault."""

    status: int = 200
    text: str | None = None  # the answer; None: the name of the provider and the model, or JSON
    body: Body | None = None  # sent as it is, instead of what the dialect would say
    headers: Headers = dataclasses.field(default_factory=dict)  # win over the dialect's; "": none
    stream: bool | None = None  # None: as the request asks (drip and short: plain JSON)
    pieces: int = 3  # how many chunks of a stream hold the text
    delay: float = 0.0  # before the headers
    gap: float = 0.0  # between pieces; 0: everything in one write
    reasoning: str = ""
    finish_reason: str | None = "stop"
    fault: str = ""  # a name in FAULTS

    def __post_init__(self) -> None:
        if self.fault not in FAULTS:
            raise ValueError(f"no such fault: {self.fault!r}")


class Count(NamedTuple):
    """How many questions the quotas of a model and its account let pass, and how many not."""

    granted: int = 0
    refused: int = 0


class Asked(NamedTuple):
    """One request that arrived, whatever it was for."""

    at: float  # time.monotonic()
    provider: str  # "" when the path is nobody's
    path: str
    model: str  # "" when the body names none
    headers: Headers  # names in lower case
    body: Json  # {} when it was not a JSON object


# --- Helpers: replies in a provider's own words ------------------------------------------------


def error(provider: str, kind: str, status: int | None = None, text: str = "") -> Reply:
    """The provider's own error of this kind, under `status` when that is given.

    "in_stream" is an error inside an HTTP 200, after `text`. "organization", "network" are Groq's
    alone, "queue" is Cerebras', "moderated" OpenRouter's; "retired" is its other way to say gone.
    """
    dialect = _dialect(provider)
    if kind == "in_stream":
        told = Reply(text=text)
        stream = [*dialect.opening(MODEL, told), *dialect.pieces(MODEL, told), dialect.in_stream()]
        return Reply(body="".join(stream), headers={"content-type": dialect.stream_type})
    if kind == "cloudflare":
        return Reply(403, body="error code: 1010", headers={"content-type": "text/plain"})
    if kind not in dialect.errors:
        raise ValueError(f"{provider} has no error of kind {kind!r}")
    row = dialect.errors[kind]
    row = row._replace(status=row.status if status is None else status)
    return Reply(row.status, body=dialect.error(row), headers=row.headers or {})


def rate_limited(
    provider: str,
    retry_after: float | None = None,
    how: str = "header",
    per: str = "minute",
    now: float | None = None,
) -> Reply:
    """The provider's 429, which says in one place (`how`) when to come back.

    how: header, header-ms, date, text, both (header and text), body (a field), reset (an instant
    or a duration), none.
    per: minute, hour, day. retry_after None: a wait that the provider is known for. `now` (epoch)
    counts for date and reset. Groq adds, as it does, reset headers with a longer time than the
    hint. OpenRouter's limit is the account's when it is longer than a minute or told by reset,
    else it is one upstream's.
    """
    dialect = _dialect(provider)
    if how not in HINTS or per not in dialect.waits:
        raise ValueError(f"no such rate limit: how={how!r}, per={per!r}")
    seconds = dialect.waits[per] if retry_after is None else retry_after
    hint = Hint(seconds, how, per, time.time() if now is None else now)
    headers, body = dialect.limit(hint)
    return Reply(429, body=body, headers=dict(hint.headers(), **headers))


def document(provider: str, reply: Reply | None = None, model: str = MODEL) -> Json:
    """The answer as the provider's plain JSON body."""
    dialect = _dialect(provider)
    return dialect.document(model, _told(dialect, reply or Reply(), model))


def events(provider: str, reply: Reply | None = None, model: str = MODEL) -> list[str]:
    """The answer as the events of the provider's stream, "[DONE]" included: to cut and spoil."""
    dialect = _dialect(provider)
    told = _told(dialect, reply or Reply(), model)
    pieces = dialect.pieces(model, told)
    return [*dialect.opening(model, told), *pieces, *dialect.closing(model, told)]


def _told(dialect: Dialect, reply: Reply, model: str) -> Reply:
    """The same reply with a text."""
    if reply.text is not None:
        return reply
    text = f"Hello from the emulator of {dialect.name}, asked for {model}; no model was called."
    return dataclasses.replace(reply, text=text)


# --- Dialects: the shape of everything that a provider says -------------------------------------


class Hint(NamedTuple):
    """When to come back, and where a 429 says so."""

    seconds: float
    how: str
    per: str
    now: float
    counts: str = "tokens"
    wide: bool = False  # the limit is the account's, whatever `how` and `per` suggest

    def headers(self) -> Headers:
        if self.how in ("header", "both"):
            return {"retry-after": _number(self.seconds)}
        if self.how == "header-ms":
            return {"retry-after-ms": _number(self.seconds * 1000)}
        if self.how == "date":
            return {"retry-after": formatdate(math.ceil(self.now + self.seconds), usegmt=True)}
        return {}

    def sentence(self, words: str, wait: str) -> str:
        return f". {words} {wait}." if self.how in ("text", "both") else ""

    def field(self, name: str) -> Json:
        return {name: self.seconds} if self.how == "body" else {}


HINTS = ("header", "header-ms", "date", "text", "both", "body", "reset", "none")


class Row(NamedTuple):
    """An error before it has a dialect's shape."""

    status: int
    message: str
    code: str = ""  # OpenRouter shows its status instead
    type: str = "invalid_request_error"  # not shown by OpenRouter
    more: Json | None = None
    headers: Headers | None = None


class Dialect:
    """How one provider speaks. The methods are pure: a model and a reply go in, JSON comes out."""

    name: ClassVar[str]
    path: ClassVar[str]
    key: ClassVar[str]
    models: ClassVar[tuple[str, ...]]
    endpoints: ClassVar[tuple[str, ...]] = (CHAT, MODELS)
    keyless: ClassVar[tuple[str, ...]] = ()
    headers: ClassVar[Headers]  # of every 200
    chunked: ClassVar[bool] = False  # also what is no stream
    stream_type: ClassVar[str] = "text/event-stream"
    comment: ClassVar[str] = ": keep-alive\n\n"
    common: ClassVar[Json] = {"id": "chatcmpl-emulated", "system_fingerprint": "fp_emulated"}
    waits: ClassVar[Mapping[str, float]]  # a typical wait per minute, hour, day
    hints: ClassVar[tuple[str, str]]  # how the 429 of a model's and of the account's quota hints
    errors: ClassVar[Mapping[str, Row]]

    def error(self, row: Row) -> Json:
        """The body of an error."""
        raise NotImplementedError

    def in_stream(self) -> str:
        """The event of an error inside a stream."""
        raise NotImplementedError

    def limit(self, hint: Hint) -> tuple[Headers, Json]:
        """The dialect's own headers and the body of a 429."""
        raise NotImplementedError

    def quota_headers(self, quotas: Sequence[Quota]) -> Headers:
        """What every reply tells of these quotas."""
        return {}

    def listed(self, model: str) -> Json:
        """One entry of the models list."""
        return {"id": model, "object": "model", "created": 0, "owned_by": "Emulator"}

    def listing(self, models: Sequence[str]) -> Json:
        """The body of the models list."""
        return {"object": "list", "data": [self.listed(model) for model in models]}

    def document(self, model: str, reply: Reply) -> Json:
        """The answer in one piece."""
        message = dict(self.thought(reply), role="assistant", content=reply.text or None)
        choice = self.choice(reply.finish_reason, message=message)
        chunk = self.chunk(model, choice, **self.figures(reply))
        return dict(chunk, object="chat.completion")

    def opening(self, model: str, reply: Reply) -> list[str]:
        """The events before the text, reasoning included."""
        deltas = [{"role": "assistant"}, self.thought(reply)]
        return [self.event(model, delta) for delta in deltas if delta]

    def pieces(self, model: str, reply: Reply) -> list[str]:
        """The events of the text."""
        texts = _split(reply.text or "", reply.pieces)
        return [self.event(model, {"content": text}) for text in texts]

    def closing(self, model: str, reply: Reply) -> list[str]:
        """The events after the text."""
        return [self.event(model, {}, reply.finish_reason, **self.figures(reply)), DONE]

    def event(self, model: str, delta: Json, reason: str | None = None, **more: Any) -> str:
        return _event(self.chunk(model, self.choice(reason, delta=delta), **more))

    def chunk(self, model: str, choice: Json, **more: Any) -> Json:
        chunk = {"object": "chat.completion.chunk", "created": CREATED, "model": model}
        return dict(self.common, **chunk, choices=[choice], **more)

    def choice(self, finish_reason: str | None, **content: Json) -> Json:
        return dict(content, index=0, logprobs=None, finish_reason=finish_reason)

    def thought(self, reply: Reply) -> Json:
        return {"reasoning": reply.reasoning} if reply.reasoning else {}

    def figures(self, reply: Reply) -> Json:
        """What stands beside the choices when the answer is complete."""
        return {"usage": self.usage(reply)}

    def usage(self, reply: Reply) -> Json:
        prompt, thought = 20, _tokens(reply.reasoning)
        completion = thought + _tokens(reply.text or "")
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "completion_tokens_details": {"reasoning_tokens": thought},
        }


def _key(prefix: str, length: int) -> str:
    """A key of the provider's pattern, the same at every run, spelled out in no file."""
    return prefix + hashlib.sha512(prefix.encode()).hexdigest()[:length]


class Cerebras(Dialect):
    name = "cerebras"
    path = "/v1"
    key = _key("csk-", 48)
    models = ("gpt-oss-120b", "qwen-3.8-27b")
    headers: ClassVar[Headers] = {
        f"x-ratelimit-{count}-{what}-{span}": str(number - (count == "remaining"))
        for what, spans in (
            ("requests", {"minute": 5, "hour": 150, "day": 2400}),
            ("tokens", {"minute": 30000, "hour": 1000000, "day": 1000000}),
        )
        for span, number in spans.items()
        for count in ("limit", "remaining")
    }
    stream_type = "text/event-stream; charset=utf-8"
    waits: ClassVar[Mapping[str, float]] = {"minute": 58, "hour": 1800, "day": 86400}
    hints = ("header", "header")
    errors: ClassVar[Mapping[str, Row]] = {
        "bad_request": Row(400, "Not a chat request", "wrong_api_format"),
        "too_long": Row(400, "The messages are too long", "context_length_exceeded"),
        "bad_key": Row(401, "This key is unknown", "wrong_api_key", more={"param": "api_key"}),
        "no_credit": Row(402, "No credit is left", "payment_required", "payment_required_error"),
        "forbidden": Row(403, "Not allowed for this key", "forbidden", "permission_error"),
        "no_path": Row(404, "No such path", "not_found", "not_found_error"),
        "gone": Row(404, f"There is no model {MODEL}", "model_not_found", "not_found_error"),
        "retired": Row(
            404, f"Model {MODEL} was archived", "model_archived", "model_archived_error"
        ),
        "too_large": Row(413, "Request too large", "request_too_large"),
        "queue": Row(429, "High traffic", "queue_exceeded", headers={"x-should-retry": "false"}),
        "server": Row(500, "Something broke in here", type="server_error"),
        "overloaded": Row(503, "The service is overloaded", type="server_error"),
    }

    def error(self, row: Row) -> Json:
        body = {"message": row.message, "type": row.type, "param": "", "code": row.code}
        return dict(body, **(row.more or {}))

    def in_stream(self) -> str:
        return _event({"status_code": 500, "error": self.error(self.errors["server"])})

    def limit(self, hint: Hint) -> tuple[Headers, Json]:
        message = f"All {hint.counts} per {hint.per} are used up"
        message += hint.sentence("Please try again in", f"{_number(hint.seconds)}s")
        more = dict(hint.field("retry_after"), param="quota")
        code, kind = f"{hint.counts[:-1]}_quota_exceeded", f"too_many_{hint.counts}_error"
        row = Row(429, message, code, kind, more)
        reset = {f"x-ratelimit-reset-{hint.counts}-{hint.per}": f"{hint.seconds:.6f}"}
        return reset if hint.how == "reset" else {}, self.error(row)

    def quota_headers(self, quotas: Sequence[Quota]) -> Headers:
        headers = {}
        for quota in quotas:
            name = f"{quota.counts}-{quota.per}"
            headers[f"x-ratelimit-limit-{name}"] = str(int(quota.capacity))
            headers[f"x-ratelimit-remaining-{name}"] = str(quota.remaining)
        return headers

    def choice(self, finish_reason: str | None, **content: Json) -> Json:
        last = {} if finish_reason is None else {"finish_reason": finish_reason}
        return dict(content, index=0, **last)

    def figures(self, reply: Reply) -> Json:
        times = {"queue_time": 0.004, "prompt_time": 0.002, "completion_time": 0.018}
        return {"usage": self.usage(reply), "time_info": dict(times, total_time=0.026)}


class Groq(Dialect):
    name = "groq"
    path = "/openai/v1"
    key = _key("gsk_", 52)
    models = (
        "openai/gpt-oss-120b",
        "openai/gpt-oss-20b",
        "qwen/qwen3.8-27b",
        "openai/gpt-oss-safeguard-20b",
        "whisper-large-v3",
    )
    headers: ClassVar[Headers] = {
        "x-ratelimit-limit-requests": "1000",
        "x-ratelimit-limit-tokens": "8000",
        "x-ratelimit-remaining-requests": "999",
        "x-ratelimit-remaining-tokens": "7938",
        "x-ratelimit-reset-requests": "1m26.4s",
        "x-ratelimit-reset-tokens": "480ms",
    }
    waits: ClassVar[Mapping[str, float]] = {"minute": 6.35, "hour": 214, "day": 578}
    hints = ("both", "both")
    errors: ClassVar[Mapping[str, Row]] = {
        "bad_request": Row(400, "Not a chat request"),
        "organization": Row(400, "This organization may not call", "organization_restricted"),
        "too_long": Row(400, "The messages are too long", "context_length_exceeded"),
        "retired": Row(400, f"`{MODEL}` was decommissioned", "model_decommissioned"),
        "bad_key": Row(401, "This key is unknown", "invalid_api_key"),
        "no_credit": Row(402, "No credit is left", "payment_required", "payment_required"),
        "forbidden": Row(403, "Not allowed for this key", "forbidden", "permissions_error"),
        "network": Row(403, "Not from here: check your network settings", type=""),
        "no_path": Row(404, "No such path", "unknown_url"),
        "gone": Row(404, f"There is no model `{MODEL}`", "model_not_found"),
        "too_large": Row(
            413,
            f"Request too large for `{MODEL}` and org_emulated: 9000 tokens per minute (TPM) asked "
            "for, 8000 allowed",
            "rate_limit_exceeded",
            "tokens",
        ),
        "server": Row(500, "Something broke in here", type="internal_server_error"),
        "overloaded": Row(503, f"{MODEL} is over capacity", type="internal_server_error"),
    }

    def error(self, row: Row) -> Json:
        named = {"type": row.type, "code": row.code}
        body = {"message": row.message, **{name: word for name, word in named.items() if word}}
        return {"error": dict(body, **(row.more or {}))}

    def in_stream(self) -> str:
        more = {"failed_generation": "{", "status_code": 400}
        row = Row(400, "Generation failed", "tool_use_failed", more=more)
        return "event: error\n" + _event(self.error(row))

    def limit(self, hint: Hint) -> tuple[Headers, Json]:
        message = (
            f"Rate limit reached by org_emulated with `{MODEL}`, {hint.counts} per {hint.per} "
            f"({hint.counts[0].upper()}P{hint.per[0].upper()}): 7739 of 8000 used, 1108 asked for"
        )
        message += hint.sentence("Please try again in", _go_duration(hint.seconds))
        row = Row(429, message, "rate_limit_exceeded", hint.counts, hint.field("retry_after"))
        full = hint.seconds if hint.how == "reset" else hint.seconds + 50
        reset = {"x-ratelimit-reset-tokens": _go_duration(full)}
        return {} if hint.how == "none" else reset, self.error(row)

    def quota_headers(self, quotas: Sequence[Quota]) -> Headers:
        """Requests are the day's, tokens the minute's; of other quotas nothing is told."""
        headers = {}
        for quota in quotas:
            if (quota.counts, quota.per) in (("requests", "day"), ("tokens", "minute")):
                headers[f"x-ratelimit-limit-{quota.counts}"] = str(int(quota.capacity))
                headers[f"x-ratelimit-remaining-{quota.counts}"] = str(quota.remaining)
                headers[f"x-ratelimit-reset-{quota.counts}"] = _go_duration(quota.full_in)
        return headers

    def listed(self, model: str) -> Json:
        audio = model.startswith("whisper")
        return dict(
            super().listed(model),
            active=True,
            context_window=448 if audio else 131072,
            input_modalities=["audio" if audio else "text"],
            output_modalities=["transcription" if audio else "text"],
        )

    def document(self, model: str, reply: Reply) -> Json:
        tags = {"x_groq": {"id": "req_emulated", "seed": 1}, "service_tier": "on_demand"}
        return dict(super().document(model, reply), usage_breakdown=None, **tags)

    def opening(self, model: str, reply: Reply) -> list[str]:
        first = {"role": "assistant", "content": ""}
        opening = [self.event(model, first, x_groq={"id": "req_emulated", "seed": 1})]
        if reply.reasoning:
            opening.append(self.event(model, dict(self.thought(reply), channel="analysis")))
        return opening

    def figures(self, reply: Reply) -> Json:
        times = {"queue_time": 0.006, "prompt_time": 0.018, "completion_time": 0.125}
        usage = dict(self.usage(reply), total_time=0.143, **times)
        return {"usage": usage, "x_groq": {"id": "req_emulated", "usage": usage}}


class OpenRouter(Dialect):
    name = "openrouter"
    path = "/api/v1"
    key = _key("sk-or-v1-", 64)
    models = (
        "qwen/qwen3.8-27b:free",
        "google/gemma-4-31b-it:free",
        "nvidia/nemotron-3-super-120b-a12b:free",
        "openrouter/free",
        "openrouter/auto",
        "anthropic/claude-sonnet-4.6",
        "openai/gpt-oss-120b",
    )
    endpoints = (CHAT, MODELS, KEY)
    keyless = (MODELS,)
    headers: ClassVar[Headers] = {"x-generation-id": "gen-emulated"}
    chunked = True
    comment = ": OPENROUTER PROCESSING\n\n"
    common: ClassVar[Json] = {"id": "gen-emulated", "provider": "Emulator"}
    waits: ClassVar[Mapping[str, float]] = {"minute": 1, "hour": 1800, "day": 40000}
    hints = ("none", "reset")
    errors: ClassVar[Mapping[str, Row]] = {
        "bad_request": Row(400, "No messages were sent"),
        "too_long": Row(
            400, "Context length is 131072", more={"error_type": "context_length_exceeded"}
        ),
        "retired": Row(400, f"{MODEL} is not a valid model ID"),
        "no_key": Row(401, "No key was sent"),
        "bad_key": Row(401, "This key is unknown"),
        "no_credit": Row(402, "Insufficient credits", more={"limit_source": "openrouter_credits"}),
        "forbidden": Row(403, "Key limit exceeded"),
        "moderated": Row(
            403,
            "The input was flagged",
            more={"reasons": ["violence"], "flagged_input": "a question", "model_slug": MODEL},
        ),
        "no_path": Row(404, "No such path"),
        "gone": Row(404, f"No endpoints found for {MODEL}."),
        "too_large": Row(413, "Request too large", more={"error_type": "payload_too_large"}),
        "server": Row(500, "Something broke in here"),
        "overloaded": Row(503, "Provider overloaded", more={"error_type": "provider_overloaded"}),
    }

    def error(self, row: Row) -> Json:
        body = {"message": row.message, "code": row.status}
        if row.more:
            body["metadata"] = row.more
        return {"error": body, "user_id": "user_emulated"}

    def in_stream(self) -> str:
        more = {"error_type": "provider_unavailable"}
        inner = self.error(Row(502, "The upstream provider hung up", more=more))["error"]
        return self.event(MODEL, {"content": ""}, "error", error=inner)

    def limit(self, hint: Hint) -> tuple[Headers, Json]:
        words = hint.sentence("Retry after", f"{_number(hint.seconds)} seconds")
        more = dict(hint.field("retry_after_seconds"), provider_name="Emulator")
        if hint.per == "minute" and hint.how != "reset" and not hint.wide:
            more["raw"] = f"{MODEL} gets too many requests upstream"
            more["limit_source"] = "upstream_provider_shared_pool"
            return {}, self.error(Row(429, "Provider returned error" + words, more=more))
        span = {"minute": "per_minute", "hour": "hourly", "day": "daily"}[hint.per]
        more["limit_source"] = f"openrouter_free_tier_{span}"
        headers: Headers = {}
        if hint.how == "reset":
            instant = str(math.ceil((hint.now + hint.seconds) * 1000))
            more["headers"] = {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": instant}
            headers = {} if hint.per == "minute" else more["headers"]  # the minute's: body only
        message = f"Over the limit free-models-per-{hint.per.replace('minute', 'min')}"
        return headers, self.error(Row(429, message + words, more=more))

    def listed(self, model: str) -> Json:
        free = model.endswith(":free") or model == "openrouter/free"
        price = "0" if free else "-1" if model == "openrouter/auto" else "0.000003"
        return {
            "id": model,
            "name": model,
            "created": CREATED,
            "context_length": 131072,
            "architecture": {"input_modalities": ["text"], "output_modalities": ["text"]},
            "pricing": {"prompt": price, "completion": price},
            "expiration_date": None,
        }

    def listing(self, models: Sequence[str]) -> Json:
        data = [self.listed(model) for model in models]
        return {"data": data, "total_count": len(data), "links": {"next": None}}

    def opening(self, model: str, reply: Reply) -> list[str]:
        opening = [self.comment, self.comment, self.event(model, {"content": ""})]
        if reply.reasoning:
            opening.append(self.event(model, dict(self.thought(reply), content="")))
        return opening

    def pieces(self, model: str, reply: Reply) -> list[str]:
        return [self.comment + piece for piece in super().pieces(model, reply)]

    def closing(self, model: str, reply: Reply) -> list[str]:
        last = model, {"content": ""}, reply.finish_reason
        return [self.event(*last), self.event(*last, **self.figures(reply)), DONE]

    def event(self, model: str, delta: Json, reason: str | None = None, **more: Any) -> str:
        return super().event(model, dict(delta, role="assistant"), reason, **more)

    def choice(self, finish_reason: str | None, **content: Json) -> Json:
        return dict(super().choice(finish_reason, **content), native_finish_reason=finish_reason)

    def thought(self, reply: Reply) -> Json:
        detail = {"type": "reasoning.text", "text": reply.reasoning, "index": 0}
        return dict(super().thought(reply), reasoning_details=[detail]) if reply.reasoning else {}

    def usage(self, reply: Reply) -> Json:
        return dict(super().usage(reply), cost=0, is_byok=False)


DIALECTS: tuple[Dialect, ...] = (Cerebras(), Groq(), OpenRouter())


def _dialect(provider: str) -> Dialect:
    for dialect in DIALECTS:
        if dialect.name == provider:
            return dialect
    raise ValueError(f"no such provider: {provider!r}")


def _event(chunk: Json) -> str:
    return f"data: {_dumps(chunk)}\n\n"


def _dumps(value: Body) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _split(text: str, pieces: int) -> list[str]:
    """The text in so many pieces of nearly the same length; fewer when it has fewer letters."""
    cuts = [len(text) * number // pieces for number in range(pieces + 1)]
    return [text[start:end] for start, end in zip(cuts, cuts[1:]) if start < end]


def _tokens(text: str) -> int:
    return math.ceil(len(text) / 4)


def _number(value: float) -> str:
    """7 for 7.0, 0.25 for 0.25."""
    return f"{value:.6f}".rstrip("0").rstrip(".")


def _go_duration(seconds: float) -> str:
    """480ms, 7.66s, 1m26.4s, 1h0m2s."""
    if seconds < 1:
        return f"{_number(seconds * 1000)}ms"
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    whole = f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else ""
    return f"{whole}{_number(rest)}s"


# --- Quotas: what an account or a model may use up ----------------------------------------------

SPANS = {"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86400.0}
MAX_RESERVED = 16384  # tokens reserved for an answer, at most and without max_tokens
UNITS = {"requests": 1, "tokens": 500}  # what one request of another program takes
CLOSE = 1e-9  # floats that are as close as this are equal


@dataclasses.dataclass(eq=False)
class Quota:
    """So many requests or tokens per window: a token bucket, full at first.

    A request takes 1, or the tokens that it reserves: those of its prompt and max_tokens. `now`
    is the time of any clock that does not go back. Not thread-safe: the emulator has the lock.
    """

    limit: float
    window: float = 60.0  # seconds; a window of 3 is a shrunk minute
    counts: str = "requests"  # or "tokens"
    per: str = "minute"  # hour, day: what headers and messages call the window
    fixed: bool = False  # all of it comes back when a window ends, nothing before
    taken: float = 0.0  # the share that another program takes, at a steady rate
    schedule: Sequence[tuple[float, float]] = ()  # from so many seconds on: so many times the limit
    told: bool = True  # False: no header and no hint gives it away
    hint: float | None = None  # seconds that it tells who is refused, instead of the truth

    counted: ClassVar[bool] = True  # in the headers of replies

    def __post_init__(self) -> None:
        self.capacity = self.left = float(self.limit)  # left: negative when another program took it
        self._begun: float | None = None
        self._at = 0.0  # seconds since it began
        self._changes = list(self.schedule)
        self._taken_at = self._next_taken()

    @property
    def remaining(self) -> int:
        """What is left, as headers tell it."""
        return max(0, int(self.left + CLOSE))

    @property
    def full_in(self) -> float:
        """Seconds until it is full, if nobody takes any."""
        return self._wait_for(self.capacity)

    def cost(self, body: Json) -> int:
        """How much of it a request with this body needs."""
        if self.counts == "requests":
            return 1
        asked = body.get("max_completion_tokens", body.get("max_tokens"))
        answer = min(asked, MAX_RESERVED) if isinstance(asked, int) else MAX_RESERVED
        return _tokens(_dumps(body.get("messages", []))) + answer

    def wait(self, cost: float, now: float) -> float:
        """Seconds until so much of it will be there, as far as the server knows; 0.0: it is."""
        self.advance(now)
        return self._wait_for(cost)

    def take(self, cost: float) -> None:
        self.left -= cost

    def whole_seconds(self, wait: float) -> float:
        """The wait in whole seconds of a real minute (hour, day), which may be shrunk."""
        second = self.window / SPANS[self.per]
        return math.ceil(wait / second - CLOSE) * second

    def advance(self, now: float) -> None:
        """Brings it up to date. The first time, it begins."""
        if self._begun is None:
            self._begun = now
        now = max(now - self._begun, self._at)
        while True:
            changes_at = self._changes[0][0] if self._changes else math.inf
            self._refill(min(now, changes_at, self._taken_at))
            if self._at == changes_at:
                self._change(self._changes.pop(0)[1])
            elif self._at == self._taken_at:
                self.left -= UNITS[self.counts]
                self._taken_at = self._next_taken()
            else:
                return

    def _wait_for(self, amount: float) -> float:
        missing = amount - self.left
        if missing <= CLOSE:
            return 0.0
        if self.fixed:
            return (self._window_at(self._at) + 1) * self.window - self._at
        return missing * self.window / self.capacity

    def _refill(self, at: float) -> None:
        if not self.fixed:
            more = (at - self._at) * self.capacity / self.window
            self.left = min(self.capacity, self.left + more)
        elif self._window_at(at) > self._window_at(self._at):
            self.left = self.capacity
        self._at = at

    def _window_at(self, at: float) -> int:
        return math.floor(at / self.window + CLOSE)

    def _change(self, factor: float) -> None:
        before, self.capacity = self.capacity, self.limit * factor
        if self.fixed:
            self.left += self.capacity - before
        else:
            self.left = min(self.left, self.capacity)

    def _next_taken(self) -> float:
        if not self.taken:
            return math.inf
        return self._at + UNITS[self.counts] * self.window / (self.capacity * self.taken)


class AtOnce(Quota):
    """So many requests at a time, each of which takes so many seconds."""

    counted = False

    def __init__(self, limit: float, takes: float, **more: Any) -> None:
        super().__init__(limit, **more)
        self.takes = takes
        self._ends: list[float] = []  # when those under way will be answered

    def wait(self, cost: float, now: float) -> float:
        self.advance(now)
        self._ends = [end for end in self._ends if end > self._at + CLOSE]
        return 0.0 if len(self._ends) < self.limit else min(self._ends) - self._at

    def take(self, cost: float) -> None:
        self._ends.append(self._at + self.takes)


class Storm(Quota):
    """Refuses everybody for the first `lasts` seconds of every `every` seconds."""

    counted = False

    def __init__(self, every: float, lasts: float, **more: Any) -> None:
        super().__init__(math.inf, fixed=True, **more)
        self.every, self.lasts = every, lasts

    def wait(self, cost: float, now: float) -> float:
        self.advance(now)
        return max(0.0, self.lasts - self._at % self.every)


class Chance(Quota):
    """Refuses a share of the requests, at random; it is the same share of the same seed."""

    counted = False

    def __init__(self, share: float, seed: int = 1, **more: Any) -> None:
        super().__init__(math.inf, fixed=True, **more)
        self.share, self._random = share, random.Random(seed)  # noqa: S311 - no secret

    def wait(self, cost: float, now: float) -> float:
        return CLOSE if self._random.random() < self.share else 0.0


def admit(quotas: Sequence[Quota], body: Json, now: float) -> tuple[Quota, float] | None:
    """Takes from each quota what the request needs, or nothing if one of them has too little.

    Then it returns the quota that makes the request wait longest, and how long: for ever, if the
    request is larger than the whole quota.
    """
    costs = [quota.cost(body) for quota in quotas]
    longest: tuple[Quota, float] | None = None
    for quota, cost in zip(quotas, costs):
        wait = quota.wait(cost, now)
        if cost > quota.capacity:
            wait = math.inf
        if wait > (longest[1] if longest else 0.0):
            longest = quota, wait
    if longest is None:
        for quota, cost in zip(quotas, costs):
            quota.take(cost)
    return longest


def refusal(provider: str, quota: Quota, wait: float, wide: bool, now: float) -> Reply:
    """The provider's 429 for a quota that is used up. wide: the account's. now: epoch seconds.

    A request that is larger than the quota (the wait is infinite) gets the 413 instead.
    """
    dialect = _dialect(provider)
    if wait == math.inf:
        return error(provider, "too_large")
    if quota.hint is not None:
        wait = quota.hint
    how = dialect.hints[wide] if quota.told else "none"
    hint = Hint(wait, how, quota.per, now, quota.counts, wide)
    own, body = dialect.limit(hint)
    headers = {**hint.headers(), **own}
    if "retry-after" in headers:
        headers["retry-after"] = _number(quota.whole_seconds(wait))
    return Reply(429, body=body, headers=headers)


def quota_headers(provider: str, quotas: Sequence[Quota]) -> Headers:
    """The headers of any reply, without those of quotas that are not in force."""
    dialect = _dialect(provider)
    headers = {name: "" for name in dialect.headers if name.startswith("x-ratelimit-")}
    headers.update(
        dialect.quota_headers([quota for quota in quotas if quota.told and quota.counted])
    )
    return headers


# --- The wire: a connection, a reply as bytes, and the faults that spoil it ---------------------


class _Link:
    """One accepted connection. Whatever finds the other end gone raises an OSError.

    It waits by listening: a client that leaves, or an emulator that stops, ends a wait at once.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.reader = connection.makefile("rb")

    def read(self) -> tuple[str, str, Headers, bytes] | None:
        """Method, path, headers and body of the next request, None when there is none."""
        words = self.reader.readline().decode("latin-1").split()
        if len(words) != 3:
            return None
        headers = {}
        for line in iter(self.reader.readline, b"\r\n"):
            if not line:
                return None
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        length = headers.get("content-length", "0")
        body = self.reader.read(int(length) if length.isdigit() else 0)
        return words[0], urlsplit(words[1]).path, headers, body

    def send(self, part: bytes) -> None:
        self.connection.sendall(part)

    def wait(self, seconds: float) -> None:
        if seconds <= 0:
            return
        self.connection.settimeout(seconds)
        try:
            if not self.connection.recv(1, socket.MSG_PEEK):
                raise ConnectionError("the client has gone")
        except socket.timeout:
            pass
        finally:
            self.connection.settimeout(None)

    def hold(self) -> None:
        while self.connection.recv(65536):
            pass

    def reset(self) -> None:
        """Makes the coming close() an RST."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    def close(self) -> None:
        self.reader.close()
        self.connection.close()


@dataclasses.dataclass(frozen=True)
class _Page:
    """A reply as bytes, whole and right: the steps that a gap separates, and what ends them."""

    status: int
    headers: Headers
    steps: list[bytes]  # at least one, each with a piece of the text
    ending: bytes
    gap: float
    chunked: bool
    beat: bytes  # what keeps the connection alive without saying anything

    @property
    def body(self) -> bytes:
        return b"".join(self.steps) + self.ending

    @property
    def beginning(self) -> list[bytes]:
        return self.steps[: max(1, len(self.steps) // 2)]

    def head(self, missing: int = 0) -> bytes:
        """Status line and headers; they promise `missing` bytes more than there are."""
        length = len(self.body) + missing
        framing = "transfer-encoding: chunked" if self.chunked else f"content-length: {length}"
        lines = [f"{name}: {value}" for name, value in self.headers.items()]
        phrase = http.client.responses.get(self.status, "Emulated")
        head = [f"HTTP/1.1 {self.status} {phrase}", framing, *lines, "\r\n"]
        return "\r\n".join(head).encode("latin-1")

    def frame(self, part: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(part), part) if self.chunked and part else part


def _page(dialect: Dialect, reply: Reply, model: str, stream: bool) -> _Page:
    """The reply in the dialect, as bytes."""
    steps, ending, content_type = _content(dialect, reply, model, stream)
    headers = {"content-type": content_type, "server": "cloudflare"}
    if reply.status == 200:
        headers.update(dialect.headers)
    headers.update((name.lower(), value) for name, value in reply.headers.items())
    headers = {name: value for name, value in headers.items() if value}
    streams = headers["content-type"].startswith("text/event-stream")
    beat = dialect.comment.encode() if streams else b"\n"
    chunked = reply.fault in ENDLESS or streams or dialect.chunked
    chunked = chunked and reply.fault not in SIZED
    return _Page(reply.status, headers, steps, ending, reply.gap, chunked, beat)


def _content(
    dialect: Dialect, reply: Reply, model: str, stream: bool
) -> tuple[list[bytes], bytes, str]:
    """The steps and the ending of the body, and its type."""
    if reply.fault == "html":
        return _halves(b"<!DOCTYPE html>\n<title>Bad gateway</title>\n"), b"", "text/html"
    if reply.fault == "empty":
        return [b""], b"", JSON_TYPE
    if reply.fault in SPOILED:
        plain, streamed = SPOILED[reply.fault](dialect, model, _told(dialect, reply, model))
        if stream:
            return _halves(streamed.encode()), b"", dialect.stream_type
        return _halves(plain.encode()), b"", JSON_TYPE
    if reply.body is not None:
        return _halves(_encoded(reply.body, model)), b"", JSON_TYPE
    if reply.status >= 300:
        body = dialect.error(Row(reply.status, f"An emulated {reply.status}"))
        return _halves(_encoded(body, model)), b"", JSON_TYPE
    told = _told(dialect, reply, model)
    if not stream:
        return _halves(_dumps(dialect.document(model, told)).encode()), b"", JSON_TYPE
    pieces = dialect.pieces(model, told)
    steps = ["".join([*dialect.opening(model, told), *pieces[:1]]), *pieces[1:]]
    ending = "".join(dialect.closing(model, told))
    return [step.encode() for step in steps], ending.encode(), dialect.stream_type


# Bodies of 200 that hold no right answer: as a JSON document, and as a stream.


def _malformed(dialect: Dialect, model: str, reply: Reply) -> tuple[str, str]:
    opening, pieces = dialect.opening(model, reply), dialect.pieces(model, reply)
    middle = len(pieces) // 2
    if pieces:
        event = pieces[middle]
        pieces[middle] = event[: len(event) // 2] + "\n\n"
    stream = "".join([*opening, *pieces, *dialect.closing(model, reply)])
    return _dumps(dialect.document(model, reply))[:-1] + ",}", stream


def _no_choices(dialect: Dialect, model: str, reply: Reply) -> tuple[str, str]:
    body = dict(dialect.document(model, reply), choices=[])
    return _dumps(body), _event(dict(body, object="chat.completion.chunk")) + DONE


def _error_object(dialect: Dialect, model: str, reply: Reply) -> tuple[str, str]:
    body = _encoded(dialect.error(dialect.errors["overloaded"]), model).decode()
    return body, f"data: {body}\n\n"


def _error_midway(dialect: Dialect, model: str, reply: Reply) -> tuple[str, str]:
    opening, pieces = dialect.opening(model, reply), dialect.pieces(model, reply)
    trouble = dialect.in_stream().replace(MODEL, model)
    half = dataclasses.replace(reply, text=_split(reply.text or "", 2)[0], finish_reason="error")
    body = dialect.document(model, half)
    body["choices"][0]["error"] = {"code": 502, "message": "The upstream provider hung up"}
    return _dumps(body), "".join([*opening, *pieces[:-1], trouble])


SPOILED: dict[str, Callable[[Dialect, str, Reply], tuple[str, str]]] = {
    "malformed": _malformed,
    "no-choices": _no_choices,
    "error-in-200": _error_object,
    "error-midway": _error_midway,
}


def _encoded(body: Body, model: str) -> bytes:
    """The body as bytes, with the model's name where MODEL stands; bytes stay what they are."""
    if isinstance(body, bytes):
        return body
    text = body if isinstance(body, str) else _dumps(body)
    return text.replace(MODEL, _dumps(model)[1:-1]).encode()


def _halves(body: bytes) -> list[bytes]:
    middle = len(body) // 2
    return [body[:middle], body[middle:]]


def _send(link: _Link, page: _Page, steps: Sequence[bytes], tail: bytes = b"") -> None:
    """Sends head, steps and tail: in one write, or with the gap between the steps."""
    frames = [page.frame(step) for step in steps]
    frames[0] = page.head() + frames[0]
    frames[-1] += tail
    if not page.gap:
        frames = [b"".join(frames)]
    for number, frame in enumerate(frames):
        link.wait(page.gap if number else 0)
        link.send(frame)


# A fault gets the page that a healthy provider would send. Only what says True leaves the
# connection fit for another request.


def _whole(link: _Link, page: _Page) -> bool:
    steps = [*page.steps[:-1], page.steps[-1] + page.ending]
    _send(link, page, steps, b"0\r\n\r\n" if page.chunked else b"")
    return True


def _cut(link: _Link, page: _Page) -> bool:
    return _whole(link, dataclasses.replace(page, steps=page.beginning, ending=b""))


def _silence_after_headers(link: _Link, page: _Page) -> None:
    link.send(page.head())
    link.hold()


def _stall(link: _Link, page: _Page) -> None:
    _send(link, page, page.beginning)
    link.hold()


def _drip(link: _Link, page: _Page) -> bool:
    link.send(page.head())
    for number in page.body:
        link.wait(page.gap or BEAT)
        link.send(bytes([number]))
    return True


def _keep_alives(link: _Link, page: _Page) -> None:
    link.send(page.head())
    while True:
        link.send(page.frame(page.beat))
        link.wait(page.gap or BEAT)


def _huge(link: _Link, page: _Page) -> None:
    piece = page.steps[-1] or b" "
    block = page.frame(piece * (1 + 65536 // len(piece)))
    link.send(page.head() + page.frame(page.steps[0]))
    while True:
        link.send(block)


def _reset_midway(link: _Link, page: _Page) -> None:
    _send(link, page, page.beginning)
    link.wait(page.gap or BEAT)  # the text is to be read before the RST discards it
    link.reset()


FAULTS: dict[str, Callable[[_Link, _Page], bool | None]] = {
    "": _whole,
    "silence": lambda link, page: link.hold(),  # not one byte
    "silence-after-headers": _silence_after_headers,
    "stall": _stall,  # some text, then nothing
    "drip": _drip,  # all of it, with its length, byte by byte
    "keep-alives": _keep_alives,  # comments for ever (new lines, where no stream was asked for)
    "reset": lambda link, page: link.reset(),  # an RST instead of a reply
    "reset-midway": _reset_midway,  # some text, then an RST
    "cut": _cut,  # some text, and an end that is right for HTTP and wrong for the answer
    "short": lambda link, page: link.send(page.head(missing=100) + page.body),  # than its length
    "html": _whole,  # a web page instead of the answer
    "empty": _whole,  # a body of no bytes
    "huge": _huge,  # text without end (a line without end, where no stream was asked for)
    "close": lambda link, page: None,  # the connection is closed instead of a reply
    "malformed": _whole,  # JSON that does not parse, in the middle of the text
    "no-choices": _whole,  # an answer without choices
    "error-in-200": _whole,  # the error of an overloaded service, and nothing else
    "error-midway": _whole,  # some text, then the provider's error
}
MUTE = ("silence", "reset", "close")  # no status is sent
SIZED, ENDLESS = ("drip", "short"), ("keep-alives", "huge")  # with a content-length; without


# --- The server ---------------------------------------------------------------------------------


@contextlib.contextmanager
def dead_address() -> Iterator[Any]:
    """An address that answers nothing: the queue of its port is full."""
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for queued in (first, second):
            queued.setblocking(False)
            queued.connect_ex(full.getsockname())
        yield full.getsockname()


class Emulator:
    """The three providers on a port of 127.0.0.1, for as long as the `with` block lasts.

    models: what a provider serves, by its name; another model is then gone. A provider that is
    not named there answers for every model. clock: of the quotas. tell: is called with every
    request and its reply, before that is sent.
    """

    def __init__(
        self,
        models: Mapping[str, Sequence[str]] | None = None,
        port: int = 0,
        clock: Callable[[], float] = time.monotonic,
        tell: Callable[[Asked, Reply], None] = lambda asked, reply: None,
    ) -> None:
        self.url = ""  # known once it serves
        self.connections = 0  # accepted so far
        self._served = {_dialect(name).name: tuple(ids) for name, ids in (models or {}).items()}
        self._port = port
        self._plans: dict[str, list[Reply]] = {}
        self._clock = clock
        self._tell = tell
        self._quotas: dict[str, list[Quota]] = {}
        self._counts: dict[str, Count] = {}
        self._asked: list[Asked] = []
        self._links: dict[_Link, threading.Thread] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Emulator:
        self._stopping = False
        self._listener = socket.socket()
        try:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # inherited
            self._listener.bind(("127.0.0.1", self._port))
            self._listener.listen(1024)
        except OSError:
            self._listener.close()
            raise
        self._port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self._acceptor = threading.Thread(target=self._accept, name="emulator", daemon=True)
        self._acceptor.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopping = True
        with contextlib.suppress(OSError):  # a connection wakes the acceptor
            socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
        self._acceptor.join()
        self._listener.close()
        with self._lock:
            links = dict(self._links)
            for link in links:
                with contextlib.suppress(OSError):  # the client may have gone
                    link.connection.shutdown(socket.SHUT_RDWR)
        for thread in links.values():
            thread.join()

    def environment(self) -> dict[str, str]:
        """The variables that point the program here; the base URLs leave the path to it."""
        variables = {}
        for dialect in DIALECTS:
            variables[f"{dialect.name.upper()}_API_KEY"] = dialect.key
            variables[f"{dialect.name.upper()}_BASE_URL"] = self.url
        return variables

    def plan(self, target: str, *replies: Reply) -> None:
        """Sets the replies of a provider, or of one of its models ("groq/openai/gpt-oss-20b").

        They come in order, the last one for ever; none: the plan is dropped. A model's own plan
        wins. "groq/models" and "openrouter/key" are the replies to GET.
        """
        _dialect(target.split("/")[0])
        with self._lock:
            self._plans[target] = list(replies)

    def limit(self, target: str, *quotas: Quota) -> None:
        """Sets the quotas of a provider's account, or of one of its models; none: they are lifted.

        All begin with the first question to a model that has any. A request that one of them
        refuses takes nothing from the others.
        """
        _dialect(target.split("/")[0])
        with self._lock:
            self._quotas[target] = list(quotas)

    @property
    def counts(self) -> dict[str, Count]:
        """What became of the questions to each model ("groq/openai/gpt-oss-20b")."""
        with self._lock:
            return dict(self._counts)

    @property
    def asked(self) -> list[Asked]:
        """The requests so far, in the order of their arrival."""
        with self._lock:
            return list(self._asked)

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            if self._stopping:
                connection.close()
                return
            link = _Link(connection)
            thread = threading.Thread(target=self._serve, args=(link,), daemon=True)
            with self._lock:
                self.connections += 1
                self._links[link] = thread
            thread.start()

    def _serve(self, link: _Link) -> None:
        """Answers the requests of one connection until either end has had enough."""
        try:
            with contextlib.suppress(OSError):
                while self._answer(link):
                    pass
        finally:
            with self._lock:
                del self._links[link]
                link.close()

    def _answer(self, link: _Link) -> bool:
        """Answers one request. Returns whether there may be another."""
        request = link.read()
        if request is None:
            return False
        method, path, headers, raw = request
        body = _parsed(raw)
        model = body["model"] if isinstance(body.get("model"), str) else ""
        found = [dialect for dialect in DIALECTS if path.startswith(dialect.path + "/")]
        provider = found[0].name if found else ""
        asked = Asked(time.monotonic(), provider, path, model, headers, body)
        with self._lock:
            self._asked.append(asked)
        dialect = found[0] if found else DIALECTS[0]
        reply = self._reply(dialect, method, asked)
        stream = reply.stream
        if stream is None:
            stream = body.get("stream") is True and reply.fault not in SIZED
        page = _page(dialect, reply, model, stream)
        self._tell(asked, reply)
        link.wait(reply.delay)
        fit = FAULTS[reply.fault](link, page)
        return bool(fit) and headers.get("connection") != "close"

    def _reply(self, dialect: Dialect, method: str, asked: Asked) -> Reply:
        """What the provider says to this request."""
        if asked.headers.get("user-agent", "").startswith(REFUSED_AGENTS):
            return error(dialect.name, "cloudflare")
        endpoint = f"{method} {asked.path[len(dialect.path) :]}"
        if not asked.provider or endpoint not in dialect.endpoints:
            return error(dialect.name, "no_path")
        authorization = asked.headers.get("authorization")
        if endpoint not in dialect.keyless and authorization != f"Bearer {dialect.key}":
            no_key = authorization is None and "no_key" in dialect.errors
            return error(dialect.name, "no_key" if no_key else "bad_key")
        if endpoint == CHAT:
            return self._chat(dialect, asked)
        planned = self._next(dialect.name + endpoint[len("GET ") :])
        return planned or Reply(body=self._data(dialect, endpoint))

    def _chat(self, dialect: Dialect, asked: Asked) -> Reply:
        if not (asked.model and isinstance(asked.body.get("messages"), list)):
            return error(dialect.name, "bad_request")
        refused, headers = self._admission(dialect, asked)
        reply = refused or self._answered(dialect, asked)
        if reply.text is None and _wants_json(asked.body):
            reply = dataclasses.replace(reply, text=ANSWER_IN_JSON)
        return dataclasses.replace(reply, headers={**headers, **reply.headers})

    def _admission(self, dialect: Dialect, asked: Asked) -> tuple[Reply | None, Headers]:
        """A refusal, if a quota is used up; and the headers that tell of the quotas."""
        target, now = f"{dialect.name}/{asked.model}", self._clock()
        with self._lock:
            account = self._quotas.get(dialect.name, [])
            quotas = [*account, *self._quotas.get(target, [])]
            if quotas:
                for quota in itertools.chain.from_iterable(self._quotas.values()):
                    quota.advance(now)
            refused = admit(quotas, asked.body, now)
            granted, refusals = self._counts.get(target, Count())
            self._counts[target] = Count(granted + (not refused), refusals + bool(refused))
            headers = quota_headers(dialect.name, quotas) if quotas else {}
        if refused is None:
            return None, headers
        quota, wait = refused
        reply = refusal(dialect.name, quota, wait, quota in account, time.time())
        return dataclasses.replace(reply, headers={**reply.headers, **headers}), headers

    def _answered(self, dialect: Dialect, asked: Asked) -> Reply:
        planned = self._next(f"{dialect.name}/{asked.model}")
        if planned is not None:
            return planned
        if asked.model not in self._served.get(dialect.name, [asked.model]):
            return error(dialect.name, "gone")
        return self._next(dialect.name) or Reply()

    def _data(self, dialect: Dialect, endpoint: str) -> Json:
        if endpoint == MODELS:
            return dialect.listing(self._served.get(dialect.name, dialect.models))
        daily = {"used": 2, "limit": 50, "remaining": 48}
        key = {"label": "sk-or-v1-emu...lat", "limit": None, "limit_remaining": None, "usage": 0}
        return {"data": dict(key, is_free_tier=True, free_model_daily_requests=daily)}

    def _next(self, target: str) -> Reply | None:
        """The next planned reply, None without a plan."""
        with self._lock:
            replies = self._plans.get(target)
            if not replies:
                return None
            return replies.pop(0) if len(replies) > 1 else replies[0]


def _parsed(body: bytes) -> Json:
    """The JSON object in the body, {} when it holds none."""
    try:
        parsed = json.loads(body.decode())
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _wants_json(body: Json) -> bool:
    """Whether the parameters or the last message ask for it."""
    told = _dumps([body.get("response_format"), body["messages"][-1:]])
    return "json_" in told or "JSON" in told


# --- The command line ---------------------------------------------------------------------------

KINDS = {  # of statuses that every provider has a text of its own for
    401: "bad_key",
    402: "no_credit",
    403: "forbidden",
    404: "gone",
    413: "too_large",
    500: "server",
    503: "overloaded",
}
OF_THE_KEY = ("401", "403")
OTHER_NAMES = {"ok": "", "timeout": "silence"}
NAMES = ["ok", "no-text", "timeout", *filter(None, FAULTS)]  # of --fault, beside statuses
MORE_HELP = """
faults:
  an HTTP status      400 to 599, in the words of the provider where it has some
  no answer at all    timeout (or silence), silence-after-headers, keep-alives,
                      close, reset
  a part of it        stall, cut, short, reset-midway, error-midway, malformed
  something else      html, empty, no-text, no-choices, error-in-200
  slow, or endless    drip, huge
  the right answer    ok

examples:
  python tests/emulator.py
  python tests/emulator.py --answer '{"city": "Lima"}' --delay 0.5
  python tests/emulator.py --fault 503 --provider cerebras,groq
  python tests/emulator.py --fault 429,429,ok --retry-after 2
  python tests/emulator.py --fault cut --provider cerebras
  python tests/emulator.py --quota 30

It prints lines that you paste into another shell. A program that is started there
asks the emulator instead of the providers. Ctrl-C ends the emulator.
"""


def fail(message: str) -> NoReturn:
    """Ends the program because of how it was called."""
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)


class _Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        fail(re.sub(r"^argument (\S+): ", r"\1 ", message))


def _number_from(least: float, most: float, kind: Callable[[str], float]) -> Callable[[str], float]:
    """The type of an option."""

    def number(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if least <= value <= most:
                return value
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {what} from {least} to {most}, not {text!r}")

    return number


def _one_or_more(names: Sequence[str], statuses: bool = False) -> Callable[[str], list[str]]:
    """The type of an option that takes names with commas between them."""

    def chosen(text: str) -> list[str]:
        words = [word.strip() for word in text.split(",")]
        for word in words:
            if word not in names and not (statuses and re.match("[45][0-9][0-9]$", word)):
                known = ", ".join([*names, *["a status from 400 to 599"] * statuses])
                raise argparse.ArgumentTypeError(f"must be one or more of {known}, not {word!r}")
        return words

    return chosen


def options_parser() -> argparse.ArgumentParser:
    """What reads the options of the command line, and explains them."""
    parser = _Parser(
        prog="python tests/emulator.py",
        description="Cerebras, Groq and OpenRouter on a port of this machine, with their faults.",
        epilog=MORE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    seconds = _number_from(0, 86400, float)
    add("--answer", metavar="TEXT", help="what every model answers")
    add(
        "--fault",
        metavar="NAMES",
        type=_one_or_more(NAMES, statuses=True),
        help="what becomes of a provider's first question, its second one and so on, separated by "
        "commas; the last one repeats, also for its list of models in an outage",
    )
    add(
        "--retry-after",
        metavar="SECONDS",
        type=seconds,
        help="what --fault 429 says (default: as the provider usually does)",
    )
    add("--delay", metavar="SECONDS", type=seconds, default=0, help="wait before each reply")
    add(
        "--quota",
        metavar="N",
        type=_number_from(1, 10**6, int),
        help="requests per minute that a provider allows; it refuses the others with a 429",
    )
    add(
        "--provider",
        metavar="NAMES",
        type=_one_or_more([dialect.name for dialect in DIALECTS]),
        help="who has the fault, the delay and the quota (default: all of "
        "cerebras,groq,openrouter)",
    )
    add(
        "--port",
        metavar="N",
        type=_number_from(0, 65535, int),
        default=0,
        help="default: a free one, another one each time",
    )
    return parser


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The options. What is wrong with them ends the program."""
    options = options_parser().parse_args(arguments)
    if options.provider and not (options.fault or options.delay or options.quota):
        fail("--provider needs --fault, --delay or --quota")
    if options.retry_after is not None and "429" not in (options.fault or []):
        fail("--retry-after needs --fault 429")
    return options


def prepared(
    options: argparse.Namespace, tell: Callable[[Asked, Reply], None] = lambda asked, reply: None
) -> Emulator:
    """The emulator that these options describe."""
    emulator = Emulator(port=options.port, tell=tell)
    for dialect in DIALECTS:
        emulator.plan(dialect.name, Reply(text=options.answer))
    faults = options.fault or ["ok"]
    for name in options.provider or [dialect.name for dialect in DIALECTS]:
        replies = [named(name, fault, options.retry_after) for fault in faults]
        replies = [dataclasses.replace(reply, delay=options.delay) for reply in replies]
        emulator.plan(name, *(_with_text(reply, options.answer) for reply in replies))
        for endpoint in _also_down(_dialect(name), faults[-1]):
            emulator.plan(name + endpoint[len("GET ") :], replies[-1])
        if options.quota:
            emulator.limit(name, Quota(options.quota))
    return emulator


def _also_down(dialect: Dialect, fault: str) -> list[str]:
    """What else has this fault, if it is the provider's or the key's rather than an answer's."""
    others = [endpoint for endpoint in dialect.endpoints if endpoint != CHAT]
    if fault in OF_THE_KEY:
        return [endpoint for endpoint in others if endpoint not in dialect.keyless]
    is_outage = fault.startswith("5") or OTHER_NAMES.get(fault, fault) in MUTE
    return others if is_outage else []


def named(provider: str, fault: str, retry_after: float | None = None) -> Reply:
    """The reply with a fault that has a name on the command line."""
    if fault == "429":
        return rate_limited(provider, retry_after)
    if fault == "no-text":
        return Reply(text="")
    if not fault.isdigit():
        return Reply(fault=OTHER_NAMES.get(fault, fault))
    status = int(fault)
    return error(provider, KINDS[status]) if status in KINDS else Reply(status)


def _with_text(reply: Reply, text: str | None) -> Reply:
    return dataclasses.replace(reply, text=text) if reply.text is None else reply


def line(asked: Asked, reply: Reply) -> str:
    """What is shown of a request and its reply."""
    at = time.strftime("%H:%M:%S")
    status = "---" if reply.fault in MUTE else reply.status
    words = f"{at} {asked.provider or '-'} {asked.model or asked.path} {status} {_outcome(reply)}"
    shown = words.replace(MODEL, asked.model)
    return "".join(letter if letter.isprintable() else "?" for letter in shown)


def _outcome(reply: Reply) -> str:
    if reply.fault or reply.status == 200:
        return reply.fault or "answered"
    body = reply.body if isinstance(reply.body, dict) else {}
    message = body.get("error", body).get("message") or http.client.responses.get(reply.status, "")
    message = textwrap.shorten(message, 60, placeholder=" ...")
    hint = reply.headers.get("retry-after")
    return f"{message} (Retry-After: {hint})" if hint else message


def _show(asked: Asked, reply: Reply) -> None:
    with contextlib.suppress(OSError):  # who reads it may have gone
        sys.stderr.write(line(asked, reply) + "\n")
        sys.stderr.flush()


def serve(options: argparse.Namespace) -> NoReturn:
    """Prints the environment, then a line for each request, until somebody ends it."""
    with contextlib.ExitStack() as stack:
        try:
            emulator = stack.enter_context(prepared(options, _show))
        except OSError as problem:
            fail(f"--port {options.port} cannot be used: {problem.strerror}")
        print("Paste these lines into another shell. Ctrl-C ends the emulator.", file=sys.stderr)
        variables = emulator.environment()
        if "http" in getproxies():
            variables["no_proxy"] = "127.0.0.1"
        lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
        print("\n".join(lines), flush=True)
        while True:
            time.sleep(3600)


def interrupted() -> NoReturn:
    """Ends this process as Ctrl-C does, so that a shell's loop stops; an exit code would not."""
    if os.name == "posix":
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(130)


def main() -> None:
    try:
        serve(parsed(sys.argv[1:]))
    except KeyboardInterrupt:
        interrupted()


if __name__ == "__main__":
    main()
