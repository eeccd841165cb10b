"""What a picture costs by how it is shown: tokens, time to prepare it, time and memory of the tower.

Input is pages of small print (`demo.documents`). The tower is one of timm's with random weights: DINOv2's ViT-S/14 at
224 pixels, four features to a token, as in `configs/documents`; of NaFlex, whose smallest is a ViT-B, SigLIP 2's. Times
are processor time of one thread.
"""

from __future__ import annotations

import random
import time
from typing import Any

import torch

from llava_compete.bench.memory import LiveBytes
from llava_compete.demo.build import png_bytes
from llava_compete.demo.documents.layouts import LAYOUTS
from llava_compete.model.place_experts import make_tower
from llava_compete.vision.image_decoder import open_image
from llava_compete.vision.image_processing import LlavaCompeteImageProcessor
from llava_compete.vision.naflex import NaFlexLayout, SizedPictures
from llava_compete.vision.sources import resolve_tower
from llava_compete.vision.tiles import Size
from llava_compete.vision.tower_config import VisionTowerSection

POOL = 2
VIT = {"timm_model_name": "vit_small_patch14_dinov2", "image_size": 224, "timm_pool": "token", "timm_proj": ""}
NAFLEX = {
    "timm_model_name": "naflexvit_base_patch16_siglip",
    "image_size": 256,
    "timm_pool": "map",
    "timm_proj": "none",
}
# Name, tower and how it is shown a picture.
SHOWN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "square": (VIT, {}),
    "tiles, at most 4": (VIT, {"tiles": {"max": 4}}),
    "tiles, at most 12": (VIT, {"tiles": {"max": 12}}),
    "naflex, 256 patches": (NAFLEX, {"naflex": {"max_patches": 256}}),
    "naflex, 1024 patches": (NAFLEX, {"naflex": {"max_patches": 1024}}),
}


def run_bench(pages: int) -> dict[str, dict[str, float]]:
    """By how pictures are shown, means over `pages` pages, of all kinds in turn."""
    torch.set_num_threads(1)
    kinds = list(LAYOUTS.values())
    files = [png_bytes(kinds[number % len(kinds)](random.Random(number)).image) for number in range(pages)]
    return {name: measured(vision_cfg, options, files) for name, (vision_cfg, options) in SHOWN.items()}


def measured(vision_cfg: dict[str, Any], options: dict[str, Any], files: list[bytes]) -> dict[str, float]:
    """Means over pictures: tokens, rows of pixel_values, milliseconds to prepare one (decoded before) and of forward
    and backward in the tower; and the most MiB that tensors of these hold for the largest."""
    config = resolve_tower(VisionTowerSection(config={"embed_dim": 64, "vision_cfg": vision_cfg}, **options))
    torch.manual_seed(0)
    tower, processor = make_tower(config).train(), LlavaCompeteImageProcessor.from_tower(config, POOL)
    side = round(config.num_tokens**0.5) // POOL
    tiling = processor.tiling(side)
    images = [open_image(file) for file in files]
    sizes = [(image.height, image.width) for image in images]
    processor(images[0])  # what the first call alone does
    start = time.process_time()
    pixels = [processor(image, return_tensors="pt")["pixel_values"] for image in images]
    prepared = time.process_time() - start
    forward = backward = 0.0
    for rows, size in zip(pixels, sizes, strict=True):
        start = time.process_time()
        features = tower(rows, *_layout(tiling, size))
        forward += time.process_time() - start
        start = time.process_time()
        features.sum().backward()
        backward += time.process_time() - start
        tower.zero_grad()
    # Counting memory is slow, so it has a run of its own.
    rows, size = max(zip(pixels, sizes, strict=True), key=lambda pair: len(pair[0]))
    with LiveBytes() as counted:
        tower(rows, *_layout(tiling, size)).sum().backward()
    tokens = [side**2 if tiling is None else tiling.num_tokens(size) for size in sizes]
    count = len(files)
    return {
        "tokens": round(sum(tokens) / count, 1),
        "rows_of_pixels": round(sum(map(len, pixels)) / count, 1),
        "prepare_ms": round(1000 * prepared / count, 1),
        "forward_ms": round(1000 * forward / count, 1),
        "backward_ms": round(1000 * backward / count, 1),
        "peak_mib": round(counted.peak / 2**20, 1),
    }


def _layout(tiling: SizedPictures | None, size: Size) -> tuple[NaFlexLayout, ...]:
    """What a NaFlex tower takes beside its pixels."""
    layout = None if tiling is None else tiling.layout([size])
    return (layout,) if isinstance(layout, NaFlexLayout) else ()
