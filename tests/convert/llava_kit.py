"""Tiny random models in LLaVA's own layout and in those built on it, from transformers' Llava; and their slow forward.

The names are those of the published code's state dicts: LLaVA 1.5, CompeteSMoE and LibMoE (`moelayer`), CuMo (experts
beside the attention), MoE-LLaVA (`deepspeed_moe`).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from llava_hf_kit import make_llava, picture_processor, pictures, randomize
from safetensors.torch import save_file
from tokenizers_for_tests import make_tokenizer
from torch import Tensor, nn

from llava_compete.model.checkpoint import load_checkpoint
from llava_compete.parts import IMAGE_TOKEN

E, K = 4, 2


def tokenizer_without_image() -> Any:
    """LLaVA's tokenizers have no `<image>`."""
    tokenizer = copy.deepcopy(make_tokenizer("byte_bpe_bos", "vicuna_v1"))
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != IMAGE_TOKEN]
    plain = type(tokenizer)(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(content)),
        bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
    )  # fmt: skip
    plain.chat_template = None
    return plain


class Mixture(nn.Module):
    """The published codes' arithmetic at inference, a token at a time. `gate` and the rest have their names."""

    def __init__(self, expert: nn.Module, width: int, name: str = "smoe", chosen: int = K) -> None:
        super().__init__()
        self.name, self.chosen = name, chosen
        self.experts = nn.ModuleList([copy.deepcopy(expert) for _ in range(E)])
        shared = name.startswith("smoe_share")
        self.gate = nn.Linear(width, E - shared, bias=name == "xmoe")
        if name in ("xmoe", "smoe_perturbed"):
            self.expert_embeddings = nn.Parameter(torch.empty(E, E // 2))
            self.inp_reduction = nn.Linear(width, E // 2, bias=False)
        if name == "competesmoe":
            self.register_buffer("prob_flips", torch.zeros(17))

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if hasattr(self, "inp_reduction"):
            z, emb = self.inp_reduction(x), self.expert_embeddings
            theta = 0.1 if self.name == "smoe_perturbed" else 0.0
            emb = emb * (1.5 / (emb.norm(dim=-1, keepdim=True) + theta))
            z = z / (z.norm() + theta) if theta else F.normalize(z, dim=-1, eps=1e-4)
            weights, chosen = ((emb @ z) / 0.3).softmax(-1).topk(self.chosen)
            return weights.softmax(-1), chosen
        logits = self.gate(x)
        scores = logits.sigmoid() if self.name in ("smoe_sigmoidgating", "smoe_sharev3") else logits.softmax(-1)
        weights, chosen = scores.topk(self.chosen - self.name.startswith("smoe_share"))
        return weights / weights.sum(), chosen

    def forward(self, hidden: Tensor) -> Tensor:
        rows = []
        for x in hidden.flatten(0, -2):
            weights, chosen = self._route(x)
            row = sum(weight * self.experts[int(number)](x) for weight, number in zip(weights, chosen, strict=True))
            rows.append(0.5 * self.experts[E - 1](x) + 0.5 * row if self.name.startswith("smoe_share") else row)
        return torch.stack(rows).view(*hidden.shape[:-1], -1)


class Llava(nn.Module):
    """transformers' Llava run by hand: S² scales of the base, and any modules in the places of MLPs and projector."""

    def __init__(self, theirs: Any, scales: tuple[int, ...] = (1,)) -> None:
        super().__init__()
        self.theirs, self.scales, self.projector = theirs, scales, theirs.model.multi_modal_projector

    def features(self, pixels: Tensor) -> Tensor:
        config, maps = self.theirs.config, []
        size = pixels.shape[-1]
        side = size // config.vision_config.patch_size
        for scale in self.scales:
            large = pixels if scale == 1 else F.interpolate(pixels, size=size * scale, mode="bicubic")
            rows = []
            for row in range(scale):
                tiles = [large[:, :, size * row : size * (row + 1), size * c : size * (c + 1)] for c in range(scale)]
                rows.append(torch.cat([self._tile(tile).unflatten(2, (side, side)) for tile in tiles], dim=-1))
            whole = torch.cat(rows, dim=-2)
            maps.append(F.interpolate(whole, size=side, mode="area").flatten(2).transpose(1, 2))
        return self.projector(torch.cat(maps, dim=-1))

    def _tile(self, pixels: Tensor) -> Tensor:
        hidden = self.theirs.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        feature = hidden[self.theirs.config.vision_feature_layer]
        return (feature[:, 1:] if self.theirs.config.vision_feature_select_strategy == "default" else feature).mT

    @torch.no_grad()
    def logits(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, image_id: int) -> Tensor:
        places = input_ids == image_id
        embeds = self.theirs.get_input_embeddings()(input_ids.masked_fill(places, 0))
        embeds[places] = self.features(pixel_values).flatten(0, 1)
        return self.theirs(inputs_embeds=embeds, attention_mask=attention_mask).logits


def assert_same_logits(checkpoint: Path, theirs: Llava) -> None:
    """Of our checkpoint and the slow forward, over the vocabulary of the latter."""
    model, processor = load_checkpoint(checkpoint)
    texts = ["a <image> red circle", "user <image> shapes"]
    inputs = processor(text=texts, images=pictures(), return_tensors="pt", padding=True)
    expected = theirs.logits(**inputs, image_id=processor.image_token_id)
    with torch.no_grad():
        ours = model(**inputs).logits
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(ours[..., : expected.shape[-1]], expected, rtol=0, atol=3e-5)


def tower_directory(directory: Path, theirs: Any) -> Path:
    """transformers' vision model alone, as LLaVA names it."""
    theirs.model.vision_tower.save_pretrained(directory)
    picture_processor(theirs.config.vision_config).save_pretrained(directory)
    return directory


def llava_config(theirs: Any, tower: Path, **options: Any) -> dict[str, Any]:
    values = theirs.config.text_config.to_dict()
    return values | {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": str(tower),
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 32,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "image_aspect_ratio": "pad",
        **options,
    }


def llava_tensors(theirs: Any, tower: str | None = None) -> dict[str, Tensor]:
    """By LLaVA's names; `tower`: what stands in front of the vision model's where they are inside."""
    tensors = {}
    for name, tensor in theirs.state_dict().items():
        if name.startswith("model.language_model."):
            tensors["model." + name.removeprefix("model.language_model.")] = tensor
        elif name.startswith("lm_head."):
            tensors[name] = tensor
        elif name.startswith("model.multi_modal_projector."):
            place = name.replace("model.multi_modal_projector.linear_1", "0").replace(
                "model.multi_modal_projector.linear_2", "2"
            )
            tensors[f"model.mm_projector.{place}"] = tensor
        elif tower is not None:
            tensors[tower + name.removeprefix("model.vision_tower.")] = tensor
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def save(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor], tokenizer: Any) -> None:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, directory / "model.safetensors")
    tokenizer.save_pretrained(directory)


def make(**options: Any) -> tuple[Any, Any]:
    """transformers' model and a tokenizer without `<image>`."""
    tokenizer = tokenizer_without_image()
    return make_llava(tokenizer, **options), tokenizer


def with_mixtures(theirs: Any, name: str, scales: tuple[int, ...], chosen: int = K) -> tuple[Llava, nn.Module]:
    """Experts in the tower and as the projector; returns the forward and the projector."""
    vision, hidden = theirs.config.vision_config, theirs.config.text_config.hidden_size
    for layer in theirs.model.vision_tower.encoder.layers:
        layer.mlp = Mixture(layer.mlp, vision.hidden_size, name, chosen)
    width = vision.hidden_size * len(scales)
    expert = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
    slow = Llava(theirs, scales)
    slow.projector = Mixture(expert, width, name, chosen)
    randomize(theirs)
    randomize(slow.projector)
    return slow, slow.projector
