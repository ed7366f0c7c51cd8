#!/usr/bin/env bash
# Copy a folder to a node's local disk: stage.sh SOURCE TARGET. Complete files that are already there are skipped.
#
# A file gets its name only once it is complete, with its source's modification time. So a file with the same size and
# time as its source is complete, and any other file, such as the remains of a killed `cp`, is copied again.
set -euo pipefail
source=$1 target=$2
mkdir -p "$target"
exec 9>"$target/.staging"
flock 9 # another job on this node may be copying the same folder
find "$target" -name '*.staging-partial' -type f -exec rm -f {} +
size_and_time() { stat -L -c '%s %y' "$1" 2>/dev/null || true; }
(cd "$source" && find -L . -type f -print0) | while IFS= read -r -d '' file; do
  from=$source/$file to=$target/$file
  if [[ $(size_and_time "$from") != "$(size_and_time "$to")" ]]; then
    mkdir -p "${to%/*}"
    cp --preserve=timestamps "$from" "$to.staging-partial"
    mv -f "$to.staging-partial" "$to"
  fi
done
