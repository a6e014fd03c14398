"""The command line's manners: one JSON object on stdout or a page for people, progress on stderr, errors as one sentence."""

from __future__ import annotations

import functools
import inspect
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from compressor.errors import VitrimError
from compressor.result import Result

__all__ = ["Console", "command", "main"]

INTERRUPTED = 3  # neither passed nor failed
TYPER_INTERRUPTED = 130  # what typer makes of a KeyboardInterrupt
COMPRESS_PACKAGES = ("torch", "safetensors", "onnx", "onnx_ir", "scipy", "sklearn", "jinja2", "matplotlib", "yaml")


class Console:
    """Progress and notes on stderr; silent with ``--quiet``."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}

    def note(self, text: str) -> None:
        """One line on stderr."""
        if not self.quiet:
            print(text, file=sys.stderr)

    def progress(self, stage: str, done: int, total: int) -> None:
        """A step of `stage`; bars are drawn only on a terminal, otherwise each finished stage is one line."""
        if self.quiet:
            return
        if self._bars is None:
            if done >= total:
                self.note(f"  {stage}")
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)

    @contextmanager
    def working(self, stage: str) -> Iterator[None]:
        """A bar for work whose steps cannot be counted."""
        self.progress(stage, 0, 1)
        yield
        self.progress(stage, 1, 1)

    @contextmanager
    def live(self) -> Iterator[None]:
        """Progress bars while inside."""
        if self.quiet or not sys.stderr.isatty():
            yield
            return
        from rich.console import Console as Rich
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=Rich(stderr=True)) as bars:
            self._bars = bars
            try:
                yield
            finally:
                self._bars = None


CLOTHES = "No --data: calibrated on the embedded images of clothes, which is right for no other model."
HELP = {"help_option_names": ["-h", "--help"]}
Threads = Annotated[int, typer.Option(min=1, max=256, help="CPU threads.")]
COMMON = {
    "as_json": Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")],
    "verbose": Annotated[bool, typer.Option("-v", "--verbose", help="Show tracebacks and runtime warnings.")],
    "quiet": Annotated[bool, typer.Option("-q", "--quiet", help="No progress, no notes.")],
}


def command(app: typer.Typer, name: str, *examples: str) -> Callable[[Callable[..., Result]], Callable[..., None]]:
    """Register a function ``(console, **options) -> Result`` as command `name`, with --json, -v and -q added.

    Args:
        app: where it is registered.
        name: as typed.
        examples: command lines shown below the help.
    """

    def register(fn: Callable[..., Result]) -> Callable[..., None]:
        @functools.wraps(fn)
        def run(*, as_json: bool, verbose: bool, quiet: bool, **options: Any) -> None:
            del verbose  # read by `main` where errors end up
            console = Console(quiet=quiet)
            with console.live():
                result = fn(console, **options)
            if as_json:
                print(json.dumps(result.data, allow_nan=False))
            else:
                _print(result.lines)
            raise typer.Exit(result.exit_code)

        own = [p for p in inspect.signature(fn, eval_str=True).parameters.values() if p.name != "console"]
        added = [
            inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=a) for n, a in COMMON.items()
        ]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + added
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        del run.__wrapped__
        app.command(
            name, context_settings=HELP, epilog="\b\nExamples:\n" + "\n".join(f"  {line}" for line in examples)
        )(run)
        return run

    return register


def _print(lines: list[Any]) -> None:
    from rich.console import Console as Rich

    rich = Rich(highlight=False, soft_wrap=True)
    for line in lines:
        rich.print(line, markup=False) if isinstance(line, str) else rich.print(line)


def _report(code: str, message: str, hint: str) -> None:
    if "--json" in sys.argv[1:]:
        print(json.dumps({"error": {"code": code, "message": message, "hint": hint}}))
    print(f"vitrim: {message}" + (f"\n        {hint}" if hint else ""), file=sys.stderr)


def main(app: typer.Typer) -> int:
    """Run `app` on ``sys.argv``; every failure becomes one sentence and an exit code, a traceback only with -v."""
    verbose = bool({"-v", "--verbose"} & set(sys.argv[1:]))
    asked: list[int] = []

    def stop(signum: int, frame: object) -> None:
        asked.append(signum)
        if signum == signal.SIGHUP:  # a closing terminal sends it more than once; cleaning up is to be finished
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        raise KeyboardInterrupt

    for sign in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(sign) is not signal.SIG_IGN:  # as nohup, and a shell for its background jobs, ignore them
            signal.signal(sign, stop)
    try:
        code = int(app(prog_name="vitrim", standalone_mode=False) or 0)
        if code == TYPER_INTERRUPTED:
            raise KeyboardInterrupt
        return code
    except BaseException as error:  # noqa: BLE001 - the last line of defence: even our bug is one sentence
        if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads: `vitrim ... | head`
            return INTERRUPTED
        if type(error).__name__ == "NoArgsIsHelpError":  # the help itself; recent typer brings its own copy of click
            print(error.format_message(), file=sys.stderr)  # type: ignore[attr-defined]
            return 2
        # A signal that arrives while a library is being imported comes back as that library's own ImportError.
        code, failure = _explain(KeyboardInterrupt() if asked else error)
        if verbose:
            traceback.print_exc()
        _report(*failure)
        return code


def _explain(error: BaseException) -> tuple[int, tuple[str, str, str]]:
    """Exit code, and (code, message, hint) of a failure."""
    if isinstance(error, VitrimError):
        return error.exit_code, (error.code, str(error), error.hint)
    describe = getattr(error, "format_message", None)  # click's usage errors; recent typer brings its own copy of click
    if describe is not None:
        context = getattr(error, "ctx", None)
        return 2, ("UsageError", describe(), f"See `{context.command_path if context else 'vitrim'} --help`.")
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        hint = "Run it again: finished stages are reused."
        return INTERRUPTED, ("Interrupted", "Interrupted; nothing was written.", hint)
    if isinstance(error, ModuleNotFoundError) and error.name in COMPRESS_PACKAGES:
        hint = "pip install 'vitrim[compress]'; the device install runs, verifies and profiles bundles only."
        return 3, ("MissingDependency", f"This command needs the package {error.name!r}, which is not installed.", hint)
    if isinstance(error, OSError):
        what = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        return 2, ("FileError", f"{what}.", "Check the path, its permissions and the free space.")
    if isinstance(error, MemoryError):
        return 2, ("OutOfMemory", "There is not enough memory for this model.", "Use a smaller --calib-size.")
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return 2, ("InternalError", text, "This is a bug in vitrim; run with -v and report it.")
