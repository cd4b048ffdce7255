"""CRADLE-VAE."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from mudata import MuData
from scvi import REGISTRY_KEYS

from scvi_cradle import presets
from scvi_cradle._constants import QC_UNS_KEY
from scvi_cradle.data import SetupArguments, build_manager
from scvi_cradle.model._effects import EffectsMixin
from scvi_cradle.model._training import TrainingMixin
from scvi_cradle.module import CradleVAEModule

UNUSED = ("artifact_keys", "guide_counts_key", "guide_targets", "cell_type_key")
MODEL_ONLY = ("mask_prior_prob", "mask_init_logits", "output_bias")


class CradleVAE(TrainingMixin, EffectsMixin):
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
        Width of each latent part [50].
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
        given = {k: v for k, v in locals().items() if k in presets.RECOMMENDED}
        self._architecture, self._training_settings = presets.resolve(preset, given)
        presets.check(self._architecture, mask_prior_logit)
        super().__init__(adata, registry)
        prior = self._architecture["mask_prior_prob"]
        logit = math.log(prior / (1 - prior)) if mask_prior_logit is None else float(mask_prior_logit)
        batches = self._state(REGISTRY_KEYS.BATCH_KEY)["categorical_mapping"]
        fields = self.registry_["field_registries"]
        covariates = fields.get(REGISTRY_KEYS.CAT_COVS_KEY, {}).get("state_registry", {})
        self.module = self._module_cls(
            len(self._genes),
            len(self._table.treatments),
            n_levels=(len(batches), *map(int, covariates.get("n_cats_per_key", ()))),
            n_continuous=int(self.summary_stats.get(f"n_{REGISTRY_KEYS.CONT_COVS_KEY}", 0)),
            mask_prior_logit=logit,
            mask_init_logit=self._architecture["mask_init_logits"],
            **{k: v for k, v in self._architecture.items() if k not in MODEL_ONLY},
        )
        self.module.set_labels(self._table.padded_members())
        self.label_counts_ = self.libraries_ = self.references_ = self.diagnostics_ = self.train_cells_ = None
        self.qc_record_ = stored_qc_record(self.adata, self._artifact_key)
        self._model_summary_string = (
            f"CradleVAE with {len(self._genes)} genes, {len(self._table.treatments)} treatments, "
            f"{len(self._table.labels)} labels; n_latent: {self._architecture['n_latent']}, "
            f"cf_weight: {self._architecture['cf_weight']}."
        )
        if preset == "published":
            warnings.warn(
                "preset='published' reproduces behaviour of the published code that differs from the paper: the counterfactual "
                "term is summed over cells, which collapses the basal state.",
                UserWarning,
                stacklevel=2,
            )
        self.init_params_ = self._get_init_params(locals())

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        *,
        perturbation_key: str | None = None,
        perturbation_obsm_key: str | None = None,
        control: str | Sequence[str | None] = "control",
        sep: str | None = "+",
        layer: str | None = None,
        artifact_key: str | None = None,
        artifact_keys: Sequence[str] | None = None,
        guide_counts_key: str | None = None,
        guide_targets: Any = None,
        cell_type_key: str | None = None,
        batch_key: str | None = None,
        categorical_covariate_keys: list[str] | None = None,
        continuous_covariate_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Register an AnnData; everything is checked before anything is written.

        Writes only scvi-tools' own ``_scvi_*`` columns and uuids.

        Parameters
        ----------
        adata
            Raw counts (dense, CSR, CSC, backed).
        perturbation_key
            Column of ``obs`` with labels such as ``"control"``, ``"KLF1"``, ``"KLF1+MAP2K6"``.
        perturbation_obsm_key
            Instead of labels: key of ``obsm`` with a cells x treatments matrix (0/1 or doses); a DataFrame, or an array
            with names in ``uns[f"{perturbation_obsm_key}_names"]``; all-zero rows are controls.
        control
            Label or labels of control cells; ``None`` or ``""`` among them lets missing or empty labels be controls.
        sep
            Text between the treatments of a label; ``None``: labels are never split.
        layer
            Layer with the counts. Default ``X``.
        artifact_key
            Column of ``obs`` that is True (or 1) for cells that failed QC, e.g. from :func:`scvi_cradle.pp.qc_label`.
        batch_key, categorical_covariate_keys, continuous_covariate_keys
            Columns of ``obs`` that enter the decoder.
        artifact_keys, guide_counts_key, guide_targets, cell_type_key
            Not used by this model; an error when given.

        Raises
        ------
        KeyError
            If a key is not found.
        ValueError
            For anything that must not be trained on, in one sentence with the remedy.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        arguments = SetupArguments.from_call(cls.__name__, setup_method_args["setup_args"], unused=UNUSED)
        cls.register_manager(build_manager(adata, arguments, setup_method_args, **kwargs))

    @classmethod
    def setup_mudata(
        cls,
        mdata: MuData,
        *,
        modalities: dict[str, str] | None = None,
        perturbation_key: str | None = None,
        perturbation_obsm_key: str | None = None,
        control: str | Sequence[str | None] = "control",
        sep: str | None = "+",
        layer: str | None = None,
        artifact_key: str | None = None,
        artifact_keys: Sequence[str] | None = None,
        guide_counts_key: str | None = None,
        guide_targets: Any = None,
        cell_type_key: str | None = None,
        batch_key: str | None = None,
        categorical_covariate_keys: list[str] | None = None,
        continuous_covariate_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Register a MuData; columns are looked up in the expression modality, then in the MuData itself.

        Parameters
        ----------
        mdata
            MuData with a modality of raw counts.
        modalities
            Names of the modalities. Default ``{"rna": "rna", "guide": "guide"}``; this model uses ``"rna"``.
        perturbation_key, perturbation_obsm_key, control, sep, layer, artifact_key
            As in :meth:`setup_anndata`.
        artifact_keys, guide_counts_key, guide_targets, cell_type_key
            Not used by this model; an error when given.
        batch_key, categorical_covariate_keys, continuous_covariate_keys
            As in :meth:`setup_anndata`.

        Raises
        ------
        KeyError, ValueError
            As :meth:`setup_anndata`.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        arguments = SetupArguments.from_call(
            cls.__name__, setup_method_args["setup_args"], unused=UNUSED, modality=(modalities or {}).get("rna", "rna")
        )
        cls.register_manager(build_manager(mdata, arguments, setup_method_args, **kwargs))

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


def stored_qc_record(data: AnnData | MuData | None, artifact_key: str | None) -> dict[str, Any] | None:
    """Return a copy of the thresholds that :func:`scvi_cradle.pp.qc_label` stored for this flag, if any."""
    if data is None or artifact_key is None:
        return None
    sources = [data, *(data.mod.values() if isinstance(data, MuData) else ())]
    records = [s.uns[QC_UNS_KEY] for s in sources if QC_UNS_KEY in s.uns]
    return copy.deepcopy(dict(records[0])) if records and records[0].get("key_added") == artifact_key else None
