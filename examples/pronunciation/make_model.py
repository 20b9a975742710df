"""Make the folder `model`: a configuration and a tokenizer, no weights. It is there already; this is how it was made.

python examples/pronunciation/make_model.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PegasusConfig, PreTrainedTokenizerFast
from words_data import LETTERS, PHONEMES

FOLDER = Path(__file__).parent / "model"
SPECIAL = ["<pad>", "</s>", "<unk>"]


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are letters, which are small, and phonemes, which are large."""
    names = [*SPECIAL, *LETTERS, *PHONEMES]
    made = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))  # noqa: S106
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[A-Z]+|."), behavior="isolated")]
    )
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # with spaces between
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    )


def configuration() -> PegasusConfig:
    """Return a small encoder-decoder that normalises before each layer, which helps it to learn to align."""
    return PegasusConfig(
        vocab_size=len(SPECIAL) + len(LETTERS) + len(PHONEMES),
        d_model=96,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=384,
        decoder_ffn_dim=384,
        max_position_embeddings=64,
        dropout=0.0,
        attention_dropout=0.0,
        init_std=0.1,  # with the usual 0.02 it takes hundreds of steps longer until it begins to align
        scale_embedding=True,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        forced_eos_token_id=None,
        num_beams=1,
        architectures=["PegasusForConditionalGeneration"],
    )


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    tokenizer().save_pretrained(target)
    configuration().save_pretrained(target)
    print(f"wrote {target}")
