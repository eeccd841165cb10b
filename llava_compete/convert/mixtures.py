"""Experts of the codes built on LLaVA's: how each names a block's router and experts, and what ours are made of.

CompeteSMoE and LibMoE put a `moelayer` in the place of an MLP, CuMo its experts beside the attention, MoE-LLaVA
DeepSpeed's layer. At inference all of them choose by a router and weigh the chosen experts to a sum of 1.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from llava_compete.convert.experts import gates_and_ups
from llava_compete.convert.recipes import Recipe, stacked
from llava_compete.errors import UserError
from llava_compete.weight_files import StoredTensor

# LibMoE's names of its algorithms, and ours.
ROUTERS = {
    "smoe": "softmax",
    "competesmoe": "competition",
    "xmoe": "xmoe",
    "smoe_perturbed": "perturbed_cosine",
    "smoe_sigmoidgating": "sigmoid",
    "smoe_share": "shared_softmax",
    "smoe_sharev3": "shared_sigmoid",
}
_COSINE = ("xmoe", "perturbed_cosine")


class Mixture(NamedTuple):
    """A block of experts as a code stores it.

    block: what stands in front of its names.
    experts: of the experts, behind the block's name.
    gate: of the router's weight.
    up, down: of an expert's linear layers; two names of `up` are a gate and what it multiplies.
    """

    block: str
    experts: str
    gate: str
    up: tuple[str, ...]
    down: str

    def count(self, tensors: dict[str, StoredTensor]) -> int:
        """Its experts."""
        inside = re.compile(rf"{re.escape(self.block)}\.{re.escape(self.experts)}\.(\d+)\.")
        numbers = {int(match[1]) for name in tensors if (match := inside.match(name))}
        if numbers != set(range(len(numbers))):
            raise UserError(f"{self.block}: experts {sorted(numbers)}, expected numbers from 0 without a gap")
        return len(numbers)

    def recipes(self, ours: str, router: str, tensors: dict[str, StoredTensor]) -> dict[str, Recipe]:
        """Names in our block `ours`, from the code's."""
        numbers = range(self.count(tensors))
        recipes = {}
        suffixes = ("weight", "bias") if f"{self.block}.{self.experts}.0.{self.down}.bias" in tensors else ("weight",)
        for suffix in suffixes:
            tail = "" if suffix == "weight" else "_bias"
            experts = [f"{self.block}.{self.experts}.{number}" for number in numbers]
            up = tuple(f"{expert}.{layer}.{suffix}" for expert in experts for layer in self.up)
            name, make = ("up_proj", stacked) if len(self.up) == 1 else ("gate_up_proj", gates_and_ups)
            recipes[f"{ours}.experts.{name}{tail}"] = Recipe(up, make)
            down = tuple(f"{expert}.{self.down}.{suffix}" for expert in experts)
            recipes[f"{ours}.experts.down_proj{tail}"] = Recipe(down, stacked)
        if router in _COSINE:
            recipes[f"{ours}.router.inp_reduction"] = Recipe((f"{self.block}.inp_reduction.weight",))
            recipes[f"{ours}.router.expert_embeddings"] = Recipe((f"{self.block}.expert_embeddings",))
        else:
            recipes[f"{ours}.router.weight"] = Recipe((f"{self.block}.{self.gate}",))
        return recipes


def find_mixtures(tensors: dict[str, StoredTensor], block: str) -> dict[int, Mixture]:
    """Mixtures of the blocks `block`.<number>, or of `block` itself (as number 0)."""
    pattern = re.compile(rf"{re.escape(block)}(?:\.(\d+))?\.((?:\w+\.)?)experts\.(?:deepspeed_experts\.)?\d+\.")
    found: dict[int, Mixture] = {}
    for name in tensors:
        match = pattern.match(name)
        if match is None or int(match[1] or 0) in found:
            continue
        number = int(match[1] or 0)
        base = block if match[1] is None else f"{block}.{number}"
        inside = match[2].removesuffix(".")
        base = f"{base}.{inside}" if inside else base
        up, down = (("0",), "2") if block == "mm_projector" else (("fc1",), "fc2")
        found[number] = Mixture(base, "experts", "gate.weight", up, down)
    return found


def find_deepspeed(tensors: dict[str, StoredTensor]) -> dict[int, Mixture]:
    """MoE-LLaVA's mixtures in the language model, by layer."""
    pattern = re.compile(r"(model\.language_model\.layers\.(\d+)\.mlp\.deepspeed_moe)\.experts\.deepspeed_experts\.")
    found = {}
    for name in tensors:
        if (match := pattern.match(name)) and int(match[2]) not in found:
            names = ("gate_proj", "up_proj")
            found[int(match[2])] = Mixture(match[1], "experts.deepspeed_experts", "gate.wg.weight", names, "down_proj")
    return found


def same_count(mixtures: dict[int, Mixture], tensors: dict[str, StoredTensor], part: str) -> int:
    """The experts of every block of a part."""
    counts = {mixture.count(tensors) for mixture in mixtures.values()}
    if len(counts) != 1:
        raise UserError(f"{part}: blocks of {sorted(counts)} experts, expected as many in each")
    return counts.pop()
