#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
#
# What the kernel owes: VFIO type1's dirty page tracking, held against a model of it.
# KSELFTEST_TYPE1_SH_ARGS has more arguments for dirtyscope verify.
exec "$(dirname "$0")/run.sh" --filter 'type1/*' "$@"
