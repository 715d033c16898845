# Sourced by the launchers, in the repository root: `use_venv [EXTRA]` puts a virtual environment that holds cai_jax, with
# the optional dependencies EXTRA of setup.py, first on the PATH. One that is active is used as it is; otherwise .venv is
# made with $PYTHON, or with the first Python on the PATH that is new enough.

die() {
  echo "$0: $*" >&2
  exit 1
}

python_version() {  # PYTHON: its version, e.g. 3.11.7, or "not found" when it cannot be run
  "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null || echo "not found"
}

new_enough() {  # PYTHON
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {  # prints the Python to make .venv with
  local candidates=("${PYTHON:-python3}") candidate tried=()
  [[ -n "${PYTHON:-}" ]] || candidates+=(python3.13 python3.12 python3.11)
  for candidate in "${candidates[@]}"; do
    if new_enough "$candidate"; then
      echo "$candidate"
      return
    fi
    tried+=("$candidate ($(python_version "$candidate"))")
  done
  die "cai_jax needs Python 3.11 or newer; tried ${tried[*]}. Install one, or name it: PYTHON=/path/to/python3.12 $0"
}

make_venv() {  # makes .venv unless it is there and whole
  local python has
  if .venv/bin/python -m pip --version >/dev/null 2>&1; then
    has=$(python_version .venv/bin/python)
    [[ -z "${PYTHON:-}" || "$has" == "$(python_version "$PYTHON")" ]] ||
      die ".venv has Python $has, but PYTHON=$PYTHON is $(python_version "$PYTHON"); remove .venv, or unset PYTHON"
  else
    python=$(find_python)
    "$python" -m venv .venv || die "$python could not make .venv; on Debian and Ubuntu install python3-venv first"
  fi
}

use_venv() {  # [EXTRA]
  local extra="${1:-}" python stamp want
  if [[ -z "${VIRTUAL_ENV:-}" ]]; then
    make_venv
    VIRTUAL_ENV="$PWD/.venv"
  fi
  export VIRTUAL_ENV PATH="$VIRTUAL_ENV/bin:$PATH"
  python="$VIRTUAL_ENV/bin/python"
  new_enough "$python" ||
    die "cai_jax needs Python 3.11 or newer; that of the environment $VIRTUAL_ENV is $(python_version "$python")"
  # What is installed there: this setup.py, from this folder, with these extras. [test] holds all that the others need.
  stamp="$VIRTUAL_ENV/.cai_jax_installed"
  want="$("$python" -c 'import hashlib; print(hashlib.sha256(open("setup.py", "rb").read()).hexdigest())') $PWD"
  case "$(cat "$stamp" 2>/dev/null)" in
    "$want [$extra]" | "$want [test]") return ;;
  esac
  rm -f "$stamp"
  "$python" -m pip install --quiet --disable-pip-version-check -e ".${extra:+[$extra]}"
  echo "$want [$extra]" >"$stamp"
}
