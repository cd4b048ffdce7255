"""Generated cells and counterfactuals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData
from mudata import MuData
from scvi import settings
from torch import Generator, Tensor

from scvi_cradle._constants import COLUMNS, CONTROL_UNS_KEY, COUNTS_PER_CELL, KEYS
from scvi_cradle._matrix import stack_rows
from scvi_cradle._validation import check_one_of, check_positive
from scvi_cradle.model._base import LabelledModel, check_indices
from scvi_cradle.model._devices import Devices, block_generator, check_devices, copies_on, spread
from scvi_cradle.model._draws import as_module_input, covariate_tensors, draw_libraries, make_generator
from scvi_cradle.module.base import Pairs
from scvi_cradle.module.base import library_size as observed_library_size

Output = Literal["counts", "mean", "normalized"]
OUTPUTS = ("counts", "mean", "normalized")


@dataclass(frozen=True)
class Request:
    """How new cells are asked for (see ``get_generated_expression``)."""

    n_samples: int
    artifact: bool
    library_size: float | Literal["observed"]
    output: Output
    batch: str | None
    seed: int | None
    batch_size: int | None
    devices: Devices = None


class GenerationMixin(LabelledModel):
    """New cells from the prior and counterfactuals of given cells."""

    def get_generated_expression(
        self,
        perturbations: str | Sequence[str] | None = None,
        *,
        n_samples: int = 100,
        artifact: bool = False,
        library_size: float | Literal["observed"] = "observed",
        output: Output = "counts",
        batch: str | None = None,
        seed: int | None = None,
        batch_size: int | None = None,
        devices: Devices = None,
    ) -> AnnData:
        """Generate new cells from the prior (CRADLE-VAE, Alg. 3).

        Parameters
        ----------
        perturbations
            Labels, also unseen combinations of seen treatments. Default: all labels seen in training, sorted.
        n_samples
            Cells per label.
        artifact
            Generate cells with the technical artifact instead of without.
        library_size
            ``"observed"``: total counts are drawn from training cells (that passed QC; failed cells for
            ``artifact=True``; of the same batch), one set of draws shared by all labels. A number fixes the total.
        output
            ``"counts"``: integer counts as CSR (dense values for a Gaussian likelihood); ``"mean"``: expected counts;
            ``"normalized"``: expected counts per 10,000.
        batch
            Batch to generate; default: as in the training cells that the library sizes come from.
        seed
            Seed of the draws; default: from torch's global generator, which ``scvi.settings.seed`` governs.
        batch_size
            Cells decoded at once. Default ``scvi.settings.batch_size``.
        devices
            Devices to share the work, each with a copy of the module, e.g. ``["cuda:0", "cuda:1"]``. Draws do not depend
            on their number. Default: the model's device.

        Returns
        -------
        AnnData of shape ``(len(perturbations) * n_samples, n_genes)``, blocks of cells in the order of the request;
        ``obs``: ``perturbation`` (and the registered key), ``artifact``, ``seen`` (``"seen"`` or
        ``"unseen combination"``), ``library_size`` (of counts) and the batch.

        Raises
        ------
        ValueError
            For an unknown treatment (near matches are named), an unknown batch, or no training cell with the flag.
        NotImplementedError
            For an artifact, a combination or a scale that the model does not have.
        RuntimeError
            If the model is not trained.
        """
        return self._generate(
            perturbations, Request(n_samples, artifact, library_size, output, batch, seed, batch_size, devices)
        )

    @torch.inference_mode()
    def _generate(
        self,
        perturbations: str | Sequence[str] | None,
        request: Request,
        pool: dict[str, np.ndarray] | None = None,
    ) -> AnnData:
        """Generate cells with covariates, library sizes and states of the cells of a pool; default: the model's own."""
        labels = self._requested_labels(perturbations)
        pool = self._library_pool if pool is None else pool
        self._check_output(request.output)
        artifact = bool(request.artifact)
        with_artifact = self._artifact_argument(artifact=artifact)
        check_positive("n_samples", request.n_samples, integer=True)
        devices = check_devices(request.devices)
        generator, rng = _randomness(self, request.seed)
        batch = self._batch_code(request.batch)
        draw = draw_libraries(pool, request.n_samples, request.library_size, artifact=artifact, batch=batch, rng=rng)
        covariates = covariate_tensors(pool, draw.rows)
        members, seed = torch.as_tensor(self._members(labels)), generator.initial_seed()

        def make(module: Any, block: tuple[int, Tensor, np.ndarray]) -> Any:
            number, row, rows = block
            own = block_generator(seed, number, module.device)
            tensors = as_module_input({k: v[rows] for k, v in covariates.items()}, module.device)
            pairs = Pairs.from_members(row.to(module.device).expand(len(rows), -1))
            noise = self._draw_noise(pool, draw.rows[rows], own)
            decoded = decode_prior(module, pairs, tensors, noise, generator=own, **with_artifact)
            return _emit(
                module, decoded, torch.as_tensor(draw.total[rows], device=module.device)[:, None], request.output, own
            )

        parts = ((row, rows) for row in members for rows in _blocks(request.n_samples, request.batch_size))
        blocks = list(spread(make, copies_on(self.module, devices), ((i, *part) for i, part in enumerate(parts))))
        obs = self._generated_obs(labels, request.n_samples, artifact=artifact)
        if self.module.decoder.likelihood.counts:
            obs["library_size"] = np.tile(draw.total, len(labels))
        self._add_batch(obs, np.tile(pool["batch"][draw.rows], len(labels)))
        return _as_anndata(blocks, obs, self._genes, self._rule.control_name)

    def _draw_noise(
        self, pool: dict[str, np.ndarray], rows: np.ndarray, generator: Generator, *, vary: bool = True
    ) -> Tensor:
        """Return what new cells differ by, shape ``(1, n_cells, n_latent)``: standard normal, or 0 for ``vary=False``.

        ``rows`` are the cells of the pool that new cells take their covariates from.
        """
        noise = torch.randn((1, len(rows), self.module.n_latent), generator=generator, device=generator.device)
        return noise if vary else torch.zeros_like(noise)

    @torch.inference_mode()
    def get_counterfactual_expression(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        perturbation: str | Sequence[str] | None = None,
        artifact: bool = False,
        output: Output = "counts",
        library_size: float | Literal["observed"] = "observed",
        seed: int | None = None,
        batch_size: int | None = None,
    ) -> AnnData:
        """Predict the same cells had they received another perturbation, with or without the artifact.

        The basal state is drawn from the posterior of the observed cell and decoded under the asked treatment:
        controls and the name of a perturbation in, predicted cells out.

        Parameters
        ----------
        adata, indices
            Cells; default: the model's own.
        perturbation
            One label for all cells or one per cell. Default: every cell keeps its own.
        artifact
            Whether the predicted cells carry the artifact.
        output, seed, batch_size
            As in :meth:`get_generated_expression`.
        library_size
            ``"observed"``: the cell's own total count. A number fixes it.

        Returns
        -------
        AnnData of the same cells in the same order, their ``obs`` with the label replaced (the old one is kept as
        ``perturbation_observed``) and the flag replaced (the old one is kept as ``<artifact_key>_observed``).

        Raises
        ------
        ValueError
            For an unknown treatment or for labels that are not one per cell.
        NotImplementedError
            For an artifact, a combination or a scale that the model does not have.
        """
        self._trained_counts()
        self._check_output(output)
        with_artifact = self._artifact_argument(artifact=bool(artifact))
        data = self._validate_anndata(adata)
        positions = check_indices(indices, data)
        targets = self._target_labels(perturbation, len(positions))
        self._requested_labels(self._observed_labels(data, positions).unique().tolist())  # trained, or an error
        loader = self._make_data_loader(data, indices=positions, batch_size=batch_size)
        generator, _ = _randomness(self, seed)
        blocks, start = [], 0
        self.module.eval()
        for tensors in loader:
            tensors = as_module_input(tensors, self.module.device)
            inputs = self.module._get_inference_input(tensors)
            outputs = self.module.inference(**inputs, n_samples=1, sample=self._draws_latents, generator=generator)
            n = len(inputs["x"])
            target = None if targets is None else self._pairs_of(targets[start : start + n])
            parts = self.module.intervene(
                outputs["latent"], outputs["pairs"], target, generator=generator, **with_artifact
            )
            decoded = self.module.decoder(parts, self.module.covariates(tensors))[0]
            blocks.append(_emit(self.module, decoded, _own_library(inputs["x"], library_size), output, generator))
            start += n
        obs = self._counterfactual_obs(data, positions, targets, artifact=bool(artifact))
        return _as_anndata(blocks, obs, self._genes, self._rule.control_name)

    @property
    def _draws_latents(self) -> bool:
        """Whether latent variables are drawn, or taken at their means."""
        return bool(self._architecture.get("sample_latents", True))

    def _target_labels(self, perturbation: str | Sequence[str] | None, n: int) -> list[str] | None:
        if perturbation is None:
            return None
        if isinstance(perturbation, str):
            return self._requested_labels(perturbation) * n
        if len(perturbation) != n:
            msg = (
                f"`perturbation` must be one label, or one per cell; received {len(perturbation)} labels for {n} cells."
            )
            raise ValueError(msg)
        return self._requested_labels(list(perturbation)) if n else []

    def _pairs_of(self, labels: list[str]) -> Pairs:
        """Return the treatments of one label per cell."""
        return Pairs.from_members(torch.as_tensor(self._members(labels), device=self.module.device))

    def _check_output(self, output: str) -> None:
        check_one_of("output", output, OUTPUTS)
        if output == "normalized":
            self._needs_counts("output='normalized'")

    def _generated_obs(self, labels: list[str], n_samples: int, *, artifact: bool) -> pd.DataFrame:
        counts = self._trained_counts()
        names = pd.Categorical(np.repeat(labels, n_samples), categories=list(dict.fromkeys(labels)))
        seen = np.where([counts.get(label, 0) > 0 for label in labels], "seen", "unseen combination")
        obs = pd.DataFrame({COLUMNS.PERTURBATION: names}, index=[f"generated_{i}" for i in range(len(names))])
        if self._state(KEYS.PERTURBATION)["from_dosage"] is False:
            obs[self._perturbation_key] = names
        obs[COLUMNS.ARTIFACT] = artifact
        obs[COLUMNS.SEEN] = pd.Categorical(np.repeat(seen, n_samples))
        return obs

    def _add_batch(self, obs: pd.DataFrame, codes: np.ndarray) -> None:
        state = self._state("batch")
        if len(state["categorical_mapping"]) > 1:
            obs[state["original_key"]] = pd.Categorical.from_codes(codes, categories=self._batches)

    def _observed_labels(self, data: AnnData | MuData, positions: np.ndarray) -> pd.Categorical:
        manager = self.get_anndata_manager(data, required=True)
        codes = np.asarray(manager.get_from_registry(KEYS.PERTURBATION)).ravel()[positions].astype(int)
        labels = np.array(manager.get_state_registry(KEYS.PERTURBATION)["labels"], dtype=object)
        return pd.Categorical(labels[codes])

    def _counterfactual_obs(
        self, data: AnnData | MuData, positions: np.ndarray, targets: list[str] | None, *, artifact: bool
    ) -> pd.DataFrame:
        manager = self.get_anndata_manager(data, required=True)
        state = manager.get_state_registry(KEYS.PERTURBATION)
        observed = self._observed_labels(data, positions)
        cells = data.obs.iloc[positions]
        obs = cells.drop(columns=[c for c in cells if str(c).startswith("_scvi")])
        key = COLUMNS.PERTURBATION if state["from_dosage"] else state["original_key"]
        obs[COLUMNS.PERTURBATION_OBSERVED] = observed
        obs[key] = observed if targets is None else pd.Categorical(targets)
        if self._artifact_key is not None:
            flags = np.asarray(manager.get_from_registry(KEYS.ARTIFACT)).ravel()[positions] > 0
            obs[f"{self._artifact_key}_observed"] = flags
            obs[self._artifact_key] = artifact
        return obs


def decode_prior(
    module: Any, pairs: Pairs, tensors: dict[str, Tensor], noise: Tensor, *, generator: Generator, **artifact: bool
) -> Tensor:
    """Decode new cells with the given noise of their own; global variables are drawn."""
    module.eval()
    return module.decoder(module.prior(pairs, noise, generator=generator, **artifact), module.covariates(tensors))[0]


def _randomness(model: LabelledModel, seed: int | None) -> tuple[Generator, np.random.Generator]:
    generator = make_generator(seed, model.module.device)
    return generator, np.random.default_rng(generator.initial_seed())


def _blocks(n: int, batch_size: int | None) -> Iterator[np.ndarray]:
    size = batch_size or settings.batch_size
    for start in range(0, n, size):
        yield np.arange(start, min(start + size, n))


def _own_library(x: Tensor, library_size: float | str) -> Tensor:
    if isinstance(library_size, str):
        check_one_of("library_size", library_size, ("observed",))
        return observed_library_size(x)
    check_positive("library_size", library_size)
    return torch.full((len(x), 1), float(library_size), device=x.device)


def _emit(module: Any, decoded: Tensor, library: Tensor, output: Output, generator: Generator) -> Any:
    likelihood = module.decoder.likelihood
    if output == "normalized":
        return (torch.softmax(decoded, dim=-1) * COUNTS_PER_CELL).cpu().numpy()
    mean = likelihood.mean(decoded, library)
    if output == "mean":
        return mean.cpu().numpy()
    values = likelihood.sample(mean, generator).cpu().numpy()
    return sp.csr_matrix(values) if likelihood.counts else values


def _as_anndata(blocks: list[Any], obs: pd.DataFrame, genes: list[str], control: str) -> AnnData:
    x = stack_rows(blocks) if sp.issparse(blocks[0]) else np.concatenate(blocks)
    return AnnData(
        X=x.astype(np.float32, copy=False), obs=obs, var=pd.DataFrame(index=genes), uns={CONTROL_UNS_KEY: control}
    )
