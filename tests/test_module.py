"""The module as a whole: its names, its cost, its form, its help, its settings."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fallback_llm
from fallback_llm import Failure, Limits, Provider, Verdict, base_url, clean, settings_of

FILE = Path(fallback_llm.__file__)
SOURCE = FILE.read_text(encoding="utf-8")
NAMES = (
    "PROVIDERS AllProvidersFailed Answer AnswerRefused Attempt FallbackLLM FallbackLLMError"
    " NoProviderError Provider ProviderHealth ProviderStatus RetryConfig StreamInterrupted Verdict"
)


def test_all_names_the_public_api() -> None:
    """Sorted, and all of it is there."""
    assert fallback_llm.__all__ == NAMES.split()
    found: dict[str, Any] = {}
    exec("from fallback_llm import *", found)  # noqa: S102 - the statement under test
    assert set(found) - {"__builtins__"} == set(fallback_llm.__all__)
    errors = [found[n] for n in found if n.endswith(("Error", "Failed", "Refused", "Interrupted"))]
    assert len(errors) == 5
    assert all(issubclass(error, fallback_llm.FallbackLLMError) for error in errors)


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


def test_the_help_fits_a_screen() -> None:
    """50 lines of 80 columns."""
    lines = fallback_llm.HELP.splitlines()
    assert len(lines) <= 50
    assert [line for line in lines if len(line) > 80] == []


def test_the_help_and_the_parser_agree() -> None:
    """Each option of the one is an option of the other, with a value or without."""
    listed = re.findall(r"^  (?:(-\w), )?(--[\w-]+)(?: ([A-Z]+))?", fallback_llm.HELP, re.MULTILINE)
    assert len(listed) == len(re.findall(r"^  -.*--[a-z]|^  --", fallback_llm.HELP, re.MULTILINE))
    assert listed == fallback_llm.OPTIONS
    for short, name, value in listed:
        for flag in filter(None, (short, name)):
            args = vars(fallback_llm.parse([flag, "1"] if value else [flag]))
            field = name[2:].replace("-", "_")
            assert str(args[field]) in ("1", "1.0", "True")
            assert [key for key in args if args[key]] == [field]


def test_the_limits_of_an_exchange() -> None:
    """A silence or the question's time ends it; after its end, nothing is a failure."""
    times = [100.0]
    limits = Limits(lambda: times[-1], 10.0, 125.0)
    ended = []
    for now in (109.0, 118.9, 128.9):
        assert limits.left() == min(10.0, 125.0 - times[-1])
        times.append(now)
        if now < 120:
            limits.progress()
    for now in (124.9, 124.995, 125.0):
        times.append(now)
        with pytest.raises(Failure) as failed:
            raise limits.failure("cut") if now < 125 else limits.left() or AssertionError
        ended.append((failed.value.reason, failed.value.wide, failed.value.blameless))
