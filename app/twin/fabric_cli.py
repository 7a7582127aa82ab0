"""`cloudmatrix fabric …`: what a transfer costs on the supernode's planes."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fabric.collectives import EP_DEGREES, Library, MoEOperator, moe_exchange
from fabric.cost import transfer_report
from fabric.gpu_cluster import NIC
from fabric.matrixlink import QOS_WEIGHT, QoS, seconds_beside
from fabric.planes import Plane
from fabric.published import validate_fabric
from fabric.topology import FabricError, Place, Topology, parse_place

fabric_app = typer.Typer(
    name="fabric", help="Price transfers on CloudMatrix384's planes (modelled).", no_args_is_help=True
)


@fabric_app.callback()
def fabric() -> None:
    """Price transfers on CloudMatrix384's planes (modelled)."""


@fabric_app.command()
def transfer(
    src: Annotated[str, typer.Option(help="npu:I, die:I or cpu:I")],
    dst: Annotated[str, typer.Option(help="npu:I, die:I or cpu:I")],
    num_bytes: Annotated[int, typer.Option("--bytes", help="How many bytes.")],
    failed: Annotated[list[str] | None, typer.Option(help="A broken component, such as l2:3.5.")] = None,
    npus: Annotated[int, typer.Option(help="Size of the supernode.")] = 384,
    beside: Annotated[
        list[str] | None,
        typer.Option(help="SRC,DST[,expert|cache|bulk]: as many bytes at the same instant; may be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Seconds that bytes take over UB, RoCE and VPC, and the way they go on UB; with others beside them, on UB."""
    try:
        topology = Topology.of_npus(npus).without(*(failed or []))
        report = transfer_report(src, dst, num_bytes, topology)
        if beside:
            ends = [(parse_place(src), parse_place(dst), "cache"), *(_beside(text) for text in beside)]
            report["shared_ub_s"] = seconds_beside(
                [(a, b, num_bytes) for a, b, _ in ends], [qos for _, _, qos in ends], topology
            )
    except FabricError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps(report))
        return
    line_rate = report["line_rate_s"]
    assert isinstance(line_rate, dict)
    assert isinstance(report["path"], list)
    basis = report["basis"]
    assert isinstance(basis, dict)
    table = Table(
        "plane", "seconds (modelled)", "floor at line rate", "basis", title=f"{src} to {dst}, {num_bytes:,} B"
    )
    for plane in ("ub", "roce", "vpc"):
        table.add_row(plane, f"{report[f'{plane}_s']:.4g}", f"{line_rate[plane]:.4g}", basis[plane])
    if report["gpu_cluster_s"] is not None:
        table.add_row("H800 cluster", f"{report['gpu_cluster_s']:.4g}", "", basis["gpu_cluster"])
    shared = report.get("shared_ub_s", [])
    assert isinstance(shared, list)
    for text, seconds in zip([f"{src},{dst}", *(beside or [])], shared, strict=bool(shared)):
        table.add_row(
            f"ub, shared: {text}",
            f"{seconds:.4g}",
            "",
            "max-min fair shares of every lane, by class of service",
        )
    table.caption = " > ".join(report["path"]) + f"  (one of {report['num_paths']} ways)"
    Console().print(table)


@fabric_app.command()
def exchange(
    tokens: Annotated[int, typer.Option(min=1, help="Tokens on every rank.")] = 128,
    ep: Annotated[list[int] | None, typer.Option(help="EP degree; may be repeated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """MoE dispatch and combine by EP degree: fused on UB, not fused, over RoCE, and DeepEP on H800."""
    variants: dict[str, tuple[Plane, Library, bool]] = {
        "UB, fused": ("ub", "cann", True),
        "UB, not fused": ("ub", "cann", False),
        "RoCE, fused": ("roce", "cann", True),
        "H800, DeepEP": ("roce", "deepep", True),
    }
    operators: tuple[MoEOperator, ...] = ("dispatch", "combine")
    rows = []
    try:
        for degree in ep or EP_DEGREES:
            for operator in operators:
                row: dict[str, object] = {"ep": degree, "operator": operator}
                for name, (plane, library, fused) in variants.items():
                    # The measured latencies hold what the wire costs; line rate is only the floor.
                    nic = NIC.value if library == "deepep" else None
                    found = moe_exchange(
                        operator, tokens, degree, plane=plane, library=library, fused=fused, bytes_per_s=nic
                    )
                    row[name] = {"seconds": found.seconds, "bound": found.bound}
                rows.append(row)
    except FabricError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps({"tokens": tokens, "rows": rows}))
        return
    table = Table(
        "EP", "operator", *variants, title=f"{tokens} tokens per rank, us and what bounds it (modelled)"
    )
    for row in rows:
        cells = [row[name] for name in variants]
        texts = [f"{1e6 * c['seconds']:.0f} {c['bound']}" for c in cells if isinstance(c, dict)]
        table.add_row(str(row["ep"]), str(row["operator"]), *texts)
    table.caption = (
        "UB fused and DeepEP follow latencies measured with 128 tokens (arXiv 2506.12708 v3, Table 6); not fused and "
        "RoCE are the fabric's own model, with nothing published to check them"
    )
    Console().print(table)


def _beside(text: str) -> tuple[Place, Place, QoS]:
    src, _, rest = text.partition(",")
    dst, _, named = rest.partition(",")
    for qos in QOS_WEIGHT:
        if (named or "cache") == qos:
            return parse_place(src.strip()), parse_place(dst.strip()), qos
    raise FabricError(f"beside {text!r}: {named!r} is not one of {', '.join(QOS_WEIGHT)}")


@fabric_app.command()
def validate(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """The published UB table, the sizes of supernodes, and a 4K handover, beside what the fabric answers."""
    report = validate_fabric()
    if as_json:
        typer.echo(json.dumps(report))
        return
    table = Table(
        "what", "unit", "published", "modelled", "error", title="fabric (modelled) against the paper"
    )
    for row in report["rows"]:
        table.add_row(
            row["what"],
            row["unit"],
            f"{row['published']:g}",
            f"{row['modelled']:.4g}",
            f"{row['error']:+.1%}",
        )
    handover = report["handover_4k"]
    told = ", ".join(f"{plane} {1e3 * seconds:.3g} ms" for plane, seconds in handover["modelled_s"].items())
    table.caption = (
        f"KV of 4,096 tokens ({handover['num_bytes']:,} B) from npu:0 to npu:383: {told} (modelled)"
    )
    Console().print(table)
