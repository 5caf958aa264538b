"""A model directory for measurements: a dense Qwen3 of any size with random weights, so that greedy tokens vary.

Needs torch, safetensors and tokenizers: it runs on the machine with the GPU, beside vLLM.

    python -m bench.dummy_model DIR --layers 16 --seed 1
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 5120, 64, 8, 128
_CHAT = "{% for m in messages %}<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def config(layers: int, intermediate: int, vocabulary: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": HIDDEN,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "use_cache": True,
    }


def shapes(layers: int, intermediate: int, vocabulary: int) -> list[dict[str, tuple[int, ...]]]:
    """Tensor names and shapes, one dictionary a file: the embeddings, then each layer."""
    head = {
        "model.embed_tokens.weight": (vocabulary, HIDDEN),
        "lm_head.weight": (vocabulary, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    return [head, *(_layer(i, intermediate) for i in range(layers))]


def _layer(index: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    at = f"model.layers.{index}"
    return {
        f"{at}.self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
        f"{at}.self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        f"{at}.self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        f"{at}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
        f"{at}.self_attn.q_norm.weight": (HEAD_DIM,),
        f"{at}.self_attn.k_norm.weight": (HEAD_DIM,),
        f"{at}.mlp.gate_proj.weight": (intermediate, HIDDEN),
        f"{at}.mlp.up_proj.weight": (intermediate, HIDDEN),
        f"{at}.mlp.down_proj.weight": (HIDDEN, intermediate),
        f"{at}.input_layernorm.weight": (HIDDEN,),
        f"{at}.post_attention_layernorm.weight": (HIDDEN,),
    }


def write(folder: Path, *, layers: int, intermediate: int, seed: int) -> int:
    """Write the model. Returns the bytes of its weights."""
    vocabulary = describe(folder, layers=layers, intermediate=intermediate)
    return _weights(folder, shapes(layers, intermediate, vocabulary), seed)


def describe(folder: Path, *, layers: int, intermediate: int) -> int:
    """Write all but the weights, which `--load-format dummy` makes up. Returns the size of the vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config(layers, intermediate, vocabulary)))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    return vocabulary


def weights_bytes(layers: int, intermediate: int, vocabulary: int) -> int:
    """Bytes of the weights in bf16."""
    return 2 * sum(math.prod(shape) for file in shapes(layers, intermediate, vocabulary) for shape in file.values())


def _tokenizer(folder: Path) -> int:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=_SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["models take turns on the gpus of one machine"] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": _SPECIAL[0],
        "model_max_length": 32768,
        "chat_template": _CHAT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return int(tokenizer.get_vocab_size())


def _weights(folder: Path, files: list[dict[str, tuple[int, ...]]], seed: int) -> int:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    index, total = {}, 0
    for number, tensors in enumerate(files):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        made = {}
        for key, shape in tensors.items():
            is_norm = len(shape) == 1
            scale = 1.0 if is_norm else _scale(key, shape)
            tensor = torch.ones(shape) if is_norm else torch.randn(shape, device=device) * scale
            made[key] = tensor.to(torch.bfloat16).cpu().contiguous()
            index[key] = name
            total += made[key].nbytes
        save_file(made, str(folder / name), metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    return total


def _scale(key: str, shape: tuple[int, ...]) -> float:
    """A loud embedding and quiet layers, so that the next token hangs on this one: a plain random network forgets its
    input and repeats one token, which would hide a wrong answer."""
    if "embed_tokens" in key:
        return 3.0
    quiet = 0.3 if "o_proj" in key or "down_proj" in key else 1.0
    return float(quiet * shape[-1] ** -0.5)


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("folder", type=Path)
    args.add_argument("--layers", type=int, default=16)
    args.add_argument("--intermediate", type=int, default=25600)
    args.add_argument("--seed", type=int, default=1)
    given = args.parse_args()
    size = write(given.folder, layers=given.layers, intermediate=given.intermediate, seed=given.seed)
    print(f"{given.folder}: {size / (1 << 30):.2f} GiB of weights")


if __name__ == "__main__":
    main()
