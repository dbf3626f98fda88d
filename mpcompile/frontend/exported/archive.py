"""The members of a .pt2 archive, from a file that is read once; archives that torch.export.save would not write are
refused.

A .pt2 archive is a zip file without compression: a JSON file of the program, two of the tensors' places, the raw
bytes of the tensors, and example inputs. Anything else in it is either code (pickle, a compiled library) or unknown.
"""

import io
import json
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import torch

from mpcompile.frontend.exported.refusal import ProgramRefused, shown

MOST_MEMBERS = 100_000
LARGEST_JSON = 2**27  # bytes; the program of a ViT-B has 1 MB
PROGRAM = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
EXAMPLES = "data/sample_inputs/model.pt"
NEEDED = ("archive_format", PROGRAM, WEIGHTS, CONSTANTS)
# Members by their names after the root folder, and what they hold: the names of the only members that are read or left
# aside. `extra/` holds texts of the user's own.
KNOWN = re.compile(
    r"archive_format|archive_version|byteorder|\.data/version|\.data/serialization_id|\.format_version"
    r"|\.storage_alignment|models/model\.json|data/sample_inputs/model\.pt|extra/.*"
    r"|data/weights/(model_weights_config\.json|weight_\d{1,9})"
    r"|data/constants/(model_constants_config\.json|tensor_\d{1,9})"
)
# Members that hold code, with what they are.
CODE = (
    (r"data/constants/opaque_obj_.*", "a pickled object, which loading would run"),
    (r"data/constants/custom_obj_.*", "a pickled object of a custom class, which loading would run"),
    (r"data/(weights|constants)/[^/]*\.pt", "pickled tensors in the form of an older torch, which loading would run"),
    (r"serialized_.*|version", "a program in the form of an older torch, which loading would unpickle"),
    (r"data/aotinductor/.*", "a compiled library, which loading would run"),
    (r"data/.*\.(so|o|cpp|cubin|py|pyc|dll|dylib)", "compiled or source code"),
    (r"models/.*", "a second program; a file must hold one, named model"),
)


def is_exported(names: list[str]) -> bool:
    """Whether the members of a zip file are those of torch.export.save, of this or an older torch."""
    inner = [entry.partition("/")[2] for entry in names]
    return any(entry in ("archive_format", PROGRAM) for entry in inner) or any(
        entry.endswith("serialized_exported_program.json") for entry in names
    )


def read_members(content: bytes) -> Mapping[str, bytes]:
    """The members by their names without the root folder. Raises ProgramRefused if one is not known to be harmless."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            _require_plain_entries(archive.infolist(), len(content))
            names = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            _require_known(list(names), archive.namelist())
            members = {inner: archive.read(entry) for inner, entry in names.items()}
    except (zipfile.BadZipFile, NotImplementedError, OSError, EOFError, ValueError, RuntimeError) as error:
        raise ProgramRefused(f"is damaged ({error})") from error
    _require_format(members)
    return members


def _require_plain_entries(entries: list[zipfile.ZipInfo], size: int) -> None:
    """Refuses compression, encryption, repeated or absolute names, and entries that overlap."""
    if len(entries) > MOST_MEMBERS:
        raise ProgramRefused(f"has {len(entries):,} members; {MOST_MEMBERS:,} are allowed")
    if not entries or min(entry.header_offset for entry in entries):
        raise ProgramRefused("is cut short or damaged (it does not begin with its first member)")
    seen: set[str] = set()
    for entry in entries:
        parts = entry.filename.split("/")
        if entry.filename in seen:
            raise ProgramRefused(f"has the member {shown(entry.filename)} twice; two readers could see two files")
        if "\\" in entry.orig_filename or "\0" in entry.orig_filename or {"", ".", ".."} & set(parts):
            raise ProgramRefused(f"has a member named {shown(entry.orig_filename)}, which is no name inside an archive")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise ProgramRefused(f"has the compressed member {shown(entry.filename)}; torch never compresses")
        if entry.flag_bits & 0x1:
            raise ProgramRefused(f"has the encrypted member {shown(entry.filename)}")
        seen.add(entry.filename)
    if len({entry.filename.partition("/")[0] for entry in entries}) > 1:
        raise ProgramRefused("has members outside its root folder")
    if sum(entry.file_size for entry in entries) > size:
        raise ProgramRefused("claims more bytes than it has, so that its members overlap")


def _require_known(inner: list[str], names: list[str]) -> None:
    """Refuses members that hold code or that are unknown."""
    for entry in [*inner, *(full for full in names if "/" not in full)]:
        for pattern, what in CODE:
            if re.fullmatch(pattern, entry) and not KNOWN.fullmatch(entry):
                raise ProgramRefused(f"holds {shown(entry)}, {what}")
        if not KNOWN.fullmatch(entry):
            raise ProgramRefused(f"holds {shown(entry)}, a member that mpcompile does not know")
    missing = [entry for entry in NEEDED if entry not in inner]
    if missing:
        raise ProgramRefused(f"lacks its member {missing[0]!r}; it is no whole archive of torch.export.save")


def _require_format(members: Mapping[str, bytes]) -> None:
    """Refuses other versions and byte orders, and example inputs that need pickled code."""
    if members["archive_format"] != b"pt2" or members.get("archive_version", b"0") != b"0":
        raise ProgramRefused(
            f"has the format {shown(members['archive_format'])} and the version "
            f"{shown(members.get('archive_version', b'0'))}; pt2 and 0 are read"
        )
    if members.get("byteorder", b"little") != b"little":
        raise ProgramRefused("was written on a machine of another byte order")
    if members.get(EXAMPLES):
        try:
            torch.load(io.BytesIO(members[EXAMPLES]), map_location="cpu", weights_only=True)
        except Exception as error:
            raise ProgramRefused(
                f"holds {EXAMPLES!r}, which is more than tensors, so that loading would run its pickle"
            ) from error


def parsed_json(content: bytes, what: str) -> Any:
    """The value of a JSON member. Refuses repeated keys, constants that JSON lacks, deep nesting and large files."""
    if len(content) > LARGEST_JSON:
        raise ProgramRefused(f"has {len(content):,} bytes of JSON in {what}; {LARGEST_JSON:,} are allowed")
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_without_repeats, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ProgramRefused(f"has no readable JSON in {what} ({str(error)[:200]})") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _no_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
