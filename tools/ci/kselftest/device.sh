#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
#
# What the driver rust_mdev_dma owes, by which that is tried.
# KSELFTEST_DEVICE_SH_ARGS has more arguments for dirtyscope verify.
exec "$(dirname "$0")/run.sh" --filter 'device/*' "$@"
