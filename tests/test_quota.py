"""The quotas of the emulator, on a clock that only moves when a test says so."""

from __future__ import annotations

import http.client
import json
import threading
from typing import Any, Iterator, NamedTuple

import pytest
from emulator import (
    DIALECTS,
    AtOnce,
    Chance,
    Count,
    Emulator,
    Headers,
    Quota,
    Storm,
    admit,
    quota_headers,
    refusal,
)
from quota import (
    BASE,
    MODELS,
    ONE,
    SCENARIOS,
    SHAPES,
    TWO,
    Place,
    Question,
    Result,
    Scenario,
    ideal,
    outcomes,
    simple,
)

EPOCH = 1790000000.25
ASKED = {"cerebras": "gpt-oss-120b", "groq": "openai/gpt-oss-20b", "openrouter": "openrouter/free"}
BODY = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 100}
SHRUNK = 3.0  # seconds of a minute


def waits(quota: Quota, *asked: float, cost: float = 1) -> list[float]:
    """What requests at these times are told; those that need not wait take their part."""
    told = []
    for now in asked:
        wait = quota.wait(cost, now)
        if not wait:
            quota.left -= cost
        told.append(round(wait, 6))
    return told


@pytest.mark.parametrize(
    ("quota", "asked", "told"),
    [
        pytest.param(Quota(2, 60), [5, 5, 5], [0, 0, 30], id="a bucket is full at first"),
        pytest.param(Quota(2, 60), [0, 0, 10, 30, 31], [0, 0, 20, 0, 29], id="it refills evenly"),
        pytest.param(Quota(2, 60), [0, 0, 900, 900, 900], [0, 0, 0, 0, 30], id="but not over"),
        pytest.param(Quota(2, 60), [9, 9, 2], [0, 0, 30], id="its time does not go back"),
        pytest.param(
            Quota(2, 60, fixed=True),
            [5, 5, 5, 64.5, 65, 65, 65],
            [0, 0, 60, 0.5, 0, 0, 60],
            id="a fixed window comes back as a whole",
        ),
        pytest.param(
            Quota(2, 60, fixed=True), [0, 200, 200, 200], [0, 0, 0, 40], id="and starts on time"
        ),
    ],
)
def test_quota_refills(quota: Quota, asked: list[float], told: list[float]) -> None:
    """Times and waits, in seconds."""
    assert waits(quota, *asked) == told


@pytest.mark.parametrize("fixed", [False, True])
def test_another_program_takes_its_share(fixed: bool) -> None:
    """Of 60 per minute it takes 20: one every 3 seconds."""
    quota = Quota(60, 60, fixed=fixed, taken=1 / 3)
    quota.advance(0)
    left = []
    quota.left = 0
    for now in (2.9, 3.1, 30.5, 59.9):
        quota.advance(now)
        left.append(quota.left)
    refilled = [0.0] * 4 if fixed else [2.9, 3.1, 30.5, 59.9]
    taken = [0, 1, 10, 19]
    assert left == pytest.approx([a - b for a, b in zip(refilled, taken)])


def test_another_program_is_no_news_to_headers() -> None:
    """What it has taken beyond the limit shows as 0."""
    quota = Quota(1, 60, fixed=True, taken=1.0)
    quota.advance(0)
    quota.left = 0
    quota.advance(59)
    quota.left -= 1
    assert quota.remaining == 0


def test_a_quota_changes_over_time() -> None:
    """A bucket is cut to its new size; then it refills at the new rate."""
    quota = Quota(60, 60, schedule=((10, 0.5), (20, 2.0)))
    found = []
    for now in (0, 9, 10, 11, 20, 21, 51):
        quota.advance(now)
        found.append((quota.capacity, quota.left))
    full, half, twice = (60, 60), (30, 30), (120, 30)
    assert found == [full, full, half, half, twice, (120, 32), (120, 92)]


def test_a_fixed_window_changes_over_time() -> None:
    """What was used of it stays used."""
    quota = Quota(60, 60, fixed=True, schedule=((10, 0.5), (20, 2.0)))
    quota.advance(0)
    quota.left -= 40
    found = []
    for now in (10, 20, 60):
        quota.advance(now)
        found.append(quota.left)
    assert found == [-10, 80, 120]


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"messages": [], "max_tokens": 100}, 101),
        ({"messages": [{"role": "user", "content": "x" * 400}], "max_tokens": 100}, 208),
        ({"messages": [], "max_tokens": 100, "max_completion_tokens": 7}, 8),
        ({"messages": [], "max_tokens": 10**6}, 16385),
        ({"messages": []}, 16385),
    ],
)
def test_tokens_are_reserved(body: dict[str, Any], tokens: int) -> None:
    """Those of the prompt and of the longest answer; the other kind of quota counts 1."""
    assert Quota(9, counts="tokens").cost(body) == tokens
    assert Quota(9, counts="requests").cost(body) == 1


def test_admission_takes_from_all_or_none() -> None:
    """The quota that holds longest is the one that refuses."""
    plenty, tight, tightest = Quota(9, 60), Quota(2, 60), Quota(1, 60)
    quotas = [plenty, tight, tightest]
    assert admit(quotas, BODY, 0) is None
    assert [quota.left for quota in quotas] == [8, 1, 0]
    tight.left = 0
    assert admit(quotas, BODY, 0) == (tightest, 60)
    assert [quota.left for quota in quotas] == [8, 0, 0]
    assert admit([plenty, tight], BODY, 0) == (tight, 30)


def test_a_request_larger_than_the_quota_is_not_told_to_wait() -> None:
    quota = Quota(50, counts="tokens")
    refused = admit([quota], BODY, 0)
    assert refused == (quota, float("inf"))
    assert refusal("groq", *refused, wide=False, now=EPOCH).status == 413


# --- What else refuses ---------------------------------------------------------------------------


def refusals(quota: Quota, *asked: float) -> list[float]:
    """What requests at these times are to wait, rounded; 0: granted."""
    found = []
    for now in asked:
        refused = admit([quota], BODY, now)
        found.append(round(refused[1], 6) if refused else 0.0)
    return found


def test_so_many_requests_at_a_time() -> None:
    """The next one is granted when the first of them has been answered."""
    quota = AtOnce(2, takes=3)
    assert refusals(quota, 0, 1, 1, 2.5, 3, 3) == [0, 0, 2, 0.5, 0, 1]
    assert refusals(quota, 90, 90, 90) == [0, 0, 3]


def test_a_storm_refuses_everybody_for_a_while() -> None:
    """And comes back; the first one begins with the batch."""
    quota = Storm(every=20, lasts=1)
    assert refusals(quota, 100, 100.75, 101, 119.5, 120.5, 121) == [1, 0.25, 0, 0, 0.5, 0]


def test_chance_refuses_a_share() -> None:
    """The same requests at each run, others with another seed."""
    found = []
    for seed in (1, 1, 2):
        quota = Chance(0.05, seed)
        found.append([admit([quota], BODY, 0) is not None for _ in range(2000)])
    assert [sum(refused) for refused in found] == pytest.approx([100] * 3, abs=30)
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    "quota",
    [
        pytest.param(lambda **more: AtOnce(1, 5, **more), id="at a time"),
        pytest.param(lambda **more: Storm(9, 5, **more), id="storm"),
        pytest.param(lambda **more: Chance(1.0, **more), id="chance"),
    ],
)
def test_what_it_tells_is_not_how_long_it_lasts(server: Server, quota: Any) -> None:
    """The hint, in the minute of the quota; and nothing in the headers of a quota."""
    server.emulator.limit("cerebras", quota(window=SHRUNK, hint=0.05))
    server.ask("cerebras")
    refused = server.ask("cerebras")
    assert (refused.status, refused.headers["retry-after"], refused.limits) == (429, "0.05", {})
    server.emulator.limit("cerebras", quota(told=False, hint=0.05))
    server.ask("cerebras")
    refused = server.ask("cerebras")
    assert (refused.status, "retry-after" in refused.headers) == (429, False)


def test_a_quota_per_second(server: Server) -> None:
    """A hint of one second is the whole of it."""
    server.emulator.limit("cerebras", Quota(1, 0.2, per="second", fixed=True))
    server.ask("cerebras")
    server.now += 0.19
    refused = server.ask("cerebras")
    assert (refused.status, refused.headers["retry-after"]) == (429, "0.2")
    assert refused.limits["remaining-requests-second"] == "0"


# --- What the providers say about them ----------------------------------------------------------


class Told(NamedTuple):
    """What came back over the wire."""

    status: int
    headers: Headers
    error: dict[str, Any]

    @property
    def limits(self) -> Headers:
        """The headers about quotas, less what their names have in common."""
        prefix = "x-ratelimit-"
        return {k[len(prefix) :]: v for k, v in self.headers.items() if k.startswith(prefix)}


class Server:
    """An emulator whose clock stands still, and a way to ask it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.emulator = Emulator(clock=lambda: self.now)

    def ask(self, provider: str, body: Any = BODY) -> Told:
        dialect = next(dialect for dialect in DIALECTS if dialect.name == provider)
        connection = http.client.HTTPConnection(self.emulator.url[len("http://") :])
        data = json.dumps(dict(body, model=ASKED[provider]))
        headers = {"Authorization": f"Bearer {dialect.key}"}
        connection.request("POST", dialect.path + "/chat/completions", data, headers)
        reply = connection.getresponse()
        said = json.loads(reply.read().decode())
        connection.close()
        found = {name.lower(): value for name, value in reply.getheaders()}
        return Told(reply.status, found, said.get("error", said))


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    with server.emulator:
        yield server


def test_cerebras_tells_of_each_quota(server: Server) -> None:
    day = Quota(100, 4320, per="day")
    tokens = Quota(1000, SHRUNK, counts="tokens")
    server.emulator.limit("cerebras/gpt-oss-120b", Quota(2, SHRUNK), tokens, day)
    body = dict(BODY, messages=[], max_tokens=99)  # the brackets are a token
    limits = {
        "limit-requests-minute": "2",
        "remaining-requests-minute": "1",
        "limit-tokens-minute": "1000",
        "remaining-tokens-minute": "900",
        "limit-requests-day": "100",
        "remaining-requests-day": "99",
    }
    first = server.ask("cerebras", body)
    assert (first.status, first.limits) == (200, limits)
    server.ask("cerebras", body)
    server.now += 0.06
    refused = server.ask("cerebras", body)
    left = {"remaining-requests-minute": "0", "remaining-tokens-minute": "820"}
    assert refused.limits == dict(limits, **left, **{"remaining-requests-day": "98"})
    assert (refused.status, refused.error["code"]) == (429, "request_quota_exceeded")
    # 1.44 seconds are 28.8 of the real minute
    assert refused.headers["retry-after"] == "1.45"


def test_cerebras_names_the_quota_of_tokens(server: Server) -> None:
    server.emulator.limit("cerebras", Quota(150, SHRUNK, counts="tokens"))
    server.ask("cerebras")
    assert server.ask("cerebras").error["code"] == "token_quota_exceeded"


def test_groq_tells_of_requests_per_day_and_tokens_per_minute(server: Server) -> None:
    day = Quota(1000, 86400, per="day")
    tokens = Quota(8000, SHRUNK, counts="tokens")
    server.emulator.limit("groq/openai/gpt-oss-20b", Quota(1, SHRUNK), tokens, day)
    body = dict(BODY, messages=[], max_tokens=1599)
    limits = {
        "limit-requests": "1000",
        "remaining-requests": "999",
        "reset-requests": "1m26.4s",
        "limit-tokens": "8000",
        "remaining-tokens": "6400",
        "reset-tokens": "600ms",
    }
    assert server.ask("groq", body).limits == limits
    server.now += 0.31
    refused = server.ask("groq", body)
    left = {"remaining-tokens": "7226", "reset-tokens": "290ms", "reset-requests": "1m26.09s"}
    assert refused.limits == dict(limits, **left)
    assert refused.headers["retry-after"] == "2.7"  # 53.8 real seconds, in whole ones
    assert refused.status == 429
    assert refused.error["type"] == "requests"
    assert "requests per minute (RPM)" in refused.error["message"]
    assert "Please try again in 2.69s." in refused.error["message"]


def test_openrouter_tells_nothing_until_the_account_is_limited(server: Server) -> None:
    server.emulator.limit("openrouter", Quota(1, SHRUNK))
    answered, refused = server.ask("openrouter"), server.ask("openrouter")
    assert (answered.status, answered.limits) == (200, {})
    assert (refused.status, refused.limits) == (429, {})
    assert "retry-after" not in refused.headers
    metadata = refused.error["metadata"]
    assert metadata["limit_source"] == "openrouter_free_tier_per_minute"
    assert set(metadata["headers"]) == {"X-RateLimit-Remaining", "X-RateLimit-Reset"}


def test_openrouter_tells_the_instant_of_a_reset() -> None:
    """In milliseconds, and never too early."""
    reply = refusal("openrouter", Quota(1, SHRUNK), 1.2345, wide=True, now=EPOCH)
    assert isinstance(reply.body, dict)
    headers = reply.body["error"]["metadata"]["headers"]
    assert headers["X-RateLimit-Reset"] == "1790000001485"


def test_openrouter_has_no_hint_for_a_model(server: Server) -> None:
    server.emulator.limit("openrouter/openrouter/free", Quota(1, SHRUNK))
    server.ask("openrouter")
    refused = server.ask("openrouter")
    assert "retry-after" not in refused.headers
    assert refused.error["metadata"]["limit_source"] == "upstream_provider_shared_pool"
    assert "headers" not in refused.error["metadata"]


@pytest.mark.parametrize("provider", ASKED)
def test_a_quota_that_is_not_told_leaves_no_trace(server: Server, provider: str) -> None:
    server.emulator.limit(provider, Quota(1, SHRUNK, told=False))
    answered, refused = server.ask(provider), server.ask(provider)
    assert (answered.status, refused.status) == (200, 429)
    for told in (answered, refused):
        assert told.limits == {}
        assert "retry-after" not in told.headers
    assert "again in" not in refused.error["message"]
    metadata = refused.error.get("metadata", {})
    assert "headers" not in metadata
    assert metadata.get("limit_source", "") in ("", "openrouter_free_tier_per_minute")


def test_without_quotas_the_headers_are_those_of_the_dialect(server: Server) -> None:
    for dialect in DIALECTS:
        told = server.ask(dialect.name)
        assert {name: told.headers[name] for name in dialect.headers} == dialect.headers


def test_an_account_shares_its_quota_among_its_models(server: Server) -> None:
    """Two providers' accounts have nothing to do with each other; lifted quotas are gone."""
    for provider in ("groq", "cerebras"):
        server.emulator.limit(provider, Quota(1, SHRUNK))
    server.emulator.limit("groq/openai/gpt-oss-20b", Quota(5, SHRUNK))
    assert [server.ask("groq").status for _ in range(2)] == [200, 429]
    assert server.ask("cerebras").status == 200
    server.emulator.limit("groq")
    assert [server.ask("groq").status for _ in range(5)] == [200] * 4 + [429]
    counts = {"groq/openai/gpt-oss-20b": Count(5, 2), "cerebras/gpt-oss-120b": Count(1, 0)}
    assert server.emulator.counts == counts


def test_quotas_begin_together(server: Server) -> None:
    """With the first question to anybody who is limited."""
    for provider in ("groq", "cerebras"):
        server.emulator.limit(provider, Quota(1, SHRUNK, fixed=True))
    server.now += 77
    server.ask("groq")
    server.now += 2
    assert [server.ask("cerebras").status for _ in range(2)] == [200, 429]
    server.now += 1
    assert server.ask("cerebras").status == 200


def test_threads_get_no_more_than_there_is(server: Server) -> None:
    server.emulator.limit("groq", Quota(50, SHRUNK))

    def ask() -> None:
        for _ in range(20):
            server.ask("groq")

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.emulator.counts == {"groq/openai/gpt-oss-20b": Count(50, 110)}


def test_headers_of_a_quota_win_over_those_of_the_dialect() -> None:
    """Those without a quota are taken away."""
    headers = quota_headers("groq", [Quota(5, SHRUNK, counts="tokens")])
    assert headers["x-ratelimit-limit-tokens"] == "5"
    assert headers["x-ratelimit-remaining-requests"] == ""


# --- The figures of quota.py --------------------------------------------------------------------


def test_the_ideal_is_limited_by_threads() -> None:
    """Cerebras answers in 50 ms."""
    unlimited = Scenario(dict)
    assert ideal(unlimited, 8, 80) == pytest.approx(0.5)
    assert ideal(unlimited, 8, 81) == pytest.approx(0.55)


def test_the_ideal_is_limited_by_quotas() -> None:
    """170 at once, and 170 more in each minute of 3 seconds; the last one comes from Groq."""
    assert ideal(SCENARIOS[BASE], 1000, 170) == pytest.approx(0.1)
    assert ideal(SCENARIOS[BASE], 1000, 340) == pytest.approx(3.06, abs=0.05)
    slow = SCENARIOS[BASE]._replace(slower=5.0)
    assert ideal(slow, 1000, 340) == pytest.approx(3.4, abs=0.1)


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenarios_last_long_enough_and_not_too_long(name: str) -> None:
    """A thousand questions with 32 threads."""
    assert 3 < ideal(SCENARIOS[name], 32, 1000) < 31


def test_a_result_counts_what_was_answered() -> None:
    result = Result("a", "b", 8, questions=200, answers=100, refused=50, took=10.0, ideal=5.0)
    assert result.share == 25.0
    assert result.refused_per_100 == 50.0
    assert result.cells() == [
        *("a", "b", "8", "", "25.0 %", "50.0"),
        *("100 of 200", "10.0 s (5.0 s)"),
    ]
    assert result._replace(simple=20.0).of_simple == "50 %"
    assert result._replace(weight=0.5).share == 12.5


def test_the_ideal_rides_out_a_storm() -> None:
    """Nobody is asked in the first second of twenty, a fifth of which is left here."""
    storm = SHAPES["a storm of 1 s every 20 s"]
    assert ideal(storm, 1, 1) == pytest.approx(0.2 + 0.2)
    assert ideal(storm, 1, 19) == pytest.approx(0.2 + 19 * 0.2)
    assert ideal(storm, 1, 20) == pytest.approx(4.0 + 0.2 + 0.2)


def test_the_ideal_knows_how_many_at_a_time() -> None:
    assert ideal(SHAPES["10 requests at a time"], 32, 100) == pytest.approx(2.0)


def test_questions_have_sizes_in_turns() -> None:
    """One of ten is long, and there are no more than the scenario has."""
    asked = SHAPES["tokens, long and short questions"].asked(1000)
    assert [question.max_tokens for question in asked] == 10 * [7000, *[200] * 9]


def test_whom_a_scenario_asks() -> None:
    """In order. Where nothing else is said, all models that our client knows."""
    everybody = [(name, model) for name, models in MODELS.items() for model in models]
    for scenario, targets in (
        (Scenario(dict), [f"{name}/{model}" for name, model in everybody]),
        (SHAPES["a storm of 1 s every 20 s"], [ONE]),
        (SHAPES["a free provider after a limited one"], [ONE, TWO]),
    ):
        assert [f"{dialect.name}/{model}" for dialect, model in scenario.endpoints()] == targets


def test_the_simple_client_honours_the_last_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    """It rests, asks the next one meanwhile, and never gives up."""
    server, slept = Server(), []

    def sleep(seconds: float) -> None:
        slept.append(round(seconds, 3))
        server.now += seconds

    monkeypatch.setattr("quota.time.monotonic", lambda: server.now)
    monkeypatch.setattr("quota.time.sleep", sleep)
    scenario = SHAPES["a free provider after a limited one"]
    with server.emulator:
        server.emulator.limit(ONE, Quota(1, 60, fixed=True))
        server.emulator.limit(TWO, Quota(1, 30, fixed=True))
        ask = simple(Place(server.emulator.url, scenario))
        assert [ask(Question("?", 9)) for _ in range(4)] == [True] * 4
        assert slept == [30, 30]
        assert server.emulator.counts == {ONE: Count(2, 1), TWO: Count(2, 2)}


def test_a_batch_that_takes_too_long_is_left_alone() -> None:
    """What has ended counts, what is under way does not, and nothing else is asked."""
    asked: list[str] = []
    released = threading.Event()

    def ask(question: Question) -> bool:
        asked.append(question.text)
        return question.text != "b" or released.wait(10)

    questions = [Question(text, 9) for text in "abc"]
    assert outcomes(ask, questions, 1, limit=0.0) in ([], [(questions[0], True)])
    released.set()
    assert "c" not in asked
    found = outcomes(lambda question: question.text == "a", questions, 2, limit=10.0)
    assert sorted(found) == list(zip(questions, [True, False, False]))
