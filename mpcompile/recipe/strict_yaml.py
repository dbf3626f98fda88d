"""YAML read strictly: a key once, numbers as they are written, no more values than a recipe can need."""

import re
from collections.abc import Hashable
from typing import Any

import yaml

MOST_VALUES = 100_000  # a recipe has some fifty
_DECIMAL = {
    "tag:yaml.org,2002:int": (re.compile(r"^[-+]?\d+$"), "-+0123456789"),
    "tag:yaml.org,2002:float": (
        re.compile(r"^[-+]?(\d+\.\d*([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.\d+([eE][-+]?\d+)?|\.(inf|nan))$"),
        "-+.0123456789",
    ),
}


class _Loader(yaml.SafeLoader):
    """YAML without its base-60 numbers, in which 2:4 is 124 and not a pattern, and without repeated keys."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (an instance variable in the base class)
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _DECIMAL]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def get_single_node(self) -> yaml.Node | None:
        """The document, or an error where aliases would make more of it than a recipe can mean."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _values_in(node, {}) > MOST_VALUES:
            text = f"its aliases spell out more than {MOST_VALUES:,} values, or one holds itself"
            raise yaml.constructor.ConstructorError(None, None, text, node.start_mark)
        return node

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        """The mapping, or an error where a key would silently win over an earlier one."""
        if not isinstance(node, yaml.MappingNode):  # one that only its tag calls a mapping
            raise yaml.constructor.ConstructorError(None, None, f"{node.tag} is on what is no mapping", node.start_mark)
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value == "null":
                key.tag = "tag:yaml.org,2002:str"  # a parameter of mp-budget, and never nothing as a key
        seen = set()
        for key in (self.construct_object(key, deep=True) for key, _ in node.value):
            if not isinstance(key, Hashable):
                continue  # refused below, with its place
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is there twice", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _values_in(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node comes to with every alias spelt out; more than MOST_VALUES where it holds itself."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = MOST_VALUES  # what a node that holds itself sees of itself
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_values_in(part, known) for part in inner)
    return known[id(node)]


class _Dumper(yaml.SafeDumper):
    """Writes what _Loader reads."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers.copy()
