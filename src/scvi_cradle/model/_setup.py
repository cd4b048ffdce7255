"""Registration of data: one signature for all models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anndata import AnnData
from mudata import MuData

from scvi_cradle.data import SetupArguments, build_manager
from scvi_cradle.model._base import warn
from scvi_cradle.model._screens import ScreenModel


class SetupMixin(ScreenModel):
    """``setup_anndata`` and ``setup_mudata``."""

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
            Raw counts (dense, CSR, CSC, backed); SAMSVAE also takes other finite values, for a Gaussian likelihood, and
            PerturbedVAE log-normalised values, for all likelihoods but ``"nb"``. QuantileHurdleAE: log-normalised values.
        perturbation_key
            Column of ``obs`` with labels such as ``"control"``, ``"KLF1"``, ``"KLF1+MAP2K6"``.
        perturbation_obsm_key
            Instead of labels: key of ``obsm`` with a cells x treatments matrix (0/1 or doses); a DataFrame, or an array
            with names in ``uns[f"{perturbation_obsm_key}_names"]``; all-zero rows are controls. A cell's label is its set of
            non-zero columns; wherever labels are asked for, every treatment has dose 1.
        control
            Label or labels of control cells; ``None`` or ``""`` among them lets missing or empty labels be controls.
        sep
            Text between the treatments of a label; ``None``: labels are never split.
        layer
            Layer with the counts. Default ``X``.
        artifact_key
            Column of ``obs`` that is True (or 1) for cells that failed QC, e.g. from :func:`scvi_cradle.pp.qc_label`.
            CradleVAE needs it; it is an error for models without an artifact, which can take the flag as one of the
            ``categorical_covariate_keys``.
        batch_key, categorical_covariate_keys, continuous_covariate_keys
            Columns of ``obs`` that enter the decoder.
        guide_counts_key
            QuantileHurdleAE: key of ``obsm`` with guide counts, cells x guides; a DataFrame, or an array with names in
            ``uns[f"{guide_counts_key}_names"]``.
        guide_targets
            The target of every guide: a DataFrame with the columns ``guide`` and ``target``, a mapping, or a key of ``uns``.
            Guides of ``control`` have no target.
        cell_type_key
            QuantileHurdleAE: column of ``obs``; perturbed cells are compared with controls of their type.
        artifact_keys
            Not used by these models; an error when given, as is every other argument that a model cannot use.

        Raises
        ------
        KeyError
            If a key is not found.
        ValueError
            For anything that must not be trained on, in one sentence with the remedy.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        cls._register(adata, setup_method_args, **kwargs)

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
            Names of the modalities. Default ``{"rna": "rna", "guide": "guide"}``; QuantileHurdleAE reads guide counts from
            ``"guide"`` if ``guide_targets`` but no ``guide_counts_key`` is given, the others use ``"rna"``.
        perturbation_key, perturbation_obsm_key, control, sep, layer, artifact_key
            As in :meth:`setup_anndata`.
        artifact_keys, guide_counts_key, guide_targets, cell_type_key
            As in :meth:`setup_anndata`.
        batch_key, categorical_covariate_keys, continuous_covariate_keys
            As in :meth:`setup_anndata`.

        Raises
        ------
        KeyError, ValueError
            As :meth:`setup_anndata`.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        names = {"rna": "rna", "guide": "guide"} | (modalities or {})
        cls._register(mdata, setup_method_args, modality=names["rna"], guide_modality=names["guide"], **kwargs)

    @classmethod
    def _register(cls, data: AnnData | MuData, setup_method_args: dict[str, Any], **kwargs: Any) -> None:
        modality, guide_modality = kwargs.pop("modality", None), kwargs.pop("guide_modality", None)
        arguments = SetupArguments.from_call(
            cls.__name__,
            setup_method_args["setup_args"],
            modality=modality,
            guide_modality=guide_modality,
            **cls._setup_checks(),
        )
        cls.register_manager(build_manager(data, arguments, setup_method_args, **kwargs))


def check_likelihood(likelihood: str, is_counts: bool) -> None:  # noqa: FBT001
    """Refuse a counts' likelihood for other values, and warn of any other for counts."""
    takes_counts = likelihood in ("nb", "poisson")
    if takes_counts and not is_counts:
        msg = f"`likelihood={likelihood!r}` needs raw counts; the registered data are not: register the layer with the counts, or use likelihood='gaussian'."
        raise ValueError(msg)
    if is_counts and not takes_counts:
        warn(
            f"The registered data are raw counts, and likelihood={likelihood!r} treats them as Gaussian values: "
            "use 'nb', or register normalised values."
        )
