"""Many questions from a file, as a process: nothing is lost, nothing is asked twice."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Iterable

import pytest
from conftest import PROVIDERS, Program, until
from emulator import Json, Reply, rate_limited

QUESTIONS = [f"question {number}" for number in range(1, 41)]
BATCH = ["--batch", "questions.txt"]
TO_FILE = [*BATCH, "-o", "answers.jsonl"]
SILENCE = Reply(fault="silence")


@pytest.fixture
def questions(run: Program) -> Path:
    """The input: forty questions, one a line."""
    path = run.folder / "questions.txt"
    path.write_text("".join(f"{question}\n" for question in QUESTIONS))
    return path


@pytest.fixture
def answers(run: Program) -> Path:
    """The output, which is not there yet."""
    return run.folder / "answers.jsonl"


def records(text: str) -> list[Json]:
    """The objects of a JSONL text, in which each line is whole."""
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def lines(path: Path) -> list[str]:
    """The lines that a file has so far."""
    return path.read_text().splitlines() if path.exists() else []


def assert_complete(run: Program, answers: Path) -> None:
    """Asserts that the finished file has an answer of each question, and nothing lies beside."""
    done = records(answers.read_text())
    asked = sorted((record["id"], record["question"], record["answer"]) for record in done)
    assert asked == [(number, text, "Paris.") for number, text in enumerate(QUESTIONS, 1)]
    assert sorted(path.name for path in run.folder.iterdir()) == ["answers.jsonl", "questions.txt"]


def refused(run: Program, arguments: Iterable[str], *words: str) -> None:
    """Asserts that it is refused with one line that has these words, and that nothing is sent."""
    before = len(run.asked)
    result = run(*arguments)
    assert result[:2] == (2, "")
    assert re.fullmatch("error: .+\n", result.stderr)
    assert [word for word in words if word not in result.stderr] == []
    assert len(run.asked) == before


# --- What goes in and what comes out ------------------------------------------------------------


def test_a_file_of_questions(run: Program, questions: Path, answers: Path) -> None:
    """Each question is asked once; its line has the answer and all that is known of it."""
    result = run(*TO_FILE, "--stats")
    assert result[:2] == (0, "")
    assert sorted(run.questions) == sorted(QUESTIONS)
    assert_complete(run, answers)
    first = records(answers.read_text())[0]
    assert (first["provider"], first["model"], first["finish_reason"]) == (
        "cerebras",
        "one",
        "stop",
    )
    assert [attempt["status"] for attempt in first["attempts"]] == [200]
    assert first["usage"]["prompt_tokens"] == 20
    assert first["elapsed_seconds"] >= 0
    assert "   successful_requests: 40\n" in result.stderr
    assert re.search(r"\b40 answered\b", result.stderr)


@pytest.mark.parametrize("stdin", [False, True], ids=["from a file", "from stdin"])
def test_answers_go_to_stdout(run: Program, questions: Path, stdin: bool) -> None:
    """Without -o, stdout is JSONL; blank lines count for the ids, and odd bytes do no harm."""
    text = b"\xef\xbb\xbfone\r\n\n  caf\xe9\n \t\nlast"
    questions.write_bytes(text)
    run.emulator.plan("cerebras", Reply(text="a\u2028\x85\x1b[31m\nb"))
    result = run("--batch", "-", "-q", stdin=text) if stdin else run(*BATCH, "-q")
    assert (result.code, result.stderr) == (0, "")
    done = {record["id"]: record["question"] for record in records(result.stdout)}
    assert done == {1: "one", 3: "caf\ufffd", 5: "last"}
    assert {record["answer"] for record in records(result.stdout)} == {"a\u2028\x85\x1b[31m\nb"}


def test_lines_of_json(run: Program, questions: Path) -> None:
    """A line can have an id and any parameter of a question; flags are for all the others."""
    user: Json = {"role": "user", "content": "talk"}
    table: list[Json] = [
        {"id": "a", "question": "ask", "system": "S", "max_tokens": 7, "provider": "groq"},
        {"id": 7, "question": "ask", "model": "openrouter:mine", "temperature": 0.5, "top_p": 0.1},
        {"messages": [user, {"role": "assistant", "content": "no"}, user]},
    ]
    questions.write_text("plain\n" + "".join(json.dumps(line) + "\n" for line in table))
    result = run(*BATCH, "--workers", "1", "--max-tokens", "9", "-s", "T")
    assert [record["id"] for record in records(result.stdout)] == [1, "a", 7, 4]
    told = [(asked.provider, asked.model, asked.body["max_tokens"]) for asked in run.asked]
    assert told == [
        ("cerebras", "one", 9),
        ("groq", "two", 7),
        ("openrouter", "mine", 9),
        ("cerebras", "one", 9),
    ]
    assert (run.asked[2].body["temperature"], run.asked[2].body["top_p"]) == (0.5, 0.1)
    said = [[message["content"] for message in asked.body["messages"]] for asked in run.asked]
    assert said == [["T", "plain"], ["S", "ask"], ["T", "ask"], ["T", "talk", "no", "talk"]]


def test_a_failed_question(run: Program, questions: Path, answers: Path) -> None:
    """Its line has an error and no answer, the others go on; the next run asks it again."""
    bad = {"id": "bad", "question": "q", "model": "groq:bad"}
    questions.write_text("one\n" + json.dumps(bad) + "\nthree\n")
    run.emulator.plan("groq/bad", Reply(400))
    result = run(*TO_FILE)
    done = {record["id"]: record for record in records(answers.read_text())}
    assert (result.code, sorted(map(str, done))) == (1, ["1", "3", "bad"])
    assert done["bad"]["answer"] is None
    assert "400" in done["bad"]["error"]
    assert re.search(r"\b1 failed\b", result.stderr.splitlines()[-1])
    run.emulator.plan("groq/bad")
    assert run(*TO_FILE, "-q") == (0, "", "")
    assert run.models[3:] == ["bad"]
    assert len(records(answers.read_text())) == 3


# --- What is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        '{"question": ',
        '{"question": " "}',
        '{"question": 5}',
        '{"id": "x"}',
        '{"id": 1, "question": "an id that is taken"}',
        '{"question": "q", "max_tokens": 0}',
        '{"question": "q", "provider": "nope"}',
        '{"question": "q", "messages": "talk"}',
        '{"question": "q", "stream": true}',
    ],
)
def test_a_bad_line(run: Program, questions: Path, line: str) -> None:
    """The whole input is checked, and a bad line named, before anything is sent."""
    questions.write_text(f"fine\n\n{line}\nfine\n")
    refused(run, TO_FILE, "questions.txt", "line 3")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "missing.txt"], ["--batch", "missing.txt"]),
        ([*BATCH, "-o", "missing/answers.jsonl"], ["--output", "missing/answers.jsonl"]),
        ([*BATCH, "-o", "."], ["--output"]),
        ([*BATCH, "--workers", "0"], ["--workers", "0", "whole number"]),
        ([*BATCH, "words"], ["--batch"]),
        ([*BATCH, "-o", "questions.txt"], ["questions.txt"]),
        ([*BATCH, "-o", "notes.txt"], ["notes.txt"]),
    ],
)
def test_what_cannot_be_read_or_written(
    run: Program, questions: Path, arguments: list[str], words: list[str]
) -> None:
    """Files and numbers that cannot be right are refused; what is no output stays as it is."""
    notes = run.folder / "notes.txt"
    notes.write_text("written by hand\n")
    refused(run, arguments, *words)
    assert lines(questions) == QUESTIONS
    assert lines(notes) == ["written by hand"]


def test_no_key(run: Program, questions: Path) -> None:
    """Without a key it ends like a single question, with the variables to set."""
    result = run(*BATCH, env={f"{provider.upper()}_API_KEY": None for provider in PROVIDERS})
    assert (result.code, result.stdout, run.asked) == (1, "", [])
    assert result.stderr.startswith("❌ No API keys found! Please set environment variables:\n")


def test_two_runs_on_one_file(run: Program, questions: Path, answers: Path) -> None:
    """The second is refused with one line and spoils nothing."""
    run.plan(*[Reply(text="Paris.")] * 10, SILENCE)
    first = run.start(*TO_FILE, "--workers", "4")
    until(lambda: len(run.asked) == 14)
    refused(run, TO_FILE, "answers.jsonl")
    first.popen.kill()
    first.end()
    run.plan(Reply(text="Paris."))
    assert run(*TO_FILE).code == 0
    assert_complete(run, answers)


# --- Ends before the end ------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_ended_is_taken_up(
    run: Program, questions: Path, answers: Path, number: int
) -> None:
    """After kill -9 or Ctrl-C every line is whole, and only what was in flight is asked again."""
    run.plan(*[Reply(text="Paris.")] * 10, SILENCE)
    process = run.start(*TO_FILE, "--workers", "4")
    until(lambda: len(lines(answers)) == 10 and len(run.asked) == 14)
    result = process.signal(number)
    assert result.code == -number
    assert ("Interrupted.\n" in result.stderr) == (number == signal.SIGINT)
    assert "Traceback" not in result.stderr
    before = answers.read_text()
    assert len(records(before)) == 10
    run.plan(Reply(text="Paris."))
    assert run(*TO_FILE).code == 0
    assert len(run.asked) == 14 + 30
    assert answers.read_text().startswith(before)
    assert_complete(run, answers)
    assert run(*TO_FILE).code == 0
    assert len(run.asked) == 14 + 30


def test_torn_failed_and_double_lines_go(run: Program, questions: Path, answers: Path) -> None:
    """A resumed file loses what is no answer, and keeps the answers and who may read them."""
    assert run(*TO_FILE, "--workers", "1").code == 0
    whole = answers.read_bytes().splitlines(keepends=True)
    failed = whole[1].replace(b'"answer": "Paris."', b'"answer": null')
    answers.write_bytes(b"".join([whole[0], failed, *whole[3:], whole[0], whole[2][:-9]]))
    answers.chmod(0o600)
    assert run(*TO_FILE).code == 0
    assert sorted(run.questions[40:]) == QUESTIONS[1:3]
    assert_complete(run, answers)
    assert answers.read_bytes().startswith(whole[0] + b"".join(whole[3:]))
    assert answers.stat().st_mode & 0o777 == 0o600


def test_a_disk_that_gets_full(run: Program, questions: Path, answers: Path) -> None:
    """It stops with one line; when there is room again, only what was in flight is asked again."""
    little = ["/bin/sh", "-c", 'ulimit -f 8 && exec "$@"', "-", *run.command]
    result = run(*TO_FILE, "-q", "--workers", "4", command=little)
    assert result[:2] == (1, "")
    assert re.fullmatch(r"error: .+\n", result.stderr)
    assert 0 < len(lines(answers)) < len(QUESTIONS)
    assert run(*TO_FILE).code == 0
    assert len(run.asked) <= len(QUESTIONS) + 4
    assert_complete(run, answers)


def test_a_stdout_that_is_full(run: Program, questions: Path) -> None:
    """It stops with one line, instead of paying for answers that nobody gets."""
    with open("/dev/full", "wb") as full:
        result = run(*BATCH, "-q", "--workers", "4", stdout=full)
    assert result.code == 1
    assert re.fullmatch(r"error: .*No space left on device.*\n", result.stderr)
    assert len(run.asked) <= 8


def test_a_reader_that_goes_away(run: Program, questions: Path) -> None:
    """`| head -1` ends it with 141, without a word."""
    run.plan(Reply(text="Paris." * 2000))
    process = run.start(*BATCH, "-q", stdout=subprocess.PIPE)
    assert process.popen.stdout is not None
    assert json.loads(process.popen.stdout.readline())["question"] in QUESTIONS
    process.popen.stdout.close()
    assert process.end() == (141, "", "")


# --- Many at once -------------------------------------------------------------------------------


def test_workers_are_requests_in_flight(run: Program, questions: Path) -> None:
    """As many questions are in flight as there are workers, and no more."""
    run.plan(SILENCE)
    run.start(*BATCH, "--workers", "16")
    until(lambda: len(run.asked) >= 16)
    time.sleep(0.2)  # for a seventeenth
    assert len(run.asked) == 16


def test_connections_are_kept(run: Program, questions: Path) -> None:
    """There are no more connections than workers, whatever the number of questions."""
    assert run(*BATCH, "--workers", "4").code == 0
    assert len(run.asked) == 40
    assert run.emulator.connections <= 4


def test_health_is_shared(run: Program, questions: Path) -> None:
    """A dead provider is probed now and then, not asked in every question."""
    run.emulator.plan("cerebras", Reply(503))
    assert run(*BATCH, "--workers", "4").code == 0
    assert run.models.count("two") == 40
    assert run.models.count("one") < 20


def test_a_rate_limit_slows_and_does_not_fail(run: Program, questions: Path) -> None:
    """Questions wait for a provider that is only limited for a moment."""
    run.emulator.plan("groq", *[rate_limited("groq", 0.3)] * 4, Reply(text="Paris."))
    result = run(*BATCH, "--workers", "4", "--provider", "groq", "--base-delay", "0")
    assert result.code == 0
    assert len(records(result.stdout)) == 40


def test_progress_is_one_line_of_a_terminal(run: Program, questions: Path) -> None:
    """It is drawn again and again: done, total, failed, speed, time left, who answers."""
    questions.write_text("one\ntwo\nthree\n")
    run.plan(Reply(text="Paris.", delay=0.5))
    master, slave = pty.openpty()
    assert run(*TO_FILE, "--workers", "1", stderr=slave).code == 0
    shown = os.read(master, 65536).decode()
    os.close(slave)
    os.close(master)
    drawn = [line for line in re.split(r"[\r\n]+", shown) if re.search(r"\b\d ?/ ?3\b", line)]
    assert len(drawn) >= 2
    told = r"[123] ?/ ?3\b.*\b0 failed.*/s.*\bleft\b.*cerebras"
    assert any(re.search(told, line) for line in drawn)
    assert max(map(len, drawn)) < 80


def test_no_progress_line_elsewhere(run: Program, questions: Path) -> None:
    """A short run outside a terminal tells its sum alone; -q leaves stderr empty."""
    assert run(*BATCH).stderr.count("\n") == 1
    assert run(*TO_FILE, "-q").stderr == ""
