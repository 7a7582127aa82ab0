"""`cloudmatrix twin …`: tables on the terminal, or with `--json` one object on standard output."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from app.twin import scenario as scenarios
from app.twin import tables
from app.twin.errors import TwinError
from fabric.topology import FabricError

twin_app = typer.Typer(
    name="twin",
    help="Predict what a workload would do on CloudMatrix384, with the error shown.",
    no_args_is_help=True,
)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
ScenarioFile = Annotated[Path | None, typer.Option("--scenario", help="JSON or TOML file of keys.")]
SetKeys = Annotated[list[str] | None, typer.Option("--set", help="key=value; may be repeated.")]
TraceFile = Annotated[Path, typer.Option("--trace", help="Mooncake JSONL or Azure CSV.")]


@twin_app.command()
def validate(as_json: JsonFlag = False) -> None:
    """Every published number the twin can speak to, with its error."""
    from app.twin.validate import validate as run

    with _clear_errors():
        _print(run(), as_json, tables.validation_table)


@twin_app.command()
def predict(
    scenario: ScenarioFile = None,
    set_: SetKeys = None,
    words: Annotated[list[str] | None, typer.Argument(help="More key=value.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """One steady-state point."""
    from app.twin.predict import predict as run

    with _clear_errors():
        _print(run(_scenario(scenario, set_, words)), as_json, tables.key_table("steady state (modelled)"))


@twin_app.command()
def replay(
    trace: TraceFile,
    scenario: ScenarioFile = None,
    set_: SetKeys = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="A profile of `twin calibrate`: simulate this machine, not a supernode."),
    ] = None,
    fail: Annotated[
        list[str] | None,
        typer.Option(
            help="What breaks and when: decode:0@600, node:3@600-900, pool:5@60, l2:0.0@60 (seconds)."
        ),
    ] = None,
    autoscale: Annotated[
        bool, typer.Option("--autoscale", help="Let the live autoscaler turn instances between P and D.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """A recorded workload through a simulated deployment, whole or while parts of it break."""
    from app.twin.live import replay_live
    from app.twin.profile import Profile
    from app.twin.replay import replay as run
    from app.twin.trace import read

    with _clear_errors():
        words = [*(set_ or []), *(["autoscale=true"] if autoscale else [])]
        if fail:
            words.append(f"faults={','.join(fail)}")
        chosen = _scenario(scenario, words, None)
        requests = read(trace, chosen.speedup)
        if profile is not None and (fail or autoscale):
            raise TwinError(
                "--profile simulates this machine's service as it is: leave out --fail and --autoscale"
            )
        if profile is None:
            _print(run(requests, chosen), as_json, tables.replay_table)
        else:
            result = replay_live(requests, Profile.read(profile))
            _print(result, as_json, tables.key_table("replay of this machine's service (simulated)"))


@twin_app.command()
def recommend(
    trace: TraceFile,
    slo_tpot: Annotated[
        list[float] | None, typer.Option(help="TPOT target in seconds; may be repeated.")
    ] = None,
    slo_ttft: Annotated[float, typer.Option(help="TTFT target in seconds.")] = 5.0,
    attainment: Annotated[float, typer.Option(help="Share of requests that must meet both.")] = 0.9,
    npu_hour: Annotated[float, typer.Option(help="Price of an NPU hour, US dollars.")] = 2.0,
    pool_gb_hour: Annotated[float, typer.Option(help="Price of a GB of pool DRAM for an hour.")] = 0.005,
    scenario: ScenarioFile = None,
    set_: SetKeys = None,
    as_json: JsonFlag = False,
) -> None:
    """The smallest deployment that serves a trace within its targets, and its cost."""
    from app.twin.recommend import Prices
    from app.twin.recommend import recommend as run
    from app.twin.trace import read

    with _clear_errors():
        base = _values(scenario, [*(set_ or []), f"slo_ttft_s={slo_ttft}"])
        chosen = scenarios.from_mapping(base)
        result = run(
            read(trace, chosen.speedup),
            base,
            slo_tpot or (0.050, 0.030, 0.015),
            prices=Prices(npu_hour, pool_gb_hour),
            attainment=attainment,
        )
        _print(result, as_json, tables.recommendation_table)


@twin_app.command()
def compare(
    left: Annotated[str, typer.Argument(help="ub, roce, or keys such as failed=l2:0.0 or ep=64,reuse=0.5")],
    right: Annotated[str, typer.Argument(help="As left.")],
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Replay it on both sides, too: pool sizes, queues, faults.")
    ] = None,
    scenario: ScenarioFile = None,
    set_: SetKeys = None,
    as_json: JsonFlag = False,
) -> None:
    """Two deployments side by side."""
    from app.twin.compare import compare as run

    with _clear_errors():
        _print(run(left, right, _values(scenario, set_), trace), as_json, tables.comparison_table)


BaseUrl = Annotated[str, typer.Option(help="Gateway of the running service.")]
ApiKey = Annotated[str | None, typer.Option(envvar="CLOUDMATRIX_API_KEY")]
Rate = Annotated[float, typer.Option(min=0.01, help="Arrivals per second.")]


@twin_app.command()
def calibrate(
    base_url: BaseUrl,
    model: Annotated[str, typer.Option(help="Model to measure.")],
    out: Annotated[Path, typer.Option(help="Where to write the profile.")] = Path("twin-profile.json"),
    api_key: ApiKey = None,
    requests: Annotated[int, typer.Option(min=8, help="About how many requests measure the parts.")] = 48,
    load_requests: Annotated[int, typer.Option(min=1, help="Requests of the load that is fitted.")] = 40,
    rate: Rate = 1.0,
    as_json: JsonFlag = False,
) -> None:
    """Learn this machine's step times from a run through the live service."""
    from app.twin.calibrate import calibrate as run

    with _clear_errors():
        result = run(
            base_url, model, api_key=api_key, num_requests=requests, load_requests=load_requests, rate=rate
        )
        result.write(out)
        _print(result.as_dict(), as_json, tables.key_table(f"profile, written to {out}"))


@twin_app.command()
def live(
    base_url: BaseUrl,
    model: Annotated[str, typer.Option(help="Model to drive.")],
    profile: Annotated[
        Path | None, typer.Option(help="A profile of `twin calibrate`; without one it calibrates first.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests of a round.")] = 40,
    rate: Rate = 1.0,
    rounds: Annotated[int, typer.Option(min=1, help="Workloads; errors are medians over them.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the first round.")] = 0,
    api_key: ApiKey = None,
    as_json: JsonFlag = False,
) -> None:
    """The same workload through the service and through its twin, and how far apart they are."""
    from app.twin.calibrate import calibrate as calibrate_first
    from app.twin.live import compare_live
    from app.twin.profile import Profile

    with _clear_errors():
        if profile is None:
            known = calibrate_first(base_url, model, api_key=api_key, load_requests=requests, rate=rate)
        else:
            known = Profile.read(profile)
        result = compare_live(
            base_url,
            model,
            known,
            num_requests=requests,
            rate=rate,
            rounds=rounds,
            seed=seed,
            api_key=api_key,
        )
        _print(result, as_json, tables.live_table)


@twin_app.command()
def report(
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("twin-report.html"),
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Adds hit ratio, link load and the course of the run.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder to write the pictures to, as PNG.")] = None,
    scenario: ScenarioFile = None,
    set_: SetKeys = None,
    as_json: JsonFlag = False,
) -> None:
    """One page: error table, Pareto curve, hit ratio against pool size, link heat map."""
    from app.twin.report import write_report
    from app.twin.trace import read

    with _clear_errors():
        chosen = _scenario(scenario, set_, None)
        requests = read(trace, chosen.speedup) if trace is not None else None
        write_report(out, chosen, requests, images)
        _print({"report": str(out)}, as_json, tables.key_table("report"))


@contextmanager
def _clear_errors() -> Iterator[None]:
    try:
        yield
    except (TwinError, FabricError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def _values(path: Path | None, words: list[str] | None) -> dict[str, Any]:
    values = scenarios.read(path) if path is not None else {}
    scenarios.from_mapping(values, f"scenario {path}" if path else "scenario")
    for word in words or []:
        key, equals, text = word.partition("=")
        if not equals:
            raise TwinError(f"--set {word!r}: expected key=value")
        values[key.strip()] = text.strip()
    return values


def _scenario(path: Path | None, set_: list[str] | None, words: list[str] | None) -> scenarios.Scenario:
    return scenarios.from_mapping(_values(path, [*(set_ or []), *(words or [])]))


def _print(result: dict[str, Any], as_json: bool, table: Callable[[dict[str, Any]], Table]) -> None:
    if as_json:
        typer.echo(json.dumps(result))
    else:
        Console().print(table(result))
