"""`cloudmatrix eval`: is what is served still the model?"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

eval_app = typer.Typer(help="Measure the engine as served against a float32 reference.", no_args_is_help=True)


@eval_app.callback()
def _eval() -> None:
    """Keeps `accuracy` a sub-command of its own while it is the only one."""


@eval_app.command()
def accuracy(
    model: Annotated[str, typer.Option(help="A model of `models list`.")] = "smollm2-135m",
    tokens: Annotated[int, typer.Option(min=64, help="How many tokens to predict, about.")] = 20_000,
    window: Annotated[int, typer.Option(min=64, help="Longest text read in one go, in tokens.")] = 512,
    text: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="A UTF-8 text of yours; none: the built-in mixed English."
        ),
    ] = None,
    weights_from: Annotated[
        Path | None,
        typer.Option(
            "--weights",
            exists=True,
            help="Other weights with the model's tokenizer: a GGUF file or a Hugging Face folder, 16-bit ones say.",
        ),
    ] = None,
    kernels: Annotated[str, typer.Option(help="Kernel path: auto, portable, …")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="Engine threads.")] = 2,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on standard output.")
    ] = False,
) -> None:
    """Perplexity, top-1 agreement and mean KL divergence of the engine against plain float32."""
    from app.evaluate import corpus
    from app.evaluate.accuracy import EngineScorer, ReferenceScorer, measure
    from app.models import catalogue
    from app.text import load_text
    from engine.model import Model
    from engine.reference import ReferenceModel
    from engine.weights import load_weights

    entry = catalogue.pull(model)
    tokenizer = load_text(entry).tokenizer
    window = min(window, entry.max_context_tokens)
    if text is None:
        texts = corpus.windows(tokenizer.encode, tokens, window)
    else:
        try:
            own = tokenizer.encode(text.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise typer.BadParameter(f"{text} is not UTF-8: {error}", param_hint="--text") from None
        texts = corpus.cut(own[:tokens], window)
    weights = load_weights(weights_from or entry.path)
    engine = Model(weights, num_threads=threads, kernels=kernels)
    try:
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("Predicting tokens", total=sum(len(part) - 1 for part in texts))
            result = measure(
                EngineScorer(engine, window),
                ReferenceScorer(ReferenceModel(weights)),
                texts,
                lambda done: bar.update(task, completed=done),
            )
    finally:
        engine.close()
    if as_json:
        typer.echo(json.dumps(asdict(result)))
        return
    difference = result.perplexity / result.perplexity_reference - 1
    name = entry.id if weights_from is None else weights_from.name
    typer.echo(f"{name} over {result.tokens:,} tokens")
    against = f"{difference:+.2%} against float32: {result.perplexity_reference:.4f}"
    typer.echo(f"  perplexity       {result.perplexity:.4f} ({against})")
    typer.echo(f"  top-1 agreement  {result.top1_agreement:.2%}")
    typer.echo(f"  mean KL          {result.kl_mean:.5f} nats")
