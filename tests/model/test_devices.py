"""Generation and effects over several devices: the same numbers in the same order."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import scanpy as sc
import scipy.sparse as sp
import torch

from scvi_cradle import QuantileHurdleAE, datasets
from scvi_cradle.model._devices import block_generator, copies_on, spread

pytestmark = [
    pytest.mark.filterwarnings("ignore:The (basal state is|invariant variables are) unused:UserWarning"),  # short
    pytest.mark.filterwarnings("ignore:Generated cells (vary too little|of one label are close):UserWarning"),
]
TWO = ["cpu", "cpu"]


def dense(adata):
    return adata.X.toarray() if sp.issparse(adata.X) else np.asarray(adata.X)


def test_generated_cells_do_not_depend_on_the_number_of_devices(trained):
    kwargs = {"n_samples": 30, "seed": 3, "batch_size": 8}
    one, two, three = (trained.get_generated_expression(**kwargs, devices=d) for d in (None, TWO, ["cpu"] * 3))
    assert len(one) > 4 * 30
    assert np.array_equal(dense(one), dense(two))
    assert np.array_equal(dense(one), dense(three))
    assert one.obs.equals(two.obs)
    other = trained.get_generated_expression(n_samples=30, seed=4, batch_size=8, devices=TWO)
    assert not np.array_equal(dense(one), dense(other))


def test_blocks_of_cells_have_draws_of_their_own(trained):
    """A repeat of a block's generator would repeat cells."""
    cells = dense(
        trained.get_generated_expression(["G01", "G01"], n_samples=24, seed=0, batch_size=8, library_size=500)
    )
    assert len(np.unique(cells, axis=0)) > 40


@pytest.mark.parametrize("expectation", ["exact", "sample"])
@pytest.mark.parametrize("share_basal", [True, False])
def test_effects_do_not_depend_on_the_number_of_devices(trained, expectation, share_basal):
    def effects(devices):
        return trained.get_average_treatment_effects(
            n_particles=40, seed=1, expectation=expectation, share_basal=share_basal, devices=devices
        )

    one, two = effects(None), effects(TWO)
    assert list(one.obs_names) == list(two.obs_names)
    assert np.array_equal(one.X, two.X)
    assert np.array_equal(one.layers["std"], two.layers["std"])
    assert (one.layers["std"] > 0).any()


def test_moved_cells_do_not_depend_on_the_number_of_devices():
    adata = datasets.simulate_perturbseq(n_cells=200, n_genes=40, n_perturbations=3, n_combinations=1, seed=1)
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    QuantileHurdleAE.setup_anndata(adata, perturbation_key="perturbation")
    model = QuantileHurdleAE(adata, n_latent=4, n_hidden=8)
    model.train(max_epochs=1, split_key="split", enable_progress_bar=False)
    one, two = (model.get_generated_expression(n_samples=20, seed=0, devices=d).X for d in (None, TWO))
    assert np.array_equal(one, two)
    one, two = (model.get_average_treatment_effects(n_particles=20, seed=0, devices=d).X for d in (None, TWO))
    assert np.array_equal(one, two)


@pytest.mark.parametrize("wrong", [[], "cpu", ["cpu", "tpu99"], ["cuda:97"], 2])
def test_wrong_devices_are_errors(trained, wrong):
    for ask in (trained.get_generated_expression, trained.get_average_treatment_effects):
        with pytest.raises(ValueError, match=r"`devices` must .*; received"):
            ask(devices=wrong)


def test_work_is_shared_and_results_keep_the_order_of_items():
    """Two items at a time, each with a worker of its own; the first item takes longest."""
    together = threading.Barrier(2, timeout=20)

    def work(worker, item):
        if item < 2:
            together.wait()  # passes only if two threads are here at once
        time.sleep(0.2 if item == 0 else 0.0)
        assert torch.is_inference_mode_enabled()
        return worker, item

    results = list(spread(work, ["a", "b"], iter(range(7))))
    assert [item for _, item in results] == list(range(7))
    assert {worker for worker, _ in results[:2]} == {"a", "b"}


def test_few_items_wait_and_errors_arrive():
    made = []

    def items():
        for i in range(20):
            made.append(i)
            yield i

    results = spread(lambda _, item: item, ["a", "b"], items())
    assert next(results) == 0
    assert len(made) <= 6  # two for each worker wait, not all
    with pytest.raises(ZeroDivisionError):
        list(spread(lambda _, item: 1 / item, ["a", "b"], [1, 0, 1]))


def test_copies_are_apart_and_generators_are_reproducible():
    module = torch.nn.Linear(2, 2)
    first, second = copies_on(module, [torch.device("cpu")] * 2)
    assert len({m.weight.data_ptr() for m in (module, first, second)}) == 3
    assert copies_on(module, []) == [module]
    draws = [torch.rand(3, generator=block_generator(5, i, torch.device("cpu"))) for i in (0, 1, 0)]
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])
