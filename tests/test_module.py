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


URLS = [  # the variable, the URL in use
    ("", "https://row.test/v1"),
    ("https://own.test", "https://own.test/v1"),
    (" 'https://own.test/' ", "https://own.test/v1"),
    ("https://own.test:8080/x/y/", "https://own.test:8080/x/y"),
    ("http://localhost:1", "http://localhost:1/v1"),
    ("HTTP://127.0.0.1/api", "HTTP://127.0.0.1/api"),
    ("http://127.9.9.9", "http://127.9.9.9/v1"),
    ("http://[::1]:80", "http://[::1]:80/v1"),
]
NO_URLS = ["http://own.test", "http://localhost.own.test", "http://127.0.0.1.own.test", "own.test"]
NO_URLS += ["ftp://own.test", "https://", "https://a b", "https://me:pw@own.test", "https://a?x=1"]
NO_URLS += ["https://own.test/#x", "http://128.0.0.1", "https://own.test:port", "//own.test"]


@pytest.mark.parametrize(("value", "url"), URLS)
def test_base_url(value: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment before the row; without a path it gets the row's."""
    monkeypatch.setenv("MY_OWN_BASE_URL", value)
    assert base_url(Provider("my.own", "https://row.test/v1", None, ())) == url


@pytest.mark.parametrize("value", NO_URLS)
def test_urls_that_would_leak_the_key(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong usage, which names the variable and shows no password."""
    monkeypatch.setenv("MY_OWN_BASE_URL", value)
    with pytest.raises(ValueError, match=r"^MY_OWN_BASE_URL must be https://") as error:
        base_url(Provider("my.own", "https://row.test/v1", None, ()))
    assert "pw" not in str(error.value)


def test_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The environment before ./.env; an empty variable or a placeholder is none."""
    monkeypatch.chdir(tmp_path)
    Path(".env").write_text("FB_A=dot\nFB_B='dot'\nFB_C=${FB_A}\nFB_D=your_key_here\nFB_E=\n")
    for name, value in {"FB_A": ' "env" ', "FB_B": "", "FB_D": "<key>", "FB_F": "xxx"}.items():
        monkeypatch.setenv(name, value)
    values, placeholders = settings_of([f"FB_{letter}" for letter in "ABCDEFG"])
    assert "env dot ${FB_A}    ".split(" ") == list(values.values())
    assert placeholders == {"FB_D", "FB_F"}
    assert [clean(value) for value in (None, "", " \t'k'\r\n", '"k')] == ["", "", "k", "k"]


PLACEHOLDERS = """your_groq_api_key_here|your-key|YOUR KEY|put_it_here|paste-here|changeme|change-me
|replace_me|replaceme|xxx|XXXXX|...|<your key>|<>|todo|none|null"""


def test_placeholders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What an example file holds in a key's place; a real key is none of it."""
    monkeypatch.chdir(tmp_path)
    for value in PLACEHOLDERS.split("|"):
        monkeypatch.setenv("FB_KEY", value)
        assert settings_of(["FB_KEY"]) == ({"FB_KEY": ""}, {"FB_KEY"}), value
    for value in ("gsk_xxx", "yours", "nonesuch", "xx", "a<k>"):
        monkeypatch.setenv("FB_KEY", value)
        assert settings_of(["FB_KEY"]) == ({"FB_KEY": value}, set())


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_limits() -> None:
    """A silence or the question's time ends an exchange; after its end, nothing is a failure."""
    clock = Clock()
    limits = Limits(clock, 10.0, 125.0)
    assert limits.left() == 10.0
    clock.now = 109.0
    limits.progress()
    assert limits.left() == 10.0
    clock.now = 119.0
    with pytest.raises(Failure) as silence:
        limits.left()
    failure = silence.value
    assert (failure.verdict, failure.wide, failure.blameless) == (Verdict.FAULT, True, False)
    assert failure.reason == "silent for 10 s"
    limits.progress()
    assert limits.left() == 6.0
    clock.now = 125.0
    with pytest.raises(Failure) as late:
        limits.left()
    assert (late.value.blameless, late.value.wide) == (True, False)
    limits.finish(1.0)
    clock.now = 127.0
    limits.progress()
    assert limits.left() < 0
