"""The pixels of validation as arithmetic on tensors of any size, for exported networks: bit for bit those of pixels.py.

torch resizes uint8 images with weights of 16 bits, and rounds after each of its two passes. All of this is in whole numbers,
which float64 holds exactly. An image takes 8 bytes per number here, so training uses torch's own function.
"""

import torch
from torch import Tensor

from distrib.data.pixels import MARGIN, ImageSpec

REACH = {"bilinear": 1.0, "bicubic": 2.0}  # half the width of a filter, in pixels of the smaller image
BITS = 15  # of a weight, without its sign
MOST = 22  # bits after the binary point


def center_resized(images: Tensor, spec: ImageSpec) -> Tensor:
    """Crop, pad or stretch images (n, height, width, 3) uint8 to (n, 3, spec.height, spec.width), floats from 0 to 255."""
    rows, columns = (torch.arange(images.shape[axis], dtype=torch.float64, device=images.device) for axis in (1, 2))
    height, width = rows.amax(0) + 1, columns.amax(0) + 1
    shown, filled = boxes(height, width, spec)
    down, inside_down = weights(rows, shown[0], filled[0], spec.height, spec.filter)
    across, inside_across = weights(columns, shown[1], filled[1], spec.width, spec.filter)
    pixels = images.permute(0, 3, 1, 2).to(torch.float64)
    pixels = rounded(pixels @ across[0].T, across[1])
    pixels = rounded(down[0] @ pixels, down[1])
    if spec.fit == "pad":
        inside = (inside_down[:, None] & inside_across[None]).to(torch.float64)
        margin = torch.tensor(MARGIN, dtype=torch.float64, device=images.device)[:, None, None]
        pixels = pixels * inside + margin * (1 - inside)
    return pixels.float()


def boxes(height: Tensor, width: Tensor, spec: ImageSpec) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """What is shown of an image, and which part of the result it fills: start and size, vertically and horizontally."""
    zero, one = torch.zeros_like(height), torch.ones_like(height)
    sides, wanted = (height, width), (spec.height * one, spec.width * one)
    whole = [(zero, side) for side in sides], [(zero, side) for side in wanted]
    if spec.fit == "crop":  # ImageSpec.center
        largest = torch.minimum(height, width * spec.height / spec.width)
        crop = [(side * spec.center_crop).round().clamp_min(1) for side in (largest, largest * spec.width / spec.height)]
        return [(torch.floor((side - part) / 2), part) for side, part in zip(sides, crop, strict=True)], whole[1]
    if spec.fit == "pad":  # pixels.resize
        scale = torch.minimum(spec.height / height, spec.width / width)
        inner = [(side * scale).round().clamp_min(1) for side in sides]
        return whole[0], [(torch.floor((side - part) / 2), part) for side, part in zip(wanted, inner, strict=True)]
    return whole


def weights(
    places: Tensor, shown: tuple[Tensor, Tensor], filled: tuple[Tensor, Tensor], size: int, kind: str
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The matrix (size, places) that resizes what is `shown` to what is `filled`, in whole numbers, and their unit.

    Also which of the `size` results are filled.
    """
    scale, reach = shown[1] / filled[1], REACH[kind] * (shown[1] / filled[1]).clamp_min(1)
    results = torch.arange(size, dtype=torch.float64, device=places.device) - filled[0]
    inside = (results >= 0) & (results < filled[1])
    centers = (scale * (results + 0.5))[:, None]
    places = (places - shown[0])[None]
    first = torch.floor(centers - reach + 0.5).clamp_min(0)
    last = torch.minimum(torch.floor(centers + reach + 0.5), shown[1])
    used = (places >= first) & (places < last) & inside[:, None]
    found = filtered((places - centers + 0.5) / scale.clamp_min(1), kind) * used
    found = found / torch.where(inside, found.sum(1), 1)[:, None]
    powers = 2.0 ** torch.arange(1, MOST + 1, dtype=torch.float64, device=places.device)
    unit = 2.0 ** (torch.floor(0.5 + found.amax((0, 1)) * powers) < 2**BITS).sum().to(torch.float64)
    scaled = found * unit
    return (torch.trunc(scaled + 0.5 * torch.sign(scaled)), unit), inside


def filtered(distance: Tensor, kind: str) -> Tensor:
    """The weight of a pixel at a distance. Bicubic: Keys, 1981, with a = -0.5."""
    x = distance.abs()
    if kind == "bilinear":
        return (1 - x).clamp_min(0)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def rounded(sums: Tensor, unit: Tensor) -> Tensor:
    return torch.floor((sums + unit / 2) / unit).clamp(0, 255)
