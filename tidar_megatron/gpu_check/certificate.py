"""Section 9: the certificate: every plan's greedy and sampled output against transformers' ``generate``."""

import torch

from tidar_megatron.evaluation.certificate import certify, plans
from tidar_megatron.gpu_check.models import random_causal_lm, random_prompt
from tidar_megatron.gpu_check.setting import Setting
from tidar_megatron.inference.loading import load_model


def check(setting: Setting) -> None:
    """Find the certificate of a model with random weights, in float32, and in bfloat16 if there is time."""
    folder = setting.folder / "model"
    random_causal_lm("small", setting, torch.float32, spread=0.1).save_pretrained(folder)
    prompts, new, lengths = setting.size((8, 48, (8,)), (2, 8, (4,)))
    for dtype, samples in (("float32", setting.size(300, 50)), ("bfloat16", 0)):
        if not setting.in_time():
            break
        model = load_model(folder, str(setting.device), dtype)
        texts = [random_prompt(model, setting.size(40, 6) + 5 * number, number) for number in range(prompts)]
        runs = plans(lengths)
        if setting.tiny:
            del runs["auto"]  # it times forwards for seconds first
        certificate = certify(model, folder, texts, new, runs, samples)
        setting.found[dtype] = certificate.as_dict()
        different = certificate.prompts - certificate.identical - certificate.ties
        same = f"{certificate.identical} of {certificate.prompts} prompts identical in every run"
        setting.summary.append(f"{dtype}: {same}, {certificate.ties} tied, {different} different")
        if dtype == "float32":
            setting.require(certificate.holds, f"{dtype}: the certificate does not hold")
        else:  # narrow dtypes tie often, so only differences count
            setting.require(not different, f"{dtype}: {different} prompts differ by more than a tie")
