"""Continue saved sessions in a process of its own: ``python session_process.py FOLDER CASE...``.

Each ``FOLDER/CASE/saved`` is loaded, continued by ``continue_session`` and saved as ``FOLDER/CASE/continued``.
"""

import sys
from pathlib import Path
from unittest.mock import patch

import torch
from hf_models import FAMILIES, attached, random_model

from deltamem_kernels import hf

# case -> (family, dtype, options of the memory)
CASES = {
    "qwen3": ("qwen3", torch.float32, {}),
    "gemma3 bf16": ("gemma3", torch.bfloat16, {"num_state_heads": 2, "couple_lambda": False}),
    "generic": ("granite", torch.float32, {}),
    "segments": ("mistral", torch.float32, {"memory_write_granularity": "message_mean"}),
}


def decoder(name):
    """A random model of a family, or one that only the generic path runs."""
    with patch.dict(FAMILIES, granite=("GraniteConfig", {"attention_multiplier": 0.3})):
        return random_model(name)


def case_model(case):
    name, dtype, options = CASES[case]
    return attached(model=decoder(name).to(dtype), **options)


def message(seed, tokens=19):
    return torch.randint(3, 64, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def continue_session(session):
    """Two turns, one of them sampled, one of three rolled back. -> their tokens"""
    said = list(session.stream(message(5), max_new_tokens=6, stop=()))
    list(session.stream(message(6), max_new_tokens=4, stop=()))
    session.undo()
    return said + list(session.stream(message(7), max_new_tokens=6, temperature=1.0, top_k=20, stop=()))


def byte_tokenizer():
    """A transformers tokenizer of bytes, with a chat template that opens with a system message."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", bos_token="<begin>")
    tokenizer.chat_template = (
        "{{ '<begin>' }}be kind\n{% for m in messages %}[{{ m.role }}]{{ m.content }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return tokenizer


def main(folder, *cases):
    for case in cases:
        session = hf.DeltaMemSession.load(Path(folder) / case / "saved", case_model(case))
        continue_session(session)
        session.save(Path(folder) / case / "continued")


if __name__ == "__main__":
    main(*sys.argv[1:])
