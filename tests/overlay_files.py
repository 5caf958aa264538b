"""Modules of the shape that vLLM's have where our patches go in. Own writing: as little as makes a patch bite."""

RUNNER = "vllm/v1/worker/gpu_model_runner.py"
WORKER = "vllm/v1/worker/gpu_worker.py"
INDEXER = "vllm/v1/attention/backends/mla/indexer.py"
GATHER = "vllm/v1/attention/backends/mla/flashmla_sparse.py"
STATE_KERNEL = "vllm/third_party/flash_linear_attention/ops/chunk_delta_h.py"
OUTPUT_KERNEL = "vllm/third_party/flash_linear_attention/ops/chunk_o.py"
MXFP4 = "vllm/model_executor/layers/quantization/mxfp4.py"
LOADER = "vllm/model_executor/model_loader/utils.py"

RUNNER_TEXT = '''
import torch
from vllm.utils.torch_utils import is_quantized_kv_cache


class GPUModelRunner:
    @torch.inference_mode()
    def init_fp8_kv_scales(self) -> None:
        """Bring the cache into a state to start from."""
        if not is_quantized_kv_cache(self.cache_config.cache_dtype):
            return
        for entry in getattr(self, "kv_caches", []):
            if entry is not None:
                entry.zero_()
'''

WORKER_TEXT = """
import torch
from vllm.logger import init_logger

logger = init_logger(__name__)


class Worker:
    def wake_up(self, tags=None):
        self._get_sleep_mode_backend().resume(tags)
        for name in self._sleep_saved_buffers:
            logger.info("%s", name)
        self.synchronize_device()
"""

INDEXER_TEXT = """
from vllm.platforms import current_platform
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import MLAAttentionSpec


def split_indexer_prefill_chunks(seq_lens, query_lens, rows_max, logits_bytes_max):
    return []


def get_max_prefill_buffer_size(vllm_config):
    max_model_len = vllm_config.model_config.max_model_len
    return max_model_len * 40


class DeepseekV32IndexerMetadataBuilder:
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        self.max_prefill_buffer_size = get_max_prefill_buffer_size(vllm_config)
        self.compress_ratio = 1
        if isinstance(kv_cache_spec, MLAAttentionSpec):
            self.compress_ratio = kv_cache_spec.compress_ratio

    def build(self, common_prefix_len, common_attn_metadata):
        split_decodes_and_prefills(common_attn_metadata)
        return split_indexer_prefill_chunks(
            common_attn_metadata.seq_lens,
            common_attn_metadata.query_lens,
            self.max_prefill_buffer_size,
            1 << 28,
        )
"""

GATHER_TEXT = """
def get_prefill_workspace_size(max_model_len: int):
    return max_model_len * 5
"""

STATE_KERNEL_TEXT = '''
import torch
from vllm.triton_utils import tl, triton

from .utils import use_cuda_graph


@triton.heuristics({"USE_G": lambda args: args["g"] is not None})
@triton.autotune(
    configs=[
        triton.Config({"BV": BV}, num_warps=warps, num_stages=stages)
        for warps in [2, 4]
        for stages in [2, 3, 4]
        for BV in [32, 64]
    ],
    key=["K"],
    use_cuda_graph=use_cuda_graph,
)
@triton.jit(do_not_specialize=["T"])
def chunk_gated_delta_rule_fwd_kernel_h_blockdim64(k, K, BT, BV):
    """Empty: only what is tried for it counts."""
'''

OUTPUT_KERNEL_TEXT = '''
import torch
from vllm.triton_utils import tl, triton

from .utils import check_shared_mem

BLOCKS = [64, 128] if check_shared_mem() else [32, 64]


@triton.autotune(
    configs=[
        triton.Config({"BK": BK, "BV": BV}, num_warps=4, num_stages=stages)
        for BK in BLOCKS
        for BV in BLOCKS
        for stages in [2, 3, 4]
    ],
    key=["K"],
)
@triton.jit
def chunk_fwd_kernel_o(k, K, BT, BK, BV):
    """Empty: only what is tried for it counts."""
'''

MXFP4_TEXT = """
import torch


class Mxfp4MoEMethod:
    def _setup_kernel(self, layer, w13, w2):
        raise NotImplementedError

    def process_weights_after_loading(self, layer):
        w13 = layer.w13_weight
        w2 = layer.w2_weight
        bias = getattr(layer, "w13_bias", None)

        self._setup_kernel(layer, w13, w2, bias)
"""

LOADER_TEXT = """
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase


def process_weights_after_loading(model, model_config, target_device):
    for _, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, QuantizeMethodBase):
            method.process_weights_after_loading(module)
"""

STOCK = {
    RUNNER: RUNNER_TEXT,
    WORKER: WORKER_TEXT,
    INDEXER: INDEXER_TEXT,
    GATHER: GATHER_TEXT,
    STATE_KERNEL: STATE_KERNEL_TEXT,
    OUTPUT_KERNEL: OUTPUT_KERNEL_TEXT,
    MXFP4: MXFP4_TEXT,
    LOADER: LOADER_TEXT,
}
