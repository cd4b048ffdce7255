"""QuantileHurdleAE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from anndata import AnnData
from mudata import MuData
from scvi import REGISTRY_KEYS

from scvi_cradle import presets
from scvi_cradle._loop_settings import FULL_HEAD_GENES, QUANTILE_RANK
from scvi_cradle._validation import check_one_of, check_positive
from scvi_cradle.data import holds_counts
from scvi_cradle.model._null import NullMixin
from scvi_cradle.model._setup import SetupMixin
from scvi_cradle.module import QuantileHurdleModule


class QuantileHurdleAE(SetupMixin, NullMixin):
    r"""Quantile-hurdle autoencoder with perturbation probabilities (Hugi, Tanna, Platt, Rätsch).

    A cell is encoded without noise; the decoder predicts for every gene the probability that it is expressed and
    quantiles of its expressed values. :meth:`fit_perturbation_loop` trains it in turns with classifiers that tell
    perturbed from unperturbed cells among those that carry a guide, and with tests that put weight on affected genes.

    Arguments that are not given take the value of the preset; the value in brackets is that of the recommended settings.

    Parameters
    ----------
    adata
        AnnData (or MuData) registered with :meth:`setup_anndata` (:meth:`setup_mudata`): normalised values that are not
        negative, as from :func:`scanpy.pp.log1p`; guide counts sharpen the first round (``guide_counts_key``).
    registry
        Registry to build the model from without data.
    preset
        ``"recommended"`` (default); ``"paper"`` (or ``"published"``): the published settings, also of the loop.
    n_latent, n_hidden, n_layers
        Width of the latent space [50], width and number of hidden layers of encoder and decoder [512, 2].
    quantiles
        Increasing levels in (0, 1) [44 from 0.001 to 0.999, evenly spaced].
    quantile_rank
        Rank of the quantile head; 0: full. Recommended: full up to 1,000 genes, else 64.
    hurdle_weight, latent_l2
        Weights of the hurdle loss [0.5] and of the squared latent norm [1e-5] (eq. 5).
    quant_normalization
        ``"all"`` (eq. 4): the quantile loss is a mean over all entries, zeros with loss 0; ``"positive"`` (eq. 2): over
        expressed entries.
    magnitude_transform
        None: quantiles of the values as they are; ``"log1p"``: of their log(1 + x).
    monotone
        ``"cumsum"``: quantiles cannot cross; ``"sort"``; ``"penalty"``.
    reconstruction
        ``"quantile-hurdle"``, or ``"mse"``: an autoencoder of the same size with squared errors, for comparison.

    Raises
    ------
    ValueError
        For an argument that cannot be, and for raw counts.

    Examples
    --------
    >>> adata = cradle.datasets.simulate_perturbseq()
    >>> sc.pp.normalize_total(adata, target_sum=1e4)
    >>> sc.pp.log1p(adata)
    >>> cradle.QuantileHurdleAE.setup_anndata(
    ...     adata, perturbation_key="perturbation", guide_counts_key="guide_counts", guide_targets="guide_targets"
    ... )
    >>> model = cradle.QuantileHurdleAE(adata)
    >>> model.fit_perturbation_loop()
    >>> model.get_perturbation_probability()
    >>> model.get_affected_genes()
    """

    _module_cls = QuantileHurdleModule
    _count_only = False
    _non_negative = True
    _unused_keys = (
        *("artifact_key", "artifact_keys"),
        *("batch_key", "categorical_covariate_keys", "continuous_covariate_keys"),
    )

    def __init__(
        self,
        adata: AnnData | MuData | None = None,
        registry: dict[str, Any] | None = None,
        *,
        preset: Literal["recommended", "paper", "published"] | None = None,
        n_latent: int | None = None,
        n_hidden: int | None = None,
        n_layers: int | None = None,
        quantiles: Sequence[float] | None = None,
        quantile_rank: int | None = None,
        hurdle_weight: float | None = None,
        latent_l2: float | None = None,
        quant_normalization: Literal["all", "positive"] | None = None,
        magnitude_transform: Literal["log1p"] | None = None,
        monotone: Literal["cumsum", "sort", "penalty"] | None = None,
        reconstruction: Literal["quantile-hurdle", "mse"] | None = None,
    ) -> None:
        given = dict(locals())
        self._architecture, self._training_settings = presets.resolve("QuantileHurdleAE", preset, given)
        self._preset = "published" if preset in ("paper", "published") else "recommended"
        _check(self._architecture)
        super().__init__(adata, registry)
        if holds_counts(self._state(REGISTRY_KEYS.X_KEY)):
            msg = "QuantileHurdleAE needs normalised values; the registered data are raw counts: call `scanpy.pp.normalize_total(adata, target_sum=1e4)` and `scanpy.pp.log1p(adata)`, or register the layer with such values."
            raise ValueError(msg)
        self._build()
        self.init_params_ = self._get_init_params(locals())

    def _build(self) -> None:
        """Build the module, untrained."""
        settings = dict(self._architecture)
        rank = settings["quantile_rank"]
        if rank is None:
            rank = QUANTILE_RANK if len(self._genes) > FULL_HEAD_GENES else 0
        settings["quantile_rank"] = rank or None
        self._build_module(**settings)
        self.module.optimizer_state = None
        self.moves_ = None
        self.loop_ = self.screening_ = self.loop_history_ = self.separation_ = None


def _check(settings: dict[str, Any]) -> None:
    for name in ("n_latent", "n_hidden", "n_layers"):
        check_positive(name, settings[name], integer=True)
    for name in ("hurdle_weight", "latent_l2"):
        check_positive(name, settings[name], allow_zero=True)
    if settings["quantile_rank"] is not None:
        check_positive("quantile_rank", settings["quantile_rank"], integer=True, allow_zero=True)
    check_one_of("quant_normalization", settings["quant_normalization"], ("all", "positive"))
    check_one_of("magnitude_transform", settings["magnitude_transform"], (None, "log1p"))
    check_one_of("monotone", settings["monotone"], ("cumsum", "sort", "penalty"))
    check_one_of("reconstruction", settings["reconstruction"], ("quantile-hurdle", "mse"))
    try:
        levels = np.asarray(settings["quantiles"], dtype=np.float64)
    except (TypeError, ValueError):
        levels = np.zeros(0)
    if (
        levels.ndim != 1
        or len(levels) < 2
        or not (levels > 0).all()
        or not (levels < 1).all()
        or (np.diff(levels) <= 0).any()
    ):
        msg = (
            f"`quantiles` must be at least two increasing numbers between 0 and 1; received {settings['quantiles']!r}."
        )
        raise ValueError(msg)
    settings["quantiles"] = tuple(float(level) for level in levels)
