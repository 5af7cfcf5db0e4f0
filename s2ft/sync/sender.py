"""The trainer's side of slice sync: it sends the trained slices of a model to the engine that generates its answers."""

import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from s2ft.distributed import all_ranks, decide, has_master_copy, is_sharded, run_on_ranks
from s2ft.sync.engines import Engine, EngineError, engine_of
from s2ft.sync.slices import TrainedSlices
from s2ft.sync.transports import Transport, transport_of
from s2ft.sync.wire import DTYPES, to_message

logger = logging.getLogger(__name__)
TIMEOUT = 600.0
UNSEEN = " (the engine does not see the files of this machine: use transport='http', or a folder that both can read)"


class Sent(NamedTuple):
    """What one sync has sent.

    Attributes:
        step: Number of the sync.
        nbytes: Size of the numbers.
        seconds: Time from the pause to the end, with the making of the numbers.

    Example:
        >>> from s2ft.sync import Sent
        >>> sent = Sent(step=3, nbytes=7_603_200, seconds=0.05)
        >>> f"{sent.nbytes / 1e6:.1f} MB"
        '7.6 MB'
    """

    step: int
    nbytes: int
    seconds: float


class SliceSender:
    """Sends the trained slices of a model to an engine, which generates with the merged weights from then on.

    Only the slices are sent: absolute numbers in the engine's dtype, the same that merging writes. The engine keeps the
    base's numbers of the slices and restores them exactly at the end.

    It has the methods of TRL's WeightTransferProtocol, so it can be AsyncGRPOTrainer's `weight_transfer`. For TRL's
    other trainers see :func:`s2ft.sync.trl.with_slices`. A loop of your own calls :meth:`sync` after each update and
    :meth:`restore` at the end, or uses the sender in a `with` statement.

    Args:
        model: An attached model, or a PeftModel with an adapter of s2ft. None if it is set later (`sender.model`),
            before the first sync.
        engine: Address of a vLLM server, started with VLLM_SERVER_DEV_MODE=1 and
            ``--weight-transfer-config '{"backend": "s2ft"}'``, or vLLM's LLM in this process, made with
            ``weight_transfer_config={"backend": "s2ft"}``.
        dtype: The engine's dtype. Default: what the engine says.
        transport: "auto", or how the numbers reach the engine: "direct" (an LLM whose weights are in this process),
            "file" (a folder that both can read), or "http" (in the request). "auto" is direct for an LLM, a file for a
            server on this machine, and http for any other.
        folder: Folder for transport "file". Default: /dev/shm, or the folder for temporary files.
        take_over: Whether to take the engine from a sender that has ended without releasing it. The engine restores
            that sender's slices first.
        timeout: Seconds to wait for each answer of a server.
        name: Name of this sender. An engine that is bound to a sender refuses every other name. Default: a new one.

    Attributes:
        model: The model.
        step: Number of the last sync; -1 before the first.
        slices: The described slices; None before the first sync.

    Raises:
        TypeError: `engine` is neither an address nor an LLM.
        ValueError: The address or the transport is not valid.

    Example:
        >>> from s2ft.sync import SliceSender
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
        >>> sender = SliceSender(model, "http://localhost:8000")
        >>> sender.step
        -1
    """

    def __init__(
        self,
        model: nn.Module | None,
        engine: Any,
        *,
        dtype: torch.dtype | None = None,
        transport: str = "auto",
        folder: str | os.PathLike | None = None,
        take_over: bool = False,
        timeout: float = TIMEOUT,
        name: str | None = None,
    ) -> None:
        self.model = model
        self._engine: Engine = engine_of(engine, timeout)
        self._dtype, self._kind, self._folder = dtype, transport, folder
        self._take_over = take_over
        self.name = name or uuid.uuid4().hex[:16]
        self.step = -1
        self.slices: TrainedSlices | None = None
        self._transport: Transport | None = None
        self._is_paused = False
        if transport != "auto":
            transport_of(transport, self._engine, self.name, folder)

    # ---- for a loop of one's own -----------------------------------------------------------------

    def sync(self) -> Sent:
        """Send the present numbers, so that the engine generates with them. On several ranks every rank must call this.

        Generation is paused meanwhile: requests wait and go on with the new weights. The engine's prefix cache is
        reset.

        Returns:
            The number of the sync, the bytes and the time.

        Raises:
            EngineError: The engine refused or failed. Generation goes on, and the message says with which weights.
            ValueError: The model trains something that can't be sent.
        """
        began = time.perf_counter()
        self._describe()
        flat = self.slices.buffer()

        def act() -> None:
            with self._pausing():
                self._send(flat)

        self._on_senders("sending slices", act)
        return Sent(self.step, self.slices.nbytes, time.perf_counter() - began)

    def restore(self) -> None:
        """Restore the engine's base, bit for bit, and release the engine. On several ranks every rank must call this.

        A later :meth:`sync` begins anew. Nothing happens if nothing was announced.

        Raises:
            EngineError: The engine refused or failed.
        """
        self._on_senders("restoring the engine", self._restore_and_release)

    def __enter__(self) -> "SliceSender":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self.restore()
        except Exception as failure:
            if error is None:
                raise
            logger.warning("%s", failure)

    # ---- TRL's WeightTransferProtocol, called on the first rank alone ------------------------------

    def init_weight_transfer(self) -> None:
        """Describe the slices, and announce them to the engine."""
        self._check_alone()
        self._describe()
        with self._pausing():  # for an engine that has to restore the slices of another sender first
            self._announce()

    def pause(self) -> None:
        """Pause generation. Requests wait."""
        self._engine.pause()
        self._is_paused = True

    def send_weights(self, iterator: Iterable[tuple[str, Tensor]] | None = None) -> None:
        """Send the present numbers.

        Args:
            iterator: TRL's iterator of all merged weights. It is not used: nothing of it is computed.

        Raises:
            EngineError: The engine refused or failed. Generation goes on.
        """
        self._check_alone()
        self._describe()
        try:
            self._send(self.slices.buffer())
        except BaseException:
            self._resume_after_failure()
            raise

    def resume(self) -> None:
        """Let generation go on."""
        self._is_paused = False
        self._engine.resume()

    def destroy(self) -> None:
        """Restore the engine's base and release it. A failure is logged."""
        try:
            self._restore_and_release()
        except Exception as failure:
            logger.warning("%s", failure)

    # ---- what each does ------------------------------------------------------------------------------

    def _describe(self) -> None:
        """Describe the slices of the model, once. On several ranks every rank must call this."""
        if self.slices is not None:
            return
        if self.model is None:
            raise ValueError("the sender has no model yet: set sender.model before the first sync")
        dtype = self._dtype
        if dtype is None:
            asked = decide("the engine's dtype", self._sends(), lambda: _name(self._engine.dtype()))
            dtype = DTYPES.get(asked.value)
        self.slices = TrainedSlices.of(self.model, dtype)

    def _announce(self) -> None:
        """Connect to the engine and describe the slices to it, unless this was done."""
        if self._transport is not None:
            return
        kind = self._engine.transport() if self._kind == "auto" else self._kind
        transport = transport_of(kind, self._engine, self.name, self._folder)
        info = {
            "sender": self.name,
            "dtype": _name(self.slices.dtype),
            "slices": to_message(self.slices.specs),
            "take_over": self._take_over,
        }
        try:
            transport.open(lambda description: self._engine.init({**info, "transport": description}))
        except BaseException:
            transport.close()
            raise
        self._transport, self._take_over = transport, False

    def _send(self, flat: Tensor) -> None:
        """Send a buffer. After a failure the engine has its base again, or the error says that it does not."""
        self._announce()
        step = self.step + 1
        try:
            with self._update():
                self._transport.send(flat, {"sender": self.name, "step": step}, self._engine.update)
        except Exception as error:
            hint = UNSEEN if self._transport.kind == "file" and "No such file" in str(error) else ""
            raise EngineError(f"sync {step} failed: {error}{hint}; {self._recovered()}") from error
        self.step = step

    @contextmanager
    def _update(self) -> Iterator[None]:
        """An update of the engine. An update that another sender has begun and not finished is finished first."""
        try:
            self._engine.start()
        except EngineError as error:
            if "already active" not in str(error):
                raise
            self._engine.finish()
            self._engine.start()
        yield
        self._engine.finish()

    def _recovered(self) -> str:
        """Restore the engine's base after a failure. Returns in words what the engine has now."""
        try:
            self._restore_and_release(pauses=False)
        except Exception as error:
            self._forget()
            return (
                f"its base could not be restored ({error}), so its weights are those of this sync or of the last one: "
                "restart it, or take it over with SliceSender(..., take_over=True) and restore it"
            )
        return "the engine has its base again, and is free for another sender"

    def _restore_and_release(self, pauses: bool = True) -> None:
        if self._transport is None:
            return
        if pauses:
            with self._pausing():
                self._restore_and_release(pauses=False)
            return
        with self._update():
            self._engine.update({"base": True, "sender": self.name})
        self._forget()

    def _forget(self) -> None:
        if self._transport is not None:
            self._transport.close()
        self._transport, self.step = None, -1

    @contextmanager
    def _pausing(self) -> Iterator[None]:
        self._engine.pause()
        try:
            yield
        except BaseException:
            self._is_paused = True
            self._resume_after_failure()
            raise
        self._engine.resume()

    def _resume_after_failure(self) -> None:
        if not self._is_paused:
            return
        try:
            self.resume()
        except EngineError as error:  # the failure that is raised matters more
            logger.warning("generation could not be resumed: %s", error)

    def _on_senders(self, what: str, act: Callable[[], None]) -> None:
        """Run a function on the ranks that send: all if each has an engine of its own, else the first one."""
        run_on_ranks(what, all_ranks(), self._sends(), act)

    def _sends(self) -> bool:
        ranks = all_ranks()
        return ranks is None or self._engine.is_local or dist.get_rank() == ranks[0]

    def _check_alone(self) -> None:
        """Raise RuntimeError if other ranks would have to take part in reading the slices."""
        if all_ranks() is None or self.model is None:
            return
        if any(is_sharded(one) or has_master_copy(one) for one in self.model.parameters()):
            raise RuntimeError(
                "the model is spread over ranks, and TRL calls weight_transfer on the first rank alone: use "
                "s2ft.sync.with_slices(AsyncGRPOTrainer), which sends from all ranks"
            )


def _name(dtype: torch.dtype | None) -> str:
    return "" if dtype is None else str(dtype).removeprefix("torch.")
