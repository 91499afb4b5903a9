# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=sh
#
# Sourced behind run-directory.sh by what makes many runs, of which RUNS= names some. Says
# of each how long it took.
start=$(date +%s)
failed='' made=''

# count_cpu: $cpu is seconds of CPU time, of all that we have started and waited for. Not
# for a subshell, of which "times" would tell.
count_cpu() {
	times >"$RUN/times"
	cpu=$(awk 'NR == 2 { gsub(/[ms]/, " "); print int($1 * 60 + $2 + $3 * 60 + $4) }' "$RUN/times")
}

# took WHAT SECONDS CPU: how long WHAT took that began then.
took() {
	count_cpu
	say "$(basename "$0"): $1: $(($(date +%s) - $2)) s, of CPU time $((cpu - $3)) s, load $(cut -d ' ' -f 1 /proc/loadavg)"
}

# wanted NAME: this run is to be made.
wanted() { case " ${RUNS:-$1} " in *" $1 "*) ;; *) return 1 ;; esac; }

# one NAME MODE ARGUMENTS: make it. $failed has the names of those that did not pass.
one() {
	wanted "$1" || return 0
	count_cpu
	began=$(date +%s) began_cpu=$cpu
	ARGS=$3 tied "$VM/run" "$2" || failed="$failed $1"
	made=yes
	took "$1" "$began" "$began_cpu"
}

# ended STATUS: end with it, unless a run has failed.
ended() {
	[ -n "$made" ] || { finish 1; die "RUNS=${RUNS:-} names none of the runs, see $VM/$(basename "$0")"; }
	took 'all of it' "$start" 0
	[ -z "$failed" ] || { finish 1; die "did not pass:$failed"; }
	finish "$1"
	exit "$1"
}
