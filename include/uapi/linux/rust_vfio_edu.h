/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * Programming interface of rust_vfio_edu, a VFIO driver of QEMU's edu device, for
 * tests of VFIO and nothing else: the device has an IOMMU and pins pages
 * nevertheless, by which type1 promotes its group.
 *
 * Region 0 of the device, the only one, has the registers of rust_mdev_dma, see
 * rust_mdev_dma.h, with these differences:
 *
 * The operations are PIN, UNPIN, WRITE and READ. BACKGROUND and a write to
 * GEN_CONTROL fail with EOPNOTSUPP, in STATUS and GEN_STATUS. There are no
 * interrupts, no migration, and neither configuration space nor the device's own BAR.
 *
 * WRITE and READ are DMA by the device's engine, through the IOMMU, to and from the
 * IOVAs of the command. The engine copies between memory and a buffer of the device,
 * which nothing else reaches. So each page of a command, or part of a page, makes a
 * round trip: the CPU stores the pattern (for WRITE) or leaves what is there (for
 * READ), the engine loads it into the buffer, the CPU inverts every byte, and the
 * engine stores the buffer where it came from. What is there then came by DMA, or
 * the command fails with EIO. It follows that READ writes as well, and that the user
 * must leave the range alone until the command has ended.
 *
 * A transfer takes 100 ms, so a command 200 ms for each page. dma_unmap waits for it.
 *
 * STATUS may also be, after rust_mdev_dma's own checks:
 *
 *	EOVERFLOW	WRITE or READ beyond the addresses that the device has, by the
 *			module parameter address_bits
 *	EINTR		a signal ended WRITE or READ between two pages
 *	EIO		the engine doesn't end, or memory is not what it should be
 *
 * After these, COUNT is the number of bytes before the failure. When the engine
 * doesn't end, DMA stays off until the device is reset or opened again.
 */
#ifndef _UAPI_LINUX_RUST_VFIO_EDU_H
#define _UAPI_LINUX_RUST_VFIO_EDU_H

/* Name of the module, and of the driver that driver_override has to name. */
#define RUST_VFIO_EDU_NAME		"rust_vfio_edu"

/* QEMU's edu device. */
#define RUST_VFIO_EDU_PCI_VENDOR_ID	0x1234
#define RUST_VFIO_EDU_PCI_DEVICE_ID	0x11e8

#endif /* _UAPI_LINUX_RUST_VFIO_EDU_H */
