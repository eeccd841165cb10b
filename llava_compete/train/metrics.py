"""What one optimizer step did, summed on the device and brought to the host once a logging step.

The model normalises every loss term by global counts, so that sums over micro-batches and ranks are the values of
the global batch. Routing metrics are additive sums too. `StepMetrics.collect` is the only place that synchronises.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llava_compete.moe.state import RoutingMetrics, RoutingRecord


class StepMetrics:
    """Accumulator on one rank; the same keys are added on every rank in every step.

    Loss terms that occur in some steps only (distillation on competition steps) are averaged over those steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._step: dict[str, Tensor] = {}
        self._step_routing: dict[str, RoutingMetrics] = {}
        self._layer_aux: dict[str, Tensor] = {}
        self._terms: dict[str, Tensor] = {}
        self._steps_with: dict[str, int] = {}
        self._routing: dict[str, RoutingMetrics] = {}
        # Choices that each expert of a layer got on this rank in the last step; none if it was bad.
        self.last_loads: dict[str, Tensor] = {}

    def add_forward(self, terms: Mapping[str, Tensor], records: Mapping[str, RoutingRecord]) -> None:
        """Add one micro-batch: loss terms by name (scalars) and the routing records by layer."""
        for name, value in terms.items():
            _add(self._step, name, value.detach().float())
        for layer, record in records.items():
            _add(self._step_routing, layer, record.metrics)
            _add(self._layer_aux, layer, record.aux_loss.detach())

    def end_step(self, *, bad: bool) -> list[str]:
        """Close an optimizer step; a bad one is left out of the means.

        Returns:
            what was not finite on this rank, empty for a good step: the first layer in forward order, then loss terms.
        """
        culprits: list[str] = []
        self.last_loads = {} if bad else {name: metrics.load_E for name, metrics in self._step_routing.items()}
        if bad:
            layers = [name for name, value in self._layer_aux.items() if not bool(torch.isfinite(value).all())]
            culprits = [f"layer {name}" for name in layers[:1]]
            culprits += [name for name, value in self._step.items() if not bool(torch.isfinite(value).all())]
        else:
            for name, value in self._step.items():
                _add(self._terms, name, value)
                self._steps_with[name] = self._steps_with.get(name, 0) + 1
            for layer, metrics in self._step_routing.items():
                _add(self._routing, layer, metrics)
        for store in (self._step, self._step_routing, self._layer_aux):
            store.clear()
        return culprits

    def collect(self, counters: Mapping[str, float]) -> dict[str, Any]:
        """Reduce over ranks, reset, and return plain numbers (expert loads as lists). Every rank must call it.

        counters: further host numbers of this rank to sum over ranks, such as rejected rows.
        """
        names = sorted(self._terms)
        layers = list(self._routing)
        values = [self._terms[name].reshape(1) for name in names]
        values += [self._routing[layer].vector() for layer in layers]
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
            size = self._routing[layer].vector().numel()
            result.update(_by_layer(layer, RoutingMetrics.from_vector(numbers[offset : offset + size])))
            offset += size
        result.update(zip(counters, numbers[offset:].tolist(), strict=True))
        self._terms.clear()
        self._steps_with.clear()
        self._routing.clear()
        return result


def _add(store: dict[str, Any], key: str, value: Any) -> None:
    store[key] = store[key] + value if key in store else value


def _by_layer(layer: str, sums: RoutingMetrics) -> dict[str, Any]:
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
