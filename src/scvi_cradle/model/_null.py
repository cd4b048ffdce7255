"""False positives where nothing is perturbed: control cells in the place of perturbed ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from scipy.special import expit
from scvi import REGISTRY_KEYS

from scvi_cradle._loop_settings import loop_settings
from scvi_cradle._matrix import to_csr
from scvi_cradle._validation import check_positive, check_probability, preview
from scvi_cradle.data import non_targeting_counts
from scvi_cradle.model._categories import Screen, gene_tests
from scvi_cradle.model._moved_effects import MovedEffectsMixin
from scvi_cradle.model._scores import fit_scores
from scvi_cradle.pp import rank_to_z

NOMINAL = 0.05
SETTINGS = ("score", "equal", "unweighted")


class NullMixin(MovedEffectsMixin):
    """``get_null_calibration``."""

    def get_null_calibration(
        self,
        n_runs: int = 20,
        *,
        whole_loop: bool = False,
        n_cells: int | None = None,
        n_targets: int = 3,
        min_expressed: float = 0.1,
        seed: int = 0,
        **loop_kwargs: Any,
    ) -> pd.DataFrame:
        """Measure false positives: control cells are called perturbed, and tested as perturbed cells are in the last round.

        Where guides without a target were counted, their counts serve as guide counts of the fake targets.

        Parameters
        ----------
        n_runs
            Draws of such cells.
        whole_loop
            False: classifiers and tests on the latent space of this model. True: a new model for every run, trained from
            nothing on the controls with ``n_targets`` fake targets, so that selection of genes, autoencoder, screening
            and resumed weights are part of the test.
        n_cells
            Cells of a fake target. Default: the median number of a category, at most a fifth of the controls.
        n_targets
            Fake targets of a run with ``whole_loop``.
        min_expressed
            Genes expressed in a smaller share of the controls are left out of the shares of small p-values, since tests of
            sparse genes keep below the level.
        seed
            Seed of the draws.
        **loop_kwargs
            Arguments of :meth:`fit_perturbation_loop` in place of those of this model's loop, e.g. ``scores`` and
            ``variance_floor``; with ``whole_loop`` also ``n_outer``, ``max_steps``, and what ``train`` takes.

        Returns
        -------
        DataFrame with a row per run, fake target and weights in the test (``"score"``: controls weighted alike;
        ``"equal"``: controls of weight 1, as published; ``"unweighted"``: all cells of weight 1): ``share_below_005`` of
        genes with p below 0.05, which should be 0.05; ``n_significant`` genes after Bonferroni; ``prevalence``, ``gap``
        and ``kept`` of the classifier, which should not keep it.

        Raises
        ------
        RuntimeError
            If the loop was not run, or the model was loaded without its data.
        ValueError
            If there are too few controls.
        """
        loop = self._results()
        self._needs_training_data("Null runs")
        check_positive("n_runs", n_runs, integer=True)
        check_positive("n_targets", n_targets, integer=True)
        check_probability("min_expressed", min_expressed)
        taken = {"checkpoint_dir", "split_key"} & set(loop_kwargs)
        if taken:
            msg = (
                f"Null runs have splits and checkpoints of their own; received {preview(sorted(taken))}: leave it out."
            )
            raise TypeError(msg)
        known = {k: v for k, v in loop_kwargs.items() if k in loop["settings"]}
        if not whole_loop and len(known) < len(loop_kwargs):
            msg = f"Without `whole_loop` only settings of scores and tests can be given; received {preview(set(loop_kwargs) - set(known))}: leave it out."
            raise TypeError(msg)
        chosen = loop_settings("recommended", **(loop["settings"] | known))
        controls = self._null_controls()
        n_fake = self._null_size(n_cells, len(controls), n_targets if whole_loop else 1)
        matrix = to_csr(self.adata_manager.get_from_registry(REGISTRY_KEYS.X_KEY))[controls]
        common = matrix.getnnz(axis=0) >= min_expressed * len(controls)
        rng = np.random.default_rng(seed)
        if whole_loop:
            runs = [self._null_loop(controls, n_fake, n_targets, rng, loop_kwargs) for _ in range(n_runs)]
        else:
            runs = [self._null_classifiers(controls, n_fake, n_runs, chosen, rng)]
        rows = []
        for run, (screen, found) in enumerate(runs):
            for setting in SETTINGS:
                table = _null_table(matrix, screen, found, common, chosen, setting)
                rows.append(table.assign(run=np.arange(n_runs) if not whole_loop else run))
        return pd.concat(rows, ignore_index=True)

    def _null_controls(self) -> np.ndarray:
        """Return the controls of the most frequent cell type, training and validation."""
        rows, types = self._controls()
        if not len(rows):
            return rows
        names, sizes = np.unique(types, return_counts=True)
        return rows[types == names[sizes.argmax()]]

    def _null_size(self, n_cells: int | None, n_controls: int, n_targets: int) -> int:
        if n_cells is None:
            screen = self._screen()
            n_cells = int(min(np.median(np.bincount(screen.category)), n_controls // 5))
        check_positive("n_cells", n_cells, integer=True)
        if n_cells < 20 or n_cells * n_targets > n_controls // 2:
            msg = f"Null runs need 20 cells or more for a fake target, and half of the controls beside them; received {n_targets} x {n_cells} of {n_controls}."
            raise ValueError(msg)
        return n_cells

    def _null_classifiers(
        self, controls: np.ndarray, n_fake: int, n_runs: int, chosen: Any, rng: np.random.Generator
    ) -> tuple[Screen, dict[str, np.ndarray]]:
        """Fit the classifiers of all runs together on the latent space as it is."""
        z = self.get_latent_representation(indices=controls).astype(np.float32)
        is_train = np.isin(controls, self.train_indices_)
        fakes = [np.sort(rng.choice(len(controls), n_fake, replace=False)) for _ in range(n_runs)]
        others = [np.setdiff1d(np.arange(len(controls)), fake) for fake in fakes]
        fit = fit_scores(z, fakes, others, is_train, chosen, seed=int(rng.integers(2**31)))
        abundance, prior = non_targeting_counts(self.adata, self.registry_), np.zeros(n_fake * n_runs)
        if abundance is not None:
            prior = np.concatenate([rank_to_z(abundance[controls[fake]]) for fake in fakes])
        screen = _null_screen(fakes, others, is_train, prior)
        return screen, {
            "logit": np.concatenate(fit.unlabeled_logits).astype(np.float64),
            "control_logit": np.concatenate(fit.negative_logits).astype(np.float64),
            "prevalence": fit.prevalence,
            "gap": fit.gap,
            "kept": fit.gap >= chosen.min_gap,
        }

    def _null_loop(
        self, controls: np.ndarray, n_fake: int, n_targets: int, rng: np.random.Generator, loop_kwargs: dict[str, Any]
    ) -> tuple[Screen, dict[str, np.ndarray]]:
        """Run the whole loop on controls, some of them as fake targets."""
        x = to_csr(self.adata_manager.get_from_registry(REGISTRY_KEYS.X_KEY))[controls]
        names = [f"null{i + 1}" for i in range(n_targets)]
        label = np.full(len(controls), "control", dtype=object)
        label[rng.permutation(len(controls))[: n_fake * n_targets]] = np.repeat(names, n_fake)
        null = AnnData(x.copy(), obs=pd.DataFrame({"perturbation": label}, index=[str(i) for i in range(len(label))]))
        null.var_names = self._genes
        keys: dict[str, Any] = {"perturbation_key": "perturbation"}
        abundance = non_targeting_counts(self.adata, self.registry_)
        if abundance is not None:
            counts = dict.fromkeys(names, abundance[controls])
            null.obsm["guides"] = pd.DataFrame(counts, index=null.obs_names)
            keys |= {"guide_counts_key": "guides", "guide_targets": {name: name for name in names}}
        type(self).setup_anndata(null, **keys)
        model = type(self)(null, **self._architecture)
        arguments = {"progress": False} | self._results()["settings"] | loop_kwargs
        model.fit_perturbation_loop(**arguments, seed=int(rng.integers(2**31)))
        loop = model._results()
        return model._screen(), {k: loop[k] for k in ("logit", "control_logit", "prevalence", "gap", "kept")}


def _null_screen(fakes: list[np.ndarray], others: list[np.ndarray], is_train: np.ndarray, prior: np.ndarray) -> Screen:
    n = len(fakes)
    names = np.array([f"null{i + 1}" for i in range(n)], dtype=object)
    row, control_row = np.concatenate(fakes), np.concatenate(others)
    return Screen(
        target=names,
        cell_type=np.full(n, "all", dtype=object),
        row=row,
        category=np.repeat(np.arange(n), [len(f) for f in fakes]),
        prior=prior,
        guide=np.zeros(len(row), dtype=np.int64),
        control_row=control_row,
        control_category=np.repeat(np.arange(n), [len(o) for o in others]),
        is_train=is_train,
    )


def _null_table(
    x: sp.csr_matrix, screen: Screen, scores: dict[str, np.ndarray], common: np.ndarray, chosen: Any, setting: str
) -> pd.DataFrame:
    weighted = setting != "unweighted"
    scale = chosen.guide_scale(max(chosen.n_outer - 1, 1))  # of the last round
    probability = expit(scores["logit"] + scale * screen.prior) if weighted else np.ones(len(screen.row))
    tests = gene_tests(x, screen, probability, expit(scores["control_logit"]) if setting == "score" else None, chosen)
    return pd.DataFrame(
        {
            "target": screen.target,
            "weights": setting,
            "share_below_005": (tests["pvalue"][:, common] < NOMINAL).mean(1),
            "n_significant": tests["significant"].sum(1),
            "prevalence": scores["prevalence"],
            "gap": scores["gap"],
            "kept": scores["kept"],
        }
    )
