"""A tiny model with a tokenizer in a folder, and episodes about it, for the tests of the trainer."""

import json

from hf_models import random_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = "<pad> <bos> <eos> <user> <assistant> <system> . the code of is ? what red blue green".split()
WORDS += [f"w{i}" for i in range(64 - len(WORDS))]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(template=TEMPLATE):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", chat_template=template)


def checkpoint(folder, **options):
    """A random Qwen3 and its tokenizer, saved."""
    random_model(**options).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def episode(i: int) -> dict:
    """The code of one of several words, and the question for it; lengths differ."""
    colours = ("red", "blue", "green")
    facts = [f"the code of w{(i + j) % 7} is {colours[(i * i + j) % 3]} ." for j in range(1 + i % 3)]
    context = [{"role": "user", "content": fact} for fact in facts]
    return {
        "context": context,
        "question": f"what is the code of w{i % 7} ?",
        "answer": colours[i * i % 3] + (" ." if i % 2 else ""),
    }


def save(path, episodes) -> str:
    path.write_text("".join(json.dumps(x) + "\n" for x in episodes))
    return str(path)
