"""VGG16 (Simonyan and Zisserman 2015, arXiv:1409.1556), whose inner layers know about texture and form.

Module names are those of torchvision's files (`features.0.weight`); widths are read from the file.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F

from library.checkpoints.critics import vgg16_convolutions
from library.checkpoints.weights import open_weights
from library.models.build import fill

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which it was trained with
SHARE = 4  # pictures are looked at in a quarter of their height and width


def load_vgg16(path: Path, layer: int, *, dtype: torch.dtype, device: torch.device) -> torch.nn.Sequential:
    """The layers of VGG16 up to `layer` (0 to 30, as torchvision counts them), frozen.

    `path` is what library.checkpoints.critics.check_vgg16 found to hold them.
    """
    places = vgg16_convolutions()
    with open_weights(path) as weights:
        layers: OrderedDict[str, torch.nn.Module] = OrderedDict()
        for place in range(layer + 1):
            if place in places:
                outputs, inputs = weights.shapes[f"features.{place}.weight"][:2]
                layers[str(place)] = torch.nn.Conv2d(inputs, outputs, 3, padding=1, device="meta")
            else:
                layers[str(place)] = torch.nn.ReLU() if place - 1 in places else torch.nn.MaxPool2d(2, 2)
        net = torch.nn.Sequential(layers)
        fill(net, lambda name: weights.tensor(f"features.{name}"), dtype=dtype, device=device)
    return net


def vgg_features(net: torch.nn.Sequential, images_BCHW: torch.Tensor) -> torch.Tensor:
    """What the last layer says of pictures in [0, 1], seen in a quarter of their size. Differentiable."""
    weight = next(net.parameters())
    size = tuple(max(side // SHARE, 1) for side in images_BCHW.shape[-2:])
    images_BCHW = F.interpolate(images_BCHW.to(weight.device, torch.float32), size, mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values, device=weight.device).view(3, 1, 1) for values in (MEAN, STD))
    return net(((images_BCHW - mean) / std).to(weight.dtype)).float()
