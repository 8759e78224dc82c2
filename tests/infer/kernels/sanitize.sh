#!/bin/sh
# The kernel, op and native step tests under AddressSanitizer and UndefinedBehaviorSanitizer: sh tests/infer/kernels/sanitize.sh
# VENV (default .venv) holds python, cmake's build tools and pytest. The instrumented extension goes to build/sanitize,
# beside a copy of the package's links, so the ordinary one stays in place.
set -eu
cd "$(dirname "$0")/../../.."
VENV="$(cd "${VENV:-.venv}" && pwd)"
PATH="$VENV/bin:$PATH"
export PATH
command -v cmake >/dev/null || { echo "cmake is missing: pip install cmake"; exit 1; }
python -c 'import nanobind' || { echo "nanobind is missing: pip install nanobind"; exit 1; }
cmake -S . -B build/sanitize -DQUANTBENCH_SANITIZE=address,undefined -DPython_EXECUTABLE="$VENV/bin/python" >build/sanitize.log
cmake --build build/sanitize -j 2 >>build/sanitize.log
rm -rf build/sanitize/src && mkdir -p build/sanitize/src/quantbench
for entry in src/quantbench/*; do
  case "$entry" in *.so | *__pycache__) ;; *) ln -s "$PWD/$entry" build/sanitize/src/quantbench/ ;; esac
done
cp build/sanitize/_kernels*.so build/sanitize/src/quantbench/
# -s: pytest would swallow the report of an abort. Leaks are python's own; the interpreter is not instrumented, so both runtimes are loaded before it
ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" \
PYTHONPATH=build/sanitize/src python -m pytest -s -p no:cacheprovider \
  tests/infer/ops tests/infer/kernels tests/infer/engine/test_native.py "$@"
