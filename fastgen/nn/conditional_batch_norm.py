from __future__ import annotations

from torch import Tensor, nn

from fastgen.nn.sequential import Sequential


class ConditionalBatchNorm2d(nn.Module):
    """Batch norm with a gain and a bias per class (Dumoulin et al. 2017, arXiv:1610.07629; de Vries et al. 2017,
    arXiv:1707.00683): y = gain[label] * (x - mean) / sqrt(var + eps) + bias[label].

    Args:
        num_features: channels C.
        num_classes: classes; each begins with a gain of 1 and a bias of 0.
        eps, momentum: as in nn.BatchNorm2d.
        convolution: a Conv2d or ConvTranspose2d with C output channels that runs before the norm, in the same op.

    forward(x, labels): x (N, C, H, W), or the convolution's input; labels (N,) int64 below num_classes. Returns (N, C,
    H, W). Raises ValueError for labels of another shape.
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        convolution: nn.Conv2d | nn.ConvTranspose2d | None = None,
    ):
        super().__init__()
        norm = nn.BatchNorm2d(num_features, eps, momentum, affine=False)
        self.norm = norm if convolution is None else Sequential(convolution, norm)
        self.gain = nn.Embedding(num_classes, num_features)
        self.bias = nn.Embedding(num_classes, num_features)
        nn.init.ones_(self.gain.weight)
        nn.init.zeros_(self.bias.weight)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        if labels.shape != x.shape[:1]:  # other shapes would broadcast
            raise ValueError(
                f"labels must be one per image, of shape ({len(x)},), got {tuple(labels.shape)} for x {tuple(x.shape)}"
            )
        y = self.norm(x)
        gain, bias = (of(labels)[:, :, None, None].to(y.dtype) for of in (self.gain, self.bias))
        return bias.addcmul(gain, y)
