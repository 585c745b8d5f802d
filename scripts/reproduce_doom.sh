#!/usr/bin/env bash
# Makes the bundled doom checkpoints from nothing: record, codec, encode, teacher, causal init, Self Forcing, diagonal.
# Every stage resumes where it stopped when the script runs again; finished stages are skipped.
# Usage: scripts/reproduce_doom.sh [STAGE ...]
# Default: frames starts codec decoder probe latents teacher tf selfforcing diagonal. The worlds that remember are left out, name
# their stages: relic, which records loops first; loops records alone.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v vidistill >/dev/null || { echo "activate an environment with vidistill first: pip install -e '.[doom,eval]'" >&2; exit 1; }

export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}" # huge pages: steps are 5 to 10 % shorter

train() { [ -f "${3:-runs}/$1/$1.json" ] || vidistill train "$2"; } # name config [out]: unless it is finished
stage() { # name config [out]: train, then bundle; a stage that refines a checkpoint has its name and a folder (out) of its own
  train "$@"
  cp "${3:-runs}/$1/$1.json" "${3:-runs}/$1/$1.safetensors" vidistill/zoo/
}

frames() { vidistill data doom data/doom/frames --episodes 640; vidistill data doom data/doom-heldout/frames --split held_out --episodes 64; }
starts() { # pictures to begin from: frames of held-out walks
  python - <<'PYTHON'
from vidistill.data.clips import Clips
from vidistill.io import save_png

frames = Clips("data/doom-heldout/frames").tensors["frames"]
for k, (walk, t) in enumerate([(60, 4), (43, 4), (54, 0), (57, 0), (38, 0), (47, 0), (49, 0), (36, 0)]):
    save_png(f"vidistill/zoo/doom-starts/{k:02d}.png", frames[walk, t].numpy())
PYTHON
}
codec() { stage doom-codec configs/doom/codec.yaml; }
decoder() { stage doom-codec configs/doom/codec-decoder.yaml runs/decoder; } # latents stay as they are
probe() { # the judge of vidistill eval
  [ -f vidistill/zoo/probes/doom-probe.json ] || python -c 'from vidistill.evaluation.probes import make_probe; print(make_probe("data/doom/frames", "data/doom-heldout/frames", "vidistill/zoo/probes/doom-probe"))'
}
latents() { vidistill data doom data/doom/latents --episodes 768 --codec doom-codec; }
teacher() {
  train doom-teacher-short configs/doom/teacher-short.yaml
  stage doom-teacher configs/doom/teacher.yaml
}
tf() { stage doom-tf configs/doom/tf.yaml; }
selfforcing() {
  stage doom-selfforcing configs/doom/selfforcing.yaml
  stage doom-selfforcing configs/doom/long.yaml runs/long
}
diagonal() {
  stage doom-diagonal configs/doom/diagonal.yaml
  stage doom-diagonal configs/doom/diagonal-long.yaml runs/long
}
loops() { vidistill data doom data/doom/loops --episodes 768 --palindromes 0.5 --codec doom-codec; }
relic() { # a student that remembers: its teacher, causal init, and the same training with three memories
  loops
  stage doom-relic-teacher configs/doom/relic-teacher.yaml
  train doom-relic-hybrid configs/doom/relic-hybrid.yaml
  for memory in relic relic-window relic-full; do stage "doom-$memory" "configs/doom/$memory.yaml"; done
  vidistill eval doom-relic --suite memory --json
}

default="frames starts codec decoder probe latents teacher tf selfforcing diagonal"
for name in "${@:-}"; do
  case " $default loops relic  " in
    *" $name "*) for s in ${name:-$default}; do echo "== $s"; $s; done ;;
    *) echo "unknown stage $name; stages: $default loops relic" >&2; exit 2 ;;
  esac
done
