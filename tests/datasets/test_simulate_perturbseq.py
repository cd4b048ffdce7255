"""The simulated screen: its truth is consistent with its counts."""

import hashlib

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scvi_cradle.datasets import simulate_perturbseq

SMALL = {"n_cells": 300, "n_genes": 60, "n_perturbations": 4, "n_combinations": 3}


@pytest.fixture(scope="module")
def screen() -> ad.AnnData:
    return simulate_perturbseq()


@pytest.fixture(scope="module")
def small() -> ad.AnnData:
    return simulate_perturbseq(**SMALL)


@pytest.fixture(scope="module")
def large() -> ad.AnnData:
    """Many clean cells, so that means are known well."""
    return simulate_perturbseq(8000, 100, 3, 2, artifact_fraction=0.0, efficiency=0.7, seed=3)


def dense(matrix: sp.csr_matrix) -> np.ndarray:
    return matrix.toarray().astype(float)


def log_expression(counts: np.ndarray) -> np.ndarray:
    return np.log2(1 + 1e4 * counts / counts.sum(axis=1, keepdims=True))


def difference_z(test: np.ndarray, control: np.ndarray, expected: np.ndarray | float = 0.0) -> np.ndarray:
    """Return the z-score per gene of the difference of means against ``expected``."""
    error = np.sqrt(test.var(axis=0, ddof=1) / len(test) + control.var(axis=0, ddof=1) / len(control))
    return (test.mean(axis=0) - control.mean(axis=0) - expected) / error


def share_of(adata: ad.AnnData, counts: np.ndarray, gene_type: str) -> np.ndarray:
    return counts[:, (adata.var["gene_type"] == gene_type).to_numpy()].sum(axis=1) / counts.sum(axis=1)


# ---------------------------------------------------------------------------------------------------- form


def test_form(screen):
    assert screen.shape == (2000, 500)
    for counts in (screen.X, screen.layers["clean_counts"]):
        assert sp.issparse(counts)
        assert counts.format == "csr"
        assert counts.dtype == np.float32
        assert counts.min() == 0
        assert np.array_equal(counts.data, np.round(counts.data))
        assert counts.has_canonical_format
    assert screen.obs_names.is_unique
    assert screen.var_names.is_unique
    assert screen.uns["control"] == "control"
    for column in ("true_artifact", "true_perturbed"):
        assert screen.obs[column].dtype == bool
    assert list(screen.uns["guide_targets"].columns) == ["guide", "target"]
    assert list(screen.obsm["guide_counts"].columns) == list(screen.uns["guide_targets"]["guide"])
    assert list(screen.obsm["guide_counts"].index) == list(screen.obs_names)
    assert screen.obsm["z_basal"].shape == (2000, 11)


def test_gene_groups(screen):
    names, types = screen.var_names, screen.var["gene_type"]
    assert names.str.startswith("MT-").sum() == (types == "mitochondrial").sum() == 13
    assert names.str.match("RP[LS]").sum() == (types == "ribosomal").sum() == 41
    assert names.str.match("HB[ABDG]").sum() == (types == "haemoglobin").sum() == 6
    assert list(names[types == "target"]) == [f"G{i:02d}" for i in range(1, 11)]
    assert (dense(screen.layers["clean_counts"]).sum(axis=0) > 0).mean() > 0.99


@pytest.mark.parametrize(("n_perturbations", "first"), [(1, "G01"), (99, "G01"), (100, "G001")])
def test_names_sort_in_creation_order(n_perturbations, first):
    adata = simulate_perturbseq(620, 230, n_perturbations, 0)
    targets = list(adata.uns["truth"]["effects"].index)
    assert targets[0] == first
    assert targets == sorted(targets)
    assert len(targets) == n_perturbations


def test_labels(screen):
    labels = screen.obs["perturbation"]
    known = sorted(set(labels) - {"control"})
    pairs = [label for label in known if "+" in label]
    assert len(known) == 15
    assert len(pairs) == 5
    assert {part for pair in pairs for part in pair.split("+")} <= set(known)
    assert all(pair.split("+")[0] < pair.split("+")[1] for pair in pairs)
    assert 0.15 < (labels == "control").mean() < 0.2
    sizes = labels.value_counts()
    assert sizes.drop("control").max() < 2 * sizes.min()
    truth = screen.uns["truth"]
    for name in ("effects", "population_effects"):
        assert list(truth[name].index) == known
        assert list(truth[name].columns) == list(screen.var_names)


# anndata 0.13 sets a pandas option that pandas 3.1 deprecates whenever a view is made
@pytest.mark.filterwarnings(r"ignore:The 'mode\.chained_assignment' option is deprecated:DeprecationWarning")
def test_split_holds_out_whole_combinations(screen):
    table = pd.crosstab(screen.obs["perturbation"], screen.obs["split"])
    held_out = table.index[table["test"] > 0]
    assert len(held_out) == 2  # a quarter of five, rounded up
    assert all("+" in label for label in held_out)
    assert (table.loc[held_out, ["train", "val"]] == 0).all(axis=None)
    rest = table.drop(held_out)
    assert np.allclose(rest["val"] / rest.sum(axis=1), 0.2, atol=0.01)
    train = screen[screen.obs["split"] == "train"]
    assert train.is_view
    assert set(rest.index) == set(train.obs["perturbation"])
    assert {part for label in held_out for part in label.split("+")} <= set(train.obs["perturbation"])


def test_split_without_combinations():
    adata = simulate_perturbseq(400, 60, 4, 0)
    table = pd.crosstab(adata.obs["perturbation"], adata.obs["split"], normalize="index")
    assert len(table) == 5
    assert np.allclose(table["test"], 0.25, atol=0.02)
    assert np.allclose(table["val"], 0.15, atol=0.02)


def test_smallest_sizes():
    adata = simulate_perturbseq(12, 32, 1, 0, guides_per_target=1, seed=1)
    assert adata.shape == (12, 32)
    assert set(adata.obs["perturbation"]) == {"control", "G01"}
    assert set(adata.var["gene_type"]) == {"mitochondrial", "ribosomal", "haemoglobin", "target", "other"}


def test_batches_differ_in_expression():
    kwargs = {**SMALL, "n_cells": 1500, "artifact_fraction": 0.0}
    one, three = simulate_perturbseq(**kwargs), simulate_perturbseq(**kwargs, n_batches=3)
    assert list(one.obs["batch"].unique()) == ["batch_1"]
    assert sorted(three.obs["batch"].unique()) == ["batch_1", "batch_2", "batch_3"]
    values, batch = log_expression(dense(three.X)), three.obs["batch"].to_numpy()
    assert np.mean(difference_z(values[batch == "batch_1"], values[batch == "batch_2"]) ** 2) > 5
    half = np.arange(1500) < 750
    values = log_expression(dense(one.X))
    assert np.mean(difference_z(values[half], values[~half]) ** 2) < 2


# ------------------------------------------------------------------------------------------------- effects


def test_effects_are_fold_changes_of_mean_counts(large):
    counts, labels = dense(large.X), large.obs["perturbation"].to_numpy()
    control = counts[labels == "control"]
    for label, effect in large.uns["truth"]["effects"].iterrows():
        cells = counts[(labels == label) & large.obs["true_perturbed"].to_numpy()]
        expressed = control.mean(axis=0) > 0.2
        z = difference_z(cells, control * np.exp2(effect.to_numpy()))[expressed]
        assert np.mean(z**2) < 1.8, label
        assert np.abs(z).max() < 6
        assert np.mean(difference_z(cells, control)[expressed] ** 2) > 20, label


def test_population_effects_are_what_clean_cells_show(large):
    values, labels = log_expression(dense(large.layers["clean_counts"])), large.obs["perturbation"].to_numpy()
    control = values[labels == "control"]
    population = large.uns["truth"]["population_effects"]
    for label, effect in population.iterrows():
        z = difference_z(values[labels == label], control, effect.to_numpy())
        assert np.mean(z**2) < 1.8, label
        assert np.abs(z).max() < 6
    shown = np.array([values[labels == label].mean(axis=0) - control.mean(axis=0) for label in population.index])
    assert np.corrcoef(shown.ravel(), population.to_numpy().ravel())[0, 1] > 0.98


def test_population_effects_do_not_depend_on_artifacts():
    clean, struck = (simulate_perturbseq(**SMALL, artifact_fraction=f).uns["truth"] for f in (0.0, 0.5))
    pd.testing.assert_frame_equal(clean["population_effects"], struck["population_effects"])
    pd.testing.assert_frame_equal(clean["effects"], struck["effects"])


def additive_sum(effects: pd.DataFrame) -> pd.DataFrame:
    pairs = [label for label in effects.index if "+" in label]
    return pd.DataFrame([effects.loc[pair.split("+")].sum() for pair in pairs], index=pairs)


def test_combinations_without_interaction_are_additive():
    effects = simulate_perturbseq(**SMALL, interaction_fraction=0.0).uns["truth"]["effects"]
    added = additive_sum(effects)
    assert len(added) == 3
    assert np.allclose(effects.loc[added.index], added, atol=1e-12)


@pytest.mark.parametrize("fraction", [0.2, 1.0])
def test_interactions_touch_their_fraction_of_the_changed_genes(fraction):
    effects = simulate_perturbseq(200, 200, 4, 3, interaction_fraction=fraction).uns["truth"]["effects"]
    added = additive_sum(effects)
    for pair in added.index:
        candidates = (added.loc[pair] != 0) & ~added.columns.isin(pair.split("+"))
        differs = (effects.loc[pair] - added.loc[pair]).abs() > 1e-9
        assert candidates.sum() > 10
        assert not (differs & ~candidates).any()
        assert differs.sum() == round(fraction * candidates.sum())


@pytest.mark.parametrize(("fraction", "n_additive"), [(0.0, 0), (0.25, 2), (0.5, 3), (1.0, 6)])
def test_additive_combinations_are_known(fraction, n_additive):
    screen = simulate_perturbseq(300, 80, 4, 6, additive_fraction=fraction)
    truth = screen.uns["truth"]
    pairs, interactions = truth["pairs"], truth["interactions"]
    assert list(pairs.index) == list(interactions.index) == [label for label in truth["effects"].index if "+" in label]
    assert list(interactions.columns) == list(screen.var_names)
    assert pairs["additive"].dtype == bool
    assert pairs["additive"].sum() == n_additive  # 1.5 is rounded to 2
    assert (interactions[pairs["additive"]] == 0).all(axis=None)
    assert (pairs["interaction_size"][~pairs["additive"]] > 0.5).all()
    np.testing.assert_allclose(pairs["interaction_size"], np.sqrt((interactions**2).sum(axis=1)))
    added = additive_sum(truth["effects"])
    np.testing.assert_allclose(truth["effects"].loc[pairs.index] - added, interactions, atol=1e-12)


def test_additive_combinations_change_no_other_label():
    few, many = (simulate_perturbseq(300, 80, 4, 6, additive_fraction=f).uns["truth"] for f in (0.2, 0.8))
    additive = many["pairs"]["additive"]
    assert (few["pairs"]["additive"] <= additive).all(), "the additive pairs of a smaller share are among them"
    kept = [label for label in few["effects"].index if not additive.get(label, False)]
    assert len(kept) == 5
    pd.testing.assert_frame_equal(few["effects"].loc[kept], many["effects"].loc[kept])


def test_tables_of_pairs_without_pairs_or_interactions():
    none = simulate_perturbseq(**{**SMALL, "n_combinations": 0}, additive_fraction=0.5).uns["truth"]
    assert none["interactions"].shape == (0, 60)
    assert none["pairs"].shape == (0, 2)
    flat = simulate_perturbseq(**SMALL, interaction_fraction=0.0).uns["truth"]["pairs"]
    assert flat["additive"].all()
    assert (flat["interaction_size"] == 0).all()


def test_effects_are_sparse_shared_and_knock_their_target_down(screen):
    effects = screen.uns["truth"]["effects"]
    singles = effects.loc[~effects.index.str.contains("+", regex=False)]
    knock_down = np.diag(singles[singles.index])
    assert ((knock_down <= -2) & (knock_down >= -3)).all()
    fixed = screen.var_names[screen.var["gene_type"].isin(["mitochondrial", "ribosomal", "haemoglobin"])]
    assert (effects[fixed] == 0).all(axis=None)
    assert 0.05 < (singles != 0).to_numpy().mean() < 0.3
    assert ((singles != 0).sum() > 1).mean() > 0.2


def test_escapers_look_like_controls(large):
    values, obs = log_expression(dense(large.X)), large.obs
    control = values[obs["perturbation"] == "control"]
    escaper = (~obs["true_perturbed"] & (obs["perturbation"] != "control")).to_numpy()
    assert not obs.loc[obs["perturbation"] == "control", "true_perturbed"].any()
    assert escaper.sum() > 1000
    assert np.mean(difference_z(values[escaper], control) ** 2) < 1.8
    assert np.mean(difference_z(values[obs["true_perturbed"]], control) ** 2) > 20


def test_full_efficiency_leaves_no_escaper():
    obs = simulate_perturbseq(**SMALL, efficiency=1.0).obs
    assert (obs["true_perturbed"] == (obs["perturbation"] != "control")).all()


def test_replicates_agree_neither_fully_nor_barely():
    adata = simulate_perturbseq(3000)
    values, labels = log_expression(dense(adata.layers["clean_counts"])), adata.obs["perturbation"].to_numpy()
    half = np.random.default_rng(0).random(3000) < 0.5
    shown = []
    for cells in (half, ~half):
        control = values[cells & (labels == "control")].mean(axis=0)
        names = adata.uns["truth"]["effects"].index
        shown.append(np.concatenate([values[cells & (labels == name)].mean(axis=0) - control for name in names]))
    assert 0.75 < np.corrcoef(shown)[0, 1] < 0.95


# ----------------------------------------------------------------------------------------------- artifacts


def test_clean_cells_equal_their_twins(screen):
    artifact = screen.obs["true_artifact"].to_numpy()
    different = np.asarray((screen.X != screen.layers["clean_counts"]).sum(axis=1)).ravel() > 0
    assert np.array_equal(different, artifact)
    assert artifact.sum() == 300
    assert np.array_equal(screen.obs["artifact_kind"] != "none", artifact)
    assert np.array_equal(screen.obs["artifact_severity"] > 0, artifact)
    sizes = screen.obs["artifact_kind"].value_counts().to_dict()
    assert sizes == {"none": 1700, "dying": 120, "ambient": 120, "doublet": 60}


def test_twins_do_not_depend_on_the_artifact_fraction():
    none, half = (simulate_perturbseq(**SMALL, artifact_fraction=f) for f in (0.0, 0.5))
    assert (none.X != none.layers["clean_counts"]).nnz == 0
    assert not none.obs["true_artifact"].any()
    assert (none.layers["clean_counts"] != half.layers["clean_counts"]).nnz == 0
    assert none.obs["perturbation"].tolist() == half.obs["perturbation"].tolist()
    assert half.obs["true_artifact"].sum() == 150


def test_dying_cells_lose_cytoplasmic_counts(screen):
    rows = (screen.obs["artifact_kind"] == "dying").to_numpy()
    counts, clean = dense(screen.X[rows]), dense(screen.layers["clean_counts"][rows])
    mitochondrial = (screen.var["gene_type"] == "mitochondrial").to_numpy()
    assert np.array_equal(counts[:, mitochondrial], clean[:, mitochondrial])
    before, after = clean[:, ~mitochondrial].sum(axis=1), counts[:, ~mitochondrial].sum(axis=1)
    severity = screen.obs.loc[rows, "artifact_severity"].to_numpy()
    z = (after - before * (1 - severity)) / np.sqrt(before * severity * (1 - severity))
    assert 0.7 < np.mean(z**2) < 1.4
    assert (counts <= clean).all()
    assert severity.min() >= 0.45
    assert severity.max() <= 0.9


def test_ambient_cells_gain_haemoglobin_at_equal_totals(screen):
    rows = (screen.obs["artifact_kind"] == "ambient").to_numpy()
    counts, clean = dense(screen.X[rows]), dense(screen.layers["clean_counts"][rows])
    severity = screen.obs.loc[rows, "artifact_severity"].to_numpy()
    assert abs(counts.sum() / clean.sum() - 1) < 0.01
    pooled = share_of(screen, dense(screen.layers["clean_counts"]).sum(axis=0, keepdims=True), "haemoglobin")[0]
    expected = (1 - severity) * share_of(screen, clean, "haemoglobin") + severity * (0.1 + 0.9 * pooled)
    seen = share_of(screen, counts, "haemoglobin")
    assert abs(seen.mean() - expected.mean()) < 0.002
    assert np.corrcoef(seen, severity)[0, 1] > 0.9


def test_doublets_are_sums_of_two_clean_cells(screen):
    rows = np.flatnonzero(screen.obs["artifact_kind"] == "doublet")
    clean = dense(screen.layers["clean_counts"])
    others = {row.tobytes() for row in clean}
    for row in rows:
        added = dense(screen.X[row]).ravel() - clean[row]
        assert added.tobytes() in others
        assert not np.array_equal(added, clean[row])
        severity = screen.obs["artifact_severity"].iloc[row]
        assert severity == pytest.approx(added.sum() / (added.sum() + clean[row].sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("fraction", "n_mads", "low", "high"), [(0.15, 3, 0.86, 0.95), (0.15, 5, 0.97, 1.0), (0.5, 3, 0.9, 0.98)]
)
def test_quality_control_passes_clean_cells_and_flags_artifacts(fraction, n_mads, low, high):
    adata = simulate_perturbseq(artifact_fraction=fraction)
    counts = dense(adata.X)
    shares = [share_of(adata, counts, kind) for kind in ("mitochondrial", "ribosomal", "haemoglobin")]
    failed = np.zeros(adata.n_obs, dtype=bool)
    for value in (-counts.sum(axis=1), -(counts > 0).sum(axis=1), *shares):
        spread = np.median(np.abs(value - np.median(value)))
        assert spread > 0
        failed |= value > np.median(value) + n_mads * spread
    kind = adata.obs["artifact_kind"].to_numpy()
    assert low < 1 - failed[kind == "none"].mean() < high
    assert failed[kind == "dying"].mean() > 0.85
    assert failed[kind == "ambient"].mean() > 0.85
    assert failed[kind == "doublet"].mean() < 0.3


def test_clean_cells_are_overdispersed_and_sparse(screen):
    control = (screen.obs["perturbation"] == "control").to_numpy()
    counts = dense(screen.layers["clean_counts"][control])
    totals = counts.sum(axis=1)
    assert 2300 < np.median(totals) < 2700
    assert 0.5 < (counts == 0).mean() < 0.75
    haemoglobin = share_of(screen, counts, "haemoglobin")
    assert 0.003 < np.median(haemoglobin) < 0.01
    counts = counts[:, counts.mean(axis=0) > 2]
    mean, variance = counts.mean(axis=0), counts.var(axis=0)
    assert np.median((variance - mean) / mean**2) == pytest.approx(0.25, abs=0.1)


# -------------------------------------------------------------------------------------------------- guides


def test_cells_carry_the_guides_of_their_label(small):
    target = small.uns["guide_targets"].set_index("guide")["target"]
    assert (target == "control").sum() == 2
    assert (target.value_counts().drop("control") == 2).all()
    for guides, label in zip(small.obs["guide_identity"], small.obs["perturbation"], strict=True):
        assert [target[guide] for guide in guides.split("+")] == label.split("+")


def test_efficacies_average_to_the_efficiency(screen):
    guides = screen.uns["truth"]["guide_efficacy"]
    targeting = guides[guides["target"] != "control"]
    assert np.allclose(targeting.groupby("target")["efficacy"].mean(), 0.7)
    assert targeting["efficacy"].between(0.4, 1).all()
    assert targeting["efficacy"].std() > 0.1
    assert (guides.loc[guides["target"] == "control", "efficacy"] == 0).all()


def test_carriers_are_perturbed_with_their_guide_s_efficacy(large):
    efficacy = large.uns["truth"]["guide_efficacy"]["efficacy"]
    labels = large.obs["perturbation"]
    single = large.obs[~labels.str.contains("+", regex=False) & (labels != "control")]
    for guide, cells in single.groupby("guide_identity", observed=True):
        p = efficacy[guide]
        assert abs(cells["true_perturbed"].mean() - p) < 4 * np.sqrt(p * (1 - p) / len(cells)) + 1e-9
    pairs = large.obs[large.obs["perturbation"].str.contains("+", regex=False)]
    assert pairs["true_perturbed"].mean() == pytest.approx(0.7, abs=0.05)


def test_guide_counts_track_efficacy(large):
    counts, obs = large.obsm["guide_counts"], large.obs
    efficacy = large.uns["truth"]["guide_efficacy"]["efficacy"]
    single = ~obs["perturbation"].str.contains("+", regex=False) & (obs["perturbation"] != "control")
    abundance = {}
    for guide, cells in obs[single].groupby("guide_identity", observed=True):
        umis = counts.loc[cells.index, guide]
        abundance[guide] = umis.mean()
        assert umis[cells["true_perturbed"]].mean() > 1.5 * umis[~cells["true_perturbed"]].mean()
    assert np.corrcoef(list(abundance.values()), efficacy[list(abundance)])[0, 1] > 0.9


def test_guide_counts_show_carried_guides_above_a_background(screen):
    clean = (~screen.obs["true_artifact"] & ~screen.obs["perturbation"].str.contains("+", regex=False)).to_numpy()
    counts = screen.obsm["guide_counts"].loc[clean]
    carried = screen.obs.loc[clean, "guide_identity"].astype(str)
    assert (counts.idxmax(axis=1) == carried).mean() > 0.95
    background = counts.to_numpy().sum(axis=1) - [counts.at[cell, guide] for cell, guide in carried.items()]
    assert 0.3 < background.mean() < 1.5
    assert counts.dtypes.map(lambda dtype: dtype.kind == "i").all()


# -------------------------------------------------------------------------------------------- seeds, files


def test_seeds():
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    first, again, other = (simulate_perturbseq(**SMALL, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002
    assert (first.X != again.X).nnz == 0
    pd.testing.assert_frame_equal(first.obs, again.obs)
    pd.testing.assert_frame_equal(first.obsm["guide_counts"], again.obsm["guide_counts"])
    for name, table in first.uns["truth"].items():
        pd.testing.assert_frame_equal(table, again.uns["truth"][name])
    assert (first.X != other.X).nnz > 0
    assert list(first.var_names) == list(other.var_names)
    assert not np.allclose(first.uns["truth"]["effects"].to_numpy()[:2], other.uns["truth"]["effects"].to_numpy()[:2])


@pytest.mark.parametrize(
    ("change", "counts", "tables"),
    [
        ({}, "5f05268a", "e043f4ec"),
        ({"seed": 1}, "fc3911e9", "4f749300"),
        ({"interaction_fraction": 1.0}, "1809892f", "6203a83a"),
        ({"n_combinations": 0}, "c8e660e8", "83303826"),
        ({"n_batches": 3}, "a4e51fca", "d321f826"),
    ],
)
def test_data_of_a_seed_stay_what_they_are(change, counts, tables):
    """Hashes of version 0.1.0.dev0, before combinations could be additive."""
    adata = simulate_perturbseq(**{**SMALL, **change})
    truth = adata.uns["truth"]
    # the second table comes from sums of float32
    effects = np.stack([1e6 * truth["effects"], 1e3 * truth["population_effects"]])
    labels = adata.obs[["perturbation", "guide_identity", "batch", "split", "artifact_kind"]].astype(str)
    digests = [
        hashlib.sha256(part).hexdigest()[:8]
        for part in (
            np.stack([dense(adata.X), dense(adata.layers["clean_counts"])]).astype(np.int64).tobytes(),
            "".join(labels.to_numpy().ravel()).encode() + np.rint(effects).astype(np.int64).tobytes(),
        )
    ]
    assert digests == [counts, tables]


@pytest.mark.parametrize("n_combinations", [0, 3])
def test_tables_of_pairs_survive_a_file(n_combinations, tmp_path):
    adata = simulate_perturbseq(**{**SMALL, "n_combinations": n_combinations}, additive_fraction=0.5)
    adata.copy().write_h5ad(tmp_path / "screen.h5ad")
    back = ad.read_h5ad(tmp_path / "screen.h5ad").uns["truth"]
    for key in ("pairs", "interactions"):
        assert back[key].shape == adata.uns["truth"][key].shape
        assert list(back[key].index) == list(adata.uns["truth"][key].index)
        np.testing.assert_array_equal(back[key].to_numpy(), adata.uns["truth"][key].to_numpy())


def test_h5ad_round_trip(small, tmp_path):
    small.copy().write_h5ad(tmp_path / "screen.h5ad")
    back = ad.read_h5ad(tmp_path / "screen.h5ad")
    assert (back.X != small.X).nnz == 0
    assert (back.layers["clean_counts"] != small.layers["clean_counts"]).nnz == 0
    assert back.uns["control"] == "control"
    assert set(back.uns["truth"]) == {"effects", "population_effects", "interactions", "pairs", "guide_efficacy"}
    for name, table in small.uns["truth"].items():
        kept = back.uns["truth"][name]
        assert list(kept.index) == list(table.index)
        assert list(kept.columns) == list(table.columns)
        assert kept.astype(str).equals(table.astype(str)) or np.allclose(kept.to_numpy(float), table.to_numpy(float))
    assert back.uns["guide_targets"].astype(str).to_numpy().tolist() == small.uns["guide_targets"].to_numpy().tolist()
    assert np.array_equal(back.obsm["guide_counts"].to_numpy(), small.obsm["guide_counts"].to_numpy())
    assert back.obs["perturbation"].tolist() == small.obs["perturbation"].tolist()
    assert back.obs["true_perturbed"].dtype == bool


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"n_cells": 0}, "`n_cells` must be a positive integer", id="no cells"),
        pytest.param({"n_cells": 100.0}, "`n_cells` must be a positive integer", id="cells as float"),
        pytest.param({"n_cells": 95}, "at least 6 for each of the 16 labels, so 96; received 95", id="few cells"),
        pytest.param({"n_genes": 49}, r"`n_genes` must be at least .* = 50, .*; received 49", id="few genes"),
        pytest.param({"n_genes": 100, "n_perturbations": 36}, "= 102, ", id="few genes for the targets"),
        pytest.param({"n_perturbations": 0}, "`n_perturbations` must be a positive integer", id="no targets"),
        pytest.param({"n_combinations": -1}, "`n_combinations` must be a non-negative integer", id="negative pairs"),
        pytest.param({"n_combinations": 46}, "must not exceed the 45 pairs .*; received 46", id="too many pairs"),
        pytest.param(
            {"artifact_fraction": 1.0}, r"`artifact_fraction` must lie in \[0, 1\); .* 1.0", id="all artifacts"
        ),
        pytest.param({"artifact_fraction": -0.1}, "`artifact_fraction` must lie", id="negative artifacts"),
        pytest.param({"artifact_fraction": np.nan}, "`artifact_fraction` must lie", id="NaN artifacts"),
        pytest.param({"efficiency": 0}, r"`efficiency` must lie in \(0, 1\]; received 0", id="no efficiency"),
        pytest.param({"efficiency": "high"}, "`efficiency` must lie", id="efficiency as text"),
        pytest.param({"interaction_fraction": 1.5}, r"must lie in \[0, 1\]; received 1.5", id="interactions"),
        pytest.param({"interaction_fraction": True}, "`interaction_fraction` must lie", id="interactions as flag"),
        pytest.param({"additive_fraction": -0.5}, r"`additive_fraction` must lie in \[0, 1\]; .* -0.5", id="additive"),
        pytest.param({"guides_per_target": 0}, "`guides_per_target` must be a positive integer", id="no guides"),
        pytest.param({"n_batches": 0}, "`n_batches` must be a positive integer", id="no batches"),
        pytest.param({"seed": -1}, "`seed` must be a non-negative integer", id="negative seed"),
        pytest.param({"seed": "a"}, "`seed` must be a non-negative integer", id="seed as text"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        simulate_perturbseq(**arguments)
