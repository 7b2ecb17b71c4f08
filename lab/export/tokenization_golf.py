"""Opens golf's tokenizer in transformers: AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True).

The file of this name in an exported folder is made from this one and from golf's own reading and writing of text, so
that its ids are those that the model was trained on.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer

from golf.data.tokenizer import SentencePieceModel
from lab.prepare.text_tokenizer import load_text_tokenizer

BUNDLED = False


class GolfTokenizer(PreTrainedTokenizer):
    """Reads and writes text by a tokenizer's file. Tokens are named by their pieces, or `<number>` where there are
    none."""

    vocab_files_names = {"pieces_file": "golf_tokenizer.model", "units_file": "golf_tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self, pieces_file: str | None = None, units_file: str | None = None, add_bos_token: bool = True, **others: Any
    ):
        self.file, self.add_bos_token = Path(pieces_file or units_file), add_bos_token
        self.text = load_text_tokenizer(self.file)
        count, of_pieces = self.text.vocab_size, isinstance(self.text, SentencePieceModel)
        self.names = [self.text.processor.id_to_piece(k) if of_pieces else f"<{k}>" for k in range(count)]
        self.numbers = {name: number for number, name in enumerate(self.names)}
        bos = self.names[self.text.bos_id]
        others = {"split_special_tokens": True} | others | {"bos_token": bos, "eos_token": bos}
        super().__init__(**others)

    @property
    def vocab_size(self) -> int:
        return len(self.names)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.numbers)

    def _tokenize(self, text: str, **others: Any) -> list[str]:
        return [self.names[number] for number in self.text.encode(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return self.numbers[token]

    def _convert_id_to_token(self, index: int) -> str:
        return self.names[index]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        return self.text.decode([self.numbers[token] for token in tokens])

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: list[int] | None = None):
        """Returns the ids of one document, or of two behind each other."""
        documents = [ids for ids in (token_ids_0, token_ids_1) if ids is not None]
        start = [self.text.bos_id] if self.add_bos_token else []
        return [token for ids in documents for token in (*start, *ids)]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        path = Path(save_directory) / ((f"{filename_prefix}-" if filename_prefix else "") + self.file.name)
        if path.resolve() != self.file.resolve():
            shutil.copyfile(self.file, path)
        return (str(path),)


if __name__ != "__main__":  # `save_pretrained` writes this file too
    GolfTokenizer.register_for_auto_class("AutoTokenizer")
