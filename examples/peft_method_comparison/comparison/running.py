"""One run from the base to its result. It can be interrupted at any time, and goes on from its folder."""

import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from comparison import data, models, results
from comparison.clock import Clock, OutOfTime
from comparison.evaluation import accuracy, accuracy_of_numbers, answers
from comparison.memory import Memory
from comparison.settings import Run
from comparison.training import BUCKET, Trainer, encoded
from s2ft.text.divergence import mean_loss
from s2ft.train.out_of_memory import first_line, is_out_of_memory

logger = logging.getLogger(__name__)


def execute(
    run: Run, output: Path, data_folder: Path | None = None, until: float | None = None, test_rows: int | None = None
) -> dict[str, Any] | None:
    """Run an experiment, and write its result.

    Args:
        run: The run.
        output: Folder of results. The run's checkpoint and answers lie in work/, until its result is written.
        data_folder: Folder with the data; None reads from the hub.
        until: When the run must end, as `time.time()`; None for no limit.
        test_rows: Number of test problems; None takes all.

    Returns:
        The content of the result, or None if the time limit came first. The next call goes on from there. A run that
        does not fit into memory, or whose loss is no number, has a result that says so.

    Raises:
        FileNotFoundError: The data or the model does not exist.
        ValueError: A setting is not allowed.
    """
    path, clock, created = output / run.file_name, Clock(until), results.now()
    needed = run.params.max_steps * run.params.batch_size
    bucket = run.params.batch_size * BUCKET  # a whole bucket is read, because its longest rows come first
    try:
        texts = data.read(data_folder, -(-needed // bucket) * bucket, test_rows, least=needed)
        measured = _Stages(run, texts, clock, output / "work" / path.stem).measured()
        content = results.result(run, created, results.SUCCESS, measured)
    except OutOfTime:
        return None
    except (FileNotFoundError, ValueError):
        raise
    except Exception as error:
        if not is_out_of_memory(error) and not isinstance(error, FloatingPointError):
            raise
        reason = f"{results.OUT_OF_MEMORY}: {first_line(error)}" if is_out_of_memory(error) else str(error)
        logger.error("%s: %s", run.name, reason)
        content = results.result(run, created, results.CANCELED, _empty(), reason)
        shutil.rmtree(output / "work" / path.stem, ignore_errors=True)
    results.write(path, content)
    return content


def _empty() -> dict[str, Any]:
    """What a result without measurements has."""
    keys = ("accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th")
    return {**dict.fromkeys([*keys, "train_time", "file_size", "num_trainable_params"]), "metrics": []}


class _Stages:
    """The parts of a run, in their order.

    Args:
        run: The run.
        texts: The data.
        clock: Measures the time, and has the limit.
        folder: Folder of the checkpoint and of the answers.
    """

    def __init__(self, run: Run, texts: data.Data, clock: Clock, folder: Path) -> None:
        self.run, self.params, self.texts, self.clock, self.folder = run, run.params, texts, clock, folder
        self.checkpoint, self.answers = folder / "checkpoint.pt", folder / "answers.json"

    def measured(self) -> dict[str, Any]:
        """Go through all stages.

        Returns:
            `train_info` of the result.
        """
        params, clock = self.params, self.clock
        torch.manual_seed(params.seed)
        with clock.part("loading"):
            memory = Memory(models.device())
            base, self.tokenizer = models.load(params)
            rows = encoded(self.tokenizer, self.texts.training, params)
            prepared = models.with_method(base, self.tokenizer, self.run, rows, self._encoded(self.texts.protected))
        logger.info("%s", prepared.report)
        self.model = prepared.model
        trainer = Trainer(self.model, rows, self.tokenizer.eos_token_id, params, memory)
        before = self._restored(trainer)
        if before is None:
            with clock.part("forgetting"), models.base_values(prepared):
                before = self._loss()
        save = partial(self._save, trainer, before)
        if trainer.is_small:
            save()
        trainer.run(clock, self._validate, save)
        generated = self._test(trainer, save)
        with clock.part("forgetting"):
            after = self._loss()
        found = self._train_info(trainer, memory, generated, before, after)
        found |= {
            "file_size": models.size_of_adapter(prepared),
            "num_trainable_params": prepared.trainable,
            "num_total_params": models.total_parameters(prepared),
        }
        shutil.rmtree(self.folder)
        return found

    def _restored(self, trainer: Trainer) -> float | None:
        """Go on from the checkpoint. Returns the base's loss on the encyclopedia, or None without a checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.checkpoint.is_file():
            self.answers.unlink(missing_ok=True)
            return None
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        if state["run"] != self.run.to_dict():
            raise ValueError(f"{self.checkpoint} is of a run with other settings: delete it to start again")
        trainer.restore(state["trainer"])
        self.clock.parts = state["parts"]
        if trainer.progress.step < self.params.max_steps:
            self.answers.unlink(missing_ok=True)
        logger.info("going on after step %d", trainer.progress.step)
        return state["before"]

    def _save(self, trainer: Trainer, before: float) -> None:
        state = {"trainer": trainer.state(), "before": before, "parts": self.clock.parts, "run": self.run.to_dict()}
        temporary = self.checkpoint.with_suffix(".new")
        torch.save(state, temporary)
        temporary.replace(self.checkpoint)

    def _validate(self, clock: Clock) -> float:
        pairs = self.texts.validation
        return accuracy(answers(self.model, self.tokenizer, pairs, self.params, clock, "validation"), pairs)

    def _test(self, trainer: Trainer, save: Callable[[], None]) -> list[str]:
        """Answer the test problems. A small checkpoint is saved before, a large one only if the time ends."""
        if trainer.is_small:
            save()
        reserve = 0.0 if trainer.is_small else trainer.saving
        pairs = self.texts.test
        try:
            return answers(self.model, self.tokenizer, pairs, self.params, self.clock, "test", self.answers, reserve)
        except OutOfTime:
            save()
            raise

    def _loss(self) -> float:
        """Mean loss on the encyclopedia, in nats a token."""
        rows = [{"input_ids": ids, "labels": ids} for ids in self._encoded(self.texts.texts)]
        return mean_loss(self.model, rows, self.params.batch_size)

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        return [ids[: self.params.max_seq_length] for ids in self.tokenizer(texts)["input_ids"]] if texts else []

    def _train_info(
        self, trainer: Trainer, memory: Memory, generated: list[str], before: float, after: float
    ) -> dict[str, Any]:
        progress, parts = trainer.progress, self.clock.parts
        last = {
            "step": progress.step,
            "test accuracy": accuracy(generated, self.texts.test),
            "test accuracy of numbers": accuracy_of_numbers(generated, self.texts.test),
            "train loss": trainer.mean_loss(),
            "train samples": trainer.samples,
            "train total tokens": sum(progress.tokens),
            "forgetting": after - before,
            "loss on the encyclopedia before": before,
        }
        training = sum(progress.durations)
        return {
            **memory.summary(),
            "memory_kind": memory.kind,
            "train_time": training + parts.get("test", 0.0) + parts.get("forgetting", 0.0),
            "seconds": {name: round(seconds, 3) for name, seconds in {**parts, "training": training}.items()},
            "tokens_per_second": sum(progress.tokens) / training,
            "total_time": sum(parts.values()),
            "dataset_info": {name: {"sha": None, "source": where} for name, where in self.texts.source.items()},
            "metrics": [*progress.metrics, last],
        }
