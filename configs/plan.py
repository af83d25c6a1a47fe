"""What to remove from a model that ships with the package, from statistics saved before.

python -m moe_jax.calibrate --config=configs/calibrate.py
python -m moe_jax.plan --config=configs/plan.py --config.keep_ratio=0.75 --config.output=plan.json
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": "moe_jax/assets/olmoe",
            "statistics": "outputs/statistics/olmoe",
        }
    )
