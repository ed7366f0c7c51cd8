"""Measure the cost of training over plain AR, and the gain of decoding, side by side in one process.

tidar benchmark training|attention|loss|loader|checkpoint|decode|planner|step|slots [--json]
"""

import argparse
import json
import os
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tidar_megatron.config import flag
from tidar_megatron.errors import UserError
from tidar_megatron.program import OneLineParser, importing, keep_threads_awake

SEQ_LENGTHS = {"training": [1024, 2048], "attention": [1024, 2048, 4096], "loader": [1024, 4096]}
REPEATS = {
    "training": 7,
    "attention": 9,
    "loader": 20,
    "loss": 7,
    "checkpoint": 5,
    "decode": 5,
    "planner": 7,
    "step": 7,
    "slots": 15,
}
OF_TEXTS = ("decode", "planner", "step")
OF_A_MODEL = (*OF_TEXTS, "slots")
SIZES = {  # flags for the sizes of a model, and their help
    "num_layers": "layers [6]",
    "hidden_size": "width [training 384, loss 256]",
    "ffn_hidden_size": "width of the feed-forward layer [1024]",
    "num_attention_heads": "query heads [training 6, attention 8]",
    "num_query_groups": "K/V heads [2]",
    "kv_channels": "channels of a head [training: width / heads, attention 64]",
    "vocab_size": "token ids [training 4096, loss 49152]",
    "tokens": "clean tokens of a step [4096], or tokens of the loss [4096]",
}
MEANT_FOR = {
    **dict.fromkeys(SIZES, ("training",)),
    "num_attention_heads": ("training", "attention"),
    "kv_channels": ("training", "attention"),
    "hidden_size": ("training", "loss"),
    "vocab_size": ("training", "loss"),
    "tokens": ("training", "loss"),
    "seq_lengths": ("attention", "training", "loader"),
    "diffusion_block_fractions": ("training",),
    "chunk_size": ("attention", "training"),
    "plot": ("training", "slots"),
    "model": OF_A_MODEL,
    "prompts": OF_TEXTS,
    "dtype": OF_TEXTS,
    "quantize": OF_TEXTS,
    "dtypes": ("slots", "training"),
    "max_new_tokens": OF_TEXTS,
    "contexts": ("decode", "planner", "step", "slots"),
    "batch_sizes": ("decode", "planner"),
    "adapter": ("decode",),
    "assistant": ("decode",),
    "bodies": ("planner",),
}


def run_model(arguments: argparse.Namespace, repeats: int) -> dict[str, Any]:
    """Load the model, then measure."""
    with importing():
        import torch

        from tidar_megatron.benchmark.bodies import BODIES
        from tidar_megatron.benchmark.decode import decode
        from tidar_megatron.benchmark.planner import planner
        from tidar_megatron.benchmark.step import step
        from tidar_megatron.evaluation.certificate import read_prompts
        from tidar_megatron.inference.dtype import dtype_name, dtype_note
        from tidar_megatron.inference.loading import load_model
        from tidar_megatron.inference.quantizing import check_quantizable
        from tidar_megatron.inference.text import encode_prompt

    settings = []
    for name in arguments.bodies or ["own"]:
        body, _, threads = name.partition("@")
        if body not in ("own", "useless", *BODIES) or not (threads or "1").isdecimal() or threads == "0":
            raise UserError(f"--bodies {name}: use own, useless, {', '.join(BODIES)}, or one of them and @THREADS")
        settings.append((body, int(threads) if threads else torch.get_num_threads()))
    texts = read_prompts(arguments.prompts)
    # the planner's benchmark grows the model, and quantizes what it has grown
    grows = arguments.what == "planner"
    quantize = None if grows else arguments.quantize
    more = {"keep_weights": grows, "quantize": quantize, "adapter": arguments.adapter}
    model = load_model(arguments.model, dtype=arguments.dtype, **more)
    check_quantizable(arguments.quantize, model.dtype, model.device)
    if arguments.what in ("planner", "step") and model.mask_token_id is None:
        raise UserError(f"--model {arguments.model}: cannot draft; export a TiDAR checkpoint")
    prompts = [encode_prompt(model, text) for text in texts]
    new = arguments.max_new_tokens or 128
    contexts = arguments.contexts or {"decode": [128, 1024, 4096], "step": [256, 1024, 4096]}.get(arguments.what, [1])
    if min(contexts) + new > model.context_limit:
        limit = model.context_limit
        raise UserError(f"--contexts {min(contexts)}: with {new} new tokens longer than the model's context of {limit}")
    if (
        arguments.what == "planner"
        and not arguments.contexts
        and (longest := max(map(len, prompts))) + new > model.context_limit
    ):
        raise UserError(
            f"--prompts {arguments.prompts}: {longest} tokens and {new} new ones are more than the model's context "
            f"of {model.context_limit}; leave that prompt out, or ask for fewer with --max-new-tokens"
        )
    if note := dtype_note(arguments.dtype, model.device, model.dtype):
        print(note, file=sys.stderr)
    dtype = {"dtype": dtype_name(model.dtype), "quantize": arguments.quantize}
    if arguments.what == "planner":
        contexts, batches = arguments.contexts or [], arguments.batch_sizes or [1]
        return dtype | planner(model, prompts, settings, contexts, batches, new, repeats, arguments.quantize)
    if arguments.what == "step":
        return dtype | step(model, arguments.model, prompts, contexts, new, repeats)
    assistant = None
    if arguments.assistant:
        assistant = load_model(arguments.assistant, dtype=model.dtype, keep_weights=True).causal_lm
    if assistant is not None:
        assistant.set_attn_implementation("sdpa")
    batches = arguments.batch_sizes or [1, 4, 8]
    return dtype | decode(model, arguments.model, prompts, contexts, batches, new, repeats, assistant)


def run_slots(arguments: argparse.Namespace, repeats: int) -> dict[str, Any]:
    """Load the model in each dtype, then measure."""
    with importing():
        from tidar_megatron.benchmark.slots import TOKENS, slots
        from tidar_megatron.inference.dtype import dtype_name
        from tidar_megatron.inference.loading import load_model

    loaded = [load_model(arguments.model, dtype=name) for name in arguments.dtypes or ("float32", "bfloat16")]
    contexts, limit = arguments.contexts or [256], loaded[0].context_limit
    if (least := min(contexts)) + TOKENS[-1] > limit:
        raise UserError(f"--contexts {least}: with {TOKENS[-1]} tokens longer than the model's context of {limit}")
    return slots({dtype_name(model.dtype): model for model in loaded}, contexts, repeats)


def main() -> None:
    """Parse the command line, measure, write the results, and print them."""
    parser = OneLineParser(description="Ratios of interleaved runs; the results are kept as JSON.", allow_abbrev=False)
    parser.add_argument("what", choices=sorted(REPEATS))
    parser.add_argument("--seq-lengths", type=int, nargs="+", metavar="S", help="clean tokens of a sequence")
    parser.add_argument("--diffusion-block-fractions", type=float, nargs="+", metavar="F", help="training [1 0.25]")
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds; each runs everything that is compared once")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch on the CPU")
    parser.add_argument("--chunk-size", type=int, metavar="N", help="of the chunked attention [256]")
    parser.add_argument("--output", default="runs/benchmarks", metavar="DIR", help="folder [runs/benchmarks]")
    parser.add_argument("--model", metavar="DIR", help="decode, planner, step, slots: Hugging Face folder")
    parser.add_argument("--prompts", metavar="FILE", help='of a model: JSON lines: strings, or objects with a "prompt"')
    parser.add_argument("--dtype", help="of a model: float32, bfloat16, .. [auto: bfloat16 where it is faster]")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        metavar="NAME",
        help="slots [float32 bfloat16], training [bfloat16 on a GPU, else float32]",
    )
    parser.add_argument("--quantize", metavar="BITS", help="of a model: int8 or int4 weights, on a CPU")
    parser.add_argument("--adapter", metavar="DIR", help="decode: draft weights for the model")
    parser.add_argument("--assistant", metavar="DIR", help="decode: a smaller model that drafts for transformers")
    help_of_contexts = "decode [128 1024 4096], step [256 1024 4096], slots [256], planner [the prompts as they are]"
    parser.add_argument("--contexts", type=int, nargs="+", metavar="P", help=help_of_contexts)
    parser.add_argument("--batch-sizes", type=int, nargs="+", metavar="N", help="decode [1 4 8], planner [1]")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of a model [128]")
    help_of_bodies = "planner: own, useless (drafts), 11M or 88M, and @THREADS where not torch's [own]"
    parser.add_argument("--bodies", nargs="+", metavar="NAME[@N]", help=help_of_bodies)
    for name, about in SIZES.items():
        parser.add_argument(flag(name), type=int, metavar="N", help=about)
    parser.add_argument("--plot", metavar="FILE.png", help="training, slots: draw times and ratios")
    parser.add_argument("--json", action="store_true", help="print one JSON object, as the last line")
    arguments = parser.parse_args()
    if arguments.what in OF_A_MODEL:
        keep_threads_awake()
    seq_lengths = arguments.seq_lengths or SEQ_LENGTHS.get(arguments.what, [])
    fractions, chunk_size = arguments.diffusion_block_fractions or [1.0, 0.25], arguments.chunk_size
    chunk_size = 256 if chunk_size is None else chunk_size
    sizes = {name: getattr(arguments, name) for name in SIZES}
    repeats = REPEATS[arguments.what] if arguments.repeats is None else arguments.repeats
    for name, values in (
        ("--seq-lengths", seq_lengths),
        ("--repeats", [repeats]),
        ("--threads", [1 if arguments.threads is None else arguments.threads]),
        ("--chunk-size", [chunk_size]),
        *((flag(name), getattr(arguments, name) or []) for name in ("contexts", "batch_sizes")),
        *((flag(name), [1 if sizes[name] is None else sizes[name]]) for name in SIZES),
    ):
        if wrong := [value for value in values if value < 1]:
            raise UserError(f"{name} {wrong[0]}: must be at least 1")
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 2:
        raise UserError(
            f"--max-new-tokens {arguments.max_new_tokens}: must be at least 2, the first comes of the prompt"
        )
    if wrong_lengths := [value for value in seq_lengths if value % 256]:
        raise UserError(f"--seq-lengths {wrong_lengths[0]}: must be a multiple of 256, of 16 documents of whole blocks")
    if wrong_fractions := [value for value in fractions if not 0 < value <= 1]:
        raise UserError(f"--diffusion-block-fractions {wrong_fractions[0]:g}: must be above 0 and at most 1")
    for name, of in MEANT_FOR.items():
        if getattr(arguments, name) is not None and arguments.what not in of:
            raise UserError(f"{flag(name)}: is for {' and '.join(of)}, not for {arguments.what}; leave it out")
    unknown = [name for name in arguments.dtypes or [] if name not in ("float32", "bfloat16")]
    if arguments.what == "training" and unknown:
        raise UserError(f"--dtypes {unknown[0]}: training is in float32 or bfloat16")
    if arguments.what in OF_TEXTS and not (arguments.model and arguments.prompts):
        raise UserError(f"{arguments.what}: needs --model DIR and --prompts FILE")
    if arguments.what in OF_A_MODEL and not arguments.model:
        raise UserError(f"{arguments.what}: needs --model DIR")
    if arguments.plot and not find_spec("matplotlib"):
        raise UserError(f"--plot {arguments.plot}: needs matplotlib; in the checkout, pip install -e '.[plot]'")
    for name, folder in (("--output", Path(arguments.output)), ("--plot", Path(arguments.plot or ".").parent)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{name}: {folder} cannot be a folder ({error.strerror}); name another") from error
    if arguments.plot and Path(arguments.plot).suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot {arguments.plot}: name a file that ends in .png, .svg or .pdf")

    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler, which counts bytes, tells of itself
    with importing():
        import torch  # heavy: after the command line is known to be sound

        from tidar_megatron.benchmark import report
        from tidar_megatron.benchmark.measuring import machine

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    before = machine()
    if before["load_average"] > 0.5 * before["cores"]:
        busy = f"load average {before['load_average']:g} on {before['cores']} cores"
        print(f"note: {busy}: ratios of a busy machine are not to be trusted", file=sys.stderr)
    if arguments.what == "training":
        with importing():
            from tidar_megatron.benchmark.training import training

        model = {name: size for name, size in sizes.items() if size is not None and name != "tokens"}
        result = training(seq_lengths, fractions, repeats, chunk_size, model, sizes["tokens"], arguments.dtypes or [])
    elif arguments.what == "attention":
        with importing():
            from tidar_megatron.benchmark.attention import attention

        result = attention(
            seq_lengths, repeats, chunk_size, heads=sizes["num_attention_heads"], channels=sizes["kv_channels"]
        )
    elif arguments.what == "loss":
        with importing():
            from tidar_megatron.benchmark.loss import loss

        result = loss(repeats, sizes["hidden_size"], sizes["vocab_size"], sizes["tokens"])
    elif arguments.what == "checkpoint":
        with importing():
            from tidar_megatron.benchmark.checkpoint import checkpoint

        result = checkpoint(repeats, arguments.output)
    elif arguments.what == "slots":
        result = run_slots(arguments, repeats)
    elif arguments.what in OF_TEXTS:
        result = run_model(arguments, repeats)
    else:
        with importing():
            from tidar_megatron.benchmark.loader import loader

        result = loader(seq_lengths, repeats)
    program = ["python", "tools/benchmark.py"] if parser.prog.endswith(".py") else parser.prog.split()
    command = shlex.join([*program, *sys.argv[1:]])
    result = {"benchmark": arguments.what, "command": command, "machine": before, "repeats": repeats, **result}
    path = report.write(result, arguments.output)
    if arguments.plot:
        report.plot(result, arguments.plot)
    if arguments.json:
        print(json.dumps(result))
    else:
        report.show(result)
        print(f"written to {path}")
