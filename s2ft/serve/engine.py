"""The scheduler. One thread runs the model and adds waiting sequences to the batch when there is room.

Each iteration removes cancelled sequences, runs the prompts of new ones, and generates one token for each row. Only
this thread uses the model. Other threads put sequences into the queue and get events through callbacks.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from s2ft.serve.schemas import ApiError, shutting_down
from s2ft.serve.served_adapters import Adapters, ServedAdapter, cannot_load
from s2ft.text.generation import AnswerRow, RunningBatch, TextStream, rows_interact, takes_left_padding

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """News of a sequence: more text, its end, or an error.

    Attributes:
        text: New text.
        finish: "stop" or "length" at the end of the sequence, else None.
        error: The error that ended the sequence, or None.
    """

    text: str = ""
    finish: str | None = None
    error: ApiError | None = None

    @property
    def last(self) -> bool:
        """Whether no event follows."""
        return self.finish is not None or self.error is not None


class Job(AnswerRow):
    """A sequence with its limits and the callback for its events.

    Args:
        prompt: Token ids of the prompt.
        max_tokens: Longest answer in tokens.
        sampler: Chooses the tokens.
        text: Converts the tokens to text and finds stop strings.
        ends: Tokens that end the answer.
        emit: Called with each event in the engine's thread. It must not block.
        served: The acquired adapter, which the engine releases. None is the base.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        sampler,
        text: TextStream,
        ends: frozenset[int],
        emit: Callable[[Event], None],
        served: ServedAdapter | None = None,
    ) -> None:
        super().__init__(prompt, sampler, None if served is None else served.bank_name)
        self.max_tokens, self.text, self.ends, self.emit, self.served = max_tokens, text, ends, emit, served
        self.cancelled = False

    def event(self) -> Event:
        """Return the event of the newest token."""
        if self.failed:
            return Event(error=ApiError(500, "model_failed", self.failed))
        if self.tokens[-1] in self.ends:
            return Event(self.text.flush(), "stop")
        text = self.text.push(self.tokens[-1])
        if self.text.stopped:
            return Event(text, "stop")
        if len(self.tokens) < self.max_tokens:
            return Event(text)
        text += self.text.flush()
        return Event(text, "stop" if self.text.stopped else "length")


class Engine:
    """Runs jobs with one model.

    Args:
        model: A causal language model of transformers.
        adapters: The adapters that jobs can use.
        max_batch_size: Number of sequences that are generated together. Models whose rows depend on the longest row
            of the batch always use 1.
        queue_size: Number of jobs that can wait. Further jobs are refused.
        max_batch_tokens: Largest number of tokens of prompts and answers in the batch, with padding. It bounds the
            memory of keys and values. A longer sequence runs alone. None is no limit.
        prefill_tokens: Largest number of prompt tokens that are run at once, with padding. A longer prompt runs alone.
        metrics: Histogram of batch sizes, see :mod:`s2ft.serve.access`. None counts nothing.
    """

    def __init__(
        self,
        model,
        adapters: Adapters,
        max_batch_size: int = 16,
        queue_size: int = 256,
        max_batch_tokens: int | None = None,
        prefill_tokens: int = 4096,
        metrics=None,
    ) -> None:
        if max_batch_size > 1 and (rows_interact(model.config) or not takes_left_padding(model)):
            logger.warning("this model's sequences can't share a batch, so one runs at a time")
            max_batch_size = 1
        self.adapters, self.metrics = adapters, metrics
        self.max_batch_size, self.queue_size = max_batch_size, queue_size
        self.max_batch_tokens, self.prefill_tokens = max_batch_tokens, prefill_tokens
        self.batch: RunningBatch[Job] = RunningBatch(model, adapters.bank.batch if adapters.bank is not None else None)
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._is_blocked = False  # the job that waits longest needs the room of an adapter of the batch
        self._thread = threading.Thread(target=self._run, name="s2ft-engine", daemon=True)

    # ---- called by other threads -----------------------------------------------------------------

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Fail all jobs that are left, and wait for the thread to end."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the engine runs and accepts jobs."""
        return self._thread.is_alive() and not self._stopped

    @property
    def waiting(self) -> int:
        """Number of jobs in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of sequences in the batch."""
        return len(self.batch.rows)

    def submit(self, job: Job) -> None:
        """Add a job to the queue. If it is refused, its adapter is released.

        Args:
            job: The job.

        Raises:
            ApiError: 429 if the queue has no room, 503 if the server is shutting down.
        """
        with self._changed:
            if self._stopped:
                refused = shutting_down()
            elif len(self._waiting) >= self.queue_size:
                refused = ApiError(
                    429,
                    "queue_full",
                    f"all {self.queue_size} places in the queue are taken: try again later",
                    {"Retry-After": "1"},
                )
            else:
                self._waiting.append(job)
                self._changed.notify()
                return
        self.adapters.release(job.served)
        raise refused

    def cancel(self, job: Job) -> None:
        """Cancel a job, for example if its client has disconnected.

        It leaves the queue at once, or the batch before its next token.

        Args:
            job: The job.
        """
        with self._changed:
            job.cancelled = True
            waited = job in self._waiting
            if waited:
                self._waiting.remove(job)
                self._is_blocked = False
        if waited:
            self.adapters.release(job.served)

    # ---- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._work_to_do():
            try:
                self._advance()
            except Exception as error:  # any error, such as a lack of memory; the next batch may work
                logger.exception("the batch failed")
                self._finish(self.batch.rows, _model_failed(error))
                self.batch.clear()
        with self._changed:
            left = [*self.batch.rows, *self._waiting]
            self._waiting.clear()
        self._finish(left, shutting_down())
        self.batch.clear()

    def _work_to_do(self) -> bool:
        """Wait until there is work. False means that the thread must end."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._waiting or self.batch.rows)
            return not self._stopped

    def _advance(self) -> None:
        cancelled = [job for job in self.batch.rows if job.cancelled]
        self.batch.keep([job for job in self.batch.rows if job not in cancelled])  # one may be cancelled just now
        self._finish(cancelled)
        self._admit(self._load_adapters(self._next()))
        if self.batch.rows:
            self.batch.step()
            if self.metrics:
                self.metrics.batch_size.observe(len(self.batch.rows))
            self._deliver(self.batch.rows)

    def _next(self) -> list[Job]:
        """Return the jobs that have waited longest, as many as fit into the batch and into one pass of the model."""
        chosen: list[Job] = []
        with self._changed:
            self._is_blocked &= bool(self.batch.rows)
            while not self._is_blocked and self._waiting and self._has_room([*chosen, self._waiting[0]]):
                chosen.append(self._waiting.popleft())
        return chosen

    def _has_room(self, jobs: list[Job]) -> bool:
        """Whether jobs can join the batch. A single job always can if the batch is empty."""
        batch = [*self.batch.rows, *jobs]
        if len(batch) == 1:
            return True
        columns = max(len(job.prompt) + job.max_tokens for job in batch)
        if len(batch) > self.max_batch_size or columns * len(batch) > (self.max_batch_tokens or float("inf")):
            return False
        return len(jobs) == 1 or max(len(job.prompt) for job in jobs) * len(jobs) <= self.prefill_tokens

    def _load_adapters(self, jobs: list[Job]) -> list[Job]:
        """Load the adapters of jobs beside those of the batch, and return the jobs that can join.

        A job whose adapter cannot be loaded fails. A job whose adapter exceeds the bank's limit waits longer.
        """
        while jobs:
            try:
                self._load([job.adapter for job in [*self.batch.rows, *jobs]])
                return jobs
            except Exception:
                loadable = [job for job in jobs if self._loads_alone(job)]
                if len(loadable) == len(jobs):
                    with self._changed:
                        self._waiting.appendleft(loadable.pop())
                        self._is_blocked = True
                jobs = loadable
        return []

    def _loads_alone(self, job: Job) -> bool:
        """Whether the adapter of a job can be loaded. If not, the job fails."""
        try:
            if self.batch.rows and job.served:  # a load could drop one of the batch, whose folder may have changed
                self.adapters.bank.check(job.served.folder)
            else:
                self._load([job.adapter])
            return True
        except Exception as error:
            logger.warning("adapter %r can't be loaded: %s", job.served.name, error)
            self._finish([job], cannot_load(job.served.name, job.served.folder, error))
            if isinstance(error, ValueError):
                self.adapters.refuse(job.served, error)
            return False

    def _load(self, names: list) -> None:
        if any(name is not None for name in names):
            with self.batch.mixing(names):
                pass

    def _admit(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        try:
            self.batch.admit(jobs)
        except Exception as error:  # the rows of the batch are unchanged
            logger.exception("a prompt failed")
            self._finish(jobs, _model_failed(error))
            return
        self._deliver(jobs)

    def _deliver(self, jobs: Sequence[Job]) -> None:
        """Send each client its newest token, and remove the finished jobs."""
        finished = []
        for job in list(jobs):
            event = job.event()
            self._emit(job, event)
            if event.last:
                finished.append(job)
        self.batch.keep([job for job in self.batch.rows if job not in finished])
        self._finish(finished)

    def _finish(self, jobs: Sequence[Job], error: ApiError | None = None) -> None:
        for job in list(jobs):
            if error is not None:
                self._emit(job, Event(error=error))
            self.adapters.release(job.served)
            self._is_blocked = False

    def _emit(self, job: Job, event: Event) -> None:
        if job.cancelled:
            return
        try:
            job.emit(event)
        except RuntimeError:  # the event loop is closed
            job.cancelled = True


def _model_failed(error: Exception) -> ApiError:
    return ApiError(500, "model_failed", f"the model failed: {type(error).__name__}")
