"""The perturbation-probability loop: autoencoder, classifiers and tests in turns (quantile-hurdle paper, Algorithm 1)."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from scipy.special import expit
from scvi import REGISTRY_KEYS, settings
from tqdm.auto import tqdm

from scvi_cradle._constants import KEYS
from scvi_cradle._loop_settings import LoopSettings, loop_settings
from scvi_cradle._loop_settings import plain as _plain
from scvi_cradle._matrix import iter_blocks, row_sums, to_csr
from scvi_cradle._validation import check_positive, preview
from scvi_cradle.dataloaders import ScreenDataModule
from scvi_cradle.model._base import cells_hash
from scvi_cradle.model._categories import Screen, gene_tests, sampling_weights
from scvi_cradle.model._loop_checkpoint import read_checkpoint, write_checkpoint
from scvi_cradle.model._loop_context import forked_randomness, quiet_trainer
from scvi_cradle.model._loop_results import FREE_PREVALENCE, LoopResultsMixin
from scvi_cradle.model._scores import fit_scores
from scvi_cradle.train import ClassifierSettings, n_processes


class PerturbationLoopMixin(LoopResultsMixin):
    """``fit_perturbation_loop``."""

    _preset: str

    def fit_perturbation_loop(
        self,
        *,
        preset: Literal["recommended", "published"] | None = None,
        n_outer: int | None = None,
        max_steps: int | None = None,
        seed: int = 0,
        checkpoint_dir: str | Path | None = None,
        split_key: str | None = None,
        feature_weights: tuple[float, float, float] | None = None,
        guide_scales: Sequence[float] | None = None,
        scores: Literal["discriminant", "nnnu"] | None = None,
        gamma: float | None = None,
        control_weights: Literal["score", "equal"] | None = None,
        variance_floor: bool | None = None,
        folds: Literal["cells", "guides"] | None = None,
        fdr_level: float | None = None,
        max_genes: int | None = None,
        oversample: float | None = None,
        oversample_min_genes: int | None = None,
        min_gap: float | None = None,
        classifier: Mapping[str, Any] | None = None,
        progress: bool | None = None,
        datamodule: ScreenDataModule | None = None,
        **train_kwargs: Any,
    ) -> None:
        """Train autoencoder and classifiers in turns; there is no ``train()`` before (quantile-hurdle paper, Algorithm 1).

        Round 0 weighs cells by the guide prior, tests every gene of every category (cell type x target), gives the
        significant ones a larger weight and trains the autoencoder from scratch. Every later round fits a classifier for
        every category on the latent space, weighs cells by its out-of-fold probability, screens categories, tests again,
        adds the new genes and trains on.

        Parameters
        ----------
        preset
            Default: that of the model. ``"published"``: six rounds, classifiers of 7,000 steps at a learning rate of 1e-4
            without early stopping, controls with equal weights; hours on two cores.
        n_outer
            Rounds, the first one with the guide prior alone [3].
        max_steps
            Optimiser steps of the autoencoder per round [500].
        seed
            Seed of all draws; no global state is changed.
        checkpoint_dir
            Folder in which the state is kept after every round. A call with the same settings and data goes on from there
            (also for more rounds), with the same results as one that was never interrupted; the training history starts
            anew.
        split_key
            Column of ``obs`` with ``"train"``, ``"val"``, ``"test"`` or ``"unused"``. Default: a fifth of the cells of every
            label and cell type is for validation.
        feature_weights
            Weight of selected genes in round 0, its factor per round, and its bound [(100, 10, 10,000)].
        guide_scales
            Weight of the guide prior in the log-odds of the classifier rounds, the last one for all later rounds
            [(0.5,); published: (0.5, 0)].
        scores
            What scores cells: ``"discriminant"`` (recommended): a linear discriminant of labelled cells and controls, along
            which labelled cells are a mixture of two normals (:func:`scvi_cradle.train.fit_discriminants`); ``"nnnu"``:
            perceptrons with the non-negative negative-unlabeled risk, as published (section 4.2).
        gamma
            Power of the probability as weight of a cell in tests [1].
        control_weights
            Weights of controls in tests: ``"score"``: by the same classifier (recommended), which keeps p-values valid;
            ``"equal"``: as published, with too many small p-values.
        variance_floor
            Take the variance of controls in tests where that of perturbed cells is smaller, for genes that fewer than 50
            of these would express at the rate of controls [True; published: False]: cells that happen not to express a
            sparse gene have no variance, and give false positives.
        folds
            What out-of-fold scores leave out: ``"cells"`` [recommended], or ``"guides"``: the cells of a guide are scored by
            a model trained on other guides of the target.
        fdr_level, max_genes
            Level of Bonferroni's correction over genes [0.05], and genes that a category may select [100].
        oversample, oversample_min_genes
            Sampling weight [10] of the cells of categories with at least so many significant genes [10].
        min_gap
            A category is kept if the mean of the upper half of its cells' scores is so much larger than that of its
            controls [0.15]. Scores are of expression alone (those of the discriminant at even odds).
        classifier
            What differs from :class:`scvi_cradle.train.ClassifierSettings`, e.g. ``{"lr": 1e-3, "n_folds": 4}``; of these
            the discriminant uses ``n_folds``.
        progress
            Whether to show a bar. Default: while scvi-tools' verbosity shows messages.
        datamodule
            A screen on disk, whose cells become the model's own; the loop reads their values into memory.
        **train_kwargs
            Further arguments of ``train`` for the autoencoder (``batch_size``, ``lr``, ``accelerator``, ...), which is not
            validated in the loop.

        Raises
        ------
        ValueError
            For a setting that cannot be, a split without training controls, or a checkpoint of other data or settings.
        """
        chosen = loop_settings(
            {"paper": "published"}.get(str(preset), preset) or self._preset,
            n_outer=n_outer,
            max_steps=max_steps,
            feature_weights=feature_weights,
            guide_scales=guide_scales,
            scores=scores,
            gamma=gamma,
            control_weights=control_weights,
            variance_floor=variance_floor,
            folds=folds,
            fdr_level=fdr_level,
            max_genes=max_genes,
            oversample=oversample,
            oversample_min_genes=oversample_min_genes,
            min_gap=min_gap,
            classifier=classifier,
        )
        check_positive("seed", seed, integer=True, allow_zero=True)
        unknown = set(chosen.classifier) - {f.name for f in fields(ClassifierSettings)}
        if unknown:
            msg = f"`classifier` must hold settings of `ClassifierSettings`; received {preview(sorted(unknown))}: leave it out."
            raise TypeError(msg)
        ClassifierSettings(**chosen.classifier)  # checks them before anything is trained
        if datamodule is not None:
            self._attach(datamodule)
        self._validate_anndata(None)
        split = self._loop_split(split_key or getattr(datamodule, "split_key", None), seed)
        self._check_training_controls(split[0])
        screen = self._make_screen(split)
        self._check_loop(screen, chosen, train_kwargs)
        x = to_csr(self.adata_manager.get_from_registry(REGISTRY_KEYS.X_KEY))
        identity = {"settings": chosen.as_dict(), "seed": int(seed), "data": self._data_hash(x, split, screen)}
        identity |= {
            "architecture": _plain(self._architecture),
            "training": {k: str(v) for k, v in train_kwargs.items()},
        }
        loop = self._resume(checkpoint_dir, identity, split, chosen.n_outer)
        shown = settings.verbosity <= 20 if progress is None else progress
        with tqdm(total=chosen.n_outer, initial=loop["round"], desc="rounds", disable=not shown) as bar:
            while loop["round"] < chosen.n_outer:
                with forked_randomness(seed, loop["round"]), quiet_trainer():
                    started = time.perf_counter()
                    self._run_round(loop, screen, x, chosen, split, seed, bar, train_kwargs)
                loop["history"][-1]["seconds"] = time.perf_counter() - started
                loop["round"] += 1
                if checkpoint_dir is not None:
                    write_checkpoint(checkpoint_dir, identity, loop, self.module)
                bar.update()
        kept = {f.name: getattr(screen, f.name) for f in fields(screen)}
        names = {"target": loop["target"], "cell_type": loop["cell_type"]}
        self._set_tables(loop | identity | {"screen": kept | names})
        with forked_randomness(seed, loop["round"]):  # loaders draw a seed
            self._moves()

    # ---- one round --------------------------------------------------------------------------------------------------

    def _run_round(
        self,
        loop: dict[str, Any],
        screen: Screen,
        x: sp.csr_matrix,
        chosen: LoopSettings,
        split: list[np.ndarray],
        seed: int,
        bar: Any,
        train_kwargs: dict[str, Any],
    ) -> None:
        round_ = loop["round"]
        if round_ == 0:
            self._start_again()
            loop |= _empty_scores(screen) | {"kept": np.ones(screen.n_categories, dtype=bool)}
        else:
            bar.set_postfix_str("classifiers")
            loop |= self._classify(screen, chosen, seed + round_)
        scale = chosen.guide_scale(round_)
        probability = expit(loop["logit"] + scale * screen.prior)
        weigh_controls = round_ > 0 and chosen.control_weights == "score"
        tests = gene_tests(x, screen, probability, expit(loop["control_logit"]) if weigh_controls else None, chosen)
        kept = loop["kept"]
        selected = (tests["selected"] & kept[:, None]).any(0)
        new = int((selected & (loop["priority"] == 0)).sum())
        loop["priority"] = np.maximum(loop["priority"], selected)
        loop["tests"] = tests
        n_significant = np.where(kept, tests["significant"].sum(1), 0)
        weight = chosen.feature_weight(round_)
        self.set_gene_weights(loop["priority"], weight)
        bar.set_postfix_str("autoencoder")
        arguments: dict[str, Any] = {"max_steps": chosen.max_steps, "datasplitter_kwargs": {"external_indexing": split}}
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "check_val_every_n_epoch": 10**6}
        self._cell_weights = sampling_weights(screen, n_significant, chosen)
        try:
            self.train(**(arguments | quiet | train_kwargs))
        finally:
            self._cell_weights = None  # of this training alone
        loop["separation"].append(
            self.get_latent_separation(n_draws=20).reset_index().assign(round=round_).to_dict("list")
        )
        loop["history"].append(
            {
                "round": round_,
                "n_genes": int((loop["priority"] > 0).sum()),
                "n_new_genes": new,
                "n_kept": int(kept.sum()),
                "mean_prevalence": float(loop["prevalence"].mean()) if screen.n_categories else 0.0,
                "mean_mmd": float(np.mean(loop["separation"][-1]["mmd"] or [0.0])),
                "guide_scale": scale,
                "feature_weight": weight,
            }
        )

    def _check_loop(self, screen: Screen, chosen: LoopSettings, train_kwargs: dict[str, Any]) -> None:
        """Raise for what the loop cannot run with, and warn of small categories, before anything is changed."""
        ours = {
            "max_epochs",
            "early_stopping",
            "train_size",
            "validation_size",
            "shuffle_set_split",
            "datasplitter_kwargs",
        }
        if ours & set(train_kwargs):
            msg = f"The loop sets the split and the number of steps by `split_key` and `max_steps`; received {preview(sorted(ours & set(train_kwargs)))}: leave it out."
            raise TypeError(msg)
        if n_processes(train_kwargs) > 1:
            msg = "The loop draws training cells with weights, in one process; received `strategy` and `devices` for several: leave them out (`train` takes them)."
            raise ValueError(msg)
        if not screen.n_categories:
            msg = "At least one cell for training or validation must be perturbed; received only controls: mend the split."
            raise ValueError(msg)
        if chosen.folds == "guides" and KEYS.GUIDES not in self.registry_["field_registries"]:
            msg = "folds='guides' needs guide counts; received data without: register `guide_counts_key`, or use folds='cells'."
            raise ValueError(msg)
        self._warn_small(screen)

    def _classify(self, screen: Screen, chosen: LoopSettings, seed: int) -> dict[str, Any]:
        """Fit the scores of all categories that are large enough and screen them."""
        scores = _empty_scores(screen)
        fitted = np.flatnonzero(screen.is_large_enough)
        if not len(fitted):
            return scores
        z = self.get_latent_representation().astype(np.float32)
        unlabeled, negative, guides = (
            [parts[c] for c in fitted]
            for parts in (
                screen.split(screen.row),
                screen.split(screen.control_row, controls=True),
                screen.split(screen.guide),
            )
        )
        groups = guides if chosen.folds == "guides" else None
        fit = fit_scores(z, unlabeled, negative, screen.is_train, chosen, groups=groups, seed=seed)
        logit, control_logit = screen.split(scores["logit"]), screen.split(scores["control_logit"], controls=True)
        for i, c in enumerate(fitted):
            logit[c], control_logit[c] = fit.unlabeled_logits[i], fit.negative_logits[i]
        scores["logit"] = np.concatenate(logit).astype(np.float64)
        scores["control_logit"] = np.concatenate(control_logit).astype(np.float64)
        for name in ("prevalence", "calibrated", "control_score", "gap"):
            scores[name][fitted] = getattr(fit, name)
        scores["kept"][fitted] = scores["gap"][fitted] >= chosen.min_gap
        return scores

    def _start_again(self) -> None:
        """Build the module anew, untrained."""
        self.is_trained_ = False
        self._build()

    def _resume(
        self, folder: str | Path | None, identity: dict[str, Any], split: list[np.ndarray], n_outer: int
    ) -> dict[str, Any]:
        """Return the state of the loop: a new one, or that of a checkpoint, of which the module is loaded, too."""
        content = None if folder is None else read_checkpoint(folder, identity, self.module.device)
        if content is not None and content["loop"]["round"] > n_outer:
            msg = f"`n_outer` must not be below the rounds of the checkpoint; received {n_outer}, and {content['loop']['round']} rounds in {str(folder)!r}: name another folder."
            raise ValueError(msg)
        if content is None:
            return {"round": 0, "priority": np.zeros(len(self._genes)), "history": [], "separation": []}
        self._start_again()
        self._learn_from_training_cells(split[0])
        self.module.load_state_dict(content["module"])
        self.module.optimizer_state = content["optimizer"]
        self.is_trained_, self.train_cells_ = True, cells_hash(self.adata)
        self.history_: dict[str, Any] = {}
        self.diagnostics_ = {}
        self.train_indices_, self.validation_indices_, self.test_indices_ = split
        self.moves_ = None
        self.module.eval()
        return content["loop"]

    def _data_hash(self, x: sp.csr_matrix, split: Sequence[np.ndarray], screen: Screen) -> str:
        """Return a hash of cells, expression, split, categories and guides."""
        digest = hashlib.sha256(cells_hash(self.adata).encode())
        names = [*self._genes, *(f"{t}\t{c}" for t, c in zip(screen.target, screen.cell_type, strict=True))]
        digest.update("\n".join(names).encode())
        sums = (sum(np.ones(block.shape[0]) @ block for _, block in iter_blocks(x)), row_sums(x))
        arrays = (*sums, *split, screen.row, screen.category, screen.control_row, screen.prior)
        for values in (*arrays, screen.guide):
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()


def _empty_scores(screen: Screen) -> dict[str, Any]:
    """Return scores of categories without a classifier."""
    n = screen.n_categories
    return {
        "target": [str(t) for t in screen.target],
        "cell_type": [str(t) for t in screen.cell_type],
        "logit": np.zeros(len(screen.row)),
        "control_logit": np.zeros(len(screen.control_row)),
        "prevalence": np.full(n, FREE_PREVALENCE),
        "calibrated": np.zeros(n, dtype=bool),
        "control_score": np.full(n, FREE_PREVALENCE),
        "gap": np.zeros(n),
        "kept": np.zeros(n, dtype=bool),
    }
