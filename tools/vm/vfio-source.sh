# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=sh
#
# Sourced behind common.sh by what builds modules of drivers/vfio from a changed source.

# vfio_source DIRECTORY MODULE...: make DIRECTORY what drivers/vfio is, with a Makefile for these modules of it.
vfio_source() {
	vfio_source_dir=$1
	shift
	mkdir -p "$vfio_source_dir"
	cp "$(kernel_dir)"/src/drivers/vfio/*.[ch] "$vfio_source_dir/"
	{
		echo "obj-m :=$(printf ' %s.o' "$@")"
		sed -n '/^vfio-/p' "$(kernel_dir)/src/drivers/vfio/Makefile"
	} >"$vfio_source_dir/Makefile"
}
