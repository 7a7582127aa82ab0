"""What two gateways tell each other: load, and where prompts were prefilled."""

from app.routing.local_blocks import RETELL_S, LocalBlocks
from app.routing.peers import GatewayLoad, Peers

LOAD = GatewayLoad(sequences=2, prompt_tokens=300, queued=0, workers={"prefill-0": (1, 300)})


class SharedDirectory:
    """A directory in memory."""

    def __init__(self) -> None:
        self.records: dict[str, bytes] = {}

    async def announce(self, member_id: str, record: bytes, ttl_s: float) -> None:
        self.records[member_id] = record

    async def withdraw(self, member_id: str) -> None:
        del self.records[member_id]

    async def members(self) -> dict[str, bytes]:
        return dict(self.records)


async def test_a_gateway_learns_once_what_another_prefilled_and_has_at_each_worker() -> None:
    directory = SharedDirectory()
    first, second = Peers(directory, "first"), Peers(directory, "second")
    learnt: list[tuple[str, list[bytes]]] = []
    second.learn = lambda worker, keys: learnt.append((worker, list(keys)))
    first.tell("prefill-1", [b"a", b"b"])
    for _ in range(2):  # what is announced twice is learnt once
        await first.turn(directory, LOAD)
        await second.turn(directory, LOAD)
    first.tell("prefill-0", [b"c"])
    await first.turn(directory, LOAD)
    await second.turn(directory, LOAD)
    assert learnt == [("prefill-1", [b"a", b"b"]), ("prefill-0", [b"c"])]
    assert second.at_worker("prefill-0") == (1, 300)
    assert second.at_worker("prefill-1") == (0, 0)


def test_blocks_are_told_once_in_a_while_and_the_oldest_are_forgotten() -> None:
    blocks = LocalBlocks()
    assert blocks.remember("w", [b"a", b"b"], 4, now=0.0) == [b"a", b"b"]
    assert blocks.remember("w", [b"a", b"b", b"c"], 4, now=RETELL_S - 1) == [b"c"]
    assert blocks.remember("w", [b"a", b"b"], 4, now=RETELL_S) == [b"a", b"b"]
    assert blocks.count("w", [b"a", b"b", b"c", b"d"]) == 3
    blocks.remember("w", [b"x", b"y"], 4, now=RETELL_S)
    # Room for four: c, of the oldest use, went.
    assert blocks.count("w", [b"a", b"b", b"c"]) == 2
    assert blocks.count("other", [b"a"]) == 0
