"""Published figures, as data: the table of the paper [L17 table 1], and the smallest coded models published since."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class PaperRow:
    """One row of the paper's table. A pair holds a rate and a test error in percent; None where the paper has no value.

    Attributes:
      network: The name of the experiment.
      method: The name of the method, one of ``registry.method_names()``.
      kept: The share of kept weights, in percent.
      pruned: The pair after pruning.
      reduced: The pair after precision reduction.
      maximum: The pair at maximum compression. The rate is the paper's estimate.
    """

    network: str
    method: str
    kept: float
    pruned: tuple[float, float]
    reduced: tuple[float, float] | None
    maximum: tuple[float, float] | None


PAPER = (
    PaperRow("lenet300", "dc", 8.0, (6, 1.6), None, (40, 1.6)),
    PaperRow("lenet300", "dns", 1.8, (28, 2.0), None, None),
    PaperRow("lenet300", "sws", 4.3, (12, 1.9), None, (64, 1.9)),
    PaperRow("lenet300", "sparse_vd", 2.2, (21, 1.8), (84, 1.8), (113, 1.8)),
    PaperRow("lenet300", "gnj", 10.8, (9, 1.8), (36, 1.8), (58, 1.8)),
    PaperRow("lenet300", "ghs", 10.6, (9, 1.8), (23, 1.9), (59, 2.0)),
    PaperRow("lenet5", "dc", 8.0, (6, 0.7), None, (39, 0.7)),
    PaperRow("lenet5", "dns", 0.9, (55, 0.9), None, (108, 0.9)),
    PaperRow("lenet5", "sws", 0.5, (100, 1.0), None, (162, 1.0)),
    PaperRow("lenet5", "sparse_vd", 0.7, (63, 1.0), (228, 1.0), (365, 1.0)),
    PaperRow("lenet5", "gnj", 0.9, (108, 1.0), (361, 1.0), (573, 1.0)),
    PaperRow("lenet5", "ghs", 0.6, (156, 1.0), (419, 1.0), (771, 1.0)),
    PaperRow("vgg", "gnj", 6.7, (14, 8.6), (56, 8.8), (95, 8.6)),
    PaperRow("vgg", "ghs", 5.5, (18, 9.0), (59, 9.0), (116, 9.2)),
)

# The test errors of the paper's uncompressed networks, in percent.
PAPER_ERRORS = {"lenet300": 1.6, "lenet5": 0.9, "vgg": 8.4}


@dataclasses.dataclass(frozen=True)
class PublishedModel:
    """A small model from another publication.

    Attributes:
      network: The name of the experiment.
      title: The name of the method, and the publication.
      error: The test error in percent.
      bytes: The size of the model.
      kind: The origin of the size: a "file", a "coded" stream, or an "estimate".
    """

    network: str
    title: str
    error: float
    bytes: int
    kind: str


MODELS = (
    PublishedModel("lenet5", "MIRACLE, Havasi et al. 2019", 0.69, 3107, "coded"),
    PublishedModel("lenet5", "MIRACLE, public file", 0.83, 1694, "file"),
    PublishedModel("lenet5", "MIRACLE, Havasi et al. 2019", 0.96, 1553, "coded"),
    PublishedModel("lenet5", "MIRACLE, public file", 0.97, 1140, "file"),
    PublishedModel("lenet5", "Oktay et al. 2020", 0.95, 2840, "coded"),
    PublishedModel("lenet300", "Oktay et al. 2020", 1.9, 8560, "coded"),
    PublishedModel("lenet300", "Sparse VD, Molchanov et al. 2017", 1.8, 9440, "estimate"),
    PublishedModel("lenet300", "Deep Compression, Han et al. 2016", 1.58, 26700, "estimate"),
)
