"""What ReMe's steps ask an LLM for, as they read it: an answer in their own form, or none.

Each step looks for a pattern, and takes an answer without it for one that says nothing: what it was
to remember is lost, and nobody is told. Here answers are read with some tolerance, checked, and
written anew in the form that the step reads. What is no such answer is an `UnusableAnswer`.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable
from typing import Any

from recallq_worker.backends.failures import CutOffAnswer, UnusableAnswer

# Models like to set such words in bold, and to add something at the end.
_COLON = r"[ *]{0,4}[:：][ *]{0,4}"
_JUDGED = re.compile(rf"(?:结果|Result){_COLON}<(\d{{1,9}})> {{0,3}}<([0-3])>", re.IGNORECASE)
_OBSERVED = re.compile(rf"(信息|Information){_COLON}<(\d{{1,9}})> {{0,3}}(<.*)$", re.IGNORECASE)
_FIELDS = re.compile(r"<([^<>]*)> {0,3}<(.*)> {0,3}<([^<>]*)>[^<>]*")
_NOTHING = frozenset({"none", "nothing", "n/a", "no information", "无", "没有"})
_BRACKETS = str.maketrans("<>", "‹›")
_THINK, _THOUGHT = "<think>", "</think>"
_FENCE, _FENCE_JSON = "```", "```json"


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
            return _fenced(_experiences(_json_in(answer)))
        case "MemoryValidationOp":
            # Without a fence, the step would take whatever is said for a yes.
            return _fenced(_validation(_json_in(answer)))
        case _:
            return answer


def _messages(callback: Callable[[Any], Any], variable: str) -> int:
    """How many messages a step asks about: its callback knows them."""
    return len(inspect.getclosurevars(callback).nonlocals.get(variable) or ())


def _judgments(answer: str, messages: int) -> str:
    verdicts: dict[int, str] = {}
    for line in answer.splitlines():
        for index, score in _JUDGED.findall(line):
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
    found: dict[str, None] = {}
    for line in answer.splitlines():
        observed = _OBSERVED.search(line.strip())
        if observed is None:
            continue
        fields = _FIELDS.fullmatch(observed[3].strip())
        index = int(observed[2])
        if fields is None or not 1 <= index <= messages:
            raise UnusableAnswer("the answer holds an observation that cannot be read")
        at, fact, keywords = (each.strip() for each in fields.groups())
        fact = fact.translate(_BRACKETS)
        if at and not times:  # the step wants none
            fact, at = f"{fact} ({at})", ""
        found[f"Information: <{index}> <{at}> <{fact}> <{keywords}>"] = None
    if not found and answer.strip(" \n.。!<>").lower() not in _NOTHING:
        raise UnusableAnswer("the answer is no list of observations")
    return "\n".join(found) or answer


def _json_in(answer: str) -> Any:
    """The JSON of an answer that is nothing else, or that has it in a fence: what is in the fence
    may hold fences."""
    candidates = [answer]
    start = answer.find(_FENCE_JSON)
    if start >= 0:
        rest = answer[start + len(_FENCE_JSON) :]
        candidates += [rest[: rest.rfind(_FENCE)], rest[: rest.find(_FENCE)]]
    for candidate in candidates:
        try:
            return json.loads(candidate)
        except (ValueError, RecursionError):
            continue
    raise UnusableAnswer("the answer is not JSON")


def _fenced(found: Any) -> str:
    """JSON in the fence that steps look for, and no other in it."""
    written = json.dumps(found).replace("`", "\\u0060")
    return f"{_FENCE_JSON}\n{written}\n{_FENCE}"


def _experiences(found: Any) -> list[dict[str, Any]]:
    experiences = found if isinstance(found, list) else [found]
    for each in experiences:
        condition = isinstance(each, dict) and (each.get("when_to_use") or each.get("condition"))
        text = isinstance(each, dict) and each.get("experience")
        if not isinstance(condition, str) or not isinstance(text, str) or not text.strip():
            raise UnusableAnswer("the answer holds something else than experiences")
    return experiences


def _validation(found: Any) -> dict[str, Any]:
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
