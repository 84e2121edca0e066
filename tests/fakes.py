"""A clock that only sleeping moves, and a server that follows a script: tests without waiting.

world = World({"a": [limited(7), says("Paris.")]})
world.llm.complete("Where?").text        # "Paris."
world.asked, world.slept                 # "aa", [7.0]
"""

from __future__ import annotations

import dataclasses
import http.client
import io
import json
import threading
from typing import Any, Callable, Dict, Mapping, NamedTuple
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPResponse

from fallback_llm import FallbackLLM, Provider, RetryConfig

Json = Dict[str, Any]
Script = Mapping[str, Any]  # model: a list of Reply, or of what makes one of an Asked
EPOCH = 1790000000.0  # what the wall clock shows when the other one shows 0
DONE = b"data: [DONE]\n\n"


class Asked(NamedTuple):
    """One request."""

    model: str  # of a GET: "one/models"
    at: float
    url: str
    headers: Mapping[str, Any]
    body: Json


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the server does with a request."""

    status: int = 200
    body: Any = b""  # JSON, text, bytes; a tuple: pieces, seconds that pass, errors that are raised
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    takes: float = 0.0  # seconds before the headers
    error: BaseException | None = None  # raised instead of a reply
    meanwhile: Callable[[], object] | None = None  # called while the request is under way


def says(text: Any = "Hello.", finish: Any = "stop", takes: float = 0.0, **more: Any) -> Reply:
    """An answer as plain JSON; `more` stands beside its text."""
    message = dict(more, role="assistant", content=text)
    choices = [{"index": 0, "message": message, "finish_reason": finish}]
    return Reply(body={"choices": choices}, takes=takes)


def event(text: str | None = None, finish: str | None = None, **more: Any) -> bytes:
    """One event of a stream; `more` stands beside its choices."""
    choice = {"index": 0, "delta": {} if text is None else {"content": text}}
    choices = [dict(choice, finish_reason=finish)]
    return b"data: " + json.dumps({"choices": choices, **more}).encode() + b"\n\n"


def limited(seconds: float | None = None, **more: Any) -> Reply:
    """A 429, with a Retry-After when there are seconds."""
    hint = {} if seconds is None else {"Retry-After": str(seconds)}
    return Reply(429, {"error": {"message": "Slow down"}}, hint, **more)


def fails(status: int = 500, **more: Any) -> Reply:
    return Reply(status, {"error": {"message": "Not now"}}, **more)


class FakeClock:
    def __init__(self) -> None:
        self.now, self.slept = 0.0, []  # type: float, list[float]

    def time(self) -> float:
        return self.now

    def epoch(self) -> float:
        return EPOCH + self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


class Body(io.RawIOBase):
    """A body that comes in pieces: each read gets one, or what is left of it."""

    def __init__(self, clock: FakeClock, body: Any) -> None:
        body = json.dumps(body) if body is None or isinstance(body, (dict, list)) else body
        body = body.encode() if isinstance(body, str) else body
        self._clock, self._pieces = clock, list(body if isinstance(body, tuple) else (body,))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._pieces:
            piece = self._pieces.pop(0)
            if isinstance(piece, Exception):
                raise piece
            if isinstance(piece, (int, float)):
                self._clock.now += piece
            elif piece:
                size = min(len(buffer), len(piece))
                buffer[:size] = piece[:size]
                self._pieces[:0] = [piece[size:]] if piece[size:] else []
                return size
        return 0

    def read1(self, size: int = -1) -> bytes | None:
        return self.read(65536 if size is None or size < 0 else size)


class FakeServer(HTTPAdapter):
    """Replies by model, in order, the last one for ever. Without a script a model answers with
    its name in capitals.
    """

    def __init__(self, clock: FakeClock, script: Script) -> None:
        super().__init__()
        self.clock, self.asked = clock, []  # type: FakeClock, list[Asked]
        self.bodies: list[Body] = []
        self.settings: Mapping[str, Any] = {}  # of the latest request: verify, proxies ...
        self._script = {model: list(replies) for model, replies in script.items()}
        self._lock = threading.Lock()

    def send(self, request: requests.PreparedRequest, *_: Any, **settings: Any) -> Any:
        url, body = urlsplit(str(request.url)), json.loads(request.body or b"{}")
        model = body.get("model") or f"{url.hostname}/{url.path.rsplit('/', 1)[-1]}"
        asked = Asked(model, self.clock.now, str(request.url), request.headers, body)
        with self._lock:
            self.asked.append(asked)
            replies = self._script.setdefault(model, [says(model.upper())])
            planned = replies.pop(0) if len(replies) > 1 else replies[0]
        reply = planned if isinstance(planned, Reply) else planned(asked)
        if reply.meanwhile is not None:
            reply.meanwhile()
        self.settings, timeout = settings, settings.get("timeout")
        longest = timeout[1] if isinstance(timeout, tuple) else timeout
        self.clock.now += reply.takes if longest is None else min(reply.takes, longest)
        if longest is not None and reply.takes > longest:
            raise requests.ReadTimeout("Read timed out.", request=request)
        if reply.error is not None:
            raise reply.error
        self.bodies.append(Body(self.clock, reply.body))
        headers, reason = dict(reply.headers), http.client.responses.get(reply.status)
        raw = HTTPResponse(
            self.bodies[-1], headers, reply.status, reason=reason, preload_content=False
        )
        return self.build_response(request, raw)


def row(name: str, *models: str, **more: Any) -> Provider:
    """A provider that needs no key."""
    return Provider(name, f"https://{name}/v1", more.pop("key_env", None), models, **more)


ROWS = (row("one", "a", "b"), row("two", "c", "d"))


class World:
    """A clock, a server and the program: two providers with two models, no jitter, no key.

    Settings are those of RetryConfig and of FallbackLLM.
    """

    def __init__(self, script: Script | None = None, **settings: Any) -> None:
        fields = [field.name for field in dataclasses.fields(RetryConfig) if field.name in settings]
        config = RetryConfig(**{"jitter": False, **{name: settings.pop(name) for name in fields}})
        self.clock = FakeClock()
        self.server = FakeServer(self.clock, script or {})
        session = requests.Session()
        for scheme in ("https://", "http://"):
            session.mount(scheme, self.server)
        clocks = {"clock": self.clock.time, "wall_clock": self.clock.epoch}
        settings = {"providers": ROWS, **clocks, "sleep": self.clock.sleep, **settings}
        self.llm = FallbackLLM(config, session=session, **settings)

    @property
    def asked(self) -> str:
        """The models that were asked, one after the other."""
        return "".join(asked.model for asked in self.server.asked)

    @property
    def slept(self) -> list[float]:
        return self.clock.slept
