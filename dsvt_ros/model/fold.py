"""Batch norms folded into the convolutions before them: fewer operations, the same function."""

from __future__ import annotations

from itertools import pairwise

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


def fold_batch_norms(module: nn.Module) -> None:
    """Fold, in place, every batch norm that directly follows a convolution among the children of a module.

    `module` must be in evaluation mode. The convolutions get a bias, and the batch norms become identities.
    """
    children = list(module.named_children())
    for (name, convolution), (norm_name, norm) in pairwise(children):
        if isinstance(convolution, CONVOLUTIONS) and isinstance(norm, nn.BatchNorm2d):
            transposed = isinstance(convolution, nn.ConvTranspose2d)
            setattr(module, name, fuse_conv_bn_eval(convolution, norm, transpose=transposed))
            setattr(module, norm_name, nn.Identity())
    for child in module.children():
        fold_batch_norms(child)
