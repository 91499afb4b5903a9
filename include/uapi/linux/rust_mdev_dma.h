/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * Programming interface of the rust_mdev_dma mediated device.
 *
 * The device is a PCI function with one memory BAR of registers, an interrupt
 * pin and MSI. It runs commands: software writes IOVA, LENGTH and SEED, then the
 * operation to COMMAND, which is the doorbell, and reads STATUS, COUNT and DIGEST.
 * It also has a generator, which writes pages by itself once it is started.
 *
 * Documentation/device.rst describes it at greater length.
 */
#ifndef _UAPI_LINUX_RUST_MDEV_DMA_H
#define _UAPI_LINUX_RUST_MDEV_DMA_H

/* Identity. There is no vendor ID for samples; QEMU's edu device uses this one. */
#define RUST_MDEV_DMA_PCI_VENDOR_ID	0x1234
#define RUST_MDEV_DMA_PCI_DEVICE_ID	0x4d44
/*
 * Name of the module, the mdev driver and the parent device. The mdev type is
 * NAME "-" TYPE. TYPE_LOG is the same device with DMA logging; it exists only if
 * the kernel has CONFIG_IOMMUFD_DRIVER.
 */
#define RUST_MDEV_DMA_NAME		"rust_mdev_dma"
#define RUST_MDEV_DMA_TYPE		"dma"
#define RUST_MDEV_DMA_TYPE_LOG		"dma-log"

/*
 * A region's offset in the device file is its index shifted left by this, as for
 * vfio-pci. VFIO_DEVICE_GET_REGION_INFO reports it; users should ask.
 */
#define RUST_MDEV_DMA_REGION_SHIFT	40

/*
 * BAR 0. Registers are little endian and naturally aligned. An access is 1, 2, 4
 * or 8 bytes wide, naturally aligned and inside the BAR; any other fails with
 * EINVAL. Bytes between registers read as 0. Writes to them and to read-only
 * registers are ignored, as on a PCI bus.
 */
#define RUST_MDEV_DMA_BAR_SIZE		4096

#define RUST_MDEV_DMA_REG_MAGIC		0x00	/* u32, read-only: RUST_MDEV_DMA_MAGIC */
#define RUST_MDEV_DMA_REG_VERSION	0x04	/* u32, read-only: RUST_MDEV_DMA_VERSION */
#define RUST_MDEV_DMA_REG_OPS		0x08	/* u32, read-only: bit n set, operation n exists */
#define RUST_MDEV_DMA_REG_PAGE_SIZE	0x0c	/* u32, read-only: size of a page in bytes */
#define RUST_MDEV_DMA_REG_MAX_PINS	0x10	/* u64, read-only: maximum number of pins held */
#define RUST_MDEV_DMA_REG_MAX_LENGTH	0x18	/* u64, read-only: maximum LENGTH of a command */
#define RUST_MDEV_DMA_REG_PINS		0x20	/* u64, read-only: number of pins held */
#define RUST_MDEV_DMA_REG_IOVA		0x40	/* u64: start of the command's range */
#define RUST_MDEV_DMA_REG_LENGTH	0x48	/* u64: size of the command's range in bytes */
#define RUST_MDEV_DMA_REG_SEED		0x50	/* u64: seed of the pattern to write */
#define RUST_MDEV_DMA_REG_COMMAND	0x58	/* u32: enum rust_mdev_dma_op and flags; the doorbell */
#define RUST_MDEV_DMA_REG_STATUS	0x5c	/* u32, read-only: errno of the last command, 0 on success */
#define RUST_MDEV_DMA_REG_COUNT		0x60	/* u64, read-only: bytes the last command processed */
#define RUST_MDEV_DMA_REG_DIGEST	0x68	/* u64, read-only: digest of what it read, or 0 */
#define RUST_MDEV_DMA_REG_REFUSED	0x70	/* u32, read-only: EBUSY if the last write to COMMAND was refused */
#define RUST_MDEV_DMA_REG_IRQ_STATUS	0x80	/* u32: RUST_MDEV_DMA_IRQ_*, events; write 1 to clear */
#define RUST_MDEV_DMA_REG_IRQ_ENABLE	0x84	/* u32: RUST_MDEV_DMA_IRQ_*, events that interrupt */
#define RUST_MDEV_DMA_REG_GEN_IOVA	0x100	/* u64: start of the generator's range */
#define RUST_MDEV_DMA_REG_GEN_LENGTH	0x108	/* u64: size of the generator's range in bytes */
#define RUST_MDEV_DMA_REG_GEN_SEED	0x110	/* u64: determines order and contents of the writes */
#define RUST_MDEV_DMA_REG_GEN_LIMIT	0x118	/* u64: GEN_COUNTER at which it stops, 0: never */
#define RUST_MDEV_DMA_REG_GEN_RATE	0x120	/* u32: pages per second, 0: unlimited */
#define RUST_MDEV_DMA_REG_GEN_MODE	0x124	/* u32: RUST_MDEV_DMA_GEN_*, methods of writing */
#define RUST_MDEV_DMA_REG_GEN_CONTROL	0x128	/* u32: enum rust_mdev_dma_gen_control; a write executes it */
#define RUST_MDEV_DMA_REG_GEN_STATUS	0x12c	/* u32, read-only: EINPROGRESS, an errno, or 0 */
#define RUST_MDEV_DMA_REG_GEN_COUNTER	0x130	/* u64, read-only: pages written since START */

#define RUST_MDEV_DMA_MAGIC		0x414d444d	/* "MDMA" */
#define RUST_MDEV_DMA_VERSION		2

/*
 * Operations, over the range [IOVA, IOVA + LENGTH).
 *
 * PIN and UNPIN take whole pages. A page can be pinned several times: PIN adds one
 * pin to each page of the range, UNPIN removes one. Either succeeds for the whole
 * range or has no effect.
 *
 * WRITE and READ access pinned pages: this device must have pinned every page
 * that the range touches. DMA_WRITE and DMA_READ call vfio_dma_rw() and need no
 * pins. These four take any alignment.
 *
 * Raw pins exist if the driver was loaded with raw_pins=1. RAW_PIN is one call of
 * vfio_pin_pages() with this IOVA, aligned to nothing, LENGTH / PAGE_SIZE pages,
 * and the protection in SEED (IOMMU_READ, IOMMU_WRITE, or what isn't one), all as
 * they are. The first page is the one that contains IOVA. The pins that it takes
 * are one raw pin: the other three name it by the same IOVA and LENGTH. RAW_UNPIN,
 * which takes the protection in SEED, too, returns them by one vfio_unpin_pages().
 * RAW_WRITE and RAW_READ access the pages from IOVA to the end of the last one, if
 * a raw pin of this IOVA and LENGTH has the protection for that. When any page of
 * a raw pin is unmapped, all of it is unpinned.
 */
enum rust_mdev_dma_op {
	RUST_MDEV_DMA_OP_PIN		= 1,
	RUST_MDEV_DMA_OP_UNPIN		= 2,
	RUST_MDEV_DMA_OP_WRITE		= 3,
	RUST_MDEV_DMA_OP_READ		= 4,
	RUST_MDEV_DMA_OP_DMA_WRITE	= 5,
	RUST_MDEV_DMA_OP_DMA_READ	= 6,
	RUST_MDEV_DMA_OP_RAW_PIN	= 7,
	RUST_MDEV_DMA_OP_RAW_UNPIN	= 8,
	RUST_MDEV_DMA_OP_RAW_WRITE	= 9,
	RUST_MDEV_DMA_OP_RAW_READ	= 10,
};

/*
 * Without BACKGROUND, a command runs inside the write to COMMAND, in the context
 * of the writing process. With it, the write only queues the command: a workqueue
 * runs it, and STATUS is EINPROGRESS until it has completed. While a command is in
 * progress, others are refused: a write to COMMAND then changes only REFUSED.
 * IOVA, LENGTH and SEED may be written meanwhile, a command has its own copies.
 *
 * A command written while the device is quiesced for migration (RUNNING_P2P, STOP)
 * is queued until the device runs again, here or at the migration's destination.
 */
#define RUST_MDEV_DMA_COMMAND_BACKGROUND	(1U << 31)

/*
 * STATUS after a command. The device's own errors, in the order of its checks:
 *
 *	EOPNOTSUPP	no such operation
 *	EINVAL		LENGTH is 0
 *	EOVERFLOW	IOVA + LENGTH is 2^64 or more
 *	E2BIG		LENGTH is more than MAX_LENGTH
 *	EINVAL		PIN or UNPIN of a range that isn't whole pages
 *	ENOSPC		PIN would exceed MAX_PINS, or PAGE_PINS for a page
 *	ENXIO		UNPIN, WRITE or READ of a page that isn't pinned
 *	EINTR		a signal, or a reset or close of the device, ended PIN between
 *			two batches or DMA_WRITE or DMA_READ between two chunks
 *
 * And those of raw pins, in place of these but EOPNOTSUPP:
 *
 *	EINVAL		LENGTH isn't whole pages, or RAW_PIN's or RAW_UNPIN's SEED has
 *			more than 32 bits
 *	E2BIG		LENGTH is more than MAX_LENGTH
 *	ENOSPC		RAW_PIN would exceed MAX_PINS
 *	EOVERFLOW	RAW_WRITE or RAW_READ of pages that end at 2^64 or behind
 *	ENXIO		there is no such raw pin
 *	EACCES		RAW_WRITE or RAW_READ of one without the protection for it
 *
 * While a command is in progress:
 *
 *	EINPROGRESS	it hasn't completed
 *
 * Errors of the IOMMU driver for PIN, DMA_WRITE and DMA_READ, passed on:
 *
 *	EINVAL		not mapped
 *	EPERM		mapped without permission: PIN and DMA_WRITE need read and
 *			write, DMA_READ needs read
 *	EFAULT		the process has no memory there
 *	ENOMEM		RLIMIT_MEMLOCK exceeded, or out of memory
 *
 * and for RAW_PIN:
 *
 *	EINVAL		LENGTH is 0, or not mapped
 *	E2BIG		more than VFIO_PIN_PAGES_MAX_ENTRIES pages
 *	EOVERFLOW	pages beyond the end of the address space
 *	EPERM		mapped without the protection, or the protection has other bits
 *	EFAULT, ENOMEM	as above
 *
 * COUNT is LENGTH after success, less IOVA % PAGE_SIZE for RAW_WRITE and RAW_READ.
 * After a failure it is 0, except for DMA_WRITE and DMA_READ: these stop at the
 * first vfio_dma_rw() that fails, and COUNT is the number of bytes before it.
 */

/* Maximum number of pins of one page. */
#define RUST_MDEV_DMA_PAGE_PINS		65535

/*
 * How commands are split. One vfio_pin_pages() or vfio_unpin_pages() stays inside
 * a batch: PIN_BATCH pages of IOVA, naturally aligned. One vfio_dma_rw() stays
 * inside a chunk: DMA_CHUNK bytes of IOVA, naturally aligned.
 */
#define RUST_MDEV_DMA_PIN_BATCH		64
#define RUST_MDEV_DMA_DMA_CHUNK		65536

/*
 * The pattern: what a write stores at an IOVA, which depends on seed and IOVA, not
 * on the command's range. Memory is an array of little endian 64-bit words, at
 * IOVAs that are multiples of 8; a write of part of a word stores the bytes in
 * range. Arithmetic is modulo 2^64, mix() is the finalizer of splitmix64:
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
 * order of IOVA, with bytes outside the range taken as 0:
 *
 *	d = DIGEST_INIT
 *	d = (rotate_left(d, 5) ^ word) * DIGEST_MUL	for every word
 */
#define RUST_MDEV_DMA_DIGEST_INIT	0xcbf29ce484222325ULL
#define RUST_MDEV_DMA_DIGEST_MUL	0x517cc1b727220a95ULL

/*
 * Interrupts. An event sets its bit in IRQ_STATUS, enabled or not; the bit stays
 * set until 1 is written to it.
 *
 * INTx is level triggered: asserted while a bit is set in both IRQ_STATUS and
 * IRQ_ENABLE and PCI_COMMAND_INTX_DISABLE is clear. MSI is edge triggered: an event
 * whose bit is set in IRQ_ENABLE sends a message, whatever IRQ_STATUS was. Bit n
 * uses vector n, or vector 0 if the user has enabled only that.
 */
#define RUST_MDEV_DMA_IRQ_COMMAND	(1U << 0)	/* a command has completed */
#define RUST_MDEV_DMA_IRQ_GENERATOR	(1U << 1)	/* the generator has stopped by itself */

/* Number of MSI vectors. */
#define RUST_MDEV_DMA_MSI_VECTORS	2

/*
 * The generator. Write number n, counted from 0 by GEN_COUNTER, stores the pattern
 * of seed(n) in page(n) of the range, which has P pages:
 *
 *	page(n)	= (n % P * GEN_STRIDE + mix(GEN_SEED) % P) % P
 *	seed(n)	= mix(GEN_SEED + (n + 1) * PATTERN_STEP)
 *
 * GEN_STRIDE is a prime and P is less than 2^31: no product overflows 64 bits, and
 * any P consecutive writes write every page once. So at any time each page has the
 * contents of one of the last P writes, or hasn't been written yet.
 *
 * GEN_MODE is a set of methods. Of its W bits, lowest first, write n uses number
 * (n % P + n / P) % W: so each page is written by every method in turn.
 */
#define RUST_MDEV_DMA_GEN_STRIDE	2654435761ULL

#define RUST_MDEV_DMA_GEN_PINNED	(1U << 0)	/* through a page pinned by PIN */
#define RUST_MDEV_DMA_GEN_DMA_RW	(1U << 1)	/* by vfio_dma_rw() */
#define RUST_MDEV_DMA_GEN_PIN		(1U << 2)	/* pin the page, write, unpin it */

/*
 * START latches GEN_IOVA to GEN_MODE, sets GEN_COUNTER to 0 and starts writing.
 * CONTINUE does the same but keeps GEN_COUNTER. STOP stops: no page is written
 * after the write to GEN_CONTROL has returned. START and CONTINUE stop a running
 * generator first.
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
 *	0		it wasn't started, was stopped, or has reached GEN_LIMIT
 *
 * Errors of a write to GEN_CONTROL, in the order of the checks:
 *
 *	EOPNOTSUPP	not one of enum rust_mdev_dma_gen_control
 *	EINVAL		GEN_LENGTH is 0, the range isn't whole pages, or GEN_MODE has
 *			no bit set or an unknown one
 *	EOVERFLOW	GEN_IOVA + GEN_LENGTH is 2^64 or more
 *	E2BIG		GEN_LENGTH is more than MAX_LENGTH, or P is 2^31 or more
 *
 * If a write of a page fails, the generator stops without counting it, with the
 * errno that PIN, WRITE or DMA_WRITE of that page would have.
 */

/*
 * Migration data, for tools that parse it: an IDENTITY section followed by a
 * DEVICE section and perhaps a RAW_PINS section. The size of a section is a
 * multiple of 8 bytes; all fields are little endian. A section begins with this
 * header:
 *
 *	u64 magic	MIG_MAGIC
 *	u32 version	MIG_VERSION
 *	u32 section	enum rust_mdev_dma_mig_section
 *	u64 length	bytes after this header
 *	u64 checksum	the digest (as above) of the 24 bytes before this field and
 *			the length bytes after it
 *
 * IDENTITY has two u64: vendor ID in bits 0 to 15 and device ID in bits 16 to 31;
 * PAGE_SIZE.
 *
 * DEVICE has the 256 bytes of configuration space, the registers up to the end of
 * GEN_COUNTER, and then, each a u64 unless noted: 1 if a command is queued, or 0;
 * its operation, IOVA, LENGTH, SEED; 1 if the generator is running, or 0; its IOVA,
 * LENGTH, SEED, LIMIT, RATE (u32), MODE (u32), GEN_COUNTER, GEN_STATUS; the number
 * of runs of pages with the same number of pins, and for each run its IOVA, number
 * of pages (u32), and number of pins of each page (u32).
 *
 * If the device has raw pins, a RAW_PINS section follows, with each one's IOVA,
 * number of pages (u32), and protection (u32).
 */
#define RUST_MDEV_DMA_MIG_MAGIC		0x45544154534d444dULL	/* "MDMSTATE" */
#define RUST_MDEV_DMA_MIG_VERSION	1

enum rust_mdev_dma_mig_section {
	RUST_MDEV_DMA_MIG_IDENTITY	= 1,
	RUST_MDEV_DMA_MIG_DEVICE	= 2,
	RUST_MDEV_DMA_MIG_RAW_PINS	= 3,
};

#endif /* _UAPI_LINUX_RUST_MDEV_DMA_H */
