"""Phi-3.5-MoE (84 GB) on one machine with 8 GPUs of 80 GB: to Phi-mini-MoE's size, then trained.

Heads and neurons are split over all 8 GPUs (the mesh axis ``tensor``), which the fast links within
a machine are for; one process drives them.

    python -m moe_jax.compress --config=configs/pods/phi_3_5_moe_8x80gb.py

Under SLURM: sbatch --nodes=1 --gpus=8 --wrap="python -m moe_jax.compress --config=..."
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "microsoft/Phi-3.5-MoE-instruct"
    config.output = "outputs/phi_3_5_moe_8x80gb"
    config.dtype = "bfloat16"
    config.mesh = ConfigDict({"tensor": 8})
    config.calibration = ConfigDict(
        {
            "files": ("hf:allenai/c4:en:train",),
            "num_sequences": 128,
            "seq_len": 2048,
            "batch_size": 4,
        }
    )
    config.training = ConfigDict(
        {"files": ("hf:allenai/c4:en:train",), "seq_len": 2048, "batch_size": 64}
    )
    config.stages = (
        {
            "method": "token_fisher",
            "expert_width": 960,
            "distill": {
                "steps": 2000,
                "loss": "kd_full",
                "learning_rate": 1e-4,
                "accumulation": 16,
                "chunk_tokens": 2048,
                "compute_dtype": "bfloat16",
                "remat": True,
            },
        },
    )
    config.evaluation = ConfigDict(
        {
            "files": ("hf:allenai/c4:en:validation",),
            "max_bytes": 10_000_000,
            "seq_len": 2048,
            "batch_size": 4,
        }
    )
    return config
