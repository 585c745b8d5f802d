#!/usr/bin/env bash
# Checks the project in an environment of its own: ruff, mypy, then the CPU test-suite.
#
#   bash scripts/test.sh                     everything a change must pass
#   bash scripts/test.sh -k memory -x        arguments go to pytest
#   bash scripts/test.sh -m "gpu or slow"    a later -m replaces the default selection
#   bash scripts/test.sh -n 0                in one process (the default: one a core, four at most)
#
# VIDISTILL_VENV    where the environment lives (default .venv-test); reused while pyproject.toml and constraints stay the same
# VIDISTILL_TORCH   the torch to install (default torch==2.13.0); installed first, so that nothing else picks a build
# VIDISTILL_PYTHON  the Python to build the environment with (default: the first of python3.11, python3, python that is 3.11 or newer)
# CI=true           a missing browser is an error, not a reason to skip
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv="${VIDISTILL_VENV:-.venv-test}"
torch="${VIDISTILL_TORCH:-torch==2.13.0}"
browsers="chromium chromium-browser google-chrome google-chrome-stable"

. scripts/environment.sh

find_browser() {
    local name
    if [ -n "${VIDISTILL_BROWSER:-}" ]; then
        command -v "$VIDISTILL_BROWSER"
        return
    fi
    for name in $browsers; do
        if command -v "$name"; then return; fi
    done
    return 1
}

# The page is tested in a real browser, handed to the tests in VIDISTILL_BROWSER; without one those tests skip and say so.
make_browser() {
    local found
    if ! find_browser >/dev/null && [ -z "${VIDISTILL_BROWSER:-}" ] && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        say "installing chromium"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } >/dev/null ||
            say "apt-get could not install chromium"
    fi
    if found="$(find_browser)"; then
        export VIDISTILL_BROWSER="$found"
        return
    fi
    local how="no browser found (tried ${VIDISTILL_BROWSER:-$browsers}). Debian or Ubuntu, as root: apt-get install chromium;
    Fedora: dnf install chromium; macOS: brew install --cask chromium; or name one with VIDISTILL_BROWSER=/path/to/browser."
    if [ "${CI:-}" = true ]; then die "$how"; fi
    say "$how The browser tests will be skipped."
}

make_environment "$venv" "$torch" dev
make_browser
export PATH="$(cd "$venv" && pwd)/bin:$PATH"
# Tests run side by side, file by file, and share the cores: most are too small for a second thread.
cores="$(python -c 'import os; print(os.cpu_count() or 1)')"
workers="$((cores < 4 ? cores : 4))"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores / workers))}"

say "ruff check"
ruff check --quiet .
say "ruff format --check"
ruff format --quiet --check . || die "some files are not formatted; run: ruff format ."
say "mypy"
mypy --no-error-summary
say "pytest"
exec python -m pytest -n "$workers" --dist loadfile -m "not gpu and not slow and not weights" "$@"
