"""Large products of single precision by oneDNN where torch would take MKL, which is slower on some processors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

MIN_PRODUCTS = 1 << 20  # below, there is little to gain


class FastLinear(TorchFunctionMode):
    """Context in which large linear layers without gradient are computed by oneDNN, in full single precision.

    It does nothing on a GPU, nor where torch has no oneDNN or no MKL.
    """

    def __init__(self) -> None:
        super().__init__()
        has_both = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
        self._product = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if has_both else None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace :func:`torch.nn.functional.linear` where it pays."""
        if func is not linear or kwargs or self._product is None or not _pays(*args[:2]):
            return func(*args, **(kwargs or {}))
        value, weight, bias = (*args, None)[:3]
        return self._product(value, weight.contiguous(), None if bias is None else bias.contiguous(), "none", [], "")


def _pays(value: Tensor, weight: Tensor) -> bool:
    single = value.device.type == "cpu" and value.dtype == weight.dtype == torch.float32 and weight.dim() == 2
    allowed = torch.backends.mkldnn.enabled and not torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
    return bool(single and allowed and value.numel() * len(weight) >= MIN_PRODUCTS)
