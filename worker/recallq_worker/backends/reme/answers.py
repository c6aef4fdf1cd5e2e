"""What ReMe's steps ask an LLM for, as they read it: an answer in their own form, or none.

Each step looks for a pattern, and takes an answer without it for one that says nothing: what it was
to remember is lost, and nobody is told. Here answers are read with some tolerance, checked, and
written anew in the form that the step reads. What is no such answer is an `UnusableAnswer`.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from recallq_worker.backends.failures import CutOffAnswer, UnusableAnswer

# Models like to set words in bold or as code, and to take their own kind of brackets.
_DRESS = r"[\s*`_]{0,9}"
_WIDE = str.maketrans("＜＞〈〉", "<><>")
_JUDGED = re.compile(
    rf"(?:结果|Results?){_DRESS}[:：]{_DRESS}<\s?(\d{{1,9}})\s?>[\s,，]{{0,3}}<[^<>\d]{{0,20}}([0-3])\s?>",
    re.IGNORECASE,
)
_OBSERVED = re.compile(rf"(?:信息|Information){_DRESS}[:：]{_DRESS}(?=[<\w\"“'])", re.IGNORECASE)
_THOUGHT_FOLLOWS = re.compile(
    r"(?:\n|(?<=>))[\s*`_#>-]{0,9}(?:\d{1,3}[.、]\s?)?(?:Thought|思考)[*`_\s]{0,9}[:：]",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"<\s?(\d{1,9})\s?>\s{0,3}(.*)", re.DOTALL)
_FIELDS = re.compile(r"<([^<>]*)>\s{0,3}<([^<>]+)>\s{0,3}<([^<>]*)>")
_FIELDS_WITH_BRACKETS = re.compile(r"<([^<>]*)> {0,3}<(.*)> {0,3}<([^<>]*)>")
_FIELD = re.compile(r"<([^<>]*)>")
_NOTHING = frozenset({"", "none", "nothing", "n/a", "no information", "无", "没有"})
_AROUND = " \t\r\n.。,，;；!`*_<>\"'“”"
_BRACKETS = str.maketrans("<>", "‹›")
_THINK, _THOUGHT = "<think>", "</think>"
_FENCE = re.compile(r"```[ \t]*(?:json)?\s*", re.IGNORECASE)
_OPENING = re.compile(r"[\[{]")
_JSON = json.JSONDecoder(strict=False)


def without_thoughts(answer: str) -> str:
    """The answer of a model that thinks aloud before it."""
    if not answer.lstrip().startswith(_THINK):
        return answer
    return answer.partition(_THOUGHT)[2]


def in_form(callback: Callable[[Any], Any], answer: str) -> str:
    """An answer in the form of the step that `callback` belongs to, by whose name it is told.

    A step of a user's own flow reads answers in a way of its own. Raises `UnusableAnswer`.
    """
    step = callback.__qualname__.partition(".")[0]
    match step:
        case "InfoFilterOp":
            return _judgments(answer, _messages(callback, "info_messages"))
        case "GetObservationOp" | "GetObservationWithTimeOp":
            times = step == "GetObservationWithTimeOp"
            return _observations(answer, _messages(callback, "filtered_messages"), times=times)
        case "SuccessExtractionOp" | "FailureExtractionOp" | "ComparativeExtractionOp":
            return _fenced(_experiences(_blocks(answer)))
        case "MemoryValidationOp":
            # Without a fence, the step would take whatever is said for a yes.
            return _fenced(_validation(_blocks(answer)[0]))
        case _:
            return answer


def _messages(callback: Callable[[Any], Any], variable: str) -> int:
    """How many messages a step asks about: its callback knows them."""
    return len(inspect.getclosurevars(callback).nonlocals.get(variable) or ())


def _judgments(answer: str, messages: int) -> str:
    verdicts: dict[int, str] = {}
    for index, score in _JUDGED.findall(answer.translate(_WIDE)):
        verdicts[int(index)] = score  # the last word counts
    if not verdicts:
        raise UnusableAnswer("the answer judges no message")
    missing = [index for index in range(1, messages + 1) if index not in verdicts]
    if missing:
        # What is not judged would be forgotten. Of fewer at once, perhaps none is passed over.
        raise CutOffAnswer(f"the answer passes over {len(missing)} of {messages} messages")
    lines = [f"<{index}> <{verdicts[index]}>" for index in range(1, messages + 1)]
    return "\n".join(f"Result: {line}" for line in lines)


def _observations(answer: str, messages: int, *, times: bool) -> str:
    _, *parts = _OBSERVED.split(answer.translate(_WIDE))
    found: dict[str, None] = {}
    for part in parts:
        line = _observation(_THOUGHT_FOLLOWS.split(part, maxsplit=1)[0].strip(), messages, times)
        if line is not None:
            found[line] = None
    if not parts and not _is_nothing(answer.strip().rpartition("\n")[2]):
        raise UnusableAnswer("the answer is no list of observations")
    return "\n".join(found) or "None"


def _observation(said: str, messages: int, times: bool) -> str | None:
    """An observation as the step reads it: with no brackets inside a field, and with a time just
    where it wants one. None for one that says that there is nothing."""
    numbered = _NUMBER.match(said)
    rest = numbered[2] if numbered is not None else said
    line = rest.partition("\n")[0].strip(" *`_.。,，;；")
    whole = line.count("<") == line.count(">")
    if whole and all(map(_is_nothing, _FIELD.findall(line) or [line])):
        return None
    fields = _FIELDS.match(rest) or _FIELDS_WITH_BRACKETS.fullmatch(line)
    if numbered is None or fields is None or not 1 <= int(numbered[1]) <= messages:
        raise UnusableAnswer("the answer holds an observation that cannot be read")
    at, fact, keywords = (" ".join(each.split()) for each in fields.groups())
    if _is_nothing(fact):
        return None
    fact, at = fact.translate(_BRACKETS), "" if _is_nothing(at) else at
    if at and not times:
        fact, at = f"{fact} ({at})", ""
    return f"Information: <{int(numbered[1])}> <{at}> <{fact}> <{keywords}>"


def _is_nothing(text: str) -> bool:
    return text.strip(_AROUND).lower() in _NOTHING


def _blocks(answer: str) -> list[Any]:
    """The JSON of an answer that is nothing else, or that has it in fences, or somewhere."""
    with contextlib.suppress(ValueError, RecursionError):
        return [_JSON.decode(answer)]
    found: list[Any] = []
    read_to = 0
    for fence in _FENCE.finditer(answer):
        if fence.start() < read_to:
            continue  # it is in a string, or ends what was read
        with contextlib.suppress(ValueError, RecursionError):
            value, end = _JSON.raw_decode(answer, fence.end())
            if isinstance(value, list | dict):
                found.append(value)
                read_to = max(answer.find("```", end) + 1, end)
    if not found and (bracket := _OPENING.search(answer)) is not None:
        with contextlib.suppress(ValueError, RecursionError):
            found.append(_JSON.raw_decode(answer, bracket.start())[0])
    if not found:
        raise UnusableAnswer("the answer is not JSON")
    return found


def _fenced(found: Any) -> str:
    """JSON in the fence that steps look for, and no other in it, nor half a character."""
    written = json.dumps(found, ensure_ascii=False).replace("`", "\\u0060")
    return f"```json\n{written.encode(errors='replace').decode()}\n```"


def _experiences(blocks: Sequence[Any]) -> list[dict[str, Any]]:
    experiences: list[Any] = []
    for block in blocks:
        inner = [*block.values()] if isinstance(block, dict) else []
        if len(inner) == 1 and isinstance(inner[0], list):
            experiences += inner[0]
        else:
            experiences += block if isinstance(block, list) else [block]
    for each in experiences:
        condition = isinstance(each, dict) and (each.get("when_to_use") or each.get("condition"))
        text = isinstance(each, dict) and each.get("experience")
        if not isinstance(condition, str) or not isinstance(text, str) or not text.strip():
            raise UnusableAnswer("the answer holds something else than experiences")
    return experiences


def _validation(found: Any) -> dict[str, Any]:
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if not isinstance(found, dict):
        raise UnusableAnswer("the answer is no validation")
    valid, score = found.get("is_valid"), found.get("score")
    if isinstance(valid, str) and valid.strip().lower() in ("true", "false"):
        valid = valid.strip().lower() == "true"
    if isinstance(score, str):
        try:
            score = float(score)
        except ValueError:
            score = None
    if not isinstance(valid, bool) or isinstance(score, bool):
        raise UnusableAnswer("the answer is no validation")
    if not isinstance(score, int | float) or not math.isfinite(score):
        raise UnusableAnswer("the answer is no validation")
    return {**found, "is_valid": valid, "score": score}
