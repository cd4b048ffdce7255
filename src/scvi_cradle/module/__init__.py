"""Modules of the models (torch), on scvi-tools' :class:`~scvi.module.base.BaseModuleClass`."""

from scvi_cradle.module._cradlevae import CradleVAEModule

__all__ = ["CradleVAEModule"]
