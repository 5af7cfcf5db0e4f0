"""`--tuner_type s2ft` in ms-swift.

    swift sft --model … --dataset … \
        --external_plugins "$(python -c 'import s2ft; print(*s2ft.__path__)')/integrations/ms_swift.py" \
        --tuner_type s2ft --model_kwargs '{"s2ft": {"d_ratio": 0.03, "o_ratio": 0.1}}'

ms-swift loads plugins by the path of their file.
"""

import json
import os
import sys

# ms-swift puts the folder of a plugin first into the path, where the trl.py of this folder would hide the package trl.
sys.path[:] = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]

# ruff: noqa: E402 - the path is put right before anything is imported
from typing import Any

from peft import PeftModel, get_peft_model
from swift.tuner_plugin import PeftTuner, tuners_map

from s2ft.integrations.settings import config_from

NAME = "s2ft"


class S2FTTuner(PeftTuner):
    """ms-swift's tuner that trains S²FT adapters in PEFT's form. Saving and loading are those of its PEFT tuners."""

    @staticmethod
    def prepare_model(args: Any, model: Any) -> PeftModel:
        """Add a new adapter to the model.

        Args:
            args: ms-swift's arguments. `model_kwargs` has the settings in its key "s2ft".
            model: The base.

        Returns:
            The model with the adapter.

        Raises:
            ValueError: The settings are missing or wrong.
        """
        given = args.model_kwargs or {}
        settings = (json.loads(given) if isinstance(given, str) else given).get(NAME)
        task_type = args.task_type.upper() if args.task_type in ("causal_lm", "seq_cls") else None
        others = {"task_type": task_type, "modules_to_save": args.modules_to_save or None}
        return get_peft_model(model, config_from(settings, 'model_kwargs["s2ft"]', **others))


tuners_map[NAME] = S2FTTuner
