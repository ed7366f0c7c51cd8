#!/usr/bin/env bash
# SmolLM2-135M writes with the draft weights in adapter/, which were trained as drafts.sh does and cut to rank 16. In a
# terminal each colour is what one forward committed. `make demo` runs this script.
set -euo pipefail
cd "$(dirname "$0")/../.."

for prompt in \
  'Question: Where is Lisbon, and what can a visitor see there?

Answer:' \
  'def fibonacci(n):
    """Return the first n Fibonacci numbers as a list."""
' \
  'Here is a description of a function:

Return a copy of the string with leading and trailing whitespace removed.

The same description as a list of points:

'; do
  printf '%s' "$prompt"
  tidar generate --model runs/smollm2/hf --adapter examples/smollm2/adapter --plan 1:8 --max-new-tokens 100 --prompt "$prompt"
  echo
done
