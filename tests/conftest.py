"""Fixtures of all tests; seeds and thread counts stay as the caller set them (`make test` sets them to 1)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data_folder() -> Path:
    """Folder of real data: ``SCVI_CRADLE_DATA``, else ``../shared/data`` beside the checkout."""
    return Path(os.environ.get("SCVI_CRADLE_DATA") or CHECKOUT.parent / "shared" / "data")


@pytest.fixture(scope="session")
def papalexi_path(real_data_folder: Path) -> Path:
    """Path of ``papalexi.h5ad``; the test is skipped where the file is absent."""
    path = real_data_folder / "papalexi.h5ad"
    if not path.is_file():
        pytest.skip(f"no papalexi.h5ad in {real_data_folder}: name its folder with SCVI_CRADLE_DATA")
    return path
