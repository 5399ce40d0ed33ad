#!/usr/bin/env bash
# Installs the Debian packages that Wrenn needs, says which and why, and leaves alone what
# is there.
#
#   scripts/packages.sh run         what building and running needs
#   scripts/packages.sh test        what the tests need as well
#   scripts/packages.sh proto       what `make proto` needs
set -euo pipefail

for_run=(
    "gcc              links our binaries and compiles SQLite"
    "libc6-dev        the static C library they are linked with"
    "qemu-system-x86  runs the virtual machines"
    "mmdebstrap       makes the guest's root file system"
    "e2fsprogs        puts it into an ext4 image, without mounting"
    "nftables         keeps guests away from the host and from each other"
    "iproute2         shows the sandboxes' network namespaces"
    "ca-certificates  trusts Debian's mirrors and crates.io"
)
for_test=(
    "g++              compiles libFuzzer for the fuzz targets"
    "python3          runs E2B's published client"
    "python3-venv     gives that client a folder of its own"
    "qemu-utils       checks our disk images with QEMU's own tools"
    "busybox-static   is the program of the small guests that tests of the VMM start"
    "util-linux       starts Wrenn as an ordinary user, to see it refuse"
)
for_proto=(
    "protobuf-compiler  compiles proto/*.proto into the descriptor set"
    "libprotobuf-dev    has Google's own .proto files"
)

case "${1:-}" in
    run) wanted=("${for_run[@]}") ;;
    test) wanted=("${for_run[@]}" "${for_test[@]}") ;;
    proto) wanted=("${for_proto[@]}") ;;
    *)
        echo "usage: $0 run|test|proto" >&2
        exit 2
        ;;
esac

missing=()
look() {
    missing=()
    for line in "${wanted[@]}"; do
        read -r package why <<<"$line"
        if dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null | grep -q '^ii'; then
            continue
        fi
        missing+=("$package")
        printf 'will install %-18s %s\n' "$package" "$why"
    done
}
look
if [ ${#missing[@]} -eq 0 ]; then
    echo "Debian packages: all ${#wanted[@]} are there"
    exit 0
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null; then
        echo "error: installing them takes root, and there is no sudo: run this as root:" >&2
        echo "    apt-get install --no-install-recommends ${missing[*]}" >&2
        exit 1
    fi
    as_root=(sudo)
fi
apt() {
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q "$@"
}
# A lock held by another apt is waited for; a mirror that fails once is asked again.
options=(-o DPkg::Lock::Timeout=300 -o Acquire::Retries=3)
apt "${options[@]}" update
apt "${options[@]}" install --yes --no-install-recommends "${missing[@]}"
# What was there may have had to go for what came, such as tools of another QEMU's version.
look
if [ ${#missing[@]} -gt 0 ]; then
    apt "${options[@]}" install --yes --no-install-recommends "${missing[@]}"
fi
