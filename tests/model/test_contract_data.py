"""What every model takes as data, and what it refuses: registration, queries, MuData, dosages, covariates."""

from __future__ import annotations

import pickle
import re

import mudata as md
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

pytestmark = [
    pytest.mark.filterwarnings("ignore:The (basal state is|invariant variables are) unused:UserWarning"),  # short
    pytest.mark.filterwarnings("ignore:Generated cells (vary too little|of one label are close):UserWarning"),
]
HELD_OUT, NEW = "G02+G04", "G01+G03"


def content(adata):
    """Everything that a refused call must leave alone."""
    return pickle.dumps(
        (
            adata.obs.to_dict("list"),
            adata.var.to_dict("list"),
            {k: np.asarray(v).tolist() for k, v in adata.obsm.items()},
            {k: v.toarray().tolist() for k, v in adata.layers.items()},
            sorted(adata.uns),
            type(adata.X).__name__,
            sp.csr_matrix(adata.X).toarray().tolist(),
        )
    )


# ---- registration -----------------------------------------------------------------------------------------------------


def test_set_up_and_training_write_only_scvi_columns(case, trained, shared_screen):
    adata = trained.adata
    for name in ("obs", "var", "obsm", "layers", "uns"):
        before, after = set(getattr(shared_screen, name)), set(getattr(adata, name))
        assert all(k.startswith("_scvi") for k in after - before), name
        assert before <= after
    kept = adata.obs[list(shared_screen.obs)]
    pd.testing.assert_frame_equal(kept, shared_screen.obs)
    assert (adata.X != shared_screen.X).nnz == 0


def without_controls(adata):
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(str).replace({"control": "G01"})


def with_nan(adata):
    adata.X = adata.X.copy()
    adata.X.data[5] = np.nan


def with_twin_genes(adata):
    adata.var_names = ["g", "g", *adata.var_names[2:]]


def with_missing_label(adata):
    labels = adata.obs["perturbation"].astype(object)
    labels.iloc[3] = np.nan
    adata.obs["perturbation"] = labels


BAD = {
    "unknown key": ({"perturbation_key": "pertubation"}, None, KeyError, "did you mean 'perturbation'"),
    "unknown batch": ({"batch_key": "lanes"}, None, KeyError, "batch_key"),
    "no control": ({}, without_controls, ValueError, "At least one cell must be a control"),
    "NaN": ({}, with_nan, ValueError, "NaN or infinite"),
    "gene twice": ({}, with_twin_genes, ValueError, "unique"),
    "missing label": ({}, with_missing_label, ValueError, "NaN"),
    "guides": ({"guide_counts_key": "guide_counts"}, None, ValueError, "does not use `guide_counts_key`"),
    "criteria": ({"artifact_keys": ["qc_pct_mt"]}, None, ValueError, "does not use `artifact_keys`"),
    "cell type": ({"cell_type_key": "batch"}, None, ValueError, "does not use `cell_type_key`"),
    "two keys": ({"perturbation_obsm_key": "dose"}, None, ValueError, "received both"),
}


@pytest.mark.parametrize(("keys", "change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_data_are_refused_and_stay_as_they_were(case, shared_screen, keys, change, error, message):
    adata = shared_screen.copy()
    if change is not None:
        change(adata)
    before = content(adata)
    with pytest.raises(error, match=re.escape(message)):
        case.model.setup_anndata(adata, **case.keys(**keys))
    assert content(adata) == before


def test_flags_are_needed_by_models_with_an_artifact_and_refused_by_others(case, shared_screen):
    flag, message = (None, "pp.qc_label") if case.artifact else ("artifact", "does not use `artifact_key`")
    with pytest.raises(ValueError, match=message):
        case.model.setup_anndata(shared_screen.copy(), **case.keys(artifact_key=flag))


def test_a_view_is_refused_by_set_up_and_kept_by_queries(case, trained, shared_screen):
    with pytest.raises(ValueError, match="must not be a view"):
        case.model.setup_anndata(shared_screen[:50], **case.keys())
    source = shared_screen.copy()
    view = source[10:60]
    z = trained.get_latent_representation(view)
    assert view.is_view
    assert not any(str(c).startswith("_scvi") for c in source.obs)
    np.testing.assert_allclose(z, trained.get_latent_representation(indices=np.arange(10, 60)), atol=1e-6)


def test_values_other_than_counts_are_refused(case, shared_screen):
    adata = shared_screen.copy()
    adata.X = sp.csr_matrix(np.log1p(adata.X.toarray()))
    with pytest.raises(ValueError, match="raw counts"):
        case.build(adata)
    adata.layers["counts"] = shared_screen.X.copy()
    assert case.build(adata, layer="counts") is not None


# ---- queries ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a[:, ::-1].copy(), "another order"),
        (lambda a: a[:, :57].copy(), "3 missing genes"),
        (lambda a: relabel(a, "perturbation", "G1"), "'G1' is unknown (did you mean 'G01'"),
        (lambda a: relabel(a, "batch", "new"), "categories seen in training"),
        (lambda a: fractional(a), "fractional"),
    ],
    ids=["order", "missing", "treatment", "batch", "values"],
)
@pytest.mark.parametrize("registered", [False, True], ids=["other data", "copy of the model's data"])
def test_a_query_that_does_not_fit_is_refused_and_left_alone(trained, shared_screen, change, message, registered):
    query = change((trained.adata if registered else shared_screen)[:30].copy())
    before = content(query)
    for call in (trained.get_latent_representation, trained.get_counterfactual_expression, trained.get_elbo):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(query)
    assert content(query) == before


def relabel(adata, key, value):
    adata.obs[key] = value
    return adata


def fractional(adata):
    adata.X = adata.X * 0.5
    return adata


@pytest.mark.parametrize("name", ["get_generated_expression", "get_average_treatment_effects"])
@pytest.mark.parametrize(
    ("request_", "message"),
    [(["g01"], "did you mean 'G01'"), (["G01+G99"], "G99' is unknown"), ([], "at least one"), (["G01+"], "Every part")],
    ids=str,
)
def test_bad_requests_are_refused(trained, name, request_, message):
    with pytest.raises(ValueError, match=message):
        getattr(trained, name)(request_)


def test_bad_options_are_refused(trained):
    generate, effects = trained.get_generated_expression, trained.get_average_treatment_effects
    for call, arguments, message in (
        (generate, {"n_samples": 0}, "`n_samples`"),
        (generate, {"output": "log"}, "`output` must be one of"),
        (generate, {"library_size": "latent"}, "'observed' or a positive number"),
        (generate, {"library_size": -1.0}, "`library_size`"),
        (effects, {"method": "log"}, "`method` must be one of"),
        (effects, {"expectation": "none"}, "`expectation` must be one of"),
        (effects, {"n_particles": 0}, "`n_particles`"),
        (trained.get_iwelbo, {"n_particles": 0}, "`n_particles`"),
        (trained.get_latent_representation, {"indices": [400]}, "between 0 and 399"),
        (trained.get_latent_representation, {"indices": []}, "at least one cell"),
        (trained.get_latent_representation, {"indices": np.zeros(400, dtype=bool)}, "at least one cell"),
        (trained.get_latent_representation, {"indices": np.ones(3, dtype=bool)}, "mask"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**arguments)


def test_a_query_with_a_new_combination_works_or_is_refused_with_the_reason(case, trained, shared_screen):
    query = shared_screen[:30].copy()
    query.obs["perturbation"] = np.array(["G03+G01", "G01"])[np.arange(30) % 2]  # no control either
    before = content(query)
    if not case.combines:
        for call in (trained.get_latent_representation, trained.get_elbo):
            with pytest.raises(NotImplementedError, match=re.escape(f"unseen combination '{NEW}'")):
                call(query)
        assert content(query) == before
        return
    own = trained.get_latent_representation(component="full")
    assert trained.get_latent_representation(query).shape == (30, 5)
    assert np.isfinite(trained.get_elbo(query))
    cells = trained.get_counterfactual_expression(query)
    assert list(cells.obs["perturbation"][:2]) == [NEW, "G01"]
    if "perturbation" in case.components:
        z = trained.get_latent_representation(query, component="perturbation")
        effects = trained.get_perturbation_effects().to_df()
        np.testing.assert_allclose(z[0], effects.loc["G01"] + effects.loc["G03"], rtol=1e-4, atol=1e-6)
    again = trained.get_latent_representation(component="full")  # the model's own data are read as before
    np.testing.assert_array_equal(own, again)


def test_cells_of_a_held_out_combination_have_latents_and_bounds(trained, shared_screen):
    cells = np.flatnonzero(shared_screen.obs["perturbation"] == HELD_OUT)
    assert np.isfinite(trained.get_latent_representation(indices=cells)).all()
    assert np.isfinite(trained.get_iwelbo(indices=cells, n_particles=2, score_global=True)).all()


# ---- other forms of data ----------------------------------------------------------------------------------------------


def test_mudata_train_like_anndata(case, trained, shared_screen):
    data = md.MuData({"rna": shared_screen.copy()})
    data.obs["split"] = shared_screen.obs["split"].to_numpy()
    with pytest.raises(KeyError, match="modalities"):
        case.model.setup_mudata(data, **case.keys(), modalities={"rna": "gex"})
    case.model.setup_mudata(data, **case.keys(), modalities={"rna": "rna", "guide": "guide"})
    model = case.model(data, **case.architecture)
    model.train(max_epochs=1, split_key="split", enable_progress_bar=False)
    model.module.load_state_dict(trained.module.state_dict())
    np.testing.assert_array_equal(
        model.get_latent_representation(component="full"), trained.get_latent_representation(component="full")
    )
    cells = model.get_counterfactual_expression(indices=[1, 2], perturbation="G01", seed=0)
    assert list(cells.obs_names) == list(shared_screen.obs_names[[1, 2]])
    assert list(cells.var_names) == list(shared_screen.var_names)


def dosages(adata, dose=0.5):
    labels = adata.obs["perturbation"].astype(str)
    names = [f"G0{i}" for i in range(1, 5)]
    frame = pd.DataFrame({n: labels.str.contains(n).astype(float) for n in names}, index=adata.obs_names)
    frame["G01"] *= dose
    return frame


# scvi-tools hands the read-only views of pandas 3 to torch, which only reads them
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
def test_dosages_are_the_second_path(case, shared_screen):
    adata = shared_screen.copy()
    adata.obsm["dose"] = dosages(adata)
    keys = {"perturbation_key": None, "perturbation_obsm_key": "dose"}
    if not case.combines:
        with pytest.raises(ValueError, match="register `perturbation_key`"):
            case.build(adata, **keys)
        return
    model = case.fit(adata, epochs=1, **keys)
    assert list(model.get_generated_expression([NEW], n_samples=2).obs["seen"]) == ["unseen combination"] * 2
    if "perturbation" in case.components:
        z = model.get_latent_representation(component="perturbation")
        expected = adata.obsm["dose"].to_numpy() @ model.get_perturbation_effects().X
        np.testing.assert_allclose(z, expected, rtol=1e-4, atol=1e-5)
    query = shared_screen[:100].copy()
    query.obsm["dose"] = dosages(query)
    half = model.get_elbo(query, return_mean=False)
    assert np.isfinite(half).all()
    query = shared_screen[:100].copy()
    query.obsm["dose"] = dosages(query, dose=-1.0)
    with pytest.raises(ValueError, match="finite non-negative"):
        model.get_latent_representation(query)


def test_batches_and_covariates_enter_the_decoder(case, shared_screen):
    adata = shared_screen.copy()
    adata.obs["lane"] = np.array(["x", "y", "z"])[np.arange(400) % 3]
    keys = {"categorical_covariate_keys": ["lane"], "continuous_covariate_keys": ["depth"]}
    model = case.fit(adata, epochs=1, **keys)
    assert model.module.n_levels == (2, 3)
    assert model.module.n_covariates == 2 + 3 + 1
    cells = {}
    for depth in (0.0, 1.0):
        query = shared_screen[shared_screen.obs["split"] == "train"][:60].copy()
        query.obs["lane"] = adata.obs["lane"]
        query.obs["depth"] = depth
        cells[depth] = model.get_counterfactual_expression(query, output="normalized", seed=0).X
        assert model.get_generated_expression(["G01"], n_samples=2).n_obs == 2
    assert (cells[0.0] != cells[1.0]).any()


def test_a_last_batch_of_one_cell_trains(case, shared_screen):
    adata = shared_screen.copy()
    adata.obs["split"] = np.where(np.arange(400) < 65, "train", "val")
    model = case.build(adata)
    arguments = {"max_epochs": 1, "split_key": "split", "batch_size": 64, "enable_progress_bar": False}
    if "lopez" in case.settings.values():  # batch normalisation needs two
        with pytest.warns(UserWarning, match="Last batch"), pytest.raises(ValueError, match="more than 1 value"):
            model.train(**arguments)
        return
    with pytest.warns(UserWarning, match="Last batch will have a small size of 1"):
        model.train(**arguments)
    assert np.isfinite(model.history["elbo_train"].to_numpy(dtype=float)).all()
