"""Cells that stay on disk: screens larger than memory, for training and for queries."""

from scvi_cradle.dataloaders._screen import ScreenDataModule

__all__ = ["ScreenDataModule"]
