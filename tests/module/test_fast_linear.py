"""Linear layers by oneDNN: the same values, and only where nothing is learnt."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scvi_cradle.module.base import FastLinear


@pytest.mark.parametrize("bias", [True, False])
def test_large_products_are_those_of_torch(bias):
    torch.manual_seed(0)
    layer, value = nn.Linear(120, 300, bias=bias), torch.randn(20, 4, 120)
    expected = layer.double()(value.double()).float()
    layer.float()
    with torch.inference_mode(), FastLinear():
        result = layer(value)
        sliced = torch.nn.functional.linear(value[..., :50], layer.weight[:, :50])
        assert layer(value[:0]).shape == (0, 4, 300)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sliced, value[..., :50] @ layer.weight[:, :50].T, atol=1e-5, rtol=1e-5)


def test_gradients_are_kept():
    layer, value = nn.Linear(400, 400), torch.randn(64, 400)
    with FastLinear():
        layer(value).sum().backward()
    torch.testing.assert_close(layer.weight.grad[0], value.sum(0), atol=1e-4, rtol=1e-4)


def test_strided_biases_vectors_and_autocast():
    torch.manual_seed(0)
    value, weight, bias = torch.randn(64, 300), torch.randn(200, 300), torch.randn(400)[::2]
    linear = torch.nn.functional.linear
    with torch.inference_mode():
        expected = linear(value, weight, bias)
        with FastLinear():
            torch.testing.assert_close(linear(value, weight, bias), expected, atol=1e-4, rtol=1e-4)
            assert linear(torch.randn(1200, 1200), torch.randn(1200)).shape == (1200,)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert linear(value, weight).dtype == torch.bfloat16
