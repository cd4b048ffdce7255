"""CRADLE-VAE."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from mudata import MuData

from scvi_cradle import presets
from scvi_cradle.model._effects import EffectsMixin
from scvi_cradle.model._pass_rate import PassRateMixin
from scvi_cradle.model._setup import SetupMixin
from scvi_cradle.model._training import TrainingMixin
from scvi_cradle.module import CradleVAEModule

MODEL_ONLY = ("mask_prior_prob", "mask_init_logits", "output_bias")


class CradleVAE(SetupMixin, PassRateMixin, TrainingMixin, EffectsMixin):
    """CRADLE-VAE: perturbation effects and technical artifacts as separate latent variables (Baek et al. 2024).

    A cell's counts come from a basal state ``z_b``, sparse effects of its treatments ``z_p`` and, if the cell failed
    quality control, one global artifact vector ``z_a = u``. Cells are generated, and counterfactuals asked, with the
    artifact switched off. Arguments that are not given take the value of the preset; the value in brackets is that of
    the recommended settings.

    Parameters
    ----------
    adata
        AnnData (or MuData) registered with :meth:`setup_anndata` (:meth:`setup_mudata`).
    registry
        Registry to build the model from without data.
    preset
        ``"recommended"`` (default): what was measured to work; ``"paper"``: the published settings;
        ``"published"``: the paper's settings with the behaviour of the published code (see the user guide), which warns.
    n_latent
        Width of each latent part [the square root of treatments times genes, at least 50 and at most 800].
    n_hidden, n_layers_encoder, n_layers_decoder
        Networks [128, 1, 1].
    mask_prior_prob, mask_prior_logit
        Prior probability of a mask entry being one [0.01], or its log-odds.
    embedding_prior_scale
        Prior standard deviation of treatment embeddings and of the artifact vector [1].
    posterior
        ``"correlated_basal"`` (recommended), ``"correlated_embedding"``, ``"correlated"`` or ``"mean_field"``.
    embedding_n_layers, embedding_n_hidden
        Network of ``q(e | m)`` for the ``embedding`` posteriors [4, 400].
    embedding_init_scale, artifact_init_scale, mask_init_logits
        Start of the posteriors [0.1, 0.1, 0].
    gs_temperature
        Temperature of the relaxed Bernoulli masks [1].
    combine
        ``"concat"`` (recommended) or ``"sum"`` of the latent parts in the decoder.
    effect_path
        How ``z_p`` reaches the logits: by a ``"linear"`` map, so that effects add up on the log scale (recommended: best
        on unseen combinations), through the hidden layers of the ``"decoder"`` (published), or ``"both"``.
    artifact_latent
        ``"gaussian"`` (recommended), or ``"embedding"``: a plain vector, the ablation "w/o Causal".
    draws, n_particles
        One draw of the global variables per ``"cell"`` (recommended) or per ``"batch"``, and the particles [1].
    kl
        ``"analytic"`` (recommended) or ``"sampled"`` divergences.
    cf_weight
        Weight of the counterfactual term [0.05]; 0 is the ablation "w/o CF".
    cf_reduction
        ``"mean"`` over cells (recommended) or ``"sum"`` (published code; collapses the basal state).
    cf_direction
        ``"reference_first"``: ``KL(reference || counterfactual)`` (recommended), or ``"counterfactual_first"``.
    cf_detach_reference
        Stop the gradient through the reference [False].
    cf_resample, cf_n_samples
        Draw 50 failed cells anew for every batch and label instead of one profile per label [False, 50].
    cf_statistic
        ``"median"`` (recommended) or ``"mean"`` of the failed cells.
    share_global_samples
        Reference and counterfactual share the draws of the global variables [True].
    reconstruction_balance
        ``"none"`` (recommended), ``"batch"`` (published code) or ``"dataset"``.
    output_bias
        Start the output bias at the ``"data"``'s log mean gene shares (recommended) or at ``"random"``.

    Examples
    --------
    >>> adata = cradle.datasets.simulate_perturbseq()
    >>> cradle.pp.qc_label(adata)
    >>> cradle.CradleVAE.setup_anndata(adata, perturbation_key="perturbation", artifact_key="artifact")
    >>> model = cradle.CradleVAE(adata)
    >>> model.train(split_key="split")
    >>> cells = model.get_generated_expression(["G01+G02"], n_samples=200)
    """

    _module_cls = CradleVAEModule
    _needs_artifact = True
    _unused_keys = ("artifact_keys", "guide_counts_key", "guide_targets", "cell_type_key")

    def __init__(
        self,
        adata: AnnData | MuData | None = None,
        registry: dict[str, Any] | None = None,
        *,
        preset: Literal["recommended", "paper", "published"] | None = None,
        n_latent: int | None = None,
        n_hidden: int | None = None,
        n_layers_encoder: int | None = None,
        n_layers_decoder: int | None = None,
        mask_prior_prob: float | None = None,
        mask_prior_logit: float | None = None,
        embedding_prior_scale: float | None = None,
        posterior: str | None = None,
        embedding_n_layers: int | None = None,
        embedding_n_hidden: int | None = None,
        embedding_init_scale: float | None = None,
        artifact_init_scale: float | None = None,
        mask_init_logits: float | None = None,
        gs_temperature: float | None = None,
        combine: str | None = None,
        effect_path: str | None = None,
        artifact_latent: str | None = None,
        draws: str | None = None,
        n_particles: int | None = None,
        kl: str | None = None,
        cf_weight: float | None = None,
        cf_reduction: str | None = None,
        cf_direction: str | None = None,
        cf_detach_reference: bool | None = None,
        cf_resample: bool | None = None,
        cf_n_samples: int | None = None,
        cf_statistic: str | None = None,
        share_global_samples: bool | None = None,
        reconstruction_balance: str | None = None,
        output_bias: str | None = None,
    ) -> None:
        given = dict(locals())
        self._architecture, self._training_settings = presets.resolve("CradleVAE", preset, given)
        presets.check(self._architecture, mask_prior_logit)
        presets.check_mask_prior("bernoulli", given)
        super().__init__(adata, registry)
        self._build_module(
            mask_prior_logit=presets.prior_logit(self._architecture, mask_prior_logit),
            mask_init_logit=self._architecture["mask_init_logits"],
            **{k: v for k, v in self._architecture.items() if k not in MODEL_ONLY},
        )
        self._keep_qc_record()
        if preset == "published":
            warnings.warn(
                "preset='published' reproduces behaviour of the published code that differs from the paper: the counterfactual "
                "term is summed over cells, which collapses the basal state.",
                UserWarning,
                stacklevel=2,
            )
        self.init_params_ = self._get_init_params(locals())

    def get_counterfactual_reference(self) -> AnnData:
        """Return the reference profiles of the counterfactual term.

        Returns
        -------
        AnnData of shape ``(n_labels, n_genes)``: gene-wise median (or mean) of the counts of the failed training cells
        of every training label (CSR; zero where there are none); ``obs``: ``n_failed``, ``has_reference``.

        Raises
        ------
        RuntimeError
            If the model is not trained.
        """
        labels = sorted(label for label, n in self._trained_counts().items() if n)
        stored = self.references_ or {}
        shape = (len(stored["labels"]), len(self._genes))
        profiles = sp.csr_matrix((stored["data"], stored["indices"], stored["indptr"]), shape=shape)
        row = {label: i for i, label in enumerate(stored["labels"])}
        empty = sp.csr_matrix((1, shape[1]), dtype=np.float32)
        x = sp.vstack([profiles[row[label]] if label in row else empty for label in labels], format="csr")
        n_failed = np.array([stored["n_failed"].get(label, 0) for label in labels])
        obs = pd.DataFrame({"n_failed": n_failed, "has_reference": n_failed > 0}, index=pd.Index(labels, dtype=str))
        return AnnData(X=x, obs=obs, var=pd.DataFrame(index=self._genes))
