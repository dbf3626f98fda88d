"""`mpcompile bench`: an output folder -> its benchmark as a table or JSON."""

from pathlib import Path
from typing import Annotated

import typer

import mpcompile.cli.parse as parse
from mpcompile.cli.app import app
from mpcompile.cli.console import configure_logging, progress, show_bench
from mpcompile.cli.options import JsonOption, QuietOption, TargetOption, VerboseOption


@app.command("bench")
def bench_command(
    folder: Annotated[Path, typer.Argument(help="An output folder.")],
    target: TargetOption = None,
    batch: Annotated[str | None, typer.Option(help="Batches to time, as 1,8,64. [default: the recipe's]")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the runtime. [default: its choice]")] = None,
    seconds: Annotated[float, typer.Option(help="For each batch; 15 to 200 rounds.")] = 4.0,
    transfers: Annotated[
        bool, typer.Option("--transfers/--no-transfers", help="Count copies to and from a GPU.")
    ] = True,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="Start a GPU's work as one CUDA graph.")] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Time an output folder on its target: dense, masked with sparse kernels off, and on, in turns."""
    configure_logging(verbose, quiet)
    from mpcompile.driver.bench import bench
    from mpcompile.driver.compare_engines import Settings

    settings = Settings(target, parse.batches(batch), threads, seconds, transfers, cuda_graph)
    with progress(quiet or as_json) as observe:
        found = bench(folder, settings, observe)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    elif not quiet:
        show_bench(found, folder / "bench" / found.target)
