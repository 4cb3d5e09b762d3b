"""Trains the tokenizer: a byte-level BPE of 1,536 entries that starts every text with <s>, like Llama's.

    python data/tiny/tokenizer.py [--out data/tiny/model]
"""
import argparse
from pathlib import Path

from corpus import shard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 1536
SPECIAL = ("<pad>", "<s>", "</s>")  # ids 0, 1, 2
CONTEXT = 512
TRAINING_SHARDS = 4


def train() -> PreTrainedTokenizerFast:
    """A tokenizer trained on the first shards of the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        (text for number in range(TRAINING_SHARDS) for text in shard(number)),
        trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False,
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", SPECIAL.index("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
                                   pad_token="<pad>", model_max_length=CONTEXT, padding_side="right",
                                   clean_up_tokenization_spaces=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model", help="folder to write to")
    train().save_pretrained(parser.parse_args().out)
