"""S²FT as a method of PEFT.

`import s2ft.peft` registers the method. After that get_peft_model, PeftModel.from_pretrained and all libraries that
are built on them accept an :class:`S2FTPeftConfig` and the folders that such a model saved.

Troubleshooting: PEFT raises ``KeyError: 'S2FT'`` if it loads such a folder in a program that has not registered the
method. Add ``import s2ft.peft`` before the call.

PEFT's own classes load, save and switch the adapters; s2ft selects the units and computes the products and the sums.
The layout is `indexed`: units stay where they are, so that several adapters with different units fit into one layer.

Example:
    >>> from peft import get_peft_model
    >>> from s2ft.peft import S2FTPeftConfig
    >>> peft_model = get_peft_model(model, S2FTPeftConfig(d_ratio=0.1, task_type="CAUSAL_LM"))
    >>> peft_model.get_nb_trainable_parameters()[0]
    1664
"""

# ruff: noqa: E402  # the check must run before peft is imported: its error names the package to install
from s2ft.packages import check_packages

check_packages("s2ft.peft")

from peft import PeftType
from peft.utils import register_peft_method

from s2ft.peft.adapter_config import TYPE, S2FTPeftConfig
from s2ft.peft.layer import S2FTPeftLayer
from s2ft.peft.model import PREFIX, S2FTPeftModel
from s2ft.peft.native_adapter import from_native, to_native

__all__ = ["S2FTPeftConfig", "S2FTPeftLayer", "S2FTPeftModel", "from_native", "to_native"]


def register() -> None:
    """Register S²FT with PEFT. Calling it again changes nothing.

    PEFT's list of methods is an enum without a way to add a member, so this adds the member `S2FT` to the enum
    `peft.PeftType` at run time. Nothing else of PEFT is changed.

    Example:
        >>> import s2ft.peft
        >>> s2ft.peft.register()
        >>> from peft import PeftType
        >>> PeftType("S2FT").value
        'S2FT'
    """
    if TYPE not in PeftType.__members__:
        member = str.__new__(PeftType, TYPE)
        member._name_, member._value_ = TYPE, TYPE
        type.__setattr__(PeftType, TYPE, member)
        PeftType._member_map_[TYPE] = PeftType._value2member_map_[TYPE] = member
        PeftType._member_names_.append(TYPE)
        register_peft_method(name=TYPE.lower(), config_cls=S2FTPeftConfig, model_cls=S2FTPeftModel, prefix=PREFIX)


# Called on import, because PEFT reads a folder's method before any code of the method can run: a program that only
# calls PeftModel.from_pretrained has no other line that could register it.
register()
