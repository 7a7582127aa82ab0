"""The secret under which keys are hashed: from the settings, or a file in the data folder that only its owner reads."""

import hashlib
import os
import secrets
from pathlib import Path

NUM_BYTES = 32


def load_pepper(configured: str | None, data_dir: Path) -> bytes:
    """The pepper; the file is made at the first use. Several processes may come here at once."""
    if configured is not None:
        return configured.encode()
    path = data_dir / "key_pepper"
    if not path.exists():
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = path.with_name(f"key_pepper.{secrets.token_hex(4)}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_hex(NUM_BYTES).encode())
        try:
            os.link(
                temporary, path
            )  # unlike a rename, does not replace what another process was first to make
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    return path.read_bytes().strip()


def fingerprint_of(pepper: bytes) -> str:
    """What the database remembers of the pepper: enough to notice another one, useless for anything else."""
    return hashlib.sha256(b"cloudmatrix-pepper-fingerprint" + pepper).hexdigest()[:32]
