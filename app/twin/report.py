"""One self-contained HTML page: error table, throughput against latency, hit ratio, link load, and how a run went."""

import base64
from collections.abc import Sequence
from pathlib import Path

import jinja2

from app.twin import pictures
from app.twin.errors import TwinError
from app.twin.machine import SupernodeMachine
from app.twin.predict import predict
from app.twin.replay import deployment, summarise
from app.twin.scenario import Scenario
from app.twin.simulator import Simulator
from app.twin.trace import Request
from app.twin.validate import validate


def write_report(
    path: Path, scenario: Scenario, requests: Sequence[Request] | None, images: Path | None = None
) -> None:
    """Write the page, and with `images` each picture into that folder. Raises `TwinError` when it cannot be written."""
    figures = [pictures.pareto(scenario)]
    run = None
    if requests is not None:
        machine = SupernodeMachine(scenario)
        outcome = Simulator(machine, deployment(scenario)).run(requests)
        run = summarise(outcome, machine, scenario)
        figures += [
            pictures.hits(requests, scenario),
            pictures.heat(scenario, outcome),
            pictures.course(scenario, outcome),
        ]
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    ).get_template("report.html.jinja")
    validation = validate()
    for row in validation["rows"]:
        row["reason"] = ""
    files = [(figure, pictures.png(figure["figure"])) for figure in figures]
    page = template.render(
        model=scenario.model,
        num_npus=scenario.num_npus,
        validation=validation,
        point=predict(scenario),
        run=run,
        figures=[figure | {"png": base64.b64encode(png).decode()} for figure, png in files],
    )
    try:
        path.write_text(page, encoding="utf-8")
        for figure, png in files if images is not None else []:
            assert images is not None
            images.mkdir(parents=True, exist_ok=True)
            (images / f"twin-{figure['name']}.png").write_bytes(png)
    except OSError as error:
        raise TwinError(f"report {path}: {error}") from None
