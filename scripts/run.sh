#!/usr/bin/env bash
# `make run`: from a clone to a program's output in a virtual machine. Each step does
# nothing where there is nothing to do, so a second run is up in seconds.
#
# Reads DATA_DIR, LISTEN, ONCE, WRENN (the binary) and MAKE from the environment.
set -euo pipefail

step() {
    local what=$1 start=$EPOCHREALTIME
    shift
    printf '\n==> %s\n' "$what"
    "$@"
    timings+=("$(printf '%-28s %8.1f s' "$what" "$(seconds_since "$start")")")
}

seconds_since() {
    awk -v a="$1" -v b="$EPOCHREALTIME" 'BEGIN { print b - a }'
}

# The server makes namespaces, firewall rules and users' processes: that takes root. The
# build does not.
as_root=()
if [ "$(id -u)" -ne 0 ]; then
    as_root=(sudo)
fi
timings=()

step "Debian packages" scripts/packages.sh run
step "build" "$MAKE" --no-print-directory build
# A short way to the binary, for whoever reads on.
ln -sfn "${WRENN#target/}" target/wrenn
step "guest image" "${as_root[@]}" "$WRENN" --data-dir "$DATA_DIR" image build minimal

printf '\n'
printf '    %s\n' "${timings[@]}"
printf '\nTo call it by name in other terminals: export PATH="%s/target:$PATH"\n' "$PWD"
printf '\n==> wrenn up\n'
# From here on Ctrl-C is the server's.
mode=--hello
if [ -n "${ONCE:-}" ] && [ "$ONCE" != 0 ]; then
    mode=--once
fi
exec "${as_root[@]}" "$WRENN" --data-dir "$DATA_DIR" up --listen "$LISTEN" "$mode"
