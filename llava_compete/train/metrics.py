"""What one optimizer step did, summed on the device and brought to the host once a logging step.

The model normalises every loss term by global counts, so that sums over micro-batches and ranks are the values of
the global batch. Routing metrics are additive sums too. `StepMetrics.collect` is the only place that synchronises.
"""

from __future__ import annotations

import resource
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llava_compete.moe.metrics import RoutingMetrics
from llava_compete.moe.records import LayerStack
from llava_compete.parts import PARTS

Layers = tuple[str, ...]


class StepMetrics:
    """Accumulator on one rank; the same keys are added on every rank in every step.

    Loss terms that occur in some steps only (distillation on competition steps) are averaged over those steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._step: dict[str, Tensor] = {}
        # By names of layers side by side, one row a layer: a few operators for all of them, each micro-batch.
        self._step_routing: dict[Layers, Tensor] = {}
        self._layer_aux: dict[Layers, Tensor] = {}
        self._terms: dict[str, Tensor] = {}
        self._steps_with: dict[str, int] = {}
        self._routing: dict[Layers, Tensor] = {}
        self._last_routing: dict[Layers, Tensor] = {}

    def add_forward(self, terms: Mapping[str, Tensor], stacks: Mapping[Layers, LayerStack]) -> None:
        """Add one micro-batch: loss terms by name (scalars) and the routing records, by names of layers."""
        for name, value in terms.items():
            _add(self._step, name, value.detach().float())
        for names, stack in stacks.items():
            _add(self._step_routing, names, stack.sums_LM)
            _add(self._layer_aux, names, stack.aux_loss_L.detach())

    @property
    def last_loads(self) -> dict[str, Tensor]:
        """Choices that each expert of a layer got on this rank in the last step; none if it was bad."""
        return {layer: RoutingMetrics.from_vector(sums_M).load_E for layer, sums_M in _by_layer(self._last_routing)}

    def end_step(self, *, bad: bool) -> list[str]:
        """Close an optimizer step; a bad one is left out of the means.

        Returns:
            what was not finite on this rank, empty for a good step: the first layer in forward order, then loss terms.
        """
        culprits: list[str] = []
        self._last_routing = {} if bad else dict(self._step_routing)
        if bad:
            layers = [name for name, value in _by_layer(self._layer_aux) if not bool(torch.isfinite(value))]
            culprits = [f"layer {name}" for name in sorted(layers, key=_forward_order)[:1]]
            culprits += [name for name, value in self._step.items() if not bool(torch.isfinite(value).all())]
        else:
            for name, value in self._step.items():
                _add(self._terms, name, value)
                self._steps_with[name] = self._steps_with.get(name, 0) + 1
            for names, sums_LM in self._step_routing.items():
                _add(self._routing, names, sums_LM)
        for store in (self._step, self._step_routing, self._layer_aux):
            store.clear()
        return culprits

    def collect(self, counters: Mapping[str, float]) -> dict[str, Any]:
        """Reduce over ranks, reset, and return plain numbers (expert loads as lists). Every rank must call it.

        counters: further host numbers of this rank to sum over ranks, such as rejected rows.
        """
        names = sorted(self._terms)
        routing: dict[str, Tensor] = {}
        for layer, sums_M in _by_layer(self._routing):
            _add(routing, layer, sums_M)
        layers = sorted(routing, key=_forward_order)
        values = [self._terms[name].reshape(1) for name in names]
        values += [routing[layer] for layer in layers]
        values.append(torch.tensor(list(counters.values()), dtype=torch.float64))
        flat = torch.cat([value.to(self.device, torch.float64) for value in values])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(flat)
        numbers = flat.cpu()
        result: dict[str, Any] = {
            name: numbers[i].item() / max(self._steps_with.get(name, 1), 1) for i, name in enumerate(names)
        }
        offset = len(names)
        for layer in layers:
            size = routing[layer].numel()
            result.update(_summary(layer, RoutingMetrics.from_vector(numbers[offset : offset + size])))
            offset += size
        result.update(zip(counters, numbers[offset:].tolist(), strict=True))
        self._terms.clear()
        self._steps_with.clear()
        self._routing.clear()
        return result


def _add(store: dict[Any, Tensor], key: Any, value: Tensor) -> None:
    store[key] = store[key] + value if key in store else value


def _by_layer(rows: Mapping[Layers, Tensor]) -> Iterable[tuple[str, Tensor]]:
    """(layer, its row) pairs; a layer has one for each group of layers that it was in."""
    for names, rows_L in rows.items():
        yield from zip(names, rows_L, strict=True)


def _forward_order(layer: str) -> tuple[int, int]:
    part, number = layer.split(".")
    return PARTS.index(part), int(number)


def _summary(layer: str, sums: RoutingMetrics) -> dict[str, Any]:
    """Means for the log from a layer's sums."""
    summary = sums.summary()
    return {f"{key}/{layer}": value for key, value in summary.items() if value is not None}


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The part of the metrics that TensorBoard and Weights & Biases can show: numbers, and of a list of expert loads
    its least and its greatest."""
    result = {key: float(value) for key, value in metrics.items() if isinstance(value, int | float)}
    for layer, load in expert_loads(metrics):
        result |= {f"expert_load_min/{layer}": min(load), f"expert_load_max/{layer}": max(load)}
    return result


def expert_loads(metrics: Mapping[str, Any]) -> Iterable[tuple[str, list[float]]]:
    """(layer, share of the layer's choices by expert) pairs of one logging step."""
    for key, value in metrics.items():
        if key.startswith("expert_load/"):
            yield key.removeprefix("expert_load/"), value


def learning_rates(optimizer: Any) -> dict[str, float]:
    """By group; spread experts' groups have DeepSpeed's name for one and their own for a label (`trainable.py`)."""
    return {f"learning_rate/{group.get('label', group['name'])}": group["lr"] for group in optimizer.param_groups}


def peak_memory_gib(device: torch.device) -> float:
    """Peak of this process: on the GPU what torch held there, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
