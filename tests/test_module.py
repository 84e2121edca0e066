"""The module as a whole: its names, its cost, its form, its help; the limits of an exchange."""

from __future__ import annotations

import argparse
import ast
import inspect
import pydoc
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

import fallback_llm
from fallback_llm import Cause, FallbackLLMError, TimeLimit

FILE = Path(fallback_llm.__file__)
SOURCE = FILE.read_text(encoding="utf-8")
PARSER = fallback_llm.make_parser("fallback_llm.py")
HELP = PARSER.format_help()
OPTIONS = [action for action in PARSER._actions if action.option_strings]
NAMES = (
    "PROVIDERS Account AllProvidersFailed Answer AnswerRefused Attempt CheckReport FallbackLLM"
    " FallbackLLMError ModelList NoProviderError Provider ProviderHealth ProviderStatus"
    " RetryConfig Stream StreamInterrupted Verdict"
)


def test_all_names_the_public_api() -> None:
    """Sorted, and all of it is there; errors are of one tree, results cannot be changed."""
    assert fallback_llm.__all__ == NAMES.split()
    found: dict[str, Any] = {}
    exec("from fallback_llm import *", found)  # noqa: S102 - the statement under test
    assert set(found) - {"__builtins__"} == set(fallback_llm.__all__)
    errors = [found[n] for n in found if n.endswith(("Error", "Failed", "Refused", "Interrupted"))]
    assert [issubclass(error, FallbackLLMError) for error in errors] == [True] * 5
    for name in ("Account", "Answer", "Attempt", "CheckReport", "ModelList", "Provider"):
        assert found[name].__dataclass_params__.frozen


def test_tab_completion_and_help_show_what_is_public() -> None:
    """And nothing else of the file's hundreds of names."""
    shown = [name for name in dir(fallback_llm) if not name.startswith("_")]
    assert shown == sorted([*NAMES.split(), "main"])
    text = pydoc.plain(pydoc.render_doc(fallback_llm))
    classes = re.findall(r"^    class (\w+)", text, re.MULTILINE)
    assert set(classes) == {name for name in NAMES.split() if name != "PROVIDERS"}


@pytest.mark.parametrize("name", NAMES.split())
def test_annotations_resolve_at_run_time(name: str) -> None:
    """Web frameworks read them, also those of Python 3.7."""
    public = getattr(fallback_llm, name)
    if not inspect.isclass(public):
        return
    typing.get_type_hints(public)
    for method_name, method in inspect.getmembers(public, inspect.isfunction):
        is_ours = method.__module__ == fallback_llm.__name__
        if is_ours and not method_name.startswith("_"):
            assert "return" in typing.get_type_hints(method)


def test_the_import_costs_little_and_says_nothing() -> None:
    """In a fresh process: no package, no output, no handler of the root logger."""
    in_a_fresh_process(
        "import sys; old = set(sys.modules); import fallback_llm, logging",
        "new = {name.split('.')[0] for name in set(sys.modules) - old}",
        "assert not new & {'requests', 'urllib3', 'dotenv'}, new",
        "assert not logging.getLogger().handlers",
    )


def test_the_help_costs_little() -> None:
    """It needs none of the packages."""
    in_a_fresh_process(
        "import contextlib, io, sys, fallback_llm",
        "sys.stdout = io.StringIO()",
        "with contextlib.suppress(SystemExit): fallback_llm.main(['--help'])",
        "assert 'usage: ' in sys.stdout.getvalue()",
        "assert not {'requests', 'urllib3', 'dotenv'} & set(sys.modules)",
    )


def in_a_fresh_process(*statements: str) -> None:
    """Asserts that these run, with warnings as errors, without a word."""
    command = [sys.executable, "-W", "error", "-c", "\n".join(statements)]
    done = subprocess.run(command, cwd=FILE.parent, stdout=-1, stderr=subprocess.STDOUT)
    assert (done.returncode, done.stdout) == (0, b"")


def test_the_file_is_of_python_37() -> None:
    """And no line of it is longer than 100."""
    if sys.version_info >= (3, 8):
        ast.parse(SOURCE, feature_version=(3, 7))
    assert [line for line in SOURCE.splitlines() if len(line) > 100] == []


SECTIONS = re.split(r"^# --- \d+\. ", SOURCE, flags=re.MULTILINE)[1:]


def test_a_section_uses_only_sections_above_it() -> None:
    """So the file can be read once, downward; `main` is the last function."""
    assert len(SECTIONS) == 10
    section_of: dict[str, int] = {}
    for number, section in enumerate(SECTIONS):
        names = re.findall(r"^(?:class |def )?([A-Za-z_]\w*)(?=\(|:| =)", section, re.MULTILINE)
        section_of.update(dict.fromkeys(names, number))
    for number, section in enumerate(SECTIONS):
        code = ast.parse(section[section.index("\n") :])
        names_used = [node for node in ast.walk(code) if isinstance(node, ast.Name)]
        own = {node.id for node in names_used if isinstance(node.ctx, ast.Store)}
        own.update(node.arg for node in ast.walk(code) if isinstance(node, ast.arg))
        used = {node.id for node in names_used} - own
        later = [name for name in used if section_of.get(name, 0) > number]
        assert later == [], f"section {number + 1}"
    assert re.findall(r"^def (\w+)", SOURCE, re.MULTILINE)[-1] == "main"


def test_batch_and_command_line_use_public_methods_only() -> None:
    """What they can do with a client, every Python program can."""
    for section in SECTIONS[8:]:
        assert re.findall(r"\bllm\._\w+", section) == []


def test_the_help_fits_a_screen() -> None:
    """50 lines of 80 columns."""
    assert len(HELP.splitlines()) <= 50
    assert [line for line in HELP.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: str(option.option_strings[-1]))
def test_each_option_has_its_help_beside_it(option: argparse.Action) -> None:
    """On one line: its names, its value, and what it is for."""
    names = ", ".join(option.option_strings)
    value = f" {option.metavar}" if option.nargs != 0 else ""
    assert re.search(rf"^  {re.escape(names + value)}  +[a-z]", HELP, re.MULTILINE)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: str(option.option_strings[-1]))
def test_each_option_is_read_by_all_its_names(option: argparse.Action) -> None:
    """With a value or without, and nothing else is changed by it."""
    if option.dest in ("help", "version"):
        return
    needed = {"output": ["--batch", "1"], "workers": ["--batch", "1"]}.get(option.dest, [])
    usual = vars(fallback_llm.parse(needed))
    for name in option.option_strings:
        value = ["1"] if option.nargs != 0 else []
        args = vars(fallback_llm.parse([name, *value, *needed]))
        changed = {key for key in args if args[key] != usual[key]}
        assert changed == {option.dest}
        assert args[option.dest] in ("1", ["1"], 1, True)


def test_how_long_an_exchange_may_go_on() -> None:
    """A silence or the question's time ends it; once all that matters has come, only a grace."""
    now = [100.0]
    limit = TimeLimit(lambda: now[0], 125.0, 10.0)
    now[0] = 109.9
    assert limit.left() == pytest.approx(0.1)
    limit.progress()
    assert limit.left() == 10.0
    for at, reason, cause in (
        (119.8, "cut", Cause.REPLY),
        (119.9, "silent for 10 s", Cause.SILENCE),
        (124.98, "silent for 10 s", Cause.SILENCE),
        (124.995, "no answer within .*time limit of 25 s", Cause.TIME_LIMIT),
        (130.0, "no answer within .*time limit of 25 s", Cause.TIME_LIMIT),
    ):
        now[0] = at
        failure = limit.failure("cut")
        assert re.fullmatch(reason, failure.reason)
        assert failure.cause is cause
        assert limit.left() == max(0.0, 119.9 - at)

    now[0] = 121.0
    limit.progress()
    assert limit.left() == 4.0
    limit.extend(140.0)
    assert limit.left() == 10.0
    limit.progress(0.5)
    assert limit.left() == 0.5
    now[0] = 122.0
    assert limit.left() == 0.0
    limit.progress(99.0)
    assert limit.left() == 10.0
    limit.postpone(3.0)
    assert limit.left() == 13.0


def test_a_share_of_the_time_is_not_the_callers_limit() -> None:
    """Others were to have a part of it; what is being shown gets all that is left."""
    now = [100.0]
    limit = TimeLimit(lambda: now[0], 105.0, 10.0, is_share=True)
    assert limit.overrun() is None
    now[0] = 105.0
    failure = limit.failure("cut")
    assert failure.cause is Cause.TIME_SHARE
    assert failure.reason == "no answer within 5 s, its share of the time limit"
    limit.extend(109.0)
    assert limit.overrun() is None
    now[0] = 109.0
    assert limit.failure("cut").cause is Cause.TIME_LIMIT
