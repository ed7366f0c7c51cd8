"""The imports that the processes of tests/ranks.py find done; none of them starts a thread or a process group."""

import gc
import os
import warnings

gc.disable()  # imports leave no garbage
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read as torch is imported; tools/pretrain.py sets it as well
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that are not installed
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    import tidar_megatron.huggingface.convert
    import tidar_megatron.inference.engine
    import tidar_megatron.training.layout_report
    import tidar_megatron.training.loop  # noqa: F401

gc.enable()
gc.collect()
gc.freeze()  # the collections of a forked process leave the imports alone, and their memory shared
