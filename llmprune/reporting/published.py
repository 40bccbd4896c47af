"""Figures of LLM-Pruner (Ma, Fang, Wang, NeurIPS 2023, arXiv:2305.11627, table 1): LLaMA-7B, 20 % of it removed.

Perplexity at windows of 128 tokens, zero-shot accuracy in per cent (of the metric that the paper chose for each task).
"""

from __future__ import annotations

TASKS = {
    "boolq": "BoolQ",
    "piqa": "PIQA",
    "hellaswag": "HellaSwag",
    "winogrande": "WinoGrande",
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
    "openbookqa": "OBQA",
}
"""The paper's seven tasks by lm-eval's names, and their headings."""

TEXTS = {"wiki": "WikiText2", "ptb": "PTB"}
"""What the name of a text holds -> the heading of its perplexity."""


def paper_task(task: str) -> str | None:
    """Which of the paper's tasks a task of lm-eval is, also under a name that begins with it; None for another."""
    return next((name for name in TASKS if task == name or task.startswith(name + "_")), None)


COLUMNS = (*TEXTS.values(), *TASKS.values(), "average")

LLAMA_7B = {
    "dense": (12.62, 22.14, 73.18, 78.35, 72.99, 67.01, 67.45, 41.38, 42.40, 63.25),
    "L2": (582.41, 1022.17, 59.66, 58.00, 37.04, 52.41, 33.12, 28.58, 29.80, 42.65),
    "random": (27.51, 43.19, 61.83, 71.33, 56.26, 54.46, 57.07, 32.85, 35.00, 52.69),
    "channel": (74.63, 153.75, 62.75, 62.73, 41.40, 51.07, 41.38, 27.90, 30.40, 45.38),
    "vector": (22.28, 41.78, 61.44, 71.71, 57.27, 54.22, 55.77, 33.96, 38.40, 53.25),
    "element2": (19.77, 36.66, 59.39, 75.57, 65.34, 61.33, 59.18, 37.12, 39.80, 56.82),
    "element1": (19.09, 34.21, 57.06, 75.68, 66.80, 59.83, 60.94, 36.52, 40.00, 56.69),
    "channel, tuned": (22.02, 38.67, 59.08, 73.39, 64.02, 60.54, 57.95, 35.58, 38.40, 55.57),
    "vector, tuned": (18.84, 33.05, 65.75, 74.70, 64.52, 59.35, 60.65, 36.26, 39.40, 57.23),
    "element2, tuned": (17.37, 30.39, 69.54, 76.44, 68.11, 65.11, 63.43, 37.88, 40.00, 60.07),
    "element1, tuned": (17.58, 30.11, 64.62, 77.20, 68.80, 63.14, 64.31, 36.77, 39.80, 59.23),
}
"""Row -> a value for each of :data:`COLUMNS`."""
