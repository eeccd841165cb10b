"""What data tests read rows with."""

import pytest
from rows_kit import processor_with
from tokenizers_for_tests import make_tokenizer


@pytest.fixture
def processor():
    tokenizer = make_tokenizer("byte_bpe", "chatml")
    return processor_with(tokenizer)
