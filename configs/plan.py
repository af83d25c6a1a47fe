"""What to remove from a model that ships with the package, from statistics saved before.

python -m moe_jax.calibrate --config=configs/calibrate.py
python -m moe_jax.plan --config=configs/plan.py --config.keep_ratio=0.75 --config.output=plan.json
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": "moe_jax/assets/olmoe",
            "statistics": "outputs/statistics/olmoe",
            "plan": "",
            "output": "",
            "scores": "",
            "dtype": "",
            "seed": 0,
            "method": "mone",
            "options": {"frequency": "", "aggregation": ""},
            "group_importance": "",
            "group_options": {"aggregation": ""},
            "keep_experts": placeholder(int),
            "keep_ratio": placeholder(float),
            "expert_width": placeholder(int),
            "width_ratio": placeholder(float),
            "total_params": placeholder(int),
            "active_params": placeholder(int),
            "total_bytes": placeholder(int),
            "drop_layers": placeholder(int),
            "kv_groups": placeholder(int),
            "replacement": "novice",
            "scope": "layer",
            "num_groups": placeholder(int),
            "min_per_group": 1,
            "min_experts": placeholder(int),
            "max_experts": placeholder(int),
            "align_experts": 1,
            "neuron_scope": "expert",
            "own_widths": False,
            "max_buckets": 4,
            "active_share": 0.0,
            "repair": False,
            "constants": False,
            "round_to": 1,
            "min_width": placeholder(int),
            "max_width": placeholder(int),
        }
    )
