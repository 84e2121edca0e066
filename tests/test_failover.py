"""The sixteen scenarios of failoverbench: buffered, an answer is whole; live, it is never a lie.

Cerebras has the trouble and Groq is well. `stream()` cannot take back what it has given out, so a
break after the first text is an error; a bad answer that ends like a good one would be worse.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import pytest
from emulator import DONE, MODEL, Emulator, Reply, document, error, events, rate_limited
from fakes import World, fails, limited, row, says

from fallback_llm import (
    PROVIDERS,
    Answer,
    AnswerRefused,
    FallbackLLM,
    Provider,
    RetryConfig,
    StreamInterrupted,
)

ANSWER = "The capital of France is Paris."  # Cerebras
OTHER = "It is Paris."  # Groq
WELL = Reply(text=ANSWER)


class Scenario(NamedTuple):
    """What Cerebras does, and who is asked for an answer."""

    replies: List[Reply]  # the last one repeats
    asked: str  # the providers, up to the one that answers
    breaks_live: bool = False  # some text has been given out when it breaks
    idle_timeout: float = 60.0  # of Cerebras


def stream_of(*parts: str) -> Reply:
    """A stream of these events."""
    return Reply(body="".join(parts), headers={"content-type": "text/event-stream"})


def with_malformed_event(place: int) -> Reply:
    """An event of the text is cut in half, and the rest is as it should be."""
    parts = events("cerebras", WELL)
    parts[place] = parts[place][: len(parts[place]) // 2] + "\n\n"
    return stream_of(*parts)


SAME = "cerebras cerebras"
NEXT = "cerebras groq"

SCENARIOS: Dict[str, Scenario] = {
    "429 with a short hint": Scenario([rate_limited("cerebras", 0.2), WELL], SAME),
    "429 with a long hint": Scenario([rate_limited("cerebras", 60)], NEXT),
    "429 without a hint": Scenario([rate_limited("cerebras", how="none"), WELL], SAME),
    "429 of the queue": Scenario([error("cerebras", "queue")], NEXT),
    "500 once": Scenario([error("cerebras", "server"), WELL], NEXT),
    "503": Scenario([error("cerebras", "overloaded")], NEXT),
    "503 with a hint": Scenario([Reply(503, headers={"retry-after": "60"})], NEXT),
    "reset": Scenario([Reply(fault="reset")], NEXT),
    "closed without a reply": Scenario([Reply(fault="close")], NEXT),
    "no response": Scenario([Reply(fault="silence")], NEXT, idle_timeout=0.2),
    "no response after the headers": Scenario(
        [Reply(fault="silence-after-headers")], NEXT, idle_timeout=0.2
    ),
    "nothing but keep-alives": Scenario([Reply(fault="keep-alives")], NEXT, idle_timeout=0.2),
    "first token in time": Scenario([Reply(text=ANSWER, delay=0.2)], "cerebras"),
    "first token too late": Scenario([Reply(text=ANSWER, delay=60)], NEXT, idle_timeout=0.2),
    "cut": Scenario([Reply(text=ANSWER, fault="cut")], NEXT, breaks_live=True),
    "cut by a reset": Scenario([Reply(text=ANSWER, fault="reset-midway")], NEXT, breaks_live=True),
    "shorter than its length": Scenario([Reply(text=ANSWER, fault="short")], NEXT),
    "stall": Scenario(
        [Reply(text=ANSWER, fault="stall")], NEXT, breaks_live=True, idle_timeout=0.5
    ),
    "error midway": Scenario([error("cerebras", "in_stream", text=ANSWER)], NEXT, breaks_live=True),
    "error inside a 200": Scenario([Reply(body={"error": {"message": "No", "code": 503}})], NEXT),
    "malformed document": Scenario([Reply(body='{"choices": [{"message": {"conte')], NEXT),
    "malformed first event": Scenario([stream_of('data: {"choices": [{"del\n\n', DONE)], NEXT),
    "HTML instead of an answer": Scenario([Reply(fault="html")], NEXT),
    "empty body": Scenario([Reply(fault="empty")], NEXT),
    "empty answer": Scenario([Reply(text="")], NEXT),
    "no [DONE]": Scenario([stream_of(*events("cerebras", WELL)[:-1])], "cerebras"),
    "no [DONE] and no finish_reason": Scenario(
        [stream_of(*events("cerebras", WELL)[:-2])], NEXT, breaks_live=True
    ),
    "context length": Scenario([error("cerebras", "too_long")], NEXT),
    "too large for this quota": Scenario([error("cerebras", "too_large")], NEXT),
    "key refused": Scenario([error("cerebras", "bad_key")], NEXT),
}

each_scenario = pytest.mark.parametrize("scenario", [*SCENARIOS.values()], ids=[*SCENARIOS])


@pytest.fixture
def here(bare: Path, monkeypatch: pytest.MonkeyPatch, emulator: Emulator) -> Emulator:
    """The emulator, with Groq well, and an environment that points the program at it."""
    for name, value in emulator.environment().items():
        monkeypatch.setenv(name, value)
    emulator.plan("groq", Reply(text=OTHER))
    return emulator


def client(idle_timeout: float = 60.0) -> FallbackLLM:
    """Cerebras with one model, then Groq with one; short pauses."""
    cerebras, groq, _ = PROVIDERS
    rows = [
        Provider("cerebras", cerebras.base_url, cerebras.key_env, ("m",), idle_timeout),
        Provider("groq", groq.base_url, groq.key_env, ("n",)),
    ]
    return FallbackLLM(RetryConfig(base_delay=0.25), providers=rows)


def asked(emulator: Emulator) -> str:
    """The providers whose models were asked."""
    return " ".join(request.provider for request in emulator.asked if request.model)


def read_live(llm: FallbackLLM, question: str = "Where?") -> Tuple[List[str], Answer]:
    """The pieces of a stream, and the answer that it returns."""
    stream: Any = llm.stream(question)
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


def text_for(scenario: Scenario) -> str:
    return OTHER if scenario.asked.endswith("groq") else ANSWER


@each_scenario
def test_a_buffered_answer_is_whole(here: Emulator, scenario: Scenario) -> None:
    """Whatever the first provider does, and the trail tells who was asked for it."""
    here.plan("cerebras", *scenario.replies)
    answer = client(scenario.idle_timeout).complete("Where?")
    assert answer.text == text_for(scenario)
    assert asked(here) == scenario.asked
    assert " ".join(attempt.provider for attempt in answer.attempts) == scenario.asked
    assert all(attempt.reason for attempt in answer.attempts[:-1])
    assert answer.attempts[-1].verdict is None


@each_scenario
def test_a_live_answer_is_whole_or_known_to_be_broken(here: Emulator, scenario: Scenario) -> None:
    """Before the first text the next provider is asked; after it a break is an error."""
    here.plan("cerebras", *scenario.replies)
    llm = client(scenario.idle_timeout)
    if not scenario.breaks_live:
        pieces, answer = read_live(llm)
        assert "".join(pieces) == answer.text == text_for(scenario)
        assert asked(here) == scenario.asked
        return

    with pytest.raises(StreamInterrupted) as broken:
        read_live(llm)
    assert broken.value.partial
    assert ANSWER.startswith(broken.value.partial)
    assert asked(here) == "cerebras"
    assert llm.get_stats()["successful_requests"] == 0


@each_scenario
def test_ask_gives_the_same(here: Emulator, scenario: Scenario) -> None:
    here.plan("cerebras", *scenario.replies)
    assert client(scenario.idle_timeout).ask("Where?") == text_for(scenario)


# --- Malformed events in the middle -------------------------------------------------------------


@pytest.mark.parametrize("place", range(len(events("cerebras", WELL)) - 1))
def test_a_malformed_event_spoils_a_buffered_answer(here: Emulator, place: int) -> None:
    """It may have held a word."""
    here.plan("cerebras", with_malformed_event(place))
    answer = client().complete("Where?")
    assert answer.text == OTHER
    assert asked(here) == NEXT


@pytest.mark.parametrize("place", range(len(events("cerebras", WELL)) - 1))
def test_a_malformed_event_ends_a_live_answer(here: Emulator, place: int) -> None:
    """What was shown cannot be taken back; before the first text, the next provider answers."""
    here.plan("cerebras", with_malformed_event(place))
    stream = client().stream("Where?")
    pieces: List[str] = []
    with contextlib.suppress(StreamInterrupted):
        for piece in stream:
            pieces.append(piece)
    if stream.answer is None:
        assert pieces
        assert str(WELL.text).startswith("".join(pieces))
    else:
        assert ("".join(pieces), stream.answer.provider) == (OTHER, "groq")


# --- Content filter -----------------------------------------------------------------------------


def filtered(text: Optional[str]) -> Reply:
    return Reply(text=text or "", finish_reason="content_filter")


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(filtered(None), id="no text"),
        pytest.param(filtered("The capital of"), id="some text"),
        pytest.param(error("openrouter", "moderated"), id="error"),
    ],
)
def test_a_content_filter_ends_a_buffered_question(here: Emulator, reply: Reply) -> None:
    """Nobody else is asked a question that was refused; the reason is given, and no text."""
    here.plan("cerebras", reply)
    llm = client()
    with pytest.raises(AnswerRefused) as refused:
        llm.complete("Where?")
    assert refused.value.reason
    assert llm.ask("Where?") == ""
    assert asked(here) == SAME
    assert llm.provider_health["cerebras"].consecutive_failures == 0


def test_a_content_filter_ends_a_live_question(here: Emulator) -> None:
    """Half an answer is not passed off as a whole one."""
    here.plan("cerebras", filtered("The capital of"), filtered(None))
    llm = client()
    with pytest.raises(StreamInterrupted) as broken:
        read_live(llm)
    assert broken.value.partial == "The capital of"
    with pytest.raises(AnswerRefused):
        read_live(llm)
    assert asked(here) == SAME
    assert llm.get_stats()["failed_requests"] == 2


# --- Prefill ------------------------------------------------------------------------------------

PREFILLED: List[Dict[str, Any]] = [
    {"role": "system", "content": "Answer with one word."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is"},
]


def test_a_conversation_may_end_with_the_assistant(here: Emulator) -> None:
    """The model goes on from there; every provider gets exactly this conversation."""
    here.plan("cerebras", error("cerebras", "server"))
    here.plan("groq", Reply(text=" Paris."))
    llm = client()
    answer = llm.complete(messages=PREFILLED)
    live = "".join(llm.stream(messages=PREFILLED, provider="groq"))
    assert answer.text.strip() == live.strip() == "Paris."
    assert asked(here) == "cerebras groq groq"
    for request in here.asked:
        assert request.body["messages"] == PREFILLED


def test_a_provider_that_refuses_a_prefill(here: Emulator) -> None:
    """Some want the user's message last: that is about this model only."""
    words = "The last message must have the role user"
    refusal = {"message": words, "type": "invalid_request_error", "code": "wrong_api_format"}
    here.plan("cerebras", Reply(400, body=refusal))
    llm = client()
    assert llm.complete(messages=PREFILLED).text == OTHER
    assert asked(here) == NEXT
    assert llm.provider_health["cerebras"].consecutive_failures == 0


# --- A primary that is down for a minute --------------------------------------------------------


@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param(fails(503), id="503"),
        pytest.param(fails(500), id="500"),
        pytest.param(says(None), id="empty answers"),
    ],
)
def test_a_primary_that_is_down_for_a_minute(bare: Path, trouble: Any) -> None:
    """Nobody notices, it is hardly asked meanwhile, and it is used again soon afterwards."""
    begun = 20.0
    ended = begun + 60

    def reply(request: Any) -> Any:
        return trouble if begun <= request.at < ended else says("A")

    world = World({"a": [reply]}, providers=(row("one", "a"), row("two", "b")))
    providers = []
    while world.clock.now < ended + 40:
        answer = world.llm.complete("Where?")
        providers.append((world.clock.now, answer.provider))
        world.clock.wait(4)

    before = {name for at, name in providers if at < begun}
    during = {name for at, name in providers if begun <= at < ended}
    after = {name for at, name in providers if at >= ended + 24}
    assert before == {"one"}
    assert during == {"two"}
    assert after == {"one"}
    asked_in_vain = [a for a in world.server.asked if a.model == "a" and begun <= a.at < ended]
    assert len(asked_in_vain) <= 8
    assert world.slept == []


def test_a_primary_with_a_rate_limit_for_a_minute(bare: Path) -> None:
    """It said when it will be back, and is not asked before."""
    world = World({"a": [limited(60), says("A")]}, providers=(row("one", "a"), row("two", "b")))
    providers = []
    for _ in range(20):
        providers.append(world.llm.complete("Where?").provider)
        world.clock.wait(4)
    assert providers == ["two"] * 15 + ["one"] * 5
    assert world.asked == "a" + "b" * 15 + "a" * 5


# --- Accounting ---------------------------------------------------------------------------------


def usage_last() -> Reply:
    """The usage comes in an event of its own, without choices, after the finish_reason."""
    parts = events("cerebras", WELL)
    told = document("cerebras", WELL)
    usage = {"model": MODEL, "choices": [], "usage": told["usage"]}
    finish = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    ending = [f"data: {json.dumps(finish)}\n\n", f"data: {json.dumps(usage)}\n\n", DONE]
    return stream_of(*parts[:-2], *ending)


USAGE = document("cerebras", WELL)["usage"]


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(WELL, id="with the finish_reason"),
        pytest.param(usage_last(), id="in an event of its own"),
        pytest.param(Reply(body=document("cerebras", WELL)), id="in a document"),
    ],
)
def test_usage_is_accounted_for(here: Emulator, reply: Reply) -> None:
    """It is asked for, and given with the answer, buffered and live."""
    here.plan("cerebras", reply)
    llm = client()
    answer = llm.complete("Where?")
    _, live = read_live(llm)
    assert answer.text == live.text == ANSWER
    assert answer.usage == live.usage == USAGE
    for request in here.asked:
        assert request.body["stream_options"] == {"include_usage": True}


def test_usage_is_of_the_provider_that_answered(here: Emulator) -> None:
    """Half an answer of another one does not count for this."""
    spoilt = events("cerebras", WELL)[:-1]
    here.plan("cerebras", stream_of(*spoilt[:-1], 'data: {"usage": {"total_tokens": 999}}\n\n'))
    answer = client().complete("Where?")
    assert answer.provider == "groq"
    assert (
        answer.usage["total_tokens"] == document("groq", Reply(text=OTHER))["usage"]["total_tokens"]
    )


def test_questions_are_accounted_for(here: Emulator) -> None:
    """Each once, whatever it took; the trail and the server count the same requests."""
    limit = rate_limited("cerebras", how="none")
    here.plan("cerebras", limit, WELL, error("cerebras", "server"), WELL)
    llm = client()
    answers = [llm.complete("1"), llm.complete("2"), read_live(llm, "3")[1]]
    assert sum(len(answer.attempts) for answer in answers) == len(here.asked)
    assert llm.get_stats() == {
        "total_requests": 3,
        "successful_requests": 3,
        "failed_requests": 0,
        "rate_limited_requests": 1,
        "provider_switches": 1,
    }
