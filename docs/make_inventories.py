"""Write the intersphinx inventories of the sites that the documentation links to.

Only the targets that our pages use are listed: ``{"site": {"role": {"uri with $": "names"}}}``.
``$`` in a URI stands for the name; ``seen=name`` gives a name the page of another, for classes that say that they live
in a private module. Run ``python docs/make_inventories.py`` after adding one.
"""

from __future__ import annotations

import zlib
from pathlib import Path

FOLDER = Path(__file__).parent / "_inventories"

SITES: dict[str, dict[str, dict[str, str]]] = {
    "python": {
        "class": {
            "library/functions.html#$": "bool float int object property type",
            "library/stdtypes.html#$": "bytes complex dict frozenset list range set slice str tuple",
            "library/collections.html#$": "collections.Counter collections.OrderedDict",
            "library/collections.abc.html#$": (
                "collections.abc.Callable collections.abc.Collection collections.abc.Generator collections.abc.Hashable "
                "collections.abc.Iterable collections.abc.Iterator collections.abc.Mapping "
                "collections.abc.MutableMapping collections.abc.Sequence collections.abc.Set "
                "Iterable=collections.abc.Iterable Mapping=collections.abc.Mapping Sequence=collections.abc.Sequence"
            ),
            "library/pathlib.html#$": "pathlib.Path",
            "library/typing.html#$": "typing.Any Any=typing.Any Literal=typing.Literal typing.NamedTuple typing.Protocol typing.Self",
            "library/os.html#$": "os.PathLike",
        },
        "data": {
            "library/constants.html#$": "None True False",
            "library/typing.html#$": (
                "typing.Any typing.Callable typing.ClassVar typing.Literal typing.Optional typing.Union typing.Self"
            ),
        },
        "exception": {
            "library/exceptions.html#$": (
                "FileNotFoundError ImportError KeyError NotImplementedError RuntimeError TypeError UserWarning ValueError"
            ),
        },
        "attribute": {"library/typing.html#$": "typing.Literal"},
    },
    "numpy": {
        "class": {
            "reference/generated/$.html#$": "numpy.ndarray numpy.dtype numpy.generic np.ndarray=numpy.ndarray",
            "reference/arrays.scalars.html#$": (
                "numpy.bool numpy.bool_ numpy.float64 numpy.floating numpy.int64 numpy.integer numpy.number"
            ),
            "reference/random/generator.html#$": "numpy.random.Generator np.random.Generator=numpy.random.Generator",
            "reference/typing.html#$": "numpy.typing.ArrayLike numpy.typing.NDArray",
        },
        "data": {"reference/typing.html#$": "numpy.typing.ArrayLike numpy.typing.NDArray"},
        "attribute": {"reference/typing.html#$": "numpy.typing.ArrayLike numpy.typing.NDArray"},
        "function": {"reference/random/generator.html#$": "numpy.random.default_rng"},
    },
    "pandas": {
        "class": {
            "reference/api/$.html#$": (
                "pandas.Categorical pandas.DataFrame pandas.Index pandas.Series "
                "pandas.core.frame.DataFrame=pandas.DataFrame pandas.core.indexes.base.Index=pandas.Index "
                "pandas.core.series.Series=pandas.Series "
                # names as they stand in annotations that cannot be evaluated, because an import is for typing only
                "pd.DataFrame=pandas.DataFrame pd.Index=pandas.Index pd.Series=pandas.Series"
            ),
        },
    },
    "scipy": {
        "class": {
            "reference/generated/$.html#$": (
                "scipy.sparse.csc_matrix scipy.sparse.csr_array scipy.sparse.csr_matrix scipy.sparse.sparray "
                "scipy.sparse.spmatrix scipy.sparse._csr.csr_array=scipy.sparse.csr_array "
                "scipy.sparse._csr.csr_matrix=scipy.sparse.csr_matrix sp.csr_matrix=scipy.sparse.csr_matrix"
            ),
        },
        "function": {
            "reference/generated/$.html#$": (
                "scipy.optimize.linear_sum_assignment scipy.stats.false_discovery_control scipy.stats.fisher_exact "
                "scipy.stats.median_abs_deviation scipy.stats.spearmanr scipy.stats.ttest_ind"
            ),
        },
    },
    "anndata": {
        "class": {
            "generated/$.html#$": "anndata.AnnData AnnData=anndata.AnnData anndata._core.anndata.AnnData=anndata.AnnData"
        },
        "attribute": {
            "generated/$.html#$": "anndata.AnnData.X anndata.AnnData.layers anndata.AnnData.obs anndata.AnnData.obsm "
            "anndata.AnnData.uns anndata.AnnData.var"
        },
        "function": {"generated/$.html#$": "anndata.concat"},
    },
    "mudata": {
        "class": {
            "api/generated/$.html#$": "mudata.MuData MuData=mudata.MuData mudata._core.mudata.MuData=mudata.MuData"
        }
    },
    "scanpy": {
        "function": {
            "api/generated/$.html#$": (
                "scanpy.pp.calculate_qc_metrics scanpy.pp.highly_variable_genes scanpy.pp.log1p "
                "scanpy.pp.normalize_total scanpy.pp.scrublet"
            ),
        },
    },
    "scvi": {
        "class": {
            "api/reference/$.html#$": "scvi.model.SCVI scvi.train.Trainer scvi.train.TrainingPlan scvi.dataloaders.DataSplitter "
            "scvi.data.AnnDataManager scvi.hub.HubModel",
            "api/developer/$.html#$": (
                "scvi.data.fields.BaseAnnDataField scvi.data.fields.NumericalObsField scvi.data.fields.ObsmField "
                "scvi.model.base.BaseModelClass scvi.model.base.UnsupervisedTrainingMixin scvi.model.base.VAEMixin "
                "scvi.module.base.BaseModuleClass scvi.module.base.LossOutput "
                "scvi.module.base._base_module.BaseModuleClass=scvi.module.base.BaseModuleClass "
                "scvi.module.base._base_module.LossOutput=scvi.module.base.LossOutput"
            ),
        },
        "method": {
            "api/developer/$.html#$": (
                "scvi.model.base.BaseModelClass.load scvi.model.base.BaseModelClass.save "
                "scvi.model.base.UnsupervisedTrainingMixin.train"
            ),
        },
    },
    "torch": {
        "class": {
            "tensors.html#$": "torch.Tensor",
            "generated/$.html#$": (
                "torch.Generator torch._C.Generator=torch.Generator torch.nn.Module torch.optim.Adam torch.optim.Optimizer"
            ),
            "tensor_attributes.html#$": "torch.device torch.dtype",
            "distributions.html#$": (
                "torch.distributions.Bernoulli torch.distributions.Distribution torch.distributions.Normal "
                "torch.distributions.bernoulli.Bernoulli torch.distributions.distribution.Distribution "
                "torch.distributions.normal.Normal"
            ),
        },
    },
    "lightning": {
        "class": {
            "api/$.html#$": "lightning.pytorch.trainer.trainer.Trainer lightning.pytorch.core.LightningDataModule",
        },
    },
    "matplotlib": {
        "class": {
            "api/_as_gen/$.html#$": (
                "matplotlib.axes.Axes Axes=matplotlib.axes.Axes matplotlib.axes._axes.Axes=matplotlib.axes.Axes"
            ),
            "api/figure_api.html#$": "matplotlib.figure.Figure Figure=matplotlib.figure.Figure",
        },
    },
    "networkx": {
        "class": {
            "reference/classes/digraph.html#$": "networkx.DiGraph networkx.classes.digraph.DiGraph=networkx.DiGraph"
        }
    },
    "sklearn": {
        "class": {
            "modules/generated/$.html#$": "sklearn.linear_model.ElasticNet sklearn.neighbors.NearestNeighbors",
        },
    },
}


def inventory(site: str, roles: dict[str, dict[str, str]]) -> bytes:
    """An inventory of version 2: four lines of text, then one compressed line a target."""
    rows = [
        f"{seen} py:{role} 1 {uri.replace('$', name or seen)} -\n"
        for role, places in roles.items()
        for uri, names in places.items()
        for seen, _, name in (entry.partition("=") for entry in names.split())
    ]
    head = (
        "# Sphinx inventory version 2\n"
        f"# Project: {site}\n"
        "# Version: \n"
        "# The remainder of this file is compressed using zlib.\n"
    )
    return head.encode() + zlib.compress("".join(sorted(rows)).encode(), 9)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for site, roles in SITES.items():
        (FOLDER / f"{site}.inv").write_bytes(inventory(site, roles))
