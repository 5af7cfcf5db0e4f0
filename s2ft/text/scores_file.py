"""The JSON file of a suite's scores: written after each task, so that a scoring that was cut off can be continued."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from s2ft.files.reading import parse_json
from s2ft.files.writing import replace_file
from s2ft.model.fingerprint import read_print
from s2ft.text.suites import LoadedTask, TaskResult, average


class ScoresFile:
    """The scores of one model on the tasks of a suite, in a JSON file.

    Args:
        path: The file.
        options: Everything that determines the scores, as JSON values. A file with other options is not continued.

    Attributes:
        results: The results so far, by the task's name.

    Example:
        >>> from pathlib import Path
        >>> from s2ft.text.scores_file import ScoresFile
        >>> from s2ft.text.suites import TaskResult
        >>> ScoresFile("scores.json", {"num_beams": 4}).add(TaskResult("BoolQ", 0.5, 1, 2, 0, 1.0))
        >>> again = ScoresFile("scores.json", {"num_beams": 4})
        >>> again.resume()
        >>> list(again.results)
        ['BoolQ']
    """

    def __init__(self, path: str | Path, options: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.options: dict[str, Any] = json.loads(json.dumps(options))  # as they are read again
        self.results: dict[str, TaskResult] = {}

    def resume(self) -> None:
        """Read the results that the file has. Nothing is changed if it does not exist.

        Raises:
            ValueError: The file is no file of scores, or its options are not those of this object. The message names
                the options that differ.
        """
        if not self.path.exists():
            return
        found = parse_json(self.path.read_bytes(), str(self.path))
        if not isinstance(found, dict) or not isinstance(found.get("options"), dict) or "tasks" not in found:
            raise ValueError(f"{self.path} holds no scores of a suite: choose another output")
        self._check(found["options"])
        try:
            results = [TaskResult.from_dict(task) for task in found["tasks"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is damaged: {error}; delete it, or choose another output") from None
        self.options = found["options"] | self.options
        self.results = {result.name: result for result in results}

    def _check(self, earlier: Mapping[str, Any]) -> None:
        different = [key for key in self.options if key in earlier and earlier[key] != self.options[key]]
        different += [key for key in self.options if key not in earlier and key != WEIGHTS]
        if different:
            shown = "; ".join(
                f"{key} was {_short(earlier.get(key))}, is {_short(self.options[key])}" for key in different
            )
            raise ValueError(f"the scores in {self.path} were made with other options: {shown}")

    def check_weights(self, model: nn.Module) -> None:
        """Record the content of the model's weights, or compare it with the recorded one.

        Args:
            model: The loaded model, with its adapter.

        Raises:
            ValueError: The earlier scores are of other weights under the same names.
        """
        now = {WEIGHTS: weights_digest(model)}
        if self.results and self.options.get(WEIGHTS, now[WEIGHTS]) != now[WEIGHTS]:
            raise ValueError(
                f"the scores in {self.path} are of other weights: the model or the adapter was changed meanwhile"
            )
        self.options |= now

    def add(self, result: TaskResult) -> None:
        """Add a result and write the file in one step.

        Args:
            result: The result of a task.
        """
        self.results[result.name] = result
        self.write()

    def write(self, **more: Any) -> None:
        """Write the file in one step.

        Args:
            more: Further values of the file, as JSON values.
        """
        tasks = list(self.results.values())
        content = {
            "options": self.options,
            "average": average(tasks) if tasks else None,
            **more,
            "tasks": [task.to_dict() for task in tasks],
        }
        replace_file(self.path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


WEIGHTS = "weights"  # the option that is known only after the model was loaded


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def rows_digest(suite: Sequence[LoadedTask]) -> dict[str, str]:
    """Return a hash of the rows of each task, by its name.

    Args:
        suite: What :func:`s2ft.text.suites.load_suite` returned.

    Example:
        >>> from s2ft.text.examples import Example
        >>> from s2ft.text.scores_file import rows_digest
        >>> from s2ft.text.suites import LoadedTask, SuiteTask
        >>> rows_digest([LoadedTask(SuiteTask("sums", "arithmetic", "sums.jsonl"), (Example("2+3=", "5"),))])
        {'sums': '...'}
    """
    return {one.task.name: hashlib.sha256(repr(one.examples).encode()).hexdigest()[:16] for one in suite}


def weights_digest(model: nn.Module) -> str:
    """Return a hash that depends on every parameter of a model.

    Args:
        model: The model. Its parameters are on this machine.

    Example:
        >>> from s2ft.text.scores_file import weights_digest
        >>> before = weights_digest(model)
        >>> with torch.no_grad():
        ...     _ = model.lm_head.weight[3, 5].add_(1)
        >>> weights_digest(model) == before
        False
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(read_print(name, parameter.detach()).content)
    return digest.hexdigest()[:16]
