# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=sh
#
# Sourced behind common.sh by scripts that make a product: products are kept in
# build/image, each under its name and a hash of what it was made from, so that
# runs that want different ones don't meet. Who sources this has a function
# "inputs", which prints one word that changes with what the product depends on.

# have NAME FILE: if there is a NAME of these inputs, FILE is a link to it, which
# stays what it is whatever others make. Otherwise we now hold the lock to make it.
have() {
	image_name=$1 image_file=$2 image_inputs=$(inputs)
	image=$BUILD/image/$1-$image_inputs
	directory "$BUILD/image"
	link_image && return
	lock "$BUILD/image/$1.lock"
	link_image
}

link_image() { ln -f "$image" "$image_file" 2>/dev/null && touch -c "$image"; }

# made PRODUCT: keep what "have" didn't have, and drop all but the eight of that
# name that were used last.
made() {
	[ "$(inputs)" = "$image_inputs" ] ||
		die "what $image_name is made from was changed meanwhile: try again"
	cp "$1" "$BUILD/image/$image_name.tmp"
	mv "$BUILD/image/$image_name.tmp" "$image"
	ln -f "$image" "$image_file"
	# shellcheck disable=SC2012 # names are ours
	(cd "$BUILD/image" && ls -t "$image_name"-* | tail -n +9 | xargs -r rm -f)
}
