#!/usr/bin/env bash
# Runs the fuzz targets, each for a while, from the seeds in fuzz/corpus. What libFuzzer
# learns goes to target/fuzz/corpus, where the next run finds it; what breaks a target goes to
# target/fuzz/artifacts, and this script fails.
#
#   scripts/fuzz.sh [SECONDS] [TARGET…]     default: 15 seconds for each target
#
# Plain cargo with the instrumentation that libFuzzer needs: no other toolchain, no cargo-fuzz
# (which can be used as well: `cargo fuzz run TARGET`). The code has next to no `unsafe`, so
# what is looked for are panics, overflows and broken promises; sanitizers would need nightly.
set -euo pipefail
cd "$(dirname "$0")/../fuzz"

seconds=${1:-15}
shift || true
targets=("$@")
if [ ${#targets[@]} -eq 0 ]; then
    mapfile -t targets < <(basename -s .rs targets/*.rs)
fi

out=$PWD/../target/fuzz
passes="-Cpasses=sancov-module"
for option in level=4 inline-8bit-counters pc-table trace-compares; do
    passes+=" -Cllvm-args=-sanitizer-coverage-$option"
done
# The workspace's static linking is left out: libFuzzer is C++.
RUSTFLAGS="$passes" CARGO_TARGET_DIR="$out" cargo build --quiet --release --locked --bins

run() {
    local target=$1 learnt=$out/corpus/$1 log=$out/$1.log
    mkdir -p "$learnt" "$out/artifacts"
    if ! "$out/x86_64-unknown-linux-gnu/release/$target" "$learnt" "corpus/$target" \
        -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 \
        -artifact_prefix="$out/artifacts/$target-" >"$log" 2>&1; then
        tail -40 "$log"
        echo "fuzz target $target failed; the input is in target/fuzz/artifacts" >&2
        return 1
    fi
    printf 'fuzz %-14s %10s runs, coverage %s\n' "$target" \
        "$(awk '/stat::number_of_executed_units/ { print $2 }' "$log")" \
        "$(awk '{ for (i = 1; i < NF; i++) if ($i == "cov:") cov = $(i + 1) } END { print cov }' "$log")"
}
export -f run
export seconds out

# As many at once as there are processors.
printf '%s\n' "${targets[@]}" | xargs -P "$(nproc)" -I TARGET bash -euo pipefail -c 'run TARGET'
