"""The walk in simulated time: whom it asks, how long it sleeps, how it ends, what it tells."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import os
import pickle
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from fakes import DONE, ROWS, Reply, World, event, fails, limited, row, says
from hypothesis import given
from hypothesis import settings as rules
from hypothesis import strategies as some

from fallback_llm import (
    PROVIDERS,
    AllProvidersFailed,
    Answer,
    AnswerRefused,
    FallbackLLM,
    FallbackLLMError,
    NoProviderError,
    ProviderHealth,
    ProviderStatus,
    RetryConfig,
    Stream,
    StreamInterrupted,
    Verdict,
)

pytestmark = pytest.mark.usefixtures("bare")

LIMITED, FAULT, DENIED, UNSUITABLE = limited(), fails(500), fails(401), fails(400)
GONE = Reply(404, {"error": {"message": "Never heard of it", "code": "model_not_found"}})
BLOCKED = Reply(400, {"error": {"message": "Not that", "code": "content_policy_violation"}})
DOWN = Reply(error=requests.ConnectionError("refused"))
ACCOUNT = Reply(429, {"error": {"metadata": {"limit_source": "openrouter_free_tier_per_minute"}}})
SILENT = fails(takes=99)
FAILED = AllProvidersFailed
ONE = (row("one", "a", "b"),)
ALONE = (row("one", "a"),)


def every(*replies: Reply, models: str = "abcd") -> Any:
    """The same script for all models."""
    return {model: list(replies) for model in models}


def jitter(chance: float) -> Any:
    return {"jitter": True, "chance": lambda: chance}


TWICE: Any = {"max_attempts": 2}
THRICE: Any = {"max_attempts": 3, "providers": ONE}
DEAD: Any = {"b": [FAULT], "c": [DOWN], "d": [FAULT]}
OUT: Any = {"c": [UNSUITABLE], "d": [UNSUITABLE]}
NO_WAIT: Any = {"wait_on_rate_limit": False}
SOONEST: Any = {m: [limited(n), says("X")] for m, n in zip("abcd", (50, 40, 35, 45))}


def walk(text: str, asked: str, slept: Any = (), ends: Any = None, **more: Any) -> Any:
    """A row of the table. ends: the answer (if not given, the last model's own) or the error;
    a, b, c, d: what these models reply (A, B, C, D, when there is nothing); more: settings.
    """
    script = {model: more.pop(model) for model in "abcd" if model in more}
    ends = asked[-1].upper() if ends is None else ends
    return pytest.param(script, asked, list(slept), ends, more, id=text)


@pytest.mark.parametrize(
    ("script", "asked", "slept", "ends", "settings"),
    [
        walk("the first model answers", "a"),
        # A rate limit is waited out on the same model, as far as the backoff goes that is due.
        walk("a plain 429 is asked again", "aa", [2], a=[LIMITED, says("A")]),
        walk("429 for ever: five attempts, then the next", "aaaaab", [2, 4, 8, 16], a=[LIMITED]),
        walk("each has its attempts", "aabbc", [2, 2], max_attempts=2, a=[LIMITED], b=[LIMITED]),
        walk("a hint below the backoff changes nothing", "aa", [2], a=[limited(1), says("A")]),
        walk("a hint as long as the backoff is obeyed", "aa", [2], a=[limited(2), says("A")]),
        walk("a longer hint moves on at once", "ab", a=[limited(2.5)]),
        walk("4 s are due at the second", "aaa", [2, 4], a=[LIMITED, limited(4), says("A")]),
        walk("4.5 s are too many at the second", "aab", [2], a=[LIMITED, limited(4.5)]),
        walk(
            "16 s are due at the fourth",
            "aaaaa",
            [2, 4, 8, 16],
            a=[*[LIMITED] * 3, limited(16), says("A")],
        ),
        walk("max_delay is the end of patience", "ab", a=[limited(2)], base_delay=1, max_delay=1),
        walk("max_delay caps the backoff", "aaaaab", [2, 4, 5, 5], a=[LIMITED], max_delay=5.0),
        walk("the base is set", "aaaaab", [2, 6, 18, 54], a=[LIMITED], exponential_base=3.0),
        walk("the first delay is set", "aaaaab", [1, 2, 4, 8], a=[LIMITED], base_delay=1.0),
        walk("without a delay nothing is slept", "aaaaab", a=[LIMITED], base_delay=0.0),
        walk("no wait follows a last attempt", "ab", a=[LIMITED], max_attempts=1),
        walk("an account's limit counts for all models", "aaaaac", [2, 4, 8, 16], a=[ACCOUNT]),
        walk("a fault after a limit moves on", "aab", [2], a=[LIMITED, FAULT]),
        # Whoever is not waited for goes to the end of the line.
        walk("a fault costs no wait", "ab", a=[FAULT]),
        walk("a provider's fault skips its models", "ac", a=[DOWN]),
        walk("turns, not repeats", "abcd" * 3, [2, 4], FAILED, max_attempts=3, **every(FAULT)),
        walk("a fault that is over", "abcda", [2], "X", **every(FAULT, says("X"))),
        walk("passed time is not slept", "abcda", [], "X", **every(fails(takes=3), says("X"))),
        walk(
            "a provider's fault counts for all its models",
            "acdb",
            [2],
            FAILED,
            max_attempts=2,
            a=[DOWN],
            b=[DOWN],
            **OUT,
        ),
        walk("its siblings are first, when its turn comes", "acb", [2], a=[DOWN], c=[DOWN]),
        walk(
            "who failed is behind its siblings",
            "acdba",
            [2],
            a=[DOWN, says("A")],
            b=[FAULT],
            **OUT,
        ),
        walk(
            "a silent model is behind its siblings, and they behind the others",
            "acdba",
            [2],
            a=[SILENT, says("A")],
            b=[FAULT],
            **OUT,
        ),
        walk("a silent model starves nobody", "ab", providers=ONE, a=[SILENT]),
        walk(
            "a long pause is last", "abcbdca", [2, 38], **TWICE, a=[limited(40), says("A")], **DEAD
        ),
        walk("when all are limited, the soonest is waited for", "abcdc", [35], "X", **SOONEST),
        walk(
            "attempts add up", "abaa", [2, 4], FAILED, **THRICE, a=[FAULT, LIMITED], b=[UNSUITABLE]
        ),
        # Who cannot help is not asked again.
        walk("who is unsuitable is out", "abcd", [], FAILED, **every(UNSUITABLE)),
        walk("who is gone is out", "abb", [2], providers=ONE, a=[GONE], b=[FAULT, says("B")]),
        walk("whose key is refused is out with all models", "ac", [], FAILED, **every(DENIED)),
        walk("a refused question stops the walk", "a", [], AnswerRefused, a=[BLOCKED]),
        # Nobody can be reached: it is our own network.
        walk("offline: one more round, within seconds", "acbd", [2], FAILED, **every(DOWN)),
        walk("offline, one provider", "ab", [2], FAILED, providers=ONE, **every(DOWN)),
        walk(
            "when somebody was reached, all attempts are made",
            "abbbbb",
            [2, 4, 8, 16],
            FAILED,
            providers=ONE,
            a=[FAULT],
            b=[DOWN],
        ),
        # Without waiting: somebody else rather than a wait.
        walk("without waiting, a 429 moves on", "ab", a=[LIMITED], **NO_WAIT),
        walk(
            "without waiting, it waits at last",
            "abcda",
            [7],
            "X",
            **NO_WAIT,
            **every(limited(7), says("X")),
        ),
        # Limits.
        walk("a wait of max_delay", "abcda", [60], "X", **every(limited(60), says("X"))),
        walk("no wait is longer than max_delay", "abcd", [], FAILED, **every(limited(61))),
        walk("no wait passes the time limit", "ab", a=[LIMITED], timeout=1.5),
        walk("no wait is possible in time", "abcd", [], FAILED, timeout=1.5, **every(FAULT)),
        walk("half of the time left is waited", "aa", [2], a=[LIMITED, says("A")], timeout=4.0),
        walk("more than half is not, while others are ready", "ab", a=[LIMITED], timeout=3.9),
        walk(
            "it is, when nobody else is there",
            "aa",
            [2],
            timeout=2.5,
            providers=ALONE,
            a=[LIMITED, says("A")],
        ),
        walk("a long pause does not eat the time limit", "ab", a=[limited(19.5)], timeout=20.0),
        walk("a slow first one leaves time for the next", "ab", a=[fails(takes=8)], timeout=5.0),
        walk(
            "each is given half of what is left",
            "abc",
            timeout=8.0,
            a=[says("A", takes=4.1)],
            b=[says("B", takes=2.1)],
            c=[says("C", takes=0.9)],
        ),
        walk("half is enough", "a", a=[says("A", takes=3.9)], timeout=8.0),
        walk(
            "the last one is given all of it",
            "a",
            timeout=5.0,
            providers=ALONE,
            a=[says("A", takes=4.9)],
        ),
        walk(
            "the time limit ends a request",
            "a",
            [],
            FAILED,
            timeout=5.0,
            providers=ALONE,
            a=[says("A", takes=5.1)],
        ),
        walk("silence ends a request", "ac", idle_timeout=10.0, a=[SILENT]),
        # Jitter: 80 to 100 percent.
        walk("least jitter", "aaaaab", [1.6, 3.2, 6.4, 12.8], **jitter(0), a=[LIMITED]),
        walk("more jitter", "aaaaab", [1.9, 3.8, 7.6, 15.2], **jitter(0.75), a=[LIMITED]),
        walk("no hint is jittered", "aa", [1.9], **jitter(0), a=[limited(1.9), says("A")]),
    ],
)
def test_walk(script: Any, asked: str, slept: Any, ends: Any, settings: Any) -> None:
    """script -> (models asked, seconds slept, answer or error)"""
    world = World(script, **settings)
    try:
        end: Any = world.llm.complete("Where?").text
    except FallbackLLMError as error:
        end = type(error)
    assert (world.asked, end) == (asked, ends)
    assert world.slept == pytest.approx(slept)


REPLIES = [says("X"), LIMITED, limited(1), limited(9), limited(40), limited(999), FAULT, DENIED]
REPLIES += [UNSUITABLE, DOWN, ACCOUNT, fails(takes=4), SILENT, limited(3, takes=2)]
SCRIPTS = {model: some.lists(some.sampled_from(REPLIES), min_size=1) for model in "abcd"}
LIMITS = some.sampled_from([None, 1.0, 30.0, 300.0])


@rules(deadline=None, database=None, derandomize=True)
@given(some.fixed_dictionaries(SCRIPTS), some.integers(1, 5), some.booleans(), LIMITS)
def test_what_holds_for_every_walk(script: Any, most: int, waits: bool, limit: Any) -> None:
    """No attempt too many, no wait too long or in vain, no hint undercut, nothing untold."""
    world = World(
        script, max_attempts=most, wait_on_rate_limit=waits, timeout=limit, max_delay=50.0
    )
    try:
        trail = world.llm.complete("Where?").attempts
    except AllProvidersFailed as error:
        trail = error.attempts
        assert all(attempt.verdict for attempt in trail)
    assert [attempt.model for attempt in trail] == list(world.asked)
    assert [attempt.waited for attempt in trail if attempt.waited] == world.slept
    assert max(world.slept, default=0) <= 50
    assert limit is None or world.clock.now <= limit + 0.001
    for model in set(world.asked):
        asked = [asked.at for asked in world.server.asked if asked.model == model]
        tries = [attempt for attempt in trail if attempt.model == model]
        ended = [begun + attempt.elapsed for begun, attempt in zip(asked, tries)]
        replies = script[model] + script[model][-1:] * most
        for reply, end, again in zip(replies, ended, asked[1:]):
            assert again >= end + float(reply.headers.get("Retry-After", 0)) - 0.001
        assert len(asked) <= most
        assert UNSUITABLE not in replies[: len(asked) - 1]


def read(stream: Stream) -> Answer:
    """The answer of a stream when all of it has been read."""
    assert "".join(stream)
    assert stream.answer is not None
    return stream.answer


class Chronicle:
    """What the rules of the walk say of a world: told by its requests, not by the program."""

    def __init__(self, sizes: Any, script: Any, max_attempts: int, waits: bool) -> None:
        names = iter("abcdefghi")
        self.rows = [
            row(f"p{number}", *itertools.islice(names, size)) for number, size in enumerate(sizes)
        ]
        self.siblings = {model: row.models for row in self.rows for model in row.models}
        self.script = {model: [KINDS[kind] for kind in script[model]] for model in self.siblings}
        self.waits = waits
        self.max_attempts = max_attempts
        self.world = World(
            self.script,
            providers=self.rows,
            max_attempts=max_attempts,
            wait_on_rate_limit=waits,
            idle_timeout=10.0,
        )
        self.hints = dict.fromkeys(self.siblings, 0.0)  # nobody may ask before
        self.replies = {model: list(replies) for model, replies in self.script.items()}

    def ask(self, pause: float, limit: float | None, live: bool) -> None:
        """One question, after which all is checked that its requests tell."""
        world = self.world
        world.clock.now += pause
        before = len(world.server.asked)
        self.deadline = math.inf if limit is None else world.clock.now + limit
        self.turns = dict.fromkeys(self.siblings, 0)  # attempts, and failures that count as such
        self.ready = dict.fromkeys(self.siblings, 0.0)  # not asked again before, in this question
        self.patience = dict.fromkeys(self.siblings, 0.0)  # pauses this long keep their place
        self.out: set[str] = set()
        self.anybody_reached = False
        is_answered = True
        try:
            if live:
                trail = read(world.llm.stream("Where?", timeout=limit)).attempts
            else:
                trail = world.llm.complete("Where?", timeout=limit).attempts
        except AllProvidersFailed as error:
            trail = error.attempts
            is_answered = False
        assert world.clock.now <= self.deadline + 0.001
        assert max(world.slept, default=0) <= 60

        requests = world.server.asked[before:]
        assert len(trail) == len(requests)
        for asked, attempt in zip(requests, trail):
            self.check_request(asked)
            self.note(asked, attempt.elapsed)
        if not is_answered:
            begun = [asked.at for asked in requests]
            self.check_failure(begun[-1] if begun else world.clock.now)

    def check_request(self, asked: Any) -> None:
        """No request inside a pause; nobody twice before everybody had a turn."""
        model = asked.model
        assert asked.at >= self.hints[model] - 0.001, "asked inside a hint"
        assert asked.at >= self.ready[model] - 0.001, "asked inside a backoff"
        assert model not in self.out
        assert self.turns[model] < self.max_attempts
        if self.turns[model] and self.patience[model] == 0:
            for other, turns in self.turns.items():
                waits = turns or other in self.out or self.hints[other] > asked.at
                assert waits, f"{model} was asked again before {other}"

    def note(self, asked: Any, elapsed: float) -> None:
        """What the reply means for the rest of the question and for the next ones."""
        model = asked.model
        replies = self.replies[model]
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
        end = asked.at + elapsed
        if reply is not DOWN:
            self.anybody_reached = True
        reached = self.siblings[model] if reply in (DOWN, ACCOUNT, DENIED) else (model,)
        if reply in (UNSUITABLE, DENIED):
            self.out.update(reached)
        in_time = elapsed >= reply.takes
        hint = float(reply.headers.get("Retry-After", 0)) if in_time else 0.0
        self.hints[model] = max(self.hints[model], end + hint)
        for each in reached:
            self.turns[each] += 1
            backoff = min(60.0, 2.0 ** self.turns[each])
            self.ready[each] = end + max(backoff, hint)
            may_wait = self.waits and in_time and reply.status == 429 and hint <= backoff
            self.patience[each] = backoff if may_wait else 0.0

    def check_failure(self, last_begun: float) -> None:
        """Nobody who was ready and would have answered was left out while there was time."""
        for model, replies in self.replies.items():
            most = self.max_attempts if self.anybody_reached else min(2, self.max_attempts)
            is_out = model in self.out or self.turns[model] >= most
            if replies[0].status != 200 or replies[0].error or is_out:
                continue
            ready_at = max(self.hints[model], self.ready[model])
            assert self.turns[model] or ready_at > last_begun, f"{model} was never asked"
            wait = max(0.0, ready_at - self.world.clock.now)
            left = self.deadline - self.world.clock.now - wait
            assert wait > 60 or left < 0.01 + 2 * replies[0].takes, f"{model} could still answer"


KINDS = {
    "answer": says("X"),
    "slow answer": says("X", takes=3),
    "429": LIMITED,
    "429, 1 s": limited(1),
    "429, 9 s": limited(9),
    "429, 40 s": limited(40),
    "429, 400 s": limited(400),
    "slow 429, 3 s": limited(3, takes=2),
    "429 of the account": ACCOUNT,
    "500": FAULT,
    "slow 500": fails(takes=4),
    "silence": SILENT,
    "no connection": DOWN,
    "400": UNSUITABLE,
    "401": DENIED,
}
WORLDS = some.fixed_dictionaries(
    {model: some.lists(some.sampled_from(list(KINDS)), min_size=1) for model in "abcdefghi"}
)
QUESTIONS = some.tuples(
    some.sampled_from([0.0, 1.0, 5.0, 30.0, 700.0]),
    some.sampled_from([None, 1.0, 5.0, 20.0, 100.0]),
    some.booleans(),
)


@rules(deadline=None, database=None, derandomize=True, max_examples=300)
@given(
    some.lists(some.integers(1, 3), min_size=1, max_size=3),
    WORLDS,
    some.lists(QUESTIONS, min_size=1, max_size=6),
    some.integers(1, 5),
    some.booleans(),
)
def test_what_holds_for_many_questions(
    sizes: Any, script: Any, questions: Any, most: int, waits: bool
) -> None:
    """Nobody who can answer is left out, nobody is asked too early, no limit is passed."""
    chronicle = Chronicle(sizes, script, most, waits)
    for pause, limit, live in questions:
        chronicle.ask(pause, limit, live)


def test_the_trail_tells_of_every_attempt() -> None:
    """Provider, model, number, status, verdict, reason, seconds slept before it and taken by it."""
    late = says("Yes.", finish="length", takes=0.5)
    world = World({"a": [limited(2, takes=1.0), DOWN], "c": [late]})
    answer = world.llm.complete("Where?")
    trail = [dataclasses.astuple(attempt) for attempt in answer.attempts]
    assert [step[:4] for step in trail] == [
        ("one", "a", 1, 429),
        ("one", "a", 2, None),
        ("two", "c", 1, 200),
    ]
    assert [step[4] and step[4].name for step in trail] == ["RATE_LIMITED", "FAULT", None]
    assert ["Slow down" in trail[0][5], "refused" in trail[1][5], trail[2][5]] == [True, True, ""]
    assert [step[6:8] for step in trail] == [(0, 1), (2, 0), (0, 0.5)]
    assert (answer.text, answer.provider, answer.model) == ("Yes.", "two", "c")
    assert (answer.finish_reason, answer.usage, answer.elapsed) == ("length", {}, 3.5)


@pytest.mark.parametrize(
    ("seconds", "settings", "script"),
    [
        pytest.param(61, {}, every(limited(61)), id="the same for all"),
        pytest.param(70, {}, {**every(UNSUITABLE), "c": [limited(70)]}, id="one is limited"),
        pytest.param(65, {}, {**every(limited(90)), "b": [limited(65)]}, id="the soonest"),
        pytest.param(20, {"timeout": 9.0}, every(limited(20)), id="not in time"),
        pytest.param(None, {}, every(UNSUITABLE), id="nobody knows"),
    ],
)
def test_a_failure_says_when_to_come_back(seconds: Any, settings: Any, script: Any) -> None:
    """retry_after: seconds until the first server wants to be asked again."""
    world = World(script, **settings)
    with pytest.raises(AllProvidersFailed) as caught:
        world.llm.complete("Where?")
    assert (caught.value.retry_after, world.slept) == (seconds, [])


def test_what_is_shown_may_take_the_time_of_the_others() -> None:
    """A stream that began within its half of the time limit is read to the limit itself."""
    world = World({"a": [Reply(body=(event("Once"), 4, event(" upon"), 5, event(".", "stop")))]})
    assert "".join(world.llm.stream("Where?", timeout=10.0)) == "Once upon."
    assert world.asked == "a"


def test_offline_a_question_fails_within_seconds_and_says_why() -> None:
    """Nobody could be reached: it is our own network, and the error says what to check."""
    world = World(every(DOWN))
    with pytest.raises(AllProvidersFailed, match="check the network or HTTPS_PROXY") as caught:
        world.llm.complete("Where?")
    assert world.clock.now <= 5
    assert "cannot reach one" in str(caught.value)
    assert "Traceback" not in str(caught.value)


# --- An answer that the caller accepts ----------------------------------------------------------


def is_json(text: str) -> bool:
    """As a caller would write it: json.loads raises a ValueError."""
    return isinstance(json.loads(text), dict)


JSON, LIST, PROSE = says('{"a": 1}'), says("[1]"), says("Well, a is 1.")


@pytest.mark.parametrize(
    ("script", "asked"),
    [
        pytest.param({"a": [JSON]}, "a", id="accepted"),
        pytest.param({"a": [LIST], "b": [JSON]}, "ab", id="something false"),
        pytest.param({"a": [PROSE], "b": [JSON]}, "ab", id="a ValueError"),
        pytest.param({**every(PROSE, models="abc"), "d": [JSON]}, "abcd", id="the last one's"),
        pytest.param({"a": [LIMITED, PROSE], "b": [JSON]}, "aab", id="after a limit"),
    ],
)
def test_the_next_model_is_asked_until_an_answer_is_accepted(script: Any, asked: str) -> None:
    world = World(script)
    assert world.llm.ask("Where?", accept=is_json) == '{"a": 1}'
    assert world.asked == asked


def test_an_answer_that_is_never_accepted_is_a_failure_with_the_whole_trail() -> None:
    """Each is asked once. Nobody's health suffers: the next question begins with the first."""
    world = World(every(PROSE), max_attempts=2)
    with pytest.raises(AllProvidersFailed, match="not accepted") as caught:
        world.llm.complete("Where?", accept=is_json)
    assert str(caught.value).startswith("4 models answered; none was accepted\n")
    assert world.asked == "abcd"
    assert {attempt.verdict for attempt in caught.value.attempts} == {Verdict.REJECTED}
    assert {health.status for health in world.llm.provider_health.values()} == {
        ProviderStatus.HEALTHY
    }
    assert world.llm.complete("Where?").model == "a"


def test_an_exception_of_accept_is_the_callers() -> None:
    """It comes out, and nobody is asked instead."""
    world = World()
    with pytest.raises(ZeroDivisionError):
        world.llm.ask("Where?", accept=lambda text: 1 / 0)
    assert world.asked == "a"
    assert world.llm.provider_health["one"].consecutive_failures == 0
    assert world.llm.ask("Where?") == "A"


def test_accept_is_for_answers_that_can_be_taken_back() -> None:
    """A live stream cannot; ask_many can, for all questions or for one."""
    world = World({"a": [PROSE], "b": [JSON]})
    with pytest.raises(ValueError, match="accept"):
        world.llm.stream("Where?", accept=is_json)
    first, second = world.llm.ask_many(["1", {"question": "2", "accept": None}], accept=is_json)
    assert str(first) == '{"a": 1}'
    assert str(second) == "Well, a is 1."
    with pytest.raises(ValueError, match="accept"):
        world.llm.ask("Where?", accept="json")  # type: ignore[arg-type]


# --- What is told -------------------------------------------------------------------------------


def test_the_documented_lines(caplog: pytest.LogCaptureFixture) -> None:
    """The logger tells the walk line by line; failures are warnings."""
    caplog.set_level(logging.INFO, "fallback_llm")
    world = World({"a": [LIMITED], "b": [UNSUITABLE], "c": [says("Paris.")]}, max_attempts=2)
    assert world.llm.ask("Where?") == "Paris."
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    limit = "❌ Error in one API request: 429 Client Error: Too Many Requests: Slow down"
    assert told == [
        ("INFO", "🔄 Trying provider: one"),
        ("INFO", "🎯 Trying one model 1/2: a"),
        ("WARNING", limit),
        ("INFO", "⏳ Waiting 2.00s before retry..."),
        ("WARNING", limit),
        ("INFO", "🔄 one a exhausted all 2 retry attempts"),
        ("INFO", "🔄 one a failed, trying next model..."),
        ("INFO", "🎯 Trying one model 2/2: b"),
        ("WARNING", "❌ Error in one API request: 400 Client Error: Bad Request: Not now"),
        ("INFO", "🔄 one b failed, trying next model..."),
        ("INFO", "🔄 Trying provider: two"),
        ("INFO", "🎯 Trying two model 1/2: c"),
        ("INFO", "✅ Success with two c on attempt 1"),
    ]


@pytest.mark.parametrize(
    ("script", "arguments", "first_line"),
    [
        pytest.param(every(UNSUITABLE), {}, "All providers and models failed", id="everybody"),
        pytest.param(every(DENIED), {}, "All providers and models failed", id="every key"),
        pytest.param(
            every(UNSUITABLE),
            {"provider": "one"},
            "No answer: without provider, two could answer",
            id="a provider that was chosen",
        ),
        pytest.param(
            every(fails(takes=9)),
            {"timeout": 3.0, "model": "a"},
            "No answer within the time limit of 3 s: without model, two could answer",
            id="no time",
        ),
    ],
)
def test_an_error_begins_with_its_sum(script: Any, arguments: Any, first_line: str) -> None:
    """Who was asked and who was not; "all" only where it was all of them."""
    with pytest.raises(AllProvidersFailed) as caught:
        World(script).llm.complete("Where?", **arguments)
    assert str(caught.value).splitlines()[0] == first_line


def test_an_error_tells_who_was_not_asked() -> None:
    """Because an earlier question was told to leave it alone."""
    world = World({"a": [limited(999)], "b": [UNSUITABLE]})
    for first_line in (
        "No answer: without provider, two could answer",
        "No answer: one is rate-limited for 17 minutes more; without provider, two could answer",
    ):
        with pytest.raises(AllProvidersFailed) as caught:
            world.llm.complete("Where?", provider="one")
        assert str(caught.value).splitlines()[0] == first_line


def test_an_error_has_a_line_for_each_provider() -> None:
    """Its last failure and what to do; then when the first limit ends."""
    world = World({"a": [FAULT], "b": [limited(7200)], "c": [DENIED]}, max_attempts=1)
    with pytest.raises(AllProvidersFailed) as caught:
        world.llm.complete("Where?")
    _, one, two, end = str(caught.value).splitlines()
    assert "one b: 429 Client Error" in one
    assert "wait for the limit to end" in one
    assert "two c: 401 Client Error" in two
    assert end.strip() == "The first rate limit ends in 2 hours."


def test_a_malformed_event_ends_a_live_stream() -> None:
    """It may have held a word, and what was shown cannot be taken back."""
    pieces = (event("Once"), b"data: {broken\n\n", event(" upon.", "stop"), DONE)
    world = World({"a": [Reply(body=pieces)], "b": [says("B")]})
    with pytest.raises(StreamInterrupted) as caught:
        list(world.llm.stream("Where?"))
    assert (caught.value.partial, world.asked) == ("Once", "a")


def test_a_malformed_event_spoils_a_buffered_answer() -> None:
    """It goes elsewhere, and does not read what can no longer be an answer."""
    pieces = (event("Once"), b"data: {broken\n\n", 8, event(" upon.", "stop"), DONE)
    world = World({"a": [Reply(body=pieces)]})
    assert world.llm.complete("Where?").text == "B"
    assert world.clock.now == 0


@pytest.mark.parametrize("reply", [UNSUITABLE, BLOCKED, DENIED], ids=["400", "policy", "401"])
def test_ask_gives_no_text_and_logs_why(reply: Reply, caplog: pytest.LogCaptureFixture) -> None:
    """ask() raises neither for models that failed nor for a question that was refused."""
    assert World(every(reply)).llm.ask("Where?") == ""
    assert "Not " in caplog.text
    assert "None" not in caplog.text


def test_statistics() -> None:
    """The five figures after an answer, a detour, a refusal and a failure; then zero again."""
    script = {**every(UNSUITABLE), "a": [says("A"), limited(50), BLOCKED, UNSUITABLE]}
    world = World({**script, "c": [says("C"), UNSUITABLE]})
    answers = []
    for _ in range(4):
        answers.append(world.llm.ask("Where?"))
        world.clock.now += 100
    assert (answers, world.asked) == (["A", "C", "", ""], "aabcaabcd")
    assert world.llm.get_stats() == {
        "total_requests": 4,
        "successful_requests": 2,
        "failed_requests": 2,
        "rate_limited_requests": 1,
        "provider_switches": 2,
    }
    world.llm.reset_stats()
    assert sum(world.llm.get_stats().values()) == 0


# --- Who is asked, and what is sent -------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        pytest.param({"provider": "two"}, "two:c two:d", id="one provider"),
        pytest.param({"provider": " Two"}, "two:c two:d", id="in any case"),
        pytest.param({"provider": "two,one"}, "two:c two:d one:a one:b", id="two, in this order"),
        pytest.param({"provider": ["two", "one"]}, "two:c two:d one:a one:b", id="as a list"),
        pytest.param({"model": "d"}, "two:d", id="a model, of the provider that lists it"),
        pytest.param({"model": "x"}, "one:x two:x", id="a model that nobody lists, of all"),
        pytest.param({"model": "x", "provider": "one"}, "one:x", id="or of the chosen"),
        pytest.param({"model": "two:x"}, "two:x", id="a provider's name before the model"),
        pytest.param({"model": "two:x", "provider": "one,two"}, "two:x", id="one of the chosen"),
        pytest.param({"model": "x:1"}, "one:x:1 two:x:1", id="another word is part of the model"),
    ],
)
def test_who_is_asked(arguments: Any, asked: str) -> None:
    world = World({**every(UNSUITABLE), "x": [UNSUITABLE], "x:1": [UNSUITABLE]})
    with pytest.raises(AllProvidersFailed) as caught:
        world.llm.complete("Where?", **arguments)
    assert " ".join(f"{a.provider}:{a.model}" for a in caught.value.attempts) == asked
    assert [urlsplit(request.url).hostname for request in world.server.asked] == [
        attempt.provider for attempt in caught.value.attempts
    ]


def test_order_and_lists_are_read_at_each_question() -> None:
    world = World({"a": [UNSUITABLE]})
    world.llm.fallback_order = ["two", "one"]
    world.llm.models["two"] = ["x"]
    assert (world.llm.ask("Where?"), world.llm.models["one"]) == ("X", ["a", "b"])
    world.llm.fallback_order.remove("two")
    assert (world.llm.ask("Where?"), world.asked) == ("B", "xab")


def test_keys_are_read_at_each_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider without a key is passed over; an empty key or a placeholder is none."""
    monkeypatch.setenv("ONE_KEY", "your_key_here")
    monkeypatch.setenv("TWO_KEY", ' "k-22222222"\n')
    rows = [dataclasses.replace(row, key_env=f"{row.name.upper()}_KEY") for row in ROWS]
    world = World(providers=rows)
    assert (world.llm.ask("Where?"), world.llm.api_keys) == (
        "C",
        {"one": None, "two": "k-22222222"},
    )
    world.llm.api_keys.update(one="k-11111111", two="")
    assert world.llm.ask("Where?") == "A"
    keys = [asked.headers["Authorization"] for asked in world.server.asked]
    assert keys == ["Bearer k-22222222", "Bearer k-11111111"]
    world.llm.api_keys["one"] = None
    with pytest.raises(NoProviderError, match="ONE_KEY"):
        world.llm.ask("Where?")
    assert world.asked == "ca"


def test_keys_and_lists_of_a_dotenv(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """.env gives keys and models where the environment has none, and nothing else."""
    lines = "ONE_KEY=k-1\nTWO_KEY=k-2\nTWO_MODELS=x, y\nTWO_BASE_URL=https://evil/v1\n"
    (bare / ".env").write_text(lines)
    monkeypatch.setenv("ONE_KEY", "k-3")
    monkeypatch.setenv("TWO_KEY", "")
    rows = [dataclasses.replace(row, key_env=f"{row.name.upper()}_KEY") for row in ROWS]
    world = World(providers=rows)
    assert world.llm.api_keys == {"one": "k-3", "two": "k-2"}
    assert world.llm.models == {"one": ["a", "b"], "two": ["x", "y"]}
    assert world.llm.ask("Where?", provider="two") == "X"
    assert world.server.asked[0].url == "https://two/v1/chat/completions"
    assert os.environ["TWO_KEY"] == ""


def test_what_is_sent() -> None:
    """system, conversation, question; max_tokens; what else the caller says, as it is."""
    world = World()
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "?"}]
    more: Any = {"temperature": 0.5, "top_p": 0.9, "stop": ["\n"], "reasoning_effort": "high"}
    world.llm.complete("Où?", 99, system="In French", messages=said, **more)
    system = {"role": "system", "content": "In French"}
    question = {"role": "user", "content": "Où?"}
    expected = {"model": "a", "messages": [system, *said, question], "max_tokens": 99}
    expected.update(stream=True, stream_options={"include_usage": True})
    assert world.server.asked[0].body == {**expected, **more}
    world.llm.complete(messages=said[:1])
    assert world.server.asked[1].body["messages"] == said[:1]
    assert [world.llm.ask("Where?"), *world.llm.stream("Where?")] == ["A", "A"]
    assert [asked.body["max_tokens"] for asked in world.server.asked] == [99, 500, 500, 500]


def test_defaults_of_rows() -> None:
    """gpt-oss is asked to think little, unless the caller says otherwise."""
    world = World(providers=PROVIDERS, api_keys={"cerebras": "k-11111111"})
    cases: list[Any] = [{}, {"reasoning_effort": "high"}]
    for more in cases:
        world.llm.complete("Where?", model="cerebras:gpt-oss-120b", **more)
    sent = [asked.body["reasoning_effort"] for asked in world.server.asked]
    assert sent == ["low", "high"]
    assert world.server.asked[0].url == "https://api.cerebras.ai/v1/chat/completions"


# --- Mistakes of the caller ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_attempts", value) for value in (0, -1, 1.5, True, None, "5")]
    + [("base_delay", value) for value in (-1, math.nan, math.inf, "2")]
    + [("max_delay", value) for value in (-1, math.nan, math.inf, 1.0)]
    + [("exponential_base", value) for value in (-1, math.nan, math.inf)],
)
def test_a_retry_config_that_makes_no_sense_is_not_born(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        RetryConfig(**{name: value})


def test_limits_are_allowed() -> None:
    """The least and the most that can be meant."""
    world = World(max_attempts=1, base_delay=0.0, max_delay=0.0, exponential_base=1.0)
    RetryConfig(base_delay=60.0)
    for more in ({"max_tokens": 1}, {"temperature": 2}, {"temperature": 0}, {"timeout": 0.001}):
        assert world.llm.ask("Where?", **more) == "A"


NAN, NOBODY = math.nan, {"provider": "nobody"}
MISTAKES: list[Any] = [{"question": text} for text in (None, "", " \n\t", "\u200b", 7)]
MISTAKES += [NOBODY, {"provider": ["one", "nobody"]}, {"provider": ""}, {"model": ""}, {"model": 7}]
MISTAKES += [{"model": "two:x", "provider": "one"}]
MISTAKES += [{"max_tokens": number} for number in (0, -1, 1.5, NAN, "9", None)]
MISTAKES += [{"temperature": number} for number in (-1, 9, NAN, "hot")]
MISTAKES += [{"timeout": number} for number in (0, -1, NAN, "1")]
MISTAKES += [{"tools": []}, {"stream": True}, {"n": 2}, {"messages": "Hi"}, {"messages": [1]}]
MISTAKES += [{"top_p": {1}}, {"top_p": NAN}]


@pytest.mark.parametrize("arguments", MISTAKES, ids=str)
def test_a_mistake_of_the_caller_is_a_value_error(arguments: Any) -> None:
    """Before anything is sent, whatever the verb, and told of at the call."""
    world = World()
    for verb in (world.llm.complete, world.llm.ask, world.llm.stream):
        with pytest.raises(ValueError, match=r"\w"):
            verb(**{"question": "Where?", **arguments})
    assert (world.asked, world.llm.get_stats()["total_requests"]) == ("", 0)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("sytem", "system"),
        ("modell", "model"),
        ("providers", "provider"),
        ("max_token", "max_tokens"),
        ("temprature", "temperature"),
        ("time_out", "timeout"),
    ],
)
def test_a_misspelt_parameter_is_refused_with_a_suggestion(name: str, near: str) -> None:
    """Whatever the verb, with a question or with messages."""
    world = World()
    asked: list[Any] = [{"question": "Where?"}, {"messages": [{"role": "user", "content": "Hi"}]}]
    for verb in (world.llm.ask, world.llm.complete, world.llm.stream):
        for arguments in asked:
            with pytest.raises(ValueError, match=f"{name}.*did you mean '{near}'"):
                verb(**{**arguments, name: "x"})
    misspelt: Any = {name: "x"}
    with pytest.raises(ValueError, match=near):
        world.llm.ask_many(["Where?"], **misspelt)
    assert world.asked == ""


def test_what_comes_after_the_provider_has_to_be_named() -> None:
    arguments: Any = ("Where?", 500, None, "a")
    with pytest.raises(TypeError):
        World().llm.ask(*arguments)


def test_a_bad_element_of_many_is_its_error_in_its_place() -> None:
    """The rest is answered."""
    world = World()
    good = {"question": "Where?", "model": "d"}
    questions: Any = ["Where?", "", None, math.nan, {"sytem": "x"}, {7: 7}, {"max_tokens": 0}, good]
    results = list(world.llm.ask_many(questions))
    kinds = [type(result) for result in results]
    assert kinds == [Answer, *[ValueError] * 6, Answer]
    assert [str(results[0]), str(results[-1])] == ["A", "D"]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"retry_config": {"max_attempts": 2}}, "retry_config"),
        ({"retry_config": "groq"}, "retry_config"),
        ({"providers": ["groq"]}, "providers"),
        ({"api_keys": {"groq": 123}}, "api_keys"),
        ({"api_keys": ["gsk_1"]}, "api_keys"),
        ({"api_keys": {"nobody": "k-11111111"}}, "nobody"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": "5"}, "timeout"),
        ({"idle_timeout": math.nan}, "idle_timeout"),
    ],
    ids=str,
)
def test_a_mistake_in_the_constructor_is_refused_at_once(arguments: Any, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        FallbackLLM(**arguments)


# --- Models that are gone -----------------------------------------------------------------------


def test_served_models_take_the_place_of_gone_ones(caplog: pytest.LogCaptureFixture) -> None:
    """Five chat models at most, once, told with the name of the setting; and they stay."""
    names = ["whisper-1", "p", "x-guard-1", "text-embedding-3", "off", "q", *"rstuv"]
    entries: Any = [{"id": name, "active": name != "off"} for name in names]
    entries[1:1] = [{"id": "w", "output_modalities": ["audio"]}, {"no": "id"}, 7]
    script = {**every(GONE, models="ab"), **every(UNSUITABLE, models="pqrstuv")}
    world = World({**script, "one/models": [Reply(200, {"data": entries})]}, providers=ONE)
    assert world.llm.ask("Where?") == world.llm.ask("Where?") == ""
    assert world.asked == "abone/modelspqrst" + "pqrst"
    assert world.llm.models == {"one": [*"pqrst"]}
    told = next(line for line in caplog.messages if "ONE_MODELS" in line)
    assert "a, b" in told
    assert "p, q, r, s, t" in told


def test_openrouter_only_offers_what_is_free() -> None:
    """Prices are strings; a router's -1 is no price of nothing."""
    rows = [row for row in PROVIDERS if row.name == "openrouter"]
    prices = {"paid": "0.0001", "auto": "-1", "free": "0", "half": "0"}
    pricing = [{"id": n, "pricing": {"prompt": "0", "completion": p}} for n, p in prices.items()]
    pricing[-1]["pricing"]["prompt"] = "0.1"  # type: ignore[index]
    script: Any = {model: [GONE] for model in rows[0].models}
    script["openrouter.ai/models"] = [Reply(200, {"data": [*pricing, {"id": "unpriced"}]})]
    world = World(script, providers=rows, api_keys={"openrouter": "k-11111111"})
    assert world.llm.ask("Where?") == "FREE"
    assert [asked.model for asked in world.server.asked][-2:] == ["openrouter.ai/models", "free"]


FREE = {"prompt": "0"}
IDS: list[Any] = [None, 7, "", ["x"], "x y", "x\n", "x" * 999]
PRICES: list[Any] = [7, "0", ["0"], {"prompt": {}}, {"prompt": "nan"}]
STRANGE: list[Any] = [None, 7, "a page", [], {"data": 7}, {"data": {"id": "x"}}, {"data": ["x"]}]
STRANGE += [{"data": [{"id": wrong, "pricing": FREE}]} for wrong in IDS]
STRANGE += [{"data": [{"id": "x", "pricing": wrong}]} for wrong in PRICES]
FIELDS = ("output_modalities", "context_length", "architecture", "active")
ODD = [{"data": [{"id": "x", "pricing": FREE, field: ["x"]}]} for field in FIELDS]


@pytest.mark.parametrize("body", STRANGE + ODD, ids=lambda body: str(body)[:60])
def test_a_models_list_may_hold_anything(body: Any) -> None:
    """What is no chat model's id, or has no price of nothing, is not asked; nothing breaks."""
    rows = [row for row in PROVIDERS if row.name == "openrouter"]
    script: Any = {model: [GONE] for model in rows[0].models}
    script["openrouter.ai/models"] = [Reply(200, body)]
    world = World(script, providers=rows, api_keys={"openrouter": "k-11111111"})
    assert world.llm.ask("Where?") == ("X" if body in ODD[1:] else "")


@pytest.mark.parametrize(
    ("script", "arguments", "asked"),
    [
        pytest.param({"a": [GONE]}, {"model": "a"}, "a", id="a model that was chosen"),
        pytest.param({"a": [GONE], "b": [UNSUITABLE]}, {}, "abc", id="not all are gone"),
        pytest.param({"a": [GONE], "b": [GONE]}, {}, "abc", id="somebody else answers"),
        pytest.param(
            {**every(UNSUITABLE), "a": [GONE], "b": [GONE]},
            {},
            "abcdone/models",
            id="a list that fails",
        ),
    ],
)
def test_nothing_takes_the_place_of(script: Any, arguments: Any, asked: str) -> None:
    """A provider's own list comes last, after everybody else."""
    world = World({**script, "one/models": [fails(500)]})
    world.llm.ask("Where?", **arguments)
    assert world.asked == asked


# --- What the module promises of itself ---------------------------------------------------------


def test_the_documented_defaults() -> None:
    assert dataclasses.astuple(RetryConfig()) == (5, 2.0, 60.0, 2.0, True, True)
    assert dataclasses.astuple(ProviderHealth()) == (ProviderStatus.HEALTHY, 0.0, 0.0, 0, 0.0)
    statuses = ["healthy", "rate_limited", "failed", "unavailable"]
    assert [status.value for status in ProviderStatus] == statuses
    idle_timeouts = {"cerebras": 10, "groq": 10, "openrouter": 30}
    assert {row.name: row.idle_timeout for row in PROVIDERS} == idle_timeouts
    assert list(FallbackLLM().fallback_order) == list(idle_timeouts)
    assert row("own").idle_timeout == 60


def test_without_a_key_only_the_question_fails(bare: Path) -> None:
    """The constructor is silent; NoProviderError names the variables; nothing was sent."""
    world = World(providers=[row("one", "a", key_env="ONE_KEY")])
    for verb in (world.llm.ask, world.llm.complete, world.llm.stream):
        with pytest.raises(NoProviderError, match="ONE_KEY") as caught:
            verb("Where?")
    assert isinstance(caught.value, FallbackLLMError)
    assert (caught.value.attempts, world.asked) == ((), "")


def test_objects_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickled object has its settings, and keys only where the constructor was given them."""
    monkeypatch.setenv("ONE_KEY", "k-11111111")
    rows = [row(name, "a", key_env=f"{name.upper()}_KEY") for name in ("one", "two")]
    settings: Any = {"providers": rows, "api_keys": {"two": "k-22222222"}, "timeout": 7.0}
    llm = FallbackLLM(RetryConfig(max_attempts=2), **settings)
    llm.fallback_order, llm.models["one"] = ["two"], ["x"]
    pickled = pickle.dumps(llm)
    assert (b"k-11111111" in pickled, b"k-22222222" in pickled) == (False, True)
    monkeypatch.setenv("ONE_KEY", "k-33333333")
    landed = pickle.loads(pickled)  # noqa: S301 - our own
    assert landed.api_keys == {"one": "k-33333333", "two": "k-22222222"}
    assert (landed.retry_config, landed.fallback_order) == (RetryConfig(max_attempts=2), ["two"])
    assert landed.models == {"one": ["x"], "two": ["a"]}
    assert landed.get_stats() == llm.get_stats()


def test_results_travel() -> None:
    """Answers and errors keep their evidence through pickle."""
    world = World({"a": [says("A"), limited(90), BLOCKED]}, max_attempts=1, providers=ONE[:1])
    world.llm.models["one"] = ["a"]
    answer, limit, refusal = list(world.llm.ask_many(["1", "2", "3"], max_workers=1))
    world.clock.now += 100
    (refusal,) = world.llm.ask_many(["4"])
    assert pickle.loads(pickle.dumps(answer)) == answer  # noqa: S301 - our own
    for error in (limit, refusal):
        landed = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
        assert (type(landed), str(landed)) == (type(error), str(error))
        assert landed.__dict__ == error.__dict__
        assert landed.attempts
