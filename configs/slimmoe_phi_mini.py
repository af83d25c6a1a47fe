"""Phi-3.5-MoE (41.9B) to the size of Phi-mini-MoE (7.6B): 960 of 6400 neurons, two stages.

    python -m moe_jax.compress --config=configs/slimmoe_phi_mini.py:tpu \\
        --config.training.files=TEXT/*.jsonl --config.calibration.files=TEXT/first.jsonl

The argument chooses the mesh: ``tpu`` (256 chips) or ``gpu`` (64 devices of 80 GB, as the paper
used), of as many processes as there are hosts. Every stage's weights divide evenly over these
meshes, but nothing of this size has been run yet.

Known from the paper's public material (arXiv 2506.18349): the final sizes, 400 billion tokens in
all, context 4096, two or three stages. Its intermediate sizes, learning rate, batch and losses are
not public. Here: the intermediate width is the geometric mean, rounded up to a multiple of 128;
both stages get half of the tokens; batch and learning rate are common for this size.
"""

from ml_collections import ConfigDict

MESHES = {
    "tpu": {"data": 4, "fsdp": 4, "expert": 16},
    "gpu": {"fsdp": 8, "expert": 8},
}
SEQ_LEN, BATCH_SIZE, TOKENS = 4096, 1024, 400_000_000_000
STEPS = TOKENS // (SEQ_LEN * BATCH_SIZE)


def distill(steps: int) -> dict:
    return {
        "steps": steps,
        "loss": "kd_topk",
        "top_k": 8,
        "learning_rate": 1e-4,
        "warmup_steps": 500,
        "compute_dtype": "bfloat16",
        "accumulation": 16,
        "chunk_tokens": 8192,
        "remat": True,
        "checkpoint_every": 500,
    }


STAGES = (
    {"expert_width": 2560, "importance": "kd_topk", "distill": distill(STEPS // 2)},
    {"expert_width": 960, "importance": "kd_topk", "distill": distill(STEPS // 2)},
)


def get_config(mesh: str = "gpu") -> ConfigDict:
    if mesh not in MESHES:
        raise ValueError(f"the argument must be one of {sorted(MESHES)}, got {mesh!r}")
    sizes = MESHES[mesh]
    # Every step's sequences are split over these axes.
    sequences = sizes.get("data", 1) * sizes.get("fsdp", 1)
    config = ConfigDict()
    config.model = "microsoft/Phi-3.5-MoE-instruct"
    config.output = "outputs/phi_mini_moe"
    config.dtype = "bfloat16"
    config.seed = 0
    config.calibration = ConfigDict(
        {
            "files": ("hf:allenai/c4:en:train",),
            "num_sequences": 1024,
            "seq_len": SEQ_LEN,
            "batch_size": sequences,
            "pack": True,
        }
    )
    config.training = ConfigDict(
        {
            "files": ("hf:allenai/c4:en:train",),
            "seq_len": SEQ_LEN,
            "batch_size": BATCH_SIZE,
        }
    )
    config.stages = STAGES
    config.evaluation = ConfigDict(
        {
            "files": ("hf:allenai/c4:en:validation",),
            "max_bytes": 10_000_000,
            "seq_len": SEQ_LEN,
            "batch_size": sequences,
        }
    )
    config.mesh = ConfigDict(sizes)
    return config
