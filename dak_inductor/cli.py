"""The command `dak`: probe a machine, plan a model, see it work, measure it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from dak_inductor.errors import DakError, OptionError
from dak_inductor.quantity_text import count_text
from dak_inductor.whole_files import write_whole

ERROR_EXIT_CODE = 2

app = typer.Typer(
    name="dak",
    help="Run models that do not fit in GPU memory: measure the machine, plan, try, compare.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
Out = Annotated[Path | None, typer.Option("--out", help="Write the JSON to this file as well.")]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Run models that do not fit in GPU memory: measure the machine, plan, try, compare."""
    context.obj = debug
    if version:
        typer.echo(f"dak-inductor {metadata.version('dak-inductor')}")
        raise typer.Exit


@app.command()
def probe(
    context: typer.Context,
    device: Annotated[
        str | None, typer.Option(help="GPU to measure. Default: the current.")
    ] = None,
    remote: Annotated[
        list[str] | None,
        typer.Option(
            help="Remote tier to measure: cpu or cuda:N; may be given several times. Default: all."
        ),
    ] = None,
    json_only: Json = False,
    out: Out = None,
) -> None:
    """Measure this machine: GPU memory, links, their windows, matmul rate. Needs a GPU.

    The result is kept, and `dak.offload` plans with it from then on.
    """
    with _named_errors(context):
        from dak_inductor.probe import probe as measure
        from dak_inductor.probe import render

        with _progress() as say:
            say("measuring this machine")
            profile = measure(device, remote or None)
        if out is not None:
            _write(out, profile.to_json())
        if json_only:
            typer.echo(profile.to_json().rstrip())
        else:
            _console().print(render(profile))


@app.command()
def plan(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(
            help="A transformers config.json, or its folder, or one of llama-3-8b, llama-3-70b, "
            "qwen2.5-14b, qwen3-8b, mistral-7b, mixtral-8x7b, opt-30b, gpt2, bert-large, vit-huge."
        ),
    ],
    hardware: Annotated[
        str, typer.Option(help="h200, gh200, rtx-pro-6000, or a file of dak probe --out.")
    ] = "h200",
    remote: Annotated[str, typer.Option(help="Remote tier: cpu or cuda:N.")] = "cpu",
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            help='Budget for all that is on the GPU: "12GiB", "24GB", "80%". Default: the card.'
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 1024,
    new: Annotated[int, typer.Option(min=1, help="Tokens generated for each prompt.")] = 128,
    all_ops: Annotated[
        bool, typer.Option("--all", help="A row for each operator, not one for equal layers.")
    ] = False,
    json_only: Json = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Write the plan (JSON) here, for dak.offload(plan=...)."),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write the predicted timeline here, for ui.perfetto.dev.")
    ] = None,
) -> None:
    """Predict what would go where, and what it would cost. Needs no GPU and no weights."""
    with _named_errors(context):
        from dak_inductor.plan_command import PlanRequest, answer
        from dak_inductor.plan_report import render

        request = PlanRequest(model, hardware, remote, gpu_memory, batch, prompt, new)
        with _progress() as say:
            result = answer(request, say)
        if out is not None:
            _write(out, result.plan.to_json())
        if trace is not None:
            from dak_inductor import hardware as profiles
            from dak_inductor.timeline import to_trace

            profile = profiles.load(hardware)
            _write(trace, to_trace(result.plan, profile, result.compute))
        if json_only:
            typer.echo(result.to_json())
            return
        console = _console()
        console.print(render(result.plan, title=result.title(), all_ops=all_ops))
        console.print(result.closing(), markup=False, highlight=False)


@app.command()
def demo(
    context: typer.Context,
    layers: Annotated[int | None, typer.Option(min=1, help="Decoder layers.")] = None,
    ratio: Annotated[float, typer.Option(help="Share of the weight bytes that goes remote.")] = 0.4,
    remote: Annotated[str | None, typer.Option(help="Remote tier: cpu, cuda:N, simulated.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 2,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 32,
    new: Annotated[int, typer.Option(min=1, help="Tokens generated for each prompt.")] = 16,
    json_out: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers to this file as well.")
    ] = None,
) -> None:
    """Run a small Llama, partly remote and compiled, and check it against eager."""
    with _named_errors(context):
        from dak_inductor.demo import run

        code = run(
            layers=layers,
            ratio=ratio,
            remote=remote,
            batch=batch,
            prompt=prompt,
            new=new,
            json_out=json_out,
        )
    raise typer.Exit(code)


@app.command()
def bench(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", help="Folder of the record and the log.")] = Path(
        "dak-bench"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="A few cases, within minutes.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the rows of an earlier run that are done.")
    ] = False,
    models: Annotated[
        str,
        typer.Option(
            help="Comma-separated, among llama-3-8b, qwen2.5-14b, mistral-7b, opt-30b, bert-large, "
            "vit-huge. Default: all."
        ),
    ] = "",
    layers: Annotated[
        int | None, typer.Option(min=0, help="Layers of each model; 0: all. Default: 8, quick 4.")
    ] = None,
    batches: Annotated[
        str, typer.Option(help="Sequences at once, comma-separated. Default: 1,16, quick 1.")
    ] = "",
    shares: Annotated[
        str,
        typer.Option(
            help="Shares of the layers' linear weights that are remote, comma-separated. "
            "Default: 0.05,0.1,0.3,0.5,1.0, fewer with --quick."
        ),
    ] = "",
    providers: Annotated[
        str,
        typer.Option(
            help="Comma-separated, among dak (this backend), resident inductor, resident eager, "
            "split inductor, split eager, layer prefetch charged eager, layer prefetch eager, "
            "linear prefetch eager, accelerate cpu_offload. Default: all."
        ),
    ] = "",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 512,
    new: Annotated[int, typer.Option(min=2, help="Tokens generated for each prompt.")] = 32,
    remote: Annotated[str | None, typer.Option(help="Remote tier: cpu or cuda:N.")] = None,
    hardware: Annotated[
        str, typer.Option(help="Profile for predictions, as of dak plan.")
    ] = "h200",
    host_memory: Annotated[
        str, typer.Option(help='Host memory to take as available: "100GB".')
    ] = "",
    seconds_per_phase: Annotated[
        float | None,
        typer.Option(help="Time to measure prefill, and decode, of a row: 0.6, quick 0.3."),
    ] = None,
    limit_seconds: Annotated[
        float | None, typer.Option(help="Start no case after so many seconds; --resume goes on.")
    ] = None,
    cards: Annotated[
        int | None,
        typer.Option(min=1, help="GPUs that run cases at the same time, each its own."),
    ] = None,
    commit: Annotated[
        str | None, typer.Option(help="Commit to record, outside of a git checkout.")
    ] = None,
) -> None:
    """Measure whole models against other ways to offload; without a GPU predict and simulate."""
    with _named_errors(context):
        from dak_inductor.bench_command import BenchText, bench_models

        text = BenchText(models, providers, batches, shares, host_memory)
        code = bench_models(
            text,
            out=out,
            quick=quick,
            resume=resume,
            layers=layers,
            prompt=prompt,
            new=new,
            remote=remote,
            hardware=hardware,
            seconds_per_phase=seconds_per_phase,
            limit_seconds=limit_seconds,
            cards=cards,
            commit=commit,
        )
    raise typer.Exit(code)


@app.command()
def report(
    context: typer.Context,
    results: Annotated[
        list[Path], typer.Argument(help="Records (JSON) of benchmarks, plans and traces.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The HTML file.")] = Path("dak-report.html"),
    figures: Annotated[
        Path | None, typer.Option("--figures", help="A folder for the charts as SVG files.")
    ] = None,
    png: Annotated[
        bool, typer.Option("--png", help="Charts as PNG files too; needs matplotlib.")
    ] = False,
) -> None:
    """Make one HTML file of records, plans and timelines; two of one benchmark are compared."""
    with _named_errors(context):
        from dak_inductor.report.document import document
        from dak_inductor.report.figures import write_figures
        from dak_inductor.report.records import load_all

        if png and figures is None:
            raise OptionError("--png needs --figures FOLDER, where the files are written")
        loaded = load_all(results)
        _write(out, document(loaded))
        if figures is not None:
            write_figures(loaded, figures, png=png)
        count = count_text(len(loaded), "record")
        typer.echo(f"{out}: {count}, {out.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    """The entry point of the installed command."""
    app()


@contextmanager
def _named_errors(context: typer.Context) -> Iterator[None]:
    """Errors of this package as one line on stderr, exit code 2; tracebacks with --debug."""
    try:
        yield
    except DakError as error:
        if context.obj:
            raise
        name, message = type(error).__name__, " ".join(str(error).split())
        print(f"dak: {name}: {message}", file=sys.stderr)
        raise typer.Exit(ERROR_EXIT_CODE) from None


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A spinner with the time on stderr while something long is done."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    console = Console(stderr=True)
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("starting", total=None)
        yield lambda text: progress.update(task, description=text)


def _console() -> Console:
    """Standard output; where that is no terminal, wide enough for every column."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, text)
    except OSError as error:
        raise OptionError(f"{path} cannot be written: {error.strerror or error}") from error
