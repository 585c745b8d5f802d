#!/usr/bin/env bash
# Makes the bundled shapes checkpoints from nothing: draw, codec, probe, encode, teacher, causal init, Self Forcing, diagonal.
# Every stage resumes where it stopped when the script runs again; finished stages are skipped.
# Usage: scripts/reproduce_shapes.sh [STAGE ...]   (default: all stages in order)
set -euo pipefail
cd "$(dirname "$0")/.."
command -v vidistill >/dev/null || { echo "activate an environment with vidistill first: pip install -e '.[eval]'" >&2; exit 1; }

train() { [ -f "${3:-runs}/$1/$1.json" ] || vidistill train "$2"; } # name config [out]: unless it is finished
stage() { # name config [out]: train, then bundle; a stage that refines a checkpoint has its name and a folder (out) of its own
  train "$@"
  cp "${3:-runs}/$1/$1.json" "${3:-runs}/$1/$1.safetensors" vidistill/zoo/
}

frames() { vidistill data shapes data/shapes/frames --episodes 512; vidistill data shapes data/shapes-heldout/frames --split held_out --episodes 64; vidistill data shapes data/shapes-judge/frames --split judge --episodes 8192 --frames 8; }
codec() { stage shapes-codec configs/shapes/codec.yaml; }
probe() { # the judge of vidistill eval
  [ -f vidistill/zoo/probes/shapes-probe.json ] || python -c 'from vidistill.evaluation.probes import SHAPES_PROBE, make_probe; print(make_probe("data/shapes-judge/frames", "data/shapes-heldout/frames", "vidistill/zoo/probes/shapes-probe", cfg=SHAPES_PROBE))'
}
latents() { vidistill data shapes data/shapes/latents --episodes 4096 --frames 81 --codec shapes-codec; }
teacher() { stage shapes-teacher configs/shapes/teacher.yaml; }
tf() { train shapes-tf configs/shapes/tf.yaml; }
selfforcing() {
  stage shapes-selfforcing configs/shapes/selfforcing.yaml
  stage shapes-selfforcing configs/shapes/long.yaml runs/long
}
diagonal() { stage shapes-diagonal configs/shapes/diagonal-long.yaml runs/long; }

stages="frames codec probe latents teacher tf selfforcing diagonal"
for name in "${@:-}"; do
  case " $stages  " in
    *" $name "*) for s in ${name:-$stages}; do echo "== $s"; $s; done ;;
    *) echo "unknown stage $name; stages: $stages" >&2; exit 2 ;;
  esac
done
