"""Control partners: who is paired with whom, and what the loaders yield."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData, read_h5ad
from mudata import MuData

from scvi_cradle import PerturbedVAE
from scvi_cradle._constants import KEYS
from scvi_cradle.data import PairedSplitter, check_pairing, find_partners
from scvi_cradle.data._paired import LabelBatches

N = 40


def screen(**columns):
    """40 cells, the first half controls; the first gene is the number of the cell."""
    x = np.ones((N, 3), dtype=np.float32)
    x[:, 0] = np.arange(N)
    obs = {"perturbation": ["control"] * 20 + ["A"] * 10 + ["B"] * 10, "group": np.arange(N) % 2}
    names = pd.Index([f"cell_{i}" for i in range(N)])
    return AnnData(sp.csr_matrix(x), obs=pd.DataFrame({**obs, **columns}, index=names))


def manager_of(adata):
    PerturbedVAE.setup_anndata(adata, perturbation_key="perturbation")
    return PerturbedVAE._get_most_recent_anndata_manager(adata)


TRAIN = np.concatenate([np.arange(0, 16), np.arange(20, 28), np.arange(30, 38)])
VAL = np.setdiff1d(np.arange(N), TRAIN)
CONTROL = 2  # labels are sorted: A, B, control


def partners(adata, pairing, key=None, seed=0):
    return find_partners(manager_of(adata), (TRAIN, VAL), CONTROL, pairing=pairing, column_key=key, seed=seed)


def test_random_partners_are_training_controls_and_drawn_anew():
    found = partners(screen(), "random")
    torch.manual_seed(0)
    draws = np.stack([found.draw(TRAIN) for _ in range(400)])
    assert set(draws.ravel()) == set(range(16))
    share = np.bincount(draws.ravel(), minlength=16) / draws.size
    assert np.abs(share - 1 / 16).max() < 5 * np.sqrt(1 / 16 / draws.size)  # uniform
    assert (draws[0] != draws[1]).any()
    assert set(found.of_cell[VAL]) <= set(range(16))  # those of validation cells stay
    torch.manual_seed(0)
    np.testing.assert_array_equal(found.draw(TRAIN), draws[0])  # governed by torch's generator


def test_fixed_partners_stay_and_depend_on_the_seed():
    found = partners(screen(), "fixed")
    np.testing.assert_array_equal(found.draw(TRAIN), found.draw(TRAIN))
    np.testing.assert_array_equal(found.of_cell, partners(screen(), "fixed").of_cell)
    assert (found.of_cell != partners(screen(), "fixed", seed=1).of_cell).any()
    assert set(found.of_cell[TRAIN]) <= set(range(16))


def test_partners_within_a_column_have_the_same_value():
    found = partners(screen(), "within:group")
    drawn = found.draw(TRAIN)
    np.testing.assert_array_equal(drawn % 2, TRAIN % 2)
    np.testing.assert_array_equal(found.of_cell[VAL] % 2, VAL % 2)
    assert (drawn != found.draw(TRAIN)).any()


def named(**changes):
    names = {f"cell_{i}": f"cell_{i if i < 20 else (i - 20) % 16}" for i in range(N)}
    return screen(partner=list((names | changes).values()))


def test_named_partners_are_taken_from_the_column():
    found = partners(named(), "shared", "partner")
    np.testing.assert_array_equal(found.draw(np.array([25, 3])), [5, 3])


@pytest.mark.parametrize(
    ("adata", "pairing", "key", "error", "message"),
    [
        (screen(), "within:batch", None, KeyError, "`control_pairing` must be a key of `adata.obs`; received 'batch'"),
        (screen(group=["a"] * 20 + ["b"] * 20), "within:group", None, ValueError, "received 'b' without"),
        (screen(group=[None, *["a"] * 39]), "within:group", None, ValueError, "received 1 missing values"),
        (named(cell_25="cell_21"), "shared", "partner", ValueError, "for every training cell; received 'cell_21'"),
        (named(cell_25="nobody"), "shared", "partner", ValueError, "received 'nobody'"),
        (named(cell_25="cell_17"), "shared", "partner", ValueError, "among the training cells"),
        (named(cell_25=None), "shared", "partner", ValueError, "received 1 missing values"),
        (screen(), "shared", "partner", KeyError, "`control_partner_key` must be a key"),
    ],
    ids=["no column", "no control", "missing value", "no control cell", "unknown", "other part", "missing", "no key"],
)
def test_cells_without_a_partner_are_refused(adata, pairing, key, error, message):
    with pytest.raises(error, match=message):
        partners(adata, pairing, key)


@pytest.mark.parametrize("pairing", ["nearest", "within:", None, 3])
def test_unknown_pairings_are_refused(pairing):
    with pytest.raises(ValueError, match="`control_pairing` must be one of"):
        check_pairing(pairing, None)


@pytest.mark.parametrize(("pairing", "key"), [("shared", None), ("random", "partner")])
def test_named_partners_and_their_column_belong_together(pairing, key):
    with pytest.raises(ValueError, match="`control_partner_key` names the column"):
        check_pairing(pairing, key)


# ---- loaders --------------------------------------------------------------------------------------------------------


def splitter(adata, pairing="random", *, by_label=False, batch_size=8, **kwargs):
    manager = manager_of(adata)
    found = find_partners(manager, (TRAIN, VAL), CONTROL, pairing=pairing)
    result = PairedSplitter(
        manager,
        partners=found,
        by_label=by_label,
        batch_size=batch_size,
        external_indexing=[TRAIN, VAL, np.array([], int)],
        **kwargs,
    )
    result.setup()
    return result, found


@pytest.mark.parametrize("storage", ["csr", "csc", "dense", "backed", "mudata"])
def test_loaders_yield_cells_with_the_rows_of_their_partners(storage, tmp_path):
    adata = screen()
    if storage == "dense":
        adata.X = adata.X.toarray()
    if storage == "csc":
        adata.X = adata.X.tocsc()
    if storage == "backed":
        adata.write_h5ad(tmp_path / "screen.h5ad")
        adata = read_h5ad(tmp_path / "screen.h5ad", backed="r+")
    if storage == "mudata":
        mdata = MuData({"rna": adata})
        PerturbedVAE.setup_mudata(mdata, perturbation_key="perturbation")
        manager = PerturbedVAE._get_most_recent_anndata_manager(mdata)
        found = find_partners(manager, (TRAIN, VAL), CONTROL, pairing="within:group")
        result = PairedSplitter(
            manager, partners=found, batch_size=8, external_indexing=[TRAIN, VAL, np.array([], int)]
        )
        result.setup()
    else:
        result, found = splitter(adata, "within:group")
    for loader, cells in ((result.train_dataloader(), TRAIN), (result.val_dataloader(), VAL)):
        seen, chosen = [], []
        for batch in loader:
            seen.append(batch["X"][:, 0])
            chosen.append(batch[KEYS.PARTNER][:, 0])
            assert batch["X"].dtype == batch[KEYS.PARTNER].dtype == torch.float32
        seen, chosen = (torch.cat(v).numpy().astype(int) for v in (seen, chosen))
        np.testing.assert_array_equal(np.sort(seen), cells)
        np.testing.assert_array_equal(chosen % 2, seen % 2)
        assert (chosen < 16).all()
        if cells is VAL:
            np.testing.assert_array_equal(chosen, found.of_cell[seen])
            np.testing.assert_array_equal(seen, VAL)


def test_training_cells_come_in_another_order_with_other_partners_every_time():
    result, _ = splitter(screen())
    torch.manual_seed(0)
    epochs = [torch.cat([b["X"][:, 0] * 100 + b[KEYS.PARTNER][:, 0] for b in result.train_dataloader()]) for _ in "ab"]
    assert not torch.equal(*epochs)
    assert not torch.equal(epochs[0].sort().values, epochs[1].sort().values)


def test_partners_bring_their_covariates():
    adata = screen(depth=np.arange(N, dtype=float), kit=pd.Categorical(np.arange(N) % 3))
    PerturbedVAE.setup_anndata(
        adata,
        perturbation_key="perturbation",
        batch_key="group",
        categorical_covariate_keys=["kit"],
        continuous_covariate_keys=["depth"],
    )
    manager = PerturbedVAE._get_most_recent_anndata_manager(adata)
    found = find_partners(manager, (TRAIN, VAL), CONTROL, pairing="random")
    result = PairedSplitter(manager, partners=found, batch_size=8, external_indexing=[TRAIN, VAL, np.array([], int)])
    result.setup()
    for batch in result.train_dataloader():
        cell = batch[KEYS.PARTNER][:, 0]
        torch.testing.assert_close(batch["control_partner_batch"][:, 0], (cell % 2).long())
        torch.testing.assert_close(batch["control_partner_extra_categorical_covs"][:, 0], (cell % 3).long())
        torch.testing.assert_close(batch["control_partner_extra_continuous_covs"][:, 0], cell)


@pytest.mark.parametrize("by_label", [False, True])
def test_controls_that_are_partners_alone_are_in_no_batch(by_label):
    result, found = splitter(screen(), by_label=by_label, members=np.arange(N) >= 20)
    assert (result.n_train, result.n_val) == (16, 4)  # of the batches
    for loader, cells in ((result.train_dataloader(), TRAIN[16:]), (result.val_dataloader(), VAL[4:])):
        batches = [(b["X"][:, 0], b[KEYS.PARTNER][:, 0]) for b in loader]
        seen, chosen = (torch.cat(v).numpy().astype(int) for v in zip(*batches, strict=True))
        np.testing.assert_array_equal(np.sort(seen), cells)
        assert (chosen < 16).all()
    np.testing.assert_array_equal(result.train_idx, TRAIN)


def test_partners_of_controls_can_be_left_open():
    adata = screen(partner=[None] * 20 + [f"cell_{i % 16}" for i in range(20)])
    found = find_partners(
        manager_of(adata), (TRAIN, VAL), CONTROL, pairing="shared", column_key="partner", pair_controls=False
    )
    np.testing.assert_array_equal(found.of_cell[20:], np.arange(20) % 16)
    with pytest.raises(ValueError, match="received 20 missing values"):
        partners(adata, "shared", "partner")
    found = find_partners(manager_of(screen()), (TRAIN, VAL), CONTROL, pairing="fixed", pair_controls=False)
    assert (found.of_cell[:20] == -1).all()
    assert set(found.of_cell[20:]) <= set(range(16))


def test_the_data_are_not_copied():
    adata = screen()
    result, _ = splitter(adata)
    before = adata.X.data.copy()
    adata.X.data[:] = 7.0  # what the loaders read is the user's matrix
    batch = next(iter(result.val_dataloader()))
    assert set(batch[KEYS.PARTNER][:, 0].tolist()) <= {0.0, 7.0}
    adata.X.data[:] = before


def test_batches_of_one_label():
    result, _ = splitter(screen(), by_label=True, batch_size=7)
    batches = [b[KEYS.PERTURBATION].ravel() for b in result.train_dataloader()]
    assert all(len(b.unique()) == 1 for b in batches)
    assert sorted(len(b) for b in batches) == [1, 1, 2, 7, 7, 7, 7]
    assert len(result.train_dataloader()) == len(batches)
    orders = [[int(b[0]) for b in LabelBatches(np.arange(N) // 20, 5, shuffle=True)] for _ in range(3)]
    assert orders[0] != orders[1] or orders[1] != orders[2]
    assert [b for b in LabelBatches(np.array([1, 0, 1]), 2, shuffle=False)] == [[1], [0, 2]]  # noqa: C416
