"""What the configurations beside it share: one cut of a public model in bfloat16, by 128 texts.

It is imported from the repository's root, the folder that their command lines are for.
"""

from typing import Any

from ml_collections import ConfigDict


def one_cut(model: str, output: str, **fields: Any) -> ConfigDict:
    """The configuration; ``model`` is a hub id, and ``fields`` are those of the cut."""
    config = ConfigDict()
    config.model = model
    config.output = output
    config.dtype = "bfloat16"
    config.calibration = ConfigDict(
        {
            "files": ("hf:allenai/c4:en:train",),
            "num_sequences": 128,
            "seq_len": 2048,
            "batch_size": 4,
        }
    )
    config.stages = (fields,)
    return config
