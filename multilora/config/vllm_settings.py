"""vLLM's engine settings that are none of ours: fine while they ask for nothing that we lack.

`docs/vllm.md` has the whole table, which a test holds to a list of vLLM's settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, shown

NOTHING: tuple[Any, ...] = (None, False, 0, "", "auto")

_FAMILIES: tuple[tuple[str, tuple[Any, ...], str], ...] = (  # names, values for nothing, why
    (
        "decode_context_parallel_size data_parallel_rank data_parallel_start_rank "
        "data_parallel_size_local data_parallel_address data_parallel_rpc_port "
        "data_parallel_hybrid_lb data_parallel_backend disable_nccl_for_dp_synchronization "
        "ray_workers_use_nsight",
        (*NOTHING, 1, "mp"),
        "one device serves the model; start an engine for each",
    ),
    (
        "all2all_backend enable_dbo dbo_decode_token_threshold dbo_prefill_token_threshold "
        "eplb_config enable_eplb expert_placement_strategy num_redundant_experts eplb_window_size "
        "eplb_step_interval eplb_log_balancedness mamba_cache_dtype mamba_ssm_cache_dtype "
        "mamba_block_size disable_hybrid_kv_cache_manager kv_sharing_fast_prefill",
        (*NOTHING, {}, True, 32, 512, 1000, 3000, "linear"),
        "a Llama has no experts and no state but its KV",
    ),
    (
        "allowed_media_domains enable_mm_embeds interleave_mm_strings media_io_kwargs "
        "disable_mm_preprocessor_cache mm_processor_cache_gb mm_processor_cache_type "
        "mm_shm_cache_max_object_size_mb mm_encoder_tp_mode mm_encoder_attn_backend "
        "io_processor_plugin skip_mm_profiling video_pruning_rate default_mm_loras "
        "disable_chunked_mm_input enable_multimodal_encoder_data_parallel",
        (*NOTHING, {}, 4, 128, 0.0, "lru", "weights"),
        "prompts are text",
    ),
    (
        "reasoning_parser guided_decoding_disable_fallback guided_decoding_disable_any_whitespace "
        "guided_decoding_disable_additional_properties",
        NOTHING,
        "there are no grammars yet",
    ),
    ("pooler_config override_pooler_config", (None, {}), "this engine generates"),
    (
        "cuda_graph_sizes max_cudagraph_capture_size",
        (None,),
        "sizes of captured steps follow max_num_seqs",
    ),
    (
        "show_hidden_metrics_for_version collect_detailed_traces aggregate_engine_logging",
        NOTHING,
        "there are no traces; see Engine.stats",
    ),
)
REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    **{name: (inert, why) for names, inert, why in _FAMILIES for name in names.split()},
    "hf_config_path": ((None,), "config.json lies in the model's folder"),
    "safetensors_load_strategy": (("lazy",), "a checkpoint is mapped, not copied"),
    "pt_load_map_location": (("cpu",), "weights are safetensors"),
    "logprobs_mode": (
        ("raw_logprobs",),
        "logprobs are of the model's own distribution, before anything changes it",
    ),
    "override_attention_dtype": (NOTHING, "attention computes in the model's dtype"),
    "worker_extension_cls": (NOTHING, "the engine runs in its caller's process"),
    "enable_lora": ((True,), "adapters are always on, and cost nothing while no request names one"),
    "max_cpu_loras": (
        NOTHING,
        "all loaded adapters stay in host memory; max_loras are resident at once",
    ),
    "lora_extra_vocab_size": ((0, 256), "no adapter may bring rows of its own"),
    "fully_sharded_loras": ((False,), "there is one device"),
    "long_lora_scaling_factors": (NOTHING, "scale RoPE in the checkpoint's config.json"),
    "enable_lora_bias": ((False, True), "biases need nothing said on a CPU, lora_scales on a GPU"),
    "tensor_parallel_size": ((1,), "one device serves the model"),
    "pipeline_parallel_size": ((1,), "one device serves the model"),
    "data_parallel_size": ((1,), "start an engine for each device"),
    "distributed_executor_backend": ((None, "uni"), "the engine runs in its caller's process"),
    "max_parallel_loading_workers": (NOTHING, "a checkpoint is mapped, not copied"),
    "disable_custom_all_reduce": ((True, False), "there is one device"),
    "worker_use_ray": ((False,), "the engine runs in its caller's process"),
    "trust_remote_code": ((False,), "no code of a checkpoint is ever run"),
    "tokenizer_mode": (("auto",), "the folder's files say which tokenizer it is"),
    "tokenizer_pool_size": ((0,), "prompts are tokenised in add_request"),
    "revision": ((None,), "give the folder of that revision"),
    "code_revision": ((None,), "no code of a checkpoint is ever run"),
    "tokenizer_revision": ((None,), "give the folder of that revision as `tokenizer`"),
    "hf_token": ((None, False), "models are folders; download them beforehand"),
    "download_dir": ((None,), "models are folders; download them beforehand"),
    "hf_overrides": ((None, {}), "change a copy of the checkpoint's config.json"),
    "rope_scaling": ((None,), "change a copy of the checkpoint's config.json"),
    "rope_theta": ((None,), "change a copy of the checkpoint's config.json"),
    "config_format": (("auto", "hf"), "the folder's files say which format it is"),
    "model_impl": (("auto",), "there is one implementation"),
    "task": (("auto", "generate"), "this engine generates"),
    "runner": (("auto", "generate"), "this engine generates"),
    "convert": (("auto", "none"), "this engine generates"),
    "override_generation_config": ((None, {}), "give SamplingParams to each request"),
    "enable_chunked_prefill": ((None, True), "prompts are always taken in chunks"),
    "max_num_partial_prefills": ((1,), "chunks follow max_num_batched_tokens"),
    "max_long_partial_prefills": ((1,), "chunks follow max_num_batched_tokens"),
    "long_prefill_token_threshold": ((0,), "chunks follow max_num_batched_tokens"),
    "scheduling_policy": (("fcfs",), "use policy; fcfs is the one that there is"),
    "scheduler_cls": ((None,), "policies have names, see `policy`"),
    "preemption_mode": ((None, "recompute"), "a preempted request is computed again"),
    "swap_space": ((0, 4), "a preempted request is computed again, nothing is swapped"),
    "cpu_offload_gb": ((0,), "use a smaller model, or quantization"),
    "num_gpu_blocks_override": ((None,), "use num_kv_blocks"),
    "kv_cache_memory_bytes": ((None,), "use num_kv_blocks"),
    "calculate_kv_scales": ((True, False), "scales of KV pages are always measured"),
    "prefix_caching_hash_algo": (("sha256", "builtin"), "blocks are keyed by SHA-256"),
    "disable_sliding_window": ((True, False), "no model here slides a window"),
    "max_seq_len_to_capture": (
        (None, 8192),
        "steps are captured by their number of rows, whatever the lengths",
    ),
    "cudagraph_capture_sizes": ((None,), "sizes follow max_num_seqs"),
    "compilation_config": ((None, {}, 0), "kernels are compiled before the first request"),
    "optimization_level": ((None,), "use enforce_eager to leave graphs out"),
    "use_v2_block_manager": ((True,), "there is one block pool"),
    "num_lookahead_slots": ((0,), "there is no speculation"),
    "speculative_config": ((None,), "there is no speculation"),
    "speculative_model": ((None,), "there is no speculation"),
    "guided_decoding_backend": (("auto", "xgrammar"), "there are no grammars yet"),
    "structured_outputs_config": ((None,), "there are no grammars yet"),
    "logits_processors": ((None, []), "give them to each request, in SamplingParams"),
    "logits_processor_pattern": ((None,), "give them to each request, in SamplingParams"),
    "limit_mm_per_prompt": ((None, {}), "prompts are text"),
    "mm_processor_kwargs": ((None, {}), "prompts are text"),
    "allowed_local_media_path": (("",), "prompts are text"),
    "disable_log_stats": ((True, False), "nothing is logged about requests; see Engine.stats"),
    "disable_log_requests": ((True, False), "nothing is logged about requests"),
    "disable_async_output_proc": ((True, False), "use async_scheduling"),
    "stream_interval": ((1,), "give it to each request, in SamplingParams"),
    "served_model_name": ((None,), "it names a model to a server's clients"),
    "otlp_traces_endpoint": ((None,), "there are no traces"),
    "disable_cascade_attn": ((True, False), "no attention here depends on neighbours"),
    "enable_sleep_mode": ((False,), "make another engine when it is needed"),
    "kv_transfer_config": ((None,), "KV stays in its engine"),
    "kv_events_config": ((None,), "KV stays in its engine"),
    "quantization_param_path": ((None,), "scales of KV pages are always measured"),
    "model_loader_extra_config": ((None, {}), "a checkpoint is mapped, not copied"),
    "ignore_patterns": ((None,), "only the files of a checkpoint are read"),
    "use_tqdm_on_load": ((True, False), "a checkpoint is mapped, not copied"),
    "enable_prompt_embeds": ((False,), "prompts are text or token ids"),
    "enable_expert_parallel": ((False,), "a Llama has no experts"),
    "worker_cls": ((None, "auto"), "the engine runs in its caller's process"),
    "additional_config": ((None, {}), "every setting has a name of its own"),
}

RENAMED = {
    "adapter_dtype": "lora_dtype",
    "lora_modules": "adapters",
    "max_seq_len": "max_model_len",
    "max_lora": "max_loras",
    "max_rank": "max_lora_rank",
    "num_gpu_blocks": "num_kv_blocks",
}
"""What people write instead of a name of ours."""


def without_vllms(settings: Mapping[str, Any], known: list[str]) -> dict[str, Any]:
    """Those of our own. A ConfigError for a value that asks for more, and for unknown names."""
    own = {}
    for name, value in settings.items():
        if name in known:
            own[name] = value
        elif name in REFUSED:
            inert, why = REFUSED[name]
            if not any(type(value) is type(one) and value == one for one in inert):
                raise ConfigError(f"{name}={shown(value)} is not supported: {why}")
        else:
            hint = f"; did you mean {RENAMED[name]}?" if name in RENAMED else ""
            raise ConfigError(
                f"unknown setting {shown(name)}{hint}; known settings: {', '.join(known)}"
            )
    return own
