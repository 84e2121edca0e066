"""The real program against the local emulator: no key, no network, no model.

    python tests/demo.py "What is the capital of France?" --stats

Cerebras says to come back in a minute, Groq is over capacity with all its models, OpenRouter
answers. Arguments go to the program, its output and exit code come back.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from emulator import Emulator, Reply, error, interrupted, rate_limited

PROGRAM = Path(__file__).resolve().parent.parent / "fallback_llm.py"
QUESTION = "What is the capital of France?"
ANSWER = "This text comes from the local emulator of OpenRouter. No model was asked."


def run(arguments: list[str]) -> int:
    """The exit code of the program, run with these arguments against the emulator."""
    if all(argument.startswith("-") for argument in arguments):
        arguments = [QUESTION, *arguments]
    with Emulator() as emulator:
        emulator.plan("cerebras", rate_limited("cerebras", retry_after=60))
        emulator.plan("groq", error("groq", "overloaded"))
        emulator.plan("openrouter", Reply(text=ANSWER))
        inherited = {name: os.environ[name] for name in os.environ if not name.endswith("_MODELS")}
        environment = dict(inherited, NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
        environment.update(emulator.environment())
        command = [sys.executable, str(PROGRAM), *arguments]
        with subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL) as program:
            try:
                code = program.wait()
            except KeyboardInterrupt:  # a terminal has told the program too: let it finish
                with contextlib.suppress(subprocess.TimeoutExpired):
                    program.wait(timeout=1)
                program.terminate()
                code = program.wait()
    return code if code >= 0 else 128 - code  # a signal, as a shell shows it


if __name__ == "__main__":
    print(
        "Demo: the real program, a local emulator instead of the providers.",
        file=sys.stderr,
        flush=True,
    )
    code = run(sys.argv[1:])
    if code == 130:
        interrupted()
    sys.exit(code)
