"""Tasks of lm-eval, and of local JSON files, by a plan and by plain AR side by side: the scores, and what was gained.

A local file holds JSON lines of one kind:

========================================================  ===========================================================
``{"context": .., "choices": [..], "answer": 0}``         multiple choice: the likeliest continuation, also per byte
``{"prompt": .., "target": .., "until": ["\\n"]}``         generation: exact match, blanks around it aside
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
    """As lm-eval would take it from its own table, which it does not do without a warning for each."""
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher_is_better}


# fields by their names: what a template gives, lm-eval would read as Python where it looks like a number or a list
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
    """lm-eval's description of a task in a local file.

    Raises:
        UserError: no such file, not JSON lines, lines of none of the kinds, an answer beyond the choices, or lines
            that end by different ``until``.
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
        raise UserError(f"--tasks {path}: is empty; its lines are objects with one of these sets of keys: {kinds}")
    first = next((keys for keys in KINDS if isinstance(lines[0], dict) and {*keys} <= {*lines[0]}), None)
    kind = next((keys for keys in KINDS if all(isinstance(x, dict) and {*keys} <= {*x} for x in lines)), None)
    if kind is None:
        what = "the first line is none" if first is None else f"the first line has {' '.join(first)}, others have not"
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
            raise UserError(f"--tasks {path}: its lines differ in 'until': give each a file of its own")
        task["generation_kwargs"] = {"until": until, "do_sample": False, "max_gen_toks": max_new_tokens}
    return task


def _what_is_wrong(line: dict[str, Any], kind: tuple[str, ...]) -> str | None:
    """With the values of its kind's keys; others may be anything."""
    for name in (*kind, *(["until"] if "prompt" in kind and "until" in line else [])):
        value = line[name]
        if name == "answer":
            if type(value) is not int or not 0 <= value < len(line["choices"]):
                return f"answer {value!r} is no place in its choices, from 0"
        elif name in ("choices", "until"):
            if not (isinstance(value, list) and value and all(isinstance(one, str) and one for one in value)):
                return f"{name} {value!r} is no list of texts"
        elif not isinstance(value, str):
            return f"{name} {value!r} is no text"
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
    """Every task by ``plan`` and by AR, one after the other: where the machine's speed drifts, so does ``over_ar``.

    Args:
        model: what :func:`~tidar_megatron.inference.loading.load_model` returned, with its tokenizer.
        tasks: names of lm-eval's, files of its own YAML, or files of JSON lines (``.json``, ``.jsonl``).
        plan: as ``--plan`` of ``tools/generate.py``.
        batch_size: texts that are generated together.
        limit: documents of each task.
        num_fewshot: examples before each document.
        max_new_tokens: of a local file's generations.

    Returns:
        A row a task: ``task``, ``scores`` and ``ar_scores`` (metric -> value), ``scores_differ``; where it generates
        also ``tokens_per_forward``, ``tokens_per_second``, ``over_ar``. Scores of what was sampled are not compared.

    Raises:
        UserError: no such task or file, the model's folder has no tokenizer, or lm-eval is not installed.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("tasks need lm-eval: make eval, or pip install lm-eval") from None
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
            raise UserError(f"--tasks {task}: lm-eval has no such task, and it is no .yaml, .json or .jsonl file")
    names = [task["task"] if isinstance(task, dict) else task for task in wanted]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--tasks: {twice[0]} names two tasks; a file's is its name without the ending, so rename it")
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
    """lm-eval's own answer is a traceback; its tags are for it to read."""
    try:
        list(yaml.parse(path.read_bytes()))
    except OSError as error:
        raise UserError(f"--tasks {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"--tasks {path}: is no YAML: {' '.join(str(error).split())}") from None


def warm_up(model: DecodeModel, plan: str) -> None:
    """Once by the plan and by AR, so that neither pays for what is made once."""
    token = next(token for token in range(model.vocab_size) if token != model.mask_token_id)
    for how in (plan, "ar"):
        room = max(1, min(32, model.context_limit - 1))
        generate(model, [token], replace(parse_plan(how), max_new_tokens=room, ignore_eos=True))
    forget_planner(model)  # what it learned is of no text


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
    """Tokens per forward and second of generations, and how much faster than AR's they were; prefill aside.

    Per second of all: of generations side by side in a batch, each forward's seconds count once.
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
