"""DeepSeek-V3 (1.3 TB) on 512 chips of TPU v5p: 192 of 256 experts, 24 in each router group.

The residual stream is split over 32 chips and heads, neurons and the vocabulary over 16: every
weight but the small latent ones over all 512. A process runs on each host and reads what its own
chips hold; batches are split over ``fsdp``.

On a pod slice (v5p-1024, which counts cores), the same command on every host:

    gcloud compute tpus tpu-vm ssh NAME --worker=all \\
        --command="python -m moe_jax.compress --config=configs/pods/deepseek_v3_512_chips.py"

On 512 GPUs under SLURM: srun --nodes=64 --ntasks-per-node=1 --gpus-per-node=8 python -m ...
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "deepseek-ai/DeepSeek-V3"
    config.output = "outputs/deepseek_v3_512_chips"
    config.dtype = "bfloat16"
    config.mesh = ConfigDict({"fsdp": 32, "tensor": 16})
    config.calibration = ConfigDict(
        {
            "files": ("hf:allenai/c4:en:train",),
            "num_sequences": 256,
            "seq_len": 2048,
            "batch_size": 32,
        }
    )
    config.stages = ({"method": "reap", "replacement": "delete", "keep_ratio": 0.75},)
    config.evaluation = ConfigDict(
        {
            "files": ("hf:allenai/c4:en:validation",),
            "max_bytes": 10_000_000,
            "seq_len": 2048,
            "batch_size": 32,
        }
    )
    return config
