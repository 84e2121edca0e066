"""How a crowd of questions shares what servers allow, in virtual time: a table of sentences.

    PYTHONPATH=. python tests/test_pacing.py    # the table, with what is reached

Each line says who limits how, and what a batch reaches: its share of the throughput of a client
that knows the quotas, or of the simple one (`fakes.simple`), whose threads all honour the last
Retry-After; how many requests are refused per 100 answers. No question is ever lost.
"""

from __future__ import annotations

import contextlib
import logging
import random
from functools import partial
from types import MappingProxyType
from typing import Any, Callable, Dict, Mapping, NamedTuple, Sequence

import pytest
from emulator import AtOnce, Chance, Quota, Storm
from fakes import (
    SIZE,
    Asked,
    Crowd,
    Metered,
    Reply,
    World,
    event,
    fails,
    limited,
    row,
    says,
    simple,
)

from fallback_llm import AllProvidersFailed, FallbackLLMError, Lane

pytestmark = pytest.mark.usefixtures("bare")

ALONE = (row("one", "a"),)


# --- The table ----------------------------------------------------------------------------------

Models = Dict[str, Metered]  # by provider and model
FREELY: Any = {"base_delay": 0, "max_delay": 0}
IDEAL, SIMPLE = "the ideal", "simple"


class Result(NamedTuple):
    share: float  # percent of the throughput of another client
    refused: float  # requests per 100 answers
    lost: int  # questions

    def __str__(self) -> str:
        return f"{self.share:.1f} %, {self.refused:.1f} refused, {self.lost} lost"


class Line(NamedTuple):
    """A sentence of the table."""

    who: str  # limits how
    models: Callable[[], Models]  # new ones at each call
    threads: int
    asked: int | Sequence[int]  # questions; or how long the answer of each may be, in tokens
    share: float  # percent, at least, of
    of: str  # this client
    refused: float  # requests per 100 answers, at most
    settings: Mapping[str, Any] = MappingProxyType({})  # of the client

    def __str__(self) -> str:
        settings = "".join(f", {name}={value}" for name, value in self.settings.items())
        reached = f"{self.share:g} % of {self.of}, {self.refused:g} refused"
        return f"{self.who}{settings}, {self.threads} threads -> {reached}"

    def crowd(self) -> Crowd:
        """The client, with a key for each provider."""
        models: dict[str, list[str]] = {}
        script = {}
        for target, metered in self.models().items():
            provider, _, model = target.partition(":")
            models.setdefault(provider, []).append(model)
            script[model] = [metered]
        rows = [row(name, *ids, key_env=f"{name.upper()}_KEY") for name, ids in models.items()]
        keys = {name: f"key-{name}" for name in models}
        return Crowd(self.threads, script, providers=rows, api_keys=keys, **self.settings)

    def result(self) -> Result:
        """What a batch reaches."""
        crowd = self.crowd()
        crowd.ask(self.asked)
        best = crowd.ideal
        if self.of == SIMPLE:
            sizes = [SIZE] * self.asked if isinstance(self.asked, int) else self.asked
            best = simple(list(self.models().values()), self.threads, sizes)
        refused = 100 * crowd.refused / max(1, len(crowd.answers))
        return Result(100 * best / crowd.took, refused, crowd.lost)


def free_tier(told: bool = True, slower: float = 1.0, tokens: float = 0.0, **more: Any) -> Models:
    """Requests per minute: 30 of each model of two providers, 20 of an account; 170 in all."""
    quota: Callable[[float], Quota] = partial(Quota, told=told, **more)
    uneven = random.Random(1)  # noqa: S311 - no secret
    model = partial(Metered, whole=True, uneven=uneven)
    account = [quota(20)]
    models = {f"one:{name}": model(quota(30), takes=slower) for name in "ab"}
    for name in "cde":
        more_quotas = [Quota(tokens, counts="tokens")] if tokens else []
        models[f"two:{name}"] = model(quota(30), *more_quotas, takes=1.2 * slower)
    for name in "fg":
        models[f"three:{name}"] = model(account=account, takes=2.0 * slower)
    return models


def one(quota: Callable[..., Quota], *values: float, takes: float = 1.0, **more: Any) -> Models:
    """A single model with a single quota."""
    return {"one:a": Metered(quota(*values, **more), takes=takes)}


def hinted(quota: Callable[..., Quota], *values: float, hint: float | None, **more: Any) -> Models:
    """The same, with a constant hint or none."""
    return one(quota, *values, hint=hint, told=hint is not None, **more)


def at_once(most: int, takes: float) -> Models:
    return {"one:a": Metered(AtOnce(most, takes, hint=1.0), takes=takes)}


def true_headers(takes: float) -> Models:
    return {"one:a": Metered(Quota(150, fixed=True), takes=takes, remaining=True)}


def beside_a_limited_one(other: str) -> Models:
    """Six answers of the first model, and then none for an hour; the other one has no limit."""
    first = Metered(Quota(6, window=3600, fixed=True, hint=60.0), takes=0.3)
    return {"one:a": first, other: Metered()}


def mixed(sizes: Sequence[int], seed: int) -> list[int]:
    """A hundred questions of these sizes."""
    return random.Random(seed).choices(sizes, k=100)  # noqa: S311 - no secret


def few(seed: int) -> list[int]:
    """One of ten is large."""
    return mixed([200] * 9 + [7000], seed)


GROQ = partial(one, Quota, 8000, counts="tokens")
WINDOW = partial(one, Quota, fixed=True)
SECONDS = partial(WINDOW, window=1.0, per="second", takes=0.3)
STORM = partial(hinted, Storm, 20, 1)
SOME, MANY = partial(hinted, Chance, 0.05), partial(hinted, Chance, 0.1)
MINUTES = partial(WINDOW, told=False, takes=3.0)
VARYING = partial(free_tier, schedule=((60, 0.5), (120, 1.0)))
FREE = partial(one, Quota, 1e9)
BESIDE_ONE = partial(beside_a_limited_one, "one:b")
BESIDE_TWO = partial(beside_a_limited_one, "two:b")
NO_WAIT = {"wait_on_rate_limit": False}

TABLE = [
    Line("token buckets", free_tier, 8, 300, 95, IDEAL, 12),
    Line("token buckets", free_tier, 8, 300, 95, IDEAL, 12, NO_WAIT),
    Line("token buckets", free_tier, 32, 300, 95, IDEAL, 15),
    Line("token buckets", free_tier, 32, 300, 95, IDEAL, 15, NO_WAIT),
    Line("token buckets", free_tier, 128, 250, 90, IDEAL, 25),
    Line("token buckets", free_tier, 128, 250, 90, IDEAL, 25, NO_WAIT),
    Line("a bucket of 10", partial(one, Quota, 10), 8, 150, 95, IDEAL, 12),
    Line(
        "a bucket of 10 without a hint", partial(one, Quota, 10, told=False), 50, 100, 95, IDEAL, 40
    ),
    Line("a window of 30", partial(WINDOW, 30), 50, 150, 85, IDEAL, 10),
    Line("fixed windows", partial(free_tier, fixed=True), 16, 300, 85, IDEAL, 10),
    Line("buckets without a hint", partial(free_tier, told=False), 16, 300, 85, IDEAL, 15),
    Line("buckets, five times slower", partial(free_tier, slower=5.0), 32, 250, 85, IDEAL, 10),
    Line("another program takes half", partial(free_tier, taken=0.5), 16, 250, 85, IDEAL, 20),
    Line("buckets that halve and double", VARYING, 16, 350, 85, IDEAL, 20),
    Line("tokens in Groq's form", partial(free_tier, tokens=8000), 16, 300, 85, IDEAL, 15),
    Line("no limit", FREE, 32, 600, 98, IDEAL, 0),
    Line("no limit", FREE, 64, 300, 80, IDEAL, 0, FREELY),
    Line("a storm every 20 s, hint 1", partial(STORM, hint=1), 8, 400, 70, SIMPLE, 10),
    Line("a storm every 20 s, hint 1", partial(STORM, hint=1), 32, 800, 70, SIMPLE, 10),
    Line("a storm every 20 s, hint 1", partial(STORM, hint=1), 64, 1000, 65, SIMPLE, 10),
    Line("a storm every 20 s, hint 10", partial(STORM, hint=10), 32, 400, 70, SIMPLE, 20),
    Line("a storm every 20 s, no hint", partial(STORM, hint=None), 32, 500, 70, SIMPLE, 15),
    Line("5 % by chance, hint 1", partial(SOME, hint=1), 8, 300, 65, SIMPLE, 10),
    Line("5 % by chance, hint 1", partial(SOME, hint=1, seed=2), 32, 400, 70, SIMPLE, 10),
    Line("5 % by chance, no hint", partial(SOME, hint=None, seed=3), 32, 400, 70, SIMPLE, 10),
    Line("10 % by chance, hint 1", partial(MANY, hint=1), 32, 400, 55, SIMPLE, 15),
    Line("10 % by chance, hint 1", partial(MANY, hint=1, seed=2), 8, 300, 65, SIMPLE, 15),
    Line("10 % by chance, no hint", partial(MANY, hint=None, seed=3), 32, 300, 65, SIMPLE, 15),
    Line("tokens, one of ten large", GROQ, 4, few(seed=4), 70, SIMPLE, 40),
    Line("tokens, one of ten large", GROQ, 16, few(seed=4), 60, SIMPLE, 50),
    Line("tokens, one of ten large", GROQ, 32, few(seed=5), 70, SIMPLE, 80),
    Line("tokens, one of three large", GROQ, 16, mixed([200, 200, 4000], 4), 70, SIMPLE, 40),
    Line("10 at a time", partial(at_once, 10, 1.0), 16, 200, 70, SIMPLE, 40),
    Line("5 at a time", partial(at_once, 5, 1.0), 16, 150, 70, SIMPLE, 70),
    Line("1 at a time", partial(at_once, 1, 1.0), 16, 100, 65, SIMPLE, 40),
    Line("20 at a time", partial(at_once, 20, 0.5), 32, 250, 70, SIMPLE, 40),
    Line("5 a second", partial(SECONDS, 5), 32, 200, 85, SIMPLE, 30),
    Line("1 a second", partial(SECONDS, 1), 32, 100, 85, SIMPLE, 50),
    Line("true headers, 3 s", partial(true_headers, 3.0), 32, 350, 85, SIMPLE, 10),
    Line("true headers, 6 s", partial(true_headers, 6.0), 32, 350, 70, SIMPLE, 10),
    Line("another provider is free", BESIDE_TWO, 32, 200, 95, SIMPLE, 20),
    Line("another provider is free", BESIDE_TWO, 32, 200, 95, SIMPLE, 20, {"timeout": 5.0}),
    Line("another model is free", BESIDE_ONE, 32, 300, 70, SIMPLE, 15),
    Line("20 a minute, never a hint", partial(MINUTES, 20), 16, 100, 70, SIMPLE, 70),
    Line("60 a minute, never a hint", partial(MINUTES, 60), 32, 150, 70, SIMPLE, 50),
]


@pytest.mark.parametrize("line", TABLE, ids=str)
def test_a_batch(line: Line) -> None:
    """It reaches what the table says, and loses no question."""
    reached = line.result()
    assert reached.lost == 0
    assert reached.share >= line.share, reached
    assert reached.refused <= line.refused, reached


def by_key(models: Sequence[Metered]) -> Callable[[Asked], Reply]:
    """A model with quotas of the keys key-0 and key-1."""
    return lambda asked: models[int(asked.headers["Authorization"][-1])](asked)


TWO_KEYS: Any = {
    "providers": [row("one", "a", key_env="ONE_KEY")],
    "api_keys": {"one": "key-0,key-1"},
}


def test_two_keys_with_a_quota_each() -> None:
    """The sum of both is used."""
    models = [Metered(Quota(30)), Metered(Quota(30))]
    crowd = Crowd(32, {"a": [by_key(models)]}, **TWO_KEYS)
    crowd.ask(200)
    assert crowd.lost == 0
    assert crowd.refused <= 30
    assert crowd.took <= (200 - 2 * 30 + 1) / 0.95


def test_the_account_of_a_provider_without_a_key() -> None:
    """It is paced like any other: each request counts once."""
    account = [Quota(20)]
    script = {model: [Metered(account=account, takes=2.0)] for model in "cd"}
    crowd = Crowd(16, script, providers=[row("two", "c", "d")])
    crowd.ask(120)
    assert crowd.lost == 0
    assert crowd.refused <= 35
    assert crowd.share >= 0.95


def test_what_is_refused_does_not_grow_with_the_crowd() -> None:
    """A crowd counts once: four times as many threads are not refused four times as often."""
    refused = []
    for threads in (32, 128):
        crowd = Crowd(threads, {"a": [Metered(Quota(10))]}, providers=ALONE)
        crowd.ask(130)
        refused.append(crowd.refused)
    assert refused[1] <= 1.5 * refused[0]


def test_a_crowd_that_meets_no_limit_goes_nowhere_else() -> None:
    """Nobody is sent to another model without need."""
    crowd = Crowd(64, {"a": [Metered(takes=1.0)]})
    crowd.ask(300)
    assert {asked.model for asked in crowd.server.asked} == {"a"}


def test_all_runs_of_a_crowd_are_the_same() -> None:
    """So a test of it cannot fail now and then."""
    runs = []
    for _ in range(2):
        crowd = Crowd(32, {"a": [Metered(Quota(30))], "c": [Metered(Quota(20))]})
        crowd.ask(100)
        runs.append([(asked.model, asked.at) for asked in crowd.server.asked])
    assert runs[0] == runs[1]


# --- A lone question notices nothing ------------------------------------------------------------


def asks(world: World, **arguments: Any) -> int:
    """Asks a question; how many requests that took."""
    before = len(world.asked)
    with contextlib.suppress(FallbackLLMError):
        world.llm.complete("Where?", **arguments)
    return len(world.asked) - before


def test_a_lone_question_keeps_its_backoff() -> None:
    """2, 4, 8, 16 seconds, question after question, whatever was met."""
    world = World({"a": [says("A"), limited()]}, providers=ALONE)
    assert asks(world) == 1
    for _ in range(3):
        assert asks(world) == 5
        world.clock.now += 100
    assert world.slept == [2, 4, 8, 16] * 3


def test_a_lone_question_never_asks_whether_it_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """However it ends, and whatever a crowd has met before."""
    bucket = Metered(Quota(10))
    alone: list[Reply] = []  # what is replied later
    script = {"a": [lambda asked: alone.pop(0) if alone else bucket(asked)]}
    crowd = Crowd(8, script, providers=ALONE)
    crowd.ask(40)
    crowd.clock.now += 60
    crowd.clock.slept.clear()
    monkeypatch.setattr(Lane, "hold", None)  # calling it raises
    several = [limited(), limited(3), fails(), says("A")]
    alone += [*several, limited(200), *several]
    assert [asks(crowd), asks(crowd)] == [4, 1]
    assert crowd.clock.slept == [2, 3, 4]
    crowd.clock.now += 300
    assert asks(crowd, timeout=20.0) == 4
    with contextlib.closing(crowd.llm.stream("Where?")) as pieces:
        assert next(pieces) == "A"


def test_a_lone_thread_is_not_paced_before_it_is_refused() -> None:
    """Ten answers in a row, each at once."""
    crowd = Crowd(1, {"a": [Metered(Quota(10), takes=0.5)]}, providers=ALONE)
    crowd.ask(10)
    assert crowd.took == 5
    assert crowd.clock.slept == []


# --- Our own pacing makes no question fail, the server's word is kept ---------------------------


@pytest.mark.parametrize("settings", [{"timeout": 3.0}, FREELY], ids=str)
@pytest.mark.parametrize("told", [True, False], ids=["hints", "no hints"])
def test_our_own_hold_makes_no_question_fail(settings: Any, told: bool) -> None:
    """A crowd has learned a pace that is too slow for it: it asks all the same."""
    quota = Quota(10, told=told, schedule=((60, 1e6),))
    crowd = Crowd(32, {"a": [Metered(quota)]}, providers=ALONE, **settings)
    crowd.ask(100)
    for error in crowd.errors:  # they did ask, or knew from the server that it would be in vain
        assert error.attempts or (isinstance(error, AllProvidersFailed) and error.retry_after)
    crowd.errors.clear()
    crowd.clock.now = max(crowd.clock.now, 61.0)
    crowd.ask(100)
    assert crowd.lost == 0


def test_a_crowd_keeps_to_its_time_limit() -> None:
    """Whoever finds no slot in time is told when to come back."""
    crowd = Crowd(32, {"a": [Metered(Quota(10))]}, providers=ALONE, timeout=30.0)
    crowd.ask(100)
    assert max(answer.elapsed for answer in crowd.answers) <= 30
    assert len(crowd.answers) + crowd.lost == 100
    assert crowd.lost > 0


class Door:
    """A server that is open for a while, then shuts for a pause, and so on.

    Whoever comes meanwhile is told when it opens, unless it is not `told`.
    """

    def __init__(self, *pauses: float, open_for: float, told: bool = True) -> None:
        self.early: list[float] = []  # when somebody asked who had been told to wait
        self._pauses = list(pauses)
        self._open_for = open_for
        self._told = told
        self._opens_at = 0.0
        self._told_at = 0.0

    def __call__(self, asked: Asked) -> Reply:
        if self._pauses and asked.at >= self._opens_at + self._open_for:
            self._opens_at = asked.at + self._pauses.pop(0)
            self._told_at = asked.at
        if asked.at >= self._opens_at - 1e-6:  # a clock's rounding
            return says("A", takes=0.5)
        if asked.at > self._told_at:
            self.early.append(asked.at)
        return limited(self._opens_at - asked.at if self._told else None)


@pytest.mark.parametrize(
    "settings", [{}, {"wait_on_rate_limit": False}, {"timeout": 5.0}, FREELY], ids=str
)
def test_nobody_asks_inside_a_hint_that_grows(settings: Any) -> None:
    """A server that wants ever longer pauses is asked only when each of them is over."""
    door = Door(3, 9, 27, 50, open_for=2)
    crowd = Crowd(20, {"a": [door]}, providers=ALONE, **settings)
    crowd.ask(300)
    assert door.early == []
    assert crowd.refused <= 60
    assert crowd.lost == 0 or "timeout" in settings or "max_delay" in settings


# --- A refusal costs no attempt where others are answered ---------------------------------------


@pytest.mark.parametrize("told", [True, False], ids=["with a hint", "without a hint"])
def test_a_crowd_that_is_answered_loses_nothing_with_a_single_attempt(told: bool) -> None:
    """Whoever is refused looks again like the others who are held."""
    bucket = Metered(Quota(10))
    door = Door(30, open_for=90, told=told)

    def both(asked: Asked) -> Reply:
        reply = door(asked)
        return reply if reply.status == 429 else bucket(asked)

    crowd = Crowd(8, {"a": [both]}, providers=ALONE, max_attempts=1)
    crowd.ask(60)
    assert door.early == [] or not told
    assert crowd.lost == 0
    assert len(crowd.server.asked) == 60 + crowd.refused
    assert crowd.refused <= 25


@pytest.mark.parametrize("limit", [2, 5])
def test_whoever_was_refused_is_not_the_first_to_try_again(limit: int) -> None:
    """So refusals do not all meet the same question."""
    crowd = Crowd(8, {"a": [Metered(Quota(limit))]}, providers=ALONE)
    crowd.ask(40)
    refused = [sum(a.status == 429 for a in answer.attempts) for answer in crowd.answers]
    assert crowd.lost == 0
    assert max(refused) <= 2


def is_unlucky(asked: Asked) -> bool:
    return "Where is 7?" in str(asked.body["messages"])


def test_at_most_fifteen_refusals_cost_no_attempt() -> None:
    """A question that is always refused ends, although all others are answered."""
    script = {"a": [lambda asked: limited(0.1) if is_unlucky(asked) else says(takes=1.0)]}
    crowd = Crowd(8, script, providers=ALONE)
    crowd.ask(700)
    assert crowd.lost == 1
    assert sum(map(is_unlucky, crowd.server.asked)) == 15 + 5


@pytest.mark.parametrize("threads", [1, 8])
def test_a_refusal_costs_an_attempt_where_nobody_is_answered(threads: int) -> None:
    crowd = Crowd(threads, {"a": [limited(1.0)]}, providers=ALONE)
    crowd.ask(8)
    assert crowd.lost == 8
    assert len(crowd.server.asked) == 8 * 5


def test_a_refusal_costs_an_attempt_where_only_another_model_answers() -> None:
    crowd = Crowd(
        8, {"a": [says(takes=1.0)], "b": [limited(0.1)]}, providers=[row("one", "a", "b")]
    )

    def ask(model: str) -> None:
        for _ in range(20):
            asks(crowd, model=model)

    crowd.run([partial(ask, model) for model in "aaaab"])
    assert crowd.asked.count("a") == 4 * 20
    assert crowd.asked.count("b") == 20 * 5


def test_a_refusal_of_the_account_costs_its_other_models_nothing() -> None:
    """Some answers of the first model fail: the second one has an attempt left."""
    account = Metered(account=[Quota(20)])
    chance = random.Random(1)  # noqa: S311 - no secret

    def shaky(asked: Asked) -> Reply:
        reply = account(asked)
        return fails() if reply.status == 200 and chance.random() < 0.2 else reply

    script = {"a": [shaky], "b": [account]}
    crowd = Crowd(16, script, providers=[row("one", "a", "b")], max_attempts=1)
    crowd.ask(100)
    assert crowd.lost == 0


def test_refusals_that_were_under_way_together_count_once() -> None:
    """Twenty in the same instant make the pause of one, two seconds."""
    crowd = Crowd(
        20, {"a": [lambda asked: says(takes=1.0) if asked.at >= 1 else limited()]}, providers=ALONE
    )
    crowd.ask(60)
    assert crowd.refused == 20
    assert min(asked.at for asked in crowd.server.asked if asked.at > 0) == 2
    assert crowd.took <= 10


def test_streams_that_are_left_unfinished_hold_nobody_back() -> None:
    """One thread may have begun many and read on in none: the next one begins all the same."""

    def sleep_not_for_ever(seconds: float) -> None:
        world.clock.sleep(seconds)
        assert world.clock.now < 60

    live = Reply(body=(event("Once"), event(" upon", "stop")))
    world = World({"a": [live]}, sleep=sleep_not_for_ever, providers=ALONE)
    streams = [world.llm.stream("Where?") for _ in range(40)]
    assert [next(stream) for stream in streams] == ["Once"] * 40


# --- A limit slows only whom it concerns, and only while it lasts -------------------------------


@pytest.mark.parametrize(
    "limit", [limited(5.0), limited(), Quota(10)], ids=["a hint", "none", "a quota"]
)
def test_another_provider_is_not_slowed(limit: Any) -> None:
    """Some threads ask one that is limited all the time, the others are as quick as ever."""
    replies = Metered(limit) if isinstance(limit, Quota) else limit
    script = {"a": [replies], "c": [says(takes=1.0)]}
    crowd = Crowd(18, script, providers=[*ALONE, row("two", "c")])
    ends = []

    def ask(provider: str, questions: int) -> None:
        for _ in range(questions):
            asks(crowd, provider=provider)
        ends.append((provider, crowd.clock.now))

    crowd.run([partial(ask, *who) for who in (("one", 5), ("two", 20), ("two", 20)) * 6])
    assert [end for name, end in ends if name == "two"] == [20.0] * 12


def test_another_key_is_not_slowed() -> None:
    """One of the keys is used up at once; the other one answers everybody as if it were alone."""
    replies = by_key([Metered(Quota(1, window=3600, hint=60.0)), Metered()])
    crowd = Crowd(32, {"a": [replies]}, **TWO_KEYS)
    crowd.ask(640)
    assert crowd.lost == 0
    assert crowd.took <= 22


@pytest.mark.parametrize("hint", [1.0, 10.0, None])
@pytest.mark.parametrize("threads", [4, 16])
def test_a_lane_heals_after_a_storm(threads: int, hint: float | None) -> None:
    """Ten seconds after its end, and that of the last hint, it is as quick as before."""

    def storm(asked: Asked) -> Reply:
        return limited(hint, takes=0.05) if 5 <= asked.at < 10 else says(takes=1.0)

    crowd = Crowd(threads, {"a": [storm]}, providers=ALONE)
    crowd.ask(30 * threads)
    late = [asked.at for asked in crowd.server.asked if 30 <= asked.at < 35]
    assert crowd.lost == 0
    assert len(late) >= 4.9 * threads


def test_a_lane_heals_when_a_quota_grows() -> None:
    """Twenty minutes of thirty requests, then as many as there are threads for."""
    quota = Quota(30, schedule=((1200, 1000),))
    crowd = Crowd(8, {"a": [Metered(quota)]}, providers=ALONE)
    crowd.ask(1000)
    last = [asked.at for asked in crowd.server.asked][-80:]
    assert crowd.lost == 0
    assert crowd.took <= 1200 + 200
    assert last[-1] - last[0] <= 11


def test_a_quota_of_a_day_is_no_pace() -> None:
    """Each day all of it is used within seconds; the rest is told when to come back."""
    crowd = Crowd(8, {"a": [Metered(Quota(40, window=86400.0, fixed=True))]}, providers=ALONE)
    for day in range(1, 5):
        crowd.clock.now = max(crowd.clock.now, 86400.0 * day)
        crowd.ask(60)
        assert crowd.took <= 6
        assert (len(crowd.answers), crowd.lost) == (40 * day, 20 * day)


def main() -> None:
    """Print the table, with what is reached."""
    logging.getLogger("fallback_llm").setLevel(logging.CRITICAL)
    for line in TABLE:
        print(f"{line!s:92} {line.result()}", flush=True)


if __name__ == "__main__":
    main()
