"""``python -m tidar_megatron COMMAND``: the command ``tidar``."""

from tidar_megatron.cli.main import main

if __name__ == "__main__":
    main()
