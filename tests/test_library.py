"""The library as a Python developer meets it: names, attributes, streams, several keys, rows."""

from __future__ import annotations

import collections
import contextlib
import inspect
import json
import logging
import pickle
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
import requests
from fakes import DONE, Asked, Reply, World, event, fails, limited, row, says

import fallback_llm
from fallback_llm import (
    AllProvidersFailed,
    Answer,
    Attempt,
    FallbackLLMError,
    NoProviderError,
    Provider,
    ProviderStatus,
    RetryConfig,
    StreamInterrupted,
)

pytestmark = pytest.mark.usefixtures("bare")

GONE = Reply(404, {"error": {"message": "Never heard of it", "code": "model_not_found"}})
DOWN = Reply(error=requests.ConnectionError("refused"))
SILENT = says("Late.", takes=1e6)
LOST_KEY = "gsk_Wq5Nz0Dk8Yt2Lr6Xb4Vh1Pc9Fj3Ms7Ga5Eo"


# --- Names of parameters ------------------------------------------------------------------------


def in_ask(llm: Any, arguments: Any) -> None:
    llm.ask("Where?", **arguments)


def in_complete(llm: Any, arguments: Any) -> None:
    llm.complete("Where?", **arguments)


def in_stream(llm: Any, arguments: Any) -> None:
    llm.stream("Where?", **arguments)  # nothing has to be read for it


def in_ask_many(llm: Any, arguments: Any) -> None:
    llm.ask_many(["Where?"], **arguments)  # nor here


def in_a_dict(llm: Any, arguments: Any) -> None:
    (result,) = llm.ask_many([{"question": "Where?", **arguments}])
    raise result


verbs = pytest.mark.parametrize("verb", [in_ask, in_complete, in_stream, in_ask_many, in_a_dict])

BELONGS = [
    ("api_key", LOST_KEY, "api_keys"),
    ("api_keys", {"one": LOST_KEY}, "FallbackLLM"),
    ("max_attempts", 3, "RetryConfig"),
    ("retries", 3, "max_attempts"),
    ("max_retries", 3, "max_attempts"),
    ("base_delay", 1.0, "RetryConfig"),
    ("max_delay", 1.0, "RetryConfig"),
    ("jitter", False, "RetryConfig"),
    ("retry_config", RetryConfig(), "FallbackLLM"),
    ("idle_timeout", 5.0, "FallbackLLM"),
    ("providers", ["one"], "provider"),
    ("max_token", 5, "max_tokens"),
    ("maxTokens", 5, "max_tokens"),
    ("temprature", 0.5, "temperature"),
    ("respons_format", {}, "response_format"),
    ("time_out", 5, "timeout"),
    ("mesages", [], "messages"),
    ("min_p", 0.1, "extra_body"),
    ("foo", 7, "foo"),
    ("foo", None, "foo"),
    ("base_url", "https://one", "base_url"),
]


@verbs
@pytest.mark.parametrize(("name", "value", "where"), BELONGS)
def test_a_name_that_does_not_belong_to_a_question(
    verb: Any, name: str, value: Any, where: str
) -> None:
    """It is refused, with the nearest one or with where it belongs; nothing is sent."""
    world = World()
    with pytest.raises(ValueError, match=where) as refused:
        verb(world.llm, {name: value})
    assert name in str(refused.value)
    assert LOST_KEY[4:12] not in str(refused.value)
    assert "\n" not in str(refused.value)
    assert world.asked == ""


@pytest.mark.parametrize("name", ["tools", "tool_choice", "functions", "n", "stream"])
def test_what_is_not_supported(name: str) -> None:
    world: Any = World()
    with pytest.raises(ValueError, match=name):
        world.llm.ask("Where?", **{name: 1})
    assert world.asked == ""


KNOWN: Any = {
    "temperature": 0.5,
    "top_p": 0.9,
    "stop": ["\n"],
    "seed": 7,
    "response_format": {"type": "json_object"},
    "reasoning_effort": "low",
    "max_completion_tokens": 99,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "logit_bias": {"50256": -100},
    "logprobs": True,
    "top_logprobs": 2,
    "user": "somebody",
    "metadata": {"a": "b"},
    "store": False,
    "service_tier": "auto",
    "reasoning": {"enabled": False},
    "stream_options": {"include_usage": False},
}


@pytest.mark.parametrize(("name", "value"), list(KNOWN.items()), ids=list(KNOWN))
def test_parameters_of_the_api_are_sent_as_they_are(name: str, value: Any) -> None:
    world = World()
    assert world.llm.ask("Where?", **{name: value}) == "A"
    assert world.server.asked[0].body[name] == value


def test_what_a_provider_has_of_its_own() -> None:
    """As in the openai package: the fields of extra_body are fields of the request."""
    world = World()
    own: Any = {"top_k": 40, "min_p": 0.1, "provider": {"order": ["x"]}, "foo": None}
    assert world.llm.ask("Where?", extra_body=own, temperature=0.5) == "A"
    body = world.server.asked[0].body
    assert {name: body[name] for name in own} == own
    assert body["temperature"] == 0.5
    assert "extra_body" not in body

    many: Any = [{"question": "Where?", "extra_body": {"top_k": 1}}, "Where?"]
    assert len(list(world.llm.ask_many(many, extra_body={"top_k": 2}))) == 2
    assert sorted(asked.body["top_k"] for asked in world.server.asked[1:]) == [1, 2]
    assert own == {"top_k": 40, "min_p": 0.1, "provider": {"order": ["x"]}, "foo": None}


@verbs
@pytest.mark.parametrize(
    "extra", [7, "top_k", ["top_k"], {"x": object()}, {"stream": False}, {"n": 2}]
)
def test_an_extra_body_that_cannot_be_sent(verb: Any, extra: Any) -> None:
    """No dict, no JSON, or what would break how the reply is read."""
    world = World()
    with pytest.raises(ValueError, match=r"extra_body|stream|JSON|n "):
        verb(world.llm, {"extra_body": extra})
    assert world.asked == ""


def test_whole_numbers_may_be_floats() -> None:
    """As they come from JSON and from data frames."""
    world: Any = World()
    assert world.llm.ask("Where?", 100.0) == "A"
    assert repr(world.server.asked[0].body["max_tokens"]) == "100"
    with pytest.raises(ValueError, match="max_tokens"):
        world.llm.ask("Where?", 100.5)


def test_arguments_are_checked_without_asking() -> None:
    world: Any = World()
    assert world.llm.validate(question="Where?", temperature=0.5) is None
    with pytest.raises(ValueError, match="max_tokens"):
        world.llm.validate(question="Where?", max_tokens=0)
    with pytest.raises(ValueError, match="foo"):
        world.llm.validate(question="Where?", foo=1)
    assert world.asked == ""


# --- Attributes ---------------------------------------------------------------------------------


def test_a_new_retry_config() -> None:
    world = World({"a": [fails(500)], "b": [fails(500)]}, providers=[row("one", "a", "b")])
    world.llm.retry_config = RetryConfig(max_attempts=1)
    assert (world.llm.ask("Where?"), world.asked) == ("", "ab")


def test_a_new_timeout() -> None:
    world: Any = World({"a": [says("A", takes=9)]}, providers=[row("one", "a")])
    assert world.llm.timeout is None
    world.llm.timeout = 5
    assert world.llm.timeout == 5
    assert world.llm.ask("Where?") == ""
    assert world.llm.ask("Where?", timeout=20) == "A"
    world.llm.timeout = None
    assert world.llm.ask("Where?") == "A"


def test_a_new_idle_timeout() -> None:
    world: Any = World({"a": [says("A", takes=9)]})
    assert world.llm.idle_timeout is None
    assert world.llm.ask("Where?") == "A"
    world.llm.idle_timeout = 5
    assert world.llm.ask("Where?") == "C"
    world.llm.idle_timeout = None
    world.clock.wait(3600)
    assert world.llm.ask("Where?") == "A"


def test_settings_of_the_constructor_can_be_read() -> None:
    config = RetryConfig(max_attempts=2)
    world: Any = World(timeout=7.0, idle_timeout=3.0)
    world.llm.retry_config = config
    assert (world.llm.timeout, world.llm.idle_timeout) == (7.0, 3.0)
    assert world.llm.retry_config is config


def test_a_new_order_and_new_models() -> None:
    world = World()
    world.llm.fallback_order = ["two", "one"]
    assert world.llm.ask("Where?") == "C"
    world.llm.models["two"] = ["x", "y"]
    assert world.llm.ask("Where?") == "X"
    world.llm.models["two"] = []
    assert world.llm.ask("Where?") == "A"
    world.llm.fallback_order = ["one"]
    assert world.llm.ask("Where?") == "A"


def assign_and_ask(world: World, assign: Callable[[Any], object]) -> None:
    assign(world.llm)
    world.llm.ask("Where?")


def setting(name: str, value: Any) -> Callable[[Any], None]:
    return lambda llm: setattr(llm, name, value)


def settings(name: str, *values: Any) -> Any:
    """The assignments of these values, by what one would write."""
    return {f"{name} = {value!r}": setting(name, value) for value in values}


WRONG: Any = {
    **settings("retry_config", 5, {}, "x"),
    **settings("timeout", 0, -1, "5", True, [], float("nan")),
    **settings("idle_timeout", 0, -1, "5", [], float("inf")),
    **settings("fallback_order", 5, [7], ["grok"]),
    "fallback_order.append('grok')": lambda llm: llm.fallback_order.append("grok"),
    "fallback_order.append(None)": lambda llm: llm.fallback_order.append(None),
    **settings("models", 5, "echo", ["echo"]),
    "models['one'] = 'echo'": lambda llm: llm.models.update(one="echo"),
    "models['one'] = None": lambda llm: llm.models.update(one=None),
    "models['one'] = [7]": lambda llm: llm.models.update(one=[7]),
    "models['one'] = ['']": lambda llm: llm.models.update(one=[""]),
    "models['grok'] = ['m']": lambda llm: llm.models.update(grok=["m"]),
    **settings("api_keys", 5, "k-12345678"),
    "api_keys['one'] = 7": lambda llm: llm.api_keys.update(one=7),
    "api_keys['grok'] = 'k'": lambda llm: llm.api_keys.update(grok="k-12345678"),
}


@pytest.mark.parametrize("assign", list(WRONG.values()), ids=list(WRONG))
def test_a_wrong_value_names_itself(assign: Any, request: pytest.FixtureRequest) -> None:
    """At the assignment or at the next question, before anything is sent."""
    name = request.node.callspec.id.split(" ")[0].split("[")[0].split(".")[0]
    world = World()
    with pytest.raises(ValueError, match=name) as refused:
        assign_and_ask(world, assign)
    if "grok" in request.node.name:
        assert "grok" in str(refused.value)
    assert "12345678" not in str(refused.value)
    assert world.asked == ""


def test_a_text_as_the_order_is_no_list_of_letters() -> None:
    """It is refused, or taken as a name; but "two" is not t, w and o."""
    world: Any = World()
    with contextlib.suppress(ValueError):
        world.llm.fallback_order = "two"
        assert world.llm.ask("Where?") == "C"
    assert world.asked in ("", "c")


def test_a_retry_config_that_is_changed_to_nonsense() -> None:
    world: Any = World()
    with pytest.raises(ValueError, match="max_attempts"):
        assign_and_ask(world, lambda llm: setattr(llm.retry_config, "max_attempts", 0))
    assert world.asked == ""


# --- accept -------------------------------------------------------------------------------------

NOS: Any = {
    "False": lambda text: False,
    "None": lambda text: None,
    "0": lambda text: 0,
    "ValueError": json.loads,
    "KeyError": lambda text: json.loads("{}")["capital"],
    "IndexError": lambda text: json.loads("[]")[5],
    "TypeError": lambda text: json.loads("7")["capital"],
    "UnicodeError": lambda text: "\ud800".encode(),
}


@pytest.mark.parametrize("accept", list(NOS.values()), ids=list(NOS))
def test_each_model_is_asked_once_when_nothing_is_accepted(accept: Any) -> None:
    """Without a pause: asking again would not make the answers better."""
    world = World()
    with pytest.raises(AllProvidersFailed) as failed:
        world.llm.complete("Where?", accept=accept)
    headline = str(failed.value).splitlines()[0]
    assert "4 models answered; none was accepted" in headline
    assert (world.asked, world.slept) == ("abcd", [])
    verdicts = [attempt.verdict and attempt.verdict.name for attempt in failed.value.attempts]
    assert verdicts == ["REJECTED"] * 4
    assert world.llm.ask("Where?") == "A"  # nothing is held against anybody


def test_the_first_answer_that_is_accepted() -> None:
    script = {
        "a": [says("no JSON")],
        "b": [says("[1]")],
        "c": [says('{"city": 1}')],
        "d": [says('{"capital": "Paris"}')],
    }
    world = World(script)
    answer = world.llm.complete("Where?", accept=lambda text: json.loads(text)["capital"])
    assert (answer.model, world.asked) == ("d", "abcd")


def test_one_model_whose_answer_is_not_accepted() -> None:
    world = World(providers=[row("one", "a")])
    with pytest.raises(AllProvidersFailed, match="1 model answered"):
        world.llm.complete("Where?", accept=lambda text: False)


def test_a_fault_is_asked_again_beside_answers_that_are_not_accepted() -> None:
    """The model that failed has not yet had its say."""
    world = World({"a": [fails(500), says("Yes.")]}, providers=[row("one", "a", "b")])
    assert world.llm.complete("Where?", accept=lambda text: text == "Yes.").text == "Yes."
    assert world.asked == "aba"


@pytest.mark.parametrize("error", [ZeroDivisionError, AttributeError, OSError, RuntimeError])
def test_other_errors_of_accept_are_the_callers(error: Any) -> None:
    def accept(_: str) -> bool:
        raise error("of the caller")

    world = World()
    with pytest.raises(error, match="of the caller"):
        world.llm.ask("Where?", accept=accept)
    assert world.asked == "a"


# --- Streams ------------------------------------------------------------------------------------

TWO_PIECES = Reply(body=event("Par") + event("is.", "stop") + DONE)


def has_answer(stream: Any) -> bool:
    """It is None until the stream has ended, and for ever after a failure."""
    return stream.answer is not None


def test_a_stream_is_an_iterator_with_an_answer() -> None:
    world = World({"a": [fails(500)], "b": [TWO_PIECES]})
    stream: Any = world.llm.stream("Where?")
    assert world.asked == ""
    assert iter(stream) is stream
    assert next(stream) == "Par"
    assert not has_answer(stream)
    assert list(stream) == ["is."]
    answer = stream.answer
    assert (answer.text, answer.model, answer.finish_reason) == ("Paris.", "b", "stop")
    assert [attempt.model for attempt in answer.attempts] == ["a", "b"]
    assert next(stream, None) is None


def test_a_stream_that_is_closed() -> None:
    world = World({"a": [TWO_PIECES]})
    stream: Any = world.llm.stream("Where?")
    with contextlib.closing(stream):
        assert next(stream) == "Par"
    assert list(stream) == []
    assert not has_answer(stream)
    stream.close()
    assert world.llm.get_stats()["total_requests"] == 1


def test_a_stream_that_is_closed_before_it_began() -> None:
    world: Any = World()
    stream = world.llm.stream("Where?")
    stream.close()
    assert list(stream) == []
    assert (world.asked, has_answer(stream)) == ("", False)


def test_a_stream_that_failed_has_no_answer() -> None:
    world: Any = World({"a": [Reply(body=event("Par"))]})
    stream = world.llm.stream("Where?")
    with pytest.raises(StreamInterrupted):
        list(stream)
    assert not has_answer(stream)
    assert list(stream) == []


def test_the_type_of_a_stream_is_public() -> None:
    """So that it can stand in an annotation."""
    made = World().llm.stream("Where?")
    kind = getattr(fallback_llm, "Stream")  # noqa: B009 - it is looked for
    assert isinstance(made, kind)
    assert "Stream" in fallback_llm.__all__
    assert inspect.getdoc(kind)


# --- Several keys -------------------------------------------------------------------------------

FIRST = "k-1-abcdefgh"
SECOND = "k-2-abcdefgh"
THIRD = "k-3-abcdefgh"
NUMBERS = {FIRST: 1, SECOND: 2, THIRD: 3}
REFUSED = Reply(401, {"error": {"message": "Who are you?"}})
ACCOUNT = Reply(429, {"error": {"metadata": {"limit_source": "openrouter_free_tier_per_minute"}}})


class Keys(World):
    """A world whose provider one has two keys; `replies` are by model and number of the key."""

    def __init__(self, keys: str = f"{FIRST},{SECOND}", replies: Any = None, **more: Any) -> None:
        self.replies = {} if replies is None else replies
        rows = [row("one", "a", "b", key_env="ONE_KEY"), row("two", "c")]
        more = {"providers": rows, "api_keys": {"one": keys}, **more}
        super().__init__({"a": [self.reply], "b": [self.reply]}, **more)

    def reply(self, asked: Asked) -> Reply:
        key = asked.headers["Authorization"].partition(" ")[2]
        planned: Reply = self.replies.get(f"{asked.model}{NUMBERS[key]}", says(asked.model.upper()))
        return planned

    @property
    def trail(self) -> str:
        """The models and keys that were asked: "a1 a2 b1"."""
        found = []
        for asked in self.server.asked:
            key = asked.headers.get("Authorization", "").partition(" ")[2]
            found.append(f"{asked.model}{NUMBERS.get(key, '')}")
        return " ".join(found)


def test_the_first_key_is_enough() -> None:
    world = Keys()
    answer: Any = world.llm.complete("Where?")
    assert (answer.text, world.trail, answer.attempts[0].key) == ("A", "a1", 1)
    assert world.llm.api_keys["one"] == f"{FIRST},{SECOND}"


def every(reply: Reply, *names: str) -> dict[str, Reply]:
    return dict.fromkeys(names, reply)


ORDERS: Any = [
    ("a limit leads to the other key at once", {"a1": limited()}, "a1 a2", "A"),
    ("one with a hint, too", {"a1": limited(30)}, "a1 a2", "A"),
    ("a limit of the account, too", {"a1": ACCOUNT}, "a1 a2", "A"),
    ("a refused key, too", {"a1": REFUSED}, "a1 a2", "A"),
    ("refused keys leave the provider", every(REFUSED, "a1", "a2"), "a1 a2 c", "C"),
    ("a refused key is not asked again", {"a1": REFUSED, "a2": fails(500)}, "a1 a2 b2", "B"),
    ("each model with each key", every(fails(500), "a1", "a2", "b1", "b2"), "a1 a2 b1 b2 c", "C"),
    ("a fault leads to the other key", {"a1": fails(500)}, "a1 a2", "A"),
    ("no connection is the provider's", {"a1": DOWN}, "a1 c", "C"),
    ("silence leaves the provider", {"a1": SILENT}, "a1 c", "C"),
    ("what a model cannot do, no key can", {"a1": fails(400)}, "a1 b1", "B"),
]


@pytest.mark.parametrize(
    ("replies", "trail", "text"), [pytest.param(*rest, id=name) for name, *rest in ORDERS]
)
def test_the_order_of_several_keys(replies: Any, trail: str, text: str) -> None:
    """Every model is asked with each key before the next model; no wait comes between."""
    world = Keys(replies=replies)
    assert (world.llm.ask("Where?"), world.trail, world.slept) == (text, trail, [])


def test_an_answer_that_is_not_accepted_is_not_asked_for_with_another_key() -> None:
    """The same model would say the same."""
    world = Keys()
    with pytest.raises(AllProvidersFailed, match="3 models answered; none was accepted"):
        world.llm.complete("Where?", accept=lambda text: False)
    assert world.trail == "a1 b1 c"


def test_keys_are_remembered_apart() -> None:
    """A limit and a refusal hold for their own key in the next questions."""
    world = Keys(replies={"a1": limited(30)})
    assert [world.llm.ask("Where?") for _ in range(3)] == ["A"] * 3
    assert world.trail == "a1 a2 a2 a2"
    world.replies.clear()
    world.clock.wait(31)
    assert world.llm.ask("Where?") == "A"
    assert world.trail == "a1 a2 a2 a2 a1"

    world = Keys(replies={"a1": REFUSED})
    assert [world.llm.ask("Where?") for _ in range(3)] == ["A"] * 3
    assert world.trail == "a1 a2 a2 a2"


def test_all_keys_are_limited() -> None:
    """The soonest is waited for."""
    rows = [row("one", "a", key_env="ONE_KEY")]
    replies = {"a1": limited(40), "a2": limited(9)}
    world = Keys(replies=replies, providers=rows)
    with contextlib.suppress(AllProvidersFailed):
        world.llm.complete("Where?", timeout=30)
    assert world.trail.startswith("a1 a2 a2")
    assert world.slept[:1] == [9.0]


def test_keys_have_numbers_and_labels(caplog: pytest.LogCaptureFixture) -> None:
    """Attempts, messages and health tell them apart without showing them."""
    caplog.set_level(logging.DEBUG)
    echo = Reply(401, {"error": {"message": f"{FIRST} and {SECOND} are unknown"}})
    world: Any = Keys(replies={"a1": echo})
    answer = world.llm.complete("Where?")
    assert [attempt.key for attempt in answer.attempts] == [1, 2]
    assert [attempt["key"] for attempt in answer.to_dict()["attempts"]] == [1, 2]
    assert [attempt.number for attempt in answer.attempts] == [1, 1]
    assert "one (key 1)" in caplog.text
    assert "one (key 2)" in caplog.text

    health = world.llm.provider_health
    assert health["one (key 1)"].status is ProviderStatus.UNAVAILABLE
    assert health["one (key 2)"].status is ProviderStatus.HEALTHY
    assert health["two"].status is ProviderStatus.HEALTHY

    world.replies["a2"] = echo
    with pytest.raises(AllProvidersFailed) as failed:
        world.llm.complete("Where?", provider="one")
    assert "one (key 2)" in str(failed.value)
    shown = "\n".join([caplog.text, str(failed.value), repr(answer), repr(world.llm), repr(health)])
    assert "abcdefgh" not in shown


def test_a_single_key_has_no_number(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing changes for who has one."""
    caplog.set_level(logging.DEBUG)
    world: Any = Keys(FIRST, {"a1": fails(500)})
    answer = world.llm.complete("Where?")
    assert [attempt.key for attempt in answer.attempts] == [1, 1]
    assert list(world.llm.provider_health) == ["one", "two"]
    assert "(key" not in caplog.text


def test_another_key_is_no_other_provider() -> None:
    """In the statistics."""
    world = Keys(replies={"a1": limited()})
    world.llm.ask("Where?")
    assert world.llm.get_stats() == {
        "total_requests": 1,
        "successful_requests": 1,
        "failed_requests": 0,
        "rate_limited_requests": 1,
        "provider_switches": 0,
    }


TEXTS = [
    (f"{FIRST},{SECOND}", 2),
    (f" {FIRST} , {SECOND} ", 2),
    (f"{FIRST},,{SECOND},", 2),
    (f"{FIRST},{FIRST}", 1),
    (f"{FIRST},{SECOND},{THIRD}", 3),
    (f"{FIRST},{SECOND},{FIRST}", 2),
    (f"{FIRST},", 1),
    (f"{FIRST},your_one_key_here", 1),
]


@pytest.mark.parametrize("where", ["api_keys", "the environment", "a file", "later"])
@pytest.mark.parametrize(("text", "count"), TEXTS)
def test_how_several_keys_are_written(
    text: str, count: int, where: str, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With commas; blanks, empty ones and repeated ones do not matter."""
    keys: Any = {"one": text} if where == "api_keys" else None
    if where == "the environment":
        monkeypatch.setenv("ONE_KEY", text)
    if where == "a file":
        (bare / ".env").write_text(f'ONE_KEY="{text}"\n')
    refusals = {f"a{number}": REFUSED for number in range(1, 4)}
    world = Keys(replies=refusals, api_keys=keys)
    if where == "later":
        world.llm.api_keys["one"] = text
    assert world.llm.ask("Where?") == "C"
    assert world.trail == " ".join([f"a{number}" for number in range(1, count + 1)] + ["c"])


def test_accounts() -> None:
    """One for each key, one for a provider without any; in the order in which they are asked."""
    rows = [
        row("one", "a", key_env="ONE_KEY"),
        row("two", "b", key_env="TWO_KEY"),
        row("three", "c"),
        row("four", "d", key_env="FOUR_KEY"),
    ]
    keys = {"one": f"{FIRST},{SECOND}", "four": THIRD}
    llm: Any = World(providers=rows, api_keys=keys).llm
    accounts = llm.accounts()
    assert [account.label for account in accounts] == [
        "one (key 1)",
        "one (key 2)",
        "two",
        "three",
        "four",
    ]
    assert [account.number for account in accounts] == [1, 2, 1, 1, 1]
    problems = [account.label for account in accounts if account.problem]
    assert problems == ["two"]
    assert "TWO_KEY" in accounts[2].problem
    assert "abcdefgh" not in repr(accounts)
    assert [account.provider for account in llm.accounts("four,one")] == ["four", "one", "one"]
    with pytest.raises(ValueError, match="five"):
        llm.accounts("five")


def test_several_keys_are_pickled_as_given() -> None:
    """And they are still several where they land."""
    llm = fallback_llm.FallbackLLM(
        providers=[row("one", "a", key_env="ONE_KEY")], api_keys={"one": f"{FIRST},{SECOND}"}
    )
    copy: Any = pickle.loads(pickle.dumps(llm))  # noqa: S301 - it is our own
    assert copy.api_keys == {"one": f"{FIRST},{SECOND}"}
    assert len(copy.accounts()) == 2


# --- Rows from the environment ------------------------------------------------------------------

OLLAMA = {"OLLAMA_BASE_URL": "http://localhost:11434/v1", "OLLAMA_MODELS": "llama3.2, qwen3"}


@pytest.fixture
def set_env(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets variables."""
    monkeypatch.delenv("FALLBACK_LLM_PROVIDERS", raising=False)

    def set_all(*variables: Any, **more: str) -> None:
        for name, value in {**dict(*variables), **more}.items():
            monkeypatch.setenv(name, value)

    return set_all


def builtin(script: Any = None, **settings: Any) -> World:
    """A world with the providers of the program, and those of the environment."""
    return World(script, providers=None, **settings)


def test_a_row_of_the_environment(set_env: Any) -> None:
    set_env(OLLAMA)
    world = builtin({"llama3.2": [fails(500)]})
    assert world.llm.ask("Where?", provider="ollama") == "QWEN3"
    first = world.server.asked[0]
    assert (first.model, first.url) == ("llama3.2", "http://localhost:11434/v1/chat/completions")
    assert "Authorization" not in first.headers
    assert world.llm.models["ollama"] == ["llama3.2", "qwen3"]
    assert world.llm.complete("Where?", model="ollama:qwen3").provider == "ollama"


def test_a_row_of_the_environment_with_a_key(set_env: Any) -> None:
    set_env(MY_HOST_BASE_URL="https://host.example/v1", MY_HOST_MODELS="m", MY_HOST_API_KEY=FIRST)
    world = builtin()
    assert world.llm.ask("Where?", provider="my_host") == "M"
    assert world.server.asked[0].headers["Authorization"] == f"Bearer {FIRST}"


@pytest.mark.parametrize("order", ["ollama,groq", " Ollama , GROQ ", "ollama,groq,"])
def test_an_order_of_the_environment(set_env: Any, order: str) -> None:
    set_env(OLLAMA, FALLBACK_LLM_PROVIDERS=order, GROQ_API_KEY=FIRST, CEREBRAS_API_KEY=SECOND)
    world = builtin({"llama3.2": [fails(400)], "qwen3": [fails(400)]})
    assert world.llm.fallback_order == ["ollama", "groq"]
    assert world.llm.complete("Where?").provider == "groq"
    assert world.llm.complete("Where?", provider="cerebras").provider == "cerebras"


def test_an_empty_order_is_none(set_env: Any) -> None:
    set_env(FALLBACK_LLM_PROVIDERS="", GROQ_API_KEY=FIRST)
    world = builtin()
    assert world.llm.fallback_order[:3] == ["cerebras", "groq", "openrouter"]
    assert world.llm.complete("Where?").provider == "groq"


def test_an_order_with_an_unknown_name(set_env: Any) -> None:
    set_env(FALLBACK_LLM_PROVIDERS="groq,grok", GROQ_API_KEY=FIRST)
    with pytest.raises(ValueError, match="grok") as refused:
        builtin().llm.ask("Where?")
    assert "FALLBACK_LLM_PROVIDERS" in str(refused.value)


def test_an_order_of_the_environment_and_rows_of_the_caller(set_env: Any) -> None:
    """Whoever gives rows has said whom to ask; the environment's order may not even know them."""
    set_env(FALLBACK_LLM_PROVIDERS="groq", GROQ_API_KEY=FIRST)
    assert World().llm.ask("Where?") == "A"


HALF_ROWS: Any = [
    ("no models", {"OLLAMA_BASE_URL": "http://localhost:1/v1"}),
    ("no address", {"OLLAMA_MODELS": "m"}),
    ("an empty address", {"OLLAMA_BASE_URL": "", "OLLAMA_MODELS": "m"}),
    ("empty models", {"OLLAMA_BASE_URL": "http://localhost:1/v1", "OLLAMA_MODELS": " , "}),
]


@pytest.mark.parametrize("variables", [pytest.param(v, id=name) for name, v in HALF_ROWS])
def test_half_a_row_is_none(set_env: Any, variables: Any) -> None:
    """It does no harm to the others."""
    set_env(variables, GROQ_API_KEY=FIRST)
    world = builtin()
    assert world.llm.complete("Where?").provider == "groq"
    with pytest.raises(ValueError, match=r"(?i)ollama"):
        world.llm.ask("Where?", provider="ollama")


def test_a_key_of_a_row_is_not_sent_in_clear_text(set_env: Any) -> None:
    """Without a key, plain http:// to a machine in the house is fine."""
    set_env(HOUSE_BASE_URL="http://nas.example:8080/v1", HOUSE_MODELS="m")
    world = builtin()
    assert world.llm.ask("Where?", provider="house") == "M"
    set_env(HOUSE_API_KEY=FIRST)
    world = builtin()
    with pytest.raises((ValueError, NoProviderError), match=r"clear text|http://|HOUSE"):
        world.llm.complete("Where?", provider="house")
    assert world.asked == ""


def test_an_address_of_a_row_that_is_none(set_env: Any) -> None:
    set_env(OLLAMA, OLLAMA_BASE_URL="localhost:11434", GROQ_API_KEY=FIRST)
    with pytest.raises((ValueError, NoProviderError), match=r"OLLAMA_BASE_URL|base_url|http"):
        builtin().llm.complete("Where?", provider="ollama")


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("name", ["GROQ_BASE_URL", "OLLAMA_BASE_URL", "SOMETHING_BASE_URL"])
def test_an_address_in_a_dotenv_file_is_told(
    bare: Path, set_env: Any, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """In one line: the question would go where its owner did not want."""
    lines = f"{name}=https://evil.example/v1\nOLLAMA_MODELS=m\nFALLBACK_LLM_PROVIDERS=ollama\n"
    (bare / ".env").write_text(lines)
    set_env(GROQ_API_KEY=FIRST)
    world = builtin()
    for _ in range(3):
        assert world.llm.complete("Where?").provider == "groq"
    assert {asked.url for asked in world.server.asked} == {
        "https://api.groq.com/openai/v1/chat/completions"
    }
    assert len([line for line in warnings_of(caplog) if name in line]) == 1
    with pytest.raises(ValueError, match=r"(?i)ollama"):
        world.llm.ask("Where?", provider="ollama")


# --- Keys and rows in Python --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sk-1234567890abcdef", LOST_KEY, "MY KEY", "1KEY", "a=b", 7])
def test_the_variable_of_a_row_is_checked_when_the_row_is_made(name: Any) -> None:
    with pytest.raises(ValueError, match="key_env") as refused:
        Provider("mine", "https://one/v1", name, ("m",))
    assert "567890" not in str(refused.value)
    assert LOST_KEY[4:12] not in str(refused.value)


@pytest.mark.parametrize("name", [None, "MY_KEY", "_KEY", "KEY2", "GROQ_API_KEY"])
def test_a_variable_that_can_be(name: Any) -> None:
    assert Provider("mine", "https://one/v1", name, ("m",)).key_env == name


def test_a_chosen_provider_without_a_key() -> None:
    """The message says so, and who has one."""
    rows = [row("one", "a", key_env="ONE_KEY"), row("two", "c", key_env="TWO_KEY")]
    world = World(providers=rows, api_keys={"two": FIRST})
    with pytest.raises(NoProviderError, match="ONE_KEY") as refused:
        world.llm.ask("Where?", provider="one")
    assert "No API keys found" not in str(refused.value)
    assert "two" in str(refused.value)
    with pytest.raises(NoProviderError, match=r"^No API keys found!"):
        World(providers=rows).llm.ask("Where?")


# --- Many questions, answers, logs --------------------------------------------------------------


@pytest.mark.parametrize("questions", [5, None, 5.5, b"Where?", {"question": "Where?"}, object()])
def test_questions_that_are_none(questions: Any) -> None:
    """It is told at once, not when the first answer is wanted."""
    world = World()
    with pytest.raises(ValueError, match="questions"):
        world.llm.ask_many(questions)
    assert world.asked == ""


@pytest.mark.parametrize(
    ("question", "name"),
    [
        ({"q": 1}, "q"),
        ({"prompt": "Where?"}, "prompt"),
        ({}, "question"),
        ({"question": None}, "question"),
        ({"question": 7}, "question"),
        ({"question": "Where?", "max_token": 5}, "max_token"),
        ({"question": "Where?", "id": 5}, "id"),
        ({"question": "Where?", 7: 5}, "7"),
        (7, "question"),
        (None, "question"),
        (["Where?"], "question"),
    ],
)
def test_a_question_among_many_that_cannot_be_asked(question: Any, name: str) -> None:
    """An error in its place names what is wrong with it."""
    world = World()
    first, second = world.llm.ask_many([question, "Where?"])
    assert isinstance(first, ValueError)
    assert name in str(first)
    assert isinstance(second, Answer)
    assert world.asked == "a"


def test_a_client_is_shown_in_short() -> None:
    rows = [row(f"provider{number}", *[f"model-{m}" for m in range(50)]) for number in range(3)]
    shown = repr(World(providers=rows).llm)
    assert len(shown) < 200
    assert "FallbackLLM" in shown
    assert "provider0" in shown
    assert "\n" not in shown


ANSWER = Answer("Paris.", "one", "a", "stop", {"total_tokens": 7}, (Attempt("one", "a"),), 1.0)


def test_an_answer_in_a_format() -> None:
    """It is its text, as str() gives it."""
    assert f"{ANSWER}" == "Paris."
    assert f"{ANSWER:>10}|{ANSWER:<10}|{ANSWER:.3}" == "    Paris.|Paris.    |Par"
    assert "%s" % ANSWER == "Paris."  # noqa: UP031 - it is what is tried


def test_an_answer_in_a_set() -> None:
    """Answers with figures, which are a dict, hash; equal ones alike."""
    twin = pickle.loads(pickle.dumps(ANSWER))  # noqa: S301 - it is our own
    assert twin == ANSWER
    assert hash(twin) == hash(ANSWER)
    other = Answer("Rome.", usage={"details": {"cached": [1, 2]}})
    assert len({ANSWER, twin, other}) == 2
    assert collections.Counter([ANSWER, twin])[ANSWER] == 2


def test_an_answer_in_a_notebook() -> None:
    shown: Any = Answer("# Paris\n\n*is* it.")
    assert shown._repr_markdown_() == "# Paris\n\n*is* it."


def told_once(world: World, caplog: pytest.LogCaptureFixture, reasons: list[str]) -> None:
    caplog.set_level(logging.DEBUG)
    world.llm.ask("Where?")
    for reason in reasons:
        lines = [line for line in warnings_of(caplog) if reason in line]
        assert len(lines) == 1, lines
        assert lines[0].count(reason) == 1


@pytest.mark.parametrize("status", [400, 401, 404, 422, 500])
def test_a_failed_question_is_told_once(status: int, caplog: pytest.LogCaptureFixture) -> None:
    """Where logging is not set up, all warnings go to stderr: the same reason once, not thrice."""
    reply = Reply(status, {"error": {"message": "Because of this"}})
    told_once(
        World({"a": [reply]}, providers=[row("one", "a")], max_attempts=1),
        caplog,
        ["Because of this"],
    )


def test_each_reason_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    reasons = [f"Because of {model}" for model in "abcd"]
    script = {
        model: [Reply(400, {"error": {"message": reason}})]
        for model, reason in zip("abcd", reasons)
    }
    told_once(World(script), caplog, reasons)


def test_a_refused_question_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    said = {"error": {"message": "Not that one", "code": "content_policy_violation"}}
    told_once(World({"a": [Reply(400, said)]}), caplog, ["Not that one"])


def attempts_in(caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    for record in caplog.records:
        attempt = getattr(record, "attempt", None)
        if attempt is not None:
            yield attempt


def test_records_carry_their_attempt(caplog: pytest.LogCaptureFixture) -> None:
    """Structured logs have provider, model, status and times without reading texts."""
    caplog.set_level(logging.DEBUG)
    script = {"a": [limited(1), fails(500)], "b": [GONE], "c": [says("C", takes=2)]}
    answer = World(script).llm.complete("Where?")
    noted: list[Any] = []
    for attempt in attempts_in(caplog):
        if attempt not in noted:
            noted.append(attempt)
    assert tuple(noted) == answer.attempts

    caplog.clear()
    with pytest.raises(FallbackLLMError) as failed:
        World({"a": [Reply(400)]}, providers=[row("one", "a")]).llm.complete("Where?")
    assert list(attempts_in(caplog))[:1] == list(failed.value.attempts)


def test_attempts_have_the_id_of_their_request() -> None:
    """As the provider gave it, for its support."""
    script = {
        "a": [Reply(500, {}, {"x-request-id": "req_01abc"})],
        "b": [Reply(200, says("B").body, {"X-Request-Id": "req_02abc"})],
    }
    attempts: Any = World(script).llm.complete("Where?").attempts
    assert [attempt.request_id for attempt in attempts] == ["req_01abc", "req_02abc"]
    no_id: Any = World().llm.complete("Where?").attempts
    assert no_id[0].request_id in ("", None)
