"""The tokenizer and the rows of the data package's tests."""

from tests.unit.data.conftest import corpus, data_folder, make_tokenizer, tokenizer, write_rows

__all__ = ["corpus", "data_folder", "make_tokenizer", "tokenizer", "write_rows"]
