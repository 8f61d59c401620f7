#!/usr/bin/env python3
"""Writes the goldens under tests/goldens with Hugging Face transformers as the oracle.

Needs torch and transformers, which are no dependencies of this project: run it in an environment of their own.

    python scripts/make_goldens.py smollm2 SmolLM2-135M-Instruct.Q4_1.gguf    prompts.json -> smollm2_greedy.json
    python scripts/make_goldens.py tiny                                       -> tiny_llama3/ and its greedy.json

Everything runs in float32 on the CPU. The oracle decodes with its own key-value cache, and a second pass over the whole
sequence without one has to choose the same tokens, so that a golden never rests on a single code path.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

GOLDENS = Path(__file__).resolve().parent.parent / "tests" / "goldens"
NUM_TOKENS = 32
NUM_WITH_LOGPROBS = 3
HOW_IDS = (
    "tokenizers library, vocabulary and merges as transformers reads them from the GGUF; pre-tokenizer "
    "Sequence[Digits(individual_digits), ByteLevel(add_prefix_space=False)], which is the model's own and what the "
    "file's tokenizer.ggml.pre = smollm means; special tokens in the text are parsed; nothing is added. Checked: "
    "decoding gives the text back."
)

# Llama 3's scaling with an original context of 64: of head_dim 8's four frequencies one stays, one is interpolated
# and two are divided by the factor, so every branch of the formula counts in a prompt of 300 tokens.
TINY_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "torch_dtype": "float32",
}
TINY_LENGTHS = (1, 5, 16, 33, 120, 300)


@torch.inference_mode()
def greedy(model: Any, prompt: list[int]) -> dict[str, list[Any]]:
    """Chosen ids, the gap between the two largest logits, and the chosen ids' log-probabilities, NUM_TOKENS of each."""
    chosen: list[int] = []
    rows: list[torch.Tensor] = []
    step, cache = torch.tensor([prompt]), None
    for _ in range(NUM_TOKENS):
        result = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        rows.append(result.logits[0, -1])
        chosen.append(int(rows[-1].argmax()))
        step, cache = torch.tensor([chosen[-1:]]), result.past_key_values
    logits = torch.stack(rows)
    whole = model(input_ids=torch.tensor([prompt + chosen[:-1]]), use_cache=False, logits_to_keep=NUM_TOKENS).logits[0]
    torch.testing.assert_close(whole, logits, atol=2e-3, rtol=1e-4)
    top = logits.topk(2).values
    logprobs = logits.log_softmax(-1).gather(-1, torch.tensor(chosen)[:, None])[:, 0]
    return {
        "output_token_ids": chosen,
        "top2_gap": [round(float(gap), 4) for gap in top[:, 0] - top[:, 1]],
        "logprobs": [round(float(value), 5) for value in logprobs],
    }


def read_tokenizer(gguf: Path) -> tuple[Tokenizer, Any]:
    """The tokenizer with its own pre-tokenizer, and transformers' wrapper, which renders the chat template."""
    wrapper = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer = wrapper.backend_tokenizer
    # transformers' GGUF reader leaves out the splitting of digits.
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer, wrapper


def prompt_text(prompt: dict[str, Any], shared_prefix: str, wrapper: Any) -> str:
    """The text the model sees."""
    if "messages" in prompt:
        return str(wrapper.apply_chat_template(prompt["messages"], tokenize=False, add_generation_prompt=True))
    return str((shared_prefix if prompt.get("shared_prefix") else "") + prompt["text"])


def make_smollm2(gguf: Path) -> None:
    """tests/goldens/prompts.json -> tests/goldens/smollm2_greedy.json."""
    source = json.loads((GOLDENS / "prompts.json").read_text(encoding="utf-8"))
    tokenizer, wrapper = read_tokenizer(gguf)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    entries = []
    for index, prompt in enumerate(source["prompts"]):
        text = prompt_text(prompt, source["shared_prefix"], wrapper)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if tokenizer.decode(ids, skip_special_tokens=False) != text:
            raise SystemExit(f"{prompt['name']}: decoding the ids does not give the text back")
        result = greedy(model, ids)
        if index >= NUM_WITH_LOGPROBS:
            del result["logprobs"]
        head = {"name": prompt["name"], "text": text}
        if "messages" in prompt:
            head["messages"] = prompt["messages"]
        entries.append(
            {
                **head,
                "prompt_token_ids": ids,
                **result,
                "output_text": tokenizer.decode(result["output_token_ids"], skip_special_tokens=False),
            }
        )
        print(f"{prompt['name']}: {len(ids)} tokens -> {entries[-1]['output_text']!r}", flush=True)
    header = {"model": gguf.name, "made_with": versions(), "how_ids_were_made": HOW_IDS, "stops_at_eos": False}
    write(GOLDENS / "smollm2_greedy.json", header, entries)


def make_tiny() -> None:
    """A random Llama in Hugging Face's format, config.json written as published Llama 3 folders have it."""
    folder = GOLDENS / "tiny_llama3"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG, indent=2) + "\n")
    torch.manual_seed(0)
    weights = LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).state_dict()
    for name, value in weights.items():
        # Wide enough that tokens and positions change the choice; transformers' own 0.02 gives nearly flat logits.
        value.normal_(1.0, 0.2) if name.endswith("norm.weight") else value.normal_(0.0, 1.0 if "embed" in name else 0.3)
    save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    unscaled_config = LlamaConfig(**{k: v for k, v in TINY_CONFIG.items() if k != "rope_scaling"})
    unscaled_config._attn_implementation = "eager"
    unscaled = LlamaForCausalLM(unscaled_config).eval()
    unscaled.load_state_dict(weights)
    generator = torch.Generator().manual_seed(1)
    entries = []
    for length in TINY_LENGTHS:
        ids = torch.randint(0, TINY_CONFIG["vocab_size"], (length,), generator=generator).tolist()
        entries.append({"name": f"length_{length}", "prompt_token_ids": ids, **greedy(model, ids)})
        print(entries[-1]["name"], entries[-1]["output_token_ids"], min(entries[-1]["top2_gap"]))
    if greedy(unscaled, ids)["output_token_ids"] == entries[-1]["output_token_ids"]:
        raise SystemExit("the longest prompt does not depend on RoPE scaling; choose other weights")
    write(folder / "greedy.json", {"made_with": versions(), "stops_at_eos": False}, entries)


def versions() -> str:
    return f"transformers {transformers.__version__}, torch {torch.__version__}, float32, CPU, eager attention"


def write(path: Path, header: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """One key a line, so that a person can read it and a change shows as a small difference."""

    def dump(value: object) -> str:
        return json.dumps(value, ensure_ascii=False)

    def members(mapping: dict[str, Any], indent: str) -> str:
        return ",\n".join(f"{indent}{dump(key)}: {dump(value)}" for key, value in mapping.items())

    body = ",\n".join("  {\n" + members(entry, "   ") + "\n  }" for entry in entries)
    path.write_text("{\n" + members(header, " ") + ',\n "prompts": [\n' + body + "\n ]\n}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("smollm2").add_argument("gguf", type=Path)
    commands.add_parser("tiny")
    arguments = parser.parse_args()
    if arguments.command == "smollm2":
        make_smollm2(arguments.gguf)
    else:
        make_tiny()


if __name__ == "__main__":
    main()
