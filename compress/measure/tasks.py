"""Questions for both models: minimal pairs and multiple choice, from JSON lines.

    {"sentence_good": "The cats sleep.", "sentence_bad": "The cats sleeps."}
    {"question": "2 + 2 =", "choices": [" 3", " 4"], "answer": 1}

A model answers with the choice to which it gives the highest probability, as a continuation of
the question; of minimal pairs the whole sentence counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from compress.documents import bos_ids, context_length, read_json_lines, tokenizer
from compress.errors import CompressError


@dataclass(frozen=True, slots=True)
class Choice:
    """Token ids, of which those from ``begin`` on are scored."""

    ids: tuple[int, ...]
    begin: int


@dataclass(frozen=True, slots=True)
class Question:
    """``answer`` is the index of the right choice."""

    choices: tuple[Choice, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class Task:
    """The questions of one file, which gives the name."""

    name: str
    questions: tuple[Question, ...]

    def half(self, which: int) -> "Task":
        """Every second question: 0 for selection, 1 for confirmation."""
        return Task(self.name, self.questions[which::2])

    @property
    def longest(self) -> int:
        """Tokens of the longest choice with its question."""
        return max(len(choice.ids) for one in self.questions for choice in one.choices)

    @property
    def chance(self) -> float:
        """The accuracy of guessing."""
        return sum(1 / len(one.choices) for one in self.questions) / len(self.questions)


def read_tasks(model_dir: Path, files: Sequence[Path]) -> tuple[Task, ...]:
    """Raises ``CompressError`` that names the file and the line."""
    if not files:
        return ()
    _check_names(files)
    encoder = tokenizer(model_dir / "tokenizer.json")
    reader = _Reader(encoder, bos_ids(model_dir), context_length(model_dir))
    return tuple(reader.task(file) for file in files)


def _check_names(files: Sequence[Path]) -> None:
    named: dict[str, Path] = {}
    for file in files:
        other = named.setdefault(file.stem, file)
        if other is not file:
            raise CompressError(
                f"{other} and {file} are both named {file.stem}, which names a task: rename one"
            )


@dataclass(frozen=True, slots=True)
class _Reader:
    encoder: Tokenizer
    bos: list[int]
    most: int

    def task(self, file: Path) -> Task:
        lines = read_json_lines(file)
        if not lines:
            raise CompressError(f"{file} has no questions")
        questions = [self._question(f"{file}:{number}", line) for number, line in lines]
        return Task(file.stem, tuple(questions))

    def _question(self, where: str, line: dict[str, Any]) -> Question:
        if "sentence_good" in line:
            pair = [line["sentence_good"], line.get("sentence_bad")]
            line = {"question": "", "choices": pair, "answer": 0}
        texts, context, answer = (line.get(key) for key in ("choices", "question", "answer"))
        if not isinstance(texts, list) or not _are_texts(texts) or not isinstance(context, str):
            raise CompressError(
                f"{where}: needs sentence_good and sentence_bad, or question, choices and answer"
            )
        if type(answer) is not int or not 0 <= answer < len(texts):
            raise CompressError(f"{where}: answer must be the index of a choice, from 0 on")
        return Question(tuple(self._choice(where, context, text) for text in texts), answer)

    def _choice(self, where: str, context: str, text: str) -> Choice:
        head = self.bos + self._encode(context)
        ids = self.bos + self._encode(context + text)
        # Without a token before it nothing predicts the first one.
        begin = max(1, len(head))
        if len(ids) <= begin:
            raise CompressError(f"{where}: a choice has no token of its own: {text!r}")
        if len(ids) > self.most:
            raise CompressError(
                f"{where}: {len(ids)} tokens are more than the model's context of {self.most}: "
                "shorten the question"
            )
        return Choice(tuple(ids), begin)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.encoder.encode(text, add_special_tokens=False).ids
        return ids


def _are_texts(values: list[object]) -> bool:
    return len(values) > 1 and all(isinstance(value, str) for value in values)
