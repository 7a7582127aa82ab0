"""Whether a 64-bit ARM processor has the dot product of four bytes is asked of the kernel, not of LLVM."""

import platform
from types import SimpleNamespace

import pytest

from engine.kernels import arm, available
from engine.kernels.arm import HWCAP_ASIMDDP


def host(patch: pytest.MonkeyPatch, machine: str, system: str, capabilities: int) -> None:
    patch.setattr(platform, "machine", lambda: machine)
    patch.setattr(platform, "system", lambda: system)
    patch.setattr(arm, "hardware_capabilities", lambda: capabilities)


@pytest.mark.parametrize(
    ("machine", "system", "capabilities", "paths"),
    [
        ("aarch64", "Linux", HWCAP_ASIMDDP | 0xFF, ("dotprod", "portable")),
        ("aarch64", "Linux", 0xFF, ("portable",)),
        ("arm64", "Darwin", 0, ("dotprod", "portable")),
        ("riscv64", "Linux", HWCAP_ASIMDDP, ("portable",)),
    ],
)
def test_the_path_is_there_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch, machine: str, system: str, capabilities: int, paths: tuple[str, ...]
) -> None:
    host(monkeypatch, machine, system, capabilities)
    assert available() == paths


def test_numba_is_told_beside_what_it_knows_or_its_user_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    host(monkeypatch, "aarch64", "Linux", HWCAP_ASIMDDP)
    for asked, host_features, told in (
        (None, "+neon,-sve", "+neon,-sve,+dotprod"),
        ("", "+neon,-sve", "+dotprod"),
        ("+neon", "+sve", "+neon,+dotprod"),
        (None, "", "+dotprod"),
    ):
        config = SimpleNamespace(CPU_FEATURES=asked)
        arm.announce(config, host_features)
        assert vars(config) == {"CPU_FEATURES": told}


def test_numba_is_told_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(CPU_FEATURES=None)
    host(monkeypatch, "aarch64", "Linux", 0xFF)
    arm.announce(config, "+neon")
    host(monkeypatch, "x86_64", "Linux", HWCAP_ASIMDDP)
    arm.announce(config, "+avx2")
    assert config.CPU_FEATURES is None


@pytest.mark.skipif(platform.system() != "Linux", reason="getauxval is Linux's")
def test_the_kernel_says_what_the_processor_can_do() -> None:
    assert arm.hardware_capabilities() != 0
