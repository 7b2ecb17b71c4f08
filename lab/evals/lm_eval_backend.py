"""Asks the same questions through EleutherAI's lm-evaluation-harness, where it is installed: its texts, its accuracies.

Its own definition of the task is used, pointed at the local file; it needs no network. The package is not among our
requirements: `pip install lm_eval`.
"""

import contextlib
import importlib
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lab.evals.zero_shot import ChoiceModel, ZeroShotError, ZeroShotItem, ZeroShotResult, blind_shares, is_cut
from lab.generate.sampling import SamplingError

HARNESS_TASKS = {"hellaswag": "tasks/hellaswag/hellaswag.yaml", "boolq": "tasks/super_glue/boolq/default.yaml"}
"""By our names: the harness's definitions, in its package."""
LOCAL_TASK = """include: {definition}
task: local_{task}
dataset_path: json
dataset_name: null
dataset_kwargs:
  data_files:
    validation: {data}
  cache_dir: {cache}
training_split: null
validation_split: validation
test_split: null
{target}metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""
PUBLISHED_ANSWER = 'doc_to_target: "{{ answer | int }}"\n'
"""BoolQ's own files say `answer`, SuperGLUE's `label`, which the harness expects."""


def has_lm_eval() -> bool:
    return importlib.util.find_spec("lm_eval") is not None


def harness_model(model: ChoiceModel, advance: Callable[[int], None]) -> Any:
    """Returns `model` as the harness asks it. Raises ZeroShotError for a choice longer than the context."""
    base = importlib.import_module("lm_eval.api.model").LM

    class HarnessModel(base):
        """Log-likelihoods alone; whether a choice is the greedy one is never told, for no accuracy looks at it."""

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            answers = []
            for done, request in enumerate(requests, start=1):
                context, continuation = request.args
                try:
                    answers.append((-model.continuation_nats(context, continuation)[0], False))
                except SamplingError as error:
                    raise ZeroShotError(f"{error}; --backend own leaves such items out") from None
                advance(done)
            return answers

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            raise NotImplementedError("no task of ours asks for it")

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            raise NotImplementedError("no task of ours asks for it")

    return HarnessModel()


def write_local_task(task: str, data: Path, folder: Path) -> Path:
    """Returns a task file of the harness for a local data file."""
    package = Path(importlib.import_module("lm_eval").__file__).parent
    published = task == "boolq" and b'"answer"' in data.read_bytes().lstrip().split(b"\n", 1)[0]
    path = folder / f"local_{task}.yaml"
    path.write_text(
        LOCAL_TASK.format(
            definition=json.dumps(str(package / HARNESS_TASKS[task])), task=task, data=json.dumps(str(data.resolve())),
            cache=json.dumps(str(folder / "cache")), target=PUBLISHED_ANSWER if published else "",
        )
    )  # fmt: skip
    return path


def score_by_lm_eval(
    model: ChoiceModel, task: str, data: Path, items: Sequence[ZeroShotItem],
    advance: Callable[[int], None] = lambda done: None,
) -> ZeroShotResult:  # fmt: skip
    """Asks the first items of `data`, as many as `items` are. Raises ZeroShotError."""
    if not has_lm_eval():
        raise ZeroShotError("lm-eval is not installed: pip install lm_eval, or take --backend own")
    evaluator, tasks = (importlib.import_module(f"lm_eval.{part}") for part in ("evaluator", "tasks"))
    started, choices = time.perf_counter(), len(items[0].choices)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        found = evaluator.simple_evaluate(
            model=harness_model(model, lambda asked: advance(asked // choices)),
            tasks=[str(write_local_task(task, data, Path(folder)))], limit=len(items), log_samples=False,
            task_manager=tasks.TaskManager(include_defaults=False),  # the index of its own takes twenty seconds
        )  # fmt: skip
    figures = found["results"][f"local_{task}"]
    return ZeroShotResult(
        task, "lm-eval", len(items), 0, sum(is_cut(model, item) for item in items), figures["acc_norm,none"],
        figures["acc,none"], *blind_shares(items), time.perf_counter() - started,
    )  # fmt: skip
