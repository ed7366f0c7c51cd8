"""Ranks that start from imported models in TP 2 x PP 2 and save them as they are:

torchrun --nproc-per-node 4 -m tests.checkpoint.start_and_save IMPORTED OUTPUT SHARDS NAME ...
"""

import sys
from pathlib import Path


def main():
    import yaml

    from tidar_megatron.config import build_config
    from tidar_megatron.distributed.groups import shut_down
    from tidar_megatron.training.trainer import Trainer

    imported, output, shards = map(Path, sys.argv[1:4])
    for name in sys.argv[4:]:
        run = imported / name / "run"
        bf16 = yaml.safe_load((run / "resolved_config.yaml").read_text())["training"]["bf16"]
        config = build_config(
            {
                "tidar": {"block_size": 4, "init_mask_token": "keep"},
                "data": {"train_data": str(shards), "seq_length": 32},
                "training": {"init_from": str(run), "bf16": bf16, "global_batch_size": 4},
                "parallel": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
                "checkpoint": {"save": str(output / name)},
            }
        )
        trainer = Trainer.build(config)
        trainer.write_run_folder()
        trainer.save()
        trainer.close()
    shut_down()


if __name__ == "__main__":
    main()
