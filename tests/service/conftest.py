from collections.abc import Iterator

import pytest

from tests.service.running import Service, running


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service of one prefill and one decode worker, shared by the tests that leave it as they found it."""
    with running(tmp_path_factory.mktemp("service")) as started:
        yield started
