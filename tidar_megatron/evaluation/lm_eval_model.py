"""lm-eval's (EleutherAI's harness) model ``tidar``: likelihoods as an AR model's, text by the planned draft/verify.

lm-eval knows the models in its own table alone, so ``python -m tidar_megatron.evaluation`` is its command line with
this one added:

    python -m tidar_megatron.evaluation --model tidar --model_args pretrained=FOLDER --tasks ...

``model_args``: ``pretrained``, ``plan`` (``auto``; or ``ar``, ``2:8``, ..), ``batch_size``, ``device``, ``dtype``,
``mask_token_id``, ``max_length``. Texts are cut, windows laid and continuations told from contexts exactly as by
lm-eval's ``hf`` model, so likelihoods are the same numbers.
"""

import dataclasses
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from tidar_megatron.distributed.platform import has_gpu
from tidar_megatron.errors import UserError
from tidar_megatron.inference.engine import generate_batch
from tidar_megatron.inference.loading import load_model
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.request import Generation, parse_plan
from tidar_megatron.inference.sampling import SamplingOptions
from tidar_megatron.inference.scoring import score
from tidar_megatron.inference.text import NO_TOKENIZER

MAX_NEW_TOKENS = 256  # where a task does not say, as lm-eval has it
TOP_K = 50  # as transformers has it


@register_model("tidar")
class TidarLM(TemplateLM):
    """A Hugging Face folder in the engine.

    Attributes:
        generations: what :meth:`generate_until` made so far, by the task's name; for tokens per forward and second.
        sampled: names of the tasks whose texts were drawn, and not the likeliest.
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: str | DecodeModel,
        plan: str = "auto",
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        mask_token_id: int | None = None,
        max_length: int | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise UserError(
                f"model_args {next(iter(unknown))}: there is pretrained, plan, dtype, mask_token_id and max_length"
            )
        if isinstance(pretrained, DecodeModel):
            self.model = pretrained
        else:
            # lm-eval says cuda:0 where nothing was said; its own model then takes what there is, too
            device = None if device == "cuda:0" and not has_gpu() else device
            self.model = load_model(pretrained, device, None if dtype == "auto" else dtype, mask_token_id)
        self.tokenizer = self.model.tokenizer
        if self.tokenizer is None:
            raise UserError(NO_TOKENIZER)
        if self.tokenizer.bos_token_id is None and self.tokenizer.eos_token_id is None:
            raise UserError(
                "the model's tokenizer has neither a BOS nor an EOS token, with which lm-eval begins a text: "
                "name one in tokenizer_config.json"
            )
        self._options = parse_plan(plan)
        self._batch_size = int(batch_size) if str(batch_size).isdecimal() else 8
        self.max_length = int(max_length or self.model.context_limit)
        self._device = self.model.device
        self.generations: dict[str, list[Generation]] = {}
        self.sampled: set[str] = set()

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        asked = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            asked["add_special_tokens"] = False  # it has its BOS already
        return self.tokenizer.encode(string, **asked)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(self, requests: list[Any], **unused: Any) -> list[tuple[float, bool]]:
        texts = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation of {len(continuation)} tokens is to be scored, and the model's context holds "
                    f"{self.max_length}: shorten {self.tokenizer.decode(continuation[:16])!r} .."
                )
            kept = (context + continuation)[-(self.max_length + 1) :]
            texts.append((kept[: -len(continuation)], kept[-len(continuation) :]))
        answers = [(one.logprob, one.greedy) for one in score(self.model, texts)]
        for (key, _, _), answer in zip(requests, answers, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for number, (string,) in enumerate(request.args for request in requests):
            for window in utils.get_rolling_token_windows(
                self.tok_encode(string), self.prefix_token_id, self.max_length, context_len=1
            ):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(number)
        texts: list[str] = [""] * len(requests)
        for numbers in groups.values():
            asked = normalize_gen_kwargs(requests[numbers[0]].args[1], MAX_NEW_TOKENS)
            eos = None if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)
            until = handle_stop_sequences(asked.get("until"), eos=eos)
            options = dataclasses.replace(
                self._options,
                max_new_tokens=asked["max_gen_toks"],
                stop=tuple(text for text in until if text),
                sampling=_sampling(asked),
            )
            room = self.max_length - options.max_new_tokens
            if room < 1:
                raise UserError(
                    f"{options.max_new_tokens} tokens to generate (max_gen_toks) leave none of the {self.max_length} "
                    "that the model's context holds for the prompt: ask for fewer"
                )
            prompts = [self.tok_encode(requests[number].args[0])[-room:] for number in numbers]
            each = [options] * len(prompts)
            if not options.sampling.greedy:  # lm-eval seeds torch; each text draws from a source of its own
                self.sampled |= {requests[number].task_name or "" for number in numbers}
                drawn = [dataclasses.replace(options.sampling, seed=int(torch.randint(2**31, ()))) for _ in prompts]
                each = [dataclasses.replace(options, sampling=sampling) for sampling in drawn]
            made = generate_batch(self.model, prompts, each, self._batch_size)
            for number, generation in zip(numbers, made, strict=True):
                self.generations.setdefault(requests[number].task_name or "", []).append(generation)
                text = self.tokenizer.decode(generation.token_ids, skip_special_tokens=True)
                texts[number] = postprocess_generated_text(text, until, None)
                self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
        return texts


def _sampling(asked: dict[str, Any]) -> SamplingOptions:
    """Of a task's ``generation_kwargs``, as lm-eval's ``hf`` model hands them to transformers.

    Raises:
        UserError: an option that is not served, by name, or a draw at temperature 0.
    """
    wanted = {name: value for name, value in asked.items() if value is not None and value is not False}
    neutral = ("use_cache", *(name for name in ("num_beams", "length_penalty") if asked.get(name) == 1))
    drawing = ("temperature", "top_k", "top_p", "min_p")
    served = ("until", "max_gen_toks", "do_sample", "repetition_penalty", "min_new_tokens", *drawing, *neutral)
    if others := [name for name in wanted if name not in served]:
        raise UserError(f"generation_kwargs: {', '.join(others)} is not served by the engine; leave it out of the task")

    def given(name: str, default: float) -> float:
        return float(wanted.get(name, default))

    kept = SamplingOptions(
        repetition_penalty=given("repetition_penalty", 1.0), min_new_tokens=int(given("min_new_tokens", 0))
    )
    if not asked.get("do_sample"):
        return kept
    temperature = given("temperature", 1.0)
    if not temperature:
        raise UserError("generation_kwargs: do_sample at temperature 0: leave do_sample out, or raise the temperature")
    return dataclasses.replace(
        kept,
        temperature=temperature,
        top_k=int(asked.get("top_k", TOP_K) or 0) or None,
        top_p=given("top_p", 1.0),
        min_p=given("min_p", 0.0),
    )
