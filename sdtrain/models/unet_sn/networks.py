"""UNetDiscriminatorSN, the discriminator of Real-ESRGAN, under the official names (old spectral-norm form)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from sdtrain.models.ghost import SpectralConv2d
from sdtrain.models.layout import for_convolutions
from sdtrain.models.unet_sn.options import DiscriminatorOptions


def _lrelu(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2, inplace=True)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class Discriminator(nn.Module):
    """[N, 3, H, W] in [0, 1] -> logits [N, H * W], one a pixel. H and W must be multiples of 8.

    `logit_map` keeps the [N, 1, H, W] form; `features` is the map before the last convolution (DCD's hidden layer).
    """

    def __init__(self, options: DiscriminatorOptions, *, resolution: int | None = None, num_classes: int = 0):
        super().__init__()
        self.options, self.hidden_channels = options, options.num_feat
        nf = options.num_feat
        self.conv0 = nn.Conv2d(options.num_in_ch, nf, 3, 1, 1)
        self.conv1 = SpectralConv2d(nf, nf * 2, 4, 2, 1, bias=False)
        self.conv2 = SpectralConv2d(nf * 2, nf * 4, 4, 2, 1, bias=False)
        self.conv3 = SpectralConv2d(nf * 4, nf * 8, 4, 2, 1, bias=False)
        self.conv4 = SpectralConv2d(nf * 8, nf * 4, 3, 1, 1, bias=False)
        self.conv5 = SpectralConv2d(nf * 4, nf * 2, 3, 1, 1, bias=False)
        self.conv6 = SpectralConv2d(nf * 2, nf, 3, 1, 1, bias=False)
        self.conv7 = SpectralConv2d(nf, nf, 3, 1, 1, bias=False)
        self.conv8 = SpectralConv2d(nf, nf, 3, 1, 1, bias=False)
        self.conv9 = nn.Conv2d(nf, 1, 3, 1, 1)

    def features(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] in [0, 1] -> the last hidden map [N, num_feat, H, W], after its leaky ReLU.

        Raises ValueError unless H and W are multiples of 8.
        """
        if x.shape[-2] % 8 or x.shape[-1] % 8:
            raise ValueError(f"UNetDiscriminatorSN needs sides that are multiples of 8, got {tuple(x.shape[-2:])}")
        x0 = _lrelu(self.conv0(for_convolutions(x)))
        x1 = _lrelu(self.conv1(x0))
        x2 = _lrelu(self.conv2(x1))
        x3 = _lrelu(self.conv3(x2))
        x4 = self._join(_lrelu(self.conv4(_double(x3))), x2)
        x5 = self._join(_lrelu(self.conv5(_double(x4))), x1)
        x6 = self._join(_lrelu(self.conv6(_double(x5))), x0)
        return _lrelu(self.conv8(_lrelu(self.conv7(x6))))

    def _join(self, x: Tensor, skip: Tensor) -> Tensor:
        return x + skip if self.options.skip_connection else x

    def logit_map(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] in [0, 1] -> logits [N, 1, H, W]. Raises ValueError as `features` does."""
        return self.conv9(self.features(x))

    def forward(self, x: Tensor, c: Tensor | None = None, hidden: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """[N, 3, H, W] in [0, 1] -> logits [N, H * W], with `features` where `hidden`; c is ignored.

        Raises ValueError as `features` does.
        """
        last = self.features(x)
        logits = self.conv9(last).flatten(1)
        return (logits, last) if hidden else logits
