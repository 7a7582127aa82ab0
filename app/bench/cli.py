"""`cloudmatrix bench`: how fast the engine and the service are on this machine."""

import typer

from app.bench.engine_cli import engine
from app.bench.faults_cli import faults
from app.bench.gateway_cli import gateway
from app.bench.grammar_cli import grammar
from app.bench.handoff_cli import handoff
from app.bench.interference_cli import interference
from app.bench.load_cli import load
from app.bench.models_cli import models
from app.bench.overload_cli import overload
from app.bench.peers_cli import peers
from app.bench.pool_cli import pool
from app.bench.reuse_cli import reuse
from app.bench.speculation_cli import speculation
from app.bench.vanish_cli import vanish

bench_app = typer.Typer(help="Measure the engine and the service on this machine.", no_args_is_help=True)
bench_app.command()(engine)
bench_app.command()(faults)
bench_app.command()(gateway)
bench_app.command()(handoff)
bench_app.command()(interference)
bench_app.command()(load)
bench_app.command()(models)
bench_app.command()(overload)
bench_app.command()(peers)
bench_app.command()(pool)
bench_app.command()(grammar)
bench_app.command()(reuse)
bench_app.command()(speculation)
bench_app.command()(vanish)
