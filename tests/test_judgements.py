"""Today's judgements beside those of the time before one table decided, on thousands of errors."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
from errors_before import NOW, Error, errors, judged_before, letter_of, wait_of

from fallback_llm import Failure, Reach, Verdict, judge

WIDE = {
    Verdict.RATE_LIMITED: Reach.ACCOUNT,
    Verdict.DENIED: Reach.ACCOUNT,
    Verdict.FAULT: Reach.PROVIDER,
    Verdict.UNSUITABLE: Reach.PROVIDER,
}


class Change(NamedTuple):
    """A difference that is wanted."""

    where: str  # a pattern for the group and the name of an error
    letters: str  # pairs of a letter of then and one of now


CHANGES = {
    "a 402 is about the model: free ones of the same key may answer": Change(
        r"\| 402( |$)", "Dd Fd gd"
    ),
    "a supplier's 404 is trouble that passes, whatever it says": Change(
        r"\| 404 relayed ", "gf uf"
    ),
    "a wait that the server asks for outranks words about a quota": Change(
        r"^(header: .*\| (200|429) Insufficient|code insufficient_quota says .*\| (200|429)$)", "Dl"
    ),
    "a supplier that is overloaded is no limit, through a router either": Change(
        r"code model_.*\| 429 relayed ", "lf"
    ),
    "a 429 of a supplier is a limit, whatever it says of its models": Change(
        r"(?i)says .*model.*\| 429 relayed ", "gl"
    ),
    "a limit is a limit, also when a router tells of it with another status": Change(
        r"(exceeded|exhausted|openrouter_\w+) \| 400 relayed |free-models-per-.*\| 403 relayed ",
        "fl fL",
    ),
    "a supplier's status outranks what it says of the form of a question": Change(
        r"code (unsupported|wrong)_.* \| (429|500) relayed ", "ul uf"
    ),
    "what a supplier says of its account is its own trouble, whatever model it names": Change(
        r"account .* model .*\| 403 relayed ", "gf"
    ),
    "a status of what broke outranks words about the account": Change(
        r"^says .*\| (408|409|424|498)$", "Df"
    ),
    "a 407 is the word of a proxy, through which nobody of the provider is reached": Change(
        r"\| 407$", "uU"
    ),
    "a 405 comes from a wrong address, whatever its code": Change(r"\| 405$", "fu"),
    "a sentence is no code, wherever it stands": Change(r" text of a field$", "rg rl"),
    "all errors of a list are read": Change(r"^body: a list of errors", "fg Fg ug Dg lg"),
    "words of the question or the model stand above codes of the account and of limits": Change(
        r"^code (openrouter|token_quota|request_quota|capacity|queue|wrong_api_key|authentication"
        r"|payment|organization|spend_limit)\w* says ",
        "Lg Lu lg lu fu Du DL",
    ),
}


@pytest.fixture(scope="module")
def differences() -> dict[str, str]:
    """The two letters of each error that is judged otherwise now."""
    found = {}
    before = judged_before()
    for group, members in errors().items():
        letters, waits = before[group]
        assert len(letters) == len(members)
        for place, (name, error) in enumerate(members.items()):
            failure = judged(error)
            now = letter(failure)
            if now != letters[place]:
                found[f"{group} | {name}"] = letters[place] + now
            elif wait_of(failure.hint) != waits.get(place, ""):
                found[f"{group} | {name}"] = f"{waits.get(place)} s, now {failure.hint} s"
    return found


def judged(error: Error) -> Failure:
    """What it means today."""
    return judge(error.status, error.headers, error.body, NOW)


def letter(failure: Failure) -> str:
    """The ruling as one letter, "?" if a verdict has a reach that it never had."""
    is_wide = failure.reach is not Reach.MODEL
    if is_wide and WIDE.get(failure.verdict) is not failure.reach:
        return "?"
    return letter_of(failure.verdict.value, is_wide)


def is_wanted(error: str, letters: str) -> bool:
    """Whether one of the reasons holds for a difference."""
    return any(
        letters in change.letters.split() and re.search(change.where, error)
        for change in CHANGES.values()
    )


def test_there_are_thousands_of_errors() -> None:
    """The same ones as then, in the same order."""
    before = judged_before()
    assert list(before) == list(errors())
    assert sum(len(letters) for letters, _ in before.values()) > 5000


def test_every_difference_has_a_reason(differences: dict[str, str]) -> None:
    """What is judged otherwise than before is meant to be, and so are the waits."""
    unwanted = {e: letters for e, letters in differences.items() if not is_wanted(e, letters)}
    assert unwanted == {}


@pytest.mark.parametrize("reason", CHANGES)
def test_every_reason_has_a_difference(reason: str, differences: dict[str, str]) -> None:
    """A reason that explains nothing any more would hide what comes later."""
    change = CHANGES[reason]
    seen = {letters for e, letters in differences.items() if re.search(change.where, e)}
    assert seen.issuperset(change.letters.split())
