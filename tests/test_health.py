"""What is known of providers and models across questions, told as stories."""

from __future__ import annotations

import contextlib
import gc
import math
import threading
from typing import Any, Callable

import pytest
from fakes import STUCK, FakeClock, Reply, World, event, limited, says

from fallback_llm import (
    Account,
    Candidate,
    Cause,
    Failure,
    Health,
    Provider,
    ProviderHealth,
    ProviderStatus,
    Queue,
    Reach,
    RetryConfig,
    Turn,
    Verdict,
)

ROWS = {name: Provider(name, f"https://{name}.test", "KEY", ("1", "2")) for name in "ab"}
EPOCH = 1_000_000.0  # of the epoch, when the clock says 0
LIMITED, FAULT, DENIED, GONE = Verdict.RATE_LIMITED, Verdict.FAULT, Verdict.DENIED, Verdict.GONE
HEALTHY, RATE_LIMITED, FAILED, UNAVAILABLE = ProviderStatus
MODEL, ACCOUNT, PROVIDER = Reach
PLAIN = RetryConfig(jitter=False)
PATIENT = RetryConfig(jitter=False, max_delay=1e6)


def candidate(name: str) -> Candidate:
    """A model such as "a1", or "a1x" if it is asked with the key x."""
    account = Account(name[0], 1, name[0], "", "")
    return Candidate(ROWS[name[0]], name[1], "1/1", account, name[2:])


def name_of(asked: Candidate) -> str:
    return asked.row.name + asked.model + asked.key


class Memory:
    """A memory under test, and its clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.health = Health(lambda: self.now, lambda: EPOCH + self.now)

    def queue(self, *names: str, deadline: float = math.inf, config: Any = PATIENT) -> Queue:
        """The line of a new question."""
        candidates = [candidate(name) for name in names]
        return Queue(candidates, deadline, self.health, config, lambda: self.now, lambda: 1.0)

    def take(self, name: str) -> Turn:
        """A model is asked now, even if it should be waited for."""
        (turn,) = self.health.turns([candidate(name)])

        def pick(_: float) -> Turn:
            turn.wait = 0.0
            return turn

        assert self.health.choose([turn], pick) is turn
        return turn

    def give_back(self, turn: Turn) -> None:
        self.health.give_back([turn])


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
            turn = memory.take(model)
            memory.now = at
            memory.health.failed(turn, Failure(verdict, "", **more), PLAIN)
            memory.give_back(turn)

        self._chapters.append(happens)
        return self

    def answers(self, at: float, since: float | None = None, model: str = "a1") -> Story:
        """An attempt that began at `since`, or just then, and was answered."""

        def happens(memory: Memory) -> None:
            begun = at if since is None else since
            memory.now = begun
            turn = memory.take(model)
            memory.now = at
            memory.health.answered(turn)
            memory.give_back(turn)

        self._chapters.append(happens)
        return self

    def leases(self, at: float, model: str = "a1") -> Story:
        """Somebody is chosen and has not been heard of yet."""

        def happens(memory: Memory) -> None:
            memory.now = at
            memory.take(model)

        self._chapters.append(happens)
        return self

    def closes(self, at: float, model: str = "a1", text_since: float | None = None) -> Story:
        """The caller ends an attempt; it had given some text if it is said since when it ran."""

        def happens(memory: Memory) -> None:
            memory.now = at if text_since is None else text_since
            turn = memory.take(model)
            memory.now = at
            if text_since is not None:
                memory.health.answered(turn)
            memory.give_back(turn)

        self._chapters.append(happens)
        return self

    def told(self, at: float) -> Memory:
        """The memory at this time."""
        memory = Memory()
        for happens in self._chapters:
            happens(memory)
        memory.now = at
        return memory

    def order(self, at: float, names: str = "a1 a2 b1") -> str:
        """Whom a question asks one after the other, when none of them can help."""
        line = self.told(at).queue(*names.split())
        asked: list[str] = []
        while True:
            with line.next() as turn:
                if turn is None:
                    return " ".join(asked)
                asked.append(name_of(turn.candidate))
                line.failed(turn, Failure(GONE, ""))

    def waits(self, at: float, names: str = "a1 a2 b1") -> list[float]:
        """How long questions for each of these wait."""
        waits = []
        for name in names.split():
            with self.told(at).queue(name).next() as turn:
                assert turn is not None
                waits.append(turn.wait)
        return waits

    def status(
        self, at: float, name: str = "a", has_key: bool = True, key: str = ""
    ) -> ProviderHealth:
        return self.told(at).health.of_account(name, key, has_key)


# --- Who is asked later -------------------------------------------------------------------------

FIRST, LATER, ALL_LATER = "a1 a2 b1", "a2 b1 a1", "b1 a1 a2"


def test_a_fault_is_asked_last_for_a_while() -> None:
    """For as long as its backoff; it is asked all the same when its turn comes."""
    story = Story().fails(10, FAULT)
    assert [story.order(at) for at in (10, 11.9, 12)] == [LATER, LATER, FIRST]
    assert story.waits(10) == [0, 0, 0]


@pytest.mark.parametrize(
    ("verdict", "reach", "order"),
    [
        pytest.param(FAULT, PROVIDER, ALL_LATER, id="a provider's fault"),
        pytest.param(GONE, MODEL, LATER, id="gone"),
        pytest.param(DENIED, ACCOUNT, ALL_LATER, id="denied"),
        pytest.param(DENIED, MODEL, LATER, id="unpaid"),
        pytest.param(LIMITED, MODEL, LATER, id="limited, no hint"),
        pytest.param(Verdict.UNSUITABLE, MODEL, FIRST, id="unsuitable"),
        pytest.param(Verdict.UNSUITABLE, PROVIDER, FIRST, id="no such path"),
        pytest.param(Verdict.REFUSED, MODEL, FIRST, id="refused"),
        pytest.param(Verdict.REJECTED, MODEL, FIRST, id="rejected by the caller"),
    ],
)
def test_what_is_asked_last(verdict: Verdict, reach: Reach, order: str) -> None:
    """Ten minutes for what does not pass by itself; a refused question says nothing of it."""
    story = Story().fails(10, verdict, reach=reach)
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
    story = Story().fails(1, FAULT).fails(1, FAULT, reach=PROVIDER)
    story.fails(1, GONE, model="a2")
    assert story.answers(2, since=1).order(2) == "a1 b1 a2"


def test_a_success_does_not_forgive_what_failed_since_it_began() -> None:
    """A slow answer says nothing of what another thread was told meanwhile."""
    story = Story().fails(10, GONE).fails(10, DENIED, reach=ACCOUNT).answers(11, since=9)
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
    story = Story().fails(10, LIMITED, hint=30).leases(40)
    assert [story.order(at) for at in (104.9, 105)] == [LATER, FIRST]
    story = Story().fails(10, FAULT, reach=PROVIDER).leases(12, "a2")
    assert story.order(19) == ALL_LATER
    assert Story().fails(10, FAULT).leases(12).answers(13, since=12).order(13) == FIRST
    story = Story().fails(10, LIMITED, hint=1).leases(12).fails(13, Verdict.UNSUITABLE, since=12)
    assert story.order(13) == FIRST


def test_of_those_who_wait_for_a_pause_to_end_one_tries() -> None:
    """Waiting takes no lease; whoever looks first at its end asks, and the others ask later."""
    memory = Story().fails(10, LIMITED, hint=30).told(12)
    lines = [memory.queue("a1", "b1") for _ in range(3)]
    for line in lines:
        with line.next() as turn:
            assert turn is not None
            assert name_of(turn.candidate) == "b1"
            line.failed(turn, Failure(GONE, ""))
        with line.next() as turn:
            assert turn is not None
            assert turn.wait == 28
    memory.now = 40
    lines = [memory.queue("a1", "b1") for _ in range(3)]
    asked = []
    with contextlib.ExitStack() as trials:
        for line in lines:
            turn = trials.enter_context(line.next())
            assert turn is not None
            asked.append(name_of(turn.candidate))
    assert asked == ["a1", "b1", "b1"]


def test_a_lease_ends_with_the_trial_whatever_comes_of_it() -> None:
    """An exception of the caller, too: nobody waits for a trial that is over."""
    memory = Story().fails(10, FAULT).told(12)

    def breaks() -> None:
        with memory.queue("a1").next():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        breaks()
    with memory.queue("a1", "b1").next() as turn:
        assert turn is not None
        assert name_of(turn.candidate) == "a1"


def test_the_callers_own_limit_counts_against_nobody() -> None:
    """Neither as a failure nor in the order."""
    for cause in (Cause.TIME_LIMIT, Cause.TIME_SHARE, Cause.STALE):
        story = Story().fails(10, FAULT, cause=cause, reach=PROVIDER)
        assert story.order(11) == FIRST
        assert story.status(11) == ProviderHealth()


def test_who_never_answers_within_its_share_of_the_time_is_asked_last() -> None:
    """Two short times tell as much as one long silence, unless there was an answer between."""
    story = Story().fails(10, FAULT, cause=Cause.TIME_SHARE)
    assert story.fails(20, FAULT, cause=Cause.TIME_SHARE).order(21) == LATER
    assert story.status(21).status is FAILED
    assert story.fails(30, FAULT, cause=Cause.TIME_SHARE).order(31) == LATER
    story = Story().fails(10, FAULT, cause=Cause.TIME_SHARE).answers(15)
    assert story.fails(20, FAULT, cause=Cause.TIME_SHARE).order(21) == FIRST
    story = Story().fails(10, FAULT, cause=Cause.TIME_LIMIT)
    assert story.fails(20, FAULT, cause=Cause.TIME_LIMIT).order(21) == FIRST


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


def test_a_hint_for_the_account_holds_for_all_its_models() -> None:
    """And the model's own, when that is longer; a success ends both."""
    story = Story().fails(10, LIMITED, hint=30, reach=ACCOUNT)
    story.fails(11, LIMITED, hint=90)
    assert story.waits(11) == [90, 29, 0]
    assert story.answers(12).waits(12) == [0, 0, 0]


def test_what_is_left_of_a_hint_can_be_told() -> None:
    """For the error of a question that nobody answered: 0 where no server said anything."""
    memory = Story().fails(10, LIMITED, hint=30).fails(10, FAULT, model="b1").told(15)
    waits = [memory.health.wait_for_server(candidate(name)) for name in ("a1", "a2", "b1")]
    assert waits == [25, 0, 0]


# --- Several keys -------------------------------------------------------------------------------

KEYS = "a1x a1y a2x a2y"
OTHER_KEY, OTHER_PROVIDER = "a1y a2y a1x a2x", "b1 a1x a1y a2x a2y"


def test_what_is_said_of_a_key_leaves_the_other_one() -> None:
    """A model and an account are known with each key; the host is the same for both."""
    assert Story().fails(10, FAULT, model="a1x").order(11, KEYS) == "a1y a2x a2y a1x"
    assert Story().fails(10, DENIED, model="a1x", reach=ACCOUNT).order(11, KEYS) == OTHER_KEY
    story = Story().fails(10, FAULT, model="a1x", reach=PROVIDER)
    assert story.order(11, KEYS + " b1") == OTHER_PROVIDER
    story = Story().fails(10, LIMITED, model="a1x", reach=ACCOUNT, hint=30)
    assert story.waits(11, KEYS) == [29, 0, 29, 0]
    assert story.answers(12, model="a2y").waits(12, KEYS) == [28, 0, 28, 0]


def test_the_health_of_a_key_is_its_own() -> None:
    """As is its place in the line."""
    story = Story().fails(5, DENIED, model="a1x", reach=ACCOUNT).answers(6, model="a1y")
    assert story.status(9, key="x").status is UNAVAILABLE
    assert story.status(9, key="y") == ProviderHealth(HEALTHY, EPOCH + 6, 0.0, 0, 0.0)
    story = Story().fails(5, FAULT, model="a1x", reach=PROVIDER)
    assert story.status(9, key="x").status is FAILED


# --- The list of models that a provider serves --------------------------------------------------


def test_one_question_fetches_the_list() -> None:
    """The others look again soon; when it is known, nobody fetches it for ten minutes."""
    memory = Story().told(10)
    assert memory.health.search("a") == 0.0
    assert memory.health.search("a") == pytest.approx(0.05)
    assert memory.health.search("b") == 0.0
    memory.now = 12
    memory.health.searched("a", is_known=True)
    assert memory.health.search("a") is None
    memory.now = 612
    assert memory.health.search("a") == 0.0


def test_a_list_that_could_not_be_had_is_asked_for_again() -> None:
    """Soon, and also if whoever fetched it never came back."""
    memory = Story().told(10)
    assert memory.health.search("a") == 0.0
    memory.health.searched("a", is_known=False)
    memory.now = 29
    assert memory.health.search("a") is None
    memory.now = 30
    assert memory.health.search("a") == 0.0
    memory.now = 44
    assert memory.health.search("a") == pytest.approx(0.05)
    memory.now = 45
    assert memory.health.search("a") == 0.0


# --- The line of one question -------------------------------------------------------------------


def asks(memory: Memory, line: Queue, *failures: Failure) -> list[tuple[str, float]]:
    """Whom a question asks, and how long it waits for it, when it meets these failures."""
    asked = []
    for failure in failures:
        waited = 0.0
        while True:
            with line.next() as turn:
                assert turn is not None
                if turn.wait == 0:
                    memory.health.failed(turn, failure, PLAIN)
                    line.failed(turn, failure)
                    asked.append((name_of(turn.candidate), waited))
                    break
                memory.now += turn.wait
                waited += turn.wait
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
    "denied": (Story().fails(5, DENIED, reach=ACCOUNT), 9, (UNAVAILABLE, None, 5, 1, None)),
    "accepted again": (
        Story().fails(5, DENIED, reach=ACCOUNT).answers(8),
        9,
        (HEALTHY, 8, 5, 0, None),
    ),
    "unpaid": (Story().fails(5, DENIED), 9, (UNAVAILABLE, None, 5, 1, None)),
    "unpaid, and a free model answered": (
        Story().fails(5, DENIED).answers(6, model="a2"),
        9,
        (HEALTHY, 6, 5, 0, None),
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
    memory.health.of_account("a", "", True).consecutive_failures = 99
    assert memory.health.of_account("a", "", True).consecutive_failures == 1


# --- Many lanes ---------------------------------------------------------------------------------


def test_keys_that_change_all_the_time_are_forgotten() -> None:
    """Those of which nothing is known; whoever failed, or is being asked, is remembered."""
    memory = Story().fails(10, FAULT).fails(10, LIMITED, hint=9, model="b2").leases(10).told(11)
    for number in range(3000):
        memory.give_back(memory.take(f"a1{number}"))
    assert memory.health.wait_for_server(candidate("b2")) == 8
    with memory.queue("a1", "b1").next() as turn:
        assert turn is not None
        assert name_of(turn.candidate) == "b1"


# --- The only lock ------------------------------------------------------------------------------


def test_a_signal_handler_may_look_at_any_moment() -> None:
    """Its thread may hold the lock just then, and must not wait for itself."""
    memory = Story().fails(10, FAULT).told(11)

    def pick(_: float) -> None:
        assert memory.health.counts()["total_requests"] == 0
        assert memory.health.of_account("a", "", True).status is FAILED

    assert memory.health.choose(memory.health.turns([candidate("a1")]), pick) is None


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
