"""Text in, token batches out: documents, tokenizers, calibration, evaluation and training data."""

from moe_jax.data.documents import Document, fingerprint, read_documents
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.data.training import training_dataset

__all__ = [
    "Document",
    "fingerprint",
    "load_tokenizer",
    "read_documents",
    "training_dataset",
]
