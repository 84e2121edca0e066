"""The module as a whole: its names, its cost, its form, its help; the limits of an exchange."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fallback_llm
from fallback_llm import Failure, FallbackLLMError, Reply

FILE = Path(fallback_llm.__file__)
SOURCE, HELP = FILE.read_text(encoding="utf-8"), fallback_llm.HELP
NAMES = (
    "PROVIDERS AllProvidersFailed Answer AnswerRefused Attempt FallbackLLM FallbackLLMError"
    " NoProviderError Provider ProviderHealth ProviderStatus RetryConfig StreamInterrupted Verdict"
)


def test_all_names_the_public_api() -> None:
    """Sorted, and all of it is there; errors are of one tree, results cannot be changed."""
    assert fallback_llm.__all__ == NAMES.split()
    found: dict[str, Any] = {}
    exec("from fallback_llm import *", found)  # noqa: S102 - the statement under test
    assert set(found) - {"__builtins__"} == set(fallback_llm.__all__)
    errors = [found[n] for n in found if n.endswith(("Error", "Failed", "Refused", "Interrupted"))]
    assert [issubclass(error, FallbackLLMError) for error in errors] == [True] * 5
    for result in (found["Answer"], found["Attempt"], found["Provider"]):
        assert result.__dataclass_params__.frozen


def test_the_import_costs_little_and_says_nothing() -> None:
    """In a fresh process: no package, nothing slow, no output, no handler."""
    program = (
        "import sys; old = set(sys.modules); import fallback_llm, logging;"
        "new = {name.split('.')[0] for name in set(sys.modules) - old};"
        "assert not new & {'requests', 'urllib3', 'dotenv', 'argparse', 'email', 'http'}, new;"
        "assert not logging.getLogger().handlers"
    )
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, cwd=FILE.parent, stdout=-1, stderr=subprocess.STDOUT)
    assert (done.returncode, done.stdout) == (0, b"")


def test_the_file_is_of_python_37() -> None:
    """And no line of it is longer than 100."""
    if sys.version_info >= (3, 8):
        ast.parse(SOURCE, feature_version=(3, 7))
    assert [line for line in SOURCE.splitlines() if len(line) > 100] == []


def test_the_help_fits_a_screen_and_agrees_with_the_parser() -> None:
    """50 lines of 80 columns; each option of one is one of the other, with a value or without."""
    assert len(HELP.splitlines()) <= 50
    assert [line for line in HELP.splitlines() if len(line) > 80] == []
    listed = re.findall(r"^  (?:(-\w), )?(--[\w-]+)(?: ([A-Z]+))?", HELP, re.MULTILINE)
    assert len(listed) == len(re.findall(r"^  -.*--[a-z]|^  --", HELP, re.MULTILINE))
    assert listed == fallback_llm.OPTIONS
    for short, name, value in listed:
        field = name[2:].replace("-", "_")
        needs = ["--batch", "1"] if name in ("--output", "--workers") else []
        for flag in filter(None, (short, name)):
            args = vars(fallback_llm.parse([flag, "1", *needs] if value else [flag]))
            assert {key for key in args if args[key]} == {field, *(["batch"] if needs else [])}
            assert {str(args[key]) for key in args if args[key]} <= {"1", "1.0", "True"}


def test_how_long_an_exchange_may_go_on() -> None:
    """A silence or the question's time ends it; after its end, nothing is a failure."""
    now = [100.0]
    reply = Reply(lambda: now[0], 10.0, 125.0, 0.0)
    now[0] = 109.9
    assert reply.left() == pytest.approx(0.1)
    reply.heard(is_over=False)
    assert reply.left() == 10.0
    for at, expected in {
        119.9: ("silent for 10 s", True, False),
        124.98: ("silent for 10 s", True, False),
        124.995: ("the question's time limit is up", False, True),
    }.items():
        now[0] = at
        with pytest.raises(Failure) as ended:
            reply.left()
        failure = ended.value
        assert (failure.reason, failure.wide, failure.blameless) == expected
    reply.heard(is_over=False)
    assert reply.left() == pytest.approx(0.005)
    now[0] = 121.0
    reply.heard(is_over=True)
    assert reply.left() == 1.0
    now[0] = 121.5
    reply.heard(is_over=True)
    assert reply.left() == 0.5
    now[0] = 127.0
    assert reply.left() == -5.0
