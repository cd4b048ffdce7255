"""Reading of zarr stores by annbatch, which is a dependency of Python 3.12 and later only."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import scipy.sparse as sp
import zarr
from anndata.abc import CSRDataset

from scvi_cradle.data._stored import StoredMatrix


def can_read(matrix: StoredMatrix) -> bool:
    """Return whether annbatch is installed and reads all parts of a matrix."""
    if find_spec("annbatch") is None:
        return False
    sparse = [isinstance(part, CSRDataset) and isinstance(part.group, zarr.Group) for part in matrix.parts]
    return all(sparse) or all(isinstance(part, zarr.Array) for part in matrix.parts)


def read_groups(matrix: StoredMatrix, groups: list[np.ndarray]) -> Iterator[sp.csr_matrix]:
    """Yield the rows of a matrix at each group of sorted positions."""
    from annbatch import Loader
    from annbatch.abc import Sampler

    class Groups(Sampler):
        batch_size, shuffle = None, False

        def n_batches(self, n_obs: int) -> int:
            return len(groups)

        def validate(self, n_obs: int) -> None:
            pass

        def _sample(self, n_obs: int) -> Iterator[dict[str, Any]]:
            for rows in groups:
                yield {"requests": rows, "splits": [np.arange(len(rows))]}

    loader = Loader(batch_sampler=Groups(), return_index=False).add_datasets(matrix.parts)
    for batch in loader:
        yield matrix.checked(sp.csr_matrix(batch["X"]))
