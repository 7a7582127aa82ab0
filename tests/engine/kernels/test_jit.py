"""Where compiled kernels are kept."""

from pathlib import Path

import pytest

from engine.kernels.jit import _cache_folder


def test_the_cache_follows_numba_then_cloudmatrix_then_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.delenv("CLOUDMATRIX_CACHE_DIR", raising=False)
    assert _cache_folder().parent == tmp_path / "home" / ".cache" / "cloudmatrix" / "kernels"
    monkeypatch.setenv("CLOUDMATRIX_CACHE_DIR", str(tmp_path / "ours"))
    assert _cache_folder().parent == tmp_path / "ours" / "kernels"
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "numba"))
    assert _cache_folder().parent == tmp_path / "numba"
