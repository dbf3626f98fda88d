"""`mpcompile bench`: measures the latency of an output folder and prints it as a table or JSON."""

from typing import Annotated

import typer

import mpcompile.cli.parse as parse
from mpcompile.cli.app import Command, app, epilog_of
from mpcompile.cli.choices import TARGETS, completion, listed
from mpcompile.cli.console import configure_logging, progress, show_times
from mpcompile.cli.options import FolderArgument, JsonOption, QuietOption, VerboseOption


@app.command("bench", cls=Command, epilog=epilog_of("bench"))
def bench_command(
    folder: FolderArgument,
    target: Annotated[
        str | None,
        typer.Option(
            help=f"Runtime to measure on: {listed(TARGETS)}. [default: the recipe's]",
            autocompletion=completion(TARGETS),
        ),
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="Batch sizes to time, such as 1,8,64. [default: the recipe's]")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the runtime. [default: its own choice]")] = None,
    seconds: Annotated[float, typer.Option(help="Seconds to measure each batch size, in 15 to 200 rounds.")] = 4.0,
    transfers: Annotated[
        bool, typer.Option("--transfers/--no-transfers", help="Include copies to and from a GPU in the time.")
    ] = True,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="Launch the GPU kernels as one CUDA graph.")] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Measure the latency of the models in an output folder.

    Times the dense model, and the compressed model with sparse kernels off and on, in interleaved rounds.
    """
    configure_logging(verbose, quiet)
    from mpcompile.cli.tables import show_bench
    from mpcompile.driver.bench import bench
    from mpcompile.driver.compare_engines import Settings

    settings = Settings(target, parse.batches(batch), threads, seconds, transfers, cuda_graph)
    with progress(quiet or as_json) as observe:
        found = bench(folder, settings, observe)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    elif not quiet:
        show_bench(found, folder / "bench" / found.target)
        show_times(observe)
