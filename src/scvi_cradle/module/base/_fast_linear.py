"""Large products of single precision by oneDNN where torch would take MKL, which is slower on some processors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

MIN_PRODUCTS = 1 << 22  # below, the conversion of inputs and outputs costs more


class FastLinear(TorchFunctionMode):
    """Context in which large linear layers without gradient are computed by oneDNN, in full single precision.

    Weights must not change within one context. It does nothing on a GPU and where torch has no oneDNN or no MKL.
    """

    def __init__(self) -> None:
        super().__init__()
        self._available = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
        self._weights: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace :func:`torch.nn.functional.linear` where it pays."""
        if func is not linear or kwargs or not self._applies(*args[:2]):
            return func(*args, **(kwargs or {}))
        value, weight, *bias = args
        flat = value.reshape(-1, value.shape[-1]).to_mkldnn()
        result = linear(flat, self._packed(weight), *(None if b is None else self._packed(b) for b in bias))
        return result.to_dense().view(*value.shape[:-1], len(weight))

    def _applies(self, value: Tensor, weight: Tensor) -> bool:
        return (
            self._available
            and not torch.is_grad_enabled()
            and value.device.type == "cpu"
            and value.dtype == torch.float32
            and value.numel() * len(weight) >= MIN_PRODUCTS
        )

    def _packed(self, weight: Tensor) -> Tensor:
        key = (weight.data_ptr(), weight.shape, weight.stride())
        if key not in self._weights:  # the weight is kept, so that its address stays its own
            self._weights[key] = weight, weight.detach().contiguous().to_mkldnn()
        return self._weights[key][1]
