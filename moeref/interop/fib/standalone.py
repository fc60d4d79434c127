"""DeepSeek's FP8 block-scale MoE in plain torch: the reference of definitions that moeref exports.

It stands alone, so that FlashInfer-Bench can run it from its text. The three constants are set for each geometry.
"""

import torch

TOP_K = 8
N_GROUP = 8
TOPK_GROUP = 4
BLOCK = 128


@torch.no_grad()
def run(
    routing_logits: torch.Tensor,
    routing_bias: torch.Tensor,
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    local_expert_offset: int,
    routed_scaling_factor: float,
) -> torch.Tensor:
    """The ten inputs -> output [T, H] bfloat16. float32 throughout, one cast at the end."""
    ids, weights = choose(routing_logits, routing_bias, routed_scaling_factor)
    hidden = dequantize(hidden_states, hidden_states_scale.T, rows_of_scale=1)  # [T, H]
    output = torch.zeros_like(hidden)
    for slot in range(gemm1_weights.shape[0]):
        tokens, choice = torch.nonzero(ids == int(local_expert_offset) + slot, as_tuple=True)
        if len(tokens):
            gemm1 = dequantize(gemm1_weights[slot], gemm1_weights_scale[slot], BLOCK)  # [2I, H]
            gemm2 = dequantize(gemm2_weights[slot], gemm2_weights_scale[slot], BLOCK)  # [H, I]
            up, gate = (hidden[tokens] @ gemm1.T).chunk(2, dim=1)
            rows = (torch.nn.functional.silu(gate) * up) @ gemm2.T
            output[tokens] += weights[tokens, choice, None] * rows
    return output.to(torch.bfloat16)


def choose(logits: torch.Tensor, bias: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights [T, TOP_K]: chosen by biased scores within the best groups, weighted by the unbiased ones."""
    scores = torch.sigmoid(logits.float())
    biased = (scores + bias.float()).view(len(logits), N_GROUP, -1)
    best_two = biased.topk(min(2, biased.shape[2]), dim=2).values.sum(2)
    kept = torch.zeros_like(best_two, dtype=torch.bool)
    kept.scatter_(1, best_two.topk(TOPK_GROUP, dim=1).indices, True)
    masked = biased.masked_fill(~kept[:, :, None], torch.finfo(torch.float32).min).flatten(1)
    ids = masked.topk(TOP_K, dim=1).indices
    chosen = scores.gather(1, ids)
    return ids, chosen / (chosen.sum(1, keepdim=True) + 1e-20) * float(factor)


def dequantize(payload: torch.Tensor, scale: torch.Tensor, rows_of_scale: int) -> torch.Tensor:
    """payload [rows, columns] e4m3 times scale [rows / rows_of_scale, columns / BLOCK] -> float32."""
    return payload.float() * scale.repeat_interleave(rows_of_scale, 0).repeat_interleave(BLOCK, 1)
