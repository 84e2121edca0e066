"""How LLM clients with fallbacks handle 23 faults of the first provider.

    python tests/faults.py                   # all installed clients, one Markdown table; minutes
    python tests/faults.py --each litellm    # one client, with the outcome of every fault

Two endpoints on loopback serve the same API. The first has the fault, the second always answers
"The capital of France is Paris." Each client asks its question about every fault twice, buffered
and streamed, and each outcome is one of:

- rescued: exactly that answer came back, from the second endpoint or from a retry of the first;
- reported: an exception was raised, possibly after part of a stream;
- passed off as a success: anything else came back without an exception;
- hung: the client was still busy after BUDGET seconds.

A stream that breaks after its first text cannot be rescued; reporting it is the best outcome.

Each client uses the fallbacks of its documentation (see "The clients"), and the timeouts that it
offers. The peers have their retries turned off: with a fallback at hand, they rescue more that way.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, AsyncIterator, Callable, Iterator, NamedTuple, Sequence

from emulator import DONE, Emulator, Reply, document, error, events, rate_limited
from tables import line

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
HALF = "The capital of"

BUDGET = 10.0  # seconds for a question
MARGIN = 1.0  # a client counts as hung this many seconds after the budget is spent
IDLE_TIMEOUT = 1.0  # seconds without a byte (without text, where a client can tell)
AT_ONCE = 4  # concurrent questions; many more, and healthy endpoints time out as well

HERE = Path(__file__).resolve()
ROOT = HERE.parent.parent
DIALECT, PATH = "groq", "/openai/v1"  # its replies are the closest to OpenAI's own
KEY = Emulator().environment()["GROQ_API_KEY"]
MODES = ("buffered", "streamed")
OUTCOMES = ("rescued", "reported", "passed off as a success", "hung")
RESCUED, REPORTED, PASSED_OFF, HUNG = OUTCOMES


class Cell(NamedTuple):
    """What one client did about one fault."""

    outcome: str  # one of OUTCOMES
    evidence: str  # the exception, or the text that came back


class Results(NamedTuple):
    """What one client did about every fault."""

    client: str
    version: str
    cells: dict[str, dict[str, Cell]]  # by mode and fault

    def tally(self, mode: str, outcome: str) -> int:
        return sum(cell.outcome == outcome for cell in self.cells[mode].values())


# --- The faults ---------------------------------------------------------------------------------


class Fault(NamedTuple):
    """The replies of the first endpoint; the last one repeats. Without any, nobody listens."""

    plain: list[Reply]  # to a request for a JSON document
    stream: list[Reply]  # to a request for a stream


def everywhere(*replies: Reply) -> Fault:
    return Fault(list(replies), list(replies))


def transport(name: str) -> Fault:
    """A fault that the emulator knows by this name."""
    return everywhere(Reply(text=ANSWER, fault=name))


def raw(plain: object, stream: Sequence[str], fault: str = "") -> Fault:
    """A body that no provider sends on purpose, as a document and as the events of a stream."""
    body = plain if isinstance(plain, str) else json.dumps(plain)
    headers = {"content-type": "text/event-stream"}
    streamed = Reply(body="".join(stream), headers=headers, fault=fault)
    return Fault([Reply(body=body, fault=fault)], [streamed])


def cut_short() -> Fault:
    """Half a body, which ends 100 bytes short of its Content-Length."""
    whole = json.dumps(document(DIALECT, Reply(text=ANSWER)))
    half = events(DIALECT, Reply(text=ANSWER))[:3]
    return raw(whole[: len(whole) // 2], half, fault="short")


def error_midway() -> Fault:
    """Half an answer, then an error, in the form that OpenRouter documents."""
    trouble = {"code": 502, "message": "The upstream provider hung up"}
    body = document(DIALECT, Reply(text=HALF, finish_reason="error"))
    body["choices"][0]["error"] = trouble
    half = events(DIALECT, Reply(text=ANSWER))[:3]
    choice = {"index": 0, "delta": {"content": ""}, "finish_reason": "error"}
    chunk = dict(body, object="chat.completion.chunk", error=trouble, choices=[choice])
    return raw(body, [*half, f"data: {json.dumps(chunk)}\n\n", DONE])


FAULTS: dict[str, Fault] = {
    # the connection
    "connection refused": everywhere(),
    "connection reset": transport("reset"),
    "silence": transport("silence"),
    "keep-alives for ever": transport("keep-alives"),
    # half an answer
    "stalled midway": transport("stall"),
    "reset midway": transport("reset-midway"),
    "cut midway": transport("cut"),
    "shorter than its Content-Length": cut_short(),
    "error midway": error_midway(),
    "malformed JSON": transport("malformed"),
    # a status of 200, and no answer
    "empty body": transport("empty"),
    "HTML page": transport("html"),
    "200 with an error object": everywhere(
        Reply(body={"error": {"message": "The service is overloaded", "type": "server_error"}})
    ),
    "no choices": transport("no-choices"),
    "no content": everywhere(Reply(text="")),  # null in a document, no piece in a stream
    "only white space": everywhere(Reply(text=" \n\n")),
    "only reasoning": everywhere(
        Reply(text="", reasoning="The user asks for a capital.", finish_reason="length")
    ),
    # an error status
    "429, Retry-After 1 s": everywhere(rate_limited(DIALECT, 1), Reply(text=ANSWER)),
    "429, Retry-After 60 s": everywhere(rate_limited(DIALECT, 60)),
    "429 without a hint": everywhere(rate_limited(DIALECT, how="none")),
    "503 overloaded": everywhere(error(DIALECT, "overloaded")),
    "401 key refused": everywhere(error(DIALECT, "bad_key")),
    "404 model gone": everywhere(error(DIALECT, "gone")),
}


# --- The clients: a function for each mode, which gets the endpoints in order -------------------


class Endpoint(NamedTuple):
    """An OpenAI-compatible API, and the model to ask for."""

    url: str
    model: str


Endpoints = Sequence[Endpoint]


class Client(NamedTuple):
    """A way to ask a question with a fallback."""

    package: str  # its name on PyPI
    ask: Callable[[Endpoints], object]
    stream: Callable[[Endpoints], Iterator[Any]]
    always_streams: bool = False  # requests a stream in both modes


def messages() -> list[dict[str, str]]:
    return [{"role": "user", "content": QUESTION}]


def fallback_llm(endpoints: Endpoints) -> Any:
    """Our client. `timeout` limits the whole question.

    Without it, a 429 that has no hint is retried for 30 seconds before the next endpoint is asked.
    """
    module = importlib.import_module("fallback_llm")
    rows = [
        module.Provider(model, url, "GROQ_API_KEY", (model,), IDLE_TIMEOUT)
        for url, model in endpoints
    ]
    keys = {model: KEY for _, model in endpoints}
    return module.FallbackLLM(providers=rows, api_keys=keys, timeout=BUDGET)


def fallback_llm_ask(endpoints: Endpoints) -> object:
    return fallback_llm(endpoints).complete(QUESTION).text


def fallback_llm_stream(endpoints: Endpoints) -> Iterator[Any]:
    yield from fallback_llm(endpoints).stream(QUESTION)


def openai_sdk(endpoint: Endpoint) -> Any:
    """One endpoint. The SDK has no fallbacks of its own, so the user writes a loop."""
    module = importlib.import_module("openai")
    return module.OpenAI(
        base_url=endpoint.url, api_key=KEY, timeout=IDLE_TIMEOUT, max_retries=0
    ).chat.completions


def openai_ask(endpoints: Endpoints) -> object:
    """The usual loop: on an error of the SDK, the next endpoint."""
    openai = importlib.import_module("openai")
    failures = []
    for endpoint in endpoints:
        try:
            reply = openai_sdk(endpoint).create(model=endpoint.model, messages=messages())
            return reply.choices[0].message.content
        except openai.OpenAIError as problem:
            failures.append(problem)
    raise failures[-1]


def openai_stream(endpoints: Endpoints) -> Iterator[Any]:
    """The same loop, with no fallback after the first text."""
    openai = importlib.import_module("openai")
    failures = []
    for endpoint in endpoints:
        started = False
        try:
            completions = openai_sdk(endpoint)
            for chunk in completions.create(model=endpoint.model, messages=messages(), stream=True):
                if chunk.choices and chunk.choices[0].delta.content:
                    started = True
                    yield chunk.choices[0].delta.content
            return
        except openai.OpenAIError as problem:
            if started:
                raise
            failures.append(problem)
    raise failures[-1]


def langchain(endpoints: Endpoints) -> Any:
    """`with_fallbacks()`, with the retries of the models turned off.

    `stream_chunk_timeout` is not fooled by keep-alives, but works in asynchronous streams only.
    """
    module = importlib.import_module("langchain_openai")
    first, *others = [
        module.ChatOpenAI(
            model=model,
            base_url=url,
            api_key=KEY,
            timeout=IDLE_TIMEOUT,
            stream_chunk_timeout=IDLE_TIMEOUT,
            max_retries=0,
        )
        for url, model in endpoints
    ]
    return first.with_fallbacks(others)


def langchain_ask(endpoints: Endpoints) -> object:
    return langchain(endpoints).invoke(QUESTION).content


def langchain_stream(endpoints: Endpoints) -> Iterator[Any]:
    async def pieces() -> AsyncIterator[Any]:
        async for chunk in langchain(endpoints).astream(QUESTION):
            yield chunk.content

    return collected(pieces())


def litellm(endpoints: Endpoints) -> Any:
    """The Router with `fallbacks`.

    With its default of two retries, it would wait out the Retry-After of 60 seconds.
    """
    module = importlib.import_module("litellm")
    rows = []
    for url, model in endpoints:
        target = {"model": f"openai/{model}", "api_base": url, "api_key": KEY}
        rows.append({"model_name": model, "litellm_params": target})
    first, second = [endpoint.model for endpoint in endpoints]
    return module.Router(
        model_list=rows,
        fallbacks=[{first: [second]}],
        num_retries=0,
        timeout=IDLE_TIMEOUT,
        stream_timeout=IDLE_TIMEOUT,
    )


def litellm_ask(endpoints: Endpoints) -> object:
    reply = litellm(endpoints).completion(model=endpoints[0].model, messages=messages())
    return reply.choices[0].message.content


def litellm_stream(endpoints: Endpoints) -> Iterator[Any]:
    router = litellm(endpoints)
    for chunk in router.completion(model=endpoints[0].model, messages=messages(), stream=True):
        if chunk.choices:
            yield chunk.choices[0].delta.content or ""


def pydantic_ai(endpoints: Endpoints) -> Any:
    """FallbackModel, with its default `fallback_on`, and the retries of the SDK turned off.

    `request_timeout` is a deadline for each model, so each one gets half of the budget.
    """
    agents = importlib.import_module("pydantic_ai")
    models = importlib.import_module("pydantic_ai.models.openai")
    providers = importlib.import_module("pydantic_ai.providers.openai")
    fallback = importlib.import_module("pydantic_ai.models.fallback")
    openai = importlib.import_module("openai")
    chain = []
    for url, model in endpoints:
        sdk = openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0)
        provider = providers.OpenAIProvider(openai_client=sdk)
        chain.append(models.OpenAIChatModel(model, provider=provider))
    settings = {
        "timeout": IDLE_TIMEOUT,
        "first_event_timeout": IDLE_TIMEOUT,
        "request_timeout": BUDGET / len(endpoints),
    }
    return agents.Agent(fallback.FallbackModel(*chain), model_settings=settings)


def pydantic_ai_ask(endpoints: Endpoints) -> object:
    async def ask() -> object:
        result: Any = await pydantic_ai(endpoints).run(QUESTION)
        return result.output

    return asyncio.run(ask())


def pydantic_ai_stream(endpoints: Endpoints) -> Iterator[Any]:
    async def pieces() -> AsyncIterator[Any]:
        async with pydantic_ai(endpoints).run_stream(QUESTION) as result:
            async for piece in result.stream_text(delta=True):
                yield piece

    return collected(pieces())


def collected(pieces: AsyncIterator[Any]) -> Iterator[Any]:
    """The pieces of an asynchronous stream, once it has ended."""

    async def collect() -> list[Any]:
        return [piece async for piece in pieces]

    return iter(asyncio.run(collect()))


OURS = "fallback_llm"
CLIENTS: dict[str, Client] = {
    OURS: Client("fallback-llm", fallback_llm_ask, fallback_llm_stream, always_streams=True),
    "openai": Client("openai", openai_ask, openai_stream),
    "langchain": Client("langchain-openai", langchain_ask, langchain_stream),
    "litellm": Client("litellm", litellm_ask, litellm_stream),
    "pydantic-ai": Client("pydantic-ai-slim", pydantic_ai_ask, pydantic_ai_stream),
}
MODULES = {"langchain": "langchain_openai", "pydantic-ai": "pydantic_ai"}  # else the same name


def installed() -> list[str]:
    """The names of the clients that are available here."""
    return [
        name
        for name in CLIENTS
        if name == OURS or importlib.util.find_spec(MODULES.get(name, name))
    ]


def version(name: str) -> str:
    if name == OURS:
        return str(importlib.import_module(OURS).__version__)
    metadata = importlib.import_module("importlib.metadata")  # not there on Python 3.7
    return str(metadata.version(CLIENTS[name].package))


# --- Measuring ----------------------------------------------------------------------------------


def cell(client: Client, mode: str, fault: Fault) -> Cell:
    """What the client does about the fault, which gets a server of its own."""
    told: list[Cell] = []

    def ask() -> None:
        told.append(judged(client, mode, endpoints))

    with Emulator() as emulator, socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # it does not listen, and nobody else can
        first = emulator.url
        streams = mode == "streamed" or client.always_streams
        replies = fault.stream if streams else fault.plain
        if not replies:
            first = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        emulator.plan(f"{DIALECT}/first", *replies)
        emulator.plan(f"{DIALECT}/second", Reply(text=ANSWER))
        emulator.plan(f"{DIALECT}/models", Reply(body={"data": []}))  # no other model would do
        endpoints = [Endpoint(first + PATH, "first"), Endpoint(emulator.url + PATH, "second")]
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(BUDGET + MARGIN)
        return told[0] if told else Cell(HUNG, "")


def judged(client: Client, mode: str, endpoints: Endpoints) -> Cell:
    """What comes of the question, as soon as something does."""
    pieces = []
    try:
        if mode == "streamed":
            for piece in client.stream(endpoints):
                pieces.append(piece)
            text: object = "".join(pieces)
        else:
            text = client.ask(endpoints)
    except Exception as problem:  # noqa: BLE001 - whatever it raises is the result
        after = f" after {''.join(pieces)!r}" if pieces else ""
        return Cell(REPORTED, f"{type(problem).__name__}{after}: {problem}")
    if isinstance(text, str) and text.strip() == ANSWER:
        return Cell(RESCUED, "")
    return Cell(PASSED_OFF, repr(text))


def measure_here(name: str) -> Results:
    """The results of one client, measured in this process. Threads that hang stay behind."""
    client = CLIENTS[name]
    healthy = everywhere(Reply(text=ANSWER))
    for mode in MODES:  # is it set up correctly? The modules are imported here, too
        first = cell(client, mode, healthy)
        if first.outcome != RESCUED:
            raise SystemExit(f"faults: {name}, {mode}, without a fault: {': '.join(first)}")
    jobs = [(mode, fault) for mode in MODES for fault in FAULTS]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        cells = list(pool.map(lambda job: cell(client, job[0], FAULTS[job[1]]), jobs))
    by_mode: dict[str, dict[str, Cell]] = {mode: {} for mode in MODES}
    for (mode, fault), found in zip(jobs, cells):
        by_mode[mode][fault] = found
    return Results(name, version(name), by_mode)


def measure(name: str, folder: Path = ROOT) -> Results:
    """The results of one client, measured in a process of its own.

    folder: where fallback_llm.py is.
    """
    environment = dict(
        os.environ,
        NO_PROXY="127.0.0.1",
        no_proxy="127.0.0.1",
        LITELLM_LOCAL_MODEL_COST_MAP="True",  # else its import asks the internet
    )
    command = [sys.executable, str(HERE), "--here", "--folder", str(folder), name]
    limit = len(MODES) * len(FAULTS) * (BUDGET + MARGIN)
    child = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=limit,
    )
    if child.returncode:
        raise SystemExit(f"faults: {name} failed:\n{child.stderr.decode(errors='replace')[-2000:]}")
    client, released, found = json.loads(child.stdout.decode())
    cells = {
        mode: {fault: Cell(*pair) for fault, pair in faults.items()}
        for mode, faults in found.items()
    }
    return Results(client, released, cells)


# --- The program --------------------------------------------------------------------------------


def table(results: Sequence[Results]) -> Iterator[str]:
    """The lines of a Markdown table: how many faults had which outcome."""
    yield line("Client", "Mode", *(outcome.capitalize() for outcome in OUTCOMES))
    yield line(*["---"] * 2, *["---:"] * len(OUTCOMES))
    for mode in MODES:
        for result in results:
            counts = [str(result.tally(mode, outcome)) for outcome in OUTCOMES]
            yield line(f"{result.client} {result.version}", mode, *counts)


def every_cell(results: Sequence[Results]) -> Iterator[str]:
    """The lines of a Markdown table for each mode: the outcome of every fault."""
    for mode in MODES:
        yield ""
        yield line(f"Fault, {mode}", *(result.client for result in results))
        yield line(*["---"] * (1 + len(results)))
        for fault in FAULTS:
            yield line(fault, *(shown(result.cells[mode][fault]) for result in results))


def shown(found: Cell) -> str:
    """The outcome with its evidence, short enough for a table."""
    evidence = " ".join(found.evidence.split()).replace("|", "/")
    return f"{found.outcome}: {evidence:.45}" if evidence else found.outcome


def serve_results(name: str) -> None:
    """Writes the results to stdout, and sends whatever the client prints to stderr."""
    stdout = os.dup(1)
    os.dup2(2, 1)
    results = measure_here(name)
    with os.fdopen(stdout, "w") as output:
        json.dump(results, output)
    sys.stderr.flush()
    os._exit(0)  # threads that hang would keep the process


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares how clients handle faults.")
    parser.add_argument("--each", action="store_true", help="show the outcome of every fault")
    parser.add_argument("clients", nargs="*", help=f"some of: {', '.join(CLIENTS)}")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args()
    unknown = set(args.clients).difference(CLIENTS)
    if unknown:
        parser.error(f"unknown client: {', '.join(sorted(unknown))}")
    if args.here:
        sys.path.insert(0, str(args.folder))
        serve_results(args.clients[0])
    results = []
    for name in args.clients or installed():
        print(f"faults: {name} ...", file=sys.stderr)
        results.append(measure(name, args.folder.resolve()))
    for text in table(results):
        print(text)
    for text in every_cell(results) if args.each else ():
        print(text)


if __name__ == "__main__":
    main()
