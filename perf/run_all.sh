#!/usr/bin/env bash
# Everything that a machine with a CUDA GPU can tell about this library, by estimate in 20 minutes:
#
#     perf/run_all.sh OUTDIR [--dry] [STEP...]
#
# what only a GPU can answer (`perf/questions.py`), kernel tests on the device, compute-sanitizer where it is installed, a
# quick benchmark, the search for tiles, and the benchmark of what it found; or only the steps that are named: info
# questions tests memcheck racecheck initcheck bench tune bench-tuned. A step takes at most 10 minutes. Run it again with
# the same OUTDIR to go on where it stopped, until it says that all is done (exit code 0; 75: time was up; 1: a step
# failed, see its log in OUTDIR). --dry: in Triton's interpreter on the CPU, at tiny sizes. PYTHON: the interpreter.
set -uo pipefail
usage="usage: perf/run_all.sh OUTDIR [--dry] [STEP...]"
out=${1:?$usage}
shift
mode=
[ "${1:-}" != --dry ] || { mode=--dry; shift; }
steps=" $* "
for name in "$@"; do
    case " info questions tests memcheck racecheck initcheck bench tune bench-tuned " in
        *" $name "*) ;;
        *) echo "unknown option or step $name; $usage" >&2; exit 2 ;;
    esac
done
python=${PYTHON:-python}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2

if [ "$mode" = --dry ]; then
    export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
    device=(--device cpu --tiny --filter 3x3-hv,linear,gram)
    tuning=(--budget 8)
    questions=(--tiny)
    tests=(-m "slow or not slow" -k "kernels_are_exact and pixel")
else
    export TRITONSYM_TEST_DEVICE=cuda
    device=(--device cuda --budget 150)
    tuning=()
    questions=()
    tests=(-n 8 -m "slow or not slow" -k "not compile and not spill")
fi

code=0
step() {  # NAME COMMAND...: once, at most 10 minutes
    local name=$1
    shift
    [[ -z "${steps// }" || "$steps" == *" $name "* ]] || return
    [ -e "$out/$name.done" ] && { echo "== $name: done before"; return; }
    echo "== $name: $*"
    timeout 600 "$@" 2>&1 | tee "$out/$name.log"
    local status=${PIPESTATUS[0]}
    if [ "$status" = 0 ]; then
        touch "$out/$name.done"
    elif [ "$status" = 75 ] || [ "$status" = 124 ]; then
        [ "$code" = 0 ] && code=75
    else
        echo "== $name FAILED ($status)"
        code=1
    fi
}

run=("$python" -m tritonsym)
step info "${run[@]}" info
step questions "$python" -m tritonsym.perf.questions "${questions[@]}"
step tests "$python" -m pytest -q "${tests[@]}" tests/test_kernels_*.py
if command -v compute-sanitizer >/dev/null; then  # of small cases: it is slow
    for tool in memcheck racecheck initcheck; do
        step "$tool" compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 9 \
            "$python" -m pytest -q -p no:xdist -m "slow or not slow" tests/test_kernels_*.py \
            -k "(kernels_are_exact and (pixel or tied)) or (kernels_equal and 64) or kernel_equals"
    done
fi
export XDG_CACHE_HOME=$out/untuned
step bench "${run[@]}" bench "${device[@]}" --quick --resume --output "$out/bench.json"
export XDG_CACHE_HOME=$out/tuned  # plans take from here what `tune` finds
step tune "${run[@]}" tune "${device[@]}" "${tuning[@]}" --output "$out/tuned.json"
[ -e "$out/tune.done" ] && step bench-tuned "${run[@]}" bench "${device[@]}" --quick --resume --output "$out/bench-tuned.json"
case $code in
    0) echo "All done: $out" ;;
    75) echo "Time was up: run the same command again" ;;
    *) echo "Failed: see the logs in $out" ;;
esac
exit $code
