#!/usr/bin/env bash
# Everything that docs/cuda.md shows of a GPU, in one run of some minutes: tests, speed, agreement, sanitizers.
#
#   benchmarks/gpu.sh OUT [CHECKPOINT...]
#
# From the repository's root, with quantbench importable. Each part leaves its log in OUT and is followed by the next
# whatever it says; the exit status is the number of parts that failed. CHECKPOINTs are compared with the CPU; REFERENCE
# names a folder that keeps what numpy computes of them (benchmarks/cuda_agreement.py). PYTHON names the interpreter.
set -u
if [ $# -lt 1 ]; then
    sed -n '2,8p' "$0" >&2
    exit 2
fi
out=$1
shift
python=${PYTHON:-python}
failed=0
mkdir -p "$out" || exit 2

part() { # NAME COMMAND...: runs a command, its output in NAME.txt
    local name=$1 start=$SECONDS
    shift
    "$@" >"$out/$name.txt" 2>&1
    local status=$?
    [ $status -eq 0 ] || failed=$((failed + 1))
    echo "$name: exit $status after $((SECONDS - start)) s"
}

part doctor "$python" -m quantbench doctor
part tests "$python" -m pytest -q tests/infer/cuda
part engine "$python" -m pytest -q tests/infer/engine -k cuda
part portable env QUANTBENCH_CUDA_PORTABLE=1 "$python" -m pytest -q tests/infer/cuda/test_gemm.py \
    tests/infer/cuda/test_attention.py tests/infer/cuda/test_rows.py
modes=()
for mode in bf16 a8w8 a8w8_fp8 a8w8c8 a8w8c8_dynamic a8w8_fp8c8_fp8 weight_only_int8 weight_only_int4; do
    modes+=(--mode "$mode")
done
part llama-3-8b sh -c '"$@" >"$0"' "$out/llama-3-8b.json" "$python" -m quantbench bench --config llama-3-8b \
    --random-weights --device cuda --batches 1,32,128,256 --profile --json "${modes[@]}"
part kernels "$python" benchmarks/cuda_kernels.py --json "$out/cuda-kernels.json"
if [ $# -gt 0 ]; then
    part agreement "$python" benchmarks/cuda_agreement.py "$@" --out "$out/agreement.json" ${REFERENCE:+--reference "$REFERENCE"}
fi
for tool in memcheck racecheck; do
    part $tool compute-sanitizer --tool $tool --error-exitcode 1 "$python" -m pytest -q \
        tests/infer/cuda/test_float16.py -k a_model
done
exit $failed
