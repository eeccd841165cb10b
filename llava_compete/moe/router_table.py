"""The routers by name. A new one is a class in a file of its own and a line here."""

from __future__ import annotations

from llava_compete.moe.autonomy import AutonomyRouter
from llava_compete.moe.bias_balanced import BiasBalancedRouter
from llava_compete.moe.routers import (
    PerturbedCosineRouter,
    Router,
    SharedSigmoidRouter,
    SharedSoftmaxRouter,
    SigmoidRouter,
    SoftmaxRouter,
    XMoeRouter,
)
from llava_compete.moe.ternary import TernaryRouter
from llava_compete.moe.zero_computation import ZeroComputationRouter

ROUTER_CLASSES: dict[str, type[Router]] = {
    "softmax": SoftmaxRouter,
    "sigmoid": SigmoidRouter,
    "xmoe": XMoeRouter,
    "perturbed_cosine": PerturbedCosineRouter,
    "shared_softmax": SharedSoftmaxRouter,
    "shared_sigmoid": SharedSigmoidRouter,
    "bias_balanced": BiasBalancedRouter,
    "tc_moe": TernaryRouter,
    "moe_plus_plus": ZeroComputationRouter,
    "autonomy": AutonomyRouter,
    "competition": SoftmaxRouter,
}
