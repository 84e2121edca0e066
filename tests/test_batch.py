"""Many questions from a file, as a process: nothing is lost, nothing is asked twice."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Iterable, Iterator

import pytest
from conftest import PROVIDERS, Process, Program, until
from emulator import Json, Reply, rate_limited

from fallback_llm import Output

QUESTIONS = [f"question {number}" for number in range(1, 41)]
BATCH = ["--batch", "questions.txt"]
TO_FILE = [*BATCH, "-o", "answers.jsonl"]
SILENCE = Reply(fault="silence")
LITTLE = ["/bin/sh", "-c", 'ulimit -f 8 && exec "$@"', "-"]  # no file may grow over 4 KiB


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
    """Asserts that it is refused with these words, a line for each mistake; nothing is sent."""
    before = len(run.asked)
    result = run.inside(*arguments)
    assert result[:2] == (2, "")
    assert re.fullmatch("error: .+\n(   line .+\n)*", result.stderr)
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
    assert (first["provider"], first["model"]) == ("cerebras", "one")
    assert first["finish_reason"] == "stop"
    assert [attempt["status"] for attempt in first["attempts"]] == [200]
    assert first["usage"]["prompt_tokens"] == 20
    for digest in ("line_digest", "flags_digest"):
        assert re.fullmatch(r"\w{8,}", first[digest])
    assert first["elapsed_seconds"] >= 0
    assert "   successful_requests: 40\n" in result.stderr
    assert re.search(r"\b40 answered\b", result.stderr)


@pytest.mark.parametrize("stdin", [False, True], ids=["from a file", "from stdin"])
def test_answers_go_to_stdout(run: Program, questions: Path, stdin: bool) -> None:
    """Without -o (or with "-o -") stdout is JSONL; blank lines count, odd ones do no harm."""
    text = b"\xef\xbb\xbfone\r\n\n  caf\xc3\xa9\n \t\nlast"
    questions.write_bytes(text)
    run.emulator.plan("cerebras", Reply(text="a\u2028\x85\x1b[31m\nb"))
    result = (
        run.inside("--batch", "-", "-q", stdin=text)
        if stdin
        else run.inside(*BATCH, "-o", "-", "-q")
    )
    assert (result.code, result.stderr) == (0, "")
    done = {record["id"]: record["question"] for record in records(result.stdout)}
    assert done == {1: "one", 3: "café", 5: "last"}
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
    result = run.inside(*BATCH, "--workers", "1", "--max-tokens", "9", "-s", "T")
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


def test_lines_in_other_forms(run: Program, questions: Path) -> None:
    """JSON strings, and the lines that OpenAI's batches have."""
    body: Json = {"model": "mine", "messages": [{"role": "user", "content": "talk"}]}
    line: Json = {"custom_id": "request-1", "method": "POST", "url": "/v1/chat/completions"}
    told = [json.dumps('say\n"hi"'), '"Hi" means', json.dumps({**line, "body": body})]
    questions.write_text("\n".join(told))
    result = run.inside(*BATCH, "--workers", "1")
    assert run.questions == ['say\n"hi"', '"Hi" means', "talk"]
    assert run.models[-1] == "mine"
    assert [record["id"] for record in records(result.stdout)] == [1, 2, "request-1"]
    for bad, words in (
        ({**line, "url": "/v1/embeddings", "body": {"input": "talk"}}, "'input'"),
        ({**line, "body": {}}, "missing"),
        ({**line, "body": {**body, "n": 2}}, "n is not supported"),
    ):
        questions.write_text(json.dumps(bad))
        refused(run, BATCH, "line 1", words)


def test_columns_of_a_data_set(run: Program, questions: Path, answers: Path) -> None:
    """Those that are no arguments are not sent: they come back beside the answer."""
    columns: Json = {"question_id": 4, "score": 0.5, "answer": "Lyon", "topic": {"a": [1]}}
    given: Json = {"question": "q", "max_tokens": 100.0, "seed": 1, "temperature": None}
    questions.write_text(json.dumps({"id": 3.0, **given, **columns, "label": None}))
    assert run.inside(*TO_FILE, "--temperature", "0.5").code == 0
    (record,) = records(answers.read_text())
    assert (record["id"], record["answer"], record["fields"]) == (3, "Paris.", columns)
    (asked,) = run.asked
    assert set(asked.body) & {*columns, "label", "fields"} == set()
    sent = [asked.body[name] for name in ("max_tokens", "seed", "temperature")]
    assert sent == [100, 1, 0.5]


def test_gaps_in_a_data_set(run: Program, questions: Path) -> None:
    """null and NaN mean that nothing was given, an id included."""
    questions.write_text(
        '{"id": null, "question": "q", "system": null, "max_tokens": null, "temperature": NaN}\n'
        '{"id": "x", "question": null, "messages": [{"role": "user", "content": "talk"}]}\n'
    )
    result = run.inside(*BATCH, "--workers", "1", "--max-tokens", "9")
    assert [record["id"] for record in records(result.stdout)] == [1, "x"]
    assert run.questions == ["q", "talk"]
    assert [asked.body["max_tokens"] for asked in run.asked] == [9, 9]


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ('"max_token": 5', "did you mean 'max_tokens'"),
        ('"Provider": "groq"', "did you mean 'provider'"),
        ('"temprature": 0', "did you mean 'temperature'"),
        ('"stream": true', "stream"),
        ('"n": 2', "n is not supported"),
    ],
)
def test_columns_that_look_like_arguments(
    run: Program, questions: Path, column: str, words: str
) -> None:
    """What may be a mistake is refused, rather than left out."""
    questions.write_text(f'{{"question": "q", {column}}}')
    refused(run, BATCH, "line 1", words)


def test_verbose_names_the_question(run: Program, questions: Path) -> None:
    """With -v each line begins with the id of the question that it is about."""
    questions.write_text('one\n{"id": "x", "question": "two"}\n')
    lines = run.inside(*BATCH, "-v").stderr.splitlines()
    for name in ("1", "x"):
        assert f"[{name}] ✅ Success with cerebras one on attempt 1" in lines
    assert lines[0] == "🚀 Initializing Fallback LLM System..."


@pytest.mark.parametrize("flags", [["--json"], ["--stats"]], ids=str)
def test_flags_that_a_batch_knows(run: Program, questions: Path, flags: list[str]) -> None:
    """Its lines are JSON with or without --json, and it can tell its statistics."""
    result = run.inside(*BATCH, *flags)
    assert result.code == 0
    assert len(records(result.stdout)) == 40
    assert ("   total_requests: 40\n" in result.stderr) == (flags == ["--stats"])


def test_a_failed_question(run: Program, questions: Path, answers: Path) -> None:
    """Its line has an error and no answer, the others go on; the next run asks it again."""
    bad = {"id": "bad", "question": "q", "model": "groq:bad"}
    questions.write_text("one\n" + json.dumps(bad) + "\nthree\n")
    run.emulator.plan("groq/bad", Reply(400))
    result = run.inside(*TO_FILE)
    done = {record["id"]: record for record in records(answers.read_text())}
    assert (result.code, sorted(map(str, done))) == (1, ["1", "3", "bad"])
    assert done["bad"]["answer"] is None
    assert "400" in done["bad"]["error"]
    assert re.search(r"^2 answered, 1 failed\n +1 x groq: 400 ", result.stderr, re.MULTILINE)
    assert "same command again" in result.stderr
    run.emulator.plan("groq/bad")
    assert run.inside(*TO_FILE, "-q") == (0, "", "")
    assert run.models[3:] == ["bad"]
    assert len(records(answers.read_text())) == 3


def test_why_a_batch_failed(run: Program, questions: Path) -> None:
    """The commonest reasons are told with their counts, under -q as well."""
    lines_of_input = []
    for model, count in (("rare", 1), ("often", 5), ("common", 3)):
        run.emulator.plan(f"groq/{model}", Reply(400, body={"error": {"message": f"{model} no"}}))
        lines_of_input.extend([json.dumps({"question": "q", "model": f"groq:{model}"})] * count)
    questions.write_text("\n".join(lines_of_input))
    result = run(*BATCH, "-q")
    assert result.code == 1
    head, *reasons = result.stderr.splitlines()
    assert head == "0 answered, 9 failed"
    told = [re.findall(r"^ +(\d+) x groq: 400 .*?(\w+) no$", reason) for reason in reasons]
    assert told == [[("5", "often")], [("3", "common")], [("1", "rare")]]


def test_answers_that_are_json(run: Program, questions: Path, answers: Path) -> None:
    """With --expect-json an answer is a JSON value; what is none is asked of the next model."""
    questions.write_text("one\ntwo\n")
    run.emulator.plan("cerebras", Reply(text='```json\n{"a": [1, null]}\n```'))
    assert run.inside(*TO_FILE, "--expect-json").code == 0
    assert [record["answer"] for record in records(answers.read_text())] == [{"a": [1, None]}] * 2
    run.emulator.plan("cerebras", Reply(text="Paris."))
    run.emulator.plan("groq", Reply(text="[]"))
    result = run.inside(*BATCH, "--expect-json", "--workers", "1")
    assert result.code == 0
    for record in records(result.stdout):
        assert (record["answer"], record["error"], record["provider"]) == ([], None, "groq")


def test_an_answer_that_is_null(run: Program, questions: Path, answers: Path) -> None:
    """The JSON value null is an answer too: it is not paid for again."""
    questions.write_text("one\n")
    run.plan(Reply(text="null"))
    assert run.inside(*TO_FILE, "--expect-json").code == 0
    assert run.inside(*TO_FILE, "--expect-json").code == 0
    assert run.questions == ["one"]
    (record,) = records(answers.read_text())
    assert (record["answer"], record["error"]) == (None, None)


def test_no_answer_is_json(run: Program, questions: Path) -> None:
    """A question without an acceptable answer has failed, and says why."""
    questions.write_text("one\n")
    result = run.inside(*BATCH, "--expect-json", "--max-attempts", "1", "-q")
    assert result.code == 1
    (record,) = records(result.stdout)
    assert record["answer"] is None
    assert "not accepted" in record["error"]
    assert "not accepted" in result.stderr


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
    ("line", "words"),
    [
        ('{"id": 1, "question": "q"}', "duplicate id 1"),
        ('{"id": 1.5, "question": "q"}', "1.5"),
        ('{"id": true, "question": "q"}', "id must be"),
        ('{"id": [1], "question": "q"}', "id must be"),
        ('{"q": "q"}', "'q'"),
        ('{"id": "x", "prompt": "q"}', "'prompt'"),
        ('{"question": "q", "sytem": "S"}', "did you mean 'system'"),
    ],
)
def test_what_is_wrong_with_a_line(run: Program, questions: Path, line: str, words: str) -> None:
    """An id, a name of a field: it says which."""
    questions.write_text(f"fine\n{line}\n")
    refused(run, BATCH, "line 2", words)


def test_an_edited_file_of_questions(run: Program, questions: Path, answers: Path) -> None:
    """Whatever of a question was changed, its old answer is not taken for the new one's."""
    message: Json = {"role": "user", "content": "talk"}
    line: Json = {"messages": [message], "system": "S", "model": "groq:two"}
    questions.write_text(json.dumps(line) + "\nlast\n")
    assert run.inside(*TO_FILE).code == 0
    before = answers.read_text()
    told = (
        "differs from the question answered as id 1 in answers.jsonl; use another -o, or give ids"
    )
    changed: list[Json] = [
        {**line, "messages": [{**message, "content": "listen"}]},
        {**line, "system": "T"},
        {**line, "model": "groq:other"},
        {**line, "temperature": 0},
        {"question": "a line that was inserted on top"},
    ]
    for fields in changed:
        questions.write_text(f"{json.dumps(fields)}\n{json.dumps(line)}\n")
        refused(run, TO_FILE, "line 1", told)
    assert records(answers.read_text()) == records(before)
    reordered = dict(reversed(list(line.items())))
    questions.write_text(json.dumps(reordered) + "\nlast\n")
    assert run.inside(*TO_FILE).code == 0
    assert len(run.asked) == 2


def test_lines_with_ids_can_move(run: Program, questions: Path, answers: Path) -> None:
    """A question with an id of its own keeps its answer, wherever it stands."""
    message: Json = {"role": "user", "content": "talk"}
    old = [json.dumps({"id": name, "messages": [message], "system": name}) for name in "ab"]
    questions.write_text("\n".join(old))
    assert run.inside(*TO_FILE).code == 0
    new = json.dumps({"id": "c", "messages": [message]})
    questions.write_text("\n".join([new, *reversed(old)]))
    assert run.inside(*TO_FILE).code == 0
    assert len(run.asked) == 3
    assert sorted(record["id"] for record in records(answers.read_text())) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "flags", [["-m", "groq:two"], ["-s", "S"], ["--temperature", "0"], ["--expect-json"]], ids=str
)
def test_answers_that_other_flags_gave(
    run: Program, questions: Path, answers: Path, flags: list[str]
) -> None:
    """They are kept, with a warning."""
    questions.write_text("one\ntwo\n")
    assert "other flags" not in run.inside(*TO_FILE).stderr
    assert "other flags" not in run.inside(*TO_FILE).stderr
    result = run.inside(*TO_FILE, *flags)
    assert result.code == 0
    warning = result.stderr.splitlines()[0]
    for words in ("2 answers", "answers.jsonl", "other flags", "another -o"):
        assert words in warning
    assert len(run.asked) == 2


def test_a_file_without_questions(run: Program) -> None:
    """An empty input is warned about, since it is seldom meant."""
    result = run.inside("--batch", "/dev/null")
    assert result[:2] == (0, "")
    assert re.search("^⚠️  /dev/null holds no question", result.stderr)


@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/full", "/dev/null"])
def test_an_output_that_is_no_file(run: Program, questions: Path, path: str) -> None:
    """It cannot be taken up again; the message says what is wrong and what to do."""
    process = run.start(*BATCH, "-o", path, stdout=subprocess.PIPE)
    result = process.end()
    assert result.code == 2
    assert re.fullmatch(f"error: --output {path}: .*leave -o out.*\n", result.stderr)
    assert run.asked == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "missing.txt"], ["--batch", "missing.txt"]),
        ([*BATCH, "-o", "missing/answers.jsonl"], ["--output", "missing/answers.jsonl"]),
        ([*BATCH, "-o", "."], ["--output"]),
        ([*BATCH, "-o", "missing/"], ["--output missing/"]),
        ([*BATCH, "-o", ""], ["--output '': No such file"]),
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
    result = run.inside(*BATCH, env={f"{provider.upper()}_API_KEY": None for provider in PROVIDERS})
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


def test_all_bad_lines_are_told(run: Program, questions: Path, answers: Path) -> None:
    """Each on a line of its own, ten at most."""
    bad = '{"question": "q", "max_tokens": 0}\n'
    questions.write_text(f"fine\n{bad}{bad}")
    result = run.inside(*TO_FILE)
    head, *told = result.stderr.splitlines()
    assert (result.code, head) == (2, "error: --batch questions.txt: 2 bad lines")
    assert [line.partition(": ")[0] for line in told] == ["   line 2", "   line 3"]
    assert "max_tokens must be" in told[0]
    questions.write_text(bad * 22)
    told = run.inside(*TO_FILE).stderr.splitlines()
    assert len(told) == 12
    assert told[-2:] == [told[1].replace("line 1:", "line 10:"), "   and 12 more"]
    assert run.asked == []
    assert not answers.exists()


def test_a_mistake_in_the_flags_is_not_told_for_each_line(run: Program, questions: Path) -> None:
    """It is none of the file's."""
    result = run.inside(*BATCH, "--provider", "grok")
    assert result.code == 2
    assert re.fullmatch("error: --provider must be .+\n", result.stderr)


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
    was_told = number == signal.SIGINT
    assert ("Interrupted.\n" in result.stderr) == was_told
    saved = "10 answers written to answers.jsonl; run the same command again"
    assert (saved in result.stderr) == was_told
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


def test_ctrl_c_and_answers_on_stdout(run: Program, questions: Path) -> None:
    """How many were written is told."""
    run.plan(*[Reply(text="Paris.")] * 3, SILENCE)
    process = run.start(*BATCH, "--workers", "1")
    until(lambda: len(run.asked) == 4)
    result = process.signal(signal.SIGINT)
    assert "\n3 answers written to stdout.\n" in result.stderr
    assert len(records(result.stdout)) == 3


def test_the_questions_are_read_once(run: Program, questions: Path, answers: Path) -> None:
    """What becomes of their file while they are asked does not matter."""
    run.plan(*[Reply(text="Paris.")] * 10, Reply(text="Paris.", delay=0.02))
    process = run.start(*TO_FILE, "--workers", "2")
    until(lambda: len(run.asked) >= 10)
    questions.write_text('one longer line that moves all the others\n{"question": "half')
    assert process.end().code == 0
    assert sorted(run.questions) == sorted(QUESTIONS)
    assert len(records(answers.read_text())) == 40


def begun(run: Program) -> Process:
    """A batch that has written some of its answers, and has others to come."""
    run.plan(*[Reply(text="Paris.")] * 10, Reply(text="Paris.", delay=0.02))
    process = run.start(*TO_FILE, "--workers", "2")
    until(lambda: len(lines(run.folder / "answers.jsonl")) >= 5)
    return process


def test_an_output_that_is_removed(run: Program, questions: Path, answers: Path) -> None:
    """It is written again with all its answers."""
    process = begun(run)
    answers.unlink()
    result = process.end()
    assert result.code == 0
    assert result.stderr.count("answers.jsonl was removed during the batch") == 1
    assert_complete(run, answers)


def test_an_output_that_is_replaced(run: Program, questions: Path, answers: Path) -> None:
    """The batch stops, whatever an editor has put there is left alone, and it can be resumed."""
    process = begun(run)
    other = run.folder / "other"
    other.write_text(answers.read_text())
    other.replace(answers)
    before = answers.read_text()
    result = process.end()
    assert result.code == 1
    told = r"error: answers\.jsonl was replaced .*; \d+ answers written to answers\.jsonl; run the "
    assert re.search(told, result.stderr)
    assert answers.read_text() == before
    assert run(*TO_FILE).code == 0
    assert_complete(run, answers)


def answer_of(number: int) -> Json:
    """A record as a batch writes it."""
    return {"id": number, "question": "q", "answer": "Paris.", "error": None}


@pytest.fixture
def output(questions: Path, answers: Path) -> Iterator[Output]:
    """An output with an answer."""
    output = Output(str(answers), str(questions))
    output.write(answer_of(1))
    yield output
    output.close()


def test_an_output_that_goes_after_the_last_answer(output: Output, answers: Path) -> None:
    """It is looked at once more at the end."""
    answers.unlink()
    output.keep_place()
    output.keep_place()
    assert records(answers.read_text()) == [answer_of(1)]


def test_an_output_that_is_cut(output: Output, answers: Path) -> None:
    """`> answers.jsonl` in another shell takes answers away."""
    answers.write_text("")
    with pytest.raises(OSError, match=r"answers\.jsonl was cut .*lost"):
        output.write(answer_of(2))


def test_an_output_whose_folder_goes(run: Program, questions: Path) -> None:
    """Where it cannot be written again, what is lost is told."""
    folder = run.folder / "folder"
    folder.mkdir()
    output = Output(str(folder / "answers.jsonl"), str(questions))
    output.write(answer_of(1))
    shutil.rmtree(folder)
    with pytest.raises(OSError, match=r"removed .* cannot be written again: No such file"):
        output.write(answer_of(2))
    output.close()


def test_torn_failed_and_double_lines_go(run: Program, questions: Path, answers: Path) -> None:
    """A resumed file loses what is no answer, and keeps the answers and who may read them."""
    assert run.inside(*TO_FILE, "--workers", "1").code == 0
    whole = answers.read_bytes().splitlines(keepends=True)
    failed = whole[1].replace(b'"answer": "Paris.", "error": null', b'"answer": null, "error": ""')
    assert failed != whole[1]
    answers.write_bytes(b"".join([whole[0], failed, *whole[3:], whole[0], whole[2][:-9]]))
    answers.chmod(0o600)
    assert run.inside(*TO_FILE).code == 0
    assert sorted(run.questions[40:]) == QUESTIONS[1:3]
    assert_complete(run, answers)
    assert answers.read_bytes().startswith(whole[0] + b"".join(whole[3:]))
    assert answers.stat().st_mode & 0o777 == 0o600


def test_a_disk_that_gets_full(run: Program, questions: Path, answers: Path) -> None:
    """It stops with one line; when there is room again, only what was in flight is asked again."""
    result = run(*TO_FILE, "-q", "--workers", "4", command=[*LITTLE, *run.command])
    assert result[:2] == (1, "")
    told = (
        r"error: .+; \d+ answers written to answers\.jsonl; run the same command again to resume\n"
    )
    assert re.fullmatch(told, result.stderr)
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


@pytest.fixture
def retrying(run: Program, questions: Path) -> list[str]:
    """What a batch has to begin with whose questions soon wait for the next attempt.

    Three answers of each provider are long; whoever asks then is to come back soon.
    """
    for provider in PROVIDERS:
        long_answers = [Reply(text="Paris." * 2000)] * 3
        run.emulator.plan(provider, *long_answers, rate_limited(provider, 0.4))
    return ["-q", "--workers", "8", "--base-delay", "0.4"]


def assert_nothing_is_asked_any_more(run: Program) -> None:
    """Asserts that no request comes later than the end of the process."""
    time.sleep(0.2)  # what was under way may still arrive
    before = len(run.asked)
    assert before < len(QUESTIONS)
    time.sleep(0.7)
    assert len(run.asked) == before


def test_a_reader_goes_away_while_questions_wait(run: Program, retrying: list[str]) -> None:
    """Nobody pays for answers that nobody reads."""
    process = run.start(*BATCH, *retrying, stdout=subprocess.PIPE)
    assert process.popen.stdout is not None
    assert process.popen.stdout.readline()
    process.popen.stdout.close()
    left_at = time.monotonic()
    assert process.end() == (141, "", "")
    assert time.monotonic() - left_at < 3
    assert_nothing_is_asked_any_more(run)


def test_a_disk_gets_full_while_questions_wait(run: Program, retrying: list[str]) -> None:
    """Nobody pays for answers that cannot be kept."""
    started = time.monotonic()
    result = run(*TO_FILE, *retrying, command=[*LITTLE, *run.command])
    assert result[:2] == (1, "")
    assert re.fullmatch(r"error: .+\n", result.stderr)
    assert time.monotonic() - started < 5
    assert_nothing_is_asked_any_more(run)


def test_ctrl_c_while_questions_wait(run: Program, answers: Path, retrying: list[str]) -> None:
    """It ends at once, and what was answered is kept."""
    process = run.start(*TO_FILE, *retrying)
    until(lambda: len(lines(answers)) == 9 and len(run.asked) >= 9 + 8)
    pressed_at = time.monotonic()
    assert process.signal(signal.SIGINT).code == -signal.SIGINT
    assert time.monotonic() - pressed_at < 2
    assert_nothing_is_asked_any_more(run)
    assert len(records(answers.read_text())) == 9


def test_nothing_is_said_after_the_end(run: Program, questions: Path) -> None:
    """Replies that come while the program ends are nobody's business any more."""
    refusals = [Reply(429, delay=0.2 + number * 0.004) for number in range(60)]
    long_answer = Reply(text="Paris." * 2000, delay=0.2)
    run.plan(long_answer, *refusals)
    result = run(*TO_FILE, "-q", "--workers", "40", command=[*LITTLE, *run.command])
    assert result[:2] == (1, "")
    assert re.fullmatch(r"error: .+\n", result.stderr)


# --- Files of the user's ------------------------------------------------------------------------


def test_other_files_are_left_alone(run: Program, questions: Path, answers: Path) -> None:
    """What lies beside the output stays as it is, files and links alike."""
    assert run.inside(*TO_FILE).code == 0
    answers.write_bytes(b"".join(answers.read_bytes().splitlines(keepends=True)[:-1]))
    precious = run.folder / "precious"
    precious.write_text("mine\n")
    part = run.folder / "answers.jsonl.part"
    part.write_text("mine too\n")
    links = [run.folder / f"answers.jsonl.{end}" for end in ("tmp", "new", "bak")]
    for link in links:
        link.symlink_to(precious)
    assert run.inside(*TO_FILE).code == 0
    assert len(records(answers.read_text())) == len(QUESTIONS)
    assert (precious.read_text(), part.read_text()) == ("mine\n", "mine too\n")
    assert all(link.is_symlink() for link in links)
    known = {questions, answers, precious, part, *links}
    assert set(run.folder.iterdir()) == known


def test_an_output_that_is_a_link(run: Program, questions: Path, answers: Path) -> None:
    """The file that it leads to has the answers, and the link stays one."""
    elsewhere = run.folder / "elsewhere"
    elsewhere.mkdir()
    answers.symlink_to(elsewhere / "real.jsonl")
    for _ in range(2):
        assert run.inside(*TO_FILE).code == 0
        assert answers.is_symlink()
        assert len(records((elsewhere / "real.jsonl").read_text())) == len(QUESTIONS)
    assert len(run.asked) == len(QUESTIONS)


def test_a_last_line_without_its_newline(run: Program, questions: Path, answers: Path) -> None:
    """It is whole, and not paid for again."""
    assert run.inside(*TO_FILE).code == 0
    answers.write_text(answers.read_text().rstrip("\n"))
    assert run.inside(*TO_FILE).code == 0
    assert len(run.asked) == len(QUESTIONS)
    assert_complete(run, answers)


def test_a_shell_has_read_the_first_line(run: Program, questions: Path) -> None:
    """`--batch -` begins where the shell stopped, also in a file."""
    questions.write_text("heading\none\ntwo\n")
    script = '{ read -r heading; "$@"; } < questions.txt'
    command = ["/bin/sh", "-c", script, "-", *run.command]
    result = run("--batch", "-", "-q", command=command)
    assert (result.code, result.stderr) == (0, "")
    assert sorted(record["question"] for record in records(result.stdout)) == ["one", "two"]


@pytest.mark.parametrize("change", ["CRLF", "byte order mark", "blank lines", "NULs at the end"])
def test_an_output_that_went_through_an_editor(
    run: Program, questions: Path, answers: Path, change: str
) -> None:
    """What an editor adds, or a crash, is taken out again; nothing is paid for twice."""
    assert run.inside(*TO_FILE).code == 0
    whole = answers.read_bytes()
    answers.write_bytes(
        {
            "CRLF": whole.replace(b"\n", b"\r\n"),
            "byte order mark": b"\xef\xbb\xbf" + whole,
            "blank lines": whole.replace(b"\n", b"\n\n") + b"\n",
            "NULs at the end": whole + b"\0" * 100,
        }[change]
    )
    assert run.inside(*TO_FILE).code == 0
    assert answers.read_bytes() == whole
    assert len(run.asked) == len(QUESTIONS)


def test_an_output_of_version_2_0_0(run: Program, questions: Path, answers: Path) -> None:
    """Its answers are kept, and questions and flags are known by their digests."""
    old = (
        '{"id": "x", "question": "q", "line_digest": "62f25e711038bde8", '
        '"flags_digest": "3f72313ba44a0a05", "answer": "Paris.", "error": null, "attempts": []}\n'
        '{"id": 1, "question": "one", "line_digest": "eee343db1fd2b19f", '
        '"flags_digest": "3f72313ba44a0a05", "answer": "Paris.", "error": null, "attempts": []}\n'
    )
    answers.write_text(old)
    line = '{"id": "x", "question": "q", "system": "S", "max_tokens": 7}'
    questions.write_text(f"one\n{line}\n")
    assert run.inside(*TO_FILE) == (0, "", "0 answered, 0 failed, 2 answered before\n")
    assert answers.read_text() == old
    assert "other flags" in run.inside(*TO_FILE, "-s", "S").stderr
    questions.write_text(f"two\n{line}\n")
    refused(run, TO_FILE, "line 1", "differs")
    assert run.asked == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_drive_without_locks(
    run: Program, questions: Path, answers: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told once, and all goes on."""

    def flock(file: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    answers.write_text('{"id": 1, "answer": null, "error": "failed"}\n')
    result = run.inside(*TO_FILE)
    assert result.code == 0
    assert_complete(run, answers)
    warning, _ = result.stderr.splitlines()
    assert re.fullmatch(r"⚠️  answers\.jsonl cannot be locked \(.+\): .+", warning)
    assert run.inside(*TO_FILE, "-q") == (0, "", "")


def test_a_drive_without_modes(
    run: Program, questions: Path, answers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """chmod fails on some network drives."""

    def chmod(path: object, mode: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", chmod)
    answers.write_text('{"id": 1, "answer": null, "error": "failed"}\n')
    assert run.inside(*TO_FILE).code == 0
    assert_complete(run, answers)


def test_a_system_that_replaces_no_open_file(
    run: Program, questions: Path, answers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows: neither the file that takes the place nor the one that had it may be open."""
    replace = os.replace

    def is_open(path: str) -> bool:
        links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        return os.path.realpath(path) in map(os.path.realpath, links)

    def strict(source: str, target: str) -> None:
        assert not is_open(source)
        assert not is_open(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", strict)
    answers.write_text('{"id": 1, "answer": null, "error": "failed"}\n')
    assert run.inside(*TO_FILE).code == 0
    assert_complete(run, answers)


def test_a_full_disk_while_an_output_is_tidied(
    run: Program, questions: Path, answers: Path
) -> None:
    """Nothing is lost, no hidden file stays, and what to do is said."""
    assert run.inside(*TO_FILE).code == 0
    failed = '{"id": 99, "answer": null, "error": "failed"}\n'
    before = failed + answers.read_text()
    answers.write_text(before)
    result = run(*TO_FILE, command=[*LITTLE, *run.command])
    assert result[:2] == (1, "")
    told = r"error: .+; 40 answers written to answers\.jsonl; run the same command again .+\n"
    assert re.fullmatch(told, result.stderr)
    assert answers.read_text() == before
    assert sorted(path.name for path in run.folder.iterdir()) == ["answers.jsonl", "questions.txt"]


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
    assert run.inside(*BATCH, "--workers", "4").code == 0
    assert len(run.asked) == 40
    assert run.emulator.connections <= 4


def test_health_is_shared(run: Program, questions: Path) -> None:
    """A dead provider is probed now and then, not asked in every question."""
    run.emulator.plan("cerebras", Reply(503))
    assert run.inside(*BATCH, "--workers", "4").code == 0
    assert run.models.count("two") == 40
    assert run.models.count("one") < 20


def test_a_rate_limit_slows_and_does_not_fail(run: Program, questions: Path) -> None:
    """Questions wait for a provider that is only limited for a moment."""
    run.emulator.plan("groq", *[rate_limited("groq", 0.3)] * 4, Reply(text="Paris."))
    result = run.inside(*BATCH, "--workers", "4", "--provider", "groq", "--base-delay", "0")
    assert result.code == 0
    assert len(records(result.stdout)) == 40


@pytest.fixture
def slow(run: Program, questions: Path) -> list[str]:
    """What a batch has to begin with that is slow enough for its progress to be shown."""
    questions.write_text("one\ntwo\nthree\n")
    run.plan(Reply(text="Paris.", delay=0.3))
    return ["--workers", "1"]


@pytest.mark.parametrize("columns", [50, 200])
def test_progress_is_one_line_of_a_terminal(run: Program, slow: list[str], columns: int) -> None:
    """It is drawn again and again: done, total, failed, speed, time left, who answers."""
    code, terminal = run.on_terminal(*TO_FILE, *slow, columns=columns)
    assert code == 0
    told = r"[123] ?/ ?3\b.*\b0 failed.*/s.*\bleft\b.*cerebras"
    received = terminal.received.replace("\x1b[J", "")
    drawn = [line for line in re.split(r"[\r\n]+", received) if re.search(told, line)]
    assert len(drawn) >= 2
    assert max(map(len, drawn)) < columns
    assert terminal.screen == "3 answered, 0 failed\n"


def test_progress_fits_the_terminal_of_stderr(run: Program, slow: list[str]) -> None:
    """It does not wrap in a narrow terminal, also where the answers go to a file by `>`."""
    terminal = run.terminal(columns=50)
    assert run(*BATCH, *slow, stderr=terminal.end).code == 0
    terminal.finish()
    assert "3/3 done" in terminal.received
    assert terminal.screen == "3 answered, 0 failed\n"


def test_progress_and_answers_on_one_terminal(run: Program, slow: list[str]) -> None:
    """An answer takes the place of what is drawn."""
    code, terminal = run.on_terminal(*BATCH, *slow, columns=60)
    assert code == 0
    assert "2/3 done" in terminal.received
    shown = terminal.screen.replace("\n", "")
    assert re.findall(r"\d/3 done", shown) == []
    assert shown.count('"answer": "Paris."') == 3


def test_progress_survives_a_resize(run: Program, slow: list[str]) -> None:
    """What a narrower terminal has wrapped is erased as well."""
    terminal = run.terminal(columns=200)
    process = run.start(*TO_FILE, *slow, stderr=terminal.end)
    until(lambda: "1/3 done" in terminal.received)
    terminal.resize(30)
    until(lambda: "2/3 done" in terminal.received)
    assert process.end().code == 0
    terminal.finish()
    assert "\r\x1b[J2/3 done, 0 failed, " in terminal.received
    (line,) = re.findall("2/3 done.*?\r", terminal.received)
    assert len(line) == 30


def test_progress_and_other_lines(run: Program, slow: list[str]) -> None:
    """What is told meanwhile, with -v or of an interruption, does not mix with it."""
    terminal = run.terminal()
    assert run(*TO_FILE, *slow, "-v", stderr=terminal.end).code == 0
    terminal.finish()
    assert "3/3 done" in terminal.received
    mixed = r"^(?!\d/3 done).*\bleft\b"
    assert re.findall(mixed, terminal.screen, re.MULTILINE) == []
    assert terminal.screen.count("✅ Success with cerebras one on attempt 1\n") == 3
    assert terminal.screen.endswith("\n3 answered, 0 failed\n")


def test_ctrl_c_and_progress(run: Program, slow: list[str], answers: Path) -> None:
    """What is said at the end has lines of its own."""
    terminal = run.terminal(columns=200)
    process = run.start(*TO_FILE, *slow, stderr=terminal.end)
    until(lambda: "1/3 done" in terminal.received)
    assert process.signal(signal.SIGINT).code == -signal.SIGINT
    terminal.finish()
    shown = terminal.screen.splitlines()
    saved = "1 answer written to answers.jsonl; run the same command again to resume."
    assert len([line for line in shown if re.fullmatch(saved, line)]) == 1
    assert shown[-1] == "Interrupted."


def test_no_progress_line_elsewhere(run: Program, questions: Path) -> None:
    """A short run outside a terminal tells its sum alone; -q leaves stderr empty."""
    assert run(*BATCH).stderr.count("\n") == 1
    assert run(*TO_FILE, "-q").stderr == ""
