#!/bin/sh
# The main job on an embedded default: no GPU, no network, no weights to download.
# A small CogVideoX pipeline with random weights is made, planned for this machine, and run.
#
#     sh examples/quickstart.sh [FOLDER]      (a temporary folder when left out)
set -eu
here=$(dirname "$0")
work=${1:-$(mktemp -d)}
mkdir -p "$work"

run() {
    printf '\n$ %s\n' "$*"
    "$@"
}

run vramplan detect
run python "$here/make_pipeline.py" cogvideox-small "$work/cogvideox-small"
run vramplan -q plan "$work/cogvideox-small" --height 64 --width 64 --frames 9 --steps 2 -o "$work/plan.yaml"
run vramplan -q apply "$work/plan.yaml" --prompt "a panda playing a guitar" -o "$work/panda.gif"

# The same for the real model and a card this machine may not have: sizes only, nothing is loaded.
run vramplan -q plan cogvideox-5b --device rtx-4070 --ram 64GiB -o "$work/cogvideox-5b.yaml"
run vramplan code "$work/cogvideox-5b.yaml"
printf '\neverything is in %s\n' "$work"
