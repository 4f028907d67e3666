"""The twin: the slice of FlashInfer 0.7.2.post1 that minillm uses, in plain PyTorch, on any device.

Names, arguments, shapes, dtypes, index conventions, plan-then-run order and errors are FlashInfer's; only speed
and random streams differ. float32, bfloat16 and float16. An argument that the twin cannot serve raises
NotImplementedError; one that only steers performance is accepted. Source: https://docs.flashinfer.ai.
"""

from minillm.reference_cascade import (
    MultiLevelCascadeAttentionWrapper,
    merge_state,
    merge_state_in_place,
    merge_states,
)
from minillm.reference_decode import BatchDecodeWithPagedKVCacheWrapper
from minillm.reference_ops import (
    append_paged_kv_cache,
    apply_rope_pos_ids,
    apply_rope_pos_ids_inplace,
    apply_rope_with_cos_sin_cache,
    apply_rope_with_cos_sin_cache_inplace,
    fused_add_rmsnorm,
    get_batch_indices_positions,
    get_seq_lens,
    rmsnorm,
    silu_and_mul,
)
from minillm.reference_prefill import BatchPrefillWithPagedKVCacheWrapper
from minillm.reference_ragged import (
    BatchPrefillWithRaggedKVCacheWrapper,
    single_decode_with_kv_cache,
    single_prefill_with_kv_cache,
)
from minillm.reference_sampling import (
    min_p_sampling_from_probs,
    sampling_from_logits,
    sampling_from_probs,
    softmax,
    top_k_top_p_sampling_from_logits,
    top_k_top_p_sampling_from_probs,
)

__all__ = [
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
    "MultiLevelCascadeAttentionWrapper",
    "append_paged_kv_cache",
    "apply_rope_pos_ids",
    "apply_rope_pos_ids_inplace",
    "apply_rope_with_cos_sin_cache",
    "apply_rope_with_cos_sin_cache_inplace",
    "fused_add_rmsnorm",
    "get_batch_indices_positions",
    "get_seq_lens",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
    "min_p_sampling_from_probs",
    "rmsnorm",
    "sampling_from_logits",
    "sampling_from_probs",
    "silu_and_mul",
    "single_decode_with_kv_cache",
    "single_prefill_with_kv_cache",
    "softmax",
    "top_k_top_p_sampling_from_logits",
    "top_k_top_p_sampling_from_probs",
]
