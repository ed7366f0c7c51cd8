"""Tasks of lm-eval and of local JSON files, run by a plan and by plain AR: scores of both, and the speedup.

A local file contains JSON lines of one kind:

========================================================  ===========================================================
``{"context": .., "choices": [..], "answer": 0}``         multiple choice: the likeliest continuation, also per byte
``{"prompt": .., "target": .., "until": ["\\n"]}``         generation: exact match, surrounding whitespace ignored
``{"text": ..}``                                          perplexity by word, byte and bit
========================================================  ===========================================================
"""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from tidar_megatron.errors import UserError
from tidar_megatron.inference.engine import generate
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.planner import forget_planner
from tidar_megatron.inference.request import Generation, parse_plan


def _target(doc: dict[str, Any]) -> str:
    return str(doc["target"]).strip()


def _metric(name: str, aggregation: str = "mean", higher_is_better: bool = True) -> dict[str, Any]:
    """Return a metric's full description, which lm-eval would otherwise look up with a warning."""
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher_is_better}


# Fields are given by name, not by template: lm-eval evaluates a template's result as Python if it looks like a literal.
KINDS: dict[tuple[str, ...], dict[str, Any]] = {
    ("context", "choices", "answer"): {
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [_metric("acc"), _metric("acc_norm")],
    },
    ("prompt", "target"): {
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": _target,
        "target_delimiter": "",
        "metric_list": [_metric("exact_match")],
        "filter_list": [
            {"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]},
        ],
    },
    ("text",): {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [
            *(_metric(name, "weighted_perplexity", False) for name in ("word_perplexity", "byte_perplexity")),
            _metric("bits_per_byte", "bits_per_byte", False),
        ],
    },
}


def local_task(path: str | Path, max_new_tokens: int = 64) -> dict[str, Any]:
    """Return the lm-eval task configuration for a local file.

    Args:
        path: A file of JSON lines.
        max_new_tokens: The largest number of tokens to generate, for generation tasks.

    Raises:
        UserError: the file cannot be read, is not JSON lines of one kind, has an answer outside the choices, or has
            lines with different ``until``.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--tasks {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"--tasks {path}: not UTF-8: {error}") from None
    lines, numbers = [], []
    for number, written in enumerate(text.split("\n"), start=1):
        if not written.strip():
            continue
        try:
            line = json.loads(written)
        except (ValueError, RecursionError) as error:
            raise UserError(f"--tasks {path}: line {number} is not JSON: {error}") from None
        lines.append(line)
        numbers.append(number)
    kinds = "; ".join(" ".join(keys) for keys in KINDS)
    if not lines:
        raise UserError(f"--tasks {path}: is empty; write objects with one of these sets of keys: {kinds}")
    first = next((keys for keys in KINDS if isinstance(lines[0], dict) and {*keys} <= {*lines[0]}), None)
    kind = next((keys for keys in KINDS if all(isinstance(x, dict) and {*keys} <= {*x} for x in lines)), None)
    if kind is None:
        what = "the first line is not" if first is None else f"the first line has {' '.join(first)}, others do not"
        raise UserError(f"--tasks {path}: all lines must be objects with one of these sets of keys: {kinds}; {what}")
    for number, line in zip(numbers, lines, strict=True):
        if why := _what_is_wrong(line, kind):
            raise UserError(f"--tasks {path}: line {number}: {why}")
    task = {
        "task": path.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path.resolve())}},
        "test_split": "test",
        **KINDS[kind],
    }
    if kind == ("prompt", "target"):
        until = lines[0].get("until", ["\n"])
        if any(line.get("until", ["\n"]) != until for line in lines):
            raise UserError(f"--tasks {path}: its lines differ in 'until'; use one file per 'until'")
        task["generation_kwargs"] = {"until": until, "do_sample": False, "max_gen_toks": max_new_tokens}
    return task


def _what_is_wrong(line: dict[str, Any], kind: tuple[str, ...]) -> str | None:
    """Return what is wrong with the values of the kind's keys, or None; other keys are not checked."""
    for name in (*kind, *(["until"] if "prompt" in kind and "until" in line else [])):
        value = line[name]
        if name == "answer":
            if type(value) is not int or not 0 <= value < len(line["choices"]):
                return f"answer {value!r} is not an index of its choices, from 0"
        elif name in ("choices", "until"):
            if not (isinstance(value, list) and value and all(isinstance(one, str) and one for one in value)):
                return f"{name} {value!r} is not a list of non-empty strings"
        elif not isinstance(value, str):
            return f"{name} {value!r} is not a string"
    return "text is empty" if "text" in kind and not line["text"] else None


def run_tasks(
    model: DecodeModel,
    tasks: Sequence[str],
    plan: str = "auto",
    batch_size: int = 1,
    limit: int | None = None,
    num_fewshot: int | None = None,
    max_new_tokens: int = 64,
) -> list[dict[str, Any]]:
    """Run all tasks by ``plan``, then by AR. Since the runs are not interleaved, drift in speed affects ``over_ar``.

    Args:
        model: The model that :func:`~tidar_megatron.inference.loading.load_model` returned, with its tokenizer.
        tasks: Names of lm-eval tasks, lm-eval YAML files, or files of JSON lines (``.json``, ``.jsonl``).
        plan: The plan, as ``--plan`` of ``tidar generate``.
        batch_size: The number of texts that are generated together.
        limit: The number of documents per task; None for all.
        num_fewshot: The number of examples before each document; None for the task's own.
        max_new_tokens: The largest number of tokens to generate, for local files.

    Returns:
        One row per task: ``task``, ``scores`` and ``ar_scores`` (metric -> value), ``scores_differ``; for generation
        tasks also ``tokens_per_forward``, ``tokens_per_second``, ``over_ar``. Sampled tasks never count as different.

    Raises:
        UserError: a task or file does not exist, the model has no tokenizer, or lm-eval is not installed.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("tasks need lm-eval: run make eval, or pip install lm-eval") from None
    from tidar_megatron.evaluation.lm_eval_model import TidarLM

    manager = TaskManager()
    wanted: list[Any] = []
    for task in tasks:
        if task.endswith((".json", ".jsonl")):
            wanted.append(local_task(task, max_new_tokens))
        elif task.endswith((".yaml", ".yml")):
            _check_yaml(Path(task))
            wanted.append(task)
        elif manager.match_tasks([task]):
            wanted.append(task)
        else:
            raise UserError(f"--tasks {task}: lm-eval has no such task, and it is not a .yaml, .json or .jsonl file")
    names = [task["task"] if isinstance(task, dict) else task for task in wanted]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--tasks: {twice[0]} names two tasks; a file's task is its name without suffix, so rename it")
    runs, sampled = [], set()
    by_plan, by_ar = (TidarLM(model, how, batch_size) for how in (plan, "ar"))
    warm_up(model, plan)
    for lm in (by_plan, by_ar):
        found = lm_eval.simple_evaluate(
            lm,
            tasks=wanted,
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            bootstrap_iters=0,
            log_samples=False,
        )
        assert found is not None
        runs.append((found["results"], lm.generations))
        sampled |= lm.sampled
    (planned, made), (plain, made_by_ar) = runs
    rows = [_row(name, planned[name], plain[name], made.get(name, []), made_by_ar.get(name, [])) for name in planned]
    return [row | {"scores_differ": False} if row["task"] in sampled else row for row in rows]


def _check_yaml(path: Path) -> None:
    """Refuse a file that is not YAML, for which lm-eval gives a traceback; lm-eval's own tags are not resolved."""
    try:
        list(yaml.parse(path.read_bytes()))
    except OSError as error:
        raise UserError(f"--tasks {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"--tasks {path}: is not YAML: {' '.join(str(error).split())}") from None


def warm_up(model: DecodeModel, plan: str) -> None:
    """Generate once by the plan and once by AR, so that neither run pays for one-time initialization."""
    token = next(token for token in range(model.vocab_size) if token != model.mask_token_id)
    for how in (plan, "ar"):
        room = max(1, min(32, model.context_limit - 1))
        generate(model, [token], replace(parse_plan(how), max_new_tokens=room, ignore_eos=True))
    forget_planner(model)  # its statistics are not from real text


def _row(
    name: str, planned: dict[str, Any], plain: dict[str, Any], made: list[Generation], by_ar: list[Generation]
) -> dict[str, Any]:
    scores, ar_scores = (_scores(found) for found in (planned, plain))
    row: dict[str, Any] = {
        "task": name,
        "scores": scores,
        "ar_scores": ar_scores,
        "scores_differ": scores.keys() != ar_scores.keys()
        or any(not _same(value, ar_scores[metric]) for metric, value in scores.items()),
    }
    return row | gained(made, by_ar) if made else row


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


def gained(made: Sequence[Generation], by_ar: Sequence[Generation]) -> dict[str, float]:
    """Return tokens per forward, tokens per second and the speedup over AR of generations, without the prefill.

    The throughput is over all generations: the seconds of a forward count once, however many texts shared it.
    """

    def speed(generations: Sequence[Generation]) -> float:
        seconds = sum(g.decode_share for g in generations)
        return sum(map(sum, (g.emitted for g in generations))) / seconds if seconds else 0.0

    forwards = sum(g.forwards for g in made)
    ar = speed(by_ar)
    return {
        "tokens_per_forward": sum(map(sum, (g.emitted for g in made))) / forwards if forwards else 0.0,
        "tokens_per_second": speed(made),
        "over_ar": speed(made) / ar if ar else 0.0,
    }


def _scores(found: dict[str, Any]) -> dict[str, float]:
    return {
        name.removesuffix(",none"): value
        for name, value in found.items()
        if isinstance(value, int | float) and "_stderr" not in name and name not in ("sample_len",)
    }
