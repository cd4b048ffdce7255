"""Conditional VAE."""

from __future__ import annotations

from typing import Any, Literal

from anndata import AnnData
from mudata import MuData

from scvi_cradle import presets
from scvi_cradle.model._effects import EffectsMixin
from scvi_cradle.model._setup import SetupMixin
from scvi_cradle.model._training import TrainingMixin
from scvi_cradle.module import ConditionalVAEModule


class ConditionalVAE(SetupMixin, TrainingMixin, EffectsMixin):
    """Conditional VAE: encoder and decoder take the treatments as they are (baseline of SAMS-VAE, sec. 4).

    Arguments that are not given take the value of the preset; the value in brackets is that of the recommended settings.

    Parameters
    ----------
    adata
        AnnData (or MuData) registered with :meth:`setup_anndata` (:meth:`setup_mudata`).
    registry
        Registry to build the model from without data.
    preset
        ``"recommended"`` (default) or ``"paper"``: the published settings.
    n_latent
        Width of the latent state [50].
    n_hidden, n_layers_encoder, n_layers_decoder
        Networks [128, 1, 1].
    likelihood
        ``"nb"`` (recommended) or ``"poisson"``.
    n_particles
        Draws of the latent state per cell [1].
    kl
        ``"analytic"`` (recommended) or ``"sampled"`` divergence.
    output_bias
        Start the output bias at the ``"data"``'s log mean gene shares (recommended) or at ``"random"``.

    Raises
    ------
    ValueError
        For an argument that cannot be.

    Examples
    --------
    >>> adata = cradle.datasets.simulate_perturbseq()
    >>> cradle.ConditionalVAE.setup_anndata(adata, perturbation_key="perturbation")
    >>> model = cradle.ConditionalVAE(adata)
    >>> model.train(split_key="split")
    >>> model.evaluate()
    """

    _module_cls = ConditionalVAEModule

    def __init__(
        self,
        adata: AnnData | MuData | None = None,
        registry: dict[str, Any] | None = None,
        *,
        preset: Literal["recommended", "paper"] | None = None,
        n_latent: int | None = None,
        n_hidden: int | None = None,
        n_layers_encoder: int | None = None,
        n_layers_decoder: int | None = None,
        likelihood: Literal["nb", "poisson"] | None = None,
        n_particles: int | None = None,
        kl: str | None = None,
        output_bias: str | None = None,
    ) -> None:
        given = dict(locals())
        self._architecture, self._training_settings = presets.resolve("ConditionalVAE", preset, given)
        presets.check(self._architecture, likelihood=("nb", "poisson"))
        super().__init__(adata, registry)
        self._build_module(**{k: v for k, v in self._architecture.items() if k != "output_bias"})
        self.init_params_ = self._get_init_params(locals())
