"""ByteTokenizer: the embedded model's vocabulary, one token per UTF-8 byte.

Token b in 0…255 is the byte b; 256 pads, 257 ends a sequence. ``decode(encode(text)) == text`` for every
text.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ByteTokenizer:
    """A tokenizer with the handful of Hugging Face names that tasks and trainers use."""

    pad_token_id = 256
    eos_token_id = 257
    bos_token_id = None  # the end token stands between texts; nothing starts one
    vocab_size = 258
    chat_template = None

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """The bytes of ``text``; ``add_special_tokens`` appends the end token."""
        if not isinstance(text, str):
            raise TypeError(f"ByteTokenizer.encode takes one str, not {type(text).__name__}.")
        # surrogatepass: a lone surrogate (say from a JSON escape) survives the round trip instead of raising.
        ids = list(text.encode("utf-8", "surrogatepass"))
        return [*ids, self.eos_token_id] if add_special_tokens else ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids`` (ints or a 1-d tensor); cut or broken byte sequences become U+FFFD."""
        names = {self.pad_token_id: b"<pad>", self.eos_token_id: b"<eos>"}
        out = bytearray()
        for token in map(int, ids):
            if 0 <= token < 256:
                out.append(token)
            elif token in names:
                out += b"" if skip_special_tokens else names[token]
            else:
                raise ValueError(
                    f"token {token} is not in this vocabulary; allowed are 0 … {self.vocab_size - 1}."
                )
        try:
            return out.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return out.decode("utf-8", "replace")

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"ByteTokenizer(vocab_size={self.vocab_size})"

    def for_transformers(self) -> PreTrainedTokenizerFast:
        """The same tokens as a transformers tokenizer, which trainers such as TRL's insist on."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        # The tokenizers library writes bytes as characters: the printable ones as themselves, the others, in
        # order, from U+0100 on.
        printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
        others = iter(range(0x100, 0x200))
        vocabulary = {chr(b if b in printable else next(others)): b for b in range(256)}
        vocabulary |= {"<pad>": self.pad_token_id, "<eos>": self.eos_token_id}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            eos_token="<eos>",
            clean_up_tokenization_spaces=False,
        )
