"""What outlives a question: the memory over sequences of results."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fallback_llm import (
    Failure,
    FallbackLLM,
    Provider,
    ProviderHealth,
    ProviderStatus,
    RetryConfig,
    Turn,
    Verdict,
)

ROWS = {name: Provider(name, f"https://{name}.test", "KEY", ("1", "2")) for name in "ab"}
EPOCH = 1_000_000.0  # of the epoch, when the clock says 0
LIMITED, FAULT, DENIED, GONE = Verdict.RATE_LIMITED, Verdict.FAULT, Verdict.DENIED, Verdict.GONE
HEALTHY, RATE_LIMITED, FAILED, UNAVAILABLE = ProviderStatus


def turn(name: str, **more: Any) -> Turn:
    """The turn of a model such as "a1"."""
    return Turn(ROWS[name[0]], name[1], name, **more)


class Story:
    """A memory to which things happen, each at a time of the clock."""

    def __init__(self) -> None:
        self.now = 0.0
        clocks: Any = {"clock": lambda: self.now, "wall_clock": lambda: EPOCH + self.now}
        keys = dict.fromkeys("ab", "k-11111111")
        self.llm = FallbackLLM(providers=ROWS.values(), api_keys=keys, **clocks)

    def fails(
        self,
        at: float,
        verdict: Verdict,
        since: float | None = None,
        model: str = "a1",
        **more: Any,
    ) -> Story:
        """An attempt that began at `since`, or just then."""
        return self._record(at, Failure(verdict, "", **more), since, model)

    def answers(self, at: float, since: float | None = None, model: str = "a1") -> Story:
        return self._record(at, None, since, model)

    def leases(self, at: float, model: str = "a1") -> Story:
        """Somebody is chosen and has not been heard of yet."""
        self.now = at
        assert self.llm._next([turn(model)], 1e9)[0]
        return self

    def _record(self, at: float, failure: Any, since: float | None, model: str) -> Story:
        since = at if since is None else since
        self.now = at
        self.llm._record(turn(model), failure, since)
        return self

    def line(self, at: float, *turns: Turn) -> list[tuple[Turn, float]]:
        """Who would be asked one after the other, and the wait for each; nobody gets a lease."""
        self.now, line, asked = at, [*turns] or [turn(n) for n in ("a1", "a2", "b1")], []
        leases = {mark: mark.probed_until for mark in self.llm._marks.values()}
        while line:
            # patience without end: not the wait, but the place and the marks give the order
            self.llm.retry_config = RetryConfig(max_delay=1e9)
            chosen, wait = self.llm._next([each._replace(patience=1e9) for each in line], 1e9)
            self.llm.retry_config = RetryConfig()
            for mark, until in leases.items():
                mark.probed_until = until
            (chosen,) = [each for each in line if chosen and each.label == chosen.label]
            line.remove(chosen)
            asked.append((chosen, wait))
        return asked

    def order(self, at: float, *turns: Turn) -> str:
        """Who is asked in which order, all that wait alike."""
        return " ".join(each.label for each, _ in self.line(at, *turns))

    def waits(self, at: float, *turns: Turn) -> list[float]:
        """Of a1, a2, b1."""
        line = self.line(at, *turns)
        return [wait for _, wait in sorted(line, key=lambda pair: pair[0].label)]

    def ready_at(self, model: str) -> float:
        return float(self.llm._ready_at(turn(model, ready_at=-math.inf)))

    def health(self, at: float, name: str = "a", has_key: bool = True) -> ProviderHealth:
        self.now = at
        self.llm.api_keys[name] = "k-11111111" if has_key else None
        return self.llm.provider_health[name]


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
    ],
)
def test_what_is_asked_last(verdict: Verdict, wide: bool, order: str) -> None:
    """Ten minutes for what does not pass by itself; a refused question says nothing of it."""
    story = Story().fails(10, verdict, wide=wide)
    assert story.order(11) == order
    ends = 610 if verdict in (GONE, DENIED) else 12
    assert story.order(ends - 0.1) == order
    assert story.order(ends) == FIRST


def test_the_backoff_grows_with_failures_and_is_forgotten_with_success() -> None:
    """2, 4, 8 … to the longest wait."""
    story, ends = Story(), []  # type: Story, list[float]
    for _ in range(7):
        start = ends[-1] if ends else 0.0
        story.fails(start, FAULT)
        ends.append(next(start + s for s in range(1, 99) if story.order(start + s) == FIRST))
    assert [end - start for start, end in zip([0.0, *ends], ends)] == [2, 4, 8, 16, 32, 60, 60]
    assert story.answers(ends[-1]).fails(ends[-1], FAULT).order(ends[-1] + 2) == FIRST


def test_failures_that_were_under_way_together_count_once() -> None:
    """Of many threads; one that began when the first had failed counts."""
    story = Story().fails(10, FAULT, since=5).fails(11, FAULT, since=9.9).fails(12, FAULT, since=8)
    assert story.health(12).consecutive_failures == 1
    assert [story.order(at) for at in (13.9, 14)] == [LATER, FIRST]
    assert story.fails(13, FAULT, since=12).health(13).consecutive_failures == 2
    assert [story.order(at) for at in (16.9, 17)] == [LATER, FIRST]


def test_a_success_forgives_what_was_before_it() -> None:
    """The model and what reached the provider; not what failed since it began, nor others."""
    story = Story().fails(1, FAULT).fails(1, FAULT, wide=True).fails(1, GONE, model="a2")
    assert story.answers(2, since=1).order(2) == "a1 b1 a2"
    story = Story().fails(10, GONE).fails(10, DENIED, wide=True).answers(11, since=9)
    assert story.order(12) == ALL_LATER
    assert story.health(12).consecutive_failures == 0


def test_whoever_was_tried_in_this_question_keeps_the_place() -> None:
    """The walk has put it there."""
    story = Story().fails(10, FAULT)
    assert story.order(11, turn("a1", attempts=1), turn("a2")) == "a1 a2"


def test_a_lease_keeps_the_others_from_it() -> None:
    """Only from one that failed; until the trial's end, or for its silence and five seconds."""
    assert Story().leases(9).order(10) == FIRST
    story = Story().fails(10, FAULT).leases(12)
    assert [story.order(at) for at in (12, 76.9, 77)] == [LATER, LATER, FIRST]
    story = Story().fails(10, LIMITED, hint=30).leases(12)  # and is waited for until 40
    assert [story.order(at) for at in (104.9, 105)] == [LATER, FIRST]
    assert Story().fails(10, FAULT, wide=True).leases(12, "a2").order(19) == ALL_LATER
    assert Story().fails(10, FAULT).leases(12).answers(13, since=12).order(13) == FIRST
    story = Story().fails(10, LIMITED, hint=1).leases(12).fails(13, Verdict.UNSUITABLE, since=12)
    assert story.order(13) == FIRST


def test_the_callers_own_limit_counts_against_nobody() -> None:
    """Neither as a failure nor in the order."""
    story = Story().fails(10, FAULT, blameless=True, wide=True)
    assert (story.order(11), story.health(11)) == (FIRST, ProviderHealth())


# --- The servers' word --------------------------------------------------------------------------


def test_a_hint_outlives_the_question() -> None:
    """Nobody asks before; a shorter one does not end a longer one."""
    story = Story().fails(10, LIMITED, hint=30).fails(11, LIMITED, since=9, hint=5)
    assert (story.waits(12), story.ready_at("a1"), story.ready_at("a2")) == (
        [28, 0, 0],
        40,
        -math.inf,
    )
    assert story.waits(40) == [0, 0, 0]
    assert story.fails(50, LIMITED, hint=60).waits(50) == [60, 0, 0]
    assert Story().fails(10, FAULT, hint=9).waits(10) == [9, 0, 0]
    assert Story().fails(10, Verdict.UNSUITABLE, hint=9).waits(10) == [0, 0, 0]


def test_a_hint_for_the_provider_holds_for_all_its_models() -> None:
    """And the model's own, when that is longer; a success ends both."""
    story = Story().fails(10, LIMITED, hint=30, wide=True).fails(11, LIMITED, hint=90)
    assert story.waits(11) == [90, 29, 0]
    assert (story.ready_at("a1"), story.ready_at("a2")) == (101, 40)
    assert story.answers(12).waits(12) == [0, 0, 0]


def test_the_later_of_both_pauses_counts() -> None:
    """Of the memory's and the question's own; what is less than a clock's rounding is none."""
    story = Story().fails(10, LIMITED, hint=30)
    assert story.waits(10, turn("a1", ready_at=99.0), turn("a2", ready_at=20.0)) == [89, 10]
    assert story.waits(30, turn("a1", ready_at=20.0)) == [10]
    assert story.waits(10, turn("b1", ready_at=10 + 1e-7)) == [0]


def test_places_are_kept() -> None:
    """Who was asked and moved is behind whoever was not, as is who shall be asked later."""
    story = Story().fails(10, FAULT)
    turns = [turn("a2", place=2, attempts=1), turn("a1"), turn("b1", place=1, attempts=1)]
    assert story.order(11, *turns) == "a1 b1 a2"


# --- ProviderHealth -----------------------------------------------------------------------------


def test_health_of_the_unknown() -> None:
    """Healthy with a key, unavailable without one; nothing has happened."""
    words = [status.value for status in (HEALTHY, RATE_LIMITED, FAILED, UNAVAILABLE)]
    assert words == ["healthy", "rate_limited", "failed", "unavailable"]
    assert Story().health(5) == ProviderHealth(HEALTHY, 0.0, 0.0, 0, 0.0)
    assert Story().health(5, has_key=False) == ProviderHealth(UNAVAILABLE, 0.0, 0.0, 0, 0.0)


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
    "denied": (Story().fails(5, DENIED, wide=True), 9, (UNAVAILABLE, None, 5, 1, None)),
    "accepted again": (Story().fails(5, DENIED, wide=True).answers(8), 9, (HEALTHY, 8, 5, 0, None)),
    "unsuitable": (Story().fails(5, Verdict.UNSUITABLE), 9, (HEALTHY, None, None, 0, None)),
    "refused": (Story().fails(5, Verdict.REFUSED), 9, (HEALTHY, None, None, 0, None)),
    "the other provider": (Story().fails(5, FAULT, model="b1"), 9, (HEALTHY, None, None, 0, None)),
}  # fmt: skip


@pytest.mark.parametrize(("story", "at", "expected"), STATES.values(), ids=list(STATES))
def test_health(story: Story, at: float, expected: Any) -> None:
    """By the latest failure since the last success; times are of the epoch, 0.0 is never."""
    status, success, failure, failures, reset = expected
    success, failure, reset = (
        0.0 if time is None else EPOCH + time for time in (success, failure, reset)
    )
    health = story.health(at)
    assert health == ProviderHealth(status, success, failure, failures, reset)
    health.consecutive_failures = 99
    assert story.health(at).consecutive_failures == failures
