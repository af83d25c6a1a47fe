"""Times llm-compressor's REAP on a checkpoint; run by ``bench_calibrate.py`` in its environment.

    PYTHON tools/peer_reap.py MODEL TOKENS.npy REPORT.json REPEATS BATCH

Prints one JSON line: seconds of a plain forward pass over all tokens and of the whole one-shot
(calibrating, scoring and pruning; loading the model is not counted), and how many batches it saw.
``REPORT.json`` then holds the experts that each layer kept.
"""

import json
import sys
import time

import numpy as np
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM


def main() -> None:
    model_folder, tokens_file, report, repeats, batch = sys.argv[1:]
    tokens = np.load(tokens_file).astype(np.int64)
    # Without a mask of its own, its layer-by-layer pipeline (0.14) attends to later tokens too, for
    # the trace drops the causal mask that the model would make: other states, other experts chosen.
    length = tokens.shape[1]
    causal = torch.full((1, length, length), torch.finfo(torch.float32).min).triu(1)
    data = [{"input_ids": row, "attention_mask": causal} for row in torch.from_numpy(tokens)]
    forward = oneshot_seconds = float("inf")
    for _ in range(int(repeats)):
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        model.eval()
        with torch.no_grad():
            for _ in range(2):
                start = time.perf_counter()
                for first in range(0, len(tokens), int(batch)):
                    model(torch.from_numpy(tokens[first : first + int(batch)]))
                forward = min(forward, time.perf_counter() - start)
        start = time.perf_counter()
        oneshot(
            model=model,
            dataset=DataLoader(data, batch_size=int(batch)),
            recipe=REAPPruningModifier(sparsity=0.25, report_path=report),
            num_calibration_samples=len(tokens),
            max_seq_length=tokens.shape[1],
            moe_calibrate_all_experts=False,
        )
        oneshot_seconds = min(oneshot_seconds, time.perf_counter() - start)
    print(json.dumps({"forward": forward, "oneshot": oneshot_seconds}))


if __name__ == "__main__":
    main()
