"""What bytes a token stands for.

Stop strings are matched in bytes, token by token, so no text is ever decoded twice. The table is
taken from the model's own tokenizer.json: byte-level BPE (GPT-2's alphabet, in which each
character stands for one byte), or SentencePiece's pieces with byte fallback.
"""

import json
import re

from tokenizers import Tokenizer

from executor_svc.torch_engine.files import ModelError

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SENTENCEPIECE_SPACE = "▁"


class TokenBytes:
    """Bytes of each token, worked out when first asked for.

    ``is_supported`` is False for a tokenizer whose decoder is neither of the two kinds.
    """

    def __init__(self, tokenizer_json: bytes) -> None:
        try:
            self._tokenizer = Tokenizer.from_buffer(tokenizer_json)
        except Exception as fault:  # the library raises no narrower class
            raise ModelError(f"tokenizer.json: not a tokenizer: {fault}") from None
        decoder = json.dumps(json.loads(tokenizer_json).get("decoder"))
        self._is_byte_level = '"ByteLevel"' in decoder
        self.is_supported = self._is_byte_level or '"ByteFallback"' in decoder
        self._byte_of = _byte_level_alphabet()
        # Added tokens stand for their text as it is.
        self._known = {
            token_id: token.content.encode()
            for token_id, token in self._tokenizer.get_added_tokens_decoder().items()
        }

    @property
    def max_token_id(self) -> int:
        """The greatest id that the tokenizer gives out."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=0)

    def __getitem__(self, token_id: int) -> bytes:
        piece = self._known.get(token_id)
        if piece is None:
            piece = self._known[token_id] = self._piece(token_id)
        return piece

    def _piece(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""  # models pad their vocabulary beyond the tokenizer's
        if self._is_byte_level:
            if any(character not in self._byte_of for character in token):
                return token.encode()  # as the tokenizer's own decoder does
            return bytes(self._byte_of[character] for character in token)
        if match := _BYTE_PIECE.fullmatch(token):
            return bytes.fromhex(match[1])
        return token.replace(_SENTENCEPIECE_SPACE, " ").encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the rest follows from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}
