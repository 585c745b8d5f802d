#!/usr/bin/env bash
# Makes the bundled talker checkpoints from nothing: draw and speak, codec, encode, teacher, causal init, plain Self Forcing,
# the improved recipe. Every stage resumes where it stopped when the script runs again; finished stages are skipped.
# Usage: scripts/reproduce_talker.sh [STAGE ...]   (default: all stages in order)
set -euo pipefail
cd "$(dirname "$0")/.."
command -v vidistill >/dev/null || { echo "activate an environment with vidistill first: pip install -e '.[audio,eval]'" >&2; exit 1; }

train() { [ -f "runs/$1/$1.json" ] || vidistill train "$2"; } # name config: unless it is finished
stage() { # name config: train, then bundle
  train "$1" "$2"
  cp "runs/$1/$1.json" "runs/$1/$1.safetensors" vidistill/zoo/
}

frames() { vidistill data talker data/talker/frames --episodes 384; vidistill data talker data/talker-heldout/frames --split held_out --episodes 64; }
codec() { stage talker-codec configs/talker/codec.yaml; }
verifier() { # knows faces, for vidistill eval
  [ -f vidistill/zoo/probes/talker-face.json ] || python -c 'from vidistill import checkpoint; from vidistill.evaluation.verifier import make_verifier; print(make_verifier("vidistill/zoo/probes/talker-face", checkpoint.load("talker-codec", "codec").net))'
}
latents() { # a fifth of the clips has something wrong, as collected video has
  vidistill data talker data/talker/latents --episodes 2048 --faults 0.2 --codec talker-codec
  vidistill data talker data/talker-heldout/latents --split held_out --episodes 64 --codec talker-codec
}
starts() { # pictures to begin from: held-out people
  python -c 'from pathlib import Path; from vidistill.worlds.talker.recorder import write_starts; write_starts(Path("vidistill/zoo/talker-starts"), 6)'
}
teacher() { stage talker-teacher configs/talker/teacher.yaml; }
init() { stage talker-init configs/talker/init.yaml; }
selfforcing() { stage talker-selfforcing configs/talker/selfforcing.yaml; }
improved() { stage talker-improved configs/talker/improved.yaml; }

stages="frames codec verifier latents starts teacher init selfforcing improved"
for name in "${@:-}"; do
  case " $stages  " in
    *" $name "*) for s in ${name:-$stages}; do echo "== $s"; $s; done ;;
    *) echo "unknown stage $name; stages: $stages" >&2; exit 2 ;;
  esac
done
