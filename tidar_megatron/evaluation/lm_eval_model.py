"""The model ``tidar`` for EleutherAI's lm-eval: autoregressive likelihoods, and text by draft/verify decoding.

lm-eval only knows registered models, so ``python -m tidar_megatron.evaluation`` runs its command line with this one
registered:

    python -m tidar_megatron.evaluation --model tidar --model_args pretrained=FOLDER --tasks ...

``model_args``: ``pretrained``, ``plan`` (``auto``; or ``ar``, ``2:8``, ..), ``batch_size``, ``device``, ``dtype``,
``quantize``, ``mask_token_id``, ``max_length``. Truncation, rolling windows and the split of context and continuation
follow lm-eval's ``hf`` model exactly, so likelihoods are identical. Where ``hf`` fails because a continuation merges
into its context, this model encodes the continuation alone.
"""

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import postprocess_generated_text

from tidar_megatron.distributed.platform import has_gpu
from tidar_megatron.errors import UserError
from tidar_megatron.evaluation.generation_kwargs import task_options
from tidar_megatron.inference.dtype import dtype_note
from tidar_megatron.inference.engine import generate_batch
from tidar_megatron.inference.loading import load_model
from tidar_megatron.inference.model import DecodeModel
from tidar_megatron.inference.request import DecodeOptions, Generation, check_prompt, check_token_ids, parse_plan
from tidar_megatron.inference.scoring import score
from tidar_megatron.inference.text import NO_TOKENIZER

LOGGER = logging.getLogger("lm_eval.tidar")  # below lm-eval's own, which writes to standard error


@register_model("tidar")
class TidarLM(TemplateLM):
    """An lm-eval model that runs a Hugging Face folder in the engine.

    Attributes:
        generations: The generations of :meth:`generate_until` so far, by task name, for throughput statistics.
        sampled: The names of tasks whose texts were sampled, not greedy.
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: str | DecodeModel,
        plan: str = "auto",
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = "auto",
        mask_token_id: int | None = None,
        max_length: int | None = None,
        max_batch_size: int | None = None,
        quantize: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise UserError(
                f"model_args {next(iter(unknown))}: unknown; use pretrained, plan, dtype, quantize, mask_token_id or "
                "max_length"
            )
        if isinstance(pretrained, DecodeModel):
            self.model = pretrained
        else:
            # cuda:0 is lm-eval's default; like lm-eval's own model, fall back to an available device
            device = None if device == "cuda:0" and not has_gpu() else device
            self.model = load_model(pretrained, device, dtype, mask_token_id, quantize=quantize)
            if note := dtype_note(dtype, self.model.device, self.model.dtype):
                LOGGER.info(note)
        self.tokenizer = self.model.tokenizer
        if self.tokenizer is None:
            raise UserError(NO_TOKENIZER)
        if self.tokenizer.bos_token_id is None and self.tokenizer.eos_token_id is None:
            raise UserError(
                "the model's tokenizer has neither a BOS nor an EOS token, and lm-eval starts each text with one: "
                "set one in tokenizer_config.json"
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
            asked["add_special_tokens"] = False  # the string already starts with BOS
        return self.tokenizer.encode(string, **asked)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        encoded = []
        for request in requests:
            with _named(request):
                encoded.append((request.args, *self._to_score(*request.args)))
        return self._loglikelihood_tokens(encoded)

    def _to_score(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the token ids of a context and of the continuation to score, at least one each.

        Raises:
            UserError: the continuation has no tokens or too many, or an id is outside the model's vocabulary.
        """
        if context:
            before, scored = self._encode_pair(context, continuation)
        else:
            before, scored = [], self.tok_encode(continuation, add_special_tokens=False)
            if scored[:1] == [self.prefix_token_id]:
                before, scored = scored[:1], scored[1:]
        before = before or [self.prefix_token_id]
        if not scored:
            raise UserError("there is no token to score: the continuation is empty")
        if len(scored) > self.max_length:
            raise UserError(
                f"the continuation to score has {len(scored)} tokens, and the model's context holds "
                f"{self.max_length}: shorten {self.tokenizer.decode(scored[:16])!r} .."
            )
        check_token_ids(self.model, [*{*before, *scored}])
        return before, scored

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode a pair as lm-eval does; encode the continuation alone if it merges into the context without tokens."""
        before, scored = super()._encode_pair(context, continuation)
        if not scored:
            spaces = context[len(context.rstrip()) :]
            scored = self.tok_encode(spaces + continuation, add_special_tokens=False)
        return before, scored

    def _loglikelihood_tokens(self, requests: list[Any], **unused: Any) -> list[tuple[float, bool]]:
        texts = []
        for _, context, continuation in requests:
            kept = (context + continuation)[-(self.max_length + 1) :]
            texts.append((kept[: -len(continuation)], kept[-len(continuation) :]))
        answers = [(one.logprob, one.greedy) for one in score(self.model, texts)]
        for (key, _, _), answer in zip(requests, answers, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            with _named(request):
                check_token_ids(self.model, [*{*tokens}])
            for window in utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
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
        prepared = []  # check all requests before generating, so that an invalid one wastes no work
        for numbers in groups.values():
            with _named(requests[numbers[0]]):
                options, until = self._task_options(requests[numbers[0]].args[1])
            prompts = []
            for number in numbers:
                with _named(requests[number]):
                    prompt = self.tok_encode(requests[number].args[0])[-(self.max_length - options.max_new_tokens) :]
                    check_prompt(self.model, prompt)
                prompts.append(prompt)
            prepared.append((numbers, options, until, prompts))
        for numbers, options, until, prompts in prepared:
            each = [options] * len(prompts)
            if not options.sampling.greedy:  # lm-eval seeds torch, from which each text gets its own seed
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

    def _task_options(self, generation_kwargs: dict[str, Any]) -> tuple[DecodeOptions, list[str]]:
        eos = None if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)
        options, until = task_options(self._options, generation_kwargs, self.model.causal_lm.generation_config, eos)
        options.check(self.model)
        if options.max_new_tokens >= self.max_length:
            raise UserError(
                f"{options.max_new_tokens} tokens to generate (max_gen_toks) leave no room for the prompt in the "
                f"model's context of {self.max_length}: ask for fewer"
            )
        return options, until


@contextmanager
def _named(request: Instance) -> Iterator[None]:
    """Prefix the message of a UserError with the task and document, and with the choice for likelihood requests."""
    try:
        yield
    except UserError as error:
        where = f"task {request.task_name}, document {request.doc_id}"
        if request.request_type == "loglikelihood":
            where += f", continuation {request.idx} {request.args[1][:40]!r}"
        raise UserError(f"{where}: {error}") from None
