"""What outlives a question: who is asked last, whose pause is kept, what health says of it."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest
import requests
from fakes import (
    EPOCH,
    ROWS,
    Reply,
    World,
    event,
    fails,
    limited,
    row,
    says,
)

from fallback_llm import (
    AllProvidersFailed,
    FallbackLLM,
    FallbackLLMError,
    ProviderHealth,
    ProviderStatus,
)

pytestmark = pytest.mark.usefixtures("bare")

FAULT, DENIED, UNSUITABLE = fails(500), fails(401), fails(400)
GONE = Reply(404, {"error": {"message": "Never heard of it", "code": "model_not_found"}})
BLOCKED = Reply(400, {"error": {"message": "Not that", "code": "content_policy_violation"}})
DOWN = Reply(error=requests.ConnectionError("refused"))
SILENT = fails(takes=99)
ALONE = (row("one", "a"),)
TWINS = (row("one", "a"), row("two", "c"))


def asks(world: World, *pauses: float, **more: Any) -> str:
    """Asks after each of these pauses; the models that were asked, the questions apart."""
    questions = []
    for pause in pauses:
        world.clock.now += pause
        before = len(world.asked)
        with contextlib.suppress(FallbackLLMError):
            world.llm.complete("Where?", **more)
        questions.append(world.asked[before:])
    return " ".join(questions)


MEMORIES = [
    pytest.param([FAULT, says("A")], [0, 0, 1.9, 0.2], "ab b b a", id="a fault's backoff"),
    pytest.param([DOWN, says("A")], [0, 0, 1.9, 0.2], "ac c c a", id="a fault of the provider"),
    pytest.param(
        [FAULT] * 3 + [says("A")],
        [0, 1.9, 0.2, 3.8, 0.3, 7.8, 0.3],
        "ab b ab b ab b a",
        id="a backoff that grows with consecutive failures",
    ),
    pytest.param(
        [FAULT] * 7 + [says("A")],
        [0, 20, 20, 20, 20, 20, 20, 19.5, 1],
        "ab ab ab ab ab ab ab b a",
        id="a backoff that never exceeds 20 s",
    ),
    pytest.param(
        [FAULT, FAULT, says("A"), FAULT, says("A")],
        [0, 2.1, 4.1, 0, 1.9, 0.2],
        "ab ab a ab b a",
        id="a success, which clears it",
    ),
    pytest.param([DENIED, says("A")], [0, 599.5, 1], "ac c a", id="a refused key, for ten minutes"),
    pytest.param([GONE, says("A")], [0, 599.5, 1], "ab b a", id="a gone model, for ten minutes"),
    pytest.param([UNSUITABLE, says("A")], [0, 0], "ab a", id="nothing of who is unsuitable"),
    pytest.param([BLOCKED, says("A")], [0, 0], "a a", id="nothing of a refusal"),
    pytest.param([limited(90), says("A")], [0, 0, 89, 2], "ab b b a", id="a pause to its end"),
    pytest.param(
        [SILENT, says("A")], [0, 0, 1.9, 0.2], "ac b b a", id="silence, of the model only"
    ),
    pytest.param(
        [Reply(503, b"", {"Retry-After": "90"}), says("A")],
        [0, 89, 2],
        "ab b a",
        id="a pause that comes with a fault",
    ),
]


@pytest.mark.parametrize(("script", "pauses", "asked"), MEMORIES)
def test_the_next_questions_remember(script: Any, pauses: Any, asked: str) -> None:
    """Nobody is waited for when somebody else is there; who failed is asked last for a while."""
    world = World({"a": script})
    assert asks(world, *pauses) == asked
    assert world.slept == []


@pytest.mark.parametrize("reply", [FAULT, DOWN, DENIED, GONE, limited()])
def test_a_guess_of_ours_refuses_nobody(reply: Reply) -> None:
    """With a single candidate each question asks at once."""
    world = World({"a": [reply]}, providers=ALONE, max_attempts=1)
    assert asks(world, 0, 0, 0, model="a") == "a a a"
    assert world.slept == []


def test_a_servers_word_is_kept() -> None:
    """Until its end nobody asks: the question waits if it may, else it says when to come back."""
    world = World({"a": [limited(100), says("A")]}, providers=ALONE)
    assert asks(world, 0, 30) == "a "
    with pytest.raises(AllProvidersFailed) as caught:
        world.llm.complete("Where?")
    assert (caught.value.retry_after, caught.value.attempts, world.slept) == (70, (), [])
    assert asks(world, 20) == "a"
    assert world.slept == [50]


def test_who_failed_is_asked_all_the_same_when_the_others_fail() -> None:
    world = World({"a": [FAULT, says("A")], "b": [says("B"), UNSUITABLE]}, providers=ROWS[:1])
    assert asks(world, 0, 0) == "ab ba"
    assert world.slept == []


def test_failures_that_were_under_way_together_are_one() -> None:
    """Ten questions that run into the same fault make the backoff of one."""
    worlds: list[World] = []
    nested = fails(500, takes=1.0, meanwhile=lambda: worlds[0].llm.ask("Where?"))
    world = World({"a": [*[nested] * 9, fails(500, takes=1.0), says("A")]}, providers=TWINS)
    worlds.append(world)
    assert asks(world, 0) == "a" * 10 + "c" * 10
    assert world.llm.provider_health["one"].consecutive_failures == 1
    assert asks(world, 1.9, 0.2) == "c a"


@pytest.mark.parametrize(
    ("reply", "arguments", "asked"),
    [
        pytest.param(fails(takes=9), {"timeout": 5.0}, "ab", id="the caller's time limit"),
        pytest.param(BLOCKED, {}, "a", id="a refused question"),
        pytest.param(UNSUITABLE, {"model": "a"}, "a", id="an unsuitable question"),
        pytest.param(
            says("No."), {"accept": lambda text: text != "No."}, "ab", id="an answer not accepted"
        ),
    ],
)
def test_not_counted_against_a_provider(reply: Reply, arguments: Any, asked: str) -> None:
    world = World({"a": [reply, says("A")]})
    assert asks(world, 0, **arguments) == asked
    health = world.llm.provider_health["one"]
    assert health.status is ProviderStatus.HEALTHY
    assert health.last_failure == 0
    assert asks(world, 0) == "a"


def test_a_stream_that_is_closed_after_some_text_has_answered() -> None:
    """It counts as a success, and clears what had failed before."""
    world = World({"a": [FAULT, Reply(body=(event("Once"), event(" upon", "stop"))), says("A")]})
    assert asks(world, 0, 0) == "ab b"
    pieces: Any = world.llm.stream("Where?", model="a")
    assert next(pieces) == "Once"
    assert world.llm.provider_health["one"].status is ProviderStatus.HEALTHY
    pieces.close()
    assert world.server.bodies[-1].closed
    assert world.llm.provider_health["one"].consecutive_failures == 0
    stats = world.llm.get_stats()
    assert [stats["successful_requests"], stats["failed_requests"]] == [3, 0]
    assert asks(world, 0) == "a"


def test_ctrl_c_is_not_counted_against_a_provider() -> None:
    """It comes through at once, and the next question begins as if nothing had been."""
    world = World({"a": [Reply(error=KeyboardInterrupt()), says("A")]}, providers=ALONE)
    with pytest.raises(KeyboardInterrupt):
        world.llm.ask("Where?")
    assert world.llm.provider_health["one"] == ProviderHealth()
    assert world.llm.ask("Where?") == "A"
    assert world.slept == []


def test_ctrl_c_before_the_first_text_of_a_stream_is_a_question_that_failed() -> None:
    world = World({"a": [Reply(error=KeyboardInterrupt()), says("A")]})
    with pytest.raises(KeyboardInterrupt):
        next(world.llm.stream("Where?"))
    assert world.llm.get_stats()["failed_requests"] == 1
    assert world.llm.provider_health["one"] == ProviderHealth()
    assert asks(world, 0) == "a"


def test_ctrl_c_while_waiting_gives_the_turn_back() -> None:
    """Nobody passes over the model because of a question that is no more."""

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    world = World({"a": [limited(), says("A")]}, sleep=interrupt)
    with pytest.raises(KeyboardInterrupt):
        world.llm.ask("Where?")
    assert asks(world, 2.1) == "a"


def test_a_slow_answer_does_not_forgive_what_failed_meanwhile() -> None:
    """While one question waits for its answer, another is told to come back in an hour."""
    worlds: list[World] = []
    slow = Reply(body=says("A").body, takes=5, meanwhile=lambda: worlds[0].llm.ask("And there?"))
    world = World({"a": [slow, limited(3600, takes=1), says("A")]}, providers=TWINS)
    worlds.append(world)
    assert asks(world, 0) == "aac"
    health = world.llm.provider_health["one"]
    assert health.status is ProviderStatus.RATE_LIMITED
    assert health.rate_limit_reset_time == EPOCH + 3601
    assert asks(world, 0, 3500, 200) == "c c a"


def test_a_provider_that_has_recovered_is_used_again_soon() -> None:
    """With a question every four seconds, within twenty of its recovery."""
    worlds: list[World] = []

    def down_for_a_minute(_: Any) -> Reply:
        return FAULT if worlds[0].clock.now < 60 else says("A")

    world = World({"a": [down_for_a_minute]}, providers=TWINS)
    worlds.append(world)
    answered_at: list[float] = []
    while world.clock.now < 120:
        if world.llm.complete("Where?").model == "a":
            answered_at.append(world.clock.now)
        world.clock.now += 4
    assert 60 <= answered_at[0] <= 80
    assert len(answered_at) >= 10


# --- The lease: one probes, the others go elsewhere ---------------------------------------------


@pytest.mark.parametrize("reply", [FAULT, DOWN, limited(2), DENIED], ids=lambda reply: reply.status)
def test_one_of_twenty_threads_probes(reply: Reply) -> None:
    """When a pause ends, one asks the model that failed; until it has answered, no other does."""
    others, done = threading.Semaphore(0), []  # type: threading.Semaphore, list[str]

    def after_the_others() -> None:
        for _ in range(19):
            assert others.acquire(timeout=60)

    probe = Reply(body=says("A").body, meanwhile=after_the_others)
    world = World({"a": [reply, probe, says("A")]}, max_attempts=1, max_delay=600.0)
    world.llm.ask("Where?")
    world.clock.now += 601

    def one() -> None:
        done.append(world.llm.ask("Where?"))
        others.release()

    threads = [threading.Thread(target=one) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done.count("A") == 1
    assert world.llm.ask("Where?") == "A"


def test_a_lease_refuses_nobody() -> None:
    """With a single candidate a question under a lease asks it as well."""
    answers: list[str] = []
    probe = Reply(500, meanwhile=lambda: answers.append(world.llm.ask("Where?")))
    world = World({"a": [FAULT, probe, says("A")]}, providers=ALONE, max_attempts=1)
    assert asks(world, 0, 2.1) == "a aa"
    assert answers == ["A"]


# --- Health, derived from the same memory -------------------------------------------------------


def test_health_of_the_untried() -> None:
    """HEALTHY without figures; UNAVAILABLE without a key."""
    world = World(providers=[*ROWS, row("three", "e", key_env="THREE_KEY")])
    health = world.llm.provider_health
    assert health == {
        "one": ProviderHealth(),
        "two": ProviderHealth(),
        "three": ProviderHealth(ProviderStatus.UNAVAILABLE),
    }


def test_health_follows_the_walk() -> None:
    """A failure, a second one, a rate limit, its end, a success, a refused key."""
    script = [FAULT, FAULT, limited(90), says("A"), DENIED]
    world = World({"a": script}, providers=TWINS)
    seen: list[ProviderHealth] = []
    for pause in (10, 10, 10, 91, 10):
        asks(world, pause)
        seen.append(world.llm.provider_health["one"])
    status = [health.status.name for health in seen]
    assert status == ["FAILED", "FAILED", "RATE_LIMITED", "HEALTHY", "UNAVAILABLE"]
    assert [health.consecutive_failures for health in seen] == [1, 2, 3, 0, 1]
    assert [health.last_failure - EPOCH for health in seen] == [10, 20, 30, 30, 131]
    assert [max(0, health.last_success - EPOCH) for health in seen] == [0, 0, 0, 121, 121]
    assert seen[2].rate_limit_reset_time == EPOCH + 30 + 90
    assert world.llm.provider_health["two"].last_success == EPOCH + 131


def test_health_of_a_limit_that_is_over() -> None:
    world = World({"a": [limited(90)]})
    asks(world, 0, 91)
    world.clock.now += 91
    assert world.llm.provider_health["one"].status is not ProviderStatus.RATE_LIMITED


def test_health_is_a_copy() -> None:
    """What a caller does to it changes nothing."""
    llm = World().llm
    llm.provider_health["one"].consecutive_failures = 7
    assert llm.provider_health["one"] == ProviderHealth()
    assert FallbackLLM().provider_health.keys() == {"cerebras", "groq", "openrouter"}


def test_who_sleeps_learns_what_others_were_told() -> None:
    """While one question waits two seconds for a, another one is told to leave it for ninety."""
    others = ["And there?"]

    def sleep_while_another_asks(seconds: float) -> None:
        if others:
            with contextlib.suppress(FallbackLLMError):
                world.llm.complete(others.pop(), model="one:a")
        world.clock.sleep(seconds)

    world = World({"a": [limited(), limited(90), says("A")]}, sleep=sleep_while_another_asks)
    assert world.llm.complete("Where?").model == "b"
    assert world.asked == "aab"
