"""YAML, read strictly: no repeated key, only decimal numbers, and a limit on what aliases expand to.

YAML 1.1, which PyYAML reads, takes a bare 2:4 as 2 * 60 + 4, keeps the last of repeated keys, and lets a few lines of
aliases expand to gigabytes. It also takes 010 as 8, which YAML 1.2 takes as 10, so a leading zero is an error. Other
numbers that are not decimal (0x10, 0o10, 0b11, 1_000) are text.
"""

import json
import re
from collections.abc import Hashable
from typing import Any

import yaml

MAX_VALUES = 100_000  # a recipe has about 50
INT = "tag:yaml.org,2002:int"
LEADING_ZERO = re.compile(r"^[-+]?0\d+$")
DECIMAL_NUMBERS = {  # tag -> the numbers that it matches, and their first characters
    INT: (re.compile(r"^[-+]?\d+$"), "-+0123456789"),
    "tag:yaml.org,2002:float": (
        re.compile(r"^[-+]?(\d+\.\d*([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.\d+([eE][-+]?\d+)?|\.(inf|nan))$"),
        "-+.0123456789",
    ),
}


def read_yaml(text: str) -> Any:
    """The value of a YAML (or JSON) text.

    Raises YAMLError if it is not YAML, repeats a key or expands to too many values, and whatever PyYAML raises for a
    value that its tag does not allow: ValueError, KeyError, IndexError, AttributeError, RecursionError.
    """
    return yaml.load(text, _Loader)


def write_yaml(value: Any) -> str:
    """The YAML text of a value, with keys in their order. `read_yaml` returns an equal value."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False)
    return text


def write_flow_yaml(value: Any) -> str:
    """The YAML text of a value on one line. `read_yaml` returns an equal value."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=float("inf"))
    line = text.removesuffix("...\n").strip()
    return line if "\n" not in line else json.dumps(value)  # JSON is YAML, and has no text on several lines


class _Loader(yaml.SafeLoader):
    """Reads YAML strictly."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (an instance variable in the base class)
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in DECIMAL_NUMBERS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def decimal_number(self, node: yaml.Node) -> int | float:
        """The number. Raises ConstructorError for a leading zero, or if a tag is on text that is no decimal number."""
        value = str(node.value)
        if node.tag == INT and LEADING_ZERO.match(value):
            text = (
                f"the number {value} begins with a zero, so YAML 1.1 reads it as octal and YAML 1.2 as decimal; write "
                "it without the zero, or in quotes if it is text"
            )
            raise yaml.constructor.ConstructorError(None, None, text, node.start_mark)
        patterns = [pattern for tag, (pattern, _) in DECIMAL_NUMBERS.items() if tag in (INT, node.tag)]
        if not isinstance(node, yaml.ScalarNode) or not any(pattern.match(value) for pattern in patterns):
            text = f"{node.tag} is on {value[:40]!r}, which is not a decimal number"
            raise yaml.constructor.ConstructorError(None, None, text, node.start_mark)
        number: int | float = int(value) if node.tag == INT else self.construct_yaml_float(node)
        return number

    def get_single_node(self) -> yaml.Node | None:
        """The document. Raises ConstructorError if its aliases expand to more than MAX_VALUES values."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _expanded_size(node, {}) > MAX_VALUES:
            text = f"its aliases expand to more than {MAX_VALUES:,} values, or an alias contains itself"
            raise yaml.constructor.ConstructorError(None, None, text, node.start_mark)
        return node

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        """The mapping. Raises ConstructorError if a key appears twice."""
        if not isinstance(node, yaml.MappingNode):  # its tag says mapping, its content does not
            raise yaml.constructor.ConstructorError(None, None, f"{node.tag} is not on a mapping", node.start_mark)
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value == "null":
                key.tag = "tag:yaml.org,2002:str"  # `null` is a parameter of mp-budget; no key of a recipe is None
        seen = set()
        for key in (self.construct_object(key, deep=True) for key, _ in node.value):
            if not isinstance(key, Hashable):
                continue  # the base class raises the error, with the position
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} appears twice", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _expanded_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """The number of values in a node with every alias expanded; over MAX_VALUES if an alias contains itself.

    `sizes` holds the sizes of the nodes seen so far, by id.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = MAX_VALUES  # the size that an alias of this node has inside the node itself
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        sizes[id(node)] = 1 + sum(_expanded_size(part, sizes) for part in inner)
    return sizes[id(node)]


class _Dumper(yaml.SafeDumper):
    """Writes YAML that _Loader reads back as the same values."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers.copy()


for _tag, (_pattern, _first) in DECIMAL_NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, _pattern, list(_first))
    _Dumper.add_implicit_resolver(_tag, _pattern, list(_first))
    _Loader.add_constructor(_tag, _Loader.decimal_number)
