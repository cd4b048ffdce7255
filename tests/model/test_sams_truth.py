"""Recovery of sparse masks: a small version of the simulation of appendix A.5 of the SAMS-VAE paper."""

from __future__ import annotations

import numpy as np
import pytest

from scvi_cradle import SAMSVAE, datasets, metrics

MASK_PROB = 0.2
LOGIT_PER_CELL = -9 / 50 * np.log(10)  # log-odds of 10 ** (-9 / 50 n), per n


def fit(n, logit, rounds, with_seed):
    """Train in rounds from fresh masks; return density and F1 of the inferred masks after every round."""
    adata = datasets.simulate_sams(60, n_latent=5, n_samples_per_treatment=n, mask_prob=MASK_PROB, seed=0)
    SAMSVAE.setup_anndata(adata, perturbation_key="perturbation")
    with with_seed(0):
        model = SAMSVAE(
            adata,
            likelihood="gaussian",
            mask_prior_logit=logit,
            mask_init_logits=2.0,
            embedding_prior_scale=10.0,
            n_latent=5,
            n_hidden=64,
            n_layers_encoder=2,
            n_layers_decoder=2,
            combine="sum",
            effect_path="decoder",
        )
        results = []
        for i in range(rounds):
            if i:
                model.reset_masks()
            model.train(
                max_steps=500, lr=3e-2, split_key="split", check_val_every_n_epoch=1000, enable_progress_bar=False
            )
            effects = model.get_perturbation_effects()
            f1 = metrics.mask_f1(adata.uns["truth"]["mask"], effects)["f1"]
            results.append(((effects.layers["mask_prob"] > 0.5).mean(), f1))
    return results


@pytest.mark.slow
def test_the_rule_of_fixed_sparsity_recovers_masks_and_a_fixed_prior_gives_denser_ones(with_seed):
    (first, _), *_, (density, f1) = fit(50, LOGIT_PER_CELL * 50, 3, with_seed)
    assert f1 > 0.9
    assert density == pytest.approx(MASK_PROB, abs=0.06)
    odds = np.log(MASK_PROB / (1 - MASK_PROB))
    ((few, _),), ((many, _),) = (fit(n, odds, 1, with_seed) for n in (20, 150))
    assert first + 0.1 < few < many - 0.05  # after one round each
