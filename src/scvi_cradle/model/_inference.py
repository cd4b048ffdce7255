"""Latent representations and bounds of the likelihood of given cells."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from torch import Tensor

from scvi_cradle._validation import check_one_of, check_positive
from scvi_cradle.model._base import LabelledModel
from scvi_cradle.model._draws import as_module_input
from scvi_cradle.module.base import importance_weighted_bound, library_size


class InferenceMixin(LabelledModel):
    """Posterior queries."""

    @torch.inference_mode()
    def get_latent_representation(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | np.ndarray | None = None,
        *,
        component: str | None = None,
        give_mean: bool = True,
        batch_size: int | None = None,
        dataloader: Iterable[dict[str, Tensor]] | None = None,
    ) -> np.ndarray:
        """Return latent variables of cells.

        Parameters
        ----------
        adata, indices
            Cells; default: the model's own.
        component
            A part by name, or ``"full"``: all parts side by side. CradleVAE: ``"basal"`` (default), ``"perturbation"``,
            ``"artifact"``; SAMSVAE and CPAVAE: ``"basal"`` (default), ``"perturbation"``; PerturbedVAE: ``"invariant"``
            (default), ``"responsive"`` and, beside the latent variables, ``"hidden"`` (the output of the encoder); the
            others: ``"latent"``.
        give_mean
            Posterior means instead of a draw.
        batch_size
            Cells encoded at once.
        dataloader
            Batches of tensors, instead of ``adata``.

        Returns
        -------
        Array of shape ``(n_cells, width of the part)``; for ``"full"`` widths add up.

        Raises
        ------
        ValueError
            For an unknown component.
        """
        parts = []
        for _, latent in self._latent_batches(
            adata, indices, batch_size, dataloader, n_samples=1, sample=not give_mean
        ):
            values = self.module.components(latent)
            name = next(iter(values)) if component is None else component
            check_one_of("component", name, (*values, "full"))
            latents = [v for part, v in values.items() if part not in self.module.beside_full]
            chosen = latents if name == "full" else [values[name]]
            parts.append(torch.cat([v[0] for v in chosen], dim=-1).cpu().numpy())
        return np.concatenate(parts)

    @torch.inference_mode()
    def get_iwelbo(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        n_particles: int = 100,
        score_global: bool = False,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Return the importance-weighted bound of every cell (SAMS-VAE, eq. 7, per cell as in its evaluation).

        ``logsumexp_k [log p(x | .) + log p(z_b) - log q(z_b)] - log K``, with K draws of the global variables that all
        cells share.

        Parameters
        ----------
        adata, indices
            Cells; default: the model's own.
        n_particles
            K.
        score_global
            Add each cell's share of the global terms, ``1{dosage != 0} / n_t`` and ``artifact / n_failed``.
        batch_size
            Cells at once.

        Returns
        -------
        Array of shape ``(n_cells,)``, in nats.
        """
        self._trained_counts()
        self._needs_density("get_iwelbo")
        check_positive("n_particles", n_particles, integer=True)
        seed = int(torch.randint(2**31 - 1, (1,)))
        device, bounds = self.module.device, []
        loader = self._loader(adata, indices, batch_size)
        weights: list[list[Tensor]] = []
        self.module.eval()
        for particle in range(n_particles):
            globals_ = self.module.draw_globals(torch.Generator(device=device).manual_seed(seed + particle))
            local = torch.Generator(device=device).manual_seed(seed + n_particles + particle)
            for i, tensors in enumerate(loader):
                log_weight = _log_weight(
                    self.module, as_module_input(tensors, device), globals_, local, score_global=score_global
                )
                if particle == 0:
                    weights.append([])
                weights[i].append(log_weight)
        for batch in weights:
            bounds.append(importance_weighted_bound(torch.stack(batch)).cpu().numpy())
        return np.concatenate(bounds)

    @torch.inference_mode()
    def get_elbo(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        *,
        dataloader: Iterable[dict[str, Tensor]] | None = None,
        return_mean: bool = True,
        n_particles: int = 1,
    ) -> float | np.ndarray:
        """Return the ELBO in nats (higher is better), each cell with its share of the global terms.

        Parameters
        ----------
        adata, indices
            Cells; default: the model's own.
        batch_size
            Cells at once.
        dataloader
            Batches of tensors, instead of ``adata``.
        return_mean
            The mean over cells, or one value per cell, shape ``(n_cells,)``.
        n_particles
            Draws per cell.
        """
        self._needs_density("get_elbo")
        values = []
        for tensors, outputs in self._batches_with_outputs(
            adata, indices, batch_size, dataloader, n_samples=n_particles
        ):
            error, kl_basal, kl_global = _elbo_terms(self.module, tensors, outputs)
            values.append((-error - kl_basal - kl_global).cpu().numpy())
        elbo = np.concatenate(values)
        return float(elbo.mean(dtype=np.float64)) if return_mean else elbo

    @torch.inference_mode()
    def get_reconstruction_error(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        *,
        dataloader: Iterable[dict[str, Tensor]] | None = None,
        return_mean: bool = True,
        n_particles: int = 1,
    ) -> dict[str, Any]:
        """Return ``{"reconstruction_loss": ...}``: ``-log p(x | z)`` in nats, at draws of the posterior.

        For ``likelihood="mse"`` of PerturbedVAE: the mean squared error over genes.

        Parameters
        ----------
        adata, indices, batch_size, dataloader, return_mean, n_particles
            As in :meth:`get_elbo`.
        """
        values = []
        for tensors, outputs in self._batches_with_outputs(
            adata, indices, batch_size, dataloader, n_samples=n_particles
        ):
            values.append(_elbo_terms(self.module, tensors, outputs)[0].cpu().numpy())
        error = np.concatenate(values)
        return {"reconstruction_loss": float(error.mean(dtype=np.float64)) if return_mean else error}

    def _batches_with_outputs(
        self,
        adata: AnnData | None,
        indices: Any,
        batch_size: int | None,
        dataloader: Iterable[dict[str, Tensor]] | None = None,
        **kwargs: Any,
    ) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
        self._trained_counts()
        self.module.eval()
        for tensors in self._loader(adata, indices, batch_size) if dataloader is None else dataloader:
            moved = as_module_input(tensors, self.module.device)
            yield moved, self.module.inference(**self.module._get_inference_input(moved), **kwargs)

    def _latent_batches(
        self,
        adata: AnnData | None,
        indices: Any,
        batch_size: int | None,
        dataloader: Iterable[dict[str, Tensor]] | None = None,
        **kwargs: Any,
    ) -> Iterator[tuple[dict[str, Tensor], Any]]:
        for tensors, outputs in self._batches_with_outputs(adata, indices, batch_size, dataloader, **kwargs):
            yield tensors, outputs["latent"]


def _elbo_terms(module: Any, tensors: dict[str, Tensor], outputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return reconstruction error, divergence of ``z_b`` and share of the global divergences of every cell, ``(n_cells,)``."""
    latent, inputs = outputs["latent"], module._get_inference_input(tensors)
    features = module.generative(**module._get_generative_input(tensors, outputs))["features"]
    log_prob = module.decoder.log_prob(inputs["x"], features, library_size(inputs["x"]))
    shares = module.global_shares(latent, outputs["pairs"], inputs)
    return -log_prob.mean(0), module.kl_basal(latent).mean(0), shares.mean(0)


def _log_weight(
    module: Any,
    tensors: dict[str, Tensor],
    globals_: dict[str, Any],
    generator: torch.Generator,
    *,
    score_global: bool,
) -> Tensor:
    """Return ``log p(x | .) + log p(z_b) - log q(z_b)`` of cells at one draw of the global variables, ``(n_cells,)``."""
    inputs = module._get_inference_input(tensors)
    outputs = module.inference(**inputs, n_samples=1, generator=generator, **globals_)
    features = module.generative(**module._get_generative_input(tensors, outputs))["features"]
    return module.log_weights(tensors, outputs, features, score_global=score_global)[0]
