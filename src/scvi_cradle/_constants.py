"""Names of registry entries and of the columns that the package writes."""

from typing import NamedTuple


class _RegistryKeys(NamedTuple):
    """Keys of the tensors that a data loader yields (beside those of scvi-tools)."""

    PERTURBATION: str = "perturbation"
    DOSAGE: str = "dosage"
    ARTIFACT: str = "artifact"
    PARTNER: str = "control_partner"
    GUIDES: str = "guides"
    CELL_TYPE: str = "cell_type"


class _Columns(NamedTuple):
    """Columns of the AnnData objects that the package returns."""

    PERTURBATION: str = "perturbation"
    PERTURBATION_OBSERVED: str = "perturbation_observed"
    ARTIFACT: str = "artifact"
    SEEN: str = "seen"


class _QCFlags(NamedTuple):
    """Criteria of :func:`scvi_cradle.pp.qc_label`; the flag of criterion ``c`` is ``obs["qc_" + c]``."""

    TOTAL_COUNTS: str = "total_counts"
    N_GENES: str = "n_genes"
    PCT_MT: str = "pct_mt"
    PCT_RIBO: str = "pct_ribo"
    PCT_HB: str = "pct_hb"
    DOUBLET: str = "doublet"


def partner_key(key: str) -> str:
    """Return the name of the tensor with what ``key`` is for the control partners of cells."""
    return KEYS.PARTNER if key == "X" else f"{KEYS.PARTNER}_{key}"


KEYS = _RegistryKeys()
COLUMNS = _Columns()
QC_CRITERIA = _QCFlags()
QC_UNS_KEY = "qc_label"
CONTROL_UNS_KEY = "control"
ON_DISK_UNS_KEY = "_scvi_cradle_on_disk"  # marks an AnnData whose counts are on disk
COUNTS_PER_CELL = 1e4
