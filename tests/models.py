"""The tiny model of several tests: traced in seconds, and its thresholds really cut."""

import torch

from iret.model import Iret
from iret.runtime.cost import Shape


def make_model(seed: int = 0, *, is_haar: bool = False, **options) -> Iret:
    """12 patches of 8 x 8 in 3 rows, three stages, 5 classes; `options` change its shape.

    Attention and answers are far from uniform, and lifting far from Haar's unless `is_haar`.
    """
    settings = dict(img_size=(24, 32), patch_size=8, in_chans=3, num_classes=5, embed_dims=(16, 32, 48), head_dim=16)
    torch.manual_seed(seed)
    model = Iret(Shape(**{**settings, "depths": (2, 3, 1), **options})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("qkv.weight") or "head" in name:
            torch.nn.init.normal_(parameter, std=0.2)
        elif parameter.dim() == 1 and not (is_haar and "lifting" in name):  # biases and norms, which start as 0 and 1
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model
