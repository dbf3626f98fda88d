"""The sections of help texts: which options and commands stand together, and the examples of each command."""

from collections.abc import Mapping
from typing import Any

FEW = 10  # a command with fewer options has one section
OTHER = "Other options"
# Title of a section -> its options, by the name of their parameter.
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "Output": ("output", "force", "dry_run", "plots", "as_json", "verbose", "quiet"),
    "Masks and tokens": (
        "pattern", "share_rows", "macs", "budget", "include", "exclude", "permute", "strict", "criterion", "refit",
        "tome", "null",
    ),
    "Accuracy": ("max_drop", "tune", "metric", "head", "confidence", "distill", "polish"),
    "Target": (
        "target", "precision", "batch", "threads", "opset", "require_engine", "seconds", "transfers", "cuda_graph",
    ),
    "Images": (
        "data", "calibration", "held_out", "seed", "classes", "exif", "alpha", "skip_broken", "input_size",
        "preprocess", "mean", "std", "resize", "crop_pct", "interpolation", "channel_order",
    ),
    "Model": (
        "arch", "arch_arg", "pretrained", "allow_pickle", "weights_key", "leaf", "model_input", "output_name",
        "submodule",
    ),
    "Recipe and passes": ("config", "save_config", "start", "keep_passes", "device", "memory"),
}  # fmt: skip
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "Compress": ("compile", "analyze", "init"),
    "Look at results": ("compare", "explain", "bench", "verify"),
    "Machine and reference": ("doctor", "passes", "schema"),
}
EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "compile": (
        "mpcompile vit.safetensors --arch vit_base_patch16_224 --pattern 2:4 -o out",
        "mpcompile vit.safetensors --pattern 50% --data images/ --max-drop 1 -o out",
        "mpcompile vit.safetensors --pattern 2:4 --precision int8 --data images/ -o out",
        "mpcompile vit.safetensors --config recipe.yaml --data images/ --dry-run",
    ),
    "analyze": (
        "mpcompile analyze vit.safetensors --arch vit_base_patch16_224",
        "mpcompile analyze vit.safetensors --precision int8 --data images/",
        "mpcompile analyze vit.safetensors --pattern auto --macs 0.7 --plots plots/",
    ),
    "init": (
        "mpcompile init",
        "mpcompile init vit.safetensors --data images/ --precision int8 --yes",
    ),
    "compare": (
        "mpcompile compare out-fp32/ out-int8/ --html compare.html",
        "mpcompile compare out/ --fail-if 'top1 < dense - 0.5' --fail-if 'speedup < 1.2'",
    ),
    "explain": (
        "mpcompile explain out/",
        "mpcompile explain out/ blocks.0.mlp.fc1",
    ),
    "bench": (
        "mpcompile bench out/ --batch 1,8,64",
        "mpcompile bench out/ --threads 1 --seconds 10 --json",
    ),
    "verify": ("mpcompile verify out/",),
    "doctor": (
        "mpcompile doctor",
        "mpcompile doctor vit.safetensors --arch vit_base_patch16_224 --data images/",
    ),
    "passes": ("mpcompile passes",),
    "schema": ("mpcompile schema > recipe.schema.json", "mpcompile schema report"),
}


def examples(command: str) -> str:
    """The examples of a command as a paragraph that is not wrapped."""
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in EXAMPLES[command])))


def write_options(ctx: Any, params: list[Any], formatter: Any) -> None:
    """Writes the arguments, and the options in their sections; in one section if there are few."""
    records = {param.name: (param, param.get_help_record(ctx)) for param in params}
    shown = {name: (param, record) for name, (param, record) in records.items() if record is not None}
    arguments = [record for param, record in shown.values() if param.param_type_name == "argument"]
    options = {name: record for name, (param, record) in shown.items() if param.param_type_name == "option"}
    sections = {"Arguments": arguments}
    if len(options) < FEW:
        sections["Options"] = list(options.values())
    else:
        for title, names in OPTIONS.items():
            sections[title] = [options.pop(name) for name in names if name in options]
        sections[OTHER] = list(options.values())
    for title, rows in sections.items():
        if rows:
            with formatter.section(title):
                formatter.write_dl(rows)


def write_commands(commands: Mapping[str, Any], formatter: Any) -> None:
    """Writes the commands in their sections, each with one line of help."""
    limit = formatter.width - 6 - max(map(len, commands), default=0)
    rest = [name for name in commands if not any(name in names for names in COMMANDS.values())]
    for title, names in {**COMMANDS, "Other commands": tuple(rest)}.items():
        rows = [(name, commands[name].get_short_help_str(limit)) for name in names if name in commands]
        if rows:
            with formatter.section(title):
                formatter.write_dl(rows)
