"""Ranks that start from imported models, by default in TP 2 x PP 2, and save them as they are:

torchrun --nproc-per-node 4 -m tests.checkpoint.start_and_save IMPORTED OUTPUT SHARDS NAME ...
"""

import argparse
import json
from pathlib import Path

TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}


def main():
    import yaml

    from tidar_megatron.config import build_config
    from tidar_megatron.distributed.groups import shut_down
    from tidar_megatron.training.trainer import Trainer

    parser = argparse.ArgumentParser()
    for name in ("imported", "output", "shards"):
        parser.add_argument(name, type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--parallel", type=json.loads, default=TP2_PP2)
    parser.add_argument("--init-mask-token", default="keep")
    args = parser.parse_args()
    for name in args.names:
        run = args.imported / name / "run"
        bf16 = yaml.safe_load((run / "resolved_config.yaml").read_text())["training"]["bf16"]
        config = build_config(
            {
                "tidar": {"block_size": 4, "init_mask_token": args.init_mask_token},
                "data": {"train_data": str(args.shards), "seq_length": 32},
                "training": {"init_from": str(run), "bf16": bf16, "global_batch_size": 4},
                "parallel": args.parallel,
                "checkpoint": {"save": str(args.output / name)},
            }
        )
        trainer = Trainer.build(config)
        trainer.write_run_folder()
        trainer.save()
        trainer.close()
    shut_down()


if __name__ == "__main__":
    main()
