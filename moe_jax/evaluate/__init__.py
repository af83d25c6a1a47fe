"""Held-out loss of models per domain, distance to a reference, and lm-evaluation-harness tasks."""

from moe_jax.evaluate.checkpoints import comparison_table, evaluate_checkpoints, tasks_table
from moe_jax.evaluate.held_out import Reference, evaluate, evaluate_pair, forward_speed
from moe_jax.evaluate.results import DomainEvaluation, Evaluation
from moe_jax.evaluate.task_files import TaskSet, find_tasks
from moe_jax.evaluate.tasks import TaskSettings, evaluate_tasks

__all__ = [
    "DomainEvaluation",
    "Evaluation",
    "Reference",
    "TaskSet",
    "TaskSettings",
    "comparison_table",
    "evaluate",
    "evaluate_checkpoints",
    "evaluate_pair",
    "evaluate_tasks",
    "find_tasks",
    "forward_speed",
    "tasks_table",
]
