/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * Programming interface of the rust_mdev_dma mediated device.
 *
 * The device is a PCI function with one memory BAR of registers. It runs one
 * kind of thing, a command: the driver of the device writes IOVA, LENGTH and
 * SEED, then the operation into COMMAND, and reads STATUS, COUNT and DIGEST.
 * The command runs to its end inside the write to COMMAND.
 *
 * Documentation/device.rst is the long form of this file.
 */
#ifndef _UAPI_LINUX_RUST_MDEV_DMA_H
#define _UAPI_LINUX_RUST_MDEV_DMA_H

/* Identity. No vendor id is registered for samples; QEMU's edu uses this one. */
#define RUST_MDEV_DMA_PCI_VENDOR_ID	0x1234
#define RUST_MDEV_DMA_PCI_DEVICE_ID	0x4d44
/* Module, mdev driver and parent device; the mdev type is NAME "-dma". */
#define RUST_MDEV_DMA_NAME		"rust_mdev_dma"
#define RUST_MDEV_DMA_TYPE		"dma"

/*
 * A region of the device file: its index lives in the offset's upper bits, as
 * with vfio-pci. VFIO_DEVICE_GET_REGION_INFO is still the way to ask for it.
 */
#define RUST_MDEV_DMA_REGION_SHIFT	40

/*
 * BAR 0. Registers are little endian and naturally aligned. An access has 1, 2,
 * 4 or 8 bytes, is naturally aligned and stays inside the BAR; anything else
 * fails with EINVAL. Bytes between registers read as 0. Writes to them, and to
 * read-only registers, are ignored, as on a PCI bus.
 */
#define RUST_MDEV_DMA_BAR_SIZE		4096

#define RUST_MDEV_DMA_REG_MAGIC		0x00	/* u32, read-only: RUST_MDEV_DMA_MAGIC */
#define RUST_MDEV_DMA_REG_VERSION	0x04	/* u32, read-only: RUST_MDEV_DMA_VERSION */
#define RUST_MDEV_DMA_REG_OPS		0x08	/* u32, read-only: bit n set, operation n exists */
#define RUST_MDEV_DMA_REG_PAGE_SIZE	0x0c	/* u32, read-only: bytes of a page */
#define RUST_MDEV_DMA_REG_MAX_PINS	0x10	/* u64, read-only: most pins held at once */
#define RUST_MDEV_DMA_REG_MAX_LENGTH	0x18	/* u64, read-only: most bytes of one command */
#define RUST_MDEV_DMA_REG_PINS		0x20	/* u64, read-only: pins held now */
#define RUST_MDEV_DMA_REG_IOVA		0x40	/* u64: first byte of the command's range */
#define RUST_MDEV_DMA_REG_LENGTH	0x48	/* u64: bytes of the command's range */
#define RUST_MDEV_DMA_REG_SEED		0x50	/* u64: seed of the pattern of a write */
#define RUST_MDEV_DMA_REG_COMMAND	0x58	/* u32: enum rust_mdev_dma_op; a write runs it */
#define RUST_MDEV_DMA_REG_STATUS	0x5c	/* u32, read-only: errno of the last command, 0: success */
#define RUST_MDEV_DMA_REG_COUNT		0x60	/* u64, read-only: bytes the last command dealt with */
#define RUST_MDEV_DMA_REG_DIGEST	0x68	/* u64, read-only: digest of what it read, else 0 */

#define RUST_MDEV_DMA_MAGIC		0x414d444d	/* "MDMA" */
#define RUST_MDEV_DMA_VERSION		1

/*
 * Operations, over the range [IOVA, IOVA + LENGTH).
 *
 * PIN and UNPIN take whole pages. A page may be pinned again: pins count, and
 * UNPIN gives back one of each page. Either succeeds for the whole range or
 * leaves things as they were.
 *
 * WRITE and READ go through pinned pages: every page that the range touches
 * must be pinned by this device. DMA_WRITE and DMA_READ go through
 * vfio_dma_rw(), and need no pins. These four take any alignment.
 */
enum rust_mdev_dma_op {
	RUST_MDEV_DMA_OP_PIN		= 1,
	RUST_MDEV_DMA_OP_UNPIN		= 2,
	RUST_MDEV_DMA_OP_WRITE		= 3,
	RUST_MDEV_DMA_OP_READ		= 4,
	RUST_MDEV_DMA_OP_DMA_WRITE	= 5,
	RUST_MDEV_DMA_OP_DMA_READ	= 6,
};

/*
 * STATUS after a command. The device's own errors, in the order it looks for them:
 *
 *	EOPNOTSUPP	no such operation
 *	EINVAL		LENGTH is 0
 *	EOVERFLOW	IOVA + LENGTH is 2^64 or more
 *	E2BIG		LENGTH is more than MAX_LENGTH
 *	EINVAL		PIN or UNPIN of parts of pages
 *	ENOSPC		PIN would take more than MAX_PINS, or than PAGE_PINS of a page
 *	ENXIO		UNPIN, WRITE or READ of a page that isn't pinned
 *	EINTR		PIN, DMA_WRITE or DMA_READ met a signal between two batches
 *
 * What the IOMMU driver answers to PIN, DMA_WRITE and DMA_READ is passed on:
 *
 *	EINVAL		not mapped
 *	EPERM		mapped without the permission: PIN and DMA_WRITE want to read
 *			and write, DMA_READ wants to read
 *	EFAULT		the process has no memory there
 *	ENOMEM		over RLIMIT_MEMLOCK, or no memory
 *
 * COUNT is LENGTH after success. After a failure it is 0, but for DMA_WRITE and
 * DMA_READ, which stop at the first vfio_dma_rw() that fails: bytes before it.
 */

/* Pins that one page can have. */
#define RUST_MDEV_DMA_PAGE_PINS		65535

/*
 * How commands are cut. One vfio_pin_pages() or vfio_unpin_pages() stays inside
 * an aligned block of PIN_BATCH pages of IOVA; one vfio_dma_rw() stays inside an
 * aligned block of DMA_CHUNK bytes of IOVA.
 */
#define RUST_MDEV_DMA_PIN_BATCH		64
#define RUST_MDEV_DMA_DMA_CHUNK		65536

/*
 * The pattern: what a write with a seed puts at an IOVA, whatever the command's
 * range. Memory is seen as little endian 64-bit words at IOVAs that are multiples
 * of 8; a write of part of a word writes those of its bytes. All arithmetic is
 * modulo 2^64, mix() is the finalizer of splitmix64:
 *
 *	mix(z):	z = (z ^ (z >> 30)) * MIX_1
 *		z = (z ^ (z >> 27)) * MIX_2
 *		return z ^ (z >> 31)
 *
 *	word(seed, iova) = mix(seed + (iova / BLOCK) * PATTERN_STEP)
 *			   + (iova % BLOCK) / 8 * WORD_STEP
 */
#define RUST_MDEV_DMA_PATTERN_BLOCK	4096
#define RUST_MDEV_DMA_PATTERN_STEP	0x9e3779b97f4a7c15ULL
#define RUST_MDEV_DMA_PATTERN_MIX_1	0xbf58476d1ce4e5b9ULL
#define RUST_MDEV_DMA_PATTERN_MIX_2	0x94d049bb133111ebULL
#define RUST_MDEV_DMA_PATTERN_WORD_STEP	0xd1b54a32d192ed03ULL

/*
 * The digest of a read: over the words (as above) that the range touches, in
 * order, bytes outside of the range taken as 0:
 *
 *	d = DIGEST_INIT
 *	d = (rotate_left(d, 5) ^ word) * DIGEST_MUL	for every word
 */
#define RUST_MDEV_DMA_DIGEST_INIT	0xcbf29ce484222325ULL
#define RUST_MDEV_DMA_DIGEST_MUL	0x517cc1b727220a95ULL

#endif /* _UAPI_LINUX_RUST_MDEV_DMA_H */
