"""How to run the files of an output folder: lines of Python for ONNX Runtime, and commands for TensorRT."""

import shlex
from dataclasses import dataclass

from mpcompile.report.schema import Report

NATIVE, COMPRESSED = "model.native.onnx", "model.onnx"


@dataclass(frozen=True, slots=True)
class Snippet:
    """Lines to copy, with a title and a sentence on what they need."""

    id: str
    title: str
    about: str
    text: str


def command_line(report: Report) -> str | None:
    """The command that started the run, quoted for a shell; None for a run from Python."""
    return None if report.command_line is None else shlex.join(report.command_line)


def snippets(report: Report) -> tuple[Snippet, ...]:
    """The ways to run the compressed model, fastest first. They are run in the output folder."""
    found = []
    names = {row.name for row in report.files}
    if NATIVE in names:
        found.append(
            Snippet(
                "with-library",
                "ONNX Runtime with the kernels of mpcompile",
                f"Runs {NATIVE}, the file that was timed. Needs pip install mpcompile.",
                _session(report, NATIVE, library=True),
            )
        )
    if report.recipe.precision not in ("bf16", "fp8"):  # ONNX Runtime has no kernels of these for CPUs
        about = f"Runs {COMPRESSED}. Needs only pip install onnxruntime."
        if NATIVE in names:
            about += " Masked layers run on dense kernels."
        found.append(Snippet("without-library", "ONNX Runtime alone", about, _session(report, COMPRESSED)))
    if report.part is None and len(_inputs(report)) == 1:
        found.append(
            Snippet(
                "artifact",
                "mpcompile, with the preprocessing of this run",
                "Takes the fastest file that this machine can run. Needs pip install mpcompile.",
                _artifact(),
            )
        )
    engines = [name for name in sorted(names) if name.endswith(".engine")]
    if report.commands or engines:
        commands = report.commands or tuple(f"trtexec --loadEngine={shlex.quote(name)}" for name in engines)
        about = "Builds and times the engine on the machine that has the GPU. Run it in this folder."
        found.append(Snippet("tensorrt", f"Target {report.recipe.target}", about, "\n".join(commands)))
    return tuple(found)


def _session(report: Report, file: str, library: bool = False) -> str:
    """Lines that open a file in ONNX Runtime and run it on a batch of zeros, with the threads of the measurement."""
    threads = report.recipe.bench.threads
    options = [] if threads is None else [f"options.intra_op_num_threads = {threads}  # as timed"]
    imports = ["import numpy as np", "import onnxruntime as ort"]
    if library:
        imports += ["from mpcompile.runtimes.native import library"]
        options = ["options.register_custom_ops_library(str(library()))", *options]
    shapes = _inputs(report)
    feeds = [
        f"    {name!r}: np.zeros({shape!r}, dtype=np.{kind}),{'  # preprocessed images' if n == 0 else ''}"
        for n, (name, shape, kind) in enumerate(shapes)
    ]
    lines = [
        *imports,
        "",
        "options = ort.SessionOptions()",
        *options,
        f'session = ort.InferenceSession("{file}", options, providers=["CPUExecutionProvider"])',
        "inputs = {",
        *feeds,
        "}",
        "outputs = session.run(None, inputs)",
    ]
    return "\n".join(lines)


def _inputs(report: Report) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape of a batch and type of each input of the ONNX files."""
    batch = report.recipe.batch if isinstance(report.recipe.batch, int) else 1
    if report.captured is not None:
        return [(row.name, (batch, *row.shape), row.dtype) for row in report.captured.inputs]
    return [("images", (batch, *report.image_shape), "float32")]


def _artifact() -> str:
    """Lines that open the folder with mpcompile."""
    lines = [
        "import mpcompile",
        "from PIL import Image",
        "",
        'artifact = mpcompile.Artifact.open(".")',
        'engine = artifact.load("onnx")',
        "prepare = artifact.transform()  # resize, crop and normalise as in this run",
        'outputs = engine(prepare(Image.open("image.png")).unsqueeze(0).numpy())',
    ]
    return "\n".join(lines)
