// SPDX-License-Identifier: GPL-2.0
/*
 * Pins, and the commands of c_mdev_dma: see device.c.
 */
#include <linux/highmem.h>
#include <linux/iommu.h>
#include <linux/overflow.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include "c_mdev_dma.h"

#define WORDS		(PAGE_SIZE / sizeof(__le64))
#define BATCH_SIZE	((u64)BATCH_PAGES * PAGE_SIZE)

struct span {
	u64 iova;
	u64 end;
};

/*
 * Removes the part in the first batch from span. Returns its first page in the batch,
 * sets n to the number of pages that it touches.
 */
static int next_part(struct span *span, int *n)
{
	u64 at = span->iova % BATCH_SIZE;
	u64 size = min(span->end - span->iova, BATCH_SIZE - at);

	span->iova += size;
	*n = DIV_ROUND_UP(at + size, PAGE_SIZE) - at / PAGE_SIZE;
	return at / PAGE_SIZE;
}

static struct batch *batch_of(struct c_mdev_dma *dev, u64 iova)
{
	return xa_load(&dev->batches, iova / BATCH_SIZE);
}

static void free_if_empty(struct c_mdev_dma *dev, struct batch *batch, u64 iova)
{
	if (!batch->held)
		kfree(xa_erase(&dev->batches, iova / BATCH_SIZE));
}

/*
 * The number of pages that one vfio_pin_pages() may take. iommufd wants ranges back as
 * they were pinned, type1 takes any part of them.
 */
static int pages_per_call(struct c_mdev_dma *dev)
{
#if IS_ENABLED(CONFIG_IOMMUFD)
	if (dev->vdev.iommufd_access)
		return 1;
#endif
	return BATCH_PAGES;
}

/* As vfio_unpin_pages(), of pages that pin_pages() has pinned, or parts of them. */
static void unpin_pages(struct c_mdev_dma *dev, u64 iova, int n)
{
	int size, at, step = pages_per_call(dev);

	for (at = 0; at < n; at += size) {
		size = min(step, n - at);
		vfio_unpin_pages(&dev->vdev, iova + at * PAGE_SIZE, size);
	}
}

/* Pins n pages, or none. Returns 0 or an errno; *pages is anything then. */
static int pin_pages(struct c_mdev_dma *dev, u64 iova, int n, struct page **pages)
{
	int ret, size, at, step = pages_per_call(dev);

	for (at = 0; at < n; at += size) {
		size = min(step, n - at);
		ret = vfio_pin_pages(&dev->vdev, iova + at * PAGE_SIZE, size,
				     IOMMU_READ | IOMMU_WRITE, pages + at);
		if (ret != size) {
			unpin_pages(dev, iova, at + max(ret, 0));
			return ret < 0 ? ret : -EFAULT;
		}
	}
	return 0;
}

/* Removes one pin of each of n pages, all of which must be pinned. */
static void unpin_part(struct c_mdev_dma *dev, struct batch *batch, u64 iova, int n)
{
	int i, first = iova % BATCH_SIZE / PAGE_SIZE;

	unpin_pages(dev, iova, n);
	for (i = first; i < first + n; i++)
		batch->counts[i]--;
	batch->held -= n;
	dev->held -= n;
}

/* Removes one pin of each page of span, all of which must be pinned. */
static void unpin(struct c_mdev_dma *dev, struct span span)
{
	while (span.iova < span.end) {
		u64 iova = span.iova;
		struct batch *batch = batch_of(dev, iova);
		int n;

		next_part(&span, &n);
		unpin_part(dev, batch, iova, n);
		free_if_empty(dev, batch, iova);
	}
}

/* Adds one pin to each of n pages, which are in one batch, or to none. */
static int pin_part(struct c_mdev_dma *dev, struct batch *batch, u64 iova, int n)
{
	int ret, i, first = iova % BATCH_SIZE / PAGE_SIZE;
	bool shared = batch->held;
	struct page *before[BATCH_PAGES];

	/* A page can only have so many pins if the batch has. */
	if (batch->held >= RUST_MDEV_DMA_PAGE_PINS)
		for (i = first; i < first + n; i++)
			if (batch->counts[i] == RUST_MDEV_DMA_PAGE_PINS)
				return -ENOSPC;
	/* If it fails, vfio_pin_pages() may leave anything there. */
	if (shared)
		memcpy(before, batch->pages, sizeof(before));
	ret = pin_pages(dev, iova, n, batch->pages + first);
	if (ret) {
		if (shared)
			memcpy(batch->pages, before, sizeof(before));
		return ret;
	}
	for (i = first; i < first + n; i++)
		batch->counts[i]++;
	batch->held += n;
	dev->held += n;
	return 0;
}

/* The batch at iova, which is made if there is none, or an error pointer. */
static struct batch *make_batch(struct c_mdev_dma *dev, u64 iova)
{
	struct batch *batch = batch_of(dev, iova);
	int ret;

	if (batch)
		return batch;
	batch = kcalloc(1, sizeof(*batch), GFP_KERNEL_ACCOUNT);
	if (!batch)
		return ERR_PTR(-ENOMEM);
	ret = xa_err(xa_store(&dev->batches, iova / BATCH_SIZE, batch,
			      GFP_KERNEL_ACCOUNT));
	if (!ret)
		return batch;
	kfree(batch);
	return ERR_PTR(ret);
}

/* Adds one pin to each page of span, or to none. */
static int pin(struct c_mdev_dma *dev, struct span span)
{
	u64 start = span.iova;

	if ((span.end - start) / PAGE_SIZE > MAX_PINS - dev->held)
		return -ENOSPC;
	while (span.iova < span.end) {
		u64 iova = span.iova;
		struct batch *batch;
		int n, ret = -EINTR;

		if (!signal_pending(current)) {
			batch = make_batch(dev, iova);
			ret = PTR_ERR_OR_ZERO(batch);
		}
		if (!ret) {
			next_part(&span, &n);
			ret = pin_part(dev, batch, iova, n);
			free_if_empty(dev, batch, iova);
		}
		if (ret) {
			unpin(dev, (struct span){ start, iova });
			return ret;
		}
	}
	return 0;
}

/* Whether each page is pinned that span touches. */
static bool all_pinned(struct c_mdev_dma *dev, struct span span)
{
	while (span.iova < span.end) {
		struct batch *batch = batch_of(dev, span.iova);
		int n, i = next_part(&span, &n);

		for (; n; i++, n--)
			if (!batch || !batch->counts[i])
				return false;
	}
	return true;
}

static u64 mix(u64 z)
{
	z = (z ^ (z >> 30)) * RUST_MDEV_DMA_PATTERN_MIX_1;
	z = (z ^ (z >> 27)) * RUST_MDEV_DMA_PATTERN_MIX_2;
	return z ^ (z >> 31);
}

/* Stores the pattern of the page at iova in its bytes from first to last. */
static void fill_page(__le64 *words, u64 seed, u64 iova, size_t first, size_t last)
{
	u64 word = mix(seed + iova / RUST_MDEV_DMA_PATTERN_BLOCK * RUST_MDEV_DMA_PATTERN_STEP);
	size_t i, size;

	if (last - first == PAGE_SIZE) {
		for (i = 0; i < WORDS; i++, word += RUST_MDEV_DMA_PATTERN_WORD_STEP)
			words[i] = cpu_to_le64(word);
		return;
	}
	for (; first < last; first += size) {
		size_t at = first % sizeof(__le64);
		__le64 value;

		i = first / sizeof(__le64);
		value = cpu_to_le64(word + i * RUST_MDEV_DMA_PATTERN_WORD_STEP);
		size = min(last - first, sizeof(value) - at);
		memcpy((u8 *)words + first, (u8 *)&value + at, size);
	}
}

/* Adds the bytes from first to last to a digest, with those around them in words as 0. */
static u64 add_digest(u64 digest, const __le64 *words, size_t first, size_t last)
{
	size_t i;

	for (i = first / sizeof(*words); i < DIV_ROUND_UP(last, sizeof(*words)); i++) {
		size_t start = i * sizeof(*words), end = start + sizeof(*words);
		u64 word = le64_to_cpu(words[i]);

		if (start < first)
			word &= U64_MAX << (8 * (first - start));
		if (end > last)
			word &= U64_MAX >> (8 * (end - last));
		digest = (rol64(digest, 5) ^ word) * RUST_MDEV_DMA_DIGEST_MUL;
	}
	return digest;
}

/* Writes through the pages of span, which are pinned, or reads. Returns the digest then. */
static u64 access_pages(struct c_mdev_dma *dev, struct span span, u64 seed, bool write)
{
	u64 digest = RUST_MDEV_DMA_DIGEST_INIT;

	while (span.iova < span.end) {
		u64 iova = span.iova;
		struct batch *batch = batch_of(dev, iova);
		int n, i = next_part(&span, &n);

		for (; n; i++, n--) {
			size_t first = offset_in_page(iova);
			size_t size = min(span.iova - iova, PAGE_SIZE - first);
			void *addr = kmap_local_page(batch->pages[i]);

			if (write)
				fill_page(addr, seed, iova, first, first + size);
			else
				digest = add_digest(digest, addr, first, first + size);
			kunmap_local(addr);
			iova += size;
		}
	}
	return digest;
}

/* Stores the pattern of [iova, iova + size), which is in one chunk, in window. */
static void fill_window(struct c_mdev_dma *dev, u64 seed, u64 iova, size_t size)
{
	while (size) {
		size_t first = offset_in_page(iova);
		size_t part = min(size, PAGE_SIZE - first);
		size_t page = (iova - first) % RUST_MDEV_DMA_DMA_CHUNK;

		fill_page(dev->window + page / sizeof(__le64), seed, iova, first, first + part);
		iova += part;
		size -= part;
	}
}

static int dma_rw(struct c_mdev_dma *dev, struct span span, u64 seed, bool write,
		  struct outcome *outcome)
{
	u64 digest = RUST_MDEV_DMA_DIGEST_INIT;

	while (span.iova < span.end) {
		u64 at = span.iova % RUST_MDEV_DMA_DMA_CHUNK;
		u64 size = min(span.end - span.iova, RUST_MDEV_DMA_DMA_CHUNK - at);
		int ret;

		if (signal_pending(current))
			return -EINTR;
		if (write)
			fill_window(dev, seed, span.iova, size);
		ret = vfio_dma_rw(&dev->vdev, span.iova, (u8 *)dev->window + at, size, write);
		if (ret)
			return ret;
		if (!write)
			digest = add_digest(digest, dev->window, at, at + size);
		span.iova += size;
		outcome->count += size;
	}
	if (!write)
		outcome->digest = digest;
	return 0;
}

int c_mdev_dma_run(struct c_mdev_dma *dev, struct outcome *outcome)
{
	u64 iova = le64_to_cpup(reg64(dev, RUST_MDEV_DMA_REG_IOVA));
	u64 length = le64_to_cpup(reg64(dev, RUST_MDEV_DMA_REG_LENGTH));
	u64 seed = le64_to_cpup(reg64(dev, RUST_MDEV_DMA_REG_SEED));
	u32 op = le32_to_cpup(reg32(dev, RUST_MDEV_DMA_REG_COMMAND)) &
		 ~RUST_MDEV_DMA_COMMAND_BACKGROUND;
	struct span span = { .iova = iova };
	int ret;

	if (op >= 32 || !(OPS & BIT(op)))
		return -EOPNOTSUPP;
	if (!length)
		return -EINVAL;
	if (check_add_overflow(iova, length, &span.end))
		return -EOVERFLOW;
	if (length > MAX_LENGTH)
		return -E2BIG;
	if (op <= RUST_MDEV_DMA_OP_UNPIN && !PAGE_ALIGNED(iova | length))
		return -EINVAL;

	switch (op) {
	case RUST_MDEV_DMA_OP_PIN:
		ret = pin(dev, span);
		if (ret)
			return ret;
		break;
	case RUST_MDEV_DMA_OP_DMA_WRITE:
	case RUST_MDEV_DMA_OP_DMA_READ:
		return dma_rw(dev, span, seed, op == RUST_MDEV_DMA_OP_DMA_WRITE, outcome);
	default:
		if (!all_pinned(dev, span))
			return -ENXIO;
		if (op == RUST_MDEV_DMA_OP_UNPIN)
			unpin(dev, span);
		else if (op == RUST_MDEV_DMA_OP_WRITE)
			access_pages(dev, span, seed, true);
		else
			outcome->digest = access_pages(dev, span, 0, false);
	}
	outcome->count = length;
	return 0;
}

void c_mdev_dma_revoke(struct c_mdev_dma *dev, u64 iova, u64 length)
{
	struct batch *batch;
	unsigned long index;
	int i;

	xa_for_each_range(&dev->batches, index, batch, iova / BATCH_SIZE,
			  (iova + length - 1) / BATCH_SIZE) {
		for (i = 0; i < BATCH_PAGES; i++) {
			u64 page = index * BATCH_SIZE + i * PAGE_SIZE;

			if (page < iova || page - iova >= length)
				continue;
			while (batch->counts[i])
				unpin_part(dev, batch, page, 1);
		}
		free_if_empty(dev, batch, index * BATCH_SIZE);
	}
}
