"""MatrixResource, the placement half (pure): which place on the virtual supernode a worker holds.

The areas follow the deployment that the CloudMatrix-Infer paper evaluates (arXiv 2506.12708v3, section 5.1): six
prefill instances of 16 NPUs on nodes 0-11, one decode instance of 160 NPUs on nodes 12-31. The 16 nodes which that
deployment leaves free take the workers that do both.
"""

from engine.protocol import Location, Role

NPUS_PER_NODE = 8
DIES_PER_NPU = 2

_AREAS: dict[Role, range] = {"prefill": range(12), "decode": range(12, 32), "both": range(32, 48)}


def capacity(role: Role) -> int:
    """How many workers of `role` the supernode has room for: one a die."""
    return len(_AREAS[role]) * NPUS_PER_NODE * DIES_PER_NPU


def place(role: Role, index: int) -> Location:
    """The place of the `index`-th worker of `role`, spread over nodes first, then NPUs, then dies.

    Spreading over nodes first gives each worker the UB links of a node to itself for as long as possible.
    Raises ValueError when the area of that role is full.
    """
    nodes = _AREAS[role]
    if not 0 <= index < capacity(role):
        raise ValueError(
            f"{role} worker {index}: the supernode has room for {capacity(role)} {role} workers (one a die)"
        )
    npu_round, node = divmod(index, len(nodes))
    die, npu = divmod(npu_round, NPUS_PER_NODE)
    return Location(node=nodes[node], npu=npu, die=die)
