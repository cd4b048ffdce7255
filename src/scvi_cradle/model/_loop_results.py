"""What the perturbation-probability loop has found."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.special import expit

from scvi_cradle import metrics
from scvi_cradle._loop_settings import loop_settings
from scvi_cradle._validation import check_one_of, check_positive
from scvi_cradle.model._loop_data import LoopDataMixin

FREE_PREVALENCE = 0.5  # of cells and categories without a classifier


class LoopResultsMixin(LoopDataMixin):
    """Probabilities, genes, and tables of the loop."""

    #: State of the loop: scores, tests, settings.
    loop_: dict[str, Any] | None
    #: Categories of the last round: ``target``, ``cell_type``, ``prevalence``, ``calibrated``, ``control_score`` (mean
    #: probability of controls; of validation controls for ``scores="nnnu"``), ``gap``, ``kept``, ``n_significant`` genes.
    screening_: pd.DataFrame | None
    #: A row per round: genes selected, categories kept, mean prevalence and separation, weights, seconds.
    loop_history_: pd.DataFrame | None
    #: Separation of every label from its controls in the latent space of every round (see ``get_latent_separation``).
    separation_: pd.DataFrame | None

    def _results(self) -> dict[str, Any]:
        if getattr(self, "loop_", None) is None:
            msg = "The loop must be run first; call `model.fit_perturbation_loop()`."
            raise RuntimeError(msg)
        assert self.loop_ is not None
        return self.loop_

    def _guide_scale(self) -> float:
        loop = self._results()
        given = loop_settings("recommended", **loop["settings"])
        return given.guide_scale(loop["round"] - 1)

    def _cell_probability(self) -> np.ndarray:
        """Return the probability of labelled cells; 1 for a model that was trained without the loop."""
        screen = self._screen()
        if getattr(self, "loop_", None) is None:
            return np.ones(len(screen.row))
        return expit(self._results()["logit"] + self._guide_scale() * screen.prior)

    def get_perturbation_probability(
        self,
        *,
        evidence: Literal["loop", "expression", "guides", "both"] = "loop",
        guide_scale: float = 0.5,
    ) -> pd.DataFrame:
        r"""Return the probability that a cell is perturbed in a target whose guide it carries (eq. 8).

        Parameters
        ----------
        evidence
            ``"loop"``: as in the last round, :math:`\sigma(g + \tau u)`; ``"expression"``: :math:`\sigma(g)`, the out-of-fold
            score of the classifier; ``"guides"``: :math:`\sigma(u)`; ``"both"``: :math:`\sigma(g + \tau u)` with the
            ``guide_scale`` given here.
        guide_scale
            Weight :math:`\tau` of the guide prior for ``evidence="both"``.

        Returns
        -------
        DataFrame of the model's cells x targets with cells, values in [0, 1]: 0 where the cell's label does not name the
        target, always so for controls; 0.5 for labelled cells of the split that the loop did not use. It can serve as
        ``perturbation_obsm_key`` of the other models.

        Raises
        ------
        RuntimeError
            If the loop was not run, or the model was loaded without its data.
        """
        loop = self._results()
        check_one_of("evidence", evidence, ("loop", "expression", "guides", "both"))
        check_positive("guide_scale", guide_scale, allow_zero=True)
        self._needs_training_data("Probabilities of cells")
        screen = self._screen()
        scale = {"loop": self._guide_scale(), "expression": 0.0, "guides": 1.0, "both": guide_scale}[evidence]
        logit = np.zeros_like(loop["logit"]) if evidence == "guides" else loop["logit"]
        labels = self._observed_labels(self.adata, np.arange(self.adata.n_obs))
        members = [self._rule.treatments(label) for label in labels.categories]
        targets = sorted({t for treatments in members for t in treatments})
        values = np.array([[FREE_PREVALENCE * (t in treatments) for t in targets] for treatments in members])[
            labels.codes
        ]
        column = pd.Index(targets).get_indexer(screen.target)[screen.category]
        values[screen.row, column] = expit(logit + scale * screen.prior)
        return pd.DataFrame(values, index=self.adata.obs_names.copy(), columns=targets)

    def _set_tables(self, loop: dict[str, Any]) -> None:
        """Set ``loop_`` and the tables of it that are attributes."""
        self.loop_ = loop
        table = pd.DataFrame({"target": loop["target"], "cell_type": loop["cell_type"]})
        for name in ("prevalence", "calibrated", "control_score", "gap", "kept"):
            table[name] = loop[name]
        self.screening_ = table.assign(n_significant=loop["tests"]["significant"].sum(1))
        self.loop_history_ = pd.DataFrame(loop["history"]).set_index("round")
        self.separation_ = pd.concat([pd.DataFrame(part) for part in loop["separation"]], ignore_index=True)

    def get_gene_weights(self) -> pd.DataFrame:
        """Return the genes with their ``priority`` (1 for genes that a round has selected), ``weight`` in the objective, and ``n_categories`` in which they were significant in the last round."""
        loop = self._results()
        found = loop["tests"]["significant"] & loop["kept"][:, None]
        return pd.DataFrame(
            {
                "priority": loop["priority"],
                "weight": self.module.gene_weights.cpu().numpy(),
                "n_categories": found.sum(0),
            },
            index=pd.Index(self._genes, name="gene"),
        )

    def get_affected_genes(self, target: str | None = None, *, all_genes: bool = False) -> pd.DataFrame:
        """Return the tests of the last round, of categories that were kept (section 4.3).

        Parameters
        ----------
        target
            One target. Default: all.
        all_genes
            All genes and categories instead of those with ``padj`` at most ``fdr_level`` in categories that were kept.

        Returns
        -------
        DataFrame: ``target``, ``cell_type``, ``gene``, ``mean_difference`` (perturbed less control, on the scale of the
        data), ``statistic``, ``pvalue``, ``padj`` (Bonferroni over genes), ``n_eff`` and ``kept``, sorted by p-value within
        a category.

        Raises
        ------
        ValueError
            For an unknown target.
        """
        loop = self._results()
        tests, names = loop["tests"], np.array(loop["target"], dtype=object)
        if target is not None:
            check_one_of("target", target, sorted(set(names)))
        wanted = np.ones(len(names), dtype=bool) if target is None else names == target
        chosen = np.broadcast_to(wanted[:, None], tests["padj"].shape)
        if not all_genes:
            chosen = chosen & tests["significant"] & loop["kept"][:, None]
        category, gene = np.nonzero(chosen)
        order = np.lexsort((tests["pvalue"][category, gene], category))
        category, gene = category[order], gene[order]
        table = {
            "target": names[category],
            "cell_type": np.array(loop["cell_type"], dtype=object)[category],
            "gene": np.array(self._genes, dtype=object)[gene],
        }
        for name in ("mean_difference", "statistic", "pvalue", "padj"):
            table[name] = tests[name][category, gene]
        return pd.DataFrame(table | {"n_eff": tests["n_eff"][category], "kept": loop["kept"][category]})

    def get_latent_separation(self, *, n_draws: int = 100, seed: int = 0) -> pd.DataFrame:
        """Return how far labels are from controls in the latent space, on validation cells (section 9.3).

        Parameters
        ----------
        n_draws, seed
            As in :func:`scvi_cradle.metrics.latent_separation`.

        Returns
        -------
        DataFrame by label and cell type: ``mmd``, ``l2``, ``n_cells``, ``n_drawn``; of cell types with validation
        controls.
        """
        self._trained_counts()
        self._needs_training_data("Separations")
        cells = np.asarray(self.validation_indices_, dtype=np.int64)
        labels, types = self._observed_labels(self.adata, cells), self._cell_types(self.adata)[cells]
        control = self._rule.control_name
        z = self.get_latent_representation(indices=cells) if len(cells) else np.zeros((0, self.module.n_latent))
        tables = []
        for name in np.unique(types) if len(cells) else ():
            here = types == name
            of_type = np.asarray(labels)[here].astype(str)
            sizes = pd.Series(of_type).value_counts()
            enough = np.isin(of_type, sizes.index[sizes >= 2])
            distinct = len(np.unique(z[here][of_type == control], axis=0))
            if distinct >= 2 and len(set(of_type[enough])) > 1:
                table = metrics.latent_separation(
                    z[here][enough], of_type[enough], control=control, n_draws=n_draws, seed=seed
                )
                tables.append(table.rename_axis("label").reset_index().assign(cell_type=name))
        if not tables:
            return pd.DataFrame(columns=["label", "mmd", "l2", "n_cells", "n_drawn", "cell_type"]).set_index("label")
        return pd.concat(tables, ignore_index=True).set_index("label")
