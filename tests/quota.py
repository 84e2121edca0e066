"""How well a batch uses rate-limited quotas: a thousand questions from many threads.

    python tests/quota.py                           # 8, 32, 128 threads; a minute
    python tests/quota.py --variants --no-wait      # other quotas; wait_on_rate_limit=False too
    python tests/quota.py --shapes                  # what else answers 429: storms, chance, ...
    python tests/quota.py --peers --threads 32      # beside other packages, if installed

Three providers have quotas like those of free accounts, but a minute lasts `MINUTE` seconds (in the
other shapes, which have one or two models, `LONGER`). The
server's hints and the clients' delays between attempts, which are meant for real minutes, shrink
alike; idle timeouts and what else is constant in a client do not. The server is a process of its
own on loopback. Each line of the table has

- the share of the simple client, in which all threads honour the last Retry-After of a model;
- the share of the ideal: how fast the answers came, compared with a client that knows the quotas
  (it has as many threads, and needs no time itself);
- refused: how many requests got a 429, which free quotas count like the others, per 100 answers;
- lost: questions without an answer, of those that ended within a minute, at which time it stops.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import heapq
import importlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Sequence

import requests
from emulator import (
    DIALECTS,
    AtOnce,
    Chance,
    Count,
    Dialect,
    Emulator,
    Quota,
    Reply,
    Storm,
    admit,
)
from tables import line, machine

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for `import fallback_llm`

from fallback_llm import PROVIDERS, FallbackLLM, FallbackLLMError, RetryConfig

Quotas = Dict[str, List[Quota]]  # by target, as in Emulator.limit

MINUTE = 3.0  # seconds
DELAYS = {"cerebras": 0.05, "groq": 0.06, "openrouter": 0.1}  # of replies
MODELS = {row.name: row.models for row in PROVIDERS}
QUESTION = "What is the capital of France? (question {})"
MAX_TOKENS = 500
LIMIT = 60.0  # seconds for a batch


# --- The scenarios ------------------------------------------------------------------------------


class Question(NamedTuple):
    text: str
    max_tokens: int


class Scenario(NamedTuple):
    """What limits the questions, who is asked, and how long an answer takes by provider."""

    quotas: Callable[[], Quotas]  # new ones at each call
    slower: float = 1.0
    per_thread: float = 0.0  # with many threads answers take longer, so that this machine keeps up
    minute: float = MINUTE  # how many seconds it lasts
    models: Mapping[str, Sequence[str]] = MODELS
    takes: Mapping[str, float] = DELAYS  # seconds until an answer
    max_tokens: Sequence[int] = (MAX_TOKENS,)  # of the questions, in turns
    questions: int = 1000  # at most
    timeout: float | None = None  # of our client, in seconds

    @property
    def shrunk(self) -> float:
        """What a second of a real minute lasts."""
        return self.minute / 60.0

    def delays(self, threads: int) -> dict[str, float]:
        least = self.per_thread * threads
        return {name: max(self.slower * delay, least) for name, delay in self.takes.items()}

    def endpoints(self) -> list[tuple[Dialect, str]]:
        """Whom to ask, in order."""
        dialects = {dialect.name: dialect for dialect in DIALECTS}
        return [(dialects[name], model) for name, ids in self.models.items() for model in ids]

    def asked(self, questions: int) -> list[Question]:
        """The questions, and how long their answers may be."""
        count = min(questions, self.questions)
        return [
            Question(QUESTION.format(number), self.max_tokens[number % len(self.max_tokens)])
            for number in range(count)
        ]


def free_tier(groq_tokens: int = 100000, told: bool = True, **more: Any) -> Quotas:
    """Requests per minute: 30 of each Cerebras and Groq model, 20 of an OpenRouter account.

    The other quotas are there for their headers; `groq_tokens` can make Groq's tokens the tighter
    limit. more: of the requests per minute.
    """
    minute = partial(Quota, window=MINUTE, told=told, **more)
    tokens = partial(Quota, window=MINUTE, counts="tokens", told=told)
    day = partial(Quota, window=1440 * MINUTE, per="day", told=told)
    quotas = {"openrouter": [minute(limit=20)]}
    for model in MODELS["cerebras"]:
        quotas[f"cerebras/{model}"] = [minute(limit=30), tokens(limit=60000), day(limit=14400)]
    for model in MODELS["groq"]:
        limits = [minute(limit=30), tokens(limit=groq_tokens), day(limit=14400)]
        quotas[f"groq/{model}"] = limits
    return quotas


BASE = "token buckets"
SCENARIOS = {
    BASE: Scenario(free_tier),
    "fixed windows": Scenario(partial(free_tier, fixed=True)),
    "no hint, no header": Scenario(partial(free_tier, told=False)),
    "replies five times slower": Scenario(free_tier, slower=5.0),
    "half is taken by another program": Scenario(partial(free_tier, taken=0.5)),
    "halves, then doubles": Scenario(partial(free_tier, schedule=((4, 0.5), (10, 1.0)))),
    "tokens, in Groq's form": Scenario(partial(free_tier, groq_tokens=8000)),
    "no limit": Scenario(dict, per_thread=1 / 320),
}

# What else answers 429. Most of it is over within seconds, in which a client has constants of its
# own: so these seconds shrink less.

LONGER = 12.0  # seconds of a minute
SECOND = LONGER / 60.0
ONE = "cerebras/gpt-oss-120b"
TWO = "groq/openai/gpt-oss-120b"


def only(
    quota: Callable[..., Quota],
    *values: float,
    target: str = ONE,
    minute: float = LONGER,
    **more: Any,
) -> Quotas:
    """Nothing but one quota of one model. The first window of a quota is the batch's."""
    return {target: [quota(*values, **{"window": minute, **more})]}


def shape(quotas: Callable[[], Quotas], takes: float = 1.0, *targets: str, **more: Any) -> Scenario:
    """Models that answer within so many real seconds, the first of which has a quota."""
    models: dict[str, list[str]] = {}
    for target in targets or (ONE,):
        provider, _, model = target.partition("/")
        models.setdefault(provider, []).append(model)
    settings: dict[str, Any] = {"minute": LONGER, "per_thread": 1 / 200, **more}
    delays = dict.fromkeys(models, takes * settings["minute"] / 60.0)
    return Scenario(quotas, models=models, takes=delays, **settings)


SHAPES = {
    "a storm of 1 s every 20 s": shape(partial(only, Storm, 20 * SECOND, SECOND, hint=SECOND)),
    "5 % refused at random": shape(partial(only, Chance, 0.05, hint=SECOND)),
    "tokens, long and short questions": shape(
        partial(only, Quota, 8000, target=TWO, minute=MINUTE, counts="tokens"),
        1.0,
        TWO,
        minute=MINUTE,
        max_tokens=[7000, *[200] * 9],
        questions=100,
    ),
    "10 requests at a time": shape(
        partial(only, AtOnce, 10, SECOND, hint=SECOND), per_thread=0, questions=400
    ),
    "5 requests per second": shape(
        partial(only, Quota, 5, window=SECOND, per="second", fixed=True), 0.3, questions=300
    ),
    "a free provider after a limited one": shape(
        partial(only, Quota, 6, fixed=True), 1.0, ONE, TWO, timeout=5 * SECOND
    ),
    "fixed minute, true headers": shape(partial(only, Quota, 300, fixed=True), 3.0, questions=700),
}
SCENARIOS.update(SHAPES)


def ideal(scenario: Scenario, threads: int, questions: int) -> float:
    """Seconds until a client that knows the quotas has all answers.

    Whenever a thread is free and some model has quota left, it asks: the quickest of those.
    """
    quotas, delays = scenario.quotas(), scenario.delays(threads)
    bodies = [
        {"messages": _messages(text), "max_tokens": most}
        for text, most in scenario.asked(questions)
    ]
    candidates = [
        (
            delays[dialect.name],
            [*quotas.get(dialect.name, []), *quotas.get(f"{dialect.name}/{model}", [])],
        )
        for dialect, model in scenario.endpoints()
    ]
    candidates.sort(key=lambda candidate: candidate[0])
    now, asked = 0.0, 0
    replies: list[float] = []  # when those that are under way will come; a heap
    while asked < len(bodies):
        waits = []
        for delay, limits in candidates:
            while asked < len(bodies) and len(replies) < threads:
                refused = admit(limits, bodies[asked], now)
                if refused is not None:
                    waits.append(refused[1])
                    break
                heapq.heappush(replies, now + delay)
                asked += 1
        soonest = [now + max(wait, 1e-6) for wait in waits] + replies[:1]
        now = min(soonest)
        while replies and replies[0] <= now:
            heapq.heappop(replies)
    return max(replies, default=now)


# --- The server, in a process of its own --------------------------------------------------------


def serve(name: str, threads: int) -> None:
    """Prints the port, serves until stdin ends, and prints what was granted and refused."""
    scenario = SCENARIOS[name]
    with Emulator() as emulator:
        for provider, delay in scenario.delays(threads).items():
            emulator.plan(provider, Reply(delay=delay))
        for target, quotas in scenario.quotas().items():
            emulator.limit(target, *quotas)
        print(emulator.url, flush=True)
        sys.stdin.read()
        with contextlib.suppress(BrokenPipeError):  # who asked has been killed
            print(json.dumps(emulator.counts), flush=True)


class Server:
    """The emulator with the quotas of a scenario, as a process."""

    def __init__(self, name: str, threads: int) -> None:
        command = [sys.executable, __file__, "--serve", name, "--threads", str(threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, universal_newlines=True
        )
        assert self.process.stdout is not None  # for mypy
        self.url = self.process.stdout.readline().strip()

    def stop(self) -> dict[str, Count]:
        """Ends it. Returns what was granted and refused by model."""
        output, _ = self.process.communicate()
        return {target: Count(*count) for target, count in json.loads(output).items()}


# --- The clients: the module, and what else a user could take -----------------------------------
#
# Peers know the same models in the same order, and may send as many requests as the SDK of OpenAI
# does by default: 3 per model. Their delays, which are constants for real minutes, are shrunk too.

SDK_RETRIES = 2
PEER_THREADS = 32


class Place(NamedTuple):
    """Where the emulator is, and what it emulates."""

    url: str
    scenario: Scenario

    def servers(self) -> list[tuple[dict[str, Any], str]]:
        """What the SDK needs to know of each model's server, and the model."""
        return [
            ({"base_url": self.url + dialect.path, "api_key": dialect.key}, model)
            for dialect, model in self.scenario.endpoints()
        ]


Ask = Callable[[Question], bool]  # whether it got an answer


def _messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def simple(place: Place) -> Ask:
    """Asks the first model that is not resting until there is an answer.

    After a 429, a model rests for all threads as long as the last Retry-After says, 2 seconds if
    there was none.
    """
    session = requests.Session()
    session.trust_env = False
    session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=128))
    rests = {(server["base_url"], model): 0.0 for server, model in place.servers()}
    keys = {server["base_url"]: server["api_key"] for server, _ in place.servers()}

    def ask(question: Question) -> bool:
        while True:
            now = time.monotonic()
            ready = [target for target, until in rests.items() if until <= now]
            if not ready:
                time.sleep(max(0.0, min(rests.values()) - now))
                continue
            url, model = target = ready[0]
            reply = session.post(
                f"{url}/chat/completions",
                headers={"Authorization": f"Bearer {keys[url]}", "User-Agent": "simple"},
                json={
                    "model": model,
                    "messages": _messages(question.text),
                    "max_tokens": question.max_tokens,
                },
            )
            if reply.status_code == 200:
                return True
            rest = float(reply.headers.get("retry-after", 2.0 * place.scenario.shrunk))
            rests[target] = max(rests[target], time.monotonic() + max(rest, 0.001))

    return ask


def ours(place: Place, wait: bool) -> Ask:
    """The module, with its defaults in shrunk minutes; nothing of the user's counts."""
    models, shrunk = place.scenario.models, place.scenario.shrunk
    for dialect in DIALECTS:
        prefix = dialect.name.upper()
        os.environ[f"{prefix}_API_KEY"] = dialect.key
        os.environ[f"{prefix}_BASE_URL"] = place.url
        os.environ[f"{prefix}_MODELS"] = ",".join(models.get(dialect.name, []))
    retry = RetryConfig(base_delay=2.0 * shrunk, max_delay=60.0 * shrunk, wait_on_rate_limit=wait)
    llm = FallbackLLM(retry, timeout=place.scenario.timeout)

    def ask(question: Question) -> bool:
        try:
            text = llm.complete(question.text, question.max_tokens, provider=list(models)).text
        except FallbackLLMError:
            return False
        return bool(text)

    return ask


def openai_loop(place: Place) -> Ask:
    """One model after the other, each with the retries of the SDK."""
    openai = _openai(place)
    clients = [(openai.OpenAI(**server), model) for server, model in place.servers()]

    def ask(question: Question) -> bool:
        for client, model in clients:
            with contextlib.suppress(openai.APIError):
                reply = client.chat.completions.create(
                    model=model,
                    messages=_messages(question.text),
                    max_tokens=question.max_tokens,
                )
                return bool(reply.choices[0].message.content)
        return False

    return ask


def langchain(place: Place) -> Ask:
    """`with_fallbacks`, over models that have the retries of the SDK."""
    openai = _openai(place)
    chat = importlib.import_module("langchain_openai").ChatOpenAI
    chains = {}
    for most in set(place.scenario.max_tokens):
        first, *others = [
            chat(model=model, max_tokens=most, max_retries=SDK_RETRIES, **server)
            for server, model in place.servers()
        ]
        chains[most] = first.with_fallbacks(others)

    def ask(question: Question) -> bool:
        with contextlib.suppress(openai.APIError):
            chain = chains[question.max_tokens]
            return bool(chain.invoke(_messages(question.text)).content)
        return False

    return ask


def litellm_router(place: Place) -> Ask:
    """A Router with the models as deployments of one model, and cooldowns as by default."""
    first, longest = sdk_delays(place)
    os.environ["INITIAL_RETRY_DELAY"], os.environ["MAX_RETRY_DELAY"] = str(first), str(longest)
    os.environ["JITTER"] = str(0.75 * place.scenario.shrunk)
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else its import asks the internet
    openai = _openai(place)
    litellm: Any = importlib.import_module("litellm")
    litellm.suppress_debug_info = True
    # It reads a Retry-After of whole seconds only, and those of a shrunk minute have fractions.
    utils: Any = importlib.import_module("litellm.utils")
    utils._get_retry_after_from_exception_header = _retry_after
    deployments = [
        {"model_name": "any", "litellm_params": {"model": f"openai/{model}", **server}}
        for server, model in place.servers()
    ]
    router = litellm.Router(
        model_list=deployments,
        num_retries=len(deployments) * (1 + SDK_RETRIES) - 1,
        cooldown_time=5.0 * place.scenario.shrunk,
    )

    def ask(question: Question) -> bool:
        with contextlib.suppress(openai.APIError, ValueError):  # the latter: all are in cooldown
            reply = router.completion(
                "any", _messages(question.text), max_tokens=question.max_tokens
            )
            return bool(reply.choices[0].message.content)
        return False

    return ask


def sdk_delays(place: Place) -> tuple[float, float]:
    """The SDK's delay before the second request, and its longest one."""
    return 0.5 * place.scenario.shrunk, 8.0 * place.scenario.shrunk


def _openai(place: Place) -> Any:
    """The SDK, with its delays shrunk."""
    base: Any = importlib.import_module("openai._base_client")
    base.INITIAL_RETRY_DELAY, base.MAX_RETRY_DELAY = sdk_delays(place)
    return importlib.import_module("openai")


def _retry_after(response_headers: Any = None) -> float:
    """Seconds; -1, as LiteLLM has it, if no header tells."""
    return float((response_headers or {}).get("retry-after", -1))


SIMPLE = "simple"
OURS: dict[str, Callable[[Place], Ask]] = {
    "waits": partial(ours, wait=True),
    "does not wait": partial(ours, wait=False),
}
PEERS: dict[str, Callable[[Place], Ask]] = {
    "openai": openai_loop,
    "langchain_openai": langchain,
    "litellm": litellm_router,
}


# --- Measuring ----------------------------------------------------------------------------------


class Result(NamedTuple):
    """What became of the questions."""

    scenario: str
    client: str
    threads: int
    questions: int  # that ended in time
    answers: int
    refused: int  # requests
    took: float  # seconds
    ideal: float  # seconds
    simple: float = 0.0  # speed of the simple client
    weight: float = 1.0  # mean size of the questions with an answer, compared with all

    @property
    def speed(self) -> float:
        """Answers per second; long ones count more."""
        return self.answers * self.weight / self.took

    @property
    def share(self) -> float:
        """Percent of the ideal throughput."""
        return 100.0 * self.ideal / self.questions * self.speed

    @property
    def of_simple(self) -> str:
        """Percent of the simple client's throughput."""
        return f"{100.0 * self.speed / self.simple:.0f} %" if self.simple else ""

    @property
    def refused_per_100(self) -> float:
        return 100.0 * self.refused / max(1, self.answers)

    def cells(self) -> list[str]:
        return [
            self.scenario,
            self.client,
            str(self.threads),
            self.of_simple,
            f"{self.share:.1f} %",
            f"{self.refused_per_100:.1f}",
            f"{self.questions - self.answers} of {self.questions}",
            f"{self.took:.1f} s ({self.ideal:.1f} s)",
        ]


HEADINGS = (
    "Scenario",
    "Client",
    "Threads",
    "Of simple",
    "Of the ideal",
    "Refused/100",
    "Lost",
    "Took (ideal)",
)


def outcomes(
    ask: Ask, asked: Sequence[Question], threads: int, limit: float
) -> list[tuple[Question, bool]]:
    """Whether each question got an answer. Threads that are still busy then stay behind."""
    todo = collections.deque(asked)
    found: list[tuple[Question, bool]] = []
    end = time.monotonic() + limit

    def work() -> None:
        while True:
            try:
                question = todo.popleft()
            except IndexError:
                return
            found.append((question, ask(question)))

    workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(max(0.0, end - time.monotonic()))
    todo.clear()
    return list(found)


def measure(name: str, client: str, threads: int, questions: int) -> Result:
    """All questions of one batch, or as many as have ended when time is up."""
    os.environ["NO_PROXY"] = "127.0.0.1"
    scenario = SCENARIOS[name]
    asked = scenario.asked(questions)
    server = Server(name, threads)
    try:
        ask = {SIMPLE: simple, **OURS, **PEERS}[client](Place(server.url, scenario))
        start = time.perf_counter()
        ended = outcomes(ask, asked, threads, LIMIT)
        took = time.perf_counter() - start
    finally:
        counts = server.stop()
    refused = sum(count.refused for count in counts.values())
    answered = [question.max_tokens for question, has_answer in ended if has_answer]
    return Result(
        name,
        client,
        threads,
        questions=len(ended),
        answers=len(answered),
        refused=refused,
        took=took,
        ideal=ideal(scenario, threads, questions) * len(ended) / len(asked),
        weight=mean(answered) / mean([question.max_tokens for question in asked]),
    )


def mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def results(
    scenarios: Sequence[str], clients: Sequence[str], threads: Sequence[int], questions: int
) -> Iterator[Result]:
    """Every scenario and number of threads with the simple client, then with each of these."""
    for name in scenarios:
        for count in threads:
            yardstick = measure(name, SIMPLE, count, questions)
            for client in (SIMPLE, *clients):
                found = yardstick if client == SIMPLE else measure(name, client, count, questions)
                yield found._replace(simple=yardstick.speed)


def installed() -> list[str]:
    """The peers that are."""
    return [name for name in PEERS if importlib.util.find_spec(name)]


def table(
    scenarios: Sequence[str],
    clients: Sequence[str],
    threads: Sequence[int],
    questions: int,
    peers: Sequence[str] = (),
) -> Iterator[str]:
    """The lines of the table, in Markdown. The shapes, and peers, have one number of threads."""
    logging.getLogger("fallback_llm").addHandler(logging.NullHandler())
    yield line(*HEADINGS)
    yield line(*["---"] * len(HEADINGS))
    for name in scenarios:
        for count in [PEER_THREADS] if name in SHAPES else threads:
            more = peers if count == PEER_THREADS else ()
            for result in results([name], [*clients, *more], [count], questions):
                yield line(*result.cells())


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures how well a batch uses its quotas.")
    parser.add_argument("--threads", type=numbers, default=[8, 32, 128], help="default: 8,32,128")
    parser.add_argument("--questions", type=int, default=1000, help="default: 1000")
    parser.add_argument("--variants", action="store_true", help="other quotas, too")
    parser.add_argument("--shapes", action="store_true", help="what else answers 429, too")
    parser.add_argument("--scenario", choices=SCENARIOS, action="append", help="only this one")
    parser.add_argument("--no-wait", action="store_true", help="wait_on_rate_limit=False, too")
    parser.add_argument("--peers", action="store_true", help="other packages, if installed, too")
    parser.add_argument("--serve", choices=SCENARIOS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.threads[0])
    clients = ["waits", "does not wait"] if args.no_wait else ["waits"]
    variants = [name for name in SCENARIOS if name not in SHAPES]
    scenarios = args.scenario or [
        *(variants if args.variants else [BASE]),
        *(SHAPES if args.shapes else ()),
    ]
    peers = installed() if args.peers else []
    print(f"{machine()}\n")
    for text in table(scenarios, clients, args.threads, args.questions, peers):
        print(text, flush=True)
    return None


if __name__ == "__main__":
    main()
