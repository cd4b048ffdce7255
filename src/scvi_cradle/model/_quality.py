"""Quality of a trained model: diagnostics, QC pass rates, and scores beside baseline and ceiling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData, concat
from mudata import MuData

from scvi_cradle import metrics
from scvi_cradle._constants import COLUMNS, KEYS, QC_UNS_KEY
from scvi_cradle._matrix import log_normalize, to_csr
from scvi_cradle.data import label_table, stored_matrix
from scvi_cradle.model._base import check_indices
from scvi_cradle.model._draws import as_module_input, covariate_tensors, draw_libraries, make_generator
from scvi_cradle.model._generation import GenerationMixin, decode_prior
from scvi_cradle.model._inference import InferenceMixin
from scvi_cradle.module.base import Pairs

MAX_CELLS = 1_500
MAX_READ = 200_000  # of cells on disk
MIN_CELLS = 40
BLOCK_OF_CELLS, BLOCK_OF_GENES = 100, 1_000
NO_AXIS = 1e-10  # share of the sum of squares: variance below it is rounding
N_COMPONENTS = 10
COLLAPSE_NATS = 0.1
MIN_VARIANCE_RATIO = 0.5
MIN_STATE_VARIANCE = 0.05


class QualityMixin(GenerationMixin, InferenceMixin):
    """Diagnostics and evaluation."""

    @torch.inference_mode()
    def get_diagnostics(self, *, seed: int = 0) -> dict[str, float]:
        """Measure whether the basal state is in use, on at most 1,500 training cells.

        Computed after every training (attribute ``diagnostics_``). There is a warning for a divergence below 0.1 nats and
        for variance ratios below 0.5; for PerturbedVAE for ``kl_invariant`` below 0.1 nats and for
        ``expected_variance_ratio`` below 0.1 (``"mse"``) or 0.02.

        Parameters
        ----------
        seed
            Seed of the sample of cells and of the generated cells.

        Returns
        -------
        ``kl_basal`` and ``kl_basal_failed``: mean of ``KL(q(z_b) || N(0, I))`` in nats over all and over failed cells;
        PerturbedVAE has ``kl_invariant`` and ``kl_responsive`` in their place;
        ``variance_ratio``: generated over real cell-to-cell variance of ``log2(1 + 1e4 x / sum(x))`` (or of values that
        are no counts) along the first ten principal components of QC-passed cells of the most frequent label (fitted on one half of them, measured on
        the other, from 40 cells on); ``expected_variance_ratio``: the same for expected in the place of generated
        expression, without observation noise; ``state_variance_ratio``: the first beyond counting noise, that is after taking from both the variance
        of cells that the model generates with one basal state. Both are left out when there are too few cells, the
        latter also when the noise is all there is, or none.
        """
        self._trained_counts()
        if not self._has_training_data():
            msg = "Diagnostics need the data of training; received a model with other data or none: load it with them, or read `diagnostics_`."
            raise ValueError(msg)
        data = self._validate_anndata(None)
        rng = np.random.default_rng(seed)
        train = np.asarray(self.train_indices_)
        cells = np.sort(rng.choice(train, min(MAX_CELLS, len(train)), replace=False))
        kls, flags = [], []
        for tensors, latent in self._latent_batches(data, cells, None, n_samples=1, sample=False):
            kls.append({name: kl[0].cpu().numpy() for name, kl in self.module.divergences(latent).items()})
            if KEYS.ARTIFACT in tensors:
                flags.append(tensors[KEYS.ARTIFACT][:, 0].cpu().numpy() > 0)
        kl = {name: np.concatenate([batch[name] for batch in kls]) for name in kls[0]}
        result = {name: float(values.mean()) for name, values in kl.items()}
        failed = np.concatenate(flags) if flags else np.zeros(len(cells), dtype=bool)
        if failed.any():
            result |= {f"{name}_failed": float(values[failed].mean()) for name, values in kl.items()}
        return result | self._variance_ratios(train, rng, seed)

    def _variance_ratios(self, train: np.ndarray, rng: np.random.Generator, seed: int) -> dict[str, float]:
        codes = np.asarray(self.adata_manager.get_from_registry(KEYS.PERTURBATION)).ravel()[train].astype(int)
        passed = ~failed_cells(self.adata_manager, train)
        if passed.sum() < MIN_CELLS:
            return {}
        label = int(np.bincount(codes[passed]).argmax())
        cells = train[passed & (codes == label)]
        if len(cells) < MIN_CELLS:
            return {}
        cells = np.sort(rng.choice(cells, min(MAX_CELLS, len(cells)), replace=False))
        axes, real = principal_variance(self._comparable(self.adata_manager.get_from_registry("X")[cells]), rng)
        generated, noise = (
            self._prior_variance(axes, self._table.labels[label], max(500, len(cells)), seed, vary=v)
            for v in (True, False)
        )
        expected = self._prior_variance(axes, self._table.labels[label], max(500, len(cells)), seed, sample=False)
        result = {"variance_ratio": float(generated / real), "expected_variance_ratio": float(expected / real)}
        if noise > 1e-6 * real and real - noise > MIN_STATE_VARIANCE * real:
            result["state_variance_ratio"] = float((generated - noise) / (real - noise))
        return result

    def _comparable(self, matrix: Any) -> sp.csr_matrix:
        """Return expression on the scale of comparisons: log-normalised counts, or other values as they are."""
        values = to_csr(matrix)
        return log_normalize(values) if self.module.decoder.likelihood.counts else values

    def _prior_variance(
        self, axes: np.ndarray, label: str, n_samples: int, seed: int, *, vary: bool = True, sample: bool = True
    ) -> float:
        """Return the variance along axes of artifact-free cells generated of one label, on the scale of comparisons.

        ``vary=False``: without variation of state; ``sample=False``: expected values, without observation noise.
        """
        module, generator = self.module, make_generator(seed, self.module.device)
        rng = np.random.default_rng(seed)
        draw = draw_libraries(self._library_pool, n_samples, "observed", artifact=False, batch=None, rng=rng)
        tensors = as_module_input(covariate_tensors(self._library_pool, draw.rows), module.device)
        members = torch.as_tensor(self._members([label]), device=module.device).expand(n_samples, -1)
        noise = self._draw_noise(self._library_pool, draw.rows, generator, vary=vary)
        decoded = decode_prior(module, Pairs.from_members(members), tensors, noise, generator=generator)
        likelihood = module.decoder.likelihood
        values = likelihood.mean(decoded, torch.as_tensor(draw.total, device=module.device)[:, None])
        del decoded
        if sample:
            values = likelihood.sample(values, generator)
        blocks = [self._comparable(block.cpu().numpy()) @ axes.T for block in values.split(BLOCK_OF_CELLS)]
        return float(np.concatenate(blocks).var(0).sum())

    def _diagnostic_warnings(self, diagnostics: dict[str, float]) -> list[str]:
        """Return one sentence per sign of a collapsed basal state."""
        remedy = (
            "lower `cf_weight`, keep `cf_reduction='mean'`, or train longer"
            if self.module.has_artifact
            else "train longer"
        )
        messages = []
        for key, which in (("kl_basal", "all cells"), ("kl_basal_failed", "failed cells")):
            value = diagnostics.get(key)
            if value is not None and value < COLLAPSE_NATS:
                messages.append(
                    f"The basal state is unused in {which}: KL {value:.3g} nats, below {COLLAPSE_NATS}; {remedy}."
                )
        ratio = min(
            (diagnostics[k] for k in ("variance_ratio", "state_variance_ratio") if k in diagnostics), default=None
        )
        if ratio is not None and ratio < MIN_VARIANCE_RATIO:
            messages.append(
                f"Generated cells vary too little from cell to cell: {ratio:.2f} of the real variance, below "
                f"{MIN_VARIANCE_RATIO}; {remedy}."
            )
        return messages

    def evaluate(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        n_samples: int = 300,
        library_size: float | Literal["observed"] = "observed",
        passed_only: bool = True,
        exclude_targets: bool = False,
        n_bootstrap: int = 200,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Score generated cells against real ones, beside a trivial baseline and the replicate ceiling.

        Parameters
        ----------
        adata, indices
            Real cells; default: the test cells of the model's split, else its validation cells. Of more than 200,000 own
            cells on disk as many of every label as there is room for are read, here and for the baseline.
        n_samples
            Generated cells per label (and controls).
        library_size
            As in :meth:`get_generated_expression`.
        passed_only
            Compare with real cells that passed QC, as the model generates artifact-free cells.
        exclude_targets
            Leave the genes that a perturbation targets out of its scores on effects.
        n_bootstrap, seed
            Bootstrap over perturbations, and seed.

        Returns
        -------
        DataFrame of :func:`scvi_cradle.metrics.evaluate`; ``attrs["diagnostics"]`` holds :meth:`get_diagnostics`.

        Raises
        ------
        ValueError
            If there are no held-out cells and none were given.
        NotImplementedError
            For a Gaussian likelihood: the metrics need counts.
        """
        self._needs_counts("`evaluate`")
        data = self._validate_anndata(adata)
        positions = self._held_out() if adata is None and indices is None else check_indices(indices, data)
        real = self._with_controls(self._real_cells(data, positions, passed_only=passed_only), passed_only=passed_only)
        train = self._training_cells(passed_only=passed_only) if self._has_training_data() else None
        control = self._rule.control_name
        labels = [x for x in sorted(set(real.obs[COLUMNS.PERTURBATION])) if x != control]
        predicted = self.get_generated_expression(
            [control, *labels], n_samples=n_samples, library_size=library_size, seed=seed
        )
        table = metrics.evaluate(
            real,
            predicted,
            perturbation_key=COLUMNS.PERTURBATION,
            control=control,
            sep=self._rule.sep,
            train=train,
            exclude_targets=exclude_targets,
            n_bootstrap=n_bootstrap,
            seed=seed,
        )
        table.attrs["diagnostics"] = self.diagnostics_
        return table

    def _training_cells(self, *, passed_only: bool = False) -> AnnData:
        return self._real_cells(self.adata, self._some_of(np.asarray(self.train_indices_)), passed_only=passed_only)

    def _some_of(self, positions: np.ndarray) -> np.ndarray:
        """Return positions of own cells: all, or of cells on disk up to 200,000, as many of every label as there is room for."""
        if len(positions) <= MAX_READ or stored_matrix(self.adata_manager) is None:
            return positions
        codes = np.asarray(self.adata_manager.get_from_registry(KEYS.PERTURBATION)).ravel()[positions]
        mixed = np.random.default_rng(0).permutation(len(positions))
        number = pd.Series(codes[mixed]).groupby(codes[mixed]).cumcount().to_numpy()  # of a cell in its label
        return np.sort(positions[mixed[number < MAX_READ // len(np.unique(codes))]])

    def _held_out(self) -> np.ndarray:
        for held_out in (self.test_indices_, self.validation_indices_):
            if held_out is not None and len(held_out) and self._has_training_data():
                return self._some_of(np.asarray(held_out))
        msg = "There are no held-out cells; train with `split_key` or `train_size`, or pass `adata` or `indices`."
        raise ValueError(msg)

    def _with_controls(self, real: AnnData, *, passed_only: bool) -> AnnData:
        """Add control cells where the real cells hold none: those of the validation set, else of the training set."""
        control = self._rule.control_name
        if (real.obs[COLUMNS.PERTURBATION] == control).any():
            return real
        if not self._has_training_data():
            msg = "`adata` must hold control cells, since the model was loaded without its own data; received none: add controls."
            raise ValueError(msg)
        for source in (self.validation_indices_, self.train_indices_):
            if source is None or not len(source):
                continue
            cells = self._real_cells(self.adata, self._some_of(np.asarray(source)), passed_only=passed_only)
            controls = cells[(cells.obs[COLUMNS.PERTURBATION] == control).to_numpy()]
            if controls.n_obs:
                return concat([real, controls], uns_merge="first")
        return real

    def _real_cells(self, data: AnnData | MuData, positions: np.ndarray, *, passed_only: bool = False) -> AnnData:
        """Return counts, canonical labels and flags of real cells as a plain AnnData."""
        manager = self.get_anndata_manager(data, required=True)
        labels = np.array(label_table(manager.get_state_registry(KEYS.PERTURBATION)).labels)
        codes = np.asarray(manager.get_from_registry(KEYS.PERTURBATION)).ravel()[positions].astype(int)
        flags = failed_cells(manager, positions)
        kept = ~flags if passed_only else np.ones(len(flags), dtype=bool)
        obs = pd.DataFrame(
            {COLUMNS.PERTURBATION: pd.Categorical(labels[codes[kept]]), COLUMNS.ARTIFACT: flags[kept]},
            index=np.asarray(data.obs_names)[positions[kept]],
        )
        if len(self._batches) > 1:  # thresholds may be per batch
            batch = np.asarray(manager.get_from_registry("batch")).ravel()[positions[kept]].astype(int)
            obs[self._state("batch")["original_key"]] = pd.Categorical.from_codes(batch, categories=self._batches)
        matrix = to_csr(manager.get_from_registry("X")[positions[kept]])
        real = AnnData(X=matrix, obs=obs, var=pd.DataFrame(index=self._genes))
        if self.qc_record_ is not None:
            real.uns[QC_UNS_KEY] = self.qc_record_
        return real


def failed_cells(manager: Any, positions: np.ndarray) -> np.ndarray:
    """Return which cells failed QC; none where no flag is registered."""
    if KEYS.ARTIFACT not in manager.data_registry:
        return np.zeros(len(positions), dtype=bool)
    return np.asarray(manager.get_from_registry(KEYS.ARTIFACT)).ravel()[positions] > 0


def principal_variance(values: Any, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Return principal axes of one half of the cells, ``(n_axes, n_genes)``, and the variance of the other half along them.

    The axes come from the products between cells, which are added up over blocks of genes.

    Parameters
    ----------
    values
        Expression, shape ``(n_cells, n_genes)``: sparse matrix or array.
    rng
        Splits the cells.
    """
    order = rng.permutation(values.shape[0])
    half = len(order) // 2
    fitted = sp.csc_matrix(values[order[:half]], dtype=np.float64)
    products = np.zeros((half, half))
    for start in range(0, fitted.shape[1], BLOCK_OF_GENES):
        block = fitted[:, start : start + BLOCK_OF_GENES].toarray()
        products += block @ block.T
    smallest = NO_AXIS * np.trace(products)
    products -= products.mean(axis=0)
    products -= products.mean(axis=1, keepdims=True)
    squares, vectors = np.linalg.eigh(products)
    squares, vectors = squares[::-1], vectors[:, ::-1]
    kept = min(N_COMPONENTS, half - 1, int((squares > smallest).sum()))
    # the vectors are orthogonal to 1, so that centred and given values have the same products with them
    axes = (fitted.T @ (vectors[:, :kept] / np.sqrt(squares[:kept]))).T
    return axes, max(float((values[order[half:]] @ axes.T).var(0).sum()), 1e-12)
