"""A clock that only sleeping moves, and a server that follows a script: tests without waiting.

    world = World({"a": [limited(7), says("Paris.")]})
    world.llm.complete("Where?").text        # "Paris."
    world.asked, world.slept                 # "aa", [7.0]

And many threads that share a client and such a clock; every run of a crowd is the same:

    crowd = Crowd(50, {"a": [Metered(Quota(10))]})   # Quota: of the emulator, ten a minute
    crowd.ask(200)
    crowd.refused, crowd.lost, crowd.share   # requests, questions, of the ideal throughput
"""

from __future__ import annotations

import copy
import dataclasses
import heapq
import http.client
import io
import itertools
import json
import random
import threading
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Sequence,
    Tuple,
)
from urllib.parse import urlsplit

import requests
from emulator import Quota, admit
from requests.adapters import HTTPAdapter
from urllib3 import HTTPResponse

from fallback_llm import Answer, FallbackLLM, FallbackLLMError, Provider, RetryConfig

Json = Dict[str, Any]
Script = Mapping[str, Any]  # model: a list of Reply, or of what makes one of an Asked
EPOCH = 1790000000.0  # what the wall clock shows when the other one shows 0
DONE = b"data: [DONE]\n\n"
SIZE = 500  # tokens of an answer, at most
STUCK = 10.0  # real seconds; only a test that fails waits so long


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
    """Time that passes when the program sleeps or waits for the server."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def time(self) -> float:
        return self.now

    def epoch(self) -> float:
        return EPOCH + self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.wait(seconds)

    def wait(self, seconds: float) -> None:
        """Lets time pass that the program did not ask for."""
        self.now += seconds


class SharedClock(FakeClock):
    """Time for threads: it goes on when all of them wait, to the first who wakes.

    One thread runs at a time, until it waits; who wakes at the same moment goes by who waited
    first. So every run is the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self._waiting: List[Tuple[float, int, threading.Event]] = []  # a heap
        self._numbers = itertools.count()
        self._turns = 0  # how often a thread was woken

    def wait(self, seconds: float) -> None:
        turn = self._turn_in(seconds)
        self._wake_first()
        self._stand_by(turn)

    def run(self, tasks: Iterable[Callable[[], object]]) -> None:
        """Runs each task in a thread; returns when all have ended. Raises what one of them did."""
        errors: list[BaseException] = []

        def work(task: Callable[[], object], turn: threading.Event, end: threading.Event) -> None:
            turn.wait()
            try:
                task()
            except BaseException as error:  # noqa: BLE001 - it is raised again below
                errors.append(error)
            finally:
                end.set()
                self._wake_first()

        ends = []
        for task in tasks:
            end = threading.Event()
            arguments = (task, self._turn_in(0.0), end)
            threading.Thread(target=work, args=arguments, daemon=True).start()
            ends.append(end)
        self._wake_first()
        for end in ends:
            self._stand_by(end)
        for error in errors:
            raise error

    def _turn_in(self, seconds: float) -> threading.Event:
        turn = threading.Event()
        heapq.heappush(self._waiting, (self.now + seconds, next(self._numbers), turn))
        return turn

    def _wake_first(self) -> None:
        if self._waiting:
            self._turns += 1
            self.now, _, turn = heapq.heappop(self._waiting)
            turn.set()

    def _stand_by(self, event: threading.Event) -> None:
        turns = -1
        while not event.wait(STUCK):
            assert turns != self._turns, "a thread runs for ever, or waits for a lock"
            turns = self._turns


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
                self._clock.wait(piece)
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
        self.clock.wait(reply.takes if longest is None else min(reply.takes, longest))
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

    def __init__(
        self, script: Script | None = None, clock: FakeClock | None = None, **settings: Any
    ) -> None:
        fields = [field.name for field in dataclasses.fields(RetryConfig) if field.name in settings]
        config = RetryConfig(**{"jitter": False, **{name: settings.pop(name) for name in fields}})
        self.clock = FakeClock() if clock is None else clock
        self.server = FakeServer(self.clock, script or {})
        session = requests.Session()
        for scheme in ("https://", "http://"):
            session.mount(scheme, self.server)
        clocks: Json = {"clock": self.clock.time, "wall_clock": self.clock.epoch}
        settings = {"providers": ROWS, **clocks, "sleep": self.clock.sleep, **settings}
        self.llm = FallbackLLM(config, session=session, **settings)

    @property
    def asked(self) -> str:
        """The models that were asked, one after the other."""
        return "".join(asked.model for asked in self.server.asked)

    @property
    def slept(self) -> list[float]:
        return self.clock.slept


class Metered:
    """The replies of a model with quotas: an answer, or a 429 that says when there is room.

    account: quotas that all models of the provider share. takes, refuses_in: seconds until an
    answer or a refusal comes. remaining: answers tell how many more requests there is room for.
    whole: hints are in whole seconds. uneven: answers take up to a quarter more or less. Quotas
    that are not `told` give no hint.
    """

    def __init__(
        self,
        *quotas: Quota,
        account: Sequence[Quota] = (),
        takes: float = 1.0,
        refuses_in: float = 0.05,
        remaining: bool = False,
        whole: bool = False,
        uneven: random.Random | None = None,
    ) -> None:
        self.quotas = [*quotas, *account]
        self.takes = takes
        self._account = account
        self._refuses_in = refuses_in
        self._remaining = remaining
        self._whole = whole
        self._uneven = uneven

    def __call__(self, asked: Asked) -> Reply:
        refused = admit(self.quotas, asked.body, asked.at)
        if refused is None:
            headers = {}
            if self._remaining:
                left = min(quota.remaining for quota in self.quotas)
                headers["x-ratelimit-remaining-requests"] = str(left)
            body = says(asked.model.upper()).body
            takes = self.takes
            if self._uneven is not None:
                takes *= self._uneven.uniform(0.75, 1.25)
            return Reply(200, body, headers, takes=takes)

        quota, wait = refused
        if quota.hint is not None:
            wait = quota.hint
        elif self._whole:
            wait = quota.whole_seconds(wait)
        reply = limited(wait if quota.told else None, takes=self._refuses_in)
        if quota in self._account:
            metadata = {"limit_source": "openrouter_free_tier_per_minute"}
            reply = dataclasses.replace(reply, body={"error": {"metadata": metadata}})
        return reply


class Crowd(World):
    """Threads that share one client, and ask as fast as it lets them.

    Settings are those of World. A model that is not in the script answers at once.
    """

    def __init__(self, threads: int, script: Script, **settings: Any) -> None:
        super().__init__(script, SharedClock(), **settings)
        self.threads = threads
        self.answers: list[Answer] = []
        self.errors: list[FallbackLLMError] = []
        self.took = 0.0  # virtual seconds, from the first question to the last answer
        self.ideal = 0.0  # the same for a client that knows the quotas
        self._script = script

    def ask(self, questions: int | Sequence[int], **arguments: Any) -> None:
        """Asks so many questions; each thread takes the next when it has done with one.

        Instead of a number: how long the answer of each may be, in tokens.
        """
        sizes = [SIZE] * questions if isinstance(questions, int) else questions
        self.ideal = ideal(self._script, self.threads, sizes, self.clock.now)
        todo = iter(enumerate(sizes))

        def work() -> None:
            for number, size in todo:
                try:
                    answer = self.llm.complete(f"Where is {number}?", size, **arguments)
                    self.answers.append(answer)
                except FallbackLLMError as error:
                    self.errors.append(error)

        start = self.clock.now
        self.run([work] * min(self.threads, len(sizes)))
        self.took = self.clock.now - start

    def run(self, tasks: Iterable[Callable[[], object]]) -> None:
        """Runs each task in a thread of its own, in virtual time."""
        assert isinstance(self.clock, SharedClock)
        self.clock.run(tasks)

    @property
    def refused(self) -> int:
        """The requests that met a 429."""
        return self.llm.get_stats()["rate_limited_requests"]

    @property
    def lost(self) -> int:
        """The questions that got no answer."""
        return len(self.errors)

    @property
    def share(self) -> float:
        """Of the throughput of the ideal client."""
        return self.ideal / self.took

    def __str__(self) -> str:
        refused = 100 * self.refused / max(1, len(self.answers))
        return (
            f"{self.threads} threads: {100 * self.share:.0f} % of the ideal, {refused:.1f} refused "
            f"per 100 answers, {self.lost} lost, {self.took:.0f} s ({self.ideal:.0f} s)"
        )


def ideal(script: Script, threads: int, sizes: Sequence[int], now: float) -> float:
    """Seconds until a client that knows the quotas of the models has all answers.

    Whenever a thread is free and a model has quota left, it asks: the quickest of those.
    """
    planned = [replies[0] for replies in copy.deepcopy(dict(script)).values()]
    models = [reply for reply in planned if isinstance(reply, Metered)]
    models.sort(key=lambda model: model.takes)
    if not models:
        return 0.0
    bodies = [body_of(size) for size in sizes]
    start = now
    begun = 0
    ends: list[float] = []  # of those that are under way; a heap
    while begun < len(bodies):
        waits = []
        for model in models:
            while begun < len(bodies) and len(ends) < threads:
                refused = admit(model.quotas, bodies[begun], now)
                if refused is not None:
                    waits.append(refused[1])
                    break
                heapq.heappush(ends, now + model.takes)
                begun += 1
        now = min([now + max(wait, 1e-6) for wait in waits] + ends[:1])
        while ends and ends[0] <= now:
            heapq.heappop(ends)
    return max(ends, default=now) - start


def simple(models: Sequence[Metered], threads: int, sizes: Sequence[int]) -> float:
    """Seconds until the usual client has all answers: it asks the first model that does not rest.

    After a 429 a model rests for all threads as long as the last Retry-After says, or 2 seconds.
    """
    rests = [0.0] * len(models)
    todo = iter(sizes)
    now = 0.0

    def work() -> Iterator[float]:
        for size in todo:
            while True:
                number = min(range(len(models)), key=lambda n: (max(now, rests[n]), n))
                if rests[number] > now:
                    yield rests[number] - now
                    continue
                reply = models[number](Asked("a", now, "", {}, body_of(size)))
                yield reply.takes
                if reply.status == 200:
                    break
                rest = float(reply.headers.get("Retry-After", 2.0))
                rests[number] = max(rests[number], now + max(rest, 0.001))

    waiting = [(0.0, number, work()) for number in range(threads)]
    numbers = itertools.count(threads)
    while waiting:
        now, _, thread = heapq.heappop(waiting)
        for seconds in thread:
            heapq.heappush(waiting, (now + seconds, next(numbers), thread))
            break
    return now


def body_of(size: int) -> Json:
    """What a question sends whose answer may be of so many tokens."""
    return {"messages": [{"role": "user", "content": "Where is 0?"}], "max_tokens": size}
