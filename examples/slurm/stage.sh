#!/usr/bin/env bash
# Copy a folder onto a node's own disk: stage.sh SOURCE TARGET. What is there already, whole, is left.
#
# A file appears under its name only when it is whole, with the time of its source; so one of the same size and time was
# copied to its end, and whatever else is there, such as what a killed `cp` left, is copied anew.
set -euo pipefail
source=$1 target=$2
mkdir -p "$target"
exec 9>"$target/.staging"
flock 9 # another job of this node may be at it
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
