"""`hf:ORG/NAME`: which files are fetched, and one line for each way in which that fails. Nothing uses the network."""

from pathlib import Path

import pytest
from hugging_face_models import hugging_face, needs_transformers, saved

from mpcompile.errors import LoadError, RuntimeMissing, UsageError
from mpcompile.frontend import hugging_face_hub
from mpcompile.frontend.load_model import Request, load

pytestmark = needs_transformers
VIT = "ViTForImageClassification"


class Hub:
    """Stands for huggingface_hub.snapshot_download: gives a folder, or raises an error, and keeps what was asked."""

    def __init__(self, answer: Path | Exception) -> None:
        self.answer = answer
        self.asked: list[tuple[str, str | None, list[str]]] = []

    def __call__(self, name: str, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append((name, revision, allow_patterns))
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


def answering(monkeypatch: pytest.MonkeyPatch, answer: Path | Exception) -> Hub:
    hub = Hub(answer)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    return hub


def test_a_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = answering(monkeypatch, saved(tmp_path, hugging_face(VIT)))
    source = load(Request("hf:org/name@v2")).source
    assert (source.name, source.arch, source.size) == ("hf:org/name@v2", f"hf:{VIT}", (3, 32, 32))
    [(name, revision, patterns)] = hub.asked
    assert (name, revision) == ("org/name", "v2")
    assert not any(pattern.endswith((".py", ".bin")) or pattern.startswith("*") for pattern in patterns)


def test_pickled_weights_are_fetched_only_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = answering(monkeypatch, tmp_path)
    with pytest.raises(LoadError, match="is a folder without model.safetensors"):
        load(Request("hf:org/name"))
    assert ["pytorch_model.bin" in patterns for _, _, patterns in hub.asked] == [False, True]


def errors() -> list[tuple[str, type[Exception], str]]:
    """Names of errors of huggingface_hub, what they become, and its text."""
    return [
        (
            "LocalEntryNotFoundError",
            LoadError,
            "is not in the cache, and the hub cannot be reached.*hf download org/name",
        ),
        ("HFValidationError", UsageError, "is no name of a hub model; give hf:ORG/NAME"),
        ("RepositoryNotFoundError", LoadError, "is not on the hub, or is private; check the name"),
        ("GatedRepoError", LoadError, "needs the consent of its owner: ask on its page"),
        ("RevisionNotFoundError", LoadError, "the hub has no revision 'v2' of it"),
        ("OSError", LoadError, "could not be fetched: OSError: disk full$"),
    ]


@pytest.mark.parametrize(("name", "kind", "text"), errors())
def test_what_the_hub_refuses(monkeypatch: pytest.MonkeyPatch, name: str, kind: type[Exception], text: str) -> None:
    from huggingface_hub import errors as theirs

    found = getattr(theirs, name, OSError)
    error = found.__new__(found)  # without the response of a server, which its constructor needs
    error.args = ("disk full\nat a place",)
    answering(monkeypatch, error)
    with pytest.raises(kind, match=text) as raised:
        load(Request("hf:org/name@v2"))
    assert "\n" not in str(raised.value)


def test_transformers_is_needed_before_anything_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = answering(monkeypatch, OSError())
    monkeypatch.setattr(hugging_face_hub, "missing", lambda: "transformers is not installed: pip install it")
    with pytest.raises(RuntimeMissing, match="hf:org/name: transformers is not installed"):
        load(Request("hf:org/name"))
    assert hub.asked == []
