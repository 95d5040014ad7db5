#!/usr/bin/env bash
# Run the demo, the scorer and the network mode with each Python from 3.10 on that pyenv or the system has.
# Each gets a virtual environment in build/pythons with the packages of ONNX Runtime and of the network mode.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$PWD/build/pythons
export ML_MODEL_FILE_WITH_PATH=$PWD/demo/model/model.onnx VOCAB_FILE=$PWD/demo/model/vocab.txt
export DATASET_FILE=$PWD/demo/dev.json SKIP_VERIFY_ACCURACY=1
score='{"exact_match": 86.82634730538922, "f1": 90.56021988656722}'
port=18500

check() { # check NAME PYTHON: the commands that MLCommons' automation runs
    local logs=$folder/$1/logs python=$2
    rm -rf "$logs"
    export LOG_PATH=$logs
    "$python" run.py --backend=onnxruntime --accuracy
    "$python" accuracy-squad.py --val_data "$DATASET_FILE" --log_file "$logs/mlperf_log_accuracy.json" \
        --vocab_file "$VOCAB_FILE" --out_file "$logs/predictions.json" | grep --fixed-strings "$score"
    "$python" run.py --backend=onnxruntime --quick | grep "^TRIAL"
    port=$((port + 1))
    "$python" run.py --backend=onnxruntime --network=sut --port=$port &
    local server=$!
    for _ in $(seq 60); do
        (exec 3<>"/dev/tcp/localhost/$port") 2>/dev/null && break
        sleep 0.5
    done
    "$python" run.py --network=lon --sut_server "http://localhost:$port" --accuracy
    kill "$server"
    wait "$server" || true
    "$python" accuracy-squad.py --val_data "$DATASET_FILE" --log_file "$logs/mlperf_log_accuracy.json" \
        --vocab_file "$VOCAB_FILE" --out_file "$logs/predictions.json" | grep --fixed-strings "$score"
}

failed=0 checked=0
for minor in 10 11 12 13; do
    python=$(find "${PYENV_ROOT:-$HOME/.pyenv}/versions" -path "*/3.$minor.*/bin/python3" 2>/dev/null | sort | tail -1)
    python=${python:-$(command -v "python3.$minor" || true)}
    if [ -z "$python" ]; then
        echo "Python 3.$minor: not on this machine"
        continue
    fi
    mkdir -p "$folder/3.$minor"
    log=$folder/3.$minor/log.txt
    # Not as the condition of an `if`, in which `set -e` has no effect.
    set +e
    (
        set -e
        "$python" -m venv "$folder/3.$minor/venv"
        "$folder/3.$minor/venv/bin/pip" install --disable-pip-version-check --quiet \
            -r requirements/onnxruntime.txt -r requirements/network.txt
        check "3.$minor" "$folder/3.$minor/venv/bin/python"
    ) >"$log" 2>&1
    status=$?
    set -e
    if [ "$status" -eq 0 ]; then
        echo "Python 3.$minor: passed"
    else
        echo "Python 3.$minor: failed; see $log"
        tail -3 "$log"
        failed=1
    fi
    checked=$((checked + 1))
done
[ "$checked" -gt 0 ] || { echo "no Python from 3.10 on was found; install one or add it to the PATH" >&2; exit 1; }
exit $failed
