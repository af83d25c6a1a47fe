"""Half of the experts' neurons go, without training; each expert keeps as many as it needs.

    python -m moe_jax.compress --config=configs/own.py --config.model=MODEL --config.output=DIR

Neurons are ranked across the model by what the loss pays for each of them per token, and what is
left of a layer is solved for together, as in configs/stock.py. The result brings its modelling file
(``trust_remote_code=True``); serving engines do not read it.
"""

from ml_collections import ConfigDict

from configs import stock


def get_config() -> ConfigDict:
    config = stock.get_config()
    config.output = "outputs/own"
    config.stages = (
        {
            "method": "token_fisher",
            "neuron_scope": "model",
            "own_widths": True,
            "width_ratio": 0.5,
            "round_to": 8,
            "refit": True,
            "refit_sequences": 384,
        },
    )
    return config
