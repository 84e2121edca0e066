"""How well a batch uses rate-limited quotas: a thousand questions from many threads.

    python tests/quota.py                           # 8, 32, 128 threads; a minute
    python tests/quota.py --variants --no-wait      # other quotas; wait_on_rate_limit=False too
    python tests/quota.py --peers --threads 32      # beside other packages, if installed

Three providers have quotas like those of free accounts, but a minute lasts `MINUTE` seconds. The
server's hints and the clients' delays between attempts, which are meant for real minutes, shrink
alike; idle timeouts and what else is constant in a client do not. The server is a process of its
own on loopback. Each line of the table has

- the share of the ideal: how fast the answers came, compared with a client that knows the quotas
  (it has as many threads, and needs no time itself);
- refused: how many requests got a 429, which free quotas count like the others, per 100 answers;
- lost: questions without an answer.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import importlib
import importlib.util
import json
import logging
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence

from emulator import DIALECTS, Count, Emulator, Quota, Reply, admit

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for `import fallback_llm`

from fallback_llm import PROVIDERS, FallbackLLM, FallbackLLMError, RetryConfig

Ask = Callable[[str], bool]  # whether the question got an answer
Quotas = Dict[str, List[Quota]]  # by target, as in Emulator.limit

MINUTE = 3.0  # seconds
SHRUNK = MINUTE / 60.0
DELAYS = {"cerebras": 0.05, "groq": 0.06, "openrouter": 0.1}  # of replies
MODELS = {row.name: row.models for row in PROVIDERS}
QUESTION = "What is the capital of France? (question {})"
MAX_TOKENS = 500


# --- The scenarios ------------------------------------------------------------------------------


class Scenario(NamedTuple):
    """What limits the questions, and how long an answer takes by provider."""

    quotas: Callable[[], Quotas]  # new ones at each call
    slower: float = 1.0
    per_thread: float = 0.0  # with many threads answers take longer, so that this machine keeps up

    def delays(self, threads: int) -> dict[str, float]:
        least = self.per_thread * threads
        return {name: max(self.slower * delay, least) for name, delay in DELAYS.items()}


def free_tier(groq_tokens: int = 100000, told: bool = True, **more: Any) -> Quotas:
    """Requests per minute: 30 of each Cerebras and Groq model, 20 of an OpenRouter account.

    The other quotas are there for their headers; `groq_tokens` can make Groq's tokens the tighter
    limit. more: of the requests per minute.
    """
    minute = partial(Quota, window=MINUTE, told=told, **more)
    tokens = partial(Quota, window=MINUTE, counts="tokens", told=told)
    day = partial(Quota, window=86400 * SHRUNK, per="day", told=told)
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


def ideal(scenario: Scenario, threads: int, questions: int) -> float:
    """Seconds until a client that knows the quotas has all answers.

    Whenever a thread is free and some model has quota left, it asks: the quickest of those.
    """
    quotas, delays = scenario.quotas(), scenario.delays(threads)
    body = {"messages": _messages(QUESTION.format(questions)), "max_tokens": MAX_TOKENS}
    candidates = [
        (delays[name], [*quotas.get(name, []), *quotas.get(f"{name}/{model}", [])])
        for name, models in MODELS.items()
        for model in models
    ]
    candidates.sort(key=lambda candidate: candidate[0])
    now, asked = 0.0, 0
    replies: list[float] = []  # when those that are under way will come; a heap
    while asked < questions:
        waits = []
        for delay, limits in candidates:
            while asked < questions and len(replies) < threads:
                refused = admit(limits, body, now)
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
SDK_DELAYS = (0.5 * SHRUNK, 8.0 * SHRUNK)  # the first one, the longest
PEER_THREADS = 32


def _messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def _endpoints(url: str) -> list[tuple[dict[str, Any], str]]:
    """What the SDK needs to know of each model's server, and the model."""
    return [
        ({"base_url": url + dialect.path, "api_key": dialect.key}, model)
        for dialect in DIALECTS
        for model in MODELS[dialect.name]
    ]


def ours(url: str, wait: bool) -> Ask:
    """The module, with its defaults in shrunk minutes; nothing of the user's counts."""
    for dialect in DIALECTS:
        prefix = dialect.name.upper()
        os.environ[f"{prefix}_API_KEY"] = dialect.key
        os.environ[f"{prefix}_BASE_URL"] = url
        os.environ[f"{prefix}_MODELS"] = ",".join(MODELS[dialect.name])
    retry = RetryConfig(base_delay=2.0 * SHRUNK, max_delay=60.0 * SHRUNK, wait_on_rate_limit=wait)
    llm = FallbackLLM(retry)

    def ask(question: str) -> bool:
        try:
            return bool(llm.complete(question, MAX_TOKENS).text)
        except FallbackLLMError:
            return False

    return ask


def openai_loop(url: str) -> Ask:
    """One model after the other, each with the retries of the SDK."""
    openai = _openai()
    clients = [(openai.OpenAI(**server), model) for server, model in _endpoints(url)]

    def ask(question: str) -> bool:
        for client, model in clients:
            with contextlib.suppress(openai.APIError):
                reply = client.chat.completions.create(
                    model=model, messages=_messages(question), max_tokens=MAX_TOKENS
                )
                return bool(reply.choices[0].message.content)
        return False

    return ask


def langchain(url: str) -> Ask:
    """`with_fallbacks`, over models that have the retries of the SDK."""
    openai = _openai()
    chat = importlib.import_module("langchain_openai").ChatOpenAI
    first, *others = [
        chat(model=model, max_tokens=MAX_TOKENS, max_retries=SDK_RETRIES, **server)
        for server, model in _endpoints(url)
    ]
    chain = first.with_fallbacks(others)

    def ask(question: str) -> bool:
        with contextlib.suppress(openai.APIError):
            return bool(chain.invoke(_messages(question)).content)
        return False

    return ask


def litellm_router(url: str) -> Ask:
    """A Router with the models as deployments of one model, and cooldowns as by default."""
    first, longest = SDK_DELAYS
    os.environ["INITIAL_RETRY_DELAY"], os.environ["MAX_RETRY_DELAY"] = str(first), str(longest)
    os.environ["JITTER"] = str(0.75 * SHRUNK)
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else its import asks the internet
    openai = _openai()
    litellm: Any = importlib.import_module("litellm")
    litellm.suppress_debug_info = True
    # It reads a Retry-After of whole seconds only, and those of a shrunk minute have fractions.
    utils: Any = importlib.import_module("litellm.utils")
    utils._get_retry_after_from_exception_header = _retry_after
    deployments = [
        {"model_name": "any", "litellm_params": {"model": f"openai/{model}", **server}}
        for server, model in _endpoints(url)
    ]
    router = litellm.Router(
        model_list=deployments,
        num_retries=len(deployments) * (1 + SDK_RETRIES) - 1,
        cooldown_time=5.0 * SHRUNK,
    )

    def ask(question: str) -> bool:
        with contextlib.suppress(openai.APIError, ValueError):  # the latter: all are in cooldown
            reply = router.completion("any", _messages(question), max_tokens=MAX_TOKENS)
            return bool(reply.choices[0].message.content)
        return False

    return ask


def _openai() -> Any:
    """The SDK, with its delays shrunk."""
    base: Any = importlib.import_module("openai._base_client")
    base.INITIAL_RETRY_DELAY, base.MAX_RETRY_DELAY = SDK_DELAYS
    return importlib.import_module("openai")


def _retry_after(response_headers: Any = None) -> float:
    """Seconds; -1, as LiteLLM has it, if no header tells."""
    return float((response_headers or {}).get("retry-after", -1))


OURS: dict[str, Callable[[str], Ask]] = {
    "waits": partial(ours, wait=True),
    "does not wait": partial(ours, wait=False),
}
PEERS: dict[str, Callable[[str], Ask]] = {
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
    questions: int
    answers: int
    refused: int  # requests
    took: float  # seconds
    ideal: float  # seconds

    @property
    def share(self) -> float:
        """Percent of the ideal throughput."""
        return 100.0 * self.ideal / self.took * self.answers / self.questions

    @property
    def refused_per_100(self) -> float:
        return 100.0 * self.refused / max(1, self.answers)

    def cells(self) -> list[str]:
        return [
            self.scenario,
            self.client,
            str(self.threads),
            f"{self.share:.1f} %",
            f"{self.refused_per_100:.1f}",
            str(self.questions - self.answers),
            f"{self.took:.1f} s ({self.ideal:.1f} s)",
        ]


HEADINGS = "Scenario", "Client", "Threads", "Of the ideal", "Refused/100", "Lost", "Took (ideal)"


def measure(name: str, client: str, threads: int, questions: int) -> Result:
    """All questions of one batch."""
    os.environ["NO_PROXY"] = "127.0.0.1"
    server = Server(name, threads)
    try:
        ask = {**OURS, **PEERS}[client](server.url)
        asked = [QUESTION.format(number) for number in range(questions)]
        start = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            answers = sum(pool.map(ask, asked))
        took = time.perf_counter() - start
    finally:
        counts = server.stop()
    refused = sum(count.refused for count in counts.values())
    best = ideal(SCENARIOS[name], threads, questions)
    return Result(name, client, threads, questions, answers, refused, took, best)


def results(
    scenarios: Sequence[str], clients: Sequence[str], threads: Sequence[int], questions: int
) -> Iterator[Result]:
    """Every scenario with every client and number of threads, one after the other."""
    for name in scenarios:
        for client in clients:
            for count in threads:
                yield measure(name, client, count, questions)


def table(
    scenarios: Sequence[str],
    clients: Sequence[str],
    threads: Sequence[int],
    questions: int,
    has_peers: bool,
) -> Iterator[str]:
    """The lines of the table, in Markdown; the peers that are installed come last."""
    logging.getLogger("fallback_llm").addHandler(logging.NullHandler())
    yield f"| {' | '.join(HEADINGS)} |"
    yield f"|{'---|' * len(HEADINGS)}"
    for result in results(scenarios, clients, threads, questions):
        yield f"| {' | '.join(result.cells())} |"

    peers = [name for name in PEERS if has_peers and importlib.util.find_spec(name)]
    for result in results(scenarios[:1], peers, [PEER_THREADS], questions):
        yield f"| {' | '.join(result.cells())} |"


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures how well a batch uses its quotas.")
    parser.add_argument("--threads", type=numbers, default=[8, 32, 128], help="default: 8,32,128")
    parser.add_argument("--questions", type=int, default=1000, help="default: 1000")
    parser.add_argument("--variants", action="store_true", help="all scenarios, not the first only")
    parser.add_argument("--scenario", choices=SCENARIOS, action="append", help="only this one")
    parser.add_argument("--no-wait", action="store_true", help="wait_on_rate_limit=False, too")
    parser.add_argument("--peers", action="store_true", help="other packages, if installed, too")
    parser.add_argument("--serve", choices=SCENARIOS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.threads[0])
    clients = ["waits", "does not wait"] if args.no_wait else ["waits"]
    scenarios = args.scenario or (list(SCENARIOS) if args.variants else [BASE])
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    print(f"Python {platform.python_version()}, {machine}, {time.strftime('%Y-%m-%d')}\n")
    for line in table(scenarios, clients, args.threads, args.questions, args.peers):
        print(line, flush=True)
    return None


if __name__ == "__main__":
    main()
