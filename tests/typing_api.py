"""What a user's type checker says of the public API. Only mypy reads this file: --strict refuses
a `type: ignore` that nothing needs, so each one here stands for a mistake that is found.
"""

from __future__ import annotations

from typing import Dict, Iterator, List, Optional

from fallback_llm import Answer, FallbackLLM, Provider, RetryConfig, Stream


def right_uses(llm: FallbackLLM) -> None:
    text: str = llm.ask("Where?", temperature=0.2)
    answer: Answer = llm.complete("Where?", provider=["groq"], accept=lambda said: len(said) > 3)
    trail: List[str] = [attempt.reason for attempt in answer.attempts]
    stream: Stream = llm.stream(messages=[{"role": "user", "content": "Where?"}])
    pieces: Iterator[str] = stream
    end: Optional[Answer] = stream.answer
    keys: Dict[str, Optional[str]] = llm.api_keys
    models: Dict[str, List[str]] = llm.models
    order: List[str] = llm.fallback_order
    attempts: int = llm.retry_config.max_attempts
    llm.timeout = 30
    print(text, trail, pieces, end, keys, models, order, attempts)
    for result in llm.ask_many(["Where?", {"question": "When?", "max_tokens": 9}]):
        print(result.text if isinstance(result, Answer) else result)


def mistakes(llm: FallbackLLM) -> None:
    llm.ask(5)  # type: ignore[arg-type]
    llm.ask("Where?", max_tokens="500")  # type: ignore[arg-type]
    print(llm.complete("Where?").txt)  # type: ignore[attr-defined]
    print(llm.stream("Where?").answer.text)  # type: ignore[union-attr]
    llm.models["groq"] = "echo"  # type: ignore[assignment]
    llm.timeout = "soon"  # type: ignore[assignment]
    llm.ask_many(5)  # type: ignore[arg-type]
    RetryConfig(attempts=3)  # type: ignore[call-arg]
    Provider("mine", "https://mine/v1")  # type: ignore[call-arg]
    FallbackLLM(api_keys=["k"])  # type: ignore[arg-type]
