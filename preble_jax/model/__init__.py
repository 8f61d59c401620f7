"""The model room: a Flax decoder, its parameter table, weights in three formats, tokenizer, chat templates, sampling.

Import-light: names that need JAX are in their own modules (`decoder`, `params`, `sampling`, `weights.load`).
"""
