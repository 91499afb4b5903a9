# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=sh disable=SC2034 # names that those who source this use
#
# Sourced by the scripts of this directory: where things are, how to say what
# happens, how to keep what was prepared.
#
# Two habits keep an interrupted run harmless. What is kept is made under a
# name that ends in .tmp and renamed when complete, under a lock; the next run
# removes what it finds under such a name. And no script sets a trap: every
# child that may run long is tied to its parent ("tied" below), so whatever
# ends a script, kill -9 included, ends all that it started.

umask 022
# chroot and others are there, which an ordinary user's PATH leaves out.
PATH=$PATH:/usr/sbin:/sbin
VM=$(cd "$(dirname "$0")" && pwd -P)
ROOT=$(cd "$VM/../.." && pwd -P)
BUILD=$ROOT/build
CACHE=${CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/rust-mdev-dma}
case $CACHE in /*) ;; *) CACHE=$ROOT/$CACHE ;; esac
LOG=$BUILD/log
# What the cache takes, at most as at last: 1.9 for the build room, 1.9 for the kernel.
CACHE_GIB=4
export CACHE
# A user's kernel tree is known by one path, wherever we are.
if [ -n "${TREE:-}" ]; then
	tree_path=$(cd "$TREE" 2>/dev/null && pwd -P) || {
		printf 'error: TREE=%s: cannot enter that directory: give the root of a kernel tree\n' "$TREE" >&2
		exit 1
	}
	export TREE="$tree_path"
elif [ -n "${CONFIG:-}" ]; then
	printf 'error: CONFIG=%s is how TREE= is configured: give that as well\n' "$CONFIG" >&2
	exit 1
fi

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

# need_space GIB DIRECTORY
need_space() {
	free_kib=$(df -Pk "$2" | awk 'NR == 2 { print $4 }')
	[ "$free_kib" -ge $(($1 * 1048576)) ] ||
		die "$2 has $((free_kib / 1024)) MiB free, $1 GiB are needed: make room there or set CACHE= to a directory elsewhere"
}

# directory PATH: make a directory we are going to write to.
directory() {
	{ mkdir -p "$1" 2>/dev/null && [ -w "$1" ]; } ||
		die "cannot write to $1: check its permissions${2:+, or set $2= to another directory}"
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
	: >"$step_log"
	# Where a step of minutes is.
	# shellcheck disable=SC2016 # expanded there
	setpriv --pdeathsig KILL -- sh -c '
		while setpriv --pdeathsig KILL -- sleep 30; do
			line=$(tail -n 1 "$1" | tr -d "\r" | cut -c1-60)
			printf "    %s s: %s\n" $(($(date +%s) - $2)) "$line"
		done' step "$step_log" "$step_start" </dev/null &
	step_ticker=$!
	step_status=0
	tied "$@" </dev/null >"$step_log" 2>&1 || step_status=$?
	kill "$step_ticker" 2>/dev/null
	if [ "$step_status" = 0 ]; then
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

# hold FD DIRECTORY [VARIABLE]: make DIRECTORY, and share its lock until this script and
# all that it starts have ended. Whoever removes DIRECTORY has the lock alone.
hold() {
	while :; do
		directory "$2" "${3:-}"
		eval "exec $1<>\"\$2/lock\""
		flock -s "$1"
		# Not removed while we waited?
		# shellcheck disable=SC3013 # POSIX has -ef since 2024, dash before
		[ "/dev/fd/$1" -ef "$2/lock" ] && return
	done
}
use_cache() { hold 7 "$CACHE" CACHE; }
use_build() {
	hold 8 "$BUILD"
	directory "$LOG"
}

# alone DIRECTORY: nobody uses DIRECTORY, nor will before we have ended. What a killed
# run has started takes a moment to end.
alone() {
	exec 9<>"$1/lock"
	flock -w 3 9 || die "$1 is in use by another run: wait for it or stop it"
}

# word: one that stands for what comes from stdin.
word() { sha256sum | cut -c1-12; }

# key PATH...: one word that changes when the content of a file below does.
# Paths are relative to ROOT, so two clones agree; missing ones count as empty.
key() {
	(
		cd "$ROOT" || exit
		for path; do [ -e "$path" ] && find "$path" -name target -prune -o -type f -print0; done |
			LC_ALL=C sort -z | xargs -0r sha256sum | word
	)
}

# keep_recent PREFIX: forget siblings of a thing just made that nobody used for
# two days, nor uses now: users touch and lock what they use (see "enter").
# Half removed it must not look like a whole one.
keep_recent() {
	find "$CACHE" -maxdepth 1 -type d -name "$1-*" -mtime +1 \
		-exec flock -n {} mv -T {} "$CACHE/$1.tmp" \; -exec rm -rf "$CACHE/$1.tmp" \;
}

# The directory of the build room, and those of the kernel: its packages, and what was
# made of them for that room. It is the one that was fetched, or, with KERNEL=, the
# one of that release.
room_dir() { printf '%s/room-%s' "$CACHE" "$(key tools/vm/room-make)"; }
packages_dir() {
	if [ -n "${KERNEL:-}" ]; then
		grep -l -x -F -e "$KERNEL" "$CACHE"/packages-*/release 2>/dev/null | sed -n '1s|/release$||p'
	else
		printf '%s/packages-%s' "$CACHE" "$(key tools/vm/kernel-fetch)"
	fi
}
# That of a user's tree and its configuration, CONFIG, the name of ours or a file.
tree_dir() { printf '%s/tree-%s' "$CACHE" "$(printf '%s\n' "$TREE" "${CONFIG:-lean}" | word)"; }
kernel_dirs() { printf '%s/kernel-%s' "$CACHE" "$(key tools/vm/room-make tools/vm/kernel-tree)"; }
kernel_dir() {
	[ -z "${TREE:-}" ] || { tree_dir; return; }
	kernel_release=${KERNEL:-$(cat "$(packages_dir)/release" 2>/dev/null || echo none)}
	printf '%s-%s' "$(kernel_dirs)" "$kernel_release"
}

# choose_driver: the driver in C where those in Rust can't be built; the kernel exists.
choose_driver() {
	case ${DRIVER:=rust} in
	c) DRIVER_WHY=${DRIVER_WHY:-DRIVER=c} ;;
	rust)
		[ ! -s "$(kernel_dir)/no-rust" ] || {
			DRIVER=c
			DRIVER_WHY="of TREE: $(head -n 1 "$(kernel_dir)/no-rust")"
			say "    driver: c_mdev_dma, because $DRIVER_WHY"
		} ;;
	*) die "DRIVER=$DRIVER: give c, or leave it out" ;;
	esac
	export DRIVER DRIVER_WHY
}

# kernel_id: what a product says that was made for this kernel.
kernel_id() {
	kernel_dir
	cat "$(kernel_dir)/id" 2>/dev/null || :
}

# A root of our own: the caller's id becomes 0, more ids come from /etc/subuid
# when asked for with "many". Root needs no namespace for that.
userns() {
	[ "$(id -u)" = 0 ] && return
	printf '%s' "--map-root-user${1:+ --map-auto}"
}
