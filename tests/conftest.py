"""Eight CPU devices in every test, so that sharding is exercised wherever the tests run.

Compiled programs are shared between the tests and processes of a run: most of its time is theirs.
"""

import atexit
import gc
import os
import shutil
import tempfile

import pytest

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers inherit the one of their parent
    _CACHE = tempfile.mkdtemp(prefix="moe_jax_tests_")
    atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Frees a module's compiled programs.

    Each maps memory; a process that keeps those of all modules reaches the number of mappings that
    Linux allows (65,530), and crashes.
    """
    yield
    import jax  # not before the settings above

    jax.clear_caches()
    gc.collect()
