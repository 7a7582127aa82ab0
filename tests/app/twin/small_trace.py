"""A synthetic trace in Mooncake's format, small enough to reason about."""

import json
from pathlib import Path
from random import Random


def write_trace(path: Path, num_requests: int = 300, seed: int = 1) -> Path:
    """Conversations whose turns grow on what came before; 512-token blocks named by running numbers."""
    random = Random(seed)
    next_block = 1
    talks: list[list[int]] = []
    lines, at_ms = [], 0
    for _ in range(num_requests):
        at_ms += random.randrange(50, 600)
        if talks and random.random() < 0.5:
            talk = random.choice(talks)
        else:
            talk = [0]
            talks.append(talk)
        for _ in range(random.randrange(1, 8)):
            talk.append(next_block)
            next_block += 1
        length = (len(talk) - 1) * 512 + random.randrange(1, 513)
        row = {
            "timestamp": at_ms,
            "input_length": length,
            "output_length": random.randrange(1, 300),
            "hash_ids": talk,
        }
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")
    return path
