# Sourced by the scripts beside it: the Python to build an environment with, and what goes into one.

say() { printf '==> %s\n' "$*" >&2; }
die() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in ${VIDISTILL_PYTHON:-python3.11 python3 python}; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    die "needs Python 3.11 or newer with the venv module; tried: ${VIDISTILL_PYTHON:-python3.11 python3 python}." \
        "Install it (Debian: apt-get install python3.11 python3.11-venv) or name one with VIDISTILL_PYTHON=/path/to/python."
}

# make_environment VENV TORCH EXTRAS: builds it, or keeps one built from the same files, torch, Python and folder.
make_environment() {
    local venv="$1" torch="$2" extras="$3" python stamp
    python="$(find_python)"
    stamp="$("$python" -c 'import hashlib, pathlib, sys
files = b"".join(pathlib.Path(name).read_bytes() for name in ("pyproject.toml", "scripts/constraints.txt"))
print(hashlib.sha256(files).hexdigest(), *sys.argv[1:], sys.version.split()[0])' "$torch" "$extras" "$PWD")"
    if [ "$(cat "$venv/vidistill.stamp" 2>/dev/null)" = "$stamp" ] && "$venv/bin/python" -c '' 2>/dev/null; then
        return
    fi
    say "building $venv with $("$python" --version) and $torch"
    "$python" -m venv --clear "$venv"
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    "$venv/bin/python" -m pip install --quiet --upgrade pip
    "$venv/bin/python" -m pip install --quiet "$torch"
    "$venv/bin/python" -m pip install --quiet --prefer-binary -c scripts/constraints.txt "$torch" -e ".[$extras]"
    printf '%s\n' "$stamp" >"$venv/vidistill.stamp"
}
