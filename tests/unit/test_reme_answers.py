"""Answers of an LLM in the form of the ReMe step that asked, or refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from recallq_worker.backends.failures import CutOffAnswer, UnusableAnswer
from recallq_worker.backends.reme.answers import in_form, without_thoughts


def callback(step: str, messages: int = 0) -> Callable[[Any], Any]:
    """As a step of ReMe's makes it: defined in its method, and with its messages at hand."""
    info_messages = filtered_messages = [*range(messages)]

    def parse(answer: Any) -> Any:
        return info_messages, filtered_messages, answer

    parse.__qualname__ = f"{step}._ask.<locals>.parse"
    return parse


def judged(answer: str, messages: int = 2) -> str:
    return in_form(callback("InfoFilterOp", messages), answer)


def observed(answer: str, messages: int = 2, *, timed: bool = False) -> str:
    step = "GetObservationWithTimeOp" if timed else "GetObservationOp"
    return in_form(callback(step, messages), answer)


def parsed(answer: str) -> Any:
    """As ReMe reads it: what is in the first fence."""
    assert answer.startswith("```json\n")
    return json.loads(answer.partition("\n")[2].partition("\n```")[0])


BOTH = "Result: <1> <3>\nResult: <2> <0>"


@pytest.mark.parametrize(
    "answer",
    [
        BOTH,
        "Result: <2> <0>\nResult: <1> <3>",
        "1. **Result**: <1> <3>\n2. **Result:** <2> <0>",
        "I would say:\nResult:<1><3>; Result: <2> <0>",
        "结果： <1> <3>\n结果：<2> <0>",
        "结果:<1> <3>\nresult: <2> <0>",
        "Result: <1> <1>\nResult: <2> <0>\nNo, wait.\nResult: <1> <3>",
        "Result: <0> <3>\nResult: <9> <3>\n" + BOTH,
        "Result: `<1> <3>`\nResult: <2>, <Score: 0>",
        "结果：＜1＞ ＜3＞\n结果：<2> <分数:0>",
    ],
)
def test_judgments(answer: str) -> None:
    assert judged(answer) == BOTH


@pytest.mark.parametrize(
    "answer", ["Result: <1> <3>", "Result: <1> <3>\nResult: <3> <3>", "Result: <0> <3>"]
)
def test_messages_that_nobody_has_judged_are_not_forgotten(answer: str) -> None:
    with pytest.raises(CutOffAnswer, match="of 2 messages"):
        judged(answer)


@pytest.mark.parametrize("answer", ["", "I cannot.", "Result: <1> <7>", "<1> <3>", "3, 3"])
def test_no_judgments(answer: str) -> None:
    with pytest.raises(UnusableAnswer, match="judges no message"):
        judged(answer)


ONE = "Information: <1> <> <ann likes tea> <tea>"


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (ONE, ONE),
        (f"Here you are:\n- {ONE}.\n\nBye", ONE),
        (f"{ONE}\n{ONE}", ONE),
        ("- **Information:** <1> <> <ann likes tea> <tea> (as she says)", ONE),
        ("信息： <1> <> <ann likes tea> <tea>", ONE),
        ("information: <1><><ann likes tea><tea>", ONE),
        (
            "Information: <1> <> <uses List<String> in Java> <java>",
            "Information: <1> <> <uses List‹String› in Java> <java>",
        ),
        (
            "Information: <2> <> <fever >38 degrees> <fever>",
            "Information: <2> <> <fever ›38 degrees> <fever>",
        ),
        (
            "Information: <1> <2026> <ann likes ham> <ham>",
            "Information: <1> <> <ann likes ham (2026)> <ham>",
        ),
        ("None", "None"),
        ("无。", "None"),
        ("Thought: hypothetical.\nNone", "None"),
        ("Thought: a novel.\nInformation: None", "None"),
        ("思考：剧本。\n信息：无", "None"),
        ('"None"', "None"),
        ("Information: <1> <> <None> <>", "None"),
        ("Information: <1> <None> <None> <None>", "None"),
        ("Information: <1> <None>", "None"),
        ("Information: <1> <> <None> <> (hypothetical)", "None"),
        ("Information: <1> <None> <ann likes tea> <tea>", ONE),
        (
            f"Thought: yes.\n{ONE}\nThought: also.\n**Information:** `<2> <> <b> <k>`",
            f"{ONE}\nInformation: <2> <> <b> <k>",
        ),
        (f"{ONE} Information: <2> <> <b> <k>", f"{ONE}\nInformation: <2> <> <b> <k>"),
        ("Information:\n<1> <> <ann\nlikes tea> <tea>", ONE),
        ("Information: ＜1＞ ＜＞ ＜ann likes tea＞ ＜tea＞", ONE),
        ("Information: <1> <> <ann\u2028likes tea> <tea>;", ONE),
    ],
)
def test_observations(answer: str, found: str) -> None:
    assert observed(answer) == found


def test_observations_with_a_time() -> None:
    line = "Information: <1> <May 3> <ann meets Bob> <Bob>"
    assert observed(line, timed=True) == line


@pytest.mark.parametrize(
    "answer",
    [
        "The user has no allergies and loves spam.",
        "I'm sorry, but I have no way to help with that.",
        "抱歉，我无法处理您的请求。",
        "Information: <1> <I like tea> <tea>",
        "Information: <3> <> <I like tea> <tea>",
        "Information: <0> <> <I like tea> <tea>",
        "Information: <1, 2> <> <I like tea> <tea>",
        "Information: <1> <> <I like tea",
        f"{ONE}\nInformation: <2> <> <and so",
    ],
)
def test_no_observations(answer: str) -> None:
    with pytest.raises(UnusableAnswer, match="observation"):
        observed(answer)


EXPERIENCE = {"when_to_use": "always", "experience": "```json\n[]\n``` is an empty list"}


@pytest.mark.parametrize("step", ["SuccessExtractionOp", "FailureExtractionOp"])
@pytest.mark.parametrize(
    "answer",
    [
        json.dumps([EXPERIENCE]),
        json.dumps(EXPERIENCE),
        f"```json\n{json.dumps([EXPERIENCE])}\n```",
        f"Here you are:\n```json\n{json.dumps([EXPERIENCE], indent=1)}\n```\nThat is all.",
        f"```\n{json.dumps([EXPERIENCE])}\n```",
        f"``` JSON\n{json.dumps([EXPERIENCE])}",
        f"Here: {json.dumps([EXPERIENCE])}. Bye [1]",
        json.dumps({"experiences": [EXPERIENCE]}),
    ],
)
def test_experiences(step: str, answer: str) -> None:
    assert parsed(in_form(callback(step), answer)) == [EXPERIENCE]


def test_experiences_in_fences_of_their_own() -> None:
    one, two = ({"when_to_use": "x", "experience": each} for each in ("a", "b\ud83d"))
    answer = f"1.\n```json\n{json.dumps(one)}\n```\n2.\n```json\n{json.dumps(two)}\n```"
    found = parsed(in_form(callback("SuccessExtractionOp"), answer))
    assert [each["experience"] for each in found] == ["a", "b?"]


def test_no_experience_may_be_found() -> None:
    assert parsed(in_form(callback("SuccessExtractionOp"), "```json\n[]\n```")) == []


@pytest.mark.parametrize(
    "answer",
    [
        "I found nothing.", "```json\n[{", '["tea"]', "3", "null", "[" * 50_000,
        '[{"when_to_use": "x"}]', '[{"when_to_use": "x", "experience": 3}]',
        '[{"when_to_use": ["x"], "experience": "y"}]', "```json" + "\n" * 50_000 + "[",
    ],
)  # fmt: skip
def test_no_experiences(answer: str) -> None:
    with pytest.raises(UnusableAnswer):
        in_form(callback("SuccessExtractionOp"), answer)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ({"is_valid": True, "score": 0.9}, {"is_valid": True, "score": 0.9}),
        ({"is_valid": "false", "score": "0.9"}, {"is_valid": False, "score": 0.9}),
        (
            {"is_valid": True, "score": 1, "feedback": "```no```"},
            {"is_valid": True, "score": 1, "feedback": "```no```"},
        ),
    ],
)
def test_validations(answer: object, found: object) -> None:
    for written in (json.dumps(answer), f"Well:\n```json\n{json.dumps(answer)}\n```"):
        assert parsed(in_form(callback("MemoryValidationOp"), written)) == found


@pytest.mark.parametrize(
    "answer",
    [
        "[]", "null", "42", '"yes"', "{}", '{"error": 1}', '{"is_valid": true}', '{"score": 0.4}',
        '{"is_valid": true, "score": NaN}', '{"is_valid": true, "score": null}', "Yes, it is.",
        '{"is_valid": true, "score": true}', '{"is_valid": "perhaps", "score": 1}',
    ],
)  # fmt: skip
def test_no_validation(answer: str) -> None:
    with pytest.raises(UnusableAnswer):
        in_form(callback("MemoryValidationOp"), answer)


def test_steps_of_others_read_answers_as_they_are() -> None:
    assert in_form(callback("MyOwnOp"), "whatever") == "whatever"


def test_thoughts_are_not_the_answer() -> None:
    assert (
        without_thoughts("<think>Result: <1> <0></think>\nResult: <1> <3>") == "\nResult: <1> <3>"
    )
    assert without_thoughts("\n<think>and so on") == ""
    assert without_thoughts("I <think> so</think>") == "I <think> so</think>"


PROMPTS = {
    "info_filter": "InfoFilterOp",
    "get_observation": "GetObservationOp",
    "get_observation_with_time": "GetObservationWithTimeOp",
}


@pytest.mark.parametrize("name", PROMPTS)
def test_what_the_prompts_themselves_show_is_read(name: str) -> None:
    """Each answer that ReMe's prompts give as an example, in both languages."""
    library = find_spec("reme_ai")
    assert library is not None
    assert library.origin is not None
    place = Path(library.origin).parent / "summary" / "personal" / f"{name}_prompt.yaml"
    prompts = yaml.safe_load(place.read_text(encoding="utf-8"))
    examples = [
        example
        for prompt, text in prompts.items()
        if "few_shot" in prompt
        for example in re.split(r"(?:示例|Example) ?\d+", text)[1:]
    ]
    assert len(examples) >= 6
    for example in examples:
        begins = re.search(r"^(思考|Thought|结果|Result)", example, re.MULTILINE)
        assert begins is not None
        asked, answer = example[: begins.start()], example[begins.start() :]
        messages = max(int(number) for number in re.findall(r"^(\d+) ", asked, re.MULTILINE))
        found = in_form(callback(PROMPTS[name], messages), answer)
        if name == "info_filter":
            assert found.count("Result:") == messages
        else:
            assert "Information: <" in found
