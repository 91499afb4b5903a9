# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=sh
#
# Sourced behind common.sh by what runs and has results. All that belongs to one
# run is in a directory of its own, build/run/MODE-*; build/ itself has the results
# of the run that ended last.

# begin MODE: make the directory, $RUN, which is ours until we and our children have
# ended. Those of interrupted runs are removed here, those of failed ones are
# kept, the last three.
begin() {
	use_build
	use_cache
	directory "$BUILD/run"
	lock "$BUILD/run/lock"
	for run in "$BUILD"/run/*/; do
		[ ! -d "$run" ] || [ -e "$run/failed" ] || flock -n "$run" rm -rf "$run" || :
	done
	find "$BUILD/run" -mindepth 2 -maxdepth 2 -name failed -printf '%T@ %h\n' | sort -rn |
		tail -n +4 | cut -d' ' -f2- | tr '\n' '\0' | xargs -0r rm -rf
	RUN=$(mktemp -d "$BUILD/run/$1-XXXXXX")
	chmod 755 "$RUN"
	exec 6<"$RUN"
	flock 6
	exec 9>&-
	use_tree
}

# use_tree: a user's tree is built once in a run, and stays as it is until we have ended.
use_tree() {
	[ -n "${TREE:-}" ] && [ -z "${TREE_BUILT:-}" ] || return 0
	tied "$VM/tree" check
	directory "$(kernel_dir)" CACHE
	exec 3>>"$(kernel_dir)/lock"
	flock -n 3 || {
		say "==> waiting for another run of $TREE ..."
		flock 3
	}
	TREE_LOCKED=yes tied "$VM/kernel" || return
	export TREE_BUILT=yes
}

# stock_tree: TREE is the source of the stock kernel.
stock_tree() {
	tied "$VM/kernel"
	TREE=$(cd "$(kernel_dir)/src" && pwd -P)
	export TREE
}

# choose_accel: a user's tree is run on KVM where that boots it. /dev/kvm may be there and
# run nothing, so it is tried, once since the host has booted.
choose_accel() {
	[ -n "${TREE:-}" ] && [ -z "${ACCEL:-}" ] && [ -w /dev/kvm ] || return 0
	tried=$CACHE/accel-$(cat /proc/sys/kernel/random/boot_id)
	if [ ! -e "$tried" ]; then
		say "==> VM: see if it boots on KVM (30 s at most) ..."
		rm -f "$CACHE"/accel-*
		if TIMEOUT=30 ACCEL=kvm tied "$VM/boot" quick "$RUN" >"$RUN/kvm.log" 2>&1; then
			echo kvm >"$tried"
		else
			echo tcg >"$tried"
		fi
	fi
	ACCEL=$(cat "$tried")
	export ACCEL
	say "    VM on $ACCEL, ACCEL=tcg or kvm overrides that"
}

# Where those are found who want to know what came of the newest run.
RESULTS=${RESULTS:-$BUILD}

# withdraw NAME...: what came of the run before isn't the newest any more.
withdraw() { (cd "$RESULTS" && rm -f "$@"); }

# publish NAME...: this is the newest.
publish() {
	for name; do
		[ ! -e "$RUN/$name" ] || ln -f "$RUN/$name" "$RESULTS/$name"
	done
}

# finish STATUS: a run that ended well needs its directory no more.
finish() {
	if [ "$1" = 0 ]; then
		rm -rf "$RUN"
	else
		touch "$RUN/failed"
		say "all that belongs to this run is kept in $RUN"
	fi
}
