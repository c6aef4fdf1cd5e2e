"""What ReMe 0.3.1.10 asks a model for, answered in the simplest way.

`ReMeAnswers` knows ReMe's prompts by how they open, in English and in Chinese, and answers in the
formats that ReMe parses: each message of a user becomes a memory with its very words, so that a
test can tell what became of which. `OpenAIServer.answer` takes one; what it does not know, it
leaves to the server.

ReMe writes messages into its prompts without quoting. How many there are, it says, so a single
message may contain anything. Of several, a line of one that begins exactly as the next message does
("2 user: ", in observations) counts as the next, and so does a line of a trajectory that looks like
the heading of a later step and has an empty line before it.

Two things do not come back as they were said: ReMe's observations stand between angle brackets, so
"<" and ">" in them become "‹" and "›" (see `in_brackets`), and ReMe strips them. It also takes an
observation that says "none", "repeat" or "无", and nothing else, for no observation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from tests.loopback.openai_api import Reply, content_of
from tests.loopback.text import similarity, words

_T = TypeVar("_T")

Judgment = Literal["Contradiction", "Contained", "None"]

_BRACKETS = str.maketrans("<>", "‹›")


def in_brackets(text: str) -> str:
    """How `text` is said where ReMe parses what stands between angle brackets."""
    return text.translate(_BRACKETS)


class ReMeAnswers:
    """``server.answer = ReMeAnswers()``. May be changed and read while the server runs."""

    def __init__(self) -> None:
        self.scores: dict[str, int] = {}
        """From 0 to 3, of messages that contain a word; ReMe goes on with 2 and 3, the default."""
        self.judgments: dict[str, Judgment] = {}
        """Of personal memories that contain a word; ReMe deletes all that are not "None"."""
        self.invalid: set[str] = set()
        """Task memories that contain one of these words are not valid."""
        self.asked: list[str] = []
        """What each chat was for, in order: "info_filter", "success", ... see `_PROMPTS`."""

    def __call__(self, body: dict[str, Any]) -> Reply | None:
        prompt = content_of(body["messages"][-1])
        for each in _PROMPTS:
            if opening := each.opening.match(prompt):
                self.asked.append(each.name)
                return each.answer(self, _Chat(prompt, opening.groupdict(), each.language))
        return None

    # --- personal memories ----------------------------------------------------------------------

    def _info_filter(self, chat: _Chat) -> str:
        language = chat.language
        begins = re.escape(f"{chat.said['name']}{language.colon} ")
        scores = (_of_words(self.scores, text, 3) for _, text in chat.sentences("", begins))
        return "\n".join(f"{language.result}<{at}> <{score}>" for at, score in enumerate(scores, 1))

    def _observation(self, chat: _Chat) -> str:
        name = chat.said["name"]
        return _observations(chat, chat.sentences(name, re.escape(f"{name}: ")))

    def _observation_with_time(self, chat: _Chat) -> str:
        name, language = chat.said["name"], chat.language
        # What ReMe makes of the time ends with a line break.
        begins = rf"({language.time})\s+{re.escape(name + language.colon)}"
        return _observations(chat, chat.sentences(name, begins))

    def _contra_repeat(self, chat: _Chat) -> str:
        language = chat.language
        default: Judgment = "None"
        judgments = (
            language.judgments[_of_words(self.judgments, text, default)]
            for _, text in chat.sentences("", "")
        )
        return "\n".join(
            f"{language.judgment}<{at}> <{each}>" for at, each in enumerate(judgments, 1)
        )

    def _extract_time(self, chat: _Chat) -> str:
        return chat.language.judgments["None"]

    def _semantic_rank(self, chat: _Chat) -> str:
        rankings = [
            {"index": index, "score": score}
            for index, score in _likeness(
                chat.said["query"],
                chat.between("\nMemories:\n", "\n\nPlease respond in JSON format:"),
                "Memory",
                "Content",
            )
        ]
        return _fenced({"rankings": rankings})

    # --- task memories --------------------------------------------------------------------------

    def _success(self, chat: _Chat) -> str:
        steps = chat.between("\n# Step Sequence Analysis\n", "\n\n# Context Information\nQuery: ")
        return _fenced(
            [
                {
                    "when_to_use": text,
                    "experience": text,
                    "tags": words(text)[:5],
                    "confidence": 0.9,
                    "step_type": "decision",
                    "tools_used": [],
                }
                for text in _user_steps(steps)
                if text.strip()
            ]
        )

    def _nothing(self, chat: _Chat) -> str:
        return _fenced([])

    def _validation(self, chat: _Chat) -> str:
        memory = chat.between("\n# Task Memory to Validate\n", "\n\nOUTPUT FORMAT:")
        is_valid = not any(word in memory for word in self.invalid.copy())
        score = 0.9 if is_valid else 0.1
        return _fenced(
            {"is_valid": is_valid, "score": score, "feedback": "", "recommendations": ""}
        )

    def _build_query(self, chat: _Chat) -> str:
        process = chat.between("# Execution Process\n", "\n\nRead through the entire execution")
        return (_user_steps(process) or [process])[-1]

    def _rerank(self, chat: _Chat) -> str:
        heading = "\n\n# Candidate Experiences (Total: "
        query = chat.between("\n# Current Query\n", heading)
        _, _, candidates = chat.between(heading, _FORMAT).partition("\n")
        likeness = _likeness(query, candidates, "Candidate", "Experience")
        ranked = sorted(likeness, key=lambda each: each[1], reverse=True)
        return _fenced({"ranked_indices": [index for index, _ in ranked], "reasoning": "likeness"})

    def _rewrite(self, chat: _Chat) -> str:
        context = chat.between("\n# Original Context Content (Multiple Experiences)\n", _FORMAT)
        return _fenced({"rewritten_context": context})


# --- the languages ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Language:
    heading: str
    """Above what was said."""
    heading_of: str
    """Above what somebody said."""
    colon: str
    """Between a name and what it said; in English, a space belongs to it."""
    time: str
    """A pattern of when something was said."""
    result: str
    information: str
    judgment: str
    judgments: dict[Judgment, str]


_ENGLISH = _Language(
    heading="Sentences:\n",
    heading_of="{} sentences:\n",
    colon=": ",
    time=r"\w+ \d+, \d+, \w+, at \d+",
    result="Result: ",
    information="Information: ",
    judgment="Judgment: ",
    judgments={"Contradiction": "Contradiction", "Contained": "Contained", "None": "None"},
)
_CHINESE = _Language(
    heading="句子：\n",
    heading_of="{}句子：\n",
    colon="：",
    time=r"\d+年\d+月\d+日周\w\d+点",
    result="结果：",
    information="信息：",
    judgment="判断：",
    judgments={"Contradiction": "矛盾", "Contained": "被包含", "None": "无"},
)


# --- reading prompts ----------------------------------------------------------------------------

_FORMAT = "\n\nOUTPUT FORMAT:"


@dataclass(frozen=True)
class _Chat:
    prompt: str
    said: dict[str, str]
    """What the opening of the prompt says: how many messages of whom."""
    language: _Language

    def between(self, start: str, end: str) -> str:
        """What stands behind the first `start` and before the last `end`.

        What was said stands there, and may look like either of them.
        """
        return self.prompt.partition(start)[2].rpartition(end)[0]

    def sentences(self, name: str, begins: str) -> list[tuple[re.Match[str], str]]:
        """How each of the messages begins, which is its number and `begins`, and its text."""
        heading = self.language.heading_of.format(name) if name else self.language.heading
        # The examples in the prompt have such headings too, but only one empty line before them.
        _, _, behind = self.prompt.partition(f"\n\n\n{heading}")
        text = behind.removesuffix("\n")
        starts: list[re.Match[str]] = []
        for number in range(1, int(self.said["count"]) + 1):
            pattern = re.compile(rf"^{number} {begins}", re.MULTILINE)
            start = pattern.search(text, starts[-1].end() if starts else 0)
            assert start is not None, f"message {number} is not in {self.prompt!r}"
            starts.append(start)
        ends = [start.start() - 1 for start in starts[1:]] + [len(text)]
        return [(start, text[start.end() : end]) for start, end in zip(starts, ends, strict=True)]


_STEP = re.compile(r"(?:\A|(?<=\n\n))### step\.(\d+) role=(\w+) (?:content|tool call result)=\n")


def _user_steps(merged: str) -> list[str]:
    """The texts of users in messages that ReMe has merged. It numbers them, and skips some."""
    merged += "\n"  # as behind all others
    starts: list[re.Match[str]] = []
    for start in _STEP.finditer(merged):
        if not starts or int(start[1]) > int(starts[-1][1]):
            starts.append(start)
    ends = [start.start() for start in starts[1:]] + [len(merged)]
    return [
        merged[start.end() : end].removesuffix("\n\n")
        for start, end in zip(starts, ends, strict=True)
        if start[2] == "user"
    ]


def _likeness(query: str, text: str, kind: str, label: str) -> list[tuple[int, float]]:
    """The number of each memory in `text`, and how like the query what is behind `label` is."""
    _, *parts = re.split(rf"(?:\A|\n---\n){kind} (\d+):\n", text)
    return [
        (int(number), round(similarity(query, part.partition(f"\n{label}: ")[2]), 3))
        for number, part in zip(parts[::2], parts[1::2], strict=True)
    ]


# --- writing answers ----------------------------------------------------------------------------


def _of_words(values: dict[str, _T], text: str, default: _T) -> _T:
    return next((value for word, value in values.copy().items() if word in text), default)


def _observations(chat: _Chat, sentences: list[tuple[re.Match[str], str]]) -> str:
    lines = []
    for number, (start, text) in enumerate(sentences, 1):
        time = start[1] if start.re.groups else ""
        said = in_brackets(text)
        # The keywords are what ReMe embeds.
        lines.append(f"{chat.language.information}<{number}> <{time}> <{said}> <{said}>")
    return "\n".join(lines)


def _fenced(value: object) -> str:
    # ReMe reads up to the next fence, and what was said may contain one.
    text = json.dumps(value, ensure_ascii=False).replace("`", "\\u0060")
    return f"```json\n{text}\n```"


# --- the prompts --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Prompt:
    name: str
    opening: re.Pattern[str]
    language: _Language
    answer: Callable[[ReMeAnswers, _Chat], str]


def _prompts() -> Iterator[_Prompt]:
    """By how they open, since what was said comes later and could look like anything."""
    # All of these say how many messages follow, and most of them, whose they are.
    count, name = r"(?P<count>\d+)", r"(?P<name>.+)"
    personal = {
        "info_filter": (
            ReMeAnswers._info_filter,
            rf"Task: Score the information about {name} contained in the given batch of {count} ",
            rf"任务：对所给{count}个句子中所含有的关于{name}的信息打分",
        ),
        "observation": (
            ReMeAnswers._observation,
            rf"Task: Sequentially extract .* about {name} from the following {count} sentences",
            rf"任务：从下面的{count}句{name}句子中依次提取出.*的重要信息，与相应的关键词",
        ),
        "observation_with_time": (
            ReMeAnswers._observation_with_time,
            rf"Task: Extract important .* from the following {count} sentences of {name}, incl",
            rf"任务：从下面的{count}句{name}句子中依次提取出.*的重要信息，相应的关键词与时间信息",
        ),
        "contra_repeat": (
            ReMeAnswers._contra_repeat,
            rf"Task: For the following {count} sentences, determine whether each sentence ",
            rf"任务：对下面的{count}句句子，逐一判断",
        ),
        "extract_time": (
            ReMeAnswers._extract_time,
            r"Task: From the sentences and the time when they occurred, infer ",
            r"任务：从语句与语句发生的时间，推断",
        ),
    }
    for op, (answer, english, chinese) in personal.items():
        yield _Prompt(op, re.compile(english), _ENGLISH, answer)
        yield _Prompt(op, re.compile(chinese), _CHINESE, answer)
    expert = "You are an expert AI a(?:nalyst|ssistant) "
    only_english = {
        "semantic_rank": (
            ReMeAnswers._semantic_rank,
            r'Given the query: "(?P<query>(?s:.*?))"\n\nPlease rank the following memories ',
        ),
        "success": (ReMeAnswers._success, expert + "reviewing successful step sequences"),
        "failure": (ReMeAnswers._nothing, expert + "reviewing failed step sequences"),
        "soft_comparison": (ReMeAnswers._nothing, expert + "comparing higher-scoring and lower"),
        "hard_comparison": (ReMeAnswers._nothing, expert + "comparing successful and failed"),
        "validation": (ReMeAnswers._validation, expert + "tasked with validating the quality"),
        "rerank": (ReMeAnswers._rerank, expert + "tasked with reranking retrieved experiences"),
        "rewrite": (ReMeAnswers._rewrite, expert + "tasked with rewriting and reorganizing"),
        # There is another prompt that begins like this, and ends otherwise.
        "build_query": (
            ReMeAnswers._build_query,
            r"# Execution Process\n(?s:.*)\n\nRead through the entire execution process ",
        ),
    }
    for op, (answer, english) in only_english.items():
        yield _Prompt(op, re.compile(english), _ENGLISH, answer)


_PROMPTS = list(_prompts())
