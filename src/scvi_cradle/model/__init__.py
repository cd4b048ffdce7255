"""Models: the classes that users work with."""

from scvi_cradle.model._cradlevae import CradleVAE

__all__ = ["CradleVAE"]
