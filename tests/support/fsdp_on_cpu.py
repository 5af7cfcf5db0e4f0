"""Makes accelerate use FSDP on CPUs, so that the tests can run it without a GPU.

accelerate uses FSDP on accelerators only. If FSDP is requested on CPUs, it uses DDP instead, without a message. After
:func:`allow` it uses FSDP on CPUs too. A launcher can run this file as a script: it calls :func:`allow` and then the
command line of s2ft.
"""

import sys


def allow() -> None:
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

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


if __name__ == "__main__":
    allow()
    from s2ft.cli.main import main

    sys.exit(main())
