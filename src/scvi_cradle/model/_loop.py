"""The perturbation-probability loop: autoencoder, classifiers and tests in turns (quantile-hurdle paper, Algorithm 1)."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from scvi import REGISTRY_KEYS, settings
from tqdm.auto import tqdm

from scvi_cradle import metrics
from scvi_cradle._constants import KEYS
from scvi_cradle._loop_settings import LoopSettings, loop_settings
from scvi_cradle._matrix import to_csr
from scvi_cradle._validation import check_one_of, check_positive
from scvi_cradle.data import expression_of, guide_counts, split_indices
from scvi_cradle.model._base import cells_hash, warn
from scvi_cradle.model._categories import Screen, gene_tests, make_screen, sampling_weights, sigmoid, top_half_gap
from scvi_cradle.model._reconstruction import ReconstructionMixin
from scvi_cradle.pp import guide_prior
from scvi_cradle.train import ClassifierSettings, fit_classifiers

CHECKPOINT = "loop.pt"
VALIDATION_SHARE = 0.2
FREE_PREVALENCE = 0.5  # of categories that are too small for a classifier


class PerturbationLoopMixin(ReconstructionMixin):
    """``fit_perturbation_loop`` and what it has found."""

    loop_: dict[str, Any] | None

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
        gamma: float | None = None,
        control_weights: Literal["score", "equal"] | None = None,
        folds: Literal["cells", "guides"] | None = None,
        fdr_level: float | None = None,
        max_genes: int | None = None,
        oversample: float | None = None,
        oversample_min_genes: int | None = None,
        min_gap: float | None = None,
        classifier: Mapping[str, Any] | None = None,
        progress: bool | None = None,
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
            (also for more rounds), with the same results as one that was never interrupted.
        split_key
            Column of ``obs`` with ``"train"``, ``"val"``, ``"test"`` or ``"unused"``. Default: a fifth of the cells of every
            label and cell type is for validation.
        feature_weights
            Weight of selected genes in round 0, its factor per round, and its bound [(100, 10, 10,000)].
        guide_scales
            Weight of the guide prior in the log-odds of the classifier rounds, the last one for all later rounds
            [(0.5, 0)].
        gamma
            Power of the probability as weight of a cell in tests [1].
        control_weights
            Weights of controls in tests: ``"score"``: by the same classifier (recommended), which keeps p-values valid;
            ``"equal"``: as published, with too many small p-values.
        folds
            What out-of-fold scores leave out: ``"cells"`` [recommended], or ``"guides"``: the cells of a guide are scored by
            a model trained on other guides of the target.
        fdr_level, max_genes
            Level of Bonferroni's correction over genes [0.05], and genes that a category may select [100].
        oversample, oversample_min_genes
            Sampling weight [10] of the cells of categories with at least so many significant genes [10].
        min_gap
            A category is kept if the mean of the upper half of its cells' scores is so much larger than that of its
            controls [0.15]. Scores are of expression alone.
        classifier
            What differs from :class:`scvi_cradle.train.ClassifierSettings`, e.g. ``{"lr": 1e-3, "n_folds": 4}``.
        progress
            Whether to show a bar. Default: while scvi-tools' verbosity shows messages.
        **train_kwargs
            Further arguments of ``train`` for the autoencoder (``batch_size``, ``lr``, ``accelerator``, ...).

        Raises
        ------
        ValueError
            For a setting that cannot be, a split without training controls, or a checkpoint of other data or settings.
        """
        chosen = loop_settings(
            preset or self._preset,
            n_outer=n_outer,
            max_steps=max_steps,
            feature_weights=feature_weights,
            guide_scales=guide_scales,
            gamma=gamma,
            control_weights=control_weights,
            folds=folds,
            fdr_level=fdr_level,
            max_genes=max_genes,
            oversample=oversample,
            oversample_min_genes=oversample_min_genes,
            min_gap=min_gap,
            classifier=classifier,
        )
        classifiers = ClassifierSettings(**chosen.classifier)
        self._validate_anndata(None)
        split = self._loop_split(split_key, seed)
        self._check_training_controls(split[0])
        screen = self._make_screen(split)
        self._warn_small(screen)
        x = to_csr(self.adata_manager.get_from_registry(REGISTRY_KEYS.X_KEY)).astype(np.float64)
        identity = {"settings": chosen.as_dict(), "seed": int(seed), "data": self._data_hash(x, split)}
        loop = self._resume(checkpoint_dir, identity, split)
        shown = settings.verbosity <= 20 if progress is None else progress
        with tqdm(total=chosen.n_outer, initial=loop["round"], desc="rounds", disable=not shown) as bar:
            while loop["round"] < chosen.n_outer:
                with _forked_randomness(seed, loop["round"], self.module.device):
                    started = time.perf_counter()
                    self._run_round(loop, screen, x, chosen, classifiers, split, seed, bar, train_kwargs)
                loop["history"][-1]["seconds"] = time.perf_counter() - started
                loop["round"] += 1
                self._keep(checkpoint_dir, identity, loop)
                bar.update()
        self.loop_ = loop | identity
        self._cell_weights = None

    # ---- one round --------------------------------------------------------------------------------------------------

    def _run_round(
        self,
        loop: dict[str, Any],
        screen: Screen,
        x: sp.csr_matrix,
        chosen: LoopSettings,
        classifiers: ClassifierSettings,
        split: list[np.ndarray],
        seed: int,
        bar: Any,
        train_kwargs: dict[str, Any],
    ) -> None:
        round_ = loop["round"]
        if round_ == 0:
            self._start_again()
            loop |= _empty_scores(screen)
        else:
            bar.set_postfix_str("classifiers")
            loop |= self._classify(screen, classifiers, chosen, seed + round_)
        scale = chosen.guide_scale(round_)
        probability = sigmoid(loop["logit"] + scale * screen.prior)
        weigh_controls = round_ > 0 and chosen.control_weights == "score"
        tests = gene_tests(x, screen, probability, sigmoid(loop["control_logit"]) if weigh_controls else None, chosen)
        kept = loop["kept"] if round_ else np.ones(screen.n_categories, dtype=bool)
        selected = (tests["selected"] & kept[:, None]).any(0)
        new = int((selected & (loop["priority"] == 0)).sum())
        loop["priority"] = np.maximum(loop["priority"], selected)
        loop["tests"] = tests
        n_significant = np.where(kept, tests["significant"].sum(1), 0)
        self._cell_weights = sampling_weights(screen, n_significant, chosen)
        weight = chosen.feature_weight(round_)
        self.set_gene_weights(loop["priority"], weight)
        bar.set_postfix_str("autoencoder")
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "check_val_every_n_epoch": 10**6}
        self.train(
            **{"max_steps": chosen.max_steps, "datasplitter_kwargs": {"external_indexing": split}} | quiet | train_kwargs
        )
        loop["separation"].append(self.get_latent_separation(n_draws=20).reset_index().assign(round=round_).to_dict("list"))
        loop["history"].append(
            {
                "round": round_,
                "n_genes": int((loop["priority"] > 0).sum()),
                "n_new_genes": new,
                "n_kept": int(kept.sum()),
                "mean_prevalence": float(loop["prevalence"].mean()) if screen.n_categories else 0.0,
                "mean_mmd": float(np.mean(loop["separation"][-1]["mmd"])),
                "guide_scale": scale,
                "feature_weight": weight,
            }
        )

    def _classify(
        self, screen: Screen, classifiers: ClassifierSettings, chosen: LoopSettings, seed: int
    ) -> dict[str, Any]:
        """Fit the classifiers of all categories that are large enough and screen them."""
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
        fit = fit_classifiers(
            z,
            unlabeled,
            negative,
            screen.is_train,
            classifiers,
            groups=guides if chosen.folds == "guides" else None,
            seed=seed,
        )
        logit, control_logit = screen.split(scores["logit"]), screen.split(scores["control_logit"], controls=True)
        for i, c in enumerate(fitted):
            logit[c], control_logit[c] = fit.unlabeled_logits[i], fit.negative_logits[i]
            scores["gap"][c] = top_half_gap(sigmoid(logit[c]), sigmoid(control_logit[c]))
        scores["logit"] = np.concatenate(logit).astype(np.float64)
        scores["control_logit"] = np.concatenate(control_logit).astype(np.float64)
        for name in ("prevalence", "calibrated", "control_score"):
            scores[name][fitted] = getattr(fit, name)
        scores["kept"][fitted] = scores["gap"][fitted] >= chosen.min_gap
        return scores

    def _start_again(self) -> None:
        """Build the module anew, untrained."""
        self.is_trained_ = False
        self._build()

    # ---- data -------------------------------------------------------------------------------------------------------

    def _loop_split(self, split_key: str | None, seed: int) -> list[np.ndarray]:
        if split_key is not None:
            return split_indices(self.adata_manager, split_key)
        n = self.adata.n_obs
        labels, types = self._observed_labels(self.adata, np.arange(n)), self._cell_types(self.adata)
        strata = pd.Series(types.astype(str)).str.cat(np.asarray(labels).astype(str), sep="\t")
        order = np.random.default_rng(seed).permutation(n)
        rank = strata.iloc[order].groupby(strata.iloc[order].to_numpy()).cumcount()
        size = strata.map(strata.value_counts()).to_numpy()[order]
        is_val = np.zeros(n, dtype=bool)
        is_val[order] = rank.to_numpy() < np.floor(VALIDATION_SHARE * size)
        return [np.flatnonzero(~is_val), np.flatnonzero(is_val), np.zeros(0, dtype=np.int64)]

    def _make_screen(self, split: Sequence[np.ndarray]) -> Screen:
        n = self.adata.n_obs
        is_train, used = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
        is_train[split[0]] = True
        used[np.concatenate([split[0], split[1]])] = True
        labels, types = self._observed_labels(self.adata, np.arange(n)), self._cell_types(self.adata)
        treatments = self._table.treatments
        prior, guide = self._guide_evidence(labels, types, treatments)
        of_label = {str(label): self._rule.treatments(label) for label in labels.categories}
        return make_screen(labels, of_label, treatments, types, prior, guide, used, is_train)

    def _guide_evidence(
        self, labels: pd.Categorical, types: np.ndarray, treatments: tuple[str, ...]
    ) -> tuple[pd.DataFrame | None, np.ndarray | None]:
        """Return the guide prior and the most abundant guide of every cell and treatment, None without guide counts."""
        fields = self.registry_["field_registries"]
        if KEYS.GUIDES not in fields:
            return None, None
        note = fields[KEYS.GUIDES]["state_registry"]
        counts, targets = guide_counts(self.adata, note, self._state_data(REGISTRY_KEYS.X_KEY).get("mod_key"))
        prior = guide_prior(
            counts,
            np.asarray(labels).astype(str),
            targets,
            cell_types=types,
            control=self._rule.control_name,
            sep=self._rule.sep,
        ).reindex(columns=list(treatments), fill_value=0.0)
        guide = np.zeros((counts.shape[0], len(treatments)), dtype=np.int64)
        dense, of_guide = counts.tocsc(), np.array(targets, dtype=object)
        for t, treatment in enumerate(treatments):
            columns = np.flatnonzero(of_guide == treatment)
            if len(columns):
                guide[:, t] = np.asarray(dense[:, columns].argmax(axis=1)).ravel()
        return prior, guide

    def _warn_small(self, screen: Screen) -> None:
        small = ~screen.is_large_enough
        if small.any():
            names = [f"{t} ({c})" for t, c in zip(screen.target[small], screen.cell_type[small], strict=True)]
            warn(
                f"{len(names)} categories have fewer than 10 cells or controls for training ({', '.join(names[:5])}): "
                "their probabilities are those of the guide prior alone."
            )

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def _data_hash(self, x: sp.csr_matrix, split: Sequence[np.ndarray]) -> str:
        digest = hashlib.sha256(cells_hash(self.adata).encode())
        digest.update(np.asarray(x.sum(axis=0)).tobytes())
        for part in split:
            digest.update(np.asarray(part, dtype=np.int64).tobytes())
        digest.update("\t".join(np.asarray(self._observed_labels(self.adata, np.arange(self.adata.n_obs)))).encode())
        return digest.hexdigest()

    def _keep(self, folder: str | Path | None, identity: dict[str, Any], loop: dict[str, Any]) -> None:
        """Write the state of the loop; an interrupted write leaves the old file."""
        if folder is None:
            return
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        content = {
            "identity": identity,
            "loop": _as_tensors(loop),
            "module": self.module.state_dict(),
            "optimizer": self.module.optimizer_state,
        }
        torch.save(content, path / f"{CHECKPOINT}.new")
        os.replace(path / f"{CHECKPOINT}.new", path / CHECKPOINT)

    def _resume(
        self, folder: str | Path | None, identity: dict[str, Any], split: list[np.ndarray]
    ) -> dict[str, Any]:
        """Return the state of the loop: a new one, or that of a checkpoint, of which the module is loaded, too."""
        new: dict[str, Any] = {
            "round": 0,
            "priority": np.zeros(len(self._genes)),
            "history": [],
            "separation": [],
        }
        path = None if folder is None else Path(folder) / CHECKPOINT
        if path is None or not path.is_file():
            return new
        content = torch.load(path, map_location=self.module.device, weights_only=True)
        kept = content["identity"]
        ours, theirs = ({**i, "settings": {**i["settings"], "n_outer": None}} for i in (identity, kept))
        if ours != theirs:
            differs = [name for name in ("settings", "seed", "data") if ours[name] != theirs[name]]
            msg = f"The checkpoint in {str(folder)!r} must be of the same data, settings and seed; received other {' and '.join(differs)}: name another folder."
            raise ValueError(msg)
        self._start_again()
        self._learn_from_training_cells(split[0])
        self.module.load_state_dict(content["module"])
        self.module.optimizer_state = content["optimizer"]
        self.is_trained_, self.train_cells_ = True, cells_hash(self.adata)
        self.train_indices_, self.validation_indices_, self.test_indices_ = split
        self.module.eval()
        self.diagnostics_ = {}
        return _as_arrays(content["loop"])

    # ---- results ----------------------------------------------------------------------------------------------------

    def _results(self) -> dict[str, Any]:
        if getattr(self, "loop_", None) is None:
            msg = "The loop must be run first; call `model.fit_perturbation_loop()`."
            raise RuntimeError(msg)
        assert self.loop_ is not None
        return self.loop_

    def _screen(self) -> Screen:
        return self._make_screen([self.train_indices_, self.validation_indices_])

    def _guide_scale(self) -> float:
        loop = self._results()
        given = loop_settings("recommended", **{k: v for k, v in loop["settings"].items()})
        return given.guide_scale(loop["round"] - 1)

    def _cell_probability(self) -> np.ndarray:
        """Return the probability of labelled cells; 1 for a model that was trained without the loop."""
        screen = self._screen()
        if getattr(self, "loop_", None) is None:
            return np.ones(len(screen.row))
        return sigmoid(self._results()["logit"] + self._guide_scale() * screen.prior)

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
        target, always so for controls, and for cells of the split that the loop did not use. It can serve as
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
        targets = sorted(set(screen.target))
        column = pd.Index(targets).get_indexer(screen.target)[screen.category]
        values = np.zeros((self.adata.n_obs, len(targets)))
        values[screen.row, column] = sigmoid(logit + scale * screen.prior)
        return pd.DataFrame(values, index=self.adata.obs_names.copy(), columns=targets)

    def _needs_training_data(self, what: str) -> None:
        if not self._has_training_data():
            msg = f"{what} need the training data; received a model without them: load it with `adata`."
            raise RuntimeError(msg)

    @property
    def screening_(self) -> pd.DataFrame | None:
        """Categories of the last round: ``target``, ``cell_type``, ``prevalence``, ``calibrated``, ``control_score``, ``gap``, ``kept``, ``n_significant``; None before the loop."""
        if getattr(self, "loop_", None) is None:
            return None
        loop = self._results()
        columns = ("prevalence", "calibrated", "control_score", "gap", "kept")
        table = pd.DataFrame({"target": loop["target"], "cell_type": loop["cell_type"]})
        for name in columns:
            table[name] = loop[name]
        return table.assign(n_significant=loop["tests"]["significant"].sum(1))

    @property
    def loop_history_(self) -> pd.DataFrame | None:
        """One row per round: genes selected, categories kept, mean prevalence, mean separation, weights, seconds."""
        return None if getattr(self, "loop_", None) is None else pd.DataFrame(self._results()["history"]).set_index("round")

    @property
    def separation_(self) -> pd.DataFrame | None:
        """Separation of every label from its controls in the latent space of every round (see ``get_latent_separation``)."""
        if getattr(self, "loop_", None) is None:
            return None
        return pd.concat([pd.DataFrame(part) for part in self._results()["separation"]], ignore_index=True)

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
        cells = np.asarray(self.validation_indices_)
        labels, types = self._observed_labels(self.adata, cells), self._cell_types(self.adata)[cells]
        z, control = self.get_latent_representation(indices=cells), self._rule.control_name
        tables = []
        for name in np.unique(types):
            here = types == name
            of_type = np.asarray(labels)[here].astype(str)
            sizes = pd.Series(of_type).value_counts()
            enough = np.isin(of_type, sizes.index[sizes >= 2])
            if sizes.get(control, 0) >= 2 and len(set(of_type[enough])) > 1:
                table = metrics.latent_separation(
                    z[here][enough], of_type[enough], control=control, n_draws=n_draws, seed=seed
                )
                tables.append(table.rename_axis("label").reset_index().assign(cell_type=name))
        if not tables:
            return pd.DataFrame(columns=["label", "mmd", "l2", "n_cells", "n_drawn", "cell_type"]).set_index("label")
        return pd.concat(tables, ignore_index=True).set_index("label")


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


@contextmanager
def _forked_randomness(seed: int, round_: int, device: torch.device) -> Iterator[None]:
    """Let torch's global generators start at a seed of the round, and put them back afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence([abs(int(seed)), round_]).generate_state(1)[0]))
        yield


def _as_tensors(value: Any) -> Any:
    """Return nested arrays as tensors, which load without running code."""
    if isinstance(value, np.ndarray):
        return torch.as_tensor(value)
    if isinstance(value, dict):
        return {str(k): _as_tensors(v) for k, v in value.items()}
    return [_as_tensors(v) for v in value] if isinstance(value, list) else value


def _as_arrays(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.cpu().numpy()
    if isinstance(value, dict):
        return {k: _as_arrays(v) for k, v in value.items()}
    return [_as_arrays(v) for v in value] if isinstance(value, list) else value
