"""Small tokenizers made on the spot, each with another habit that moves token boundaries."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>"]
_TEXTS = [
    "<|user|>\nWhat is the capital of Norway?\n<|assistant|>\nThe capital is Oslo.</s>\n",
    "<|system|>\nBe brief.\n<|user|>\nHow do you do?\n<|assistant|>\nVery well, thank you.</s>\n",
    "<|user|>\nGrüße aus Köln. Как дела? 你好,世界。\n<|assistant|>\nХорошо, спасибо. 谢谢!</s>\n",
] * 4


@cache
def small_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer over bytes that adds `<s>`.

    "words": tokens never cross a word's bound (GPT-2's manner); "text": they may cross anything, line ends and role
    markers too (as in sentencepiece without pre-tokenisation); "closing": "words" that also adds `</s>`.
    """
    bpe = Tokenizer(models.BPE())
    if kind == "text":
        bpe.normalizer = normalizers.ByteLevel()
    else:
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_TEXTS, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if kind == "closing" else "<s> $A",
        special_tokens=[(token, bpe.token_to_id(token)) for token in ("<s>", "</s>")],
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def chat_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """The "words" tokenizer, not shared, with a chat template."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=small_tokenizer("words").backend_tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )
    tokenizer.chat_template = template
    return tokenizer
