# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=sh disable=SC2034 # names that those who source this use
#
# Sourced by the scripts of this folder: where things are, how to say what
# happens, how to keep what was prepared.
#
# Two habits keep an interrupted run harmless. What is kept is made under a
# name that ends in .tmp and renamed when complete, under a lock; the next run
# removes what it finds under such a name. And no script sets a trap: every
# child that may run long is tied to its parent ("tied" below), so whatever
# ends a script, kill -9 included, ends all that it started.

umask 022
VM=$(cd "$(dirname "$0")" && pwd -P)
ROOT=$(cd "$VM/../.." && pwd -P)
BUILD=$ROOT/build
CACHE=${CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/rust-mdev-dma}
case $CACHE in /*) ;; *) CACHE=$ROOT/$CACHE ;; esac
LOG=$BUILD/log
export CACHE

# The make that called us must not steer the ones we call.
unset MAKEFLAGS MFLAGS MAKELEVEL MAKEOVERRIDES

say() { printf '%s\n' "$*"; }

die() {
	printf 'error: %s\n' "$*" >&2
	exit 1
}

# need TOOL PACKAGE: the host has TOOL, or the user learns where it comes from.
need() {
	command -v "$1" >/dev/null || die "$1 not found on this host: apt-get install $2"
}

# need_space GIB FOLDER
need_space() {
	free_kib=$(df -Pk "$2" | awk 'NR == 2 { print $4 }')
	[ "$free_kib" -ge $(($1 * 1048576)) ] ||
		die "$2 has $((free_kib / 1024)) MiB free, $1 GiB are needed: make room there or set CACHE= to a folder elsewhere"
}

# folder PATH: make a folder we are going to write to.
folder() {
	{ mkdir -p "$1" 2>/dev/null && [ -w "$1" ]; } ||
		die "cannot write to $1: check its permissions${2:+, or set $2= to another folder}"
}

# tied COMMAND...: run COMMAND so that it dies when this script does.
tied() { setpriv --pdeathsig KILL -- "$@"; }

# step TEXT LOG COMMAND...: run a long COMMAND, its output kept in LOG.
# COMMAND is a program, not a function: "set -e" sleeps in a tested function.
step() {
	step_text=$1 step_log=$2
	shift 2
	say "==> $step_text ..."
	step_start=$(date +%s)
	if tied "$@" </dev/null >"$step_log" 2>&1; then
		say "    done in $(($(date +%s) - step_start)) s"
	else
		tail -n "${STEP_TAIL:-25}" "$step_log" >&2
		printf '    failed after %s s, all output: %s\n' "$(($(date +%s) - step_start))" "$step_log" >&2
		return 1
	fi
}

# lock FILE: hold FILE's lock until this script and its children have ended.
lock() {
	exec 9>>"$1"
	flock -n 9 && return
	say "==> waiting for another run, which holds $1 ..."
	flock 9
}

# key PATH...: one word that changes when the content of a file below does.
# Paths are relative to ROOT, so two clones agree; missing ones count as empty.
key() {
	(
		cd "$ROOT" || exit
		for path; do [ -e "$path" ] && find "$path" -name target -prune -o -type f -print0; done |
			LC_ALL=C sort -z | xargs -0r sha256sum | sha256sum | cut -c1-12
	)
}

# fresh FILE KEY: FILE exists and was made from inputs with this KEY.
fresh() { [ -e "$1" ] && [ "$(cat "$1.key" 2>/dev/null)" = "$2" ]; }

# Record the KEY that FILE was made from.
made() {
	printf '%s\n' "$2" >"$1.key.tmp"
	mv "$1.key.tmp" "$1.key"
}

# keep_recent PREFIX: forget siblings of a thing just made that nobody used for
# two days. Users touch what they use (see "enter" and "kernel").
keep_recent() {
	find "$CACHE" -maxdepth 1 -type d -name "$1-*" -mtime +1 -exec rm -rf {} +
}

# The folder of the build room and that of the kernel made for it.
room_dir() { printf '%s/room-%s' "$CACHE" "$(key tools/vm/room-make)"; }
packages_dir() { printf '%s/packages-%s' "$CACHE" "$(key tools/vm/kernel-fetch)"; }
kernel_dir() {
	kernel_packages=$(packages_dir)
	printf '%s/kernel-%s-%s' "$CACHE" "$(key tools/vm/room-make tools/vm/kernel-tree)" \
		"$(cat "$kernel_packages/release" 2>/dev/null || echo none)"
}

# A root of our own: the caller's id becomes 0, more ids come from /etc/subuid
# when asked for with "many". Root needs no namespace for that.
userns() {
	[ "$(id -u)" = 0 ] && return
	printf '%s' "--map-root-user${1:+ --map-auto}"
}
