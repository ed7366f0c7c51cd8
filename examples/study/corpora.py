"""Write the studies' corpora: GeoNames' cities (bytes) and Python's standard library (BPE of 2048; SmolLM2's ids).

python examples/study/corpora.py data/study cities stdlib
"""

import json
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TOKENIZERS = {"cities": "byte", "stdlib": "bpe:2048", "smollm2": str(ROOT / "runs/smollm2/hf")}
LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "pydoc_data", "encodings"}


def write_stdlib(path: Path) -> int:
    """Write the sources of Python's standard library, one document per file, sorted by name; return the file count."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [file for file in sorted(library.rglob("*.py")) if not LEFT_OUT & {*file.relative_to(library).parts}]
    with path.open("w", encoding="utf-8") as out:
        for file in files:
            text = file.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                out.write(json.dumps({"text": text}) + "\n")
    return len(files)


def prepare(folder: Path, names: Sequence[str]) -> None:
    """Write the missing corpora to ``folder/NAME/train`` and ``folder/NAME/valid``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (folder / name / "valid").exists():
            continue
        texts = folder / f"{name}.jsonl"
        if name == "cities":
            subprocess.run([sys.executable, ROOT / "examples/quickstart/cities.py", texts], check=True)
        else:
            write_stdlib(texts)
        command = [sys.executable, ROOT / "tools/prepare_data.py", "--input", texts, "--tokenizer", TOKENIZERS[name]]
        command += ["--output", folder / name / "train", "--overwrite", "--held-out-fraction", "0.05"]
        subprocess.run([*map(str, command), "--held-out-output", str(folder / name / "valid")], check=True)


if __name__ == "__main__":
    prepare(Path(sys.argv[1]), sys.argv[2:])
