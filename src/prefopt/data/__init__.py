"""Rows, sources and token ids: everything between a recipe's data keys and the batches."""

from prefopt.data.encoding import TextMode, Truncation, prepare_tokenizer, tokenizer_fingerprint
from prefopt.data.holdout import hold_out
from prefopt.data.loading import DataArguments, load_datasets, load_tokenized, normalise_rows
from prefopt.data.messages import BadRow
from prefopt.data.sources import DataSource
from prefopt.data.tokenization import (
    LengthSummary,
    RowTokenizer,
    TokenizationReport,
    check_fits_model,
    describe_sample,
    tokenize_comparisons,
    tokenize_pairs,
    tokenize_prompts,
)

__all__ = [
    "BadRow",
    "DataArguments",
    "DataSource",
    "LengthSummary",
    "RowTokenizer",
    "TextMode",
    "TokenizationReport",
    "Truncation",
    "check_fits_model",
    "describe_sample",
    "hold_out",
    "load_datasets",
    "load_tokenized",
    "normalise_rows",
    "prepare_tokenizer",
    "tokenize_comparisons",
    "tokenize_pairs",
    "tokenize_prompts",
    "tokenizer_fingerprint",
]
