"""Fetches the files of a Hugging Face hub model, or finds them in the hub's cache."""

import logging
from pathlib import Path

from mpcompile.errors import LoadError, RuntimeMissing, UsageError, first_line
from mpcompile.frontend.hugging_face import PREFIX, missing

log = logging.getLogger(__name__)

SETTINGS = ["config.json", "preprocessor_config.json", "processor_config.json"]
SAFETENSORS = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
PICKLED = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"]


def fetched(model: str) -> Path:
    """The folder with the config and the weights of `hf:ORG/NAME` or `hf:ORG/NAME@REVISION`; no code is downloaded.

    Only missing files are downloaded. Raises RuntimeMissing, UsageError for a name that cannot be one, and LoadError.
    """
    if reason := missing():
        raise RuntimeMissing(f"{model}: {reason}")
    name, _, revision = model.removeprefix(PREFIX).partition("@")
    folder = _snapshot(name, revision, [*SETTINGS, *SAFETENSORS], model)
    if not any(folder.glob("*.safetensors")):
        folder = _snapshot(name, revision, [*SETTINGS, *PICKLED], model)
    log.info("%s is in %s", model, folder)
    return folder


def _snapshot(name: str, revision: str, patterns: list[str], model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except HFValidationError as error:
        raise UsageError(f"{model} is no name of a hub model; give hf:ORG/NAME, or the path of a folder") from error
    except GatedRepoError as error:
        raise LoadError(f"{model} needs the consent of its owner: ask on its page, then hf auth login") from error
    except RevisionNotFoundError as error:
        raise LoadError(f"{model}: the hub has no revision {revision!r} of it") from error
    except RepositoryNotFoundError as error:
        raise LoadError(f"{model} is not on the hub, or is private; check the name, or hf auth login") from error
    except LocalEntryNotFoundError as error:
        raise LoadError(
            f"{model} is not in the cache, and the hub cannot be reached; where there is a network, run "
            f"hf download {name} --local-dir FOLDER, and give the folder"
        ) from error
    except Exception as error:  # of the network or the disk
        raise LoadError(f"{model} could not be fetched: {type(error).__name__}: {first_line(error)}") from error
