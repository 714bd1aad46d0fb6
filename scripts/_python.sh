# Sourced by the commands that are Python programs: run_python NAME ARGUMENTS runs bnre_exp.cli.NAME in .venv, which it sets
# up the first time.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup_venv.sh"

run_python() {
    local name=$1
    shift
    setup_venv "$root" ""
    exec "$root/.venv/bin/python" -m "bnre_exp.cli.$name" "$@"
}
