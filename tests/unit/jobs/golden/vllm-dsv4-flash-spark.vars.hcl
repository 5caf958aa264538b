args = ["--trust-remote-code", "--kv-cache-dtype", "fp8", "--block-size", "256", "--tokenizer-mode", "deepseek_v4", "--tool-call-parser", "deepseek_v4", "--enable-auto-tool-choice", "--reasoning-parser", "deepseek_v4", "--speculative-config", "{\"method\":\"mtp\",\"num_speculative_tokens\":2}", "--compilation-config", "{\"cudagraph_mode\":\"FULL_AND_PIECEWISE\",\"custom_ops\":[\"all\"]}", "--enable-prefix-caching", "--enable-chunked-prefill", "--gpu-memory-utilization", "0.85", "--disable-custom-all-reduce", "--load-format", "safetensors", "--max-model-len", "131072", "--max-num-seqs", "8", "--max-num-batched-tokens", "16384", "--enable-expert-parallel"]
cache_dir = "/srv/vllm-cache/dsv4-flash-spark"
cpu = 4000
engine = "dsv4-flash-spark"
entrypoint = ["vllm", "serve"]
env = {"DG_JIT_NVCC_COMPILER" = "/usr/local/cuda/bin/nvcc", "DG_JIT_USE_NVRTC" = "0", "FLASHINFER_DISABLE_VERSION_CHECK" = "1", "OMP_NUM_THREADS" = "8", "ROTATOR_ALLOCATOR" = "on", "TILELANG_CLEANUP_TEMP_FILES" = "1", "TORCH_CUDA_ARCH_LIST" = "12.1a", "VLLM_ALLOW_LONG_MAX_MODEL_LEN" = "1", "VLLM_TRITON_MLA_SPARSE" = "1", "VLLM_USE_FLASHINFER_SAMPLER" = "1"}
free_mib = 104164
gate_tries = 60
head = "spark1"
head_env = {"GLOO_SOCKET_IFNAME" = "bond0", "NCCL_IB_HCA" = "rocep1s0f0,rocep1s0f1", "NCCL_SOCKET_IFNAME" = "bond0", "TP_SOCKET_IFNAME" = "bond0", "VLLM_HOST_IP" = "10.0.0.1"}
head_gpu = "GPU-aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa"
healthy_deadline = "1800s"
image = "registry.example/vllm-spark@sha256:2222222222222222222222222222222222222222222222222222222222222222"
ipc_mode = ""
job_id = "vllm-dsv4-flash-spark"
kill_timeout = "120s"
master_address = "10.0.0.1"
master_port = 29501
memory_mb = 57344
model_dir = "/srv/models/DeepSeek-V4-Flash"
namespace = "default"
node_pool = "gpu"
overlay_root = "/srv/overlays/0d5e6f"
overlays = {"cumem.py" = "/usr/local/lib/python3.12/dist-packages/vllm/device_allocator/cumem.py"}
pipeline_parallel = 1
port = 8510
progress_deadline = "2100s"
recipe = "deepseek-v4-flash-fp8/balanced"
served_name = "dsv4-flash-spark"
shm_mb = 16384
tensor_parallel = 2
tmp_mb = 8192
worker = "spark2"
worker_env = {"GLOO_SOCKET_IFNAME" = "bond0", "NCCL_IB_HCA" = "rocep1s0f0,rocep1s0f1", "NCCL_SOCKET_IFNAME" = "bond0", "TP_SOCKET_IFNAME" = "bond0", "VLLM_HOST_IP" = "10.0.0.2"}
worker_gpu = "GPU-bbbbbbbb-bbbb-4bbb-8bbb-bbbbbbbbbbbb"
