"""report.json follows its published JSON Schema, whose keys change only together with the recorded list."""

import json
from pathlib import Path
from typing import Any

from commandline import mpcompile

from mpcompile.driver.artifact import Artifact
from mpcompile.report.schema import report_schema

KEYS = Path(__file__).parent / "report_keys.txt"
PUBLISHED = Path(__file__).parents[2] / "docs" / "report.schema.json"


def keys_of(schema: dict[str, Any]) -> set[str]:
    """All key paths of a schema, with [] for the members of a list. Free-form values have no paths below them."""
    definitions = schema["$defs"]

    def walk(node: dict[str, Any], path: str) -> set[str]:
        if "$ref" in node:
            return walk(definitions[node["$ref"].rpartition("/")[2]], path)
        paths = set()
        for option in node.get("anyOf", ()):
            paths |= walk(option, path)
        if isinstance(node.get("items"), dict):
            paths |= walk(node["items"], f"{path}[]")
        for name, child in node.get("properties", {}).items():
            paths |= {f"{path}.{name}"} | walk(child, f"{path}.{name}")
        return paths

    return walk(schema, "")


def test_keys_equal_the_recorded_list() -> None:
    version, *recorded = KEYS.read_text(encoding="utf-8").split()
    schema = report_schema()
    keys = keys_of(schema)
    gone, new = sorted(set(recorded) - keys), sorted(keys - set(recorded))
    assert version == f"schema_version={schema['properties']['schema_version']['const']}"
    assert not gone, f"keys were removed: {gone}; raise schema_version and update tests/report/report_keys.txt"
    assert not new, f"keys were added: {new}; add them to tests/report/report_keys.txt"


def test_reports_follow_the_published_schema(reported: Artifact, artifact: Artifact) -> None:
    import jsonschema

    printed = mpcompile("schema", "report")
    assert printed.returncode == 0, printed.stderr
    schema = json.loads(printed.stdout)
    assert schema == report_schema()
    assert schema["title"] == "mpcompile report, schema_version 1"
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    for folder in (reported.folder, artifact.folder):
        content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        validator.validate(content)
        for broken in ({**content, "extra": 1}, {**content, "schema_version": 2}, {**content, "layers": [{}]}):
            assert not validator.is_valid(broken)


def test_the_published_schema_is_that_of_the_reports() -> None:
    """After a change of the report: mpcompile schema report > docs/report.schema.json."""
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    assert published["$id"] == report_schema()["$id"] == "urn:mpcompile:report:1"
    assert published == report_schema()


def test_only_two_schemas_can_be_printed() -> None:
    refused = mpcompile("schema", "bench")
    assert refused.returncode == 2
    assert "'recipe', 'report'" in refused.stderr
