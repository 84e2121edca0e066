"""How quick fallback_llm is, as ratios to what its user would write with requests.

    python tests/benchmark.py                  # all tables, in Markdown; many minutes
    python tests/benchmark.py --quick warm     # a tenth of the rounds, one section
    python tests/benchmark.py quota failures   # how quotas are used; what becomes of faults

Program and yardstick take turns (A B A B) in one run; a figure is the median of the rounds, with
the minimum and the maximum. The server is a process of its own on loopback. The last column has
the same figure of other packages, where they are installed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import http.client
import importlib.util
import json
import logging
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, NamedTuple, Sequence

from tables import line, machine

if TYPE_CHECKING:  # loaded late, as requests is: a child's peak memory starts from its parent's
    import asyncio

    from fallback_llm import FallbackLLM

Call = Callable[[], object]

HERE, PROGRAM = Path(__file__).resolve(), "fallback_llm.py"
IMPORTS = "import argparse, dataclasses, enum, json, logging"
KEY = "csk-" + hashlib.sha512(b"benchmark").hexdigest()[:48]
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."
MANY = 10000  # pieces of the long stream
LONG = "word " * MANY
COMMON = {"id": "chatcmpl-1", "created": 1790000000, "model": "m", "system_fingerprint": "fp_1"}
POOL = "128 threads at 50 ms"


# --- The server: bytes made beforehand ----------------------------------------------------------


class Page(NamedTuple):
    """What a path is answered with, `delay` seconds after the request."""

    data: bytes
    delay: float = 0.0
    keep: bool = True  # the connection


def plain(body: object, status: str = "200 OK", more: str = "") -> bytes:
    data = json.dumps(body).encode() if body else b""
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n{more}"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def chunk(text: str, reason: str | None = None) -> bytes:
    """An event of a stream, as an HTTP chunk of its own."""
    choice = {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": reason}
    event = dict(COMMON, object="chat.completion.chunk", choices=[choice])
    data = f"data: {json.dumps(event)}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(data), data)


def stream(text: str, whole: bool = True) -> bytes:
    """An event stream, one event a word; one that is not whole ends in the middle of a chunk."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
    end = chunk("", "stop") + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n" if whole else b"ff\r\ndata"
    return b"\r\n".join([head, b"".join(map(chunk, re.findall(r"\S+\s?", text))) + end])


def pages() -> dict[str, Page]:
    """What the first part of a path stands for."""
    message = {"role": "assistant", "content": ANSWER}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    usage = {"prompt_tokens": 20, "completion_tokens": 7, "total_tokens": 27}
    whole = plain(dict(COMMON, object="chat.completion", choices=choices, usage=usage))
    error = {"error": {"message": "The service is overloaded", "type": "server_error"}}
    limited = partial(plain, error, "429 Too Many Requests")
    return {
        "json": Page(whole),
        "stream": Page(stream(ANSWER)),
        "ms50": Page(whole, 0.05),
        "ms200": Page(whole, 0.2),
        "many": Page(stream(LONG)),
        "503": Page(plain(error, "503 Service Unavailable")),
        "200-with-an-error": Page(plain(error)),
        "empty": Page(plain(None)),
        "cut": Page(stream(ANSWER, whole=False), keep=False),
        "silent": Page(b"", 3600),
        "429-no-wait": Page(limited("Retry-After: 10\r\n")),
        "window": Page(limited("Retry-After: 1\r\n")),
    }


class Server:
    """Counts the connections, by the page asked first, and the requests inside a Retry-After."""

    def __init__(self) -> None:
        self.pages, self.counts = pages(), {"early": 0}
        self.asked, self.window_end = 0, 0.0  # of "window"

    async def serve(self) -> None:
        """Prints the port, and serves until stdin ends."""
        import asyncio

        server = await asyncio.start_server(self.link, "127.0.0.1", backlog=1024)
        print((server.sockets or [])[0].getsockname()[1], flush=True)
        await asyncio.get_event_loop().run_in_executor(None, sys.stdin.read)
        os._exit(0)  # whatever still waits for an answer

    async def link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        import asyncio

        name, page = "", Page(b"")
        with contextlib.suppress(EOFError, OSError):
            while page.keep:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)\ncontent-length: (\d+)", head)
                await reader.readexactly(int(length.group(1)) if length else 0)
                first, name = not name, head.split(b"/", 2)[1].split()[0].decode()
                page = self.page(name, first)
                if page.delay:
                    await asyncio.sleep(page.delay)
                writer.write(page.data)
        writer.close()

    def page(self, name: str, first: bool) -> Page:
        if name == "counts":
            counts, self.counts = self.counts, {"early": 0}
            return Page(plain(counts))
        self.counts[name] = self.counts.get(name, 0) + first
        return self.windowed() if name == "window" else self.pages[name]

    def windowed(self) -> Page:
        """Every tenth request gets a 429, and opens a window in which requests are too early."""
        now = time.monotonic()
        early = now < self.window_end
        self.counts["early"] += early
        self.asked += not early
        if not early and self.asked % 10 == 1:
            self.window_end = now + 1
        return self.pages["window" if now < self.window_end else "json"]


# --- Yardstick and peers, as a user would write them --------------------------------------------


class Script(NamedTuple):
    """The module's name, lines that make a client, and an expression that asks it."""

    module: str
    setup: str
    ask: str
    shared: bool = True  # between threads

    def lines(self, url: str) -> str:
        messages = [{"role": "user", "content": QUESTION}]
        return f"URL, KEY, MESSAGES = {url!r}, {KEY!r}, {messages}\n{self.setup}"

    def arguments(self, url: str) -> list[str]:
        return ["-c", f"{self.lines(url)}\nprint({self.ask})"]

    def call(self, url: str) -> Call:
        """The expression as a function of this process."""
        names: dict[str, Any] = {}
        exec(f"{self.lines(url)}\ndef call(): return {self.ask}", names)  # noqa: S102 - our own
        return checked(names["call"])


BARE = Script(
    "requests",
    "import requests\nsession = requests.Session()\nheaders = {'Authorization': 'Bearer ' + KEY}\n"
    "body = {'model': 'm', 'messages': MESSAGES, 'max_tokens': 500}",
    "session.post(URL + '/chat/completions', headers=headers, json=body)"
    ".json()['choices'][0]['message']['content']",
)
WIDE = "\nsession.mount('http://', requests.adapters.HTTPAdapter(pool_maxsize=128))"
CLIENT = "base_url=URL, api_key=KEY"
CREATE = (
    "client.chat.completions.create(model='m', messages=MESSAGES, max_tokens=500)"
    ".choices[0].message.content"
)
PEERS = {
    "groq": Script("groq", f"import groq\nclient = groq.Groq({CLIENT})", CREATE),
    "openai": Script("openai", f"import openai\nclient = openai.OpenAI({CLIENT})", CREATE),
    "langchain": Script(
        "langchain_openai",
        "from langchain_openai import ChatOpenAI\n"
        f"model = ChatOpenAI(model='m', {CLIENT}, max_tokens=500)",
        "model.invoke(MESSAGES).content",
    ),
    "pydantic-ai": Script(
        "pydantic_ai",
        "from pydantic_ai import Agent\nfrom pydantic_ai.models.openai import OpenAIChatModel\n"
        "from pydantic_ai.providers.openai import OpenAIProvider\n"
        f"agent = Agent(OpenAIChatModel('m', provider=OpenAIProvider({CLIENT})))",
        "agent.run_sync(MESSAGES[0]['content'], model_settings={'max_tokens': 500}).output",
        shared=False,  # its threads hang
    ),
    "litellm": Script(
        "litellm",
        "import litellm",
        "litellm.completion('openai/m', MESSAGES, api_base=URL, api_key=KEY, max_tokens=500)"
        ".choices[0].message.content",
    ),
}


# --- Measuring ----------------------------------------------------------------------------------


class Row(NamedTuple):
    """A line of the table."""

    what: str
    figures: Sequence[float]
    target: str
    beside: str = ""
    unit: str = ""  # "": a ratio or a count
    peers: str = ""

    def cells(self) -> list[str]:
        spread = f" ({number(min(self.figures))} to {number(max(self.figures))})"
        figure = median(self.figures, self.unit) + spread * (len(self.figures) > 1)
        return [self.what, figure, self.target, self.beside, self.peers]


def number(figure: float) -> str:
    """Three digits, or the whole number of a count."""
    digits = 0 if isinstance(figure, int) or abs(figure) >= 100 else 1 if abs(figure) >= 10 else 2
    return f"{figure:.{digits}f}"


def median(figures: Sequence[float], unit: str, scale: int = 1) -> str:
    return f"{number(scale * statistics.median(figures))} {unit}".strip()


def checked(call: Call, answer: str = ANSWER) -> Call:
    """The same function, after it has given this answer."""
    told = str(call())
    if told.strip() != answer.strip():
        raise SystemExit(f"benchmark: not the answer: {told[:200]!r}")
    return call


def seconds(call: Call, times: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def in_turns(rounds: int, *measures: Callable[[], Any]) -> list[list[Any]]:
    """The figures of each measure, A B A B."""
    return [list(column) for column in zip(*([f() for f in measures] for _ in range(rounds)))]


def ratios(figures: Sequence[float], yardstick: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(figures, yardstick)]


def share(call: Call, threads: int, ideal: float, each: int = 20) -> float:
    """The percentage of the ideal speed, at which a question takes `ideal` seconds."""
    starts: list[float] = []
    barrier = threading.Barrier(threads, lambda: starts.append(time.perf_counter()))

    def ask(_: int) -> None:
        for times in (1, each):
            barrier.wait()
            seconds(call, times)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(ask, range(threads)))
    return 100 * each * ideal / (time.perf_counter() - starts[1])  # connections were open


def cpu(call: Call) -> float:
    """Microseconds of CPU per piece."""
    start = time.process_time()
    call()
    return 1e6 * (time.process_time() - start) / MANY


def growth(call: Call, times: int) -> float:
    """The MB by which Python's objects grow over so many calls."""
    tracemalloc.start()
    sizes = []
    for count in (300, times):
        seconds(call, count)
        gc.collect()
        sizes.append(tracemalloc.get_traced_memory()[0] / 1e6)
    tracemalloc.stop()
    return sizes[1] - sizes[0]


class Run(NamedTuple):
    """What a process cost."""

    time: float  # seconds
    memory: float  # MB at the peak


def spawn(arguments: Sequence[str], **streams: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, *arguments], **streams)


def run(arguments: Sequence[str], code: int = 0, output: str = "") -> Run:
    """Python with these arguments, from its start to its exit."""
    with tempfile.TemporaryFile() as out:
        start = time.perf_counter()
        child = spawn(arguments, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        _, status, usage = os.wait4(child.pid, 0)
        took = time.perf_counter() - start
        child.returncode = os.WEXITSTATUS(status)  # for Popen, which cannot learn it any more
        out.seek(0)
        told = out.read().decode()
    if child.returncode != code or output not in told:
        raise SystemExit(f"benchmark: {arguments[0]} ended with {child.returncode}:\n{told}")
    return Run(took, usage.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10))


class Bench:
    """The server, and how thorough to be."""

    def __init__(self, port: int, quick: bool = False) -> None:
        self.port, self.quick = port, quick

    def url(self, name: str, port: int | None = None) -> str:
        return f"http://127.0.0.1:{port or self.port}/{name}/v1"

    def rounds(self, count: int) -> int:
        return max(3, count // 10) if self.quick else count

    def counts(self) -> dict[str, int]:
        """What the server has counted since the last time."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("GET", "/counts")
        counts: dict[str, int] = json.loads(connection.getresponse().read().decode())
        connection.close()
        return counts

    def client(self, *urls: str, idle_timeout: float = 60.0, **retry: Any) -> FallbackLLM:
        """The module, with a provider for each URL."""
        from fallback_llm import FallbackLLM, Provider, RetryConfig

        rows = [Provider(f"p{n}", url, None, ("m",), idle_timeout) for n, url in enumerate(urls)]
        return FallbackLLM(RetryConfig(**retry), providers=rows)

    def ask(self, *urls: str, answer: str = ANSWER, **settings: Any) -> Call:
        return checked(partial(self.client(*urls, **settings).ask, QUESTION), answer)

    def peers(self, measure: str) -> str:
        """The medians of the peers, each in a process of its own."""
        cells = []
        for name, script in PEERS.items():
            if importlib.util.find_spec(script.module) and (script.shared or measure != POOL):
                command = [str(HERE), "--peer", name, measure, str(self.port)]
                child = spawn(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
                cells.append(f"{name} {child.communicate()[0].decode().strip() or 'failed'}")
        return ", ".join(cells)


# --- The sections of the table ------------------------------------------------------------------


def start(bench: Bench) -> Iterator[Row]:
    """Without a question."""
    cases = {
        "`import fallback_llm`": (["-c", "import fallback_llm"], 0),
        "`--help`": ([PROGRAM, "--help"], 0),
        "`--version`": ([PROGRAM, "--version"], 0),
        "wrong usage": ([PROGRAM, "--nonsense"], 2),
    }
    measures = [partial(run, ["-c", IMPORTS]), *(partial(run, *case) for case in cases.values())]
    in_turns(1, *measures)  # compiles the module
    times = [[run.time for run in runs] for runs in in_turns(bench.rounds(40), *measures)]
    beside = f"`{IMPORTS}`: {median(times[0], 'ms', 1000)}"
    for what, ours in zip(cases, times[1:]):
        peers = bench.peers("import") if "import" in what else ""
        yield Row(what, ratios(ours, times[0]), "1.15", beside, "", peers)


def question(bench: Bench) -> Iterator[Row]:
    """One question, from the start of the process to its exit."""
    five_lines = BARE.arguments(bench.url("json"))
    script, module = [PROGRAM, QUESTION], ["-m", PROGRAM[:-3], QUESTION]  # -m keeps the bytecode
    commands = [partial(run, line, 0, ANSWER) for line in (five_lines, script, module)]
    runs = in_turns(bench.rounds(30) + 1, *commands)
    for field, unit in ("time", "s"), ("memory", "MB"):
        yardstick, *others = [[getattr(run, field) for run in column[1:]] for column in runs]
        beside = f"five lines with requests: {median(yardstick, unit)}"
        for ours, how in zip(others, (PROGRAM, f"-m {PROGRAM[:-3]}")):
            peers = bench.peers(field) if how == PROGRAM else ""
            what = f"one question, `python {how}`, {field}"
            yield Row(what, ratios(ours, yardstick), "1.15", beside, "", peers)


def warm(bench: Bench) -> Iterator[Row]:
    """A server that answers at once."""
    calls = [BARE.call(bench.url("json")), *(bench.ask(bench.url(p)) for p in ("json", "stream"))]
    times = in_turns(bench.rounds(60), *(partial(seconds, call, 50) for call in calls))
    beside = f"`session.post(...).json()`: {median(times[0], 'µs', 10**6)}"
    for what, ours in zip(("JSON", "event stream"), times[1:]):
        peers = bench.peers("warm") if what == "JSON" else ""
        yield Row(f"warm `ask()`, {what}", ratios(ours, times[0]), "1.0", beside, "", peers)


def threads(bench: Bench) -> Iterator[Row]:
    """Many threads share one object."""
    for count, milliseconds, target in (32, 200, "at least 97 %"), (128, 50, ""):
        name, ideal = f"ms{milliseconds}", milliseconds / 1000
        bare = BARE._replace(setup=BARE.setup + WIDE).call(bench.url(name))
        bench.counts()
        ask = bench.ask(bench.url(name))
        share(ask, count, ideal, 2)
        opened = bench.counts()[name]
        measures = [partial(share, call, count, ideal) for call in (ask, bare)]
        ours, yardstick = in_turns(bench.rounds(8), *measures)
        what = f"{count} threads at {milliseconds} ms"
        beside = f"requests, a pool of 128: {median(yardstick, '%')}"
        yield Row(f"{what}, share of the ideal", ours, target, beside, "%")
        peers = bench.peers(what) if what == POOL else ""
        yield Row(f"{what}, speed", ratios(ours, yardstick), "at least 1.0", beside, "", peers)
        yield Row(f"{what}, connections", [opened], str(count))


def pieces(bench: Bench) -> Iterator[Row]:
    """A long stream."""
    import requests

    session, url = requests.Session(), bench.url("many")

    def bare() -> str:
        with session.post(f"{url}/chat/completions", json={}, stream=True) as reply:
            lines = [line[6:] for line in reply.iter_lines() if line.startswith(b"data: {")]
        return "".join(json.loads(x)["choices"][0]["delta"].get("content", "") for x in lines)

    llm = bench.client(url)
    calls: list[Call] = [bare, partial(llm.ask, QUESTION), lambda: "".join(llm.stream(QUESTION))]
    measures = [partial(cpu, checked(call, LONG)) for call in calls]
    yardstick, *others = in_turns(bench.rounds(20), *measures)
    beside = f"`iter_lines()`, `json.loads`: {median(yardstick, 'µs')}"
    for name, ours in zip(("ask", "stream"), others):
        yield Row(f"CPU per piece of {MANY}, `{name}()`", ours, "10 µs", beside, "µs")


def memory(bench: Bench) -> Iterator[Row]:
    """What stays behind."""
    for what, name, answer in ("questions", "json", ANSWER), ("failing questions", "503", ""):
        count = bench.rounds(20000)
        ask = bench.ask(bench.url(name), answer=answer, max_attempts=1)
        yield Row(f"growth over {count} {what}", [growth(ask, count)], "0.5", "tracemalloc", "MB")


def fallback(bench: Bench) -> Iterator[Row]:
    """A new object each time: its first provider fails, the second one answers."""
    import requests

    def bare(*urls: str) -> None:
        session = requests.Session()
        for url in urls:
            with contextlib.suppress(requests.RequestException):
                session.post(f"{url}/chat/completions", json={"messages": [QUESTION]})

    with socket.socket() as nobody:  # bound, but it does not listen
        nobody.bind(("127.0.0.1", 0))
        for fault in ("refused", "503", "200-with-an-error", "empty", "cut", "429-no-wait"):
            port = nobody.getsockname()[1] if fault == "refused" else None
            urls = (bench.url(fault, port), bench.url("json"))
            ask = partial(bench.ask, *urls, wait_on_rate_limit=fault != "429-no-wait")
            measures = (partial(seconds, ask), partial(seconds, partial(bare, *urls)))
            ours, yardstick = in_turns(bench.rounds(100), *measures)
            beside = f"the same two posts: {median(yardstick, 'ms', 1000)}"
            yield Row(f"first provider: {fault}", ratios(ours, yardstick), "1.5", beside)


def waits(bench: Bench) -> Iterator[Row]:
    """Silence, and Retry-After."""
    urls = [bench.url(name) for name in ("silent", "window", "json")]
    silent = partial(bench.ask, urls[0], urls[2], idle_timeout=0.5)
    late = [1000 * (seconds(silent) - 0.5) for _ in range(bench.rounds(30))]
    yield Row("first provider: silent, time beyond it", late, "50 ms", "", "ms")
    for what, chosen in ("not waiting", urls[1:]), ("waiting", urls[1:2]):
        ask = bench.ask(*chosen, wait_on_rate_limit=what == "waiting", base_delay=0.1)
        for _ in range(50):
            checked(ask)
            time.sleep(0.05)  # so that windows end and begin
        early = bench.counts()["early"]
        yield Row(f"requests inside a Retry-After, 50 questions, {what}", [early], "0")


SECTIONS = {
    f.__name__: f for f in (start, question, warm, threads, pieces, memory, fallback, waits)
}


# --- Tables of their own: see quota.py and faults.py ----------------------------------------------


def quota(quick: bool) -> Iterator[str]:
    """How well a batch uses rate-limited quotas, beside the peers that are installed."""
    from quota import BASE, OURS, SHAPES, installed, table

    count = 200 if quick else 1000
    yield from table([BASE], list(OURS), [8, 32, 128], count, installed())
    yield ""
    yield from table(list(SHAPES), ["waits"], [], count, installed())


def failures(quick: bool) -> Iterator[str]:
    """What becomes of 23 faults, in each client that is installed."""
    from faults import installed, measure, table

    clients = installed()[:1] if quick else installed()
    yield from table([measure(name) for name in clients])


TABLES = {f.__name__: f for f in (quota, failures)}


def peer(name: str, measure: str, bench: Bench) -> str:
    """The peer's figure, beside the same yardstick."""
    scripts = (PEERS[name], BARE._replace(setup=BARE.setup + WIDE))
    if measure == POOL:
        measures = [partial(share, s.call(bench.url("ms50")), 128, 0.05, 5) for s in scripts]
    elif measure == "warm":
        measures = [partial(seconds, s.call(bench.url("json")), 10) for s in scripts]
    else:
        commands = [s.arguments(bench.url("json")) for s in scripts]
        if measure == "import":
            commands = [["-c", f"import {PEERS[name].module}"], ["-c", IMPORTS]]
        field = Run._fields.index("memory" if measure == "memory" else "time")
        measures = [lambda c=c: run(c)[field] for c in commands]  # type: ignore[misc]
    return median(ratios(*in_turns(3, *measures)), "")


# --- The program --------------------------------------------------------------------------------


def environment(port: int) -> None:
    """For this process and its children: nothing of the user's, and nobody's key."""
    for name in list(os.environ):
        if re.search("(?i)proxy|groq|openrouter|pythondontwrite", name):
            del os.environ[name]
    os.environ["CEREBRAS_API_KEY"] = KEY
    os.environ["CEREBRAS_BASE_URL"] = f"http://127.0.0.1:{port}/stream/v1"
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else its import asks the internet


def table(sections: Sequence[str], quick: bool) -> Iterator[Sequence[str]]:
    """The rows, measured on a copy of the program: no .env beside it, its bytecode kept."""
    yield "What", "Median (min to max)", "Target", "Beside", "Others"
    yield ["---"] * 5
    server = spawn([str(HERE), "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout  # for mypy
    with tempfile.TemporaryDirectory() as folder, server:
        port = int(server.stdout.readline())
        environment(port)
        shutil.copy(str(HERE.parent.parent / PROGRAM), folder)
        sys.path.insert(0, folder)
        os.chdir(folder)
        for name in sections:
            print(f"benchmark: {name} ...", file=sys.stderr)
            for row in SECTIONS[name](Bench(port, quick)):
                yield row.cells()


def lines(names: Sequence[str], quick: bool) -> Iterator[str]:
    """All that is printed for these sections and tables."""
    sections = [name for name in names if name in SECTIONS]
    if sections:
        for cells in table(sections, quick):
            yield line(*cells)
    for name in names:
        if name in TABLES:
            print(f"benchmark: {name} ...", file=sys.stderr)
            yield ""
            yield from TABLES[name](quick)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures fallback_llm beside requests.")
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds")
    names = [*SECTIONS, *TABLES]
    parser.add_argument("sections", nargs="*", help=f"some of: {', '.join(names)}")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--peer", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        import asyncio

        return asyncio.run(Server().serve())
    if args.peer:
        return print(peer(args.peer[0], args.peer[1], Bench(int(args.peer[2]))))
    logging.getLogger("fallback_llm").addHandler(logging.NullHandler())
    print(f"{machine()}\n")
    unknown = set(args.sections).difference(names)
    if unknown:
        parser.error(f"unknown section: {', '.join(sorted(unknown))}")
    for text in lines(args.sections or names, args.quick):
        print(text, flush=True)
    return None


if __name__ == "__main__":
    main()
