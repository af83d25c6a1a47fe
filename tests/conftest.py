"""What every test runs under: eight CPU devices, and compiled programs that are made once.

Most of the suite's time is XLA's, so its programs are compiled without LLVM's optimisations, kept
from module to module, and shared by the workers and the processes that tests start.
``XLA_FLAGS= pytest`` runs the tests on the programs that users get.
"""

import atexit
import gc
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")  # sharding is exercised wherever the tests run
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A gradient compiles four times as fast; arrays of tests are too small for slow code to show.
FLAGS = ["--xla_backend_optimization_level=0"]
if version("jaxlib").startswith("0.10."):  # an unknown flag ends the process
    FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers inherit the one of their parent
    _CACHE = tempfile.mkdtemp(prefix="moe_jax_tests_")
    atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE
    # Programs of one operation take 50 ms to compile and 3 ms to read, and there are thousands.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=20)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))

MAX_MAPPINGS = 30_000  # Linux allows 65,530 in a process


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Frees the compiled programs before the memory that they map reaches Linux's limit."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or len(maps.read_bytes().splitlines()) > MAX_MAPPINGS:
        import jax  # not before the settings above

        jax.clear_caches()
        gc.collect()
