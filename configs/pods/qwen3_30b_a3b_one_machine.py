"""Qwen3-30B-A3B (61 GB) on one machine of 24 GB, layer by layer from disk: 96 of 128 experts.

The text's hidden states go forward one layer at a time. Of the weights, the layer that computes
and the one that is read ahead are in memory; the hidden states are in files, 26 GB of them. A run
that was stopped goes on after the last layer that it finished.

    python -m moe_jax.compress --config=configs/pods/qwen3_30b_a3b_one_machine.py

Under SLURM: sbatch --mem=24G --cpus-per-task=16 --wrap="python -m moe_jax.compress --config=..."
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "Qwen/Qwen3-30B-A3B"
    config.output = "outputs/qwen3_30b_a3b_one_machine"
    config.dtype = "bfloat16"
    config.calibration = ConfigDict(
        {
            "files": ("hf:allenai/c4:en:train",),
            "num_sequences": 64,
            "seq_len": 2048,
            "batch_size": 1,
            "mode": "layerwise",
        }
    )
    config.stages = ({"method": "reap", "replacement": "delete", "keep_ratio": 0.75},)
    return config
