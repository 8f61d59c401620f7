"""A real `Tokenizer` over a vocabulary one can do in one's head: a token is a byte, and two control tokens follow."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from preble_jax.model.tokenizer import Tokenizer

START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """Ids 0-255 are the byte alphabet in its sorted order, 256 is START, 257 END (which ends an answer)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([START, END])
    return Tokenizer(backend, eos_token_ids=[257], chat_template=TEMPLATE)
