"""The counterfactual term of CRADLE-VAE."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal

from scvi_cradle.module.base import BasalEncoder, Pairs, summed_gaussian_kl


class EligibleCells(NamedTuple):
    """Cells of a batch that have a counterfactual term: they passed QC and their label has a failed training cell.

    Parameters
    ----------
    eligible
        Which cells they are, boolean, shape ``(n_cells,)``.
    cells
        Their positions, shape ``(n_eligible,)``.
    labels
        Their label codes without repeats, shape ``(n_labels,)``.
    label_of_cell
        Which of these each of them has, shape ``(n_eligible,)``.
    projected
        The reference profiles of the labels in the encoder's first layer, if they are known, shape ``(n_labels, n_hidden)``.
    """

    eligible: Tensor
    cells: Tensor
    labels: Tensor
    label_of_cell: Tensor
    projected: Tensor | None = None


def eligible_cells(module: Any, label: Tensor, artifact: Tensor) -> EligibleCells | None:
    """Return the cells with a counterfactual term; None if there are none."""
    if module.cf_weight == 0 or not module.sees_effects:
        return None
    eligible = (artifact[:, 0] == 0) & module.references.available(label)
    if not bool(eligible.any()):
        return None
    cells = eligible.nonzero()[:, 0]
    return EligibleCells(eligible, cells, *torch.unique(label[cells], return_inverse=True))


def project_with_references(
    module: Any, x: Tensor, label: Tensor, artifact: Tensor
) -> tuple[Tensor, EligibleCells | None]:
    """Project expression into the encoder's first layer; in training, reference profiles of the batch in the same product."""
    found = eligible_cells(module, label, artifact) if torch.is_grad_enabled() else None
    if found is None:
        return module.encoder.first.project("x", module.standardize(x)), None
    both = module.standardize(x, module.references(found.labels))
    cells, projected = module.encoder.first.project("x", both).split((len(x), len(found.labels)))
    return cells, found._replace(projected=projected)


def counterfactual_kl(module: Any, latent: Any, pairs: Pairs, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the divergence between reference and counterfactual basal states of eligible cells.

    Parameters
    ----------
    module
        :class:`~scvi_cradle.module.CradleVAEModule`.
    latent, pairs
        What its ``inference`` returns.
    inputs
        The arguments of its ``inference``.

    Returns
    -------
    The divergences, shape ``(n_particles, n_eligible)``, and the eligible cells, boolean, shape ``(n_cells,)``.
    """
    x_projected, label = latent.x_projected, inputs["label"]
    found = latent.references or eligible_cells(module, label, inputs["artifact"])
    if found is None:
        return x_projected.new_zeros(1, 0), torch.zeros_like(label, dtype=torch.bool)
    eligible, cells, labels, inverse, reference = found
    if reference is None:
        reference = module.encoder.first.project("x", module.standardize(module.references(labels)))
    effects = latent.offsets[0]
    counterfactual = module.encoder(
        x_projected.index_select(0, cells),
        effects.index_select(1, cells),
        _artifact_on(module.encoder, latent.artifact_vector, cells),
    )
    vector = latent.artifact_vector
    if not module.share_global_samples:
        draw = module.effects.draw(pairs, len(effects), per_cell=module.per_cell)
        vector, _ = module.artifact.draw(*vector.shape[:2])
        effects = draw.to_cells(module.encoder.first.project("perturbation", draw.rows), pairs)
    one_of_label = not module.per_cell and inputs["dosage"] is None  # cells of a label have the same target
    if one_of_label:
        rows = cells.new_empty(len(labels)).scatter_(0, inverse, cells)
    else:
        rows, reference = cells, reference.index_select(0, inverse)
    target = module.encoder(reference, effects.index_select(1, rows), _artifact_on(module.encoder, vector, rows))
    loc, scale = target.loc, target.scale
    if module.cf_detach_reference:
        loc, scale = loc.detach(), scale.detach()
    if one_of_label:
        loc, scale = loc.index_select(1, inverse), scale.index_select(1, inverse)
    target = Normal(loc, scale, validate_args=False)
    first, second = (target, counterfactual) if module.cf_direction == "reference_first" else (counterfactual, target)
    return summed_gaussian_kl(first, second), eligible


def _artifact_on(encoder: BasalEncoder, vector: Tensor, cells: Tensor) -> Tensor:
    """Return the encoder offset of cells with the artifact switched on, shape ``(P, n_cells or 1, H)``."""
    return encoder.first.project("artifact", vector if vector.shape[1] == 1 else vector.index_select(1, cells))
