"""lm-eval's command line with the model ``tidar`` registered.

python -m tidar_megatron.evaluation --model tidar --model_args pretrained=FOLDER --tasks ...
"""

from tidar_megatron.errors import UserError
from tidar_megatron.program import run_tool


def main() -> None:
    """Run lm-eval's command line after registering the model."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        raise UserError("tasks need lm-eval: run make eval, or pip install lm-eval") from None
    import tidar_megatron.evaluation.lm_eval_model  # noqa: F401 - its decorator registers the model

    cli_evaluate()


if __name__ == "__main__":
    run_tool(main)
