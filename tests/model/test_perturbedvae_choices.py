"""PerturbedVAE: controls that are partners alone, and the posterior of the noise without a hidden layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from scvi_cradle import PerturbedVAE, datasets
from scvi_cradle._matrix import log_normalize

pytestmark = [
    pytest.mark.filterwarnings("ignore:The invariant variables are unused:UserWarning"),  # short training
    pytest.mark.filterwarnings("ignore:Generated cells of one label are close:UserWarning"),
]
D, N_HIDDEN = 4, 16
SIZES = {"n_latent_responsive": D, "n_latent_invariant": 6, "n_hidden": N_HIDDEN, "n_layers": 1}
QUIET = {"split_key": "split", "enable_progress_bar": False}


@pytest.fixture(scope="module")
def screen():
    adata = datasets.simulate_perturbseq(
        n_cells=300, n_genes=40, n_perturbations=4, n_combinations=0, artifact_fraction=0.0, seed=3
    )
    adata.layers["log"] = log_normalize(adata.X).astype(np.float32)
    adata.obs["split"] = np.where(np.arange(300) % 5 > 0, "train", "val")
    return adata


def built(screen, **settings):
    adata = screen.copy()
    PerturbedVAE.setup_anndata(adata, perturbation_key="perturbation", layer="log")
    torch.manual_seed(0)
    return PerturbedVAE(adata, **(SIZES | settings))


class Batches(Callback):
    """Labels, partners and stages of the batches of a run."""

    def __init__(self):
        self.labels, self.partners, self.validated = [], [], []

    def on_train_batch_start(self, trainer, module, batch, *args):
        self.labels.append(batch["perturbation"].ravel())
        self.partners.append(batch["control_partner"])

    def on_validation_batch_start(self, trainer, module, batch, *args, **kwargs):
        self.validated.append(batch["perturbation"].ravel())


# ---- controls as partners alone -------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", ["l2", "mmd"])
def test_controls_can_be_partners_alone(screen, alignment, tmp_path):
    model, batches = built(screen, alignment=alignment, control_cells="partners"), Batches()
    model.train(max_epochs=2, callbacks=[batches], **QUIET)
    control = model._table.labels.index("control")
    seen = torch.cat(batches.labels).numpy()
    labels, split = screen.obs["perturbation"].astype(str).to_numpy(), screen.obs["split"].to_numpy()
    perturbed = (labels != "control") & (split == "train")
    assert control not in seen
    assert len(seen) == 2 * perturbed.sum()  # each once an epoch
    validated = torch.cat(batches.validated).numpy()
    assert len(validated) > 0
    assert control not in validated
    rows = screen.layers["log"].toarray()
    controls = {row.tobytes() for row in rows[(labels == "control") & (split == "train")]}
    assert {row.tobytes() for row in torch.cat(batches.partners).numpy()} <= controls
    # whatever is learnt from the data beside gradients is the same
    other = built(screen, alignment=alignment)
    other.train(max_epochs=1, **QUIET)
    assert model.label_counts_ == other.label_counts_
    torch.testing.assert_close(model.module.input_mean, other.module.input_mean)
    np.testing.assert_array_equal(model.libraries_["cell"], other.libraries_["cell"])
    np.testing.assert_array_equal(model.train_indices_, np.flatnonzero(split == "train"))
    # numbers of cells that scvi-tools scales by are those of the batches
    assert model.trainer.lightning_module.n_obs_training == perturbed.sum()
    assert np.isfinite(model.history["elbo_validation"].to_numpy(dtype=float)).all()
    assert set(model.diagnostics_) >= {"kl_invariant", "kl_responsive", "variance_ratio"}
    assert np.isfinite(list(model.get_diagnostics().values())).all()
    model.save(tmp_path / "model", save_anndata=True)
    model = PerturbedVAE.load(tmp_path / "model")
    assert np.isfinite(model.get_generated_expression(["control", "G01"], n_samples=5, seed=0).X).all()


def test_a_budget_of_steps_is_that_of_batches_without_controls(screen):
    model, batches = built(screen, alignment="l2", control_cells="partners"), Batches()
    model.train(max_steps=21, batch_size=16, callbacks=[batches], **QUIET)
    assert len(batches.labels) == 21


def test_named_partners_of_controls_are_not_needed(screen):
    adata = screen.copy()
    labels, split = adata.obs["perturbation"].astype(str), adata.obs["split"]
    pool = adata.obs_names[(labels == "control") & (split == "train")]
    adata.obs["partner"] = np.where(labels == "control", None, np.resize(pool, adata.n_obs))
    pairs = {"control_pairing": "shared", "control_partner_key": "partner"}
    model, batches = built(adata, control_cells="partners", **pairs), Batches()
    model.train(max_epochs=1, callbacks=[batches], **QUIET)
    assert len(batches.labels) > 0
    with pytest.raises(ValueError, match="must have a value for every cell"):
        built(adata, **pairs).train(max_epochs=1, **QUIET)


@pytest.mark.parametrize("settings", [{}, {"alignment": "none"}], ids=str)
def test_partners_alone_need_an_alignment(screen, settings):
    with pytest.raises(ValueError, match="`control_cells='partners'` needs an alignment.*received alignment='none'"):
        built(screen, control_cells="partners", **settings)


def test_partners_alone_need_perturbed_cells(screen):
    adata = screen.copy()
    adata.obs["split"] = np.where(adata.obs["perturbation"] == "control", "train", "val")
    model = built(adata, control_cells="partners", alignment="l2")
    with pytest.raises(ValueError, match="control_cells='partners' trains on perturbed cells; received"):
        model.train(max_epochs=1, **QUIET)


def test_validation_cells_that_are_all_controls_are_no_batches(screen):
    adata = screen.copy()
    control = (adata.obs["perturbation"] == "control").to_numpy()
    adata.obs["split"] = np.where(control & (np.arange(300) % 2 > 0), "val", "train")
    model, batches = built(adata, control_cells="partners", alignment="l2"), Batches()
    model.train(max_epochs=2, callbacks=[batches], **QUIET)
    assert not batches.validated
    assert len(model.validation_indices_) == (adata.obs["split"] == "val").sum()


# ---- the posterior of the noise -------------------------------------------------------------------------------------


def test_a_linear_posterior_of_the_noise_has_no_hidden_layer(screen):
    model = built(screen, noise_encoder="linear")
    model.train(max_epochs=1, **QUIET)
    module, n_inputs = model.module, N_HIDDEN + 4
    sizes = {name: p.shape for name, p in module.named_parameters() if name.startswith("noise_")}
    assert sizes == {"noise_head.linear.weight": (2 * D, n_inputs), "noise_head.linear.bias": (2 * D,)}
    deep = sum(p.numel() for name, p in built(screen).module.named_parameters() if name.startswith("noise_"))
    assert deep == (n_inputs + 1) * N_HIDDEN + (N_HIDDEN + 1) * 2 * D
    x = screen.layers["log"][:6].toarray()
    tensors = next(iter(model._make_data_loader(model.adata, indices=np.arange(6))))
    doses = module.pairs(tensors["perturbation"].ravel().long()).dosage(4)
    hidden = module.encoder(module.standardize(torch.as_tensor(x)))
    inputs = torch.cat([hidden, doses], dim=1).detach().numpy()
    weight, bias = (p.detach().numpy() for p in (module.noise_head.linear.weight, module.noise_head.linear.bias))
    mean, log_variance = np.split(inputs @ weight.T + bias, 2, axis=1)
    posterior = module.inference(**module._get_inference_input(tensors))["latent"].q_noise
    np.testing.assert_allclose(posterior.loc[0].detach().numpy(), mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(posterior.scale[0].detach().numpy() ** 2, np.exp(log_variance) + 1e-4, rtol=1e-4)
    middle = module._noise_posterior((hidden[:3] + hidden[3:]) / 2, (doses[:3] + doses[3:]) / 2).loc
    torch.testing.assert_close(middle, (posterior.loc[0, :3] + posterior.loc[0, 3:]) / 2)


# ---- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"control_cells": "none"}, "`control_cells` must be one of 'included', 'partners'"),
        ({"noise_encoder": "deep"}, "`noise_encoder` must be one of 'mlp', 'linear'"),
        ({"output_activation": "relu"}, "`output_activation` must be one of"),
        ({"likelihood": "nb", "output_activation": "softplus"}, "likelihood='nb' are shares of genes"),
        ({"likelihood": "gaussian", "output_variance": 0.0}, "`output_variance` must be a positive number"),
        ({"likelihood": "gaussian", "output_variance": "fixed"}, "'learned' or a positive number; received 'fixed'"),
        ({"output_variance": 0.01}, "`output_variance` is that of likelihood='gaussian'; received 0.01"),
        ({"likelihood": "nb", "output_variance": 1.0}, "`output_variance` is that of likelihood='gaussian'"),
    ],
    ids=str,
)
def test_choices_that_cannot_be(screen, settings, message):
    with pytest.raises(ValueError, match=message):
        built(screen, **settings)


@pytest.mark.parametrize("preset", ["recommended", "paper"])
def test_choices_are_by_default_those_of_before(screen, preset):
    model = built(screen, preset=preset)
    likelihood = model.module.decoder.likelihood
    assert (likelihood.activation, model._architecture["control_cells"]) == ("identity", "included")
    assert len(model.module.noise_encoder) == 2
    assert built(screen, preset=preset, likelihood="gaussian").module.decoder.likelihood.variance is None
