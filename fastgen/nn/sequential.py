from torch import Tensor, nn

from fastgen.nn import _patterns, _run


class Sequential(nn.Sequential):
    """nn.Sequential, with the same children and state_dict, that runs what fuses as one op.

    Fused are Conv2d or ConvTranspose2d -> [BatchNorm2d, SyncBatchNorm, InstanceNorm2d or GroupNorm] -> [activation] and
    norm -> activation; activations are the layers of those that fastgen.ops.norm_act has, ReLU for "relu". Every other
    child, and any with hooks or of a subclass, is called as it is; hooks that compute a convolution's weight
    (torch.nn.utils.spectral_norm, weight_norm, prune) are called before the op.
    A plain nn.Sequential among the children counts as its children. An in-place activation of a fused run does not
    write to its input: nobody else sees that.
    """

    def forward(self, input: Tensor) -> Tensor:
        modules, at = [module for _, module in _patterns.steps(self)], 0
        while at < len(modules):
            convolution, norm, activation, end = _patterns.fusable(modules, at)
            if end > at and isinstance(input, Tensor):
                _patterns.before_forward(convolution, input)
                input, at = _run.run(input, convolution, norm, activation), end
            else:
                input, at = modules[at](input), at + 1
        return input
