"""From AnnData to tensors: fields, checks at set-up, splits, and what is learnt from training cells outside training."""

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
from scvi_cradle.data._partners import PairedSplitter, check_pairing, find_partners
from scvi_cradle.data._quantiles import empirical_quantiles
from scvi_cradle.data._queries import check_query, expression_of
from scvi_cradle.data._setup import SetupArguments, build_manager
from scvi_cradle.data._splits import split_indices
from scvi_cradle.data._statistics import TrainingStatistics, pool_of_cells, training_statistics
from scvi_cradle.data._weighted import WeightedSplitter

__all__ = [
    "ArtifactField",
    "DeviceDataSplitter",
    "DosageField",
    "PairedSplitter",
    "PerturbationField",
    "SetupArguments",
    "TrainingStatistics",
    "WeightedSplitter",
    "build_manager",
    "check_pairing",
    "check_query",
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
    "training_statistics",
]
