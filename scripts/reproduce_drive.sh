#!/usr/bin/env bash
# Makes the driving world from nothing: record the car, make a project as `vidistill new` does, train it by the configs of
# configs/drive. Every stage resumes where it stopped when the script runs again; finished stages are skipped.
# Usage: scripts/reproduce_drive.sh [STAGE ...]   (default: all stages in order)
set -euo pipefail
cd "$(dirname "$0")/.."
command -v vidistill >/dev/null || { echo "activate an environment with vidistill first: pip install -e '.[gym,eval]'" >&2; exit 1; }

frames() {
  vidistill data gym data/drive --env vidistill.worlds.drive.env:Drive-v0 --policy vidistill.worlds.drive.driver:drive \
    --episodes 320 --validation 32 --test 48 --frames 129
}
project() { # what to start from and pictures to begin with are made here; numbers of steps are those of configs/drive
  [ -f runs/drive/plan.json ] || vidistill new runs/drive --data data/drive --budget 3h
  for name in codec teacher tf selfforcing diagonal; do cp "configs/drive/$name.yaml" runs/drive/; done
}
train() { runs/drive/run.sh; }
judge() { vidistill eval runs/drive/runs/diagonal/diagonal --data data/drive; }

stages="frames project train judge"
for name in "${@:-}"; do
  case " $stages  " in
    *" $name "*) for s in ${name:-$stages}; do echo "== $s"; $s; done ;;
    *) echo "unknown stage $name; stages: $stages" >&2; exit 2 ;;
  esac
done
