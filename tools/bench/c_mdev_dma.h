/* SPDX-License-Identifier: GPL-2.0 */
/* What the files of c_mdev_dma share. */
#ifndef _C_MDEV_DMA_H
#define _C_MDEV_DMA_H

#include <linux/mutex.h>
#include <linux/rust_mdev_dma.h>
#include <linux/vfio.h>
#include <linux/xarray.h>

#define OPS		(BIT(RUST_MDEV_DMA_OP_PIN) | BIT(RUST_MDEV_DMA_OP_UNPIN) | \
			 BIT(RUST_MDEV_DMA_OP_WRITE) | BIT(RUST_MDEV_DMA_OP_READ) | \
			 BIT(RUST_MDEV_DMA_OP_DMA_WRITE) | BIT(RUST_MDEV_DMA_OP_DMA_READ))
/* The defaults of rust_mdev_dma. */
#define MAX_PINS	65536
#define MAX_LENGTH	(256 << 20)
#define BATCH_PAGES	RUST_MDEV_DMA_PIN_BATCH

/* Pages that one vfio_pin_pages() stays inside. */
struct batch {
	/* Valid where counts isn't 0. */
	struct page *pages[BATCH_PAGES];
	/* Pins of each page. */
	u16 counts[BATCH_PAGES];
	/* Their sum. */
	u32 held;
};

struct c_mdev_dma {
	struct vfio_device vdev;
	/*
	 * Held while a command runs and in dma_unmap, across the page faults of
	 * vfio_pin_pages() and vfio_dma_rw(), which take as long as who serves the
	 * memory likes: system calls that wait for it can be killed. Taken before
	 * type1's iommu->lock, and in dma_unmap after its device_list_lock.
	 */
	struct mutex lock;
	/* struct batch by IOVA / BATCH_SIZE; NULL if nothing is pinned there. */
	struct xarray batches;
	/* Pins of all batches. */
	u64 held;
	/* The registers. */
	u8 bar[RUST_MDEV_DMA_BAR_SIZE] __aligned(8);
	/* DMA_CHUNK bytes for vfio_dma_rw() to copy from or to. */
	__le64 *window;
};

/* What a command has done. */
struct outcome {
	u64 count;
	u64 digest;
};

static inline __le32 *reg32(struct c_mdev_dma *dev, unsigned int offset)
{
	return (__le32 *)(dev->bar + offset);
}

static inline __le64 *reg64(struct c_mdev_dma *dev, unsigned int offset)
{
	return (__le64 *)(dev->bar + offset);
}

/* Runs the command in the registers. Called with the lock held, as the next one. */
int c_mdev_dma_run(struct c_mdev_dma *dev, struct outcome *outcome);
/* Removes all pins of a range. */
void c_mdev_dma_revoke(struct c_mdev_dma *dev, u64 iova, u64 length);

#endif /* _C_MDEV_DMA_H */
