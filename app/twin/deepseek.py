"""DeepSeek-R1 as the twin needs it: sizes and work of each part, from the model's public configuration.

61 layers (3 dense, 58 MoE) and one MTP layer; hidden 7168; 128 heads with MLA (q_lora 1536, kv_lora 512, rope
64, nope 128, v 128); 256 routed experts, top 8, one shared; vocabulary 129,280. Weights are INT8, one byte
each.
"""

NUM_LAYERS = 61
HIDDEN = 7168
NUM_HEADS = 128
KV_LORA = 512
ROPE = 64
NOPE = 128
V_DIM = 128
NUM_EXPERTS = 256
EXPERTS_PER_TOKEN = 9
"""Eight routed and the shared one."""
VOCABULARY = 129_280

ATTENTION_PARAMETERS = 187.1e6
"""Per layer: q and kv down- and up-projections and the output projection."""
EXPERT_PARAMETERS = 3 * 7168 * 2048
LM_HEAD_PARAMETERS = VOCABULARY * HIDDEN
TOTAL_WEIGHT_BYTES = 671e9

KV_BYTES_PER_TOKEN_LAYER = (KV_LORA + ROPE) * 2
KV_BYTES_PER_TOKEN = NUM_LAYERS * KV_BYTES_PER_TOKEN_LAYER
"""70,272 B."""

DECODE_ATTENTION_FLOPS = 2 * NUM_HEADS * (KV_LORA + ROPE + KV_LORA)
"""Per query token, context token and layer, weights absorbed."""
PREFILL_ATTENTION_FLOPS = 2 * NUM_HEADS * (NOPE + ROPE + V_DIM)
"""Per query token, context token and layer, as 128-head attention."""


def experts_per_rank(ep: int) -> int:
    """Experts that a rank holds, redundant and shared copies included.

    The published layouts: 1 at EP320 (shared copies on ranks of their own), 10 at EP32, 3 at EP144.
    """
    with_redundant = NUM_EXPERTS + 32
    return 1 if ep >= with_redundant else -(-with_redundant // ep) + 1


def weight_bytes_per_rank(ep: int) -> float:
    """INT8 weights in a rank's memory: attention of all layers, its experts, embedding and LM head in 16
    bits.
    """
    layers = (NUM_LAYERS + 1) * (ATTENTION_PARAMETERS + experts_per_rank(ep) * EXPERT_PARAMETERS)
    return layers + 2 * 2 * LM_HEAD_PARAMETERS
