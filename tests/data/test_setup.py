"""Registration: what is accepted, what is refused, and that a refusal leaves the data as they were."""

from __future__ import annotations

import pickle
import re

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scvi_cradle import CradleVAE
from scvi_cradle.data import label_table

pytestmark = [
    pytest.mark.filterwarnings("ignore:The basal state is unused:UserWarning"),  # two steps of training
    pytest.mark.filterwarnings("ignore:Generated cells vary too little:UserWarning"),
]

LABELS = ["control", "A", "B", "A+B", "C"]
KEYS = {"perturbation_key": "perturbation", "artifact_key": "artifact"}


def make_adata(n_cells=60, n_genes=8, labels=LABELS, **obs):
    rng = np.random.default_rng(0)
    adata = ad.AnnData(sp.csr_matrix(rng.poisson(3.0, (n_cells, n_genes)).astype(np.float32)))
    adata.var_names = [f"gene{i}" for i in range(n_genes)]
    adata.obs["perturbation"] = np.array(labels, dtype=object)[np.arange(n_cells) % len(labels)]
    adata.obs["artifact"] = np.arange(n_cells) % 7 == 0
    adata.obs["batch"] = pd.Categorical(np.where(np.arange(n_cells) % 2, "b1", "b2"))
    adata.obs["depth"] = np.linspace(0, 1, n_cells)
    for key, value in obs.items():
        adata.obs[key] = value
    return adata


def content(adata):
    """Everything a refused setup must leave alone."""
    return pickle.dumps(
        (
            adata.obs.to_dict("list"),
            [str(d) for d in adata.obs.dtypes],
            adata.var.to_dict("list"),
            {k: np.asarray(v.todense() if sp.issparse(v) else v).tolist() for k, v in adata.obsm.items()},
            {k: v.toarray().tolist() for k, v in adata.layers.items()},
            repr(adata.uns),
            None
            if adata.X is None
            else (type(adata.X).__name__, np.asarray(sp.csr_matrix(adata.X).todense()).tolist()),
        )
    )


def with_x(change):
    def build():
        adata = make_adata()
        x = adata.X.toarray()
        change(x)
        adata.X = sp.csr_matrix(x)
        return adata

    return build


def _set(x, value):
    x[3, 2] = value


def with_obs(key, value):
    return lambda: make_adata(**{key: value})


def with_labels(*labels):
    return lambda: make_adata(labels=list(labels))


def with_obsm(matrix, names=("A", "B", "C")):
    def build():
        adata = make_adata()
        adata.obsm["dosage"] = matrix(adata.n_obs) if callable(matrix) else matrix
        if names is not None:
            adata.uns["dosage_names"] = list(names)
        return adata

    return build


def dosage(n_cells, value=1.0):
    matrix = np.zeros((n_cells, 3), dtype=np.float32)
    matrix[np.arange(n_cells) % 4 > 0, 0] = value
    matrix[np.arange(n_cells) % 4 == 2, 1] = 1
    matrix[np.arange(n_cells) % 4 == 3, 2] = 1
    return matrix


def duplicate_genes():
    adata = make_adata()
    adata.var_names = ["gene0"] * 2 + [f"gene{i}" for i in range(2, 8)]
    return adata


def without_x():
    adata = make_adata()
    adata.layers["counts"] = adata.X.copy()
    adata.X = None
    return adata


DOSE = {"perturbation_key": None, "perturbation_obsm_key": "dosage"}
BAD = [
    ("no key", make_adata, {"perturbation_key": None}, ValueError, "received neither"),
    ("both keys", with_obsm(dosage), {"perturbation_obsm_key": "dosage"}, ValueError, "received both"),
    ("unknown column", make_adata, {"perturbation_key": "pertubation"}, KeyError, "did you mean 'perturbation'"),
    ("unknown flag", make_adata, {"artifact_key": "artefact"}, KeyError, "did you mean 'artifact'"),
    ("no flag", make_adata, {"artifact_key": None}, ValueError, "pp.qc_label"),
    ("unknown batch", make_adata, {"batch_key": "lane"}, KeyError, "batch_key"),
    ("unknown layer", make_adata, {"layer": "counts"}, KeyError, "layer"),
    ("unknown covariate", make_adata, {"categorical_covariate_keys": ["x"]}, KeyError, "covariate"),
    ("control absent", make_adata, {"control": "NT"}, ValueError, "'control' looks like one"),
    ("no control cell", with_labels("A", "B"), {}, ValueError, "At least one cell must be a control"),
    ("only controls", with_labels("control"), {}, ValueError, "At least one cell must be perturbed"),
    ("no control token", make_adata, {"control": []}, ValueError, "at least one control label"),
    ("missing label", with_labels("control", "A", np.nan), {}, ValueError, "NaN"),
    ("empty label", with_labels("control", "A", ""), {}, ValueError, "must not be empty"),
    ("blank label", with_labels("control", "A", "  "), {}, ValueError, "must not be empty"),
    ("empty part", with_labels("control", "A", "A+"), {}, ValueError, "'A+'"),
    ("empty first part", with_labels("control", "A", "+A"), {}, ValueError, "'+A'"),
    ("blank separator", make_adata, {"sep": " "}, ValueError, "`sep`"),
    ("text flag", with_obs("artifact", ["yes", "no"] * 30), {}, ValueError, "True/False or 0/1"),
    ("flag of 2", with_obs("artifact", [0, 1, 2] * 20), {}, ValueError, "True/False or 0/1"),
    ("fractional flag", with_obs("artifact", [0.5, 1.0] * 30), {}, ValueError, "True/False or 0/1"),
    ("missing flag", with_obs("artifact", [np.nan, 1.0] * 30), {}, ValueError, "missing"),
    ("all failed", with_obs("artifact", True), {}, ValueError, "must have passed"),
    ("missing batch", with_obs("batch", [None, "b"] * 30), {"batch_key": "batch"}, ValueError, "missing"),
    ("text covariate", make_adata, {"continuous_covariate_keys": ["batch"]}, ValueError, "numeric"),
    (
        "infinite covariate",
        with_obs("depth", [np.inf, 1.0] * 30),
        {"continuous_covariate_keys": ["depth"]},
        ValueError,
        "finite",
    ),
    ("negative", with_x(lambda x: _set(x, -1)), {}, ValueError, "negative"),
    ("fraction", with_x(lambda x: _set(x, 0.5)), {}, ValueError, "fractional"),
    ("NaN", with_x(lambda x: _set(x, np.nan)), {}, ValueError, "NaN or infinite"),
    ("infinity", with_x(lambda x: _set(x, np.inf)), {}, ValueError, "NaN or infinite"),
    ("log-normalised", with_x(lambda x: np.log1p(x, out=x)), {}, ValueError, "raw counts"),
    ("no X", without_x, {}, ValueError, "X=None"),
    ("gene twice", duplicate_genes, {}, ValueError, "unique"),
    ("view", lambda: make_adata()[:50], {}, ValueError, "copy()"),
    ("no cells", lambda: make_adata()[:0].copy(), {}, ValueError, "shape (0, 8)"),
    ("guide counts", make_adata, {"guide_counts_key": "guides"}, ValueError, "does not use `guide_counts_key`"),
    ("criteria", make_adata, {"artifact_keys": ["a"]}, ValueError, "does not use `artifact_keys`"),
    ("cell type", make_adata, {"cell_type_key": "batch"}, ValueError, "does not use `cell_type_key`"),
    ("no obsm", make_adata, DOSE, KeyError, "perturbation_obsm_key"),
    ("no names", with_obsm(dosage, None), DOSE, KeyError, "dosage_names"),
    ("too few names", with_obsm(dosage, ["A"]), DOSE, ValueError, "1 names for 3 columns"),
    ("negative dose", with_obsm(lambda n: -dosage(n)), DOSE, ValueError, "non-negative"),
    ("NaN dose", with_obsm(lambda n: dosage(n, np.nan)), DOSE, ValueError, "finite"),
    ("no control row", with_obsm(lambda n: dosage(n) + 1), DOSE, ValueError, "all-zero row"),
    ("separator in name", with_obsm(dosage, ["A", "B+C", "D"]), DOSE, ValueError, "B+C"),
    ("control in names", with_obsm(dosage, ["A", "control", "D"]), DOSE, ValueError, "control"),
]


@pytest.mark.parametrize(("build", "keys", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_is_refused_and_the_data_stay_as_they_were(build, keys, error, message):
    adata = build()
    before = content(adata)
    with pytest.raises(error, match=re.escape(message)):
        CradleVAE.setup_anndata(adata, **(KEYS | keys))
    assert content(adata) == before


@pytest.mark.parametrize("kind", ["dense", "csr", "csc", "csr_array", "int", "bool", "backed"])
def test_every_storage_of_counts_registers_and_stays(kind, tmp_path):
    adata = make_adata()
    dense = adata.X.toarray()
    match kind:
        case "dense":
            adata.X = dense
        case "csc":
            adata.X = sp.csc_matrix(dense)
        case "csr_array":
            adata.X = sp.csr_array(dense)
        case "int":
            adata.X = sp.csr_matrix(dense.astype(np.int64))
        case "bool":
            adata.X = dense = dense > 2
        case "backed":
            adata.write_h5ad(tmp_path / "a.h5ad")
            adata = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    stored = type(adata.X)
    CradleVAE.setup_anndata(adata, **KEYS)
    assert type(adata.X) is stored
    model = CradleVAE(adata)
    model.train(max_steps=2, enable_progress_bar=False)
    latent = model.get_latent_representation()
    assert latent.shape == (60, 50)
    assert np.isfinite(latent).all()


def test_only_columns_of_scvi_tools_are_added():
    adata = make_adata()
    obs, obsm, uns = set(adata.obs), set(adata.obsm), set(adata.uns)
    CradleVAE.setup_anndata(adata, **KEYS, batch_key="batch", continuous_covariate_keys=["depth"])
    assert all(
        k.startswith("_scvi") for k in (set(adata.obs) - obs) | (set(adata.obsm) - obsm) | (set(adata.uns) - uns)
    )


def test_labels_become_codes_treatments_and_dosages():
    adata = make_adata(labels=["NT", "ctrl", "B + A", "A+ctrl", "C", "NT+ctrl"])
    CradleVAE.setup_anndata(adata, **KEYS, control=["NT", "ctrl"])
    model = CradleVAE(adata)
    table = label_table(model.registry["field_registries"]["perturbation"]["state_registry"])
    assert table.labels == ("A", "A+B", "C", "NT")
    assert table.treatments == ("A", "B", "C")
    np.testing.assert_array_equal(table.dosage, [[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0]])
    codes = adata.obs["_scvi_perturbation"].to_numpy()
    assert [table.labels[c] for c in codes[:6]] == ["NT", "NT", "A+B", "A", "C", "NT"]


@pytest.mark.parametrize(("token", "label"), [("", ""), (None, np.nan)])
def test_empty_or_missing_labels_are_controls_when_told(token, label):
    adata = make_adata(labels=[label, "A", "B"])
    CradleVAE.setup_anndata(adata, **KEYS, control=["control", token])
    table = label_table(CradleVAE(adata).registry["field_registries"]["perturbation"]["state_registry"])
    assert table.labels == ("A", "B", "control")


def test_labels_are_not_split_without_separator():
    adata = make_adata()
    CradleVAE.setup_anndata(adata, **KEYS, sep=None)
    table = label_table(CradleVAE(adata).registry["field_registries"]["perturbation"]["state_registry"])
    assert table.treatments == ("A", "A+B", "B", "C")


def test_a_treatment_named_twice_is_collapsed_with_a_warning():
    adata = make_adata(labels=["control", "A", "A+A"])
    with pytest.warns(UserWarning, match="more than once"):
        CradleVAE.setup_anndata(adata, **KEYS)
    assert label_table(CradleVAE(adata).registry["field_registries"]["perturbation"]["state_registry"]).labels == (
        "A",
        "control",
    )


def test_warnings_name_what_is_unusual():
    with pytest.warns(UserWarning, match="No cell failed QC"):
        CradleVAE.setup_anndata(make_adata(artifact=False), **KEYS)
    adata = make_adata()
    adata.X[4] = 0
    with pytest.warns(UserWarning, match="1 cells have no count"):
        CradleVAE.setup_anndata(adata, **KEYS)
    toxic = make_adata(n_cells=400)
    toxic.obs["artifact"] = toxic.obs["perturbation"] == "C"
    with pytest.warns(UserWarning, match="QC failure goes with the perturbation for 'C'"):
        CradleVAE.setup_anndata(toxic, **KEYS)


# scvi-tools hands the read-only views of pandas 3 to torch, which only reads them
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
@pytest.mark.parametrize("as_frame", [True, False])
def test_a_dosage_matrix_is_the_second_path(as_frame):
    adata = make_adata()
    matrix = dosage(adata.n_obs, value=0.5)
    adata.obsm["dosage"] = (
        pd.DataFrame(matrix, columns=list("ABC"), index=adata.obs_names) if as_frame else sp.csr_matrix(matrix)
    )
    adata.uns["dosage_names"] = list("ABC")
    CradleVAE.setup_anndata(adata, perturbation_obsm_key="dosage", artifact_key="artifact")
    model = CradleVAE(adata)
    table = label_table(model.registry["field_registries"]["perturbation"]["state_registry"])
    assert table.labels == ("A", "A+B", "A+C", "control")
    model.train(max_steps=3, enable_progress_bar=False)
    np.testing.assert_array_equal(
        model.module.n_obs_per_treatment.numpy(), (matrix[model.train_indices] > 0).sum(0).astype(np.float32)
    )
    z = model.get_latent_representation(component="perturbation")
    expected = model.get_perturbation_effects().X
    np.testing.assert_allclose(z, matrix @ expected, rtol=1e-4, atol=1e-5)


def test_a_query_may_hold_new_combinations_of_known_treatments_only():
    adata = make_adata()
    CradleVAE.setup_anndata(adata, **KEYS)
    model = CradleVAE(adata)
    model.train(max_steps=2, enable_progress_bar=False)
    query = make_adata(labels=["C+B", "B", "A+B+C"])  # no control, two new combinations
    z = model.get_latent_representation(query, component="perturbation")
    effects = model.get_perturbation_effects().to_df()
    np.testing.assert_allclose(z[0], effects.loc["B"] + effects.loc["C"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(z[2], effects.sum(), rtol=1e-4, atol=1e-6)
    unknown = make_adata(labels=["A", "A+Bb"])
    before = content(unknown)
    with pytest.raises(ValueError, match="'Bb' is unknown .did you mean 'B'"):
        model.get_latent_representation(unknown)
    assert content(unknown) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a[:, ::-1].copy(), "another order"),
        (lambda a: a[:, :5].copy(), "3 missing genes ('gene5', 'gene6', 'gene7')"),
        (
            lambda a: ad.concat(
                [a, ad.AnnData(a.X[:, :1], obs=a.obs[[]], var=pd.DataFrame(index=["new"]))], axis=1, merge="first"
            ),
            "further genes ('new')",
        ),
    ],
    ids=["reversed", "missing", "extra"],
)
def test_genes_of_a_query_are_checked(change, message):
    adata = make_adata()
    CradleVAE.setup_anndata(adata, **KEYS)
    model = CradleVAE(adata)
    model.train(max_steps=2, enable_progress_bar=False)
    query = change(make_adata())
    with pytest.raises(ValueError, match=re.escape(message)):
        model.get_latent_representation(query)


def test_a_query_view_stays_a_view_and_gives_the_rows_asked():
    adata = make_adata()
    CradleVAE.setup_anndata(adata, **KEYS)
    model = CradleVAE(adata)
    model.train(max_steps=2, enable_progress_bar=False)
    view = adata[10:20]
    z = model.get_latent_representation(view)
    assert view.is_view
    np.testing.assert_allclose(z, model.get_latent_representation(indices=np.arange(10, 20)), atol=1e-6)


@pytest.mark.parametrize(
    ("split", "error", "message"),
    [
        (["train", "validation"], ValueError, "validation"),
        (["train", None], ValueError, "missing"),
        (["val", "test"], ValueError, "at least one cell as 'train'"),
    ],
)
def test_a_split_column_must_be_one(split, error, message):
    adata = make_adata(split=pd.Series(split * 30, index=make_adata().obs_names))
    CradleVAE.setup_anndata(adata, **KEYS)
    with pytest.raises(error, match=message):
        CradleVAE(adata).train(split_key="split")


def test_training_without_controls_is_refused():
    adata = make_adata()
    adata.obs["split"] = np.where(adata.obs["perturbation"] == "control", "test", "train")
    CradleVAE.setup_anndata(adata, **KEYS)
    model = CradleVAE(adata)
    with pytest.raises(ValueError, match="must hold control cells"):
        model.train(split_key="split")
    with pytest.raises(KeyError, match="split_key"):
        model.train(split_key="no")
