"""Where the files of published data sets are."""

from __future__ import annotations

from typing import NamedTuple

_PERTPY = "https://exampledata.scverse.org/pertpy"
_DATAVERSE = "https://dataverse.harvard.edu/api/access/datafile"
_FIGSHARE = "https://ndownloader.figshare.com/files"
_ZENODO = "https://zenodo.org/records"


class Source(NamedTuple):
    """An address and the name that its file gets here; addresses of different files have different names."""

    url: str
    file_name: str


# Addresses as other projects give them, first choice first; none publishes a checksum.
SOURCES: dict[str, tuple[Source, ...]] = {
    "norman": (
        Source(f"{_PERTPY}/norman_2019.h5ad", "norman_2019.h5ad"),
        Source(f"{_FIGSHARE}/34027562", "norman_2019.h5ad"),
        Source(f"{_DATAVERSE}/6154020", "norman_gears.zip"),
    ),
    "dixit": (
        Source(f"{_FIGSHARE}/34011689", "dixit_2016_figshare.h5ad"),
        Source(f"{_PERTPY}/dixit_2016.h5ad", "dixit_2016.h5ad"),
        Source(f"{_DATAVERSE}/6154416", "dixit_gears.zip"),
    ),
    "adamson": (
        Source(
            f"{_ZENODO}/7041849/files/AdamsonWeissman2016_GSM2406681_10X010.h5ad",
            "AdamsonWeissman2016_GSM2406681_10X010.h5ad",
        ),
        Source(f"{_DATAVERSE}/6154417", "adamson_gears.zip"),
        Source(f"{_PERTPY}/adamson_2016_upr_perturb_seq.h5ad", "adamson_2016_upr_perturb_seq.h5ad"),
    ),
    "replogle_k562_gwps": (Source(f"{_PERTPY}/replogle_2022_k562_gwps.h5ad", "replogle_2022_k562_gwps.h5ad"),),
    "replogle_k562_essential": (
        Source(f"{_PERTPY}/replogle_2022_k562_essential.h5ad", "replogle_2022_k562_essential.h5ad"),
        Source(f"{_DATAVERSE}/7458695", "replogle_k562_essential_gears.zip"),
    ),
    "santinha": (
        Source(f"{_ZENODO}/13350497/files/SantinhaPlatt2023.h5ad", "SantinhaPlatt2023.h5ad"),
        Source(f"{_ZENODO}/7041849/files/SantinhaPlatt2023.h5ad", "SantinhaPlatt2023.h5ad"),
    ),
    "papalexi": (Source(f"{_PERTPY}/papalexi_2021.h5mu", "papalexi_2021.h5mu"),),
}
