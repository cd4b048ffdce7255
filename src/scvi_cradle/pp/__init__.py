"""Preparation of data: quality-control labels, what they go with, and splits of perturbations."""

from scvi_cradle.pp._qc_label import qc_label
from scvi_cradle.pp._qc_report import qc_report
from scvi_cradle.pp._splits import split_perturbations

__all__ = ["qc_label", "qc_report", "split_perturbations"]
