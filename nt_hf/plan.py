"""What a configuration costs: parameters and matrix FLOPs."""

from .configuration_neurotrails_llama import NeuroTrailsLlamaConfig

# Dense bf16 peaks without sparsity, in TFLOP/s, from the vendors' data sheets; the first name found in the
# device's name counts.
PEAK_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A10G": 70.0,
    "RTX 4090": 165.0,
}


def forward_flops_per_token(config: NeuroTrailsLlamaConfig, sequence_length: int) -> float:
    """Matrix FLOPs that a forward pass executes for a token, all heads together.

    A multiplication and an addition are two. Masks do not lower it: zeros are multiplied like any weight. Attention
    counts every query-key pair of the sequence, as is usual (PaLM, arXiv 2204.02311, appendix B), though half of
    them are masked.
    """
    hidden, heads, head_dim = config.hidden_size, config.num_attention_heads, config.head_dim
    projections = hidden * head_dim * (2 * heads + 2 * config.num_key_value_heads)
    scores = 2 * heads * head_dim * sequence_length
    block = 2 * (projections + 3 * hidden * config.intermediate_size + scores)
    lm_head = 2 * hidden * config.vocab_size
    return config.num_cache_layers * block + config.num_ensemble_heads * lm_head


def training_flops_per_token(config: NeuroTrailsLlamaConfig, sequence_length: int) -> float:
    """Matrix FLOPs of a training step for a token: the backward pass costs two forward passes."""
    return 3 * forward_flops_per_token(config, sequence_length)


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 matrix peak of a known accelerator in TFLOP/s, else ``None``."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)
