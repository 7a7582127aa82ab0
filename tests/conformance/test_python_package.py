"""The unmodified `openai` package of this environment against the running service."""

import pytest

from tests.conformance.cases import CASES, Access


@pytest.mark.parametrize("name", CASES)
def test_case(access: Access, name: str) -> None:
    CASES[name](access)
