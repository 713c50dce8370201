#!/usr/bin/env bash
# Everything that needs a GPU, in stages: see gpu_check.py. PYTHON names the interpreter.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_check.py" "$@"
