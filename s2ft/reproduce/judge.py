"""Answers to questions in the form of MT-Bench, for a judge of the user's choice. No judge runs here."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from s2ft.files.writing import replace_file
from s2ft.reproduce.results import digest
from s2ft.text.encoding import context_length
from s2ft.text.generation import generate
from s2ft.text.prompts import encode_prompt


def read_questions(file: str | Path) -> list[dict[str, Any]]:
    """Read questions in the form of MT-Bench's question.jsonl.

    Args:
        file: One JSON object a line: `question_id` and `turns`, the messages of the user one after the other.

    Returns:
        The questions.

    Raises:
        ValueError: A line has another form. The message names the line.

    Example:
        >>> from pathlib import Path
        >>> from s2ft.reproduce.judge import read_questions
        >>> _ = Path("question.jsonl").write_text('{"question_id": 81, "turns": ["Hello!", "And now?"]}')
        >>> read_questions("question.jsonl")[0]["turns"]
        ['Hello!', 'And now?']
    """
    questions = []
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            question = json.loads(line)
        except ValueError as error:
            raise ValueError(f"questions {file}, line {number}: not JSON: {error}") from error
        turns = question.get("turns") if isinstance(question, dict) else None
        if "question_id" not in (question or {}) or not isinstance(turns, list) or not turns:
            raise ValueError(f"questions {file}, line {number}: needs question_id and a list turns, got {line[:80]!r}")
        if not all(isinstance(turn, str) for turn in turns):
            raise ValueError(f"questions {file}, line {number}: turns must be texts, got {turns!r}")
        questions.append(question)
    if not questions:
        raise ValueError(f"questions {file} is empty")
    return questions


def write_answers(
    loaded: Any, model: Any, questions: Sequence[dict[str, Any]], name: str, options: Any, folder: Path
) -> Path:
    """Answer questions and write the answers in the form of MT-Bench's model_answer, which its judges read.

    The second turn follows the model's own first answer. Answers are greedy, or by beams. (MT-Bench draws the answers
    of some categories at a temperature of 0.7, so that they differ between calls.)

    Args:
        loaded: The base with the tokenizer and the prompt, see :class:`~s2ft.reproduce.trial.Loaded`.
        model: The model that answers.
        questions: What :func:`read_questions` returned.
        name: The name of the model in the answers.
        options: Has `num_beams`, `eval_batch_size` and `max_new_tokens`.
        folder: The folder of the file.

    Returns:
        The file.

    Raises:
        ValueError: A conversation does not fit into the model's context.
    """
    chats: list[list[dict[str, str]]] = [[] for _ in questions]
    answers: list[list[str]] = [[] for _ in questions]
    room = (context_length(model) or 1 << 30) - options.max_new_tokens
    for turn in range(max(len(question["turns"]) for question in questions)):
        numbers = [number for number, question in enumerate(questions) if turn < len(question["turns"])]
        prompts = []
        for number in numbers:
            chats[number].append({"role": "user", "content": questions[number]["turns"][turn]})
            prompts.append(encode_prompt(loaded.tokenizer, loaded.prompt.conversation(chats[number])))
            if len(prompts[-1]) > room:
                raise ValueError(
                    f"question {questions[number]['question_id']}, turn {turn + 1}: {len(prompts[-1])} tokens do not "
                    f"fit into the {room} that the context leaves for the prompt: lower max_new_tokens"
                )
        how = (options.eval_batch_size, options.max_new_tokens, "answering", options.num_beams)
        for number, text in zip(numbers, generate(model, loaded.tokenizer, prompts, *how)):
            chats[number].append({"role": "assistant", "content": text})
            answers[number].append(text)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "model_answer.jsonl"
    lines = [_line(question, turns, name) for question, turns in zip(questions, answers)]
    replace_file(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    return file


def _line(question: dict[str, Any], turns: list[str], name: str) -> dict[str, Any]:
    return {
        "question_id": question["question_id"],
        "answer_id": digest({"question": question["question_id"], "model": name, "turns": turns})[:22],
        "model_id": name,
        "choices": [{"index": 0, "turns": turns}],
    }
