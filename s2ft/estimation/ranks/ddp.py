"""DistributedDataParallel: every device has the whole model, and buckets in which gradients are summed."""

from torch import Tensor

from s2ft.estimation.ranks.one import OneDevice


class DdpDevice(OneDevice):
    """A device under DDP. Its buckets hold the gradients of all trained parameters, from the start."""

    def start(self) -> None:
        self._buckets = self.hold(sum(parameter.nbytes for parameter in self.trained.values()))
        if self.strategy.gradient_as_bucket_view:
            for parameter in self.trained.values():
                parameter.register_post_accumulate_grad_hook(self._into_bucket)

    def buffers(self) -> int:
        if self.strategy.gradient_as_bucket_view:  # the buckets are the gradients
            return 0
        return sum(parameter.nbytes for parameter in self.trained.values())

    def _into_bucket(self, parameter: Tensor) -> None:
        """Replace a gradient by one that does not count, which stands for a view of a bucket."""
        view = self.empty(tuple(parameter.shape), parameter.dtype)
        self.memory.leave_out(view)
        parameter.grad = view
