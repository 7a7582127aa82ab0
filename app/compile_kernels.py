"""`python -m app.compile_kernels`: compile the engine's kernels into the cache, with a progress bar.

Runs as a process of its own before the workers start: they all find the compiled code, none compiles it twice.
"""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from engine.kernels.warm import warm


def main() -> None:
    """Compile what is not in the cache yet; quick and silent when everything is."""
    console = Console(stderr=True)
    columns = (
        TextColumn("Compiling kernels (first start only)"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None, visible=False)

        def report(done: int, total: int, label: str) -> None:
            progress.update(task, completed=done, total=total, description=label, visible=True)

        warm(report)


if __name__ == "__main__":
    main()
