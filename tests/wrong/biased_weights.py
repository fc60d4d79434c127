"""Routing weights from s + bias, not from s. Must fail.

Stands for transformers #41647, vLLM #12002 and PaddleFormers #3452: the bias is for the choice only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from _layer import inputs_of

from moeref.reference import NORMALISER_EPSILON, experts, route


def run(*ten: Any, n_group: int = 8, topk_group: int = 4, top_k: int = 8) -> torch.Tensor:
    inputs = inputs_of(ten, n_group, topk_group, top_k)
    g, factor = inputs.geometry, inputs.routed_scaling_factor
    routing = route(inputs.routing_logits, inputs.routing_bias, g, factor)
    biased = torch.sigmoid(inputs.routing_logits) + inputs.routing_bias.float()
    chosen = biased.gather(1, routing.topk_ids)
    weights = chosen / (chosen.sum(-1, keepdim=True) + NORMALISER_EPSILON) * factor
    return experts(inputs, replace(routing, topk_weights=weights)).output
