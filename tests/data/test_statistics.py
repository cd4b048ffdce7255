"""What is learnt from training cells: moments, counts, library sizes and reference profiles, against plain loops."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scvi_cradle._constants import KEYS
from scvi_cradle.data import _statistics, training_statistics
from scvi_cradle.data import label_table as read_label_table
from scvi_cradle.model import CradleVAE

N_GENES = 5
# label: (flags of the training cells, flags of other cells)
DESIGN = {
    "control": ([1, 1, 1, 1, 0, 0, 0], [1, 0]),  # even number of failed cells
    "A": ([1, 1, 1, 0, 0], [1, 1]),  # odd
    "B": ([1, 0, 0], [0]),  # one
    "C": ([0, 0], [1]),  # none in training, one outside
    "A+B": ([1, 1], [0]),  # all failed
}


@pytest.fixture
def screen():
    """AnnData, training positions (shuffled) and the matching label and flag arrays."""
    rng = np.random.default_rng(0)
    rows = [(label, flag, part == 0) for label, parts in DESIGN.items() for part in (0, 1) for flag in parts[part]]
    rows = [rows[i] for i in rng.permutation(len(rows))]
    label, flag, train = (np.array(v) for v in zip(*rows, strict=True))
    x = rng.poisson(rng.gamma(0.8, 6.0, (len(rows), N_GENES)))
    x[:, 3] = 2  # a gene without variance
    obs = pd.DataFrame(
        {
            "perturbation": label,
            "failed": flag.astype(bool),
            "batch": rng.choice(["x", "y"], len(rows)),
            "age": rng.random(len(rows)),
        },
        index=[f"c{i}" for i in range(len(rows))],
    )
    adata = ad.AnnData(X=sp.csr_matrix(x.astype(np.float32)), obs=obs)
    return adata, rng.permutation(np.flatnonzero(train)), label, flag.astype(bool), x


def learn(adata, indices, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # confounding of tiny groups
        CradleVAE.setup_anndata(
            adata,
            perturbation_key="perturbation",
            artifact_key="failed",
            batch_key="batch",
            continuous_covariate_keys=["age"],
        )
    manager = CradleVAE._get_most_recent_anndata_manager(adata)
    table = read_label_table(manager.get_state_registry(KEYS.PERTURBATION))
    members = table.padded_members()
    return training_statistics(manager, indices, members=members, n_treatments=len(table.treatments), **kwargs), table


@pytest.mark.parametrize("storage", [sp.csr_matrix, sp.csc_matrix, lambda m: m.toarray()], ids=["csr", "csc", "dense"])
@pytest.mark.parametrize(("statistic", "function"), [("median", np.median), ("mean", np.mean)])
def test_reference_profiles_equal_a_loop_over_labels(screen, statistic, function, storage):
    adata, train, label, flag, x = screen
    adata.X = storage(adata.X)
    found, table = learn(adata, train, statistic=statistic)
    profiles = dict(
        zip((table.labels[c] for c in found.reference_labels), found.reference_profiles.toarray(), strict=True)
    )
    for name, (flags, _) in DESIGN.items():
        cells = [i for i in train if label[i] == name and flag[i]]
        assert len(cells) == sum(flags)
        assert (name in profiles) == bool(cells)
        if cells:
            np.testing.assert_allclose(profiles[name], function(x[cells], axis=0), rtol=1e-6)
    assert "C" not in profiles
    (only,) = (i for i in train if label[i] == "B" and flag[i])
    np.testing.assert_array_equal(profiles["B"], x[only])


def test_an_even_number_of_failed_cells_has_half_counts():
    adata = ad.AnnData(
        X=np.array([[1.0, 4.0], [2.0, 9.0], [0.0, 0.0], [5.0, 5.0]], dtype=np.float32),
        obs=pd.DataFrame(
            {
                "perturbation": ["control", "control", "control", "A"],
                "failed": [True, True, False, False],
                "batch": "x",
                "age": 0.0,
            },
            index=list("abcd"),
        ),
    )
    found, table = learn(adata, np.arange(4))
    assert [table.labels[c] for c in found.reference_labels] == ["control"]
    assert found.reference_profiles.toarray().tolist() == [[1.5, 6.5]]


def test_pools_hold_the_failed_training_cells(screen):
    adata, train, label, flag, x = screen
    found, table = learn(adata, train)
    assert len(found.pools) == len(found.reference_labels) == 4
    for code, pool in zip(found.reference_labels, found.pools, strict=True):
        expected = x[[i for i in train if label[i] == table.labels[code] and flag[i]]]
        assert sorted(map(tuple, pool.toarray())) == sorted(map(tuple, expected))


def test_large_pools_are_seeded_samples(screen, monkeypatch):
    adata, train, label, flag, x = screen
    monkeypatch.setattr(_statistics, "MAX_REFERENCE_CELLS", 2)
    found, table = learn(adata, train, seed=1)
    again, _ = learn(adata, train, seed=1)
    other = [learn(adata, train, seed=s)[0] for s in range(2, 12)]
    for code, pool, profile, same in zip(
        found.reference_labels, found.pools, found.reference_profiles.toarray(), again.pools, strict=True
    ):
        cells = {tuple(x[i]) for i in train if label[i] == table.labels[code] and flag[i]}
        assert pool.shape[0] == min(2, len(cells))
        assert set(map(tuple, pool.toarray())) <= cells
        np.testing.assert_array_equal(profile, np.median(pool.toarray(), axis=0))
        assert (pool != same).nnz == 0
    assert any((s.reference_profiles != found.reference_profiles).nnz for s in other)


def test_counts_of_treatments_labels_and_failures(screen):
    adata, train, label, flag, _ = screen
    found, table = learn(adata, train)
    expected = {t: sum(t in label[i].split("+") for i in train) for t in "ABC"}
    assert dict(zip(table.treatments, found.n_obs_per_treatment, strict=True)) == expected == {"A": 7, "B": 5, "C": 2}
    assert dict(zip(table.labels, found.n_obs_per_label, strict=True)) == {k: len(v[0]) for k, v in DESIGN.items()}
    assert dict(zip(table.labels, found.n_failed_per_label, strict=True)) == {k: sum(v[0]) for k, v in DESIGN.items()}
    assert found.n_failed == flag[train].sum() == 10


def test_doses_count_as_cells():
    rng = np.random.default_rng(1)
    doses = np.array([[0, 0], [0.5, 0], [2, 1], [0, 3], [0, 0], [1, 0]], dtype=float)
    adata = ad.AnnData(
        X=rng.poisson(3.0, (6, 4)).astype(np.float32),
        obs=pd.DataFrame({"failed": [True] + 5 * [False]}, index=list("abcdef")),
    )
    adata.obsm["dose"] = pd.DataFrame(doses, index=adata.obs_names, columns=["A", "B"])
    CradleVAE.setup_anndata(adata, perturbation_obsm_key="dose", artifact_key="failed")
    manager = CradleVAE._get_most_recent_anndata_manager(adata)
    table = read_label_table(manager.get_state_registry(KEYS.PERTURBATION))
    found = training_statistics(manager, np.array([5, 0, 1, 2]), members=table.padded_members(), n_treatments=2)
    assert found.n_obs_per_treatment.tolist() == [3, 1]


def test_moments_are_those_of_training_cells(screen, monkeypatch):
    adata, train, _, _, x = screen
    monkeypatch.setattr(_statistics, "BLOCK_SIZE", 4)  # several blocks
    found, _ = learn(adata, train)
    logged = np.log1p(x[train].astype(float))
    np.testing.assert_allclose(found.input_mean, logged.mean(0), rtol=1e-6)
    expected = logged.std(0, ddof=1)
    assert expected[3] == 0
    expected[3] = 1
    np.testing.assert_allclose(found.input_std, expected, rtol=1e-5)
    np.testing.assert_allclose(found.gene_share, x[train].sum(0) / x[train].sum(), rtol=1e-6)


def test_a_single_training_cell_has_unit_spread(screen):
    adata, train, *_ = screen
    found, _ = learn(adata, train[:1])
    assert found.input_std.tolist() == [1.0] * N_GENES


def test_libraries_are_the_totals_with_their_flag_batch_and_covariates(screen):
    adata, train, _, flag, x = screen
    found, _ = learn(adata, train)
    pool, batch = found.libraries, adata.obs["batch"].to_numpy()
    rows = sorted(zip(pool["total"], pool["artifact"], pool["batch"], pool["continuous"][:, 0], strict=True))
    expected = sorted((x[i].sum(), flag[i], int(batch[i] == "y"), adata.obs["age"].iloc[i]) for i in train)
    np.testing.assert_allclose(np.array(rows, dtype=float), np.array(expected, dtype=float), rtol=1e-6)
    assert (pool["weight"] == 1).all()


def test_capped_libraries_stand_for_all_cells(screen, monkeypatch):
    adata, train, _, flag, _ = screen
    monkeypatch.setattr(_statistics, "MAX_LIBRARIES", 2)
    pool = learn(adata, train)[0].libraries
    batch = (adata.obs["batch"].to_numpy() == "y").astype(int)
    for b in (0, 1):
        for f in (False, True):
            rows = (pool["batch"] == b) & (pool["artifact"] == f)
            n = int(((batch[train] == b) & (flag[train] == f)).sum())
            assert rows.sum() == min(2, n)
            assert pool["weight"][rows].sum() == pytest.approx(n)


def test_without_failed_cells_there_is_no_reference(screen):
    adata, train, *_ = screen
    adata.obs["failed"] = False
    found, _ = learn(adata, train)
    assert found.n_failed == 0
    assert found.reference_profiles.shape == (0, N_GENES)
    assert found.pools == ()
    assert not found.libraries["artifact"].any()


@pytest.mark.parametrize("n_cells", [1, 2, 3, 6, 9])
@pytest.mark.parametrize("signs", [(0, 4), (-3, 4), (-3, 1)], ids=["counts", "both signs", "not positive"])
def test_medians_of_sparse_columns(n_cells, signs):
    rng = np.random.default_rng(n_cells)
    dense = rng.integers(*signs, (n_cells, 300)) * (rng.random((n_cells, 300)) < np.linspace(0, 1, 300))
    dense = dense + np.sign(dense) * 0.25
    expected = np.median(dense, axis=0)
    assert (expected == 0).any()
    assert (expected != 0).any()
    np.testing.assert_array_equal(_statistics.medians(sp.csr_matrix(dense), width=64), expected)


def test_medians_of_nothing_and_of_stored_zeros():
    assert _statistics.medians(sp.csr_matrix((4, 3))).tolist() == [0.0] * 3
    stored = sp.csr_matrix((np.array([0.0, 0.0, 5.0, 2.0, 2.0]), [0, 0, 0, 1, 1], [0, 1, 2, 5]), shape=(3, 2))
    assert _statistics.medians(stored).tolist() == np.median(stored.toarray(), axis=0).tolist() == [0.0, 0.0]
    assert _statistics.medians(stored[2]).tolist() == [5.0, 4.0]


def test_pools_are_left_out_if_not_asked_for(screen):
    adata, train, *_ = screen
    found, kept = learn(adata, train, keep_pools=False)[0], learn(adata, train)[0]
    assert found.pools == ()
    assert (found.reference_profiles != kept.reference_profiles).nnz == 0
