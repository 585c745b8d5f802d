#!/usr/bin/env bash
# From nothing to a playable world: installs, records fresh episodes, distils the bundled teacher for five minutes,
# streams ten seconds from your student and from the bundled one, and compares speeds. 9 to 15 minutes on two cores.
#
# VIDISTILL_VENV   where the environment lives (default .venv)
# VIDISTILL_TORCH  the torch to install (default torch==2.13.0)
# VIDISTILL_PYTHON the Python to build it with (default: the first of python3.11, python3, python that is 3.11 or newer)
# VIDISTILL_SEED   seed of the first recorded episode (default: from the clock)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv="${VIDISTILL_VENV:-.venv}"
torch="${VIDISTILL_TORCH:-torch==2.13.0}"
out=out/quickstart
. scripts/environment.sh

make_environment "$venv" "$torch" doom,demo,eval
export PATH="$(cd "$venv" && pwd)/bin:$PATH"

rm -rf "$out"
say "recording 32 fresh episodes and encoding them with the bundled codec"
vidistill data doom "$out/latents" --episodes 32 --first "${VIDISTILL_SEED:-$(($(date +%s) % 900000))}" --codec doom-codec

say "stage 1: causal init of the bundled teacher (teacher forcing)"
vidistill train configs/doom/quickstart-tf.yaml
say "how good is it? (32 held-out clips)"
vidistill eval "$out/quickstart-tf/quickstart-tf" --clips 32 --glance

say "stage 2: Self Forcing, on the student's own rollouts"
vidistill train configs/doom/quickstart-selfforcing.yaml
say "how good is it now?"
vidistill eval "$out/quickstart-selfforcing/quickstart-selfforcing" --clips 32 --glance

walk=forward:24,turn_left:32,forward:24,turn_right+forward:16
say "ten seconds of your student, and of the bundled one"
vidistill generate "$out/quickstart-selfforcing/quickstart-selfforcing" -o "$out/yours.mp4" --seconds 10 --action "$walk"
vidistill generate doom -o "$out/bundled.mp4" --seconds 10 --action "$walk"

say "speed of the student against the teacher"
vidistill bench doom --vs doom-teacher

say "done"
echo "videos and contact sheets: $out/yours.mp4 $out/yours.png $out/bundled.mp4 $out/bundled.png"
echo "play it:                   $venv/bin/vidistill serve doom   (then open http://127.0.0.1:8000)"
