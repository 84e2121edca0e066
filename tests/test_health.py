"""What is known of providers and models across questions, told as stories."""

from __future__ import annotations

import gc
import math
import threading
from typing import Any, Callable

import pytest
from fakes import STUCK, FakeClock, Reply, World, event, limited, says

from fallback_llm import (
    Candidate,
    Failure,
    Health,
    Provider,
    ProviderHealth,
    ProviderStatus,
    Queue,
    RetryConfig,
    Slot,
    Verdict,
)

ROWS = {name: Provider(name, f"https://{name}.test", "KEY", ("1", "2")) for name in "ab"}
EPOCH = 1_000_000.0  # of the epoch, when the clock says 0
LIMITED, FAULT, DENIED, GONE = Verdict.RATE_LIMITED, Verdict.FAULT, Verdict.DENIED, Verdict.GONE
HEALTHY, RATE_LIMITED, FAILED, UNAVAILABLE = ProviderStatus
PLAIN = RetryConfig(jitter=False)
PATIENT = RetryConfig(jitter=False, max_delay=1e6)


def candidate(name: str) -> Candidate:
    """A model such as "a1"."""
    return Candidate(ROWS[name[0]], name[1])


def name_of(asked: Candidate) -> str:
    return asked.row.name + asked.model


class Memory:
    """A memory under test, and its clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.health = Health(lambda: self.now, lambda: EPOCH + self.now)

    def queue(self, *names: str, deadline: float = math.inf, config: Any = PATIENT) -> Queue:
        """The line of a new question."""
        candidates = [candidate(name) for name in names]
        return Queue(candidates, deadline, self.health, config, lambda: self.now, lambda: 1.0)

    def take(self, name: str) -> Slot:
        with self.health.lock:
            return self.health.take(candidate(name), self.now, self.now)


class Story:
    """Things that happen to a memory, each at a time of the clock.

    Whoever wants to know how it stands hears the story told from its beginning, so that asking
    changes nothing.
    """

    def __init__(self) -> None:
        self._chapters: list[Callable[[Memory], object]] = []

    def fails(
        self,
        at: float,
        verdict: Verdict,
        since: float | None = None,
        model: str = "a1",
        **more: Any,
    ) -> Story:
        """An attempt that began at `since`, or just then, and failed."""

        def happens(memory: Memory) -> None:
            begun = at if since is None else since
            memory.now = begun
            slot = memory.take(model)
            memory.now = at
            memory.health.failed(slot, begun, Failure(verdict, "", **more), PLAIN.backoff)

        self._chapters.append(happens)
        return self

    def answers(self, at: float, since: float | None = None, model: str = "a1") -> Story:
        """An attempt that began at `since`, or just then, and was answered."""

        def happens(memory: Memory) -> None:
            begun = at if since is None else since
            memory.now = begun
            slot = memory.take(model)
            memory.now = at
            memory.health.answered(slot, begun)

        self._chapters.append(happens)
        return self

    def leases(self, at: float, model: str = "a1") -> Story:
        """Somebody is chosen and has not been heard of yet."""

        def happens(memory: Memory) -> None:
            memory.now = at
            step = memory.queue(model).next()
            assert step is not None

        self._chapters.append(happens)
        return self

    def closes(self, at: float, model: str = "a1", text_since: float | None = None) -> Story:
        """The caller ends an attempt; it had given some text if it is said since when it ran."""

        def happens(memory: Memory) -> None:
            memory.now = at if text_since is None else text_since
            slot = memory.take(model)
            memory.now = at
            memory.health.drop(slot, text_since)

        self._chapters.append(happens)
        return self

    def told(self, at: float) -> Memory:
        """The memory at this time."""
        memory = Memory()
        for happens in self._chapters:
            happens(memory)
        memory.now = at
        return memory

    def order(self, at: float) -> str:
        """Whom a question asks one after the other, when none of them can help."""
        memory = self.told(at)
        line = memory.queue("a1", "a2", "b1")
        asked = []
        step = line.next()
        while step is not None:
            assert step.slot is not None
            memory.health.drop(step.slot)
            asked.append(name_of(step.turn.candidate))
            line.failed(step.turn, Failure(Verdict.UNSUITABLE, ""))
            step = line.next()
        return " ".join(asked)

    def waits(self, at: float) -> list[float]:
        """How long questions for a1, for a2 and for b1 wait."""
        waits = []
        for name in ("a1", "a2", "b1"):
            step = self.told(at).queue(name).next()
            assert step is not None
            waits.append(step.wait)
        return waits

    def status(self, at: float, name: str = "a", has_key: bool = True) -> ProviderHealth:
        return self.told(at).health.of_provider(name, has_key)


# --- Who is asked later -------------------------------------------------------------------------

FIRST, LATER, ALL_LATER = "a1 a2 b1", "a2 b1 a1", "b1 a1 a2"


def test_a_fault_is_asked_last_for_a_while() -> None:
    """For as long as its backoff; it is asked all the same when its turn comes."""
    story = Story().fails(10, FAULT)
    assert [story.order(at) for at in (10, 11.9, 12)] == [LATER, LATER, FIRST]
    assert story.waits(10) == [0, 0, 0]


@pytest.mark.parametrize(
    ("verdict", "wide", "order"),
    [
        pytest.param(FAULT, True, ALL_LATER, id="a provider's fault"),
        pytest.param(GONE, False, LATER, id="gone"),
        pytest.param(DENIED, True, ALL_LATER, id="denied"),
        pytest.param(LIMITED, False, LATER, id="limited, no hint"),
        pytest.param(Verdict.UNSUITABLE, False, FIRST, id="unsuitable"),
        pytest.param(Verdict.REFUSED, False, FIRST, id="refused"),
        pytest.param(Verdict.REJECTED, False, FIRST, id="rejected by the caller"),
    ],
)
def test_what_is_asked_last(verdict: Verdict, wide: bool, order: str) -> None:
    """Ten minutes for what does not pass by itself; a refused question says nothing of it."""
    story = Story().fails(10, verdict, reaches_provider=wide)
    assert story.order(11) == order
    ends = 610 if verdict in (GONE, DENIED) else 12
    assert story.order(ends - 0.1) == order
    assert story.order(ends) == FIRST


def test_the_backoff_grows_with_failures_and_is_forgotten_with_success() -> None:
    """2, 4, 8 … but never more than 20 seconds, for it may be well again at any time."""
    story = Story()
    now = 0
    pauses = []
    for _ in range(7):
        story.fails(now, FAULT)
        pause = 1
        while story.order(now + pause) != FIRST:
            pause += 1
        pauses.append(pause)
        now += pause
    assert pauses == [2, 4, 8, 16, 20, 20, 20]
    assert story.answers(now).fails(now, FAULT).order(now + 2) == FIRST


def test_failures_that_were_under_way_together_count_once() -> None:
    """Of many threads; one that began when the first had failed counts."""
    story = Story().fails(10, FAULT, since=5).fails(11, FAULT, since=9.9).fails(12, FAULT, since=8)
    assert story.status(12).consecutive_failures == 1
    assert [story.order(at) for at in (13.9, 14)] == [LATER, FIRST]
    assert story.fails(13, FAULT, since=12).status(13).consecutive_failures == 2
    assert [story.order(at) for at in (16.9, 17)] == [LATER, FIRST]


def test_a_success_forgives_what_was_before_it() -> None:
    """The model and what reached the provider, but no other model."""
    story = Story().fails(1, FAULT).fails(1, FAULT, reaches_provider=True)
    story.fails(1, GONE, model="a2")
    assert story.answers(2, since=1).order(2) == "a1 b1 a2"


def test_a_success_does_not_forgive_what_failed_since_it_began() -> None:
    """A slow answer says nothing of what another thread was told meanwhile."""
    story = Story().fails(10, GONE).fails(10, DENIED, reaches_provider=True).answers(11, since=9)
    assert story.order(12) == ALL_LATER
    story = Story().fails(10, LIMITED, hint=3600).answers(11, since=9)
    assert story.waits(12) == [3598, 0, 0]
    assert story.status(12).status is RATE_LIMITED
    assert story.status(12).consecutive_failures == 1


def test_a_stream_that_is_closed_after_some_text_has_answered() -> None:
    """What failed before it is forgiven, as by any other success."""
    story = Story().fails(10, FAULT).closes(11.5, text_since=10.5)
    assert story.order(11.5) == FIRST
    assert story.status(11.5).consecutive_failures == 0


def test_a_stream_that_is_closed_before_its_first_text_says_nothing() -> None:
    assert Story().closes(10).status(10) == ProviderHealth()
    assert Story().fails(10, FAULT).closes(10.5).order(11) == LATER


def test_a_lease_keeps_the_others_from_it() -> None:
    """Only from one that failed; until the trial's end, or for its silence and five seconds."""
    assert Story().leases(9).order(10) == FIRST
    story = Story().fails(10, FAULT).leases(12)
    assert [story.order(at) for at in (12, 76.9, 77)] == [LATER, LATER, FIRST]
    story = Story().fails(10, LIMITED, hint=30).leases(12)  # and is waited for until 40
    assert [story.order(at) for at in (104.9, 105)] == [LATER, FIRST]
    story = Story().fails(10, FAULT, reaches_provider=True).leases(12, "a2")
    assert story.order(19) == ALL_LATER
    assert Story().fails(10, FAULT).leases(12).answers(13, since=12).order(13) == FIRST
    story = Story().fails(10, LIMITED, hint=1).leases(12).fails(13, Verdict.UNSUITABLE, since=12)
    assert story.order(13) == FIRST


def test_the_callers_own_limit_counts_against_nobody() -> None:
    """Neither as a failure nor in the order."""
    story = Story().fails(10, FAULT, is_blameless=True, reaches_provider=True)
    assert story.order(11) == FIRST
    assert story.status(11) == ProviderHealth()


# --- The servers' word --------------------------------------------------------------------------


def test_a_hint_outlives_the_question() -> None:
    """Nobody asks before; a shorter one does not end a longer one."""
    story = Story().fails(10, LIMITED, hint=30).fails(11, LIMITED, since=9, hint=5)
    assert story.waits(12) == [28, 0, 0]
    assert story.waits(40) == [0, 0, 0]
    assert story.fails(50, LIMITED, hint=60).waits(50) == [60, 0, 0]


def test_a_fault_may_bring_a_hint_too() -> None:
    assert Story().fails(10, FAULT, hint=9).waits(10) == [9, 0, 0]
    assert Story().fails(10, Verdict.UNSUITABLE, hint=9).waits(10) == [0, 0, 0]


def test_a_hint_for_the_provider_holds_for_all_its_models() -> None:
    """And the model's own, when that is longer; a success ends both."""
    story = Story().fails(10, LIMITED, hint=30, reaches_provider=True)
    story.fails(11, LIMITED, hint=90)
    assert story.waits(11) == [90, 29, 0]
    assert story.answers(12).waits(12) == [0, 0, 0]


def test_what_is_left_of_a_hint_can_be_told() -> None:
    """For the error of a question that nobody answered: 0 where no server said anything."""
    memory = Story().fails(10, LIMITED, hint=30).fails(10, FAULT, model="b1").told(15)
    waits = [memory.health.wait_for_server(candidate(name)) for name in ("a1", "a2", "b1")]
    assert waits == [25, 0, 0]


# --- The line of one question -------------------------------------------------------------------


def asks(memory: Memory, line: Queue, *failures: Failure) -> list[tuple[str, float]]:
    """Whom a question asks, and how long it waits for it, when it meets these failures."""
    asked = []
    for failure in failures:
        step = line.next()
        assert step is not None
        assert step.slot is not None
        memory.now += step.wait
        begun = memory.now
        memory.health.failed(step.slot, begun, failure, PLAIN.backoff)
        line.failed(step.turn, failure)
        asked.append((name_of(step.turn.candidate), step.wait))
    return asked


def test_whoever_is_worth_the_wait_keeps_its_place() -> None:
    """What others are told to do, ask it later, does not hold for who has asked it already."""
    memory = Story().told(10)
    limit = Failure(LIMITED, "")
    asked = asks(memory, memory.queue("a1", "a2", config=PLAIN), limit, limit)
    assert asked == [("a1", 0), ("a1", 2)]


def test_places_are_kept() -> None:
    """Who was asked and moved is behind whoever was not, as is who shall be asked later."""
    memory = Story().fails(9, FAULT).told(9)
    fault = Failure(FAULT, "")
    asked = asks(memory, memory.queue("a2", "a1", "b1", config=PLAIN), fault, fault, fault, fault)
    assert asked == [("a2", 0), ("b1", 0), ("a1", 0), ("a2", 2)]


def test_the_later_of_both_pauses_counts() -> None:
    """Of the memory's and the question's own."""
    memory = Story().fails(10, LIMITED, hint=3).told(12)
    twice = [Failure(LIMITED, ""), Failure(LIMITED, "")]
    assert asks(memory, memory.queue("a1", config=PLAIN), *twice) == [("a1", 1), ("a1", 2)]
    memory = Story().told(10)
    line = memory.queue("a1", config=PLAIN)
    assert asks(memory, line, Failure(LIMITED, "", hint=30)) == [("a1", 0)]
    assert asks(memory, line, Failure(LIMITED, "")) == [("a1", 30)]


def test_less_than_a_clocks_rounding_is_no_wait() -> None:
    assert Story().fails(10, LIMITED, hint=5.0000001).waits(15) == [0, 0, 0]


# --- ProviderHealth -----------------------------------------------------------------------------


def test_health_of_the_unknown() -> None:
    """Healthy with a key, unavailable without one; nothing has happened."""
    words = [status.value for status in (HEALTHY, RATE_LIMITED, FAILED, UNAVAILABLE)]
    assert words == ["healthy", "rate_limited", "failed", "unavailable"]
    assert Story().status(5) == ProviderHealth(HEALTHY, 0.0, 0.0, 0, 0.0)
    assert Story().status(5, has_key=False) == ProviderHealth(UNAVAILABLE, 0.0, 0.0, 0, 0.0)


STATES: dict[str, Any] = {  # the story, the time; status, success, failure, failures, reset
    "answered": (Story().answers(3), 9, (HEALTHY, 3, None, 0, None)),
    "failed": (Story().answers(3).fails(5, FAULT), 9, (FAILED, 3, 5, 1, None)),
    "failed long ago": (Story().fails(5, FAULT), 9999, (FAILED, None, 5, 1, None)),
    "failed twice": (Story().fails(5, FAULT).fails(6, FAULT), 9, (FAILED, None, 6, 2, None)),
    "two": (Story().fails(5, FAULT).fails(6, GONE, model="a2"), 9, (FAILED, None, 6, 2, None)),
    "gone": (Story().fails(5, GONE), 9, (FAILED, None, 5, 1, None)),
    "answered since": (Story().fails(5, FAULT).answers(6), 9, (HEALTHY, 6, 5, 0, None)),
    "another model answered": (
        Story().fails(5, FAULT).answers(6, model="a2"),
        9,
        (HEALTHY, 6, 5, 0, None),
    ),
    "limited": (Story().fails(5, LIMITED, hint=60), 9, (RATE_LIMITED, None, 5, 1, 65)),
    "limited still": (Story().fails(5, LIMITED, hint=60), 64.9, (RATE_LIMITED, None, 5, 1, 65)),
    "the limit is over": (Story().fails(5, LIMITED, hint=60), 65, (HEALTHY, None, 5, 1, 65)),
    "limited without a hint": (Story().fails(5, LIMITED), 6, (RATE_LIMITED, None, 5, 1, 7)),
    "limited, then failed": (
        Story().fails(5, LIMITED, hint=60).fails(6, FAULT, model="a2"),
        9,
        (FAILED, None, 6, 2, None),
    ),
    "denied": (Story().fails(5, DENIED, reaches_provider=True), 9, (UNAVAILABLE, None, 5, 1, None)),
    "accepted again": (
        Story().fails(5, DENIED, reaches_provider=True).answers(8),
        9,
        (HEALTHY, 8, 5, 0, None),
    ),
    "unsuitable": (Story().fails(5, Verdict.UNSUITABLE), 9, (HEALTHY, None, None, 0, None)),
    "refused": (Story().fails(5, Verdict.REFUSED), 9, (HEALTHY, None, None, 0, None)),
    "rejected": (Story().fails(5, Verdict.REJECTED), 9, (HEALTHY, None, None, 0, None)),
    "the other provider": (Story().fails(5, FAULT, model="b1"), 9, (HEALTHY, None, None, 0, None)),
}


def epoch(time: float | None) -> float:
    return 0.0 if time is None else EPOCH + time


@pytest.mark.parametrize(("story", "at", "expected"), STATES.values(), ids=list(STATES))
def test_health(story: Story, at: float, expected: Any) -> None:
    """By the latest failure since the last success; times are of the epoch, 0.0 is never."""
    status, success, failure, failures, reset = expected
    assert story.status(at) == ProviderHealth(
        status, epoch(success), epoch(failure), failures, epoch(reset)
    )


def test_health_is_a_copy_each_time() -> None:
    memory = Story().fails(5, FAULT).told(9)
    memory.health.of_provider("a", True).consecutive_failures = 99
    assert memory.health.of_provider("a", True).consecutive_failures == 1


# --- The only lock ------------------------------------------------------------------------------


class CollectingClock(FakeClock):
    """Each time that somebody looks at it, the garbage collector finds one of the streams."""

    def __init__(self) -> None:
        super().__init__()
        self.streams: list[Any] = []
        self._is_collecting = False

    def time(self) -> float:
        if self.streams and not self._is_collecting:
            self._is_collecting = True
            cycle = [self.streams.pop()]
            cycle.append(cycle)
            del cycle
            gc.collect()
            self._is_collecting = False
        return super().time()


def test_the_garbage_collector_may_end_a_stream_at_any_moment() -> None:
    """Also while the lock is held: an unfinished stream in a cycle stopped its thread for ever."""
    clock = CollectingClock()
    live = Reply(body=(event("Once"), event(" upon", "stop")))
    world = World({"a": [live], "b": [limited(), says("B")]}, clock)
    streams = [world.llm.stream("Where?", model="a") for _ in range(10)]
    for stream in streams:
        assert next(stream) == "Once"
    clock.streams.extend(streams)
    streams.clear()
    del stream

    answers: list[str] = []

    def ask_while_streams_end() -> None:
        while clock.streams:
            answers.append(world.llm.ask("Where?", model="b"))

    thread = threading.Thread(target=ask_while_streams_end, daemon=True)
    thread.start()
    thread.join(STUCK)
    assert not thread.is_alive()
    assert set(answers) == {"B"}
    assert all(body.closed for body in world.server.bodies[:10])
    assert world.llm.get_stats()["successful_requests"] == 10 + len(answers)
    assert world.llm.ask("Where?", model="a") == "Once upon"
