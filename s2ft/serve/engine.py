"""The scheduler: one thread runs the model, and takes waiting sequences into the batch whenever there is room.

Each turn drops who was cancelled, runs the prompts of newcomers, and then makes one token for every row. All that
touches the model happens in this thread; other threads put sequences into the queue and get events by callback.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from s2ft.serve.errors import ApiError, shutting_down
from s2ft.serve.job import Event, Job
from s2ft.serve.registry import Adapters, Version, not_loaded
from s2ft.text.running_batch import RunningBatch, rows_interact

logger = logging.getLogger(__name__)


class Engine:
    """Runs jobs over `model`.

    Args:
        max_batch_size: rows that advance together. 1 for models whose rows depend on the longest of the batch.
        queue_size: jobs that wait; more are refused.
        max_batch_tokens: of prompts and answers in the batch, padding included, which bounds the memory of keys and
            values; a longer sequence runs alone. None is no limit.
        prefill_tokens: of the prompts that are run at once, padding included; a longer prompt runs alone.
        metrics: see :mod:`s2ft.serve.metrics`; None counts nothing.
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
        for name, value in dict(
            max_batch_size=max_batch_size, queue_size=queue_size, max_batch_tokens=max_batch_tokens
        ).items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if rows_interact(model.config) and max_batch_size > 1:
            logger.warning(
                "this model's position embeddings depend on the longest sequence of a batch: one runs at a time"
            )
            max_batch_size = 1
        self.adapters, self.metrics = adapters, metrics
        self.max_batch_size, self.queue_size = max_batch_size, queue_size
        self.max_batch_tokens, self.prefill_tokens = max_batch_tokens, prefill_tokens
        self.batch = RunningBatch(model, adapters.bank.batch if adapters.bank is not None else None)
        self.drain_until: float | None = None  # by time.monotonic(); set by a signal handler, so no lock guards it
        self._waiting: deque[Job] = deque()
        self._errands: deque[tuple[Callable, Future]] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="s2ft-engine", daemon=True)

    # ---- from other threads ----------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Fail what is left and wait for the thread to end."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self.drain_until is None

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self.batch)

    def submit(self, job: Job) -> None:
        """Queue a job. Raises: ApiError 429 or 503; the job's adapter is then given back."""
        with self._changed:
            refused = None
            if self._stopped or self.drain_until is not None:
                refused = shutting_down()
            elif len(self._waiting) >= self.queue_size:
                refused = ApiError(
                    429, "queue_full", f"{self.queue_size} requests wait already: try again later", {"Retry-After": "1"}
                )
            if refused is None:
                self._waiting.append(job)
                self._changed.notify()
                return
        self._release(job)
        raise refused

    def cancel(self, job: Job) -> None:
        """Nobody waits for this job any more. It leaves the queue now, or the batch before its next token."""
        with self._changed:
            job.cancelled = True
            waited = job in self._waiting
            if waited:
                self._waiting.remove(job)
        if waited:
            self._release(job)

    def check(self, version: Version) -> Future:
        """Whether an adapter loads: the future raises if not. It is loaded between two tokens."""
        with self._changed:
            future: Future = Future()
            if self._stopped:
                future.set_exception(shutting_down())
            else:
                self._errands.append((lambda: self._load([version.in_bank]), future))
                self._changed.notify()
            return future

    # ---- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._work_to_do():
            try:
                self._turn()
            except Exception as error:  # whatever a model raises, memory that ran out too: the next batch may do
                logger.exception("the batch failed")
                self._end(self.batch.rows, ApiError(500, "model_failed", f"the model failed: {type(error).__name__}"))
                self.batch.clear()
        self._give_up()

    def _work_to_do(self) -> bool:
        """Wait until there is something; False once the thread is to end."""
        with self._changed:
            while not (self._stopped or self._waiting or self._errands or self.batch.rows):
                self._changed.wait()
            return not self._stopped

    def _turn(self) -> None:
        if self.drain_until is not None and time.monotonic() > self.drain_until:
            self._give_up()
            return
        self._run_errands()
        self._drop_cancelled()
        self._admit(self._next())
        if self.batch.rows:
            self.batch.step()
            if self.metrics:
                self.metrics.batch_size.observe(len(self.batch))
            self._deliver(self.batch.rows)

    def _run_errands(self) -> None:
        while self._errands:
            errand, future = self._errands.popleft()
            try:
                future.set_result(errand())
            except Exception as error:
                future.set_exception(error)

    def _drop_cancelled(self) -> None:
        left = [job for job in self.batch.rows if job.cancelled]
        if left:
            self.batch.keep([job for job in self.batch.rows if not job.cancelled])
            self._end(left)

    def _next(self) -> list[Job]:
        """Those who wait longest, as many as the batch and one pass of the model have room for."""
        chosen: list[Job] = []
        with self._changed:
            while self._waiting and self._has_room([*chosen, self._waiting[0]]):
                chosen.append(self._waiting.popleft())
        return chosen

    def _has_room(self, jobs: list[Job]) -> bool:
        """Whether these can join the batch. One can that would be alone."""
        batch = [*self.batch.rows, *jobs]
        if len(batch) == 1:
            return True
        columns = max(len(job.prompt) + job.max_tokens for job in batch)
        if len(batch) > self.max_batch_size or columns * len(batch) > (self.max_batch_tokens or float("inf")):
            return False
        return len(jobs) == 1 or max(len(job.prompt) for job in jobs) * len(jobs) <= self.prefill_tokens

    def _admit(self, jobs: list[Job]) -> None:
        jobs = self._loaded(jobs)
        if not jobs:
            return
        try:
            self.batch.admit(jobs)
        except Exception as error:  # the rows that run are as they were
            logger.exception("a prompt failed")
            self._end(jobs, ApiError(500, "model_failed", f"the model failed: {type(error).__name__}"))
            return
        if self.metrics:
            self.metrics.prompt_tokens.inc(sum(len(job.prompt) for job in jobs))
        self._deliver(jobs)

    def _loaded(self, jobs: list[Job]) -> list[Job]:
        """Those of the jobs that can join the batch now: their adapters are in memory beside the others'. One whose
        adapter doesn't load fails; one whose adapter is too much for the bank's limit waits on."""
        while jobs:
            try:
                self._load([job.adapter for job in [*self.batch.rows, *jobs]])
                return jobs
            except Exception:
                sound = [job for job in jobs if self._loads_alone(job)]
                if len(sound) == len(jobs):
                    with self._changed:
                        self._waiting.appendleft(sound.pop())
                jobs = sound
        return []

    def _loads_alone(self, job: Job) -> bool:
        try:
            self._load([job.adapter])
            return True
        except Exception as error:
            logger.warning("adapter %r doesn't load: %s", job.version.name, error)
            self._end([job], not_loaded(job.version, error))
            return False

    def _load(self, names: list) -> None:
        if any(name is not None for name in names):
            with self.batch.mixing(names):
                pass

    def _deliver(self, jobs: Sequence[Job]) -> None:
        """Tell every job's client about its newest token, and let the finished ones go."""
        over = []
        for job in list(jobs):
            event = job.event()
            if not job.cancelled:
                self._emit(job, event)
            if event.last:
                over.append(job)
        if over:
            self.batch.keep([job for job in self.batch.rows if job not in over])
            self._end(over)

    def _end(self, jobs: Sequence[Job], error: ApiError | None = None) -> None:
        for job in list(jobs):
            if error is not None and not job.cancelled:
                self._emit(job, Event(error=error))
            self._release(job)

    def _emit(self, job: Job, event: Event) -> None:
        try:
            job.emit(event)
        except RuntimeError:  # the event loop has closed
            job.cancelled = True

    def _release(self, job: Job) -> None:
        if job.over:
            return
        job.over = True
        if job.version is not None:
            self.adapters.give_back(job.version)
        if self.metrics:
            self.metrics.generated_tokens.inc(len(job.tokens))

    def _give_up(self) -> None:
        """The time to finish is over: fail what runs and what waits."""
        with self._changed:
            waiting, errands = list(self._waiting), list(self._errands)
            self._waiting.clear()
            self._errands.clear()
        for _, future in errands:
            future.set_exception(shutting_down())
        self._end([*self.batch.rows, *waiting], shutting_down())
        self.batch.clear()
