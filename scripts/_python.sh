# Sourced by the commands that are Python programs: run_python NAME "LIBRARIES" ARGUMENTS runs bnre_exp.cli.launch.NAME in
# the environment that it is started from, if that has the libraries, else in .venv. It installs nothing.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

run_python() {
    local name=$1 libraries=$2 python
    shift 2
    for python in ${PYTHON:+"$PYTHON"} python python3 "$root/.venv/bin/python"; do
        if _has "$python" "$libraries"; then
            export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
            exec "$python" -c "import sys; from bnre_exp.cli.launch import $name; sys.exit($name())" "$@"
        fi
    done
    echo "Error: neither the environment that this is started from nor $root/.venv has $libraries. Activate the one" \
        "that the runs were made in, or set PYTHON to its python; scripts/run --version makes $root/.venv." >&2
    exit 2
}

_has() {
    "$1" -c "import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))" $2 2>/dev/null
}
