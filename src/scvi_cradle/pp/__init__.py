"""Preparation of data: quality-control labels, what they go with, evidence of guide counts, and splits."""

from scvi_cradle.pp._guide_prior import guide_prior, rank_to_z
from scvi_cradle.pp._qc_label import qc_label
from scvi_cradle.pp._qc_report import qc_report
from scvi_cradle.pp._splits import split_perturbations

__all__ = ["guide_prior", "qc_label", "qc_report", "rank_to_z", "split_perturbations"]
