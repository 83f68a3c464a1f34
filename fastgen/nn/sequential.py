from torch import nn


class Sequential(nn.Sequential):
    """nn.Sequential (same keys) that runs ConvTranspose2d -> norm -> activation runs as one op."""
