"""Cells that stay on disk: screens larger than memory, for training and for queries."""

from scvi_cradle.dataloaders._labelled import LabelledDataModule
from scvi_cradle.dataloaders._screen import ScreenDataModule

__all__ = ["LabelledDataModule", "ScreenDataModule"]
