// SPDX-License-Identifier: GPL-2.0
/*
 * A mediated device in C with the commands of rust_mdev_dma, for kernels that the latter
 * can't be built for: without CONFIG_RUST, or with other Rust interfaces. It is also what
 * "dirtyscope bench" measures rust_mdev_dma by. Registers, order of checks, and how
 * commands are split are those of include/uapi/linux/rust_mdev_dma.h.
 *
 * It has PIN to DMA_READ, reset, iommufd, and several devices. Not implemented:
 * configuration space, interrupts (IRQ_STATUS is kept), the generator (EOPNOTSUPP),
 * migration, logging, raw pins. Userspace sees that in OPS, VFIO_DEVICE_GET_INFO,
 * VFIO_DEVICE_FEATURE, and that error. A command in the BACKGROUND is run by a kernel
 * thread, but has completed when the write to COMMAND returns.
 */
#include <linux/completion.h>
#include <linux/kthread.h>
#include <linux/mdev.h>
#include <linux/module.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/uaccess.h>
#include "c_mdev_dma.h"

#define NAME		"c_mdev_dma"
/* The default of rust_mdev_dma. */
#define MAX_INSTANCES	16

#define to_dev(device)	container_of(device, struct c_mdev_dma, vdev)

/* The offset of an access in the BAR, or an errno. */
static int bar_offset(size_t count, loff_t pos)
{
	u64 offset = pos - ((u64)VFIO_PCI_BAR0_REGION_INDEX << RUST_MDEV_DMA_REGION_SHIFT);

	if (!is_power_of_2(count) || count > sizeof(u64) || !IS_ALIGNED(offset, count) ||
	    offset >= RUST_MDEV_DMA_BAR_SIZE)
		return -EINVAL;
	return offset;
}

/* Whether a write to the byte there changes it to what is written. */
static bool writable(int offset)
{
	return (offset >= RUST_MDEV_DMA_REG_IOVA && offset < RUST_MDEV_DMA_REG_STATUS) ||
	       (offset >= RUST_MDEV_DMA_REG_IRQ_ENABLE &&
		offset < RUST_MDEV_DMA_REG_IRQ_ENABLE + sizeof(__le32)) ||
	       (offset >= RUST_MDEV_DMA_REG_GEN_IOVA && offset < RUST_MDEV_DMA_REG_GEN_STATUS);
}

/* Writes to the BAR what may be written. */
static void write_bar(struct c_mdev_dma *dev, int offset, const u8 *bytes, size_t count)
{
	size_t i, j, size = min(count, sizeof(__le32));

	/* Words of 32 bits are writable as a whole or not at all. */
	for (i = 0; i < count; i += size) {
		int at = offset + i;

		if (writable(at))
			memcpy(dev->bar + at, bytes + i, size);
		else if (ALIGN_DOWN(at, sizeof(__le32)) == RUST_MDEV_DMA_REG_IRQ_STATUS)
			for (j = 0; j < size; j++)
				dev->bar[at + j] &= ~bytes[i + j];
	}
}

/* A command that a kernel thread runs. */
struct background {
	struct c_mdev_dma *dev;
	struct outcome *outcome;
	/* From then on the thread can be killed. */
	struct completion started;
	struct completion done;
};

static int run_in_background(void *data)
{
	struct background *this = data;
	int ret;

	allow_signal(SIGKILL);
	complete(&this->started);
	ret = c_mdev_dma_run(this->dev, this->outcome);
	complete(&this->done);
	return ret;
}

/*
 * Has a kernel thread run the command, and waits for it. It may wait for memory that the
 * very process serves that waits here: when that is killed, so is the thread.
 */
static int run_by_thread(struct c_mdev_dma *dev, struct outcome *outcome)
{
	struct background this = { .dev = dev, .outcome = outcome };
	struct task_struct *thread;
	int ret;

	init_completion(&this.started);
	init_completion(&this.done);
	thread = kthread_create(run_in_background, &this, NAME);
	if (IS_ERR(thread))
		return PTR_ERR(thread);
	get_task_struct(thread);
	wake_up_process(thread);
	wait_for_completion(&this.started);
	if (wait_for_completion_killable(&this.done))
		send_sig(SIGKILL, thread, 1);
	ret = kthread_stop(thread);
	put_task_struct(thread);
	return ret;
}

/* Runs a command, and shows how it ended. */
static void doorbell(struct c_mdev_dma *dev)
{
	u32 command = le32_to_cpup(reg32(dev, RUST_MDEV_DMA_REG_COMMAND));
	struct outcome outcome = {};
	int ret;

	if (command & RUST_MDEV_DMA_COMMAND_BACKGROUND)
		ret = run_by_thread(dev, &outcome);
	else
		ret = c_mdev_dma_run(dev, &outcome);
	*reg32(dev, RUST_MDEV_DMA_REG_STATUS) = cpu_to_le32(-ret);
	*reg64(dev, RUST_MDEV_DMA_REG_COUNT) = cpu_to_le64(outcome.count);
	*reg64(dev, RUST_MDEV_DMA_REG_DIGEST) = cpu_to_le64(outcome.digest);
	*reg32(dev, RUST_MDEV_DMA_REG_IRQ_STATUS) |= cpu_to_le32(RUST_MDEV_DMA_IRQ_COMMAND);
}

static ssize_t c_mdev_dma_read(struct vfio_device *vdev, char __user *buf,
			       size_t count, loff_t *ppos)
{
	struct c_mdev_dma *dev = to_dev(vdev);
	int offset = bar_offset(count, *ppos);
	u8 bytes[8];

	if (offset < 0)
		return offset;
	if (mutex_lock_killable(&dev->lock))
		return -EINTR;
	if (ALIGN_DOWN(offset, (int)sizeof(__le64)) == RUST_MDEV_DMA_REG_PINS)
		*reg64(dev, RUST_MDEV_DMA_REG_PINS) = cpu_to_le64(dev->held);
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

	if (offset < 0)
		return offset;
	if (copy_from_user(bytes, buf, count))
		return -EFAULT;
	if (mutex_lock_killable(&dev->lock))
		return -EINTR;
	write_bar(dev, offset, bytes, count);
	if (offset == RUST_MDEV_DMA_REG_COMMAND)
		doorbell(dev);
	if (offset == RUST_MDEV_DMA_REG_GEN_CONTROL)
		*reg32(dev, RUST_MDEV_DMA_REG_GEN_STATUS) = cpu_to_le32(EOPNOTSUPP);
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

static void c_mdev_dma_unmap(struct vfio_device *vdev, u64 iova, u64 length)
{
	struct c_mdev_dma *dev = to_dev(vdev);

	mutex_lock(&dev->lock);
	c_mdev_dma_revoke(dev, iova, length);
	mutex_unlock(&dev->lock);
}

static void reset_registers(struct c_mdev_dma *dev)
{
	memset(dev->bar, 0, sizeof(dev->bar));
	*reg32(dev, RUST_MDEV_DMA_REG_MAGIC) = cpu_to_le32(RUST_MDEV_DMA_MAGIC);
	*reg32(dev, RUST_MDEV_DMA_REG_VERSION) = cpu_to_le32(RUST_MDEV_DMA_VERSION);
	*reg32(dev, RUST_MDEV_DMA_REG_OPS) = cpu_to_le32(OPS);
	*reg32(dev, RUST_MDEV_DMA_REG_PAGE_SIZE) = cpu_to_le32(PAGE_SIZE);
	*reg64(dev, RUST_MDEV_DMA_REG_MAX_PINS) = cpu_to_le64(MAX_PINS);
	*reg64(dev, RUST_MDEV_DMA_REG_MAX_LENGTH) = cpu_to_le64(MAX_LENGTH);
}

static long get_info(unsigned long arg)
{
	struct vfio_device_info info;
	size_t size = offsetofend(struct vfio_device_info, num_irqs);

	if (copy_from_user(&info, (void __user *)arg, size))
		return -EFAULT;
	if (info.argsz < size)
		return -EINVAL;
	info.flags = VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET;
	info.num_regions = VFIO_PCI_BAR0_REGION_INDEX + 1;
	info.num_irqs = 0;
	return copy_to_user((void __user *)arg, &info, size) ? -EFAULT : 0;
}

#ifndef HAS_REGION_INFO_CAPS
static long get_region_info(struct vfio_device *vdev, unsigned long arg)
{
	struct vfio_region_info info;
	size_t size = offsetofend(struct vfio_region_info, offset);
	long ret;

	if (copy_from_user(&info, (void __user *)arg, size))
		return -EFAULT;
	ret = info.argsz < size ? -EINVAL : c_mdev_dma_region_info(vdev, &info, NULL);
	if (ret)
		return ret;
	return copy_to_user((void __user *)arg, &info, size) ? -EFAULT : 0;
}
#endif

static long c_mdev_dma_ioctl(struct vfio_device *vdev, unsigned int cmd, unsigned long arg)
{
	struct c_mdev_dma *dev = to_dev(vdev);

	switch (cmd) {
	case VFIO_DEVICE_GET_INFO:
		return get_info(arg);
#ifndef HAS_REGION_INFO_CAPS
	case VFIO_DEVICE_GET_REGION_INFO:
		return get_region_info(vdev, arg);
#endif
	case VFIO_DEVICE_RESET:
		if (mutex_lock_killable(&dev->lock))
			return -EINTR;
		c_mdev_dma_revoke(dev, 0, U64_MAX);
		reset_registers(dev);
		mutex_unlock(&dev->lock);
		return 0;
	default:
		return -ENOTTY;
	}
}

static int c_mdev_dma_open(struct vfio_device *vdev)
{
	reset_registers(to_dev(vdev));
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
	.ioctl = c_mdev_dma_ioctl,
#ifdef HAS_REGION_INFO_CAPS
	.get_region_info_caps = c_mdev_dma_region_info,
#endif
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
	.max_instances = MAX_INSTANCES,
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
	.pretty_name = "DMA on command, in C",
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

MODULE_DESCRIPTION("Mediated device that does DMA on command, in C");
MODULE_AUTHOR("rust-mdev-dma developers");
MODULE_LICENSE("GPL");
