"""sdtrain: training of distilled GANs (SD-GAN and SDAKD). Importing this package is cheap and has no side effect."""

__version__ = "0.1.0"
