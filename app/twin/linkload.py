"""How full the UB links between L1 and L2 chips were over a simulated run."""

from app.twin import deepseek as r1
from app.twin.exchange import crossing_share
from app.twin.outcome import Outcome
from app.twin.scenario import Scenario
from fabric.collectives import COMBINE_BYTES, DISPATCH_BYTES, TOP_K
from fabric.planes import UB_LANE
from fabric.topology import L1_UPLINKS, NPUS_PER_NODE, NUM_SUBPLANES

MOE_LAYERS = 58


def node_to_l2_load(scenario: Scenario, outcome: Outcome) -> list[list[float]]:
    """Mean share of capacity in use on each L1 chip's uplinks: `[sub-plane][node]`.

    Counts the bytes that leave each node: dispatch and combine of every token that an instance computed, the
    part of it that crosses nodes, and blocks between NPUs and the pool's CPUs, which are spread over all
    nodes. Dead lanes carry nothing and leave their load to the chip's others.
    """
    topology = scenario.topology
    bytes_out = [0.0] * topology.num_nodes
    per_token = TOP_K * (DISPATCH_BYTES + COMBINE_BYTES) * MOE_LAYERS
    # A step of MTP computes two rows for the tokens that it yields.
    rows_per_token = 2 / (1 + scenario.mtp_acceptance) if scenario.mtp else 1.0
    for unit in outcome.units:
        moved = unit.prefilled_tokens * crossing_share(scenario.prefill_ep)
        moved += unit.decoded_tokens * rows_per_token * crossing_share(scenario.decode_ep)
        for npu in unit.npus:
            bytes_out[npu // NPUS_PER_NODE] += moved * per_token / len(unit.npus)
    remote = 1 - 1 / topology.num_nodes
    published_tokens = sum(unit.prefilled_tokens for unit in outcome.units)
    pool_bytes = outcome.loaded_bytes + published_tokens * r1.KV_BYTES_PER_TOKEN
    if scenario.handover_plane == "ub":
        pool_bytes += outcome.handed_over_bytes
    for node in range(topology.num_nodes):
        bytes_out[node] += pool_bytes * remote / topology.num_nodes
    alive = _alive_lanes(scenario)
    span_s = max(outcome.now, 1e-9)
    load = []
    for k in range(NUM_SUBPLANES):
        row = []
        for node in range(topology.num_nodes):
            lanes = alive[node][k]
            part = bytes_out[node] * (1 if lanes else 0) / max(1, sum(1 for n in alive[node] if n))
            row.append(part / span_s / (lanes * UB_LANE.value) if lanes else 0.0)
        load.append(row)
    return load


def _alive_lanes(scenario: Scenario) -> list[list[int]]:
    topology = scenario.topology
    lanes = [[0] * NUM_SUBPLANES for _ in range(topology.num_nodes)]
    for link, rate in topology.capacity.items():
        start, end = link.split(">")
        if start.startswith("l1:") and end.startswith("l2:"):
            node, k = map(int, start[3:].split("."))
            lanes[node][k] += round(rate / UB_LANE.value)
    assert all(n <= L1_UPLINKS for row in lanes for n in row)
    return lanes
