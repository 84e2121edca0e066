"""What users of such clients reported, and its kin: texts, endings, errors in a 200, hints."""

from __future__ import annotations

import json
import logging
from email.utils import formatdate
from typing import Any, Iterator

import pytest
from fakes import DONE, EPOCH, Reply, World, event, fails, row, says
from peers import Serve, page, replies

from fallback_llm import (
    PROVIDERS,
    AllProvidersFailed,
    AnswerRefused,
    FallbackLLM,
    FallbackLLMError,
    Provider,
    RetryConfig,
    StreamInterrupted,
    judge,
)

pytestmark = pytest.mark.usefixtures("bare")

KEY = "k-0123456789abcdefghijklmnop"


def whole(world: World) -> str:
    return world.llm.complete("Where?").text


def live(world: World) -> str:
    return "".join(world.llm.stream("Where?"))


both = pytest.mark.parametrize("verb", [whole, live])


def chunk(*choices: Any, **more: Any) -> bytes:
    """An event with these choices; `more` stands beside them."""
    return b"data: " + json.dumps({"choices": list(choices), **more}).encode() + b"\n\n"


def delta(index: Any = 0, finish: Any = None, **fields: Any) -> Any:
    return {"index": index, "delta": fields, "finish_reason": finish}


def so_far(text: Any, finish: Any = None, index: int = 0, **more: Any) -> Any:
    """A choice that holds the message as far as it goes, not what was added."""
    message = {"role": "assistant", "content": text}
    return {"index": index, "message": message, "finish_reason": finish, **more}


def raw(*escaped: str) -> bytes:
    """Events whose texts stand in them as given, escapes and all."""
    line = '{"choices": [{"index": 0, "delta": {"content": "%s"}, "finish_reason": null}]}'
    return b"".join(b"data: " + (line % text).encode() + b"\n\n" for text in escaped)


def table(rows: Any) -> Any:
    """A parametrization of rows that begin with a name."""
    return [pytest.param(*values, id=name) for name, *values in rows]


STOP = event(None, "stop") + DONE

# --- The same text more than once ---------------------------------------------------------------

GREW = [
    ("the last chunk repeats all", event("Par") + event("is.") + chunk(so_far("Paris.", "stop"))),
    ("it has an empty delta, too", event("Par") + chunk(so_far("Paris.", "stop", delta={}))),
    (
        "and the last piece as delta",
        event("Par") + chunk(so_far("Paris.", delta={"content": "is."})) + STOP,
    ),
    (
        "each chunk has all so far",
        chunk(so_far("P")) + chunk(so_far("Par")) + chunk(so_far("Paris.", "stop")),
    ),
    ("the whole comes twice", chunk(so_far("Paris.")) + chunk(so_far("Paris.", "stop"))),
    (
        "the whole comes after the end",
        event("Paris.") + event(None, "stop") + chunk(so_far("Paris.")),
    ),
    ("only the whole comes", chunk(so_far("Paris.", "stop"))),
    ("the whole, without an end of its own", event("Par") + chunk(so_far("Paris."))),
    (
        "the whole in parts",
        event("Par") + chunk(so_far([{"type": "text", "text": "Paris."}], "stop")),
    ),
    ("a delta goes on after a message", chunk(so_far("Par")) + event("is.", "stop")),
    ("a message without text takes nothing away", event("Paris.") + chunk(so_far("", "stop"))),
    ("nor does one of null", event("Paris.") + chunk(so_far(None, "stop"))),
    (
        "nor an empty one",
        event("Paris.") + chunk({"index": 0, "message": {}, "finish_reason": "stop"}),
    ),
    ("an empty message first", chunk(so_far("")) + event("Paris.", "stop")),
    (
        "a thought grows, too",
        chunk(so_far("<think>H"))
        + chunk(so_far("<think>Hm</think>Par"))
        + chunk(so_far("<think>Hm</think>Paris.", "stop")),
    ),
    ("plain JSON with an empty delta", {"choices": [so_far("Paris.", "stop", delta={})]}),
    (
        "plain JSON with the same delta",
        {"choices": [so_far("Paris.", "stop", delta={"content": "Paris."})]},
    ),
]


@both
@pytest.mark.parametrize("body", table(GREW))
def test_a_text_that_is_sent_again_counts_once(verb: Any, body: Any) -> None:
    """A message in a chunk is all of the answer so far; it replaces, it does not add."""
    body = body + DONE if isinstance(body, bytes) else body
    world = World({"a": [Reply(body=body)]})
    assert (verb(world), world.asked) == ("Paris.", "a")


REPEATS = [["1", "10"], ["ha", "ha"], ["a", "ab", "abc"], ["no", "no", "no"], ["x = ", "x = 1"]]
REPEATS += [["10", "1", "101"], ["Paris", "Paris."], ["\n", "\n\n", "a"], ["0", "00", "000"]]


@both
@pytest.mark.parametrize("pieces", REPEATS, ids=str)
def test_a_delta_is_never_taken_for_the_whole(verb: Any, pieces: Any) -> None:
    """However much it looks like it."""
    body = b"".join(event(piece) for piece in pieces) + STOP
    assert verb(World({"a": [Reply(body=body)]})) == "".join(pieces)


def test_a_message_that_takes_back_what_was_said() -> None:
    """It wins while nothing was shown; what was shown cannot be replaced."""
    body = event("Rome") + chunk(so_far("Paris.", "stop")) + DONE
    assert whole(World({"a": [Reply(body=body)]})) == "Paris."
    pieces = World({"a": [Reply(body=body)]}).llm.stream("Where?")
    assert next(pieces) == "Rome"
    with pytest.raises(StreamInterrupted) as broken:
        next(pieces)
    assert broken.value.partial == "Rome"


# --- Choices that are not ours ------------------------------------------------------------------

OTHERS = [
    (
        "in chunks between",
        event("Par")
        + chunk(delta(1, content="Rome "))
        + event("is.")
        + chunk(delta(1, content="so"))
        + STOP,
    ),
    ("beside ours", chunk(delta(0, content="Paris."), delta(1, content="Rome.")) + STOP),
    (
        "before ours in one chunk",
        chunk(delta(1, content="Rome."), delta(0, content="Paris.")) + STOP,
    ),
    ("all of it comes first", chunk(delta(1, "stop", content="Rome.")) + event("Paris.") + STOP),
    (
        "all of it comes last",
        event("Paris.") + event(None, "stop") + chunk(delta(1, "stop", content="Rome.")) + DONE,
    ),
    ("it is cut, ours is not", chunk(delta(1, "length", content="Ro")) + event("Paris.") + STOP),
    (
        "it is filtered, ours is not",
        event("Par") + chunk(delta(1, "content_filter")) + event("is.") + STOP,
    ),
    ("it fails, ours does not", event("Par") + chunk(delta(1, "error")) + event("is.") + STOP),
    ("it is a whole message", event("Par") + chunk(so_far("Rome.", index=1)) + event("is.") + STOP),
    ("it thinks in tags", chunk(delta(1, content="<think>")) + event("Paris.") + STOP),
    (
        "ours has no number",
        chunk({"delta": {"content": "Paris."}}) + chunk(delta(2, content="Rome.")) + STOP,
    ),
    ("ours has null as number", chunk(delta(None, content="Paris.")) + STOP),
    ("plain JSON", {"choices": [so_far("Paris.", "stop"), so_far("Rome.", "stop", 1)]}),
    (
        "plain JSON, ours is last",
        {"choices": [so_far("Rome.", "stop", 1), so_far("Paris.", "stop")]},
    ),
    (
        "plain JSON without numbers",
        {"choices": [{"message": {"content": "Paris."}}, {"message": {"content": "Rome."}}]},
    ),
]


@both
@pytest.mark.parametrize("body", table(OTHERS))
def test_another_choice_is_not_mixed_in(verb: Any, body: Any) -> None:
    world = World({"a": [Reply(body=body)]})
    assert (verb(world), world.asked) == ("Paris.", "a")


UNENDED = [
    ("nothing for us", chunk(delta(1, "stop", content="Rome.")) + DONE),
    ("ours has no end", event("Par") + chunk(delta(1, "stop", content="Rome."))),
    ("ours is cut off in silence", event("Par") + chunk(delta(1, "stop")) + b": bye\n\n"),
]


@pytest.mark.parametrize("body", table(UNENDED))
def test_the_end_of_another_choice_is_not_ours(body: Any) -> None:
    world = World({"a": [Reply(body=body)]})
    assert (whole(world), world.asked) == ("B", "ab")


# --- Thinking -----------------------------------------------------------------------------------

HM = {"type": "text", "text": "Hm"}
THOUGHTS: Any = [
    ("reasoning", {"reasoning": "Hm"}),
    ("reasoning_content", {"reasoning_content": "Hm"}),
    ("reasoning_content beside an empty text", {"content": "", "reasoning_content": "Hm"}),
    ("thinking", {"thinking": "Hm"}),
    ("thinking beside null", {"content": None, "thinking": "Hm"}),
    ("details with text", {"reasoning_details": [{"type": "reasoning.text", "text": "Hm"}]}),
    ("a summary", {"reasoning_details": [{"type": "reasoning.summary", "summary": "Hm"}]}),
    ("encrypted", {"reasoning_details": [{"type": "reasoning.encrypted", "data": "aGVsbG8="}]}),
    ("a part that holds a text", {"content": [{"type": "thinking", "thinking": "Hm"}]}),
    ("a part that holds parts", {"content": [{"type": "thinking", "thinking": [HM]}]}),
    ("a part of reasoning", {"content": [{"type": "reasoning", "text": "Hm"}]}),
    ("a part of reasoning by its name", {"content": [{"type": "reasoning", "reasoning": "Hm"}]}),
]


@both
@pytest.mark.parametrize("thought", table(THOUGHTS))
def test_thinking_is_progress_and_no_text(verb: Any, thought: Any) -> None:
    """Under each of its names it renews the idle timeout."""
    thoughts = (chunk(delta(**thought)), 6.0) * 4
    world = World({"a": [Reply(body=(*thoughts, event("Paris."), STOP))]}, idle_timeout=10.0)
    assert (verb(world), world.asked, world.clock.now) == ("Paris.", "a", 24.0)


@pytest.mark.parametrize("thought", table(THOUGHTS))
def test_thinking_may_use_up_max_tokens(thought: Any) -> None:
    """Then the reason says what to raise, and the next model is asked."""
    for body in (chunk(delta(**thought)) + event(None, "length") + DONE, plain(thought)):
        world = World({"a": [Reply(body=body)]}, max_attempts=1)
        first = world.llm.complete("Where?").attempts[0]
        assert first.verdict is not None
        assert first.verdict.name == "UNSUITABLE"
        assert "max_tokens" in first.reason


def plain(message: Any, finish: Any = "length") -> Any:
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish}]}


NO_THOUGHTS: Any = [
    ("an empty reasoning", {"reasoning": ""}),
    ("null", {"reasoning_content": None, "thinking": None}),
    ("no details", {"reasoning_details": []}),
    ("white space", {"reasoning": " \n"}),
    ("an empty part", {"content": [{"type": "thinking", "thinking": ""}]}),
]


@pytest.mark.parametrize("nothing", table(NO_THOUGHTS))
def test_an_empty_thought_is_silence(nothing: Any) -> None:
    thoughts = (chunk(delta(**nothing)), 6.0) * 4
    world = World({"a": [Reply(body=(*thoughts, event("Paris."), STOP))]}, idle_timeout=10.0)
    assert (whole(world), world.asked) == ("C", "ac")  # whoever is silent is left with its siblings


PARTS = [
    (
        "a thought and a text",
        [{"type": "thinking", "thinking": [HM]}, {"type": "text", "text": "Paris."}],
    ),
    (
        "a thought by its other name",
        [{"type": "reasoning", "text": "Hm"}, {"type": "text", "text": "Paris."}],
    ),
    ("texts", [{"type": "text", "text": "Par"}, {"type": "text", "text": "is."}]),
]


@both
@pytest.mark.parametrize("parts", table(PARTS))
def test_a_text_in_parts(verb: Any, parts: Any) -> None:
    for body in (chunk(delta(content=parts)) + STOP, plain({"content": parts}, "stop")):
        assert verb(World({"a": [Reply(body=body)]})) == "Paris."


UNOPENED = [
    ("in one piece", event("Let me see.</think>Paris.") + STOP),
    ("in three", event("Let me see.") + event("</think>") + event("Paris.") + STOP),
    ("the tag is cut", event("Hm </thi") + event("nk>\n\nPar") + event("is.") + STOP),
    ("nothing before it", event("</think>\n\nPar") + event("is.") + STOP),
    ("white space before it", event("\n</think>\n\nParis.") + STOP),
    ("plain JSON", says("Let me see.\n</think>\n\nParis.").body),
    ("all so far", chunk(so_far("Hm")) + chunk(so_far("Hm</think>Paris.", "stop")) + DONE),
]


@pytest.mark.parametrize("body", table(UNOPENED))
def test_a_thought_without_a_beginning(body: Any) -> None:
    """What stands before a lone </think> is no part of the answer (templates send <think>)."""
    world = World({"a": [Reply(body=body)]})
    assert (whole(world), world.asked) == ("Paris.", "a")


@pytest.mark.parametrize("text", ["Let me see.</think>", "Hm</think>\n \n"])
def test_a_thought_and_no_answer(text: str) -> None:
    for body in (event(text) + STOP, says(text).body):
        world = World({"a": [Reply(body=body)]})
        assert (whole(world), world.asked) == ("B", "ab")


# --- How answers end ----------------------------------------------------------------------------

HALF = "There are three steps: first, op"
GOOD = ["stop", "STOP", "Stop", "end_turn", "END_TURN", "eos", "EOS", "eos_token", "complete"]
GOOD += ["completed", "COMPLETE", "stop_sequence", "tool_calls"]
CUTS = ["length", "LENGTH", "Length", "max_tokens", "MAX_TOKENS", "model_length", "MODEL_LENGTH"]
CUTS += ["model_context_window_exceeded", "max_output_tokens", "MAX_OUTPUT_TOKENS"]
FILTERS = ["content_filter", "CONTENT_FILTER", "sensitive", "safety", "SAFETY", "Sensitive"]
BROKEN = ["abort", "aborted", "ABORT", "error", "ERROR", "network_error", "unknown", "cancelled"]
BROKEN += ["insufficient_system_resource", "failed", "timeout", "MALFORMED_FUNCTION_CALL"]
BROKEN += ["OTHER", "repetition", "server_shutdown", "stopped by a word never seen before"]


def ended(finish: str, text: str | None = HALF) -> Iterator[Any]:
    """The bodies of an answer that ends so, with or without the end of the stream."""
    yield event(text) + event(None, finish) + DONE
    yield event(text, finish) + DONE
    yield event(text) + event(None, finish)
    yield says(text, finish).body


@pytest.mark.parametrize("finish", GOOD)
def test_a_good_end(finish: str) -> None:
    for body in ended(finish):
        world = World({"a": [Reply(body=body)]})
        assert (whole(world), world.asked) == (HALF, "a")
        assert live(World({"a": [Reply(body=body)]})) == HALF


@pytest.mark.parametrize("finish", ["", None])
def test_no_word_is_no_end(finish: Any) -> None:
    """Some gateways write "" where others write null."""
    body = event("Par", finish) + event("is.", finish)
    assert whole(World({"a": [Reply(body=body + STOP)]})) == "Paris."
    assert whole(World({"a": [Reply(body=body + DONE)]})) == "Paris."
    assert whole(World({"a": [Reply(body=body)]})) == "B"


@both
@pytest.mark.parametrize("finish", CUTS)
def test_a_cut_is_told(verb: Any, finish: str, caplog: pytest.LogCaptureFixture) -> None:
    for body in ended(finish):
        caplog.clear()
        world = World({"a": [Reply(body=body)]})
        assert (verb(world), world.asked) == (HALF, "a")
        warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert ["cut" in record.getMessage() for record in warnings] == [True]


@pytest.mark.parametrize("finish", CUTS)
def test_a_cut_before_any_text(finish: str) -> None:
    """max_tokens was used up: the same model would end so again."""
    for body in ended(finish, None):
        world = World({"a": [Reply(body=body)]})
        first = world.llm.complete("Where?").attempts[0]
        assert first.verdict is not None
        assert (first.verdict.name, world.asked) == ("UNSUITABLE", "ab")
        assert "max_tokens" in first.reason


@pytest.mark.parametrize("finish", BROKEN)
@pytest.mark.parametrize("text", [HALF, "", None])
def test_an_end_that_is_not_known_to_be_good(finish: str, text: Any) -> None:
    """Half an answer is none, nor is no answer: the next model is asked."""
    for body in ended(finish, text):
        world = World({"a": [Reply(body=body)]})
        answer = world.llm.complete("Where?")
        verdict = answer.attempts[0].verdict
        assert verdict is not None
        assert (answer.text, world.asked, verdict.name) == ("B", "ab", "FAULT")


@pytest.mark.parametrize("finish", BROKEN + FILTERS)
def test_a_live_answer_with_a_bad_end(finish: str) -> None:
    """What was shown cannot be taken back, but it is told that it is half an answer."""
    for body in ended(finish):
        world = World({"a": [Reply(body=body)]})
        shown: list[str] = []
        try:
            shown.extend(world.llm.stream("Where?"))
        except FallbackLLMError:
            assert "".join(shown) in (HALF, "")
        else:  # the end was seen before the text was shown
            assert (shown, world.asked, finish in FILTERS) == (["B"], "ab", False)


@pytest.mark.parametrize("finish", FILTERS)
@pytest.mark.parametrize("text", [HALF, None])
def test_a_filtered_answer(finish: str, text: Any) -> None:
    for body in ended(finish, text):
        world = World({"a": [Reply(body=body)]})
        with pytest.raises(AnswerRefused):
            world.llm.complete("Where?")
        assert world.asked == "a"


def test_the_reason_names_the_end() -> None:
    """A word that nobody knows is shown, so that its reader can look it up."""
    world = World({"a": [says(HALF, "insufficient_system_resource")]})
    assert "insufficient_system_resource" in world.llm.complete("Where?").attempts[0].reason


EARLY: Any = [
    ("the text comes soon", 0.3),
    ("the text comes after a while", 1.5),
    ("the text comes late", 8.0),
    ("a thought, then the text", chunk(delta(0, "stop", reasoning_content="Hm")), 1.5),
    ("thoughts for long", *[chunk(delta(0, "stop", reasoning="Hm")), 6.0] * 3),
    ("comments meanwhile", 3.0, b": wait\n\n", 3.0),
    ("usage meanwhile", chunk(usage={"total_tokens": 7}), 3.0),
]


@both
@pytest.mark.parametrize("first", ["stop", "end_turn", "length", "tool_calls"])
@pytest.mark.parametrize("between", [pytest.param(rest, id=name) for name, *rest in EARLY])
def test_an_end_before_any_text_ends_nothing(verb: Any, first: str, between: Any) -> None:
    """Some gateways write the last finish_reason into each chunk, the first one too."""
    body = (event("", first), *between, event("Par", "stop"), event("is.", "stop") + DONE)
    world = World({"a": [Reply(body=body)]}, idle_timeout=10.0)
    assert (verb(world), world.asked) == ("Paris.", "a")


@pytest.mark.parametrize("rest", [(), (99.0,), (DONE,), (b": wait\n\n", 6.0) * 4])
def test_an_end_before_any_text_and_no_text(rest: Any) -> None:
    """It is no answer; and it does not wait for ever."""
    body = (event("", "stop"), *rest, event("Late.") + STOP if len(rest) > 1 else b"")
    world = World({"a": [Reply(body=body)]}, idle_timeout=10.0)
    assert whole(world) in ("B", "C")
    assert world.clock.now < 100


# --- Characters that come in halves -------------------------------------------------------------

FACE = "\U0001f600"
HALVES = [
    ("two chunks", raw("Hi ", "\\ud83d", "\\ude00", "!"), f"Hi {FACE}!"),
    ("text around them", raw("Hi \\ud83d", "\\ude00!"), f"Hi {FACE}!"),
    ("several", raw("\\ud83d", "\\ude00\\ud83d", "\\ude00"), FACE * 2),
    ("an empty delta between", raw("Hi \\ud83d", "", "\\ude00!"), f"Hi {FACE}!"),
    ("another event between", raw("Hi \\ud83d") + chunk() + raw("\\ude00!"), f"Hi {FACE}!"),
    ("one chunk", raw("Hi \\ud83d\\ude00!"), f"Hi {FACE}!"),
    ("the first half alone", raw("Hi \\ud83d there"), "Hi \ufffd there"),
    ("the first half alone in a chunk", raw("Hi ", "\\ud83d", " there"), "Hi \ufffd there"),
    ("the second half alone", raw("Hi \\ude00 there"), "Hi \ufffd there"),
    ("the wrong way round", raw("Hi ", "\\ude00", "\\ud83d", "!"), "Hi \ufffd\ufffd!"),
    ("the first half twice", raw("\\ud83d", "\\ud83d", "\\ude00"), f"\ufffd{FACE}"),
    ("the first half at the end", raw("Hi", "\\ud83d"), "Hi\ufffd"),
    ("the second half at the beginning", raw("\\ude00", "Hi"), "\ufffdHi"),
    ("before a thought's end", raw("<think>\\ud83d", "</think>Hi"), "Hi"),
]


@both
@pytest.mark.parametrize(("body", "text"), table(HALVES))
def test_halves_of_a_character(verb: Any, body: Any, text: str) -> None:
    """Two make one, one alone becomes U+FFFD: every text can be written to a file."""
    world = World({"a": [Reply(body=body + STOP)]})
    assert (verb(world), world.asked) == (text, "a")


@pytest.mark.parametrize(("body", "text"), table(HALVES))
def test_each_live_piece_can_be_written(body: Any, text: str) -> None:
    pieces = World({"a": [Reply(body=body + STOP)]}).llm.stream("Where?")
    assert b"".join(piece.encode() for piece in pieces) == text.encode()


def test_half_a_character_elsewhere() -> None:
    """In plain JSON, in all so far, in a reason, before a break."""
    document = b'{"choices": [{"message": {"content": "Hi \\ud83d"}, "finish_reason": "stop"}]}'
    assert whole(World({"a": [Reply(body=document)]})) == "Hi \ufffd"

    growing = chunk(so_far("Hi \ud83d")) + chunk(so_far(f"Hi {FACE}", "stop")) + DONE
    assert whole(World({"a": [Reply(body=growing)]})) == f"Hi {FACE}"
    assert live(World({"a": [Reply(body=growing)]})) == f"Hi {FACE}"

    reply = Reply(400, b'{"error": {"message": "Not \\ud83d so"}}')
    reason = World({"a": [reply]}).llm.complete("Where?").attempts[0].reason
    assert "Not" in reason
    assert reason.encode()

    with pytest.raises(StreamInterrupted) as broken:
        live(World({"a": [Reply(body=raw("Hi \\ud83d"))]}))
    assert broken.value.partial.encode() in (b"Hi ", "Hi \ufffd".encode())


# --- Events that cannot be read -----------------------------------------------------------------

MALFORMED = [
    ("no JSON", b"data: {oops\n\n"),
    ("a word", b"data: hello\n\n"),
    ("half an event", event("is.")[:40] + b"\n\n"),
    ("two in one line", event("i").rstrip() + event("s.")),
    ("an escape that is none", event("?").replace(b"?", b"\\x41")),
    ("not UTF-8", event("?").replace(b"?", b"\xff")),
    ("half a UTF-8 character", event("?").replace(b"?", b"\xf0\x9f")),
    ("a web page", b"data: <html><body>Bad gateway</body></html>\n\n"),
    ("single quotes", b"data: {'choices': []}\n\n"),
]


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("bad", table(MALFORMED))
def test_a_malformed_event_may_have_held_a_word(bad: bytes, place: str) -> None:
    """Buffered it is a failure; live too, which is told when something was shown."""
    pieces = [event("Par"), event("is."), STOP]
    pieces.insert(["first", "middle", "last"].index(place), bad)
    shown_before = ["", "Par", "Paris."][pieces.index(bad)]
    world = World({"a": [Reply(body=tuple(pieces))]})
    answer = world.llm.complete("Where?")
    verdict = answer.attempts[0].verdict
    assert verdict is not None
    assert (answer.text, verdict.name, world.asked) == ("B", "FAULT", "ab")

    world = World({"a": [Reply(body=tuple(pieces))]})
    if not shown_before:
        assert (live(world), world.asked) == ("B", "ab")
        return
    shown: list[str] = []
    with pytest.raises(StreamInterrupted) as broken:
        shown.extend(world.llm.stream("Where?"))
    assert "".join(shown) == broken.value.partial == shown_before


# --- Errors in a 200 ----------------------------------------------------------------------------

LONG = "This model's maximum context length is 4096 tokens. You asked for 9000."
ERRORS: Any = [
    ("error", {"error": LONG}),
    ("error with a message", {"error": {"message": LONG}}),
    ("error_message", {"error_message": LONG}),
    ("with its type", {"error_type": "BadRequestError", "error_message": LONG}),
    ("with no choices", {"choices": None, "error_type": "BadRequest", "error_message": LONG}),
    ("with empty choices", {"choices": [], "error_message": LONG}),
    ("detail", {"detail": LONG}),
    ("details of fields", {"detail": [{"loc": ["body", "messages"], "msg": LONG}]}),
    ("detail with an error", {"detail": {"error": {"message": LONG}}}),
    ("an object that is an error", {"object": "error", "message": LONG, "code": 400}),
    ("in a list", [{"error": {"message": LONG}}]),
]


@pytest.mark.parametrize("said", table(ERRORS))
def test_an_error_in_a_200_gives_its_reason(said: Any) -> None:
    """As plain JSON, as the first event, with and without [DONE]: it says what is wrong."""
    line = b"data: " + json.dumps(said).encode() + b"\n\n"
    for body in (said, line, line + DONE, b": wait\n\n" + line, event(None) + line):
        world = World({"a": [Reply(body=body)]})
        answer = world.llm.complete("Where?")
        first = answer.attempts[0]
        assert first.verdict is not None
        assert "maximum context length" in first.reason
        assert (answer.text, first.verdict.name, world.asked) == ("B", "UNSUITABLE", "ab")


BARE: Any = [
    ("a type alone", {"error_type": "InternalServerError"}),
    ("a code alone", {"error": {"code": 500}}),
    ("a word", {"error": "overloaded"}),
    ("a number", {"error": 7}),
    ("true", {"error": True}),
    ("a list", {"error": [{"message": "overloaded"}]}),
    ("a message alone", {"error_message": "overloaded"}),
]


@pytest.mark.parametrize("said", table(BARE))
def test_an_error_beside_a_text(said: Any) -> None:
    """It fails the answer, before or after the text, in an event of its own or beside it."""
    alone = b"data: " + json.dumps(said).encode() + b"\n\n"
    for body in (
        alone + event("Paris.") + STOP,
        event("Par") + alone + event("is.") + STOP,
        event("Paris.") + event(None, "stop") + alone + DONE,
        event("Par", **said) + event("is.") + STOP,
        {**says("Paris.").body, **said},
    ):
        world = World({"a": [Reply(body=body)]}, max_attempts=1)
        assert (whole(world), world.asked) == ("B", "ab")


@pytest.mark.parametrize("said", table(BARE))
def test_an_error_after_a_live_text(said: Any) -> None:
    body = event("Par") + b"data: " + json.dumps(said).encode() + b"\n\n" + event("is.") + STOP
    pieces = World({"a": [Reply(body=body)]}).llm.stream("Where?")
    assert next(pieces) == "Par"
    with pytest.raises(StreamInterrupted):
        next(pieces)


EMPTY: Any = [
    ("all fields empty", {"error": {"message": "", "type": "", "param": "", "code": None}}),
    ("with a code of 0", {"error": {"message": "", "type": "", "code": 0}}),
    ("with nothing nested", {"error": {"message": "", "metadata": {}, "details": []}}),
    ("no fields", {"error": {}}),
    ("null", {"error": None}),
    ("false", {"error": False}),
    ("an empty text", {"error": ""}),
    ("an empty list", {"error": []}),
    ("its other names", {"error_message": "", "error_type": None, "detail": None}),
    ("in the supplier's field", {"x_groq": {"error": None}}),
]


@both
@pytest.mark.parametrize("said", table(EMPTY))
def test_an_empty_error_is_none(verb: Any, said: Any) -> None:
    """Gateways with a fixed set of fields send it with every answer."""
    alone = b"data: " + json.dumps(said).encode() + b"\n\n"
    in_choice = dict(delta(content="is."), **said)
    for body in (
        event("Par", **said) + event("is.", "stop", **said) + DONE,
        event("Par") + alone + event("is.") + STOP,
        event("Par") + chunk(in_choice) + STOP,
        {**says("Paris.").body, **said},
    ):
        world = World({"a": [Reply(body=body)]})
        assert (verb(world), world.asked) == ("Paris.", "a")


# --- Verdicts -----------------------------------------------------------------------------------


def error(message: str, code: Any = None, **more: Any) -> Any:
    return {"error": {"message": message, **({} if code is None else {"code": code}), **more}}


def routed(message: str, code: int, **metadata: Any) -> Any:
    return error(message, code, metadata=metadata)


def google(message: str, *details: Any) -> Any:
    """An error as Google's endpoint says it: a list of one."""
    status = "RESOURCE_EXHAUSTED"
    return [error(message, 429, status=status, details=list(details))]


def retry_info(seconds: str) -> Any:
    return {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": seconds}


QUOTA = "You exceeded your current quota, please check your plan and billing details."
RELAYED = routed("Provider returned error", 404, provider_name="Somebody", raw="")
POOL = routed("No endpoints available at the moment.", 404)
VERDICTS: Any = [
    # A wait outranks words about a quota.
    ("quota words and a wait", 429, {}, google(QUOTA + " Please retry in 1.5s."), "RATE_LIMITED"),
    ("quota words and a field", 429, {}, google(QUOTA, retry_info("34.07s")), "RATE_LIMITED"),
    ("quota words and Retry-After", 429, {"retry-after": "7"}, error(QUOTA), "RATE_LIMITED"),
    ("quota words and milliseconds", 429, {"retry-after-ms": "900"}, error(QUOTA), "RATE_LIMITED"),
    ("quota words and minutes", 429, {}, error(QUOTA + " Try again in 2m3s"), "RATE_LIMITED"),
    ("quota words and about", 429, {}, error(QUOTA + " Retry in about 9 seconds."), "RATE_LIMITED"),
    ("quota words in a 200", 200, {}, google(QUOTA + " Please retry in 1.5s."), "RATE_LIMITED"),
    ("quota words alone", 429, {}, google(QUOTA), "DENIED"),
    ("quota words and junk", 429, {"retry-after": "soon"}, error(QUOTA), "DENIED"),
    # Codes and statuses as others write them.
    ("a code as text", 200, {}, error("Slow down", "429"), "RATE_LIMITED"),
    ("a status as text", 200, {}, {"error": {"message": "Busy", "code": "503"}}, "FAULT"),
    ("Google's limit", 429, {}, google("Resource has been exhausted."), "RATE_LIMITED"),
    (
        "Google's overload",
        503,
        {},
        [error("The model is overloaded.", 503, status="UNAVAILABLE")],
        "FAULT",
    ),
    (
        "Google's word for a wrong key",
        400,
        {},
        [error("API key not valid. Please pass a valid API key.", 400, status="INVALID_ARGUMENT")],
        "DENIED",
    ),
    # What a router tells of a supplier.
    ("a supplier's 404", 404, {}, RELAYED, "FAULT"),
    ("a supplier's 404 in a 200", 200, {}, RELAYED, "FAULT"),
    (
        "a supplier's 404 without raw",
        404,
        {},
        routed("Provider returned error", 404, provider_name="S"),
        "FAULT",
    ),
    (
        "a supplier's 404 with null",
        404,
        {},
        routed("Provider returned error", 404, provider_name="S", raw=None),
        "FAULT",
    ),
    (
        "a supplier's page",
        404,
        {},
        routed("Provider returned error", 404, provider_name="S", raw="Not Found"),
        "FAULT",
    ),
    (
        "no images",
        404,
        {},
        routed("No endpoints found that support image input", 404),
        "UNSUITABLE",
    ),
    ("no tools", 404, {}, routed("No endpoints found that support tool use.", 404), "UNSUITABLE"),
    (
        "no formats",
        404,
        {},
        error("No endpoints found that support response_format", 404),
        "UNSUITABLE",
    ),
    (
        "no parameters",
        404,
        {},
        error("No endpoints found that can handle the requested parameters.", 404),
        "UNSUITABLE",
    ),
    ("nobody at all", 404, {}, error("No endpoints found for m/x:free.", 404), "GONE"),
    # Money.
    (
        "fewer max_tokens",
        402,
        {},
        error("This request requires more credits, or fewer max_tokens.", 402),
        "DENIED",
    ),
    (
        "a prompt too dear",
        402,
        {},
        error("Prompt tokens limit exceeded: 9000 > 120.", 402),
        "DENIED",
    ),
    ("no credits yet", 402, {}, error("Your account never purchased credits", 402), "DENIED"),
    # A wait that never helps.
    (
        "413 with a wait",
        413,
        {"retry-after": "120"},
        error("Request too large for model `m`"),
        "UNSUITABLE",
    ),
]


@pytest.mark.parametrize(("status", "headers", "body", "verdict"), table(VERDICTS))
def test_a_verdict(status: int, headers: Any, body: Any, verdict: str) -> None:
    assert judge(status, headers, body, EPOCH).verdict.name == verdict


def test_an_empty_pool_is_not_the_end_of_a_model() -> None:
    """The id of a router does not die."""
    assert judge(404, {}, POOL, EPOCH).verdict.name not in ("GONE", "DENIED", "REFUSED")


def test_a_wait_that_comes_with_words_about_a_quota_is_waited() -> None:
    said = google(QUOTA + " Please retry in 1.5s.", retry_info("1s"))
    world = World({"a": [Reply(429, said), says("Paris.")]})
    assert (whole(world), world.asked, world.slept) == ("Paris.", "aa", [2.0])


def test_a_relayed_404_is_asked_again() -> None:
    """The model lives, and mostly answers again soon; its siblings are asked meanwhile."""
    world = World({"a": [Reply(404, RELAYED), says("A")], "b": [fails(400)]}, providers=ONE)
    assert (whole(world), world.asked) == ("A", "aba")


@pytest.mark.parametrize("status", [402, 200])
def test_no_money_for_one_model(status: int) -> None:
    """Free models of the same key may answer."""
    world = World({"a": [Reply(status, error("Pay first", 402))]})
    assert (whole(world), world.asked) == ("B", "ab")


def test_a_model_without_money_is_asked_last() -> None:
    """For a while; its siblings answer meanwhile."""
    world = World({"a": [Reply(402, error("Pay first", 402))]})
    assert [whole(world) for _ in range(3)] == ["B"] * 3
    assert world.asked == "abbb"


ONE = (row("one", "a", "b"),)


def advice(world: World) -> str:
    """What the error of a failed question says to do."""
    with pytest.raises(AllProvidersFailed) as failed:
        world.llm.complete("Where?")
    lines = str(failed.value).splitlines()
    return " ".join(line.partition("→")[2] for line in lines)


@pytest.mark.parametrize(
    "message",
    [
        "This request requires more credits, or fewer max_tokens. You can only afford 120.",
        "You requested up to 500 tokens, but can only afford 120.",
    ],
)
def test_advice_for_too_dear_an_answer(message: str) -> None:
    reply = Reply(402, error(message, 402))
    assert "max_tokens" in advice(World({"a": [reply], "b": [reply]}, providers=ONE))


UNKNOWN_URLS: Any = [
    (
        "Groq's words",
        404,
        error("Unknown request URL: POST /openai/chat/completions.", "unknown_url"),
    ),
    ("its code alone", 404, error("Please check the URL for typos.", "unknown_url")),
    (
        "OpenAI's words",
        404,
        error("Invalid URL (POST /v1/v1/chat/completions)", type="invalid_request_error"),
    ),
    ("a framework's words", 404, {"detail": "Not Found"}),
    ("text", 404, "404 page not found"),
    (
        "a web page",
        404,
        "<!DOCTYPE html><title>Error</title><pre>Cannot POST /openai/chat/completions</pre>",
    ),
    ("a method", 405, {"detail": "Method Not Allowed"}),
]


@pytest.mark.parametrize(("status", "body"), table(UNKNOWN_URLS))
def test_advice_for_a_wrong_address(status: int, body: Any) -> None:
    """The variable that holds it is named, for a row of the program and for one of one's own."""
    reply = Reply(status, body)
    for name in ("groq", "mine"):
        rows = [Provider(name, f"https://{name}/v1", None, ("a",))]
        world = World({"a": [reply]}, providers=rows, max_attempts=1)
        assert f"{name.upper()}_BASE_URL" in advice(world)


def test_a_wrong_address_is_not_the_end_of_a_model() -> None:
    said = error("Unknown request URL: POST /v1/completions.", "unknown_url")
    assert judge(404, {}, said, EPOCH).verdict.name != "GONE"
    world = World({"a": [Reply(404, said)], "b": [Reply(404, said)]}, providers=ONE)
    advice(world)
    assert "one/models" not in world.asked  # nobody looks for other models there


# --- Wait hints ---------------------------------------------------------------------------------


def iso(seconds: float) -> str:
    """The ISO date so many seconds after 2026-09-21T14:13:20Z, which is EPOCH; within a minute."""
    return f"2026-09-21T14:{13 + int(20 + seconds) // 60}:{int(20 + seconds) % 60:02}"


def spent(which: str = "requests", **resets: Any) -> dict[str, str]:
    """Headers of a spent limit, and when it ends."""
    headers = {f"x-ratelimit-remaining-{which}": "0"}
    headers.update({f"x-ratelimit-reset-{name}": str(value) for name, value in resets.items()})
    return headers


DATED = {"date": formatdate(EPOCH, usegmt=True)}
HINTS: Any = [
    ("Retry-After twice", {"retry-after": "30, 30"}, "", 30),
    ("with a unit", {"retry-after": "30s"}, "", 30),
    ("in Go's form", {"retry-after": "1m26.4s"}, "", 86.4),
    ("in milliseconds with a unit", {"retry-after": "2500ms"}, "", 2.5),
    ("an ISO date", {"retry-after": iso(30) + "Z"}, "", 30),
    ("an ISO date with an offset", {"retry-after": "2026-09-21T16:13:50+02:00"}, "", 30),
    ("an ISO date with a fraction", {"retry-after": iso(30) + ".500Z"}, "", 30.5),
    ("an instant", {"retry-after": str(int(EPOCH) + 30)}, "", 30),
    ("a reset of requests", spent(requests="30s"), "", 30),
    ("in Go's form, a reset", spent(requests="1m26.4s"), "", 86.4),
    ("in hours", spent(requests="2h0m30s"), "", 7230),
    ("in milliseconds", spent(requests="450ms"), "", 0.45),
    ("a bare number", spent(requests="30"), "", 30),
    ("an ISO date as a reset", spent(requests=iso(30) + "Z"), "", 30),
    ("a reset of tokens", spent("tokens", tokens="7.66s"), "", 7.66),
    ("of what is spent only", spent("tokens", tokens="7.66s", requests="2m"), "", 7.66),
    (
        "of the longer when both are",
        {**spent(requests="9s"), **spent("tokens", tokens="40s")},
        "",
        40,
    ),
    (
        "Cerebras's names",
        {"x-ratelimit-remaining-tokens-minute": "0", "x-ratelimit-reset-tokens-minute": "33.2"},
        "",
        33.2,
    ),
    ("x-ratelimit-reset in seconds", {"x-ratelimit-reset": "30"}, "", 30),
    ("as an instant", {"x-ratelimit-reset": str(int(EPOCH) + 30)}, "", 30),
    ("as an instant in ms", {"x-ratelimit-reset": str(int(EPOCH + 30) * 1000)}, "", 30),
    ("with a unit, a reset", {"x-ratelimit-reset": "30s"}, "", 30),
    ("the standard's name", {"ratelimit-reset": "30"}, "", 30),
    ("RetryInfo", {}, google("Slow down", retry_info("34s")), 34),
    ("RetryInfo with a fraction", {}, google("Slow down", retry_info("34.0748s")), 34.0748),
    ("RetryInfo, not in a list", {}, google("Slow down", retry_info("34s"))[0], 34),
    ("RetryInfo among others", {}, google("Slow down", {"@type": "Help"}, retry_info("34s")), 34),
    ("a field", {}, error("Slow down", retry_after=20), 20),
    ("a field with a unit", {}, error("Slow down", retry_after="20s"), 20),
    ("approximately", {}, error("Please try again in approximately 20 seconds."), 20),
    ("about", {}, error("Try again in about 20 seconds."), 20),
    ("a few letters", {}, error("Please retry in 20 secs"), 20),
    ("in a word of minutes", {}, error("Try again in 2 minutes."), 120),
    ("wait", {}, error("Too many requests. Please wait 20 seconds and try again."), 20),
    ("wait for", {}, error("Wait for 20s before the next request"), 20),
    ("after", {}, error("Please retry after 20 seconds."), 20),
    ("an error of one word", {}, {"error": "Rate limited. Retry in 20 seconds."}, 20),
    ("an answer of text", {}, "Rate limited. Retry in 20 seconds.", 20),
    ("a header before text", {"retry-after": "30s"}, error("retry in 9s"), 30),
    ("text before a reset", spent(requests="30s"), error("retry in 9s"), 9),
    ("junk, then a reset", {"retry-after": "soon", **spent(requests="30s")}, "", 30),
    ("junk only", {"retry-after": "soon", "x-ratelimit-reset": "later"}, "", None),
    ("a negative one", {"retry-after": "-30s"}, "", None),
    ("an ISO date that is past", {"retry-after": iso(-15) + "Z"}, "", None),
    ("no date", {"retry-after": "2026-99-99T99:99:99Z"}, "", None),
]


@pytest.mark.parametrize(("headers", "body", "seconds"), table(HINTS))
def test_a_hint(headers: Any, body: Any, seconds: Any) -> None:
    """Headers and body -> the seconds that the server wants to be left alone."""
    failure = judge(429, headers, body, EPOCH)
    expected = seconds if seconds is None else pytest.approx(seconds)
    assert (failure.verdict.name, failure.hint) == ("RATE_LIMITED", expected)


@pytest.mark.parametrize("status", [429, 503])
def test_a_reset_of_what_is_not_spent_is_no_hint(status: int) -> None:
    """Groq tells with each reply when its day's quota, which is almost untouched, is full again."""
    headers = {
        "x-ratelimit-remaining-requests": "997",
        "x-ratelimit-reset-requests": "4m19.2s",
        "x-ratelimit-remaining-tokens": "7120",
        "x-ratelimit-reset-tokens": "6.6s",
    }
    hint = judge(status, headers, error("Slow down"), EPOCH).hint
    assert hint is None or hint < 7
    assert judge(status, {**headers, "retry-after": "3"}, "", EPOCH).hint == 3


def instants(now: float) -> Iterator[tuple[Any, Any]]:
    """Headers and bodies that name the instant 20 s from the server's own now."""
    later = int(now + 20)
    routes = [{"X-RateLimit-Reset": str(later * 1000)}, {"X-RateLimit-Reset": str(later)}]
    for headers in routes:
        yield {}, routed("Rate limit exceeded: free-models-per-min.", 429, headers=headers)
    yield {"x-ratelimit-reset": str(later)}, ""
    yield {"x-ratelimit-reset": str(later * 1000)}, ""
    yield {"retry-after": formatdate(later, usegmt=True)}, ""
    yield {"retry-after": "2026-09-21T14:13:40Z"}, ""
    yield spent(requests="2026-09-21T14:13:40Z"), ""


@pytest.mark.parametrize("skew", [-86400, -3600, -30, 0, 120, 86400])
def test_instants_are_read_by_the_servers_own_clock(skew: float) -> None:
    """Our clock may be wrong; the reply's Date tells what the server means."""
    for headers, body in instants(EPOCH):
        hint = judge(429, {**DATED, **headers}, body, EPOCH + skew).hint
        assert hint == pytest.approx(20, abs=1), (headers, body)


def test_seconds_do_not_depend_on_any_clock() -> None:
    for headers in ({"retry-after": "20"}, spent(requests="20s")):
        assert judge(429, {**DATED, **headers}, "", EPOCH + 3600).hint == 20


@pytest.mark.parametrize("date", ["", "yesterday", "Mon, 99 Foo 2026 99:99:99 GMT"])
def test_a_date_that_cannot_be_read(date: str) -> None:
    """Then our own clock has to do."""
    headers = {"date": date, "x-ratelimit-reset": str(int(EPOCH) + 20)}
    assert judge(429, headers, "", EPOCH).hint == 20


def test_a_spent_limit_is_waited_for() -> None:
    """And a question that failed says when to come back."""
    reply = Reply(429, error("Slow down"), spent(requests="9s"))
    rows = [row("one", "a")]
    world = World({"a": [reply, says("A")]}, providers=rows)
    assert (whole(world), world.slept) == ("A", [9.0])
    with pytest.raises(AllProvidersFailed) as failed:
        World({"a": [reply]}, providers=rows, max_attempts=1).llm.complete("Where?")
    assert failed.value.retry_after == pytest.approx(9)


def test_headers_that_come_twice(serve: Serve) -> None:
    """As they come over the wire: a list, of which the first valid one counts."""
    for values in (("30", "30"), ("30s", "30"), ("30", "31")):
        lines = "".join(f"Retry-After: {value}\r\n" for value in values)
        server = serve(replies(page(429, b"{}", more=lines)))
        llm = FallbackLLM(
            RetryConfig(max_attempts=1), providers=[Provider("one", server.url, None, ("m",))]
        )
        with pytest.raises(AllProvidersFailed) as failed:
            llm.complete("Where?")
        assert failed.value.retry_after is not None
        assert 15 < failed.value.retry_after < 31


# --- Parameters that some servers refuse --------------------------------------------------------

FORBIDDEN = {"type": "extra_forbidden", "loc": ["body", "stream_options", "include_usage"]}
REFUSALS: Any = [
    ("in words", 400, error("Unrecognized request argument supplied: stream_options")),
    ("as the parameter", 400, error("This is not supported", param="stream_options")),
    ("in a list of fields", 422, {"object": "error", "message": {"detail": [FORBIDDEN]}}),
    ("in FastAPI's form", 422, {"detail": [FORBIDDEN]}),
    ("in text", 400, "stream_options is not allowed here"),
    ("one of its fields", 400, error("`stream_options.include_usage` is unknown")),
]


def asked_options(world: World) -> list[bool]:
    """Whether each request had stream_options."""
    return ["stream_options" in asked.body for asked in world.server.asked]


def forbids(reply: Reply) -> Any:
    """A model that answers only without stream_options."""

    def answer(asked: Any) -> Reply:
        return reply if "stream_options" in asked.body else says(asked.model.upper())

    return [answer]


@both
@pytest.mark.parametrize(("status", "body"), table(REFUSALS))
def test_stream_options_are_left_out_where_they_are_refused(
    verb: Any, status: int, body: Any
) -> None:
    """The same model is asked again at once without them, and the row remembers."""
    script = {model: forbids(Reply(status, body)) for model in "ab"}
    world = World(script)
    assert (verb(world), world.asked, world.slept) == ("A", "aa", [])
    assert asked_options(world) == [True, False]
    assert verb(world) == "A"
    assert world.llm.complete("Where?", model="b").text == "B"  # of the same row
    assert world.llm.complete("Where?", model="c").text == "C"  # of another one
    assert asked_options(world) == [True, False, False, False, True]
    assert world.llm.provider_health["one"].consecutive_failures == 0


def test_stream_options_are_left_out_once() -> None:
    """A server that goes on complaining is left."""
    reply = Reply(400, error("stream_options? Never heard of them"))
    world = World({"a": [reply]})
    assert (whole(world), world.asked) == ("B", "aab")


def test_another_parameter_that_is_refused() -> None:
    """It is the caller's; nothing is sent again without it."""
    world = World({"a": [Reply(400, error("Unrecognized argument: top_k"))]})
    assert (whole(world), world.asked) == ("B", "ab")


def test_stream_options_of_the_caller() -> None:
    world = World()
    world.llm.ask("Where?", stream_options=None)
    world.llm.ask("Where?", stream_options={"include_usage": False})
    bodies = [asked.body for asked in world.server.asked]
    assert "stream_options" not in bodies[0]
    assert bodies[1]["stream_options"] == {"include_usage": False}
    assert all(body["stream"] is True for body in bodies)


def test_nemotron_is_told_not_to_think() -> None:
    """It writes its thoughts as the answer; the caller's own wish counts more."""
    openrouter = PROVIDERS[-1]
    nemotron = openrouter.models[0]
    assert "nemotron" in nemotron
    world = World(providers=PROVIDERS, api_keys={"openrouter": KEY})
    thoughts: Any = {"effort": "high"}
    world.llm.ask("Where?", provider="openrouter")
    world.llm.ask("Where?", model=f"openrouter:{nemotron}", reasoning=thoughts)
    wishes = [(asked.model, asked.body.get("reasoning")) for asked in world.server.asked]
    assert wishes == [(nemotron, {"enabled": False}), (nemotron, thoughts)]
