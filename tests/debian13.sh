#!/usr/bin/env bash
# fastpost on Debian 13 (GCC 14, Python 3.13), on any Linux whose root may run debootstrap: makes the system in a folder, clones
# the last commit into it, and runs a command there in a mount and process namespace of its own.
#
#   tests/debian13.sh DIR [COMMAND...]     default: make test test-kernels
#
# A second run in the same folder updates the clone and goes on with what is installed. Needs debootstrap (on Debian:
# apt-get install debootstrap), git, some 10 GB, and the network for packages. Exit status: the command's.
set -euo pipefail

die() { echo "debian13.sh: $1" >&2; exit 2; }

[[ ${1:-} == -* || -z ${1:-} ]] && { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 2; }
tree=$(realpath -m "$1")
shift
(($#)) || set -- make test test-kernels
source=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
((EUID == 0)) || die "needs root, for debootstrap and chroot"
for tool in debootstrap git unshare; do
  command -v "$tool" >/dev/null || die "needs $tool; on Debian: apt-get install debootstrap git util-linux"
done

if [[ ! -e $tree/.complete ]]; then
  packages=ca-certificates,clang,g++,git,make,python3,python3-dev,python3-venv
  debootstrap --variant=minbase --include="$packages" trixie "$tree" "${DEBIAN_MIRROR:-http://deb.debian.org/debian}"
  touch "$tree/.complete"
fi

# The ways to the network of this machine: its resolver, its certificates, pip's settings.
cp /etc/resolv.conf /etc/hosts "$tree/etc/"
for file in /etc/ssl/certs/ca-certificates.crt /etc/pip.conf; do
  [[ ! -e $file ]] || cp "$file" "$tree$file"
done

if [[ -e $tree/fastpost/.git ]]; then
  git -C "$tree/fastpost" fetch --quiet "$source" HEAD
  git -C "$tree/fastpost" reset --quiet --hard FETCH_HEAD
else
  git clone --quiet "$source" "$tree/fastpost"
fi

# Of the environment only what the tree understands: a compiler or a launcher that is set here may be missing there.
kept=(HOME=/root LANG=C.UTF-8 TMPDIR=/tmp PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin)
for name in $(compgen -e); do
  case $name in CI | TERM | *_proxy | *_PROXY | PIP_* | FASTPOST_*) kept+=("$name=${!name}") ;; esac
done

# shellcheck disable=SC2016  # expanded inside
exec unshare --mount --pid --fork --kill-child env -i "${kept[@]}" bash -euc '
  tree=$1
  shift
  mount --make-rprivate /
  mount --rbind /dev "$tree/dev"
  mount -t proc proc "$tree/proc"
  exec chroot "$tree" bash -c "cd /fastpost && exec \"\$@\"" - "$@"
' - "$tree" "$@"
