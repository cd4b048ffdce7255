"""The state of the perturbation-probability loop on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

NAME = "loop.pt"


def write_checkpoint(folder: str | Path, identity: dict[str, Any], loop: dict[str, Any], module: Any) -> None:
    """Write the state of the loop and of the module; an interrupted write leaves the old file."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    content = {
        "identity": identity,
        "loop": _as_tensors(loop),
        "module": module.state_dict(),
        "optimizer": module.optimizer_state,
    }
    torch.save(content, path / f"{NAME}.new")
    (path / f"{NAME}.new").replace(path / NAME)


def read_checkpoint(folder: str | Path, identity: dict[str, Any], device: torch.device) -> dict[str, Any] | None:
    """Return what :func:`write_checkpoint` has written, None if there is nothing; no code of the file is run.

    Raises
    ------
    ValueError
        If it is of other data, settings (but for the number of rounds) or another seed.
    """
    path = Path(folder) / NAME
    if not path.is_file():
        return None
    content = torch.load(path, map_location=device, weights_only=True)
    ours, theirs = ({**i, "settings": {**i["settings"], "n_outer": None}} for i in (identity, content["identity"]))
    differs = [name for name in ours if ours[name] != theirs.get(name)]
    if differs:
        msg = f"The checkpoint in {str(folder)!r} must be of the same data, settings and seed; received other {' and '.join(differs)}: name another folder."
        raise ValueError(msg)
    return content | {"loop": _as_arrays(content["loop"])}


def _as_tensors(value: Any) -> Any:
    """Return nested arrays as tensors, which load without running code."""
    if isinstance(value, np.ndarray):
        return torch.as_tensor(value)
    if isinstance(value, dict):
        return {str(k): _as_tensors(v) for k, v in value.items()}
    return [_as_tensors(v) for v in value] if isinstance(value, list) else value


def _as_arrays(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.cpu().numpy()
    if isinstance(value, dict):
        return {k: _as_arrays(v) for k, v in value.items()}
    return [_as_arrays(v) for v in value] if isinstance(value, list) else value
