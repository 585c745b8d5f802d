#!/usr/bin/env bash
# Prints the speed figures of a CPU that README names: run it on a quiet machine, from the root of the repository.
#   bash scripts/speed.sh [THREADS]      default: 2; doom-relic really walks for ten minutes
# Each block is one run: contenders alternate, at least 5 rounds, medians and ranges; the matmul peak is of the same run.
set -euo pipefail
shape=(dim=384 layers=8 heads=6 ffn=1536 text=512x4096 latent=16x16x28 chunk=3 chunks=8 steps=4 threads="${1:-2}")
bench() {
    printf '\n== vidistill bench %s\n' "$*"
    vidistill bench --json "$@"
}

bench --random-weights "${shape[@]}" --profile --batch 2                          # passes against the matmul peak
bench --random-weights "${shape[@]}" --linears packed --profile                   # ... beside plain linear layers
bench --random-weights "${shape[@]}" --linears bf16 || true                       # a CPU without bfloat16 products says so
bench --random-weights "${shape[@]}" --linears int8 || true                       # needs torchao
bench --random-weights "${shape[@]}" --compile                                    # compiled beside eager
for memory in "sinks=0" "sinks=3" "history=60" "history=60 entries=int8"; do      # 1, 10 and 60 minutes of stream
    bench --random-weights "${shape[@]}" rounds=1 $memory --growth
done
bench doom --vs doom-teacher                                                      # small worlds, decode included
bench doom --compile --vs doom-teacher
bench doom --linears packed --vs doom
bench doom --growth
bench doom-diagonal --vs doom-selfforcing
bench doom-diagonal --vs doom-teacher
bench doom-relic --growth --growth-run 10
bench talker --vs talker-teacher
bench shapes-diagonal --vs shapes-selfforcing
bench shapes-diagonal --vs shapes-teacher
