"""Makes accelerate share a model on CPUs, so that the tests can run it without a GPU.

accelerate uses FSDP, tensor and context parallelism on accelerators only. If FSDP is requested on CPUs, it uses DDP
instead, without a message. After :func:`allow` it uses them on CPUs too. A launcher can run this file as a script: it
calls :func:`allow` and then the command line of s2ft.
"""

import sys
from pathlib import Path


def allow() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    from support.inside import parallel

    if hasattr(AcceleratorState, "before_allow"):
        return
    AcceleratorState.before_allow = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **options):
        self.before_allow(*args, fsdp_plugin=fsdp_plugin, **options)
        plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = init
    several = Accelerator.multi_device.fget

    def multi_device(self):
        shared = self.parallelism_config is not None and self.parallelism_config.tp_enabled
        return several(self) or (shared and self.distributed_type == DistributedType.MULTI_CPU)

    Accelerator.multi_device = property(multi_device)
    parallel.check_can_shard = lambda arguments: None


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from support.context_on_cpu import allow as allow_context

    allow()
    allow_context()
    from accelerate.state import AcceleratorState

    from s2ft.cli.main import main

    status = main()
    # in one piece, because several ranks write
    sys.stdout.write(f"ran as {AcceleratorState._shared_state['distributed_type'].name}\n")
    sys.stdout.flush()
    sys.exit(status)
