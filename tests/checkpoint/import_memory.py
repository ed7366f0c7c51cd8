"""Import a model and tell how far the process's own memory grew, files that are mapped aside: one line of JSON.

HF OUTPUT [INIT_MASK_TOKEN MASK_TOKEN_ID]
"""

import json
import sys
import threading
import time
from pathlib import Path

from tidar_megatron.huggingface.convert import import_run


def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main():
    before, peak, done = anonymous(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.002)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    import_run(sys.argv[1], sys.argv[2], None, *sys.argv[3:4], *map(int, sys.argv[4:]))
    done.set()
    watching.join()
    print(json.dumps({"anonymous_bytes": peak - before}))


if __name__ == "__main__":
    main()
