"""The notebook runs from beginning to end, in any folder, and its last cell makes sense."""

import ast
import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

REPOSITORY = Path(__file__).parents[1]
NOTEBOOK = REPOSITORY / "notebooks" / "quickstart.ipynb"
ASSETS = REPOSITORY / "moe_jax" / "assets"
FIGURES = 7


def test_is_committed_without_outputs():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert code
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.slow
@pytest.mark.skipif(
    not (ASSETS / "olmoe" / "model.safetensors").exists(),
    reason="the teacher's weights (moe_jax/assets/olmoe/model.safetensors) are not there",
)
def test_runs_and_leaves_nothing_behind(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(env=_kernel_environment())
    assert not list(tmp_path.iterdir())
    outputs = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type in ("display_data", "execute_result")
    ]
    assert sum("image/png" in output.data for output in outputs) == FIGURES
    _check_result(ast.literal_eval(outputs[-1].data["text/plain"]))


def _kernel_environment() -> dict[str, str]:
    """One CPU device, as a user has; the package from this checkout."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
    paths = [str(REPOSITORY), environment.get("PYTHONPATH", "")]
    return environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _check_result(result):
    read_back = result.pop("read_back")
    assert set(result) == {"original", "replaced", "deleted", "slimmed"}
    parameters = {name: model["parameters"] for name, model in result.items()}
    assert parameters["deleted"] < parameters["replaced"] < parameters["original"]
    assert parameters["slimmed"] < parameters["original"]
    original = result["original"]["bits_per_byte"]
    for name, model in result.items():
        # Cutting a quarter or half costs something, or next to nothing, but never gains much.
        assert 0.98 * original <= model["bits_per_byte"] < 8, name
    assert read_back["same_architecture"]
    assert read_back["difference"] < 0.1
