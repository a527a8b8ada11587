"""The tables of the two papers, with their published values, and which run belongs to which row. Free of torch.

`sdtrain report table1 --runs RUN ...` fills them with numbers of runs; published values stand in columns of their own,
as printed, because no run here was measured as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from sdtrain.models.width import fraction

Words = tuple[str, ...]
Cells = Mapping[str, str]  # "val/fid" -> as printed

MODELS = {"stylegan2": "StyleGAN2-ADA", "stylenat": "StyleNAT", "fastgan": "ProjectedGAN"}
BACKBONES = {"gcfsr": "GCFSR", "rrdbnet": "Real-ESRGAN", "srvgg": "SRVGG"}
DATA = {"ffhq": "FFHQ", "church": "LSUN Church"}  # by what the path of the training set contains
LAST = ("", "naive", "adversarial", "online")  # stages whose network is the result


@dataclass(frozen=True)
class Paper:
    """One table of a paper."""

    title: str
    words: Words
    """Names of the columns that say which row it is."""
    columns: Words
    """SPLIT/METRIC of what is measured."""
    row_of: Callable[[Any], Words | None]
    """The row of a run's configuration; None = it is not of this table."""
    published: Mapping[Words, Cells]
    teacher: Words | None = None
    """The row of the teacher that a run has trained or was given."""
    apart: int = 0
    """So many words at the beginning tell things that were never to be compared, such as data sets."""


def sdgan_row(config: Any) -> Words | None:
    """(data set, model) of a run of SD-GAN, with +SD, +SD_L1 and the like."""
    if config.method != "sdgan":
        return None
    data, model = setting(config)
    return data, model + variant(config.sd)


def setting(config: Any) -> tuple[str, str]:
    """(data set, model) of a run of SD-GAN."""
    kind, place = config.model.generator.kind, str(config.data.train).lower()
    if kind == "fastgan" and config.model.discriminator.kind != "projected":
        kind = "FastGAN"
    data = next((name for part, name in DATA.items() if part in place), "other images")
    return data, MODELS.get(kind, kind)


def variant(sd: Any) -> str:
    """What a run of SD-GAN adds to its baseline, such as +SD; "" is the baseline."""
    if not sd.alpha:
        return ""
    if sd.loss != "lpips-vgg":
        return f"+SD_{sd.loss.upper()}"
    return "+SD" if sd.augment else "+SD without T"


def sdakd_row(backbone: str) -> Callable[[Any], Words | None]:
    """(method, C of G, C of D) of runs whose generator is `backbone`, the arms of Tables 1 and 2 of SDAKD."""

    def row(config: Any) -> Words | None:
        if config.model.generator.kind != backbone or (name := method_of(config)) is None:
            return None
        D_C = 1 if config.method in ("omgd", "dcd") else config.student.D_C
        C = fraction(config.student.C)
        return name, str(C), str(C if D_C is None else fraction(D_C))

    return row


def method_of(config: Any) -> str | None:
    """The name of an arm; None for an ablation and for a run that trains teachers alone."""
    if config.method == "omgd":
        return "OMGD"
    if config.method == "dcd":
        return "DCD with modified adversarial training" if config.judged == "both" else "DCD"
    if config.method != "sdakd" or config.adversary == "teacher":
        return None
    if config.stages == ("naive",):
        return "naive"
    return "SDAKD + SD" if config.sd.alpha else "SDAKD" if "adversarial" in config.stages else None


def ablation_row(config: Any) -> Words | None:
    """(n2 > 0, map distilled, student D) of Table 4, at C = 1/4 of GCFSR."""
    whole = config.method == "sdakd" and "adversarial" in config.stages and fraction(config.student.C) == Fraction(1, 4)
    if not whole or config.model.generator.kind != "gcfsr" or config.sd.alpha or config.teacher_d == "frozen":
        return None
    answers = ("supervised" in config.stages, config.lambda_1 > 0, config.adversary == "student")
    return tuple("yes" if answer else "no" for answer in answers)


def cells(columns: Words, *values: str) -> Cells:
    return dict(zip(columns, values, strict=True))


def rows(columns: Words, text: str) -> dict[Words, Cells]:
    """Lines of `word; word = value value ...`, a value as printed with _ for its spaces."""
    found = {}
    for line in text.strip().splitlines():
        about, values = line.split("=")
        found[tuple(word.strip() for word in about.split(";"))] = cells(
            columns, *(value.replace("_", " ") for value in values.split())
        )
    return found


IMAGES = ("val/fid", "val/rfid", "val/precision", "val/recall")
FACES = tuple(f"{split}/fid_{factor}" for split in ("val", "test") for factor in (64, 32, 16))
PHOTOS = ("val/fid", "test/fid")
VARIATION = ("weights/variation",)

PAPERS = {
    "sdgan-table1": Paper(
        "Table 1 of SD-GAN: final metrics at 256 px.",
        ("Data", "Model"),
        IMAGES,
        sdgan_row,
        rows(
            IMAGES,
            """
            FFHQ; StyleGAN2-ADA = 4.00 1.584_+-_0.112 0.692 0.399
            FFHQ; StyleGAN2-ADA+SD = 3.50 1.181_+-_0.274 0.678 0.440
            FFHQ; StyleGAN2-ADA+SD_L1 = 3.46 4.509_+-_0.904 0.679 0.469
            FFHQ; ProjectedGAN = 3.90 79.344_+-_7.644 0.662 0.439
            FFHQ; ProjectedGAN+SD = 3.15 14.103_+-_2.091 0.666 0.452
            FFHQ; ProjectedGAN+SD_L1 = 3.35 34.394_+-_3.555 0.669 0.446
            FFHQ; StyleNAT = 2.17 6.307_+-_0.554 0.698 0.383
            FFHQ; StyleNAT+SD = 2.27 4.223_+-_0.699 0.676 0.367
            LSUN Church; StyleGAN2-ADA = 4.60 2.727_+-_0.184 0.626 0.218
            LSUN Church; StyleGAN2-ADA+SD = 4.16 1.807_+-_0.198 0.619 0.274
            LSUN Church; StyleGAN2-ADA+SD_L1 = 3.83 0.977_+-_0.075 0.622 0.321
            LSUN Church; ProjectedGAN = 2.11 5.725_+-_1.256 0.561 0.474
            LSUN Church; ProjectedGAN+SD = 1.91 1.917_+-_0.279 0.605 0.446
            LSUN Church; ProjectedGAN+SD_L1 = 2.18 2.950_+-_0.462 0.607 0.429
            """,
        ),
        apart=1,
    ),
    "sdgan-table3": Paper(
        "Table 3 of SD-GAN: average variation of generated samples between weights along training.",
        ("Data", "Model"),
        VARIATION,
        sdgan_row,
        rows(
            VARIATION,
            """
            FFHQ; StyleGAN2-ADA = 0.375_+-_0.020
            FFHQ; StyleGAN2-ADA+SD = 0.295_+-_0.028
            FFHQ; ProjectedGAN = 0.470_+-_0.028
            FFHQ; ProjectedGAN+SD = 0.411_+-_0.022
            LSUN Church; StyleGAN2-ADA = 0.482_+-_0.016
            LSUN Church; StyleGAN2-ADA+SD = 0.358_+-_0.033
            LSUN Church; ProjectedGAN = 0.513_+-_0.030
            LSUN Church; ProjectedGAN+SD = 0.472_+-_0.029
            """,
        ),
        apart=1,
    ),
    "sdakd-table1": Paper(
        "Table 1 of SDAKD: GCFSR, FID at 64, 32 and 16 times enlargement.",
        ("Method", "C of G", "C of D"),
        FACES,
        sdakd_row("gcfsr"),
        rows(
            FACES,
            """
            teacher; 1; 1 = 57.01 43.87 30.95 56.71 45.72 31.54
            naive; 1/2; 1 = 58.59 47.04 33.12 58.14 49.32 33.82
            naive; 1/2; 1/2 = 58.51 46.71 32.96 58.03 48.52 33.25
            OMGD; 1/2; 1 = 105.93 91.52 65.14 110.46 94.89 68.52
            DCD; 1/2; 1 = 91.18 72.79 52.34 96.86 76.66 55.68
            DCD with modified adversarial training; 1/2; 1 = 67.32 53.95 38.60 67.04 55.87 39.91
            SDAKD; 1/2; 1/2 = 57.48 44.91 31.67 57.94 46.38 33.15
            naive; 1/4; 1 = 67.30 55.41 41.28 67.12 56.32 41.68
            naive; 1/4; 1/4 = 64.12 51.08 37.82 64.22 53.91 38.65
            SDAKD; 1/4; 1/4 = 60.22 48.15 33.81 58.61 49.20 34.36
            naive; 1/8; 1 = 74.85 61.56 45.82 74.42 63.16 46.47
            naive; 1/8; 1/8 = 71.42 58.11 42.79 71.36 60.53 43.42
            SDAKD; 1/8; 1/8 = 67.74 54.42 39.81 66.76 55.04 40.77
            """,
        ),
        teacher=("teacher", "1", "1"),
    ),
    "sdakd-table2": Paper(
        "Table 2 of SDAKD: Real-ESRGAN, FID at 4 times enlargement.",
        ("Method", "C of G", "C of D"),
        PHOTOS,
        sdakd_row("rrdbnet"),
        rows(
            PHOTOS,
            """
            teacher; 1; 1 = 44.89 45.62
            naive; 1/2; 1 = 58.46 58.72
            naive; 1/2; 1/2 = 57.90 58.24
            OMGD; 1/2; 1 = 54.47 55.89
            DCD; 1/2; 1 = 52.90 53.43
            DCD with modified adversarial training; 1/2; 1 = 54.62 54.93
            SDAKD; 1/2; 1/2 = 49.08 49.57
            naive; 1/4; 1 = 63.65 63.91
            naive; 1/4; 1/4 = 62.51 62.94
            SDAKD; 1/4; 1/4 = 49.93 50.49
            naive; 1/8; 1 = 74.72 75.07
            naive; 1/8; 1/8 = 71.38 71.74
            SDAKD; 1/8; 1/8 = 55.82 56.47
            """,
        ),
        teacher=("teacher", "1", "1"),
    ),
    "sdakd-table4": Paper(
        "Table 4 of SDAKD: ablations on GCFSR at C = 1/4, FID at 64, 32 and 16 times enlargement.",
        ("Stage 2", "Map distilled", "Student D"),
        FACES,
        ablation_row,
        rows(
            FACES,
            """
            no; no; no = 61.57 50.32 35.26 60.03 49.78 36.56
            yes; no; no = 61.37 49.78 35.12 59.69 49.50 36.34
            yes; yes; no = 60.89 49.08 34.75 59.42 49.46 35.92
            yes; yes; yes = 60.22 48.15 33.81 58.61 49.20 34.36
            """,
        ),
    ),
}
