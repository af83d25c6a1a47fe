"""Phi-3.5-MoE: experts of 6,400 neurons to 960, the width of Phi-mini-MoE, in one shot.

SparseMixer always picks two experts. For the stages with distillation see ``slimmoe_phi_mini.py``.

    python -m moe_jax.compress --config=configs/models/phi_3_5_moe.py --config.dry_run=True
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "microsoft/Phi-3.5-MoE-instruct"
    config.output = "outputs/phi_3_5_moe"
    config.dtype = "bfloat16"
    config.calibration = ConfigDict(
        {
            "files": ("hf:allenai/c4:en:train",),
            "num_sequences": 128,
            "seq_len": 2048,
            "batch_size": 4,
        }
    )
    config.stages = ({"method": "token_fisher", "expert_width": 960},)
    return config
