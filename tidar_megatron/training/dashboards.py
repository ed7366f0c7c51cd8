"""W&B and TensorBoard dashboards to watch a run; the authoritative record is ``metrics.jsonl``."""

import json
import netrc
import os
import re
import secrets
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from tidar_megatron.config import Config
from tidar_megatron.files import replace_text

Values = dict[str, Any]
SAMPLE_COLUMNS = ("prompt", "text", "tokens_per_forward", "distinct_4grams")
RUN_ID = "wandb_run_id"  # a file in the run's folder


class Dashboard(Protocol):
    """The interface of a dashboard."""

    def write(self, iteration: int, values: Values) -> None:
        """Show the values of ``iteration``; nested names are joined by ``/``."""
        ...

    def samples(self, iteration: int, rows: list[Values]) -> None:
        """Show generations from the checkpoint of ``iteration``, one row each (``SAMPLE_COLUMNS``)."""
        ...

    def published(self, iteration: int, checkpoint: Path) -> None:
        """Note that the checkpoint of ``iteration`` is published in the folder ``checkpoint``."""
        ...

    def close(self) -> None:
        """Flush and close the dashboard."""
        ...


class WandB:
    """A Weights & Biases run: online if there is an API key, else offline.

    A resumed run continues the same W&B run. ``--wandb-log-checkpoints`` logs each checkpoint as an artifact.
    """

    def __init__(self, config: Config, folder: Path, console: Console) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE")
        if mode is None and not has_wandb_key():
            mode = "offline"
            upload = f"'wandb login', 'wandb sync {folder / 'wandb'}/*' upload it"
            console.print(f"W&B: no API key, so this run is kept offline; {upload}")
        known, name = folder / RUN_ID, config.logging.wandb_exp_name or folder.name
        identity = known.read_text().strip() if known.exists() and config.checkpoint.load else secrets.token_hex(4)
        self._artifacts = config.logging.wandb_log_checkpoints
        self.run = wandb.init(
            project=config.logging.wandb_project,
            name=name,
            id=identity,
            resume="allow",
            dir=str(folder),
            mode=mode,  # type: ignore[arg-type]
            config=json.loads(json.dumps(config, default=vars)),
            settings=wandb.Settings(silent=True),
        )
        self._name = name
        self._samples: list[list[Any]] = []
        if config.checkpoint.save:
            replace_text(known, identity)

    def write(self, iteration: int, values: Values) -> None:
        import wandb

        shown = flatten(values)
        if offsets := values.get("eval", {}).get("acceptance_by_offset"):
            table = wandb.Table(data=list(enumerate(offsets, 1)), columns=["offset", "acceptance"])
            title = "draft acceptance by offset in the block"
            shown["eval/acceptance"] = wandb.plot.line(table, "offset", "acceptance", title=title)
        self.run.log(shown, step=iteration)

    def samples(self, iteration: int, rows: list[Values]) -> None:
        import wandb

        self._samples += [[iteration, *(row[name] for name in SAMPLE_COLUMNS)] for row in rows]
        # logged with the current step: a separate step would make W&B drop later values of the current one
        table = wandb.Table(data=list(self._samples), columns=["iteration", *SAMPLE_COLUMNS])
        self.run.log({"samples": table}, commit=False)

    def published(self, iteration: int, checkpoint: Path) -> None:
        import wandb

        if self._artifacts:
            name = re.sub(r"[^A-Za-z0-9_.-]", "-", self._name)  # artifact names allow fewer characters than run names
            artifact = wandb.Artifact(f"{name}-checkpoint", "model", metadata={"iteration": iteration})
            artifact.add_dir(str(checkpoint))
            self.run.log_artifact(artifact, aliases=["latest", f"iteration-{iteration}"])

    def close(self) -> None:
        self.run.finish()


def has_wandb_key() -> bool:
    """Return whether W&B has an API key, from 'wandb login' or the environment."""
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].rstrip("/")
    try:
        return bool(os.environ.get("WANDB_API_KEY") or netrc.netrc(os.environ.get("NETRC")).authenticators(host))
    except (OSError, netrc.NetrcParseError):
        return False


class TensorBoard:
    """A dashboard that writes TensorBoard event files."""

    def __init__(self, folder: str, config: Config) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder)
        self.writer.add_text("config", f"```yaml\n{config.to_yaml()}```")
        offsets = ["Multiline", [r"eval/acceptance_by_offset/\d+"]]
        self.writer.add_custom_scalars({"drafts": {"acceptance by offset in the block": offsets}})

    def write(self, iteration: int, values: Values) -> None:
        for name, value in flatten(values).items():
            if isinstance(value, int | float):
                self.writer.add_scalar(name, value, iteration)

    def samples(self, iteration: int, rows: list[Values]) -> None:
        for number, row in enumerate(rows, 1):
            self.writer.add_text(f"samples/{number}", f"{row['prompt']} **|** {row['text']}", iteration)

    def published(self, iteration: int, checkpoint: Path) -> None:
        pass

    def close(self) -> None:
        self.writer.close()


def flatten(values: Values, prefix: str = "") -> Values:
    """Flatten nested values: ``{"eval": {"acceptance_by_offset": [..]}}`` -> ``{"eval/acceptance_by_offset/1": ..}``.

    Items of a list are numbered from 1.
    """
    flat: Values = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            flat |= {f"{prefix}{name}/{i}": item for i, item in enumerate(value, start=1)}
        else:
            flat[prefix + name] = value
    return flat
