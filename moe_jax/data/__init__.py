"""Text in, token batches out: documents, tokenizers, calibration, evaluation and training data."""

from moe_jax.data.calibration import calibration_batches
from moe_jax.data.documents import Document, fingerprint, read_documents
from moe_jax.data.evaluation import EvaluationWindows, TextSize, evaluation_windows
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.data.training import training_dataset

__all__ = [
    "Document",
    "EvaluationWindows",
    "TextSize",
    "calibration_batches",
    "evaluation_windows",
    "fingerprint",
    "load_tokenizer",
    "read_documents",
    "training_dataset",
]
