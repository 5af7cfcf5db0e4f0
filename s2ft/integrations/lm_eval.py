"""lm-eval (lm-evaluation-harness) on a model with an S²FT adapter.

lm-eval runs the model that s2ft loads. The adapter is in the weights, bit for bit as a merge writes it, so that the
results are those of the merged checkpoint.
"""

import copy
import functools
import json
from collections.abc import Sequence
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table

from s2ft.text.adapter_prompts import Prompter, standalone_template
from s2ft.text.generation import generation_mode


def evaluate(
    model,
    prompter: Prompter,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    apply_chat_template: bool = False,
    include_path: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Score a model on tasks of lm-eval.

    Args:
        model: A causal language model, with or without an attached adapter.
        prompter: The :class:`s2ft.text.adapter_prompts.Prompter` of the adapter or of the base, which
            :func:`s2ft.text.adapter_prompts.load_with_adapter` returns beside the model.
        tasks: Names of tasks, groups and tags of lm-eval; * stands for any letters.
        num_fewshot: Examples before each question. None is the task's own number.
        limit: Use the first rows of each task only.
        batch_size: Rows of a forward pass.
        apply_chat_template: Whether questions are put into the chat template. The adapter's own template and system
            prompt are used if it records them.
        include_path: A folder with further tasks, as YAML files.
        options: Further arguments of `lm_eval.simple_evaluate`, such as `gen_kwargs` or `log_samples`.

    Returns:
        What `lm_eval.simple_evaluate` returns.

    Raises:
        ValueError: A task is unknown, or the adapter was trained on plain text and the chat template is asked for.
    """
    names = check_tasks(tasks, include_path)
    if apply_chat_template and not prompter.is_chat:
        raise ValueError(
            "apply_chat_template has no template to apply: the adapter was trained on plain text, or the base has none"
        )
    tokenizer = copy.deepcopy(prompter.tokenizer)  # lm-eval may give it a token to pad with
    if prompter.is_chat:
        tokenizer.chat_template = standalone_template(prompter.format)
    with generation_mode(model):
        return simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal"),
            tasks=names,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            apply_chat_template=apply_chat_template,
            task_manager=_manager(include_path),
            **{"log_samples": False, **options},
        )


def check_tasks(tasks: Sequence[str], include_path: str | None = None) -> list[str]:
    """Return the names of tasks that lm-eval knows, and raise an error for others.

    Args:
        tasks: As in :func:`evaluate`.
        include_path: As in :func:`evaluate`.

    Returns:
        The names of tasks, groups and tags.

    Raises:
        ValueError: A task is unknown, or none was given.
    """
    found = {task: _manager(include_path).match_tasks([task]) for task in tasks}
    unknown = [task for task, names in found.items() if not names]
    if unknown or not found:
        raise ValueError(
            f"lm-eval has no task {', '.join(unknown) or 'without a name'}; `lm_eval ls tasks` lists them, and "
            "lm_eval_path (--lm-eval-path) adds a folder with others"
        )
    return [name for names in found.values() for name in names]


@functools.lru_cache(maxsize=1)  # it reads thousands of files
def _manager(include_path: str | None) -> TaskManager:
    return TaskManager(include_path=include_path)


def as_table(results: dict[str, Any]) -> str:
    """Return lm-eval's own table of results.

    Args:
        results: What :func:`evaluate` returned.
    """
    return make_table(results) + (f"\n{make_table(results, 'groups')}" if results.get("groups") else "")


def as_json(results: dict[str, Any]) -> str:
    """Return results as JSON, with text in place of functions in the tasks' configurations.

    Args:
        results: What :func:`evaluate` returned.
    """
    return json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n"
