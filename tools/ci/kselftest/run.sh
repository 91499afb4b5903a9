#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
#
# run.sh ARGUMENT...: dirtyscope verify ARGUMENT..., with the drivers that it needs, which are taken
# away again, as are devices. Ends as kselftest has it: with 0 if all is right, 1 if not, 4 if
# this kernel can't be tested.
cd "$(dirname "$0")" || exit 1

skip() {
	printf '1..0 # SKIP %s\n' "$1"
	exit 4
}

# load MODULE [PARAMETER]: the driver, from this directory, or else the kernel's own.
load() {
	[ ! -d "/sys/module/$1" ] || return 0
	said=$(insmod "./$1.ko" ${2:+"$2"} 2>&1) || modprobe -q "$@" 2>/dev/null || return 1
	loaded="$1 $loaded"
}

# in_use: somebody has one of our devices open, or drives one.
in_use() { grep -q -s -v '^0$' /sys/module/rust_mdev_dma/refcnt; }

devices() { (cd "$parent" && ls -d [0-9a-f]*-*-*-*-*) 2>/dev/null; }

# remove: what was not there before isn't there afterwards. Removing what is in use would
# wait for it.
remove() {
	! in_use || sleep 5
	! in_use || { echo '# rust_mdev_dma is in use still: it and its devices stay'; return 1; }
	for device in $(devices); do
		case " $before " in
		*" $device "*) ;;
		*) echo 1 >"/sys/bus/mdev/devices/$device/remove" || return 1 ;;
		esac
	done
	# shellcheck disable=SC2086 # names
	[ -z "$loaded" ] || rmmod $loaded
}

[ "$(id -u)" = 0 ] || skip 'must be run as root'
# What is built in needs no loading, what is missing is found missing below.
for module in vfio vfio_iommu_type1 mdev vfio-pci; do modprobe -q "$module" 2>/dev/null; done
{ [ -c /dev/vfio/vfio ] && [ -d /sys/module/vfio_iommu_type1 ]; } ||
	skip 'this kernel has no CONFIG_VFIO_CONTAINER or no CONFIG_VFIO_IOMMU_TYPE1'
[ -d /sys/bus/mdev ] || skip 'this kernel has no CONFIG_VFIO_MDEV'

loaded=''
load rust_mdev_dma || case $said in
*[Ii]'nvalid module format'*) skip "rust_mdev_dma.ko is for another kernel than this one ($(uname -r))" ;;
*) echo "# cannot load rust_mdev_dma: $said"; exit 1 ;;
esac
parent=/sys/class/mdev_bus/rust_mdev_dma
before=$(devices | tr '\n' ' ')
# QEMU's edu is driven where there are some, with dma_mask=0xffffffffffffffff.
! cat /sys/bus/pci/devices/*/uevent | grep -q PCI_ID=1234:11E8 || load rust_vfio_edu address_bits=64 || :

# A time-out sends SIGTERM to all of its group, twice. At the first one the tool ends its scenario and
# removes what it has made, at the second one it ends: it gets only ours.
stopped=''
trap 'stopped=yes' HUP INT TERM
setsid ./dirtyscope verify "$@" &
tool=$!
wait $tool
code=$?
if [ -n "$stopped" ]; then
	kill $tool 2>/dev/null
	end=$(($(date +%s) + 10))
	while kill -0 $tool 2>/dev/null && [ "$(date +%s)" -lt $end ]; do sleep 0.2; done
	kill -KILL $tool 2>/dev/null
	code=1
fi
remove || code=1
# To kselftest, what other programs mean by 2 and 3 is no failure.
case $code in 0 | 4) exit $code ;; *) exit 1 ;; esac
