"""A recipe as YAML with a comment on every key. The comments are the descriptions of its JSON Schema."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from mpcompile.recipe.schema import Recipe
from mpcompile.recipe.strict_yaml import write_flow_yaml

WIDTH = 100  # of a comment, with its indentation

Schema = Mapping[str, Any]


def commented_yaml(recipe: Recipe, schema: Schema, title: str = "") -> str:
    """The recipe as YAML, each key below its description; `Recipe.from_yaml` reads it back as an equal recipe.

    Args:
        recipe: keys and parameters that it does not hold are not written.
        schema: the JSON Schema of recipes, with the passes that it names (mpcompile/driver/run_plan.py).
        title: sentences for the head of the file.
    """
    content = recipe.model_dump(mode="json")
    lines = list(_comment(title, ""))
    for key, value in content.items():
        lines += ["", *_entry(key, value, schema["properties"][key], schema, "")]
    return "\n".join(lines).strip("\n") + "\n"


def _entry(key: str, value: Any, about: Schema, schema: Schema, indent: str) -> Iterator[str]:
    """The lines of one key: its comment, and its value below."""
    yield from _comment(_described(about), indent)
    inner = _resolved(about, schema)
    if key == "passes" and value:
        yield f"{indent}{key}:"
        for step in value:
            yield from _step(step, inner, schema, f"{indent}  ")
    elif isinstance(value, dict) and "properties" in inner:
        yield f"{indent}{key}:"
        for name, each in value.items():
            yield from _entry(name, each, inner["properties"][name], schema, f"{indent}  ")
    else:
        yield f"{indent}{write_flow_yaml(key)}: {write_flow_yaml(value)}"


def _step(step: Mapping[str, Any], passes: Schema, schema: Schema, indent: str) -> Iterator[str]:
    """The lines of one pass with its parameters."""
    [(name, params)] = step.items()
    kinds = [kind["properties"][name] for kind in passes["items"]["oneOf"] if name in kind.get("properties", ())]
    about: Schema = kinds[0] if kinds else {}
    yield from _comment(about.get("description", ""), indent)
    if not params:
        yield f"{indent}- {write_flow_yaml(name)}"
        return
    yield f"{indent}- {write_flow_yaml(name)}:"
    known = about.get("properties", {})
    for key, value in params.items():
        yield from _entry(key, value, known.get(key, {}), schema, f"{indent}    ")


def _described(about: Schema) -> str:
    """The description of a key, with its allowed values if these are few words that it does not name itself."""
    text = str(about.get("description") or "")
    values = [str(value) for kind in about.get("anyOf", (about,)) for value in kind.get("enum", ())]
    unnamed = [value for value in values if value not in text.replace(",", " ").replace(".", " ").split()]
    return f"{text} Values: {', '.join(values)}.".strip() if unnamed else text


def _resolved(about: Schema, schema: Schema) -> Schema:
    """The schema of the value of a key: that of the section which it refers to, if it refers to one."""
    for kind in (about, *about.get("anyOf", ()), *about.get("allOf", ())):
        if "$ref" in kind:
            found: Schema = schema["$defs"][kind["$ref"].rpartition("/")[2]]
            return found
    return about


def _comment(text: str, indent: str) -> Iterator[str]:
    """A text as comment lines."""
    for line in textwrap.wrap(text, WIDTH - len(indent) - 2, break_long_words=False, break_on_hyphens=False):
        yield f"{indent}# {line}"
