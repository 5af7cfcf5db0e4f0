"""Reading YAML. This module imports neither PyTorch nor PyYAML before they are needed."""

import re
from typing import Any


def parse_yaml(text: str) -> Any:
    """Parse YAML by PyYAML's safe loader, which then also reads 1e-6 as a number, and refuses a key that stands twice.

    Args:
        text: The text of a file, or of a value.

    Raises:
        yaml.YAMLError: The text is not YAML, or a key stands twice.

    Example:
        >>> from s2ft.files.yaml_reading import parse_yaml
        >>> parse_yaml("learning_rate: 1e-3")
        {'learning_rate': 0.001}
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = [key for place, key in enumerate(keys) if key in keys[:place]]
            if twice:
                raise yaml.YAMLError(f"{twice[0]} stands twice, on line {node.start_mark.line + 1} or below")
            return super().construct_mapping(node, deep)

    number = re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, [*"-+0123456789"])
    return yaml.load(text, Loader)
