"""CPA-VAE."""

from __future__ import annotations

from typing import Any, Literal

from anndata import AnnData
from mudata import MuData

from scvi_cradle import presets
from scvi_cradle.model._effects import EffectsMixin
from scvi_cradle.model._setup import SetupMixin
from scvi_cradle.model._training import TrainingMixin
from scvi_cradle.module import SAMSVAEModule

MODEL_ONLY = ("output_bias", "encode_combinations")


class CPAVAE(SetupMixin, TrainingMixin, EffectsMixin):
    """CPA-VAE: additive dense effects of treatments, SAMS-VAE without masks (Bereket and Karaletsos 2023, sec. 2.4).

    Arguments that are not given take the value of the preset; the value in brackets is that of the recommended settings.

    Parameters
    ----------
    adata
        AnnData (or MuData) registered with :meth:`setup_anndata` (:meth:`setup_mudata`).
    registry
        Registry to build the model from without data.
    preset
        ``"recommended"`` (default): what was measured to work; ``"paper"``: the published settings.
    n_latent
        Width of each latent part [the square root of treatments times genes, at least 50 and at most 800].
    n_hidden, n_layers_encoder, n_layers_decoder
        Networks [128, 1, 1].
    embedding_prior_scale
        Prior standard deviation of treatment embeddings [1].
    posterior
        ``"correlated_basal"`` (recommended): the encoder of the basal state sees the effects; ``"mean_field"``: it does
        not.
    embedding_init_scale
        Start of the standard deviation of ``q(e)`` [0.1].
    likelihood
        ``"nb"`` (recommended) or ``"poisson"``.
    combine, effect_path, draws, n_particles, kl, encode_combinations, output_bias
        As in :class:`SAMSVAE`.

    Raises
    ------
    ValueError
        For an argument that cannot be.

    Examples
    --------
    >>> adata = cradle.datasets.simulate_perturbseq()
    >>> cradle.CPAVAE.setup_anndata(adata, perturbation_key="perturbation")
    >>> model = cradle.CPAVAE(adata)
    >>> model.train(split_key="split")
    >>> model.evaluate()
    """

    _module_cls = SAMSVAEModule

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
        embedding_prior_scale: float | None = None,
        posterior: Literal["correlated_basal", "mean_field"] | None = None,
        embedding_init_scale: float | None = None,
        likelihood: Literal["nb", "poisson"] | None = None,
        combine: str | None = None,
        effect_path: str | None = None,
        draws: str | None = None,
        n_particles: int | None = None,
        kl: str | None = None,
        encode_combinations: str | None = None,
        output_bias: str | None = None,
    ) -> None:
        given = dict(locals())
        self._architecture, self._training_settings = presets.resolve("CPAVAE", preset, given)
        presets.check(self._architecture, posterior=("correlated_basal", "mean_field"), likelihood=("nb", "poisson"))
        super().__init__(adata, registry)
        self._build_module(mask_prior="none", **{k: v for k, v in self._architecture.items() if k not in MODEL_ONLY})
        self.init_params_ = self._get_init_params(locals())
