"""The models under contract, and data on which all of them train."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import scvi

from scvi_cradle import CPAVAE, SAMSVAE, ConditionalVAE, CradleVAE, PerturbedVAE, SVAEPlus, datasets, pp

TINY = {"n_latent": 5, "n_hidden": 16}


@dataclass(frozen=True)
class Case:
    """A model, what its methods are expected to answer, and how it is trained in these tests.

    Parameters
    ----------
    model
        The class.
    components
        Its latent parts, in the order of ``"full"``.
    settings
        Arguments of the constructor.
    latent_effects
        Whether treatments have latent effects.
    combines
        Whether it predicts unseen combinations.
    """

    model: Any
    components: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    latent_effects: bool = True
    combines: bool = True

    def __str__(self):
        return "-".join([self.model.__name__, *(v for v in self.settings.values() if isinstance(v, str))])

    @property
    def artifact(self):
        return self.model._needs_artifact

    @property
    def architecture(self):
        return TINY | self.settings

    def keys(self, **keys):
        """Arguments of ``setup_anndata``."""
        defaults = {"perturbation_key": "perturbation", "batch_key": "batch"}
        return defaults | ({"artifact_key": "artifact"} if self.artifact else {}) | keys

    def build(self, adata, **keys):
        self.model.setup_anndata(adata, **self.keys(**keys))
        return self.model(adata, **self.architecture)

    def fit(self, adata, *, epochs=2, split_key="split", seed=0, **keys):
        with seeded(seed):
            model = self.build(adata, **keys)
            model.train(max_epochs=epochs, split_key=split_key, enable_progress_bar=False)
        return model


# A new model comes under the contract by one line.
MODELS = [
    Case(CradleVAE, ("basal", "perturbation", "artifact")),
    Case(SAMSVAE, ("basal", "perturbation")),
    Case(CPAVAE, ("basal", "perturbation")),
    Case(ConditionalVAE, ("latent",), latent_effects=False),
    Case(SVAEPlus, ("latent",), combines=False),
    Case(SVAEPlus, ("latent",), {"variant": "lopez"}, combines=False),
    Case(SVAEPlus, ("latent",), {"encode_combinations": "additive"}),
    Case(
        PerturbedVAE,
        ("invariant", "responsive"),
        {"likelihood": "nb", "n_latent": None, "n_latent_responsive": 5, "n_latent_invariant": 5},
        latent_effects=False,
    ),
]


@contextmanager
def seeded(seed):
    """Set scvi-tools' seed for a while."""
    before, scvi.settings.seed = scvi.settings.seed, seed
    yield
    scvi.settings._seed = before


@pytest.fixture(scope="session")
def with_seed():
    return seeded


@pytest.fixture(scope="session")
def cases():
    return MODELS


@pytest.fixture(scope="session", params=MODELS, ids=str)
def case(request):
    return request.param


@pytest.fixture(scope="session")
def shared_screen():
    """400 cells x 60 genes in two batches; ``G02+G04`` is held out, ``G01+G03`` has no cell."""
    adata = datasets.simulate_perturbseq(
        n_cells=400, n_genes=60, n_perturbations=4, n_combinations=3, artifact_fraction=0.25, n_batches=2, seed=1
    )
    pp.qc_label(adata, n_mads=3, criteria=("total_counts", "n_genes", "pct_mt"), doublets=None)
    adata.obs["depth"] = adata.obs["total_counts"] / adata.obs["total_counts"].max()
    return adata


@pytest.fixture(scope="session")
def trained(case, shared_screen):
    """A model trained for two epochs; not to be changed."""
    return case.fit(shared_screen.copy())
