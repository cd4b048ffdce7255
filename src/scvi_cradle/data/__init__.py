"""From AnnData to tensors: fields, checks at set-up, splits, and what is learnt from training cells outside training."""

from scvi_cradle.data._annbatch import can_read
from scvi_cradle.data._blocks import BlockLoader, StoredSplitter
from scvi_cradle.data._collected import CollectedCells
from scvi_cradle.data._device import DeviceDataSplitter
from scvi_cradle.data._fields import (
    ArtifactField,
    DosageField,
    PerturbationField,
    holds_counts,
    label_rule,
    label_table,
)
from scvi_cradle.data._guides import guide_counts, non_targeting_counts
from scvi_cradle.data._paired import PairedSplitter
from scvi_cradle.data._partners import check_pairing, find_partners
from scvi_cradle.data._quantiles import empirical_quantiles
from scvi_cradle.data._queries import check_query, expression_of
from scvi_cradle.data._setup import SetupArguments, build_manager, check_arguments, check_values
from scvi_cradle.data._splits import split_indices
from scvi_cradle.data._statistics import TrainingStatistics, pool_of_cells, training_statistics
from scvi_cradle.data._stored import StoredManager, StoredMatrix, stored_matrix
from scvi_cradle.data._weighted import WeightedSplitter

__all__ = [
    "ArtifactField",
    "BlockLoader",
    "CollectedCells",
    "DeviceDataSplitter",
    "DosageField",
    "PairedSplitter",
    "PerturbationField",
    "SetupArguments",
    "StoredManager",
    "StoredMatrix",
    "StoredSplitter",
    "TrainingStatistics",
    "WeightedSplitter",
    "build_manager",
    "can_read",
    "check_arguments",
    "check_pairing",
    "check_query",
    "check_values",
    "empirical_quantiles",
    "expression_of",
    "find_partners",
    "guide_counts",
    "holds_counts",
    "label_rule",
    "label_table",
    "non_targeting_counts",
    "pool_of_cells",
    "split_indices",
    "stored_matrix",
    "training_statistics",
]
