"""sVAE+."""

from __future__ import annotations

from typing import Any, Literal

from anndata import AnnData
from mudata import MuData

from scvi_cradle import presets
from scvi_cradle.model._effects import EffectsMixin
from scvi_cradle.model._setup import SetupMixin
from scvi_cradle.model._training import TrainingMixin
from scvi_cradle.model._transfer import TransferMixin
from scvi_cradle.module import SVAEPlusModule

MODEL_ONLY = ("mask_init_logits", "output_bias", "encode_combinations")


class SVAEPlus(SetupMixin, TransferMixin, TrainingMixin, EffectsMixin):
    """sVAE+: interventions shift the mean of sparse latent dimensions (Lopez et al. 2023).

    As published, every combination is an intervention of its own: one without cells cannot be predicted, unless
    ``encode_combinations="additive"`` adds up the shifts of its treatments. Arguments that are not given take the value of
    the preset; the value in brackets is that of the recommended settings.

    Parameters
    ----------
    adata
        AnnData (or MuData) registered with :meth:`setup_anndata` (:meth:`setup_mudata`).
    registry
        Registry to build the model from without data.
    preset
        ``"recommended"`` (default), or ``"paper"``: the settings of the comparison with SAMS-VAE.
    variant
        ``"sams"`` (recommended): as compared with SAMS-VAE (Bereket and Karaletsos 2023); ``"lopez"``: the original, with
        batch normalisation, dropout, masks that start open, a new mask for every cell and a KL warm-up over 50 epochs.
    n_latent
        Width of the latent state [50].
    n_hidden, n_layers_encoder, n_layers_decoder
        Networks [128, 1, 1; two layers each for ``"lopez"``].
    mask_beta
        ``(1, K)`` of the Beta prior of mask probabilities; a greater ``K`` makes masks sparser [(1, 2)].
    mask_init_logits, gs_temperature
        Start of the mask posterior [0; 5 for ``"lopez"``] and temperature of its relaxed draws [1].
    embedding_init_scale
        Standard deviation of the random start of the shifts [0.1; 1 for ``"lopez"``].
    likelihood
        ``"nb"`` (recommended) or ``"poisson"``.
    draws, n_particles
        One mask per ``"cell"`` (recommended) or per ``"batch"``, and the particles [1].
    kl
        ``"analytic"`` (recommended) or ``"sampled"`` divergence of the latent state.
    encode_combinations
        ``"unique"`` (recommended): a combination has a mask and a shift of its own; ``"additive"``: the mean of its latent
        state is the sum of the masked shifts of its treatments, so that unseen combinations can be predicted.
    output_bias
        Start the output bias at the ``"data"``'s log mean gene shares (recommended) or at ``"random"``.

    Raises
    ------
    ValueError
        For an argument that cannot be, and for dosages instead of labels unless combinations are additive.

    Examples
    --------
    >>> adata = cradle.datasets.simulate_perturbseq(n_combinations=0)
    >>> cradle.SVAEPlus.setup_anndata(adata, perturbation_key="perturbation")
    >>> model = cradle.SVAEPlus(adata)
    >>> model.train()
    >>> model.get_perturbation_effects().layers["mask_prob"]
    """

    _module_cls = SVAEPlusModule

    def __init__(
        self,
        adata: AnnData | MuData | None = None,
        registry: dict[str, Any] | None = None,
        *,
        preset: Literal["recommended", "paper"] | None = None,
        variant: Literal["sams", "lopez"] | None = None,
        n_latent: int | None = None,
        n_hidden: int | None = None,
        n_layers_encoder: int | None = None,
        n_layers_decoder: int | None = None,
        mask_beta: tuple[float, float] | None = None,
        mask_init_logits: float | None = None,
        gs_temperature: float | None = None,
        embedding_init_scale: float | None = None,
        likelihood: Literal["nb", "poisson"] | None = None,
        draws: str | None = None,
        n_particles: int | None = None,
        kl: str | None = None,
        encode_combinations: str | None = None,
        output_bias: str | None = None,
    ) -> None:
        given = dict(locals())
        if variant == "lopez":
            given = {k: v if v is not None else presets.LOPEZ.get(k) for k, v in given.items()}
        self._architecture, self._training_settings = presets.resolve("SVAEPlus", preset, given)
        self._training_settings |= presets.TRAINING_LOPEZ if variant == "lopez" else {}
        presets.check(self._architecture, likelihood=("nb", "poisson"))
        super().__init__(adata, registry)
        self._build_module(
            mask_init_logit=self._architecture["mask_init_logits"],
            **{k: v for k, v in self._architecture.items() if k not in MODEL_ONLY},
        )
        self.init_params_ = self._get_init_params(locals())
