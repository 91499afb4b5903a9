/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * Programming interface of the rust_mdev_dma mediated device.
 *
 * The device is a PCI function with one memory BAR of registers, an interrupt
 * pin and MSI. It runs commands: the driver of the device writes IOVA, LENGTH
 * and SEED, then the operation into COMMAND, and reads STATUS, COUNT and DIGEST.
 * And it has a generator, which writes pages on its own when it is started.
 *
 * Documentation/device.rst is the long form of this file.
 */
#ifndef _UAPI_LINUX_RUST_MDEV_DMA_H
#define _UAPI_LINUX_RUST_MDEV_DMA_H

/* Identity. No vendor id is registered for samples; QEMU's edu uses this one. */
#define RUST_MDEV_DMA_PCI_VENDOR_ID	0x1234
#define RUST_MDEV_DMA_PCI_DEVICE_ID	0x4d44
/*
 * Module, mdev driver and parent device. The mdev type is NAME "-" TYPE; TYPE_LOG
 * is the same with DMA logging, and only there where the kernel can serve that.
 */
#define RUST_MDEV_DMA_NAME		"rust_mdev_dma"
#define RUST_MDEV_DMA_TYPE		"dma"
#define RUST_MDEV_DMA_TYPE_LOG		"dma-log"

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
#define RUST_MDEV_DMA_REG_COMMAND	0x58	/* u32: enum rust_mdev_dma_op and flags; a write runs it */
#define RUST_MDEV_DMA_REG_STATUS	0x5c	/* u32, read-only: errno of the last command, 0: success */
#define RUST_MDEV_DMA_REG_COUNT		0x60	/* u64, read-only: bytes the last command dealt with */
#define RUST_MDEV_DMA_REG_DIGEST	0x68	/* u64, read-only: digest of what it read, else 0 */
#define RUST_MDEV_DMA_REG_REFUSED	0x70	/* u32, read-only: EBUSY if the last write to COMMAND was refused */
#define RUST_MDEV_DMA_REG_IRQ_STATUS	0x80	/* u32: RUST_MDEV_DMA_IRQ_*, what happened; 1 clears a bit */
#define RUST_MDEV_DMA_REG_IRQ_ENABLE	0x84	/* u32: RUST_MDEV_DMA_IRQ_*, what interrupts */
#define RUST_MDEV_DMA_REG_GEN_IOVA	0x100	/* u64: first byte of the generator's window */
#define RUST_MDEV_DMA_REG_GEN_LENGTH	0x108	/* u64: bytes of the window */
#define RUST_MDEV_DMA_REG_GEN_SEED	0x110	/* u64: what order and contents follow from */
#define RUST_MDEV_DMA_REG_GEN_LIMIT	0x118	/* u64: value of GEN_COUNTER at which it stops, 0: none */
#define RUST_MDEV_DMA_REG_GEN_RATE	0x120	/* u32: pages per second, 0: as fast as it can */
#define RUST_MDEV_DMA_REG_GEN_MODE	0x124	/* u32: RUST_MDEV_DMA_GEN_*, how it writes */
#define RUST_MDEV_DMA_REG_GEN_CONTROL	0x128	/* u32: enum rust_mdev_dma_gen_control; a write acts */
#define RUST_MDEV_DMA_REG_GEN_STATUS	0x12c	/* u32, read-only: EINPROGRESS, or why it stopped */
#define RUST_MDEV_DMA_REG_GEN_COUNTER	0x130	/* u64, read-only: pages written since it was started */

#define RUST_MDEV_DMA_MAGIC		0x414d444d	/* "MDMA" */
#define RUST_MDEV_DMA_VERSION		2

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
 * Without BACKGROUND, a command runs inside the write to COMMAND, in the context
 * of the process that rings. With it, COMMAND only begins it: a kernel thread
 * runs it, and STATUS is EINPROGRESS until it has ended. While a command is in
 * progress, others are refused: a write to COMMAND then changes nothing but
 * REFUSED. IOVA, LENGTH and SEED may be written, a command has its own copies.
 *
 * A command that is rung while migration has stopped the device (RUNNING_P2P,
 * STOP) runs in the background once the device runs again, here or wherever its
 * state was brought to.
 */
#define RUST_MDEV_DMA_COMMAND_BACKGROUND	(1U << 31)

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
 *	EINTR		PIN, DMA_WRITE or DMA_READ met a signal, or a reset by somebody
 *			else, between two batches
 *
 * And while there is no command's status to show:
 *
 *	EINPROGRESS	a command is in progress
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

/*
 * Interrupts. Bits of IRQ_STATUS are set when something happens, enabled or not,
 * and stay set until the driver writes 1 to them.
 *
 * INTx is a level: asserted while a bit is set in both IRQ_STATUS and IRQ_ENABLE
 * and the command register doesn't disable INTx. MSI is an edge: when something
 * happens whose bit is set in IRQ_ENABLE, a message is sent, whatever IRQ_STATUS
 * was. Bit n uses vector n, or vector 0 if the user has enabled no more than that.
 */
#define RUST_MDEV_DMA_IRQ_COMMAND	(1U << 0)	/* a command has ended */
#define RUST_MDEV_DMA_IRQ_GENERATOR	(1U << 1)	/* the generator has stopped by itself */

/* MSI vectors. */
#define RUST_MDEV_DMA_MSI_VECTORS	2

/*
 * The generator. Write number n (from 0, GEN_COUNTER is how many there were) puts
 * the pattern of seed(n) on page(n) of the window, which has P pages:
 *
 *	page(n)	= (n % P * GEN_STRIDE + mix(GEN_SEED) % P) % P
 *	seed(n)	= mix(GEN_SEED + (n + 1) * PATTERN_STEP)
 *
 * GEN_STRIDE is a prime, P less than 2^31: no product overflows 64 bits, and
 * P writes in a row, whichever, write every page once. So at any time, each page
 * has the contents of one of the last P writes, or was not written yet.
 *
 * GEN_MODE is a set of ways. Of its W bits, lowest first, write n uses number
 * (n % P + n / P) % W: a page isn't always written in the same way.
 */
#define RUST_MDEV_DMA_GEN_STRIDE	2654435761ULL

#define RUST_MDEV_DMA_GEN_PINNED	(1U << 0)	/* through a pin that PIN took */
#define RUST_MDEV_DMA_GEN_DMA_RW	(1U << 1)	/* by vfio_dma_rw() */
#define RUST_MDEV_DMA_GEN_PIN		(1U << 2)	/* pins the page, writes, unpins it */

/*
 * START takes the other registers, sets GEN_COUNTER to 0 and begins to write;
 * CONTINUE does so without touching GEN_COUNTER; STOP ends it: once written to
 * GEN_CONTROL, there are no more writes. START and CONTINUE stop it first.
 */
enum rust_mdev_dma_gen_control {
	RUST_MDEV_DMA_GEN_STOP		= 0,
	RUST_MDEV_DMA_GEN_START		= 1,
	RUST_MDEV_DMA_GEN_CONTINUE	= 2,
};

/*
 * GEN_STATUS:
 *
 *	EINPROGRESS	it is running
 *	0		it was never started, was stopped, or has reached GEN_LIMIT
 *
 * START and CONTINUE may have refused, in this order:
 *
 *	EOPNOTSUPP	no such control
 *	EINVAL		GEN_LENGTH is 0, the window isn't whole pages, GEN_MODE is
 *			empty or has other bits
 *	EOVERFLOW	GEN_IOVA + GEN_LENGTH is 2^64 or more
 *	E2BIG		GEN_LENGTH is more than MAX_LENGTH, or P is 2^31 or more
 *
 * A write may have failed, and then it stopped before counting it, with the errno
 * that PIN, WRITE or DMA_WRITE of that page would have.
 */

/*
 * The stream of a migration, for those who want to look at it: an IDENTITY
 * section, then a DEVICE section. A section is a multiple of 8 bytes, little endian:
 *
 *	u64 magic	MIG_MAGIC
 *	u32 version	MIG_VERSION
 *	u32 section	enum rust_mdev_dma_mig_section
 *	u64 length	bytes behind this header
 *	u64 checksum	the digest (as above) of the 24 bytes before this, and of
 *			the bytes behind it
 *
 * IDENTITY has two u64: vendor id and, from bit 16 on, device id; PAGE_SIZE.
 *
 * DEVICE has the 256 bytes of configuration space, the registers up to the end of
 * GEN_COUNTER, and then, each a u64 but where it says otherwise: 1 if a command
 * waits, its operation, IOVA, LENGTH, SEED; 1 if the generator runs, its IOVA,
 * LENGTH, SEED, LIMIT, RATE (u32), MODE (u32), GEN_COUNTER, GEN_STATUS; the number
 * of runs of pinned pages, and each run's IOVA, pages (u32), and pins of each (u32).
 */
#define RUST_MDEV_DMA_MIG_MAGIC		0x45544154534d444dULL	/* "MDMSTATE" */
#define RUST_MDEV_DMA_MIG_VERSION	1

enum rust_mdev_dma_mig_section {
	RUST_MDEV_DMA_MIG_IDENTITY	= 1,
	RUST_MDEV_DMA_MIG_DEVICE	= 2,
};

#endif /* _UAPI_LINUX_RUST_MDEV_DMA_H */
