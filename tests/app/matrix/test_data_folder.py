import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from app.matrix import data_folder
from app.matrix.data_folder import DataFolder, DataFolderError


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def test_two_services_cannot_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_folder, "STOPPING_S", 0.1)
    with DataFolder(tmp_path), pytest.raises(DataFolderError, match="--data-dir"), DataFolder(tmp_path):
        pass
    with DataFolder(tmp_path):
        pass


def test_a_service_that_is_just_stopping_is_waited_for(tmp_path: Path) -> None:
    stopping = DataFolder(tmp_path)
    stopping.__enter__()
    threading.Timer(0.2, stopping.__exit__, (None, None, None)).start()
    with DataFolder(tmp_path):
        pass


def test_a_folder_that_is_a_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(DataFolderError, match="--data-dir"), DataFolder(tmp_path / "data"):
        pass


def test_leftovers_of_a_killed_service_are_ended(
    tmp_path: Path, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_folder, "LEAVE_S", 0.1)
    folder = DataFolder(tmp_path)
    folder.logs.mkdir()
    folder.write_service({"url": "http://x"}, {"sleeper": sleeper.pid})  # and no end: as after kill -9
    with DataFolder(tmp_path):
        assert not psutil.pid_exists(sleeper.pid)
        assert not (tmp_path / "service.json").exists()


def test_a_process_that_only_took_over_the_number_is_left_alone(
    tmp_path: Path, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_folder, "LEAVE_S", 0.1)
    born_at = psutil.Process(sleeper.pid).create_time()
    noted = {"processes": [{"name": "x", "pid": sleeper.pid, "created_at": born_at - 3600}]}
    (tmp_path / "service.json").write_text(json.dumps(noted))
    with DataFolder(tmp_path):
        assert sleeper.poll() is None
