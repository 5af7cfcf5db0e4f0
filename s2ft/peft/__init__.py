"""S²FT as a method of PEFT: ``import s2ft.peft`` registers it, and get_peft_model, PeftModel.from_pretrained and all
that is built on them take an :class:`S2FTPeftConfig`.

PEFT's own classes do PEFT's part; the units, the products and the sums are s2ft's. Weights stay where they are, so that
several adapters with different units live in one layer.
"""

from s2ft.packages import check_packages

check_packages("s2ft.peft")  # before Python's own error, which does not say what to install

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from s2ft.peft.config import TYPE, S2FTPeftConfig
from s2ft.peft.layer import S2FTPeftLayer
from s2ft.peft.model import PREFIX, S2FTPeftModel
from s2ft.peft.native import from_native, to_native

__all__ = ["S2FTPeftConfig", "S2FTPeftLayer", "S2FTPeftModel", "from_native", "to_native"]


def _register() -> None:
    """PEFT's list of types is an enum, which gets one member more at run time."""
    if TYPE not in PeftType.__members__:
        member = str.__new__(PeftType, TYPE)
        member._name_, member._value_ = TYPE, TYPE
        type.__setattr__(PeftType, TYPE, member)
        PeftType._member_map_[TYPE] = PeftType._value2member_map_[TYPE] = member
        PeftType._member_names_.append(TYPE)
    if PeftType(TYPE) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=TYPE.lower(), config_cls=S2FTPeftConfig, model_cls=S2FTPeftModel, prefix=PREFIX)


_register()
