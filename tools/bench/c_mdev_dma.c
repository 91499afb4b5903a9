// SPDX-License-Identifier: GPL-2.0
/*
 * Reference for "dirtyscope bench": a mediated device in C that implements what is
 * measured of rust_mdev_dma, that is PIN, UNPIN, WRITE and DMA_WRITE. The registers
 * are those of include/uapi/linux/rust_mdev_dma.h.
 *
 * Not implemented: configuration space, interrupts, reads, a second pin of a page,
 * ranges that aren't whole pages, limits. In addition it has MEMSET, which sets
 * pinned pages to the lowest byte of SEED by the kernel's memset().
 */
#include <linux/highmem.h>
#include <linux/iommu.h>
#include <linux/mdev.h>
#include <linux/module.h>
#include <linux/overflow.h>
#include <linux/rust_mdev_dma.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/vfio.h>
#include <linux/xarray.h>

#define NAME		"c_mdev_dma"
#define OP_MEMSET	31
#define OPS		(BIT(RUST_MDEV_DMA_OP_PIN) | BIT(RUST_MDEV_DMA_OP_UNPIN) | \
			 BIT(RUST_MDEV_DMA_OP_WRITE) | BIT(RUST_MDEV_DMA_OP_DMA_WRITE) | \
			 BIT(OP_MEMSET))
#define WORDS		(PAGE_SIZE / sizeof(__le64))
#define BATCH_PAGES	RUST_MDEV_DMA_PIN_BATCH
#define BATCH_SIZE	((u64)BATCH_PAGES * PAGE_SIZE)

struct c_mdev_dma {
	struct vfio_device vdev;
	/*
	 * Held while a command runs and in dma_unmap, across the page faults of
	 * vfio_pin_pages() and vfio_dma_rw(). Taken before type1's iommu->lock,
	 * and in dma_unmap after its device_list_lock.
	 */
	struct mutex lock;
	/* struct page *[BATCH_PAGES] by IOVA / BATCH_SIZE; NULL if not pinned. */
	struct xarray batches;
	/* The registers. */
	u8 bar[RUST_MDEV_DMA_BAR_SIZE] __aligned(8);
	/* DMA_CHUNK bytes for vfio_dma_rw() to copy from. */
	__le64 *window;
};

struct span {
	u64 iova;
	u64 end;
};

#define to_dev(device)	container_of(device, struct c_mdev_dma, vdev)

static __le32 *reg32(struct c_mdev_dma *dev, unsigned int offset)
{
	return (__le32 *)(dev->bar + offset);
}

static __le64 *reg64(struct c_mdev_dma *dev, unsigned int offset)
{
	return (__le64 *)(dev->bar + offset);
}

/* Removes the part in the first batch from span: returns its slots, sets n. */
static struct page **next_part(struct page **batch, struct span *span, int *n)
{
	u64 at = span->iova % BATCH_SIZE;
	u64 size = min(span->end - span->iova, BATCH_SIZE - at);

	span->iova += size;
	*n = size / PAGE_SIZE;
	return batch ? batch + at / PAGE_SIZE : NULL;
}

static struct page **batch_of(struct c_mdev_dma *dev, u64 iova)
{
	return xa_load(&dev->batches, iova / BATCH_SIZE);
}

static void free_if_empty(struct c_mdev_dma *dev, struct page **batch, u64 iova)
{
	if (!memchr_inv(batch, 0, BATCH_PAGES * sizeof(*batch)))
		kfree(xa_erase(&dev->batches, iova / BATCH_SIZE));
}

/* Unpins the pages of span, all of which must be pinned. */
static void unpin(struct c_mdev_dma *dev, struct span span)
{
	while (span.iova < span.end) {
		u64 iova = span.iova;
		struct page **batch = batch_of(dev, iova);
		int n;
		struct page **pages = next_part(batch, &span, &n);

		vfio_unpin_pages(&dev->vdev, iova, n);
		memset(pages, 0, n * sizeof(*pages));
		free_if_empty(dev, batch, iova);
	}
}

/* Pins n pages at iova, which are in one batch. */
static int pin_part(struct c_mdev_dma *dev, struct page **pages, u64 iova, int n)
{
	int ret;

	if (memchr_inv(pages, 0, n * sizeof(*pages)))
		return -EBUSY;
	ret = vfio_pin_pages(&dev->vdev, iova, n, IOMMU_READ | IOMMU_WRITE, pages);
	return ret < 0 ? ret : 0;
}

static int pin(struct c_mdev_dma *dev, struct span span)
{
	u64 start = span.iova;

	while (span.iova < span.end) {
		u64 iova = span.iova;
		struct page **batch = batch_of(dev, iova);
		int n, ret = signal_pending(current) ? -EINTR : 0;

		if (!ret && !batch) {
			batch = kcalloc(BATCH_PAGES, sizeof(*batch), GFP_KERNEL);
			ret = batch ? xa_err(xa_store(&dev->batches, iova / BATCH_SIZE,
						      batch, GFP_KERNEL)) : -ENOMEM;
			if (ret)
				kfree(batch);
		}
		if (!ret) {
			struct page **pages = next_part(batch, &span, &n);

			ret = pin_part(dev, pages, iova, n);
			if (ret)
				free_if_empty(dev, batch, iova);
		}
		if (ret) {
			unpin(dev, (struct span){ start, iova });
			return ret;
		}
	}
	return 0;
}

static bool all_pinned(struct c_mdev_dma *dev, struct span span)
{
	while (span.iova < span.end) {
		struct page **batch = batch_of(dev, span.iova);
		int i, n;
		struct page **pages = next_part(batch, &span, &n);

		for (i = 0; i < n; i++)
			if (!pages || !pages[i])
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

/* Stores the pattern of the page at iova in words. */
static void fill_page(__le64 *words, u64 seed, u64 iova)
{
	u64 word = mix(seed + iova / RUST_MDEV_DMA_PATTERN_BLOCK * RUST_MDEV_DMA_PATTERN_STEP);
	unsigned int i;

	for (i = 0; i < WORDS; i++, word += RUST_MDEV_DMA_PATTERN_WORD_STEP)
		words[i] = cpu_to_le64(word);
}

/* WRITE and MEMSET */
static void write_pages(struct c_mdev_dma *dev, struct span span, u64 seed, bool set)
{
	while (span.iova < span.end) {
		u64 iova = span.iova;
		int i, n;
		struct page **pages = next_part(batch_of(dev, iova), &span, &n);

		for (i = 0; i < n; i++) {
			void *addr = kmap_local_page(pages[i]);

			if (set)
				__memset(addr, seed, PAGE_SIZE);
			else
				fill_page(addr, seed, iova + i * PAGE_SIZE);
			kunmap_local(addr);
		}
	}
}

static int dma_write(struct c_mdev_dma *dev, struct span span, u64 seed)
{
	while (span.iova < span.end) {
		u64 at = span.iova % RUST_MDEV_DMA_DMA_CHUNK;
		u64 size = min(span.end - span.iova, RUST_MDEV_DMA_DMA_CHUNK - at);
		u64 page;
		int ret;

		if (signal_pending(current))
			return -EINTR;
		for (page = 0; page < size; page += PAGE_SIZE)
			fill_page(dev->window + page / sizeof(__le64), seed, span.iova + page);
		ret = vfio_dma_rw(&dev->vdev, span.iova, dev->window, size, true);
		if (ret)
			return ret;
		span.iova += size;
	}
	return 0;
}

static int run_command(struct c_mdev_dma *dev)
{
	u64 iova = le64_to_cpup(reg64(dev, RUST_MDEV_DMA_REG_IOVA));
	u64 length = le64_to_cpup(reg64(dev, RUST_MDEV_DMA_REG_LENGTH));
	u64 seed = le64_to_cpup(reg64(dev, RUST_MDEV_DMA_REG_SEED));
	u32 op = le32_to_cpup(reg32(dev, RUST_MDEV_DMA_REG_COMMAND));
	struct span span = { .iova = iova };

	if (!length || !PAGE_ALIGNED(iova | length) ||
	    check_add_overflow(iova, length, &span.end))
		return -EINVAL;

	switch (op) {
	case RUST_MDEV_DMA_OP_PIN:
		return pin(dev, span);
	case RUST_MDEV_DMA_OP_DMA_WRITE:
		return dma_write(dev, span, seed);
	case RUST_MDEV_DMA_OP_UNPIN:
	case RUST_MDEV_DMA_OP_WRITE:
	case OP_MEMSET:
		if (!all_pinned(dev, span))
			return -ENXIO;
		if (op == RUST_MDEV_DMA_OP_UNPIN)
			unpin(dev, span);
		else
			write_pages(dev, span, seed, op == OP_MEMSET);
		return 0;
	default:
		return -EOPNOTSUPP;
	}
}

/* The offset of an access in the BAR, or an errno. */
static int bar_offset(size_t count, loff_t pos)
{
	u64 offset = pos - ((u64)VFIO_PCI_BAR0_REGION_INDEX << RUST_MDEV_DMA_REGION_SHIFT);

	if ((count != 4 && count != 8) || offset % count || offset >= RUST_MDEV_DMA_BAR_SIZE)
		return -EINVAL;
	return offset;
}

static ssize_t c_mdev_dma_read(struct vfio_device *vdev, char __user *buf,
			       size_t count, loff_t *ppos)
{
	struct c_mdev_dma *dev = to_dev(vdev);
	int offset = bar_offset(count, *ppos);
	u8 bytes[8];

	if (offset < 0)
		return offset;
	mutex_lock(&dev->lock);
	memcpy(bytes, dev->bar + offset, count);
	mutex_unlock(&dev->lock);
	if (copy_to_user(buf, bytes, count))
		return -EFAULT;
	*ppos += count;
	return count;
}

static ssize_t c_mdev_dma_write(struct vfio_device *vdev, const char __user *buf,
				size_t count, loff_t *ppos)
{
	struct c_mdev_dma *dev = to_dev(vdev);
	int offset = bar_offset(count, *ppos);
	u8 bytes[8];
	int ret;

	if (offset < 0)
		return offset;
	if (copy_from_user(bytes, buf, count))
		return -EFAULT;
	mutex_lock(&dev->lock);
	if (offset >= RUST_MDEV_DMA_REG_IOVA && offset + count <= RUST_MDEV_DMA_REG_STATUS)
		memcpy(dev->bar + offset, bytes, count);
	if (offset == RUST_MDEV_DMA_REG_COMMAND) {
		ret = run_command(dev);
		*reg32(dev, RUST_MDEV_DMA_REG_STATUS) = cpu_to_le32(-ret);
		*reg64(dev, RUST_MDEV_DMA_REG_COUNT) =
			ret ? 0 : *reg64(dev, RUST_MDEV_DMA_REG_LENGTH);
	}
	mutex_unlock(&dev->lock);
	*ppos += count;
	return count;
}

static int c_mdev_dma_region_info(struct vfio_device *vdev, struct vfio_region_info *info,
				  struct vfio_info_cap *caps)
{
	if (info->index != VFIO_PCI_BAR0_REGION_INDEX)
		return -EINVAL;
	info->flags = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
	info->size = RUST_MDEV_DMA_BAR_SIZE;
	info->offset = (u64)VFIO_PCI_BAR0_REGION_INDEX << RUST_MDEV_DMA_REGION_SHIFT;
	return 0;
}

/* Revokes all pins of a range. */
static void c_mdev_dma_unmap(struct vfio_device *vdev, u64 iova, u64 length)
{
	struct c_mdev_dma *dev = to_dev(vdev);
	struct page **batch;
	unsigned long index;
	int i;

	mutex_lock(&dev->lock);
	xa_for_each_range(&dev->batches, index, batch, iova / BATCH_SIZE,
			  (iova + length - 1) / BATCH_SIZE) {
		for (i = 0; i < BATCH_PAGES; i++) {
			u64 page = index * BATCH_SIZE + i * PAGE_SIZE;

			if (!batch[i] || page < iova || page - iova >= length)
				continue;
			vfio_unpin_pages(vdev, page, 1);
			batch[i] = NULL;
		}
		free_if_empty(dev, batch, index * BATCH_SIZE);
	}
	mutex_unlock(&dev->lock);
}

static int c_mdev_dma_open(struct vfio_device *vdev)
{
	struct c_mdev_dma *dev = to_dev(vdev);

	memset(dev->bar, 0, sizeof(dev->bar));
	*reg32(dev, RUST_MDEV_DMA_REG_MAGIC) = cpu_to_le32(RUST_MDEV_DMA_MAGIC);
	*reg32(dev, RUST_MDEV_DMA_REG_VERSION) = cpu_to_le32(RUST_MDEV_DMA_VERSION);
	*reg32(dev, RUST_MDEV_DMA_REG_OPS) = cpu_to_le32(OPS);
	*reg32(dev, RUST_MDEV_DMA_REG_PAGE_SIZE) = cpu_to_le32(PAGE_SIZE);
	*reg64(dev, RUST_MDEV_DMA_REG_MAX_PINS) = cpu_to_le64(U64_MAX);
	*reg64(dev, RUST_MDEV_DMA_REG_MAX_LENGTH) = cpu_to_le64(U64_MAX);
	return 0;
}

static void c_mdev_dma_close(struct vfio_device *vdev)
{
	c_mdev_dma_unmap(vdev, 0, U64_MAX);
}

static int c_mdev_dma_init(struct vfio_device *vdev)
{
	struct c_mdev_dma *dev = to_dev(vdev);

	dev->window = kvmalloc(RUST_MDEV_DMA_DMA_CHUNK, GFP_KERNEL);
	if (!dev->window)
		return -ENOMEM;
	mutex_init(&dev->lock);
	xa_init(&dev->batches);
	return 0;
}

static void c_mdev_dma_release(struct vfio_device *vdev)
{
	struct c_mdev_dma *dev = to_dev(vdev);

	xa_destroy(&dev->batches);
	mutex_destroy(&dev->lock);
	kvfree(dev->window);
}

static const struct vfio_device_ops c_mdev_dma_ops = {
	.name = NAME,
	.init = c_mdev_dma_init,
	.release = c_mdev_dma_release,
	.open_device = c_mdev_dma_open,
	.close_device = c_mdev_dma_close,
	.read = c_mdev_dma_read,
	.write = c_mdev_dma_write,
	.get_region_info_caps = c_mdev_dma_region_info,
	.dma_unmap = c_mdev_dma_unmap,
	.bind_iommufd = vfio_iommufd_emulated_bind,
	.unbind_iommufd = vfio_iommufd_emulated_unbind,
	.attach_ioas = vfio_iommufd_emulated_attach_ioas,
	.detach_ioas = vfio_iommufd_emulated_detach_ioas,
};

static int c_mdev_dma_probe(struct mdev_device *mdev)
{
	struct c_mdev_dma *dev = vfio_alloc_device(c_mdev_dma, vdev, &mdev->dev,
						   &c_mdev_dma_ops);
	int ret;

	if (IS_ERR(dev))
		return PTR_ERR(dev);
	dev_set_drvdata(&mdev->dev, dev);
	ret = vfio_register_emulated_iommu_dev(&dev->vdev);
	if (ret)
		vfio_put_device(&dev->vdev);
	return ret;
}

static void c_mdev_dma_remove(struct mdev_device *mdev)
{
	struct c_mdev_dma *dev = dev_get_drvdata(&mdev->dev);

	vfio_unregister_group_dev(&dev->vdev);
	vfio_put_device(&dev->vdev);
}

static struct mdev_driver c_mdev_dma_driver = {
	.device_api = VFIO_DEVICE_API_PCI_STRING,
	.max_instances = 1,
	.driver = {
		.name = NAME,
		.owner = THIS_MODULE,
		.mod_name = KBUILD_MODNAME,
	},
	.probe = c_mdev_dma_probe,
	.remove = c_mdev_dma_remove,
};

static struct mdev_type c_mdev_dma_type = {
	.sysfs_name = RUST_MDEV_DMA_TYPE,
	.pretty_name = "Measuring stick",
};

static struct mdev_type *c_mdev_dma_types[] = { &c_mdev_dma_type };
static struct mdev_parent c_mdev_dma_mdev_parent;
static const struct class c_mdev_dma_class = { .name = NAME };
static struct device *c_mdev_dma_parent;

static int __init c_mdev_dma_module_init(void)
{
	int ret;

	ret = class_register(&c_mdev_dma_class);
	if (ret)
		return ret;
	c_mdev_dma_parent = device_create(&c_mdev_dma_class, NULL, 0, NULL, NAME);
	ret = PTR_ERR_OR_ZERO(c_mdev_dma_parent);
	if (ret)
		goto err_class;
	ret = mdev_register_driver(&c_mdev_dma_driver);
	if (ret)
		goto err_device;
	ret = mdev_register_parent(&c_mdev_dma_mdev_parent, c_mdev_dma_parent,
				   &c_mdev_dma_driver, c_mdev_dma_types,
				   ARRAY_SIZE(c_mdev_dma_types));
	if (ret)
		goto err_driver;
	return 0;

err_driver:
	mdev_unregister_driver(&c_mdev_dma_driver);
err_device:
	device_unregister(c_mdev_dma_parent);
err_class:
	class_unregister(&c_mdev_dma_class);
	return ret;
}

static void __exit c_mdev_dma_module_exit(void)
{
	mdev_unregister_parent(&c_mdev_dma_mdev_parent);
	mdev_unregister_driver(&c_mdev_dma_driver);
	device_unregister(c_mdev_dma_parent);
	class_unregister(&c_mdev_dma_class);
}

module_init(c_mdev_dma_module_init)
module_exit(c_mdev_dma_module_exit)

MODULE_DESCRIPTION("Mediated device to measure rust_mdev_dma by");
MODULE_AUTHOR("rust-mdev-dma developers");
MODULE_LICENSE("GPL");
