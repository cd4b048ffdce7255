"""Recorded noise, for modules that are compared with equations in numpy."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def tape(monkeypatch):
    """Values that torch draws, uniform and normal, in order; everything in double precision."""
    values, generator = [], torch.Generator().manual_seed(11)
    randn, rand = torch.randn, torch.rand

    def recorder(draw):
        def wrapped(shape, **_):
            values.append(draw(shape, generator=generator, dtype=torch.float64))
            return values[-1]

        return wrapped

    monkeypatch.setattr(torch, "randn", recorder(randn))
    monkeypatch.setattr(torch, "rand", recorder(rand))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield values
    torch.set_default_dtype(default)
