# Sourced by scripts/run and scripts/test: setup_venv ROOT EXTRAS makes sure that ROOT/.venv has the package, installed
# in place, and its extras (a comma-separated list, or empty). It installs only when pyproject.toml, the interpreter or
# the place of the checkout changed; otherwise it costs a hash.

setup_venv() {
    local root=$1 extras=$2 venv=$1/.venv
    local stamp=$venv/.installed${extras:+-$extras}
    _venv_is_current "$root" "$stamp" && return
    # What the tests need includes what a run needs.
    [[ -z $extras ]] && _venv_is_current "$root" "$venv/.installed-test" && return

    mkdir -p "$venv"
    exec 9>"$venv/.lock"
    flock 9 2>/dev/null || true # two first runs at once; where flock is missing, they may both install
    if ! _venv_is_current "$root" "$stamp"; then
        _create_venv "$venv"
        echo "Installing bnre_exp and what it needs into $venv (the first time: some minutes and 6 GB) ..." >&2
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
            --editable "$root${extras:+[$extras]}" >&2
        _venv_state "$root" >"$stamp"
    fi
    exec 9>&-
}

_venv_state() {
    { echo "$1"; "$1/.venv/bin/python" --version; cat "$1/pyproject.toml"; } | sha256sum
}

_venv_is_current() {
    [[ -f $2 && -x $1/.venv/bin/python && $(<"$2") == "$(_venv_state "$1")" ]]
}

_create_venv() {
    local python=${PYTHON:-python3}
    [[ -x $1/bin/python ]] && "$1/bin/python" -m pip --version >/dev/null 2>&1 && return
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "Python 3.10 or newer is needed; '$python' is not. Set PYTHON=/path/to/python3." >&2
        exit 1
    fi
    if ! "$python" -m venv "$1" >&2; then
        echo "'$python -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2
        exit 1
    fi
}
